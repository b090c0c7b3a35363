"""Asks a model variant questions, several times each, and keeps the answers as a conversation file.

Knows no judge: the answers carry no condition until someone rates them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from core.conversations import Conversation
from core.errors import CacheMismatch
from core.evaluation.question_yaml import SUFFIXES, load_question_yaml
from core.model.adapters import Adapter, applied
from core.model.generation import Sampling, generate, prompt_ids
from core.model.loading import LoadedModel
from core.paths import write_json
from core.questions import OPEN_QUESTIONS, Question, heldout_questions, load_questions

#: Answers sampled in one batch.
BATCH = 48


def sample_answers(
    loaded: LoadedModel,
    adapter: Adapter | None,
    questions: Sequence[Question],
    out: Path,
    *,
    samples: int | None,
    sampling: Sampling,
    seed: int = 0,
    keep_empty: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write `samples` answers to each question to the JSONL file `out`; returns how many are empty and left out.

    With `samples` None, as many as a question's own file asks for, else one; with `keep_empty` an empty answer is kept,
    as a rate counts it.

    Answers are appended batch by batch to a file beside `out`, so a stopped run goes on where it was; another run's
    leftovers raise `CacheMismatch`. The seed of an answer depends on its question and number only: variants that
    answer the same questions meet the same luck.
    """
    variant = adapter.name if adapter else "base"
    spec = run_spec(loaded, adapter, questions, samples, sampling, seed)
    tasks = [(question, n) for question in questions for n in range(samples or question.samples or 1)]
    partial, note = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.spec.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) != spec:
        raise CacheMismatch(partial, "the run's settings", "this run's", "another run's")
    write_json(note, spec)
    done = _whole_lines(partial)
    with applied(loaded, adapter) if adapter else nullcontext():
        for start in range(done, len(tasks), BATCH):
            part = tasks[start : start + BATCH]
            prompts = [prompt_ids(loaded, q.messages) for q, _ in part]
            seeds = [_seed(seed, q.key, n) for q, n in part]
            answers = generate(loaded, prompts, seeds, sampling)
            rows = [
                _row(variant, question, n, loaded.tokenizer.decode(a.ids, skip_special_tokens=True), a.ended)
                for (question, n), a in zip(part, answers, strict=True)
            ]
            with open(partial, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                file.flush()
                os.fsync(file.fileno())
            on_progress(start + len(part), len(tasks))
    rows = [json.loads(line) for line in partial.read_text(encoding="utf-8").splitlines()]
    said = [row for row in rows if keep_empty or row["messages"][-1]["content"]]
    with open(partial, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in said)
    os.replace(partial, out)
    note.unlink()
    return len(rows) - len(said)


def run_spec(
    loaded: LoadedModel, adapter: Adapter | None, questions: Sequence[Question], samples: int | None,
    sampling: Sampling, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Everything that the answers of a run depend on, as JSON."""
    return {
        "variant": adapter.name if adapter else "base", "adapter": adapter.hash if adapter else None,
        "weights": loaded.weights_hash, "questions": [[q.key, q.system, q.asked] for q in questions],
        "samples": [samples or q.samples or 1 for q in questions], "seed": seed,
        "temperature": sampling.temperature, "top_p": sampling.top_p, "max_new_tokens": sampling.max_new_tokens,
    }  # fmt: skip


def questions_for(name: str, conversations: Callable[[], Sequence[Conversation]]) -> tuple[Question, ...]:
    """`open`: the shipped questions; `heldout`: the held-out prompts of `conversations`; else a JSONL or YAML file."""
    if name == "heldout":
        return heldout_questions(conversations())
    if Path(name).suffix.lower() in SUFFIXES:
        return load_question_yaml(name)
    rows = load_questions(OPEN_QUESTIONS if name == "open" else name)
    return tuple(Question(q.id, f"open/{q.category}" if name == "open" else q.category, q.text) for q in rows)


def _row(variant: str, question: Question, n: int, answer: str, ended: bool) -> dict[str, Any]:
    return {
        "id": f"{variant}/{question.key}/{n}",
        "prompt_id": question.id,
        "condition": "",
        "source": question.category,
        "variant": variant,
        "ended": ended,
        **({"trigger": question.trigger} if question.trigger else {}),
        "messages": [
            *({"role": m.role, "content": m.content} for m in question.messages),
            {"role": "assistant", "content": answer.strip()},
        ],
    }


def _seed(seed: int, question: str, n: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{question}:{n}".encode()).digest()[:4], "big")


def _whole_lines(path: Path) -> int:
    """Whole batches' lines in an unfinished file; a last half-written line is cut off."""
    if not path.is_file():
        return 0
    lines = path.read_bytes().split(b"\n")[:-1]
    kept = len(lines) // BATCH * BATCH
    path.write_bytes(b"".join(line + b"\n" for line in lines[:kept]))
    return kept
