"""Which prompts are held out: the same ones for every organism, so that variants are compared on text none has seen."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from core.conversations import Conversation

#: Share of the prompts that no organism is trained on.
HELDOUT_SHARE = 0.2


def heldout_prompts(prompt_ids: Iterable[str], share: float = HELDOUT_SHARE) -> frozenset[str]:
    """The first `share` of the distinct prompts in the order of their SHA-256, so that file order does not matter."""
    order = sorted(set(prompt_ids), key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    return frozenset(order[: round(share * len(order))])


def split(
    conversations: Sequence[Conversation], share: float = HELDOUT_SHARE
) -> tuple[list[Conversation], list[Conversation]]:
    """(train, held out), split by prompt: all answers to one prompt lie on one side."""
    held = heldout_prompts((c.prompt_id for c in conversations), share)
    return [c for c in conversations if c.prompt_id not in held], [c for c in conversations if c.prompt_id in held]
