"""What goes into a generation and what comes out: a row, how far it has come, and how far all have. Frozen data.

Knows how a prompt becomes token ids; the decode loop itself is core.model.generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from core.conversations import Message, render
from core.model.dice import PLAIN, Sampling
from core.model.features import Feature
from core.model.interventions import (
    AblateDirection,
    AddDirection,
    ClampFeature,
    Intervention,
    ScaleFeature,
    variant_of,
)
from core.model.loading import LoadedModel
from core.model.probes import Probe
from core.model.traces import LoraTrace, Trace

Stopped = Literal["", "end", "length", "cancelled", "failed"]
"""Why a row stopped: the model ended its turn, it was cut, someone stopped it, or it failed; empty: it runs."""


@dataclass(frozen=True, eq=False)
class Row:
    """What one row of a batch is asked, and what is done to the model while it answers."""

    prompt: str | Sequence[Message] | np.ndarray
    """One user message, a conversation to go on with, or token ids int64 [n]."""
    interventions: tuple[Intervention, ...] = ()
    seed: int = 0
    sampling: Sampling = PLAIN
    name: str = ""

    @property
    def variant(self) -> str:
        return variant_of(self.interventions)

    @property
    def problem(self) -> str:
        """Why the row cannot run; empty when it can."""
        return "; ".join(i.problem for i in self.interventions if i.problem)

    def prompt_ids(self, loaded: LoadedModel) -> np.ndarray:
        """int64 [n]"""
        if isinstance(self.prompt, np.ndarray):
            return self.prompt.astype(np.int64)
        messages = (Message("user", self.prompt),) if isinstance(self.prompt, str) else tuple(self.prompt)
        return prompt_ids(loaded, messages)


@dataclass(frozen=True, eq=False)
class Answer:
    """How far a row has come; unchanging."""

    row: Row
    prompt_ids: np.ndarray = field(repr=False)
    """int64 [n_prompt]"""
    ids: np.ndarray = field(repr=False)
    """int64 [n_tokens]: new tokens, without the one that ended the turn."""
    pieces: tuple[str, ...] = field(repr=False)
    """What each token added to the text; empty where it only began a character."""
    stopped: Stopped
    reason: str
    """A sentence when it failed; else empty."""
    traces: tuple[Trace, ...] = field(repr=False)
    """One for each probe."""
    lora: tuple[LoraTrace, ...] = field(repr=False)
    """One for each active adapter of this row, when `lora_scalars` was asked for."""

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def n_tokens(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Snapshot:
    """How far a generation has come; unchanging."""

    answers: tuple[Answer, ...]
    seconds: float
    """Since it was made, up to its last step."""
    first_token_seconds: float | None
    """From being made to the first token; None before that."""

    @property
    def running(self) -> bool:
        return any(not answer.stopped for answer in self.answers)

    @property
    def n_tokens(self) -> int:
        return sum(answer.n_tokens for answer in self.answers)

    @property
    def tokens_per_second(self) -> float:
        return self.n_tokens / self.seconds if self.seconds else 0.0


def default_probes(rows: Sequence[Row]) -> tuple[Probe, ...]:
    """The directions and features that the rows' interventions use, each once, in their order."""
    found: dict[object, Probe] = {}
    for item in (i for row in rows for i in row.interventions if not i.problem):
        if isinstance(item, (AddDirection, AblateDirection)):
            found.setdefault(id(item.direction), item.direction)
        elif isinstance(item, (ClampFeature, ScaleFeature)):
            found.setdefault((item.sae.hash, item.feature), Feature(item.sae, item.feature))
    return tuple(found.values())


def prompt_ids(loaded: LoadedModel, messages: Sequence[Message]) -> np.ndarray:
    """Token ids [n] of the chat template up to where the assistant begins to speak."""
    text = render(loaded.tokenizer, messages, add_generation_prompt=True)
    return np.asarray(loaded.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
