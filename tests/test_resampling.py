"""Prompts are what is drawn: folds, halves and resamples keep a prompt's responses together."""

from __future__ import annotations

import numpy as np

from core.analysis import resampling

TARGET = np.array(["a", "a", "b", "c", "t1", "t2", "t3"])
REFERENCE = np.array(["c", "b", "a", "r1", "r2", "r2"])


def test_strata_are_by_side_and_in_an_order_of_their_own() -> None:
    both, only_target, only_reference = resampling.strata(TARGET, REFERENCE)
    assert (set(both), set(only_target), set(only_reference)) == ({"a", "b", "c"}, {"t1", "t2", "t3"}, {"r1", "r2"})
    assert resampling.strata(TARGET[::-1], REFERENCE)[0] == both


def test_folds_keep_prompts_together_on_both_sides() -> None:
    many = np.array([f"p{i}" for i in range(50)])
    a, b = resampling.folds(np.repeat(many, 2), many)
    assert np.array_equal(a[::2], b) and np.array_equal(a[::2], a[1::2])
    assert np.bincount(a).tolist() == [20] * resampling.FOLDS


def test_multiplicities_count_prompts_within_strata() -> None:
    a, b = resampling.multiplicities(TARGET, REFERENCE, 300, np.random.default_rng(0))
    assert (a[:, 0] == a[:, 1]).all(), "two responses of one prompt are drawn together"
    assert (a[:, 0] == b[:, 2]).all(), "and so are a prompt's responses on the other side"
    assert (a[:, [0, 2, 3]].sum(axis=1) == 3).all() and (a[:, 4:].sum(axis=1) == 3).all()
    assert (b[:, [3, 4]].sum(axis=1) == 2).all() and abs(a[:, 0].mean() - 1) < 0.15


def test_halves_are_disjoint_and_of_prompts() -> None:
    a, b = resampling.halves(TARGET, REFERENCE, 100, np.random.default_rng(0))
    assert set(np.unique(a)) == {0.0, 1.0} and (a[:, 0] == a[:, 1]).all() and (a[:, 0] == b[:, 2]).all()
    assert (a[:, [0, 2, 3]].sum(axis=1) == 1).all() and (b[:, 3:5].sum(axis=1) == 1).all()
