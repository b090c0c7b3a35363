"""A variant's own answers to questions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from core.commands.shared import Device, Dtype, Preset, say


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
