"""Rankings: which features differ between the two sides, how surely, and where in the network."""

from dataclasses import replace

import polars as pl
import streamlit as st

from core.analysis import feature_table
from core.analysis.export import parquet_bytes
from core.view import charts, describe, session
from core.view.guide import COLUMNS, POSITION_NAMES, WORDS, markdown_safe
from core.view.labels import NAMING

SHOWS = ["Features", "Table", "Depth"]
PLOTS = {"volcano": "Effect and confidence", "prevalence": "Effect and prevalence"}
TAILS = {"both": "Both", "raised": "Raised", "suppressed": "Suppressed"}
BARS = 12
LENGTH_RATIO = 1.1


def column_config() -> dict[str, object]:
    """Headings with their explanation, and number formats."""
    forms = {"effect_size": "%.2f", "q_value": "%.2g", "auroc": "%.2f", "mean_target": "%.3g",
             "mean_reference": "%.3g", "delta_attribution": "%.2g", "delta_attribution_se": "%.2g", "rank": "%d",
             "feature": "%d"}
    found: dict[str, object] = {}
    for column, (heading, word) in COLUMNS.items():
        if column == "name":
            found[column] = st.column_config.TextColumn(heading, help=WORDS[word], width="medium")
        else:
            found[column] = st.column_config.NumberColumn(heading, help=WORDS[word],
                                                          format=forms.get(column, "percent"))
    return found


view = session.view()
st.title("Rankings", anchor=False)
st.markdown(f"{markdown_safe(view.contrast.title or view.contrast.name)} · layer {view.layer} · "
            f"{POSITION_NAMES[view.position].lower()}")
sides = session.open_sides(view)
target, reference = sides.names

with st.container(horizontal=True, vertical_alignment="center", gap="medium"):
    show = session.choose(st.segmented_control, "Show", "show", SHOWS, "Features", label_visibility="collapsed")
    show_format = session.toggle("Show format features", "format", help=WORDS["format"])
    matched = session.toggle("Match lengths", "matched", help=(
        f"Compare only prompts whose two answers differ in length by at most {LENGTH_RATIO - 1:.0%}, so that no "
        "feature is raised merely because one side writes more."
    ))
settings = replace(session.QUICK, max_length_ratio=LENGTH_RATIO if matched else None)

if show == "Depth":
    with st.spinner("Ranking every layer"):
        depth = session.load_depth(view, sides, settings)
    st.markdown(describe.depth(depth))
    columns = st.columns(3, gap="medium")
    for column, title, chart, word in zip(
        columns,
        ("Features that pass", "Largest effect size", "Separation without features"),
        (charts.depth_counts, charts.depth_effects, charts.depth_separation),
        ("q_value", "effect_size", "separation"),
        strict=True,
    ):
        with column:
            st.markdown(f"**{title}**", help=WORDS[word])
            if depth.drop_nulls(describe.DEPTH_NEEDS[chart.__name__]).is_empty():
                st.caption("No layer has these figures: it takes features, or more conversations.")
            else:
                st.altair_chart(chart(depth), width="stretch")
    st.caption("Format features are left out of the first two. The third uses the residual stream alone.")
    session.warn_about_sae(sides, *sides.layers)
    st.stop()

session.need_features(view, sides)
ranking = session.load_ranking(view, sides, settings)
labels = session.load_labels(view)
full = session.named(charts.with_direction(ranking.table, settings.alpha), view, sides, labels)
table = full if show_format else feature_table.hide_format(full)
hidden = full.height - table.height
ends = describe.ends(table)
feature = session.selected(view, full.height, ends)

counts = {d: table.filter(pl.col("direction") == d).height for d in ("raised", "suppressed")}
figures = st.container(horizontal=True, gap="medium")
figures.metric("Raised", f"{counts['raised']:,}", width=150, help=f"{WORDS['raised']} Here q < {settings.alpha:g}.")
figures.metric("Suppressed", f"{counts['suppressed']:,}", width=150,
               help=f"{WORDS['suppressed']} Here q < {settings.alpha:g}.")
figures.metric("Tested", f"{ranking.n_tested:,}", width=150, help=(
    f"Features active on at least {settings.prevalence_floor:.0%} of the responses; the others are too rare to test. "
    f"The dictionary has {full.height:,}."
))
figures.metric("Replicate", describe.held_out(ranking.replication), width=150, help=WORDS["replication"])
st.markdown(describe.sample(ranking))
control = st.empty()
control.markdown(describe.replication(ranking.replication, waiting=True))
if hidden:
    st.caption(f"{hidden:,} format feature{'s are' if hidden > 1 else ' is'} hidden.", help=WORDS["format"])
for note in ranking.notes:
    st.info(markdown_safe(note), icon=":material/info:")
session.warn_about_sae(sides, view.layer, also_no_worse=True)

if show == "Features":
    plot = session.choose(st.segmented_control, "Plot", "plot", list(PLOTS), "volcano",
                          format_func=PLOTS.__getitem__, label_visibility="collapsed",
                          help=WORDS["effect_size"])
    if plot == "volcano" and table["q_value"].null_count() == table.height:
        st.caption("No q-values here (see the note above): this is effect against prevalence instead.")
        plot = "prevalence"
    drawn = charts.thin(table.filter(pl.col("rank").is_not_null()))
    chart = (charts.volcano(drawn, alpha=settings.alpha, selected=feature) if plot == "volcano"
             else charts.effect_prevalence(drawn, selected=feature))
    session.picked(chart, f"chart {plot}", view)
    if drawn.height < table["rank"].count():
        st.caption(f"{drawn.height:,} of {table['rank'].count():,} ranked features are drawn: all that pass first.")
    if feature is None:
        st.caption("Click a point or a bar to select its feature.")
    else:
        with st.container(border=True, horizontal=True, vertical_alignment="center", gap="medium"):
            st.markdown(describe.one_line(full, feature))
            st.page_link("pages/feature.py", label="Open feature", icon=":material/arrow_forward:",
                         query_params=view.link(feature=feature))
    up, down = feature_table.top(table, BARS), feature_table.bottom(table, BARS)
    limit = float(pl.concat([up, down])["effect_size"].abs().max() or 1.0)
    for column, rows, raised in zip(st.columns(2, gap="medium"), (up, down), (True, False), strict=True):
        with column:
            word = "raised" if raised else "suppressed"
            st.subheader(f"Most {word}", anchor=False, help=WORDS[word])
            st.caption(f"Higher in {markdown_safe(target if raised else reference)} responses")
            if rows.is_empty():
                st.caption(f"No ranked feature is {word}.")
            else:
                session.picked(charts.tail_bars(rows, raised=raised, limit=limit), f"bars {word}", view)

if show == "Table":
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        find = session.text("Find in labels and tokens", "find", placeholder="for example: doctor")
        tail = session.choose(st.segmented_control, "Side", "tail", list(TAILS), "both", format_func=TAILS.__getitem__)
        passing = session.toggle("Only those that pass", "passing", help=WORDS["q_value"])
    rows = describe.filtered(table, find=find, tail=tail, passing=passing)
    st.caption(f"{rows.height:,} of {table.height:,} features. Select a row to select its feature.")
    session.picked_row(
        rows.select([c for c in COLUMNS if c in rows.columns]), "table", view, height=460,
        column_config=column_config(),
    )
    if feature is not None:
        st.markdown(describe.one_line(full, feature))
        st.page_link("pages/feature.py", label="Open feature", icon=":material/arrow_forward:",
                     query_params=view.link(feature=feature))
    export = rows.select(*feature_table.columns(rows), *NAMING)
    stem = f"{view.experiment.name}_{view.contrast.name}_layer{view.layer}_{view.position}"
    with st.container(horizontal=True):
        st.download_button("Download CSV", lambda: export.write_csv().encode(), f"{stem}.csv", "text/csv",
                           icon=":material/download:", on_click="ignore")
        st.download_button("Download Parquet", lambda: parquet_bytes(export), f"{stem}.parquet",
                           "application/vnd.apache.parquet", icon=":material/download:", on_click="ignore")

# The permutation control takes longest, so everything else is on the page before it begins.
if ranking.replication is not None:
    with st.spinner("Shuffling labels for the permutation control"):
        checked = session.load_ranking(view, sides, replace(settings, n_permutations=session.PERMUTATIONS))
    control.markdown(describe.replication(checked.replication))
else:
    control.empty()
