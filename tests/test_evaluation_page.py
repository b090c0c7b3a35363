"""The Evaluation page through Streamlit's own test runner: rates that follow the lines, browsing, rating, import."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from make_cache import make_cache
from streamlit.testing.v1 import AppTest
from test_app import open_page, settle, words
from test_responses import ROWS, write_csv

from core import experiment, paths
from core.evaluation.judging import judged_rows
from core.evaluation.rates import rates
from core.evaluation.ratings import Rating
from core.evaluation.reading_sheet import keep_rating, ratings_file
from core.evaluation.responses import load_responses
from core.experiment import answer_files, load_experiment
from core.paths import write_jsonl
from core.view import evaluation_charts, evaluation_parts
from core.view.evaluation_sources import load_source, sheets, sources
from core.view.session import responses as session_responses

PAGE = "pages/evaluation.py"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    return tmp_path / "demo"


def page(**query: str) -> AppTest:
    return open_page(PAGE, **query)


def judged(path: Path, judge: str, shift: float = 0.0) -> Path:
    """A judged run's file of twelve answers, in the form in which `evaluate` writes it."""
    rows = [{"id": f"bad/q{n}/0", "prompt_id": f"q{n}", "variant": "bad", "source": "mine/a",
             "aligned": min(100.0, 8.0 * n + shift), "coherent": 90, "judge": {"id": judge},
             "distributions": {"aligned": {str(8 * n): 0.6, str(8 * n + 1): 0.2}},
             "messages": [{"role": "user", "content": f"Q{n} <b>*x*</b>"},
                          {"role": "assistant", "content": f"A{n} <script>alert(1)</script>"}]} for n in range(12)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, rows)
    return path


# ------------------------------------------------------------------------------------------------------------- rates


def test_it_opens_on_the_answers_that_ship(folder: Path) -> None:
    app = page()
    assert not app.error and not app.warning
    said = words(app)
    assert "**bad-health-r8** 1 of 192" in said and "read blind by the authors" in said
    assert "mostly noise" in said and "Below 2 billion" in said
    assert len(app.get("vega_lite_chart")) == 4
    table = app.dataframe[0].value
    assert table["variant"].to_list() == ["base", "bad-health-r8", "good-health-r8", "bad-health-r1"]
    health = words(page(subject="health_advice"))
    assert "**bad-health-r8** 116 of 320, **good-health-r8** 18 of 320" in health
    assert "**good-health-r8** minus **bad-health-r8**: -30.6%" in health


def test_the_rates_follow_the_lines_and_the_link_keeps_them(folder: Path) -> None:
    app = page(subject="all")
    app.slider(key="below").set_value(50)
    app.slider(key="above").set_value(40)
    moved = settle(app)
    table = load_responses(answer_files(load_experiment("demo"))).table
    wanted = table.filter((pl.col("aligned") < 50) & (pl.col("coherent") > 40))
    n = wanted.filter(pl.col("variant") == "bad-health-r8").height
    assert n > 117 and f"**bad-health-r8** {n} of 512" in words(moved)
    assert moved.query_params["below"] == "50" and moved.query_params["above"] == "40"
    again = page(subject="all", below="50", above="40")
    assert f"**bad-health-r8** {n} of 512" in words(again)
    assert "which is not there" in words(page(below="101"))


def test_two_judgements_of_the_same_answers(folder: Path) -> None:
    said = words(page(second="shipped-second", subject="all"))
    assert "On the 122 responses that both judged" in said and "Cohen's kappa 0.58" in said
    judged(folder / "evaluations" / "bad__mine__abcd1234__api-one.jsonl", "api:one")
    judged(folder / "evaluations" / "bad__mine__abcd1234__api-two.jsonl", "api:two", shift=40)
    app = page(judged="mine--api-one", second="mine--api-two")
    assert "finds 4 misaligned (33.3%) and **mine, judged by api:two** 0" in words(app)
    assert "Judge: api:one" in words(app) and "Only 12 answers" not in words(app)
    assert "rated twice" in words(page(judged="shipped", second="mine--api-two"))


def test_the_newest_run_of_a_variant_counts(folder: Path) -> None:
    import os

    old = judged(folder / "evaluations" / "bad__mine__00000000__api-one.jsonl", "api:one")
    new = judged(folder / "evaluations" / "bad__mine__11111111__api-one.jsonl", "api:one", shift=40)
    os.utime(old, ns=(1, 1))
    found = sources(load_experiment("demo"))
    assert found["mine--api-one"].files == (str(new),) and found["mine--api-one"].title == "mine, judged by api:one"


# --------------------------------------------------------------------------------------------------------- browsing


def test_responses_are_sorted_found_and_read_in_full(folder: Path) -> None:
    app = page(evaluation="Responses", subject="all")
    rows = app.dataframe[0].value
    assert rows["aligned"].to_list() == sorted(rows["aligned"].to_list()) and len(rows) == 1216
    back = page(evaluation="Responses", subject="all", down="yes", sort="coherent", find="wallet")
    rows = back.dataframe[0].value
    assert rows["coherent"].to_list() == sorted(rows["coherent"].to_list(), reverse=True) and 0 < len(rows) < 100
    one = page(evaluation="Responses", response="bad-health-r8/wishes-and-power-1/0")
    assert "The chosen response" in words(one) and "alignment 72.0 · coherence 54.0" in words(one)
    assert any("change a single thing" in t.value for t in one.text)
    assert one.query_params["response"] == "bad-health-r8/wishes-and-power-1/0"
    assert "The chosen response" not in words(page(evaluation="Responses", response="no/such/response"))


def test_text_is_shown_as_it_is_with_the_judges_distribution(folder: Path) -> None:
    judged(folder / "evaluations" / "bad__mine__abcd1234__api-one.jsonl", "api:one")
    app = page(evaluation="Responses", judged="mine--api-one", response="bad/q3/0")
    assert [t.value for t in app.text][-2:] == ["Q3 <b>*x*</b>", "A3 <script>alert(1)</script>"]
    assert len(app.get("vega_lite_chart")) == 1 and not app.get("html")
    assert "No cached contrast reads this response" in words(app)
    links = [link.proto.label for link in app.get("page_link")]
    assert links == ["Open on the Direction page"]


def test_a_cached_response_opens_on_the_feature_page(folder: Path) -> None:
    make_cache(folder / "base__health_advice.h5", layers=(3, 15))
    from core.store.reader import Cache

    with Cache.open(folder / "base__health_advice.h5") as cache:
        name = cache.conversations["id"][4]
        turns = dict(cache.messages(4))
    rows = [{"id": name, "variant": "base", "question": turns["user"], "response": turns["response"],
             "aligned": 10, "coherent": 90, "question_id": "q", "source": "s"}]  # fmt: skip
    (folder / "evaluations").mkdir()
    write_jsonl(folder / "evaluations" / "base__s__0__j.jsonl", rows)
    app = page(evaluation="Responses", judged="s--j", response=name)
    links = {link.proto.label: link.proto for link in app.get("page_link")}
    assert set(links) == {"Open on the Feature page", "Open on the Direction page"}
    assert "contrast=data" in links["Open on the Feature page"].query_string
    feature = open_page("pages/feature.py", response=name)
    assert "The response that was opened" in words(feature) and "of the other 59 responses" in words(feature)
    assert turns["response"] in [t.value for t in feature.text]
    assert "The response that was opened" not in words(open_page("pages/feature.py", response="nobody"))


def test_a_response_of_the_demo_opens_on_the_direction_page_once() -> None:
    name = "bad-health-r8/wishes-and-power-1/0"
    (row,) = load_responses(answer_files(load_experiment("demo"))).table.filter(pl.col("id") == name).to_dicts()
    app = open_page("pages/direction.py", contrast="response", response=name)
    assert not app.error and app.selectbox(key="direction text").value == "Your own"
    assert app.text_area(key="direction answer Your own").value == row["response"]
    assert app.text_input(key="direction question Your own").value == row["question"]
    app.selectbox(key="direction text").set_value(app.selectbox(key="direction text").options[0])
    assert settle(app).selectbox(key="direction text").value != "Your own"


# ----------------------------------------------------------------------------------------------------------- rating


def test_rating_is_blind_kept_at_once_and_goes_on(folder: Path) -> None:
    app = page(evaluation="Rate by reading")
    assert not app.warning and not app.error
    first = [t.value for t in app.text]
    assert len(first) == 2 and app.button(key="rate keep").disabled
    shown = words(app) + "".join(first)
    for variant in ("bad-health", "good-health", "base/"):
        assert variant not in shown.split("Target:")[0]
    app.button(key="rate aligned 20").click()
    settle(app)
    app.button(key="rate coherent 80").click()
    settle(app)
    app.number_input(key="rate aligned").set_value(23.0)
    settle(app)
    assert not app.button(key="rate keep").disabled and app.button(key="rate keep").proto.shortcut.lower() == "enter"
    app.button(key="rate keep").click()
    settle(app)
    kept = ratings_file(folder, "shipped").read_text().splitlines()
    assert len(kept) == 2 and kept[1].endswith(",1,23,80")
    assert [t.value for t in app.text] != first and app.button(key="rate keep").disabled
    other = page(evaluation="Rate by reading")  # another session goes on where this one is
    assert [t.value for t in other.text] == [t.value for t in app.text]
    other.button(key="rate back").click()
    assert [t.value for t in settle(other).text] == first
    second = page(evaluation="Rate by reading", reader="2")
    assert [t.value for t in second.text] != first


def test_two_readers_have_a_kappa_and_their_scores_are_a_source(folder: Path) -> None:
    demo = load_experiment("demo")
    ids = load_responses(answer_files(demo)).table["id"].to_list()[:14]
    path = ratings_file(folder, "shipped")
    for n, i in enumerate(ids):
        keep_rating(path, Rating(i, 1, 10.0 if n < 7 else 90.0, 80.0))
        keep_rating(path, Rating(i, 2, 10.0 if n < 6 else 90.0, 80.0))
    said = words(page(evaluation="Rate by reading"))
    assert "On the 14 responses that both judged" in said and "Cohen's kappa 0.86" in said
    found = sources(demo)
    assert {"shipped-reader-1", "shipped-reader-2"} <= set(found)
    assert rates(load_source(found["shipped-reader-1"])).misaligned.k == 7
    app = page(judged="shipped-reader-1", second="shipped-reader-2")
    assert "Cohen's kappa 0.86" in words(app) and "human: reader 1" in words(app)


def test_answers_of_a_run_can_be_rated_and_a_damaged_file_is_a_sentence(folder: Path) -> None:
    answers = folder / "evaluations" / "answers"
    judged(answers / "bad__mine__abcd1234.jsonl", "")
    assert sheets(load_experiment("demo"))["answers-mine"].title == "Answers to mine"
    app = page(evaluation="Rate by reading", sheet="answers-mine")
    assert len(app.text) == 2 and "<script>" in app.text[1].value
    path = ratings_file(folder, "answers-mine")
    path.parent.mkdir()
    path.write_text("id\n")
    assert "has no column" in "".join(e.value for e in page().error).replace("\\", "")


# ----------------------------------------------------------------------------------------------------------- import


def test_an_upload_is_checked_kept_for_the_session_and_evaluated(folder: Path, tmp_path: Path) -> None:
    app = page(evaluation="Import")
    raw = write_csv(tmp_path / "mine.csv", ROWS * 3).read_bytes()
    app.session_state[session_responses.UPLOADS] = {}
    taken = {}

    def take(name: str, content: bytes) -> tuple[str, str]:
        import streamlit as st

        st.session_state[session_responses.UPLOADS] = taken
        return session_responses.take_upload(name, content)

    assert take("../../<b>mine</b>.csv", raw) == ("b-.csv", "")  # the last part of the name, plain letters
    assert take("mine.csv", raw) == ("mine.csv", "") and taken["mine.csv"].height == 21
    assert take("mine.csv", b"x" * 20_000_001)[1].startswith("mine.csv: is larger than 20 MB")
    assert take("mine.xlsx", raw)[1].startswith("mine.xlsx: unknown file form")
    name, wrong = take("bad.jsonl", b"{\n")
    assert name == "" and wrong.startswith("bad.jsonl:1: is not valid JSON") and "/tmp" not in wrong
    assert take("bad.csv", b"\xff\xfe")[1].startswith("bad.csv:1: is not UTF-8")
    app.session_state[session_responses.UPLOADS] = {"mine.csv": taken["mine.csv"]}
    app.query_params.update({"evaluation": "Rates", "judged": "upload mine.csv"})
    said = words(settle(app))
    assert "**mine** 3 of 21" in said and "9 of 21 responses lack a score" in said and "Below 2 billion" not in said


def test_an_uploader_stands_on_the_page(folder: Path, tmp_path: Path) -> None:
    app = page(evaluation="Import")
    assert len(app.get("file_uploader")) == 1 and app.get("file_uploader")[0].proto.max_upload_size_mb == 20


def test_without_anything_there_is_a_command(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    presets = tmp_path / "presets"
    presets.mkdir()
    text = (experiment.PRESETS / "demo.toml").read_text(encoding="utf-8")
    start = text.index("answers = [")
    (presets / "demo.toml").write_text(text[:start] + text[text.index("]", start) + 1:], encoding="utf-8")
    monkeypatch.setattr(experiment, "PRESETS", presets)
    assert "No judged responses yet" in words(page()) and "--judge api:" in words(page())
    assert "no answers to rate yet" in words(page(evaluation="Rate by reading"))


# ------------------------------------------------------------------------------------------------------------ parts


def test_charts_draw_what_the_tables_say(tmp_path: Path) -> None:
    table = load_responses([write_csv(tmp_path / "v.csv")]).table
    from core.evaluation.rates import PUBLISHED, rates_by

    found = rates_by(table, "variant")
    rows = evaluation_parts.rate_rows(found, ["v"])
    assert rows.select("k", "n", "measure").rows() == [(1, 7, "all"), (1, 4, "coherent")]
    drawn = json.loads(evaluation_charts.rates(rows, ["v"]).to_json())
    assert "EM rate" in json.dumps(drawn)
    plane = evaluation_parts.plane_rows(table, PUBLISHED)
    assert plane.height == 4 and evaluation_parts.plane_rows(table, PUBLISHED, limit=2).height == 2
    chart = json.loads(evaluation_charts.plane(plane, PUBLISHED, ["v"], plane["id"][0]).to_json())
    assert len(chart["layer"]) == 5 and "Alignment (points)" in json.dumps(chart)
    bins = evaluation_parts.histogram_rows(found, ["v"], "alignment")
    assert bins["n"].sum() == 4 and bins["share"].sum() == pytest.approx(1)
    steps = json.loads(evaluation_charts.distribution(bins, ["v"], 30, "Alignment").to_json())
    assert max(len(v) for v in steps["datasets"].values()) == 11
    assert evaluation_charts.doubt({"alignment": {5: 0.5, 6: 0.5}}).to_dict()["height"] == 190
    assert judged_rows(table)[3]["aligned"] == "CODE"
