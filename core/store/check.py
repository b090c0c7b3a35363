"""Whether cache files are whole and sound: header, check sums, content hash, fingerprint, health."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from core.errors import CacheError
from core.store.reader import Cache


def check_file(path: Path) -> dict[str, Any]:
    """One file's entry of `check --json`: file, ok, problems, fingerprint, layers with their health."""
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
