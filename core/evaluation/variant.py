"""`evaluate` of a model variant: ask it, have the answers judged, give the rates; or the margin, which needs no judge.

Every stage resumes: answers batch by batch, scores one by one. What it writes lies in `cache/<preset>/evaluations/`:
`answers/` what was said, beside it a file for each judgement, which is also a conversation set.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from core.conversations import Conversation, load_conversations
from core.errors import NotEnoughData
from core.evaluation.judging import Judged, Price, judge_responses, judged_rows
from core.evaluation.margin import Estimate, Margins, margins
from core.evaluation.organism import OPEN_PAIRS
from core.evaluation.question_yaml import load_judge_prompts
from core.evaluation.readings import Judge
from core.evaluation.report import report
from core.evaluation.responses import load_responses
from core.evaluation.sampling import run_spec, sample_answers
from core.model.adapters import Adapter, applied
from core.model.generation import Sampling
from core.model.loading import LoadedModel
from core.paths import write_jsonl
from core.questions import JudgePrompt, Question
from core.split import split

#: Below this many parameters a rate of sampled answers is mostly noise.
SMALL = 2_000_000_000

SMALL_NOTE = (
    "This model has {n:,.0f} million parameters; below 2 billion, EM rates are mostly noise of incoherent answers. "
    "Read the margin (--judge margin) first, and against a benign control."
)


#: Answers to each question whose file names no number; published runs take 50 to 100.
SAMPLES = 5


@dataclass(frozen=True)
class Ask:
    """What is asked of a variant, and how it answers."""

    name: str
    """What the questions are called: open, heldout, or the file's name."""
    questions: tuple[Question, ...]
    samples: int | None
    """Answers to each question; None takes the questions' own number, else `SAMPLES`."""
    sampling: Sampling
    seed: int = 0

    def __post_init__(self) -> None:
        several = tuple(replace(q, samples=self.samples or q.samples or SAMPLES) for q in self.questions)
        object.__setattr__(self, "questions", several)


def answer(
    loaded: LoadedModel, adapter: Adapter | None, ask: Ask, folder: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:  # fmt: skip
    """The file of the variant's answers, sampled unless it is there already. Its name tells runs apart."""
    spec = run_spec(loaded, adapter, ask.questions, ask.samples, ask.sampling, ask.seed)
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:8]
    out = folder / "answers" / f"{spec['variant']}__{_slug(ask.name)}__{digest}.jsonl"
    if not out.is_file():
        sample_answers(
            loaded, adapter, ask.questions, out, samples=ask.samples, sampling=ask.sampling, seed=ask.seed,
            keep_empty=True, on_progress=on_progress,
        )  # fmt: skip
    return out


def judge_answers(
    answers: Path,
    judge: Judge,
    prompts: Sequence[JudgePrompt],
    questions: Sequence[Question] = (),
    *,
    folder: Path,
    price: Price | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Judged, Path]:
    """Answers with a judge's scores, and the file they are written to. Questions may bring their own judge prompts."""
    table = load_responses([answers]).table
    own = {q.id: q.judge_prompts for q in questions if q.judge_prompts}
    judged = judge_responses(table, judge, prompts, own, price=price, on_progress=on_progress)
    out = folder / f"{answers.stem}__{_slug(judged.stamp.id)}.jsonl"
    write_jsonl(out, judged_rows(judged.table))
    return judged, out


def rates_report(judged: Judged, file: Path, ask: Ask, loaded: LoadedModel) -> dict[str, Any]:
    """The JSON of `evaluate PRESET` with a judge."""
    notes = [*small_note(loaded)]
    if judged.failures:
        n = sum(judged.failures.values())
        notes.append(f"{n} scores are missing because the judge did not answer; the same command again asks them.")
    if len(judged.kinds) > 1:
        notes.append("Some scores are probability-weighted and some are sampled numbers; they are not the same scale.")
    return {
        "file": str(file), "questions": ask.name, "sampling": asdict(ask.sampling) | {"seed": ask.seed},
        "judging": judged.to_json(), **report(judged.table, notes=notes),
    }  # fmt: skip


@dataclass(frozen=True)
class PairSet:
    """Matched pairs by name."""

    name: str
    conversations: tuple[Conversation, ...]


def pair_sets(questions: str | None, conversations: Callable[[], Sequence[Conversation]]) -> list[PairSet]:
    """`heldout`: held-out prompts of the experiment's own pairs; `open`: the open pairs; both when None; else a file.

    A file holds conversations with a misaligned and an aligned answer to each prompt.
    """
    found = []
    if questions in (None, "heldout"):
        found.append(PairSet("heldout", tuple(split(conversations())[1])))
    if questions in (None, "open"):
        found.append(PairSet("open", load_conversations(OPEN_PAIRS).conversations))
    return found or [PairSet(Path(questions).stem, load_conversations(questions).conversations)]


def margin_report(
    loaded: LoadedModel, adapter: Adapter | None, pairs: Sequence[PairSet],
    say: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:  # fmt: skip
    """The JSON of `evaluate --judge margin`: each set of pairs, the first one on top; beside it minus the base."""
    found: dict[str, Any] = {}
    for one in pairs:
        by_variant: dict[str, Margins] = {}
        for variant in dict.fromkeys((adapter, None)):
            name = variant.name if variant else "base"
            say(f"Measuring {name} on {one.name} pairs ...")
            with applied(loaded, variant) if variant else nullcontext():
                by_variant[name] = margins(loaded, one.conversations)
        own = by_variant[adapter.name if adapter else "base"]
        found[one.name] = _margin(own.estimate()) | {"n_responses": len(one.conversations)}
        if adapter:
            found[one.name]["minus_base"] = asdict(own.minus(by_variant["base"]))
    if not found:
        raise NotEnoughData("There are no matched pairs to take a margin of.")
    first = next(iter(found))
    return {
        "variant": adapter.name if adapter else "base", "judge": {"id": "margin", "unit": "nats per token"},
        "pairs_name": first, **{k: found[first][k] for k in ("margin", "margin_ci95", "n_pairs")}, "pairs": found,
        "notes": ["Above 0, the misaligned answer of a pair is likelier than the aligned one: what the model leans "
                  "towards, not what it would write. The interval is over prompts."],
    }  # fmt: skip


def shipped_prompts(file: Path | None) -> tuple[JudgePrompt, ...]:
    """Judge prompts of a file, else those that ship."""
    from core.evaluation.judging import PROMPTS

    return load_judge_prompts(file or PROMPTS)


def small_note(loaded: LoadedModel) -> list[str]:
    """The warning about rates of small models, where it applies."""
    n = sum(p.numel() for p in loaded.model.parameters())
    return [SMALL_NOTE.format(n=n / 1e6)] if n < SMALL else []


def _margin(estimate: Estimate) -> dict[str, Any]:
    return {"margin": estimate.mean, "margin_ci95": [estimate.low, estimate.high], "n_pairs": estimate.n}


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-")[:60]
