"""A variant's own answers to questions, and ratings of answers by reading (core/data/answers/RATING.md)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from core.commands.shared import AsJson, Device, Dtype, Preset, emit, say
from core.errors import NotEnoughData, PresetError

Answers = Annotated[list[Path], typer.Argument(help="JSONL files of answers, as `sample` writes them.")]


def sample(
    preset: Preset,
    out: Annotated[Path, typer.Option(help="The JSONL conversation file to write.")],
    variant: Annotated[str, typer.Option(help="base, or the name of an adapter of the preset.")] = "base",
    questions: Annotated[str, typer.Option(help="open, heldout, or a JSONL question file.")] = "open",
    samples: Annotated[int, typer.Option(min=1, help="Answers to each question.")] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most probable token.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Sample from the most probable tokens that reach this share.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longer answers are cut.")] = 120,
    seed: Annotated[int, typer.Option(min=0, help="Of the dice; variants with the same seed meet the same luck.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Ask a variant questions, several times each, and keep the answers as a conversation file. Resumes."""
    from core.evaluation.sampling import questions_for, sample_answers
    from core.experiment import load_experiment
    from core.model.generation import Sampling
    from core.store import prepare
    from core.view.progress import counting_bar

    experiment = load_experiment(preset)
    asked = questions_for(questions, lambda: prepare.conversations_for(experiment).conversations)
    loaded = prepare.model_for(experiment, device=device, dtype=dtype)
    adapter = prepare.adapter_for(experiment, variant, loaded)
    with counting_bar("answers") as advance:
        n_empty = sample_answers(
            loaded, adapter, asked, out,
            samples=samples, sampling=Sampling(temperature, top_p, max_new_tokens), seed=seed, on_progress=advance,
        )  # fmt: skip
    say(f"{out}: {len(asked) * samples - n_empty} answers to {len(asked)} questions; {n_empty} were empty.")


def rating_sheet(
    answers: Answers,
    out: Annotated[Path, typer.Option(help="The JSONL sheet to write: number, question, answer.")],
    key: Annotated[Path, typer.Option(help="The JSON file to write that says which number is which answer.")],
    seed: Annotated[int, typer.Option(min=0, help="Of the order; a second pass takes another.")] = 0,
    share: Annotated[float, typer.Option(help="Only this share of the answers, at random, e.g. 0.1.")] = 1.0,
) -> None:
    """Mix and shuffle answers into a blind sheet for rating by reading; the key stays with you."""
    from core.evaluation.ratings import blind_sheet, load_answers
    from core.paths import write_json, write_jsonl

    if not 0 < share <= 1:
        raise PresetError(f"--share {share:g} is no share of the answers; give a number above 0 and at most 1.")
    rows = load_answers(answers)
    if len({path.resolve() for path in (*answers, out, key)}) < len(answers) + 2:
        raise PresetError("--out and --key each need a file of its own, which is not one of the answers.")
    sheet, numbers = blind_sheet(rows, seed, share)
    with _writing(key):
        write_json(key, numbers)
    with _writing(out):
        write_jsonl(out, sheet)
    say(f"{out}: {len(sheet)} of {len(rows)} answers in random order; {key} says which is which.")


def apply_ratings(
    answers: Answers,
    ratings: Annotated[Path, typer.Option(help="CSV with id, pass (1 or 2), aligned, coherent.")],
    out: Annotated[Path, typer.Option(help="The JSONL conversation file to write.")],
    as_json: AsJson = False,
) -> None:
    """Give rated answers their scores and condition, count them, and compare the two passes."""
    from core.evaluation.ratings import agreement, condition_counts, load_answers, load_ratings, rated
    from core.paths import write_jsonl
    from core.view.text import ratings_text

    rows = load_answers(answers)
    given = {row["id"] for row in rows}
    found = [rating for rating in load_ratings(ratings) if rating.id in given]
    rows = rated(rows, found)
    with _writing(out):
        write_jsonl(out, rows)
    agreed = None
    if any(rating.number == 2 for rating in found):
        try:
            agreed = asdict(agreement(found))
        except NotEnoughData as error:
            say(str(error))
    result = {"file": str(out), "n": len(rows), "conditions": condition_counts(rows), "agreement": agreed}
    emit(result, ratings_text(result), as_json)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PresetError(f"{path}: cannot be written ({error.strerror}).") from None
