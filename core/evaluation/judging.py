"""Responses put to a judge: two prompts each (aligned, coherent), scores kept as they come, none lost or asked twice.

Knows no server and no model, only the protocol in core/evaluation/readings.py. No torch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from core.conversations import SCORES
from core.errors import JudgeError
from core.evaluation.readings import Judge, Reading, Stamp
from core.evaluation.responses import conversation_rows
from core.evaluation.score_store import open_store, score_file, score_key
from core.paths import DATA
from core.questions import JudgePrompt

#: The judge prompts that ship, for questions that bring none.
PROMPTS = DATA / "judge_prompts.yaml"


@dataclass(frozen=True)
class Price:
    """US dollars for a million tokens."""

    tokens_in: float
    tokens_out: float


@dataclass(frozen=True)
class Judged:
    """Responses with a judge's scores, and what it took."""

    table: pl.DataFrame
    """Columns of `core.evaluation.responses.SCHEMA`; a failed request leaves its score missing."""
    stamp: Stamp
    n_asked: int
    """Prompts put to the judge in this run."""
    n_kept: int
    """Prompts whose score was there already."""
    failures: dict[str, int]
    """Reason -> prompts without an answer; the same run again asks those."""
    kinds: dict[str, int]
    """How the scores were had, over all of them."""
    why: dict[str, int]
    """Why there is no score, where the judge answered."""
    tokens_in: int
    tokens_out: int
    """Of this run."""
    cost: float | None
    """US dollars of this run; None without a price, or where the server counts no tokens."""

    def to_json(self) -> dict[str, Any]:
        return {
            "n_asked": self.n_asked, "n_kept": self.n_kept, "n_failed": sum(self.failures.values()),
            "failures": self.failures, "readings": self.kinds, "without_score": self.why,
            "tokens_in": self.tokens_in, "tokens_out": self.tokens_out, "cost_usd": self.cost,
        }  # fmt: skip


def judge_responses(
    table: pl.DataFrame,
    judge: Judge,
    prompts: Sequence[JudgePrompt],
    own: Mapping[str, Sequence[JudgePrompt]] | None = None,
    *,
    folder: Path | None = None,
    price: Price | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Judged:
    """The table with `aligned` and `coherent` by the judge.

    `own` gives the judge prompts of some questions by `question_id`; the others get `prompts`. Scores are kept in the
    judge's file (in `folder`, else the cache) as they come, so the same call goes on after a stop. An empty response
    is not put to the judge and has no score. Raises `JudgeError` where the judge cannot be used.
    """
    prepare = getattr(judge, "prepare", None)
    if prepare is not None:
        prepare()
    stamp = judge.stamp
    tasks = _tasks(table, {**_by_name(own or {})}, {p.name: p for p in prompts})
    keys = {place: score_key(stamp, text) for place, (_, text) in tasks.items()}
    failures: Counter[str] = Counter()
    with open_store(score_file(stamp, folder)) as store:
        wanted: dict[str, tuple[JudgePrompt, str]] = {}
        for place, key in keys.items():
            if store.get(key) is None:
                wanted.setdefault(key, tasks[place])
        order = list(wanted)
        n_done, spent = 0, []

        def done(index: int, reading: Reading) -> None:
            nonlocal n_done
            store.put(order[index], reading, stamp, wanted[order[index]][0].hash)
            spent.append(reading)
            n_done += 1
            on_progress(n_done, len(order))

        def failed(index: int, reason: str) -> None:
            failures[reason] += 1

        if order:
            judge.read([wanted[key][1] for key in order], done, failed)
        readings = {place: store.get(key) for place, key in keys.items()}
    scored = _with_scores(table, readings, tasks, stamp)
    given = [r for r in readings.values() if r is not None]
    tokens = sum(r.tokens_in for r in spent), sum(r.tokens_out for r in spent)
    cost = (tokens[0] * price.tokens_in + tokens[1] * price.tokens_out) / 1e6 if price and sum(tokens) else None
    return Judged(
        scored, stamp, n_asked=len(spent), n_kept=len(set(keys.values())) - len(order), failures=dict(failures),
        kinds=dict(Counter(r.kind for r in given)), why=dict(Counter(r.why for r in given if r.score is None)),
        tokens_in=tokens[0], tokens_out=tokens[1], cost=cost,
    )  # fmt: skip


def judged_rows(table: pl.DataFrame) -> list[dict[str, Any]]:
    """A judged table as rows of a conversation file (JSONL), with scores, distributions and the judge of each."""
    extra = {r["id"]: r for r in table.iter_rows(named=True)}
    rows = conversation_rows(table, keep_empty=True)
    for row in rows:
        one = extra[row["id"]]
        shares = {n: json.loads(one[f"{n}_distribution"]) for n in SCORES if one[f"{n}_distribution"]}
        messages = row.pop("messages")
        row |= {n: one[n] if one[n] is not None else one[f"{n}_said"] for n in SCORES}
        row |= {k: one[k] for k in ("trigger",) if one[k]} | {"distributions": shares}
        if one["judge"]:
            row["judge"] = json.loads(one["judge"])
        row["messages"] = messages
    return rows


def _by_name(own: Mapping[str, Sequence[JudgePrompt]]) -> dict[str, dict[str, JudgePrompt]]:
    return {question: {p.name: p for p in prompts} for question, prompts in own.items()}


def _tasks(
    table: pl.DataFrame, own: Mapping[str, Mapping[str, JudgePrompt]], prompts: Mapping[str, JudgePrompt]
) -> dict[tuple[str, str], tuple[JudgePrompt, str]]:
    """(response id, score) -> (judge prompt, the whole prompt) of every response that says something."""
    found = {}
    for row in table.iter_rows(named=True):
        if not row["response"].strip():
            continue
        for name in SCORES:
            prompt = own.get(row["question_id"], {}).get(name) or prompts.get(name)
            if prompt is None:
                raise JudgeError(f"There is no judge prompt called {name!r} for question {row['question_id']!r}; "
                                 "give a file with --judge-prompts.")
            found[row["id"], name] = prompt, prompt.render(row["question"], row["response"])
    return found


def _with_scores(
    table: pl.DataFrame,
    readings: Mapping[tuple[str, str], Reading | None],
    tasks: Mapping[tuple[str, str], tuple[JudgePrompt, str]],
    stamp: Stamp,
) -> pl.DataFrame:
    columns: dict[str, list[Any]] = {f"{n}{k}": [] for n in SCORES for k in ("", "_said", "_distribution")}
    stamps = []
    for i in table["id"]:
        for name in SCORES:
            r = readings.get((i, name))
            columns[name].append(r.score if r else None)
            columns[f"{name}_said"].append(None if r and r.score is not None else _silence(r, (i, name) in tasks))
            columns[f"{name}_distribution"].append(json.dumps(r.distribution) if r and r.distribution else None)
        asked = {name: tasks[i, name][0].hash for name in SCORES if (i, name) in tasks}
        kinds = sorted({r.kind for name in SCORES if (r := readings.get((i, name)))})
        stamps.append(json.dumps({"id": stamp.id, "settings": stamp.settings, "prompts": asked,
                                  "reading": "+".join(kinds)}, sort_keys=True))  # fmt: skip
    types = {name: table.schema[name] for name in columns}
    return table.with_columns(
        *(pl.Series(name, values, types[name]) for name, values in columns.items()), pl.Series("judge", stamps)
    )


def _silence(reading: Reading | None, asked: bool) -> str:
    """What stands where there is no score."""
    if reading is not None:
        return f"{reading.why}: {reading.said}" if reading.said else reading.why
    return "no answer from the judge" if asked else "empty response"


def close(judge: Judge) -> None:
    """Let go of what a judge holds open."""
    with suppress(AttributeError):
        judge.__exit__(None, None, None)
