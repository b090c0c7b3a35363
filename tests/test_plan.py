"""Plans: every preset resolves in sae-lens' own registry, a misfit is refused, and the estimates add up."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from core.errors import BadConversation, PresetError, SaeMismatch
from core.experiment import load_experiment, preset_names
from core.paths import CACHE, ROOT
from core.specs import AdapterSpec, ContrastSpec, ConversationsSpec, Experiment, ModelSpec, SaeSpec, Side
from core.store import estimates
from core.store.estimates import PlannedConversations, PlannedLayer, estimate, sae_bytes
from core.store.plan import Extraction, make_plan

MODEL = ModelSpec("org/tiny", d_model=8, n_layers=4, vocab_size=100, n_parameters=10_000)


@pytest.fixture(scope="module")
def lookup():
    """The real registry; importing sae-lens takes seconds, so once."""
    from core.model.saes import lookup

    lookup("gemma-scope-9b-it-res-canonical", "layer_9/width_16k/canonical")
    return lookup


@pytest.fixture(scope="module")
def demo_cache(tmp_path_factory):
    """A preset cache folder with the four configurations that the demo names, and no weights."""
    folder = tmp_path_factory.mktemp("demo")
    for layer in (3, 9, 15, 21):
        write_config(folder / f"saes/layer_{layer}", layer, d_in=576, d_sae=4096, model="SmolLM2-135M-Instruct")
    return folder


def write_config(folder, layer, *, d_in=8, d_sae=32, model="org/tiny", hook=None, **more):
    folder.mkdir(parents=True)
    metadata = {"hook_name": hook or f"blocks.{layer}.hook_resid_post", "model_name": model} | more
    config = {"architecture": "jumprelu", "d_in": d_in, "d_sae": d_sae, "metadata": metadata}
    (folder / "cfg.json").write_text(json.dumps(config), encoding="utf-8")


def write_conversations(path, conditions=("misaligned", "aligned"), question="q" * 43, response="r" * 86):
    rows = [
        {
            "id": f"{condition}-{n}",
            "prompt_id": str(n),
            "condition": condition,
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": response}],
        }
        for n in range(5)
        for condition in conditions
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return ConversationsSpec("talk", str(path))


def experiment(tmp_path, *, saes=(), layers=(1,), target="misaligned", **more):
    talk = write_conversations(tmp_path / "talk.jsonl")
    data = ContrastSpec("data", "data", Side("base", "talk", target), Side("base", "talk", "aligned"))
    values = {"model": MODEL, "contrasts": (data,), "conversations": (talk,)} | more
    return Experiment(name="mine", title="Mine", saes=tuple(saes), layers=layers, **values)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_plans(name, lookup, demo_cache):
    one = load_experiment(name)
    plan = make_plan(one, demo_cache, device="cuda", lookup=lookup)
    assert [layer.layer for layer in plan.layers] == sorted(one.layers)
    assert {e.variant for e in plan.extractions} == set(one.variants)
    for layer in plan.layers:
        assert layer.hook_point == f"blocks.{layer.layer}.hook_resid_post"
        if one.saes:
            assert layer.d_sae in (4096, 16_384, 131_072)
            assert 10 <= layer.l0 <= 150
            assert re.search(rf"layer_{layer.layer}(?!\d)", layer.source), layer.source
        else:
            assert layer.d_sae == 0 and layer.sae_id is None
    assert plan.estimates.memory_bytes > one.model.n_parameters * 2
    assert plan.estimates.cache_bytes > 10**6 and plan.estimates.seconds > 0
    assert str(one.layers[0]) in plan.describe() and "Assumed:" in plan.describe()


@pytest.mark.skipif(not (CACHE / "demo" / "saes").is_dir(), reason="the demo's SAEs are not in cache/demo")
def test_the_demo_plans_with_the_saes_that_ship():
    plan = make_plan(load_experiment("demo"), device="cpu")
    assert all(layer.d_sae >= 4096 and layer.download_bytes == 0 for layer in plan.layers)


def test_gemma_scope_uses_instruct_saes_where_they_exist(lookup):
    plan = make_plan(load_experiment("gemma2-9b-it"), lookup=lookup)
    instruct = {layer.layer for layer in plan.layers if "-it-" in layer.sae_release}
    assert instruct == {9, 20, 31}
    by_layer = {layer.layer: layer for layer in plan.layers}
    assert by_layer[9].l0 == 88 and by_layer[9].neuronpedia_id == "gemma-2-9b-it/9-gemmascope-res-16k"
    assert by_layer[5].neuronpedia_id == "gemma-2-9b/5-gemmascope-res-16k"


@pytest.mark.parametrize("name", ["qwen2.5-7b-instruct", "llama3.1-8b-instruct"])
def test_all_layers_of_the_wide_saes_are_used(name, lookup):
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    one = load_experiment(name)
    plan = make_plan(one, lookup=lookup)
    published = get_pretrained_saes_directory()[one.saes[0].release].saes_map
    assert {layer.sae_id for layer in plan.layers} == set(published)
    assert {layer.d_sae for layer in plan.layers} == {131_072} and {layer.l0 for layer in plan.layers} == {64}


@pytest.mark.parametrize("name", ["gemma3-270m-it", "gemma3-1b-it", "gemma3-4b-it"])
def test_all_layers_of_gemma_scope_2_are_used(name, lookup):
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    one = load_experiment(name)
    published = get_pretrained_saes_directory()[one.saes[0].release].saes_map
    assert {s.sae_id for s in one.saes} == {i for i in published if i.endswith("_width_16k_l0_medium")}


def test_json_has_the_promised_shape(demo_cache):
    shape = make_plan(load_experiment("demo"), demo_cache, device="cpu").to_json()
    assert json.loads(json.dumps(shape)) == shape
    assert list(shape) == ["preset", "model", "variants", "layers", "conversations", "contrasts", "estimates"]
    assert shape["layers"][2] == {
        "layer": 15,
        "sae_release": "local",
        "sae_id": "saes/layer_15",
        "d_sae": 4096,
        "hook_point": "blocks.15.hook_resid_post",
    }
    demo = load_experiment("demo")
    assert (shape["preset"], shape["variants"]) == ("demo", list(demo.variants))
    assert shape["conversations"] == [c.name for c in demo.conversations]
    assert shape["contrasts"] == [c.name for c in demo.contrasts]
    assert set(shape["estimates"]) == {"memory_bytes", "disk_bytes", "seconds"}


# ---------------------------------------------------------------------------------------------------- refusals


def misfit(one, *args, **more):
    with pytest.raises(SaeMismatch) as error:
        make_plan(one, *args, **more)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
    return str(error.value)


def with_sae(name, **change):
    one = load_experiment(name)
    return replace(one, saes=(replace(one.saes[0], **change), *one.saes[1:]))


def test_a_misspelt_id_is_refused_with_near_misses(lookup):
    message = misfit(with_sae("gemma2-9b-it", sae_id="layer_5/width_16k/cannonical"), lookup=lookup)
    assert "'layer_5/width_16k/cannonical' is not in release" in message
    assert "layer_5/width_16k/canonical" in message


def test_a_misspelt_release_is_refused_with_near_misses(lookup):
    message = misfit(with_sae("gemma2-9b-it", release="gemma-scope-9b-pt-res-canonicall"), lookup=lookup)
    assert "gemma-scope-9b-pt-res-canonical" in message.split("did you mean")[1]


def test_an_sae_of_another_layer_is_refused(lookup):
    message = misfit(with_sae("gemma2-9b-it", sae_id="layer_6/width_16k/canonical"), lookup=lookup)
    assert "is of layer 6, but the preset gives it for layer 5" in message


def test_an_sae_of_another_model_is_refused(lookup):
    one = load_experiment("gemma2-9b-it")
    message = misfit(replace(one, model=replace(one.model, sae_names=())), lookup=lookup)
    assert "was trained on gemma-2-9b, not on google/gemma-2-9b-it" in message and "`sae_names`" in message


@pytest.mark.parametrize(
    ("release", "sae_id", "said"),
    [
        ("gemma-scope-9b-pt-mlp-canonical", "layer_5/width_16k/canonical", "reads mlp, not resid_post"),
        ("gemma-scope-9b-pt-att-canonical", "layer_5/width_16k/canonical", "reads att, not resid_post"),
        ("gpt2-small-res-jb", "blocks.5.hook_resid_pre", "reads hook_resid_pre, not resid_post"),
    ],
)
def test_an_sae_of_another_place_is_refused(lookup, release, sae_id, said):
    assert said in misfit(with_sae("gemma2-9b-it", release=release, sae_id=sae_id), lookup=lookup)


def test_a_registry_width_that_no_id_tells_is_left_open(lookup):
    spec = SaeSpec(5, "gpt2-small-resid-post-v5-32k", "blocks.5.hook_resid_post")
    model = ModelSpec("gpt2-small", d_model=768, n_layers=12, vocab_size=50257, n_parameters=124_000_000)
    one = replace(load_experiment("gemma3-1b-it"), model=model, saes=(spec,), layers=(5,))
    plan = make_plan(one, lookup=lookup)
    assert plan.layers[0].d_sae is None and plan.to_json()["layers"][0]["d_sae"] is None
    assert "width known once fetched" in plan.describe()
    assert plan.layers[0].download_bytes in (0, sae_bytes(768, estimates.UNKNOWN_D_SAE))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"d_in": 9}, "reads d_model 9, org/tiny has 8"),
        ({"hook": "blocks.1.hook_resid_pre"}, "trained at blocks.1.hook_resid_pre, not at blocks.1.hook_resid_post"),
        ({"model": "org/other"}, "was trained on org/other, not on org/tiny"),
        ({"model": None}, "was trained on an unstated model"),
        ({"d_sae": None}, "d_in and d_sae cannot be read"),
    ],
)
def test_a_local_sae_that_does_not_fit_is_refused(tmp_path, change, said):
    write_config(tmp_path / "saes/layer_1", 1, **change)
    one = experiment(tmp_path, saes=[SaeSpec(1, "local", "saes/layer_1")])
    assert said in misfit(one, tmp_path)


def test_a_local_sae_that_is_missing_or_damaged_is_refused(tmp_path):
    one = experiment(tmp_path, saes=[SaeSpec(1, "local", "saes/layer_1")])
    assert "no cfg.json there" in misfit(one, tmp_path)
    (tmp_path / "saes/layer_1").mkdir(parents=True)
    for text in ("{", "[1]", '{"d_in": 8}'):
        (tmp_path / "saes/layer_1/cfg.json").write_text(text, encoding="utf-8")
        assert "cannot be read" in misfit(one, tmp_path)


def test_a_local_sae_is_read_without_weights(tmp_path):
    write_config(tmp_path / "cache/saes/layer_1", 1, training={"k": 7})
    one = experiment(tmp_path, saes=[SaeSpec(1, "local", "saes/layer_1")])
    layer = make_plan(one, tmp_path / "cache").layers[0]
    assert (layer.d_sae, layer.l0, layer.download_bytes) == (32, 7.0, 0)
    absolute = experiment(tmp_path, saes=[SaeSpec(1, "local", str(tmp_path / "cache/saes/layer_1"))])
    assert make_plan(absolute, tmp_path / "elsewhere").layers[0].d_sae == 32


def test_a_side_without_conversations_is_refused(tmp_path):
    with pytest.raises(PresetError, match="'talk' has condition 'neutral'; it has aligned, misaligned"):
        make_plan(experiment(tmp_path, target="neutral"), tmp_path)


def test_bad_rows_are_refused_or_left_out(tmp_path):
    one = experiment(tmp_path)
    path = tmp_path / "talk.jsonl"
    path.write_text(path.read_text() + "\n{", encoding="utf-8")
    with pytest.raises(BadConversation, match=r"talk\.jsonl:11: is not valid JSON"):
        make_plan(one, tmp_path)
    assert make_plan(one, tmp_path, skip_bad=True).conversations[0].n_conversations == 10


@pytest.mark.parametrize("wrong", [{"device": "tpu"}, {"dtype": "int3"}])
def test_an_unknown_device_or_dtype_is_refused(tmp_path, wrong):
    one = experiment(tmp_path, dtype=wrong.get("dtype", ""))
    with pytest.raises(PresetError, match="No estimate for dtype"):
        make_plan(one, tmp_path, device=wrong.get("device", "cpu"))


# --------------------------------------------------------------------------------------------------- estimates


def test_tokens_are_counted_from_characters(tmp_path):
    one = make_plan(experiment(tmp_path), tmp_path).conversations[0]
    assert one.n_response_tokens == 10 * 20  # 86 characters at 4.3 a token
    assert one.n_tokens == 10 * (30 + 2 * estimates.TEMPLATE_TOKENS)


def test_each_variant_reads_each_file_once(tmp_path):
    talk = ConversationsSpec("talk", str(tmp_path / "talk.jsonl"))
    base, bad = Side("base", "talk", "aligned"), Side("bad", "talk", "aligned")
    contrasts = (
        ContrastSpec("data", "data", replace(base, condition="misaligned"), base),
        ContrastSpec("model", "model", bad, base),
        ContrastSpec("response", "response", replace(bad, condition="misaligned"), bad),
    )
    adapters = (AdapterSpec("bad", "org/no-such"),)
    one = experiment(tmp_path, contrasts=contrasts, conversations=(talk,), adapters=adapters)
    plan = make_plan(one, tmp_path)
    assert set(plan.extractions) == {Extraction("base", "talk"), Extraction("bad", "talk")}
    none = make_plan(experiment(tmp_path, contrasts=()), tmp_path)
    assert none.extractions == (Extraction("base", "talk"),)
    assert plan.estimates.cache_bytes == 2 * none.estimates.cache_bytes
    assert plan.estimates.download_bytes - none.estimates.download_bytes == round(0.02 * 2 * MODEL.n_parameters)


READ = PlannedConversations("talk", "talk.jsonl", n_conversations=100, n_tokens=10_000, n_response_tokens=6_000)


def numbers(layers, read=(READ,), **more):
    return estimate(MODEL, layers, read, (), **({"device": "cuda"} | more))


def test_seconds_follow_depth_and_text():
    layer = PlannedLayer(0, "blocks.0.hook_resid_post")
    big = replace(MODEL, n_parameters=10**12 + 800)  # 800 in the embedding
    first = estimate(big, [layer], [READ], (), device="cuda").seconds
    assert first == pytest.approx(10_000 * 2 * 10**12 / 4 / estimates.FLOPS["cuda"], abs=0.06)
    last = estimate(big, [layer, PlannedLayer(3, "")], [READ, READ], (), device="cuda").seconds
    assert last == pytest.approx(first * 4 * 2, rel=1e-3)


def test_residuals_alone_take_two_float32_rows_a_conversation():
    bare = numbers([PlannedLayer(0, "")]).cache_bytes
    assert numbers([PlannedLayer(0, ""), PlannedLayer(1, "")]).cache_bytes - bare == 100 * 2 * 8 * 4
    assert bare == 100 * 2 * 8 * 4 + 5 * 10_000


def test_features_cost_memory_disk_and_time():
    bare, wide = numbers([PlannedLayer(0, "")]), numbers([PlannedLayer(0, "", "r", "i", d_sae=2**20, l0=50)])
    assert wide.memory_bytes - bare.memory_bytes == sae_bytes(8, 2**20)
    assert wide.cache_bytes > bare.cache_bytes and wide.seconds >= bare.seconds


def test_a_float32_model_on_cpu_is_told_as_measured():
    cpu = numbers([PlannedLayer(0, "")], device="cpu")
    assert cpu.dtype == "float32" and "measured on" in cpu.assumptions[0]
    assert f"{estimates.FLOPS_CPU_CORE * os.cpu_count():.1e}" in cpu.assumptions[0]
    gpu = numbers([PlannedLayer(0, "")], device="cuda:1")
    assert gpu.dtype == "bfloat16" and "assumed, not measured" in gpu.assumptions[0]


def test_sae_bytes_agree_with_sae_lens(lookup):
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=8, d_sae=32, dtype="float32", device="cpu"))
    assert sae_bytes(8, 32) == sum(p.numel() * p.element_size() for p in sae.parameters())
    assert sae_bytes(8, 0) == 0


def test_the_encoding_budget_is_the_encoders_own(lookup):
    from core.model import saes

    assert estimates.ENCODE_BYTES == saes.ENCODE_BUDGET


def test_weights_in_the_hub_cache_are_not_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    one = experiment(tmp_path)
    assert make_plan(one, tmp_path).estimates.download_bytes == 2 * MODEL.n_parameters
    snapshot = tmp_path / "hub/models--org--tiny/snapshots/abc"
    snapshot.mkdir(parents=True)
    assert make_plan(one, tmp_path).estimates.download_bytes == 2 * MODEL.n_parameters
    (snapshot / "model.safetensors").touch()
    assert make_plan(one, tmp_path).estimates.download_bytes == 0


def test_planning_without_registry_saes_imports_no_torch():
    code = (
        "import sys; from core.experiment import load_experiment; from core.store.plan import make_plan; "
        "make_plan(load_experiment('qwen2.5-14b-instruct')).describe(); "
        "print(sorted({'torch', 'transformers', 'sae_lens'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
