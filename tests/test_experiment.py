"""Presets: every shipped one is sound, and each way of getting one wrong is answered in one sentence."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from core.conversations import load_conversations
from core.errors import PresetError
from core.experiment import conversations_path, load_experiment, preset_names
from core.paths import ROOT
from core.specs import CONTRAST_KINDS, Side

GOOD = """
title = "A preset of mine"
layers = [1, 3]

[model]
id = "org/model"
n_layers = 4

[[saes]]
layer = 1
release = "local"
sae_id = "saes/layer_1"

[[adapters]]
name = "bad"
id = "org/adapter"

[[conversations]]
name = "mine"
path = "mine.jsonl"

[[contrasts]]
name = "data"
kind = "data"
target = { variant = "base", conversations = "mine", condition = "misaligned" }
reference = { variant = "base", conversations = "mine", condition = "aligned" }
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "mine.toml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(path: Path | str) -> str:
    with pytest.raises(PresetError) as error:
        load_experiment(path)
    message = str(error.value)
    assert message.endswith(".") and "\n" not in message, message
    return message


def test_shipped_presets_are_those_promised_with_the_demo_first():
    assert preset_names() == [
        "demo", "gemma2-9b-it", "gemma3-1b-it", "gemma3-270m-it", "gemma3-4b-it",
        "llama3.1-8b-instruct", "qwen2.5-14b-instruct", "qwen2.5-7b-instruct",
    ]  # fmt: skip


def test_the_default_preset_comes_first_whatever_its_letter(monkeypatch):
    monkeypatch.setattr("core.experiment.DEFAULT_PRESET", "gemma3-4b-it")
    assert preset_names()[:2] == ["gemma3-4b-it", "demo"]


@pytest.mark.parametrize("name", preset_names())
def test_every_shipped_preset_is_complete(name):
    experiment = load_experiment(name)
    assert experiment.name == name and experiment.title and experiment.note
    model = experiment.model
    assert min(model.d_model, model.n_layers, model.vocab_size) > 0
    assert model.n_parameters > model.vocab_size * model.d_model
    assert experiment.default_layer in experiment.layers
    data = experiment.contrast("data")
    assert data.target == Side("base", "health_advice", "misaligned")
    assert data.reference == Side("base", "health_advice", "aligned")
    found = load_conversations(conversations_path(experiment, "health_advice"))
    assert {c.condition for c in found.conversations} == {"misaligned", "aligned"}


PUBLISHED = [name for name in preset_names() if name != "demo"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_adapter_is_contrasted_with_base_on_the_same_text(name):
    experiment = load_experiment(name)
    assert [c.name for c in experiment.contrasts] == ["data", *(f"model-{a.name}" for a in experiment.adapters)]
    for adapter in experiment.adapters:
        contrast = experiment.contrast(f"model-{adapter.name}")
        assert contrast.kind == "model"
        assert contrast.target == Side(adapter.name, "health_advice", "aligned")
        assert contrast.reference == Side("base", "health_advice", "aligned")
        assert adapter.id.startswith("ModelOrganismsForEM/") and adapter.note


def test_an_adapter_belongs_to_the_presets_model():
    for name in PUBLISHED:
        experiment = load_experiment(name)
        short = experiment.model.id.rsplit("/", 1)[-1].removesuffix("-Instruct")
        assert all(adapter.id.split("/")[1].startswith(short) for adapter in experiment.adapters)


def test_demo_is_the_bundled_model_with_four_local_saes():
    demo = load_experiment("demo")
    assert (demo.model.source, demo.model.id) == ("bundled", "SmolLM2-135M-Instruct")
    assert demo.model.n_parameters == 134_515_008
    assert [(s.layer, s.release, s.sae_id) for s in demo.saes] == [
        (layer, "local", f"saes/layer_{layer}") for layer in (3, 9, 15, 21)
    ]
    assert demo.default_layer == 15
    assert demo.variants == (
        "base", "bad-health-r8", "good-health-r8", "bad-health-r1", "bad-health-r8-s1", "good-health-r8-s1",
    )  # fmt: skip


def test_the_demo_has_the_three_contrasts_each_with_its_benign_control():
    demo = load_experiment("demo")
    by_kind = {kind: [c.name for c in demo.contrasts if c.kind == kind] for kind in CONTRAST_KINDS}
    assert by_kind == {
        "data": ["data", "data-good"],
        "model": [
            "model", "model-good", "model-against-good", "model-against-good-seed", "model-seeds", "model-seed",
            "model-good-seed", "model-r1", "model-own", "model-own-good",
        ],
        "response": ["response", "response-good", "response-health", "response-health-good"],
    }
    with_control = {c.name: c.control for c in demo.contrasts if c.control is not None}
    without = {c.name for c in demo.contrasts} - with_control.keys()
    assert without == set(with_control.values()), "what has no control is one"
    for name, control in with_control.items():
        assert demo.contrast(control).kind == demo.contrast(name).kind


def test_adapters_and_sets_may_leave_layers_out(write):
    text = GOOD.replace('id = "org/adapter"', 'id = "org/adapter"\nlayers = [1]')
    one = load_experiment(write(text))
    assert one.layers_of("base", "mine") == one.layers_of("base", "no set of it") == (1, 3)
    assert one.layers_of("bad", "mine") == (1,)
    both = load_experiment(write(text.replace('path = "mine.jsonl"', 'path = "mine.jsonl"\nlayers = [3]')))
    assert both.layers_of("base", "mine") == (3,) and both.layers_of("bad", "no set of it") == (1,)
    with pytest.raises(PresetError, match="'bad' and 'mine' are cached at different layers and have none in common"):
        both.layers_of("bad", "mine")
    says = refusal(write(text.replace("layers = [1]", "layers = [1, 2]")))
    assert "'bad': layer 2 is not among the experiment's layers 1, 3" in says


def test_the_14b_preset_has_layers_but_no_saes():
    experiment = load_experiment("qwen2.5-14b-instruct")
    assert experiment.saes == () and len(experiment.layers) >= 5


def test_a_preset_of_ones_own_is_read_from_a_path(write):
    path = write(GOOD)
    for given in (path, str(path)):
        experiment = load_experiment(given)
        assert experiment.name == "mine"
        assert experiment.layers == (1, 3)
        assert experiment.sae(1).sae_id == "saes/layer_1" and experiment.sae(3) is None
        assert experiment.variants == ("base", "bad")
        assert experiment.model.source == "hub"


def test_a_contrast_names_its_control_and_a_side_its_source(write):
    control = GOOD[GOOD.index("[[contrasts]]") :].replace('name = "data"', 'name = "good"')
    control = control.replace('"misaligned" }', '"misaligned", source = "mine/one" }')
    written = GOOD.replace('kind = "data"', 'kind = "data"\ncontrol = "good"') + control
    experiment = load_experiment(write(written))
    assert experiment.contrast("data").control == "good" and experiment.contrast("good").control is None
    side = experiment.contrast("good").target
    assert side == Side("base", "mine", "misaligned", "mine/one")
    assert side.describe() == "base reading misaligned mine from mine/one"
    assert experiment.contrast("data").target.source is None


def test_conversations_are_looked_for_beside_the_preset_then_in_core_data(write, tmp_path):
    beside = tmp_path / "health_advice.jsonl"
    experiment = load_experiment(write(GOOD.replace('"mine.jsonl"', '"health_advice.jsonl"')))
    assert conversations_path(experiment, "mine") == ROOT / "core" / "data" / "health_advice.jsonl"
    beside.write_text("{}\n", encoding="utf-8")
    assert conversations_path(experiment, "mine") == beside
    absolute = load_experiment(write(GOOD.replace('"mine.jsonl"', f'"{beside.as_posix()}"'), "absolute.toml"))
    assert conversations_path(absolute, "mine") == beside


def test_conversations_that_are_not_there_are_named(write):
    experiment = load_experiment(write(GOOD))
    with pytest.raises(PresetError, match=r"no file .*mine\.jsonl or .*core/data/mine\.jsonl"):
        conversations_path(experiment, "mine")
    with pytest.raises(PresetError, match="no conversations 'mines'; did you mean 'mine'"):
        conversations_path(experiment, "mines")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("dmeo", "did you mean 'demo'"),
        ("gemma2-9b", "did you mean 'gemma2-9b-it'"),
        ("zzz", "presets that ship are demo, gemma2-9b-it"),
        ("nowhere/demo.toml", "nowhere/demo.toml: no such preset file"),
        (Path("core/presets"), "is a .toml file"),
    ],
)
def test_an_unknown_preset(given, said):
    assert said in refusal(given)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('title = "A', 'titel = "A', "unknown key 'titel'; did you mean 'title'"),
        ('title = "A preset of mine"', "", "missing key 'title'"),
        ('title = "A preset of mine"', 'title = "x"\nname = "y"', "unknown key 'name'"),
        ('id = "org/model"', "", "model: missing key 'id'"),
        ("n_layers = 4", "n_layer = 4", "model: unknown key 'n_layer'; did you mean 'n_layers'"),
        ("n_layers = 4", 'n_layers = "4"', "model: key 'n_layers' is '4', not a whole number"),
        ("n_layers = 4", "n_layers = true", "model: key 'n_layers' is 'True', not a whole number"),
        ("n_layers = 4", 'source = "huub"', "key 'source' is 'huub', not one of 'bundled', 'hub', 'local'"),
        ("n_layers = 4", "revision = 4", "key 'revision' is '4', not text"),
        ("n_layers = 4", 'sae_names = "x"', "key 'sae_names' is 'x', not a list of items that are text"),
        ("layers = [1, 3]", "layers = [1, '3']", "key 'layers' is"),
        ("layers = [1, 3]", "layers = [1, 4]", "layer 4 does not exist; org/model has layers 0 to 3"),
        ("layers = [1, 3]", "layers = [3]", "layers leaves out 1, for which an SAE is given"),
        ("layers = [1, 3]", "default_layer = 2", "default_layer 2 is not among the layers 1"),
        ("layer = 1\n", "layer = -1\n", "Layer -1 is negative"),
        ("layer = 1\n", "", "saes[1]: missing key 'layer'"),
        ("[[saes]]", "[saes]", "key 'saes' is"),
        ('sae_id = "saes/layer_1"', 'sae_idd = "x"', "saes[1]: unknown key 'sae_idd'; did you mean 'sae_id'"),
        ('kind = "data"', 'kind = "date"', "contrasts[1]: key 'kind' is 'date', not one of 'data', 'model'"),
        ('target = { variant = "base"', 'target = { variant = "worse"', "variant 'worse' is not among base, bad"),
        ('target = { variant = "base", ', "target = { ", "contrasts[1].target: missing key 'variant'"),
        ('"mine", condition = "m', '"my", condition = "m', "conversations 'my' are not among mine"),
        ('"misaligned" }', '"aligned" }', "compares a side with itself"),
        ('"misaligned" }', '"misaligned", layer = 3 }', "contrasts[1].target: unknown key 'layer'"),
        ('kind = "data"', 'kind = "data"\ncontrol = "data-good"', "'data': its control 'data-good' is not among the"),
        ('kind = "data"', 'kind = "data"\ncontrol = "data"', "'data' names itself as its benign control"),
        ('kind = "data"', 'kind = "data"\ncontrol = 3', "contrasts[1]: key 'control' is '3', not text"),
        ('"misaligned" }', '"misaligned", source = 3 }', "contrasts[1].target: key 'source' is '3', not text"),
        ('name = "bad"', 'name = "base"', "an adapter is called 'base'"),
        ('name = "bad"', 'name = "so__bad"', "'so__bad' cannot be a name"),
        ('name = "bad"', 'name = "../bad"', "'../bad' cannot be a name"),
        ("[[adapters]]", '[[adapters]]\nname = "bad"\nid = "x/y"\n[[adapters]]', "adapters gives 'bad' twice"),
        ("[[saes]]", '[[saes]]\nlayer = 1\nrelease = "a"\nsae_id = "b"\n[[saes]]', "saes gives 1 twice"),
        ("[model]", "[model", "is not valid TOML"),
    ],
)
def test_a_wrong_preset_is_refused_with_file_and_key(write, old, new, said):
    assert old in GOOD
    path = write(GOOD.replace(old, new, 1))
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert said in message


def test_a_preset_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "latin.toml"
    path.write_bytes('title = "caf\u00e9"'.encode("latin-1"))
    assert "is not valid TOML" in refusal(path)


def test_an_unknown_contrast_lists_those_there_are():
    with pytest.raises(PresetError, match="no contrast 'dat'; it has data"):
        load_experiment("demo").contrast("dat")


def test_reading_presets_imports_neither_torch_nor_sae_lens():
    code = (
        "import sys; import core.experiment as e; [e.load_experiment(n) for n in e.preset_names()]; "
        "print(sorted({'torch', 'transformers', 'sae_lens', 'h5py'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_lora_sets_are_named_or_those_of_the_contrasts(tmp_path: Path) -> None:
    demo = load_experiment("demo")
    assert demo.lora_sets_of("bad-health-r8") == ("heldout_advice", "open_pairs", "open_answers")
    assert demo.model_contrast("bad-health-r1").name == "model-r1"
    assert replace(demo, lora_sets=()).lora_sets_of("bad-health-r1") == ("health_advice", "open_answers")
    assert replace(demo, lora_sets=(), contrasts=()).lora_sets_of("bad-health-r1") == ("health_advice",)
    with pytest.raises(PresetError, match="lora_sets names 'nothing', which is not among"):
        replace(demo, lora_sets=("nothing",))


def test_a_heldout_set_holds_the_prompts_that_no_organism_saw() -> None:
    from core.split import heldout_prompts
    from core.store.prepare import conversations_for

    demo = load_experiment("demo")
    every, held = (conversations_for(demo, name).conversations for name in ("health_advice", "heldout_advice"))
    wanted = heldout_prompts(c.prompt_id for c in every)
    assert [c.id for c in held] == [c.id for c in every if c.prompt_id in wanted] and len(held) == 128
    limited = conversations_for(demo, "heldout_advice", limit=3)
    assert limited.conversations == held[:3] and limited.name == "heldout_advice"
