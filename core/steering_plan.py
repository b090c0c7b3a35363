"""What a steered generation is asked to do, as plain data: panes that differ in weights, steering or dice.

A pane becomes a row of one batch (core.model.plan_rows); a plan is logged and read back (core.store.steering_log) and
written as code (core.view.steering_code). Names adapters and SAE features instead of holding them, so nothing here
needs a model or torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from core.conversations import Message
from core.directions import Direction, random_like


@dataclass(frozen=True, eq=False)
class Push:
    """A direction added to the residual stream at its layer."""

    direction: Direction = field(repr=False)
    strength: float
    """In mean residual norms; the stored vector's multiple where `raw`."""
    raw: bool = False

    @property
    def vector(self) -> np.ndarray:
        """float32 [d_model]: what is added."""
        if self.raw:
            return self.direction.vector * np.float32(self.strength)
        return self.direction.scaled_to(self.strength)


@dataclass(frozen=True)
class Hold:
    """An SAE feature whose activation is set to a value; the SAE's error is kept."""

    layer: int
    feature: int
    value: float
    """In the SAE's units."""


@dataclass(frozen=True, eq=False)
class Pane:
    """One row: who answers, what is done to it, and with which dice."""

    name: str
    variant: str = "base"
    """`base` or an adapter of the preset."""
    lora: float = 1.0
    """Strength of the variant's LoRA; nothing for base."""
    pushes: tuple[Push, ...] = ()
    holds: tuple[Hold, ...] = ()
    seed: int = 0
    messages: tuple[Message, ...] = ()
    """The conversation to go on with; ends with the user."""
    beside: int | None = None
    """Number of the pane that is this one unsteered, with the same weights and dice; None for such a pane itself."""

    @property
    def steered(self) -> bool:
        return bool(self.pushes or self.holds)

    @property
    def prompt(self) -> str:
        return self.messages[-1].content if self.messages else ""


@dataclass(frozen=True)
class Dice:
    """How tokens are chosen, alike in every pane (core.model.dice.Sampling has the meaning of each)."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 60
    repetition_penalty: float = 1.0


@dataclass(frozen=True, eq=False)
class Plan:
    """One press of the button."""

    preset: str
    panes: tuple[Pane, ...]
    dice: Dice = Dice()
    scope: str = "all"
    """Where pushes and holds act: all, prompt, response or first:N (core.model.scopes)."""
    probe: Direction | None = field(default=None, repr=False)
    """The direction whose projection is read at every token of every pane."""

    @property
    def prompt(self) -> str:
        return self.panes[0].prompt if self.panes else ""


def scaled(pushes: Sequence[Push], factor: float) -> tuple[Push, ...]:
    """The same pushes, `factor` times as strong; none at factor 0."""
    made = (replace(push, strength=push.strength * factor) for push in pushes)
    return tuple(push for push in made if push.strength)


def at_random(pushes: Sequence[Push], seed: int) -> tuple[Push, ...]:
    """The control: at each layer one push in a random direction, exactly as long as the sum of `pushes` there."""
    layers: dict[int, list[Push]] = {}
    for push in pushes:
        layers.setdefault(push.direction.layer, []).append(push)
    made = []
    for one in layers.values():
        total = np.sum([push.vector for push in one], axis=0, dtype=np.float64)
        if not total.any():
            continue
        names = " + ".join(push.direction.name for push in one)
        whole = replace(one[0].direction, name=names, vector=total)
        made.append(Push(random_like(whole, seed), 1.0, raw=True))
    return tuple(made)
