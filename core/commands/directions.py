"""The direction of a contrast, and a direction as features."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from core.commands.shared import AsJson, CacheDir, Preset, emit, say

ONCE = "response"


def direction(
    preset: Preset,
    contrast: Annotated[str, typer.Argument(help="One of the preset's contrasts.")],
    layer: Annotated[int | None, typer.Option(help="The preset's default layer when left out.")] = None,
    position: Annotated[str, typer.Option(help="response or last_prompt.")] = "response",
    weighting: Annotated[str, typer.Option(help="response: each response counts once; token: each token.")] = ONCE,
    all_layers: Annotated[bool, typer.Option("--all-layers", help="Write every cached layer's direction.")] = False,
    cache: CacheDir = None,
    out: Annotated[Path | None, typer.Option(help="Write the direction with its origin: .safetensors.")] = None,
    as_json: AsJson = False,
) -> None:
    """The misalignment direction of a contrast: norm, held-out AUROC, stability, cosines with its relatives."""
    from core.analysis import direction_files as files
    from core.analysis.direction import contrast_direction, measure
    from core.experiment import load_experiment
    from core.store.direction_file import save_directions
    from core.view.direction_text import direction_summary, direction_text

    experiment = load_experiment(preset)
    sides = files.open_sides(experiment, experiment.contrast(contrast), cache)
    middle = sides.layers[len(sides.layers) // 2]
    usual = experiment.default_layer if experiment.default_layer in sides.layers else middle
    chosen = usual if layer is None else layer
    found = measure(sides, chosen, position, weighting, experiment.name)
    if out is not None:
        layers = sides.layers if all_layers else [chosen]
        save_directions(out, [contrast_direction(sides, n, position, weighting, experiment.name) for n in layers])
        say(f"Wrote the direction of layer {', '.join(map(str, layers))} to {out}.")
    others = files.relatives(experiment, sides, chosen, position, weighting, cache)
    own = files.Relative(sides, chosen, position, weighting, experiment.name)
    summary = direction_summary(found, own, others, out)
    emit(summary, "" if as_json else direction_text(summary), as_json)


def decompose(
    file: Annotated[Path, typer.Argument(help="What `direction` wrote, or a vector made elsewhere.")],
    method: Annotated[str, typer.Option(help="exact, encoder, cosine, omp or nnls.")] = "omp",
    top: Annotated[int, typer.Option(min=1, help="Features to list; a fit takes as many.")] = 20,
    k: Annotated[int, typer.Option("--k", min=1, help="Features of the longest fit and of the curve.")] = 64,
    layer: Annotated[int | None, typer.Option(help="Which layer, for a file with several or made elsewhere.")] = None,
    key: Annotated[str | None, typer.Option(help="Which tensor, for a file made elsewhere that holds several.")] = None,
    preset: Annotated[str | None, typer.Option(help="Whose SAEs; the preset it was made with when left out.")] = None,
    cache: CacheDir = None,
    out: Annotated[Path | None, typer.Option(help="Also write the whole table: .parquet, .csv or .json.")] = None,
    as_json: AsJson = False,
) -> None:
    """A direction as a sum of SAE features, in one of five ways, with the norm that they explain."""
    from core.analysis import decompose as ways
    from core.analysis import direction_files as files
    from core.analysis.export import write_table
    from core.model.dictionaries import read_dictionary
    from core.store.places import experiment_folder
    from core.view.direction_text import decomposition_summary, decomposition_text
    from core.view.labels import named_by_cache

    given, experiment = files.load_any(file, layer, key, preset, cache)
    sides = files.caches_of(given, experiment, cache) if method == "exact" else None
    spec = files.sae_spec(experiment, given.layer)
    found = ways.decompose(
        given, read_dictionary(spec, cache or experiment_folder(experiment), experiment), method,
        differences=files.differences_of(given, sides) if sides else None, k=max(k, top),
    )  # fmt: skip
    known = files.any_cache(experiment, given.layer, cache, features=True)
    table = named_by_cache(found.table, known, given.layer) if known else found.table
    if out is not None:
        write_table(table, out)
        say(f"Wrote {table.height:,} features to {out}.")
    summary = decomposition_summary(found, table, top)
    emit(summary, "" if as_json else decomposition_text(summary), as_json)
