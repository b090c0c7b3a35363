"""Panes of the Steering page as HTML: the text, what stands beneath it, and a small trace of the projection.

Every text is escaped. Streamlit's `html` drops inline SVG, so the trace is an image; its greys read on light and dark.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from core.view import tokens
from core.view.tokens import RAISED_RGB, SUPPRESSED_RGB

if TYPE_CHECKING:
    from core.model.rows import Answer

_GREY, _OWN = "#7d838e", "#8a74d6"
_STOPPED = {"": "", "end": "ended its turn", "length": "cut at the limit", "cancelled": "stopped", "failed": ""}
#: Size of a trace, in pixels of its own grid; it scales to the pane.
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 270, 92, 40, 18, 8


@dataclass(frozen=True)
class Shown:
    """One pane as it is drawn."""

    title: str
    subtitle: str
    sign: float
    """Above 0 orange, below blue, 0 grey: the pane's accent."""
    pieces: tuple[str, ...] = ()
    same: int = 0
    """Tokens at the beginning that the unsteered pane also said."""
    stopped: str = ""
    reason: str = ""
    facts: tuple[str, ...] = ()
    values: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False)
    """Projection at each token of the answer, residual units."""
    reference: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False)
    """The same of the unsteered pane; empty for that pane itself."""


def common(ids: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for n, (a, b) in enumerate(zip(ids, other, strict=False)):
        if a != b:
            return n
    return min(len(ids), len(other))


def shown(answer: Answer, beside: Answer | None, title: str, subtitle: str, sign: float, facts: Sequence[str] = ()
          ) -> Shown:
    """A pane from a row's answer and its unsteered neighbour's."""
    same = common(answer.ids.tolist(), beside.ids.tolist()) if beside is not None else 0
    return Shown(title, subtitle, sign, answer.pieces, same, answer.stopped, answer.reason, tuple(facts),
                 _response(answer), _response(beside) if beside is not None else np.zeros(0))


def pane(one: Shown, *, low: float, high: float, waiting: str = "", shaded: bool = False, n_tokens: int = 0,
         middle: float = 0.0) -> str:
    """A pane. low, high: the range of every pane's trace; `shaded`: the text by its projection, against `middle`."""
    hue = RAISED_RGB if one.sign > 0 else SUPPRESSED_RGB if one.sign < 0 else "128, 134, 145"
    head = (f'<div style="font-weight:600;line-height:1.3">{html.escape(one.title)}</div>'
            f'<div style="font-size:0.8rem;opacity:0.75;line-height:1.35;overflow-wrap:anywhere">'
            f"{html.escape(one.subtitle)}</div>")
    if shaded and len(one.values):
        n = min(len(one.pieces), len(one.values))
        body = tokens.signed(one.pieces[:n], one.values[:n], scale=max(high - middle, middle - low, 1e-9),
                             centre=middle)
    else:
        body = _text(one)
    wait = f'<span style="opacity:0.7">{html.escape(waiting)}</span>' if waiting and not one.pieces else ""
    facts = [f"{len(one.pieces)} tokens" if one.pieces else "", _STOPPED.get(one.stopped, one.stopped), *one.facts]
    below = " · ".join(html.escape(fact) for fact in facts if fact).replace(" -", " \N{MINUS SIGN}")
    why = (f'<div style="font-size:0.85rem;border-left:3px solid rgb({RAISED_RGB});padding-left:0.5rem;margin-top:'
           f'0.4rem">{html.escape(one.reason)}</div>' if one.reason else "")
    image = trace(one.values, one.reference, low=low, high=high, n_tokens=n_tokens) if len(one.values) else ""
    return (f'<div style="border-top:3px solid rgb({hue});padding-top:0.45rem">{head}'
            f'<div style="min-height:6.5rem;margin-top:0.5rem">{wait}{body}{why}</div>'
            f'<div style="font-size:0.78rem;opacity:0.75;min-height:1.2rem">{below}</div>{image}</div>')


def trace(values: np.ndarray, reference: np.ndarray, *, low: float, high: float, n_tokens: int = 0) -> str:
    """The projection by token as an image: the pane's line, the unsteered one in grey, what lies between shaded."""
    n = max(n_tokens, len(values), 2)
    span = max(high - low, 1e-9)

    def at(i: int, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - 6) * i / (n - 1)
        return x, TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / span)

    def line(given: np.ndarray, colour: str, more: str = "") -> str:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(i, v) for i, v in enumerate(given) if math.isfinite(v)))
        return f'<polyline points="{points}" fill="none" stroke="{colour}" {more}/>'

    m = min(len(values), len(reference))
    fills = []
    for i in range(m - 1):
        quad = [at(i, values[i]), at(i + 1, values[i + 1]), at(i + 1, reference[i + 1]), at(i, reference[i])]
        if all(math.isfinite(y) for _, y in quad):
            above = values[i] + values[i + 1] > reference[i] + reference[i + 1]
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in quad)
            fills.append(f'<polygon points="{points}" fill="rgb({RAISED_RGB if above else SUPPRESSED_RGB})"/>')
    zero = ""
    if low < 0 < high:
        (x0, y), (x1, _) = at(0, 0.0), at(n - 1, 0.0)
        zero = f'<path d="M{x0} {y:.1f}H{x1}" stroke="{_GREY}" stroke-width="0.6" opacity="0.6"/>'
    text = f'font-family="sans-serif" font-size="11" fill="{_GREY}"'
    own = line(values, _OWN if m else _GREY, 'stroke-width="1.6"')
    other = line(reference, _GREY, 'stroke-width="1"') if m else ""
    drawn = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">'
        f'{zero}<g opacity="0.3">{"".join(fills)}</g>'
        f"{other}{own}"
        f'<text x="{LEFT - 4}" y="{TOP + 8}" text-anchor="end" {text}>{high:.3g}</text>'
        f'<text x="{LEFT - 4}" y="{HEIGHT - BOTTOM}" text-anchor="end" {text}>{low:.3g}</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 4}" {text}>token 1</text>'
        f'<text x="{(LEFT + WIDTH) / 2 + 8}" y="{HEIGHT - 4}" text-anchor="middle" {text}>projection, raw</text>'
        f'<text x="{WIDTH - 6}" y="{HEIGHT - 4}" text-anchor="end" {text}>{n}</text></svg>'
    )
    coded = base64.b64encode(drawn.encode()).decode()
    mean = float(np.mean(values)) if len(values) else 0.0
    alt = f"Projection on the direction by token, residual units, {low:.3g} to {high:.3g}; mean {mean:.3g}"
    return (f'<img alt="{alt}" title="{alt}" src="data:image/svg+xml;base64,{coded}" '
            'style="width:100%;max-width:26rem;margin-top:0.2rem">')


def value_range(panes: Sequence[Shown]) -> tuple[float, float]:
    """The range that all traces share: every finite value, 0 among them."""
    values = np.concatenate([np.zeros(1), *(p.values for p in panes)])
    values = values[np.isfinite(values)]
    return float(values.min()), float(values.max())


def coherent_strip(low: float, high: float, ends: tuple[float, float], inside: bool) -> str:
    """A strip under a strength slider: where the measured coherent range lies between the slider's ends."""
    start, stop = (100 * (min(max(v, ends[0]), ends[1]) - ends[0]) / (ends[1] - ends[0]) for v in (low, high))
    span = f"{low:+.2g} to {high:+.2g}"
    words = f"coherent from {span}" if inside else f"beyond what stays coherent ({span})"
    hue = "120, 96, 196" if inside else RAISED_RGB
    return (
        '<div style="position:relative;height:0.35rem;border-radius:0.2rem;background:rgba(128,128,128,0.18);'
        'margin:-0.6rem 0.4rem 0.15rem 0.4rem"><div style="position:absolute;top:0;bottom:0;border-radius:0.2rem;'
        f'left:{start:.1f}%;width:{max(stop - start, 0):.1f}%;background:rgba({hue},0.65)"></div></div>'
        f'<div style="font-size:0.78rem;opacity:0.8">{html.escape(words)}</div>'
    )


def _text(one: Shown) -> str:
    same = html.escape("".join(one.pieces[: one.same]))
    own = html.escape("".join(one.pieces[one.same :]))
    faint = f'<span style="opacity:0.6" title="as the unsteered pane">{same}</span>' if same else ""
    return ('<div style="font-size:0.97rem;line-height:1.6;white-space:pre-wrap;overflow-wrap:anywhere">'
            f"{faint}{own}</div>")


def _response(answer: Answer) -> np.ndarray:
    """The first projection that was read, at the answer's tokens: float32 [up to n_tokens]."""
    found = next((t for t in answer.traces if t.kind == "projection"), None)
    return found.response if found is not None else np.zeros(0)
