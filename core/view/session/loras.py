"""A LoRA's components and their firing, from the adapter's files and the firing file; nothing loads a model.

Open files are shared between browser sessions, never changed, and not closed while a page may still read them. Errors
stop the page with one sentence.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl
import streamlit as st

from core.analysis import direction_files, lora_features, lora_files, lora_firing
from core.analysis.decompose import Decomposition
from core.analysis.lora import Component, components
from core.analysis.lora_effect import effect_table, movers
from core.analysis.lora_files import ContrastPrediction, OpenLora
from core.analysis.lora_space import angle_table, principal_angles
from core.dictionary import Dictionary
from core.directions import Direction
from core.errors import CacheError, MicroscopeError
from core.model.adapter_files import find_adapter, read_factors
from core.specs import AdapterSpec, Experiment
from core.store.firing_file import Firing
from core.store.firing_layout import firing_files
from core.store.places import experiment_folder
from core.view.inventory import FileKey, file_key
from core.view.labels import named_by_cache
from core.view.session.caches import open_cache
from core.view.session.chosen import View
from core.view.session.directions import load_dictionary
from core.view.session.messages import stop_with


def lora_files_of(chosen: View) -> dict[str, dict[str, Path]]:
    """Adapter -> set -> firing file, of the experiment's adapters that have one, in the preset's order."""
    folder = experiment_folder(chosen.experiment)
    found = {a.name: firing_files(folder, a.name) for a in chosen.experiment.adapters}
    return {name: files for name, files in found.items() if files}


def load_lora(chosen: View, adapter: str, path: Path) -> OpenLora:
    """An adapter's components with their firing."""
    spec = next(a for a in chosen.experiment.adapters if a.name == adapter)
    try:
        return _lora(file_key(path), _adapter_key(chosen.experiment, spec), chosen.experiment, spec)
    except MicroscopeError as error:
        stop_with(error)


@st.cache_resource(max_entries=8, show_spinner="Reading the adapter")
def _lora(key: FileKey, of: FileKey, _experiment: Experiment, _spec: AdapterSpec) -> OpenLora:
    firing = Firing.open(key[0])
    try:
        return lora_files.open_lora(_experiment, _spec, firing)
    except MicroscopeError:
        firing.close()
        raise


def load_components(chosen: View, adapter: str) -> tuple[Component, ...]:
    """An adapter's components alone, without any firing."""
    spec = next(a for a in chosen.experiment.adapters if a.name == adapter)
    try:
        return _components(_adapter_key(chosen.experiment, spec), chosen.experiment, spec)
    except MicroscopeError as error:
        stop_with(error)


@st.cache_resource(max_entries=8, show_spinner="Reading the adapter")
def _components(key: FileKey, _experiment: Experiment, _spec: AdapterSpec) -> tuple[Component, ...]:
    return components(read_factors(_spec, experiment_folder(_experiment)))


def adapters_here(chosen: View) -> list[str]:
    """The experiment's adapters whose files are on this machine."""
    found = []
    for spec in chosen.experiment.adapters:
        try:
            find_adapter(spec, experiment_folder(chosen.experiment))
        except MicroscopeError:
            continue
        found.append(spec.name)
    return found


def _adapter_key(experiment: Experiment, spec: AdapterSpec) -> FileKey:
    return file_key(find_adapter(spec, experiment_folder(experiment)) / "adapter_model.safetensors")


def sae_layers(chosen: View) -> list[int]:
    return sorted(s.layer for s in chosen.experiment.saes)


def names_at(chosen: View, table: pl.DataFrame, layer: int) -> pl.DataFrame:
    """A table with `feature`, with the name each feature goes by; from whichever cache knows the layer."""
    cache = direction_files.any_cache(chosen.experiment, layer, None, open_cache, features=True)
    if cache is None:
        return table.with_columns(name=pl.lit(""))
    return named_by_cache(table, cache, layer)


def load_contrast_directions(chosen: View) -> dict[int, Direction]:
    """The chosen contrast's direction at every cached layer; empty where its files are missing."""
    try:
        return lora_files.contrast_directions(chosen.experiment, chosen.contrast, None, open_cache)
    except CacheError:
        return {}


def load_written(chosen: View, lora: OpenLora, component: int, layer: int, book: Dictionary) -> Decomposition:
    """The component's write direction as features of the dictionary at `layer`."""
    try:
        return _written(_key(lora), component, layer, lora, book)
    except MicroscopeError as error:
        stop_with(error)


@st.cache_data(max_entries=64, show_spinner=False)
def _written(key: FileKey, component: int, layer: int, _lora: OpenLora, _book: Dictionary) -> Decomposition:
    part = _lora.parts[component]
    return lora_features.write_features(part, _lora.firing.gains[part.key.layer], _book, _lora.firing.model_id)


def load_firing_table(lora: OpenLora, question: lora_firing.Question) -> pl.DataFrame | None:
    """Every component's test on one question; None where there are too few prompts."""
    try:
        return _firing_table(_key(lora), question, lora)
    except MicroscopeError:
        return None


@st.cache_data(max_entries=64, show_spinner=False)
def _firing_table(key: FileKey, question: lora_firing.Question, _lora: OpenLora) -> pl.DataFrame:
    return lora_firing.firing_table(_lora.firing, question)


def load_probes(lora: OpenLora, *, by_layer: bool) -> pl.DataFrame:
    """Probes of all scalars together, or of each layer's as well."""
    return _probes(_key(lora), by_layer, lora)


@st.cache_data(max_entries=16, show_spinner="Fitting probes")
def _probes(key: FileKey, by_layer: bool, _lora: OpenLora) -> pl.DataFrame:
    return lora_firing.probe_table(_lora.firing, None if by_layer else [None])


def load_predictions(chosen: View, lora: OpenLora) -> tuple[tuple[ContrastPrediction, ...], tuple[str, ...]]:
    """How much of the adapter's own model contrast its writing predicts, and of others'; notes for what is left out."""
    return _predictions(_key(lora), chosen.experiment.name, lora, chosen)


@st.cache_data(max_entries=16, show_spinner="Comparing with the measured contrast")
def _predictions(
    key: FileKey, preset: str, _lora: OpenLora, _chosen: View
) -> tuple[tuple[ContrastPrediction, ...], tuple[str, ...]]:
    return lora_files.predictions(_chosen.experiment, _lora, lambda n: load_dictionary(_chosen, n), None, open_cache)


def load_effects(lora: OpenLora, book: Dictionary, component: int | None) -> pl.DataFrame:
    """What a component, or all up to the dictionary's layer, does to each feature."""
    try:
        return effect_table(lora.firing, lora.writes, book, component)
    except MicroscopeError as error:
        stop_with(error)


def load_movers(lora: OpenLora, book: Dictionary, feature: int) -> pl.DataFrame:
    """Which components move a feature."""
    return movers(lora.firing, lora.writes, book, feature)


def load_angles(chosen: View, a: str, b: str) -> pl.DataFrame:
    """How near the write spaces of two adapters are, by layer and module."""
    try:
        return angle_table(principal_angles(load_components(chosen, a), load_components(chosen, b)))
    except MicroscopeError as error:
        stop_with(error)


def _key(lora: OpenLora) -> FileKey:
    return file_key(lora.firing.path)
