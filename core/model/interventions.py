"""Interventions: what is done to the forward pass of one row, as frozen data.

A row of a batch (core.model.generation.Row) carries a tuple of them, in any order and number:

    AddDirection(direction, 0.5)                  x + 0.5 mean residual norms along the direction, at its layer
    AddDirection(direction, 4, raw=True)          x + 4 times the vector as it is stored
    AblateDirection(direction)                    x - v (v . x) with v of norm 1, at its layer
    AblateDirection(direction, everywhere=True)   the same vector at every layer
    ablate_each(directions)                       each layer its own vector
    ClampFeature(sae, feature, 8.0)               the SAE feature's activation set to 8, the SAE's error kept
    ScaleFeature(sae, feature, 0.0)               its activation times 0, the SAE's error kept
    ApplyLora(adapter, 1.0)                       the fine-tuned model is the base with its LoRA at strength 1

Each takes a `scope` (core.model.scopes) that says at which positions it acts.

The order is fixed, whatever order they are given in. Inside a block: LoRAs, which add up. At the block's resid_post:
additions, which add up; then features, all read from the same residual by the SAE's own encoder and changed together;
then ablations of a strength other than 1, one after another as given; last the whole ablations, of which those of one
scope are projected out of the residual together, so that nothing along any of them is left.

A strength that no model survives (not finite, or beyond `MAX_STRENGTH`) raises nothing: it is the `problem` for which
its row alone stops. What cannot be meant at all raises `InterventionError` when it is made.

How they are computed is in core.model.steering; nothing here runs a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from core.directions import Direction
from core.errors import DirectionError, InterventionError
from core.model.adapters import Adapter
from core.model.features import Feature
from core.model.scopes import ALL, Scope

#: Mean residual norms, or multiples of a LoRA, beyond which a strength is a mistake rather than a choice.
MAX_STRENGTH = 1000.0

Description = dict[str, str | int | float | bool | None]
"""An intervention as JSON writes it."""


@dataclass(frozen=True, eq=False)
class AddDirection:
    """x + strength mean residual norms along `direction`, at its layer's resid_post."""

    direction: Direction
    strength: float
    raw: bool = False
    """The strength multiplies the stored vector instead."""
    scope: Scope = ALL

    def __post_init__(self) -> None:
        if not self.raw and self.direction.resid_norm is None:
            raise DirectionError(
                f"Direction {self.direction.name!r} does not know the mean residual norm of layer {self.layer}; give a "
                "raw strength, or make the direction from a cache."
            )

    @property
    def layer(self) -> int:
        return self.direction.layer

    @property
    def nothing(self) -> bool:
        return self.strength == 0

    @property
    def vector(self) -> np.ndarray:
        """float32 [d_model]: what is added."""
        if self.raw:
            return self.direction.vector * np.float32(self.strength)
        return self.direction.scaled_to(self.strength)

    @property
    def raw_strength(self) -> float:
        """How many times the stored vector is added; NaN for a vector of zeros that is to be made longer."""
        if self.raw or self.nothing:
            return self.strength
        norm = self.direction.norm
        return self.strength * self.direction.resid_norm / norm if norm else math.nan

    @property
    def problem(self) -> str:
        """Why a row that carries it stops; empty when it does not."""
        if not math.isfinite(self.strength):
            return f"adding {self.direction.name!r} at strength {self.strength}, which is not a finite number"
        if self.nothing or self.direction.norm == 0:
            return "" if self.nothing else f"adding {self.direction.name!r}, which is zero and points nowhere"
        unit = self.direction.resid_norm
        norms = abs(self.strength) if not self.raw else abs(self.strength) * self.direction.norm / unit if unit else 0.0
        return _too_much(norms, f"adding {self.direction.name!r}", "mean residual norms")

    def describe(self) -> Description:
        strength = {"strength": self.strength, "raw": self.raw}
        return {"kind": "add", "direction": self.direction.name, "layer": self.layer, **strength} | _scope(self.scope)


@dataclass(frozen=True, eq=False)
class AblateDirection:
    """x - strength v (v . x), v being `direction` at norm 1: strength 1 leaves nothing along it, 0 everything."""

    direction: Direction
    everywhere: bool = False
    """At every layer's resid_post, not only at its own."""
    strength: float = 1.0
    scope: Scope = ALL

    def __post_init__(self) -> None:
        self.direction.unit  # noqa: B018  (raises for a vector of zeros)

    @property
    def layer(self) -> int:
        return self.direction.layer

    @property
    def nothing(self) -> bool:
        return self.strength == 0

    @property
    def problem(self) -> str:
        """Why a row that carries it stops; empty when it does not."""
        return _too_much(abs(self.strength), f"ablating {self.direction.name!r}", "times")

    def describe(self) -> Description:
        where = {"layer": self.layer, "everywhere": self.everywhere, "strength": self.strength}
        return {"kind": "ablate", "direction": self.direction.name, **where} | _scope(self.scope)


def ablate_each(directions: Sequence[Direction], scope: Scope = ALL) -> tuple[AblateDirection, ...]:
    """Each layer its own direction. Raises `InterventionError` when two live at one layer."""
    layers = [direction.layer for direction in directions]
    if len(set(layers)) < len(layers):
        raise InterventionError(f"Directions of layers {', '.join(map(str, layers))}: give one for each layer.")
    return tuple(AblateDirection(direction, scope=scope) for direction in directions)


@dataclass(frozen=True, eq=False)
class ClampFeature(Feature):
    """x + (value - a) W_dec[f], a being the feature's activation as the SAE reads it: the SAE's error is kept."""

    value: float
    """The activation it is set to, in the SAE's own units."""
    scope: Scope = ALL

    @property
    def nothing(self) -> bool:
        return False

    @property
    def problem(self) -> str:
        """Why a row that carries it stops; empty when it does not."""
        return _not_finite(self.value, f"clamping feature {self.feature} of layer {self.layer} to {self.value}")

    def describe(self) -> Description:
        return {"kind": "clamp", "layer": self.layer, "feature": self.feature, "value": self.value} | _scope(self.scope)


@dataclass(frozen=True, eq=False)
class ScaleFeature(Feature):
    """x + (factor - 1) a W_dec[f]: factor 0 switches the feature off, 1 changes nothing."""

    factor: float
    scope: Scope = ALL

    @property
    def nothing(self) -> bool:
        return self.factor == 1

    @property
    def problem(self) -> str:
        """Why a row that carries it stops; empty when it does not."""
        return _too_much(abs(self.factor), f"scaling feature {self.feature} of layer {self.layer}", "times")

    def describe(self) -> Description:
        where = {"layer": self.layer, "feature": self.feature, "factor": self.factor}
        return {"kind": "scale", **where} | _scope(self.scope)


@dataclass(frozen=True, eq=False)
class ApplyLora:
    """Each of the adapter's modules returns its output + strength * scaling * B (A x)."""

    adapter: Adapter = field(repr=False)
    strength: float = 1.0
    scope: Scope = ALL

    @property
    def nothing(self) -> bool:
        return self.strength == 0

    @property
    def problem(self) -> str:
        """Why a row that carries it stops; empty when it does not."""
        return _too_much(abs(self.strength), f"LoRA {self.adapter.name!r}", "times")

    def describe(self) -> Description:
        return {"kind": "lora", "adapter": self.adapter.name, "strength": self.strength} | _scope(self.scope)


Intervention = AddDirection | AblateDirection | ClampFeature | ScaleFeature | ApplyLora


def variant_of(interventions: Sequence[Intervention]) -> str:
    """`base`, or the adapters applied, each with its strength where that is not 1: `bad@0.5`."""
    loras = [i for i in interventions if isinstance(i, ApplyLora) and not i.nothing]
    return " + ".join(i.adapter.name + ("" if i.strength == 1 else f"@{i.strength:g}") for i in loras) or "base"


def _too_much(size: float, what: str, unit: str) -> str:
    wrong = _not_finite(size, f"{what} at strength {size}")
    return wrong or (f"{what} at {size:g} {unit}, beyond {MAX_STRENGTH:g}" if size > MAX_STRENGTH else "")


def _not_finite(value: float, what: str) -> str:
    return "" if math.isfinite(value) else f"{what}, which is not a finite number"


def _scope(scope: Scope) -> Description:
    return {"scope": str(scope)}
