"""What features go by: the user's labels, what they fire on, their logit-lens tokens."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import polars as pl
import streamlit as st

from core.analysis.compare import Sides
from core.errors import CacheError
from core.store.places import experiment_folder, side_file
from core.view.guide import markdown_safe
from core.view.inventory import FileKey, file_key
from core.view.labels import Labels, read_labels, with_names
from core.view.session.caches import open_cache, open_key
from core.view.session.chosen import View


def load_labels(chosen: View) -> Labels:
    """The user's labels of this experiment; a damaged file is reported on the page."""
    labels = read_labels(label_folder(chosen))
    if labels.problem:
        st.warning(markdown_safe(labels.problem), icon=":material/label_off:")
    return labels


def label_folder(chosen: View) -> Path:
    return experiment_folder(chosen.experiment)


def named(table: pl.DataFrame, chosen: View, sides: Sides, labels: Labels) -> pl.DataFrame:
    """A feature table with labels, what each feature fires on, logit-lens tokens and the name it goes by."""
    info = sides.target.info(chosen.layer)
    return with_names(table, load_feature_info(chosen, sides), labels.of_sae(info.sae_release, info.sae_id))


def load_feature_info(chosen: View, sides: Sides) -> pl.DataFrame:
    """Logit lens and activity of every feature of the layer, from the target's cache."""
    return _feature_info(file_key(sides.target.path), chosen.layer)


@st.cache_data(max_entries=32, show_spinner=False)
def _feature_info(key: FileKey, layer: int) -> pl.DataFrame:
    return open_key(*key).feature_info(layer)


def feature_names(chosen: View, layer: int, release: str, sae_id: str) -> dict[int, str]:
    """What the features of an SAE go by; empty where the chosen contrast's cache does not hold that SAE's layer."""
    with suppress(CacheError):
        cache = open_cache(side_file(chosen.experiment, chosen.contrast.target))
        if layer in cache.layers and (cache.info(layer).sae_release, cache.info(layer).sae_id) == (release, sae_id):
            info = _feature_info(file_key(cache.path), layer)
            own = read_labels(label_folder(chosen)).of_sae(release, sae_id)
            return dict(with_names(info.select("feature"), info, own).select("feature", "name").iter_rows())
    return {}
