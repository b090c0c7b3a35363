"""Shards of a firing run -> one finished file, published by rename. Knows HDF5, not models.

What is held at once is one shard and figures of the size of the adapter; it does not grow with the conversations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import h5py
import numpy as np

from core.model.gains import BlockGains
from core.store import firing_layout, layout
from core.store.writer import (
    Shards,
    disk_full_is_clear,
    publish,
    write_attributes,
    write_conversations,
    write_vocabulary,
)

#: Conversations or tokens in a chunk of a dataset that is filled shard by shard.
WIDTH = 2**14

#: Arrays of a shard that are sums, and so add up over shards.
SUMS = ("square", "output_square", "n_tokens_by_layer", "sum_norm", "n_masked")


@dataclass(frozen=True, eq=False)
class FiringHead:
    """What the file says about the adapter beside its numbers. c components, of which w write into the residual."""

    layer: np.ndarray = field(repr=False)
    """int64 [c]"""
    module: list[str] = field(repr=False)
    """[c]"""
    index: np.ndarray = field(repr=False)
    """int64 [c]"""
    singular_value: np.ndarray = field(repr=False)
    """float64 [c]"""
    writing: np.ndarray = field(repr=False)
    """int64 [w]: which components write into the residual stream."""
    top_ids: np.ndarray = field(repr=False)
    """int32 [w, LENS_KEPT], tokens that the write direction promotes; strongest first."""
    bottom_ids: np.ndarray = field(repr=False)
    groups: tuple[tuple[str, str], ...]
    """(conversation set, condition) that sums are kept for."""
    gains: Mapping[int, BlockGains] = field(repr=False)
    """By layer, of the layers that the adapter changes."""

    @property
    def modules(self) -> list[tuple[int, str]]:
        """(layer, name) of every module, in order."""
        return sorted(set(zip(self.layer.tolist(), self.module, strict=True)))

    @property
    def layers(self) -> list[int]:
        return sorted(set(self.layer.tolist()))


def assemble_firing(
    shards: Shards,
    n_shards: int,
    spec: Mapping[str, Any],
    head: FiringHead,
    columns: Mapping[str, list[str]],
    token_text: Callable[[np.ndarray], list[str]],
    header: Mapping[str, str],
) -> None:
    """Write the finished file from the shards, publish it by rename, then drop the shards."""
    path, compact = shards.path, spec["storage"] == "compact"
    temporary = path.with_name(f".{path.name}.tmp")

    def parts(name: str) -> Iterator[np.ndarray]:
        return (shards.read(i, name) for i in range(n_shards))

    with disk_full_is_clear(path):
        with h5py.File(temporary, "w", libver="v110") as file:
            write_attributes(file, spec, header, firing_layout.FORMAT, firing_layout.FORMAT_VERSION)
            counts = list(parts("n_tokens"))
            used = write_conversations(file, shards, n_shards, counts, columns)
            sums = {name: sum(parts(name)) for name in SUMS}
            _adapter(file, head, sums)
            n, n_response = sum(map(len, counts)), int(file["conversations/n_response_tokens"][...].sum())
            group = file["components"]
            for name in ("mean", "written") if n_shards and "written" in _names(shards) else ("mean",):
                steps = _steps(parts(name)) if compact else None
                width = len(head.layer) if name == "mean" else len(head.writing)
                data = layout.create(group, name, (width, n), np.float32, WIDTH)
                _columns(data, (part if steps is None else np.round(part / steps) * steps for part in parts(name)))
            kept = _strongest(head, sums["square"].sum(0), spec["kept"])
            group = file.create_group("scalars")
            layout.put(group, "component", kept.astype(np.int32))
            values = layout.create(group, "value", (len(kept), n_response), np.float16, WIDTH)
            bits = firing_layout.COMPACT_BITS if compact else None
            _columns(values, (_rounded(part[:, kept], bits) for part in parts("scalars")))
            used |= {int(i) for ids in (head.top_ids, head.bottom_ids) for i in np.unique(ids)}
            write_vocabulary(file, used, token_text)
            file.attrs["content_hash"] = layout.content_hash(file)
            file.attrs["complete"] = True
        publish(temporary, path)
    shards.remove()


def _adapter(file: h5py.File, head: FiringHead, sums: Mapping[str, np.ndarray]) -> None:
    group = file.create_group("components")
    layout.put(group, "layer", head.layer.astype(np.int32))
    layout.put(group, "module", list(head.module))
    layout.put(group, "index", head.index.astype(np.int32))
    layout.put(group, "singular_value", head.singular_value.astype(np.float64))
    layout.put(group, "square", sums["square"].astype(np.float32))
    layout.put(group, "writing", head.writing.astype(np.int32))
    for name in ("top_ids", "bottom_ids"):
        layout.put(group, name, getattr(head, name).astype(np.int32))
    group = file.create_group("modules")
    layout.put(group, "layer", np.array([layer for layer, _ in head.modules], dtype=np.int32))
    layout.put(group, "module", [name for _, name in head.modules])
    layout.put(group, "output_square", sums["output_square"].astype(np.float64))
    group = file.create_group("layers")
    layout.put(group, "layer", np.array(head.layers, dtype=np.int32))
    layout.put(group, "n_tokens", sums["n_tokens_by_layer"].astype(np.int64))
    layout.put(group, "n_masked", sums["n_masked"].astype(np.int64))
    layout.put(group, "sum_norm", sums["sum_norm"].astype(np.float64))
    group = file.create_group("groups")
    for n, name in enumerate(("set", "condition")):
        layout.put(group, name, [group_name[n] for group_name in head.groups])
    for layer, gains in head.gains.items():
        for name in firing_layout.GAINS:
            if getattr(gains, name) is not None:
                layout.put(file.require_group(f"gains/{layer}"), name, layout.to_float16(getattr(gains, name)))


def _columns(data: h5py.Dataset, parts: Iterator[np.ndarray]) -> None:
    """Fill `data` [components, rows] with parts [rows of a shard, components], one after another."""
    start = 0
    for part in parts:
        if part.size:
            data[:, start : start + len(part)] = np.ascontiguousarray(part.T)
        start += len(part)


def _rounded(values: np.ndarray, bits: int | None) -> np.ndarray:
    return values if bits is None else layout.to_float16(layout.round_bits(values.astype(np.float32), bits))


def _steps(parts: Iterator[np.ndarray]) -> np.ndarray:
    """float32 [components]: a power of two from half of COMPACT_STEP to COMPACT_STEP of each one's standard deviation
    over responses; the zeros that rounding to it leaves compress away. Tiny where nothing varies."""
    count, total, square = 0.0, 0.0, 0.0
    for part in parts:
        known = np.isfinite(part)
        values = np.where(known, part, 0.0).astype(np.float64)
        count, total, square = count + known.sum(0), total + values.sum(0), square + (values**2).sum(0)
    mean = total / np.maximum(count, 1)
    deviation = np.sqrt(np.maximum(square / np.maximum(count, 1) - mean**2, 1e-24))
    return np.exp2(np.floor(np.log2(firing_layout.COMPACT_STEP * deviation))).astype(np.float32)


def _names(shards: Shards) -> Sequence[str]:
    with np.load(shards.name(0), allow_pickle=False) as file:
        return file.files


def _strongest(head: FiringHead, square: np.ndarray, kept: int) -> np.ndarray:
    """Indices of the `kept` components with the largest singular_value^2 * sum of scalar^2, in order; all for 0."""
    if kept == 0 or kept >= len(square):
        return np.arange(len(square))
    return np.sort(np.argsort(-(head.singular_value**2) * square, kind="stable")[:kept])
