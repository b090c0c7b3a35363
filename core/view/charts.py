"""Tables to Altair charts: pure functions, one chart each, with units on the axes and the same two hues everywhere.

Knows nothing of Streamlit, files or models. Backgrounds are transparent and no text colour is set, so that the page's
theme, light or dark, decides them. Orange means raised (or the target), blue means suppressed (or the reference):
a pair that stays apart in the common forms of colour blindness.
"""

from __future__ import annotations

import altair as alt
import numpy as np
import polars as pl

RAISED, SUPPRESSED, NEUTRAL = "#d9772b", "#3f82c4", "#8b919b"

#: What a point of a ranking is called, in legend order, and its colour.
DIRECTIONS = {"raised": RAISED, "suppressed": SUPPRESSED, "not significant": NEUTRAL}

#: A ranking chart draws every significant feature and as many others as fit; more only slow the browser down.
MAX_POINTS = 4000

#: Name of the click selection in every chart that has one; its field is `feature`.
PICK = "pick"

_Q_FLOOR = 1e-300  # keeps -log10 q finite where a p-value underflows
#: Options of axes and legends, alike in every chart.
AXIS = {"titleFontWeight": "normal", "labelOverlap": True, "tickCount": 8}
PLAIN = {**AXIS, "format": "~r"}
LEGEND = {"orient": "top", "title": None, "labelLimit": 260, "symbolOpacity": 1}


def with_direction(table: pl.DataFrame, alpha: float) -> pl.DataFrame:
    """Add `direction` (raised, suppressed, not significant at q < alpha), `minus_log10_q` and `prevalence`.

    `prevalence` is the share of all responses, both sides together, on which the feature is active.
    """
    n = pl.col("n_target") + pl.col("n_reference")
    active = pl.col("frac_active_target") * pl.col("n_target") + pl.col("frac_active_reference") * pl.col("n_reference")
    significant = (pl.col("q_value") < alpha).fill_null(False)
    return table.with_columns(
        pl.when(significant & (pl.col("effect_size") > 0)).then(pl.lit("raised"))
        .when(significant & (pl.col("effect_size") < 0)).then(pl.lit("suppressed"))
        .otherwise(pl.lit("not significant")).alias("direction"),
        (-pl.col("q_value").clip(_Q_FLOOR, 1.0).log10()).abs().alias("minus_log10_q"),
        (active / n).alias("prevalence"),
    )


def thin(table: pl.DataFrame, limit: int = MAX_POINTS) -> pl.DataFrame:
    """At most `limit` rows: every significant one first (strongest first), then an even pick of the others."""
    if table.height <= limit:
        return table
    telling = table.filter(pl.col("direction") != "not significant")
    telling = telling.sort(pl.col("effect_size").abs(), descending=True).head(limit)
    rest = table.filter(pl.col("direction") == "not significant").sort("feature")
    room = limit - telling.height
    keep = np.unique(np.linspace(0, rest.height - 1, room).astype(int)) if room and rest.height else []
    return pl.concat([telling, rest[list(keep)]]) if len(keep) else telling


def volcano(table: pl.DataFrame, *, alpha: float, selected: int | None = None) -> alt.LayerChart:
    """Effect size against -log10 q, one point a feature. `table` has `with_direction`'s columns and `name`."""
    points = table.filter(pl.col("q_value").is_not_null() & pl.col("effect_size").is_not_null())
    line = alt.Chart(pl.DataFrame({"y": [-np.log10(alpha)]})).mark_rule(strokeDash=[4, 4], color=NEUTRAL).encode(
        y=alt.Y("y:Q"), tooltip=alt.value(f"q = {alpha:g}: features above this line pass")
    )
    y = alt.Y("minus_log10_q:Q", title="Confidence: -log10 q", axis=alt.Axis(**PLAIN))
    return _scatter(points, alt.X("effect_size:Q", title="Effect size (raised to the right)", axis=alt.Axis(**PLAIN)),
                    y, selected, line, "Effect size against confidence")


def effect_prevalence(table: pl.DataFrame, *, selected: int | None = None) -> alt.LayerChart:
    """Share of responses with the feature active against effect size. `table` as for `volcano`."""
    points = table.filter(pl.col("effect_size").is_not_null())
    line = alt.Chart(pl.DataFrame({"y": [0.0]})).mark_rule(color=NEUTRAL, opacity=0.6).encode(y="y:Q")
    x = alt.X("prevalence:Q", title="Share of responses with the feature active",
              axis=alt.Axis(format="%", **AXIS), scale=alt.Scale(domain=[0, 1]))
    y = alt.Y("effect_size:Q", title="Effect size (raised above 0)", axis=alt.Axis(**PLAIN))
    return _scatter(points, x, y, selected, line, "Effect size against prevalence")


def _scatter(points, x, y, selected, line, description) -> alt.LayerChart:
    points = points.select(
        "feature", "name", "direction", "effect_size", "minus_log10_q", "prevalence", "q_value",
        "frac_active_target", "frac_active_reference",
    )
    pick = alt.selection_point(name=PICK, fields=["feature"], nearest=False, empty=True)
    dots = (
        alt.Chart(points)
        .mark_circle(size=42, cursor="pointer")
        .encode(
            x=x, y=y, color=_direction_colour(points),
            opacity=alt.condition("datum.direction == 'not significant'", alt.value(0.35), alt.value(0.8)),
            tooltip=FEATURE_TOOLTIP,
        )
        .add_params(pick)
    )
    layers = [line, dots]
    if selected is not None and points.filter(pl.col("feature") == selected).height:
        one = alt.Chart(points.filter(pl.col("feature") == selected)).encode(x=x, y=y, tooltip=FEATURE_TOOLTIP)
        layers.append(one.mark_point(size=190, strokeWidth=2.5, filled=False, color=NEUTRAL))
    return finish(alt.layer(*layers), 380, description)


FEATURE_TOOLTIP = [
    alt.Tooltip("feature:Q", title="Feature", format="d"),
    alt.Tooltip("name:N", title="Fires on"),
    alt.Tooltip("effect_size:Q", title="Effect size", format="+.2f"),
    alt.Tooltip("q_value:Q", title="q", format=".2g"),
    alt.Tooltip("frac_active_target:Q", title="Active in target", format=".0%"),
    alt.Tooltip("frac_active_reference:Q", title="Active in reference", format=".0%"),
]


def _direction_colour(points: pl.DataFrame) -> alt.Color:
    names = [d for d in DIRECTIONS if d in set(points["direction"].to_list())] or list(DIRECTIONS)
    scale = alt.Scale(domain=names, range=[DIRECTIONS[d] for d in names])
    return alt.Color("direction:N", scale=scale, legend=alt.Legend(**LEGEND))


def tail_bars(table: pl.DataFrame, *, raised: bool, limit: float | None = None) -> alt.Chart:
    """One tail of the ranking as horizontal bars, strongest on top. `limit` is the largest |effect size| of the axis.

    `table` has `feature`, `name`, `effect_size`, `q_value` and both `frac_active_*`, in the order to be drawn.
    """
    rows = table.select("feature", "name", "effect_size", "q_value", "frac_active_target", "frac_active_reference")
    rows = rows.with_columns((pl.col("feature").cast(pl.String) + ": " + pl.col("name")).alias("bar"))
    limit = limit or float(rows["effect_size"].abs().max() or 1.0)
    domain = [0, limit] if raised else [-limit, 0]
    word = "raised" if raised else "suppressed"
    pick = alt.selection_point(name=PICK, fields=["feature"], empty=True)
    chart = (
        alt.Chart(rows)
        .mark_bar(color=RAISED if raised else SUPPRESSED, cornerRadiusEnd=2, cursor="pointer")
        .encode(
            x=alt.X("effect_size:Q", title="Effect size", scale=alt.Scale(domain=domain), axis=alt.Axis(**PLAIN)),
            y=alt.Y("bar:N", title=None, sort=rows["bar"].to_list(),
                    axis=alt.Axis(labelLimit=190, labelOverlap=False, ticks=False, domain=False,
                                  orient="left" if raised else "right")),
            tooltip=FEATURE_TOOLTIP,
        )
        .add_params(pick)
    )
    return finish(chart, max(60, 26 * rows.height + 40), f"Most {word} features by effect size")


def distribution(values: pl.DataFrame, *, order: tuple[str, str], limit: int = 1500) -> alt.LayerChart:
    """Activation of one feature on every response, a dot each, by side, with the median as a bar.

    `values` has `side` (one of `order`: target, reference) and `activation` (>= 0). The side's label says how many
    responses it has and what share of them is exactly 0, where dots lie on top of each other.
    """
    parts, marks = [], []
    for side in order:
        acts = values.filter(pl.col("side") == side)["activation"].to_numpy()
        label = side_label(side, acts)
        shown = acts if len(acts) <= limit else np.sort(acts)[np.linspace(0, len(acts) - 1, limit).astype(int)]
        jitter = (np.arange(len(shown)) * 0.6180339887) % 1  # even and the same on every run
        parts.append(pl.DataFrame({"side": side, "label": label, "activation": shown, "jitter": jitter}))
        middle = (float(np.median(acts)), float(np.mean(acts))) if len(acts) else (None, None)
        marks.append({"side": side, "label": label, "median": middle[0], "mean": middle[1]})
    dots, middle = pl.concat(parts), pl.DataFrame(marks)
    labels = middle["label"].to_list()
    y = alt.Y("label:N", title=None, sort=labels,
              axis=alt.Axis(labelLimit=200, labelExpr="split(datum.label, ' | ')", ticks=False, domain=False))
    colour = alt.Color("side:N", scale=alt.Scale(domain=list(order), range=[RAISED, SUPPRESSED]), legend=None)
    x = alt.X("activation:Q", title="Activation on one response", axis=alt.Axis(**PLAIN), scale=alt.Scale(domainMin=0))
    strip = alt.Chart(dots).mark_circle(size=22, opacity=0.45).encode(
        x=x, y=y, color=colour, yOffset=alt.YOffset("jitter:Q", scale=alt.Scale(domain=[-0.35, 1.35])),
        tooltip=[alt.Tooltip("side:N", title="Side"), alt.Tooltip("activation:Q", title="Activation", format=".3g")],
    )
    bars = alt.Chart(middle.filter(pl.col("median").is_not_null())).mark_tick(thickness=3, size=56).encode(
        x="median:Q", y=y, color=colour,
        tooltip=[alt.Tooltip("side:N", title="Side"), alt.Tooltip("median:Q", title="Median", format=".3g"),
                 alt.Tooltip("mean:Q", title="Mean", format=".3g")],
    )
    return finish(alt.layer(strip, bars), 210, "Activation of the feature on each response, by side")


def side_label(side: str, acts: np.ndarray) -> str:
    """`misaligned | 320 responses | 41% at zero`; the bar stands for a line break in charts."""
    zero = f"{np.mean(acts == 0):.0%} at zero" if len(acts) else "none"
    return f"{side} | {len(acts):,} responses | {zero}"


def cumulative(values: pl.DataFrame, *, order: tuple[str, str]) -> alt.Chart:
    """Share of responses at or below each activation, a step line a side. `values` as for `distribution`."""
    parts = []
    for side in order:
        acts = np.sort(values.filter(pl.col("side") == side)["activation"].to_numpy())
        if not len(acts):
            continue
        level, last = np.unique(acts, return_index=False, return_counts=True)
        share = np.cumsum(last) / len(acts)
        if level[0] > 0:
            level, share = np.insert(level, 0, 0.0), np.insert(share, 0, 0.0)
        parts.append(pl.DataFrame({"side": side, "activation": level.astype(float), "share": share}))
    rows = pl.concat(parts) if parts else pl.DataFrame(schema={"side": pl.String, "activation": pl.Float64,
                                                               "share": pl.Float64})
    chart = alt.Chart(rows).mark_line(interpolate="step-after", strokeWidth=2).encode(
        x=alt.X("activation:Q", title="Activation on one response", axis=alt.Axis(**PLAIN)),
        y=alt.Y("share:Q", title="Share of responses at or below", axis=alt.Axis(format="%", **AXIS),
                scale=alt.Scale(domain=[0, 1])),
        color=alt.Color("side:N", scale=alt.Scale(domain=list(order), range=[RAISED, SUPPRESSED]),
                        legend=alt.Legend(**LEGEND)),
        strokeDash=alt.StrokeDash("side:N", scale=alt.Scale(domain=list(order), range=[[1, 0], [6, 3]]), legend=None),
        tooltip=[alt.Tooltip("side:N", title="Side"), alt.Tooltip("activation:Q", title="Activation", format=".3g"),
                 alt.Tooltip("share:Q", title="At or below", format=".1%")],
    )
    return finish(chart, 240, "Cumulative share of responses by activation")


#: Pixels, legend and axis included: the three depth charts stand beside each other.
DEPTH_HEIGHT = 330


def depth_counts(depth: pl.DataFrame) -> alt.Chart:
    """Significant features a layer: `depth` has `layer`, `n_raised`, `n_suppressed`."""
    rows = depth.select("layer", raised="n_raised", suppressed="n_suppressed").unpivot(
        index="layer", variable_name="direction", value_name="n"
    )
    chart = alt.Chart(rows).mark_bar().encode(
        x=layer_axis(), xOffset="direction:N", color=_direction_colour(rows),
        y=alt.Y("n:Q", title="Features", axis=alt.Axis(format="d", tickMinStep=1, **AXIS)),
        tooltip=[alt.Tooltip("layer:O", title="Layer"), alt.Tooltip("direction:N", title="Direction"),
                 alt.Tooltip("n:Q", title="Features", format=",d")],
    )
    return finish(chart, DEPTH_HEIGHT, "Number of significant features by layer")


def depth_effects(depth: pl.DataFrame) -> alt.Chart:
    """Largest |effect size| a layer: `depth` has `layer`, `max_raised`, `max_suppressed` (both as magnitudes)."""
    rows = depth.select("layer", raised="max_raised", suppressed="max_suppressed").unpivot(
        index="layer", variable_name="direction", value_name="effect"
    ).drop_nulls()
    chart = alt.Chart(rows).mark_line(point=alt.OverlayMarkDef(size=55), strokeWidth=2).encode(
        x=layer_axis(), color=_direction_colour(rows),
        y=alt.Y("effect:Q", title="Effect size (magnitude)", axis=alt.Axis(**PLAIN)),
        tooltip=[alt.Tooltip("layer:O", title="Layer"), alt.Tooltip("direction:N", title="Direction"),
                 alt.Tooltip("effect:Q", title="Effect size (magnitude)", format=".2f")],
    )
    return finish(chart, DEPTH_HEIGHT, "Largest effect size by layer")


def depth_separation(depth: pl.DataFrame) -> alt.LayerChart:
    """Held-out AUROC of the residual mean difference a layer: `depth` has `layer`, `resid_auroc`."""
    rows = depth.select("layer", "resid_auroc").drop_nulls()
    line = alt.Chart(rows).mark_line(point=alt.OverlayMarkDef(size=55, color=NEUTRAL), color=NEUTRAL).encode(
        x=layer_axis(),
        y=alt.Y("resid_auroc:Q", title="Held-out AUROC", axis=alt.Axis(**PLAIN),
                scale=alt.Scale(domain=[0.4, 1], zero=False)),
        tooltip=[alt.Tooltip("layer:O", title="Layer"),
                 alt.Tooltip("resid_auroc:Q", title="Held-out AUROC", format=".3f")],
    )
    chance = alt.Chart(pl.DataFrame({"y": [0.5]})).mark_rule(strokeDash=[4, 4], color=NEUTRAL).encode(
        y="y:Q", tooltip=alt.value("0.5: no better than a coin")
    )
    return finish(alt.layer(chance, line), DEPTH_HEIGHT, "Held-out AUROC of the residual mean difference by layer")


def layer_axis() -> alt.X:
    """The layers, one beside the other."""
    return alt.X("layer:O", title="Layer", axis=alt.Axis(labelAngle=0, titleFontWeight="normal"))


def finish(chart, height: int, description: str):
    """What every chart has: a height in pixels, the page's background, words for a screen reader."""
    return chart.properties(height=height, background="transparent", description=description)
