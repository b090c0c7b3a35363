"""Concordance: are the features that one contrast moves the ones that another moves?"""

import streamlit as st

from core.analysis.concordance import ConcordanceSettings
from core.analysis.concordance_files import sae_flags
from core.analysis.concordance_report import words_for
from core.view import concordance_charts as charts
from core.view import concordance_parts as parts
from core.view import session, tokens
from core.view.guide import POSITION_NAMES, WORDS, extract_command, markdown_safe

ENDS = {"raised": "Most raised", "suppressed": "Most suppressed"}
TOP = [10, 20, 50, 100, 200]
CURVE = tuple(range(10, 201, 10))
WINDOWS = 2


def need_two(names: list[str]) -> None:
    """Stop where there is nothing to compare with."""
    experiment = view.experiment
    if names:
        return
    adapter = experiment.adapters[0].name if experiment.adapters else "ADAPTER"
    conversations = experiment.conversations[0].name if experiment.conversations else None
    session.empty(
        "Nothing to compare with",
        f"The preset {markdown_safe(experiment.name)} has one contrast. Add a second one to its file under "
        "`[[contrasts]]`, for example of a fine-tuned model against base, and make the file it needs. Then reload "
        "this page.",
        extract_command(experiment.name, adapter, conversations),
    )


def selected_feature(feature: int) -> None:
    """One feature in every contrast: effects, strongest contexts, links."""
    with st.container(border=True):
        st.markdown(parts.one_line(named, feature, words))
        for column, spec in zip(st.columns(len(specs), gap="medium"), specs, strict=True):
            with column:
                st.page_link("pages/feature.py", label=f"Open in: {words[spec.name].short}",
                             icon=":material/arrow_forward:",
                             query_params=view.link(contrast=spec.name, feature=feature))
                both = session.load_contexts(view, found.sides[spec.name], feature)
                windows = sorted((w for side in both for w in side), key=lambda w: -w.value)[:WINDOWS]
                if windows:
                    st.html(tokens.contexts(windows, scale=windows[0].value))
                else:
                    st.caption("No context was kept.")


view = session.view()
st.title("Concordance", anchor=False, help=WORDS["concordance"])
st.markdown(f"{markdown_safe(view.contrast.title or view.contrast.name)} · layer {view.layer} · "
            f"{POSITION_NAMES[view.position].lower()}")
contrasts = {c.name: c for c in view.experiment.contrasts}
choices = parts.others(view.experiment, view.contrast)
need_two(choices)
chosen = session.several(
    "Compare with", "with", choices,
    parts.begin_with(view.experiment, view.contrast, lambda c: session.is_cached(view.experiment, c)), 2,
    format_func=lambda n: contrasts[n].title or n, help=WORDS["compare_with"],
)
with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
    end = session.choose(st.segmented_control, "End", "end", list(ENDS), "raised", format_func=ENDS.__getitem__,
                         help=WORDS["end"])
    k = session.choose(st.segmented_control, "Features", "k", TOP, 50, help=WORDS["top_k"])
    show_format = session.toggle("Show format features", "format", help=WORDS["format"])
    subtract = session.toggle("Subtract benign control", "subtract", help=WORDS["subtract"])
if not chosen:
    st.info("Choose one or two contrasts to compare with.", icon=":material/compare_arrows:")
    st.stop()

specs = [view.contrast, *(contrasts[name] for name in chosen)]
words = words_for(specs)
found = session.open_contrasts(view, specs)
for one in found.sides.values():
    session.need_features(view, one)
settings = ConcordanceSettings(k=k, ks=CURVE, include_format=show_format, subtract="mean" if subtract else "none")
concordance = session.load_concordance(view, found, settings)
labels = session.load_labels(view)
named = parts.with_table(concordance, session.named(concordance.table, view, found.sides[view.contrast.name], labels))
feature = session.selected(view, concordance.d_sae, {})

sentence, other_end = parts.headline(concordance, end, words)
with st.container(border=True):
    st.markdown(f"#### {sentence}", help=WORDS["chance"])
    st.markdown(other_end)
if legend := parts.legend(specs, words):
    st.markdown(legend)
st.caption(parts.chance(concordance, end), help=WORDS["chance"])
for flag in sae_flags(found, view.layer):
    st.warning(markdown_safe(flag), icon=":material/troubleshoot:")
if hidden := concordance.n_format_hidden:
    st.caption(f"{hidden:,} format feature{'s are' if hidden > 1 else ' is'} hidden.", help=WORDS["format"])
figures = st.container(horizontal=True, gap="medium")
for name, value, word in parts.figures(concordance, end, words):
    figures.metric(name, value, width=240 if len(specs) > 2 else 160, help=WORDS[word])

pairs = parts.pairs(concordance)
pair = pairs[session.choose(st.segmented_control, "Pair", "pair", list(pairs), next(iter(pairs)),
                            format_func=lambda key: parts.called(pairs[key], words))
             if len(pairs) > 1 else next(iter(pairs))]
left, right = st.columns([3, 2], gap="medium")
with left:
    st.subheader("Effect against effect", anchor=False, help=WORDS["quadrant"])
    points = charts.scatter_points(named, pair, words)
    session.picked(charts.scatter(points, pair, words, selected=feature), "chart concordance", view)
    if points.height < named.n_features:
        st.caption(f"{points.height:,} of {named.n_features:,} features are drawn: those moved in either first.")
with right:
    st.subheader(f"{ENDS[end]}, by k", anchor=False, help=WORDS["chance"])
    st.altair_chart(charts.overlap_curve(concordance.overlap_of(pair, end)), width="stretch")
    if note := parts.control_note(concordance, pair, words):
        st.caption(note, help=WORDS["control"])
if feature is None:
    st.caption("Click a point, or select a row below, to read its feature.")
else:
    selected_feature(feature)

st.subheader(f"Shared and exclusive: the {k} most {end}", anchor=False, help=WORDS["top_k"])
groups = parts.groups(concordance, end, words)
group = session.choose(st.segmented_control, "List", "list", list(groups), next(iter(groups)),
                       format_func=lambda key: groups[key][0], label_visibility="collapsed")
rows = parts.rows(named, end, groups[group][1], words)
if rows.is_empty():
    st.caption("No feature is in this list.")
else:
    config = {
        "feature": st.column_config.NumberColumn("Feature", format="%d", help=WORDS["feature"]),
        "name": st.column_config.TextColumn("Fires on", width="medium", help=WORDS["fires_on"]),
        **{c: st.column_config.NumberColumn(format="%.2f", help=WORDS["effect_size"])
           for c in rows.columns if c.startswith("Effect")},
        **{c: st.column_config.NumberColumn(format="%d", help=WORDS["place"])
           for c in rows.columns if c.startswith("Place")},
    }
    session.picked_row(rows, f"list {group} {end}", view, column_config=config)
for note in concordance.notes:
    st.caption(markdown_safe(note))

# Every layer needs its rankings, so everything else is on the page before they begin.
st.subheader("By layer", anchor=False, help=WORDS["by_layer"])
with st.spinner("Comparing the other layers"):
    layers = session.load_every_layer(view, found, settings)
if not layers:
    st.caption("No cached layer has the data for this comparison.")
    st.stop()
depth = charts.depth_rows(layers, pair, end)
left, right = st.columns(2, gap="medium")
left.altair_chart(charts.depth_spearman(depth), width="stretch")
right.altair_chart(charts.depth_overlap(depth, k), width="stretch")
