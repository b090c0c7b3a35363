"""The selected feature: kept across pages, in the URL, and chosen by a click on a chart or a row."""

from __future__ import annotations

from typing import Any

import polars as pl
import streamlit as st

from core.view.charts import PICK
from core.view.session.choices import keep
from core.view.session.chosen import View
from core.view.session.messages import note


def selected(chosen: View, d_sae: int, ends: dict[str, int]) -> int | None:
    """The selected feature of the chosen layer, or None. `ends` are words the URL may use for one (top, bottom).

    A feature number means nothing in another layer, so a change of layer forgets it.
    """
    state, raw = st.session_state, st.query_params.get("feature")
    place = (chosen.experiment.name, chosen.layer)
    feature = state.get("kept feature") if state.get("feature at") == place else None
    if raw is not None and raw != state.get("url of feature"):
        found = ends.get(raw, int(raw) if raw.isdecimal() and len(raw) < 10 else None)
        if found is not None and 0 <= found < d_sae:
            feature = found
        else:
            note(f"The link asks for feature “{raw[:60]}”, but layer {chosen.layer} has features 0 to {d_sae - 1}.")
    select(chosen, feature)
    return feature


def remember_feature(chosen: View, feature: int | None) -> None:
    """In a callback: make `feature` the selected one; the next run writes it to the URL."""
    st.session_state["feature at"] = (chosen.experiment.name, chosen.layer)
    st.session_state["kept feature"] = feature


def select(chosen: View, feature: int | None) -> None:
    """Make `feature` the selected one, here and in the URL."""
    remember_feature(chosen, feature)
    keep("feature", feature, None)


def picked(chart: Any, key: str, chosen: View, **more: Any) -> None:
    """Draw a chart whose click selection makes a feature the selected one."""

    def on_select() -> None:
        points = st.session_state[key]["selection"].get(PICK) or []
        if points and points[0].get("feature") is not None:
            remember_feature(chosen, int(points[0]["feature"]))

    st.altair_chart(chart, key=key, on_select=on_select, selection_mode=PICK, width="stretch", **more)


def picked_row(table: pl.DataFrame, key: str, chosen: View, **more: Any) -> None:
    """Draw a table (with a column `feature`) whose selected row makes its feature the selected one."""
    features = table["feature"].to_list()

    def on_select() -> None:
        rows = st.session_state[key]["selection"]["rows"]
        if rows and rows[0] < len(features):
            remember_feature(chosen, int(features[rows[0]]))

    st.dataframe(table, key=key, on_select=on_select, selection_mode="single-row", hide_index=True, **more)
