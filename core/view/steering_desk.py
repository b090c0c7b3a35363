"""The desk of the Steering page: channels with a strength, mute and solo each; and the panes that a setting asks for.

Pure: what sliders stand at goes in, the pushes and panes of a plan come out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from core.conversations import Message
from core.directions import Direction
from core.steering_plan import Hold, Pane, Push, at_random, scaled

#: How panes may differ.
MODES = {"strengths": "Strengths", "variants": "Fine-tuned", "seeds": "Seeds"}
#: Marks of a channel.
MUTE, SOLO = "M", "S"
#: Strengths of a pane, as multiples of what the sliders say, and how a pane of each is called.
FACTORS = {-1.0: "Reversed", -0.5: "Half, reversed", 0.0: "Unsteered", 0.5: "Half", 1.0: "Steered"}


@dataclass(frozen=True, eq=False)
class Channel:
    """One slider of the desk."""

    key: str
    """Part of its name in the URL."""
    name: str
    direction: Direction = field(repr=False)
    feature: int | None = None
    """The feature whose page explains it."""


def sounding(strengths: Mapping[str, float], marks: Mapping[str, Collection[str]]) -> list[str]:
    """Keys of the channels that act, in order: with any solo only those, never a muted one, never one at 0."""
    alone = {key for key in strengths if SOLO in marks.get(key, ())}
    return [
        key for key, strength in strengths.items()
        if strength and MUTE not in marks.get(key, ()) and (not alone or key in alone)
    ]  # fmt: skip


def pushes(
    channels: Sequence[Channel], strengths: Mapping[str, float], marks: Mapping[str, Collection[str]]
) -> tuple[Push, ...]:
    """What the desk adds to the residual stream."""
    by_key = {channel.key: channel for channel in channels}
    return tuple(Push(by_key[key].direction, strengths[key]) for key in sounding(strengths, marks) if key in by_key)


def spread(whole: Direction, parts: Sequence[Channel], strength: float) -> dict[str, float]:
    """Strengths at which `parts`, which sum to `whole`, add what the whole would at `strength`."""
    return {part.key: strength * part.direction.norm / whole.norm for part in parts}


def along(feature: int, row, of: Direction, name: str) -> Direction:
    """The decoder direction of a feature (`row` [d_model]) as a direction beside `of`."""
    return replace(of, name=name, vector=row, origin={"kind": "feature", "feature": str(feature)})


@dataclass(frozen=True)
class Asked:
    """What the page asks of every pane."""

    prompt: str
    pushes: tuple[Push, ...] = ()
    holds: tuple[Hold, ...] = ()
    variant: str = "base"
    lora: float = 1.0
    seed: int = 0
    control: bool = False
    """Push in a random direction of the same length instead."""


def strengths(asked: Asked, factors: Sequence[float]) -> tuple[Pane, ...]:
    """One pane a factor, lowest first; the unsteered one is always there to compare with."""
    order = sorted({0.0, *factors})
    plain = order.index(0.0)
    return tuple(
        _pane(asked, FACTORS.get(f, f"{f:g} times"), f, asked.variant, asked.seed, None if f == 0 else plain)
        for f in order
    )


def variants(asked: Asked, tuned: str) -> tuple[Pane, ...]:
    """Base and fine-tuned, unsteered and steered."""
    return (
        _pane(asked, "Base", 0, "base", asked.seed, None), _pane(asked, "Base, steered", 1, "base", asked.seed, 0),
        _pane(asked, "Fine-tuned", 0, tuned, asked.seed, None),
        _pane(asked, "Fine-tuned, steered", 1, tuned, asked.seed, 2),
    )  # fmt: skip


def seeds(asked: Asked, n: int) -> tuple[Pane, ...]:
    """n seeds unsteered, then the same seeds steered."""
    drawn = range(asked.seed, asked.seed + n)
    plain = tuple(_pane(asked, f"Unsteered, seed {seed}", 0, asked.variant, seed, None) for seed in drawn)
    return plain + tuple(
        _pane(asked, f"Steered, seed {seed}", 1, asked.variant, seed, at) for at, seed in enumerate(drawn)
    )


def followed(panes: Sequence[Pane], before: Sequence[tuple[Pane, str]]) -> tuple[Pane, ...]:
    """Each pane goes on with what its namesake of the last turn (pane, answer) was asked and said."""
    said = {pane.name: (*pane.messages, Message("assistant", text)) for pane, text in before if text.strip()}
    return tuple(replace(pane, messages=(*said.get(pane.name, ()), *pane.messages)) for pane in panes)


def what(pane: Pane) -> str:
    """A pane's weights and steering in a few words, as plain text."""
    words = [pane.variant if pane.variant == "base" or pane.lora == 1 else f"{pane.variant} at {pane.lora:g}"]
    words += [p.direction.name if p.raw else f"{p.strength:+.3g} {_short(p.direction)}" for p in pane.pushes]
    words += [f"feature {hold.feature} held at {hold.value:g}" for hold in pane.holds]
    return " · ".join(words).replace(" -", " \N{MINUS SIGN}")


def _short(direction: Direction) -> str:
    """A direction's name, without what its feature fires on."""
    return f"feature {direction.origin['feature']}" if "feature" in direction.origin else direction.name


def _pane(asked: Asked, name: str, factor: float, variant: str, seed: int, beside: int | None) -> Pane:
    made = scaled(asked.pushes, factor)
    return Pane(
        name, variant, asked.lora, at_random(made, asked.seed) if asked.control else made,
        asked.holds if factor > 0 else (), seed, (Message("user", asked.prompt),), beside,
    )  # fmt: skip
