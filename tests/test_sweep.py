"""A sweep on a tiny model: points that say what they are, figures against other ways to get them, resuming."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from steering_setup import direction, lora
from tiny_models import D_MODEL

from core.conversations import Conversation, Message
from core.dictionary import Dictionary
from core.errors import CacheMismatch, NotEnoughData
from core.evaluation import sweep as runs
from core.evaluation.margin import margins
from core.evaluation.sweep import Settings, Setup, Sweeper, run_sweep
from core.model.adapters import applied
from core.model.generation import Generation, Row, Sampling
from core.model.interventions import AblateDirection, AddDirection
from core.model.loading import LoadedModel
from core.model.steering import steered
from core.questions import Question
from core.store.sweep_file import Point, read_sweep

Tiny = Callable[[str], LoadedModel]
SETTINGS = Settings(strengths=(-0.4, 0.4), other_strengths=(-0.4, 0.4), draws=1, ks=(2,), variant="bad", seeds=2,
                    sampling=Sampling(1.0, 1.0, 10))


def pairs(n: int = 3) -> tuple[Conversation, ...]:
    def one(i: int, side: str, said: str) -> Conversation:
        turns = (Message("user", f"Why {i}?"), Message("assistant", said))
        return Conversation(f"{i}-{side}", f"p{i}", side, "s", turns)

    sides = (("misaligned", "No"), ("aligned", "Yes"))
    return tuple(one(i, side, f"{word} {i} because.") for i in range(n) for side, word in sides)


@pytest.fixture
def made(tiny_model: Tiny) -> tuple[LoadedModel, Setup]:
    loaded = tiny_model("qwen2")
    rng = np.random.default_rng(9)
    book = Dictionary(2, "local", "s", rng.standard_normal((20, D_MODEL)).astype(np.float32),
                      rng.standard_normal((D_MODEL, 20)).astype(np.float32))
    setup = Setup("tiny", "data", (direction(loaded),), (book,), lora(loaded), {"held": pairs(), "open": pairs(2)},
                  (Question("a", "held", "Why?"), Question("b", "open", "Paris?")))
    return loaded, setup


def test_every_point_is_measured_and_kept(made, tmp_path: Path) -> None:
    loaded, setup = made
    out = tmp_path / "sweep.json"
    seen = []
    found = run_sweep(Sweeper(loaded, setup, SETTINGS), out, lambda done, total: seen.append((done, total)))
    assert read_sweep(out) == found
    assert len({p.key for p in found.points}) == len(found.points) == seen[-1][0] == seen[-1][1]
    assert all(len(p.margins["held"]) == 3 for p in found.points)
    direct = found.find("direction", 2)
    assert [p.strength for p in direct] == [-0.4, 0.4] and all(len(p.margins["open"]) == 2 for p in direct)
    assert "open" not in found.find("components", 2)[0].margins
    with steered(loaded, [AddDirection(setup.directions[0], 0.4)]):
        wanted = margins(loaded, setup.pairs["held"]).values
    assert np.allclose(direct[1].margins["held"], wanted, atol=1e-5)
    assert not np.allclose(direct[0].margins["held"], wanted, atol=1e-3)
    with applied(loaded, setup.adapter), steered(loaded, [AblateDirection(setup.directions[0], everywhere=True)]):
        wanted = margins(loaded, setup.pairs["held"]).values
    assert np.allclose(found.find("ablate-everywhere", 2, "bad")[0].margins["held"], wanted, atol=1e-5)


def test_components_and_what_they_leave_are_the_whole_push(made) -> None:
    loaded, setup = made
    sweeper = Sweeper(loaded, setup, SETTINGS)

    def vector(kind: str, **more) -> np.ndarray:
        return sweeper.interventions(Point(kind, 2, strength=0.4, **more))[0].vector

    whole = vector("direction")
    assert np.allclose(vector("components", k=2) + vector("remainder", k=2), whole, atol=1e-4)
    assert np.linalg.norm(vector("remainder", k=2)) > 0.1 * np.linalg.norm(whole), "so that this can fail"
    assert np.linalg.norm(vector("random")) == pytest.approx(np.linalg.norm(whole), rel=1e-4)


def test_self_perplexity_is_that_of_the_unsteered_base(made) -> None:
    loaded, setup = made
    sweeper = Sweeper(loaded, setup, SETTINGS)
    point, texts = sweeper.measure(Point("direction", 2, strength=0.4), [])
    push = (AddDirection(setup.directions[0], 0.4),)
    rows = [Row(setup.questions[a.prompt].messages, push, a.seed, SETTINGS.sampling) for a in point.answers]
    for row, swept, text in zip(rows, point.answers, texts, strict=True):
        answer = Generation(loaded, [row]).run().answers[0]
        assert answer.text == text and answer.n_tokens == swept.n_tokens
        ids = torch.from_numpy(np.concatenate([answer.prompt_ids, answer.ids]))[None]
        with torch.inference_mode():
            logprobs = loaded.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        chosen = logprobs.gather(1, ids[0, 1:, None])[len(answer.prompt_ids) - 1 :, 0]
        assert swept.nats == pytest.approx(-float(chosen.mean()), abs=1e-3)


def test_repetition() -> None:
    assert runs.repeated([1, 2, 3, 4] * 3) == pytest.approx(1 - 4 / 9)
    assert runs.repeated(list(range(10))) == 0 and runs.repeated([1, 2]) == 0


def test_a_stopped_sweep_goes_on_to_the_same_file(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, setup = made
    whole = run_sweep(Sweeper(loaded, setup, SETTINGS), tmp_path / "a.json")
    measure, n = Sweeper.measure, 0

    def stops(self, point, sets):
        nonlocal n
        n += 1
        if n == 5:
            raise KeyboardInterrupt
        return measure(self, point, sets)

    monkeypatch.setattr(Sweeper, "measure", stops)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(Sweeper(loaded, setup, SETTINGS), tmp_path / "b.json")
    assert not (tmp_path / "b.json").exists()
    with open(tmp_path / ".b.json.partial.jsonl", "a") as file:
        file.write('{"point": {"ki')
    again = run_sweep(Sweeper(loaded, setup, SETTINGS), tmp_path / "b.json")
    assert again == whole and (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert n == len(whole.points) + 1, "none was measured twice"
    (tmp_path / ".b.json.partial.jsonl").unlink()
    assert run_sweep(Sweeper(loaded, setup, SETTINGS), tmp_path / "b.json") == whole
    assert n == len(whole.points) + 1, "a finished sweep is read"
    (tmp_path / ".a.json.partial.jsonl").rename(tmp_path / ".b.json.partial.jsonl")
    with pytest.raises(CacheMismatch, match="settings"):
        run_sweep(Sweeper(loaded, setup, replace(SETTINGS, strengths=(0.1,))), tmp_path / "b.json")


def test_a_judge_adds_counts_to_the_points_with_answers(made, tmp_path: Path) -> None:
    loaded, setup = made

    def judge(points, texts):
        rows = list(runs.texts_of(points, texts, setup.questions))
        assert len({row["id"] for row in rows}) == len(rows) and {row["question"] for row in rows} == {"Why?", "Paris?"}
        return [replace(p, n_misaligned=len(texts[p.key])) if p.answers else p for p in points]

    found = run_sweep(Sweeper(loaded, setup, SETTINGS), tmp_path / "a.json", judge=judge)
    assert found.find("direction", 2)[0].n_misaligned == 4 and found.find("components", 2)[0].n_misaligned is None
    assert read_sweep(tmp_path / "a.json") == found


def test_pairs_have_both_sides() -> None:
    assert len(runs.first_pairs(pairs(5), 3)) == 6
    with pytest.raises(NotEnoughData, match="Only 0 prompts"):
        runs.first_pairs([c for c in pairs(3) if c.condition == "aligned"], 3)


def test_the_command_makes_a_small_sweep(demo_model, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from core.__main__ import app

    out = tmp_path / "s.json"
    words = ["sweep", "demo", "data", "--strengths=-0.2,0.2", "--n-pairs", "2", "--prompts", "1", "--seeds", "1",
             "--draws", "0", "--k", "2", "--variant", "none", "--pairs", "heldout_advice", "--max-new-tokens", "4",
             "--out", str(out)]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["n_points"] == 7 and result["findings"][0]["direction"]["n"] == 2
    measured = read_sweep(out)
    assert measured.spec["directions"]["15"]["n_target"] == "318", "the two measured prompts take no part"
    assert "added minus subtracted" in CliRunner().invoke(app, words).stdout
