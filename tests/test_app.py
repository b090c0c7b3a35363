"""Every page through Streamlit's own test runner: with a cache, without one, with broken ones, and from a link."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import h5py
import pytest
from make_cache import FORMAT, RAISED, SUPPRESSED, make_cache
from streamlit.testing.v1 import AppTest

from core import paths
from core.store.reader import Cache

ROOT = Path(__file__).parent.parent
PAGES = (None, "pages/rankings.py", "pages/feature.py")
LAYERS = (3, 15)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with the demo's file in it; do not change it."""
    folder = tmp_path_factory.mktemp("cache")
    make_cache(folder / "demo" / "base__health_advice.h5", layers=LAYERS)
    return folder


@pytest.fixture
def cache(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own with the finished file, which the app reads."""
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "base__health_advice.h5").symlink_to(finished / "demo" / "base__health_advice.h5")
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    return tmp_path


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    return tmp_path


def open_page(page: str | None = None, **query: str) -> AppTest:
    """The app at one page, as a link with these parameters opens it."""
    app = AppTest.from_file(str(ROOT / "streamlit_app.py"), default_timeout=300)  # a guard, not a target
    app.query_params.update(query)
    if page:
        app.switch_page(page)
        app.query_params.update(query)
    return settle(app)


def settle(app: AppTest) -> AppTest:
    app.run()
    assert not app.exception, app.exception[0].message
    return app


def words(app: AppTest) -> str:
    """Everything written on the page, Markdown escapes taken out."""
    kinds = (app.title, app.subheader, app.markdown, app.caption, app.error, app.info, app.warning, app.code)
    return "\n".join(str(e.value) for kind in kinds for e in kind).replace("\\", "")


def html(app: AppTest) -> str:
    return "\n".join(str(e.value) for e in app.get("html"))


def metrics(app: AppTest) -> dict[str, str]:
    return {m.label: m.value for m in app.metric}


# ------------------------------------------------------------------------------------------- with a finished cache


@pytest.mark.parametrize("page", PAGES)
def test_every_page_draws_and_writes_its_choices_into_the_url(cache: Path, page: str | None) -> None:
    app = open_page(page)
    assert not app.error and not app.warning
    assert {k: app.query_params[k] for k in ("experiment", "contrast", "layer", "position")} == {
        "experiment": "demo", "contrast": "data", "layer": "15", "position": "response",
    }


def test_overview_says_what_is_cached_and_starts_six_tours(cache: Path) -> None:
    app = open_page()
    files, health = (frame.value for frame in app.dataframe)
    assert set(files["status"].to_list()[1:]) == {"not made yet"}
    assert files["status"][0] == "ready" and files["n"].to_list()[0] == 60
    assert "30 misaligned" in files["conditions"][0] and files["layers"][0] == "3, 15"
    assert health["layer"].to_list() == [3, 15] and health["features"].to_list() == [64, 64]
    links = app.get("page_link")
    assert len(links) == 6 and all("layer=15" in link.proto.query_string for link in links)


def test_rankings_finds_what_was_planted_and_checks_it_on_the_held_out_half(cache: Path) -> None:
    app = open_page("pages/rankings.py")
    assert int(metrics(app)["Raised"]) >= 1 and int(metrics(app)["Suppressed"]) >= 1
    assert "responses to 30 matched prompts" in words(app) and "12.0 against 12.0 tokens" in words(app)
    assert "hold on the other half" in words(app) and "with labels shuffled" in words(app)
    assert "1 format feature is hidden" in words(app)
    assert len(app.get("vega_lite_chart")) == 3


def test_format_features_are_shown_on_demand_and_the_link_keeps_it(cache: Path) -> None:
    hidden = open_page("pages/rankings.py", show="Table")
    assert FORMAT not in hidden.dataframe[0].value["feature"].to_list()
    hidden.toggle(key="format").set_value(True)
    shown = settle(hidden)
    assert FORMAT in shown.dataframe[0].value["feature"].to_list() and shown.query_params["format"] == "yes"
    again = open_page("pages/rankings.py", show="Table", format="yes")
    assert FORMAT in again.dataframe[0].value["feature"].to_list() and "format feature" not in again.caption[0].value


def test_the_table_filters_and_the_link_keeps_the_filters(cache: Path) -> None:
    app = open_page("pages/rankings.py", show="Table", tail="suppressed", passing="yes")
    assert app.dataframe[0].value["feature"].to_list()[0] == SUPPRESSED
    assert (app.dataframe[0].value["effect_size"] < 0).all() and (app.dataframe[0].value["q_value"] < 0.05).all()
    app.text_input(key="find").set_value(str(SUPPRESSED))
    assert settle(app).dataframe[0].value["feature"].to_list() == [SUPPRESSED]
    assert app.query_params["find"] == str(SUPPRESSED) and app.query_params["tail"] == "suppressed"
    assert len(app.get("download_button")) == 2


def test_depth_view_has_a_chart_each_for_features_effects_and_residuals(cache: Path) -> None:
    app = open_page("pages/rankings.py", show="Depth")
    assert len(app.get("vega_lite_chart")) == 3
    assert "The residual mean difference separates the sides best at layer" in words(app)


def test_feature_page_opens_the_most_raised_one_and_reads_both_sides(cache: Path) -> None:
    app = open_page("pages/feature.py")
    assert app.title[0].value == f"Feature {RAISED}" and app.query_params["feature"] == str(RAISED)
    assert metrics(app)["Rank"].startswith("2 of")  # the planted format feature is first
    assert "responses at exactly 0" in words(app)
    assert "misaligned" in words(app) and "aligned" in words(app)
    assert html(app).count("<li") == 10 and "activation " in html(app)
    assert not app.get("link_button")


def test_a_contexts_conversation_can_be_read_in_full(cache: Path) -> None:
    app = open_page("pages/feature.py", feature=str(RAISED))
    box = next(b for b in app.selectbox if b.label == "Conversation")
    second = box.options[1]
    box.set_value(second)
    settle(app)
    with Cache.open(paths.CACHE / "demo" / "base__health_advice.h5") as opened:
        turns = opened.messages(opened.conversations["id"].to_list().index(second))
    assert [t.value for t in app.text][-2:] == [text for _, text in turns][-2:]
    assert "response" in words(app)


def test_stepping_goes_through_the_ranking(cache: Path) -> None:
    app = open_page("pages/feature.py", feature="top")
    next(b for b in app.button if b.label == "More raised").click()
    assert settle(app).title[0].value == f"Feature {FORMAT}"
    assert next(b for b in app.button if b.label == "More raised").disabled
    app.number_input[0].set_value(SUPPRESSED)
    assert settle(app).title[0].value == f"Feature {SUPPRESSED}" and app.query_params["feature"] == str(SUPPRESSED)
    assert next(b for b in app.button if b.label == "More suppressed").disabled
    assert open_page("pages/feature.py", feature="bottom").title[0].value == f"Feature {SUPPRESSED}"


def test_a_feature_without_activity_is_told_as_such(cache: Path) -> None:
    app = open_page("pages/feature.py", feature="63")
    assert metrics(app)["Rank"] == "none" and metrics(app)["q"] == "not tested"
    assert "silent on every response token" in words(app)


def test_choices_last_across_pages_and_a_feature_does_not_outlive_its_layer(cache: Path) -> None:
    app = open_page("pages/feature.py", feature="9", layer="3")
    app.switch_page("pages/rankings.py")
    settle(app)
    assert app.query_params["layer"] == "3" and app.query_params["feature"] == "9"
    assert "Feature 9" in words(app)
    app.sidebar.selectbox(key="layer").set_value(15)
    settle(app)
    assert "feature" not in app.query_params


def test_a_link_inside_the_app_overrides_the_choices_made(cache: Path) -> None:
    app = open_page("pages/rankings.py", layer="3")
    app.query_params["layer"] = "15"
    assert settle(app).sidebar.selectbox(key="layer").value == 15


@pytest.mark.parametrize(("page", "name", "value"), [
    (None, "experiment", "nothing"), (None, "contrast", "x"), (None, "layer", "99"), (None, "layer", "-1"),
    (None, "layer", "fifteen"), (None, "position", "<b>"), ("pages/rankings.py", "show", "everything"),
    ("pages/rankings.py", "format", "maybe"), ("pages/rankings.py", "plot", "pie"),
    ("pages/feature.py", "feature", "64"), ("pages/feature.py", "feature", "-1"),
    ("pages/feature.py", "feature", "9" * 30),
    ("pages/feature.py", "feature", "\u00b2"), ("pages/feature.py", "values", "x"),
])
def test_an_impossible_link_gets_a_note_and_a_working_page(
    cache: Path, page: str | None, name: str, value: str
) -> None:
    app = open_page(page, **{name: value})
    (note,) = [i.value.replace("\\", "") for i in app.info]
    assert name in note and value[:60] in note
    assert app.query_params.get(name) != value
    settle(app)
    assert not app.info


def test_last_prompt_position_reads_other_numbers(cache: Path) -> None:
    app = open_page("pages/rankings.py", position="last_prompt")
    assert "last prompt token" in words(app) and metrics(app)["Raised"] == "0"


# ----------------------------------------------------------------------------------------------------- labels


def test_a_label_is_kept_shown_in_the_ranking_and_never_markup(cache: Path) -> None:
    text = "<img src=x onerror=alert(1)> *doctor* :red[x] $y$"
    app = open_page("pages/feature.py", feature=str(RAISED))
    app.text_input[0].set_value(text)
    next(b for b in app.button if b.label == "Keep label").click()
    settle(app)
    named = next(m.value for m in app.markdown if "onerror" in m.value)
    assert r"\<img" in named and r"\*doctor\*" in named and r"\:red\[" in named and r"\$y\$" in named
    assert not any(m.allow_html for m in app.markdown) and "<img" not in html(app)
    table = open_page("pages/rankings.py", show="Table").dataframe[0].value
    assert table["name"][table["feature"].to_list().index(RAISED)] == text


@pytest.mark.parametrize("page", PAGES[1:])
def test_a_damaged_label_file_is_a_warning_not_an_end(cache: Path, page: str) -> None:
    (cache / "demo" / "labels.json").write_text("{ damaged")
    app = open_page(page)
    assert "labels.json" in app.warning[0].value.replace("\\", "") and not app.error
    assert len(app.get("vega_lite_chart")) >= 1


# -------------------------------------------------------------------------- missing, incomplete and foreign caches


@pytest.mark.parametrize("page", PAGES)
def test_without_a_cache_every_page_says_what_to_run(no_cache: Path, page: str | None) -> None:
    app = open_page(page)
    assert "python -m core extract demo --conversations health_advice" in words(app)
    assert not app.error


def test_every_preset_has_a_working_empty_state(no_cache: Path) -> None:
    app = open_page("pages/rankings.py")
    for name in app.sidebar.selectbox(key="experiment").options:
        app.sidebar.selectbox(key="experiment").set_value(name)
        settle(app)
        assert f"python -m core extract {name}" in words(app)
        assert app.query_params["experiment"] == name


def foreign(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.attrs["title"] = "something else"


def unfinished(path: Path) -> None:
    make_cache(path, layers=LAYERS, n_prompts=4)
    with h5py.File(path, "r+") as file:
        file.attrs["complete"] = False


def truncated(path: Path) -> None:
    make_cache(path, layers=LAYERS, n_prompts=4)
    path.write_bytes(path.read_bytes()[:2000])


def no_hdf5(path: Path) -> None:
    path.write_text("not HDF5")


def other_conditions(path: Path) -> None:
    make_cache(path, layers=LAYERS, conditions=("good", "bad"))


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("spoil", [foreign, unfinished, truncated, no_hdf5, other_conditions])
def test_an_unusable_file_is_one_sentence(no_cache: Path, page: str | None, spoil) -> None:
    path = no_cache / "demo" / "base__health_advice.h5"
    path.parent.mkdir()
    spoil(path)
    app = open_page(page)
    if page is None and spoil is other_conditions:
        assert "30 bad" in app.dataframe[0].value["conditions"][0]
        return
    (error,) = app.error
    assert path.name in error.value.replace("\\", "") and "Traceback" not in error.value


def test_a_new_file_under_the_old_name_is_seen(no_cache: Path) -> None:
    path = no_cache / "demo" / "base__health_advice.h5"
    path.parent.mkdir()
    no_hdf5(path)
    app = open_page("pages/rankings.py")
    assert app.error
    make_cache(path, layers=LAYERS)
    assert not settle(app).error
    path.unlink()
    assert "python -m core extract" in words(settle(app))


def test_too_few_prompts_are_refused_in_words(no_cache: Path) -> None:
    make_cache(no_cache / "demo" / "base__health_advice.h5", layers=LAYERS, n_prompts=1)
    assert "needs at least 2" in open_page("pages/rankings.py").error[0].value.replace("\\", "")
    settle(open_page("pages/rankings.py", show="Depth"))


def test_eight_prompts_withhold_q_values_and_still_draw(no_cache: Path) -> None:
    make_cache(no_cache / "demo" / "base__health_advice.h5", layers=LAYERS, n_prompts=8)
    app = open_page("pages/rankings.py")
    assert "q-values are withheld" in words(app) and len(app.get("vega_lite_chart")) == 3


def test_residuals_without_features_still_give_the_depth_view(no_cache: Path) -> None:
    make_cache(no_cache / "demo" / "base__health_advice.h5", layers=LAYERS, with_saes=False)
    assert "has no features" in words(open_page("pages/rankings.py"))
    assert "has no features" in words(open_page("pages/feature.py"))
    depth = open_page("pages/rankings.py", show="Depth")
    assert len(depth.get("vega_lite_chart")) == 1 and "held-out AUROC" in words(depth)
    assert open_page().dataframe[1].value["features"].isna().all()


def test_neuronpedia_is_linked_where_the_sae_is_on_it(no_cache: Path) -> None:
    make_cache(no_cache / "demo" / "base__health_advice.h5", layers=LAYERS, neuronpedia_id="tiny/15-res")
    (link,) = open_page("pages/feature.py", feature="7").get("link_button")
    assert link.proto.url == "https://www.neuronpedia.org/tiny/15-res/7"


# --------------------------------------------------------------------------------------------------- lightness


def test_nothing_on_the_app_s_path_imports_torch_or_sae_lens() -> None:
    code = (
        "import sys\n"
        "from streamlit.testing.v1 import AppTest\n"
        "for page in (None, 'pages/rankings.py', 'pages/feature.py', 'pages/evaluation.py'):\n"
        "    app = AppTest.from_file('streamlit_app.py', default_timeout=300)\n"
        "    app = (app.switch_page(page) if page else app).run()\n"
        "    assert not app.exception, app.exception[0].message\n"
        "heavy = {'torch', 'sae_lens', 'transformers', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
