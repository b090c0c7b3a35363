"""The cache format: names, dtypes, compression, fingerprint. `cache/README.md` is its prose.

With reader.py and writer.py the only modules that know HDF5. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

FORMAT = "em-microscope-cache"
FORMAT_VERSION = 1

#: Statistics of feature activations over a response's tokens, each a dataset beside `indices`.
RESPONSE_STATISTICS = ("mean", "max", "frac_active")
#: Those that a compact file keeps.
COMPACT_STATISTICS = ("mean",)
#: Bits of the significand that residuals keep in a compact file, and that means keep: relative errors of at most 2**-12
#: and 2**-8.
COMPACT_BITS, COMPACT_MEAN_BITS = 12, 8

#: Context windows: tokens before and after the peak.
WINDOW_BEFORE, WINDOW_AFTER = 16, 8
#: Contexts kept per feature and condition, and in a compact file.
CONTEXTS_KEPT, COMPACT_CONTEXTS_KEPT = 5, 3
#: Logit-lens tokens kept per feature and sign.
LENS_KEPT = 10

FLOAT16_MAX = float(np.finfo(np.float16).max)

#: Fields of a spec that decide no number beyond rounding, and so are left out of the fingerprint.
NOT_FINGERPRINTED = ("device", "batch_tokens")


def cache_file(folder: Path, variant: str, conversations: str) -> Path:
    """Where one model variant's reading of one conversation set lies."""
    return Path(folder) / f"{variant}__{conversations}.h5"


def index_dtype(d_sae: int) -> np.dtype:
    """Smallest unsigned integer that holds a feature index."""
    return np.dtype(np.uint16 if d_sae <= 2**16 else np.uint32)


def to_float16(values: np.ndarray) -> np.ndarray:
    """float32 -> float16; what does not fit is stored as the largest finite value."""
    return np.clip(values, -FLOAT16_MAX, FLOAT16_MAX).astype(np.float16)


def round_bits(values: np.ndarray, bits: int = COMPACT_BITS) -> np.ndarray:
    """float32 rounded to `bits` significant bits (ties to even): the range stays, and the zeros compress away."""
    drop = 24 - bits
    raw = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    half = (np.uint32(1) << np.uint32(drop - 1)) - np.uint32(1)
    rounded = (raw + half + ((raw >> np.uint32(drop)) & np.uint32(1))) >> np.uint32(drop) << np.uint32(drop)
    return np.where(np.isfinite(values), rounded.view(np.float32), values)


def fingerprint(spec: Mapping[str, Any]) -> str:
    """SHA-256 of the fields that change a number."""
    kept = {k: v for k, v in spec.items() if k not in NOT_FINGERPRINTED}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def create(
    group: h5py.Group, name: str, shape: tuple[int, ...], dtype: Any, width: int | None = None
) -> h5py.Dataset:
    """An empty dataset, compressed and check-summed, in chunks of about 256 KiB along the first axis.

    width: at most so many columns in a chunk, for a dataset that grows along its second axis.
    """
    if 0 in shape:
        return group.create_dataset(name, shape=shape, dtype=dtype)
    inner = shape[1:] if width is None else (min(width, shape[1]), *shape[2:])
    row = np.dtype(dtype).itemsize * int(np.prod(inner, dtype=np.int64))
    rows = int(np.clip(2**18 // max(row, 1), 1, shape[0]))
    filters = {"compression": "gzip", "compression_opts": 4, "shuffle": True, "fletcher32": True}
    return group.create_dataset(name, shape=shape, dtype=dtype, chunks=(rows, *inner), **filters)


def put(group: h5py.Group, name: str, values: np.ndarray | list[str]) -> None:
    """A whole dataset at once; a list of text becomes UTF-8 strings of the longest one's length, which compress."""
    if isinstance(values, list):
        encoded = [text.encode() for text in values]
        dtype = h5py.string_dtype("utf-8", max(map(len, encoded), default=1) or 1)
        create(group, name, (len(values),), dtype)[...] = np.array(encoded, dtype=dtype)
    else:
        create(group, name, values.shape, values.dtype)[...] = values


def datasets(file: h5py.File) -> Iterator[h5py.Dataset]:
    """Every dataset, in path order."""
    found: list[str] = []
    file.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
    for name in sorted(found):
        yield file[name]


def content_hash(file: h5py.File) -> str:
    """SHA-256 over every dataset's name, type, shape and values; reads in slices, so memory stays small."""
    digest = hashlib.sha256()
    for data in datasets(file):
        digest.update(f"{data.name} {data.dtype} {data.shape}\n".encode())
        rows = max(1, 2**22 // max(1, data.dtype.itemsize * int(np.prod(data.shape[1:], dtype=np.int64))))
        for start in range(0, data.shape[0] if data.shape else 0, rows):
            part = data[start : start + rows]
            if part.dtype == object:
                digest.update(b"\0".join(text if isinstance(text, bytes) else text.encode() for text in part.ravel()))
            else:
                digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()
