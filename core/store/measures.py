"""The judge-free measures of an experiment's organisms: the file beside the adapters, read into a table.

Knows the file's form, not how the figures are made (core/evaluation/organism.py); imports no torch.
"""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl

from core.errors import CacheError

#: File in the folder of the adapters, so that the base is measured once for all of them.
MEASURES = "measures.json"
#: Key of a variant's margins minus the base's, paired by prompt.
MINUS_BASE = "minus_base"
#: The sets of matched pairs, and what each is.
PAIRS = {"health": "Health, held-out prompts", "open": "Open questions"}


def read_margins(folder: Path) -> pl.DataFrame | None:
    """Margins minus the base's of every organism in `folder`; None where none was measured.

    Columns: variant, pairs (a key of `PAIRS`), mean, low and high (95%, nats per token), n (prompts); in the file's
    order. Raises `CacheError` for a damaged file.
    """
    path = folder / MEASURES
    if not path.is_file():
        return None
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        rows = [
            {"variant": name, "pairs": pairs, **{k: float(estimate[k]) for k in ("mean", "low", "high")},
             "n": int(estimate["n"])}
            for name, row in kept.items()
            for pairs, estimate in row.get(MINUS_BASE, {}).items()
            if pairs in PAIRS
        ]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(
            f"{path}: cannot be read ({error}); remove it and run `python -m core train-adapter` again to measure."
        ) from None
    return pl.DataFrame(rows) if rows else None
