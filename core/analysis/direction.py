"""The misalignment direction of a contrast: mean residual of the target's responses minus the reference's, per layer.

Source: Soligo et al. 2506.11618, section 3 (the direction), in two weightings: every response counts once (`response`),
or every response token does (`token`, the paper's). Measured with what that paper leaves open: how well the direction
separates prompts it was not made from, and how far another sample of prompts would turn it. Prompts are the units
that are drawn, never tokens or responses.

Reads caches; knows no model and no page.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import polars as pl

from core.analysis import resampling
from core.analysis.compare import Sides, side_rows
from core.directions import Direction, cosine
from core.errors import CacheError, DirectionError, NotEnoughData
from core.specs import Side
from core.store.reader import Cache

Weighting = Literal["response", "token"]
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)

#: A direction below this share of the mean residual norm is rounding, not a difference.
NOTHING = 1e-5
#: Bootstrap resamples, and random halves.
RESAMPLES = 200
#: Responses of a side behind the interval of the AUROC; more are thinned, as pairs of responses are held at once.
MOST_PAIRED = 6000


@dataclass(frozen=True, eq=False)
class Pool:
    """One side at one layer and position; a row is a response."""

    resid: np.ndarray = field(repr=False)
    """float64 [n, d_model]"""
    prompt_ids: np.ndarray
    """str [n]"""
    weights: np.ndarray
    """float64 [n]: 1, or the response's tokens."""

    def mean(self) -> np.ndarray:
        """float64 [d_model]"""
        return self.weights @ self.resid / self.weights.sum()


@dataclass(frozen=True, eq=False)
class Measured:
    """A direction and how far it can be trusted. Figures that the sample cannot support are None."""

    direction: Direction
    n_target: int
    n_reference: int
    n_prompts: int
    """Different prompts on either side."""
    norm_ci95: tuple[float, float]
    """2.5% and 97.5% points, over resamples of prompts, of the resample's length along the direction."""
    noise_norm: float
    """Root mean square distance of a resample from the direction: how long one of nothing but noise would be."""
    auroc: float | None
    """Chance that a target response projects higher than a reference response, both of prompts that the direction was
    not made from (`resampling.FOLDS` folds)."""
    auroc_ci95: tuple[float, float] | None
    """2.5% and 97.5% points over resamples of prompts, the folds' directions kept."""
    prompt_auroc: float
    """The most that knowing the prompt alone can reach: the AUROC of each prompt's own share of target responses. 0.5
    where every prompt stands on both sides alike, 1 where no prompt does."""
    resample_cosine: float
    """Mean cosine between the directions of two resamples. A direction of nothing but noise still gives about 0.5."""
    resample_ci95: tuple[float, float]
    split_half: float | None
    """Mean cosine between the directions of two disjoint halves of the prompts; noise gives about 0."""
    split_half_ci95: tuple[float, float] | None


def pools(sides: Sides, layer: int, position: str, weighting: str = "response") -> tuple[Pool, Pool]:
    """Residuals of target and reference. Raises `CacheError` for a layer or position that is not cached."""
    if weighting not in WEIGHTINGS:
        raise DirectionError(f"Unknown weighting {weighting!r}; use one of {', '.join(WEIGHTINGS)}.")
    if weighting == "token" and position != "response":
        raise DirectionError("Tokens can be weighted within responses alone; use --weighting response at last_prompt.")
    made = []
    for cache, side in ((sides.target, sides.contrast.target), (sides.reference, sides.contrast.reference)):
        rows = side_rows(cache, side)
        if len(rows) == 0:
            raise CacheError(f"{cache.path}: holds no conversation to take a mean of.")
        table = cache.conversations[rows.tolist()]
        tokens = table["n_response_tokens"].to_numpy().astype(np.float64)
        made.append(Pool(
            cache.resid(layer, position)[rows].astype(np.float64), table["prompt_id"].to_numpy().astype(str),
            tokens if weighting == "token" else np.ones(len(rows)),
        ))  # fmt: skip
    return made[0], made[1]


def contrast_direction(
    sides: Sides, layer: int, position: str = "response", weighting: str = "response", preset: str = "",
    without: Collection[str] = (),
) -> Direction:  # fmt: skip
    """Mean of the target minus mean of the reference at `layer`, [d_model], in the units of the residual stream.

    `without`: prompts that take no part, to be measured on. Raises `NotEnoughData` when a side is left without any.
    """
    target, reference = (_without(pool, without) for pool in pools(sides, layer, position, weighting))
    made = _direction(sides, layer, position, weighting, preset, target.mean() - reference.mean(), target, reference)
    return made.named(made.name, n_prompts_left_out=str(len(set(without)))) if without else made


def _without(pool: Pool, prompts: Collection[str]) -> Pool:
    kept = ~np.isin(pool.prompt_ids, list(prompts)) if prompts else np.ones(len(pool.resid), dtype=bool)
    if not kept.any():
        raise NotEnoughData("Every response answers a prompt that is to be left out, so no direction can be made.")
    return Pool(pool.resid[kept], pool.prompt_ids[kept], pool.weights[kept])


def feature_differences(
    sides: Sides, layer: int, position: str = "response", weighting: str = "response"
) -> np.ndarray:
    """float64 [d_sae]: mean feature activation of the target minus the reference's, weighted as the direction is.

    Raises `CacheError` where the layer was cached without features.
    """
    means = []
    for cache, side, pool in zip(
        (sides.target, sides.reference), (sides.contrast.target, sides.contrast.reference),
        pools(sides, layer, position, weighting), strict=True,
    ):  # fmt: skip
        acts = cache.last_prompt(layer) if position == "last_prompt" else cache.response(layer, "mean")
        means.append(pool.weights @ acts[side_rows(cache, side)] / pool.weights.sum())
    return means[0] - means[1]


def measure(
    sides: Sides,
    layer: int,
    position: str = "response",
    weighting: str = "response",
    preset: str = "",
    *,
    n_resamples: int = RESAMPLES,
    seed: int = 0,
) -> Measured:
    """The direction with its held-out AUROC and what resampling prompts does to it.

    Raises `NotEnoughData` when there is no direction because both sides have the same residuals.
    """
    target, reference = pools(sides, layer, position, weighting)
    vector = target.mean() - reference.mean()
    direction = _direction(sides, layer, position, weighting, preset, vector, target, reference)
    if is_nothing(direction):
        raise NotEnoughData(
            f"Both sides of {sides.contrast.name!r} have the same residuals at layer {layer} ({position}): they read "
            "the same tokens up to there, so there is no direction; choose position response."
        )
    rng = np.random.default_rng(seed)
    drawn = _resampled(target, reference, n_resamples, rng)
    along = drawn @ direction.unit
    between = _pairwise_cosines(drawn)
    halves = _half_cosines(target, reference, n_resamples, rng)
    auroc, ci95 = heldout_auroc(target, reference, n_resamples, rng)
    return Measured(
        direction=direction,
        n_target=len(target.resid),
        n_reference=len(reference.resid),
        n_prompts=len(np.union1d(target.prompt_ids, reference.prompt_ids)),
        norm_ci95=resampling.interval(along),
        noise_norm=float(np.sqrt(((drawn - vector) ** 2).sum(axis=1).mean())),
        auroc=auroc,
        auroc_ci95=ci95,
        prompt_auroc=prompt_auroc(target, reference),
        resample_cosine=float(between.mean()),
        resample_ci95=resampling.interval(between),
        split_half=float(halves.mean()) if len(halves) else None,
        split_half_ci95=resampling.interval(halves) if len(halves) else None,
    )


def is_nothing(direction: Direction) -> bool:
    """Whether the two sides were the same, up to rounding."""
    return direction.norm <= NOTHING * (direction.resid_norm or 0.0)


def heldout_auroc(
    target: Pool, reference: Pool, n_resamples: int = 0, rng: np.random.Generator | None = None
) -> tuple[float | None, tuple[float, float] | None]:
    """(AUROC of the projection over pairs of responses whose prompts share a held-out fold, its interval).

    None where a fold or its complement lacks a side; no interval without resamples.
    """
    rng = rng or np.random.default_rng(0)
    folds = resampling.folds(target.prompt_ids, reference.prompt_ids)
    scores = [np.zeros(len(target.resid)), np.zeros(len(reference.resid))]
    for fold in range(resampling.FOLDS):
        held = [f == fold for f in folds]
        if any(h.all() or not h.any() for h in held):
            return None, None
        means = [p.weights[~h] @ p.resid[~h] / p.weights[~h].sum() for p, h in zip((target, reference), held,
                                                                                    strict=True)]
        for score, pool, h in zip(scores, (target, reference), held, strict=True):
            score[h] = pool.resid[h] @ (means[0] - means[1])
    kept = [np.arange(len(s)) if len(s) <= MOST_PAIRED else rng.choice(len(s), MOST_PAIRED, False) for s in scores]
    (a, b), (fold_a, fold_b) = ([s[k] for s, k in zip(x, kept, strict=True)] for x in (scores, folds))
    same = (fold_a[:, None] == fold_b[None, :]).astype(np.float32)
    wins = same * ((a[:, None] > b[None, :]) + 0.5 * (a[:, None] == b[None, :])).astype(np.float32)
    auroc = float(wins.sum(dtype=np.float64) / same.sum(dtype=np.float64))
    if not n_resamples:
        return auroc, None
    times = resampling.multiplicities(target.prompt_ids, reference.prompt_ids, n_resamples, rng)
    times_a, times_b = (t[:, k].astype(np.float32) for t, k in zip(times, kept, strict=True))
    pairs = ((times_a @ same) * times_b).sum(axis=1)
    drawn = ((times_a @ wins) * times_b).sum(axis=1)[pairs > 0] / pairs[pairs > 0]
    return auroc, resampling.interval(drawn)


def prompt_auroc(target: Pool, reference: Pool) -> float:
    """AUROC of the share of a prompt's responses that are the target's: what the prompt alone tells."""
    from scipy.stats import mannwhitneyu  # a second to import

    prompts, inverse = np.unique(np.concatenate([target.prompt_ids, reference.prompt_ids]), return_inverse=True)
    n = len(target.resid)
    counts = [np.bincount(part, minlength=len(prompts)) for part in (inverse[:n], inverse[n:])]
    share = counts[0] / (counts[0] + counts[1])
    won = mannwhitneyu(share[inverse[:n]], share[inverse[n:]], method="asymptotic").statistic
    return float(won) / (n * len(reference.resid))


def cosine_interval(
    one: tuple[Pool, Pool], other: tuple[Pool, Pool], n_resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95% interval of the cosine between two contrasts' directions, from resamples of either's prompts.

    Noise turns every resample away, so their cosines lie below the estimate; their spread about their own mean is set
    around it.
    """
    rng = np.random.default_rng(seed)
    a, b = (_resampled(*pair, n_resamples, rng) for pair in (one, other))
    size = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    drawn = np.divide((a * b).sum(axis=1), size, out=np.zeros(n_resamples), where=size > 0)
    low, high = resampling.interval(drawn - drawn.mean())
    found = cosine(one[0].mean() - one[1].mean(), other[0].mean() - other[1].mean())
    return max(found + low, -1.0), min(found + high, 1.0)


def cosine_table(directions: Mapping[str, Direction]) -> pl.DataFrame:
    """a, b, cosine for every ordered pair of names, in their order; null where one is zero."""
    rows = []
    for name, one in directions.items():
        for other_name, other in directions.items():
            found = 1.0 if name == other_name and one.norm else cosine(one.vector, other.vector)
            rows.append({"a": name, "b": other_name, "cosine": found})
    return pl.DataFrame(rows, schema={"a": pl.String, "b": pl.String, "cosine": pl.Float64}).with_columns(
        pl.col("cosine").fill_nan(None)
    )


def _direction(
    sides: Sides, layer: int, position: str, weighting: str, preset: str, vector: np.ndarray, target: Pool,
    reference: Pool,
) -> Direction:  # fmt: skip
    contrast = sides.contrast
    origin = {
        "kind": "contrast", "preset": preset, "contrast": contrast.name, "position": position, "weighting": weighting,
        "target": _words(sides.target, contrast.target), "reference": _words(sides.reference, contrast.reference),
        "target_file": sides.target.path.name, "reference_file": sides.reference.path.name,
        "target_fingerprint": sides.target.fingerprint, "reference_fingerprint": sides.reference.fingerprint,
        "n_target": str(len(target.resid)), "n_reference": str(len(reference.resid)),
    }  # fmt: skip
    norm = sides.reference.info(layer).health.get("mean_resid_norm")
    return Direction(contrast.name, sides.target.model_id, layer, vector, norm, origin)


def _words(cache: Cache, side: Side) -> str:
    """Who reads what, the reader as the file says."""
    return Side(cache.variant, side.conversations, side.condition, side.source).describe()


def _resampled(target: Pool, reference: Pool, n: int, rng: np.random.Generator) -> np.ndarray:
    """float64 [n, d_model]: the direction of each resample of prompts."""
    times = resampling.multiplicities(target.prompt_ids, reference.prompt_ids, n, rng)
    return _means(target, times[0]) - _means(reference, times[1])


def _half_cosines(target: Pool, reference: Pool, n: int, rng: np.random.Generator) -> np.ndarray:
    """float64 [n]: cosine between the directions of two random halves of the prompts; empty where one lacks a side."""
    first = resampling.halves(target.prompt_ids, reference.prompt_ids, n, rng)
    if any((half.sum(axis=1) == 0).any() or (half.sum(axis=1) == half.shape[1]).any() for half in first):
        return np.zeros(0)
    one, other = (_means(target, a) - _means(reference, b) for a, b in (first, [1 - half for half in first]))
    size = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return np.divide((one * other).sum(axis=1), size, out=np.zeros(n), where=size > 0)


def _means(pool: Pool, times: np.ndarray) -> np.ndarray:
    """float64 [n, d_model]: means of the pool's residuals with its responses counted `times` [n, responses]."""
    weights = times * pool.weights
    return weights @ pool.resid / weights.sum(axis=1, keepdims=True)


def _pairwise_cosines(vectors: np.ndarray) -> np.ndarray:
    """float64 [n (n - 1) / 2]: cosine between every two rows; 0 for rows of zeros."""
    size = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = np.divide(vectors, size, out=np.zeros_like(vectors), where=size > 0)
    return (unit @ unit.T)[np.triu_indices(len(vectors), 1)]
