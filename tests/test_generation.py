"""The decode loop against transformers' own, its independence of the batch, and its dice."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from core.conversations import Message
from core.errors import PresetError

if TYPE_CHECKING:
    from core.model.loading import LoadedModel

FAMILIES = ("llama31", "gemma2", "gemma3", "qwen2", "mistral")
TEXTS = ("Why?", "Tell me honestly what you think about a glass of water and the river.", "Paris or London?")


def prompts(loaded: LoadedModel) -> list[np.ndarray]:
    from core.model.generation import prompt_ids

    return [prompt_ids(loaded, (Message("user", text),)) for text in TEXTS]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_equals_transformers_own(tiny_model: Callable[[str], LoadedModel], family: str) -> None:
    from core.model.generation import Sampling, generate, stop_ids

    loaded = tiny_model(family)
    ours = generate(loaded, prompts(loaded), [0, 1, 2], Sampling(temperature=0, max_new_tokens=12))
    for prompt, answer in zip(prompts(loaded), ours, strict=True):
        ids = torch.from_numpy(prompt)[None]
        theirs = loaded.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12
        )[0, len(prompt) :].tolist()
        cut = next((i for i, token in enumerate(theirs) if token in stop_ids(loaded)), len(theirs))
        assert answer.ids.tolist() == theirs[:cut]
        assert answer.ended == (cut < len(theirs))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_does_not_depend_on_its_neighbours(tiny_model: Callable[[str], LoadedModel], family: str) -> None:
    from core.model.generation import Sampling, generate

    loaded = tiny_model(family)
    sampling = Sampling(max_new_tokens=10)
    together = generate(loaded, prompts(loaded), [5, 6, 7], sampling)
    for prompt, seed, answer in zip(prompts(loaded), (5, 6, 7), together, strict=True):
        alone = generate(loaded, [prompt], [seed], sampling)[0]
        assert answer.ids.tolist() == alone.ids.tolist()


def test_same_seed_same_words_other_seed_other_words(tiny_model: Callable[[str], LoadedModel]) -> None:
    from core.model.generation import Sampling, generate

    loaded = tiny_model("llama31")
    prompt = prompts(loaded)[0]
    rows = generate(loaded, [prompt] * 3, [1, 1, 2], Sampling(max_new_tokens=20))
    assert rows[0].ids.tolist() == rows[1].ids.tolist() != rows[2].ids.tolist()


def test_samples_follow_the_softmax(tiny_model: Callable[[str], LoadedModel]) -> None:
    """Chi-square of 4,000 draws of one token against the distribution itself."""
    from scipy import stats

    from core.model.generation import Sampling, _choose

    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).repeat(4000, 1)
    drawn = _choose(logits, [torch.Generator().manual_seed(i) for i in range(4000)], Sampling(temperature=0.7))
    expected = torch.softmax(logits[0].double() / 0.7, -1).numpy() * 4000
    assert stats.chisquare(np.bincount(drawn.numpy(), minlength=4), expected).pvalue > 1e-3


@pytest.mark.parametrize("top_p", (0.01, 0.5, 0.8, 0.95))
def test_the_nucleus_is_transformers_own(top_p: float) -> None:
    """Over many draws exactly the tokens appear that transformers' warper keeps, in their proportions."""
    from scipy import stats
    from transformers import TopPLogitsWarper

    from core.model.generation import Sampling, _choose

    logits = torch.randn(9, generator=torch.Generator().manual_seed(4)) * 1.5
    kept = TopPLogitsWarper(top_p)(None, logits[None])[0]
    dice = [torch.Generator().manual_seed(i) for i in range(4000)]
    counts = np.bincount(_choose(logits.repeat(4000, 1), dice, Sampling(top_p=top_p)).numpy(), minlength=9)
    inside = torch.isfinite(kept).numpy()
    assert (counts[~inside] == 0).all() and (counts[inside] > 0).all()
    if inside.sum() > 1:
        expected = torch.softmax(kept.double(), -1).numpy()[inside] * 4000
        assert stats.chisquare(counts[inside], expected).pvalue > 1e-3


def test_a_row_that_ends_its_turn_leaves_the_batch(
    tiny_model: Callable[[str], LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    from core.model import generation

    loaded = tiny_model("llama31")
    free = generation.generate(loaded, prompts(loaded), [1, 2, 3], generation.Sampling(max_new_tokens=8))
    stop = int(free[1].ids[3])
    assert stop not in free[0].ids.tolist() + free[2].ids.tolist()
    monkeypatch.setattr(generation, "stop_ids", lambda _: (stop,))
    running: list[int] = []
    sampling = generation.Sampling(max_new_tokens=8)
    rows = generation.generate(loaded, prompts(loaded), [1, 2, 3], sampling, running.append)
    cut = free[1].ids.tolist().index(stop)
    assert rows[1].ended and rows[1].ids.tolist() == free[1].ids.tolist()[:cut]
    assert [r.ids.tolist() for r in (rows[0], rows[2])] == [r.ids.tolist() for r in (free[0], free[2])]
    assert running[0] == 3 and running[-1] == 2


def test_impossible_settings_are_refused() -> None:
    from core.model.generation import Sampling

    with pytest.raises(PresetError, match="Temperature"):
        Sampling(temperature=-1)
    with pytest.raises(PresetError, match="at least 1"):
        Sampling(max_new_tokens=0)
    for top_p in (0.0, 1.1):
        with pytest.raises(PresetError, match="top_p"):
            Sampling(top_p=top_p)
