"""How far rankings of the same features agree: overlap at k with its chance, rank-biased overlap, rank correlation.

Arrays alone. A *place* is 1 for the first of a ranking; a feature that the ranking leaves out has the place N + 1, so
it is in no top k. Chance shuffles the identities of the features of every ranking but one, either among all of them or
within strata of features alike in something that has nothing to do with the question (how often they are active).
It does not know contrasts or files. What shuffling cannot know: features are not independent of each other (their
decoder directions correlate, and several may share one meaning), so true chance is wider than any interval here.
scipy (hypergeom, spearmanr) is the oracle of the tests and is not imported: it costs a second at start-up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from core.analysis import statistics

#: Features a stratum has at least, where there are that many: fewer leave nothing to shuffle.
STRATUM_SIZE = 20


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of two columns of effect sizes, both tails at once."""

    rho: float
    """In [-1, 1]; NaN where it is undefined."""
    ci95: tuple[float, float]
    """Fisher's z with the standard error of Bonett and Wright (2000), as if features were independent: too narrow."""
    expected: float
    """Mean under shuffling within strata: what being active equally often alone would give."""
    n: int
    """Features."""


def places(keys: np.ndarray, members: np.ndarray) -> np.ndarray:
    """int64 [N]: 1 for the smallest of `keys` [N] among `members` (bool [N]), and so on; N + 1 for the others."""
    own = np.flatnonzero(members)
    found = np.full(len(keys), len(keys) + 1, dtype=np.int64)
    found[own[np.argsort(keys[own], kind="stable")]] = np.arange(1, len(own) + 1)
    return found


def observed(rankings: np.ndarray, ks: Sequence[int]) -> np.ndarray:
    """int64 [len(ks)]: features that stand at place k or better in every one of `rankings` [n_rankings, N]."""
    return (np.max(rankings, axis=0)[None, :] <= np.asarray(ks)[:, None]).sum(axis=1)


def expected(rankings: np.ndarray, strata: np.ndarray, ks: Sequence[int]) -> np.ndarray:
    """float64 [len(ks)]: the exact mean of `observed` under shuffling within `strata` (int [N], 0-based).

    The sum over strata of (members of each top k, multiplied) / size^(n_rankings - 1); with one stratum and whole
    rankings this is k^n_rankings / N^(n_rankings - 1).
    """
    sizes = np.bincount(strata)
    found = []
    for k in ks:
        product = np.ones(len(sizes))
        for ranking in rankings:
            product *= np.bincount(strata, weights=ranking <= k, minlength=len(sizes))
        found.append((product / np.maximum(sizes, 1.0) ** (len(rankings) - 1)).sum())
    return np.array(found)


def shuffles(strata: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """int32 [n, N]: features of `strata` [N] put in another's place, each row a permutation within every stratum."""
    drawn = np.empty((n, len(strata)), dtype=np.int32)
    for stratum in range(int(strata.max(initial=-1)) + 1):
        own = np.flatnonzero(strata == stratum).astype(np.int32)
        drawn[:, own] = rng.permuted(np.tile(own, (n, 1)), axis=1)
    return drawn


def shuffled(rankings: np.ndarray, drawn: Sequence[np.ndarray], ks: Sequence[int]) -> np.ndarray:
    """int64 [n, len(ks)]: `observed` with the first ranking as it is and ranking i + 1 shuffled by `drawn[i]`, [n, N]
    of `shuffles`."""
    own = np.flatnonzero(rankings[0] <= max(ks, default=0))  # no other feature can be in every top k
    worst = np.broadcast_to(rankings[0][own], (len(drawn[0]), len(own)))
    for ranking, order in zip(rankings[1:], drawn, strict=True):
        worst = np.maximum(worst, ranking[order[:, own]])
    return np.stack([(worst <= k).sum(axis=1) for k in ks], axis=1)


def strata_of(values: np.ndarray, n_strata: int) -> np.ndarray:
    """int64 [N]: about `n_strata` groups of neighbours in `values` [N], equal values together, groups not tiny."""
    n_strata = max(1, min(n_strata, len(values) // STRATUM_SIZE))
    edges = np.unique(np.quantile(values, np.arange(1, n_strata) / n_strata)) if len(values) else np.empty(0)
    groups = np.searchsorted(edges, values, side="right")
    return np.unique(groups, return_inverse=True)[1].reshape(-1)


def rank_biased(overlaps: np.ndarray, shorter: int, p: float) -> float:
    """Extrapolated rank-biased overlap (Webber, Moffat and Zobel 2010, equation 32) of two rankings, in [0, 1].

    `overlaps` [l] is X_d, the size of the intersection of the two top d, for d = 1 to the length l of the longer one;
    `shorter` is the length of the shorter. A reader goes on to the next place with chance `p`, so 1 / (1 - p) places
    are read on average; with p = 1 - 1/k about 86% of the weight lies on the first k (their equation 21). Linear in
    `overlaps`: from expected overlaps it gives the expected value. NaN when a ranking is empty.
    """
    longer = len(overlaps)
    if shorter == 0:
        return float("nan")
    depth = np.arange(1, longer + 1)
    weight = p**depth
    total = (overlaps / depth * weight).sum()
    beyond = depth[shorter:]
    at_shorter, at_longer = overlaps[shorter - 1], overlaps[-1]
    total += (at_shorter * (beyond - shorter) / (shorter * beyond) * weight[shorter:]).sum()
    extrapolated = (at_longer - at_shorter) / longer + at_shorter / shorter
    return float((1 - p) / p * total + extrapolated * p**longer)


def rank_biased_of(a: np.ndarray, b: np.ndarray, strata: np.ndarray, p: float) -> tuple[float, float]:
    """(rank-biased overlap, its mean under shuffling within `strata`) of two rankings given as places [N]."""
    n = len(a)
    lengths = sorted(int((ranking <= n).sum()) for ranking in (a, b))
    if lengths[0] == 0:
        return float("nan"), float("nan")
    longer = lengths[1]
    found = np.cumsum(np.bincount(np.maximum(a, b), minlength=n + 2))[1 : longer + 1]
    chance = np.zeros(longer)
    for stratum in range(int(strata.max()) + 1):
        own = strata == stratum
        counts = [np.cumsum(np.bincount(r[own], minlength=n + 2))[1 : longer + 1] for r in (a, b)]
        chance += counts[0] * counts[1] / own.sum()
    return rank_biased(found, lengths[0], p), rank_biased(chance, lengths[0], p)


def correlation(a: np.ndarray, b: np.ndarray, strata: np.ndarray) -> Correlation:
    """Spearman's correlation of two columns of effect sizes [N] without NaN."""
    n, rho = len(a), statistics.spearman(a, b)
    if not np.isfinite(rho):
        return Correlation(rho, (float("nan"), float("nan")), float("nan"), n)
    ranks = [_mean_ranks(x) for x in (a, b)]
    centred = [(r - r.mean()) / r.std() for r in ranks]
    sizes = np.bincount(strata)
    sums = [np.bincount(strata, weights=c) for c in centred]
    chance = float((sums[0] * sums[1] / np.maximum(sizes, 1)).sum() / n)
    if n <= 3 or abs(rho) >= 1 - 1e-12:
        ci = (rho, rho) if n > 3 else (-1.0, 1.0)
    else:
        half = 1.959963984540054 * np.sqrt((1 + rho**2 / 2) / (n - 3))
        ci = (float(np.tanh(np.arctanh(rho) - half)), float(np.tanh(np.arctanh(rho) + half)))
    return Correlation(rho, ci, chance, n)


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    """float64 [N]: 1 for the smallest; ties share their mean."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group.reshape(-1)]
