"""The sliders of the Steering page: one row a channel, with its mute, its solo, its reset and its link."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import streamlit as st

from core.view import steering_panes
from core.view.guide import markdown_safe
from core.view.session.choices import forget, number, put, within
from core.view.session.chosen import View
from core.view.steering_desk import MUTE, SOLO, Channel, pushes, spread
from core.view.steering_parts import raw_words

#: Where strength sliders end, in mean residual norms.
MOST = 0.5


@dataclass
class Desk:
    """What the sliders drawn so far stand at."""

    view: View
    channels: list[Channel] = field(default_factory=list)
    strengths: dict[str, float] = field(default_factory=dict)
    marks: dict[str, list[str]] = field(default_factory=dict)

    def channel(self, one: Channel, default: float = 0.0, step: float = 0.005, *, help: str | None = None,
                coherent: tuple[float, float] | None = None) -> None:
        """One slider. `coherent`: the measured range, drawn below it."""
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            st.markdown(f"**{markdown_safe(one.name)}**", width="stretch", help=help)
            if one.feature is not None:
                st.page_link("pages/feature.py", label="Open", icon=":material/arrow_forward:",
                             query_params=self.view.link(feature=one.feature))
            marks = within(f"Mute or solo {one.name}", f"{one.key}-is", [MUTE, SOLO], [], label_visibility="collapsed")
            now = st.session_state.get(one.key, st.session_state.get(f"kept {one.key}", default))
            st.button("", key=f"reset {one.key}", type="tertiary", icon=":material/undo:",
                      disabled=now == default and not marks, help="Back to where it was",
                      on_click=lambda: forget(one.key, f"{one.key}-is"))
        value = number(f"Strength of {one.name}", one.key, -MOST, MOST, default, step, format="%+.3f",
                       label_visibility="collapsed")
        if coherent is not None:
            st.html(steering_panes.coherent_strip(*coherent, (-MOST, MOST), coherent[0] <= value <= coherent[1]))
        st.caption(raw_words(one.direction, value))
        self.channels.append(one)
        self.strengths[one.key], self.marks[one.key] = value, marks

    def pushes(self):
        """What the desk adds: core.steering_plan.Push, channels in order."""
        return pushes(self.channels, self.strengths, self.marks)

    def reset(self) -> None:
        """In a callback: every slider back to its default, nothing muted or alone."""
        forget(*self.strengths, *(f"{key}-is" for key in self.strengths))

    def spread(self, whole: Channel, parts: Sequence[Channel], otherwise: float) -> Callable[[], None]:
        """A callback: the whole's strength goes to the parts that sum to it (or `otherwise` where it is 0)."""

        def do() -> None:
            strength = self.strengths[whole.key] or otherwise
            for key, value in spread(whole.direction, parts, strength).items():
                put(key, round(value, 4))
            put(whole.key, 0.0)

        return do
