"""What a LoRA component's vectors are in the residual stream, and how the write spaces of adapters lie to each other.

`down_proj` and `o_proj` write into the residual stream; `q`, `k`, `v`, `gate` and `up` read it through a norm, whose
gain is folded into the read vector. `down_proj` reads the MLP's hidden space and `o_proj` the attention heads, so they
have no read direction; the others write into heads and the MLP, so they have no write direction. It does not know SAEs
(core/analysis/decompose.py) nor text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from core.analysis.lora import Component
from core.errors import AdapterError
from core.model.gains import BlockGains

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def write_direction(component: Component, gains: BlockGains | None = None) -> np.ndarray | None:
    """float64 [d_model]: what the component adds to resid_post of its layer, for each unit of its scalar times its
    singular value; None for a module that does not write there.

    A norm after the module (Gemma) multiplies it by that norm's gain, and further by 1 / (root mean square of the
    module's whole output), which depends on the token and is left to the firing (`written`). Norm 1 without one.
    """
    if not component.writes_residual:
        return None
    after = None
    if gains is not None:
        after = gains.after_attention if component.key.kind in ATTENTION else gains.after_mlp
    return component.write if after is None else component.write * after


def read_direction(component: Component, gains: BlockGains) -> np.ndarray | None:
    """float64 [d_model]: the residual direction whose projection (over the residual's root mean square) the scalar is;
    None for a module that does not read the residual stream. Attention reads resid_post of the layer before; the MLP
    reads what attention of its own layer has added to as well.
    """
    if not component.reads_residual:
        return None
    return component.read * (gains.attention if component.key.kind in ATTENTION else gains.mlp)


@dataclass(frozen=True, eq=False)
class WriteSpace:
    """The write directions of an adapter's residual-writing components, side by side."""

    parts: tuple[Component, ...]
    vectors: np.ndarray = field(repr=False)
    """float64 [n, d_model]"""

    def rows(self, *, layer: int | None = None, up_to: int | None = None, module: str | None = None) -> np.ndarray:
        """Indices [k] of the components at `layer`, in layers up to `up_to` and in `module`."""
        keys = [c.key for c in self.parts]
        return np.array([
            i for i, key in enumerate(keys)
            if (layer is None or key.layer == layer) and (up_to is None or key.layer <= up_to)
            and (module is None or key.module == module)
        ], dtype=np.int64)  # fmt: skip


def write_space(parts: Sequence[Component], gains: Mapping[int, BlockGains] | None = None) -> WriteSpace:
    """The write directions of all components that have one; `gains` by layer, needed only where a norm follows."""
    writing = tuple(c for c in parts if c.writes_residual)
    vectors = [write_direction(c, (gains or {}).get(c.key.layer)) for c in writing]
    if len({len(v) for v in vectors}) > 1:
        raise AdapterError("The adapter's write vectors have different widths, so they are not of one residual stream.")
    return WriteSpace(writing, np.array(vectors) if vectors else np.zeros((0, 0)))


def cosines(vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
    """float64 [n, m] of [n, d] and [m, d]; NaN where one is zero."""
    with np.errstate(invalid="ignore", divide="ignore"):
        a = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        b = others / np.linalg.norm(others, axis=1, keepdims=True)
    return a @ b.T


def cosines_over_layers(space: WriteSpace, kind: str, index: int = 0) -> pl.DataFrame:
    """a, b, cosine for every ordered pair of layers' components of one module kind and index, in layer order.

    Signs are a convention, so -1 says as much as 1: the same line.
    """
    rows = [i for i, c in enumerate(space.parts) if (c.key.kind, c.key.index) == (kind, index)]
    found = cosines(space.vectors[rows], space.vectors[rows]) if rows else np.zeros((0, 0))
    names = [str(space.parts[i].key.layer) for i in rows]
    return pl.DataFrame(
        [{"a": a, "b": b, "cosine": float(found[i, j])} for i, a in enumerate(names) for j, b in enumerate(names)],
        schema={"a": pl.String, "b": pl.String, "cosine": pl.Float64},
    ).with_columns(pl.col("cosine").fill_nan(None))


@dataclass(frozen=True)
class SpaceAngles:
    """How near the write spaces of two adapters at one layer and module are."""

    layer: int
    module: str
    cosines: tuple[float, ...]
    """Of the principal angles, the nearest pair of directions first; min(k_a, k_b) of them."""
    overlap: float
    """Mean squared cosine: 1 when one space holds the other."""
    chance: float
    """The overlap expected of random spaces of the same dimensions: max(k_a, k_b) / d_model."""
    weighted: float
    """Cosine of the matrices U S^2 U^T of the two, tr(P_a P_b) / (|P_a| |P_b|): as `overlap`, but directions count by
    how much of the update they carry. In [0, 1]."""


def principal_angles(a: Sequence[Component], b: Sequence[Component]) -> list[SpaceAngles]:
    """For every residual-writing module that both adapters change (Bjorck and Golub 1973): the cosines are the
    singular values of U_a^T U_b, whose columns are orthonormal already."""
    found = []
    spaces = [write_space(parts) for parts in (a, b)]
    places = [{(c.key.layer, c.key.module) for c in space.parts} for space in spaces]
    for layer, module in sorted(places[0] & places[1]):
        rows = [space.rows(layer=layer, module=module) for space in spaces]
        U = [space.vectors[r].T for space, r in zip(spaces, rows, strict=True)]
        S = [np.array([space.parts[i].singular_value for i in r]) ** 2 for space, r in zip(spaces, rows, strict=True)]
        if U[0].shape[0] != U[1].shape[0]:
            raise AdapterError("The two adapters are of models of different width and cannot be compared.")
        between = U[0].T @ U[1]
        values = np.clip(np.linalg.svd(between, compute_uv=False), 0.0, 1.0)
        weighted = float((S[0][:, None] * between**2 * S[1]).sum() / (np.linalg.norm(S[0]) * np.linalg.norm(S[1])))
        chance = max(len(S[0]), len(S[1])) / U[0].shape[0]
        found.append(SpaceAngles(layer, module, tuple(values.tolist()), float((values**2).mean()), chance, weighted))
    return found


def angle_table(found: Sequence[SpaceAngles]) -> pl.DataFrame:
    """A row a layer and module: layer, module, kind, nearest (cosine), overlap, weighted, chance."""
    return pl.DataFrame(
        [{"layer": a.layer, "module": a.module, "kind": a.module.rsplit(".", 1)[-1], "nearest": a.cosines[0],
          "overlap": a.overlap, "weighted": a.weighted, "chance": a.chance} for a in found],
        schema={"layer": pl.Int64, "module": pl.String, "kind": pl.String, "nearest": pl.Float64,
                "overlap": pl.Float64, "weighted": pl.Float64, "chance": pl.Float64},
    )  # fmt: skip
