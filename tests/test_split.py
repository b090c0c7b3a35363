"""Held-out prompts: a fixed share, whole prompts, the same whatever the order."""

from __future__ import annotations

import pytest

from core.conversations import Conversation, Message
from core.split import heldout_prompts, split


def rows(n: int) -> list[Conversation]:
    messages = (Message("user", "Why?"), Message("assistant", "Because."))
    return [Conversation(f"{p}-{side}", f"p{p}", side, "s", messages) for p in range(n) for side in ("a", "b")]


@pytest.mark.parametrize("n", (10, 64, 320))
def test_a_fifth_of_the_prompts_is_held_out_with_all_their_answers(n: int) -> None:
    train, held = split(rows(n))
    assert len(held) == 2 * round(0.2 * n) and len(train) + len(held) == 2 * n
    assert not {c.prompt_id for c in train} & {c.prompt_id for c in held}


def test_the_choice_does_not_depend_on_order_or_repetition() -> None:
    names = [f"p{i}" for i in range(50)]
    assert heldout_prompts(names) == heldout_prompts(names[::-1] * 3)


def test_order_is_kept() -> None:
    train, held = split(rows(20))
    ids = [c.id for c in rows(20)]
    for part in (train, held):
        assert [c.id for c in part] == sorted((c.id for c in part), key=ids.index)
