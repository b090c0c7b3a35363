"""The rating tab: one answer at a time, blind, by mouse or keys; every rating is on disk before the next answer."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import streamlit as st

from core.errors import MicroscopeError, NotEnoughData
from core.evaluation.agreement import agree
from core.evaluation.ratings import Rating, scores
from core.evaluation.reading_sheet import (
    ALIGNED_BANDS,
    COHERENT_BANDS,
    READERS,
    keep_rating,
    ratings_csv,
    ratings_file,
    read_ratings,
    reading_order,
    rubric,
    take_back,
    to_read,
)
from core.store.places import experiment_folder
from core.view.evaluation_parts import agreement_sentence
from core.view.guide import WORDS, markdown_safe
from core.view.session.choices import choose
from core.view.session.chosen import View
from core.view.session.messages import stop_with
from core.view.session.responses import load_judged, load_sheets

#: Keys of the bands, from the best down.
ALIGNED_KEYS, COHERENT_KEYS = "123456", "ASDFG"


def rating_tab(chosen: View) -> None:
    """Choose the answers and the reader, rate what is left, see how two readers agree."""
    found = load_sheets(chosen)
    if not found:
        st.markdown("There are no answers to rate yet. Ask a variant some questions first:")
        st.code(f"python -m core evaluate {chosen.experiment.name} --judge human", language="bash")
        return
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        name = choose(st.selectbox, "Answers", "sheet", list(found), next(iter(found)),
                      format_func=lambda n: found[n].title, help=WORDS["rating_sheet"])
        reader = choose(st.segmented_control, "Reader", "reader", list(READERS), 1,
                        format_func={1: "First", 2: "Second"}.__getitem__, help=WORDS["reader"])
    table = load_judged(found[name]).filter(pl.col("response").str.strip_chars() != "")
    path = ratings_file(experiment_folder(chosen.experiment), name)
    try:
        kept = read_ratings(path)
    except MicroscopeError as error:
        stop_with(error)
    order = reading_order(table["id"], reader)
    left = to_read(order, kept, reader)
    done = len(order) - len(left)
    st.progress(done / len(order), text=f"{done:,} of {len(order):,} rated by this reader")
    if left:
        _rate(table.row(by_predicate=pl.col("id") == left[0], named=True), path, reader, done)
    else:
        st.success("Everything here is rated by this reader.", icon=":material/done_all:")
    with st.expander("What the scores mean"):
        st.markdown(rubric())
    _both(kept)
    st.download_button("Download ratings", lambda: ratings_csv(kept).encode(), f"{name}_ratings.csv", "text/csv",
                       icon=":material/download:", on_click="ignore", disabled=not kept)
    st.caption("They are kept beside the cache, and shown under Rates once there are some.")


def _rate(row: dict, path: Path, reader: int, done: int) -> None:
    """One answer, its two scores, and what keeps them. Which variant said it is nowhere on the page."""
    state = st.session_state
    aligned, coherent = "rate aligned", "rate coherent"
    if state.get("rate at") != (row["id"], reader):
        state["rate at"], state[aligned], state[coherent] = (row["id"], reader), None, None

    def keep() -> None:
        try:
            keep_rating(path, Rating(row["id"], reader, float(state[aligned]), float(state[coherent])))
        except (MicroscopeError, OSError) as error:
            state["rate error"] = str(error)

    def back() -> None:
        try:
            take_back(path, reader)
        except (MicroscopeError, OSError) as error:
            state["rate error"] = str(error)

    with st.container(border=True):
        if row["system"]:
            st.caption("System prompt")
            st.text(row["system"])
        st.caption("Question")
        st.text(row["question"])
        st.caption("Answer")
        st.text(row["response"])
    _bands("Alignment", ALIGNED_BANDS, ALIGNED_KEYS, aligned, WORDS["alignment"])
    _bands("Coherence", COHERENT_BANDS, COHERENT_KEYS, coherent, WORDS["coherence"])
    ready = state[aligned] is not None and state[coherent] is not None
    with st.container(horizontal=True):
        st.button("Keep and next", type="primary", icon=":material/check:", shortcut="Enter", disabled=not ready,
                  on_click=keep, key="rate keep")
        st.button("Take back the last", icon=":material/undo:", shortcut="Backspace", disabled=done == 0,
                  on_click=back, key="rate back")
    if wrong := state.pop("rate error", ""):
        st.error(markdown_safe(wrong), icon=":material/error:")


def _bands(title: str, bands: dict[int, str], keys: str, name: str, help_: str) -> None:
    """One score: a button and a key for each band of the rubric, and the exact number."""
    state = st.session_state

    def set_to(score: int) -> None:
        state[name] = float(score)

    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        st.number_input(title, 0.0, 100.0, step=1.0, format="%.0f", key=name, help=help_, width=140, value=None,
                        placeholder="0 to 100")
        for (score, words), key in zip(bands.items(), keys, strict=True):
            st.button(f"{score} {words}", key=f"{name} {score}", shortcut=key, on_click=set_to, args=(score,),
                      type="primary" if state.get(name) == score else "secondary")


def _both(kept: list[Rating]) -> None:
    """How the two readers agree, once both rated enough of the same answers."""
    if not {1, 2} <= {r.number for r in kept}:
        return
    try:
        found = agree(scores(kept, 1), scores(kept, 2))
    except NotEnoughData as error:
        st.caption(markdown_safe(str(error)))
        return
    st.markdown(agreement_sentence(found, "the first reader", "the second reader"), help=WORDS["kappa"])
