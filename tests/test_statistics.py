"""The vectorised tests against scipy, feature by feature, on random, tied and zero-heavy data."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse, stats

from core.analysis import statistics

KINDS = ("continuous", "tied", "zero-heavy", "zero-heavy and tied", "half precision")


def draw(kind: str, n: int, n_columns: int, rng: np.random.Generator) -> np.ndarray:
    values = rng.exponential(1.0, size=(n, n_columns))
    if "tied" in kind:
        values = np.ceil(values * 2)
    if "zero-heavy" in kind:
        values *= rng.random(values.shape) < rng.random(n_columns)
    if kind == "half precision":
        values = np.round(values, 2).astype(np.float16).astype(np.float64)
    return values


@pytest.mark.parametrize("n", [2, 8, 23, 50, 51, 120])
@pytest.mark.parametrize("kind", KINDS)
def test_signed_rank_equals_scipy(kind: str, n: int) -> None:
    rng = np.random.default_rng(n)
    difference = draw(kind, n, 40, rng) - draw(kind, n, 40, rng) * 0.8
    if "tied" in kind:
        difference = np.round(difference)
    ours = statistics.signed_rank(sparse.csc_array(difference))
    for column in range(difference.shape[1]):
        d = difference[:, column]
        d = d[d != 0]
        assert ours.n_nonzero[column] == len(d)
        if len(d) == 0:
            assert ours.p_value[column] == 1
            continue
        tied = len(np.unique(np.abs(d))) < len(d)
        method = "asymptotic" if tied or len(d) > 50 else "exact"
        theirs = stats.wilcoxon(d, zero_method="wilcox", correction=False, method=method)
        total = len(d) * (len(d) + 1) / 2
        assert min(ours.w_plus[column], total - ours.w_plus[column]) == theirs.statistic
        assert ours.p_value[column] == pytest.approx(theirs.pvalue, rel=1e-10)


@pytest.mark.parametrize("sizes", [(2, 2), (3, 40), (30, 25), (100, 140)])
@pytest.mark.parametrize("kind", KINDS)
def test_rank_sum_equals_scipy(kind: str, sizes: tuple[int, int]) -> None:
    rng = np.random.default_rng(sizes[1])
    target, reference = draw(kind, sizes[0], 40, rng) * 1.0, draw(kind, sizes[1], 40, rng)
    target[:, 0] = 0
    reference[:, 0] = 0
    target[:, 1], reference[:, 1] = 2.0, 2.0
    ours = statistics.rank_sum(sparse.csc_array(target), sparse.csc_array(reference))
    theirs = stats.mannwhitneyu(target, reference, method="asymptotic", use_continuity=True, axis=0)
    np.testing.assert_allclose(ours.auroc * sizes[0] * sizes[1], theirs.statistic, rtol=0, atol=1e-9)
    np.testing.assert_allclose(ours.p_value[2:], theirs.pvalue[2:], rtol=1e-10)
    assert ours.p_value[0] == ours.p_value[1] == 1 and ours.auroc[0] == ours.auroc[1] == 0.5


def test_rank_sum_refuses_negative_values() -> None:
    column = sparse.csc_array(np.array([[1.0], [-1.0]]))
    with pytest.raises(ValueError, match=">= 0"):
        statistics.rank_sum(column, column)


def test_stored_zeros_change_nothing() -> None:
    dense = np.array([[1.0], [0.0], [-2.0], [3.0]])
    stored = sparse.csc_array((dense[:, 0], np.arange(4), np.array([0, 4])), shape=(4, 1))
    assert stored.nnz == 4
    ours, plain = statistics.signed_rank(stored), statistics.signed_rank(sparse.csc_array(dense))
    assert (ours.w_plus, ours.n_nonzero, ours.p_value) == (plain.w_plus, plain.n_nonzero, plain.p_value)


def test_effect_sizes_equal_their_definitions() -> None:
    rng = np.random.default_rng(0)
    target, reference = draw("zero-heavy", 17, 30, rng), draw("zero-heavy", 12, 30, rng)
    d = target[:12] - reference
    scale = np.ones(30)
    ours = statistics.paired_effect(d.sum(0), (d**2).sum(0), 12, scale)
    spread = d.std(0, ddof=1)
    np.testing.assert_allclose(ours, np.divide(d.mean(0), spread, out=np.zeros(30), where=spread > 0), rtol=1e-9)

    ours = statistics.unpaired_effect(
        target.sum(0), (target**2).sum(0), 17, reference.sum(0), (reference**2).sum(0), 12, scale
    )
    pooled = np.sqrt((16 * target.var(0, ddof=1) + 11 * reference.var(0, ddof=1)) / 27)
    cohen = np.divide(target.mean(0) - reference.mean(0), pooled, out=np.zeros(30), where=pooled > 0)
    np.testing.assert_allclose(ours, cohen * (1 - 3 / (4 * 27 - 1)), rtol=1e-3)  # the textbook's approximation
    assert np.all(np.abs(ours[cohen != 0]) < np.abs(cohen[cohen != 0]))


def test_no_spread_is_zero_or_undefined_and_never_infinite() -> None:
    d = np.stack([np.zeros(6), np.full(6, 0.1), np.full(6, 0.1) + 1e-12 * np.arange(6)], axis=1)
    effect = statistics.paired_effect(d.sum(0), (d**2).sum(0), 6, np.array([0.0, 1.0, 1.0]))
    assert effect[0] == 0 and np.isnan(effect[1:]).all()
    a, b = np.full((4, 2), 0.7), np.stack([np.full(5, 0.7), np.full(5, 0.3)], axis=1)
    g = statistics.unpaired_effect(a.sum(0), (a**2).sum(0), 4, b.sum(0), (b**2).sum(0), 5, np.full(2, 0.7))
    assert g[0] == 0 and np.isnan(g[1])


def test_benjamini_hochberg_leaves_out_what_is_no_test() -> None:
    p = np.array([0.01, np.nan, 0.04, 0.5])
    q = statistics.benjamini_hochberg(p)
    np.testing.assert_allclose(q[[0, 2, 3]], [0.03, 0.06, 0.5])
    rng = np.random.default_rng(0)
    many = np.round(rng.random(500) ** 3, 2)
    np.testing.assert_allclose(statistics.benjamini_hochberg(many), stats.false_discovery_control(many), rtol=1e-12)
    assert np.isnan(q[1]) and np.isnan(statistics.benjamini_hochberg(np.array([np.nan]))).all()


def test_spearman_equals_scipy() -> None:
    rng = np.random.default_rng(0)
    a = np.round(rng.normal(size=200), 1)
    b = np.round(a + rng.normal(size=200), 1)
    expected = stats.spearmanr(a[2:], b[2:]).statistic
    a[0], b[1] = np.nan, np.nan
    assert statistics.spearman(a, b) == pytest.approx(expected, rel=1e-12)
    assert np.isnan(statistics.spearman(a[:4], b[:4])) and np.isnan(statistics.spearman(a, np.zeros(200)))


def test_what_n_can_support() -> None:
    assert statistics.smallest_p(8, 8, paired=True) == pytest.approx(0.0078125)
    assert statistics.smallest_p(4, 4, paired=False) == pytest.approx(2 / 70)
    assert statistics.prompts_needed(16_384, 0.05, paired=True) == 20
    assert statistics.prompts_needed(131_072, 0.05, paired=True) == 23
    n = statistics.prompts_needed(16_384, 0.05, paired=False)
    assert statistics.smallest_p(n, n, paired=False) <= 0.05 / 16_384
    assert statistics.smallest_p(n - 1, n - 1, paired=False) > 0.05 / 16_384
