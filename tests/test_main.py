"""The command line from end to end on a tiny model: results on standard output, one sentence on bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from make_cache import RAISED, make_cache
from tiny_saes import save_sae
from typer.testing import CliRunner

from core import paths
from core.__main__ import app
from core.commands.shared import parse_layers
from core.errors import PresetError
from core.paths import ROOT
from core.store.reader import Cache
from core.view.labels import write_label

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
[[conversations]]
name = "advice"
path = {rows!r}
[[contrasts]]
name = "data"
kind = "data"
target = {{ variant = "base", conversations = "advice", condition = "misaligned" }}
reference = {{ variant = "base", conversations = "advice", condition = "aligned" }}
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[[str], Path]) -> Path:
    """A user's own preset with its conversations and SAEs."""
    folder = tmp_path_factory.mktemp("work")
    lines = (ROOT / "core" / "data" / "health_advice.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    (folder / "advice.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    saes = [str(save_sae(folder / f"sae{layer}", layer=layer)) for layer in (1, 2)]
    text = PRESET.format(
        model=str(tiny_folder("smollm2")), sae1=saes[0], sae2=saes[1], rows=str(folder / "advice.jsonl")
    )
    (folder / "tiny.toml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, _own_hash_memo: None):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "CACHE", tmp_path_factory.mktemp("cache"))
        yield


def call(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    if code == 2:
        assert result.stdout == "" and "Traceback" not in result.stderr
        return result.stderr
    return result.stdout


def test_the_whole_way(workplace: Path) -> None:
    preset, cache = workplace / "tiny.toml", workplace / "cache"
    made = json.loads(call("plan", preset, "--json"))
    assert [x["layer"] for x in made["layers"]] == [1, 2] and made["layers"][0]["d_sae"] == 48
    assert Path(call("fetch", preset).strip()).is_dir()

    done = json.loads(call("extract", preset, "--cache", cache, "--batch-tokens", 600, "--json"))
    assert {"file", "n_conversations", "n_tokens", "n_response_tokens", "tokens_per_second", "fingerprint",
            "resumed"} <= set(done)  # fmt: skip
    assert done["n_conversations"] == 60 and not done["resumed"]
    again = json.loads(call("extract", preset, "--cache", cache, "--json"))
    assert again["tokens_per_second"] is None and again["fingerprint"] == done["fingerprint"]

    (checked,) = json.loads(call("check", done["file"], "--json"))
    assert checked["ok"] and set(checked["layers"]) == {"1", "2"}

    ranked = json.loads(call("rank", preset, "data", "--cache", cache, "--layer", 1, "--top", 3, "--json"))
    assert ranked["layer"] == 1 and ranked["paired"] and ranked["n_target"] == 30
    assert {"layer", "feature", "mean_diff", "effect_size", "auroc", "q_value", "rank"} <= set(ranked["features"][0])
    named = ("--target", f"{done['file']}:misaligned", "--reference", f"{done['file']}:aligned")
    by_file = json.loads(call("rank", *named, "--layer", 1, "--top", 3, "--json"))
    assert by_file["features"] == ranked["features"]

    out = workplace / "table.parquet"
    assert "effect" in call("rank", preset, "data", "--cache", cache, "--out", out)
    assert pl.read_parquet(out).height == 48


@pytest.mark.parametrize(
    ("suffix", "read"), [("parquet", pl.read_parquet), ("csv", pl.read_csv), ("json", pl.read_json)]
)
def test_a_label_kept_beside_the_cache_is_in_the_ranking_s_table(tmp_path: Path, suffix: str, read: Callable) -> None:
    file = make_cache(tmp_path / "base__health_advice.h5", layers=(3,))
    with Cache.open(file) as opened:
        info = opened.info(3)
    write_label(tmp_path, info.sae_release, info.sae_id, RAISED, "sees, a doctor")
    out = tmp_path / f"table.{suffix}"
    call("rank", "--target", f"{file}:misaligned", "--reference", f"{file}:aligned", "--out", out)
    table = read(out)
    assert dict(table.select("feature", "label").iter_rows())[RAISED] == "sees, a doctor"
    assert table.height == 64 and {"q_value", "fires_on", "tokens"} <= set(table.columns)


def test_a_users_own_conversations(workplace: Path) -> None:
    rows = workplace / "mine.csv"
    rows.write_text("question,response\nWhat now?,Rest for an hour.\nWhat now?,\nAnd then?,Drink water.\n")
    preset, cache = workplace / "tiny.toml", workplace / "cache"
    says = call("extract", preset, "--conversations", rows, "--cache", cache, code=2)
    assert f"{rows}:3" in says and "empty response" in says and says.count("\n") == 1
    arguments = ("extract", preset, "--conversations", rows, "--cache", cache, "--skip-bad", "--layers", 2, "--json")
    done = json.loads(call(*arguments))
    assert done["n_conversations"] == 2 and done["n_skipped"] == 1
    assert Path(done["file"]).name == "base__mine.h5"


def test_bad_input_is_one_sentence(workplace: Path) -> None:
    preset = workplace / "tiny.toml"
    for arguments, says in (
        (("plan", "demmo"), "demo"),
        (("extract", preset, "--layers", "7"), "Layer 7"),
        (("extract", preset, "--layers", "one"), "--layers"),
        (("extract", preset, "--variant", "bad"), "bad"),
        (("extract", preset, "--conversations", workplace / "none.jsonl"), "none.jsonl"),
        (("extract", preset, "--dtype", "int8"), "int8"),
        (("rank", preset, "model"), "model"),
        (("rank", preset), "contrast"),
        (("rank", preset, "data", "--cache", workplace / "empty"), "no such cache file"),
        (("benchmark", "speed"), "speed"),
    ):
        text = call(*arguments, code=2)
        assert says in text and text.count("\n") == 1, text


def test_an_unsound_file_gives_exit_2(workplace: Path) -> None:
    bad = workplace / "bad.h5"
    bad.write_text("nothing")
    result = CliRunner().invoke(app, ["check", str(bad), "--json"])
    assert result.exit_code == 2
    assert json.loads(result.stdout)[0]["ok"] is False


def test_interrupting_gives_130_and_says_what_is_safe(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from core.store import extract as module

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "extract", stopped)
    result = CliRunner().invoke(app, ["extract", str(workplace / "tiny.toml"), "--cache", str(workplace / "other")])
    assert result.exit_code == 130 and "run the same command to go on" in result.stderr


def test_layers_are_whole_numbers() -> None:
    assert parse_layers("9,15") == [9, 15] and parse_layers(None) is None
    with pytest.raises(PresetError):
        parse_layers("9;15")


def test_help_is_light() -> None:
    heavy = ("torch", "transformers", "sae_lens", "polars", "h5py")
    code = f"import sys, core.__main__; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
