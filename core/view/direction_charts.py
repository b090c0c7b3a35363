"""Charts of the Direction page: by depth, cosines, components, explained norm, overlap of methods.

Pure, like charts.py: tables in, Altair out, no text colour set.
"""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import polars as pl

from core.analysis.decompose import METHODS
from core.view.charts import AXIS, LEGEND, NEUTRAL, PICK, PLAIN, RAISED, SUPPRESSED, finish, layer_axis

HEIGHT = 290

METHOD_NAMES = {"exact": "Exact difference", "encoder": "Encoder difference", "cosine": "Decoder cosine",
                "omp": "Matching pursuit", "nnls": "Non-negative fit"}
#: Hues of the methods: none is the orange or the blue that mean raised and suppressed.
METHOD_COLOURS = dict(zip(METHODS, ("#8f62d0", "#14927f", "#b07d12", "#d0458b", "#5d7a34"), strict=True))
METHOD_DASHES = dict(zip(METHODS, ([1, 0], [8, 3], [3, 3], [1, 0], [8, 3, 2, 3]), strict=True))

#: What the bar of the part outside all features is called.
ERROR_BAR = "not in any feature"


def depth_norm(depth: pl.DataFrame) -> alt.LayerChart:
    """Length as a share of the residual norm by layer, with its interval, above what noise alone would have.

    `depth` has layer, share, share_low, share_high, noise_share.
    """
    base = alt.Chart(depth).encode(x=layer_axis())
    y = alt.Y("share:Q", title="Share of the residual norm", axis=alt.Axis(format="~%", **AXIS),
              scale=alt.Scale(zero=True))
    tooltip = [alt.Tooltip("layer:O", title="Layer"), alt.Tooltip("share:Q", title="Length", format=".1%"),
               alt.Tooltip("share_low:Q", title="95% from", format=".1%"),
               alt.Tooltip("share_high:Q", title="to", format=".1%"),
               alt.Tooltip("norm:Q", title="Length, raw", format=".3g"),
               alt.Tooltip("noise_share:Q", title="Noise alone", format=".1%")]
    noise = base.mark_line(color=NEUTRAL, strokeDash=[4, 4]).encode(y="noise_share:Q", tooltip=tooltip)
    floor = base.mark_point(color=NEUTRAL, size=40, shape="stroke", strokeWidth=2).encode(y="noise_share:Q",
                                                                                         tooltip=tooltip)
    range_ = base.mark_rule(color=RAISED, strokeWidth=2).encode(y="share_low:Q", y2="share_high:Q", tooltip=tooltip)
    line = base.mark_line(color=RAISED, strokeWidth=2, point=alt.OverlayMarkDef(size=60, color=RAISED)).encode(
        y=y, tooltip=tooltip)
    return finish(alt.layer(noise, floor, range_, line), HEIGHT, "Length of the direction by layer")


def depth_auroc(depth: pl.DataFrame) -> alt.LayerChart:
    """Held-out AUROC by layer with its interval; dashed, what knowing the prompt alone reaches.

    `depth` has layer, auroc, auroc_low, auroc_high, prompt_auroc.
    """
    rows = depth.drop_nulls("auroc")
    base = alt.Chart(rows).encode(x=layer_axis())
    scale = alt.Scale(domain=[min(0.4, float(rows["auroc_low"].min() or 0.4)), 1], zero=False)
    y = alt.Y("auroc:Q", title="Held-out AUROC", axis=alt.Axis(**PLAIN), scale=scale)
    tooltip = [alt.Tooltip("layer:O", title="Layer"), alt.Tooltip("auroc:Q", title="Held-out AUROC", format=".3f"),
               alt.Tooltip("auroc_low:Q", title="95% from", format=".3f"),
               alt.Tooltip("auroc_high:Q", title="to", format=".3f"),
               alt.Tooltip("prompt_auroc:Q", title="The prompt alone", format=".2f")]
    prompt = base.mark_line(color=NEUTRAL, strokeDash=[4, 4]).encode(
        y=alt.Y("prompt_auroc:Q", scale=scale), tooltip=tooltip)
    floor = base.mark_point(color=NEUTRAL, size=40, shape="stroke", strokeWidth=2).encode(y="prompt_auroc:Q",
                                                                                         tooltip=tooltip)
    range_ = base.mark_rule(color=RAISED, strokeWidth=2).encode(y="auroc_low:Q", y2="auroc_high:Q", tooltip=tooltip)
    line = base.mark_line(color=RAISED, strokeWidth=2, point=alt.OverlayMarkDef(size=60, color=RAISED)).encode(
        y=y, tooltip=tooltip)
    return finish(alt.layer(prompt, floor, range_, line), HEIGHT, "Held-out AUROC of the direction by layer")


def cosine_map(cosines: pl.DataFrame, names: Sequence[str]) -> alt.LayerChart:
    """Cosines between directions as a heat map with figures. `cosines` has a, b, cosine (null: undefined)."""
    order, small = list(names), len(names) <= 12
    axis = alt.Axis(labelLimit=230, ticks=False, domain=False, labelOverlap=False)
    base = alt.Chart(cosines).encode(
        x=alt.X("b:N", sort=order, title=None, axis=alt.Axis(labelAngle=-40, **_without(axis, "labelAngle"))),
        y=alt.Y("a:N", sort=order, title=None, axis=axis),
        tooltip=[alt.Tooltip("a:N", title="Direction"), alt.Tooltip("b:N", title="Beside"),
                 alt.Tooltip("cosine:Q", title="Cosine", format="+.2f")],
    )
    cells = base.mark_rect(cornerRadius=2).encode(color=alt.Color(
        "cosine:Q", scale=alt.Scale(domain=[-1, 0, 1], range=[SUPPRESSED, "#8b919b22", RAISED], interpolate="rgb"),
        legend=alt.Legend(title="Cosine", titleFontWeight="normal", orient="top", gradientLength=160, format="+.1f")))
    layers = [cells]
    if small:
        layers.append(base.mark_text(fontSize=11).encode(
            text=alt.Text("cosine:Q", format="+.2f"),
            color=alt.condition("abs(datum.cosine) > 0.55", alt.value("white"), alt.value(NEUTRAL))))
    return finish(alt.layer(*layers), 60 + 27 * len(order) + 90, "Cosines between directions")


def _without(axis: alt.Axis, key: str) -> dict:
    return {k: v for k, v in axis.to_dict().items() if k != key}


def component_bars(rows: pl.DataFrame) -> alt.Chart:
    """Components as signed bars, longest first, then what is in no feature. Clicking a bar picks its feature.

    `rows` has feature (null for the last), bar (text), kind (added, taken away, left), size (signed share of the
    direction's length), coefficient, cosine, contribution.
    """
    pick = alt.selection_point(name=PICK, fields=["feature"], empty=True)
    chart = alt.Chart(rows).mark_bar(cornerRadiusEnd=2, cursor="pointer").encode(
        x=alt.X("size:Q", title="Share of the direction's length",
                axis=alt.Axis(format="~%", **AXIS)),
        y=alt.Y("bar:N", title=None, sort=rows["bar"].to_list(),
                axis=alt.Axis(labelLimit=210, labelOverlap=False, ticks=False, domain=False)),
        color=alt.Color("kind:N", legend=None, scale=alt.Scale(domain=["added", "taken away", "left"],
                                                               range=[RAISED, SUPPRESSED, NEUTRAL])),
        tooltip=[alt.Tooltip("bar:N", title="Component"), alt.Tooltip("size:Q", title="Length", format="+.1%"),
                 alt.Tooltip("coefficient:Q", title="Coefficient", format="+.3g"),
                 alt.Tooltip("cosine:Q", title="Cosine with the direction", format="+.2f"),
                 alt.Tooltip("contribution:Q", title="Share of the squared norm", format="+.1%")],
    ).add_params(pick)
    return finish(chart, max(80, 25 * rows.height + 50), "Components of the direction")


def explained_curve(curves: pl.DataFrame, chosen: str) -> alt.LayerChart:
    """Share of the squared norm within the span of the k best features, a line a method; grey, random features.

    `curves` has method, k, share, random_share, random_low, random_high; the `chosen` method's line is thick.
    """
    methods = [m for m in METHODS if m in set(curves["method"])]
    names = [METHOD_NAMES[m] for m in methods]
    rows = curves.with_columns(name=pl.col("method").replace_strict(METHOD_NAMES))
    x = alt.X("k:Q", title="Features kept (k)", axis=alt.Axis(**PLAIN), scale=alt.Scale(domainMin=1, nice=False))
    y = alt.Y("share:Q", title="Squared norm explained", axis=alt.Axis(format="%", **AXIS),
              scale=alt.Scale(domain=[0, 1]))
    random = alt.Chart(rows.filter(pl.col("method") == methods[0])).encode(x=x)
    band = random.mark_area(color=NEUTRAL, opacity=0.25).encode(y="random_low:Q", y2="random_high:Q")
    middle = random.mark_line(color=NEUTRAL, strokeDash=[4, 4]).encode(
        y="random_share:Q", tooltip=[alt.Tooltip("k:Q", title="k"),
                                     alt.Tooltip("random_share:Q", title="Random features", format=".1%")])
    line = alt.Chart(rows).mark_line().encode(
        x=x, y=y,
        color=alt.Color("name:N", scale=alt.Scale(domain=names, range=[METHOD_COLOURS[m] for m in methods]),
                        legend=alt.Legend(**LEGEND, columns=2, symbolType="stroke", symbolStrokeWidth=3)),
        strokeDash=alt.StrokeDash("name:N", legend=None,
                                  scale=alt.Scale(domain=names, range=[METHOD_DASHES[m] for m in methods])),
        strokeWidth=alt.condition(f"datum.method === '{chosen}'", alt.value(3.5), alt.value(1.8)),
        tooltip=[alt.Tooltip("name:N", title="Method"), alt.Tooltip("k:Q", title="k"),
                 alt.Tooltip("share:Q", title="Explained", format=".1%"),
                 alt.Tooltip("random_share:Q", title="Random features", format=".1%")],
    )
    return finish(alt.layer(band, middle, line), 360, "Squared norm explained by the k best features, by method")


def overlap_map(overlap: pl.DataFrame) -> alt.LayerChart:
    """How many of the k best features two methods share. `overlap` as `decompose.method_overlap` makes it."""
    rows = overlap.with_columns(pl.col("method_a", "method_b").replace_strict(METHOD_NAMES))
    order = [METHOD_NAMES[m] for m in METHODS]
    base = alt.Chart(rows).encode(
        x=alt.X("method_b:N", sort=order, title=None, axis=alt.Axis(labelAngle=-40, ticks=False, domain=False,
                                                                    labelLimit=160, labelOverlap=False)),
        y=alt.Y("method_a:N", sort=order, title=None, axis=alt.Axis(ticks=False, domain=False, labelLimit=160,
                                                                    labelOverlap=False)),
        tooltip=[alt.Tooltip("method_a:N", title="Method"), alt.Tooltip("method_b:N", title="Beside"),
                 alt.Tooltip("shared:Q", title="Features of both"), alt.Tooltip("same_sign:Q", title="Same sign"),
                 alt.Tooltip("k:Q", title="Of k")],
    )
    k = int(rows["k"].max() or 1)
    cells = base.mark_rect(cornerRadius=2).encode(color=alt.Color(
        "shared:Q", scale=alt.Scale(domain=[0, k], range=["#8b919b22", "#8f62d0"], interpolate="rgb"), legend=None))
    text = base.mark_text(fontSize=12).encode(
        text="shared:Q", color=alt.condition(f"datum.shared > {k * 0.5}", alt.value("white"), alt.value(NEUTRAL)))
    return finish(alt.layer(cells, text), 300, "Features that two methods share")
