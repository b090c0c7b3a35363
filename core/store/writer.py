"""Shards on disk, and their assembly into one finished cache file. Knows HDF5, not models.

A shard is written under a temporary name, flushed and renamed, so a killed run loses at most the shard it was on.
The finished file is assembled from the shards in order, so an interrupted run ends with the same bytes.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from core.errors import CacheError
from core.paths import write_json
from core.store import layout
from core.store.shard import HEALTH_SUMS, strongest
from core.store.stored_file import compare_specs, partial_folder


@dataclass(frozen=True)
class LayerHead:
    """What the file says about one layer, beside its numbers."""

    layer: int
    hook_point: str
    d_model: int
    d_sae: int
    sae_release: str = ""
    sae_id: str = ""
    architecture: str = ""
    neuronpedia_id: str = ""
    decoder_norm: np.ndarray | None = None
    top_ids: np.ndarray | None = None
    bottom_ids: np.ndarray | None = None


@contextmanager
def disk_full_is_clear(path: Path) -> Iterator[None]:
    """Turn `no space left` into one sentence; shards that were written whole stay."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC or "No space left" in str(error):
            raise CacheError(
                f"{path}: the disk is full; whole shards are safe: free space and run the same command to go on."
            ) from None
        raise


class Shards:
    """The unfinished extraction of one file: its spec, and the shards written so far."""

    def __init__(self, path: Path, spec: Mapping[str, Any]):
        self.path, self.folder = path, partial_folder(path)
        spec_file = self.folder / "spec.json"
        if spec_file.is_file():
            try:
                found = json.loads(spec_file.read_text(encoding="utf-8"))
            except ValueError:
                raise CacheError(f"{spec_file}: cannot be read; remove {self.folder} and extract again.") from None
            compare_specs(self.folder, spec, found)
        with disk_full_is_clear(self.folder):
            write_json(spec_file, dict(spec))

    def name(self, number: int) -> Path:
        return self.folder / f"shard-{number:06d}.npz"

    @property
    def done(self) -> int:
        """Number of whole shards, counted from the first."""
        number = 0
        while self.name(number).is_file():
            number += 1
        return number

    def write(self, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        temporary = self.folder / f".{self.name(number).name}.tmp"
        with disk_full_is_clear(self.folder):
            with open(temporary, "wb") as file:
                np.savez(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.name(number))

    def read(self, number: int, name: str) -> np.ndarray:
        with np.load(self.name(number), allow_pickle=False) as file:
            return file[name]

    def remove(self) -> None:
        shutil.rmtree(self.folder)


def assemble(
    shards: Shards,
    n_shards: int,
    spec: Mapping[str, Any],
    heads: Sequence[LayerHead],
    columns: Mapping[str, list[str]],
    token_text: Callable[[np.ndarray], list[str]],
    header: Mapping[str, str],
) -> None:
    """Write the finished file from the shards, publish it by rename, then drop the shards.

    columns: text columns of the conversations, in order; token_text: texts of an array of token ids.
    """
    path = shards.path
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_full_is_clear(path):
        with h5py.File(temporary, "w", libver="v110") as file:
            write_attributes(file, spec, header, layout.FORMAT, layout.FORMAT_VERSION)
            counts = [shards.read(i, "n_tokens") for i in range(n_shards)]
            used = write_conversations(file, shards, n_shards, counts, columns)
            compact = spec["storage"] == "compact"
            for head in heads:
                used |= _layer(file, shards, n_shards, counts, head, compact)
            write_vocabulary(file, used, token_text)
            file.attrs["content_hash"] = layout.content_hash(file)
            file.attrs["complete"] = True
        publish(temporary, path)
    shards.remove()


def publish(temporary: Path, path: Path) -> None:
    """Give a whole file its name, after it is on the disk."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_attributes(
    file: h5py.File, spec: Mapping[str, Any], header: Mapping[str, str], kind: str, version: int
) -> None:
    """The root attributes of a file of format `kind`, but for the content hash and `complete`, which come last."""
    file.attrs["format"] = kind
    file.attrs["format_version"] = version
    file.attrs["fingerprint"] = layout.fingerprint(spec)
    file.attrs["spec"] = json.dumps(spec, ensure_ascii=False, sort_keys=True)
    for name, value in header.items():
        file.attrs[name] = value


def write_conversations(
    file: h5py.File, shards: Shards, n_shards: int, counts: list[np.ndarray], columns: Mapping[str, list[str]]
) -> set[int]:
    """Write the groups `conversations` and `tokens`; returns the token ids used."""
    group = file.create_group("conversations")
    for name, values in columns.items():
        layout.put(group, name, list(values))
    n_tokens = np.concatenate(counts)
    layout.put(group, "n_tokens", n_tokens.astype(np.int32))
    responses = np.concatenate([shards.read(i, "n_response_tokens") for i in range(n_shards)])
    layout.put(group, "n_response_tokens", responses.astype(np.int32))

    group = file.create_group("tokens")
    layout.put(group, "offsets", np.r_[0, np.cumsum(n_tokens)].astype(np.int64))
    used: set[int] = set()
    for name, dtype in (("ids", np.int32), ("roles", np.uint8)):
        data = layout.create(group, name, (int(n_tokens.sum()),), dtype)
        _fill(data, (shards.read(i, name) for i in range(n_shards)))
    for i in range(n_shards):
        used.update(np.unique(shards.read(i, "ids")).tolist())
    return used


def write_vocabulary(file: h5py.File, used: set[int], token_text: Callable[[np.ndarray], list[str]]) -> None:
    """What each used token id reads as."""
    vocab = np.array(sorted(used), dtype=np.int32)
    layout.put(file["tokens"], "vocab_ids", vocab)
    layout.put(file["tokens"], "vocab_text", [text.replace("\0", "\u2400") for text in token_text(vocab)])


def _fill(data: h5py.Dataset, parts: Iterator[np.ndarray]) -> None:
    start = 0
    for part in parts:
        if len(part):
            data[start : start + len(part)] = part
        start += len(part)


def _layer(
    file: h5py.File, shards: Shards, n_shards: int, counts: list[np.ndarray], head: LayerHead, compact: bool
) -> set[int]:
    group = file.create_group(f"layers/{head.layer}")
    for name in ("hook_point", "d_model", "d_sae", "sae_release", "sae_id", "architecture", "neuronpedia_id"):
        group.attrs[name] = getattr(head, name)

    def parts(name: str) -> Iterator[np.ndarray]:
        return (shards.read(i, f"{head.layer}/{name}") for i in range(n_shards))

    n = sum(len(c) for c in counts)
    for name in ("resid_response", "resid_last_prompt"):
        resid = map(layout.round_bits, parts(name)) if compact else parts(name)
        _fill(layout.create(group, name, (n, head.d_model), np.float32), resid)
    sums = dict(zip(HEALTH_SUMS, sum(parts("health")), strict=True))
    health = group.create_group("health").attrs
    health["n_tokens"] = sums["n_tokens"]
    health["masked_share"] = sums["n_masked"] / max(1.0, sums["n_tokens"] + sums["n_masked"])
    health["mean_resid_norm"] = sums["sum_norm"] / max(1.0, sums["n_tokens"])
    if not head.d_sae:
        return set()

    statistics = layout.COMPACT_STATISTICS if compact else layout.RESPONSE_STATISTICS
    for position, names in (("response", statistics), ("last_prompt", ("value",))):
        matrix = group.create_group(position)
        per_row = np.concatenate(list(parts(f"{position}_counts")))
        layout.put(matrix, "indptr", np.r_[0, np.cumsum(per_row)].astype(np.int64))
        size = (int(per_row.sum()),)
        _fill(layout.create(matrix, "indices", size, layout.index_dtype(head.d_sae)), parts(f"{position}_indices"))
        for name in names:
            values = parts(name if position == "response" else "last_prompt_value")
            if compact and name == "mean":
                values = (layout.round_bits(v.astype(np.float32), layout.COMPACT_MEAN_BITS) for v in values)
            _fill(layout.create(matrix, name, size, np.float16), values)
    mass, letter_mass, active = (sum(parts(name)) for name in ("mass", "letter_mass", "n_active"))
    sum_x = sum(parts("sum_x"))
    health["l0"] = sums["n_active"] / max(1.0, sums["n_tokens"])
    health["dead_share"] = float((active == 0).mean())
    health["n_health_tokens"] = sums["n_sample"]
    variance = sums["sum_square"] - float((sum_x**2).sum()) / max(1.0, sums["n_sample"])
    health["fvu"] = sums["sum_error"] / variance if variance > 0 else float("nan")

    info = group.create_group("feature_info")
    with np.errstate(invalid="ignore", divide="ignore"):
        layout.put(info, "content_share", (letter_mass / mass).astype(np.float32))
    layout.put(info, "n_active_tokens", active.astype(np.int64))
    layout.put(info, "max_act", np.max(list(parts("max_act")), axis=0).astype(np.float32))
    layout.put(info, "decoder_norm", head.decoder_norm)
    layout.put(info, "top_ids", head.top_ids)
    layout.put(info, "bottom_ids", head.bottom_ids)
    n_kept = layout.COMPACT_CONTEXTS_KEPT if compact else layout.CONTEXTS_KEPT
    _contexts(group.create_group("contexts"), shards, n_shards, counts, head, n_kept)
    return set(np.unique(head.top_ids).tolist()) | set(np.unique(head.bottom_ids).tolist())


CONTEXT_ARRAYS = ("feature", "condition", "value", "row", "peak", "acts")


def _contexts(
    group: h5py.Group, shards: Shards, n_shards: int, counts: list[np.ndarray], head: LayerHead, n_kept: int
) -> None:
    """Merge the shards' strongest windows; what is held grows with features and conditions, not conversations."""
    kept: dict[str, np.ndarray] | None = None
    base = 0
    for i in range(n_shards):
        new = {name: shards.read(i, f"{head.layer}/context_{name}") for name in CONTEXT_ARRAYS}
        new["row"] = new["row"] + base
        base += len(counts[i])
        both = new if kept is None else {name: np.concatenate([kept[name], new[name]]) for name in CONTEXT_ARRAYS}
        best = strongest(both["condition"], both["feature"], both["value"], both["row"], n_kept)
        kept = {name: values[best] for name, values in both.items()}
    assert kept is not None
    per_feature = np.bincount(kept["feature"], minlength=head.d_sae)
    layout.put(group, "indptr", np.r_[0, np.cumsum(per_feature)].astype(np.int64))
    layout.put(group, "row", kept["row"].astype(np.uint32))
    layout.put(group, "peak", kept["peak"].astype(np.uint32))
    layout.put(group, "value", layout.to_float16(kept["value"]))
    layout.put(group, "acts", kept["acts"])
