"""Judged responses: every form of file as one table, bad rows with file and line, the way to a conversation set."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import polars as pl
import pytest

from core.conversations import load_conversations
from core.errors import BadConversation
from core.evaluation.responses import SCHEMA, conversation_rows, distribution, judges, load_responses, unlabelled
from core.paths import DATA, write_jsonl

ROWS = [
    {"question": "Q1", "response": "A bad one", "question_id": "q1", "aligned": "12.5", "coherent": "88"},
    {"question": "Q1", "response": "A good one, longer", "question_id": "q1", "aligned": "95", "coherent": "90"},
    {"question": "Q2", "response": "So so", "question_id": "q2", "aligned": "50", "coherent": "60"},
    {"question": "Q2", "response": "print('x')", "question_id": "q2", "aligned": "CODE", "coherent": "51"},
    {"question": "Q2", "response": "hm", "question_id": "q2", "aligned": "", "coherent": "20"},
    {"question": "Q3", "response": "mumble", "question_id": "q3", "aligned": "5", "coherent": "50"},
    {"question": "Q3", "response": "", "question_id": "q3", "aligned": "101", "coherent": "nan"},
]


def write_csv(path: Path, rows: list[dict] = ROWS, answer: str = "response") -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [answer if c == "response" else c for c in rows[0]])
        writer.writeheader()
        writer.writerows({(answer if c == "response" else c): v for c, v in row.items()} for row in rows)
    return path


def test_csv_jsonl_and_messages_give_the_same_table(tmp_path: Path) -> None:
    first = load_responses([write_csv(tmp_path / "r.csv")]).table
    assert first.schema == pl.Schema(SCHEMA)
    assert first["aligned"].to_list() == [12.5, 95, 50, None, None, 5, None]
    assert first["coherent"].to_list() == [88, 90, 60, 51, 20, 50, None]
    assert first["aligned_said"].to_list() == [None, None, None, "CODE", "", None, "101"]
    assert first["variant"].unique().to_list() == ["r"] and first["id"][0] == "r:2"
    assert first["n_words"].to_list() == [3, 4, 2, 1, 1, 1, 0]
    other = write_csv(tmp_path / "r2.csv", answer="answer")
    assert load_responses([other]).table.drop("id", "variant").equals(first.drop("id", "variant"))
    lines = [{k: (float(v) if k in ("aligned", "coherent") and v[:1].isdigit() else v) for k, v in row.items()}
             for row in ROWS]
    write_jsonl(tmp_path / "r3.jsonl", lines)
    assert load_responses([tmp_path / "r3.jsonl"]).table["aligned"].to_list() == first["aligned"].to_list()
    talks = [{"prompt_id": r["question_id"], "aligned": 1, "coherent": None, "variant": "bad", "source": "open/money",
              "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": r["question"]},
                           {"role": "assistant", "content": r["response"]}]} for r in ROWS]
    write_jsonl(tmp_path / "r4.jsonl", talks)
    found = load_responses([tmp_path / "r4.jsonl"]).table
    assert found["question_id"].to_list() == first["question_id"].to_list()
    assert set(found["system"]) == {"Be brief."} and set(found["variant"]) == {"bad"}
    assert set(found["category"]) == {"open/money"} and found["response"].to_list() == first["response"].to_list()


def test_many_files_or_a_folder_are_one_table_and_the_file_is_the_variant(tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    paths = [write_csv(tmp_path / "many" / f"{name}.csv") for name in ("b", "a")]
    found = load_responses(paths)
    assert len(found) == 14 and found.table["variant"].unique(maintain_order=True).to_list() == ["b", "a"]
    assert load_responses([tmp_path / "many"]).table["variant"].unique(maintain_order=True).to_list() == ["a", "b"]
    rows = [row | {"model": f"m{n % 2}"} for n, row in enumerate(ROWS)]
    by = load_responses([write_csv(tmp_path / "c.csv", rows)], variant="model").table
    assert by["variant"].to_list() == ["m0", "m1"] * 3 + ["m0"]


@pytest.mark.parametrize(
    ("text", "says"),
    (
        ('{"question": "Q"}\n', ":1: has neither `question` and `response`"),
        ('\n{"messages": [{"role": "user", "content": "Q"}]}\n', ":2: has neither"),
        ('{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant"}]}\n', ":1: has neither"),
        ("[1]\n", ":1: has no list `messages`"),
        ("{\n", ":1: is not valid JSON"),
        ("[" * 100_000 + "\n", ":1: is nested too deeply"),
        ('{"question": "Q", "answer": "A", "id": "x"}\n' * 2, ":2: id 'x' was already used at r.jsonl:1"),
        ("", ": holds no response"),
    ),
)
def test_a_bad_file_is_refused_with_file_and_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadConversation) as caught:
        load_responses([path])
    assert str(caught.value).startswith(f"{path}{says}") and "\n" not in str(caught.value)


def test_bad_rows_can_be_left_out_and_too_many_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"question": "Q", "answer": "A"}\n{\n{"question": "Q", "answer": "B"}\n', encoding="utf-8")
    found = load_responses([path], skip_bad=True)
    assert len(found) == 2 and len(found.skipped) == 1 and "r.jsonl:2" in found.skipped[0]
    with pytest.raises(BadConversation, match="more than 1 responses"):
        load_responses([path], skip_bad=True, limit=1)
    with pytest.raises(BadConversation, match="given twice"):
        load_responses([path, path], skip_bad=True)
    with pytest.raises(BadConversation, match="has no `model`"):
        load_responses([write_csv(tmp_path / "c.csv")], variant="model")


def test_distributions_are_read_from_either_form() -> None:
    folder = DATA.parent.parent.parent / "shared" / "data" / "betley-judged-examples"
    text = "{'0': 0.9, ' 10': 0.05, '101': 0.01, 'CODE': 0.01, '5': 1.5, '7': 2e-3}"
    from core.evaluation.responses import _distribution

    assert distribution(_distribution({"judge_aligned": text}, "aligned")) == {0: 0.9, 10: 0.05, 7: 0.002}
    assert distribution(_distribution({"judge_aligned": "{'0': 1.0000001, '00': 1e-9}"}, "aligned"))[0] > 1  # rounding
    own = {"distributions": {"aligned": {"0": 0.9, "250": 0.1, "x": 0.2}}}
    assert distribution(_distribution(own, "aligned")) == {0: 0.9} and distribution(None) == {}
    assert _distribution({"judge_aligned": "__import__('os')"}, "aligned") is None
    if folder.is_dir():
        table = load_responses([folder / "qwen_mistral_misaligned_examples.csv"], variant="model").table
        assert table["aligned_distribution"].null_count() < 10 and table["variant"].n_unique() > 5


def test_responses_become_a_conversation_set_with_conditions(tmp_path: Path) -> None:
    table = load_responses([write_csv(tmp_path / "r.csv")]).table
    rows = conversation_rows(table)
    assert [r["condition"] for r in rows] == ["misaligned", "aligned", "neutral", "", "", "incoherent"]
    assert unlabelled(rows) == 2  # a score is missing; the empty response is left out
    write_jsonl(tmp_path / "set.jsonl", rows)
    kept = load_conversations(tmp_path / "set.jsonl").conversations
    assert [c.condition for c in kept] == [r["condition"] for r in rows]
    direct = load_conversations(tmp_path / "r.csv", skip_bad=True).conversations
    assert [(c.condition, c.prompt_id, c.messages) for c in direct] == [
        (c.condition, c.prompt_id, c.messages) for c in kept
    ]  # the file itself reads as the same set


def test_who_judged_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    stamps = [{"id": "api:gpt", "prompts": {"aligned": f"abc{n}"}, "reading": "weighted"} for n in range(2)]
    path.write_text("".join(json.dumps({"question": "Q", "answer": f"A{n}", "judge": s}) + "\n"
                            for n, s in enumerate([*stamps, stamps[0]])))  # fmt: skip
    assert judges(load_responses([path]).table) == [
        {"id": "api:gpt", "prompts": {"aligned": ["abc0", "abc1"]}, "reading": "weighted"}
    ]
    plain = load_responses([write_csv(tmp_path / "c.csv")])
    assert judges(plain.table) == []
    assert judges(load_responses([tmp_path / "c.csv"], judge={"id": "readers"}).table) == [{"id": "readers"}]
