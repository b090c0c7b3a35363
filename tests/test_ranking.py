"""Ranking on sparse synthetic data: planted features at the two ends, scipy as second opinion, and the invariances."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy import sparse, stats

from core.analysis import feature_table
from core.analysis.ranking import Ranking, RankingSettings, Sample, contrast_summary, rank_features
from core.errors import CacheError, NotEnoughData, PresetError, SaeMismatch

N, D_SAE = 80, 300
RAISED, SUPPRESSED = np.arange(0, 6), np.arange(6, 12)
SILENT, RARE = 298, 299
FAST = RankingSettings(replication_k=0)
SIGNED = ("mean_diff", "effect_size", "log2_ratio")


def values(rng: np.random.Generator, n: int = N, raise_by: float = 1.0) -> np.ndarray:
    prevalence = np.linspace(0.95, 0.15, D_SAE)
    acts = rng.exponential(1.0, size=(n, D_SAE)) * (rng.random((n, D_SAE)) < prevalence)
    acts[:, RAISED] *= raise_by
    acts[:, SUPPRESSED] /= raise_by
    acts[:, [SILENT, RARE]] = 0
    acts[0, RARE] = 5.0
    return acts.astype(np.float32)


def sample(acts: np.ndarray, ids: object = None, lengths: object = None, name: str = "bad") -> Sample:
    ids = [f"q{i}" for i in range(len(acts))] if ids is None else ids
    return Sample(name, sparse.csr_array(acts), np.array(ids), np.full(len(acts), 60) if lengths is None else lengths)


def rank(target: Sample, reference: Sample, settings: RankingSettings = FAST, **more) -> Ranking:
    return rank_features(target, reference, layer=15, position="response", settings=settings, **more)


def by_feature(ranking: Ranking) -> pl.DataFrame:
    return ranking.table.sort("feature")


def both(paired: bool, raise_by: float = 4.0, seed: int = 0) -> tuple[Sample, Sample]:
    rng = np.random.default_rng(seed)
    a, b = values(rng, raise_by=raise_by), values(rng)
    return sample(a), sample(b, ids=None if paired else [f"r{i}" for i in range(N)], name="good")


@pytest.mark.parametrize("paired", [True, False])
def test_planted_features_stand_at_the_two_ends(paired: bool) -> None:
    ranking = rank(*both(paired))
    assert ranking.paired is paired and ranking.n_target == ranking.n_reference == N
    assert ranking.n_prompts == (N if paired else 2 * N)
    assert set(feature_table.top(ranking.table, 6)["feature"]) == set(RAISED)
    assert set(feature_table.bottom(ranking.table, 6)["feature"]) == set(SUPPRESSED)
    planted = ranking.table.filter(pl.col("feature") < 12)
    assert (planted["q_value"] < 0.05).all()
    assert (ranking.table.filter(pl.col("feature") >= 12)["q_value"].drop_nulls() < 0.05).mean() < 0.05


@pytest.mark.parametrize("paired", [True, False])
def test_every_column_against_its_definition(paired: bool) -> None:
    target, reference = both(paired)
    t, r = target.acts.toarray().astype(float), reference.acts.toarray().astype(float)
    table = by_feature(rank(target, reference))
    col = {name: table[name].to_numpy() for name in table.columns}
    np.testing.assert_allclose(col["mean_target"], t.mean(0), rtol=1e-12)
    np.testing.assert_allclose(col["mean_diff"], t.mean(0) - r.mean(0), atol=1e-12)
    np.testing.assert_allclose(col["frac_active_reference"], (r > 0).mean(0))
    np.testing.assert_allclose(col["log2_ratio"], np.log2((t.mean(0) + 0.01) / (r.mean(0) + 0.01)), atol=1e-12)
    auroc = stats.mannwhitneyu(t, r, axis=0).statistic / N**2
    np.testing.assert_allclose(col["auroc"], auroc, rtol=1e-12)
    tested = ~np.isin(np.arange(D_SAE), [SILENT, RARE])
    if paired:
        d = t - r
        effect = d[:, tested].mean(0) / d[:, tested].std(0, ddof=1)
        p = [stats.wilcoxon(x[x != 0], method="exact" if (x != 0).sum() <= 50 else "asymptotic").pvalue
             for x in d[:, tested].T]
    else:
        pooled = np.sqrt((t.var(0, ddof=1) + r.var(0, ddof=1)) / 2)[tested]
        free = 2 * N - 2
        effect = (t.mean(0) - r.mean(0))[tested] / pooled * (1 - 3 / (4 * free - 1))
        p = stats.mannwhitneyu(t, r, axis=0, method="asymptotic").pvalue[tested]
    np.testing.assert_allclose(col["effect_size"][tested], effect, rtol=1e-4)
    np.testing.assert_allclose(col["p_value"][tested], p, rtol=1e-9)
    np.testing.assert_allclose(col["q_value"][tested], stats.false_discovery_control(p), rtol=1e-9)
    by_hand = np.flatnonzero(tested)[np.argsort(-effect)]
    assert table.sort("rank", nulls_last=True)["feature"].to_list()[: tested.sum()] == by_hand.tolist()


def test_features_below_the_floor_are_not_tested_and_come_last() -> None:
    ranking = rank(*both(True))
    tail = ranking.table.tail(2)
    assert tail["feature"].to_list() == [SILENT, RARE]
    assert all(tail[name].null_count() == 2 for name in ("rank", "p_value", "q_value"))
    assert ranking.n_tested == D_SAE - 2 == ranking.table["rank"].max()
    assert tail["mean_target"].to_list()[1] > 0
    assert rank(*both(True), replace(FAST, prevalence_floor=0.9)).n_tested < 40
    nothing = rank(*both(True), replace(FAST, min_active_responses=1000))
    assert nothing.n_tested == 0 and "none is tested" in nothing.notes[0]


def test_null_features_have_uniform_p_values() -> None:
    for paired in (True, False):
        p = rank(*both(paired, raise_by=1.0, seed=3)).table["p_value"].drop_nulls().to_numpy()
        assert stats.kstest(p, "uniform").pvalue > 0.001
        assert abs((p < 0.05).mean() - 0.05) < 0.04


@pytest.mark.parametrize("paired", [True, False])
def test_swapping_the_sides_flips_the_signs(paired: bool) -> None:
    target, reference = both(paired)
    a, b = by_feature(rank(target, reference)), by_feature(rank(reference, target))
    for name in SIGNED:
        np.testing.assert_allclose(a[name].to_numpy(), -b[name].to_numpy(), atol=1e-12)
    np.testing.assert_allclose(a["auroc"].to_numpy(), 1 - b["auroc"].to_numpy(), atol=1e-12)
    np.testing.assert_allclose(a["p_value"].to_numpy(), b["p_value"].to_numpy(), rtol=1e-12)
    assert a["frac_active_target"].equals(b["frac_active_reference"])


@pytest.mark.parametrize("paired", [True, False])
def test_the_order_of_rows_changes_nothing(paired: bool) -> None:
    rng = np.random.default_rng(1)
    target, reference = both(paired)
    repeated = [f"q{i // 4}" for i in range(N)]  # four responses a prompt
    # rows of very unlike sizes, so that the order of a sum shows in its last digits
    target = replace(target, prompt_ids=np.array(repeated), lengths=rng.integers(40, 80, N),
                     acts=target.acts * np.float32(10) ** rng.uniform(-6, 6, (N, 1)).astype(np.float32))
    if paired:
        reference = replace(reference, prompt_ids=np.array(repeated))
    first = rank(target, reference, RankingSettings(replication_k=6, n_permutations=5))
    shuffled = []
    for s in (target, reference):
        order = rng.permutation(N)
        shuffled.append(Sample(s.name, s.acts[order], s.prompt_ids[order], s.lengths[order]))
    again = rank(*shuffled, RankingSettings(replication_k=6, n_permutations=5))
    assert first.table.equals(again.table) and first.replication == again.replication
    assert replace(first, table=again.table) == again


@pytest.mark.parametrize("paired", [True, False])
def test_the_unit_of_activation_does_not_matter(paired: bool) -> None:
    target, reference = both(paired)
    # ties survive scaling by a power of two exactly, whatever the rounding
    scaled = [replace(s, acts=s.acts * np.float32(1024)) for s in (target, reference)]
    a, b = by_feature(rank(target, reference)), by_feature(rank(*scaled))
    for name in ("effect_size", "auroc", "p_value", "q_value", "rank"):
        np.testing.assert_allclose(a[name].to_numpy(), b[name].to_numpy(), rtol=1e-9)
    np.testing.assert_allclose(a["mean_diff"].to_numpy() * 1024, b["mean_diff"].to_numpy(), rtol=1e-9)


def test_responses_to_one_prompt_do_not_count_as_independent() -> None:
    target, reference = both(True)
    once = by_feature(rank(target, reference))
    three = [Sample(s.name, sparse.csr_array(sparse.vstack([s.acts] * 3)), np.tile(s.prompt_ids, 3),
                    np.tile(s.lengths, 3)) for s in (target, reference)]
    ranking = rank(*three)
    thrice = by_feature(ranking)
    assert (ranking.n_target, ranking.n_prompts) == (3 * N, N)
    for name in ("effect_size", "p_value", "mean_target", "auroc", "frac_active_target"):
        np.testing.assert_allclose(once[name].to_numpy(), thrice[name].to_numpy(), rtol=1e-9)
    alone = rank(*(replace(s, prompt_ids=np.char.add(s.prompt_ids, s.name)) for s in three))
    np.testing.assert_allclose(  # unpaired: over prompts too, not over the 240 responses
        by_feature(alone)["p_value"].to_numpy(),
        by_feature(rank(target, replace(reference, prompt_ids=np.char.add("x", reference.prompt_ids))))["p_value"],
        rtol=1e-9,
    )


def test_small_samples_keep_effect_sizes_and_lose_q_values() -> None:
    target, reference = both(True)
    few = [Sample(s.name, s.acts[:8], s.prompt_ids[:8], s.lengths[:8]) for s in (target, reference)]
    ranking = rank(*few)
    assert ranking.table["q_value"].null_count() == D_SAE
    assert ranking.table["p_value"].min() >= 0.0078 and ranking.table["rank"].drop_nulls().len() > 200
    assert "0.0078" in ranking.notes[0] and "at least 14 pairs" in ranking.notes[0]
    for n, withheld in ((8, False), (5, True)):  # 16 prompts can be split in 12870 ways, 10 in only 252
        sides = [Sample(s.name, s.acts[:n], np.char.add(s.prompt_ids[:n], s.name), s.lengths[:n]) for s in few]
        unpaired = rank(*sides)
        assert (unpaired.table["q_value"].null_count() == D_SAE) is withheld
        assert ("prompts a side are needed" in " ".join(unpaired.notes)) is withheld


def test_refusals_name_what_is_missing() -> None:
    target, reference = both(True)
    one = Sample("lonely", target.acts[:1], target.prompt_ids[:1], target.lengths[:1])
    with pytest.raises(NotEnoughData, match="lonely: 1 prompts to compare"):
        rank(one, reference)
    with pytest.raises(NotEnoughData, match="lonely: 1 paired prompts"):
        rank(one, reference, replace(FAST, pairing="paired"))
    with pytest.raises(SaeMismatch, match="300 features and good 10"):
        rank(target, replace(reference, acts=reference.acts[:, :10]))
    broken = target.acts.copy()
    broken.data[0] = np.inf
    with pytest.raises(CacheError, match="response 0, feature 0 has activation inf"):
        replace(target, acts=broken)
    broken.data[0] = -1.0
    with pytest.raises(CacheError, match="not a finite number >= 0"):
        replace(target, acts=broken)
    with pytest.raises(PresetError, match="alpha = 2 .*; pairing = 'both'"):
        RankingSettings(alpha=2, pairing="both")


def test_a_fixed_token_is_an_error_and_not_a_discovery() -> None:
    target, _ = both(True)
    with pytest.raises(NotEnoughData, match="degenerate"):
        rank(target, replace(target, name="same text"))
    constant = np.tile(np.linspace(0, 2, D_SAE, dtype=np.float32), (N, 1))
    for ids in (None, [f"r{i}" for i in range(N)]):
        with pytest.raises(NotEnoughData, match="degenerate"):
            rank(sample(constant), sample(constant * np.float32(0.5), ids=ids))
    rng = np.random.default_rng(5)
    mixed_target, mixed_reference = values(rng), values(rng)
    mixed_target[:, 0], mixed_reference[:, 0] = 2.0, 1.0
    wobble = np.float32(1 + 1e-7)
    mixed_reference[:, 1] = mixed_target[:, 1] * wobble  # rounding in one direction
    ranking = rank(sample(mixed_target), sample(mixed_reference))
    row, rounding = by_feature(ranking).row(0, named=True), by_feature(ranking).row(1, named=True)
    assert row["mean_diff"] == 1 and row["effect_size"] is row["p_value"] is row["rank"] is None
    assert rounding["effect_size"] == 0 and rounding["p_value"] == 1
    assert any("degenerate" in note for note in ranking.notes)


def test_length_is_reported_and_named_as_a_confound() -> None:
    target, reference = both(True)
    ranking = rank(replace(target, lengths=np.full(N, 30)), reference)
    assert ranking.length_ratio == 0.5 and "0.50 times as long" in ranking.notes[0]
    assert rank(target, reference).notes == ()


def test_summary_is_the_command_lines_json() -> None:
    share = np.full(D_SAE, 0.9)
    share[[0, 6]], share[1] = 0.1, np.nan
    ranking = rank(*both(True), RankingSettings(replication_k=5, n_permutations=3), content_share=share)
    summary = contrast_summary(ranking, 4, contrast="data")
    assert summary == json.loads(json.dumps(summary, allow_nan=False))
    assert {"contrast", "layer", "position", "n_target", "n_reference", "paired", "replication"} <= set(summary)
    features = [f["feature"] for f in summary["features"]]
    assert len(features) == 8 and set(features[:4]) <= set(RAISED) - {0} and set(features[4:]) <= set(SUPPRESSED) - {6}
    assert list(summary["features"][0]) == list(feature_table.SCHEMA) and summary["n_format_hidden"] == 2
    assert summary["features"][4]["rank"] == max(f["rank"] for f in summary["features"])
    with_format = contrast_summary(ranking, 6, include_format=True)
    assert with_format["contrast"] == "bad minus good" and {0, 6} <= {f["feature"] for f in with_format["features"]}
    no_control = rank(*both(True), RankingSettings(replication_k=5, n_permutations=0))
    assert contrast_summary(no_control, 1)["replication"]["permuted_mean"] is None
    assert ranking.replication.n_candidates == D_SAE - 4  # two silent, two format


def test_analysis_imports_neither_torch_nor_the_slow_scipy_stats() -> None:
    code = "import sys, core.analysis.ranking; sys.exit(bool({'torch', 'scipy.stats'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0
