"""Contexts to HTML: text with each token shaded by activation, token chips and a legend. Every text is escaped.

Knows nothing of Streamlit. Colours are translucent over whatever the page's background is and the text keeps the
page's own colour, so the same markup reads on light and dark.
"""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Iterable, Sequence

#: The pages' two hues as red, green, blue: what is promoted or raised, what is suppressed.
RAISED_RGB, SUPPRESSED_RGB = "217, 119, 43", "63, 130, 196"

_HUE = "224, 122, 24"  # amber, as red, green, blue
_STRONGEST = 0.72  # opacity of the shade at the top of the scale; the text above it stays readable
_FAINT = "color:inherit;opacity:0.62"
_VISIBLE = {"\n": "\u21b5", "\r": "\u240d", "\t": "\u21e5", "\u00a0": "\u237d"}


def visible(text: str) -> str:
    """A token as a person can read it: line ends, tabs and lone spaces as signs, invisible characters as codes.

    Not escaped: the callers do that.
    """
    if text == "":
        return "\u2205"
    if text.strip(" ") == "":
        return "\u00b7" * len(text)
    return "".join(_VISIBLE.get(c) or (f"\\u{ord(c):04x}" if _invisible(c) else c) for c in text)


def _invisible(character: str) -> bool:
    """Control and format characters (among them the ones that turn the direction of text), and line separators."""
    return unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Cs", "Co")


def shade(
    tokens: Sequence[str],
    acts: Sequence[float],
    *,
    scale: float,
    peak: int | None = None,
    in_response: Sequence[bool] | None = None,
) -> str:
    """One window of text as HTML: a shade from nothing (0) to full (`scale`), the value as tooltip, the peak outlined.

    Tokens outside the response are faint. `tokens` and `acts` [n] are of one length.
    Raises ValueError when lengths differ.
    """
    if len(tokens) != len(acts) or (in_response is not None and len(in_response) != len(tokens)):
        raise ValueError(f"{len(tokens)} tokens, {len(acts)} activations: give one activation (and flag) a token.")
    spans = []
    for i, (token, act) in enumerate(zip(tokens, acts, strict=True)):
        act = float(act)
        share = min(max(act / scale, 0.0), 1.0) if scale > 0 and math.isfinite(act) else 0.0
        style = []
        if share > 0:
            style.append(f"background:rgba({_HUE},{share * _STRONGEST:.3f})")
        if i == peak:
            style.append("box-shadow:inset 0 -2px 0 currentColor;font-weight:600")
        outside = in_response is not None and not in_response[i]
        if outside:
            style.append(_FAINT)
        where = "prompt, " if outside else ""
        body = html.escape(visible(token), quote=True)
        spans.append(f'<span title="{where}activation {act:.3g}" style="{";".join(style)}">{body}</span>')
    return "".join(spans)


def signed(
    tokens: Sequence[str],
    values: Sequence[float],
    *,
    scale: float,
    centre: float = 0.0,
    faint: Sequence[bool] | None = None,
    what: str = "projection",
) -> str:
    """A text as HTML: orange above `centre`, blue below it, full at a distance of `scale`; the value as tooltip.

    `tokens` and `values` [n] are of one length; `faint` tokens are dimmed. Raises ValueError when lengths differ.
    """
    if len(tokens) != len(values) or (faint is not None and len(faint) != len(tokens)):
        raise ValueError(f"{len(tokens)} tokens, {len(values)} values: give one value (and flag) a token.")
    spans = []
    for i, (token, value) in enumerate(zip(tokens, map(float, values), strict=True)):
        share = (value - centre) / scale if scale > 0 and math.isfinite(value) else 0.0
        hue, strength = (RAISED_RGB, share) if share > 0 else (SUPPRESSED_RGB, -share)
        style = [f"background:rgba({hue},{min(strength, 1.0) * _STRONGEST:.3f})"] if strength > 0.02 else []
        if faint is not None and faint[i]:
            style.append(_FAINT)
        body = html.escape(visible(token), quote=True)
        end = "<br>" if token.endswith("\n") else ""
        spans.append(f'<span title="{html.escape(what)} {value:+.3g}" style="{";".join(style)}">{body}</span>{end}')
    return ('<div style="font-size:0.95rem;line-height:1.85;white-space:pre-wrap;overflow-wrap:anywhere">'
            f'{"".join(spans)}</div>')


def signed_legend(low: str, high: str, *, scale: float, centre: float = 0.0) -> str:
    """The scale of `signed`: what blue and orange stand for, and the values at both ends."""
    steps = ",".join(f"rgba({h},{a:.2f})" for h, a in (
        (SUPPRESSED_RGB, _STRONGEST), (SUPPRESSED_RGB, 0.0), (RAISED_RGB, 0.0), (RAISED_RGB, _STRONGEST)))
    bar = ('<span style="display:inline-block;width:8rem;height:0.8rem;border-radius:0.2rem;vertical-align:middle;'
           f'border:1px solid rgba(128,128,128,0.4);background:linear-gradient(90deg,{steps})"></span>')
    return ('<div style="font-size:0.82rem;display:flex;gap:0.4rem 1.1rem;flex-wrap:wrap;align-items:center">'
            f"<span>{html.escape(low)} {centre - scale:.3g} {bar} {centre + scale:.3g} {html.escape(high)}</span>"
            f'<span><span style="{_FAINT}">faint</span>: prompt or template</span></div>')


def contexts(windows: Iterable[object], *, scale: float, sources: Sequence[str] | None = None) -> str:
    """Strongest windows of one side as an HTML list. A window is `core.store.reader.Context`.

    `scale` is the activation shown at full shade: the same on both sides, so that shades can be compared.
    `sources[i]`, if given, says where window i is from.
    """
    items = []
    for i, window in enumerate(windows):
        text = shade(window.tokens, window.acts, scale=scale, peak=window.peak, in_response=window.in_response)
        source = f' <span style="opacity:0.7">{html.escape(sources[i])}</span>' if sources else ""
        items.append(
            '<li style="list-style:none;margin:0 0 0.55rem 0;padding:0.5rem 0.7rem;border-radius:0.4rem;'
            'border:1px solid rgba(128,128,128,0.28)">'
            '<div style="font-size:0.78rem;margin-bottom:0.15rem;opacity:0.85">'
            f'peak <b>{float(window.value):.3g}</b>{source}</div>'
            '<div style="font-size:0.92rem;line-height:1.75;white-space:pre-wrap;overflow-wrap:anywhere">'
            f"{text}</div></li>"
        )
    return f'<ul style="margin:0;padding:0">{"".join(items)}</ul>'


def legend(scale: float) -> str:
    """The shade's scale, from 0 to `scale`, and what the other signs mean."""
    steps = ",".join(f"rgba({_HUE},{s * _STRONGEST:.3f})" for s in (0.0, 0.5, 1.0))
    bar = (
        '<span style="display:inline-block;width:8rem;height:0.8rem;border-radius:0.2rem;vertical-align:middle;'
        f'border:1px solid rgba(128,128,128,0.4);background:linear-gradient(90deg,{steps})"></span>'
    )
    return (
        '<div style="font-size:0.82rem;display:flex;gap:0.4rem 1.1rem;flex-wrap:wrap;align-items:center">'
        f"<span>activation 0 {bar} {scale:.3g}</span>"
        '<span><span style="box-shadow:inset 0 -2px 0 currentColor;font-weight:600">underlined</span>: the peak</span>'
        f'<span><span style="{_FAINT}">faint</span>: prompt or template, not the response</span>'
        "<span>\u21b5 line end, \u00b7 space</span></div>"
    )


def chips(tokens: Iterable[str], *, colour: str = "128, 128, 128") -> str:
    """Tokens as a row of small boxes. `colour` is red, green, blue in 0 to 255."""
    boxes = "".join(
        f'<code style="display:inline-block;margin:0 0.3rem 0.35rem 0;padding:0.1rem 0.45rem;border-radius:0.35rem;'
        f"color:inherit;background:rgba({colour},0.2);border:1px solid rgba({colour},0.45);font-size:0.85rem;"
        f'white-space:pre">{html.escape(visible(_lead(t)), quote=True)}</code>'
        for t in tokens
    )
    return f"<div>{boxes}</div>" if boxes else '<div style="opacity:0.7">none recorded</div>'


def _lead(token: str) -> str:
    """Drop one leading space before a word: most tokens have it and it says little here."""
    return token[1:] if len(token) > 1 and token[0] == " " and token[1] != " " else token
