"""Charts: planted tables in, Altair specifications out; what is drawn, in what colour, with what words on the axes."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest

from core.view import charts


def ranking(n: int = 6) -> pl.DataFrame:
    """Feature 0 raised, 1 suppressed, 2 strong but untested, the others flat."""
    effect = [2.0, -1.5, 3.0, *np.linspace(-0.1, 0.1, n - 3)]
    q = [1e-9, 1e-4, None, *([0.9] * (n - 3))]
    return pl.DataFrame({
        "feature": range(n), "name": [f"token {i}" for i in range(n)], "effect_size": effect, "q_value": q,
        "frac_active_target": [0.5] * n, "frac_active_reference": [0.25] * n, "n_target": [30] * n,
        "n_reference": [10] * n,
    })


def directed(n: int = 6) -> pl.DataFrame:
    return charts.with_direction(ranking(n), 0.05)


def values() -> pl.DataFrame:
    return pl.DataFrame({"side": ["bad"] * 4 + ["good"] * 2, "activation": [0.0, 0.0, 1.0, 3.0, 0.5, 2.0]})


def depth() -> pl.DataFrame:
    return pl.DataFrame({
        "layer": [3, 9], "n_raised": [4, None], "n_suppressed": [2, None], "max_raised": [1.5, None],
        "max_suppressed": [0.5, None], "resid_auroc": [0.7, 0.9],
    })


ALL = {
    "volcano": lambda: charts.volcano(directed(), alpha=0.05, selected=0),
    "prevalence": lambda: charts.effect_prevalence(directed()),
    "raised": lambda: charts.tail_bars(ranking().head(1), raised=True),
    "suppressed": lambda: charts.tail_bars(ranking()[1:2], raised=False),
    "dots": lambda: charts.distribution(values(), order=("bad", "good")),
    "cumulative": lambda: charts.cumulative(values(), order=("bad", "good")),
    "counts": lambda: charts.depth_counts(depth()),
    "effects": lambda: charts.depth_effects(depth()),
    "separation": lambda: charts.depth_separation(depth()),
}


def encodings(spec: dict) -> list[dict]:
    return [layer["encoding"] for layer in spec.get("layer", [spec])]


def rows(spec: dict) -> list[list[dict]]:
    return list(spec["datasets"].values())


@pytest.mark.parametrize("name", ALL)
def test_every_chart_is_valid_titled_tooltipped_and_fits_both_themes(name: str) -> None:
    spec = ALL[name]().to_dict()
    text = json.dumps(spec)
    assert spec["background"] == "transparent"
    assert spec["description"]
    assert '"black"' not in text and '"#000' not in text and '"white"' not in text and '"labelColor"' not in text
    drawn = [e for e in encodings(spec) if "x" in e and "y" in e]
    assert drawn and all("tooltip" in e for e in drawn)
    assert any(e["x"].get("title") for e in drawn)
    assert all(not axis.get("title", "").islower() for e in drawn for axis in (e["x"], e["y"]) if axis.get("title"))


def test_direction_needs_the_q_value_and_prevalence_pools_both_sides() -> None:
    table = directed()
    assert table["direction"].to_list()[:4] == ["raised", "suppressed", "not significant", "not significant"]
    assert table["prevalence"][0] == pytest.approx((0.5 * 30 + 0.25 * 10) / 40)
    assert table["minus_log10_q"][0] == pytest.approx(9)
    assert table["minus_log10_q"][2] is None


def test_a_q_value_of_zero_stays_finite() -> None:
    table = charts.with_direction(ranking().with_columns(q_value=pl.lit(0.0)), 0.05)
    assert table["minus_log10_q"].is_finite().all() and table["minus_log10_q"].max() == pytest.approx(300)
    assert str(charts.with_direction(ranking().with_columns(q_value=pl.lit(1.0)), 0.05)["minus_log10_q"][0]) == "0.0"


def test_the_two_hues_are_orange_for_raised_and_blue_for_suppressed() -> None:
    spec = charts.volcano(directed(), alpha=0.05).to_dict()
    scale = next(e["color"]["scale"] for e in encodings(spec) if "color" in e)
    colours = dict(zip(scale["domain"], scale["range"], strict=True))
    assert colours["raised"] == charts.RAISED and colours["suppressed"] == charts.SUPPRESSED
    for word in charts.DIRECTIONS.values():
        assert contrast(word, "#ffffff") >= 2.9 and contrast(word, "#11151c") >= 2.9
    red, blue = ([int(c[i:i + 2], 16) for i in (1, 3, 5)] for c in (charts.RAISED, charts.SUPPRESSED))
    assert red[2] + 100 < blue[2]  # told apart by blue, which red-green blindness leaves alone


def contrast(a: str, b: str) -> float:
    """WCAG contrast ratio of two colours, 1 to 21."""
    def light(colour: str) -> float:
        parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(a), light(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_volcano_leaves_out_untested_features_and_rings_the_selected_one() -> None:
    spec = charts.volcano(directed(), alpha=0.05, selected=1).to_dict()
    drawn = [{r.get("feature") for r in part} for part in rows(spec)]
    assert {0, 1, 3, 4, 5} in drawn and {1} in drawn
    assert {1} not in [{r.get("feature") for r in part}
                       for part in rows(charts.volcano(directed(), alpha=0.05, selected=2).to_dict())]
    assert any(r.get("y") == pytest.approx(-np.log10(0.05)) for part in rows(spec) for r in part)


def test_a_click_gives_back_the_feature() -> None:
    for name in ("volcano", "prevalence", "raised", "suppressed"):
        (pick,) = [p for p in ALL[name]().to_dict()["params"] if p["name"] == charts.PICK]
        assert pick["select"]["type"] == "point" and pick["select"]["fields"] == ["feature"]


def test_thin_keeps_every_significant_feature_and_at_most_the_limit() -> None:
    table = directed(500)
    few = charts.thin(table, 50)
    assert few.height <= 50
    assert set(table.filter(pl.col("direction") != "not significant")["feature"]) <= set(few["feature"])
    assert few["feature"].max() > 400  # an even pick, not the first ones
    assert charts.thin(table, 500).equals(table)
    crowd = table.with_columns(direction=pl.lit("raised"))
    assert charts.thin(crowd, 50)["effect_size"].abs().min() >= table["effect_size"].abs().sort(descending=True)[49]


def test_bars_keep_the_given_order_and_share_an_axis() -> None:
    table = ranking().sort("effect_size")
    spec = charts.tail_bars(table, raised=False, limit=4).to_dict()
    assert spec["encoding"]["y"]["sort"] == [f"{f}: token {f}" for f in table["feature"]]
    assert spec["encoding"]["x"]["scale"]["domain"] == [-4, 0]
    assert charts.tail_bars(table, raised=True, limit=4).to_dict()["encoding"]["x"]["scale"]["domain"] == [0, 4]


def test_distribution_says_the_share_of_zeros_and_draws_the_median() -> None:
    spec = charts.distribution(values(), order=("bad", "good")).to_dict()
    labels = {r["label"] for part in rows(spec) for r in part}
    assert labels == {"bad | 4 responses | 50% at zero", "good | 2 responses | 0% at zero"}
    medians = {r["side"]: r["median"] for part in rows(spec) for r in part if "median" in r}
    assert medians == {"bad": 0.5, "good": 1.25}
    dots = next(part for part in rows(spec) if "jitter" in part[0])
    assert sorted(r["activation"] for r in dots) == sorted(values()["activation"])


def test_distribution_of_many_responses_keeps_the_extremes() -> None:
    many = pl.DataFrame({"side": ["bad"] * 5000 + ["good"], "activation": [*np.linspace(0, 9, 5000), 1.0]})
    dots = next(p for p in rows(charts.distribution(many, order=("bad", "good"), limit=100).to_dict()) if len(p) > 90)
    acts = [r["activation"] for r in dots if r["side"] == "bad"]
    assert len(acts) == 100 and min(acts) == 0 and max(acts) == 9


def test_cumulative_is_the_share_at_or_below() -> None:
    (part,) = rows(charts.cumulative(values(), order=("bad", "good")).to_dict())
    at = {(r["side"], r["activation"]): r["share"] for r in part}
    assert at[("bad", 0.0)] == 0.5 and at[("bad", 3.0)] == 1.0
    assert at[("good", 0.0)] == 0.0 and at[("good", 0.5)] == 0.5 and at[("good", 2.0)] == 1.0


def test_depth_leaves_out_layers_without_features() -> None:
    (part,) = rows(charts.depth_effects(depth()).to_dict())
    assert {r["layer"] for r in part} == {3}
    assert any(len(p) == 2 and {r["layer"] for r in p} == {3, 9} for p in rows(ALL["separation"]().to_dict()))
