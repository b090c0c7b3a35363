"""Steered generations of this browser session: started, looked at while they run, kept, logged.

A generation belongs to the worker, not to the page: reruns, other widgets and other pages leave it alone, and closing
the tab ends it. What it said is kept as long as the session is.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import streamlit as st

from core.specs import Experiment
from core.steering_plan import Plan
from core.store.places import experiment_folder
from core.view.session.models import held, owner, presence

if TYPE_CHECKING:  # torch is imported with the first generation
    from core.model.rows import Snapshot

TURNS = "steering turns"
#: Generations kept in a session; the log keeps all.
MOST = 40
PACKAGES = ("torch", "transformers", "sae-lens")


@dataclass(eq=False)
class Turn:
    """One press of the button: its plan, and how far it has come. The worker's thread writes, pages read."""

    number: int
    plan: Plan
    job: Any = None
    generation: Any = None
    divergences: dict[int, np.ndarray] = field(default_factory=dict)
    """Pane -> float32 [n_tokens], nats: KL from the unsteered pane's predictions on the same text."""
    record: dict[str, Any] | None = None
    """What the log holds of it, once it is over."""
    problem: str = ""
    """Why it could not be logged; empty when it could."""

    @property
    def over(self) -> bool:
        return self.job.over

    @property
    def error(self) -> str:
        return self.job.error

    def snapshot(self) -> Snapshot | None:
        """How far every pane has come; None before the first token."""
        return self.generation.snapshot() if self.generation is not None else None

    def stop(self) -> None:
        """Stop all panes at the next token."""
        self.job.cancel()


def turns() -> list[Turn]:
    """This session's generations, oldest first."""
    return st.session_state.setdefault(TURNS, [])


def forget_turns() -> None:
    """In a callback: stop and forget all of this session's generations; the log keeps them."""
    for turn in turns():
        turn.stop()
    st.session_state[TURNS] = []


def start(experiment: Experiment, plan: Plan) -> Turn:
    """Hand a plan to the worker; returns at once. What goes wrong is the turn's `error`."""
    found, kept = held(experiment), turns()
    turn = Turn(kept[-1].number + 1 if kept else 1, plan)
    folder = experiment_folder(experiment)

    def work(loaded: Any):
        from core.model.divergence import divergence
        from core.model.generation import Generation
        from core.model.plan_rows import probes_of, rows_of

        def sae(layer: int) -> Any:
            return found.sae(loaded, layer)

        rows = rows_of(plan, lambda variant: found.adapter(loaded, variant), sae)
        turn.generation = Generation(loaded, rows, probes=probes_of(plan, sae))
        try:
            while turn.generation.step():
                yield
            answers = turn.generation.snapshot().answers
            for n, pane in enumerate(plan.panes):
                if pane.beside is not None and answers[n].stopped != "failed":
                    turn.divergences[n] = divergence(loaded, answers[n], rows[pane.beside].interventions)
                    yield
        finally:
            turn.generation.cancel()  # panes that still run when the job is given up say so
            turn.generation.step()
            _log(turn, found, loaded, folder)

    turn.job = found.worker.run(work, owner=owner(), alive=presence(owner()))
    kept.append(turn)
    running = [t for t in kept[:-MOST] if not t.over]
    st.session_state[TURNS] = running + kept[-MOST:]
    return turn


def queue(turn: Turn, experiment: Experiment) -> str:
    """What a turn that has not begun waits for, as a sentence; empty once it runs."""
    if turn.over or turn.snapshot() is not None:
        return ""
    status = held(experiment).worker.status()
    if turn.job.state == "waiting" and turn.job.ahead:
        return f"Waiting behind {turn.job.ahead} other generation{'s' if turn.job.ahead > 1 else ''}."
    return "Loading the model, once." if not status.loaded else "Waiting for its turn."


def busy(experiment: Experiment) -> tuple[int, int]:
    """(generations on their way, generations waiting), of all sessions."""
    status = held(experiment).worker.status()
    return status.n_running, status.n_waiting


def records(kept: Sequence[Turn]) -> list[dict[str, Any]]:
    """What the log holds of these generations."""
    return [turn.record for turn in kept if turn.record is not None]


def _log(turn: Turn, found: Any, loaded: Any, folder: Path) -> None:
    """In the worker's thread: one line more in the log."""
    from core.store import steering_log

    variants = {pane.variant for pane in turn.plan.panes}
    layers = {hold.layer for pane in turn.plan.panes for hold in pane.holds}
    made_by = {
        "model": loaded.spec.id, "weights": loaded.weights_hash, "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": str(loaded.device), "chat_template": loaded.template_hash,
        "adapters": {name: found.adapters[name].hash for name in sorted(variants) if found.adapters.get(name)},
        "saes": {str(layer): found.saes[layer].hash for layer in sorted(layers) if found.saes.get(layer)},
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    }  # fmt: skip
    kl = {n: round(float(nats.mean()), 5) for n, nats in turn.divergences.items() if len(nats)}
    try:
        files = steering_log.files_of(turn.plan, folder)
        answers = turn.generation.snapshot().answers
        turn.record = steering_log.record(turn.plan, files, answers, made_by, kl)
        steering_log.append(folder, turn.record)
    except (OSError, ValueError) as error:
        turn.problem = f"It could not be logged in {folder / 'steering'}: {error}."
