"""The chart of the Difference lens page: size of the difference by layer, one or two variants.

Pure, like charts.py: a table in, Altair out, no text colour set. Whatever lies behind a layer can be clicked, which is
easier to hit than a point on a narrow screen; fainter points are less reliable.
"""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import polars as pl

from core.view.charts import AXIS, LEGEND, NEUTRAL, PICK, RAISED, SUPPRESSED, finish

HEIGHT = 340

#: Names longer than this stand one to a line of the legend.
SHORT = 16

#: Opacity of a point whose split-half cosine is 0 (or has none), and of one at 1.
FAINT, FULL = 0.15, 1.0


def share_by_layer(rows: pl.DataFrame, variants: Sequence[str], *, layer: int) -> alt.LayerChart:
    """Norm of the mean difference as a share of base's residual norm, a line a variant (the first in orange, the
    second in blue and dashed), the chosen `layer` shaded. `rows` as `difference_parts.depth_rows` makes them.
    """
    x = alt.X("layer:O", title="Layer", axis=alt.Axis(labelAngle=0, titleFontWeight="normal", labelOverlap=True))
    scale = alt.Scale(domain=list(variants), range=[RAISED, SUPPRESSED][: len(variants)])
    legend = alt.Legend(**LEGEND, symbolStrokeWidth=0, columns=2 if max(map(len, variants)) <= SHORT else 1)
    colour = alt.Color("variant:N", scale=scale, legend=legend)
    dash = alt.StrokeDash("variant:N", legend=None,
                          scale=alt.Scale(domain=list(variants), range=[[1, 0], [6, 3]][: len(variants)]))
    y = alt.Y("share:Q", title="Share of the residual norm", axis=alt.Axis(format="~%", **AXIS),
              scale=alt.Scale(zero=True))
    drawn = rows.drop_nulls("share").with_columns(pl.col("split_half").fill_null(0.0).clip(0.0, 1.0))
    base = alt.Chart(drawn).encode(x=x, y=y, color=colour)
    line = base.mark_line(strokeWidth=2, opacity=0.55).encode(strokeDash=dash)
    points = base.mark_circle(size=70).encode(opacity=alt.Opacity(
        "split_half:Q", scale=alt.Scale(domain=[0, 1], range=[FAINT, FULL]), legend=None))
    wide, tooltip = _wide(rows, variants)
    here = alt.Chart(pl.DataFrame({"layer": [layer]})).mark_rect(color=NEUTRAL, opacity=0.22).encode(x=x)
    pick = alt.selection_point(name=PICK, fields=["layer"], empty=True)
    hit = alt.Chart(wide).mark_rect(opacity=0, cursor="pointer").encode(x=x, tooltip=tooltip).add_params(pick)
    return finish(alt.layer(here, line, points, hit), HEIGHT, "Size of the difference from base by layer")


def _wide(rows: pl.DataFrame, variants: Sequence[str]) -> tuple[pl.DataFrame, list[alt.Tooltip]]:
    """One row a layer with every variant's figures beside each other, and the tooltip that shows them."""
    wide = rows.select("layer").unique(maintain_order=True).sort("layer")
    tooltip = [alt.Tooltip("layer:O", title="Layer")]
    for i, name in enumerate(variants):
        of = rows.filter(pl.col("variant") == name)
        wide = wide.join(of.select("layer", **{f"share_{i}": "share", f"half_{i}": "split_half", f"n_{i}": "n"}),
                         on="layer", how="left", maintain_order="left")
        tooltip += [alt.Tooltip(f"share_{i}:Q", title=f"{name}: share", format=".1%"),
                    alt.Tooltip(f"half_{i}:Q", title=f"{name}: halves agree", format=".2f"),
                    alt.Tooltip(f"n_{i}:Q", title=f"{name}: texts", format=",d")]
    return wide, tooltip
