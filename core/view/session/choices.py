"""Widgets whose choice lasts: across pages, and in the URL, so that a link restores the view.

Every choice has one name, which is its URL parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import streamlit as st

from core.view.session.messages import note

T = TypeVar("T")


def recall(name: str, default: T, parse: Callable[[str], T], valid: Callable[[T], bool]) -> None:
    """Before a widget with key `name`: give it the URL's value when the URL changed, else keep what it had.

    An unusable URL value leaves a note for the reader and falls back to what was kept, else to `default`.
    """
    state, raw = st.session_state, st.query_params.get(name)
    kept = state.get(f"kept {name}", default)
    kept = kept if valid(kept) else default
    changed = raw != state.get(f"url of {name}")
    if raw is not None and changed:
        try:
            value = parse(raw)
        except ValueError:
            value = None
        if value is None or not valid(value):
            shown = ", ".join(map(str, kept)) if isinstance(kept, list) else kept
            note(f"The link asks for {name} “{raw[:60]}”, which is not there; showing “{shown}” instead.")
        else:
            kept = value
    if changed or name not in state or not valid(state[name]):
        state[name] = kept


def keep(name: str, value: T, default: T | None, as_text: Callable[[T], str] = str) -> None:
    """After the widget: remember its value across pages and write it to the URL, unless it is the default."""
    written = None if value == default else as_text(value)
    st.session_state[f"kept {name}"] = value
    st.session_state[f"url of {name}"] = written
    if written is None:
        st.query_params.pop(name, None)
    elif st.query_params.get(name) != written:
        st.query_params[name] = written


def choose(widget: Callable[..., Any], label: str, name: str, options: Sequence[T], default: T, *,
           always: bool = False, **more: Any) -> T:
    """One of `options` through a selectbox or segmented control, in the URL as text (`always`: the default too)."""
    recall(name, default, {str(o): o for o in options}.get, lambda value: value in options)
    chosen = widget(label, options, key=name, **more)
    value = default if chosen is None else chosen
    keep(name, value, None if always else default)
    return value


def toggle(label: str, name: str, **more: Any) -> bool:
    """A switch that is off by default, in the URL as `yes` when on."""
    recall(name, False, {"yes": True, "no": False}.get, lambda value: isinstance(value, bool))
    value = st.toggle(label, key=name, **more)
    keep(name, value, False, lambda on: "yes")
    return value


def text(label: str, name: str, default: str = "", widget: Callable[..., Any] = st.text_input, **more: Any) -> str:
    """A line of text (or what `widget` takes), in the URL as it is."""
    recall(name, default, str, lambda value: isinstance(value, str))
    value = widget(label, key=name, **more)
    keep(name, value, default)
    return value


def slide(label: str, name: str, low: int, high: int, default: int, **more: Any) -> int:
    """A whole number on a slider, in the URL unless it is the default."""
    recall(name, default, int, lambda value: isinstance(value, int) and low <= value <= high)
    value = st.slider(label, low, high, key=name, **more)
    keep(name, value, default)
    return value


def several(label: str, name: str, options: Sequence[str], default: list[str], limit: int, **more: Any) -> list[str]:
    """At most `limit` of `options` through a multiselect, in the URL separated by commas."""
    recall(name, default, lambda raw: [part for part in raw.split(",") if part],
           lambda value: len(value) == len(set(value)) <= limit and set(value) <= set(options))
    value = st.multiselect(label, options, key=name, max_selections=limit, **more)
    keep(name, value, default, ",".join)
    return value


def number(label: str, name: str, low: float, high: float, default: float, step: float, **more: Any
           ) -> float:
    """A slider from `low` to `high`, in the URL as a number unless it is the default."""
    recall(name, default, float, lambda value: isinstance(value, float | int) and low <= value <= high)
    st.session_state[name] = type(step)(st.session_state[name])
    value = st.slider(label, low, high, key=name, step=step, **more)
    keep(name, value, default, lambda value: f"{value:g}")
    return value


def within(label: str, name: str, options: Sequence[T], default: list[T], widget: Callable[..., Any] = st.pills,
           **more: Any) -> list[T]:
    """Any number of few `options`, through pills side by side; in the URL separated by commas, `none` for none."""
    known = {str(o): o for o in options}

    def parse(raw: str) -> list[T]:
        return [] if raw == "none" else [known[part] for part in raw.split(",")]

    def lenient(raw: str) -> list[T] | None:
        try:
            return parse(raw)
        except KeyError:
            return None

    recall(name, default, lenient, lambda value: isinstance(value, list) and set(value) <= set(options))
    value = widget(label, options, key=name, selection_mode="multi", **more)
    keep(name, value, default, lambda chosen: ",".join(map(str, chosen)) or "none")
    return value


def put(name: str, value: Any) -> None:
    """In a callback: set the choice called `name`."""
    st.session_state[name] = st.session_state[f"kept {name}"] = value


def forget(*names: str) -> None:
    """In a callback: let the choices go back to their defaults."""
    for name in names:
        st.session_state.pop(name, None)
        st.session_state.pop(f"kept {name}", None)
        st.session_state.pop(f"url of {name}", None)
        st.query_params.pop(name, None)
