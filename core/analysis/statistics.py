"""Tests and effect sizes for many features at once, on arrays alone.

Every function works on all columns together (a column is a feature, a row one independent observation), and a stored
value is never a zero: zeros are implied, so the cost follows the active values. What it does not know: what a row is.
Rows must be independent, that is prompts and not tokens, or every p-value here is too small.
scipy.stats is the oracle of the tests and is not imported: it costs a second at start-up.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, exp, lgamma, log2

import numpy as np
from scipy import sparse
from scipy.special import gammaln, ndtr

#: Longest sample for which the exact null distribution of the signed-rank statistic is used (without ties).
EXACT_UP_TO = 50

#: A spread below this share of the values' root mean square is rounding (float32 holds about 1e-7), not variation.
RESOLUTION = 1e-6


@dataclass(frozen=True)
class ColumnRanks:
    """Ranks of the stored values within their column."""

    ranks: np.ndarray
    """float64 [nnz], in the matrix' own order: 1 is the smallest, ties share their mean."""
    tie_term: np.ndarray
    """float64 [n_columns]: sum of t^3 - t over groups of t tied values."""


@dataclass(frozen=True)
class SignedRank:
    """Wilcoxon signed-rank test of each column."""

    w_plus: np.ndarray
    """float64 [n_columns]: sum of the ranks of |difference| where the difference is positive."""
    n_nonzero: np.ndarray
    """int64 [n_columns]: differences other than zero; zeros are dropped (`zero_method="wilcox"`)."""
    p_value: np.ndarray
    """float64 [n_columns], two-sided; 1 where every difference is zero."""


@dataclass(frozen=True)
class RankSum:
    """Mann-Whitney rank-sum test of each column."""

    auroc: np.ndarray
    """float64 [n_columns]: chance that a target value exceeds a reference value, ties counting half."""
    p_value: np.ndarray
    """float64 [n_columns], two-sided; 1 where all values are equal."""


def column_ranks(values: sparse.csc_array) -> ColumnRanks:
    """Rank the stored values of each column of [n_rows, n_columns] among themselves, smallest first."""
    n_columns = values.shape[1]
    if values.nnz == 0:
        return ColumnRanks(np.zeros(0), np.zeros(n_columns))
    counts = np.diff(values.indptr)
    column = np.repeat(np.arange(n_columns, dtype=np.int32), counts)
    order = np.lexsort((values.data, column))
    ordered = values.data[order]  # columns stay in place, so `column` still fits
    starts_group = np.ones(len(ordered), dtype=bool)
    starts_group[1:] = (ordered[1:] != ordered[:-1]) | (column[1:] != column[:-1])
    start = np.flatnonzero(starts_group)
    size = np.diff(start, append=len(ordered)).astype(np.float64)
    group_rank = start - values.indptr[column[start]] + (size + 1) / 2
    ranks = np.empty(len(ordered))
    ranks[order] = np.repeat(group_rank, size.astype(np.int64))
    return ColumnRanks(ranks, np.bincount(column[start], weights=size**3 - size, minlength=n_columns))


def column_sums(values: sparse.csc_array, weights: np.ndarray | None = None) -> np.ndarray:
    """float64 [n_columns]: sum of each column, or of `weights` [nnz] laid out as the matrix' values."""
    column = np.repeat(np.arange(values.shape[1]), np.diff(values.indptr))
    return np.bincount(column, weights=values.data if weights is None else weights, minlength=values.shape[1])


@lru_cache(maxsize=1)
def _exact_cdf() -> np.ndarray:
    """[EXACT_UP_TO + 1, max W + 1]: P(W <= w) under the null for each n, counting sign patterns (exact in float64)."""
    widest = EXACT_UP_TO * (EXACT_UP_TO + 1) // 2
    patterns = np.zeros((EXACT_UP_TO + 1, widest + 1))
    patterns[0, 0] = 1
    for n in range(1, EXACT_UP_TO + 1):
        patterns[n] = patterns[n - 1]
        patterns[n, n:] += patterns[n - 1, :-n]
    return np.cumsum(patterns, axis=1) / np.exp2(np.arange(EXACT_UP_TO + 1))[:, None]


def signed_rank(differences: sparse.csc_array) -> SignedRank:
    """Two-sided Wilcoxon signed-rank test of each column of paired differences [n_pairs, n_columns].

    Zeros are dropped. With at most `EXACT_UP_TO` non-zero differences and no ties among their sizes, the p-value is
    exact (scipy.stats.wilcoxon, method="exact", on the non-zero differences); otherwise it is the normal approximation
    with tie correction and no continuity correction (method="asymptotic").
    """
    differences = _without_zeros(differences)
    sizes = sparse.csc_array((np.abs(differences.data), differences.indices, differences.indptr), differences.shape)
    ranked = column_ranks(sizes)
    n = np.diff(differences.indptr).astype(np.int64)
    w_plus = column_sums(differences, ranked.ranks * (differences.data > 0))
    total = n * (n + 1) / 2
    smaller = np.minimum(w_plus, total - w_plus)

    deviation = np.sqrt(np.maximum((n * (n + 1.0) * (2 * n + 1) - ranked.tie_term / 2) / 24, 0))
    z = np.divide(smaller - total / 2, deviation, out=np.zeros(len(n)), where=deviation > 0)
    p = 2 * ndtr(z)
    exact = (n <= EXACT_UP_TO) & (ranked.tie_term == 0)
    p[exact] = 2 * _exact_cdf()[n[exact], smaller[exact].astype(np.int64)]
    return SignedRank(w_plus, n, np.minimum(p, 1.0))


def rank_sum(target: sparse.csc_array, reference: sparse.csc_array) -> RankSum:
    """Two-sided Mann-Whitney test of each column, target [n_target, n_columns] against reference [n_reference, ...].

    Values are >= 0, the zeros being one tied block below all others. Normal approximation with tie and continuity
    correction (scipy.stats.mannwhitneyu, method="asymptotic"): sparse features nearly always hold tied zeros, for
    which no exact distribution is tabulated. Raises ValueError on negative values.
    """
    n_target, n_reference = target.shape[0], reference.shape[0]
    n = n_target + n_reference
    pooled = _without_zeros(sparse.csc_array(sparse.vstack([target, reference], format="csc")))
    if pooled.nnz and pooled.data.min() < 0:
        raise ValueError("rank_sum takes activations >= 0")
    ranked = column_ranks(pooled)
    in_target = pooled.indices < n_target
    n_zero = n - np.diff(pooled.indptr).astype(np.float64)
    active_target = column_sums(pooled, in_target.astype(np.float64))
    rank_total = (
        column_sums(pooled, ranked.ranks * in_target)
        + active_target * n_zero
        + (n_target - active_target) * (n_zero + 1) / 2
    )
    u = rank_total - n_target * (n_target + 1) / 2
    pairs = n_target * n_reference
    ties = ranked.tie_term + n_zero**3 - n_zero
    variance = np.maximum(pairs / 12 * ((n + 1) - ties / (n * (n - 1.0))), 0)
    above = np.maximum(u, pairs - u) - pairs / 2 - 0.5
    all_equal = ties >= float(n) ** 3 - n
    z = np.divide(above, np.sqrt(variance), out=np.full(len(u), -np.inf), where=~all_equal & (variance > 0))
    return RankSum(u / pairs, np.minimum(2 * ndtr(-z), 1.0))


def _without_zeros(values: sparse.csc_array) -> sparse.csc_array:
    if values.nnz and not values.data.all():
        values = values.copy()
        values.eliminate_zeros()
    return values


def paired_effect(total: np.ndarray, squares: np.ndarray, n: int, scale: np.ndarray) -> np.ndarray:
    """d_z [..., n_columns]: mean difference over the standard deviation (n - 1) of the differences.

    `total` and `squares` are sums of the differences and of their squares over n pairs; `scale` is the root mean
    square of the values compared. Without spread the effect is 0 when nothing differs and NaN (undefined) when every
    pair differs by one and the same amount.
    """
    mean = total / n
    return _standardised(mean, (squares - n * mean**2) / (n - 1), scale)


def unpaired_effect(
    total_target: np.ndarray,
    squares_target: np.ndarray,
    n_target: int,
    total_reference: np.ndarray,
    squares_reference: np.ndarray,
    n_reference: int,
    scale: np.ndarray,
) -> np.ndarray:
    """Hedges' g [..., n_columns]: mean difference over the pooled standard deviation, corrected for small samples.

    The correction is exact (gamma functions). Without spread: as `paired_effect`.
    """
    mean_target, mean_reference = total_target / n_target, total_reference / n_reference
    within = (squares_target - n_target * mean_target**2) + (squares_reference - n_reference * mean_reference**2)
    free = n_target + n_reference - 2
    correction = np.exp(gammaln(free / 2) - gammaln((free - 1) / 2)) / np.sqrt(free / 2)
    return correction * _standardised(mean_target - mean_reference, within / free, scale)


def _standardised(difference: np.ndarray, variance: np.ndarray, scale: np.ndarray) -> np.ndarray:
    deviation = np.sqrt(np.maximum(variance, 0))
    flat = deviation <= RESOLUTION * scale
    same = np.abs(difference) <= RESOLUTION * scale
    effect = np.divide(difference, deviation, out=np.zeros(np.shape(deviation)), where=~flat)
    return np.where(flat & ~same, np.nan, effect)


def benjamini_hochberg(p_value: np.ndarray) -> np.ndarray:
    """q-values [n] of p-values [n]; NaN is not a test and stays NaN (else scipy.stats.false_discovery_control)."""
    q_value = np.full(len(p_value), np.nan)
    tested = np.flatnonzero(~np.isnan(p_value))
    largest_first = tested[np.argsort(-p_value[tested], kind="stable")]
    m = len(tested)
    scaled = p_value[largest_first] * m / np.arange(m, 0, -1)
    q_value[largest_first] = np.minimum(np.minimum.accumulate(scaled), 1.0)
    return q_value


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two arrays [n] over the entries that are NaN in neither; NaN if undefined."""
    both = ~np.isnan(a) & ~np.isnan(b)
    stacked = np.stack([a[both], b[both]], axis=1)
    n = len(stacked)
    if n < 3 or (np.ptp(stacked, axis=0) == 0).any():
        return float("nan")
    stored = sparse.csc_array((stacked.T.ravel(), np.tile(np.arange(n), 2), np.array([0, n, 2 * n])), shape=(n, 2))
    ranks = column_ranks(stored).ranks.reshape(2, n)
    return float(np.corrcoef(ranks)[0, 1])


def smallest_p(n_target: int, n_reference: int, *, paired: bool) -> float:
    """Smallest two-sided p-value that any data of this size can reach: one relabelling of all, and its mirror."""
    if paired:
        return min(1.0, 2.0 ** (1 - n_target))
    ways = lgamma(n_target + n_reference + 1) - lgamma(n_target + 1) - lgamma(n_reference + 1)
    return min(1.0, 2 * exp(-ways))


def prompts_needed(n_tests: int, alpha: float, *, paired: bool) -> int:
    """Fewest prompts (a side, when unpaired) with which a single feature can pass Benjamini-Hochberg at `alpha`."""
    if paired:
        return max(2, ceil(1 + log2(n_tests / alpha) - 1e-12))
    n = 2
    while smallest_p(n, n, paired=False) > alpha / n_tests:
        n += 1
    return n
