"""The direction: a vector of the residual stream that knows its layer, what it was made from and how large it is.

Adds, subtracts and scales. Knows neither files (core.store.direction_file) nor what is done with it
(core.model.interventions); nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from core.errors import DirectionError
from core.specs import hook_point


@dataclass(frozen=True, eq=False)
class Direction:
    """A vector at resid_post of one layer of one model."""

    name: str
    """What it goes by in a list."""
    model: str
    """Id of the base model whose residual stream it lives in."""
    layer: int
    """0-based decoder block; the vector lives at that block's resid_post."""
    vector: np.ndarray = field(repr=False)
    """float32 [d_model], in the units of the residual stream."""
    resid_norm: float | None = None
    """Mean norm of the residual at response tokens of this layer, the unit of strengths; None when unknown."""
    origin: Mapping[str, str] = field(default_factory=dict)
    """Where it comes from, in words that a file can hold: contrast, caches and their fingerprints, position, ..."""

    def __post_init__(self) -> None:
        vector = np.array(self.vector, dtype=np.float32)
        if vector.ndim != 1 or len(vector) == 0:
            raise DirectionError(f"Direction {self.name!r} has shape {list(vector.shape)}; it takes one [d_model].")
        if not np.isfinite(vector).all():
            at = int(np.flatnonzero(~np.isfinite(vector))[0])
            raise DirectionError(f"Direction {self.name!r} holds {vector[at]} at coordinate {at}; make it again.")
        if self.layer < 0:
            raise DirectionError(f"Direction {self.name!r} has layer {self.layer}; layers are 0-based decoder blocks.")
        if self.resid_norm is not None and not (np.isfinite(self.resid_norm) and self.resid_norm > 0):
            raise DirectionError(f"Direction {self.name!r} has a mean residual norm of {self.resid_norm}, not above 0.")
        vector.setflags(write=False)
        object.__setattr__(self, "vector", vector)

    @property
    def d_model(self) -> int:
        return len(self.vector)

    @property
    def norm(self) -> float:
        return float(np.linalg.norm(self.vector.astype(np.float64)))

    @property
    def hook_point(self) -> str:
        return hook_point(self.layer)

    @property
    def unit(self) -> np.ndarray:
        """float32 [d_model], of norm 1. Raises `DirectionError` for a vector of zeros."""
        norm = self.norm
        if norm == 0:
            raise DirectionError(f"Direction {self.name!r} is zero, so it points nowhere.")
        return (self.vector.astype(np.float64) / norm).astype(np.float32)

    @property
    def share_of_residual_norm(self) -> float | None:
        """Its norm over the mean residual norm; None when that is unknown."""
        return None if self.resid_norm is None else self.norm / self.resid_norm

    def scaled_to(self, strength: float) -> np.ndarray:
        """float32 [d_model]: the vector with a norm of `strength` mean residual norms, pointing back when negative.

        Raises `DirectionError` when the mean residual norm is unknown or the vector is zero.
        """
        if self.resid_norm is None:
            raise DirectionError(
                f"Direction {self.name!r} does not know the mean residual norm of layer {self.layer}; give a raw "
                "strength, or make the direction from a cache."
            )
        return (strength * self.resid_norm * self.unit.astype(np.float64)).astype(np.float32)

    def cosine(self, other: Direction | np.ndarray) -> float:
        """Cosine with another direction (of any layer) or vector [d_model]; NaN when either is zero."""
        vector = other.vector if isinstance(other, Direction) else np.asarray(other)
        self._same_width(vector)
        return cosine(self.vector, vector)

    def named(self, name: str, **origin: str) -> Direction:
        """The same vector under another name, with further words about its origin."""
        return replace(self, name=name, origin={**self.origin, **origin})

    def __add__(self, other: Direction) -> Direction:
        return self._combined(other, 1.0, "+")

    def __sub__(self, other: Direction) -> Direction:
        return self._combined(other, -1.0, "-")

    def __mul__(self, factor: float) -> Direction:
        return replace(self, name=f"{factor:g} x {self.name}", vector=self.vector * np.float32(factor))

    __rmul__ = __mul__

    def __truediv__(self, factor: float) -> Direction:
        return self * (1 / factor)

    def __neg__(self) -> Direction:
        return replace(self, name=f"-{self.name}", vector=-self.vector)

    def _combined(self, other: Direction, sign: float, word: str) -> Direction:
        if (self.layer, self.model) != (other.layer, other.model):
            raise DirectionError(
                f"Directions {self.name!r} (layer {self.layer} of {self.model}) and {other.name!r} (layer "
                f"{other.layer} of {other.model}) live in different places and cannot be added."
            )
        self._same_width(other.vector)
        made_of = {"made_of": f"{self.name} {word} {other.name}"}
        return Direction(f"{self.name} {word} {other.name}", self.model, self.layer,
                         self.vector + np.float32(sign) * other.vector, self.resid_norm or other.resid_norm, made_of)

    def _same_width(self, vector: np.ndarray) -> None:
        if vector.shape != self.vector.shape:
            raise DirectionError(
                f"Direction {self.name!r} has d_model {self.d_model}, the other vector is {list(vector.shape)}."
            )


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two vectors [n]; NaN when either is zero."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size else float("nan")


def random_like(direction: Direction, seed: int = 0) -> Direction:
    """An isotropic random direction of the same norm, layer and unit: the control of whatever `direction` does."""
    drawn = np.random.default_rng(seed).standard_normal(direction.d_model)
    vector = drawn * (direction.norm / np.linalg.norm(drawn))
    return replace(direction, name=f"random {seed}, as long as {direction.name}", vector=vector,
                   origin={"kind": "random", "seed": str(seed), "norm_of": direction.name})
