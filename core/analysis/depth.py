"""A contrast layer by layer: how many features differ and how far, and how well residuals alone separate the sides."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from core.analysis.compare import Sides, rank
from core.analysis.direction import heldout_auroc, pools
from core.analysis.feature_table import hide_format
from core.analysis.ranking import RankingSettings
from core.errors import NotEnoughData


@dataclass(frozen=True)
class Depth:
    """One layer of the depth view. Feature figures are None without an SAE; all None where n cannot support them."""

    layer: int
    n_raised: int | None
    n_suppressed: int | None
    max_raised: float | None
    max_suppressed: float | None
    """Magnitude."""
    resid_auroc: float | None
    """Held-out, in [0, 1]."""
    resid_norm_share: float | None
    """Norm of the mean difference over the mean residual norm."""


def depth(sides: Sides, layer: int, position: str, settings: RankingSettings) -> Depth:
    """Feature and residual figures of one layer, format features left out."""
    raised = suppressed = most_raised = most_suppressed = None
    if sides.target.info(layer).d_sae and sides.reference.info(layer).d_sae:
        try:
            table = rank(sides, layer, position, settings).table
        except NotEnoughData:
            table = None
        if table is not None:
            table = hide_format(table)
            passed = table.filter(pl.col("q_value") < settings.alpha)
            raised = passed.filter(pl.col("effect_size") > 0).height
            suppressed = passed.filter(pl.col("effect_size") < 0).height
            tested = table.filter(pl.col("q_value").is_not_null())["effect_size"]
            most_raised = float(max(tested.max() or 0.0, 0.0))
            most_suppressed = float(max(-(tested.min() or 0.0), 0.0))
    auroc, share = residual_separation(sides, layer, position)
    return Depth(layer, raised, suppressed, most_raised, most_suppressed, auroc, share)


def residual_separation(sides: Sides, layer: int, position: str) -> tuple[float | None, float | None]:
    """(held-out AUROC of the direction, None where a fold lacks a side; its norm over the mean residual norm)."""
    target, reference = pools(sides, layer, position)
    norm = float(np.linalg.norm(np.concatenate([target.resid, reference.resid]), axis=1).mean())
    share = float(np.linalg.norm(target.mean() - reference.mean())) / norm if norm > 0 else None
    return heldout_auroc(target, reference)[0], share
