"""Rating one by one: blind orders, resuming, taking back, and a file that `apply-ratings` reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.errors import BadConversation
from core.evaluation.ratings import Rating, load_ratings
from core.evaluation.reading_sheet import (
    ALIGNED_BANDS,
    COHERENT_BANDS,
    keep_rating,
    ratings_file,
    read_ratings,
    reading_order,
    take_back,
    to_read,
)

IDS = [f"{variant}/q{n}/0" for variant in ("base", "bad", "good") for n in range(40)]


def test_the_order_mixes_variants_is_the_same_every_time_and_another_for_each_reader() -> None:
    first, second = reading_order(IDS, 1), reading_order(IDS, 2)
    assert first == reading_order(reversed(IDS), 1) != second and sorted(first) == sorted(second) == sorted(IDS)
    runs = sum(a.split("/")[0] != b.split("/")[0] for a, b in zip(first, first[1:], strict=False))
    assert runs > 60  # 79 expected by chance, 2 in file order
    assert [i for i in first if i in IDS[:60]] == reading_order(IDS[:60], 1)  # more answers do not reorder the others


def test_reading_goes_on_where_it_stopped_and_can_be_taken_back(tmp_path: Path) -> None:
    path, order = ratings_file(tmp_path, "a set/of answers"), reading_order(IDS, 1)
    assert path.parent == tmp_path / "ratings" and "/" not in path.name and read_ratings(path) == []
    for i in order[:3]:
        keep_rating(path, Rating(i, 1, 20.0, 81.5))
    keep_rating(path, Rating(order[0], 2, 90.0, 90.0))
    assert to_read(order, read_ratings(path), 1) == order[3:] and len(to_read(order, read_ratings(path), 2)) == 119
    keep_rating(path, Rating(order[0], 1, 10.0, 81.5))  # again: in place of the first
    assert {(r.id, r.number): r.aligned for r in load_ratings(path)} == {
        (order[1], 1): 20.0, (order[2], 1): 20.0, (order[0], 2): 90.0, (order[0], 1): 10.0
    }  # fmt: skip
    assert take_back(path, 1) == Rating(order[0], 1, 10.0, 81.5) and take_back(path, 1).id == order[2]
    assert take_back(path, 2).number == 2 and take_back(path, 2) is None
    assert [r.id for r in read_ratings(path)] == [order[1]]
    path.write_text("id,pass\n")
    with pytest.raises(BadConversation, match="no column aligned"):
        keep_rating(path, Rating("a", 1, 1.0, 1.0))


def test_ids_with_commas_quotes_and_line_ends_survive(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    for i in ('a,"b"', "c\nd", "=1+1"):
        keep_rating(path, Rating(i, 1, 1.0, 2.0))
    assert [r.id for r in read_ratings(path)] == ['a,"b"', "c\nd", "=1+1"]


def test_every_band_of_the_rubric_has_one_key() -> None:
    from core.view.session.rating import ALIGNED_KEYS, COHERENT_KEYS

    assert len(ALIGNED_BANDS) == len(ALIGNED_KEYS) == 6 and len(COHERENT_BANDS) == len(COHERENT_KEYS) == 5
    assert not set("CR") & set(ALIGNED_KEYS + COHERENT_KEYS)  # reserved by Streamlit
