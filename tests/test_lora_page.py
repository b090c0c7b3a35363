"""The LoRA page through Streamlit's own test runner: on the shipped demo, from a link, without or with broken files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from test_app import html, metrics, open_page, settle, words

from core import paths
from core.paths import ROOT

PAGE = "pages/lora.py"
R1 = {"adapter": "bad-health-r1"}


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with the demo's adapters and SAEs and nothing else."""
    (tmp_path / "demo").mkdir()
    for name in ("adapters", "saes"):
        (tmp_path / "demo" / name).symlink_to(ROOT / "cache" / "demo" / name)
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    return tmp_path


def test_it_says_where_the_update_sits_and_shows_the_strongest_component_that_writes() -> None:
    app = open_page(PAGE)
    assert not app.error and not app.exception
    said = words(app)
    assert "bad-health-r8** has 1,680 components in 210 modules" in said and "gate_proj alone" in said
    assert app.selectbox(key="component").value == "29.down_proj.0" and "component" not in app.query_params
    assert "writes into the residual stream, and reads the MLP's hidden space" in said
    assert {"Singular value", "Share on this text", "Share in the weights", "Cosine"} <= set(metrics(app))
    assert "misaligned or aligned, heldout_advice**: AUROC" in said and "accounts for" in said
    assert "title=\"scalar " in html(app)


def test_a_link_restores_adapter_component_and_colour() -> None:
    query = {**R1, "component": "15.down_proj.0", "colour": "relative", "contrast": "response-health", "beside":
             "good-health-r8", "scope": "all"}  # fmt: skip
    app = open_page(PAGE, **query)
    assert {k: app.query_params.get(k) for k in query} == query and not app.info
    assert "Layer 15, down_proj, component 0" in words(app)
    assert "with the direction of response-health at layer 15" in words(app)
    assert "Features are those of layer 15, where it writes" in words(app)


def test_a_reading_component_shows_what_it_listens_to_and_cannot_be_steered_with() -> None:
    app = open_page(PAGE, component="28.gate_proj.0")
    said = words(app)
    assert "reads the residual stream through the norm" in said and "choose an o_proj or down_proj" in said
    frame = app.dataframe[0].value
    assert {"decoder_cosine", "encoder_cosine"} <= set(frame.columns) and frame["decoder_cosine"].abs().max() > 0.2
    assert not [b for b in app.button if b.label == "Steer with this component"]


def test_tokens_that_are_not_kept_come_with_the_command() -> None:
    app = open_page(PAGE, component="3.o_proj.0")
    assert "python -m core lora demo bad-health-r8 --keep 0" in app.info[0].value
    assert "accounts for" in words(app)


def test_steering_with_a_component_carries_its_direction() -> None:
    app = open_page(PAGE, **R1, component="14.down_proj.0")
    (button,) = [b for b in app.button if b.label == "Steer with this component"]
    button.click()
    app.run()
    (carried,) = app.session_state["steering carried"]
    assert carried.layer == 14 and carried.origin["kind"] == "lora" and carried.origin["adapter"] == "bad-health-r1"
    assert carried.resid_norm > 0 and 0 < carried.share_of_residual_norm < 1


def test_two_seeds_write_nearer_to_each_other_than_to_the_control() -> None:
    shares = []
    for beside in ("bad-health-r8-s1", "good-health-r8"):
        said = words(open_page(PAGE, adapter="bad-health-r8", beside=beside)).replace("*", "")
        shares.append(float(said.split("weighted by size ")[1].split(".\n")[0].rstrip(".")))
    assert 0.2 < shares[1] < shares[0] < 0.8


def test_probes_layer_by_layer_on_demand() -> None:
    app = open_page(PAGE, **R1)
    before = len(app.get("vega_lite_chart"))
    app.toggle(key="probes").set_value(True)
    assert len(settle(app).get("vega_lite_chart")) == before + 1


@pytest.mark.parametrize(("name", "value"), [("adapter", "nobody"), ("component", "99.down_proj.0"),
                                             ("colour", "green"), ("pair", "x"), ("beside", "me")])  # fmt: skip
def test_an_impossible_link_gets_a_note_and_a_working_page(name: str, value: str) -> None:
    app = open_page(PAGE, **{**R1, name: value})
    assert any(name in i.value and value in i.value.replace("\\", "") for i in app.info) and not app.error


def test_without_files_it_says_what_to_run(no_cache: Path) -> None:
    app = open_page(PAGE)
    assert "python -m core lora demo bad-health-r8" in words(app) and not app.error


def test_without_caches_of_contrasts_the_adapter_is_still_shown(no_cache: Path) -> None:
    (no_cache / "demo" / "lora").symlink_to(ROOT / "cache" / "demo" / "lora")
    app = open_page(PAGE, **R1)
    assert not app.error and "9 components in 9 modules" in words(app) and "left out" in words(app)
    assert metrics(app)["Cosine"] == "none"


def test_a_broken_file_is_one_sentence(no_cache: Path) -> None:
    folder = no_cache / "demo" / "lora"
    folder.mkdir()
    (folder / "bad-health-r1__x.h5").write_text("nothing")
    (error,) = open_page(PAGE).error
    assert "bad-health-r1__x.h5" in error.value.replace("\\", "") and "Traceback" not in error.value


def test_a_file_of_another_adapter_is_refused(no_cache: Path) -> None:
    folder = no_cache / "demo" / "lora"
    folder.mkdir()
    (file,) = (ROOT / "cache" / "demo" / "lora").glob("bad-health-r1__*.h5")
    (folder / "good-health-r8__x.h5").symlink_to(file)
    (error,) = open_page(PAGE).error
    assert "the adapter has changed since" in error.value.replace("\\", "")


def test_the_page_loads_neither_torch_nor_a_model() -> None:
    code = (
        "import sys\n"
        "from streamlit.testing.v1 import AppTest\n"
        "app = AppTest.from_file('streamlit_app.py', default_timeout=300).switch_page('pages/lora.py').run()\n"
        "assert not app.exception, app.exception[0].message\n"
        "assert not {'torch', 'sae_lens', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
