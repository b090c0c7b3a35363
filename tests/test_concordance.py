"""Concordance of planted rankings: shared, exclusive and opposed features, chance, controls, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy import stats

from core.analysis import feature_table
from core.analysis.concordance import Concordance, ConcordanceSettings, concord
from core.analysis.ranking import Ranking, RankingSettings
from core.errors import NotEnoughData, PresetError, SaeMismatch

N, K = 600, 50


def make_ranking(
    effect: np.ndarray,
    *,
    spread: float = 1.0,
    q: np.ndarray | None = None,
    active: np.ndarray | float = 0.5,
    share: np.ndarray | float = 0.9,
    tested: np.ndarray | None = None,
    layer: int = 15,
    position: str = "response",
) -> Ranking:
    """A ranking with these effect sizes [N]; mean_diff is effect times `spread`; q is tiny unless given."""
    effect, n = np.asarray(effect, dtype=float), len(effect)
    tested = np.ones(n, dtype=bool) if tested is None else tested
    rank = np.full(n, np.nan)
    own = np.flatnonzero(tested)
    rank[own[np.argsort(-effect[own], kind="stable")]] = np.arange(1, len(own) + 1)
    q = np.full(n, 1e-6) if q is None else q
    data = {
        "layer": np.full(n, layer), "feature": np.arange(n), "mean_target": np.full(n, 1.0),
        "mean_reference": 1.0 - effect * spread, "mean_diff": effect * spread,
        "frac_active_target": np.broadcast_to(active, n), "frac_active_reference": np.broadcast_to(active, n),
        "log2_ratio": np.zeros(n), "effect_size": effect, "auroc": np.full(n, 0.5),
        "p_value": np.where(tested, q, np.nan), "q_value": np.where(tested, q, np.nan),
        "n_target": np.full(n, 40), "n_reference": np.full(n, 40),
        "content_share": np.broadcast_to(share, n), "rank": rank,
    }  # fmt: skip
    table = pl.DataFrame([pl.Series(k, v, nan_to_null=True) for k, v in data.items()])
    table = feature_table.validate(table.cast(dict(feature_table.SCHEMA)).sort("rank", "feature", nulls_last=True))
    return Ranking(
        table=table, target="bad", reference="good", layer=layer, position=position, n_target=40, n_reference=40,
        n_prompts=40, paired=True, replication=None, mean_length_target=60.0, mean_length_reference=60.0,
        length_ratio=1.0, n_tested=int(tested.sum()), settings=RankingSettings(), notes=(),
    )  # fmt: skip


def planted(m: int, seed: int = 0, n: int = N, k: int = K) -> tuple[np.ndarray, np.ndarray]:
    """Effects of two contrasts that share exactly m of their k most raised and m of their k most suppressed."""
    rng = np.random.default_rng(seed)
    a, b = (rng.uniform(-0.5, 0.5, n) for _ in range(2))
    for end, sign in ((0, 1), (1, -1)):
        start = end * 2 * k
        a[start : start + k] = sign * rng.uniform(1, 2, k)
        b[start + k - m : start + 2 * k - m] = sign * rng.uniform(1, 2, k)
    return a, b


def pair(a: np.ndarray, b: np.ndarray, **more) -> Concordance:
    return concord({"data": make_ranking(a), "model": make_ranking(b)}, **more)


def at(found: Concordance, tail: str = "raised", k: int = K, names: tuple[str, ...] = ("data", "model")):
    return found.overlap_of(names, tail).at_k(k)


# -------------------------------------------------------------------------------------------- planted truth


@pytest.mark.parametrize("m", [0, 1, 14, 50])
def test_the_planted_number_of_shared_features_is_found_at_both_ends(m: int) -> None:
    found = pair(*planted(m))
    assert (at(found).observed, at(found, "suppressed").observed) == (m, m)
    assert at(found).uniform.expected == pytest.approx(K * K / N) and at(found).sizes == (K, K)


def test_independent_contrasts_stay_within_chance() -> None:
    inside = 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        found = pair(rng.normal(size=400), rng.normal(size=400), settings=ConcordanceSettings(k=40, ks=(40,)))
        low, high = at(found, k=40).matched.ci95
        inside += low <= at(found, k=40).observed <= high
    assert inside / 120 >= 0.92  # the interval is of whole numbers, so it holds a little more than 95%


def test_the_interval_is_the_hypergeometric_one() -> None:
    found = pair(*planted(5), settings=ConcordanceSettings(n_permutations=5000))
    exact = stats.hypergeom(N, K, K)
    assert at(found).uniform.ci95 == tuple(exact.ppf([0.025, 0.975]))


def test_frequent_features_raise_the_stricter_chance() -> None:
    rng = np.random.default_rng(1)
    active = np.linspace(0.05, 0.95, N)
    a, b = (rng.normal(size=N) * active**2 for _ in range(2))
    found = concord({"data": make_ranking(a, active=active), "model": make_ranking(b, active=active)})
    one = at(found)
    assert one.matched.expected > 1.5 * one.uniform.expected and one.stricter is one.matched
    assert one.matched.ci95[0] <= one.observed <= one.matched.ci95[1]


def test_quadrants_name_what_moves_where() -> None:
    a, b = planted(10)
    a[300], b[300] = 1.5, -1.5
    quiet = np.abs(a) < 0.6, np.abs(b) < 0.6
    rankings = {name: make_ranking(x, q=np.where(q, 0.9, 1e-5))
                for name, x, q in zip(("data", "model"), (a, b), quiet, strict=True)}
    found = concord(rankings)
    word = dict(found.table.select("feature", "quadrant").iter_rows())
    assert word[300] == "opposed" and word[45] == "shared" and word[145] == "shared"
    assert word[0] == "data only" and word[80] == "model only" and word[400] == "neither"
    assert found.table["quadrant"].value_counts().height == 5
    third = make_ranking(a, q=np.where(quiet[0], 0.9, 1e-5))
    three = dict(concord({**rankings, "response": third}).table.select("feature", "quadrant").iter_rows())
    assert three[0] == "data and response only" and three[45] == "shared" and three[300] == "opposed"


def test_without_q_values_the_largest_effects_count() -> None:
    a, b = planted(10)
    found = concord({"data": make_ranking(a, q=np.full(N, np.nan)), "model": make_ranking(b)},
                    settings=ConcordanceSettings(top_share=0.1))
    assert found.table["direction_data"].abs().sum() == 60
    assert found.table["direction_model"].abs().sum() == N
    assert any("data: q-values are withheld, so the 10%" in note for note in found.notes)


def test_three_contrasts_give_each_pair_and_all() -> None:
    rng = np.random.default_rng(2)
    effects = [rng.permutation(np.r_[np.full(N // 2, -1.0), np.linspace(0.1, 1, N // 2)]) for _ in range(3)]
    effects[2][7:20] = -2
    for e in effects:
        e[:7] = 5 + rng.random(7)
    effects[0][7:20] = effects[1][7:20] = 4
    found = concord(dict(zip(("data", "model", "response"), map(make_ranking, effects), strict=True)),
                    settings=ConcordanceSettings(k=20))
    names = ("data", "model", "response")
    assert len(found.overlaps) == 8 and len(found.pairs) == 3
    assert at(found, names=names, k=20).observed == 7 and at(found, names=("data", "model"), k=20).observed == 20
    assert at(found, names=names, k=20).uniform.expected == pytest.approx(20**3 / N**2)
    assert np.isnan(found.overlap_of(names, "raised").rbo)


# ----------------------------------------------------------------------------------------------- invariants


def test_a_contrast_with_itself() -> None:
    a, _ = planted(0)
    found = pair(a, a)
    for tail in ("raised", "suppressed"):
        one = found.overlap_of(("data", "model"), tail)
        assert [x.observed for x in one.at] == [x.k for x in one.at] and one.rbo == pytest.approx(1)
    assert found.spearman("data", "model").rho == pytest.approx(1)
    assert set(found.table["quadrant"]) == {"shared"}


def test_a_contrast_and_its_reverse() -> None:
    a, _ = planted(0)
    found = pair(a, -a)
    assert at(found).observed == at(found, "suppressed").observed == 0
    assert found.spearman("data", "model").rho == pytest.approx(-1) and set(found.table["quadrant"]) == {"opposed"}


def test_swapping_the_contrasts_changes_nothing() -> None:
    rankings = dict(zip(("data", "model"), map(make_ranking, planted(9)), strict=True))
    control = make_ranking(planted(3, seed=5)[1])
    one = concord(rankings, {"model": control})
    other = concord(dict(reversed(rankings.items())), {"model": control})
    for tail in ("raised", "suppressed"):
        a, b = (x.overlap_of(("data", "model"), tail) for x in (one, other))
        assert a.at == b.at and a.rbo == b.rbo
    assert one.spearman("data", "model").rho == pytest.approx(other.spearman("data", "model").rho)
    assert set(one.table.columns) == set(other.table.columns)
    assert one.table.drop("quadrant").equals(other.table.select(one.table.drop("quadrant").columns))


def test_spearman_is_scipy_s_over_the_features_considered() -> None:
    a, b = planted(9)
    share = np.where(np.arange(N) < 20, 0.1, 0.9)
    found = concord({"data": make_ranking(a, share=share), "model": make_ranking(b)})
    rho = found.spearman("data", "model")
    assert rho.rho == pytest.approx(stats.spearmanr(a[20:], b[20:]).statistic) and rho.n == N - 20


# ------------------------------------------------------------------------------------- what is considered


def test_only_features_tested_in_every_contrast_and_no_format_features_count() -> None:
    a, b = planted(14)
    share, tested = np.full(N, 0.9), np.ones(N, dtype=bool)
    share[[36, 37]], tested[38] = 0.1, False  # among the fourteen
    rankings = {"data": make_ranking(a, share=share), "model": make_ranking(b, tested=tested)}
    found = concord(rankings)
    assert found.n_eligible == N - 1 and found.n_format_hidden == 2 and found.n_features == N - 3
    kept = np.setdiff1d(np.arange(N), [36, 37, 38])
    tops = [set(kept[np.argsort(-x[kept])[:K]]) for x in (a, b)]
    assert at(found).observed == len(tops[0] & tops[1]) and at(found).uniform.expected == pytest.approx(K**2 / (N - 3))
    with_format = concord(rankings, settings=ConcordanceSettings(include_format=True))
    assert with_format.n_features == N - 1 and with_format.n_format_hidden == 0
    assert {36, 37} <= set(with_format.table["feature"]) and not {36, 37, 38} & set(found.table["feature"])


def test_an_end_holds_only_features_moved_that_way() -> None:
    a, b = planted(5)
    found = pair(np.where(np.arange(N) < 8, a, -np.abs(a)), b)
    assert at(found).sizes == (8, K) and at(found).uniform.expected == pytest.approx(8 * K / N)
    assert found.table["raised_data"].count() == 8


def test_places_follow_the_ranking_s_own_order() -> None:
    a, b = planted(5)
    found = pair(a, b)
    top = feature_table.top(make_ranking(a).table, 20)["feature"].to_list()
    bottom = feature_table.bottom(make_ranking(a).table, 20)["feature"].to_list()
    assert found.table.sort("raised_data", nulls_last=True)["feature"].head(20).to_list() == top
    assert found.table.sort("suppressed_data", nulls_last=True)["feature"].head(20).to_list() == bottom


# ------------------------------------------------------------------------------------------ benign controls


def test_the_control_stands_in_for_its_contrast() -> None:
    a, b = planted(14)
    control = planted(5)[1]
    found = concord({"data": make_ranking(a), "model": make_ranking(b)}, {"model": make_ranking(control)})
    assert at(found).controls == {"model": 5} and at(found).observed == 14 and found.controlled == ("model",)
    np.testing.assert_allclose(found.table["control_model"], control[found.table["feature"].to_numpy()])
    assert found.table["control_data"].null_count() == N


@pytest.mark.parametrize("how", ["effect", "mean"])
def test_subtracting_a_control_leaves_what_it_does_not_explain(how: str) -> None:
    a, b = planted(14)
    control = np.where(np.arange(N) < 43, b, 0.0)  # explains seven of the fourteen
    rankings = {"data": make_ranking(a), "model": make_ranking(b, spread=3.0)}
    found = concord(rankings, {"model": make_ranking(control, spread=3.0)}, ConcordanceSettings(subtract=how))
    assert at(found).observed < 14 and not at(found).controls
    left = dict(found.table.select("feature", "effect_model").iter_rows())
    assert left[36] == pytest.approx(0) and left[45] == pytest.approx(b[45])
    assert found.table["q_model"].null_count() == N and found.table["q_data"].null_count() == 0
    assert any("Nothing is subtracted from data" in note for note in found.notes)
    assert any("model: its control is taken off" in note for note in found.notes)


def test_mean_subtraction_is_in_the_contrast_s_own_units() -> None:
    a, b = planted(14)
    rankings = {"data": make_ranking(a), "model": make_ranking(b, spread=2.0)}
    found = concord(rankings, {"model": make_ranking(b, spread=0.5)}, ConcordanceSettings(subtract="mean"))
    np.testing.assert_allclose(found.table["effect_model"], b * 0.75, rtol=1e-9)
    crude = concord(rankings, {"model": make_ranking(b, spread=0.5)}, ConcordanceSettings(subtract="effect"))
    np.testing.assert_allclose(crude.table["effect_model"], 0.0, atol=1e-12)


# --------------------------------------------------------------------------------------------------- refusals


def test_refusals() -> None:
    a, b = (make_ranking(x) for x in planted(3))
    with pytest.raises(PresetError, match="two or three different contrasts; 1 were given"):
        concord({"data": a})
    with pytest.raises(PresetError, match="4 were given"):
        concord({str(i): a for i in range(4)})
    with pytest.raises(SaeMismatch, match="600 features and model of layer 15 with 300"):
        concord({"data": a, "model": make_ranking(planted(3, n=300)[0])})
    with pytest.raises(SaeMismatch, match="layer 15 .* layer 9"):
        concord({"data": a, "model": make_ranking(planted(3)[0], layer=9)})
    with pytest.raises(SaeMismatch, match="the control of model"):
        concord({"data": a, "model": b}, {"model": make_ranking(planted(3, n=300)[0])})
    with pytest.raises(PresetError, match="one position"):
        concord({"data": a, "model": make_ranking(planted(3)[0], position="last_prompt")})
    with pytest.raises(NotEnoughData, match="600 features could be tested in all of them, fewer than the 601"):
        concord({"data": a, "model": b}, settings=ConcordanceSettings(k=601))
    with pytest.raises(PresetError, match="k = 0 .*; subtract = 'all'"):
        ConcordanceSettings(k=0, subtract="all")


def test_sizes_above_the_number_of_features_are_left_out_with_a_note() -> None:
    found = pair(*(x[:150] for x in planted(3)), settings=ConcordanceSettings(k=50))
    assert [x.k for x in found.overlap_of(("data", "model"), "raised").at] == [10, 20, 50, 100]
    assert any("Overlap at 200 is left out: only 150" in note for note in found.notes)


def test_the_same_seed_gives_the_same_result() -> None:
    one, other = (pair(*planted(9)) for _ in range(2))
    assert one.overlaps == other.overlaps and one.table.equals(other.table)
    moved = pair(*planted(9), settings=replace(ConcordanceSettings(), seed=1))
    assert [x.uniform.expected for x in moved.overlaps[0].at] == [x.uniform.expected for x in one.overlaps[0].at]


def test_it_imports_neither_torch_nor_the_slow_scipy_stats() -> None:
    code = ("import sys, core.analysis.concordance_files, core.analysis.concordance_report; "
            "sys.exit(bool({'torch', 'scipy.stats'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0
