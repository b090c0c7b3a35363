"""Directions, their decompositions and the SAE's matrices, computed once; and what is carried to the Steering page.

Cached by the files they were read from and the settings. Errors stop the page with one sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import streamlit as st

from core.analysis import decompose, direction, direction_files
from core.analysis.compare import Sides
from core.analysis.decompose import METHODS, Decomposition
from core.analysis.direction import Measured
from core.dictionary import Dictionary
from core.directions import Direction
from core.errors import DirectionError, MicroscopeError
from core.model.dictionaries import read_dictionary
from core.paths import ROOT
from core.specs import ContrastSpec, SaeSpec
from core.store.places import experiment_folder
from core.view.inventory import FileKey
from core.view.session.caches import open_cache, open_key, side_keys
from core.view.session.chosen import View
from core.view.session.messages import stop_with

#: Where directions wait for the Steering page.
CARRIED = "steering carried"


def load_measured(chosen: View, sides: Sides, layer: int, weighting: str) -> Measured:
    """The contrast's direction at `layer` with its figures."""
    try:
        return _measured(*side_keys(sides), chosen.contrast, layer, chosen.position, weighting, chosen.experiment.name)
    except MicroscopeError as error:
        stop_with(error)


@st.cache_data(max_entries=128, show_spinner=False)
def _measured(target: FileKey, reference: FileKey, contrast: ContrastSpec, layer: int, position: str, weighting: str,
              preset: str) -> Measured:
    sides = Sides(contrast, open_key(*target), open_key(*reference))
    return direction.measure(sides, layer, position, weighting, preset)


def load_across(chosen: View, sides: Sides, weighting: str, what: str) -> dict[str, Direction]:
    """The direction's relatives of one kind: `contrasts`, `layers` or `positions`, itself among them."""
    experiment, layer = chosen.experiment, chosen.layer
    try:
        if what == "layers":
            found = direction_files.across_layers(sides, chosen.position, weighting, experiment.name)
        elif what == "positions":
            found = direction_files.across_ways(sides, layer, experiment.name)
        else:
            found = direction_files.across_contrasts(experiment, layer, chosen.position, weighting, None, open_cache)
        return {name: relative.direction for name, relative in found.items()}
    except MicroscopeError as error:
        stop_with(error)


def load_readers(chosen: View, weighting: str) -> dict[str, Direction]:
    """Variant -> the direction of the same text as that variant reads it; the contrast's own reader first."""
    found = {}
    for variant, sides in direction_files.readers(chosen.experiment, chosen.contrast, None, open_cache).items():
        if chosen.layer in sides.layers:
            found[variant] = direction.contrast_direction(sides, chosen.layer, chosen.position, weighting)
    return found


def load_dictionary(chosen: View, layer: int) -> Dictionary | None:
    """The SAE's matrices at `layer`; None where the experiment has no SAE there. Errors stop the page."""
    spec = chosen.experiment.sae(layer)
    if spec is None:
        return None
    try:
        return _dictionary(spec, str(experiment_folder(chosen.experiment)), chosen.experiment.model.d_model)
    except MicroscopeError as error:
        stop_with(error)


@st.cache_resource(max_entries=4, show_spinner="Reading the SAE's matrices")
def _dictionary(spec: SaeSpec, folder: str, d_model: int) -> Dictionary:
    found = read_dictionary(spec, Path(folder))
    if d_model and found.d_model != d_model:
        raise DirectionError(f"The SAE of layer {spec.layer} has d_model {found.d_model}, the model {d_model}.")
    return found


def load_decompositions(chosen: View, sides: Sides, weighting: str, book: Dictionary) -> dict[str, Decomposition]:
    """Every method's decomposition of the contrast's direction at the chosen layer; refused methods are left out."""
    made = {method: load_decomposition(chosen, sides, weighting, book, method) for method in METHODS}
    return {method: found for method, found in made.items() if found is not None}


def load_decomposition(chosen: View, sides: Sides, weighting: str, book: Dictionary, method: str
                       ) -> Decomposition | None:
    """One method's; None where it is refused."""
    try:
        return _decomposition(*side_keys(sides), chosen.contrast, chosen.layer, chosen.position, weighting,
                              chosen.experiment.name, method, book)
    except DirectionError:
        return None
    except MicroscopeError as error:
        stop_with(error)


@st.cache_data(max_entries=64, show_spinner=False)
def _decomposition(target: FileKey, reference: FileKey, contrast: ContrastSpec, layer: int, position: str,
                   weighting: str, preset: str, method: str, _book: Dictionary) -> Decomposition:
    sides = Sides(contrast, open_key(*target), open_key(*reference))
    made = direction.contrast_direction(sides, layer, position, weighting, preset)
    differences = None
    if method == "exact":
        differences = direction.feature_differences(sides, layer, position, weighting)
    return decompose.decompose(made, _book, method, differences=differences)


def pools(chosen: View, sides: Sides, weighting: str) -> tuple[np.ndarray, np.ndarray]:
    """Residuals [n, d_model] of target and reference at the chosen layer and position."""
    target, reference = direction.pools(sides, chosen.layer, chosen.position, weighting)
    return target.resid, reference.resid


def carry(directions: Sequence[Direction]) -> None:
    """In a callback: put directions where the Steering page finds them, in place of what waited there."""
    st.session_state[CARRIED] = tuple(directions)
    st.session_state["steering just carried"] = True


def just_carried() -> bool:
    """Whether directions were sent just now; true once."""
    return st.session_state.pop("steering just carried", False)


def carried() -> tuple[Direction, ...]:
    """Directions that another page sent to the Steering page; they stay until others are sent."""
    return st.session_state.get(CARRIED, ())


def steering_page() -> str | None:
    """The Steering page's file, for a link."""
    return "pages/steering.py" if (ROOT / "pages" / "steering.py").is_file() else None
