"""The file that keeps the delta-attribution of one contrast beside its cache files; checked against them on reading.

Knows the file's form, not how the numbers are made (core/evaluation/attribution.py); imports neither torch nor HDF5.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from core.errors import CacheError, CacheMismatch
from core.specs import ContrastSpec
from core.store.reader import Cache

FORMAT = "em-microscope-attribution"
FORMAT_VERSION = 1

#: Column of a feature table -> name of the array behind it.
COLUMNS = {"delta_attribution": "delta_attribution", "delta_attribution_se": "standard_error"}


@dataclass(frozen=True)
class LayerAttribution:
    """One layer's delta-attribution, target minus reference, over prompts."""

    delta_attribution: np.ndarray = field(repr=False)
    """float32 [d_sae], nats."""
    standard_error: np.ndarray = field(repr=False)
    """float32 [d_sae], nats; the prompt is the unit."""


def attribution_file(folder: Path, contrast: str) -> Path:
    """Where the delta-attribution of a contrast lies."""
    return Path(folder) / f"attribution__{contrast}.safetensors"


def provenance(contrast: ContrastSpec, target: Cache, reference: Cache) -> dict[str, Any]:
    """What decides whether a file belongs to a contrast and its open caches."""
    return {
        "target": asdict(contrast.target),
        "reference": asdict(contrast.reference),
        "target_fingerprint": target.fingerprint,
        "reference_fingerprint": reference.fingerprint,
    }


def write_attribution(path: Path, layers: Mapping[int, LayerAttribution], about: Mapping[str, Any]) -> None:
    """Write every layer's arrays with `about` (JSON values) as metadata, whole or not at all."""
    arrays = {
        f"{layer}/{name}": np.ascontiguousarray(getattr(found, name), dtype=np.float32)
        for layer, found in layers.items()
        for name in COLUMNS.values()
    }
    stated = {"format": FORMAT, "format_version": FORMAT_VERSION, **about}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(arrays, temporary, metadata={k: json.dumps(v, ensure_ascii=False) for k, v in stated.items()})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_about(path: Path) -> dict[str, Any]:
    """The file's metadata. Raises `CacheError` when the file is missing, damaged or not one of these."""
    about, _ = _read(path, lambda name: False)
    return about


def read_layers(path: Path) -> dict[int, LayerAttribution]:
    """Layer -> its arrays, of every layer in the file. Raises `CacheError`."""
    _, arrays = _read(path, lambda name: True)
    layers = sorted({int(name.partition("/")[0]) for name in arrays})
    return {n: LayerAttribution(*(arrays[f"{n}/{name}"] for name in COLUMNS.values())) for n in layers}


def read_attribution(
    path: Path, contrast: ContrastSpec, target: Cache, reference: Cache, layer: int
) -> pl.DataFrame | None:
    """layer, feature, delta_attribution, delta_attribution_se (null where not finite); None when it has no such layer.

    Raises `CacheMismatch` when the file was made from other cache files, other sides or another SAE than these,
    `CacheError` when it is damaged.
    """
    about, arrays = _read(path, lambda name: name.startswith(f"{layer}/"))
    check_provenance(path, about, provenance(contrast, target, reference))
    if not arrays:
        return None
    columns = {column: arrays[f"{layer}/{name}"].astype(np.float64) for column, name in COLUMNS.items()}
    d_sae = len(columns["delta_attribution"])
    if d_sae != target.info(layer).d_sae:
        raise CacheMismatch(path, f"d_sae of layer {layer}", target.info(layer).d_sae, d_sae)
    table = pl.DataFrame({"layer": np.full(d_sae, layer), "feature": np.arange(d_sae), **columns})
    return table.with_columns(
        pl.when(pl.col(name).is_finite()).then(pl.col(name)).otherwise(None).alias(name) for name in COLUMNS
    )


def check_provenance(path: Path, about: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise `CacheMismatch` naming the first field of `expected` that the file states otherwise."""
    for name, value in expected.items():
        if about.get(name) != value:
            raise CacheMismatch(path, name, value, about.get(name), "run `python -m core attribute` again")


def _read(path: Path, wanted: Callable[[str], bool]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        with safe_open(path, framework="numpy") as file:
            about = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            if about.get("format") != FORMAT or about.get("format_version") != FORMAT_VERSION:
                raise CacheError(f"{path}: this is no delta-attribution of this program; remove it.")
            return about, {name: file.get_tensor(name) for name in file.keys() if wanted(name)}
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CacheError(
            f"{path}: the file cannot be read ({first}); run `python -m core attribute` to make it."
        ) from None
