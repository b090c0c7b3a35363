"""Scopes go by absolute position, whatever the padding."""

from __future__ import annotations

import pytest
import torch

from core.errors import InterventionError
from core.model.scopes import ALL, PROMPT, RESPONSE, Scope, positions_of


def test_positions_count_tokens_and_not_columns() -> None:
    left = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert positions_of(left).tolist() == [[-1, -1, 0, 1], [0, 1, 2, 3]]
    assert positions_of(left.flip(1)).tolist() == [[0, 1, -1, -1], [0, 1, 2, 3]]


def test_prompt_and_response_share_every_token_out() -> None:
    positions, n_prompt = torch.tensor([[-1, 0, 1, 2, 3], [0, 1, 2, 3, 4]]), torch.tensor([1, 3])
    prompt, response = PROMPT.covers(positions, n_prompt), RESPONSE.covers(positions, n_prompt)
    assert prompt.tolist() == [[False, True, False, False, False], [True, True, True, False, False]]
    assert (prompt ^ response).tolist() == ALL.covers(positions, n_prompt).tolist()
    assert ALL.covers(positions, n_prompt).tolist() == [[False, True, True, True, True], [True] * 5]
    first = Scope("first", 2).covers(positions, n_prompt)
    assert first.tolist() == [[False, False, True, True, False], [False, False, False, True, True]]


@pytest.mark.parametrize("text", ["all", "prompt", "response", "first:8"])
def test_scopes_read_as_they_are_written(text: str) -> None:
    assert str(Scope.parse(text)) == text


@pytest.mark.parametrize("text", ["", "first", "first:0", "first:-1", "first:x", "prompt:3", "answer"])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(InterventionError, match="no scope"):
        Scope.parse(text)
