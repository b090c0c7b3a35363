"""Differential features of a contrast: two samples of responses in, a feature table and its caveats out.

The unit of analysis is the prompt. Tokens of one response, and responses to one prompt, are not independent, so they
are averaged before any test. It does not know models, files or what a feature means, and a small q-value says that
the two texts differ, not why: length and format differ too, and the notes say so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import polars as pl
from scipy import sparse

from core.analysis import feature_table, statistics
from core.analysis.replication import Replication, replicate
from core.analysis.units import Pairing, Sample, Units, build_units
from core.errors import NotEnoughData, PresetError

__all__ = ["Ranking", "RankingSettings", "Replication", "Sample", "contrast_summary", "rank_features"]

#: Mean response lengths within this ratio of each other (either way round) are not called a confound.
LENGTH_RATIO_UNREMARKABLE = 1.05

#: Stored values worked on at a time (about 150 bytes each while a chunk of features is ranked).
CHUNK_VALUES = 2_000_000


@dataclass(frozen=True)
class RankingSettings:
    """How a ranking is computed; travels with its result. Raises `PresetError` when a value is impossible."""

    prevalence_floor: float = 0.05
    """Share of all responses, both sides together, a feature must be active on to be tested and ranked."""
    min_active_responses: int = 5
    """Responses, both sides together, it must be active on at least."""
    pseudocount: float = 0.01
    """Added to both means before log2_ratio, in activation units."""
    alpha: float = 0.05
    """False discovery rate."""
    pairing: Pairing = "auto"
    """Pair by prompt_id where both sides share it, or always, or never."""
    min_shared_share: float = 0.5
    """Share of the smaller side's prompts that must be on both sides for "auto" to pair."""
    max_length_ratio: float | None = None
    """Keep only prompts whose response lengths match within this factor; None keeps all."""
    replication_k: int = 50
    """Features at each end carried from the discovery half to the confirmation half; 0 leaves replication out."""
    replication_format: bool = False
    """Let format features be among them."""
    format_below: float = feature_table.FORMAT_BELOW
    """Content share below which a feature counts as format."""
    n_permutations: int = 20
    """Label permutations of the replication control."""
    seed: int = 0
    """For the split of the prompts and the permutations."""

    def __post_init__(self) -> None:
        wrong = [
            f"{name} = {getattr(self, name)!r} ({rule})"
            for name, fine, rule in (
                ("prevalence_floor", 0 <= self.prevalence_floor <= 1, "0 to 1"),
                ("min_active_responses", self.min_active_responses >= 1, "at least 1"),
                ("pseudocount", 0 < self.pseudocount < float("inf"), "above 0"),
                ("alpha", 0 < self.alpha < 1, "between 0 and 1"),
                ("pairing", self.pairing in get_args(Pairing), "auto, paired or unpaired"),
                ("min_shared_share", 0 <= self.min_shared_share <= 1, "0 to 1"),
                ("max_length_ratio", self.max_length_ratio is None or self.max_length_ratio >= 1, "at least 1"),
                ("replication_k", self.replication_k >= 0, "at least 0"),
                ("format_below", 0 <= self.format_below <= 1, "0 to 1"),
                ("n_permutations", self.n_permutations >= 0, "at least 0"),
                ("seed", self.seed >= 0, "at least 0"),
            )
            if not fine
        ]
        if wrong:
            raise PresetError(f"Impossible ranking settings: {'; '.join(wrong)}.")


@dataclass(frozen=True)
class Ranking:
    """The feature table of one contrast (target minus reference) at one layer and position, and what limits it."""

    table: pl.DataFrame = field(repr=False)
    """Every feature of the SAE: ranked ones by rank, then the others (null effect_size or null rank) by index."""
    target: str
    reference: str
    layer: int
    position: str
    n_target: int
    """Responses compared."""
    n_reference: int
    n_prompts: int
    """Different prompts compared: the n of every effect size and p-value."""
    paired: bool
    replication: Replication | None
    """None when it was not asked for or cannot be done; the notes say which."""
    mean_length_target: float
    """Response tokens."""
    mean_length_reference: float
    length_ratio: float
    """mean_length_target over mean_length_reference."""
    n_tested: int
    """Features with a p-value: the m of Benjamini-Hochberg."""
    settings: RankingSettings
    notes: tuple[str, ...]
    """Plain sentences a reader must know: what was dropped, confounds, why q-values are withheld."""


def rank_features(
    target: Sample,
    reference: Sample,
    *,
    layer: int,
    position: str,
    content_share: np.ndarray | None = None,
    settings: RankingSettings = RankingSettings(),
) -> Ranking:
    """Rank every feature by its standardised difference between target and reference.

    Paired when both sides share their prompts: d_z and the signed-rank test over prompts; else Hedges' g and the
    rank-sum test over prompts. The AUROC compares responses, ignoring pairs. Features below the label-blind
    prevalence floor keep their means and effect size but have no p-value and no rank. `content_share` [d_sae] may
    hold NaN. q-values are withheld, and a note gives the n needed, when no p-value the sample allows could pass.

    Raises `NotEnoughData` with fewer than two prompts a side, or when no feature varies; `SaeMismatch` on two widths.
    """
    units = build_units(
        target,
        reference,
        pairing=settings.pairing,
        min_shared_share=settings.min_shared_share,
        max_length_ratio=settings.max_length_ratio,
    )
    d_sae = units.target.responses.shape[1]
    share = np.full(d_sae, np.nan) if content_share is None else np.asarray(content_share, dtype=np.float64)
    if share.shape != (d_sae,):
        raise ValueError(f"content_share has shape {share.shape}, not ({d_sae},)")
    n_target, n_reference = units.target.n_responses, units.reference.n_responses
    columns = _columns(units, settings)
    active = columns["frac_active_target"] * n_target + columns["frac_active_reference"] * n_reference
    floor = max(settings.prevalence_floor * (n_target + n_reference), settings.min_active_responses)
    eligible = active >= floor - 1e-6
    notes = [*units.notes, *_length_notes(units, position)]

    undefined = np.isnan(columns["effect_size"])
    flat = undefined | ((columns["effect_size"] == 0) & (columns["p_value"] == 1))
    if eligible.any() and flat[eligible].all():
        raise NotEnoughData(
            f"{target.name} and {reference.name} at position {position!r}: all {int(eligible.sum())} features have "
            "one constant difference between the sides, so the test is degenerate (the sides read the same tokens "
            "there, or a fixed template token); use the other position or another contrast."
        )
    if (eligible & undefined).any():
        notes.append(
            f"{int((eligible & undefined).sum())} features differ by one and the same amount everywhere and have no "
            "effect size or p-value: their test is degenerate."
        )
    columns["p_value"][~eligible | undefined] = np.nan
    n_tested = int((~np.isnan(columns["p_value"])).sum())
    withheld = _why_no_q(n_tested, units, settings)
    if withheld:
        notes.append(withheld)
    columns["q_value"] = np.full(d_sae, np.nan) if withheld else statistics.benjamini_hochberg(columns["p_value"])
    columns["rank"] = _rank(columns, eligible & ~undefined)

    replication = None
    if settings.replication_k:
        candidates = eligible & ~undefined
        if not settings.replication_format:
            candidates &= ~(share < settings.format_below)
        try:
            replication = replicate(
                units,
                np.flatnonzero(candidates),
                k=settings.replication_k,
                alpha=settings.alpha,
                n_permutations=settings.n_permutations,
                seed=settings.seed,
            )
        except NotEnoughData as reason:
            notes.append(str(reason))
    return Ranking(
        table=_table(columns, layer, share, n_target, n_reference),
        target=target.name,
        reference=reference.name,
        layer=layer,
        position=position,
        n_target=n_target,
        n_reference=n_reference,
        n_prompts=units.n_prompts,
        paired=units.paired,
        replication=replication,
        mean_length_target=units.target.mean_length,
        mean_length_reference=units.reference.mean_length,
        length_ratio=_ratio(units.target.mean_length, units.reference.mean_length),
        n_tested=n_tested,
        settings=settings,
        notes=tuple(notes),
    )


def _ratio(a: float, b: float) -> float:
    return a / b if b else float("nan")


def _chunks(units: Units) -> Iterator[slice]:
    """Consecutive features with about CHUNK_VALUES stored values together."""
    stored = units.target.responses.indptr.astype(np.int64) + units.reference.responses.indptr
    start = 0
    while start < len(stored) - 1:
        stop = int(np.searchsorted(stored, stored[start] + CHUNK_VALUES, side="right")) - 1
        stop = min(max(stop, start + 1), len(stored) - 1)
        yield slice(start, stop)
        start = stop


def _columns(units: Units, settings: RankingSettings) -> dict[str, np.ndarray]:
    """Column name -> float64 [d_sae]; p_value for every feature, tested or not."""
    parts = [_chunk_columns(units, chunk) for chunk in _chunks(units)]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    columns["mean_diff"] = columns["mean_target"] - columns["mean_reference"]
    columns["log2_ratio"] = np.log2(columns["mean_target"] + settings.pseudocount) - np.log2(
        columns["mean_reference"] + settings.pseudocount
    )
    return columns


def _chunk_columns(units: Units, chunk: slice) -> dict[str, np.ndarray]:
    sums = statistics.column_sums
    sides = (units.target, units.reference)
    responses = [side.responses[:, chunk] for side in sides]
    prompts = [side.prompts[:, chunk].astype(np.float64) for side in sides]
    (n, m), (total_t, total_r) = (side.n_prompts for side in sides), (sums(p) for p in prompts)
    square_t, square_r = (sums(p, p.data**2) for p in prompts)
    scale = np.sqrt((square_t + square_r) / (n + m))
    across = statistics.rank_sum(*responses)
    if units.paired:
        difference = sparse.csc_array(prompts[0] - prompts[1])
        effect = statistics.paired_effect(sums(difference), sums(difference, difference.data**2), n, scale)
        p_value = statistics.signed_rank(difference).p_value
        spread = np.sqrt(sums(difference, difference.data**2) / n)
    else:
        effect = statistics.unpaired_effect(total_t, square_t, n, total_r, square_r, m, scale)
        same_rows = all(side.n_prompts == side.n_responses for side in sides)
        p_value = across.p_value if same_rows else statistics.rank_sum(*prompts).p_value
        spread = np.sqrt(np.maximum(scale**2 - ((total_t + total_r) / (n + m)) ** 2, 0))
    p_value = np.where(spread <= statistics.RESOLUTION * scale, 1.0, p_value)  # rounding is no difference
    return {
        "mean_target": total_t / n,
        "mean_reference": total_r / m,
        "frac_active_target": np.diff(responses[0].indptr) / responses[0].shape[0],
        "frac_active_reference": np.diff(responses[1].indptr) / responses[1].shape[0],
        "effect_size": effect,
        "auroc": across.auroc,
        "p_value": p_value,
    }


def _length_notes(units: Units, position: str) -> list[str]:
    ratio = _ratio(units.target.mean_length, units.reference.mean_length)
    if position != "response" or not ratio > 0 or max(ratio, 1 / ratio) <= LENGTH_RATIO_UNREMARKABLE:
        return []
    note = (
        f"Responses of the target are {ratio:.2f} times as long as those of the reference "
        f"({units.target.mean_length:.1f} against {units.reference.mean_length:.1f} tokens): sentence-end and format "
        "features shift with length in a per-response mean, so compare with a length-matched contrast."
    )
    return [note]


def _why_no_q(n_tested: int, units: Units, settings: RankingSettings) -> str | None:
    """One sentence when no feature can pass the false discovery rate whatever the data; None when one can."""
    if n_tested == 0:
        return (
            f"No feature is active on {settings.prevalence_floor:.0%} of the responses (and on at least "
            f"{settings.min_active_responses}), so none is tested or ranked."
        )
    n, m = units.target.n_prompts, units.reference.n_prompts
    smallest = statistics.smallest_p(n, m, paired=units.paired)
    if smallest <= settings.alpha / n_tested:
        return None
    needed = statistics.prompts_needed(n_tested, settings.alpha, paired=units.paired)
    have = f"{n} pairs of prompts" if units.paired else f"{n} target and {m} reference prompts"
    unit = "pairs" if units.paired else "prompts a side"
    return (
        f"q-values are withheld: with {have} the smallest possible p-value is {smallest:.2g}, and a single feature "
        f"among {n_tested} tested needs {settings.alpha / n_tested:.2g}; at least {needed} {unit} are needed."
    )


def _rank(columns: dict[str, np.ndarray], ranked: np.ndarray) -> np.ndarray:
    """float64 [d_sae]: 1 for the most raised by effect_size (ties: mean_diff, then feature index), NaN if unranked."""
    features = np.flatnonzero(ranked)
    order = np.lexsort((features, -columns["mean_diff"][features], -columns["effect_size"][features]))
    rank = np.full(len(ranked), np.nan)
    rank[features[order]] = np.arange(1, len(features) + 1)
    return rank


def _table(
    columns: dict[str, np.ndarray], layer: int, share: np.ndarray, n_target: int, n_reference: int
) -> pl.DataFrame:
    d_sae = len(share)
    constant = {"layer": layer, "n_target": n_target, "n_reference": n_reference}
    data = {**columns, "content_share": share, "feature": np.arange(d_sae)}
    series = [
        pl.Series(name, np.full(d_sae, constant[name]) if name in constant else data[name], nan_to_null=True)
        for name in feature_table.SCHEMA
    ]
    table = pl.DataFrame(series).cast(dict(feature_table.SCHEMA)).sort("rank", "feature", nulls_last=True)
    return feature_table.validate(table, extra=False)


def contrast_summary(
    ranking: Ranking, top: int = 20, *, contrast: str | None = None, include_format: bool = False
) -> dict[str, Any]:
    """The `rank` result for JSON: the `top` most raised features, then the `top` most suppressed; no NaN, only null.

    Format features are left out unless asked for, and counted.
    """
    table = ranking.table
    shown = table if include_format else feature_table.hide_format(table, ranking.settings.format_below)
    tails = pl.concat([feature_table.top(shown, top), feature_table.bottom(shown, top)])
    held = ranking.replication
    figures = {} if held is None else {
        **vars(held), "permuted_ci95": list(held.permuted_ci95), "n_replicated": held.n_replicated,
    }  # fmt: skip
    return _no_nan({
        "contrast": contrast or f"{ranking.target} minus {ranking.reference}",
        "layer": ranking.layer,
        "position": ranking.position,
        "n_target": ranking.n_target,
        "n_reference": ranking.n_reference,
        "n_prompts": ranking.n_prompts,
        "n_tested": ranking.n_tested,
        "n_format_hidden": table.height - shown.height,
        "paired": ranking.paired,
        "mean_length_target": ranking.mean_length_target,
        "mean_length_reference": ranking.mean_length_reference,
        "length_ratio": ranking.length_ratio,
        "replication": figures,
        "settings": vars(ranking.settings).copy(),
        "notes": list(ranking.notes),
        "features": tails.to_dicts(),
    })  # fmt: skip


def _no_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _no_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_no_nan(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
