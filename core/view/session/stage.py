"""The panes of a generation on the Steering page: drawn from its snapshot, anew while it runs."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import streamlit as st

from core.directions import Direction
from core.paths import ROOT
from core.specs import Experiment
from core.steering_plan import Pane
from core.store.places import experiment_folder
from core.store.sweep_file import Sweep
from core.view import steering_code, steering_desk, steering_panes
from core.view.guide import markdown_safe
from core.view.session.generations import Turn, queue
from core.view.steering_panes import Shown
from core.view.steering_parts import progress_words
from core.view.sweep_text import known_margin

#: Below this cosine with the probe a pane's push counts as neither along it nor against it.
ALONG = 0.2


def draw(turn: Turn, experiment: Experiment, *, shaded: bool = False, sweep: Sweep | None = None) -> None:
    """A turn's question and its panes, as far as they have come; beneath a pane also what the sweep knows of it."""
    st.markdown(f"**{markdown_safe(turn.plan.prompt)}**")
    waiting = turn.error or queue(turn, experiment)
    if turn.error:
        st.error(markdown_safe(turn.error), icon=":material/error:")
    snapshot = turn.snapshot()
    panes = turn.plan.panes
    given: list[Shown] = []
    for n, pane in enumerate(panes):
        more = [known_margin(pane, turn.plan, sweep)]
        nats = turn.divergences.get(n)
        if nats is not None and len(nats):
            more.append(f"KL {float(np.mean(nats)):.2f} nats a token")
        sign = leaning(pane, turn.plan.probe)
        if snapshot is None:
            given.append(Shown(pane.name, steering_desk.what(pane), sign))
            continue
        beside = snapshot.answers[pane.beside] if pane.beside is not None else None
        given.append(steering_panes.shown(snapshot.answers[n], beside, pane.name, steering_desk.what(pane), sign, more))
    low, high = steering_panes.value_range(given)
    plain = [p.values for p in given if not len(p.reference) and len(p.values)]
    middle = float(np.mean(np.concatenate(plain))) if plain else 0.0
    n_tokens = max((len(p.pieces) for p in given), default=0)
    per_row = 2 if len(panes) == 4 else min(len(panes), 3)
    for start in range(0, len(given), per_row):
        for column, one in zip(st.columns(per_row, gap="medium"), given[start : start + per_row], strict=False):
            column.html(steering_panes.pane(one, low=low, high=high, waiting="" if turn.error else waiting or "…",
                                            shaded=shaded, n_tokens=n_tokens, middle=middle))
    if snapshot is not None:
        st.caption(progress_words(snapshot.n_tokens, snapshot.tokens_per_second, snapshot.first_token_seconds))
    if turn.problem:
        st.warning(markdown_safe(turn.problem), icon=":material/edit_off:")


def leaning(pane: Pane, probe: Direction | None) -> float:
    """1 where the pane's pushes point along the probe, -1 against it, 0 neither."""
    if probe is None or not pane.pushes:
        return 0.0
    along = probe.cosine(np.sum([push.vector for push in pane.pushes], axis=0))
    return float(np.sign(along)) if abs(along) >= ALONG else 0.0


def code(turn: Turn, experiment: Experiment) -> tuple[str, str]:
    """(commands, Python) that give this turn again; the direction files they name are written when they are not."""
    from core.store.steering_log import files_of

    files = files_of(turn.plan, experiment_folder(experiment))
    root = Path(ROOT)
    return steering_code.commands(turn.plan, files, root), steering_code.script(turn.plan, files, root)


def answers_of(turn: Turn) -> list[tuple[Pane, str]]:
    """Each pane with what it said; empty before a turn is over."""
    snapshot = turn.snapshot()
    if snapshot is None or not turn.over:
        return []
    return [(pane, answer.text) for pane, answer in zip(turn.plan.panes, snapshot.answers, strict=True)]


def share_link() -> str:
    """The address of this page with everything that is chosen."""
    base = (st.context.url or "").partition("?")[0]
    return f"{base}?{urlencode(dict(st.query_params))}"
