"""Judged responses for the Evaluation page: loaded once, uploaded, and opened on other pages.

Cached by the files they were read from. Errors stop the page with one sentence, but for an upload, which is refused.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import streamlit as st

from core.analysis import compare
from core.errors import BadConversation, CacheError, MicroscopeError
from core.evaluation.responses import load_responses
from core.store.places import side_file
from core.view.charts import PICK
from core.view.evaluation_sources import Source, load_source, sheets, sources
from core.view.session.caches import is_cached, open_cache
from core.view.session.chosen import View
from core.view.session.messages import stop_with

#: What an upload may hold.
UPLOAD_MB, UPLOAD_ROWS = 20, 50_000
#: Uploaded tables of this browser session: name -> table.
UPLOADS = "uploaded responses"
#: Responses whose pages were linked from here: id -> `OpenedResponse`.
OPENED = "opened responses"
CHOSEN = "chosen response"


@dataclass(frozen=True)
class OpenedResponse:
    """A response that a link asks another page to show."""

    id: str
    variant: str
    question: str
    response: str


def load_sources(chosen: View) -> dict[str, Source]:
    """Every judged set of responses of the experiment."""
    try:
        return sources(chosen.experiment)
    except MicroscopeError as error:
        stop_with(error)


def load_sheets(chosen: View) -> dict[str, Source]:
    """Every set of answers that can be rated by reading."""
    try:
        return sheets(chosen.experiment)
    except MicroscopeError as error:
        stop_with(error)


def load_judged(source: Source) -> pl.DataFrame:
    """The table of a source."""
    try:
        return _judged(source.key, source)
    except MicroscopeError as error:
        stop_with(error)


@st.cache_data(max_entries=16, show_spinner=False)
def _judged(key: tuple[Any, ...], _source: Source) -> pl.DataFrame:
    return load_source(_source)


def uploads() -> dict[str, pl.DataFrame]:
    """What was uploaded in this browser session."""
    return st.session_state.setdefault(UPLOADS, {})


def take_upload(name: str, content: bytes) -> tuple[str, str]:
    """Check an uploaded file and keep its table for this session: (name it goes by, "") or ("", what is wrong)."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(name).name).strip("-.")[-80:] or "upload.csv"
    if len(content) > UPLOAD_MB * 1_000_000:
        return "", f"{safe}: is larger than {UPLOAD_MB} MB; split the file."
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / safe
        path.write_bytes(content)
        try:
            table = load_responses([path], limit=UPLOAD_ROWS).table
        except BadConversation as error:
            return "", str(error).replace(f"{folder}/", "")
    uploads()[safe] = table
    return safe, ""


def choose_response(ids: Sequence[str]) -> str | None:
    """The response chosen by a click on a chart or a row, or by the link; None where none of `ids` is."""
    state, raw = st.session_state, st.query_params.get("response")
    if raw is not None and raw != state.get("url of response"):
        state[CHOSEN] = raw
    chosen = state.get(CHOSEN) if state.get(CHOSEN) in set(ids) else None
    state["url of response"] = chosen
    if chosen is None:
        st.query_params.pop("response", None)
    elif st.query_params.get("response") != chosen:
        st.query_params["response"] = chosen
    return chosen


def remember_response(chosen: str) -> None:
    """In a callback: make it the chosen response; the next run writes it to the URL."""
    st.session_state[CHOSEN] = chosen
    st.query_params["response"] = chosen
    st.session_state["url of response"] = chosen


def picked_response(chart: Any, key: str) -> None:
    """Draw a chart whose click selection chooses a response."""

    def on_select() -> None:
        points = st.session_state[key]["selection"].get(PICK) or []
        if points and points[0].get("id"):
            remember_response(str(points[0]["id"]))

    st.altair_chart(chart, key=key, on_select=on_select, selection_mode=PICK, width="stretch")


def picked_response_row(table: pl.DataFrame, key: str, **more: Any) -> None:
    """Draw a table (with a column `id`) whose selected row chooses a response."""
    ids = table["id"].to_list()

    def on_select() -> None:
        rows = st.session_state[key]["selection"]["rows"]
        if rows and rows[0] < len(ids):
            remember_response(ids[rows[0]])

    st.dataframe(table, key=key, on_select=on_select, selection_mode="single-row", hide_index=True, **more)


def read_by(chosen: View, response: str) -> str | None:
    """A cached contrast that reads the response, the chosen one first; None where none does."""
    rest = [c for c in chosen.experiment.contrasts if c.name != chosen.contrast.name]
    for contrast in (chosen.contrast, *rest):
        if not is_cached(chosen.experiment, contrast):
            continue
        for side in (contrast.target, contrast.reference):
            try:
                cache = open_cache(side_file(chosen.experiment, side))
                rows = compare.side_rows(cache, side)
                if response in cache.conversations["id"].gather(rows.tolist()):
                    return contrast.name
            except (CacheError, MicroscopeError):
                continue
    return None


def remember_opened(row: dict[str, Any]) -> None:
    """Keep a response's text for the page that a link opens."""
    opened = OpenedResponse(row["id"], row["variant"], row["question"], row["response"])
    st.session_state.setdefault(OPENED, {})[row["id"]] = opened


def opened_response(chosen: View) -> OpenedResponse | None:
    """The response that the link asks for: one opened in this session, else one that the chosen contrast reads."""
    name = st.query_params.get("response")
    if not name:
        return None
    known = st.session_state.get(OPENED, {})
    if name in known:
        return known[name]
    for side in (chosen.contrast.target, chosen.contrast.reference):
        try:
            cache = open_cache(side_file(chosen.experiment, side))
        except CacheError:
            continue
        ids = cache.conversations["id"].to_list()
        if name in ids:
            turns = dict(cache.messages(ids.index(name)))
            return OpenedResponse(name, side.variant, turns.get("user", ""), turns.get("response", ""))
    return None
