"""A LoRA component beside the features of a dictionary: what it writes, what it reads, and as a direction of its own.

A component seldom lies at a layer that has a dictionary. All layers share one residual stream, so its vector is held
against the nearest dictionary that could see it: above for what is written, below for what is read; how far away that
is belongs to the result. It knows no text.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from core.analysis.decompose import Decomposition, Method, cosines_with, decompose
from core.analysis.lora import Component
from core.analysis.lora_space import ATTENTION, read_direction, write_direction
from core.dictionary import Dictionary
from core.directions import Direction
from core.errors import AdapterError
from core.model.gains import BlockGains


@dataclass(frozen=True, eq=False)
class ReadFeatures:
    """The features whose directions a component's read direction is nearest to."""

    table: pl.DataFrame = field(repr=False)
    """layer, feature, encoder_cosine, decoder_cosine; largest magnitude of decoder_cosine first. What the residual
    stream carries of a feature is its decoder direction, so a decoder cosine says that the component fires with it."""
    layer: int
    """The dictionary's."""


def nearest_layer(component: Component, layers: Collection[int]) -> int | None:
    """The layer of the dictionary to hold a component against; None where there is no dictionary at all.

    For one that writes, the first at or above its layer, else the last. For one that reads, the last at or below the
    residual that it reads (resid_post of the layer before; what the MLP reads, attention has added to), else the first.
    """
    if not layers:
        return None
    at = component.key.layer
    if component.writes_residual:
        above = [n for n in layers if n >= at]
        return min(above) if above else max(layers)
    below = [n for n in layers if n < at]
    return max(below) if below else min(layers)


def as_direction(
    component: Component, gains: BlockGains, model: str, *, size: float = 1.0, resid_norm: float | None = None,
    adapter: str = "", layer: int | None = None,
) -> Direction:  # fmt: skip
    """The component's write direction times `size`, at its own layer (or held against `layer`'s dictionary).

    Raises `AdapterError` for a component that does not write into the residual stream.
    """
    vector = write_direction(component, gains)
    if vector is None:
        raise AdapterError(f"Component {component.key} does not write into the residual stream; choose one of o_proj "
                           "or down_proj.")  # fmt: skip
    origin = {"kind": "lora", "adapter": adapter, "layer": str(component.key.layer), "module": component.key.module,
              "index": str(component.key.index), "singular_value": f"{component.singular_value:.6g}"}  # fmt: skip
    at = component.key.layer if layer is None else layer
    name = f"{adapter} {component.key}".strip()
    return Direction(name, model, at, vector * size, resid_norm, origin)


def write_features(
    component: Component, gains: BlockGains, dictionary: Dictionary, model: str, method: Method = "omp", k: int = 16
) -> Decomposition:
    """The write direction as features of `dictionary`, by one of the ways of core/analysis/decompose.py."""
    return decompose(as_direction(component, gains, model, layer=dictionary.layer), dictionary, method, k=k)


def read_features(component: Component, gains: BlockGains, dictionary: Dictionary) -> ReadFeatures:
    """Cosines of the read direction, the norm's gain folded in, with every encoder and decoder direction.

    Raises `AdapterError` for a component that does not read the residual stream.
    """
    vector = read_direction(component, gains)
    if vector is None:
        space = "the attention heads" if component.key.kind in ATTENTION else "the MLP's hidden space"
        raise AdapterError(f"Component {component.key} reads {space}, not the residual stream.")
    sizes = np.linalg.norm(dictionary.W_enc, axis=0) * np.linalg.norm(vector)
    dots = vector.astype(np.float32) @ dictionary.W_enc
    encoder = np.divide(dots, sizes, out=np.zeros(dictionary.d_sae), where=sizes > 0)
    table = pl.DataFrame({
        "layer": np.full(dictionary.d_sae, dictionary.layer, dtype=np.int64),
        "feature": np.arange(dictionary.d_sae, dtype=np.int64),
        "encoder_cosine": encoder,
        "decoder_cosine": cosines_with(vector, dictionary),
    })
    return ReadFeatures(table.sort(pl.col("decoder_cosine").abs(), descending=True), dictionary.layer)
