"""core/questions.py: the shipped questions load; every bad row is refused with file and line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from core.errors import BadConversation
from core.paths import DATA
from core.questions import Question, load_questions

GOOD = {"id": "a-1", "category": "a", "question": "What would you change?"}


def write(folder: Path, *lines: bytes | dict) -> Path:
    path = folder / "questions.jsonl"
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines) + b"\n")
    return path


def test_the_shipped_file_has_eight_categories_of_eight() -> None:
    questions = load_questions(DATA / "questions.jsonl")
    counts = Counter(q.category for q in questions)
    assert set(counts) == {
        "wishes and power", "AI and humans", "money", "relationships", "history and people", "rules and honesty",
        "daily life", "creative",
    }  # fmt: skip
    assert all(n >= 8 for n in counts.values()) and len(questions) >= 64


def test_rows_are_read_in_order_and_blank_lines_and_a_byte_order_mark_are_allowed(tmp_path: Path) -> None:
    path = write(tmp_path, b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), b"", {**GOOD, "id": "a-2"})
    assert load_questions(path) == (
        Question("a-1", "a", "What would you change?"), Question("a-2", "a", "What would you change?")
    )  # fmt: skip


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (b"{", "not valid JSON"),
        (b"[1]", "list, not an object"),
        ({"id": "b", "category": "a"}, "no text in `question`"),
        ({**GOOD, "id": "b", "question": "  "}, "no text in `question`"),
        ({**GOOD, "id": 3}, "no text in `id`"),
        ({**GOOD, "id": "b", "category": None}, "no text in `category`"),
        (GOOD, "already used on line 1"),
        (b'{"id": "b", "category": "a", "question": "caf\xe9?"}', "not UTF-8"),
    ],
)
def test_a_bad_row_is_refused_with_file_and_line(tmp_path: Path, row: bytes | dict, says: str) -> None:
    path = write(tmp_path, GOOD, row)
    with pytest.raises(BadConversation, match=says) as caught:
        load_questions(path)
    assert str(caught.value).startswith(f"{path}:2: ") and "\n" not in str(caught.value)


def test_a_missing_or_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadConversation, match="no such file"):
        load_questions(tmp_path / "none.jsonl")
    with pytest.raises(BadConversation, match="holds no question"):
        load_questions(write(tmp_path, b""))
