"""The chart of what the fine-tunes learnt: margins minus the base's, with their intervals.

Pure, like charts.py: a table in, Altair out, no text colour set.
"""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import polars as pl

from core.store.measures import PAIRS
from core.view.charts import AXIS, LEGEND, NEUTRAL, RAISED, SUPPRESSED, finish

#: Pixels that a variant takes, and that legend and axis take around them.
ROW, AROUND = 44, 130


def margins(rows: pl.DataFrame, variants: Sequence[str]) -> alt.LayerChart:
    """A dot and its 95% interval for each variant and set of pairs, the variants from top to bottom.

    rows: as `core.store.measures.read_margins` makes them. Right of zero, the fine-tune finds the misaligned answer
    likelier than the base does.
    """
    drawn = rows.with_columns(pl.col("pairs").replace_strict(PAIRS).alias("what"))
    colour = alt.Color("what:N", title=None, legend=alt.Legend(**LEGEND, columns=1),
                       scale=alt.Scale(domain=list(PAIRS.values()), range=[RAISED, SUPPRESSED]))
    y = alt.Y("variant:N", title=None, sort=list(variants), scale=alt.Scale(paddingInner=0.45),
              axis=alt.Axis(labelLimit=200, domain=False, ticks=False))
    offset = alt.YOffset("what:N", sort=list(PAIRS.values()))
    tooltip = [
        alt.Tooltip("variant:N", title="Variant"), alt.Tooltip("what:N", title="Pairs"),
        alt.Tooltip("mean:Q", title="Change of margin", format="+.3f"),
        alt.Tooltip("low:Q", title="95% from", format="+.3f"), alt.Tooltip("high:Q", title="95% to", format="+.3f"),
        alt.Tooltip("n:Q", title="Prompts"),
    ]  # fmt: skip
    base = alt.Chart(drawn).encode(y=y, yOffset=offset, color=colour, tooltip=tooltip)
    x = alt.X("low:Q", title="Change of margin (nats per token)", axis=alt.Axis(format="+.1f", **AXIS))
    lines = base.mark_rule(strokeWidth=2.5).encode(x=x, x2="high:Q")
    dots = base.mark_circle(size=90, opacity=1).encode(x="mean:Q")
    zero = alt.Chart(pl.DataFrame({"x": [0.0]})).mark_rule(color=NEUTRAL, strokeDash=[4, 3]).encode(x="x:Q")
    height = AROUND + ROW * rows["variant"].n_unique()
    return finish(alt.layer(zero, lines, dots), height, "Change of margin from base, by fine-tune")
