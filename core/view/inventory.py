"""Which cache files an experiment needs, how each stands, and how healthy its layers are: tables for the Overview."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from core.errors import CacheError
from core.specs import Experiment, Side
from core.store.places import side_file
from core.store.reader import Cache
from core.view.guide import extract_command

#: Path, time of change in nanoseconds and size in bytes: a new file under an old name is another key.
FileKey = tuple[str, int, int]


def file_key(path: Path) -> FileKey:
    """What a cached table of this file is kept under. Raises `CacheError` when the file is not there."""
    try:
        stat = path.stat()
    except OSError:
        raise CacheError(f"{path}: no such cache file; run `python -m core extract` to make it.") from None
    return str(path), stat.st_mtime_ns, stat.st_size


@dataclass(frozen=True)
class CachedFile:
    """One cache file the experiment's contrasts need, and how it stands."""

    variant: str
    conversations: str
    status: str
    """`ready`, `not made yet`, or the sentence that says what is wrong."""
    n: int | None
    conditions: str
    layers: str
    created: str
    command: str


def cached_files(experiment: Experiment, open_cache: Callable[[Path], Cache]) -> list[CachedFile]:
    """Every file the contrasts need, in their order."""
    sides = dict.fromkeys((s.variant, s.conversations) for c in experiment.contrasts for s in (c.target, c.reference))
    return [_cached_file(experiment, variant, conversations, open_cache) for variant, conversations in sides]


def _cached_file(
    experiment: Experiment, variant: str, conversations: str, open_cache: Callable[[Path], Cache]
) -> CachedFile:
    command = extract_command(experiment.name, variant, conversations)
    path = side_file(experiment, Side(variant, conversations))
    absent = CachedFile(variant, conversations, "not made yet", None, "", "", "", command)
    if not path.is_file():
        return absent
    try:
        cache = open_cache(path)
        counts = cache.conversations["condition"].value_counts(sort=True)
    except CacheError as error:
        return replace(absent, status=str(error))
    conditions = ", ".join(f"{n:,} {condition or 'without a label'}" for condition, n in counts.iter_rows())
    return CachedFile(variant, conversations, "ready", cache.conversations.height, conditions,
                      ", ".join(map(str, cache.layers)), cache.created[:16].replace("T", " "), command)


def health(cache: Cache) -> pl.DataFrame:
    """One row a cached layer: its SAE and the figures of its health, null where they do not exist."""
    infos = [cache.info(layer) for layer in cache.layers]
    names = ("fvu", "l0", "dead_share", "masked_share", "n_tokens", "mean_resid_norm")
    return pl.DataFrame([
        {"layer": i.layer, "features": i.d_sae or None, **{n: i.health.get(n) for n in names},
         "sae": f"{i.sae_release} {i.sae_id}".strip() or "none"}
        for i in infos
    ], infer_schema_length=None)
