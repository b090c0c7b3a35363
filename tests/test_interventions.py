"""Interventions as data: their units, what they are in JSON, and the strengths that no model survives."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from steering_setup import direction, exact_sae, lora

from core.directions import Direction
from core.errors import DirectionError, InterventionError
from core.model.interventions import (
    AblateDirection,
    AddDirection,
    ApplyLora,
    ClampFeature,
    ScaleFeature,
    ablate_each,
    variant_of,
)
from core.model.scopes import PROMPT

D = Direction("d", "tiny", 2, np.array([3.0, 4.0]), 10.0)
BARE = Direction("bare", "tiny", 2, np.array([3.0, 4.0]))


def test_strengths_are_mean_residual_norms_or_raw() -> None:
    assert np.allclose(AddDirection(D, 0.5).vector, [3.0, 4.0]) and AddDirection(D, 0.5).raw_strength == 1.0
    assert np.allclose(AddDirection(D, -2, raw=True).vector, [-6.0, -8.0])
    assert AddDirection(BARE, 2, raw=True).raw_strength == 2
    assert AddDirection(0 * D, 0).raw_strength == 0 and math.isnan(AddDirection(0 * D, 1).raw_strength)
    with pytest.raises(DirectionError, match="give a raw strength"):
        AddDirection(BARE, 1.0)


@pytest.mark.parametrize(
    ("item", "says"),
    [
        (AddDirection(D, math.nan), "adding 'd' at strength nan, which is not a finite number"),
        (AddDirection(D, math.inf, raw=True), "inf, which is not"),
        (AddDirection(D, -1001), "at 1001 mean residual norms, beyond 1000"),
        (AddDirection(D, 3000, raw=True), "at 1500 mean residual norms"),
        (AddDirection(0 * D, 1), "points nowhere"),
        (AblateDirection(D, strength=math.nan), "not a finite number"),
        (ClampFeature(exact_sae(), 3, -math.inf), "clamping feature 3 of layer 2 to -inf"),
        (ScaleFeature(exact_sae(), 3, 1e4), "beyond 1000"),
    ],
)
def test_strengths_that_no_model_survives_are_problems(item: object, says: str) -> None:
    assert says in item.problem


def test_sensible_ones_are_none(tiny_model) -> None:
    loaded = tiny_model("llama31")
    items = [AddDirection(D, 2), AddDirection(0 * D, 0), AddDirection(BARE, 1e5, raw=True), AblateDirection(D),
             ClampFeature(exact_sae(), 0, 8), ScaleFeature(exact_sae(), 0, 0), ApplyLora(lora(loaded), -1)]  # fmt: skip
    assert [item.problem for item in items] == [""] * len(items)
    assert [item.nothing for item in items] == [False, True] + [False] * 5
    assert ApplyLora(lora(loaded), math.inf).problem and ApplyLora(lora(loaded), 0).nothing


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(InterventionError, match="no feature 32; its SAE has 0 to 31"):
        ClampFeature(exact_sae(), 32, 1.0)
    with pytest.raises(DirectionError, match="points nowhere"):
        AblateDirection(0 * D)
    with pytest.raises(InterventionError, match="one for each layer"):
        ablate_each([D, 2 * D])


def test_they_describe_themselves_in_json(tiny_model) -> None:
    loaded = tiny_model("llama31")
    items = (AddDirection(D, 0.5, scope=PROMPT), AblateDirection(D, everywhere=True), ClampFeature(exact_sae(), 3, 8.0),
             ScaleFeature(exact_sae(), 4, 0.0), ApplyLora(lora(loaded), 0.5))  # fmt: skip
    assert json.loads(json.dumps([item.describe() for item in items])) == [
        {"kind": "add", "direction": "d", "layer": 2, "strength": 0.5, "raw": False, "scope": "prompt"},
        {"kind": "ablate", "direction": "d", "layer": 2, "everywhere": True, "strength": 1.0, "scope": "all"},
        {"kind": "clamp", "layer": 2, "feature": 3, "value": 8.0, "scope": "all"},
        {"kind": "scale", "layer": 2, "feature": 4, "factor": 0.0, "scope": "all"},
        {"kind": "lora", "adapter": "bad", "strength": 0.5, "scope": "all"},
    ]


def test_the_variant_is_the_adapters_applied(tiny_model) -> None:
    bad, good = lora(tiny_model("llama31")), lora(tiny_model("llama31"), 1, name="good")
    assert variant_of([AddDirection(direction(tiny_model("llama31")), 1), ApplyLora(bad, 0)]) == "base"
    assert variant_of([ApplyLora(bad)]) == "bad" and variant_of([ApplyLora(bad, 0.5)]) == "bad@0.5"
    assert variant_of([ApplyLora(bad), ApplyLora(good, -1)]) == "bad + good@-1"
