"""The Direction page: on the demo as it ships, without features, without a cache, and what it says in words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from make_cache import make_cache
from test_app import open_page, settle

from core import paths
from core.analysis.decompose import METHODS, decompose
from core.dictionary import Dictionary
from core.directions import Direction
from core.paths import ROOT
from core.view import direction_charts as charts
from core.view import direction_parts as parts
from core.view.session.directions import CARRIED

PAGE = "pages/direction.py"


def words(app) -> str:
    return " ".join(m.value for m in (*app.markdown, *app.caption, *app.warning, *app.info))


def test_it_shows_the_shipped_demo_without_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.store.prepare.model_for", lambda *_: pytest.fail("a model was loaded"))
    app = open_page(PAGE)
    assert [m.label for m in app.metric] == ["Length", "Held-out AUROC", "Prompt alone", "Halves agree"]
    assert app.metric[2].value == "0.50"
    assert "best features span" in words(app) and "random ones" in words(app)
    assert "effect model" in app.dataframe[0].value.columns
    next(b for b in app.button if b.label == "Use in steering").click()
    settle(app)
    carried = app.session_state[CARRIED]
    whole = sum(d.vector for d in carried)
    assert len(carried) == 9 and "remainder" in carried[-1].name
    assert np.linalg.norm(whole) == pytest.approx(float(carried[0].resid_norm) * 0.036, rel=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_every_comparison(method: str) -> None:
    across = {"exact": "layers", "encoder": "positions"}.get(method, "contrasts")
    app = open_page(PAGE, method=method, across=across, contrast="response-health", weighting="token")
    assert not app.error and "Share" not in app.title[0].value
    assert ("sum to the direction exactly" in words(app)) == (method == "exact")
    assert "read by" in words(app), "base reads the same text in the demo"


def test_what_both_sides_share_gives_no_direction() -> None:
    app = open_page(PAGE, position="last_prompt")
    assert "no direction" in app.error[0].value and not app.metric


def test_an_unpaired_contrast_says_that_the_prompt_tells_the_sides_apart() -> None:
    assert "different prompts" in words(open_page(PAGE, contrast="response"))


def test_without_features_or_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    assert "Nothing cached" in open_page(PAGE).subheader[0].value
    make_cache(tmp_path / "demo" / "base__health_advice.h5", with_saes=False, layers=(7,))
    app = open_page(PAGE)
    assert "has no SAE" in words(app) and len(app.metric) == 4


def test_a_text_is_read_by_the_real_model(demo_model) -> None:
    app = open_page(PAGE)
    next(b for b in app.button if b.label == "Read").click()
    settle(app)
    assert "tokens shown in full" in words(app)
    assert any("projection" in html.proto.body for html in app.get("html"))


def named(table: pl.DataFrame) -> pl.DataFrame:
    return table.with_columns(name=pl.lit("x"))


def test_bars_are_lengths_and_the_last_is_what_is_left() -> None:
    rng = np.random.default_rng(0)
    W = rng.standard_normal((40, 16)).astype(np.float32)
    book = Dictionary(1, "local", "s", W, W.T)
    found = decompose(Direction("d", "m", 1, rng.standard_normal(16), 2.0), book, "omp", k=4)
    rows = parts.component_rows(found, named(found.table), 3)
    first = found.table.row(0, named=True)
    size = first["coefficient"] * book.norms[first["feature"]] / found.direction.norm
    assert rows["size"][0] == pytest.approx(size, rel=1e-5)
    assert rows["feature"].to_list() == [*found.table["feature"].head(3), None]
    assert rows["size"][-1] == pytest.approx(found.error_norm_share) and rows["kind"][-1] == "left"
    chart = charts.component_bars(rows).to_dict()
    assert chart["encoding"]["x"]["title"] == "Share of the direction's length"


def test_steering_parts_keep_the_order_asked_for_and_sum_up() -> None:
    rng = np.random.default_rng(1)
    W = rng.standard_normal((40, 16)).astype(np.float32)
    book = Dictionary(1, "local", "s", W, W.T)
    whole = Direction("d", "m", 1, rng.standard_normal(16), 2.0)
    found = decompose(whole, book, "cosine")
    wanted = found.table["feature"][[5, 0, 3]].to_list()
    made = parts.steering_parts(found, book, wanted, {wanted[0]: "doctor"})
    assert made[0].name == f"{wanted[0]}: doctor" and made[-1].name == "remainder of d"
    assert [d.origin.get("feature") for d in made[:3]] == [str(f) for f in wanted]
    assert np.allclose(sum(d.vector for d in made), whole.vector, atol=1e-5)


def test_charts_are_valid_and_name_their_units() -> None:
    depth = pl.DataFrame({"layer": [1, 2], "norm": [1.0, 2.0], "share": [0.1, 0.2], "share_low": [0.05, 0.1],
                          "share_high": [0.15, 0.3], "noise_share": [0.01, 0.02], "auroc": [0.7, None],
                          "auroc_low": [0.6, None], "auroc_high": [0.8, None], "prompt_auroc": [0.5, 0.5]})
    assert "Share of the residual norm" in charts.depth_norm(depth).to_json()
    assert "Held-out AUROC" in charts.depth_auroc(depth).to_json()
    cosines = pl.DataFrame({"a": ["x"], "b": ["x"], "cosine": [None]}, schema_overrides={"cosine": pl.Float64})
    charts.cosine_map(cosines, ["x"]).to_dict()


def test_sentences_say_what_a_low_cosine_means() -> None:
    assert "whoever reads it" in parts.reader_sentence("base", {"bad": 0.95})
    assert "the reader's" in parts.reader_sentence("base", {"bad": 0.95, "good": 0.5})
    assert parts.reader_sentence("base", {}) == ""
    assert (ROOT / PAGE).is_file()
