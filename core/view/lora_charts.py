"""Charts of the LoRA page: the map of an adapter, firing by group, predicted against measured, probes, write spaces.

Pure, like charts.py: tables in, Altair out, no text colour set. Shades are opacities of one hue, which read on a light
and on a dark page.
"""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import polars as pl

from core.view.charts import AXIS, LEGEND, NEUTRAL, PICK, PLAIN, RAISED, SUPPRESSED, finish
from core.view.lora_parts import COLOURS, KINDS

#: Hues of questions and modules where orange and blue would mean raised and suppressed.
HUES = ("#8f62d0", "#14927f", "#b07d12", "#d0458b", "#5d7a34")

_LAYERS = alt.X("layer:O", title="Layer", axis=alt.Axis(labelAngle=0, titleFontWeight="normal", labelOverlap=True,
                                                         domain=False, ticks=False))


def adapter_map(rows: pl.DataFrame, by: str, layer: int, kind: str) -> alt.LayerChart:
    """Layers x modules, the deeper the shade the larger the share; the chosen module outlined. A click picks a module.

    `rows` as `lora_parts.map_rows` makes them; `by` is one of `COLOURS`.
    """
    kinds = [k for k in KINDS if k in set(rows["kind"].to_list())]
    y = alt.Y("kind:N", title=None, sort=kinds, axis=alt.Axis(domain=False, ticks=False, labelLimit=120))
    legend = alt.Legend(**{**LEGEND, "title": COLOURS[by], "format": "~%", "symbolType": "square",
                           "titleFontWeight": "normal", "titleOrient": "left"})
    tooltip = [
        alt.Tooltip("layer:O", title="Layer"), alt.Tooltip("kind:N", title="Module"),
        alt.Tooltip("text_share:Q", title="Share on this text", format=".2%"),
        alt.Tooltip("share:Q", title="Share in the weights", format=".2%"),
        alt.Tooltip("relative:Q", title="Beside its output", format=".1%"),
        alt.Tooltip("n_components:Q", title="Components"),
        alt.Tooltip("effective_rank:Q", title="Effective rank", format=".1f"),
        alt.Tooltip("norm:Q", title="Norm", format=".3g"),
    ]  # fmt: skip
    pick = alt.selection_point(name=PICK, fields=["layer", "kind"], empty=True)
    base = alt.Chart(rows).encode(x=_LAYERS, y=y)
    cells = base.mark_rect(color=RAISED, cursor="pointer").encode(
        opacity=alt.Opacity(f"{by}:Q", scale=alt.Scale(range=[0.06, 1], domainMin=0), legend=legend),
        tooltip=tooltip,
    ).add_params(pick)  # fmt: skip
    here = base.transform_filter((alt.datum.layer == layer) & (alt.datum.kind == kind)).mark_rect(
        fillOpacity=0, stroke=NEUTRAL, strokeWidth=2.5)
    return finish(alt.layer(cells, here), 125 + 27 * len(kinds), "The adapter's update by layer and module")


def firing_strip(rows: pl.DataFrame, groups: Sequence[str]) -> alt.LayerChart:
    """Mean scalar of each response, a dot each, a line a group; the median as a bar.

    `rows` has group, condition, mean, id. Misaligned is orange, aligned blue, all else grey.
    """
    order = [g for g in groups if g in set(rows["group"].to_list())]
    counts = dict(rows.group_by("group").len().iter_rows())
    label = {g: f"{g} | {counts[g]:,} responses" for g in order}
    drawn = rows.with_columns(
        label=pl.col("group").replace_strict(label),
        jitter=(pl.int_range(pl.len()).over("group") * 0.6180339887) % 1,
    )
    y = alt.Y("label:N", title=None, sort=[label[g] for g in order],
              axis=alt.Axis(labelLimit=240, labelExpr="split(datum.label, ' | ')", ticks=False, domain=False))
    colour = alt.Color("condition:N", legend=None, scale=alt.Scale(
        domain=["misaligned", "bad", "aligned", "good", "neutral", "incoherent", ""],
        range=[RAISED, RAISED, SUPPRESSED, SUPPRESSED, NEUTRAL, NEUTRAL, NEUTRAL]))
    x = alt.X("mean:Q", title="Mean scalar over a response", axis=alt.Axis(**PLAIN), scale=alt.Scale(zero=False))
    dots = alt.Chart(drawn).mark_circle(size=26, opacity=0.5).encode(
        x=x, y=y, color=colour, yOffset=alt.YOffset("jitter:Q", scale=alt.Scale(domain=[-0.35, 1.35])),
        tooltip=[alt.Tooltip("id:N", title="Response"), alt.Tooltip("mean:Q", title="Mean scalar", format="+.3g")],
    )
    middle = drawn.group_by("label", "condition", maintain_order=True).agg(pl.median("mean"))
    bars = alt.Chart(middle).mark_tick(thickness=3, size=30).encode(
        x="mean:Q", y=y, color=colour, tooltip=[alt.Tooltip("mean:Q", title="Median", format="+.3g")])
    return finish(alt.layer(dots, bars), 60 + 52 * len(order), "Mean scalar of the component by group of responses")


def predicted_measured(rows: pl.DataFrame, measured: str, title: str) -> alt.Chart:
    """Predicted effect of each feature against what was measured. `rows` has feature, name, effect and `measured`."""
    pick = alt.selection_point(name=PICK, fields=["feature"], empty=True)
    chart = alt.Chart(rows.select("feature", "name", "effect", measured)).mark_circle(
        size=38, color=RAISED, opacity=0.45, cursor="pointer").encode(
        x=alt.X("effect:Q", title="Predicted: change of pre-activation", axis=alt.Axis(**PLAIN)),
        y=alt.Y(f"{measured}:Q", title=title, axis=alt.Axis(**PLAIN)),
        tooltip=[alt.Tooltip("feature:Q", title="Feature", format="d"), alt.Tooltip("name:N", title="Fires on"),
                 alt.Tooltip("effect:Q", title="Predicted", format="+.3g"),
                 alt.Tooltip(f"{measured}:Q", title="Measured", format="+.3g")],
    ).add_params(pick)  # fmt: skip
    return finish(chart, 320, "Predicted against measured change of each feature")


def probes_by_layer(rows: pl.DataFrame) -> alt.LayerChart:
    """AUROC of each question's probe by layer, with its interval. `rows` as `lora_firing.probe_table` makes them."""
    drawn = rows.filter(pl.col("layer").is_not_null() & (pl.col("question") == pl.col("trained_on")))
    names = drawn["question"].unique(maintain_order=True).to_list()
    colour = alt.Color("question:N", scale=alt.Scale(domain=names, range=list(HUES[: len(names)])),
                       legend=alt.Legend(**LEGEND, columns=1))
    tooltip = [alt.Tooltip("question:N", title="Question"), alt.Tooltip("layer:O", title="Layer"),
               alt.Tooltip("auroc:Q", title="AUROC", format=".2f"),
               alt.Tooltip("low:Q", title="95% from", format=".2f"), alt.Tooltip("high:Q", title="to", format=".2f"),
               alt.Tooltip("n_scalars:Q", title="Scalars")]
    y = alt.Y("auroc:Q", title="Held-out AUROC", axis=alt.Axis(**PLAIN), scale=alt.Scale(domain=[0.3, 1], zero=False))
    base = alt.Chart(drawn).encode(x=_LAYERS, color=colour, tooltip=tooltip)
    ranges = base.mark_rule(opacity=0.45, clip=True).encode(y=alt.Y("low:Q", title=None), y2="high:Q")
    line = base.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=45)).encode(y=y)
    chance = alt.Chart(pl.DataFrame({"y": [0.5]})).mark_rule(strokeDash=[4, 4], color=NEUTRAL).encode(y="y:Q")
    return finish(alt.layer(chance, ranges, line), 340, "Held-out AUROC of a probe of each layer's scalars")


def write_spaces(rows: pl.DataFrame, by: str) -> alt.LayerChart:
    """Overlap of two adapters' write spaces by layer, a line a module; dashed, what random spaces would have.

    `rows` as `lora_space.angle_table` makes them; `by` is overlap, weighted or nearest.
    """
    title = {"overlap": "Mean squared cosine", "weighted": "Overlap, weighted by size",
             "nearest": "Cosine of the nearest pair"}[by]
    names = [k for k in KINDS if k in set(rows["kind"].to_list())]
    colour = alt.Color("kind:N", scale=alt.Scale(domain=names, range=list(HUES[: len(names)])),
                       legend=alt.Legend(**LEGEND))
    tooltip = [alt.Tooltip("layer:O", title="Layer"), alt.Tooltip("kind:N", title="Module"),
               alt.Tooltip("overlap:Q", title="Mean squared cosine", format=".3f"),
               alt.Tooltip("weighted:Q", title="Weighted by size", format=".3f"),
               alt.Tooltip("nearest:Q", title="Nearest pair", format=".2f"),
               alt.Tooltip("chance:Q", title="Chance", format=".3f")]
    base = alt.Chart(rows).encode(x=_LAYERS, tooltip=tooltip)
    y = alt.Y(f"{by}:Q", title=title, axis=alt.Axis(**AXIS), scale=alt.Scale(domain=[0, 1]))
    line = base.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=50)).encode(y=y, color=colour)
    if by != "overlap":
        return finish(alt.layer(line), 280, f"{title} of two adapters' write spaces by layer")
    chance = base.mark_line(strokeDash=[4, 4], color=NEUTRAL).encode(y="chance:Q")
    return finish(alt.layer(chance, line), 280, f"{title} of two adapters' write spaces by layer")
