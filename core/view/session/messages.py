"""What is said in place of content: errors as one sentence, empty states, notes about the link."""

from __future__ import annotations

from typing import NoReturn

import streamlit as st

from core.analysis import health
from core.analysis.compare import Sides
from core.errors import MicroscopeError
from core.view.guide import WORDS, markdown_safe


def stop_with(error: MicroscopeError) -> NoReturn:
    """One sentence in place of the page's content."""
    st.error(markdown_safe(str(error)), icon=":material/error:")
    st.stop()


def empty(title: str, body: str, *commands: str) -> NoReturn:
    """An empty state: what is missing, and the commands that make it."""
    with st.container(border=True):
        st.subheader(title, anchor=False)
        st.markdown(body)
        if commands:
            st.code("\n".join(dict.fromkeys(commands)), language="bash")
    st.stop()


def warn_about_sae(sides: Sides, *layers: int, also_no_worse: bool = False) -> None:
    """A warning for each layer whose SAE explains the target of a model contrast worse than its reference.

    With `also_no_worse`, a caption where it does not.
    """
    for layer in layers:
        found = health.of_sides(sides, layer)
        if found is not None and found.worse:
            st.warning(markdown_safe(found.sentence), icon=":material/troubleshoot:")
        elif found is not None and also_no_worse:
            st.caption(markdown_safe(found.sentence), help=WORDS["fvu"])


def note_slot() -> None:
    """Reserve the place, above the page's title, where notes about the link appear."""
    st.session_state["note slot"] = st.container()


def note(sentence: str) -> None:
    """Say what the link asked for that could not be done."""
    with st.session_state["note slot"]:
        st.info(markdown_safe(sentence), icon=":material/link_off:")
