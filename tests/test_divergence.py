"""KL divergence against scipy, on the distributions of two separate plain passes."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from steering_setup import PROMPTS, direction, lora

from core.model.dice import Sampling
from core.model.divergence import divergence
from core.model.generation import Generation
from core.model.interventions import AddDirection, ApplyLora
from core.model.loading import LoadedModel
from core.model.rows import Row
from core.model.scopes import RESPONSE
from core.model.steering import steered

Tiny = Callable[[str], LoadedModel]


@torch.inference_mode()
def shares(loaded: LoadedModel, answer, interventions) -> np.ndarray:
    ids = torch.from_numpy(np.concatenate([answer.prompt_ids, answer.ids]))[None]
    with steered(loaded, interventions):
        logits = loaded.model(input_ids=ids).logits[0, len(answer.prompt_ids) - 1 : -1]
    return logits.double().softmax(-1).numpy()


@pytest.mark.parametrize("family", ["llama31", "gemma2", "qwen2"])
def test_it_is_scipys_on_the_same_text(family: str, tiny_model: Tiny) -> None:
    loaded = tiny_model(family)
    tuned, add = ApplyLora(lora(loaded)), AddDirection(direction(loaded), 1.0)
    rows = [Row(PROMPTS[1], items, 1, Sampling(max_new_tokens=40)) for items in ((add,), (tuned, add), ())]
    base, fine_tuned, plain = Generation(loaded, rows).run().answers
    for answer, reference in ((base, ()), (fine_tuned, (tuned,)), (fine_tuned, ())):
        one, other = (shares(loaded, answer, items) for items in (answer.row.interventions, reference))
        found = divergence(loaded, answer, reference)
        assert found.shape == (answer.n_tokens,)
        assert np.allclose(found, entropy(one, other, axis=1), rtol=1e-3, atol=1e-4) and found.min() > 1e-3
    assert np.abs(divergence(loaded, plain)).max() < 1e-6


def test_steering_the_response_does_not_move_the_first_token(tiny_model: Tiny) -> None:
    loaded = tiny_model("qwen2")
    row = Row(PROMPTS[1], (AddDirection(direction(loaded), 1.0, scope=RESPONSE),), 1, Sampling(max_new_tokens=6))
    found = divergence(loaded, Generation(loaded, [row]).run().answers[0])
    assert found[0] < 1e-6 and found[1:].min() > 1e-3


def test_a_row_that_never_ran_has_none(tiny_model: Tiny) -> None:
    loaded = tiny_model("qwen2")
    answer = Generation(loaded, [Row("Why?", (AddDirection(direction(loaded), math.nan),))]).run().answers[0]
    assert divergence(loaded, answer).shape == (0,)
