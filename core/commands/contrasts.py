"""What a contrast moves: its ranking, the gradients behind it, what it shares with other contrasts."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from core.commands.shared import AsJson, CacheDir, Device, Dtype, Preset, emit, parse_layers, say


def rank(
    preset: Annotated[str | None, typer.Argument(help="Name of a preset, or the path of a .toml file.")] = None,
    contrast: Annotated[str | None, typer.Argument(help="One of the preset's contrasts.")] = None,
    target: Annotated[str | None, typer.Option(help="FILE[:condition], instead of a preset and contrast.")] = None,
    reference: Annotated[str | None, typer.Option(help="FILE[:condition].")] = None,
    layer: Annotated[int | None, typer.Option(help="The preset's default layer when left out.")] = None,
    position: Annotated[str, typer.Option(help="response or last_prompt.")] = "response",
    top: Annotated[int, typer.Option(min=1, help="How many features of each tail.")] = 20,
    include_format: Annotated[bool, typer.Option("--include-format", help="Show format features too.")] = False,
    permutations: Annotated[int, typer.Option(min=0, help="Label permutations of the replication control.")] = 20,
    cache: CacheDir = None,
    out: Annotated[Path | None, typer.Option(help="Also write the whole table: .parquet, .csv or .json.")] = None,
    as_json: AsJson = False,
) -> None:
    """Differential features of a contrast: the most raised, then the most suppressed."""
    from core.analysis import compare, feature_table, find, health
    from core.analysis.export import write_table
    from core.analysis.ranking import RankingSettings, contrast_summary
    from core.view.labels import NAMING, named_by_cache
    from core.view.text import ranking_text

    sides, default_layer, name = find.find_sides(preset, contrast, target, reference, cache)
    chosen = default_layer if layer is None else layer
    ranking = compare.rank(sides, chosen, position, RankingSettings(n_permutations=permutations))
    ranking = compare.with_attribution(ranking, sides)
    if out is not None:
        named = named_by_cache(ranking.table, sides.target, chosen)
        write_table(named.select(*feature_table.columns(named), *NAMING), out)
        say(f"Wrote {ranking.table.height:,} features to {out}.")
    summary = contrast_summary(ranking, top, contrast=name, include_format=include_format)
    compared = health.of_sides(sides, chosen)
    if compared is not None:
        summary |= {"sae_health": asdict(compared), "notes": [*summary["notes"], compared.sentence]}
    emit(summary, "" if as_json else ranking_text(summary), as_json)


def attribute(
    preset: Preset,
    contrast: Annotated[str, typer.Argument(help="A contrast whose two sides are read by one variant.")],
    layers: Annotated[str | None, typer.Option(help="Layers, e.g. 9,15; all that are cached when left out.")] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens in one batch, padding included.")] = 1024,
    cache: CacheDir = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Delta-attribution of a contrast's features, by gradients, once: `rank` and the Rankings page then show it."""
    from core.evaluation.attribution import attribute as run
    from core.evaluation.attribution import one_reader
    from core.experiment import load_experiment
    from core.store import prepare
    from core.store.attribution_file import attribution_file
    from core.store.places import experiment_folder, side_file
    from core.store.reader import Cache
    from core.view.progress import counting_bar
    from core.view.text import attribution_text

    experiment = load_experiment(preset)
    spec, asked = experiment.contrast(contrast), parse_layers(layers)
    prepare.choose_layers(experiment, asked)
    one_reader(spec)
    folder = cache or experiment_folder(experiment)
    with Cache.open(side_file(experiment, spec.target, folder)) as text, counting_bar("attribute") as advance:
        chosen = prepare.choose_layers(experiment, asked or text.layers)
        loaded = prepare.model_for(experiment, device=device, dtype=dtype)
        done = run(
            loaded, prepare.adapter_for(experiment, spec.target.variant, loaded),
            prepare.saes_for(experiment, chosen, loaded), spec, text, attribution_file(folder, contrast),
            batch_tokens=batch_tokens, on_progress=advance,
        )  # fmt: skip
    result = asdict(done) | {"file": str(done.file)}
    emit(result, "" if as_json else attribution_text(result), as_json)


def concordance(
    preset: Preset,
    contrasts: Annotated[list[str], typer.Argument(help="Two or three of the preset's contrasts.")],
    layer: Annotated[int | None, typer.Option(help="The preset's default layer when left out.")] = None,
    position: Annotated[str, typer.Option(help="response or last_prompt.")] = "response",
    k: Annotated[int, typer.Option("--k", min=1, help="Features at each end that the sentence speaks of.")] = 50,
    top: Annotated[int, typer.Option(min=1, help="Features listed of each end.")] = 20,
    include_format: Annotated[bool, typer.Option("--include-format", help="Consider format features too.")] = False,
    subtract: Annotated[str, typer.Option(help="Take the benign control off: none, effect or mean.")] = "none",
    all_layers: Annotated[bool, typer.Option("--all-layers", help="Also the figures of every cached layer.")] = False,
    cache: CacheDir = None,
    out: Annotated[Path | None, typer.Option(help="Also write the whole table: .parquet, .csv or .json.")] = None,
    as_json: AsJson = False,
) -> None:
    """Which features two or three contrasts share, against chance and their benign controls."""
    from core.analysis import concordance_files as files
    from core.analysis.concordance import ConcordanceSettings
    from core.analysis.concordance_report import concordance_summary, words_for
    from core.analysis.export import write_table
    from core.view.labels import named_by_cache
    from core.view.text import concordance_text

    found = files.open_contrasts(preset, contrasts, cache)
    settings = ConcordanceSettings(k=k, include_format=include_format, subtract=subtract)
    made = files.concord_at(found, found.default_layer if layer is None else layer, position, settings)
    table = named_by_cache(made.table, found.sides[contrasts[0]].target, made.layer)
    made = replace(made, table=table, notes=(*files.sae_flags(found, made.layer), *made.notes))
    if out is not None:
        write_table(made.table, out)
        say(f"Wrote {made.n_features:,} features to {out}.")
    summary = concordance_summary(
        made, top, words=words_for(found.specs),
        context=lambda name, feature: files.context_text(found.sides[name], made.layer, feature),
        layers=files.every_layer(found, position, settings) if all_layers else (),
    )  # fmt: skip
    emit(summary, "" if as_json else concordance_text(summary), as_json)
