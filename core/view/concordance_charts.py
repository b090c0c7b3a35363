"""Charts of a concordance: two contrasts against each other, overlap by k, agreement by depth.

Pure, like charts.py: tables in, Altair out, no text colour set. Four hues tell what a feature is moved in, and a shape
says the same again; they are others than the orange and blue that mean raised and suppressed elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import altair as alt
import numpy as np
import polars as pl

from core.analysis.concordance import Concordance, quadrant
from core.analysis.concordance_report import Words
from core.analysis.ends import Overlap, Tail
from core.view.charts import AXIS, LEGEND, MAX_POINTS, NEUTRAL, PICK, PLAIN, finish, layer_axis

SHARED, FIRST, SECOND, OPPOSED = "#8f62d0", "#14927f", "#b07d12", "#d0458b"

#: Legend entries longer than this stand one to a line.
SHORT = 16
#: Legend entries a line: a phone holds three short ones.
LEGEND_COLUMNS = 3


def scatter_points(found: Concordance, pair: tuple[str, str], words: Mapping[str, Words]) -> pl.DataFrame:
    """One row a feature: feature, name, x and y (effect sizes), q_x, q_y, quadrant in words, of one pair.

    At most MAX_POINTS rows: those moved in either first, the strongest first, then an even pick of the others.
    """
    a, b = pair
    table = found.table
    short = {name: words[name].short for name in pair}
    moved = quadrant({short[name]: table[f"direction_{name}"].to_numpy() for name in pair})
    points = table.select(
        "feature", *(["name"] if "name" in table.columns else [pl.lit("").alias("name")]),
        x=f"effect_{a}", y=f"effect_{b}", q_x=f"q_{a}", q_y=f"q_{b}",
    ).with_columns(pl.Series("quadrant", moved, dtype=pl.String))
    if points.height <= MAX_POINTS:
        return points
    strength = pl.max_horizontal(pl.col("x").abs(), pl.col("y").abs())
    telling = points.filter(pl.col("quadrant") != "neither").sort(strength, descending=True).head(MAX_POINTS)
    rest = points.filter(pl.col("quadrant") == "neither").sort("feature")
    room = min(MAX_POINTS - telling.height, rest.height)
    keep = np.unique(np.linspace(0, rest.height - 1, room).astype(int)).tolist() if room else []
    return pl.concat([telling, rest[keep]])


def scatter(
    points: pl.DataFrame, pair: tuple[str, str], words: Mapping[str, Words], *, selected: int | None = None
) -> alt.LayerChart:
    """Effect size in one contrast against effect size in the other; `points` as `scatter_points` makes them."""
    a, b = (words[name].short for name in pair)
    colours = {"shared": SHARED, f"{a} only": FIRST, f"{b} only": SECOND, "opposed": OPPOSED, "neither": NEUTRAL}
    shapes = {"shared": "diamond", f"{a} only": "triangle-right", f"{b} only": "triangle-up", "opposed": "cross",
              "neither": "circle"}
    there = set(points["quadrant"].to_list())
    names = [name for name in colours if name in there] or list(colours)
    legend = alt.Legend(**LEGEND, columns=LEGEND_COLUMNS if max(map(len, names)) <= SHORT else 1)
    x = alt.X("x:Q", title=_axis(a), axis=alt.Axis(titleLimit=300, **PLAIN))
    y = alt.Y("y:Q", title=_axis(b), axis=alt.Axis(titleLimit=300, **PLAIN))
    tooltip = [
        alt.Tooltip("feature:Q", title="Feature", format="d"),
        alt.Tooltip("name:N", title="Fires on"),
        alt.Tooltip("quadrant:N", title="Moved in"),
        alt.Tooltip("x:Q", title=f"Effect, {a}", format="+.2f"),
        alt.Tooltip("q_x:Q", title=f"q, {a}", format=".2g"),
        alt.Tooltip("y:Q", title=f"Effect, {b}", format="+.2f"),
        alt.Tooltip("q_y:Q", title=f"q, {b}", format=".2g"),
    ]
    pick = alt.selection_point(name=PICK, fields=["feature"], nearest=False, empty=True)
    dots = (
        alt.Chart(points)
        .mark_point(filled=True, size=56, strokeWidth=0, cursor="pointer")
        .encode(
            x=x, y=y, tooltip=tooltip,
            color=alt.Color("quadrant:N", legend=legend,
                            scale=alt.Scale(domain=names, range=[colours[n] for n in names])),
            shape=alt.Shape("quadrant:N", legend=legend,
                            scale=alt.Scale(domain=names, range=[shapes[n] for n in names])),
            opacity=alt.condition("datum.quadrant == 'neither'", alt.value(0.3), alt.value(0.8)),
        )
        .add_params(pick)
    )
    zero = pl.DataFrame({"zero": [0.0]})
    said = alt.value("0: no difference")
    layers = [
        alt.Chart(zero).mark_rule(color=NEUTRAL, opacity=0.6).encode(x="zero:Q", tooltip=said),
        alt.Chart(zero).mark_rule(color=NEUTRAL, opacity=0.6).encode(y="zero:Q", tooltip=said),
        dots, *_corners(),
    ]
    one = points.filter(pl.col("feature") == selected) if selected is not None else points.clear()
    if one.height:
        mark = alt.Chart(one).mark_point(size=230, strokeWidth=2.5, filled=False, color=NEUTRAL, shape="circle")
        layers.append(mark.encode(x=x, y=y, tooltip=tooltip))
    return finish(alt.layer(*layers), 430, "Effect sizes of two contrasts against each other")


def _corners() -> list[alt.Chart]:
    """What each quarter of the plane means, in its corner."""
    found = []
    for text, right, top in (("raised in both", True, True), ("suppressed in both", False, False),
                             ("opposed", True, False), ("opposed", False, True)):
        found.append(
            alt.Chart(pl.DataFrame({"text": [text]}))
            .mark_text(align="right" if right else "left", baseline="top" if top else "bottom", color=NEUTRAL,
                       fontStyle="italic", dx=-5 if right else 5, dy=4 if top else -4)
            .encode(x=alt.value("width" if right else 0), y=alt.value(0 if top else "height"), text="text:N",
                    tooltip=alt.value(None))
        )
    return found


def _axis(short: str) -> str:
    return f"Effect size: {short}"


def overlap_curve(found: Overlap) -> alt.LayerChart:
    """Features in every top k as k grows: observed, the stricter chance with its range, and the benign controls'."""
    rows, lines = [], []
    for at in found.at:
        low, high = at.stricter.ci95
        rows.append({"k": at.k, "low": low, "high": high, "expected": at.stricter.expected, "observed": at.observed})
        lines += [{"k": at.k, "n": float(at.observed), "line": "shared"},
                  {"k": at.k, "n": at.stricter.expected, "line": "chance"}]
        if at.controls:
            # the control of the last contrast named stands in for it, as in the sentence
            stand_in = at.controls.get(found.names[-1], next(iter(at.controls.values())))
            lines.append({"k": at.k, "n": float(stand_in), "line": "benign control"})
    table, drawn = pl.DataFrame(rows), pl.DataFrame(lines)
    hues = {"shared": SHARED, "benign control": FIRST, "chance": NEUTRAL}
    names = [name for name in hues if name in drawn["line"].to_list()]
    x = alt.X("k:Q", title="Features taken from the end (k)", axis=alt.Axis(format="d", **AXIS))
    y = alt.Y("n:Q", title="Features in every top k", axis=alt.Axis(**PLAIN))
    band = alt.Chart(table).mark_area(color=NEUTRAL, opacity=0.25).encode(
        x=x, y=alt.Y("low:Q", title="Features in every top k"), y2="high:Q",
        tooltip=[alt.Tooltip("k:Q"), alt.Tooltip("low:Q", title="Chance, 2.5%", format=".0f"),
                 alt.Tooltip("high:Q", title="Chance, 97.5%", format=".0f")],
    )
    curves = alt.Chart(drawn).mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=36)).encode(
        x=x, y=y,
        color=alt.Color("line:N", scale=alt.Scale(domain=names, range=[hues[n] for n in names]),
                        legend=alt.Legend(symbolType="stroke", **LEGEND)),
        strokeDash=alt.StrokeDash("line:N", legend=None, scale=alt.Scale(
            domain=names, range=[{"shared": [1, 0], "benign control": [7, 3], "chance": [3, 3]}[n] for n in names])),
        tooltip=[alt.Tooltip("line:N", title="Line"), alt.Tooltip("k:Q"),
                 alt.Tooltip("n:Q", title="Features", format=".1f")],
    )
    return finish(alt.layer(band, curves), 340, "Overlap of the most moved features by k, against chance")


def depth_rows(layers: Sequence[Concordance], names: tuple[str, ...], tail: Tail) -> pl.DataFrame:
    """One row a layer: layer, rho (of the first two names), low and high (its interval), observed, expected,
    chance_low, chance_high at the settings' k."""
    rows = []
    for one in layers:
        rho, at = one.spearman(names[0], names[1]), one.overlap_of(names, tail).at_k(one.settings.k)
        chance = at.stricter
        rows.append({"layer": one.layer, "rho": rho.rho, "low": rho.ci95[0], "high": rho.ci95[1],
                     "observed": at.observed, "expected": chance.expected, "chance_low": chance.ci95[0],
                     "chance_high": chance.ci95[1]})
    return pl.DataFrame(rows, infer_schema_length=None).with_columns(pl.col("rho", "low", "high").fill_nan(None))


def depth_spearman(rows: pl.DataFrame) -> alt.LayerChart:
    """Rank correlation of the effect sizes by layer; `rows` as `depth_rows` makes them."""
    tooltip = [alt.Tooltip("layer:O", title="Layer"), alt.Tooltip("rho:Q", title="Spearman", format="+.2f"),
               alt.Tooltip("low:Q", title="95% from", format="+.2f"),
               alt.Tooltip("high:Q", title="to", format="+.2f")]
    title = "Spearman correlation"
    base = alt.Chart(rows.drop_nulls("rho")).encode(x=layer_axis(), tooltip=tooltip)
    line = base.mark_line(color=SHARED, strokeWidth=2, point=alt.OverlayMarkDef(size=60, color=SHARED)).encode(
        y=alt.Y("rho:Q", title=title, axis=alt.Axis(**PLAIN)))
    bars = base.mark_rule(color=SHARED, strokeWidth=2, opacity=0.5).encode(y=alt.Y("low:Q", title=title), y2="high:Q")
    zero = alt.Chart(pl.DataFrame({"y": [0.0]})).mark_rule(strokeDash=[4, 4], color=NEUTRAL).encode(
        y="y:Q", tooltip=alt.value("0: the ranks say nothing about each other"))
    return finish(alt.layer(zero, bars, line), 260, "Rank correlation of two contrasts by layer")


def depth_overlap(rows: pl.DataFrame, k: int) -> alt.LayerChart:
    """Features in every top k by layer, with the range of chance; `rows` as `depth_rows` makes them."""
    title = f"Shared of the top {k}"
    tooltip = [alt.Tooltip("layer:O", title="Layer"), alt.Tooltip("observed:Q", title="Shared"),
               alt.Tooltip("expected:Q", title="Chance", format=".1f"),
               alt.Tooltip("chance_low:Q", title="Chance from", format=".0f"),
               alt.Tooltip("chance_high:Q", title="to", format=".0f")]
    base = alt.Chart(rows).encode(x=layer_axis(), tooltip=tooltip)
    axis = alt.Axis(format="d", tickMinStep=1, **AXIS)
    chance = base.mark_rule(color=NEUTRAL, strokeWidth=14, opacity=0.3).encode(
        y=alt.Y("chance_low:Q", title=title, axis=axis), y2="chance_high:Q")
    mean = base.mark_tick(color=NEUTRAL, thickness=2, width=22).encode(y=alt.Y("expected:Q", title=title))
    line = base.mark_line(color=SHARED, strokeWidth=2, point=alt.OverlayMarkDef(size=60, color=SHARED)).encode(
        y=alt.Y("observed:Q", title=title))
    return finish(alt.layer(chance, mean, line), 260, "Shared features by layer, against chance")
