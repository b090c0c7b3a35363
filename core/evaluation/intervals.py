"""Intervals of rates: Wilson's for a share of responses, the cluster bootstrap for rates over questions.

Wilson's takes responses as independent; they are not, as several answer one question and questions differ (EM rates
run from 0 to 68% between them). The bootstrap over questions allows for that, roughly where there are few of them.
No torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

#: Resamples of a bootstrap interval.
RESAMPLES = 4000

#: Below this many questions an interval over questions is rough, and said to be.
FEW_QUESTIONS = 10


@dataclass(frozen=True)
class Share:
    """`k` of `n` with Wilson's 95% interval (Wilson 1927); of nothing, nothing is known."""

    k: int
    n: int

    @property
    def rate(self) -> float | None:
        return self.k / self.n if self.n else None

    @property
    def ci95(self) -> tuple[float, float] | None:
        if not self.n:
            return None
        found = stats.binomtest(self.k, self.n).proportion_ci(method="wilson")
        return float(found.low), float(found.high)


def cluster_rate(k: np.ndarray, n: np.ndarray, seed: int = 0) -> tuple[float, float] | None:
    """95% interval of sum(k) / sum(n), questions resampled whole (BCa, Efron 1987).

    k, n [questions]: responses that count, and all of them. None where it cannot be had: fewer than two questions, or
    every question with the same rate (a resample of those says nothing; Wilson's interval does).
    """
    return _interval((k, n), lambda k, n, axis: k.sum(axis=axis) / n.sum(axis=axis), seed)


def cluster_mean(values: np.ndarray, seed: int = 0) -> tuple[float, float] | None:
    """95% interval of the mean of `values` [questions], questions resampled (BCa); None as for `cluster_rate`."""
    return _interval((values,), lambda v, axis: v.mean(axis=axis), seed)


def _interval(columns: tuple[np.ndarray, ...], statistic: Callable[..., np.ndarray], seed: int):
    columns = tuple(np.asarray(c, dtype=float) for c in columns)
    if len(columns[0]) < 2:
        return None
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # a degenerate bootstrap warns and gives NaN, which is handled below
        made = stats.bootstrap(
            columns, statistic, paired=len(columns) > 1, vectorized=True, n_resamples=RESAMPLES,
            rng=np.random.default_rng(seed),
        )  # fmt: skip
    low, high = (float(x) for x in made.confidence_interval)
    return (low, high) if np.isfinite([low, high]).all() and low < high else None
