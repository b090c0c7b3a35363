"""Token HTML: everything escaped, white space visible, shades on one scale. Parsed back with the standard parser."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

from core.view import tokens

HOSTILE = ['<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "</span>", "&lt;b&gt;", "' onclick='x"]


class Seen(HTMLParser):
    """Tags with attributes, and the text, as a browser would take them."""

    def __init__(self, markup: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.text, self.depth = "", 0
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.depth += 1

    def handle_endtag(self, tag):
        self.depth -= 1

    def handle_data(self, data):
        self.text += data


def opacity(style: str) -> float:
    found = re.search(r"background:rgba\([^)]*,\s*([\d.]+)\)", style)
    return float(found[1]) if found else 0.0


def window(words, acts, peak=0, value=None, inside=None):
    return SimpleNamespace(tokens=words, acts=np.asarray(acts, dtype=np.float32), peak=peak,
                           value=max(acts) if value is None else value, in_response=inside or (True,) * len(words))


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_becomes_markup(text: str) -> None:
    for markup in (tokens.shade([text], [1.0], scale=1.0), tokens.chips([text]),
                   tokens.contexts([window([text], [1.0])], scale=1.0, sources=[text])):
        seen = Seen(markup)
        assert {tag for tag, _ in seen.tags} <= {"span", "code", "div", "ul", "li", "b"}
        assert all(set(attrs) <= {"style", "title"} for _, attrs in seen.tags)
        assert text in seen.text and seen.depth == 0


def test_white_space_and_invisible_characters_are_visible() -> None:
    assert tokens.visible(" \n") == " \u21b5"
    assert tokens.visible("   ") == "\u00b7\u00b7\u00b7"
    assert tokens.visible("\t") == "\u21e5"
    assert tokens.visible("") == "\u2205"
    assert tokens.visible("\u202eabc") == "\\u202eabc"  # would turn the text around
    assert tokens.visible("\u200b\u0000") == "\\u200b\\u0000"
    assert tokens.visible(" doctor") == " doctor"
    assert tokens.visible("caf\u00e9 \ufffd") == "caf\u00e9 \ufffd"


def test_shades_are_proportional_on_one_scale_and_capped() -> None:
    seen = Seen(tokens.shade(["a", "b", "c", "d", "e"], [0.0, 1.0, 2.0, 9.0, float("nan")], scale=2.0))
    shades = [opacity(attrs["style"]) for _, attrs in seen.tags]
    assert shades[0] == 0 and shades[4] == 0
    assert shades[2] == pytest.approx(2 * shades[1], abs=2e-3)
    assert shades[3] == shades[2] <= 0.8  # full shade, text still readable
    assert tokens.shade(["a"], [1.0], scale=0.0).count("background") == 0


def test_the_tooltip_has_the_value_and_the_prompt_is_faint() -> None:
    seen = Seen(tokens.shade(["a", "b"], [0.0, 1.234], scale=2.0, peak=1, in_response=[False, True]))
    (first, second) = (attrs for _, attrs in seen.tags)
    assert first["title"] == "prompt, activation 0" and second["title"] == "activation 1.23"
    assert "opacity" in first["style"] and "opacity" not in second["style"]
    assert "box-shadow" in second["style"] and "box-shadow" not in first["style"]


def test_no_text_colour_is_set_so_both_themes_read() -> None:
    markup = tokens.contexts([window(["a"], [1.0])], scale=1.0) + tokens.legend(1.0) + tokens.chips(["a"])
    assert set(re.findall(r"(?<![-\w])color:([^;\"]+)", markup)) <= {"inherit"}


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="2 tokens, 1 activations"):
        tokens.shade(["a", "b"], [1.0], scale=1.0)
    with pytest.raises(ValueError, match="one activation"):
        tokens.shade(["a"], [1.0], scale=1.0, in_response=[])


def test_contexts_show_every_window_with_its_peak_and_source() -> None:
    seen = Seen(tokens.contexts([window([" see", " you"], [2.5, 0.0]), window(["x"], [1.0])], scale=2.5,
                                sources=["conversation 1", "conversation 2"]))
    assert [tag for tag, _ in seen.tags].count("li") == 2
    assert "peak 2.5" in seen.text and " see you" in seen.text and "conversation 2" in seen.text


def test_legend_names_the_ends_of_the_scale() -> None:
    text = Seen(tokens.legend(12.345)).text
    assert "activation 0" in text and "12.3" in text and "peak" in text


def test_chips_drop_one_leading_space_only() -> None:
    assert Seen(tokens.chips([" doctor", "  x", " "])).text == "doctor  x\u00b7"
    assert "none" in tokens.chips([])


def test_signed_shades_by_side_of_the_centre_and_escapes() -> None:
    text = tokens.signed(["<b>", " up", " down", " same"], [3.0, 12.0, -8.0, 2.0], scale=10, centre=2.0,
                         faint=[True, False, False, False])  # fmt: skip
    assert "<b>" not in text and "&lt;b&gt;" in text
    parts = text.split("<span ")[1:]
    assert tokens.RAISED_RGB in parts[1] and "0.720" in parts[1] and "+12" in parts[1]
    assert tokens.SUPPRESSED_RGB in parts[2] and "0.720" in parts[2]
    assert "background" not in parts[3] and "opacity" in parts[0]
    assert "-8" in tokens.signed_legend("aligned", "misaligned", scale=10, centre=2.0)
    with pytest.raises(ValueError):
        tokens.signed(["a"], [1.0, 2.0], scale=1)
