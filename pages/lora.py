"""LoRA: what each component of an adapter writes, when it fires, and how much of the model's change that predicts."""

from dataclasses import replace

import polars as pl
import streamlit as st

from core.analysis import lora_features, lora_firing
from core.analysis.lora_files import direction_for
from core.analysis.lora_space import cosines_over_layers, write_direction
from core.view import direction_charts, direction_parts, session, tokens
from core.view import lora_charts as charts
from core.view import lora_parts as parts
from core.view.charts import PICK
from core.view.difference_parts import random_cosine
from core.view.guide import WORDS, markdown_safe

#: Name, in the URL, of the chosen component, such as `19.down_proj.0`.
COMPONENT = "component"
BARS = 12
SCOPES = {"one": "This component", "all": "All that write up to this layer"}
MEASURES = {"activation": "Activation", "preactivation": "Pre-activation"}
OVERLAPS = {"weighted": "Weighted by size", "overlap": "All directions alike", "nearest": "Nearest pair"}


def pick_module() -> None:
    """In a callback: the clicked module's largest component becomes the chosen one."""
    points = st.session_state["lora map"]["selection"].get(PICK) or []
    if points and points[0].get("kind") is not None:
        st.session_state[f"kept {COMPONENT}"] = f"{points[0]['layer']}.{points[0]['kind']}.0"
        st.session_state.pop(COMPONENT, None)


def what_it_writes() -> None:
    """The write direction as features, and its logit lens."""
    left, right = st.columns([3, 2], gap="large")
    with right:
        st.markdown("**Tokens**", help=WORDS["logit_lens"])
        top, bottom = firing.lens(at)
        st.caption("Promoted when the scalar is positive")
        st.html(tokens.chips(top, colour=tokens.RAISED_RGB))
        st.caption("Suppressed")
        st.html(tokens.chips(bottom, colour=tokens.SUPPRESSED_RGB))
    with left:
        st.markdown("**Features**", help=WORDS["decomposition"])
        if book is None:
            st.caption("There is no dictionary in this experiment.")
            return
        found = session.load_written(view, lora, at, near, book)
        named = session.names_at(view, found.table, near)
        session.picked(direction_charts.component_bars(direction_parts.component_rows(found, named, BARS)),
                       "lora writes", near_view)
        explained = found.curve.filter(pl.col("k") == BARS)
        share = "" if explained.is_empty() else (
            f" The {BARS} explain {explained['share'][0]:.0%} of its squared length, {BARS} random ones "
            f"{explained['random_share'][0]:.0%}.")
        st.caption(parts.nearest_sentence(part, near) + share)


def over_layers() -> None:
    """Cosines of the write directions of one module and index, layer by layer."""
    rows = cosines_over_layers(lora.writes.space, part.key.kind, part.key.index)
    names = rows["a"].unique(maintain_order=True).to_list()
    if len(names) < 2:
        return
    off = rows.filter(pl.col("a") != pl.col("b"))["cosine"].abs()
    with st.expander(f"Do other layers write the same? Mean |cosine| {off.mean():.2f}, largest {off.max():.2f}"):
        st.markdown(f"Write directions of {part.key.kind}, component {part.key.index}, layer by layer.",
                    help=WORDS["cosine"])
        st.altair_chart(direction_charts.cosine_map(rows, names), width="stretch")
        st.caption("Signs are a convention: -1 is the same line as 1.")


def what_it_reads() -> None:
    """Features nearest to the read direction."""
    if book is None:
        st.caption("There is no dictionary in this experiment.")
        return
    found = lora_features.read_features(part, firing.gains[part.key.layer], book)
    named = session.names_at(view, found.table.head(60), near)
    st.markdown("**Features it listens to**", help=WORDS["read_cosine"])
    number = st.column_config.NumberColumn
    session.picked_row(named.select("feature", "name", "decoder_cosine", "encoder_cosine"), "lora reads", near_view,
                       height=320, column_config={
                           "feature": number("Feature", help=WORDS["feature"], format="%d"),
                           "name": st.column_config.TextColumn("Fires on", help=WORDS["fires_on"], width="large"),
                           "decoder_cosine": number("Decoder cosine", help=WORDS["read_cosine"], format="%+.2f"),
                           "encoder_cosine": number("Encoder cosine", help=WORDS["read_cosine"], format="%+.2f"),
                       })
    st.caption(f"{parts.nearest_sentence(part, near)} A random direction would reach about "
               f"{random_cosine(book.d_sae, book.d_model):.2f}.")


def on_text() -> None:
    """A matched pair of responses side by side, and the strongest stretches of text, shaded by the scalar."""
    if firing.scalars(at) is None:
        st.info(parts.not_kept(view.experiment.name, lora), icon=":material/info:")
        return
    scale = parts.scale_of(firing, at)
    st.html(tokens.signed_legend("", "", scale=scale))
    pairs = parts.matched_prompts(firing)
    if pairs:
        prompt = session.choose(st.selectbox, "Matched pair of responses", "pair", list(pairs), next(iter(pairs)))
        for column, row, hue in zip(st.columns(2, gap="large"), pairs[prompt], ("orange", "blue"), strict=True):
            with column:
                st.markdown(f"**:{hue}[{markdown_safe(firing.conversations['condition'][row])}]** · mean scalar "
                            f"{firing.mean(at)[row]:+.3g}")
                values, texts = firing.on_tokens(row, at), firing.texts(row)
                st.html(tokens.signed(texts, values, scale=scale, faint=[v != v for v in values], what="scalar"))
    with st.expander("Where it is strongest"):
        for column, positive in zip(st.columns(2, gap="large"), (True, False), strict=True):
            with column:
                st.markdown("**Most positive**" if positive else "**Most negative**")
                found = parts.windows(firing, at, positive=positive)
                if not found:
                    st.caption("Never on this text.")
                for w in found:
                    st.caption(f"{w.value:+.3g} · {markdown_safe(w.group)} · {markdown_safe(w.id)}")
                    st.html(tokens.signed(w.tokens, w.values, scale=scale, faint=[v != v for v in w.values],
                                          what="scalar"))


def effects() -> None:
    """What is written, as a change of features, beside the contrasts."""
    if book is None or not firing.writing.size:
        st.caption("It takes a dictionary, and modules that write into the residual stream.")
        return
    usable = part.writes_residual and part.key.layer <= near
    scope = session.choose(st.segmented_control, "Of", "scope", list(SCOPES) if usable else ["all"],
                           "one" if usable else "all", format_func=SCOPES.__getitem__, label_visibility="collapsed")
    table = session.load_effects(lora, book, at if scope == "one" else None)
    own = view.experiment.model_contrast(adapter)
    kinds = {c.kind: c.name for c in reversed(view.experiment.contrasts) if session.is_cached(view.experiment, c)}
    names = list(dict.fromkeys([*([own.name] if own else []), *(kinds[k] for k in ("data", "response") if k in kinds)]))
    rankings = session.load_rankings(near_view, names)
    best = pl.concat([table.sort("effect", descending=True).head(40), table.sort("effect").head(40)]).unique("feature")
    named = session.names_at(view, best, near).sort(pl.col("effect").abs(), descending=True)
    joined = direction_parts.joined(named, rankings)
    groups = [c for c in joined.columns if c.startswith("effect: ")]
    columns = ["feature", "name", "effect", *(c for n in rankings for c in (f"effect {n}", f"rank {n}")), *groups]
    number = st.column_config.NumberColumn
    config = {
        "feature": number("Feature", help=WORDS["feature"], format="%d"),
        "name": st.column_config.TextColumn("Fires on", help=WORDS["fires_on"], width="medium"),
        "effect": number("Predicted", help=WORDS["lora_effect"], format="%+.3g"),
        **{g: number(g.removeprefix("effect: "), help=WORDS["lora_effect"], format="%+.3g") for g in groups},
        **{f"effect {n}": number(f"Effect size, {n}", help=WORDS["effect_size"], format="%+.2f") for n in rankings},
        **{f"rank {n}": number(f"Rank, {n}", help=WORDS["rank"], format="%d") for n in rankings},
    }
    session.picked_row(joined.select(columns), f"lora effects {scope}", near_view, height=330, column_config=config)
    st.caption(f"Layer {near}: the 40 most raised and the 40 most lowered features, largest effect first. Beside them, "
               "what the contrasts measured.")
    feature = session.selected(near_view, book.d_sae, {}) if near == view.layer else None
    if feature is not None:
        moved = session.load_movers(lora, book, feature).head(5)
        told = ", ".join(f"{m['layer']}.{m['module'].rsplit('.', 1)[-1]}.{m['index']} {m['effect']:+.3g}"
                         for m in moved.iter_rows(named=True))
        st.markdown(f"Feature {feature} is moved most by {markdown_safe(told)}.")
        st.page_link("pages/feature.py", label=f"Open feature {feature}", icon=":material/arrow_forward:",
                     query_params=view.link(feature=feature))
    st.download_button("All features, CSV", lambda: table.write_csv().encode(),
                       f"{view.experiment.name}_{adapter}_layer{near}_{scope}.csv", "text/csv",
                       icon=":material/download:", on_click="ignore")


def prediction() -> None:
    """Predicted against measured: the model contrast at every cached layer, and other variants' as controls."""
    found, notes = session.load_predictions(view, lora)
    own = next((p for p in found if p.of == p.by), None)
    for note in notes:
        st.caption(markdown_safe(note))
    if own is None:
        return
    layer = view.layer if view.layer in [p.layer for p in own.layers] else own.layers[-1].layer
    st.markdown(parts.prediction_sentence(own, layer))
    st.markdown(parts.other_sentence(own, [p for p in found if p is not own], layer))
    one = next(p for p in own.layers if p.layer == layer)
    left, right = st.columns(2, gap="large")
    with left:
        if one.table is None:
            st.caption(f"Layer {layer} has no dictionary.")
        else:
            measure = session.choose(st.segmented_control, "Measured", "measured", list(MEASURES), "activation",
                                     format_func=MEASURES.__getitem__, label_visibility="collapsed")
            column = "mean_diff" if measure == "activation" else "preactivation"
            rows = session.names_at(view, one.table, layer)
            session.picked(charts.predicted_measured(rows, column, f"Measured: change of {MEASURES[measure].lower()}"),
                           "lora predicted", replace(view, layer=layer))
    with right:
        number = st.column_config.NumberColumn
        st.dataframe(
            parts.prediction_rows(found).select("of", "layer", "cosine", "norm_ratio", "explained", "preactivation",
                                                "activation", "cosine_range", "n_prompts"),
            hide_index=True, height=340, column_config={
                "of": st.column_config.TextColumn("Change of", help=WORDS["variant"]),
                "layer": number("Layer", help=WORDS["layer"], format="%d"),
                "cosine": number("Cosine", help=WORDS["lora_prediction"], format="%.2f"),
                "norm_ratio": number("Length", help=WORDS["norm_ratio"], format="percent"),
                "explained": number("Explained", help=WORDS["lora_explained"], format="percent"),
                "preactivation": number("Pre-activation", help=WORDS["preactivation"], format="%.2f"),
                "activation": number("Activation", help=WORDS["activation_change"], format="%.2f"),
                "cosine_range": st.column_config.TextColumn("Cosine, 95%"),
                "n_prompts": number("Prompts", format="%d"),
            })


def probes() -> None:
    """Whether the scalars tell conditions apart, and whether that is one distinction or several."""
    by_layer = session.toggle("Layer by layer", "probes", help="A probe for every layer and question: some seconds.")
    table = session.load_probes(lora, by_layer=by_layer)
    if table.is_empty():
        st.caption("It takes a set with two opposed conditions and ten prompts.")
        return
    number, words = st.column_config.NumberColumn, st.column_config.TextColumn
    whole = table.filter(pl.col("layer").is_null()).with_columns(
        range=pl.format("{} to {}", pl.col("low").round(2), pl.col("high").round(2)),
        trained_on=pl.when(pl.col("question") == pl.col("trained_on")).then(pl.lit("other prompts of the same"))
        .otherwise("trained_on"))
    st.dataframe(whole.select("question", "trained_on", "auroc", "range", "n_prompts"), hide_index=True,
                 column_config={"question": words("Question"), "trained_on": words("Fitted on"),
                                "auroc": number("AUROC", help=WORDS["probe"], format="%.2f"),
                                "range": words("95%"), "n_prompts": number("Prompts", format="%d")})
    if by_layer:
        st.altair_chart(charts.probes_by_layer(table), width="stretch")


def compare() -> None:
    """Write spaces of this adapter and another."""
    others = [name for name in session.adapters_here(view) if name != adapter]
    if not others:
        st.caption("There is no other adapter here to compare with.")
        return
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        other = session.choose(st.selectbox, "Beside", "beside", others, others[0], help=WORDS["variant"])
        by = session.choose(st.segmented_control, "Overlap", "overlap", list(OVERLAPS), "weighted",
                            format_func=OVERLAPS.__getitem__, help=WORDS["write_space"])
    rows = session.load_angles(view, adapter, other)
    if rows.is_empty():
        st.caption("They change no writing module in common.")
        return
    st.altair_chart(charts.write_spaces(rows, by), width="stretch")
    mean = rows.select(pl.mean("weighted", "overlap", "chance")).row(0, named=True)
    st.markdown(f"Over {rows.height} modules that both change: overlap **{mean['overlap']:.2f}** where random spaces "
                f"would have {mean['chance']:.2f}; weighted by size **{mean['weighted']:.2f}**.")


view = session.view()
st.title("LoRA", anchor=False, help=WORDS["lora"])
st.markdown("What fine-tuning added, as vectors that are switched on token by token: what each writes, when it fires, "
            "and how much of the model's change that accounts for.")
files = session.lora_files_of(view)
if not files:
    names = [a.name for a in view.experiment.adapters]
    if not names:
        session.empty("No adapter here", "This experiment has no fine-tuned variant; add one to its preset.")
    session.empty("Nothing cached yet",
                  "The fine-tuned model reads some conversations once, and the scalar of each component is kept for "
                  "every response. Then reload this page.",
                  *(parts.lora_command(view.experiment.name, name) for name in names[:2]))
with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
    default = view.contrast.target.variant if view.contrast.target.variant in files else next(iter(files))
    adapter = session.choose(st.selectbox, "Adapter", "adapter", list(files), default, help=WORDS["lora"])
    sets = files[adapter]
    chosen = session.choose(st.selectbox, "Read on", "on", list(sets), next(iter(sets)), help=WORDS["firing_text"],
                            format_func=lambda name: name.replace("+", ", "))
lora = session.load_lora(view, adapter, sets[chosen])
firing = lora.firing
st.markdown(parts.headline(lora))
if firing.masked_share >= 1e-4:
    st.caption(f"{firing.masked_share:.2%} of the response tokens, layers together, are left out as attention sinks.",
               help=WORDS["sink"])

order = firing.components.with_row_index("at").sort("on_text", descending=True)
labels = {str(lora.parts[i].key): parts.component_label(lora.parts[i].key, s)
          for i, s in order.select("at", "text_share").iter_rows()}
places = {str(c.key): i for i, c in enumerate(lora.parts)}
st.subheader("Where the update sits", anchor=False)
by = session.choose(st.segmented_control, "Colour", "colour", list(parts.COLOURS), "text_share",
                    format_func=parts.COLOURS.__getitem__, label_visibility="collapsed", help=WORDS["lora_colour"])
drawn = st.container()
usual = next((str(lora.parts[i].key) for i in order["at"] if lora.parts[i].writes_residual), next(iter(labels)))
picked = session.choose(st.selectbox, "Component", COMPONENT, list(labels), usual,
                        format_func=labels.__getitem__, help=WORDS["lora_component"])
at = places[picked]
part = lora.parts[at]
with drawn:
    st.altair_chart(charts.adapter_map(parts.map_rows(lora), by, part.key.layer, part.key.kind), key="lora map",
                    on_select=pick_module, selection_mode=PICK, width="stretch")
    st.caption("Click a module to choose its largest component.", help=WORDS["lora_colour"])

near = lora_features.nearest_layer(part, session.sae_layers(view))
if part.writes_residual and near is not None and view.layer in session.sae_layers(view) and view.layer > near:
    near = view.layer
near_view = view if near is None else replace(view, layer=near)
book = None if near is None else session.load_dictionary(view, near)
row = firing.components.row(at, named=True)
written = write_direction(part, firing.gains[part.key.layer])
direction = direction_for(part, session.load_contrast_directions(view)) if written is not None else None

st.subheader(f"Layer {part.key.layer}, {part.key.kind}, component {part.key.index}", anchor=False,
             help=WORDS["lora_component"])
with st.container(horizontal=True, gap="medium"):
    st.metric("Singular value", f"{part.singular_value:.3g}", width=150, help=WORDS["singular_value"])
    st.metric("Share on this text", f"{row['text_share']:.1%}", width=150, help=WORDS["text_share"])
    st.metric("Share in the weights", f"{part.share:.1%}", width=150, help=WORDS["weight_share"])
    if written is not None:
        st.metric("Cosine", "none" if direction is None else f"{direction.cosine(written):+.2f}", width=150,
                  help=WORDS["lora_cosine"])
st.markdown(parts.what_it_touches(part) + ("" if direction is None else
            f" The cosine is with the direction of {markdown_safe(direction.name)} at layer {direction.layer}."))
if part.writes_residual:
    what_it_writes()
    over_layers()
elif part.reads_residual:
    what_it_reads()

st.subheader("When it fires", anchor=False, help=WORDS["lora_scalar"])
groups = [f"{s}, {c}" if c else s for s, c in firing.groups]
st.altair_chart(charts.firing_strip(parts.group_rows(firing, at), groups), width="stretch")
sentences = []
for question in lora_firing.questions(firing):
    tested = session.load_firing_table(lora, question)
    if tested is not None:
        sentences.append(parts.firing_sentence(question, tested.row(at, named=True),
                                               lora_firing.component_auroc(firing, question, at)))
st.markdown("\n".join(sentences))
on_text()

st.subheader("What it does to features", anchor=False, help=WORDS["lora_effect"])
effects()

st.subheader("How much of the measured change does this predict?", anchor=False, help=WORDS["lora_prediction"])
prediction()

st.subheader("What the scalars together tell apart", anchor=False, help=WORDS["probe"])
probes()

st.subheader("Beside another adapter", anchor=False, help=WORDS["write_space"])
compare()

st.subheader("Use in steering", anchor=False)
if written is None:
    st.caption("Only what is written into the residual stream can be steered with: choose an o_proj or down_proj "
               "component.")
else:
    size = part.singular_value * parts.mean_written(firing, at)
    carried = lora_features.as_direction(
        part, firing.gains[part.key.layer], firing.model_id, size=size, adapter=adapter,
        resid_norm=firing.mean_resid_norm(part.key.layer))
    if st.button("Steer with this component", icon=":material/tune:", on_click=session.carry, args=([carried],)):
        st.toast("The component is on the Steering page.")
        if page := session.steering_page():
            st.switch_page(page)
    st.caption(f"The direction is what the component adds on average over a response here, of length {abs(size):.3g}.")
