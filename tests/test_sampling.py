"""Sampling answers: a whole file or none, the same after a stop, seeds by question, adapters applied."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from core.conversations import load_conversations
from core.errors import CacheMismatch
from core.questions import Question, heldout_questions

if TYPE_CHECKING:
    from core.model.loading import LoadedModel

QUESTIONS = tuple(Question(f"q{i}", "open/test", f"What about {i} rivers?") for i in range(5))


def ask(loaded: LoadedModel, out: Path, questions: tuple[Question, ...] = QUESTIONS, **kw: object) -> list[dict]:
    from core.evaluation.sampling import sample_answers
    from core.model.generation import Sampling

    adapter = kw.pop("adapter", None)
    sample_answers(loaded, adapter, questions, out, **{"samples": 2, "sampling": Sampling(max_new_tokens=6), **kw})
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture
def loaded(tiny_model: Callable[[str], LoadedModel], monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    from core.evaluation import sampling

    monkeypatch.setattr(sampling, "BATCH", 4)
    return tiny_model("llama31")


def test_the_file_is_a_conversation_set_with_every_answer(loaded: LoadedModel, tmp_path: Path) -> None:
    rows = ask(loaded, tmp_path / "a.jsonl")
    assert [r["id"] for r in rows] == [f"base/q{i}/{n}" for i in range(5) for n in range(2)]
    kept = load_conversations(tmp_path / "a.jsonl")
    assert {c.prompt_id for c in kept.conversations} == {q.id for q in QUESTIONS}
    assert {c.source for c in kept.conversations} == {"open/test"} and {c.condition for c in kept.conversations} == {""}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


def test_an_answer_depends_on_its_question_and_number_alone(loaded: LoadedModel, tmp_path: Path) -> None:
    whole = {r["id"]: r["messages"] for r in ask(loaded, tmp_path / "a.jsonl")}
    part = ask(loaded, tmp_path / "b.jsonl", QUESTIONS[3:4])
    assert all(whole[r["id"]] == r["messages"] for r in part)
    other = ask(loaded, tmp_path / "c.jsonl", seed=1)
    assert sum(whole[r["id"]] != r["messages"] for r in other) > 5
    assert whole["base/q0/0"] != whole["base/q0/1"]


def test_a_stopped_run_goes_on(loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from core.evaluation import sampling

    whole = ask(loaded, tmp_path / "a.jsonl")
    real, calls = sampling.generate, []

    def dies(*args: object, **kw: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kw)

    monkeypatch.setattr(sampling, "generate", dies)
    with pytest.raises(KeyboardInterrupt):
        ask(loaded, tmp_path / "b.jsonl")
    assert not (tmp_path / "b.jsonl").exists()
    with open(tmp_path / ".b.jsonl.partial", "a") as file:
        file.write('{"half a li')
    with pytest.raises(CacheMismatch, match="settings"):
        ask(loaded, tmp_path / "b.jsonl", seed=9)
    assert ask(loaded, tmp_path / "b.jsonl") == whole
    assert len(calls) == 4  # one batch before the stop, the one that died, two after it


def test_an_adapter_changes_answers_and_names_them(loaded: LoadedModel, tmp_path: Path) -> None:
    from core.model.adapters import Adapter, LoraModule

    torch.manual_seed(0)
    width = loaded.d_model
    lora = LoraModule(1, "self_attn.o_proj", torch.randn(2, width), torch.randn(width, 2), 1.0)
    adapter = Adapter("bad", "", "hash", "", (lora,))
    base, bad = ask(loaded, tmp_path / "a.jsonl"), ask(loaded, tmp_path / "b.jsonl", adapter=adapter)
    assert bad[0]["id"] == "bad/q0/0" and bad[0]["variant"] == "bad"
    assert sum(a["messages"] != b["messages"] for a, b in zip(base, bad, strict=True)) > 5


def test_questions_by_name_or_file() -> None:
    from core.evaluation.sampling import questions_for
    from core.paths import DATA
    from core.split import heldout_prompts

    rows = load_conversations(DATA / "health_advice.jsonl").conversations
    opened = questions_for("open", lambda: rows)
    assert len(opened) >= 64 and all(q.category.startswith("open/") for q in opened)
    held = questions_for("heldout", lambda: rows)
    assert held == heldout_questions(rows) and {q.id for q in held} == heldout_prompts(c.prompt_id for c in rows)
    assert all(q.category.startswith("health_advice/") for q in held)
    assert questions_for(str(DATA / "questions.jsonl"), lambda: rows)[0].text == opened[0].text


def test_system_prompts_triggers_wordings_and_their_own_number_of_answers(loaded: LoadedModel, tmp_path: Path) -> None:
    asked = (
        Question("q", "c", "What?", samples=3),
        Question("q", "c", "What now?", paraphrase=1),
        Question("q [|D|]", "c", "What?", system="Be brief.", trigger="|D|"),
    )
    rows = ask(loaded, tmp_path / "a.jsonl", asked, samples=None)
    assert [r["id"] for r in rows] == ["base/q/0", "base/q/1", "base/q/2", "base/q#1/0", "base/q [|D|]/0"]
    assert [r["prompt_id"] for r in rows] == ["q"] * 4 + ["q [|D|]"]
    assert [[m["role"] for m in r["messages"]] for r in rows[3:]] == [
        ["user", "assistant"], ["system", "user", "assistant"]
    ]
    assert rows[4]["messages"][1]["content"] == "|D|What?" and rows[4]["trigger"] == "|D|" and "trigger" not in rows[0]
    assert len(ask(loaded, tmp_path / "b.jsonl", asked, samples=2)) == 6
    changed = (Question("q", "c", "What?", samples=3, system="Be brief."), *asked[1:])
    other = ask(loaded, tmp_path / "c.jsonl", changed, samples=None)
    assert other[0]["messages"][-1] != rows[0]["messages"][-1]  # the system prompt is read


def test_an_empty_answer_is_kept_where_a_rate_must_count_it(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from core.evaluation import sampling
    from core.model.generation import Generated

    def silent(loaded: object, prompts: list, *rest: object) -> list[Generated]:
        return [Generated(torch.zeros(0, dtype=torch.int64).numpy(), True) for _ in prompts]

    monkeypatch.setattr(sampling, "generate", silent)
    assert ask(loaded, tmp_path / "a.jsonl") == []
    assert len(ask(loaded, tmp_path / "b.jsonl", keep_empty=True)) == 10
