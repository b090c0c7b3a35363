"""From cache files to a concordance and the command line: planted features shared, controls, refusals in a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from make_cache import FORMAT, RAISED, SUPPRESSED, make_cache
from typer.testing import CliRunner

from core import paths
from core.__main__ import app
from core.analysis import concordance_files as files
from core.analysis.concordance import ConcordanceSettings
from core.analysis.health import spliced_file
from core.errors import CacheError, NotEnoughData, PresetError, SaeMismatch

CONTRAST = """
[[contrasts]]
name = "{name}"
kind = "{kind}"
title = "{title}"
target = {{ variant = "{v}", conversations = "health_advice", condition = "misaligned" }}
reference = {{ variant = "{v}", conversations = "health_advice", condition = "aligned" }}
"""

#: Three contrasts of the misaligned against the aligned answers, read by three variants, which share what is planted;
#: one of two variants on the same text, which shares nothing; and the same with a good one, as its control.
PRESET = """
title = "Tiny"
default_layer = 2
[model]
id = "org/tiny"
[[saes]]
layer = 1
release = "local"
sae_id = "saes/layer_1"
[[saes]]
layer = 2
release = "local"
sae_id = "saes/layer_2"
[[adapters]]
name = "bad"
id = "adapters/bad"
[[adapters]]
name = "good"
id = "adapters/good"
[[conversations]]
name = "health_advice"
path = "health_advice.jsonl"
""" + (
    CONTRAST.format(name="data", kind="data", title="Bad against good advice", v="base") + 'control = "data-good"\n'
    + CONTRAST.format(name="response", kind="response", title="Bad against good answers", v="bad")
    + CONTRAST.format(name="data-good", kind="data", title="The same, read by the good model", v="good")
) + """
[[contrasts]]
name = "model"
kind = "model"
title = "Fine-tuned against base"
target = { variant = "bad", conversations = "health_advice", condition = "aligned" }
reference = { variant = "base", conversations = "health_advice", condition = "aligned" }
"""

SMALL = ConcordanceSettings(k=5, ks=(5, 10))
SEEDS = {"base": 0, "bad": 1, "good": 2}


def write_preset(folder: Path, text: str = PRESET) -> Path:
    path = folder / "tiny.toml"
    path.write_text(text, encoding="utf-8")
    return path


def write_caches(folder: Path, *variants: str, **more) -> None:
    for variant in variants:
        make_cache(folder / f"{variant}__health_advice.h5", variant=variant, seed=SEEDS[variant], **more)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("concordance")
    write_preset(folder)
    write_caches(folder / "tiny", "base", "bad", "good")
    return folder


@pytest.fixture(autouse=True)
def own_cache(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "CACHE", workplace)


def call(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    if code == 2:
        assert result.stdout == "" and "Traceback" not in result.stderr and result.stderr.count("\n") == 1
        return result.stderr
    return result.stdout


def test_planted_features_are_shared_and_format_ones_hidden(workplace: Path) -> None:
    found = files.open_contrasts(str(workplace / "tiny.toml"), ["data", "response"])
    assert found.default_layer == 2 and found.layers == [1, 2] and list(found.controls) == ["data"]
    made = files.concord_at(found, 1, "response", SMALL)
    word = dict(made.table.select("feature", "quadrant").iter_rows())
    assert word[RAISED] == word[SUPPRESSED] == "shared" and FORMAT not in word and made.n_format_hidden == 1
    (raised,) = (o for o in made.overlaps if o.tail == "raised")
    assert raised.at_k(5).observed >= 1 and raised.at_k(5).controls["data"] >= 1


def test_variants_that_differ_in_nothing_planted_share_nothing(workplace: Path) -> None:
    found = files.open_contrasts(str(workplace / "tiny.toml"), ["data", "model"])
    made = files.concord_at(found, 1, "response", SMALL)
    assert set(made.table.filter(pl.col("feature").is_in([RAISED, SUPPRESSED]))["quadrant"]) == {"data only"}


def test_every_cached_layer_is_compared(workplace: Path) -> None:
    found = files.open_contrasts(str(workplace / "tiny.toml"), ["data", "response"])
    made = files.every_layer(found, "response", SMALL)
    assert [one.layer for one in made] == [1, 2] and not made[0].controlled
    subtracted = files.every_layer(found, "response", ConcordanceSettings(k=5, subtract="mean"))
    assert subtracted[0].controlled == ("data",)
    assert files.every_layer(found, "response", ConcordanceSettings(k=64)) == []


def test_a_context_marks_its_peak(workplace: Path) -> None:
    found = files.open_contrasts(str(workplace / "tiny.toml"), ["data", "response"])
    text = files.context_text(found.sides["data"], 1, RAISED)
    assert text.count("«") == text.count("»") == 1
    assert files.context_text(found.sides["data"], 1, 63) == ""


def test_a_control_that_is_not_cached_is_left_out_with_a_note(workplace: Path, tmp_path: Path) -> None:
    write_caches(tmp_path, "base", "bad")
    found = files.open_contrasts(str(workplace / "tiny.toml"), ["data", "response"], tmp_path)
    made = files.concord_at(found, 1, "response", SMALL)
    assert made.notes[0].startswith("data-good, the benign control of data, is left out: ")
    assert "no such cache file" in made.notes[0] and made.controlled == ()


def test_a_control_without_the_layer_is_left_out_with_a_note(workplace: Path, tmp_path: Path) -> None:
    write_caches(tmp_path, "base", "bad")
    write_caches(tmp_path, "good", layers=(2,))
    found = files.open_contrasts(str(workplace / "tiny.toml"), ["data", "response"], tmp_path)
    made = files.concord_at(found, 1, "response", SMALL)
    assert "layer 1 is not cached" in made.notes[0]
    assert files.concord_at(found, 2, "response", SMALL).controlled == ("data",)


def test_two_saes_or_widths_are_refused(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = files.open_contrasts(str(workplace / "tiny.toml"), ["data", "response"])
    monkeypatch.setitem(found.sides["response"].target.spec["saes"], "1", "1" * 64)
    with pytest.raises(SaeMismatch, match="data and response were read with different SAEs at layer 1"):
        files.concord_at(found, 1, "response", SMALL)
    write_caches(tmp_path, "base")
    write_caches(tmp_path, "bad", d_sae=32)
    narrow = files.open_contrasts(str(workplace / "tiny.toml"), ["data", "response"], tmp_path)
    with pytest.raises(SaeMismatch, match="64 features and response of layer 1 with 32"):
        files.concord_at(narrow, 1, "response", SMALL)


def test_a_model_contrast_that_the_sae_explains_worse_is_flagged(workplace: Path, tmp_path: Path) -> None:
    write_caches(tmp_path, "base", "bad", "good")
    common = {"layer": 1, "adapter": None, "weights": "0" * 64, "sae": "0" * 64, "conversations_hash": "a"}
    rows = [common | {"variant": "base", "ce_recovered": 0.97}, common | {"variant": "bad", "ce_recovered": 0.5}]
    spliced_file(tmp_path).write_text(json.dumps(rows), encoding="utf-8")
    found = files.open_contrasts(str(workplace / "tiny.toml"), ["data", "model"], tmp_path)
    (flag,) = files.sae_flags(found, 1)
    assert flag.startswith("model: The SAE of layer 1 explains bad worse than base") and not files.sae_flags(found, 2)
    told = call("concordance", workplace / "tiny.toml", "data", "model", "--k", 5, "--layer", 1, "--cache", tmp_path)
    assert flag in " ".join(told.split())


def test_refusals(workplace: Path) -> None:
    preset = str(workplace / "tiny.toml")
    with pytest.raises(PresetError, match="'data' is given twice"):
        files.open_contrasts(preset, ["data", "data"])
    with pytest.raises(PresetError, match="two or three contrasts of a preset; 1 were given"):
        files.open_contrasts(preset, ["data"])
    with pytest.raises(PresetError, match="4 were given"):
        files.open_contrasts(preset, ["data", "response", "model", "data-good"])
    with pytest.raises(PresetError, match="no contrast 'nothing'"):
        files.open_contrasts(preset, ["data", "nothing"])
    found = files.open_contrasts(preset, ["data", "response"])
    with pytest.raises(CacheError, match="layer 9 is not cached"):
        files.concord_at(found, 9, "response", SMALL)
    with pytest.raises(NotEnoughData, match="fewer than the 64"):
        files.concord_at(found, 1, "response", ConcordanceSettings(k=64))


def test_the_command_line(workplace: Path) -> None:
    preset, out = workplace / "tiny.toml", workplace / "shared.csv"
    made = json.loads(call("concordance", preset, "data", "response", "--k", 5, "--layer", 1, "--top", 3, "--json"))
    assert made["contrasts"] == ["data", "response"] and made["layer"] == 1 and made["controlled"] == ["data"]
    assert {"spearman", "overlap_at_k", "shared", "exclusive", "sentence"} <= set(made)
    assert {row["feature"] for row in made["shared"]} >= {RAISED, SUPPRESSED}
    first = made["shared"][0]
    assert first["name"] and "«" in first["context"] and "effect_data" in first
    assert made["sentence"].startswith("Of the 5 features most raised by the data, ")
    text = call("concordance", preset, "data", "response", "model", "--k", 5, "--top", 2, "--all-layers", "--out", out)
    assert "in all three" in text and "layer 1: Spearman" in text and "features considered" in text
    assert pl.read_csv(out).height == 62 and "effect_model" in pl.read_csv(out).columns
    with_format = json.loads(call("concordance", preset, "data", "response", "--k", 5, "--include-format", "--json"))
    assert with_format["n_format_hidden"] == 0 and with_format["layer"] == 2


@pytest.mark.parametrize(("arguments", "says"), [
    (("data",), "two or three contrasts"),
    (("data", "data"), "given twice"),
    (("data", "nothing"), "nothing"),
    (("data", "response", "--layer", "9"), "layer 9"),
    (("data", "response", "--k", "64"), "fewer than the 64"),
    (("data", "response", "--k", "5", "--subtract", "all"), "subtract = 'all'"),
    (("data", "response", "--cache", "nowhere"), "no such cache file"),
])
def test_bad_input_is_one_sentence(workplace: Path, arguments: tuple[str, ...], says: str) -> None:
    assert says in call("concordance", workplace / "tiny.toml", *arguments, code=2)
