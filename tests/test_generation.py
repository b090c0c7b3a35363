"""The decode loop against transformers' own, its independence of the batch, and its dice."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from core.conversations import Message

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
