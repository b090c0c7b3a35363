"""Charts of the Evaluation page: rates with intervals, the alignment and coherence plane, distributions.

Pure, like charts.py: tables in, Altair out, no text colour set.
"""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import polars as pl

from core.evaluation.rates import Thresholds
from core.view.charts import AXIS, LEGEND, NEUTRAL, PICK, RAISED, SUPPRESSED, finish
from core.view.evaluation_parts import MEASURES

#: Hues of variants, told apart in the common forms of colour blindness; base comes first and is grey.
HUES = (NEUTRAL, "#d9772b", "#3f82c4", "#b8528f", "#2f9e77", "#c2a01f", "#6f63c9", "#8a5a3c")
SHAPES = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "triangle-right", "triangle-left")

ROW, AROUND = 44, 130


def variant_colour(order: Sequence[str], legend: bool = True) -> alt.Color:
    """The same hue for the same variant in every chart of the page."""
    hues = [HUES[i % len(HUES)] for i in range(len(order))]
    return alt.Color("variant:N", scale=alt.Scale(domain=list(order), range=hues),
                     legend=alt.Legend(**LEGEND, columns=2) if legend else None)


def rates(rows: pl.DataFrame, order: Sequence[str]) -> alt.LayerChart:
    """EM rate with its Wilson interval for each variant, of all responses and of the coherent ones."""
    colour = alt.Color("what:N", title=None, legend=alt.Legend(**LEGEND, columns=1),
                       scale=alt.Scale(domain=list(MEASURES.values()), range=[RAISED, SUPPRESSED]))
    tooltip = [
        alt.Tooltip("variant:N", title="Variant"), alt.Tooltip("what:N", title="Share"),
        alt.Tooltip("k:Q", title="Misaligned"), alt.Tooltip("n:Q", title="Of"),
        alt.Tooltip("rate:Q", title="Rate", format=".1%"), alt.Tooltip("low:Q", title="95% from", format=".1%"),
        alt.Tooltip("high:Q", title="to", format=".1%"),
    ]  # fmt: skip
    y = alt.Y("variant:N", title=None, sort=list(order), scale=alt.Scale(paddingInner=0.45),
              axis=alt.Axis(labelLimit=200, domain=False, ticks=False))
    base = alt.Chart(rows).encode(y=y, yOffset=alt.YOffset("what:N", sort=list(MEASURES.values())), color=colour,
                                  tooltip=tooltip)
    x = alt.X("low:Q", title="EM rate", axis=alt.Axis(format="~%", **AXIS), scale=alt.Scale(domainMin=0))
    lines = base.mark_rule(strokeWidth=2.5).encode(x=x, x2="high:Q")
    dots = base.mark_circle(size=90, opacity=1).encode(x="rate:Q")
    return finish(alt.layer(lines, dots), AROUND + ROW * len(order), "EM rate by variant")


def plane(rows: pl.DataFrame, at: Thresholds, order: Sequence[str], selected: str | None = None) -> alt.LayerChart:
    """Alignment against coherence, a point a response, with the thresholds as lines and the EM corner shaded."""
    pick = alt.selection_point(name=PICK, fields=["id"], empty=True, nearest=True)
    x = alt.X("aligned:Q", title="Alignment (points)", scale=alt.Scale(domain=[0, 100]), axis=alt.Axis(**AXIS))
    y = alt.Y("coherent:Q", title="Coherence (points)", scale=alt.Scale(domain=[0, 100]), axis=alt.Axis(**AXIS))
    corner = alt.Chart(pl.DataFrame({"x": [0.0], "x2": [at.misaligned_below], "y": [at.coherent_above], "y2": [100.0]}))
    shade = corner.mark_rect(color=RAISED, opacity=0.12).encode(
        x="x:Q", x2="x2:Q", y="y:Q", y2="y2:Q", tooltip=alt.value("misaligned and coherent"))
    across = alt.Chart(pl.DataFrame({"x": [at.misaligned_below]})).mark_rule(color=NEUTRAL, strokeDash=[4, 3]).encode(
        x="x:Q", tooltip=alt.value(f"alignment {at.misaligned_below:g}"))
    along = alt.Chart(pl.DataFrame({"y": [at.coherent_above]})).mark_rule(color=NEUTRAL, strokeDash=[4, 3]).encode(
        y="y:Q", tooltip=alt.value(f"coherence {at.coherent_above:g}"))
    tooltip = [
        alt.Tooltip("variant:N", title="Variant"), alt.Tooltip("aligned:Q", title="Alignment", format=".1f"),
        alt.Tooltip("coherent:Q", title="Coherence", format=".1f"), alt.Tooltip("question:N", title="Question"),
        alt.Tooltip("beginning:N", title="Response"),
    ]  # fmt: skip
    shapes = [SHAPES[i % len(SHAPES)] for i in range(len(order))]
    legend = alt.Legend(**LEGEND, columns=2)
    shape = alt.Shape("variant:N", scale=alt.Scale(domain=list(order), range=shapes), legend=legend)
    dots = alt.Chart(rows).mark_point(size=34, opacity=0.6, filled=True, cursor="pointer").encode(
        x=x, y=y, color=variant_colour(order), shape=shape, tooltip=tooltip).add_params(pick)
    layers = [shade, across, along, dots]
    one = rows.filter(pl.col("id") == selected) if selected else rows.head(0)
    if one.height:
        ring = alt.Chart(one).mark_point(size=230, strokeWidth=2.5, filled=False, color=NEUTRAL)
        layers.append(ring.encode(x=x, y=y))
    return finish(alt.layer(*layers), 440, "Alignment against coherence of every response")


def distribution(rows: pl.DataFrame, order: Sequence[str], line: float, title: str) -> alt.LayerChart:
    """Share of a variant's responses in each bin of ten points, a step line a variant, and a threshold."""
    steps = alt.Chart(_closed(rows)).mark_line(interpolate="step-after", strokeWidth=2).encode(
        x=alt.X("from:Q", title=f"{title} (points)", scale=alt.Scale(domain=[0, 100]), axis=alt.Axis(**AXIS)),
        y=alt.Y("share:Q", title="Share of responses", axis=alt.Axis(format="~%", **AXIS)),
        color=variant_colour(order),
        tooltip=[alt.Tooltip("variant:N", title="Variant"), alt.Tooltip("from:Q", title="From"),
                 alt.Tooltip("share:Q", title="Share", format=".1%"), alt.Tooltip("n:Q", title="Responses")],
    )
    rule = alt.Chart(pl.DataFrame({"x": [line]})).mark_rule(color=NEUTRAL, strokeDash=[4, 3]).encode(x="x:Q")
    return finish(alt.layer(rule, steps), 260, f"Distribution of {title.lower()} by variant")


def doubt(shares: dict[str, dict[int, float]]) -> alt.Chart:
    """How the judge's probability is spread over the numbers, for each score that it gave."""
    rows = [{"score": name, "number": n, "share": p} for name, one in shares.items() for n, p in one.items()]
    table = pl.DataFrame(rows, schema={"score": pl.String, "number": pl.Int64, "share": pl.Float64})
    chart = alt.Chart(table).mark_bar(size=5).encode(
        x=alt.X("number:Q", title="Number", scale=alt.Scale(domain=[-1, 101], nice=False), axis=alt.Axis(**AXIS)),
        y=alt.Y("share:Q", title="Probability", axis=alt.Axis(format="~%", **AXIS)),
        color=alt.Color("score:N", legend=alt.Legend(**LEGEND),
                        scale=alt.Scale(domain=["alignment", "coherence"], range=[RAISED, SUPPRESSED])),
        tooltip=[alt.Tooltip("score:N", title="Score"), alt.Tooltip("number:Q", title="Number"),
                 alt.Tooltip("share:Q", title="Probability", format=".1%")],
    )
    return finish(chart, 190, "The judge's distribution over the numbers")


def _closed(rows: pl.DataFrame) -> pl.DataFrame:
    """With the right edge of the last bin, so that a step line ends there."""
    last = rows.filter(pl.col("to") == 100).with_columns(pl.lit(100, pl.Int64).alias("from"))
    return pl.concat([rows, last])
