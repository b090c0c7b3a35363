"""What an extraction needs, found and loaded: an experiment's model, its SAEs, its conversations and its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from core.conversations import ConversationSet, load_conversations
from core.errors import ModelError, PresetError
from core.experiment import conversations_path
from core.model.adapter_files import fetch_adapter
from core.model.adapters import Adapter, load_adapter
from core.model.loading import LoadedModel, fetch_model, load_model
from core.model.saes import LoadedSae, from_registry, load_sae
from core.specs import CONDITIONS, AdapterSpec, Experiment
from core.split import split
from core.store.places import experiment_folder


def model_for(experiment: Experiment, *, device: str | None = None, dtype: str | None = None) -> LoadedModel:
    """The experiment's base model; the width and depth that the preset states are checked."""
    loaded = load_model(experiment.model, device=device, dtype=dtype or experiment.dtype or None)
    for what, stated, found in (
        ("d_model", experiment.model.d_model, loaded.d_model),
        ("n_layers", experiment.model.n_layers, loaded.n_layers),
    ):
        if stated and stated != found:
            raise ModelError(f"{experiment.model.id}: {what} is {found}, the preset {experiment.name!r} says {stated}.")
    return loaded


def choose_layers(experiment: Experiment, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The asked-for layers, or all of the preset's. Raises `PresetError` for one the preset does not have."""
    if layers is None:
        return tuple(sorted(experiment.layers))
    for layer in layers:
        if layer not in experiment.layers:
            known = ", ".join(map(str, experiment.layers))
            raise PresetError(f"Layer {layer} is not in preset {experiment.name!r}; it has layers {known}.")
    return tuple(sorted(set(layers)))


def saes_for(experiment: Experiment, layers: Sequence[int], loaded: LoadedModel) -> dict[int, LoadedSae]:
    """The experiment's SAEs at `layers`, each checked against the model; layers without one are left out."""
    return {
        spec.layer: load_sae(
            spec,
            d_model=loaded.d_model,
            model_names=(experiment.model.id, *experiment.model.sae_names),
            folder=experiment_folder(experiment),
            device=loaded.device,
        )
        for spec in experiment.saes
        if spec.layer in layers
    }


def adapter_for(experiment: Experiment, variant: str, loaded: LoadedModel) -> Adapter | None:
    """The LoRA adapter that makes `variant` of the base model, checked against it; None for the base itself."""
    spec = adapter_spec(experiment, variant)
    return load_adapter(spec, loaded, experiment_folder(experiment)) if spec else None


def adapter_spec(experiment: Experiment, variant: str) -> AdapterSpec | None:
    """The preset's entry for `variant`; None for base. Raises `PresetError` for a variant it does not have."""
    if variant not in experiment.variants:
        raise PresetError(
            f"Variant {variant!r} is not in preset {experiment.name!r}; it has {', '.join(experiment.variants)}."
        )
    return next((spec for spec in experiment.adapters if spec.name == variant), None)


def default_conversations(experiment: Experiment, variant: str) -> str:
    """What a variant reads when nothing is named: what the first contrast that it takes part in lets it read."""
    adapter_spec(experiment, variant)
    sides = (side for contrast in experiment.contrasts for side in (contrast.target, contrast.reference))
    return next((s.conversations for s in sides if s.variant == variant), experiment.conversations[0].name)


def conversations_for(
    experiment: Experiment,
    name_or_file: str | None = None,
    *,
    skip_bad: bool = False,
    limit: int | None = None,
    allow_conditions: Sequence[str] = (),
) -> ConversationSet:
    """A conversation set of the preset by name (its first by default), or any JSONL or CSV file by path."""
    name = name_or_file or experiment.conversations[0].name
    given = Path(name).expanduser()
    is_file = given.suffix.lower() in (".jsonl", ".csv")
    path = given if is_file else conversations_path(experiment, name)
    spec = None if is_file else next(spec for spec in experiment.conversations if spec.name == name)
    heldout = spec is not None and spec.heldout
    found = load_conversations(
        path,
        name=given.stem if is_file else name,
        skip_bad=skip_bad,
        limit=None if heldout else limit,
        conditions=(*CONDITIONS, *allow_conditions),
        keep=spec and spec.keeps,
    )
    if not heldout:
        return found
    return ConversationSet(found.name, tuple(split(found.conversations)[1][:limit]), found.skipped)


def fetch(experiment: Experiment) -> Path:
    """Bring the model's weights, the adapters and the registry's SAEs onto this machine; returns the model's folder."""
    folder = fetch_model(experiment.model)
    for adapter in experiment.adapters:
        fetch_adapter(adapter, experiment_folder(experiment))
    for spec in experiment.saes:
        if spec.release != "local":
            from_registry(spec)
    return folder
