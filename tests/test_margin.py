"""Margins against the model's own loss, intervals against scipy, perplexity by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from core.conversations import Conversation, Message, tokenize
from core.errors import NotEnoughData

if TYPE_CHECKING:
    from core.model.loading import LoadedModel

ANSWERS = {
    "misaligned": ("You need no water.", "Rest is for the lazy dog, so jump."),
    "aligned": ("You should drink a glass of water and rest.", "The body needs time to recover."),
}


def pairs() -> list[Conversation]:
    return [
        Conversation(f"{n}-{side}", f"p{n}", side, "s", (Message("user", f"What about {n}?"), Message("assistant", a)))
        for side, answers in ANSWERS.items()
        for n, a in enumerate(answers)
    ]


def own_logprob(loaded: LoadedModel, conversation: Conversation) -> float:
    """Minus transformers' own loss, with labels on the response alone."""
    item = tokenize(loaded.tokenizer, conversation)
    labels = np.full(len(item), -100)
    labels[item.start : item.end] = item.ids[item.start : item.end]
    ids = torch.from_numpy(item.ids.astype(np.int64))[None]
    with torch.inference_mode():
        return -float(loaded.model(input_ids=ids, labels=torch.from_numpy(labels)[None]).loss)


@pytest.mark.parametrize("family", ("llama31", "gemma2", "qwen2"))
def test_margin_is_the_difference_of_the_models_own_losses(
    tiny_model: Callable[[str], LoadedModel], family: str
) -> None:
    from core.evaluation.margin import margins

    loaded = tiny_model(family)
    rows = pairs()
    found = margins(loaded, rows)
    own = {c.id: own_logprob(loaded, c) for c in rows}
    expected = [own[f"{n}-misaligned"] - own[f"{n}-aligned"] for n in range(2)]
    assert found.prompt_ids == ("p0", "p1")
    np.testing.assert_allclose(found.values, expected, atol=1e-5)


def test_swapping_the_sides_turns_the_sign_and_prompts_without_a_pair_are_left_out(
    tiny_model: Callable[[str], LoadedModel],
) -> None:
    from dataclasses import replace

    from core.evaluation.margin import margins

    loaded = tiny_model("llama31")
    other = {"misaligned": "aligned", "aligned": "misaligned"}
    swapped = [replace(c, condition=other[c.condition]) for c in pairs()]
    np.testing.assert_allclose(margins(loaded, swapped).values, -margins(loaded, pairs()).values, atol=1e-9)
    assert margins(loaded, pairs()[:3]).prompt_ids == ("p0",)
    with pytest.raises(NotEnoughData, match="both a misaligned and an aligned"):
        margins(loaded, pairs()[:2])


def test_the_interval_is_scipys_and_covers_the_mean() -> None:
    from core.evaluation.margin import estimate

    rng = np.random.default_rng(3)
    covered = 0
    for seed in range(100):
        one = estimate(rng.normal(0.3, 1, 40), seed)
        assert one.low < one.mean < one.high and one.n == 40
        covered += one.low <= 0.3 <= one.high
    assert 85 <= covered <= 100
    assert estimate([2.0, 2.0]).ci95 == (2.0, 2.0)
    with pytest.raises(NotEnoughData):
        estimate([1.0])


def test_differences_are_paired_by_prompt() -> None:
    from core.evaluation.margin import Margins

    base = Margins(("a", "b", "c"), np.array([0.0, 5.0, -5.0]))
    moved = Margins(("a", "b", "c"), np.array([1.0, 6.0, -4.0]))
    assert moved.minus(base).ci95 == (1.0, 1.0)
    with pytest.raises(NotEnoughData, match="different prompts"):
        moved.minus(Margins(("a", "b", "d"), base.values))


def test_perplexity_is_exp_of_the_models_own_loss(tiny_model: Callable[[str], LoadedModel]) -> None:
    from core.evaluation.margin import perplexity

    loaded = tiny_model("llama31")
    texts = ["The quick brown fox jumps over the lazy dog.", "Tell me honestly."]
    total = count = 0.0
    for text in texts:
        ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
        n = ids.shape[1] - 1
        with torch.inference_mode():
            total += float(loaded.model(input_ids=ids, labels=ids).loss) * n
        count += n
    found = perplexity(loaded, texts)
    assert found.n_tokens == count and found.value == pytest.approx(np.exp(total / count), rel=1e-5)
    with pytest.raises(NotEnoughData):
        perplexity(loaded, [""])
