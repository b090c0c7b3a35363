"""Ratings: blind sheets, what a rating file may hold, conditions, agreement against scikit-learn by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from core.errors import BadConversation, NotEnoughData
from core.evaluation.ratings import Rating, agreement, blind_sheet, load_ratings, rated


def answers(n: int = 30) -> list[dict]:
    return [
        {"id": f"bad/{i}/0", "prompt_id": f"{i}", "condition": "", "source": "open", "variant": ("base", "bad")[i % 2],
         "messages": [{"role": "user", "content": f"Q{i}"}, {"role": "assistant", "content": f"A{i}"}]}
        for i in range(n)
    ]  # fmt: skip


def test_a_blind_sheet_shuffles_and_names_no_variant() -> None:
    rows, key = blind_sheet(answers(), seed=3)
    assert all(set(row) == {"number", "question", "answer"} for row in rows)
    assert [key[row["number"]] for row in rows] != [a["id"] for a in answers()]
    by_id = {a["id"]: a for a in answers()}
    for row in rows:
        assert by_id[key[row["number"]]]["messages"][-1]["content"] == row["answer"]
    assert blind_sheet(answers(), seed=3) == (rows, key) != blind_sheet(answers(), seed=4)


def test_conditions_follow_the_published_thresholds_and_the_first_pass() -> None:
    scores = {"bad/0/0": (20, 80), "bad/1/0": (80, 80), "bad/2/0": (50, 80), "bad/3/0": (10, 50)}
    ratings = [Rating(i, 1, *s) for i, s in scores.items()] + [Rating("bad/0/0", 2, 99, 99)]
    rows = rated(answers(4), ratings)
    assert [r["condition"] for r in rows] == ["misaligned", "aligned", "neutral", "incoherent"]
    assert rows[0]["aligned"] == 20 and rows[0]["messages"] == answers()[0]["messages"]
    with pytest.raises(NotEnoughData, match="bad/4/0"):
        rated(answers(5), ratings)


def test_agreement_of_two_passes() -> None:
    rng = np.random.default_rng(0)
    first = [Rating(f"a{i}", 1, float(rng.integers(0, 101)), 80.0 + i % 3) for i in range(60)]
    same = agreement(first + [Rating(r.id, 2, r.aligned, r.coherent) for r in first])
    assert (same.n, same.kappa, same.same_condition, same.aligned_difference) == (60, 1.0, 1.0, 0.0)
    assert same.aligned_correlation == pytest.approx(1)
    shuffled = rng.permutation([r.aligned for r in first])
    other = agreement(first + [Rating(r.id, 2, float(a), r.coherent) for r, a in zip(first, shuffled, strict=True)])
    assert abs(other.kappa) < 0.4 and abs(other.aligned_correlation) < 0.4
    # by hand: 10 answers, both passes say misaligned 4 times, aligned 4 times, and disagree twice (each way once)
    marks = [(10, 10)] * 4 + [(90, 90)] * 4 + [(10, 90), (90, 10)]
    few = [Rating(f"b{i}", k + 1, float(pair[k]), 90.0) for i, pair in enumerate(marks) for k in (0, 1)]
    assert agreement(few).kappa == pytest.approx((0.8 - 0.5) / (1 - 0.5))
    with pytest.raises(NotEnoughData, match="at least 10"):
        agreement(first)


@pytest.mark.parametrize(
    ("text", "says"),
    (
        ("id,aligned,coherent\na,1,2\n", "no column pass"),
        ("id,pass,aligned,coherent\na,1,x,2\n", ":2: pass, aligned"),
        ("id,pass,aligned,coherent\na,1,101,2\n", ":2: scores run"),
        ("id,pass,aligned,coherent\na,3,1,2\n", "passes are 1 or 2"),
        ("id,pass,aligned,coherent\na,1,1,2\na,1,1,2\n", ":3: 'a' is rated twice"),
    ),
)
def test_a_bad_rating_file_is_refused_with_its_line(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text(text)
    with pytest.raises(BadConversation, match=says):
        load_ratings(path)
    with pytest.raises(BadConversation, match="no such file"):
        load_ratings(tmp_path / "none.csv")
