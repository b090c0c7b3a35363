"""The one model in memory, owned by a worker thread (core.model.worker): pages hand it work and look at how far it is.

The model is loaded with the first job. Everything that touches it, its adapters or its SAEs runs in that thread.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import streamlit as st
from streamlit.runtime import exists, get_instance
from streamlit.runtime.scriptrunner import get_script_run_ctx

from core.conversations import Conversation, Message, token_texts, tokenize
from core.directions import Direction
from core.errors import MicroscopeError
from core.specs import Experiment
from core.view.session.messages import stop_with

#: Seconds without its browser after which a session's jobs are given up; a reconnecting browser is back sooner.
GRACE = 8.0


@dataclass(eq=False)
class Held:
    """An experiment's model with what belongs to it, read once. Adapters and SAEs are the worker's thread's alone."""

    experiment: Experiment
    worker: Any
    """core.model.worker.Worker"""
    adapters: dict[str, Any] = field(default_factory=dict)
    saes: dict[int, Any] = field(default_factory=dict)

    def adapter(self, loaded: Any, variant: str) -> Any:
        """The adapter of `variant`; None for base."""
        from core.store.prepare import adapter_for

        if variant not in self.adapters:
            self.adapters[variant] = adapter_for(self.experiment, variant, loaded)
        return self.adapters[variant]

    def sae(self, loaded: Any, layer: int) -> Any:
        """The SAE at `layer`; None where there is none."""
        from core.store.prepare import saes_for

        if layer not in self.saes:
            self.saes[layer] = saes_for(self.experiment, [layer], loaded).get(layer)
        return self.saes[layer]


@dataclass(frozen=True)
class ReadText:
    """A text as the model read it."""

    tokens: tuple[str, ...]
    values: np.ndarray
    """float32 [n]: projection on the direction, in residual units."""
    faint: tuple[bool, ...]
    """Prompt or template."""


def held(experiment: Experiment) -> Held:
    """The experiment's worker, started but idle until its first job."""
    return _held(experiment)


def _retire(given: Held) -> None:
    """Close the worker of another experiment once its jobs are over, so that no session loses one."""

    def wait() -> None:
        while (status := given.worker.status()).n_running + status.n_waiting:
            time.sleep(0.5)
        given.worker.close()
        gc.unfreeze()

    threading.Thread(target=wait, name="retire", daemon=True).start()


@st.cache_resource(max_entries=1, show_spinner=False, on_release=_retire)
def _held(experiment: Experiment) -> Held:
    from core.model.worker import Worker  # torch and transformers take seconds
    from core.store import prepare

    def load() -> Any:
        loaded = prepare.model_for(experiment)
        # Streamlit collects garbage after every run of a page, which with all that torch brings holds Python's lock
        # for half a second; what is here now will stay, so the collector need not look at it.
        gc.collect()
        gc.freeze()
        return loaded

    return Held(experiment, Worker(load))


def owner() -> str:
    """What the worker calls this browser session."""
    context = get_script_run_ctx()
    return context.session_id if context else ""


def presence(session: str) -> Callable[[], bool]:
    """Whether a browser session is still there, for a job that ends with it. Callable from any thread."""
    seen = time.monotonic()

    def alive() -> bool:
        nonlocal seen
        if not session or not exists() or get_instance().is_active_session(session):
            seen = time.monotonic()
        return time.monotonic() - seen < GRACE

    return alive


def read_text(experiment: Experiment, variant: str, question: str, answer: str, direction: Direction) -> ReadText:
    """A question and its answer in the chat template, or without a question plain text, projected on `direction`."""
    found = held(experiment)

    def work(loaded: Any):
        from core.model.reading import project

        tokenizer = loaded.tokenizer
        if question.strip():
            messages = (Message("user", question), Message("assistant", answer))
            item = tokenize(tokenizer, Conversation("text", "text", "", "", messages))
            ids, faint = item.ids, [not item.start <= i < item.end for i in range(len(item.ids))]
        else:
            ids = np.asarray(tokenizer(answer)["input_ids"], dtype=np.int64)
            faint = [False] * len(ids)
        values = project(loaded, ids, direction, found.adapter(loaded, variant))
        yield ReadText(tuple(token_texts(tokenizer, ids.tolist())), values, tuple(faint))

    job = found.worker.run(work, owner=owner(), alive=presence(owner()))
    job.wait()
    if job.error:
        stop_with(MicroscopeError(job.error))
    return job.latest
