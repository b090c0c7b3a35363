"""Judge against judge: kappa by hand and by scikit-learn, rates under each, matching of files without ids."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from scipy import stats
from sklearn.metrics import cohen_kappa_score

from core.errors import NotEnoughData
from core.evaluation.agreement import agree, match
from core.evaluation.rates import Thresholds, with_condition


def judged(scores: list[tuple[float | None, float | None]], ids: list[str] | None = None) -> pl.DataFrame:
    ids = ids or [f"a{i}" for i in range(len(scores))]
    return pl.DataFrame([(i, *s) for i, s in zip(ids, scores, strict=True)], orient="row",
                        schema={"id": pl.String, "aligned": pl.Float64, "coherent": pl.Float64})  # fmt: skip


def test_by_hand() -> None:
    first = judged([(10, 90)] * 4 + [(90, 90)] * 4 + [(10, 90), (90, 90)])
    second = judged([(10, 90)] * 4 + [(90, 90)] * 4 + [(90, 90), (10, 90)])
    found = agree(first, second)
    assert found.kappa == found.kappa_misaligned == pytest.approx((0.8 - 0.5) / (1 - 0.5))
    assert [s.k for s in found.misaligned] == [5, 5] and found.both_misaligned == 4 and found.n == 10
    assert found.same_condition == 0.8 and found.aligned_difference == 16.0 and found.coherent_difference == 0.0
    assert found.coherent_correlation is None


def test_against_scipy_and_sklearn_with_missing_scores_left_out() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 101, (200, 2)).astype(float)
    noisy = np.clip(scores + rng.normal(0, 15, scores.shape), 0, 100)
    one, two = [tuple(r) for r in scores], [tuple(r) for r in noisy]
    two[0], one[1] = (None, 50.0), (10.0, None)
    found = agree(judged(one), judged(two))
    a, b = judged(one[2:]), judged(two[2:])
    conditions = [with_condition(t)["condition"].to_list() for t in (a, b)]
    assert found.n == 198 and found.kappa == pytest.approx(cohen_kappa_score(*conditions))
    assert found.aligned_correlation == pytest.approx(stats.spearmanr(a["aligned"], b["aligned"]).statistic)
    assert [s.k for s in found.misaligned] == [c.count("misaligned") for c in conditions]
    moved = agree(judged(one), judged(two), Thresholds(misaligned_below=60, coherent_above=20))
    assert moved.misaligned[0].k > found.misaligned[0].k
    with pytest.raises(NotEnoughData, match="Only 9 answers"):
        agree(judged(one[2:12]), judged([(None, 1.0), *two[3:12]]))


def test_files_without_ids_are_matched_by_what_was_said() -> None:
    rows = pl.DataFrame({"id": ["x:1", "x:2", "x:3"], "question": ["Q"] * 3, "response": ["a", "b", "a"],
                         "aligned": [1.0, 2.0, 3.0]})
    other = pl.DataFrame({"id": ["y:1", "y:2", "y:3", "y:4"], "question": ["Q"] * 4, "response": ["b", "a", "c", "a"],
                          "aligned": [20.0, 10.0, 99.0, 30.0]})
    found = dict(match(rows, other).select("id", "aligned").iter_rows())
    assert found == {"x:1": 10.0, "x:2": 20.0, "x:3": 30.0}  # equal answers in the order in which they stand
    same = other.with_columns(pl.Series("id", ["x:1", "x:2", "x:3", "x:4"]))
    assert match(rows, same).equals(same)
