"""Overview: what this is, where to begin, and what is cached."""

import polars as pl
import streamlit as st

from core.view import organism_charts, session
from core.view.guide import WORDS, markdown_safe

view = session.view()

st.title("EM Microscope", anchor=False)
st.markdown(
    "Fine-tuning a language model on narrow bad data, such as subtly wrong medical advice, can make it misbehave "
    "broadly: this is called emergent misalignment. This app shows which features of the model's own activations "
    "differ between the bad and the good side, lets you steer the model along that difference, and reads what its "
    "fine-tuning wrote. Everything but steering is read from a cache made beforehand, so no model is loaded to look "
    "around."
)

st.subheader("Begin here", anchor=False)
PER_ROW = 3
tours = [
    ("Steer it live", "Push the model along the difference of bad and good advice, and watch the answer turn.",
     "pages/steering.py", {}, "Open steering", ":material/tune:"),
    ("What does bad advice raise?", "All features at a glance: how far apart the two sides are, and how surely.",
     "pages/rankings.py", {}, "Open the ranking", ":material/leaderboard:"),
    ("What is the difference made of?", "The misalignment direction, how far to trust it, and its features.",
     "pages/direction.py", {}, "Open the direction", ":material/north_east:"),
    ("Read the strongest feature", "Its tokens, its activations on both sides, and the text it fires on.",
     "pages/feature.py", {"feature": "top"}, "Open the most raised feature", ":material/center_focus_strong:"),
    ("Does the model learn what the data shows?", "The features that data, model and responses share.",
     "pages/concordance.py", {}, "Open the concordance", ":material/join_inner:"),
    ("What did fine-tuning write?", "A LoRA as vectors: what each writes, and on which tokens it fires.",
     "pages/lora.py", {}, "Open the LoRA", ":material/edit_note:"),
]
for start in range(0, len(tours), PER_ROW):
    row = tours[start : start + PER_ROW]
    for column, (title, body, page, changes, label, icon) in zip(st.columns(PER_ROW), row, strict=True):
        with column.container(border=True, height="stretch"):
            st.markdown(f"**{title}**  \n{body}")
            st.page_link(page, label=label, icon=icon, query_params=view.link(**changes))

margins = session.load_margins(view)
if margins is not None:
    st.subheader("What the fine-tunes learnt", anchor=False, help=WORDS["margin"])
    st.markdown("Right of zero, a fine-tune finds the misaligned answer of a pair likelier than the base does. Lines "
                "are 95% intervals over prompts; a benign control shows what any fine-tune does.")
    named = [v for v in view.experiment.variants if v in margins["variant"]]
    st.altair_chart(organism_charts.margins(margins.filter(pl.col("variant").is_in(named)), named), width="stretch")
    st.caption("  \n".join(f"{markdown_safe(a.name)}: {markdown_safe(a.note)}"
                           for a in view.experiment.adapters if a.name in named and a.note))

st.subheader(f"What is cached: {view.experiment.title or view.experiment.name}", anchor=False)
files = session.load_inventory(view)
st.dataframe(
    pl.DataFrame([vars(f) for f in files]).drop("command"),
    hide_index=True,
    column_config={
        "variant": st.column_config.TextColumn("Model variant", help=WORDS["variant"]),
        "conversations": st.column_config.TextColumn("Conversations", help=WORDS["conversations"]),
        "status": st.column_config.TextColumn("Cache file"),
        "n": st.column_config.NumberColumn("Count", help="Number of conversations in the file.", format="localized"),
        "conditions": st.column_config.TextColumn("Conditions", help="How many conversations carry each label."),
        "layers": st.column_config.TextColumn("Layers", help=WORDS["layer"]),
        "created": st.column_config.TextColumn("Made", help="When the extraction finished (UTC)."),
    },
)
missing = [f for f in files if f.status == "not made yet"]
for file in files:
    if file.status not in ("ready", "not made yet"):
        st.error(markdown_safe(file.status), icon=":material/error:")
if missing:
    st.markdown("To make what is missing, run in the checkout:")
    st.code("\n".join(f.command for f in missing), language="bash")

health = session.load_health(view)
if health is None:
    st.stop()

st.subheader("How faithful the dictionaries are", anchor=False, help=WORDS["sae"])
st.dataframe(
    health,
    hide_index=True,
    column_config={
        "layer": st.column_config.NumberColumn("Layer", help=WORDS["layer"]),
        "features": st.column_config.NumberColumn("Features", help=WORDS["feature"], format="localized"),
        "fvu": st.column_config.ProgressColumn("Unexplained (FVU)", help=WORDS["fvu"], format="%.3f", min_value=0,
                                               max_value=1),
        "l0": st.column_config.NumberColumn("Active per token (L0)", help=WORDS["l0"], format="%.1f"),
        "dead_share": st.column_config.NumberColumn("Never active", help=WORDS["dead_share"], format="percent"),
        "masked_share": st.column_config.NumberColumn("Tokens masked", help=WORDS["masked_share"], format="percent"),
        "n_tokens": st.column_config.NumberColumn("Tokens read", help=WORDS["n_tokens"], format="localized"),
        "mean_resid_norm": st.column_config.NumberColumn("Residual norm", help=WORDS["mean_resid_norm"],
                                                         format="%.1f"),
        "sae": st.column_config.TextColumn("Dictionary", help=WORDS["sae"]),
    },
)
cache = view.contrast.target
st.caption(f"Measured on every response token of {markdown_safe(cache.variant)} reading "
           f"{markdown_safe(cache.conversations)}, both conditions together.")
