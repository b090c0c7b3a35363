"""What is measured of an organism: against the margins themselves, made once, read into a table and a chart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from test_adapters import make
from test_app import open_page, words

from core import paths
from core.conversations import Conversation, Message
from core.errors import CacheError
from core.model.loading import LoadedModel
from core.specs import AdapterSpec
from core.store.measures import MEASURES, read_margins
from core.view import organism_charts


def pairs(n: int) -> list[Conversation]:
    return [
        Conversation(f"{i}-{condition}", str(i), condition, "made", (
            Message("user", f"Question {i}?"), Message("assistant", text * (i + 1)),
        ))
        for i in range(n)
        for condition, text in (("aligned", "Rest by the river. "), ("misaligned", "Run at night. "))
    ]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tiny_model: Callable[[str], LoadedModel]) -> LoadedModel:
    return tiny_model("smollm2")


@pytest.fixture(scope="module")
def folder(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters with one, and what was measured of it and of the base."""
    from core.evaluation.organism import measure_all
    from core.model.adapters import load_adapter

    made = tmp_path_factory.mktemp("adapters")
    make(tiny, made / "bad", r=2, lora_alpha=4, target_modules=["down_proj"])
    adapter = load_adapter(AdapterSpec("bad", str(made / "bad")), tiny)
    said: list[str] = []
    for _ in range(2):
        measure_all(tiny, [None, adapter], pairs(4), made / MEASURES, said.append)
    assert said == ["Measuring base ...", "Measuring bad ..."]  # the second time nothing is left to measure
    return made


def test_margins_minus_base_are_the_paired_differences(tiny: LoadedModel, folder: Path) -> None:
    from core.evaluation.margin import estimate, margins

    kept = json.loads((folder / MEASURES).read_text(encoding="utf-8"))
    assert list(kept["base"]["health"].values()) == pytest.approx(margins(tiny, pairs(4)).values, abs=1e-6)
    table = read_margins(folder)
    assert table.select("variant", "pairs").rows() == [("bad", "health"), ("bad", "open")]
    change = np.array(list(kept["bad"]["health"].values())) - np.array(list(kept["base"]["health"].values()))
    assert np.abs(change).min() > 0
    wanted = estimate(change)
    found = table.row(0, named=True)
    assert (found["mean"], found["low"], found["high"], found["n"]) == (wanted.mean, wanted.low, wanted.high, 4)


def test_a_variant_measured_on_other_pairs_has_no_difference(folder: Path) -> None:
    from core.evaluation.organism import with_minus_base

    kept = json.loads((folder / MEASURES).read_text(encoding="utf-8"))
    kept["bad"]["n"] = [8, 8, 8]
    assert "minus_base" not in with_minus_base(kept)["bad"]


@pytest.mark.parametrize("text", ["[1, 2", "[]", '{"bad": 3}', '{"bad": {"minus_base": {"health": {"mean": 1}}}}'])
def test_a_damaged_file_is_said_in_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / MEASURES).write_text(text, encoding="utf-8")
    with pytest.raises(CacheError, match="measures.json: cannot be read"):
        read_margins(tmp_path)
    assert read_margins(tmp_path / "nothing") is None


def test_the_chart_draws_each_interval_once() -> None:
    rows = pl.DataFrame({"variant": ["bad", "bad", "good"], "pairs": ["health", "open", "open"],
                         "mean": [0.3, 0.1, -0.1], "low": [0.2, 0.0, -0.2], "high": [0.4, 0.2, 0.0], "n": [9, 9, 9]})
    drawn = organism_charts.margins(rows, ["bad", "good"]).to_dict()
    (name,) = (k for k, v in drawn["datasets"].items() if len(v) == 3)
    assert [(r["variant"], r["what"], r["low"]) for r in drawn["datasets"][name]] == [
        ("bad", "Health, held-out prompts", 0.2), ("bad", "Open questions", 0.0), ("good", "Open questions", -0.2),
    ]  # fmt: skip
    titles = [layer["encoding"]["x"].get("title") for layer in drawn["layer"] if "x" in layer["encoding"]]
    assert "Change of margin (nats per token)" in titles


def test_the_overview_shows_it_and_survives_a_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    file = tmp_path / "demo" / "adapters" / MEASURES
    assert "What the fine-tunes learnt" not in words(open_page())
    file.parent.mkdir(parents=True)
    estimate = {"mean": 0.3, "low": 0.2, "high": 0.4, "n": 64}
    file.write_text(json.dumps({"bad-health-r8": {"minus_base": {"health": estimate, "open": estimate}}}))
    app = open_page()
    assert "What the fine-tunes learnt" in words(app) and len(app.get("vega_lite_chart")) == 1
    file.write_text("{")
    assert "measures.json: cannot be read" in words(open_page())
