"""What lies in an experiment's folder: which cache files there are, SAE health, difference lenses."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import streamlit as st

from core.analysis import sweep as analysis
from core.errors import CacheError, MicroscopeError
from core.store import difference_file
from core.store.measures import read_margins
from core.store.places import experiment_folder, side_file
from core.store.sweep_file import Sweep, read_sweep, sweep_file
from core.view import difference_parts, inventory
from core.view.guide import markdown_safe
from core.view.inventory import CachedFile, file_key
from core.view.session.caches import open_cache
from core.view.session.chosen import View
from core.view.session.messages import stop_with
from core.view.session.names import label_folder


def load_inventory(chosen: View) -> list[CachedFile]:
    """Every cache file the experiment needs, and how it stands."""
    return inventory.cached_files(chosen.experiment, open_cache)


def load_health(chosen: View) -> pl.DataFrame | None:
    """Health of the target's cache, a row a layer; None when it cannot be opened."""
    try:
        return inventory.health(open_cache(side_file(chosen.experiment, chosen.contrast.target)))
    except CacheError:
        return None


def load_margins(chosen: View) -> pl.DataFrame | None:
    """Margins of the experiment's fine-tunes minus the base's; None where none was measured."""
    try:
        return read_margins(experiment_folder(chosen.experiment) / "adapters")
    except CacheError as error:
        st.error(markdown_safe(str(error)), icon=":material/error:")
        return None


def difference_files(chosen: View) -> dict[str, Path]:
    """Variant -> the file of its difference lens, of the chosen experiment, in the preset's order."""
    return difference_parts.ordered(difference_file.difference_files(label_folder(chosen)), chosen.experiment)


def load_difference(path: Path) -> difference_file.DifferenceLens:
    """A variant's difference lens. Errors stop the page with one sentence."""
    try:
        return _difference(*file_key(path))
    except MicroscopeError as error:
        stop_with(error)


@st.cache_resource(max_entries=8, show_spinner=False)
def _difference(path: str, mtime_ns: int, size: int) -> difference_file.DifferenceLens:
    return difference_file.read_difference(Path(path))


def load_sweep(chosen: View) -> Sweep | None:
    """The contrast's sweep; None where none was made. A damaged one is reported on the page."""
    path = sweep_file(experiment_folder(chosen.experiment), chosen.contrast.name)
    if not path.is_file():
        return None
    try:
        return _sweep(*file_key(path))
    except CacheError as error:
        st.error(markdown_safe(str(error)), icon=":material/error:")
        return None


@st.cache_resource(max_entries=8, show_spinner=False)
def _sweep(path: str, mtime_ns: int, size: int) -> Sweep:
    return read_sweep(Path(path))


def coherent_range(sweep: Sweep | None, layer: int) -> tuple[float, float] | None:
    """The strengths at which text stays coherent, as the sweep measured; None where it did not."""
    return analysis.coherent_range(sweep, layer) if sweep is not None and layer in sweep.layers else None
