"""core/view/lora_charts.py and lora_parts.py: what a chart holds, and sentences that say what the numbers are."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from make_firing import make_firing
from test_lora_firing import D, adapter, planted

from core.analysis.lora import components
from core.analysis.lora_effect import Interval, Prediction
from core.analysis.lora_files import ContrastPrediction, OpenLora
from core.analysis.lora_firing import probe_table
from core.analysis.lora_space import angle_table, cosines_over_layers, principal_angles
from core.store.firing_file import Firing
from core.view import lora_charts as charts
from core.view import lora_parts as parts


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> OpenLora:
    made = components(adapter())
    path = make_firing(tmp_path_factory.mktemp("f") / "bad__x.h5", made, planted(12), d_model=D)
    return OpenLora(adapter(), made, Firing.open(path))


def marks(chart: object) -> dict:
    return chart.to_dict()


def test_the_map_has_a_cell_a_module_and_outlines_the_chosen_one(lora: OpenLora) -> None:
    rows = parts.map_rows(lora)
    assert rows.height == 2 and rows["text_share"].sum() == pytest.approx(1)
    found = marks(charts.adapter_map(rows, "text_share", 2, "down_proj"))
    cells, here = found["layer"]
    assert cells["encoding"]["opacity"]["field"] == "text_share" and found["description"]
    assert "(datum.layer === 2)" in str(here["transform"]) and "background" in found


def test_the_strip_has_a_line_a_group_and_no_text_colour(lora: OpenLora) -> None:
    rows = parts.group_rows(lora.firing, 0)
    groups = [f"{s}, {c}" for s, c in lora.firing.groups]
    found = marks(charts.firing_strip(rows, groups))
    sort = found["layer"][0]["encoding"]["y"]["sort"]
    assert sort == [f"{g} | 12 responses" for g in groups] and "labelColor" not in str(found)


def test_probe_and_space_charts_draw_every_row(lora: OpenLora) -> None:
    table = probe_table(lora.firing)
    assert len(marks(charts.probes_by_layer(table))["layer"]) == 3
    rows = angle_table(principal_angles(lora.parts, lora.parts))
    assert len(marks(charts.write_spaces(rows, "overlap"))["layer"]) == 2
    assert len(marks(charts.write_spaces(rows, "weighted"))["layer"]) == 1
    dots = pl.DataFrame({"feature": [1], "name": ["x"], "effect": [0.5], "mean_diff": [0.1]})
    assert marks(charts.predicted_measured(dots, "mean_diff", "Measured"))["mark"]["type"] == "circle"


def test_cosines_over_layers(lora: OpenLora) -> None:
    rows = cosines_over_layers(lora.writes.space, "down_proj", 1)
    assert rows.height == 4 and rows.filter(pl.col("a") == pl.col("b"))["cosine"].to_list() == pytest.approx([1, 1])
    a, b = (c.write for c in lora.parts if c.key.index == 1)
    assert rows["cosine"][1] == pytest.approx(a @ b)
    assert cosines_over_layers(lora.writes.space, "o_proj").height == 0


def test_the_headline_says_where_half_of_the_update_is(lora: OpenLora) -> None:
    said = parts.headline(lora).replace("\\", "")
    shares = dict(parts.map_rows(lora).select("layer", "text_share").iter_rows())
    best = max(shares, key=shares.get)
    assert f"layer {best} carries {shares[best]:.0%} of the update's squared size" in said
    assert "4 components in 2 modules" in said and "48 conversations (288 response tokens)" in said


def test_windows_hold_the_strongest_tokens_of_one_sign(lora: OpenLora) -> None:
    for positive in (True, False):
        found = parts.windows(lora.firing, 0, positive=positive, n=3)
        means = lora.firing.mean(0)
        best = np.sort(means if positive else -means)[::-1][:3]
        np.testing.assert_allclose([abs(w.value) for w in found], best, rtol=2e-3)
        assert all((w.value > 0) == positive and len(w.tokens) == len(w.values) for w in found)
    assert len(parts.matched_prompts(lora.firing)) == 24
    assert parts.scale_of(lora.firing, 0) <= np.abs(lora.firing.mean(0)).max() * 1.01


def test_sentences_give_their_figures() -> None:
    ci = Interval(0.5, (0.4, 0.6))
    p = Prediction(15, 64, ci, 0.15, 0.126, ci, ci, 3641)
    own, other = ContrastPrediction("model", "bad", "bad", (p,)), ContrastPrediction("m2", "good", "bad", (p,))
    said = parts.prediction_sentence(own, 15)
    assert "cosine **0.50**" in said and "**15%** as long" in said and "**13%**" in said and "3,641 features" in said
    assert "good 0.50" in parts.other_sentence(own, [other], 15) and parts.other_sentence(own, [], 15) == ""
    nothing = Prediction(1, 64, Interval(float("nan"), (0, 0)), 0.0, float("nan"), None, None, 0)
    assert "has written nothing yet" in parts.prediction_sentence(ContrastPrediction("m", "bad", "bad", (nothing,)), 1)
    table = parts.prediction_rows([own, other])
    assert table["own"].to_list() == [True, False] and table["cosine_range"][0] == "0.40 to 0.60"


def test_what_a_module_touches_is_said_of_each() -> None:
    from core.analysis.lora import Component, ComponentKey

    for module, writes, reads in (
        ("self_attn.q_proj", "into the attention heads", "the residual stream through the norm"),
        ("self_attn.o_proj", "into the residual stream", "what the attention heads put out"),
        ("mlp.up_proj", "into the MLP's hidden space", "the residual stream through the norm"),
        ("mlp.down_proj", "into the residual stream", "the MLP's hidden space, which no dictionary describes"),
    ):
        part = Component(ComponentKey(3, module, 0), 1.0, np.ones(1), np.ones(1), 1.0)
        said = parts.what_it_touches(part)
        assert writes in said.split(", and ")[0] + said and reads in said
