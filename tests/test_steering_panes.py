"""Panes as HTML: escaped text, what they share with the unsteered one, a trace whose image is valid."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as tree

import numpy as np

from core.view import steering_panes as panes
from core.view.steering_panes import Shown

SVG = "{http://www.w3.org/2000/svg}"


def drawn(html: str) -> tree.Element:
    return tree.fromstring(base64.b64decode(re.search(r"base64,([^\"]+)", html)[1]))


def one(**more) -> Shown:
    given = {"pieces": ("A", " lump", " <script>"), "values": np.array([1.0, 4.0, 2.0]),
             "reference": np.array([1.0, 2.0, 3.0]), "same": 1, "stopped": "length"}
    return Shown("Steered", "base & <b>", 1, **(given | more))


def test_text_is_escaped_and_the_common_beginning_is_faint() -> None:
    html = panes.pane(one(), low=0, high=4)
    assert "<script>" not in html and "&lt;script&gt;" in html and "base &amp; &lt;b&gt;" in html
    assert re.search(r'opacity:0.6"[^>]*>A</span> lump', html)
    assert "3 tokens · cut at the limit" in html
    assert "It &lt;broke&gt;" in panes.pane(one(reason="It <broke>"), low=0, high=4)


def test_shading_is_by_projection_about_the_middle() -> None:
    html = panes.pane(one(), low=0, high=4, shaded=True, middle=2.0)
    assert panes.RAISED_RGB in html and panes.SUPPRESSED_RGB in html and "projection +4" in html


def test_common_beginning() -> None:
    assert panes.common([1, 2, 3], [1, 2, 4]) == 2 and panes.common([1], [1, 2]) == 1 and panes.common([], [1]) == 0


def test_the_trace_is_a_valid_image_with_the_difference_shaded_on_the_right_side() -> None:
    svg = drawn(panes.trace(np.array([1.0, 4.0, 2.0]), np.array([1.0, 2.0, 3.0]), low=0, high=4))
    lines, fills = svg.findall(f"{SVG}polyline"), svg.findall(f".//{SVG}polygon")
    assert len(lines) == 2 and len(fills) == 2
    assert panes.RAISED_RGB in fills[0].get("fill") and panes.RAISED_RGB in fills[1].get("fill")
    below = drawn(panes.trace(np.array([1.0, 0.0]), np.array([1.0, 3.0]), low=0, high=4))
    assert panes.SUPPRESSED_RGB in below.find(f".//{SVG}polygon").get("fill")
    top = [float(pair.split(",")[1]) for pair in lines[1].get("points").split()]
    assert min(top) == top[1] == panes.TOP, "the largest value lies at the top"
    alone = drawn(panes.trace(np.array([1.0, np.nan, 2.0]), np.zeros(0), low=0, high=4))
    assert len(alone.findall(f"{SVG}polyline")) == 1 and not alone.findall(f".//{SVG}polygon")


def test_all_traces_share_a_range() -> None:
    assert panes.value_range([one(), Shown("x", "", 0)]) == (0.0, 4.0)
    assert panes.value_range([one(values=np.array([np.inf, -3.0]))]) == (-3.0, 0.0)


def test_the_strip_shows_the_range_and_says_when_the_slider_left_it() -> None:
    html = panes.coherent_strip(-0.25, 0.25, (-0.5, 0.5), True)
    assert "left:25.0%;width:50.0%" in html and "coherent from" in html
    assert "beyond what stays coherent" in panes.coherent_strip(-0.25, 0.25, (-0.5, 0.5), False)
