"""Steering: the direction and its components on sliders, applied while the model answers, pane beside pane."""

import json

import streamlit as st

from core.analysis import sweep as sweeps
from core.steering_plan import Dice, Hold, Plan
from core.store.places import experiment_folder
from core.store.sweep_file import sweep_file
from core.view import direction_parts, session, steering_desk, sweep_charts, sweep_text
from core.view.direction_charts import METHOD_NAMES
from core.view.guide import WORDS, markdown_safe
from core.view.session import stage
from core.view.session.desk import Desk
from core.view.steering_desk import FACTORS, MODES, Asked, Channel, along
from core.view.steering_parts import EXAMPLES, feature_numbers

PARTS_K, MOST_PARTS = 5, 10
STRENGTH = 0.15
SCOPES = {"all": "Every token", "prompt": "The question", "response": "The answer", "first:10": "Its first 10 tokens"}
SEEDS_TEMPERATURE = 0.8
SHOWN = {"live": "Live", "sweep": "Sweep"}
#: Set by the button, taken by the run that starts the generation.
ASKED = "steering asked"
#: Seconds between two looks at a running generation.
BEAT = 0.4


def ask() -> tuple[str, bool, bool]:
    """The question; whether it is asked now; whether it goes on from the last answers."""
    st.pills("Examples", EXAMPLES, key="example", label_visibility="collapsed",
             on_change=lambda: st.session_state["example"] and session.put("prompt", st.session_state["example"]))
    with st.form("ask", border=False, enter_to_submit=True):
        asked = session.text("Question", "prompt", EXAMPLES[0], st.text_area, height=80, max_chars=2000,
                             label_visibility="collapsed", placeholder="Ask something")
        with st.container(horizontal=True, vertical_alignment="center", gap="medium"):
            st.form_submit_button("Generate", icon=":material/play_arrow:", type="primary",
                                  on_click=lambda: st.session_state.update({ASKED: True}))
            going_on = session.toggle("Go on from the last answers", "follow", help=WORDS["follow"])
    return asked.strip(), st.session_state.pop(ASKED, False), going_on


def take_carried() -> None:
    """Choose the components that the Direction page sent, once."""
    sent = [d.origin for d in session.carried() if "feature" in d.origin]
    if sent and st.session_state.get("steering took") is not session.carried():
        st.session_state["steering took"] = session.carried()
        session.put("method", sent[0]["method"])
        session.put("parts", [origin["feature"] for origin in sent])
        st.session_state.pop("parts at", None)


def components() -> list[Channel]:
    """The chosen features of the direction's decomposition and what they leave, as channels."""
    take_carried()
    method = session.choose(st.selectbox, "Method", "method", list(METHOD_NAMES), "omp",
                            format_func=METHOD_NAMES.__getitem__, help=WORDS["method"])
    found = session.load_decomposition(view, sides, weighting, book, method)
    if found is None:
        st.caption("This method cannot be used with this SAE.")
        return []
    best = [str(f) for f in found.table["feature"].head(30)]
    place = (view.experiment.name, view.contrast.name, view.layer, view.position, weighting, method)
    if st.session_state.get("parts at", place) != place:
        session.forget("parts")
    st.session_state["parts at"] = place
    chosen = session.several("Components", "parts", best, best[:PARTS_K], MOST_PARTS, help=WORDS["components"],
                             format_func=lambda f: f"{f}: {names.get(int(f), '')}")
    made = direction_parts.steering_parts(found, book, [int(f) for f in chosen], names)
    parts = [Channel(f"c{f}", d.name, d, int(f)) for f, d in zip(chosen, made, strict=False)]
    return [*parts, Channel("rest", "Remainder", made[-1])]


def by_number() -> tuple[Hold, ...]:
    """Any features by number: pushed along as further channels, or held at an activation."""
    numbers, wrong = feature_numbers(session.text("Features", "features", placeholder="475, 718",
                                                  help=WORDS["features_by_number"]), book.d_sae)
    held = session.toggle("Hold their activation", "hold", help=WORDS["hold"])
    if wrong:
        st.caption(wrong)
    holds = []
    for f in numbers:
        name = f"{f}: {names.get(f, '')}"
        if not held:
            desk.channel(Channel(f"f{f}", name, along(f, book.W_dec[f], whole, name), f))
            continue
        top = max(float(info.filter(info["feature"] == f)["max_act"].item() or 0), 1.0)
        value = session.number(markdown_safe(name), f"h{f}", 0.0, float(round(2 * top)), float(round(top)), 0.5,
                               help=WORDS["hold"])
        holds.append(Hold(view.layer, f, value))
    return tuple(holds)


def show_sweep() -> None:
    """What every strength does to the margin and to the text, as it was measured."""
    if sweep is None or view.layer not in sweep.layers:
        session.empty("No sweep yet", "A sweep measures what every strength does: to the margin on held-out pairs, and "
                      "to the text's quality. It can be interrupted and goes on where it stopped.",
                      f"python -m core sweep {view.experiment.name} {view.contrast.name} --layers {view.layer}")
    ends = session.coherent_range(sweep, view.layer)
    pairs = session.choose(st.segmented_control, "Pairs", "pairs", list(sweep.pairs), next(iter(sweep.pairs)),
                           help=WORDS["pairs"])
    for sentence in sweep_text.finding_sentences(found, sweep.spec.get("variant")) if (
            found := sweeps.findings(sweep, view.layer, pairs)) else []:
        st.markdown(sentence)
    st.subheader("Margin", anchor=False, help=WORDS["sweep_margin"])
    st.altair_chart(sweep_charts.margin_curves(sweeps.curves(sweep, view.layer, pairs), ends), width="stretch")
    st.subheader("What the text is like", anchor=False, help=WORDS["coherent"])
    quality = sweeps.quality(sweep, view.layer)
    judged = quality["misaligned"].null_count() == 0
    kinds = ["perplexity", "repeated", *(["misaligned"] if judged else [])]
    for column, what in zip(st.columns(len(kinds), gap="large"), kinds, strict=True):
        column.altair_chart(sweep_charts.quality_curve(quality, what, ends), width="stretch")
    st.caption(f"Shaded: coherent, {sweep_text.range_words(ends)}. {len(sweep.prompts)} questions, "
               f"{quality['n'].max()} answers a point.")
    st.download_button("Sweep, JSON", lambda: sweep_file(experiment_folder(view.experiment), view.contrast.name)
                       .read_bytes(), f"sweep__{view.contrast.name}.json", "application/json",
                       icon=":material/download:", on_click="ignore")


@st.fragment(run_every=BEAT if any(not t.over for t in session.turns()) else None)
def running() -> None:
    """The newest generation, and older ones that still run; looks again while any does."""
    shown = session.turns()
    if not shown:
        return
    now = [t for t in shown if not t.over]
    if now:
        with st.container(horizontal=True, vertical_alignment="center", gap="medium"):
            st.button("Stop", icon=":material/stop:", on_click=lambda: [t.stop() for t in now])
            n, waiting = session.busy(view.experiment)
            st.caption(f"{n} on their way, {waiting} waiting, of all sessions" if n + waiting > len(now) else "")
    for turn in reversed(shown):
        if turn is shown[-1] or not turn.over:
            stage.draw(turn, view.experiment, shaded=shaded, sweep=sweep)
    if not now and st.session_state.get("steering drawn") != shown[-1].number:
        st.session_state["steering drawn"] = shown[-1].number
        st.rerun()


view = session.view()
st.title("Steering", anchor=False, help=WORDS["steering"])
sides = session.open_sides(view)
token = view.position == "response" and st.session_state.get("kept weighting") == "token"
weighting = "token" if token else "response"
whole = session.load_measured(view, sides, view.layer, weighting).direction
st.markdown(f"{markdown_safe(view.contrast.title or view.contrast.name)} · layer {view.layer}. Add the direction to "
            "the residual stream and watch the answer change.")
sweep = session.load_sweep(view)
if session.choose(st.segmented_control, "Show", "show", list(SHOWN), "live", format_func=SHOWN.__getitem__,
                  label_visibility="collapsed") == "sweep":
    show_sweep()
    st.stop()
prompt, go, follow = ask()
left, right = st.columns([5, 12], gap="large")

with left:
    desk = Desk(view)
    own = Channel("push", f"Direction: {view.contrast.name}", whole)
    desk.channel(own, STRENGTH, 0.01, help=WORDS["push"], coherent=session.coherent_range(sweep, view.layer))
    mode = session.choose(st.segmented_control, "Compare", "compare", list(MODES), "strengths",
                          format_func=MODES.__getitem__, help=WORDS["compare_panes"])
    tuned = [a.name for a in view.experiment.adapters]
    if mode == "strengths":
        factors = session.within("Panes", "panes", list(FACTORS), [-1.0, 0.0, 1.0],
                                 format_func=lambda f: f"{f:g}×".replace("-", "\N{MINUS SIGN}"), help=WORDS["factors"])
    if mode == "seeds":
        n_seeds = session.choose(st.segmented_control, "Seeds", "seeds", [2, 3, 4], 2, help=WORDS["seeds"])
    if mode == "variants" and not tuned:
        session.empty("No fine-tuned variant", "This experiment has no adapter to set beside the base.")
    options = tuned if mode == "variants" else ["base", *tuned]
    variant = session.choose(st.selectbox, "Fine-tuned" if mode == "variants" else "Who answers",
                             "tuned" if mode == "variants" else "answers", options, options[0], help=WORDS["variant"])
    lora = 1.0
    if variant != "base":
        lora = session.number("Strength of its LoRA", "lora", -1.0, 2.0, 1.0, 0.05, help=WORDS["lora_strength"])
    control = session.toggle("Random control", "control", help=WORDS["random_control"])
    holds: tuple[Hold, ...] = ()
    book = session.load_dictionary(view, view.layer)
    if book is None:
        st.caption(f"Layer {view.layer} has no SAE, so the direction has no components here.")
    else:
        info = session.load_feature_info(view, sides)
        names = session.feature_names(view, view.layer, book.release, book.sae_id)
        with st.expander("Components", icon=":material/tune:", expanded=bool(session.carried())):
            parts = components()
            st.button("Spread the direction over them", icon=":material/call_split:", disabled=not parts,
                      help=WORDS["spread"], on_click=desk.spread(own, parts, STRENGTH))
            for one in parts:
                desk.channel(one, 0.0, 0.001)
        with st.expander("Features by number", icon=":material/tag:"):
            holds = by_number()
    with st.expander("How tokens are chosen", icon=":material/casino:"):
        dice = Dice(
            session.number("Temperature", "temperature", 0.0, 1.5, 0.0, 0.1, help=WORDS["temperature"]),
            session.number("Top p", "top-p", 0.1, 1.0, 1.0, 0.05, help=WORDS["top_p"]),
            session.number("Longest answer, tokens", "tokens", 10, 200, 60, 10),
            session.number("Repetition penalty", "penalty", 1.0, 1.5, 1.0, 0.05, help=WORDS["penalty"]),
        )
        seed = session.number("Seed", "seed", 0, 20, 0, 1, help=WORDS["seed"])
        scope = session.choose(st.selectbox, "Steer at", "scope", list(SCOPES), "all", format_func=SCOPES.__getitem__,
                               help=WORDS["scope"])
    st.button("Reset all sliders", icon=":material/restart_alt:", on_click=desk.reset)

asked = Asked(prompt, desk.pushes(), holds, variant, lora, seed, control)
if mode == "strengths":
    panes = steering_desk.strengths(asked, factors)
elif mode == "variants":
    panes = steering_desk.variants(asked, variant)
else:
    panes = steering_desk.seeds(asked, n_seeds)
    if dice.temperature == 0:
        dice = Dice(SEEDS_TEMPERATURE, dice.top_p, dice.max_new_tokens, dice.repetition_penalty)
if follow and session.turns():
    panes = steering_desk.followed(panes, stage.answers_of(session.turns()[-1]))
if go and prompt:
    session.start(view.experiment, Plan(view.experiment.name, panes, dice, scope, whole))
    st.rerun()

with right:
    shaded = session.toggle("Shade tokens by their projection", "shaded", help=WORDS["shaded"])
    running()
    done = [t for t in session.turns() if t.over]
    if not session.turns():
        st.caption("Press Generate. The model is loaded with the first question, once.")
    for turn in reversed(done):
        if turn is not session.turns()[-1]:
            with st.expander(markdown_safe(turn.plan.prompt), icon=":material/history:"):
                stage.draw(turn, view.experiment, shaded=shaded, sweep=sweep)
    if done:
        with st.expander("The last answers as code", icon=":material/code:"):
            commands, script = stage.code(done[-1], view.experiment)
            if commands:
                st.code(commands, language="bash", wrap_lines=True)
            st.code(script, language="python")
        with st.container(horizontal=True, gap="small"):
            st.download_button("Session, JSON", lambda: json.dumps(session.records(done), indent=1).encode(),
                               "steering_session.json", "application/json", icon=":material/download:",
                               on_click="ignore")
            st.button("Clear", icon=":material/delete:", on_click=session.forget_turns, help=WORDS["clear_turns"])
    with st.expander("Link to this setting", icon=":material/link:"):
        st.code(stage.share_link(), language=None, wrap_lines=True)
