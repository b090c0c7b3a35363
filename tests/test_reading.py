"""Projections of tokens are those of the model's own hidden states."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from core.directions import Direction
from core.errors import DirectionError
from core.model.reading import project


@pytest.mark.parametrize("family", ["smollm2", "gemma2", "qwen2"])
def test_projections_are_of_the_models_own_hidden_states(tiny_model: Callable, family: str) -> None:
    loaded = tiny_model(family)
    ids = np.arange(5, 17)
    direction = Direction("d", "tiny", 1, np.random.default_rng(0).standard_normal(loaded.d_model))
    with torch.no_grad():
        states = loaded.decoder(torch.tensor(ids)[None], output_hidden_states=True).hidden_states[2][0]
    wanted = states.numpy() @ direction.unit
    assert np.allclose(project(loaded, ids, direction), wanted, atol=1e-4)
    assert np.allclose(project(loaded, ids, 7 * direction), wanted, atol=1e-4), "its length does not matter"
    with pytest.raises(DirectionError, match="d_model 3"):
        project(loaded, ids, Direction("d", "tiny", 1, np.ones(3)))
