"""The log: a line is enough to get the same tokens again, as a plan, as Python and as a command."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from steering_setup import direction, exact_sae, lora

from core.conversations import Message
from core.errors import CacheError, InterventionError
from core.model.generation import Generation
from core.model.loading import LoadedModel
from core.model.plan_rows import probes_of, rows_of
from core.steering_plan import Dice, Hold, Pane, Plan, Push, at_random
from core.store import steering_log as log
from core.view import steering_code

Tiny = Callable[[str], LoadedModel]


def plan(loaded: LoadedModel) -> Plan:
    d, asked = direction(loaded), (Message("user", "Why 'that'?"),)
    pushes = (Push(d, 0.4), Push(direction(loaded, seed=2), -0.3))
    panes = (
        Pane("plain", messages=asked, seed=3),
        Pane("steered", pushes=pushes, messages=asked, seed=3, beside=0),
        Pane("control", pushes=at_random(pushes, 1), messages=asked, seed=3, beside=0),
        Pane("tuned, held", "bad", 0.5, holds=(Hold(2, 5, 3.0),), messages=asked, seed=4),
    )
    return Plan("demo", panes, Dice(0.8, 0.9, 10, 1.1), "all", d)


def said(loaded: LoadedModel, asked: Plan) -> list[list[int]]:
    adapters, saes = {"bad": lora(loaded)}.get, {2: exact_sae()}.get
    generation = Generation(loaded, rows_of(asked, adapters, saes), probes=probes_of(asked, saes))
    return [answer.ids.tolist() for answer in generation.run().answers]


def test_a_line_gives_the_same_tokens_again(tiny_model: Tiny, tmp_path: Path) -> None:
    loaded = tiny_model("qwen2")
    asked = plan(loaded)
    adapters, saes = {"bad": lora(loaded)}.get, {2: exact_sae()}.get
    answers = Generation(loaded, rows_of(asked, adapters, saes)).run().answers
    line = log.record(asked, log.files_of(asked, tmp_path), answers, {"model": "tiny"}, {1: 0.5})
    log.append(tmp_path, line)
    log.append(tmp_path, line)
    back = log.read_log(tmp_path)
    assert len(back) == 2 and back[0] == json.loads(json.dumps(line))
    assert back[0]["answers"][1]["kl_nats_per_token"] == 0.5
    again = log.plan_of(back[1], tmp_path)
    assert said(loaded, again) == [a["ids"] for a in line["answers"]]
    assert len({tuple(ids) for ids in said(loaded, again)}) == 4, "the panes differ, so this can fail"


def test_a_cut_line_is_left_out_and_another_is_refused(tmp_path: Path) -> None:
    log.append(tmp_path, {"a": 1})
    with open(log.log_file(tmp_path), "a") as file:
        file.write('{"b": ')
    assert log.read_log(tmp_path) == [{"a": 1}] and log.read_log(tmp_path / "none") == []
    with pytest.raises(CacheError, match="no generation"):
        log.plan_of({"a": 1}, tmp_path)


def test_a_direction_is_kept_once(tiny_model: Tiny, tmp_path: Path) -> None:
    d = direction(tiny_model("qwen2"))
    files = {log.keep_direction(x, tmp_path) for x in (d, replace(d), replace(d, origin={"a": "b"}), d * 2)}
    assert len(files) == 3 and len(list((tmp_path / "steering" / "directions").iterdir())) == 3


def test_a_feature_without_an_sae_is_refused(tiny_model: Tiny) -> None:
    asked = plan(tiny_model("qwen2"))
    with pytest.raises(InterventionError, match="Layer 2 has no SAE"):
        rows_of(asked, {"bad": None}.get, lambda layer: None)


def test_commands_and_python_say_the_same_as_the_page(demo_model, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from core.__main__ import app
    from core.directions import Direction
    from core.experiment import load_experiment
    from core.store import prepare

    experiment = load_experiment("demo")
    vector = np.random.default_rng(0).standard_normal(demo_model.d_model)
    d = Direction("a 'quoted' one", experiment.model.id, 15, vector, 168.0)
    asked = (Message("user", "Is my mole 'bad'?"),)
    made = Plan("demo", (
        Pane("plain", messages=asked, seed=1),
        Pane("steered", "bad-health-r8", 0.5, (Push(d, -0.2),), (Hold(15, 475, 6.0),), 1, asked, 0),
    ), Dice(0.7, 0.95, 8, 1.05), "first:5", d)  # fmt: skip
    rows = rows_of(made, lambda v: prepare.adapter_for(experiment, v, demo_model),
                   lambda layer: prepare.saes_for(experiment, [layer], demo_model)[layer])
    wanted = [answer.text for answer in Generation(demo_model, rows).run().answers]
    assert wanted[0] != wanted[1]
    files = log.files_of(made, tmp_path)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(steering_code.script(made, files, Path("/nowhere")), {})
    assert all(text in out.getvalue() for text in wanted)
    import shlex

    for pane, text in zip(made.panes, wanted, strict=True):
        words = shlex.split(steering_code.command(made, pane, files, Path("/nowhere")))[3:]
        done = CliRunner().invoke(app, [*words, "--json"])
        assert json.loads(done.stdout)["rows"][0]["text"] == text
    several = replace(made, panes=(replace(made.panes[0], messages=(*asked, Message("assistant", "No."), *asked)),))
    assert steering_code.commands(several, files, tmp_path) == ""
