"""The parts of a LoRA that do not depend on how it is written down: singular components of every module's delta_W.

An adapter's factors B and A are defined only up to an invertible matrix between them, so their columns and rows mean
nothing by themselves; the singular vectors of delta_W = scaling * B A do. Sizes, shares and spectra are here. It does
not know what the components do on text (lora_firing.py) nor what their vectors mean (lora_space.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from core.model.adapter_files import AdapterFactors

#: Modules whose output is added to the residual stream (through a further norm in Gemma), by the end of their name.
WRITERS = ("o_proj", "down_proj")
#: Modules whose input is the normed residual stream.
READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")

#: Singular values below this share of the module's largest are the rounding of float32 factors, not components.
RESOLUTION = 1e-6


@dataclass(frozen=True)
class ComponentKey:
    """What names a component within an adapter."""

    layer: int
    """0-based decoder block."""
    module: str
    """Path within the block, e.g. `mlp.down_proj`."""
    index: int
    """0 is the module's largest singular value."""

    @property
    def kind(self) -> str:
        """The module's own name, e.g. `down_proj`."""
        return self.module.rsplit(".", 1)[-1]

    def __str__(self) -> str:
        return f"{self.layer}.{self.kind}.{self.index}"


@dataclass(frozen=True, eq=False)
class Component:
    """One singular component of a module's delta_W: it adds singular_value * (read . x) * write to the output."""

    key: ComponentKey
    singular_value: float
    """> 0; of delta_W with its scaling."""
    write: np.ndarray = field(repr=False)
    """float64 [d_out], norm 1; its entry of largest magnitude is positive."""
    read: np.ndarray = field(repr=False)
    """float64 [d_in], norm 1, in the basis of what the module is given (after the norm, where there is one)."""
    share: float
    """singular_value^2 over the sum of all squares of the adapter: its share of the squared Frobenius norm."""

    @property
    def writes_residual(self) -> bool:
        return self.key.kind in WRITERS

    @property
    def reads_residual(self) -> bool:
        return self.key.kind in READERS


@dataclass(frozen=True)
class Svd:
    """Singular value decomposition of a product of thin matrices; the largest singular value first."""

    left: np.ndarray
    """float64 [d_out, k]"""
    values: np.ndarray
    """float64 [k]"""
    right: np.ndarray
    """float64 [k, d_in]"""


def factored_svd(B: np.ndarray, A: np.ndarray, scaling: float = 1.0) -> Svd:
    """SVD of scaling * B A without the [d_out, d_in] product: QR of B and of A^T, then the SVD of an r x r matrix.

    B: [d_out, r], A: [r, d_in]. Rank 1 is normalised as it is. Singular values that are rounding are left out, so k
    may be below r, and 0. Equal singular values leave the vectors free within their common space. The signs are made
    the same for every (B M^-1, M A): the entry of largest magnitude of each left vector is positive (the convention of
    scikit-learn's `svd_flip`), and its right vector turns with it.
    """
    B, A = B.astype(np.float64), A.astype(np.float64)
    if B.shape[1] == 1:
        sizes = float(np.linalg.norm(B)), float(np.linalg.norm(A))
        if 0 in sizes or scaling == 0:
            return Svd(B[:, :0], np.zeros(0), A[:0])
        left, values, right = B / sizes[0], np.array([abs(scaling) * sizes[0] * sizes[1]]), A / sizes[1]
        right = right * np.sign(scaling)
    else:
        q_left, r_left = np.linalg.qr(B)
        q_right, r_right = np.linalg.qr(A.T)
        inner, values, outer = np.linalg.svd(scaling * (r_left @ r_right.T))
        left, right = q_left @ inner, outer @ q_right.T
    kept = values > RESOLUTION * values.max(initial=0.0)
    left, values, right = left[:, kept], values[kept], right[kept]
    largest = np.abs(left).argmax(axis=0)
    signs = np.sign(left[largest, np.arange(len(values))])
    return Svd(left * signs, values, right * signs[:, None])


def components(adapter: AdapterFactors) -> tuple[Component, ...]:
    """Every component of the adapter, in layer, then module order, the largest of a module first."""
    found = [(m, factored_svd(m.B, m.A, m.scaling)) for m in adapter.modules]
    total = sum(float((svd.values**2).sum()) for _, svd in found)
    return tuple(
        Component(ComponentKey(m.layer, m.name, i), float(value), svd.left[:, i], svd.right[i], float(value**2 / total))
        for m, svd in found
        for i, value in enumerate(svd.values)
    )


def effective_rank(values: np.ndarray) -> float:
    """exp of the entropy of the singular values' shares (Roy and Vetterli 2007): k for k equal ones; 0 for none."""
    if not len(values):
        return 0.0
    p = values / values.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def module_table(parts: Sequence[Component]) -> pl.DataFrame:
    """A row a module: layer, module, kind, n_components, norm (Frobenius, of delta_W), effective_rank, share."""
    rows = []
    for layer, module in sorted({(c.key.layer, c.key.module) for c in parts}):
        own = [c for c in parts if (c.key.layer, c.key.module) == (layer, module)]
        values = np.array([c.singular_value for c in own])
        rows.append({
            "layer": layer, "module": module, "kind": own[0].key.kind, "n_components": len(own),
            "norm": float(np.linalg.norm(values)), "effective_rank": effective_rank(values),
            "share": sum(c.share for c in own),
        })  # fmt: skip
    schema = {"layer": pl.Int64, "module": pl.String, "kind": pl.String, "n_components": pl.Int64,
              "norm": pl.Float64, "effective_rank": pl.Float64, "share": pl.Float64}  # fmt: skip
    return pl.DataFrame(rows, schema=schema)


def component_table(parts: Sequence[Component]) -> pl.DataFrame:
    """A row a component, in order: layer, module, kind, index, singular_value, share (of the squared norm)."""
    return pl.DataFrame({
        "layer": [c.key.layer for c in parts],
        "module": [c.key.module for c in parts],
        "kind": [c.key.kind for c in parts],
        "index": [c.key.index for c in parts],
        "singular_value": [c.singular_value for c in parts],
        "share": [c.share for c in parts],
    })  # fmt: skip
