"""Direction: the misalignment direction of a contrast, how far to trust it, its features, and a text read along it."""

import numpy as np
import polars as pl
import streamlit as st

from core.analysis import decompose
from core.analysis.direction import cosine_table
from core.analysis.export import parquet_bytes
from core.store.direction_file import as_bytes
from core.view import direction_charts as charts
from core.view import direction_parts as parts
from core.view import session, tokens
from core.view.guide import POSITION_NAMES, WORDS, markdown_safe

WEIGHTINGS = {"response": "Each response once", "token": "Each token once"}
ACROSS = {"contrasts": "Contrasts and readers", "layers": "Layers", "positions": "Positions"}
BARS = 16
OVERLAP_K = 20
CARRY_K = 8
#: Where the text that was last asked for is kept: reader, question, answer.
ASKED = "direction asked"


def column_config(contrasts: list[str]) -> dict[str, object]:
    """Headings with their explanation, and number formats."""
    number, text = st.column_config.NumberColumn, st.column_config.TextColumn
    fixed = {
        "rank": number("Rank", help="1 is the best feature of this method.", format="%d"),
        "feature": number("Feature", help=WORDS["feature"], format="%d"),
        "name": text("Fires on", help=WORDS["fires_on"], width="medium"),
        "coefficient": number("Coefficient", help=WORDS["coefficient"], format="%.3g"),
        "cosine": number("Cosine", help=WORDS["decoder_cosine"], format="%.2f"),
        "contribution": number("Contribution", help=WORDS["contribution"], format="percent"),
    }
    for name in contrasts:
        fixed[f"effect {name}"] = number(f"Effect, {name}", help=WORDS["effect_size"], format="%.2f")
        fixed[f"rank {name}"] = number(f"Rank, {name}", help=WORDS["rank"], format="%d")
    return fixed


def kinds() -> list[str]:
    """The chosen contrast and the first cached one of every kind: data, model, response."""
    first = {}
    for contrast in view.experiment.contrasts:
        if session.is_cached(view.experiment, contrast):
            first.setdefault(contrast.kind, contrast.name)
    return list(dict.fromkeys([view.contrast.name, *first.values()]))


def read_a_text() -> None:
    """Tokens of any text shaded by their projection; the model is loaded for it."""
    st.subheader("Read a text along it", anchor=False, help=WORDS["projection"])
    examples = {f"{cache.conversations['id'][int(row)]} ({name})": (cache, int(row))
                for name, cache, rows in session.example_rows(sides) for row in rows}
    opened = session.opened_response(view)
    if opened is not None and st.session_state.get("direction opened") != opened.id:  # by a link, once
        st.session_state.update({"direction opened": opened.id, "direction text": "Your own",
                                 "direction question Your own": opened.question,
                                 "direction answer Your own": opened.response[:6000]})
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        chosen = st.selectbox("Text", [*examples, "Your own"], key="direction text")
        readers = list(view.experiment.variants)
        own = view.contrast.target.variant
        reader = st.selectbox("Read by", readers, readers.index(own), key="direction reader", help=WORDS["variant"])
    question = answer = ""
    if chosen in examples:
        cache, row = examples[chosen]
        turns = dict(cache.messages(row))
        question, answer = turns.get("user", ""), turns.get("response", "")
    keys = [f"direction {what} {chosen}" for what in ("question", "answer")]
    with st.form("read", border=False):
        st.text_input("Question (leave empty for plain text)", question, key=keys[0])
        st.text_area("Answer, or any text", answer, height=120, max_chars=6000, key=keys[1])
        st.form_submit_button("Read", icon=":material/visibility:", type="primary", on_click=lambda: st.session_state
                              .update({ASKED: (reader, *(st.session_state[key] for key in keys))}))
    if ASKED not in st.session_state:
        st.caption("The model is loaded when you press Read, once.")
        return
    reader, question, answer = st.session_state[ASKED]
    if not answer.strip():
        st.caption("There is no text to read yet.")
        return
    with st.spinner("Reading"):
        read = session.read_text(view.experiment, reader, question, answer, direction)
    spoken = read.values[~np.array(read.faint)]
    middle, scale = parts.middle_and_scale(*session.pools(view, sides, weighting), direction, spoken)
    st.html(tokens.signed_legend(f"like {reference}", f"like {target}", scale=scale, centre=middle))
    st.html(tokens.signed(read.tokens, read.values, scale=scale, centre=middle, faint=read.faint))
    mean = float(spoken.mean())
    side = target if mean > middle else reference
    st.markdown(f"On average over the {len(spoken)} tokens shown in full: {mean:+.3g}, on the side of the "
                f"**{markdown_safe(side)}** responses (the middle is {middle:+.3g}).")


view = session.view()
st.title("Direction", anchor=False, help=WORDS["direction"])
st.markdown(f"{markdown_safe(view.contrast.title or view.contrast.name)} · layer {view.layer} · "
            f"{POSITION_NAMES[view.position].lower()}")
sides = session.open_sides(view)
target, reference = sides.names
weighting = "response"
if view.position == "response":
    weighting = session.choose(st.segmented_control, "Weighting", "weighting", list(WEIGHTINGS), "response",
                               format_func=WEIGHTINGS.__getitem__, help=WORDS["weighting"])
measured = session.load_measured(view, sides, view.layer, weighting)
direction = measured.direction

with st.container(horizontal=True, gap="medium"):
    share = direction.share_of_residual_norm
    st.metric("Length", f"{direction.norm:.3g}" if share is None else f"{share:.1%}", width=150,
              help=f"{WORDS['direction_length']} Raw: {direction.norm:.4g}.")
    st.metric("Held-out AUROC", "none" if measured.auroc is None else f"{measured.auroc:.2f}", width=150,
              help=WORDS["direction_auroc"])
    st.metric("Prompt alone", f"{measured.prompt_auroc:.2f}", width=150, help=WORDS["prompt_auroc"])
    st.metric("Halves agree", "none" if measured.split_half is None else f"{measured.split_half:.2f}", width=150,
              help=WORDS["direction_halves"])
st.markdown(parts.headline(measured, sides.names))
session.warn_about_sae(sides, view.layer)

st.subheader("By depth", anchor=False)
depth = parts.depth_rows([session.load_measured(view, sides, n, weighting) for n in sides.layers])
left, right = st.columns(2, gap="large")
with left:
    st.markdown("**Length**", help=WORDS["direction_length"])
    st.altair_chart(charts.depth_norm(depth), width="stretch")
    st.caption("Dashed: a direction of noise alone.", help=WORDS["direction_noise"])
with right:
    st.markdown("**Separation of held-out prompts**", help=WORDS["direction_auroc"])
    if depth["auroc"].null_count() == depth.height:
        st.caption("There are too few prompts to hold any out.")
    else:
        st.altair_chart(charts.depth_auroc(depth), width="stretch")
        st.caption("Dashed: knowing the prompt alone.", help=WORDS["prompt_auroc"])

st.subheader("Is it the same direction elsewhere?", anchor=False, help=WORDS["cosine"])
across = session.choose(st.segmented_control, "Compare across", "across", list(ACROSS), "contrasts",
                        format_func=ACROSS.__getitem__, label_visibility="collapsed")
others = session.load_across(view, sides, weighting, across)
if len(others) < 2:
    st.caption("Nothing else is cached to compare with.")
else:
    st.altair_chart(charts.cosine_map(cosine_table(others), list(others)), width="stretch")
readers = session.load_readers(view, weighting)
own, *rest = readers or {"": None}
if rest:
    st.markdown(parts.reader_sentence(own, {name: readers[own].cosine(readers[name]) for name in rest}))

st.subheader("As features", anchor=False, help=WORDS["decomposition"])
book = session.load_dictionary(view, view.layer)
if book is None:
    st.caption(f"Layer {view.layer} has no SAE, so there are no features to write the direction with.")
    read_a_text()
    st.stop()
with st.spinner("Decomposing in five ways"):
    found = session.load_decompositions(view, sides, weighting, book)
methods = list(found)
method = session.choose(st.segmented_control, "Method", "method", methods, "omp" if "omp" in methods else methods[0],
                        format_func=charts.METHOD_NAMES.__getitem__, help=WORDS["method"])
one = found[method]
named = session.named(one.table, view, sides, session.load_labels(view))
st.markdown(parts.decomposition_sentence(one, OVERLAP_K))
feature = session.selected(view, book.d_sae, {})
left, right = st.columns(2, gap="large")
with left:
    st.markdown("**Components**", help=WORDS["component_size"])
    session.picked(charts.component_bars(parts.component_rows(one, named, BARS)), f"bars {method}", view)
    st.caption(f"The {BARS} best features, and in grey what is in none of them. Click a bar to select its feature.",
               help=WORDS["sae_error"])
with right:
    st.markdown("**Squared norm explained**", help=WORDS["explained"])
    curves = pl.concat([d.curve.with_columns(method=pl.lit(name)) for name, d in found.items()])
    st.altair_chart(charts.explained_curve(curves, method), width="stretch")
    with st.expander(f"Which methods agree on their {OVERLAP_K} best features?"):
        overlap = decompose.method_overlap(list(found.values()), OVERLAP_K)
        st.altair_chart(charts.overlap_map(overlap), width="stretch")
if feature is not None and (row := named.filter(pl.col("feature") == feature)).height:
    with st.container(border=True, horizontal=True, vertical_alignment="center", gap="medium"):
        r = row.row(0, named=True)
        st.markdown(f"**{feature}** · {markdown_safe(r['name'])} · coefficient {r['coefficient']:+.3g} · cosine "
                    f"{r['cosine']:+.2f} · contribution {r['contribution']:+.1%}")
        st.page_link("pages/feature.py", label="Open feature", icon=":material/arrow_forward:",
                     query_params=view.link(feature=feature))

st.subheader("Beside the contrasts", anchor=False, help=WORDS["rank"])
contrasts = kinds()
rankings = session.load_rankings(view, contrasts)
table = parts.joined(named, rankings)
columns = ["rank", "feature", "name", "coefficient", "cosine", "contribution"]
columns += [c for c in table.columns if c.startswith(("effect ", "rank "))]
session.picked_row(table.select(columns), f"table {method}", view, height=360, column_config=column_config(contrasts))
stem = f"{view.experiment.name}_{view.contrast.name}_layer{view.layer}_{view.position}"
with st.container(horizontal=True):
    st.download_button("Features, CSV", lambda: table.drop("name").write_csv().encode(), f"{stem}_{method}.csv",
                       "text/csv", icon=":material/download:", on_click="ignore")
    st.download_button("Features, Parquet", lambda: parquet_bytes(table.drop("name")), f"{stem}_{method}.parquet",
                       "application/vnd.apache.parquet", icon=":material/download:", on_click="ignore")
    st.download_button("Direction, safetensors", lambda: as_bytes([direction]), f"{stem}.safetensors",
                       "application/octet-stream", icon=":material/download:", on_click="ignore")

st.page_link("pages/concordance.py", label="Where the contrasts agree", icon=":material/join_inner:",
             query_params=view.link())

st.subheader("Use in steering", anchor=False)
names = dict(zip(named["feature"].to_list(), named["name"].to_list(), strict=True))
best = named["feature"].head(30).to_list()
with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
    kept = st.multiselect("Components", best, best[:CARRY_K], key=f"carry {method}", width="stretch",
                          format_func=lambda f: f"{f}: {names[f]}")
    st.button("Use in steering", icon=":material/tune:", disabled=not kept,
              on_click=lambda: session.carry(parts.steering_parts(one, book, kept, names)))
if session.just_carried():
    st.toast(f"{len(kept)} components and the remainder are on the Steering page.")
    if page := session.steering_page():
        st.switch_page(page)
st.caption("Each becomes a slider there; what they leave of the direction is one more, so that together they are the "
           "whole direction.")

read_a_text()
