"""Feature: one feature's tokens, activations on both sides, strongest contexts, and the user's label."""

import polars as pl
import streamlit as st

from core.analysis import feature_table
from core.errors import MicroscopeError
from core.view import charts, describe, session, tokens
from core.view.guide import POSITION_NAMES, WORDS, markdown_safe, neuronpedia_url
from core.view.labels import MAX_LENGTH, write_label

VALUES = {"dots": "Each response", "cumulative": "Cumulative"}


def step_controls(rows: pl.DataFrame, now: int) -> None:
    """Choose a feature by number, or step through the ranking."""
    ranked = rows.filter(pl.col("rank").is_not_null()).sort("rank")["feature"].to_list()
    at = ranked.index(now) if now in ranked else None
    st.session_state["feature number"] = now
    before, number, after = st.columns([1, 1, 1], vertical_alignment="bottom")
    number.number_input("Feature", 0, rows.height - 1, step=1, key="feature number", help=WORDS["feature"],
                        on_change=lambda: session.remember_feature(view, st.session_state["feature number"]))
    before.button("More raised", icon=":material/arrow_back:", disabled=at in (None, 0), width="stretch",
                  on_click=lambda: session.remember_feature(view, ranked[at - 1]), help="The next higher rank")
    after.button("More suppressed", icon=":material/arrow_forward:", disabled=at in (None, len(ranked) - 1),
                 width="stretch", on_click=lambda: session.remember_feature(view, ranked[at + 1]),
                 help="The next lower rank")


def label_form(current: str) -> None:
    """The user's own words for the feature, kept beside the cache."""
    key = f"label {info.sae_release} {info.sae_id} {feature} {current}"

    def keep() -> None:
        words = st.session_state[key]
        try:
            write_label(session.label_folder(view), info.sae_release, info.sae_id, feature, words)
        except MicroscopeError as error:
            st.session_state["label error"] = str(error)
        else:
            st.session_state["label kept"] = "Label kept." if words.strip() else "Label removed."

    with st.form("label", border=False):
        st.text_input("Label", current, max_chars=MAX_LENGTH, key=key, label_visibility="collapsed",
                      placeholder="What does this feature respond to?")
        st.form_submit_button("Keep label", icon=":material/label:", on_click=keep)
    if said := st.session_state.pop("label kept", ""):
        st.toast(said)
    if wrong := st.session_state.pop("label error", ""):
        st.error(markdown_safe(wrong), icon=":material/error:")


view = session.view()
title = st.empty()
title.title("Feature", anchor=False)
sides = session.open_sides(view)
session.need_features(view, sides)
ranking = session.load_ranking(view, sides)
labels = session.load_labels(view)
table = session.named(charts.with_direction(ranking.table, ranking.settings.alpha), view, sides, labels)
ends = describe.ends(feature_table.hide_format(table))
feature = session.selected(view, table.height, ends)
if feature is None:
    feature = ends.get("top", 0)
    session.select(view, feature)
row = table.filter(pl.col("feature") == feature).row(0, named=True)
info = sides.target.info(view.layer)
target, reference = sides.names

title.title(f"Feature {feature}", anchor=False, help=WORDS["feature"])
st.markdown(f"**{markdown_safe(row['name'])}** · layer {view.layer} · "
            f"{markdown_safe(view.contrast.title or view.contrast.name)} · {POSITION_NAMES[view.position].lower()}")

step_controls(table, feature)

with st.container(horizontal=True, gap="medium"):
    for name, value, word in describe.figures(row, ranking):
        st.metric(name, value, width=150, help=WORDS[word])
st.markdown(describe.means(row, ranking))
session.warn_about_sae(sides, view.layer)

left, right = st.columns(2, gap="large")
lens = session.load_feature_info(view, sides).filter(pl.col("feature") == feature).row(0, named=True)
with left:
    st.subheader("Tokens", anchor=False, help=WORDS["logit_lens"])
    st.caption("Promoted")
    st.html(tokens.chips(lens["top_tokens"], colour=tokens.RAISED_RGB))
    st.caption("Suppressed")
    st.html(tokens.chips(lens["bottom_tokens"], colour=tokens.SUPPRESSED_RGB))
with right:
    st.subheader("Your label", anchor=False, help=WORDS["label"])
    label_form(row["label"])
    if info.neuronpedia_id:
        st.link_button("Open on Neuronpedia", neuronpedia_url(info.neuronpedia_id, feature),
                       icon=":material/open_in_new:", help=WORDS["neuronpedia"])

st.subheader("Activation by side", anchor=False, help=WORDS["activation"])
values = session.load_values(view, sides, feature)
drawing = session.choose(st.segmented_control, "Drawing", "values", list(VALUES), "dots",
                         format_func=VALUES.__getitem__, label_visibility="collapsed")
draw = charts.distribution if drawing == "dots" else charts.cumulative
st.markdown(describe.zeros(values, sides.names))
st.altair_chart(draw(values, order=sides.names), width="stretch")

opened = session.opened_response(view)
if opened is not None:
    st.subheader("The response that was opened", anchor=False)
    st.markdown(describe.one_response(values, opened.id))
    with st.container(border=True):
        for caption, text in (("Question", opened.question), (f"Response of {opened.variant}", opened.response)):
            st.caption(markdown_safe(caption))
            st.text(text)

st.subheader("Strongest contexts", anchor=False, help=WORDS["contexts"])
windows = session.load_contexts(view, sides, feature)
scale = max((w.value for side in windows for w in side), default=0.0)
if scale <= 0:
    st.caption("No context was kept: the feature is silent on every response token of these conversations.")
    st.stop()
st.html(tokens.legend(scale))
for column, name, found, cache, hue in zip(st.columns(2, gap="large"), (target, reference), windows,
                                           (sides.target, sides.reference), ("orange", "blue"), strict=True):
    with column:
        st.markdown(f"**:{hue}[{markdown_safe(name)}]**")
        if not found:
            st.caption("Never active on this side.")
        else:
            ids = cache.conversations["id"]
            st.html(tokens.contexts(found, scale=scale, sources=[ids[w.row] for w in found]))

whole = {cache.conversations["id"][w.row]: (cache, w.row)
         for found, cache in zip(windows, (sides.target, sides.reference), strict=True) for w in found}
with st.expander("Read one of these conversations in full"):
    chosen = st.selectbox("Conversation", list(whole), label_visibility="collapsed")
    cache, place = whole[chosen]
    for role, text in cache.messages(place):
        st.caption(role)
        st.text(text)
