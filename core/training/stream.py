"""Conversation files -> a stream of residuals on disk, to train SAEs on. Resumes where a killed run stopped.

Keeps the tokens an SAE will later read: responses, user turns (once for each distinct prompt) and the last prompt
token. Leaves out template tokens and attention sinks. Splits by prompt, so held-out text shares no prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.progress import Progress

from core.conversations import RESPONSE, USER, Conversation, TokenizedConversation, load_conversations, tokenize
from core.errors import CacheMismatch, SpanError
from core.model.batches import outliers, pad, pad_id, plan_batches
from core.model.hooks import resid_post
from core.model.loading import LoadedModel
from core.paths import write_json

SPLITS = ("train", "heldout")

#: Conversations between two notes of how far the work is.
CHUNK = 256


@dataclass(frozen=True)
class StreamSpec:
    """What decides the contents of a stream."""

    files: tuple[str, ...]
    first: tuple[str, ...]
    """Files whose conversations are always read, before the shuffled rest."""
    layers: tuple[int, ...]
    max_tokens: int
    """Stop once the training split holds this many tokens."""
    max_length: int = 512
    """Longer conversations are cut to this many tokens."""
    heldout_share: float = 0.05
    batch_tokens: int = 2048
    seed: int = 0


@dataclass(frozen=True)
class Stream:
    """Residuals float16 [n_tokens, d_model] of each split and layer, memory-mapped."""

    folder: Path
    d_model: int
    n_tokens: dict[str, int]
    sources: dict[str, int]
    """Tokens by source file, both splits."""

    def residuals(self, split: str, layer: int) -> np.ndarray:
        path = self.folder / f"{split}.{layer}.f16"
        return np.memmap(path, dtype=np.float16, mode="r", shape=(self.n_tokens[split], self.d_model))


def is_heldout(prompt_id: str, share: float, seed: int = 0) -> bool:
    """A stable coin for each prompt."""
    digest = hashlib.sha256(f"{seed}:{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def prompt_key(conversation: Conversation) -> str:
    return hashlib.sha256("\n".join(m.content for m in conversation.prompt).encode()).hexdigest()


def _choose(spec: StreamSpec) -> list[Conversation]:
    """`first` files whole, then all others in one seeded shuffle."""
    firsts = [c for path in spec.first for c in load_conversations(path, skip_bad=True).conversations]
    rest = [c for path in spec.files for c in load_conversations(path, skip_bad=True).conversations]
    order = np.random.default_rng(spec.seed).permutation(len(rest))
    return [*firsts, *(rest[i] for i in order)]


def _kept(item: TokenizedConversation, length: int, seen: set[str]) -> np.ndarray:
    """Positions that go into the stream, bool [length]."""
    keep = item.roles[:length] == RESPONSE
    key = prompt_key(item.conversation)
    if key not in seen:
        keep |= item.roles[:length] == USER
        seen.add(key)
    if item.last_prompt < length:
        keep[item.last_prompt] = True
    return keep


def collect(loaded: LoadedModel, spec: StreamSpec, folder: Path) -> Stream:
    """Run the conversations through the model and append their residuals to `folder`; resumes after a kill."""
    folder.mkdir(parents=True, exist_ok=True)
    state_path = folder / "state.json"
    wanted = json.loads(json.dumps({**asdict(spec), "weights": loaded.weights_hash}))
    state = {"spec": wanted, "conversations": 0, "tokens": dict.fromkeys(SPLITS, 0), "sources": {}, "done": False}
    if state_path.is_file():
        state = json.loads(state_path.read_text())
        if state["spec"] != wanted:
            raise CacheMismatch(folder, "stream spec", wanted, state["spec"])
    _truncate(folder, spec.layers, state["tokens"], loaded.d_model)

    conversations = _choose(spec)
    seen = {prompt_key(c) for c in conversations[: state["conversations"]]}
    with Progress() as progress:
        bar = progress.add_task("residuals", total=spec.max_tokens, completed=state["tokens"]["train"])
        while not state["done"]:
            begin = state["conversations"]
            part = conversations[begin : begin + CHUNK]
            if not part or state["tokens"]["train"] >= spec.max_tokens:
                state["done"] = True
            else:
                _append(loaded, spec, folder, part, seen, state)
                state["conversations"] = begin + len(part)
            write_json(state_path, state)
            progress.update(bar, completed=min(state["tokens"]["train"], spec.max_tokens))
    return Stream(folder, loaded.d_model, state["tokens"], state["sources"])


def _truncate(folder: Path, layers: Iterable[int], tokens: dict[str, int], d_model: int) -> None:
    """Drop what was written after the last recorded chunk."""
    for split in SPLITS:
        for layer in layers:
            with open(folder / f"{split}.{layer}.f16", "ab") as file:
                file.truncate(tokens[split] * d_model * 2)


def _append(
    loaded: LoadedModel,
    spec: StreamSpec,
    folder: Path,
    part: Sequence[Conversation],
    seen: set[str],
    state: dict,
) -> None:
    items = []
    for conversation in part:
        try:
            items.append(tokenize(loaded.tokenizer, conversation))
        except SpanError:
            continue  # text that the template cannot render as it is written is no training text
    rows = [item.ids[: spec.max_length] for item in items]
    kept = [_kept(item, len(row), seen) for item, row in zip(items, rows, strict=True)]
    heldout = [is_heldout(prompt_key(item.conversation), spec.heldout_share, spec.seed) for item in items]
    for batch in plan_batches([len(row) for row in rows], spec.batch_tokens):
        ids, mask = pad([rows[i] for i in batch], pad_id(loaded.tokenizer), loaded.device)
        resid = resid_post(loaded, ids, mask, spec.layers)
        keep = np.zeros(mask.shape, dtype=bool)
        for n, i in enumerate(batch):
            keep[n, : len(rows[i])] = kept[i]
        for layer in spec.layers:  # one set of tokens for every layer
            keep &= ~outliers(resid[layer], mask).cpu().numpy()
        for split in SPLITS:
            side = keep & np.array([(split == "heldout") == heldout[i] for i in batch])[:, None]
            for layer in spec.layers:
                with open(folder / f"{split}.{layer}.f16", "ab") as file:
                    file.write(resid[layer][side].half().cpu().numpy().tobytes())
            state["tokens"][split] += int(side.sum())
        for n, i in enumerate(batch):
            source = items[i].conversation.source.split("/")[0]
            state["sources"][source] = state["sources"].get(source, 0) + int(keep[n].sum())
