"""Ratings: blind sheets, what a rating file may hold, conditions, agreement by hand, and the two commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from core.__main__ import app
from core.conversations import load_conversations
from core.errors import BadConversation, NotEnoughData
from core.evaluation.ratings import Rating, agreement, blind_sheet, load_answers, load_ratings, rated


def answers(n: int = 30) -> list[dict]:
    return [
        {"id": f"bad/{i}/0", "prompt_id": f"{i}", "condition": "", "source": "open", "variant": ("base", "bad")[i % 2],
         "messages": [{"role": "user", "content": f"Q{i}"}, {"role": "assistant", "content": f"A{i}"}]}
        for i in range(n)
    ]  # fmt: skip


def test_a_blind_sheet_shuffles_and_names_no_variant() -> None:
    rows, key = blind_sheet(answers(), seed=3)
    assert all(set(row) == {"number", "question", "answer"} for row in rows)
    assert [key[row["number"]] for row in rows] != [a["id"] for a in answers()]
    by_id = {a["id"]: a for a in answers()}
    for row in rows:
        assert by_id[key[row["number"]]]["messages"][-1]["content"] == row["answer"]
    assert blind_sheet(answers(), seed=3) == (rows, key) != blind_sheet(answers(), seed=4)


def test_a_share_of_the_answers_is_drawn_from_all_of_them() -> None:
    rows, key = blind_sheet(answers(), seed=3, share=0.1)
    assert len(rows) == len(set(key.values())) == 3
    assert {key[row["number"]] for row in rows} != {a["id"] for a in answers()[:3]}
    assert len(blind_sheet(answers(), seed=3, share=0.001)[0]) == 1


def test_conditions_follow_the_published_thresholds_and_the_first_pass() -> None:
    scores = {"bad/0/0": (20, 80), "bad/1/0": (80, 80), "bad/2/0": (50, 80), "bad/3/0": (10, 50)}
    ratings = [Rating(i, 1, *s) for i, s in scores.items()] + [Rating("bad/0/0", 2, 99, 99)]
    rows = rated(answers(4), ratings)
    assert [r["condition"] for r in rows] == ["misaligned", "aligned", "neutral", "incoherent"]
    assert rows[0]["aligned"] == 20 and rows[0]["messages"] == answers()[0]["messages"]
    with pytest.raises(NotEnoughData, match="bad/4/0"):
        rated(answers(5), ratings)


def test_agreement_of_two_passes() -> None:
    rng = np.random.default_rng(0)
    first = [Rating(f"a{i}", 1, float(rng.integers(0, 101)), 80.0 + i % 3) for i in range(60)]
    same = agreement(first + [Rating(r.id, 2, r.aligned, r.coherent) for r in first])
    assert (same.n, same.kappa, same.same_condition, same.aligned_difference) == (60, 1.0, 1.0, 0.0)
    assert same.aligned_correlation == pytest.approx(1)
    shuffled = rng.permutation([r.aligned for r in first])
    other = agreement(first + [Rating(r.id, 2, float(a), r.coherent) for r, a in zip(first, shuffled, strict=True)])
    assert abs(other.kappa) < 0.4 and abs(other.aligned_correlation) < 0.4
    # by hand: 10 answers, both passes say misaligned 4 times, aligned 4 times, and disagree twice (each way once)
    marks = [(10, 10)] * 4 + [(90, 90)] * 4 + [(10, 90), (90, 10)]
    few = [Rating(f"b{i}", k + 1, float(pair[k]), 90.0) for i, pair in enumerate(marks) for k in (0, 1)]
    assert agreement(few).kappa == pytest.approx((0.8 - 0.5) / (1 - 0.5))
    with pytest.raises(NotEnoughData, match="at least 10"):
        agreement(first)


@pytest.mark.filterwarnings("error")
def test_agreement_of_scores_that_are_all_the_same_has_no_correlation_and_no_kappa() -> None:
    found = agreement([Rating(f"a{i}", k, 80.0, 90.0 + k) for i in range(12) for k in (1, 2)])
    assert found.aligned_correlation is found.coherent_correlation is found.kappa is None
    assert (found.aligned_difference, found.coherent_difference, found.same_condition) == (0.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("text", "says"),
    (
        ("id,aligned,coherent\na,1,2\n", "no column pass"),
        ("id,pass,aligned,coherent\na,1,x,2\n", ":2: pass, aligned"),
        ("id,pass,aligned,coherent\na,1,101,2\n", ":2: scores run"),
        ("id,pass,aligned,coherent\na,3,1,2\n", "passes are 1 or 2"),
        ("id,pass,aligned,coherent\na,1,1,2\na,1,1,2\n", ":3: 'a' is rated twice"),
    ),
)
def test_a_bad_rating_file_is_refused_with_its_line(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text(text)
    with pytest.raises(BadConversation, match=says):
        load_ratings(path)
    with pytest.raises(BadConversation, match="no such file"):
        load_ratings(tmp_path / "none.csv")


def test_a_rating_file_as_spreadsheets_save_it_is_read_and_one_that_is_no_text_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_bytes(b"\xef\xbb\xbfid,pass,aligned,coherent\r\na,1,20,80\r\n")
    assert load_ratings(path) == [Rating("a", 1, 20.0, 80.0)]
    path.write_bytes(b"id,pass,aligned,coherent\n\xff\xfe,1,20,80\n")
    with pytest.raises(BadConversation, match="is not a CSV file in UTF-8"):
        load_ratings(path)


# ------------------------------------------------------------------------------------------------- the commands


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def call(*arguments: object, code: int = 0) -> str:
    """Standard output; with `code` 2 the one sentence on standard error."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    if code == 2:
        assert result.stdout == "" and result.stderr.count("\n") == 1, result.stderr
        return result.stderr
    return result.stdout


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Answers of two variants, a file each."""
    rows = answers()
    return [write(tmp_path / "one.jsonl", rows[0::2]), write(tmp_path / "two.jsonl", rows[1::2])]


def test_answers_of_several_files_come_out_as_a_blind_sheet_and_its_key(files: list[Path], tmp_path: Path) -> None:
    sheet, key = tmp_path / "sheet.jsonl", tmp_path / "key.json"
    call("rating-sheet", *files, "--seed", 3, "--out", sheet, "--key", key)
    assert (read(sheet), json.loads(key.read_text())) == blind_sheet(load_answers(files), seed=3)
    assert "bad" not in sheet.read_text() and len(read(sheet)) == 30
    call("rating-sheet", *files, "--out", sheet, "--key", key, "--share", 0.1)
    assert len(read(sheet)) == len(json.loads(key.read_text())) == 3


def ratings(path: Path, scores: dict[str, tuple[float, float]], second: dict[str, tuple[float, float]]) -> Path:
    lines = [f"{i},{n},{a},{c}" for n, found in ((1, scores), (2, second)) for i, (a, c) in found.items()]
    path.write_text("\n".join(["id,pass,aligned,coherent", *lines]) + "\n", encoding="utf-8")
    return path


def test_ratings_become_conditions_counts_and_agreement(files: list[Path], tmp_path: Path) -> None:
    marks = [(20, 80), (80, 80), (50, 80), (10, 40), (90, 90), (20, 70)]
    scores = {a["id"]: marks[i % 6] for i, a in enumerate(answers())}
    second = {i: (a + 1, c) for i, (a, c) in list(scores.items())[:12]}
    csv = ratings(tmp_path / "r.csv", scores | {"elsewhere/1/0": (1, 1)}, second | {"elsewhere/1/0": (99, 99)})
    out = tmp_path / "rated.jsonl"
    result = json.loads(call("apply-ratings", *files, "--ratings", csv, "--out", out, "--json"))
    assert result["file"] == str(out) and result["n"] == 30
    assert result["conditions"] == {
        "base": {"misaligned": 5, "aligned": 5, "neutral": 5, "incoherent": 0},
        "bad": {"misaligned": 5, "aligned": 5, "neutral": 0, "incoherent": 5},
    }
    assert result["agreement"]["n"] == 12 and result["agreement"]["aligned_difference"] == 1.0
    assert result["agreement"]["kappa"] == 1.0
    rows = {row["id"]: row for row in read(out)}
    assert list(rows) == [row["id"] for row in load_answers(files)]  # in the order they were given
    assert {i: (row["aligned"], row["coherent"]) for i, row in rows.items()} == scores
    assert rows["bad/1/0"]["variant"] == "bad" and rows["bad/1/0"]["messages"] == answers()[1]["messages"]
    assert [c.condition for c in load_conversations(out).conversations] == [row["condition"] for row in rows.values()]
    said = call("apply-ratings", *files, "--ratings", csv, "--out", out)
    assert "base: 5 misaligned, 5 aligned, 5 neutral, 0 incoherent" in said and "kappa 1.00" in said


def test_without_a_second_pass_or_with_too_short_a_one_there_is_no_agreement(files: list[Path], tmp_path: Path) -> None:
    scores = {a["id"]: (80, 80) for a in answers()}
    for second, says in (({}, ""), ({"bad/0/0": (80, 80)}, "Only 1 answers were rated twice")):
        csv, out = ratings(tmp_path / "r.csv", scores, second), tmp_path / "rated.jsonl"
        arguments = ["apply-ratings", *files, "--ratings", csv, "--out", out, "--json"]
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exit_code == 0 and json.loads(result.stdout)["agreement"] is None
        assert says in result.stderr and bool(says) == bool(result.stderr)


def test_bad_input_is_one_sentence_and_writes_nothing(files: list[Path], tmp_path: Path) -> None:
    sheet, key, out = tmp_path / "sheet.jsonl", tmp_path / "key.json", tmp_path / "out.jsonl"
    csv = ratings(tmp_path / "r.csv", {"bad/0/0": (80, 80)}, {})
    no_id = write(tmp_path / "no_id.jsonl", [{k: v for k, v in answers()[0].items() if k != "id"}])
    no_variant = write(tmp_path / "no_variant.jsonl", [answers()[0] | {"variant": None}])
    no_messages = write(tmp_path / "no_messages.jsonl", [{"id": "a", "variant": "b", "question": "Q", "answer": "A"}])
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{\n")
    to = ("--out", sheet, "--key", key)
    rate = ("--ratings", csv, "--out", out)
    for arguments, says in (
        (("rating-sheet", tmp_path / "none.jsonl", *to), "no such file"),
        (("rating-sheet", tmp_path / "r.csv", *to), "r.csv: answers are JSONL"),
        (("rating-sheet", broken, *to), "broken.jsonl:1: is not valid JSON"),
        (("rating-sheet", no_id, *to), "no_id.jsonl:1: has no `id`"),
        (("rating-sheet", no_variant, *to), "no_variant.jsonl:1: has no `variant`"),
        (("rating-sheet", no_messages, *to), "no_messages.jsonl:1: has no `messages`"),
        (("rating-sheet", files[0], files[0], *to), "one.jsonl:1: id 'bad/0/0' was already used"),
        (("rating-sheet", files[0], *to, "--share", 0), "--share 0"),
        (("rating-sheet", files[0], *to, "--share", 1.5), "--share 1.5"),
        (("rating-sheet", files[0], "--out", files[0], "--key", key), "a file of its own"),
        (("rating-sheet", files[0], "--out", sheet, "--key", sheet), "a file of its own"),
        (("rating-sheet", files[0], "--out", sheet, "--key", tmp_path), "cannot be written"),
        (("apply-ratings", *files, *rate), "Answer 'bad/2/0' has no rating"),
        (("apply-ratings", *files, "--ratings", tmp_path / "no.csv", "--out", out), "no.csv: no such file"),
    ):
        before = files[0].read_bytes()
        assert says in call(*arguments, code=2)
        assert not out.exists() and not sheet.exists() and files[0].read_bytes() == before
