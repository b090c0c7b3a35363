"""Whether cache and firing files are whole and sound: header, check sums, content hash, fingerprint, health."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import h5py

from core.errors import CacheError
from core.store import firing_layout
from core.store.firing_file import Firing
from core.store.reader import Cache


def check_file(path: Path) -> dict[str, Any]:
    """One file's entry of `check --json`: file, ok, problems, fingerprint, layers with their health."""
    if _is_firing(path):
        return _check_firing(path)
    try:
        cache = Cache.open(path)
    except CacheError as error:
        return {"file": str(path), "ok": False, "problems": [str(error)], "fingerprint": None, "layers": {}}
    with cache:
        problems = cache.verify()
        layers = {}
        if not problems:
            for layer in cache.layers:
                health = cache.info(layer).health
                layers[str(layer)] = {k: v if math.isfinite(v) else None for k, v in health.items()}
        return {
            "file": str(path),
            "ok": not problems,
            "problems": [f"{path}: {p}" for p in problems],
            "fingerprint": cache.fingerprint,
            "layers": layers,
        }


def _is_firing(path: Path) -> bool:
    try:
        with h5py.File(path, "r") as file:
            return file.attrs.get("format") == firing_layout.FORMAT
    except OSError:
        return False


def _check_firing(path: Path) -> dict[str, Any]:
    try:
        firing = Firing.open(path)
    except CacheError as error:
        return {"file": str(path), "ok": False, "problems": [str(error)], "fingerprint": None, "layers": {}}
    with firing:
        problems = firing.verify()
        layers = {} if problems else {
            str(n): {"masked_share": firing.masked_share, "mean_resid_norm": firing.mean_resid_norm(n)}
            for n in firing.layers.tolist()
        }  # fmt: skip
        return {"file": str(path), "ok": not problems, "problems": [f"{path}: {p}" for p in problems],
                "fingerprint": firing.fingerprint, "layers": layers}
