"""The one model in memory, loaded when a page first needs it. Pages take turns with it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import streamlit as st

from core.conversations import Conversation, Message, token_texts, tokenize
from core.directions import Direction
from core.errors import MicroscopeError
from core.specs import Experiment
from core.view.session.messages import stop_with


@dataclass
class Model:
    """A loaded model, its adapters, and the lock that whoever runs it holds."""

    loaded: Any
    adapters: dict[str, Any] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class ReadText:
    """A text as the model read it."""

    tokens: tuple[str, ...]
    values: np.ndarray
    """float32 [n]: projection on the direction, in residual units."""
    faint: tuple[bool, ...]
    """Prompt or template."""


@contextmanager
def model(experiment: Experiment) -> Iterator[Model]:
    """The experiment's model, for this page alone within the block. Errors stop the page with one sentence."""
    try:
        held = _model(experiment)
    except MicroscopeError as error:
        stop_with(error)
    with held.lock:
        yield held


@st.cache_resource(max_entries=1, show_spinner="Loading the model, once")
def _model(experiment: Experiment) -> Model:
    from core.store.prepare import model_for  # torch and transformers take seconds

    return Model(model_for(experiment))


def adapter(held: Model, experiment: Experiment, variant: str) -> Any:
    """The adapter of `variant`, read once; None for base."""
    from core.store.prepare import adapter_for

    if variant not in held.adapters:
        held.adapters[variant] = adapter_for(experiment, variant, held.loaded)
    return held.adapters[variant]


def read_text(experiment: Experiment, variant: str, question: str, answer: str, direction: Direction) -> ReadText:
    """A question and its answer in the chat template, or without a question plain text, projected on `direction`."""
    from core.model.reading import project

    with model(experiment) as held:
        try:
            tokenizer = held.loaded.tokenizer
            if question.strip():
                messages = (Message("user", question), Message("assistant", answer))
                item = tokenize(tokenizer, Conversation("text", "text", "", "", messages))
                ids, faint = item.ids, [not item.start <= i < item.end for i in range(len(item.ids))]
            else:
                ids = np.asarray(tokenizer(answer)["input_ids"], dtype=np.int64)
                faint = [False] * len(ids)
            values = project(held.loaded, ids, direction, adapter(held, experiment, variant))
            return ReadText(tuple(token_texts(tokenizer, ids.tolist())), values, tuple(faint))
        except MicroscopeError as error:
            stop_with(error)
