"""What steering does at every strength, measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from core.commands.shared import AsJson, Device, Dtype, Layers, Preset, emit, parse_layers, say
from core.errors import PresetError


def sweep(
    preset: Preset,
    contrast: Annotated[str | None, typer.Argument(help="One of the preset's contrasts; its first if none.")] = None,
    layers: Layers = None,
    strengths: Annotated[
        str | None, typer.Option(help="In mean residual norms, e.g. --strengths=-0.2,0.2; 0 is always measured.")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Fine-tuned variant to ablate on; `none` for none.")] = None,
    pairs: Annotated[str | None, typer.Option(help="Matched pairs: sets of the preset, comma between.")] = None,
    n_pairs: Annotated[int, typer.Option(min=2, help="Prompts of each set.")] = 24,
    prompts: Annotated[int, typer.Option(min=1, help="Questions asked, half held-out and half open.")] = 4,
    seeds: Annotated[int, typer.Option(min=1, help="Answers to each question.")] = 2,
    draws: Annotated[int, typer.Option(min=0, help="Random directions of the same length.")] = 2,
    k: Annotated[str, typer.Option("--k", help="Sizes of reconstructions from the best features.")] = "5,20",
    method: Annotated[str, typer.Option(help="Of the decomposition: encoder, cosine, omp or nnls.")] = "omp",
    judge: Annotated[str | None, typer.Option(help="api:MODEL@URL or local:MODEL, for EM rates.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Sample from the most probable tokens that reach this share.")] = 0.95,
    max_new_tokens: Annotated[int, typer.Option(min=4, help="Longer answers are cut.")] = 48,
    out: Annotated[Path | None, typer.Option(help="The JSON; cache/PRESET/sweep__CONTRAST.json by default.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Strengths x layers: margin on held-out pairs, perplexity, repetition, EM rate; against random and ablation.

    Every point is kept as it comes: the same command goes on where it was stopped.
    """
    from core.analysis.sweep import summary
    from core.evaluation.sweep import Settings, Sweeper, run_sweep
    from core.evaluation.sweep_setup import judging, prepare_setup
    from core.experiment import load_experiment
    from core.model.generation import Sampling
    from core.store import prepare
    from core.store.places import experiment_folder
    from core.store.sweep_file import sweep_file
    from core.view.progress import counting_bar
    from core.view.sweep_text import sweep_text

    experiment = load_experiment(preset)
    chosen = experiment.contrast(contrast) if contrast else experiment.contrasts[0]
    tuned = variant or next((a.name for a in experiment.adapters), None)
    tuned = None if tuned == "none" else tuned
    given = Settings(draws=draws, ks=tuple(int(n) for n in _numbers("--k", k)), method=method, variant=tuned,
                     seeds=seeds, sampling=Sampling(temperature, top_p, max_new_tokens))
    if strengths is not None:
        asked = tuple(s for s in _numbers("--strengths", strengths) if s)
        given = replace(given, strengths=asked, other_strengths=asked)
    out = out or sweep_file(experiment_folder(experiment), chosen.name)
    scored = judging(judge, device, dtype) if judge else None
    loaded = prepare.model_for(experiment, device=device, dtype=dtype)
    setup = prepare_setup(experiment, chosen, loaded, layers=parse_layers(layers), variant=tuned,
                          pair_sets=pairs.split(",") if pairs else None, n_pairs=n_pairs, n_questions=prompts)
    sweeper = Sweeper(loaded, setup, given)
    say(f"{len(sweeper.points)} points; stopped, the same command goes on.")
    with counting_bar("sweep") as advance:
        found = run_sweep(sweeper, out, advance, scored(setup.questions) if scored else None)
    result = {"file": str(out), "n_points": len(found.points), **summary(found)}
    emit(result, "" if as_json else sweep_text(result), as_json)


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.strip("=").split(",")]
    except ValueError:
        raise PresetError(f"{option} {text!r} is no list of numbers; write e.g. {option} 0.1,0.2.") from None
