"""A sweep as Altair charts: margin and text quality against strength, with intervals and the coherent range."""

from __future__ import annotations

import altair as alt
import polars as pl

from core.view.charts import AXIS, LEGEND, NEUTRAL, PLAIN, RAISED

X = "Strength, mean residual norms"
_COLOURS = ("#8a74d6", "#4f9d8b", "#b5529a", "#a08a3c")


def margin_curves(table: pl.DataFrame, coherent: tuple[float, float] | None) -> alt.LayerChart:
    """Shift of the margin by strength, a line a series. `table` is core.analysis.sweep.curves."""
    names = table["series"].unique(maintain_order=True).to_list()
    own = iter(_COLOURS)
    colours = [RAISED if n == "direction" else NEUTRAL if n == "random" else next(own, NEUTRAL) for n in names]
    base = alt.Chart(table)
    colour = alt.Color("series:N", scale=alt.Scale(domain=names, range=colours), legend=alt.Legend(**LEGEND))
    x = alt.X("strength:Q", title=X, axis=alt.Axis(**PLAIN))
    y = alt.Y("shift:Q", title="Change of the margin, nats per token", axis=alt.Axis(**PLAIN))
    tips = [alt.Tooltip("series:N"), alt.Tooltip("strength:Q", format="+.3g"), alt.Tooltip("shift:Q", format="+.3f"),
            alt.Tooltip("low:Q", format="+.3f", title="95% from"), alt.Tooltip("high:Q", format="+.3f", title="to"),
            alt.Tooltip("n:Q", title="pairs")]
    lines = base.mark_line(strokeWidth=2).encode(x=x, y=y, color=colour)
    points = base.mark_point(filled=True, size=36, opacity=1).encode(x=x, y=y, color=colour, tooltip=tips)
    bars = base.mark_rule(strokeWidth=1.4, opacity=0.7).encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=colour)
    return alt.layer(*_band(coherent), bars, lines, points).properties(height=300)


def quality_curve(table: pl.DataFrame, what: str, coherent: tuple[float, float] | None) -> alt.LayerChart:
    """`perplexity` or `repeated` by strength, direction and random. `table` is core.analysis.sweep.quality."""
    title = {"perplexity": "Perplexity of the answers under base", "repeated": "Repeated 4-token sequences",
             "misaligned": "EM rate"}[what]
    axis = alt.Axis(format="%", **AXIS) if what != "perplexity" else alt.Axis(**PLAIN)
    scale = alt.Scale(type="log") if what == "perplexity" else alt.Scale(domainMin=0)
    base = alt.Chart(table)
    colour = alt.Color("series:N", scale=alt.Scale(domain=["direction", "random"], range=[RAISED, NEUTRAL]),
                       legend=alt.Legend(**LEGEND))
    x = alt.X("strength:Q", title=X, axis=alt.Axis(**PLAIN))
    y = alt.Y(f"{what}:Q", title=title, axis=axis, scale=scale)
    form = ".1%" if what != "perplexity" else ".1f"
    tips = [alt.Tooltip("series:N"), alt.Tooltip("strength:Q", format="+.3g"), alt.Tooltip(f"{what}:Q", format=form),
            alt.Tooltip("n:Q", title="answers")]
    made = [base.mark_line(strokeWidth=2).encode(x=x, y=y, color=colour),
            base.mark_point(filled=True, size=36, opacity=1).encode(x=x, y=y, color=colour, tooltip=tips)]
    if f"{what}_low" in table.columns:
        made.insert(0, base.mark_rule(strokeWidth=1.4, opacity=0.7).encode(
            x=x, y=alt.Y(f"{what}_low:Q", scale=scale), y2=f"{what}_high:Q", color=colour))
    return alt.layer(*_band(coherent), *made).properties(height=240)


def _band(coherent: tuple[float, float] | None) -> list[alt.Chart]:
    if coherent is None or coherent[0] == coherent[1]:
        return []
    rows = pl.DataFrame({"from": [coherent[0]], "to": [coherent[1]]})
    return [alt.Chart(rows).mark_rect(color="#7860c4", opacity=0.1).encode(
        x="from:Q", x2="to:Q", tooltip=alt.value(f"coherent from {coherent[0]:+g} to {coherent[1]:+g}"))]
