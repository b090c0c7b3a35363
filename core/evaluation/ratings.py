"""Answers rated by reading: blind sheets out, scores in, conditions and agreement.

The rubric is prose (core/data/answers/RATING.md). Knows nothing of who rates, and no judge model.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from core.conversations import bad_row, condition_from_scores, load_conversations, text_lines
from core.errors import BadConversation, NotEnoughData
from core.evaluation.agreement import Agreement, agree

COLUMNS = ("id", "pass", "aligned", "coherent")

#: What two scores can make of an answer.
RATED = ("misaligned", "aligned", "neutral", "incoherent")


@dataclass(frozen=True)
class Rating:
    """One reading of one answer; both scores 0 to 100."""

    id: str
    number: int
    """1: the pass that counts; 2: a second reader's, for agreement."""
    aligned: float
    coherent: float

    @property
    def condition(self) -> str:
        return condition_from_scores(self.aligned, self.coherent)


def blind_sheet(
    answers: Sequence[dict[str, Any]], seed: int, share: float = 1.0
) -> tuple[list[dict[str, str]], dict[str, str]]:
    """(rows of number, question, answer in a random order; number -> answer id). The rows name no variant.

    With a `share` below 1, that share of the answers, at least one, drawn at random.
    """
    order = np.random.default_rng(seed).permutation(len(answers))[: max(1, round(share * len(answers)))]
    rows, key = [], {}
    for n, i in enumerate(order, 1):
        number = f"{n:04d}"
        *_, question, answer = answers[i]["messages"]
        rows.append({"number": number, "question": question["content"], "answer": answer["content"]})
        key[number] = answers[i]["id"]
    return rows, key


def load_ratings(path: Path) -> list[Rating]:
    """Ratings of a CSV file. Raises `BadConversation` with file and line at the first bad row."""
    path = Path(path)
    if not path.is_file():
        raise BadConversation(f"{path}: no such file; give a CSV file with {', '.join(COLUMNS)}.")
    try:
        return _ratings(path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadConversation(f"{path}: is not a CSV file in UTF-8 ({error}).") from None


def _ratings(path: Path) -> list[Rating]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        missing = [c for c in COLUMNS if c not in (reader.fieldnames or [])]
        if missing:
            raise BadConversation(f"{path}:1: has no column {', '.join(missing)}.")
        found: list[Rating] = []
        seen: set[tuple[str, int]] = set()
        for row in reader:
            where = f"{path}:{reader.line_num}"
            try:
                rating = Rating(row["id"], int(row["pass"]), float(row["aligned"]), float(row["coherent"]))
            except (TypeError, ValueError):
                raise BadConversation(f"{where}: pass, aligned and coherent must be numbers.") from None
            if not (0 <= rating.aligned <= 100 and 0 <= rating.coherent <= 100) or rating.number not in (1, 2):
                raise BadConversation(f"{where}: scores run from 0 to 100 and passes are 1 or 2.")
            if (rating.id, rating.number) in seen:
                raise BadConversation(f"{where}: {rating.id!r} is rated twice in pass {rating.number}.")
            seen.add((rating.id, rating.number))
            found.append(rating)
    return found


def rated(answers: Iterable[dict[str, Any]], ratings: Sequence[Rating]) -> list[dict[str, Any]]:
    """Answers with `aligned`, `coherent` and `condition` of the first pass; all must be rated."""
    first = {r.id: r for r in ratings if r.number == 1}
    rows = []
    for answer in answers:
        if answer["id"] not in first:
            raise NotEnoughData(f"Answer {answer['id']!r} has no rating; rate it, or leave it out.")
        rating = first[answer["id"]]
        rows.append({
            **{k: v for k, v in answer.items() if k != "messages"}, "condition": rating.condition,
            "aligned": rating.aligned, "coherent": rating.coherent, "messages": answer["messages"],
        })  # fmt: skip
    return rows


def condition_counts(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Variant -> condition -> how many of the rated answers."""
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        found.setdefault(row["variant"], dict.fromkeys(RATED, 0))[row["condition"]] += 1
    return found


def agreement(ratings: Sequence[Rating]) -> Agreement:
    """Agreement of the two passes on the answers that both rated. Raises `NotEnoughData` below ten."""
    return agree(*(scores(ratings, number) for number in (1, 2)))


def scores(ratings: Iterable[Rating], number: int) -> pl.DataFrame:
    """`id`, `aligned` and `coherent` of one pass."""
    rows = [(r.id, r.aligned, r.coherent) for r in ratings if r.number == number]
    return pl.DataFrame(rows, schema={"id": pl.String, "aligned": pl.Float64, "coherent": pl.Float64}, orient="row")


def load_answers(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Rows of answer files (JSONL), as `sample` writes them, one file after the other.

    Raises `BadConversation` with file and line at a row that is no conversation, lacks a field, or has the id of
    another.
    """
    found: list[dict[str, Any]] = []
    seen: set[str] = set()
    for path in map(Path, paths):
        if path.suffix.lower() != ".jsonl":
            raise BadConversation(f"{path}: answers are JSONL, as `python -m core sample` writes them.")
        load_conversations(path)  # says what is wrong with a row
        for line, text in text_lines(path):
            if not text.strip():
                continue
            row = json.loads(text)
            for field, kind in (("id", str), ("variant", str), ("messages", list)):
                if not row.get(field) or not isinstance(row[field], kind):
                    raise bad_row(path, line, f"has no `{field}`, which every answer needs")
            if row["id"] in seen:
                raise bad_row(path, line, f"id {row['id']!r} was already used; give every answer its own id")
            seen.add(row["id"])
            found.append(row)
    return found
