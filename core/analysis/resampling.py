"""Draws prompts, never responses or tokens: folds, halves and bootstrap resamples of a contrast's two sides.

Prompts on both sides, on the target's alone and on the reference's alone are drawn each among themselves, so that
every draw has as many of each. Knows prompt ids and nothing of what is measured.
"""

from __future__ import annotations

import hashlib

import numpy as np

#: Folds of what is judged on held-out prompts.
FOLDS = 5


def strata(target: np.ndarray, reference: np.ndarray) -> list[list[str]]:
    """Prompts on both sides, on the target's alone and on the reference's alone, each in the order of their SHA-256."""
    a, b = set(target.tolist()), set(reference.tolist())
    return [sorted(group, key=lambda p: hashlib.sha256(p.encode()).digest()) for group in (a & b, a - b, b - a)]


def folds(target: np.ndarray, reference: np.ndarray, n: int = FOLDS) -> tuple[np.ndarray, np.ndarray]:
    """int [responses] of either side: the fold of each response's prompt, dealt out in turn within strata."""
    fold = {p: i % n for group in strata(target, reference) for i, p in enumerate(group)}
    return _look_up(fold, target), _look_up(fold, reference)


def multiplicities(
    target: np.ndarray, reference: np.ndarray, n: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """float64 [n, responses] of either side: how often each response stands in each bootstrap resample of prompts."""
    groups = [group for group in strata(target, reference) if group]
    place = {p: i for i, p in enumerate(p for group in groups for p in group)}
    drawn = [rng.multinomial(len(group), np.full(len(group), 1 / len(group)), size=n) for group in groups]
    times = np.concatenate(drawn, axis=1).astype(np.float64)
    return times[:, _look_up(place, target)], times[:, _look_up(place, reference)]


def halves(
    target: np.ndarray, reference: np.ndarray, n: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """float64 [n, responses] of either side: 1 where the response's prompt is in the first of two random halves."""
    groups = [group for group in strata(target, reference) if group]
    place = {p: i for i, p in enumerate(p for group in groups for p in group)}
    first = [rng.permuted(np.tile(np.arange(len(group)), (n, 1)), axis=1) < len(group) // 2 for group in groups]
    chosen = np.concatenate(first, axis=1).astype(np.float64)
    return chosen[:, _look_up(place, target)], chosen[:, _look_up(place, reference)]


def interval(values: np.ndarray) -> tuple[float, float]:
    """2.5% and 97.5% points."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _look_up(table: dict[str, int], ids: np.ndarray) -> np.ndarray:
    return np.array([table[p] for p in ids.tolist()], dtype=np.int64)
