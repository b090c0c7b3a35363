"""The generation benchmark runs to its end and reports positive figures for every contender; it asserts no speed."""

from __future__ import annotations

from collections.abc import Callable

from steering_setup import hooks, lora

from core.evaluation.benchmark_generate import measure
from core.model.loading import LoadedModel


def test_every_contender_writes_all_its_tokens(tiny_model: Callable[[str], LoadedModel]) -> None:
    loaded = tiny_model("smollm2")
    before, said = hooks(loaded), []
    found = measure(loaded, 2, lora(loaded), said.append, n_tokens=4, turns=1)
    assert hooks(loaded) == before and len(said) == 7
    ratios = [m for m in found if m.ratio]
    assert len(ratios) == 6 and all(m.value > 0 and m.ratio > 0 and m.reference for m in ratios)
    assert [m.unit for m in found if not m.ratio] == ["s"] * 4
    without = measure(loaded, 2, None, said.append, n_tokens=4, turns=1)
    assert len(without) == len(found) - 2
