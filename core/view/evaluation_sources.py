"""Which judged responses an experiment has: those that ship, judged runs, readings in the app. Opens no model."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from core.conversations import SCORES
from core.evaluation.ratings import Rating
from core.evaluation.reading_sheet import RUBRIC, ratings_file, read_ratings, rubric_hash
from core.evaluation.responses import load_responses
from core.experiment import answer_files
from core.specs import Experiment
from core.store.places import experiment_folder

SHIPPED = "shipped"


@dataclass(frozen=True)
class Source:
    """Files of responses with one judgement of them."""

    name: str
    """In the URL."""
    title: str
    files: tuple[str, ...]
    judge: dict[str, Any] | None = field(default=None, hash=False)
    """Who gave the scores, where the files do not say it."""
    reader: int = 0
    """1 or 2: scores are those of the reader, in `ratings`."""
    ratings: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """Changes when a file does."""
        stats = [Path(f).stat() for f in (*self.files, *([self.ratings] if self.ratings else []))]
        return (self.name, self.files, self.reader, *((s.st_mtime_ns, s.st_size) for s in stats))


def sources(experiment: Experiment) -> dict[str, Source]:
    """Every judged set of responses of an experiment by name, the shipped one first."""
    found = [*_shipped(experiment), *_runs(experiment)]
    for sheet in sheets(experiment).values():
        path = ratings_file(experiment_folder(experiment), sheet.name)
        readers = sorted({r.number for r in read_ratings(path)})
        found += [Source(f"{sheet.name}-reader-{n}", f"{sheet.title}: read here, reader {n}", sheet.files,
                         {"id": f"human: reader {n}", "prompts": {"rubric": rubric_hash()},
                          "settings": {"protocol": "blind, one at a time"}}, n, str(path))
                  for n in readers]  # fmt: skip
    return {s.name: s for s in found}


def sheets(experiment: Experiment) -> dict[str, Source]:
    """Every set of answers that can be rated by reading: the shipped ones, and what variants answered."""
    found = [Source(SHIPPED, "The answers that ship", s.files) for s in _shipped(experiment)[:1]]
    folder = experiment_folder(experiment) / "evaluations" / "answers"
    by_questions: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        by_questions.setdefault(path.stem.split("__")[1] if path.stem.count("__") == 2 else path.stem, []).append(path)
    found += [Source(f"answers-{name}", f"Answers to {name}", tuple(map(str, _newest(paths))))
              for name, paths in by_questions.items()]  # fmt: skip
    return {s.name: s for s in found}


def load_source(source: Source) -> pl.DataFrame:
    """The table of a source. Raises `BadConversation`."""
    table = load_responses(source.files, judge=source.judge).table
    return with_ratings(table, read_ratings(Path(source.ratings)), source.reader) if source.reader else table


def with_ratings(table: pl.DataFrame, ratings: list[Rating], reader: int) -> pl.DataFrame:
    """The rated responses alone, with a reader's scores in place of whatever scores there are."""
    given = {r.id: r for r in ratings if r.number == reader}
    rows = table.filter(pl.col("id").is_in(list(given)))
    scores = [pl.Series(n, [getattr(given[i], n) for i in rows["id"]], pl.Float64) for n in SCORES]
    return rows.with_columns(*scores, **{f"{n}{k}": pl.lit(None, pl.String) for n in SCORES
                                         for k in ("_said", "_distribution")})  # fmt: skip


def _shipped(experiment: Experiment) -> list[Source]:
    files = answer_files(experiment)
    if not files:
        return []
    judge: dict[str, Any] = {"id": "scores of the files"}
    if files[0].parent == RUBRIC.parent:  # this project's own answers
        judge = {"id": "human: read blind by the authors", "prompts": {"rubric": rubric_hash()},
                 "settings": {"protocol": f"{RUBRIC.parent.name}/{RUBRIC.name}"}}  # fmt: skip
    found = [Source(SHIPPED, "The answers that ship", tuple(map(str, files)), judge)]
    passes = files[0].parent / "ratings.csv"
    if passes.is_file() and any(r.number == 2 for r in read_ratings(passes)):
        found.append(Source(f"{SHIPPED}-second", "Some of them, read by a second author", found[0].files,
                            judge | {"id": "human: read blind by a second author"}, 2, str(passes)))  # fmt: skip
    return found


def _runs(experiment: Experiment) -> list[Source]:
    """Judged runs, by questions and judge: the newest file of each variant."""
    found: dict[tuple[str, str], list[Path]] = {}
    for path in sorted((experiment_folder(experiment) / "evaluations").glob("*.jsonl")):
        parts = path.stem.split("__")
        questions, judge = (parts[1], parts[3]) if len(parts) == 4 else (path.stem, "")
        found.setdefault((questions, judge), []).append(path)
    return [Source(f"{questions}--{judge}".strip("-"), f"{questions}, judged by {_judge_id(paths[-1]) or 'unknown'}",
                   tuple(map(str, _newest(paths)))) for (questions, judge), paths in found.items()]  # fmt: skip


def _newest(paths: list[Path]) -> list[Path]:
    """Of each variant (the name up to `__`) the newest file."""
    by_variant: dict[str, Path] = {}
    for path in sorted(paths, key=lambda p: (p.stat().st_mtime_ns, p.name)):
        by_variant[path.stem.split("__")[0]] = path
    return sorted(by_variant.values(), key=lambda p: (not p.name.startswith("base__"), p.name))


def _judge_id(path: Path) -> str:
    """Who judged, from the file's first row."""
    try:
        with open(path, encoding="utf-8") as file:
            return str(json.loads(file.readline()).get("judge", {}).get("id", ""))
    except (OSError, ValueError, AttributeError):
        return ""
