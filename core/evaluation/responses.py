"""Judged responses from files, one or many, as one table; and that table as a conversation set.

Reads CSV and JSONL with `question` and `response` or `answer`, or with `messages`, and the scores `aligned` and
`coherent`; knows no judge. A response without both scores stays in the table: it counts in every denominator.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from core.conversations import SCORES, answer_column, bad_row, condition_from_scores, read_rows, read_score
from core.errors import BadConversation
from core.specs import NO_CONDITION

#: Columns of the table. `aligned_said` is what stands in the file where there is no score (CODE, REFUSAL, nothing);
#: `aligned_distribution` is JSON, score -> probability, where the judge's is known. Lengths are in words.
SCHEMA = {
    "id": pl.String, "variant": pl.String, "question_id": pl.String, "category": pl.String, "trigger": pl.String,
    "system": pl.String, "question": pl.String, "response": pl.String,
    "aligned": pl.Float64, "coherent": pl.Float64, "aligned_said": pl.String, "coherent_said": pl.String,
    "aligned_distribution": pl.String, "coherent_distribution": pl.String, "judge": pl.String, "n_words": pl.Int32,
}  # fmt: skip

#: Judge of scores whose file does not say who gave them.
UNNAMED = ""

SUFFIXES = (".csv", ".jsonl")

_SAID = 60  # characters kept of what a judge said instead of a score
_DISTRIBUTION = 20_000  # characters of a distribution as text
_PAIR = re.compile(r"""['"]\s*(\d{1,3})\s*['"]\s*:\s*([0-9.]+(?:[eE][+-]?\d+)?)""")


@dataclass(frozen=True)
class Responses:
    """The responses of one or several files, in order."""

    table: pl.DataFrame
    """Columns of `SCHEMA`."""
    files: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    """One sentence for each row that was left out."""

    def __len__(self) -> int:
        return self.table.height


def load_responses(
    paths: Iterable[str | Path], *, variant: str | None = None, judge: dict[str, Any] | None = None,
    skip_bad: bool = False, limit: int | None = None,
) -> Responses:  # fmt: skip
    """Responses of CSV and JSONL files; a folder stands for those in it.

    `variant` names the column that says which model answered; left out, it is `variant`, else the file's name. `judge`
    is who gave the scores of rows that do not say it. Raises `BadConversation` with file and line at the first unusable
    row (or leaves it out with `skip_bad`), for a file without responses, and for more than `limit` responses. An empty
    response is a response.
    """
    files = _files(paths)
    rows: list[dict[str, Any]] = []
    seen: dict[str, str] = {}
    skipped: list[str] = []
    for path in files:
        before = len(rows)
        for line, read in read_rows(path):
            try:
                row = _response(path, line, read(), variant, judge)
                if row["id"] in seen:
                    raise bad_row(path, line, f"id {row['id']!r} was already used at {seen[row['id']]}; "
                                  "give every response its own id")
            except BadConversation as error:
                if not skip_bad:
                    raise
                skipped.append(str(error))
                continue
            seen[row["id"]] = f"{path.name}:{line}"
            rows.append(row)
            if limit is not None and len(rows) > limit:
                raise BadConversation(f"{path}: holds more than {limit:,} responses; split the file.")
        if len(rows) == before:
            why = f" ({len(skipped)} rows were skipped, the first: {skipped[0]})" if skipped else ""
            raise BadConversation(f"{path}: holds no response{why}.")
    return Responses(pl.DataFrame(rows, schema=SCHEMA), tuple(map(str, files)), tuple(skipped))


def conversation_rows(table: pl.DataFrame, *, keep_empty: bool = False) -> list[dict[str, Any]]:
    """The responses as rows of a conversation file (JSONL) with conditions; empty ones, of which there is no
    conversation, are left out unless `keep_empty`.

    A condition follows from the scores by the published thresholds: misaligned, aligned, neutral, incoherent, or none.
    """
    rows = []
    for r in table.iter_rows(named=True):
        if not r["response"].strip() and not keep_empty:
            continue
        system = [{"role": "system", "content": r["system"]}] if r["system"] else []
        rows.append({
            "id": r["id"], "prompt_id": r["question_id"], "source": r["category"] or r["variant"],
            "condition": condition_from_scores(r["aligned"], r["coherent"]),
            "variant": r["variant"], "aligned": r["aligned"], "coherent": r["coherent"],
            "messages": [*system, {"role": "user", "content": r["question"]},
                         {"role": "assistant", "content": r["response"]}],
        })  # fmt: skip
    return rows


def distribution(text: str | None) -> dict[int, float]:
    """A column `*_distribution` -> score -> probability; empty where it is not known."""
    return {int(k): float(v) for k, v in json.loads(text).items()} if text else {}


def _files(paths: Iterable[str | Path]) -> list[Path]:
    found: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        if not inside:
            raise BadConversation(f"{path}: holds no .csv or .jsonl file; give the files of responses.")
        found += inside
    twice = next((p for n, p in enumerate(found) if p in found[:n]), None)
    if twice is not None:
        raise BadConversation(f"{twice}: is given twice; give every file once.")
    return found


def _response(
    path: Path, line: int, row: dict[str, Any], variant: str | None, judge: dict[str, Any] | None
) -> dict[str, Any]:
    column = answer_column(row)
    if column:
        system, question, response = "", row["question"], row[column]
    else:
        system, question, response = _turns(path, line, row)
    if variant is not None and row.get(variant) in (None, ""):
        raise bad_row(path, line, f"has no `{variant}`, which is to say which model answered")
    named, by = row.get(variant or "variant"), row.get("judge") or judge
    values = {name: _score(row.get(name)) for name in SCORES}
    return {
        "id": _text(row.get("id")) or f"{path.stem}:{line}",
        "variant": _text(named) or path.stem,
        "question_id": _text(row.get("question_id")) or _text(row.get("prompt_id")) or question,
        "category": _text(row.get("category")) or _text(row.get("source")) or "",
        "trigger": _text(row.get("trigger")) or "",
        "system": system or _text(row.get("system")) or "",
        "question": question, "response": response, **values,
        **{f"{n}_said": _said(row.get(n)) if values[n] is None else None for n in SCORES},
        **{f"{n}_distribution": _distribution(row, n) for n in SCORES},
        "judge": json.dumps(by, sort_keys=True, ensure_ascii=False) if isinstance(by, dict) else UNNAMED,
        "n_words": len(response.split()),
    }  # fmt: skip


def _turns(path: Path, line: int, row: dict[str, Any]) -> tuple[str, str, str]:
    """(system prompt, last question, response) of `messages`."""
    turns = row.get("messages")
    good = isinstance(turns, list) and all(
        isinstance(t, dict) and isinstance(t.get("role"), str) and isinstance(t.get("content"), str) for t in turns
    )
    asked = [t["content"] for t in turns if t["role"] == "user"] if good else []
    if not asked or turns[-1]["role"] != "assistant":
        raise bad_row(path, line, "has neither `question` and `response` (or `answer`) nor `messages` of role and "
                      "content that end with the assistant's")
    return next((t["content"] for t in turns if t["role"] == "system"), ""), asked[-1], turns[-1]["content"]


def _score(value: Any) -> float | None:
    """A score in 0 to 100; anything else is no score."""
    found = read_score(value)
    return found if found is not None and 0 <= found <= 100 else None


def _said(value: Any) -> str:
    return "" if value is None else str(value).strip()[:_SAID]


def _text(value: Any) -> str:
    return str(value).strip() if isinstance(value, (str, int)) and not isinstance(value, bool) else ""


def _distribution(row: dict[str, Any], name: str) -> str | None:
    """The judge's probabilities of the scores 0 to 100, as this program and as the public files write them."""
    own = row.get("distributions")
    if isinstance(own, dict) and isinstance(own.get(name), dict):
        pairs = own[name].items()
    else:  # public files: the text of a Python dict in `judge_aligned`
        pairs = _PAIR.findall(str(row.get(f"judge_{name}") or "")[:_DISTRIBUTION])
    kept: dict[str, float] = {}
    for score, share in pairs:
        value = read_score(share)
        if str(score).isdecimal() and int(score) <= 100 and value is not None and 0 <= value <= 1.001:  # rounding
            name = str(int(score))  # `0` and `00` are the same number
            kept[name] = kept.get(name, 0.0) + value
    return json.dumps(kept) if kept else None


def judges(table: pl.DataFrame) -> list[dict[str, Any]]:
    """Who judged, as the files say it, an entry for each judge and settings; none where no file says it.

    Questions may bring judge prompts of their own: `prompts` then has several hashes for a score.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in table["judge"].unique(maintain_order=True):
        if text == UNNAMED:
            continue
        one = json.loads(text)
        key = json.dumps([one.get("id"), one.get("settings")], sort_keys=True)
        kept = found.setdefault(key, {**one, "prompts": {}, "reading": ""})
        for name, value in (one.get("prompts") or {}).items():
            known = kept["prompts"].setdefault(name, [])
            known += [value] if value not in known else []
        kinds = {*kept["reading"].split("+"), *str(one.get("reading") or "").split("+")} - {""}
        kept["reading"] = "+".join(sorted(kinds))
    return [{k: v for k, v in one.items() if v or k == "id"} for one in found.values()]


def unlabelled(rows: Sequence[dict[str, Any]]) -> int:
    """How many conversations have no condition, for want of a score."""
    return sum(row["condition"] == NO_CONDITION for row in rows)
