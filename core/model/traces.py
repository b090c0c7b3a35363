"""What a generation read at every token: projections, feature activations, LoRA scalars. Plain arrays, no model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from core.model.adapters import Adapter


@dataclass(frozen=True)
class Trace:
    """One number for every position that the model has read.

    Position i is that of the row's token i, prompt first. The residual there is read after all changes of the layer.
    The last token of an answer that was cut (or stopped) was never read by the model and has no entry.
    """

    name: str
    """The direction's name, or `layer L, feature F`."""
    kind: Literal["projection", "feature"]
    layer: int
    feature: int | None
    n_prompt: int
    values: np.ndarray = field(repr=False)
    """float32 [n_read]: x . v of norm 1, in the residual's units; or the feature's activation, in the SAE's."""

    @property
    def prompt(self) -> np.ndarray:
        """float32 [n_prompt]"""
        return self.values[: self.n_prompt]

    @property
    def response(self) -> np.ndarray:
        """float32 [up to n_tokens]: entry i belongs to token i of the answer."""
        return self.values[self.n_prompt :]


@dataclass(frozen=True)
class LoraTrace:
    """The scalars A_i . x of every module and rank of an adapter, at every position that the model has read.

    A and B are only defined up to an invertible matrix between them, so single scalars mean something for rank 1 (and
    sign and size even then only together with B); `norms` does not depend on that choice.
    """

    adapter: Adapter = field(repr=False)
    n_prompt: int
    scalars: np.ndarray = field(repr=False)
    """float32 [n_read, sum of ranks], modules in the adapter's order; NaN where the adapter was not active."""

    def norms(self) -> np.ndarray:
        """float32 [n_read, n_modules]: |scaling B A x| of each module's output at strength 1."""
        found, start = [], 0
        for module in self.adapter.modules:
            hidden = self.scalars[:, start : start + len(module.A)]
            gram = (module.B.T @ module.B).double().cpu().numpy()
            found.append(module.scaling * np.sqrt(np.maximum(np.einsum("ni,ij,nj->n", hidden, gram, hidden), 0.0)))
            start += len(module.A)
        return np.stack(found, axis=1).astype(np.float32)
