"""What stands around every page: navigation, and the sidebar that leaves a `View`."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import streamlit as st

from core.errors import CacheError, MicroscopeError
from core.experiment import load_experiment, preset_names
from core.specs import POSITIONS, ContrastSpec, Experiment
from core.store.places import side_file
from core.view.guide import POSITION_NAMES, WORDS, markdown_safe
from core.view.session.caches import open_cache
from core.view.session.choices import choose
from core.view.session.chosen import View
from core.view.session.messages import stop_with

DEFAULT_PRESET = "demo"


def sidebar() -> None:
    """The shared controls; leaves a `View` for the page, or says in one sentence why there is none."""
    names = preset_names()
    default = DEFAULT_PRESET if DEFAULT_PRESET in names else next(iter(names), "")
    with st.sidebar:
        if not names:
            stop_with(CacheError("No preset was found in core/presets; restore the checkout."))
        name = choose(st.selectbox, "Experiment", "experiment", names, default, always=True, help=WORDS["experiment"])
        try:
            experiment = load_experiment(name)
        except MicroscopeError as error:
            stop_with(error)
        contrasts = {c.name: c for c in experiment.contrasts}
        contrast = contrasts[choose(
            st.selectbox, "Contrast", "contrast", list(contrasts), next(iter(contrasts)), always=True,
            format_func=lambda n: contrasts[n].title or n, help=WORDS["contrast"],
        )]
        layers = _layers(experiment, contrast)
        middle = experiment.default_layer if experiment.default_layer in layers else layers[len(layers) // 2]
        layer = choose(st.selectbox, "Layer", "layer", layers, middle, always=True, help=WORDS["layer"])
        position = choose(
            st.selectbox, "Position", "position", list(POSITIONS), "response", always=True,
            format_func=POSITION_NAMES.__getitem__, help=WORDS["position"],
        )
        # the box above cuts a long title off
        whole = f"{markdown_safe(contrast.title)}  \n" if contrast.title else ""
        sides = f"Target: {contrast.target.describe()}. Reference: {contrast.reference.describe()}."
        st.caption(f"{whole}{markdown_safe(sides)}")
    st.session_state["view"] = View(experiment, contrast, layer, position)


def navigation() -> Any:
    """The pages, in the sidebar; returns the one to run."""
    return st.navigation([
        st.Page("pages/overview.py", title="Overview", default=True),
        st.Page("pages/rankings.py", title="Rankings"),
        st.Page("pages/concordance.py", title="Concordance"),
        st.Page("pages/direction.py", title="Direction"),
        st.Page("pages/lora.py", title="LoRA"),
        st.Page("pages/steering.py", title="Steering"),
        st.Page("pages/difference.py", title="Difference lens"),
        st.Page("pages/evaluation.py", title="Evaluation"),
        st.Page("pages/feature.py", title="Feature"),
    ])


def view() -> View:
    """What the sidebar chose in this run; a page asks once.

    On a fresh server a link straight to a page makes Streamlit run that page's file alone, because a folder `pages`
    exists; only once `st.navigation` was called does it run the app's script. So call it here and begin again.
    """
    chosen = st.session_state.pop("view", None)
    if chosen is None:
        navigation()
        st.rerun()
    return chosen


def _layers(experiment: Experiment, contrast: ContrastSpec) -> list[int]:
    """Layers to choose from: those cached on both sides, or the preset's where nothing usable is cached."""
    with suppress(CacheError):  # the page says what is wrong with the file; here any layer will do
        found = [open_cache(side_file(experiment, s)).layers for s in (contrast.target, contrast.reference)]
        both = sorted(set(found[0]) & set(found[1]))
        if both:
            return both
    return list(experiment.layers)
