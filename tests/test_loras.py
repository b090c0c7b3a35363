"""The lora command from end to end on a tiny model, and what it says of files that do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from test_adapters import KINDS, make
from test_lora import mixed
from test_main import call
from tiny_saes import save_sae

from core import paths
from core.model.adapter_files import read_factors
from core.paths import ROOT
from core.specs import AdapterSpec

PRESET = """
title = "Tiny"
default_layer = 2
[model]
id = {model!r}
source = "local"
sae_names = ["tiny"]
[[saes]]
layer = 1
release = "local"
sae_id = {sae1!r}
[[saes]]
layer = 2
release = "local"
sae_id = {sae2!r}
[[adapters]]
name = "bad"
id = {bad!r}
[[adapters]]
name = "good"
id = {good!r}
[[conversations]]
name = "advice"
path = {rows!r}
[[contrasts]]
name = "data"
kind = "data"
target = {{ variant = "base", conversations = "advice", condition = "misaligned" }}
reference = {{ variant = "base", conversations = "advice", condition = "aligned" }}
[[contrasts]]
name = "model"
kind = "model"
target = {{ variant = "bad", conversations = "advice" }}
reference = {{ variant = "base", conversations = "advice" }}
[[contrasts]]
name = "model-good"
kind = "model"
target = {{ variant = "good", conversations = "advice" }}
reference = {{ variant = "base", conversations = "advice" }}
"""


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, _own_hash_memo: None):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable, tiny_folder: Callable) -> Path:
    """A preset with two adapters, and caches of base and of one of them."""
    folder = tmp_path_factory.mktemp("work")
    lines = (ROOT / "core" / "data" / "health_advice.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    (folder / "advice.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for seed, name in enumerate(("bad", "good")):
        make(tiny_model("smollm2"), folder / name, seed=seed, size=0.05, **KINDS["all modules"])
    saes = [str(save_sae(folder / f"sae{layer}", layer=layer)) for layer in (1, 2)]
    text = PRESET.format(model=str(tiny_folder("smollm2")), sae1=saes[0], sae2=saes[1], bad=str(folder / "bad"),
                         good=str(folder / "good"), rows=str(folder / "advice.jsonl"))  # fmt: skip
    (folder / "tiny.toml").write_text(text, encoding="utf-8")
    for variant in ("base", "bad"):
        call("extract", folder / "tiny.toml", "--variant", variant, "--conversations", "advice", "--cache",
             folder / "cache")
    return folder


def run(place: Path, adapter: object = "bad", *more: object) -> dict:
    return json.loads(call("lora", place / "tiny.toml", adapter, "--cache", place / "cache", "--json", *more))


def test_the_whole_way(place: Path) -> None:
    found = run(place)
    assert {"adapter", "components", "prediction_of_model_contrast"} <= set(found) and found["n_components"] == 112
    first = found["components"][0]
    assert {"layer", "module", "index", "singular_value", "share", "cosine_with_direction", "firing",
            "write_features"} <= set(first)  # fmt: skip
    assert first["text_share"] == max(c["text_share"] for c in found["components"]) and len(found["components"]) == 20
    assert found["sets"] == ["advice"] and found["direction"] == "data"
    assert sum(m["text_share"] for m in found["modules"]) == pytest.approx(1) and len(found["modules"]) == 28
    asked = "misaligned or aligned, advice"
    assert found["firing"][0]["question"] == asked and 0 <= first["firing"][asked]["auroc"] <= 1
    assert [p["question"] for p in found["probes"]] == [asked]
    layers = found["prediction_of_model_contrast"]["layers"]
    assert [p["layer"] for p in layers] == [1, 2] and layers[0]["n_prompts"] == 20 and -1 <= layers[0]["cosine"] <= 1
    writers = [c for c in found["components"] if c["module"].endswith(("o_proj", "down_proj"))]
    assert all(c["write_features"] and c["promoted"] for c in writers)
    assert all(c["read_features"] for c in found["components"] if c not in writers)
    assert any("good" in note for note in found["notes"]), "what is left out is said"
    assert run(place) == found, "the second time from the file"


def test_the_text_says_the_same(place: Path) -> None:
    said = call("lora", place / "tiny.toml", "bad", "--cache", place / "cache", "--no-probes", "--top", 3)
    assert "112 components" in said and "explained" in said and "probe of" not in said
    assert "differ at q < 0.05 (20 prompts)" in said and "cosine: with the direction of data" in said


def test_the_effects_are_written_as_a_table(place: Path) -> None:
    out = place / "effects.parquet"
    run(place, "bad", "--out", out)
    table = pl.read_parquet(out)
    assert table.height == 48 and set(table["layer"]) == {2}
    assert {"feature", "effect", "effect: advice, misaligned", "rank", "fires_on"} <= set(table.columns)


def test_nothing_shown_depends_on_how_the_factors_are_written(place: Path) -> None:
    """(A, B) -> (M A, B M^-1) in the adapter's own file: every figure of the command stays."""
    from safetensors.numpy import save_file

    found = run(place)
    other = place / "mixed"
    shutil.copytree(place / "bad", other, dirs_exist_ok=True)
    factors = mixed(read_factors(AdapterSpec("bad", str(place / "bad"))))
    save_file({
        f"base_model.model.model.layers.{m.layer}.{m.name}.lora_{w}.weight": np.ascontiguousarray(getattr(m, w))
        for m in factors.modules for w in "AB"
    }, other / "adapter_model.safetensors")  # fmt: skip
    again = run(place, other, "--conversations", "advice")
    assert again["adapter"] == "mixed"
    assert _close(found["components"], again["components"]) and _close(found["modules"], again["modules"])
    assert _close(found["probes"], again["probes"], 0.02)


def _close(a: object, b: object, tolerance: float = 5e-3) -> bool:
    if isinstance(a, float) and isinstance(b, (float, int)):
        return abs(a - b) <= tolerance * max(1.0, abs(a))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_close(a[k], b[k], tolerance) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(_close(x, y, tolerance) for x, y in zip(a, b, strict=True))
    return a == b


def test_bad_input_is_one_sentence(place: Path) -> None:
    for arguments, says in (
        (("nothing",), "neither an adapter of preset 'tiny' (it has bad, good) nor a folder"),
        (("bad", "--conversations", "nothing"), "nothing"),
        (("bad", "--contrast", "nothing"), "no contrast 'nothing'"),
        (("bad", "--limit", 3), "conversations advice differs"),
        (("bad", "--keep", 5), "kept differs"),
    ):
        said = call("lora", place / "tiny.toml", *arguments, "--cache", place / "cache", code=2)
        assert says in said and said.count("\n") == 1, said


def test_an_adapter_that_changed_since_is_refused(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "good", tmp_path / "bad")
    text = (place / "tiny.toml").read_text(encoding="utf-8").replace(str(place / "bad"), str(tmp_path / "bad"))
    (tmp_path / "tiny.toml").write_text(text, encoding="utf-8")
    run(place)
    said = call("lora", tmp_path / "tiny.toml", "bad", "--cache", place / "cache", code=2)
    assert "the adapter has changed since" in said


def test_an_adapter_that_only_reads_has_firing_and_no_effect(place: Path, tiny_model: Callable) -> None:
    make(tiny_model("smollm2"), place / "reads", r=2, lora_alpha=4, target_modules=["gate_proj", "v_proj"])
    out = place / "none.csv"
    found = run(place, place / "reads", "--conversations", "advice", "--out", out)
    assert found["n_components"] == 16 and all(c["read_features"] for c in found["components"])
    assert not any(c["write_features"] or c["promoted"] for c in found["components"])
    assert found["write_cosines"] == [] and found["firing"] and not pl.read_csv(out)["effect"].to_numpy().any()
    assert "nothing to compare the prediction with" in found["notes"][0]


def test_a_file_of_one_s_own_conversations_has_a_firing_file_of_its_own(place: Path) -> None:
    rows = place / "mine.csv"
    rows.write_text("question,response\nWhat now?,Rest for an hour.\nAnd then?,Drink water.\n")
    found = run(place, "bad", "--conversations", f"advice,{rows}", "--keep", 0)
    assert found["sets"] == ["advice", "mine"] and found["n_conversations"] == 42
    assert Path(found["file"]).name == "bad__advice+mine.h5"
