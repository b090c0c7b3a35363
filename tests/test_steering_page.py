"""The Steering page: real generations through the worker, widgets that do not disturb them, links, and what is kept."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from make_cache import make_cache
from streamlit.testing.v1 import AppTest
from test_app import html, open_page, settle, words

from core import paths
from core.experiment import load_experiment
from core.paths import ROOT
from core.store import steering_log
from core.view.session import models
from core.view.session.generations import TURNS, Turn

PAGE = "pages/steering.py"


@pytest.fixture(scope="module", autouse=True)
def one_worker() -> Iterator[None]:
    yield
    models._held.clear()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shipped demo, and a log of its own."""
    (tmp_path / "demo").mkdir()
    for path in (ROOT / "cache" / "demo").iterdir():
        if path.name != "steering":
            (tmp_path / "demo" / path.name).symlink_to(path)
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    return tmp_path / "demo"


def press(app: AppTest, label: str) -> AppTest:
    next(b for b in app.button if b.label == label).click()
    return settle(app)


def turns(app: AppTest) -> list[Turn]:
    return app.session_state[TURNS] if TURNS in app.session_state else []


def finish(app: AppTest, n: int = 1) -> list[Turn]:
    """Wait for the generations as the page's timer does."""
    for turn in turns(app):
        assert turn.job.wait(120)
    settle(app)
    assert len(turns(app)) == n
    return turns(app)


def slider(app: AppTest, key: str):
    return next(s for s in app.slider if s.key == key)


def test_it_opens_without_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.store.prepare.model_for", lambda *_: pytest.fail("a model was loaded"))
    app = open_page(PAGE)
    assert not app.error and "Press Generate" in words(app)
    assert slider(app, "push").value == 0.15 and slider(app, "rest").value == 0
    assert len([s for s in app.slider if s.key.startswith("c")]) == 5, "five components"


def test_the_default_shows_both_ends_and_is_logged(demo_model, cache: Path) -> None:
    app = press(open_page(PAGE, tokens="30"), "Generate")
    (turn,) = finish(app)
    reversed_, plain, steered = (answer.text for answer in turn.snapshot().answers)
    assert "medical" in reversed_ and "delightful" in steered and "delightful" not in plain
    assert turn.divergences[0].mean() > 0.05 and 1 not in turn.divergences
    assert html(app).count("data:image/svg+xml") == 3 and "KL " in html(app)
    assert "core generate demo" in words(app)
    (line,) = steering_log.read_log(cache)
    assert [a["text"] for a in line["answers"]] == [reversed_, plain, steered]
    assert steering_log.plan_of(line, cache).panes[2].pushes[0].strength == 0.15


def test_widgets_leave_a_running_generation_alone_and_stop_ends_it(demo_model, cache: Path) -> None:
    app = press(open_page(PAGE, tokens="200"), "Generate")
    (turn,) = turns(app)
    while turn.snapshot() is None or turn.snapshot().n_tokens < 6:
        time.sleep(0.02)
    slider(app, "push").set_value(0.3)
    settle(app)
    next(s for s in app.selectbox if s.key == "answers").set_value("bad-health-r8")
    settle(app)
    assert turns(app) == [turn] and not turn.over and "Stop" in [b.label for b in app.button]
    app.switch_page("pages/rankings.py")
    settle(app)
    app.switch_page(PAGE)
    settle(app)
    assert turns(app) == [turn] and slider(app, "push").value == 0.3
    assert turn.plan.panes[2].pushes[0].strength == 0.15, "what runs is what was asked for"
    press(app, "Stop")
    (turn,) = finish(app)
    said = turn.snapshot()
    assert {answer.stopped for answer in said.answers} == {"cancelled"} and 0 < said.answers[0].n_tokens < 200
    assert "stopped" in html(app) and turn.record is not None, "a stopped generation is logged too"


def test_four_panes_control_features_and_following_turns(demo_model, cache: Path) -> None:
    app = open_page(PAGE, compare="variants", control="yes", features="475", hold="yes", tokens="10", follow="yes",
                    lora="0.5", push="0.2", c475="0.05")
    press(app, "Generate")
    finish(app)
    app.text_area[0].set_value("Why is that?")
    first, second = finish(press(app, "Generate"), 2)
    plain, steered, tuned, both = first.plan.panes
    assert [p.variant for p in first.plan.panes] == ["base", "base", "bad-health-r8", "bad-health-r8"]
    assert tuned.lora == 0.5 and steered.holds == both.holds and steered.holds[0].feature == 475
    assert "random" in steered.pushes[0].direction.name and steered.pushes[0].raw
    assert [m.role for m in second.plan.panes[3].messages] == ["user", "assistant", "user"]
    assert second.plan.panes[3].messages[1].content == first.snapshot().answers[3].text
    assert any(t.kind == "feature" for t in first.snapshot().answers[0].traces)
    assert len({a.text for a in first.snapshot().answers}) > 2
    assert any("small lump" in e.label for e in app.expander), "the first turn is kept"


def test_seeds_differ_by_their_dice_alone(demo_model, cache: Path) -> None:
    app = open_page(PAGE, compare="seeds", tokens="10", push="0.1")
    (turn,) = finish(press(app, "Generate"))
    assert turn.plan.dice.temperature == 0.8 and len(turn.plan.panes) == 4
    texts = [a.text for a in turn.snapshot().answers]
    assert texts[0] != texts[1] and turn.plan.panes[2].seed == turn.plan.panes[0].seed


def test_spread_mute_and_reset(cache: Path) -> None:
    app = press(open_page(PAGE), "Spread the direction over them")
    values = {s.key: s.value for s in app.slider}
    assert values["push"] == 0 and values["rest"] > 0 and values["c475"] != 0
    next(b for b in app.button_group if b.key == "c475-is").set_value(["M"])
    settle(app)
    assert app.query_params["c475-is"] in ("M", ["M"])
    press(app, "Reset all sliders")
    values = {s.key: s.value for s in app.slider}
    assert values["push"] == 0.15 and values["c475"] == 0 and "c475-is" not in app.query_params


def test_components_sent_by_the_direction_page_are_the_sliders(cache: Path) -> None:
    app = open_page("pages/direction.py", method="cosine")
    chosen = next(m for m in app.multiselect if m.label == "Components")
    chosen.set_value(chosen.value[2:5])
    settle(app)
    sent = [int(f) for f in next(m for m in app.multiselect if m.label == "Components").value]
    press(app, "Use in steering")
    app.switch_page(PAGE)
    settle(app)
    assert [s.key for s in app.slider if s.key.startswith("c")] == [f"c{f}" for f in sent] and len(sent) == 3
    next(m for m in app.multiselect if m.key == "parts").set_value([str(sent[0])])
    settle(app)
    assert [s.key for s in app.slider if s.key.startswith("c")] == [f"c{sent[0]}"], "taken once, then free to change"


def test_a_link_restores_and_what_it_cannot_is_said(cache: Path) -> None:
    app = open_page(PAGE, prompt="Is it bad?", push="-0.25", compare="seeds", seeds="3", parts="617,475", c617="0.1",
                    scope="first:10", temperature="0.5")
    assert app.text_area[0].value == "Is it bad?" and slider(app, "push").value == -0.25
    assert slider(app, "c617").value == 0.1 and slider(app, "temperature").value == 0.5
    assert [s.key for s in app.slider if s.key.startswith("c")] == ["c617", "c475"]
    app = open_page(PAGE, push="7", parts="999999")
    assert sum("The link asks for" in i.value.replace("\\", "") for i in app.info) == 2
    assert slider(app, "push").value == 0.15


def test_a_model_that_cannot_be_loaded_is_said_in_a_sentence(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from core.errors import ModelError
    from core.store import prepare

    def fail(experiment):
        raise ModelError("The weights are not there; run `fetch`.")

    models._held.clear()
    monkeypatch.setattr(prepare, "model_for", fail)
    app = press(open_page(PAGE), "Generate")
    (turn,) = finish(app)
    assert "weights are not there" in app.error[0].value.replace("\\", "") and turn.error
    models._held.clear()


def test_without_features_or_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    assert "Nothing cached" in open_page(PAGE).subheader[0].value
    make_cache(tmp_path / "demo" / "base__health_advice.h5", with_saes=False, layers=(7,))
    app = open_page(PAGE)
    assert "has no SAE" in words(app) and slider(app, "push").value == 0.15


def test_the_sweep_tab_shows_the_shipped_sweep_and_the_slider_its_range(cache: Path) -> None:
    app = open_page(PAGE)
    assert "coherent from" in html(app)
    app = open_page(PAGE, show="sweep")
    said = words(app)
    assert "Against random." in said and "As features." in said and "Ablated." in said and not app.slider
    assert len(app.get("vega_lite_chart")) == 3
    app = open_page(PAGE, show="sweep", pairs="open_pairs")
    assert "Against random." in words(app)
    (cache / "sweep__data.json").unlink()
    assert "coherent from" not in html(open_page(PAGE))
    app = open_page(PAGE, show="sweep")
    assert "python -m core sweep demo data --layers 15" in words(app)
    (cache / "sweep__data.json").write_text("{")
    assert "cannot be read" in open_page(PAGE).error[0].value.replace("\\", "")


def test_a_second_session_sees_the_queue_and_neither_meets_the_other(demo_model, cache: Path) -> None:
    first = press(open_page(PAGE, tokens="60"), "Generate")
    others = [press(open_page(PAGE, tokens="10", push=p), "Generate") for p in ("0.2", "-0.2")]
    assert "of all sessions" in words(others[1])
    texts = [finish(app)[0].snapshot().answers for app in (*others, first)]
    assert [len(turns(app)) for app in (first, *others)] == [1, 1, 1]
    assert texts[0][2].text == texts[1][0].text, "one session's steered is the other's reversed, whoever else is there"
    assert texts[0][1].text == texts[1][1].text and texts[2][1].text.startswith(texts[0][1].text)


def test_a_closed_tab_ends_its_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Runtime:
        there = True

        def is_active_session(self, session: str) -> bool:
            return self.there and session == "mine"

    runtime, clock = Runtime(), [100.0]
    monkeypatch.setattr(models, "exists", lambda: True)
    monkeypatch.setattr(models, "get_instance", lambda: runtime)
    monkeypatch.setattr(models.time, "monotonic", lambda: clock[0])
    alive = models.presence("mine")
    assert alive()
    runtime.there, clock[0] = False, 100.0 + models.GRACE / 2
    assert alive(), "a reconnecting browser is waited for"
    clock[0] += models.GRACE
    assert not alive()
    assert models.presence("")()


def test_the_session_download_is_the_log(demo_model, cache: Path) -> None:
    app = press(open_page(PAGE, tokens="10"), "Generate")
    (turn,) = finish(app)
    assert json.loads(json.dumps([turn.record])) == steering_log.read_log(cache)
    assert load_experiment("demo").name == turn.plan.preset
