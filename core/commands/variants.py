"""A fine-tuned variant beside its base: do the SAEs still explain it, and what does it differ by."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from core.commands.shared import AsJson, CacheDir, Device, Dtype, Layers, Preset, emit, parse_layers
from core.errors import PresetError


def sae_health(
    preset: Preset,
    variants: Annotated[str | None, typer.Option(help="Variants, e.g. base,bad-health-r8; all when left out.")] = None,
    conversations: Annotated[str | None, typer.Option(help="A conversation set, or a JSONL or CSV file.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Conversations read, those of held-out prompts first.")] = 40,
    layers: Layers = None,
    cache: CacheDir = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """FVU, L0 and cross-entropy with each SAE spliced in, on base and on every adapter, of the same conversations."""
    from core.analysis.health import spliced_file
    from core.evaluation.sae_health import choose_conversations, measure_variants
    from core.experiment import load_experiment
    from core.store import prepare
    from core.store.places import experiment_folder
    from core.view.progress import counting_bar
    from core.view.text import sae_health_text

    experiment = load_experiment(preset)
    names = variants.split(",") if variants else list(experiment.variants)
    for name in names:
        prepare.adapter_spec(experiment, name)
    chosen = prepare.choose_layers(experiment, parse_layers(layers))
    rows = choose_conversations(prepare.conversations_for(experiment, conversations), limit)
    loaded = prepare.model_for(experiment, device=device, dtype=dtype)
    adapters = {name: prepare.adapter_for(experiment, name, loaded) for name in names}
    path = spliced_file(cache or experiment_folder(experiment))
    with counting_bar("sae-health") as advance:
        saes = prepare.saes_for(experiment, chosen, loaded)
        found = [asdict(h) for h in measure_variants(loaded, saes, adapters, rows, path, on_progress=advance)]
    emit(found, "" if as_json else sae_health_text(found, str(path)), as_json)


def difference(
    preset: Preset,
    variant: Annotated[str, typer.Argument(help="Name of an adapter of the preset.")],
    texts: Annotated[Path | None, typer.Option(help="JSONL with `text`; the unrelated texts that ship.")] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="Tokens read of each text, BOS not counted.")] = 5,
    limit: Annotated[int | None, typer.Option(min=1, help="Read only the first N texts.")] = None,
    features: Annotated[bool, typer.Option(help="Compare with the SAEs' decoder directions; loads the SAEs.")] = True,
    cache: CacheDir = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Activation difference lens: what a variant differs by from base on the first tokens of unrelated text."""
    from core.experiment import load_experiment
    from core.store import prepare
    from core.store.difference import make_difference
    from core.store.difference_file import difference_file
    from core.store.places import experiment_folder
    from core.store.texts import UNRELATED_TEXT, load_texts
    from core.view.difference_parts import difference_text, summary

    experiment = load_experiment(preset)
    if prepare.adapter_spec(experiment, variant) is None:
        others = ", ".join(experiment.variants[1:]) or "none yet"
        raise PresetError(f"Base does not differ from itself; give an adapter of {experiment.name!r}: {others}.")
    rows = load_texts(texts or UNRELATED_TEXT, limit)
    loaded = prepare.model_for(experiment, device=device, dtype=dtype)
    adapter = prepare.adapter_for(experiment, variant, loaded)
    path = difference_file(cache or experiment_folder(experiment), variant)
    layers = [spec.layer for spec in experiment.saes] if features else []
    saes = (prepare.saes_for(experiment, [layer], loaded)[layer] for layer in layers)
    result = summary(make_difference(loaded, adapter, rows, path, k=k, saes=saes), path)
    emit(result, "" if as_json else difference_text(result), as_json)
