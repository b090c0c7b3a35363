"""A LoRA as components: what each writes, when it fires, how much of the model contrast that predicts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from core.commands.shared import AsJson, CacheDir, Device, Dtype, Preset, emit, say


def lora(
    preset: Preset,
    adapter: Annotated[str, typer.Argument(help="Name of an adapter of the preset, or a folder in PEFT's layout.")],
    conversations: Annotated[str | None, typer.Option(help="Sets or files, e.g. open_pairs,open_answers; the preset's "
                                                           "when left out.")] = None,
    contrast: Annotated[str | None, typer.Option(help="Whose direction to hold components against.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Components to list, the strongest on this text first.")] = 20,
    keep: Annotated[int | None, typer.Option(min=0, help="Components kept token by token; 0: all.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read only the first N conversations of each set.")] = None,
    probes: Annotated[bool, typer.Option(help="Fit grouped logistic probes of the scalars.")] = True,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens in one batch, padding included.")] = 2048,
    cache: CacheDir = None,
    out: Annotated[Path | None, typer.Option(help="Also write what the adapter does to each feature of the default "
                                                  "layer: .parquet, .csv or .json.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """LoRA components of an adapter: what they write, when they fire, what that predicts. Reads the text once."""
    from functools import lru_cache

    from core.analysis import direction_files, lora_files
    from core.analysis.export import write_table
    from core.analysis.lora_effect import effect_table
    from core.analysis.lora_report import lora_summary
    from core.experiment import load_experiment
    from core.model.dictionaries import read_dictionary
    from core.store import prepare
    from core.store.firing_file import Firing
    from core.store.firing_layout import firing_file
    from core.store.places import experiment_folder
    from core.view.labels import named_by_cache
    from core.view.lora_text import lora_text

    experiment = load_experiment(preset)
    spec, folder = lora_files.adapter_spec(experiment, adapter), cache or experiment_folder(experiment)
    wanted = experiment.contrast(contrast) if contrast else lora_files.usual_contrast(experiment, cache)
    names = conversations.split(",") if conversations else list(experiment.lora_sets_of(spec.name))
    sets = [prepare.conversations_for(experiment, name, limit=limit) for name in names]
    path = firing_file(folder, spec.name, "+".join(s.name for s in sets))
    if not path.is_file():
        _read(experiment, spec, sets, path, keep, batch_tokens, device, dtype)

    @lru_cache(maxsize=2)
    def book(layer: int):
        sae = experiment.sae(layer)
        return read_dictionary(sae, experiment_folder(experiment), experiment) if sae else None

    with Firing.open(path) as firing:
        lora_files.check_sets(firing, sets, keep)
        found = lora_files.open_lora(experiment, spec, firing)
        directions = lora_files.contrast_directions(experiment, wanted, cache) if wanted else {}
        predicted, notes = lora_files.predictions(experiment, found, book, cache)
        layers = sorted(s.layer for s in experiment.saes)
        result = lora_summary(found, book, layers, directions, predicted, top=top, probes=probes, notes=notes)
        if out is not None and layers:
            layer = experiment.default_layer if experiment.default_layer in layers else layers[len(layers) // 2]
            table = effect_table(firing, found.writes, book(layer))
            known = direction_files.any_cache(experiment, layer, cache, features=True)
            write_table(named_by_cache(table, known, layer) if known else table, out)
            say(f"Wrote {table.height:,} features to {out}.")
    named = {}
    if not as_json:
        for layer in {f["layer"] for c in result["components"] for f in (*c["write_features"], *c["read_features"])}:
            known = direction_files.any_cache(experiment, layer, cache, features=True)
            if known is not None:
                info = named_by_cache(known.feature_info(layer).select("feature"), known, layer)
                named |= {(layer, feature): name for feature, name in info.select("feature", "name").iter_rows()}
    emit(result, "" if as_json else lora_text(result, named), as_json)


def _read(experiment, spec, sets, path, keep, batch_tokens, device, dtype) -> None:
    """Make the firing file, or go on with it; what is there already is left as it is."""
    from core.analysis.lora import components
    from core.evaluation.firing import read_firing
    from core.model.adapter_files import read_factors
    from core.model.adapters import load_adapter
    from core.store import prepare
    from core.store.places import experiment_folder
    from core.view.progress import extraction_bar

    place = experiment_folder(experiment)
    parts = components(read_factors(spec, place))
    loaded = prepare.model_for(experiment, device=device, dtype=dtype)
    adapter = load_adapter(spec, loaded, place)
    with extraction_bar() as advance:
        try:
            done = read_firing(loaded, adapter, parts, sets, path, keep=keep, compact=experiment.storage == "compact",
                               batch_tokens=batch_tokens, on_progress=advance)
        except KeyboardInterrupt:
            say(f"Interrupted: whole shards are safe beside {path}; run the same command to go on.")
            raise
    if done.tokens_per_second:
        say(f"Wrote {path}: {done.n_components:,} components on {done.n_response_tokens:,} response tokens.")
