"""Overlap at k, rank-biased overlap and rank correlation: scipy and the paper's own example as second opinion."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from core.analysis import overlap


def whole(rng: np.random.Generator, n: int) -> np.ndarray:
    """Places of a whole random ranking of n features."""
    return rng.permutation(n) + 1


def of_lists(*lists: str) -> tuple[np.ndarray, ...]:
    """Places of lists of letters over all letters that stand in one of them."""
    letters = sorted(set("".join(lists)))
    return tuple(np.array([x.index(c) + 1 if c in x else len(letters) + 1 for c in letters]) for x in lists)


def one_stratum(n: int) -> np.ndarray:
    return np.zeros(n, dtype=int)


def test_places_leave_out_who_is_no_member() -> None:
    found = overlap.places(np.array([0.3, 0.1, 0.2, 0.0]), np.array([True, True, False, True]))
    assert found.tolist() == [3, 2, 5, 1]


def test_overlap_is_the_intersection_of_the_top_sets() -> None:
    rng = np.random.default_rng(0)
    rankings = np.stack([whole(rng, 60) for _ in range(3)])
    for k in (1, 7, 30, 60):
        sets = [set(np.flatnonzero(r <= k).tolist()) for r in rankings]
        assert overlap.observed(rankings[:2], [k]).item() == len(sets[0] & sets[1])
        assert overlap.observed(rankings, [k]).item() == len(sets[0] & sets[1] & sets[2])


def test_uniform_chance_is_the_hypergeometric_distribution() -> None:
    rng, n, ks = np.random.default_rng(1), 300, [5, 20, 60]
    rankings = np.stack([whole(rng, n), whole(rng, n)])
    exact = [stats.hypergeom(n, k, k) for k in ks]
    np.testing.assert_allclose(overlap.expected(rankings, one_stratum(n), ks), [e.mean() for e in exact], rtol=1e-12)
    drawn = overlap.shuffled(rankings, [overlap.shuffles(one_stratum(n), 20_000, rng)], ks)
    for column, e in zip(drawn.T, exact, strict=True):
        assert column.mean() == pytest.approx(e.mean(), abs=4 * e.std() / np.sqrt(20_000))
        assert column.std() == pytest.approx(e.std(), rel=0.03)
        assert np.quantile(column, [0.025, 0.975]).tolist() == list(e.ppf([0.025, 0.975]))


def test_chance_of_three_is_k_cubed_over_n_squared() -> None:
    rng, n, ks = np.random.default_rng(2), 120, [30, 60]
    rankings = np.stack([whole(rng, n) for _ in range(3)])
    np.testing.assert_allclose(overlap.expected(rankings, one_stratum(n), ks), [k**3 / n**2 for k in ks])
    orders = [overlap.shuffles(one_stratum(n), 4000, rng) for _ in range(2)]
    np.testing.assert_allclose(overlap.shuffled(rankings, orders, ks).mean(0), [k**3 / n**2 for k in ks], rtol=0.03)


def test_shuffling_within_strata_keeps_to_them_and_its_mean_is_exact() -> None:
    rng, n = np.random.default_rng(3), 200
    strata = np.repeat([0, 1, 2, 3], [20, 30, 50, 100])
    orders = overlap.shuffles(strata, 3000, rng)
    assert (strata[orders] == strata).all()
    assert (np.sort(orders, axis=1) == np.arange(n)).all()
    keys = rng.random(n) + 0.4 * strata  # both rankings prefer the first strata
    rankings = np.stack([overlap.places(keys, np.ones(n, dtype=bool)),
                         overlap.places(rng.random(n) + 0.4 * strata, np.ones(n, dtype=bool))])
    exact = overlap.expected(rankings, strata, [20, 50])
    np.testing.assert_allclose(overlap.shuffled(rankings, [orders], [20, 50]).mean(0), exact, rtol=0.03)
    assert (exact > overlap.expected(rankings, one_stratum(n), [20, 50])).all()


def test_partial_rankings_expect_fewer() -> None:
    members = np.arange(100) < 10
    short = overlap.places(np.arange(100.0), members)
    both = np.stack([short, np.arange(1, 101)])
    assert overlap.expected(both, one_stratum(100), [50]).item() == pytest.approx(10 * 50 / 100)


@pytest.mark.parametrize("n_strata", [1, 4, 20])
def test_strata_are_neighbours_of_about_one_size(n_strata: int) -> None:
    values = np.random.default_rng(4).random(1000)
    strata = overlap.strata_of(values, n_strata)
    assert len(set(strata)) == n_strata and np.bincount(strata).min() >= 1000 // n_strata - 2
    assert (np.diff(strata[np.argsort(values)]) >= 0).all()


def test_equal_values_and_few_features_make_one_stratum() -> None:
    assert set(overlap.strata_of(np.ones(500), 20)) == {0}
    assert set(overlap.strata_of(np.arange(30.0), 20)) == {0}
    mixed = overlap.strata_of(np.r_[np.zeros(300), np.ones(300), np.arange(2, 102.0)], 10)
    assert len(set(mixed[:300])) == len(set(mixed[300:600])) == 1 and mixed[0] != mixed[300]


def test_rank_biased_overlap_of_the_paper_s_example() -> None:
    """Webber, Moffat and Zobel 2010, table of <a b c d e f g> and <z c a v w x y>: agreement 0, 0, 2/3, 2/4, 2/5 ..."""
    a, b = of_lists("abcdefg", "zcavwxy")
    p, agreement = 0.9, [0, 0, 2 / 3, 1 / 2, 2 / 5, 1 / 3, 2 / 7]
    by_hand = (1 - p) / p * sum(x * p**d for d, x in enumerate(agreement, 1)) + agreement[-1] * p**7
    found, _ = overlap.rank_biased_of(a, b, one_stratum(len(a)), p)
    assert found == pytest.approx(by_hand) and by_hand == pytest.approx(0.28822, abs=1e-5)


def test_rank_biased_overlap_by_hand_even_and_uneven() -> None:
    # 0.1/0.9 (0.9^2/2 + 0.9^3 2/3 + 0.9^4 + 0.9^5) + 0.9^5
    a, b = of_lists("abcde", "bcdae")
    assert overlap.rank_biased_of(a, b, one_stratum(5), 0.9)[0] == pytest.approx(0.828, abs=5e-4)
    # equation 32: the short list ends at 2 with X_2 = 1, the long one has X = 0, 1, 2, 2
    a, b = of_lists("ab", "cabd")
    overlaps = np.array([0, 1, 2, 2])
    p, s = 0.8, 2
    series = sum(overlaps[d - 1] / d * p**d for d in range(1, 5))
    series += sum(overlaps[s - 1] * (d - s) / (s * d) * p**d for d in range(3, 5))
    by_hand = (1 - p) / p * series + ((overlaps[3] - overlaps[1]) / 4 + overlaps[1] / s) * p**4
    assert overlap.rank_biased_of(a, b, one_stratum(len(a)), p)[0] == pytest.approx(by_hand)


def test_rank_biased_overlap_is_one_with_itself_and_nought_without_a_common_feature() -> None:
    a, b, empty = of_lists("abcdef", "uvwxyz", "")
    strata = one_stratum(len(a))
    assert overlap.rank_biased_of(a, a, strata, 0.98)[0] == pytest.approx(1, abs=1e-12)
    assert overlap.rank_biased_of(a, b, strata, 0.98)[0] == 0
    assert np.isnan(overlap.rank_biased_of(a, empty, strata, 0.98)[0])


def test_the_expected_rank_biased_overlap_is_the_mean_over_shuffles() -> None:
    rng, n = np.random.default_rng(5), 80
    a, b, strata = whole(rng, n), whole(rng, n), np.arange(n) % 2
    drawn = overlap.shuffles(strata, 3000, rng)
    mean = np.mean([overlap.rank_biased_of(a, b[order], strata, 0.9)[0] for order in drawn])
    assert overlap.rank_biased_of(a, b, strata, 0.9)[1] == pytest.approx(mean, rel=0.05)


def test_correlation_against_scipy_with_ties() -> None:
    rng = np.random.default_rng(6)
    a = rng.normal(size=400).round(1)
    b = (a + rng.normal(size=400)).round(1)
    found = overlap.correlation(a, b, one_stratum(400))
    assert found.rho == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12) and found.n == 400
    assert found.ci95[0] < found.rho < found.ci95[1] and abs(found.expected) < 1e-9
    alone = overlap.correlation(a, b, np.arange(400))  # nothing to shuffle
    assert alone.expected == pytest.approx(found.rho)
    assert overlap.correlation(a, a, one_stratum(400)).ci95 == pytest.approx((1, 1))
    assert np.isnan(overlap.correlation(a, np.ones(400), one_stratum(400)).rho)


def test_the_expected_correlation_is_the_mean_over_shuffles() -> None:
    rng = np.random.default_rng(7)
    strata = np.repeat([0, 1, 2], 60)
    a, b = rng.normal(size=180) + strata, rng.normal(size=180) + strata
    mean = np.mean([stats.spearmanr(a, b[order]).statistic for order in overlap.shuffles(strata, 600, rng)])
    assert overlap.correlation(a, b, strata).expected == pytest.approx(mean, abs=0.02) and mean > 0.2


def test_the_interval_of_the_correlation_holds_the_true_one() -> None:
    rng, true = np.random.default_rng(8), 6 / np.pi * np.arcsin(0.6 / 2)
    held = 0
    for _ in range(300):
        x = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], size=150)
        low, high = overlap.correlation(x[:, 0], x[:, 1], one_stratum(150)).ci95
        held += low <= true <= high
    assert 0.91 <= held / 300 <= 0.985
