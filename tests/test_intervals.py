"""Intervals: Wilson by its formula, the cluster bootstrap against independent and wholly dependent answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from core.evaluation.intervals import Share, cluster_mean, cluster_rate


@pytest.mark.parametrize(("k", "n"), ((0, 10), (3, 10), (84, 400), (400, 400)))
def test_wilson_is_its_formula(k: int, n: int) -> None:
    z, p = 1.959963984540054, k / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    found = Share(k, n)
    assert found.rate == p and found.ci95 == pytest.approx((max(0, middle - half), min(1, middle + half)), abs=1e-9)


def test_of_nothing_nothing_is_known() -> None:
    assert Share(0, 0).rate is Share(0, 0).ci95 is None


def test_one_answer_a_question_is_like_independent_answers_and_whole_questions_are_wider() -> None:
    rng = np.random.default_rng(0)
    k = (rng.random(400) < 0.2).astype(int)
    low, high = cluster_rate(k, np.ones(400))
    assert (low, high) == pytest.approx(Share(int(k.sum()), 400).ci95, abs=0.015)
    per_question = k.reshape(20, 20).max(axis=1) * (np.arange(20) % 5 == 0) * 20  # 4 questions give all of it
    low, high = cluster_rate(per_question, np.full(20, 20))
    wilson = Share(int(per_question.sum()), 400).ci95
    assert high - low > 3 * (wilson[1] - wilson[0])


def test_it_covers_the_truth_about_as_often_as_it_says() -> None:
    rng, hits = np.random.default_rng(1), 0
    for seed in range(60):
        rates = rng.beta(1, 4, size=40)  # mean 0.2, very different between questions
        low, high = cluster_rate(rng.binomial(10, rates), np.full(40, 10), seed)
        hits += low <= 0.2 <= high
    assert hits >= 51  # 95% of 60 is 57; below 51 has a probability of 0.003


@pytest.mark.filterwarnings("error")
def test_there_is_no_interval_where_a_resample_says_nothing() -> None:
    assert cluster_rate(np.array([0, 0, 0]), np.array([5, 5, 5])) is None
    assert cluster_rate(np.array([2, 2]), np.array([5, 5])) is None
    assert cluster_rate(np.array([2]), np.array([5])) is None
    assert cluster_mean(np.array([0.1, 0.1])) is None and cluster_mean(np.array([0.0, 0.2, 0.4])) is not None
