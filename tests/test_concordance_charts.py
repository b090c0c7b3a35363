"""Charts of a concordance: valid, titled, tooltipped, fit for both themes, and drawn from the result's own figures."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from test_concordance import K, N, make_ranking, planted
from test_concordance_report import THREE, WORDS, three, two

from core.analysis.concordance import Concordance, concord
from core.view import charts as plain
from core.view import concordance_charts as charts
from core.view.charts import NEUTRAL, RAISED, SUPPRESSED

PAIR = ("data", "model")


def mixed() -> Concordance:
    """All five quadrants, with names."""
    a, b = planted(10)
    a[300], b[300] = 1.5, -1.5
    q = (np.where(np.abs(x) < 0.6, 0.9, 1e-5) for x in (a, b))
    found = concord({n: make_ranking(x, q=p) for n, x, p in zip(PAIR, (a, b), q, strict=True)})
    return replace(found, table=found.table.with_columns(name=pl.format("token {}", "feature")))


def points() -> pl.DataFrame:
    return charts.scatter_points(mixed(), PAIR, WORDS)


ALL = {
    "scatter": lambda: charts.scatter(points(), PAIR, WORDS, selected=300),
    "curve": lambda: charts.overlap_curve(two().overlap_of(PAIR, "raised")),
    "spearman": lambda: charts.depth_spearman(charts.depth_rows([two(), two(3)], PAIR, "raised")),
    "overlap": lambda: charts.depth_overlap(charts.depth_rows([two(), two(3)], PAIR, "raised"), K),
}


def layers(spec: dict) -> list[dict]:
    return [layer["encoding"] for layer in spec["layer"]]


def scale(spec: dict, channel: str) -> dict[str, str]:
    found = next(e[channel]["scale"] for e in layers(spec) if channel in e)
    return dict(zip(found["domain"], found["range"], strict=True))


@pytest.mark.parametrize("name", ALL)
def test_every_chart_is_valid_titled_tooltipped_and_fits_both_themes(name: str) -> None:
    spec = ALL[name]().to_dict()
    text = json.dumps(spec)
    assert spec["background"] == "transparent" and spec["description"]
    assert '"black"' not in text and '"#000' not in text and '"white"' not in text and '"labelColor"' not in text
    drawn = [e for e in layers(spec) if "field" in e.get("x", {}) and "field" in e.get("y", {})]
    assert drawn and all("tooltip" in e and e["x"].get("title") for e in drawn)


def test_the_scatter_names_colours_and_shapes_every_quadrant() -> None:
    spec = ALL["scatter"]().to_dict()
    colours, shapes = scale(spec, "color"), scale(spec, "shape")
    assert list(colours) == list(shapes) == ["shared", "data only", "model only", "opposed", "neither"]
    assert len(set(colours.values())) == len(set(shapes.values())) == 5
    assert not {RAISED, SUPPRESSED} & set(colours.values()) and colours["neither"] == NEUTRAL
    assert {"raised in both", "suppressed in both", "opposed"} <= {
        row["text"] for rows in spec["datasets"].values() for row in rows if "text" in row
    }
    titles = [t["title"] for t in next(e for e in layers(spec) if "shape" in e)["tooltip"]]
    assert titles == ["Feature", "Fires on", "Moved in", "Effect, data", "q, data", "Effect, model", "q, model"]


def test_points_hold_effects_and_the_pair_s_own_quadrant() -> None:
    found = points()
    row = found.filter(pl.col("feature") == 300).row(0, named=True)
    assert (row["x"], row["y"], row["quadrant"], row["name"]) == (1.5, -1.5, "opposed", "token 300")
    assert found.height == N
    of_three = charts.scatter_points(three(), ("model", "response"), THREE)
    assert set(of_three["quadrant"]) <= {"shared", "model only", "responses only", "opposed", "neither"}


def test_a_large_scatter_keeps_what_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = points()
    monkeypatch.setattr(charts, "MAX_POINTS", 250)
    thinned = points()
    moved = whole.filter(pl.col("quadrant") != "neither")
    assert thinned.height == 250 and set(moved["feature"]) <= set(thinned["feature"])
    assert 0 < moved.height < 250 and plain.MAX_POINTS == 4000


def test_long_titles_stand_one_to_a_line() -> None:
    long = {n: replace(w, short=f"{n}, a title that takes a whole line") for n, w in WORDS.items()}
    one = charts.scatter(charts.scatter_points(mixed(), PAIR, long), PAIR, long).to_dict()
    columns = [next(e["color"]["legend"]["columns"] for e in layers(s) if "color" in e)
               for s in (one, ALL["scatter"]().to_dict())]
    assert columns == [1, charts.LEGEND_COLUMNS]


def test_the_curve_draws_observed_chance_and_control() -> None:
    found = two().overlap_of(PAIR, "raised")
    spec = charts.overlap_curve(found).to_dict()
    lines = [r for rows in spec["datasets"].values() for r in rows if "line" in r]
    at = found.at_k(K)
    assert {r["line"]: r["n"] for r in lines if r["k"] == K} == {
        "shared": 14.0, "chance": at.stricter.expected, "benign control": 5.0
    }
    (band,) = (r for rows in spec["datasets"].values() for r in rows if "low" in r and r["k"] == K)
    assert (band["low"], band["high"]) == at.stricter.ci95
    at_both = replace(found, at=tuple(replace(a, controls={"data": 9, **a.controls}) for a in found.at))
    drawn = [r["n"] for rows in charts.overlap_curve(at_both).to_dict()["datasets"].values() for r in rows
             if r.get("line") == "benign control" and r["k"] == K]
    assert drawn == [5.0]  # the control of the second contrast, as in the sentence
    without = charts.overlap_curve(two(control=None).overlap_of(PAIR, "raised")).to_dict()
    assert list(scale(without, "color")) == ["shared", "chance"]


def test_depth_has_a_row_a_layer_and_survives_an_undefined_correlation() -> None:
    rows = charts.depth_rows([two(), replace(two(3), layer=21)], PAIR, "suppressed")
    assert rows["layer"].to_list() == [15, 21] and rows["observed"].to_list() == [14, 3]
    flat = two()
    undefined = replace(flat.pairs[0], spearman=replace(flat.pairs[0].spearman, rho=float("nan")))
    missing = charts.depth_rows([replace(flat, pairs=(undefined,))], PAIR, "raised")
    assert missing["rho"].to_list() == [None]
    charts.depth_spearman(missing).to_dict()
