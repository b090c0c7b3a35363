"""The Concordance page through Streamlit's own test runner: sentence, charts, lists, links, and what to run instead."""

from __future__ import annotations

from pathlib import Path

import pytest
from make_cache import FORMAT, RAISED, SUPPRESSED
from streamlit.testing.v1 import AppTest
from test_app import html, metrics, open_page, settle, words
from test_concordance_files import CONTRAST, PRESET, write_caches

from core import experiment, paths

PAGE = "pages/concordance.py"
QUICK = {"k": "10"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    write_caches(folder / "demo", "base", "bad", "good", layers=(1, 2))
    return folder


@pytest.fixture
def presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of presets with one, called demo, that the app reads."""
    folder = tmp_path / "presets"
    folder.mkdir()
    (folder / "demo.toml").write_text(PRESET, encoding="utf-8")
    monkeypatch.setattr(experiment, "PRESETS", folder)
    return folder


@pytest.fixture
def cache(finished: Path, presets: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(paths, "CACHE", finished)
    return finished


@pytest.fixture
def no_cache(tmp_path: Path, presets: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    return tmp_path


def page(**query: str) -> AppTest:
    return open_page(PAGE, **{**QUICK, **query})


def test_it_begins_with_one_contrast_of_each_kind_and_says_what_they_share(cache: Path) -> None:
    app = page()
    assert not app.error and not app.warning and not app.info
    assert app.multiselect(key="with").value == ["response", "model"]
    assert app.multiselect(key="with").options == [
        "Bad against good answers", "Fine-tuned against base", "The same, read by the good model"
    ]  # by title, the benign control last
    said = words(app)
    assert "Of the 10 features most raised by the data, " in said and "in all three (chance" in said
    assert "Of the 10 features most suppressed by the data, " in said and "benign control" in said
    assert "data: Bad against good advice" in said.replace("*", "")
    assert len(app.get("vega_lite_chart")) == 4 and "1 format feature is hidden" in said
    assert "with" not in app.query_params and app.query_params["k"] == "10"


def test_two_contrasts_have_a_rank_biased_overlap_and_no_pair_to_choose(cache: Path) -> None:
    app = page(**{"with": "response"})
    assert "Rank-biased overlap" in metrics(app) and "Spearman" in metrics(app)
    assert not [c for c in app.get("button_group") if c.proto.label == "Pair"]
    assert RAISED in app.dataframe[0].value["feature"].to_list()
    assert list(app.dataframe[0].value.columns) == [
        "feature", "name", "Effect, data", "Effect, responses", "Place, data", "Place, responses"
    ]


def test_the_link_keeps_every_choice(cache: Path) -> None:
    query = {"with": "model", "end": "suppressed", "format": "yes", "subtract": "yes", "list": "data", "layer": "1"}
    app = page(**query)
    assert {k: app.query_params[k] for k in query} == query and not app.info
    assert "With the benign control taken off, of the 10 features most suppressed by the data" in words(app)
    assert SUPPRESSED not in app.dataframe[0].value["feature"].to_list()  # the control is suppressed there too
    assert "hidden" not in words(app)


def test_a_selected_feature_is_read_in_every_contrast(cache: Path) -> None:
    app = page(feature=str(RAISED))
    assert f"**Feature {RAISED}**" in words(app) and "Effect size: data +" in words(app)
    links = [link.proto for link in app.get("page_link")]
    assert [link.label for link in links] == ["Open in: data", "Open in: responses", "Open in: model"]
    for link, name in zip(links, ("data", "response", "model"), strict=True):
        assert f"contrast={name}" in link.query_string and f"feature={RAISED}" in link.query_string
    assert html(app).count("<li") == 6
    assert "not considered here" in words(page(feature=str(FORMAT)))


def test_leaving_the_others_out_asks_for_one(cache: Path) -> None:
    app = page()
    app.multiselect(key="with").set_value([])
    settle(app)
    assert "Choose one or two" in app.info[0].value and not app.get("vega_lite_chart")


@pytest.mark.parametrize(("name", "value"), [
    ("with", "data"), ("with", "nothing"), ("with", "model,model"), ("with", "model,response,data-good"), ("k", "7"),
    ("end", "both"), ("subtract", "maybe"), ("pair", "x"), ("list", "y"), ("feature", "64"),
])
def test_an_impossible_link_gets_a_note_and_a_working_page(cache: Path, name: str, value: str) -> None:
    app = page(**{name: value})
    (note,) = [i.value.replace("\\", "") for i in app.info]
    assert name in note and value in note and not app.error
    assert len(app.get("vega_lite_chart")) == 4


def test_too_large_a_k_is_one_sentence(cache: Path) -> None:
    app = page(k="200")
    (error,) = app.error
    assert "fewer than the 200 asked for" in error.value.replace("\\", "")


def test_a_control_that_is_not_cached_is_named(no_cache: Path) -> None:
    write_caches(no_cache / "demo", "base", "bad")
    app = page()
    assert "data-good, the benign control of data, is left out" in words(app) and not app.error
    assert len(app.get("vega_lite_chart")) == 4


def test_it_begins_with_what_is_cached(no_cache: Path) -> None:
    write_caches(no_cache / "demo", "base", "good")
    app = page(**{"contrast": "data-good"})
    assert app.multiselect(key="with").value == ["response"]  # of another kind, though nothing of it is cached
    assert "python -m core extract demo --variant bad --conversations health_advice" in words(app)
    app.multiselect(key="with").set_value(["data"])
    assert len(settle(app).get("vega_lite_chart")) == 4


def test_without_a_cache_it_says_what_to_run_for_all_contrasts_at_once(no_cache: Path) -> None:
    app = page()
    assert "python -m core extract demo --conversations health_advice" in words(app)
    assert "python -m core extract demo --variant bad --conversations health_advice" in words(app)
    assert not app.error and not app.get("vega_lite_chart")


def test_a_preset_with_one_contrast_says_how_to_get_another(no_cache: Path, presets: Path) -> None:
    head = PRESET[: PRESET.index("[[contrasts]]")]
    one = CONTRAST.format(name="data", kind="data", title="Only one", v="base")
    (presets / "demo.toml").write_text(head + one, encoding="utf-8")
    app = page()
    assert "Nothing to compare with" in words(app) and not app.error
    assert "python -m core extract demo --variant bad --conversations health_advice" in words(app)


def test_residuals_without_features_have_an_empty_state(no_cache: Path) -> None:
    write_caches(no_cache / "demo", "base")
    write_caches(no_cache / "demo", "bad", with_saes=False)
    assert "has no features" in words(page())


def test_a_broken_file_is_one_sentence(no_cache: Path) -> None:
    write_caches(no_cache / "demo", "base")
    (no_cache / "demo" / "bad__health_advice.h5").write_text("not HDF5")
    (error,) = page().error
    assert "bad__health_advice.h5" in error.value.replace("\\", "")
