"""Difference lens: what a fine-tuned variant differs by from base on text that has nothing to do with its training."""

import polars as pl
import streamlit as st

from core.store.difference_file import DifferenceLens
from core.view import difference_charts as charts
from core.view import difference_parts as parts
from core.view import session, tokens
from core.view.charts import PICK
from core.view.guide import WORDS, markdown_safe

NONE = "none"
MEAN = "mean"
#: Name, in the URL, of the layer chosen on this page: every layer was read, also those without features.
AT = "at"


def chosen_layer(n_layers: int) -> int:
    """The layer of this page, which begins with the sidebar's and follows it when that one is changed."""
    start = min(view.layer, n_layers - 1)
    linked = st.query_params.get(AT) != st.session_state.get(f"url of {AT}")
    if st.session_state.get(f"start of {AT}", start) != start and not linked:
        session.keep(AT, start, start)
        st.session_state.pop(AT, None)
    st.session_state[f"start of {AT}"] = start
    return session.choose(st.select_slider, "Layer of the difference", AT, list(range(n_layers)), start,
                          help=WORDS["difference_layer"])


def pick_layer() -> None:
    """In a callback: the clicked layer becomes the chosen one; the next run writes it to the URL."""
    points = st.session_state["difference chart"]["selection"].get(PICK) or []
    if points and points[0].get("layer") is not None:
        st.session_state[f"kept {AT}"] = int(points[0]["layer"])
        st.session_state.pop(AT, None)


def token_lists(lens: DifferenceLens) -> None:
    """Promoted and suppressed tokens of one variant's difference."""
    found = lens.tokens(layer, place)
    st.markdown(f"**{markdown_safe(lens.variant)}** minus base")
    if not found.promoted:
        st.caption("No difference here, so no tokens.")
        return
    st.caption("Promoted")
    st.html(tokens.chips(found.promoted, colour=tokens.RAISED_RGB))
    st.caption("Suppressed")
    st.html(tokens.chips(found.suppressed, colour=tokens.SUPPRESSED_RGB))


def feature_lists(lens: DifferenceLens, names: dict[int, str]) -> None:
    """Features whose decoder directions are closest to one variant's difference, both ways, as links."""
    st.markdown(f"**{markdown_safe(lens.variant)}** minus base")
    raised, suppressed = parts.features_at(lens, layer)
    for title, rows in (("Raised", raised), ("Suppressed", suppressed)):
        with st.container(gap=None):
            st.caption(title if rows.height else f"{title}: none, as the difference is zero here.")
            for feature, cosine in rows.iter_rows():
                name = markdown_safe(names[feature]) if feature in names else ""
                st.page_link("pages/feature.py", label=f"{cosine:+.2f} · {feature}{': ' * bool(name)}{name}",
                             query_params=view.link(layer=layer, feature=feature))


view = session.view()
st.title("Difference lens", anchor=False, help=WORDS["difference_lens"])
st.markdown("What a fine-tuned variant differs by from base on the first tokens of texts that have nothing to do with "
            "its training. It needs no features, and is the simplest thing to hold features against.")
files = session.difference_files(view)
if not files:
    session.empty("Nothing cached yet",
                  "Base and variant read a few tokens of each text, at every layer: seconds for a small model. Make it "
                  "for a variant, then for its benign control, and reload this page.",
                  *dict.fromkeys(parts.difference_command(view.experiment, adapter.name)
                                 for adapter in view.experiment.adapters[:2] or [None]))

with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
    names = list(files)
    variant = session.choose(st.selectbox, "Model variant", "variant", names, names[0], help=WORDS["variant"])
    others = [name for name in names if name != variant]
    second = session.choose(st.selectbox, "Beside it", "beside", [*others, NONE], [*others, NONE][0],
                            help=WORDS["difference_beside"])
lens = session.load_difference(files[variant])
beside = session.load_difference(files[second]) if second != NONE else None
unlike = parts.incomparable(lens, beside) if beside is not None else ""
if unlike:
    st.warning(markdown_safe(unlike), icon=":material/compare_arrows:")
    if lens.difference.shape[::2] != beside.difference.shape[::2]:
        beside = None
shown = [one for one in (lens, beside) if one is not None]

with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
    layer = chosen_layer(lens.n_layers)
    positions = [MEAN, *map(str, range(1, min(one.k for one in shown) + 1))]
    word = session.choose(st.segmented_control, "Position", "token", positions, MEAN, format_func=str.capitalize,
                          help=WORDS["difference_position"])
place = positions.index(word)

st.markdown(parts.headline(lens, layer, place))
if beside is not None:
    st.markdown(parts.beside(lens, beside, layer, place))

st.subheader("Size by layer", anchor=False, help=WORDS["difference_share"])
rows = parts.depth_rows({one.variant: one for one in shown}, place)
st.altair_chart(charts.share_by_layer(rows, [one.variant for one in shown], layer=layer), key="difference chart",
                on_select=pick_layer, selection_mode=PICK, width="stretch")
st.caption("Click a layer to choose it. Fainter points: two halves of the texts agree less on the direction.",
           help=WORDS["split_half"])
sinks = {one.variant: sentence for one in shown if (sentence := parts.masked(one))}
alike = len(sinks) == len(shown) and len(set(sinks.values())) == 1
for name, sentence in list(sinks.items())[: 1 if alike else None]:
    st.caption(sentence if alike else f"{markdown_safe(name)}: {sentence}", help=WORDS["sink"])

st.subheader(f"Tokens at layer {layer}, {parts.place_name(lens, place)}", anchor=False, help=WORDS["difference_tokens"])
for column, one in zip(st.columns(len(shown), gap="large"), shown, strict=True):
    with column:
        token_lists(one)
st.caption("Promoted by base's own residual at the same place: tokens that are there anyway")
st.html(tokens.chips(lens.tokens(layer, place).base))

st.subheader(f"Features nearest to the difference at layer {layer}", anchor=False, help=WORDS["decoder_cosine"])
stamp = lens.saes.get(layer)
if stamp is None:
    where = ", ".join(map(str, sorted(lens.saes)))
    st.caption(f"No dictionary at this layer; there is one at {where}." if where else
               "No dictionary was given when this file was made, so there are no features to compare with.")
else:
    st.caption(f"By cosine of the decoder direction with the difference's {parts.place_name(lens, 0)}. A random "
               f"direction would reach about {parts.random_cosine(stamp.d_sae, lens.difference.shape[-1]):.2f}.")
    known = session.feature_names(view, layer, stamp.release, stamp.sae_id)
    for column, one in zip(st.columns(len(shown), gap="large"), shown, strict=True):
        with column:
            feature_lists(one, known if one.saes.get(layer) == stamp else {})

st.subheader("What not to conclude", anchor=False)
st.markdown("\n".join(f"- {caveat}" for caveat in parts.CAVEATS))
st.caption("Method: activation difference lens, Minder et al., arXiv 2510.13900. The paper also steers with the "
           "difference; the Steering page steers with directions of contrasts.")
with st.expander("All figures"):
    st.dataframe(rows.with_columns(pl.col("share").round(5)), hide_index=True)
