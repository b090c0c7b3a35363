"""One decode loop over rows that share the weights but neither interventions, seeds nor sampling settings.

    rows = [
        Row("I have a headache.", name="base"),
        Row("I have a headache.", (AddDirection(direction, 0.5),), name="base, steered"),
        Row("I have a headache.", (ApplyLora(adapter),), name="fine-tuned"),
        Row("I have a headache.", (ApplyLora(adapter), AblateDirection(direction)), name="fine-tuned, ablated"),
    ]
    generation = Generation(loaded, rows)
    while generation.step():              # one forward pass, one token a running row; hooks are there only inside
        generation.snapshot()             # from any thread, at any time
    generation.cancel()                   # from any thread; acts before the next step
    generation.snapshot().answers[1].text

A row stops by itself (its turn ends, `max_new_tokens`, cancelled, or failed with a reason) and leaves the batch; the
others go on as if it had never been there. Several generations over one model may take turns, step by step, in one
thread (core.model.worker does so): each has its own KV cache and its hooks leave with the step. `generate` runs prompts
to their end in one call.

`probes` are read in every row, so that steered and unsteered panes show the same traces; by default they are the
directions and features that any row uses. Knows neither files nor what is asked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from core.errors import InterventionError
from core.model.batches import pad_id
from core.model.detokenize import Detokenizer
from core.model.dice import PLAIN, Sampling, choose
from core.model.features import Feature
from core.model.interventions import ApplyLora
from core.model.loading import LoadedModel, text_config
from core.model.probes import Probe
from core.model.rows import Answer, Row, Snapshot, Stopped, default_probes, prompt_ids
from core.model.scopes import positions_of
from core.model.steering import Readings, Steering
from core.model.traces import LoraTrace, Trace

__all__ = ["Answer", "Generated", "Generation", "Row", "Sampling", "Snapshot", "generate", "prompt_ids", "stop_ids"]


@dataclass(frozen=True)
class Generated:
    """One prompt's answer, as `generate` gives it."""

    ids: np.ndarray
    """int64 [n]: new tokens, without the one that ended the turn."""
    ended: bool
    """Whether the model ended its turn, rather than being cut at `max_new_tokens`."""


@dataclass(eq=False)
class _State:
    """A row on its way."""

    row: Row
    prompt: np.ndarray
    die: torch.Generator
    text: Detokenizer
    ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    stopped: Stopped = ""
    reason: str = ""
    cancelled: bool = False
    probes: list[np.ndarray] = field(default_factory=list)
    """[positions, probe], a step each"""
    lora: list[tuple[int, list[np.ndarray | None]]] = field(default_factory=list)
    """a step each: how many positions; for each adapter [positions, scalar], None where it did not act"""

    def stop(self, why: Stopped, reason: str = "") -> None:
        self.stopped, self.reason = why, reason
        if self.pieces:
            self.pieces[-1] += self.text.close()


class Generation:
    """Rows on their way, one token a `step`. Step from one thread; `snapshot` and `cancel` from any."""

    def __init__(
        self,
        loaded: LoadedModel,
        rows: Sequence[Row],
        *,
        probes: Sequence[Probe] | None = None,
        lora_scalars: bool = False,
        stops: Sequence[int] | None = None,
    ) -> None:
        """probes: what to read in every row; None: what any row's interventions use. stops: tokens that end a turn;
        None: the model's own.

        Raises a `MicroscopeError` when a prompt or an intervention does not fit the model. A row whose strengths are
        impossible does not raise: it is stopped from the start, with its reason.
        """
        if not rows:
            raise InterventionError("There is no row to generate; give at least one prompt.")
        self._loaded, self._lock, self._made = loaded, threading.Lock(), time.perf_counter()
        self._seconds, self._first = 0.0, None
        self.probes = default_probes(rows) if probes is None else tuple(probes)
        self._lora_scalars = lora_scalars
        self._limit = getattr(text_config(loaded.model.config), "max_position_embeddings", None) or 2**31
        self._stops = torch.tensor(stop_ids(loaded) if stops is None else stops, device=loaded.device)
        self._states = [
            _State(row, row.prompt_ids(loaded), torch.Generator().manual_seed(row.seed), Detokenizer(loaded.tokenizer))
            for row in rows
        ]
        for state in self._states:
            if len(state.prompt) == 0 or len(state.prompt) >= self._limit:
                raise InterventionError(
                    f"A prompt has {len(state.prompt)} tokens; {loaded.spec.id} reads 1 to {self._limit - 1}."
                )
            if state.row.problem:
                state.stop("failed", f"It was not run: {state.row.problem}.")
        self._running = [state for state in self._states if not state.stopped]
        prompts = [state.prompt for state in self._running]
        self._steering = Steering(
            loaded, [state.row.interventions for state in self._running], [len(p) for p in prompts], self.probes,
            lora_scalars=lora_scalars,
        )  # fmt: skip
        self._cache: DynamicCache | None = DynamicCache(config=loaded.model.config)
        if prompts:
            self._ids, self._mask = _left_pad(prompts, pad_id(loaded.tokenizer), loaded.device)
            self._positions = positions_of(self._mask)

    @property
    def rows(self) -> tuple[Row, ...]:
        return tuple(state.row for state in self._states)

    @property
    def n_running(self) -> int:
        return len(self._running)

    @property
    def finished(self) -> bool:
        return not self._running

    def cancel(self, row: int | None = None) -> None:
        """Stop one row, or all, before the next step. From any thread."""
        with self._lock:
            for state in self._states if row is None else [self._states[row]]:
                state.cancelled = True

    @torch.inference_mode()
    def step(self) -> bool:
        """One token more for every running row; whether any row runs on.

        An error of the model stops every row with its reason and is raised.
        """
        self._drop_cancelled()
        if not self._running:
            return False
        try:
            with self._steering.during(self._positions):
                logits = self._loaded.model(
                    input_ids=self._ids, attention_mask=self._mask, position_ids=self._positions.clamp(min=0),
                    past_key_values=self._cache, use_cache=True, logits_to_keep=1,
                ).logits[:, -1].float()  # fmt: skip
            problems = {n: "The model's logits are no longer finite numbers." for n in _not_finite(logits)}
            problems |= {n: f"{why[0].upper()}{why[1:]}." for n, why in self._steering.broken().items()}
            if problems:
                logits = logits.clone()
                logits[list(problems)] = 0.0
            running = self._running
            chosen = choose(
                logits, [s.die for s in running], [s.row.sampling for s in running],
                [[*s.prompt.tolist(), *s.ids] if s.row.sampling.repetition_penalty != 1 else () for s in running],
            )  # fmt: skip
            self._note(chosen, problems, self._steering.readings())
            self._go_on(chosen)
        except BaseException as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._stop_all("failed", f"The model failed: {first}")
            raise
        return bool(self._running)

    def run(self) -> Snapshot:
        """All steps to the end."""
        while self.step():
            pass
        return self.snapshot()

    def snapshot(self) -> Snapshot:
        """How far every row has come. From any thread."""
        with self._lock:
            return Snapshot(tuple(self._answer(s) for s in self._states), self._seconds, self._first)

    def _note(self, chosen: Tensor, problems: dict[int, str], readings: Readings) -> None:
        """Take the chosen tokens and what was read into the rows' states."""
        stops = torch.isin(chosen, self._stops).tolist()
        probes = readings.probes.cpu().numpy() if self.probes else None
        lora = [scalars.cpu().numpy() for scalars in readings.lora] if self._lora_scalars else []
        width = self._positions.shape[1]
        padding = (self._positions < 0).sum(1).tolist()
        with self._lock:
            for n, (state, token) in enumerate(zip(self._running, chosen.tolist(), strict=True)):
                if n in problems:
                    state.stop("failed", problems[n])
                    continue
                if probes is not None:
                    state.probes.append(probes[n, padding[n] :])
                if lora:
                    read = [scalars[n, padding[n] :] if scalars.size else None for scalars in lora]
                    state.lora.append((width - padding[n], read))
                if stops[n]:
                    state.stop("end")
                    continue
                state.ids.append(token)
                state.pieces.append(state.text.push(token))
                if len(state.ids) == state.row.sampling.max_new_tokens:
                    state.stop("length")
                elif len(state.prompt) + len(state.ids) >= self._limit:
                    state.stop("length", f"The model reads at most {self._limit} tokens.")
            self._seconds = time.perf_counter() - self._made
            if self._first is None:
                self._first = self._seconds

    def _go_on(self, chosen: Tensor) -> None:
        """Let the stopped rows leave the batch and prepare the next forward pass."""
        self._keep([n for n, state in enumerate(self._running) if not state.stopped], chosen)
        if not self._running:
            return
        self._ids = self._ids[:, -1:]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._running), 1)], dim=1)
        self._positions = self._positions[:, -1:] + 1

    def _keep(self, going: list[int], last: Tensor | None) -> None:
        """Go on with these of the running rows; `last`: the token that each just said."""
        if last is not None:
            self._ids = last[:, None]
        if len(going) < len(self._running):
            self._running = [self._running[n] for n in going]
            if not going:
                self._release()
                return
            at = torch.tensor(going, device=self._loaded.device)
            if last is not None or self._cache.get_seq_length() > 0:
                self._cache.batch_select_indices(at)
            self._steering.keep(at)
            self._ids, self._mask, self._positions = self._ids[at], self._mask[at], self._positions[at]

    def _drop_cancelled(self) -> None:
        with self._lock:
            for state in self._running:
                if state.cancelled:
                    state.stop("cancelled")
        self._keep([n for n, state in enumerate(self._running) if not state.stopped], None)

    def _stop_all(self, why: Stopped, reason: str) -> None:
        with self._lock:
            for state in self._running:
                state.stop(why, reason)
            self._running = []
        self._release()

    def _release(self) -> None:
        self._cache = None

    def _answer(self, state: _State) -> Answer:
        n_prompt = len(state.prompt)
        probes = np.concatenate(state.probes) if state.probes else np.zeros((0, len(self.probes)), np.float32)
        traces = tuple(_trace(probe, n_prompt, probes[:, n]) for n, probe in enumerate(self.probes))
        lora = []
        if state.lora:
            own = {i.adapter.hash for i in state.row.interventions if isinstance(i, ApplyLora) and not i.nothing}
            for n, rows in enumerate(self._steering.loras):
                if rows.adapter.hash in own:
                    width = sum(len(m.A) for m in rows.adapter.modules)
                    steps = [_whole(count, read[n], width) for count, read in state.lora]
                    lora.append(LoraTrace(rows.adapter, n_prompt, np.concatenate(steps)))
        return Answer(
            state.row, state.prompt, np.asarray(state.ids, dtype=np.int64), tuple(state.pieces), state.stopped,
            state.reason, traces, tuple(lora),
        )  # fmt: skip


@torch.inference_mode()
def generate(
    loaded: LoadedModel,
    prompts: Sequence[np.ndarray],
    seeds: Sequence[int],
    sampling: Sampling = PLAIN,
    on_step: Callable[[int], None] = lambda n_running: None,
) -> list[Generated]:
    """Answers to `prompts` (token ids each), all in one batch, without interventions of rows' own.

    What is done to the model around the call (core.model.adapters.applied, core.model.steering.steered) acts on it.
    """
    rows = [Row(prompt, (), seed, sampling) for prompt, seed in zip(prompts, seeds, strict=True)]
    generation = Generation(loaded, rows, probes=())
    while running := generation.n_running:
        generation.step()
        on_step(running)
    return [Generated(a.ids, a.stopped == "end") for a in generation.snapshot().answers]


def stop_ids(loaded: LoadedModel) -> tuple[int, ...]:
    """Tokens that end a turn: the generation configuration's and the tokenizer's own."""
    configured = loaded.model.generation_config.eos_token_id
    many = configured if isinstance(configured, list) else [configured]
    return tuple({int(i) for i in (*many, loaded.tokenizer.eos_token_id) if i is not None})


def _left_pad(rows: Sequence[np.ndarray], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Left-padded ids and mask, int64 [batch, position]: every row's last token stands in the last column."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for n, row in enumerate(rows):
        ids[n, width - len(row) :] = torch.from_numpy(np.asarray(row, dtype=np.int64))
        mask[n, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


def _not_finite(logits: Tensor) -> list[int]:
    """Rows of logits [batch, vocabulary] that hold something else than finite numbers."""
    return (~torch.isfinite(logits.amax(-1))).nonzero().ravel().tolist()  # NaN passes through the maximum


def _trace(probe: Probe, n_prompt: int, values: np.ndarray) -> Trace:
    if isinstance(probe, Feature):
        name = f"layer {probe.layer}, feature {probe.feature}"
        return Trace(name, "feature", probe.layer, probe.feature, n_prompt, values)
    return Trace(probe.name, "projection", probe.layer, None, n_prompt, values)


def _whole(n_positions: int, scalars: np.ndarray | None, width: int) -> np.ndarray:
    """`scalars` [positions, width], or as many NaN where nothing was read."""
    return np.full((n_positions, width), np.nan, np.float32) if scalars is None else scalars
