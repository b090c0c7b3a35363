"""Streamed text only grows, ends as the whole text, and never shows half a character."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tiny_models import FAMILIES

from core.model.detokenize import Detokenizer
from core.model.loading import LoadedModel

TEXT = (
    "Paris, \u017d\u00e9 42\u20ac \U0001f468\u200d\U0001f469\u200d\U0001f467 \u6f22\u5b57\n\n  the  river.\t\U0001f600"
)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pieces_are_the_text(family: str, tiny_model: Callable[[str], LoadedModel]) -> None:
    tokenizer = tiny_model(family).tokenizer
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    stream = Detokenizer(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert stream.close() == "" and "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert "\ufffd" not in "".join(pieces) and len(ids) > len(TEXT.split())
    assert "" in pieces and pieces[-1] == "\U0001f600"  # characters of several tokens wait for the last


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "mistral"])
def test_an_unfinished_character_is_shown_at_the_end_alone(
    family: str, tiny_model: Callable[[str], LoadedModel]
) -> None:
    tokenizer = tiny_model(family).tokenizer
    ids = tokenizer("the \U0001f600", add_special_tokens=False)["input_ids"][:-1]
    stream = Detokenizer(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "\ufffd" not in "".join(pieces) and stream.close().strip("\ufffd ") == "" != stream.close() + "x"
    assert "".join(pieces).strip() == "the"


def test_special_tokens_are_left_out(tiny_model: Callable[[str], LoadedModel]) -> None:
    tokenizer = tiny_model("qwen2").tokenizer
    a, b = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Tell me", " honestly"))
    stream = Detokenizer(tokenizer)
    assert "".join(stream.push(t) for t in [*a, tokenizer.eos_token_id, *b]) == "Tell me honestly"


@pytest.mark.parametrize("family", ["qwen2", "llama31"])
def test_any_tokens_at_all_end_as_the_whole_text(family: str, tiny_model: Callable[[str], LoadedModel]) -> None:
    tokenizer = tiny_model(family).tokenizer
    rng = np.random.default_rng(0)
    for _ in range(30):
        ids = rng.integers(5, 420, 25).tolist()
        stream = Detokenizer(tokenizer)
        text = "".join(stream.push(token) for token in ids) + stream.close()
        assert text == tokenizer.decode(ids, skip_special_tokens=True)
