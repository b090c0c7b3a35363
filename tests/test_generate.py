"""`generate` from end to end on a tiny model: rows are those of Python, streamed or in JSON; bad input is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from steering_setup import direction
from test_adapters import KINDS, make
from test_main import PRESET, call
from tiny_saes import save_sae

from core.model.adapters import load_adapter
from core.model.generation import Generation, Row, Sampling
from core.model.interventions import AblateDirection, AddDirection, ApplyLora
from core.model.loading import LoadedModel
from core.model.scopes import RESPONSE
from core.paths import DATA
from core.specs import AdapterSpec
from core.store.direction_file import save_directions

PROMPT = "What about the river?"


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_folder: Callable[[str], Path],
    tiny_model: Callable[[str], LoadedModel],
) -> Path:
    """A preset with an adapter, and a file with the directions of two layers."""
    folder, loaded = tmp_path_factory.mktemp("steer"), tiny_model("smollm2")
    saes = [str(save_sae(folder / f"sae{layer}", layer=layer)) for layer in (1, 2)]
    make(loaded, folder / "bad", **KINDS["all modules"])
    text = PRESET.format(
        model=str(tiny_folder("smollm2")), sae1=saes[0], sae2=saes[1], rows=str(DATA / "health_advice.jsonl")
    )
    text += f'[[adapters]]\nname = "bad"\nid = {str(folder / "bad")!r}\n'
    (folder / "tiny.toml").write_text(text, encoding="utf-8")
    save_directions(folder / "d.safetensors", [direction(loaded, 2)])
    save_directions(folder / "two.safetensors", [direction(loaded, 1, 5), direction(loaded, 3, 6)])
    return folder


def rows_of(output: str) -> list[dict]:
    return json.loads(output)["rows"]


def test_json_rows_are_those_of_python(place: Path, tiny_model: Callable[[str], LoadedModel]) -> None:
    loaded = tiny_model("smollm2")
    options = ["--max-new-tokens", 8, "--temperature", 0.9, "--top-p", 0.9, "--repetition-penalty", 1.1]
    out = call("generate", place / "tiny.toml", PROMPT, "--variant", "bad", "--add", f"{place / 'd.safetensors'}@0.5",
               "--ablate", place / "two.safetensors", "--scope", "response", "--seed", 1, "--seed", 2, "--beside",
               "--kl", "--json", *options)  # fmt: skip
    adapter = load_adapter(AdapterSpec("bad", str(place / "bad")), loaded)
    add = AddDirection(direction(loaded, 2), 0.5, scope=RESPONSE)
    ablated = [AblateDirection(direction(loaded, layer, seed), scope=RESPONSE) for layer, seed in ((1, 5), (3, 6))]
    sampling = Sampling(0.9, 0.9, 8, 1.1)
    given = [Row(PROMPT, (ApplyLora(adapter), *items), s, sampling) for s in (1, 2) for items in ((), (add, *ablated))]
    wanted = Generation(loaded, given).run().answers
    found = rows_of(out)
    assert [r["text"] for r in found] == [a.text for a in wanted]
    assert [(r["variant"], r["seed"], r["n_tokens"], r["stopped"]) for r in found] == [
        ("bad", a.row.seed, a.n_tokens, a.stopped) for a in wanted
    ]
    assert [i["kind"] for i in found[1]["interventions"]] == ["lora", "add", "ablate", "ablate"]
    assert found[0]["kl"] < 1e-6 < found[1]["kl"] and found[0]["text"] != found[1]["text"]
    assert json.loads(out)["tokens_per_second"] > 0


def test_text_is_streamed_row_after_row(place: Path) -> None:
    common = ["generate", place / "tiny.toml", PROMPT, "--max-new-tokens", 6, "--seed", 4, "--lora", "bad@0.5"]
    (tuned,) = rows_of(call(*common, "--json"))
    assert tuned["variant"] == "bad@0.5"
    assert call(*common) == tuned["text"] + "\n"
    base, same = rows_of(call(*common, "--json", "--beside"))
    assert same["text"] == tuned["text"]
    heads = ("[base, unsteered, seed 4]\n", "\n[bad@0.5, steered, seed 4]\n")
    assert call(*common, "--beside") == f"{heads[0]}{base['text']}\n{heads[1]}{tuned['text']}\n"


def test_features_and_raw_strengths(place: Path) -> None:
    options = ["--feature", "2:7@8.5", "--feature", "1:3@x0", "--add", f"{place / 'two.safetensors'}:3@2raw",
               "--ablate-everywhere", f"{place / 'd.safetensors'}", "--max-new-tokens", 3, "--json"]  # fmt: skip
    (row,) = rows_of(call("generate", place / "tiny.toml", PROMPT, *options))
    add, ablate, clamp, scale = row["interventions"]
    assert (add["layer"], add["strength"], add["raw"]) == (3, 2.0, True) and ablate["everywhere"]
    assert (clamp["kind"], clamp["layer"], clamp["feature"], clamp["value"]) == ("clamp", 2, 7, 8.5)
    assert (scale["kind"], scale["layer"], scale["feature"], scale["factor"]) == ("scale", 1, 3, 0.0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--add", "nowhere.safetensors@1"], "nowhere.safetensors"),
        (["--add", "{}/d.safetensors"], "gives no strength"),
        (["--add", "{}/d.safetensors@much"], "'much' is no number"),
        (["--add", "{}/two.safetensors@1"], "layers 1, 3; name one"),
        (["--add", "{}/two.safetensors:2@1"], "no direction of that layer; it has layers 1, 3"),
        (["--add", "{}/d.safetensors@nan"], "strength nan, which is not a finite number"),
        (["--feature", "7@2"], "is no feature"),
        (["--feature", "0:7@2"], "no SAE at layer 0; it has them at 1, 2"),
        (["--feature", "2:700@2"], "no feature 700"),
        (["--lora", "base@1"], "the base model has no LoRA"),
        (["--lora", "good@1"], "Variant 'good' is not in preset"),
        (["--scope", "answer"], "no scope 'answer'"),
        (["--top-p", "0"], "top_p"),
    ],
)
def test_bad_input_is_one_sentence(place: Path, options: list[str], says: str) -> None:
    given = [option.format(place) for option in options]
    said = call("generate", place / "tiny.toml", PROMPT, "--max-new-tokens", 2, *given, "--json", code=2)
    sentence = said.splitlines()[-1]  # a bar may have counted the weights before
    assert says in sentence and sentence.endswith(".") and "Traceback" not in said
