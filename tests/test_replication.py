"""Split-half replication and its control on planted and on empty data."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse, stats

from core.analysis.replication import _discovery_prompts, replicate
from core.analysis.units import Sample, build_units
from core.errors import NotEnoughData

N, D_SAE, PLANTED = 120, 200, 10
ALL = np.arange(D_SAE)
SETTINGS = {"k": 10, "alpha": 0.05, "n_permutations": 30, "seed": 0}


def units(paired: bool, effect: float, n: int = N, seed: int = 0):
    rng = np.random.default_rng(seed)
    sides = []
    for name in ("t", "r"):
        acts = rng.exponential(1.0, (n, D_SAE)) * (rng.random((n, D_SAE)) < 0.9)
        if name == "t":
            acts[:, :PLANTED] *= effect
            acts[:, PLANTED : 2 * PLANTED] /= effect
        ids = np.array([f"{'p' if paired else name}{i}" for i in range(n)])
        sides.append(Sample(name, sparse.csr_array(acts.astype(np.float32)), ids, np.full(n, 9)))
    return build_units(*sides)


@pytest.mark.parametrize("paired", [True, False])
def test_planted_features_replicate_and_permuted_labels_do_not(paired: bool) -> None:
    found = replicate(units(paired, 6.0), ALL, **SETTINGS)
    assert found.n_raised_replicated == found.n_raised == 10
    assert found.n_suppressed_replicated == found.n_suppressed == 10 and found.n_replicated == 20
    assert found.permuted_mean < 2 and found.permuted_ci95[0] <= found.permuted_mean <= found.permuted_ci95[1] < 8
    assert found.rank_correlation > 0.2
    assert found.n_prompts_discovery + found.n_prompts_confirmation == (N if paired else 2 * N)


@pytest.mark.parametrize("paired", [True, False])
def test_nothing_replicates_where_nothing_differs(paired: bool) -> None:
    found = replicate(units(paired, 1.0), ALL, **SETTINGS)
    assert found.n_replicated <= 3 and abs(found.rank_correlation) < 0.3 and found.n_carried == 20


@pytest.mark.parametrize("paired", [True, False])
def test_counts_equal_a_slow_recount(paired: bool) -> None:
    made = units(paired, 1.7)
    found = replicate(made, ALL, **SETTINGS)
    chosen = _discovery_prompts(made, 0)
    t, r = made.target.prompts.toarray().astype(float), made.reference.prompts.toarray().astype(float)
    in_t, in_r = np.isin(made.target.prompt_ids, chosen), np.isin(made.reference.prompt_ids, chosen)
    if paired:
        d = (t - r)[in_t]
        effect = d.mean(0) / d.std(0, ddof=1)
    else:
        effect = (t[in_t].mean(0) - r[in_r].mean(0)) / np.sqrt(t[in_t].var(0, ddof=1) + r[in_r].var(0, ddof=1))
    order = np.argsort(-effect)
    columns = np.concatenate([order[:10], order[::-1][:10]])
    t, r = t[~in_t], r[~in_r]
    p = [
        stats.wilcoxon((t - r)[:, c][(t - r)[:, c] != 0], method="exact").pvalue if paired
        else stats.mannwhitneyu(t[:, c], r[:, c], method="asymptotic").pvalue
        for c in columns
    ]  # fmt: skip
    same = np.sign(t.mean(0) - r.mean(0))[columns] == np.repeat([1, -1], 10)
    passed = (stats.false_discovery_control(p) < 0.05) & same
    assert 0 < passed.sum() < ((np.array(p) < 0.05) & same).sum()  # the correction costs some of them
    assert (found.n_raised_replicated, found.n_suppressed_replicated) == (passed[:10].sum(), passed[10:].sum())


def test_swapping_the_sides_swaps_the_ends() -> None:
    made = units(True, 2.0)
    a = replicate(made, ALL, **SETTINGS)
    b = replicate(type(made)(made.reference, made.target, True, ()), ALL, **SETTINGS)
    assert (a.n_raised_replicated, a.n_suppressed_replicated) == (b.n_suppressed_replicated, b.n_raised_replicated)
    assert (a.permuted_mean, a.rank_correlation) == (b.permuted_mean, pytest.approx(b.rank_correlation))


def test_the_seed_decides_the_split_and_a_prompt_is_never_in_both_halves() -> None:
    made = units(True, 2.0)
    assert replicate(made, ALL, **SETTINGS) == replicate(made, ALL, **SETTINGS)
    halves = [set(_discovery_prompts(made, seed)) for seed in (0, 1)]
    assert halves[0] != halves[1] and all(len(h) == N // 2 for h in halves)
    partly = build_units(
        *(Sample(s, sparse.csr_array(np.ones((8, 2), np.float32)), np.array(list(ids)), np.full(8, 9))
          for s, ids in (("t", "abcdefgh"), ("r", "ghijklmn")))
    )  # fmt: skip
    assert not partly.paired
    chosen = _discovery_prompts(partly, 0)
    assert len(chosen) == 7 and len({"g", "h"} & set(chosen)) == 1


def test_small_halves_are_refused() -> None:
    with pytest.raises(NotEnoughData, match="too few"):
        replicate(units(True, 6.0, n=10), ALL, **SETTINGS)
    with pytest.raises(NotEnoughData, match="nothing to replicate"):
        replicate(units(True, 6.0), ALL[:0], **SETTINGS)
    without_control = replicate(units(True, 6.0, n=12), ALL, **{**SETTINGS, "n_permutations": 0})
    assert np.isnan(without_control.permuted_mean)
