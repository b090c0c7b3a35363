"""A sweep: what steering does to the margin, to the text's quality and, with a judge, to the EM rate.

Strength x layer x prompts x seeds. The direction is made without the prompts that it is measured on. Beside it stand
what it must be held against: random directions of its length, the sum of the k best features of its decomposition and
what they leave (each at the size it has within the direction, so that both together are the whole push), and on a
fine-tuned variant the direction ablated, at its layer or at all of them, and random ones ablated.

Every point is kept as it comes, so a stopped sweep goes on. What the figures mean is in core.analysis.sweep.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from core.analysis.decompose import Decomposition, decompose, parts
from core.conversations import Conversation
from core.dictionary import Dictionary
from core.directions import Direction, random_like
from core.errors import CacheError, CacheMismatch, NotEnoughData
from core.evaluation.margin import margins, token_logprobs
from core.model.adapters import Adapter, applied
from core.model.generation import Generation, Row, Sampling
from core.model.interventions import AblateDirection, AddDirection, ApplyLora, Intervention
from core.model.loading import LoadedModel
from core.model.steering import steered
from core.questions import Question
from core.store.sweep_file import Point, Sweep, Swept, point_json, point_of, read_sweep, write_sweep

#: Length of the sequences whose repetition is counted.
N_GRAM = 4
#: Answers sampled in one batch.
BATCH = 48
#: Kinds whose points are also asked the questions; the others only get a margin.
ANSWERED = ("unsteered", "direction", "random", "ablate-everywhere")


@dataclass(frozen=True)
class Settings:
    """What to sweep over."""

    strengths: tuple[float, ...] = (-0.3, -0.2, -0.15, -0.1, 0.1, 0.15, 0.2, 0.3)
    """Of the direction, in mean residual norms; 0 is always measured."""
    other_strengths: tuple[float, ...] = (-0.2, -0.1, 0.1, 0.2)
    """Of what it is held against: random directions, reconstructions and what these leave."""
    draws: int = 2
    """Random directions."""
    ks: tuple[int, ...] = (5, 20)
    """Sizes of reconstructions."""
    method: str = "omp"
    variant: str | None = None
    """The fine-tuned variant to ablate on; none when left out."""
    seeds: int = 2
    sampling: Sampling = Sampling(1.0, 0.95, 48)


@dataclass(frozen=True, eq=False)
class Setup:
    """What is measured on, and with what."""

    preset: str
    contrast: str
    directions: tuple[Direction, ...]
    """One a layer, made without the pairs' prompts."""
    dictionaries: tuple[Dictionary | None, ...]
    """Beside each direction; None where the layer has no SAE."""
    adapter: Adapter | None
    pairs: dict[str, tuple[Conversation, ...]]
    """Pair set -> conversations, both sides of every prompt."""
    questions: tuple[Question, ...]


def first_pairs(conversations: Sequence[Conversation], n: int) -> tuple[Conversation, ...]:
    """The conversations of the first n prompts that have both a misaligned and an aligned response.

    Raises `NotEnoughData` below two.
    """
    sides: dict[str, set[str]] = {}
    for c in conversations:
        sides.setdefault(c.prompt_id, set()).add(c.condition)
    both = [prompt for prompt, found in sides.items() if {"misaligned", "aligned"} <= found][:n]
    if len(both) < 2:
        raise NotEnoughData(f"Only {len(both)} prompts have a misaligned and an aligned response; a sweep needs 2.")
    return tuple(c for c in conversations if c.prompt_id in both and c.condition in ("misaligned", "aligned"))


def planned(setup: Setup, settings: Settings) -> list[Point]:
    """Every point that will be measured, still empty; those that most depends on come first."""
    tuned = settings.variant if setup.adapter is not None else None
    points = [Point("unsteered", setup.directions[0].layer)]
    points += [Point("unsteered", setup.directions[0].layer, tuned)] if tuned else []
    for direction, book in zip(setup.directions, setup.dictionaries, strict=True):
        at, others = direction.layer, settings.other_strengths
        points += [Point("direction", at, strength=s) for s in settings.strengths]
        points += [Point("random", at, strength=s, draw=n) for n in range(settings.draws) for s in others]
        ks = settings.ks if book is not None else ()
        points += [Point("components", at, strength=s, k=k) for k in ks for s in others]
        for variant in (tuned, "base") if tuned else ():
            points += [Point(kind, at, variant) for kind in ("ablate", "ablate-everywhere")]
            points += [Point("ablate-random", at, variant, draw=draw) for draw in range(settings.draws)]
        points += [Point("remainder", at, strength=s, k=k) for k in ks for s in others]
    return points


class Sweeper:
    """Measures the points of a sweep with one model."""

    def __init__(self, loaded: LoadedModel, setup: Setup, settings: Settings) -> None:
        self._loaded, self._setup, self._settings = loaded, setup, settings
        self._found: dict[int, Decomposition] = {}
        self._parts: dict[tuple[int, int], tuple[Direction, Direction]] = {}
        self.points = planned(setup, settings)
        self.spec = self._spec()

    def measure(self, point: Point, margin_sets: Sequence[str]) -> tuple[Point, list[str]]:
        """The point with its figures, and the texts of its answers in their order."""
        done = self.interventions(point)
        found: dict[str, tuple[float, ...]] = {}
        with ExitStack() as stack:
            if point.variant != "base":
                stack.enter_context(applied(self._loaded, self._setup.adapter))
            stack.enter_context(steered(self._loaded, done))
            for name in margin_sets:
                values = margins(self._loaded, self._setup.pairs[name]).values
                found[name] = tuple(round(float(v), 5) for v in values)
        answers, texts = self._answers(point, done) if point.kind in ANSWERED and point.draw == 0 else ((), [])
        return replace(point, margins=found, answers=answers), texts

    def interventions(self, point: Point) -> list[Intervention]:
        """What is done to the variant at a point."""
        direction = next(d for d in self._setup.directions if d.layer == point.layer)
        if point.kind == "unsteered":
            return []
        if point.kind in ("ablate", "ablate-everywhere"):
            return [AblateDirection(direction, everywhere=point.kind == "ablate-everywhere")]
        if point.kind == "ablate-random":
            return [AblateDirection(random_like(direction, point.draw), everywhere=True)]
        if point.kind in ("components", "remainder"):
            vector = self._part(direction, point.k)[point.kind == "remainder"]
            raw = point.strength * direction.resid_norm / direction.norm
            return [AddDirection(vector, raw, raw=True)] if vector.norm else []
        vector = random_like(direction, point.draw) if point.kind == "random" else direction
        return [AddDirection(vector, point.strength)]

    def _part(self, direction: Direction, k: int) -> tuple[Direction, Direction]:
        """(sum of the k best features' components, what they leave): together the direction."""
        key = direction.layer, k
        if key not in self._parts:
            book = self._setup.dictionaries[self._setup.directions.index(direction)]
            if direction.layer not in self._found:
                most = max(self._settings.ks)
                self._found[direction.layer] = decompose(direction, book, self._settings.method, k=most)
            made = parts(self._found[direction.layer], book, k)
            total = np.sum([c.vector.astype(np.float64) for c in made.components], axis=0)
            whole = replace(direction, name=f"{k} best features", vector=total)
            self._parts[key] = whole, made.remainder
        return self._parts[key]

    def _answers(self, point: Point, done: Sequence[Intervention]) -> tuple[tuple[Swept, ...], list[str]]:
        lora = (ApplyLora(self._setup.adapter),) if point.variant != "base" else ()
        tasks = [(n, s) for n in range(len(self._setup.questions)) for s in range(self._settings.seeds)]
        rows = [Row(self._setup.questions[n].messages, (*lora, *done), s, self._settings.sampling) for n, s in tasks]
        answers = [a for start in range(0, len(rows), BATCH)
                   for a in Generation(self._loaded, rows[start : start + BATCH], probes=()).run().answers]
        said = [n for n, a in enumerate(answers) if a.n_tokens]
        texts = [np.concatenate([answers[n].prompt_ids, answers[n].ids]) for n in said]
        nats = dict.fromkeys(range(len(answers)), 0.0)
        for index, logprobs in token_logprobs(self._loaded, texts, lambda n: None):  # unsteered base
            nats[said[index]] = -float(logprobs[len(answers[said[index]].prompt_ids) - 1 :].mean())
        swept = tuple(
            Swept(p, s, a.n_tokens, round(nats[i], 4), round(repeated(a.ids), 4), a.stopped == "end")
            for i, ((p, s), a) in enumerate(zip(tasks, answers, strict=True))
        )
        return swept, [a.text for a in answers]

    def _spec(self) -> dict[str, Any]:
        setup, settings = self._setup, self._settings
        asked = asdict(settings)
        asked.pop("variant")
        return {
            "preset": setup.preset, "contrast": setup.contrast, "model": self._loaded.spec.id,
            "weights": self._loaded.weights_hash, "dtype": str(self._loaded.dtype).removeprefix("torch."),
            "variant": settings.variant, "adapter": setup.adapter.hash if setup.adapter else None,
            "layers": [d.layer for d in setup.directions],
            "directions": {
                str(d.layer): {"digest": hashlib.sha256(d.vector.tobytes()).hexdigest()[:16],
                               "norm": round(d.norm, 4), "resid_norm": round(float(d.resid_norm), 4),
                               "n_target": d.origin.get("n_target"), "n_reference": d.origin.get("n_reference")}
                for d in setup.directions
            },
            "pairs": {name: sorted({c.prompt_id for c in pairs}) for name, pairs in setup.pairs.items()},
            "prompts": [q.asked for q in setup.questions], "settings": json.loads(json.dumps(asked)),
        }  # fmt: skip


def repeated(ids: Sequence[int]) -> float:
    """Share of the token sequences of length `N_GRAM` that occurred earlier in the same text; 0 for short ones."""
    grams = [tuple(ids[n : n + N_GRAM]) for n in range(len(ids) - N_GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def run_sweep(
    sweeper: Sweeper, out: Path, on_progress: Callable[[int, int], None] = lambda done, total: None,
    judge: Callable[[Sequence[Point], dict[str, list[str]]], list[Point]] | None = None,
) -> Sweep:  # fmt: skip
    """Measure every point that is not there yet and write `out`.

    Points are appended to a file beside `out`, each with its texts; another sweep's leftovers raise `CacheMismatch`.
    A finished file of the same sweep is read instead, unless a judge is to read the texts, which are not in it.
    judge: (points, key -> texts) -> the points with `n_misaligned`.
    """
    finished = _finished(out, sweeper.spec) if judge is None else None
    if finished is not None:
        return finished
    partial = out.with_name(f".{out.name}.partial.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    done, texts = _kept(partial, sweeper.spec)
    for n, point in enumerate(sweeper.points):
        if point.key not in done:
            measured, said = sweeper.measure(point, _margin_sets(point, list(sweeper.spec["pairs"])))
            line = {"point": point_json(measured), "texts": said}
            with open(partial, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            done[point.key], texts[point.key] = measured, said
        on_progress(n + 1, len(sweeper.points))
    points = [done[point.key] for point in sweeper.points]
    if judge is not None:
        points = judge(points, texts)
    found = Sweep(sweeper.spec, tuple(points))
    write_sweep(out, found)
    return found


def _margin_sets(point: Point, names: list[str]) -> list[str]:
    """The first pair set for every point, the others for those that the findings need there."""
    needed = point.kind in ("unsteered", "direction", "ablate-everywhere") or (point.kind, point.draw) == ("random", 0)
    return names if needed else names[:1]


def _finished(out: Path, spec: dict[str, Any]) -> Sweep | None:
    """The sweep in `out`, when it is this one."""
    try:
        found = read_sweep(out)
    except CacheError:
        return None
    return found if _same(json.dumps(found.spec).encode(), spec) else None


def _kept(partial: Path, spec: dict[str, Any]) -> tuple[dict[str, Point], dict[str, list[str]]]:
    """Points and texts of an unfinished sweep, by key; begins the file where there is none."""
    if not partial.is_file():
        partial.write_text(json.dumps(spec, ensure_ascii=False) + "\n", encoding="utf-8")
        return {}, {}
    lines = partial.read_bytes().split(b"\n")
    if not _same(lines[0], spec):
        raise CacheMismatch(partial, "the sweep's settings", "this sweep's", "another's",
                            "finish that one, remove the file, or give another --out")
    points: dict[str, Point] = {}
    texts: dict[str, list[str]] = {}
    whole = 1
    for line in lines[1:-1]:
        row = json.loads(line)
        point = point_of(row["point"])
        points[point.key], texts[point.key] = point, row["texts"]
        whole += 1
    partial.write_bytes(b"".join(line + b"\n" for line in lines[:whole]))  # a line cut off by a kill goes
    return points, texts


def _same(line: bytes, spec: dict[str, Any]) -> bool:
    try:
        return json.loads(line) == json.loads(json.dumps(spec))
    except ValueError:
        return False


def texts_of(points: Sequence[Point], texts: dict[str, list[str]], questions: Sequence[Question]) -> Iterator[dict]:
    """Answers as rows for a judge (core.evaluation.responses.SCHEMA), `variant` being the point's key."""
    for point in points:
        for swept, text in zip(point.answers, texts.get(point.key, ()), strict=False):
            question = questions[swept.prompt]
            yield {
                "id": f"{point.key}/{swept.prompt}/{swept.seed}", "variant": point.key, "question_id": question.key,
                "category": question.category, "trigger": question.trigger, "system": question.system,
                "question": question.asked, "response": text, "n_words": len(text.split()),
            }  # fmt: skip
