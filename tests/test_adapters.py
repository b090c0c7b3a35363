"""core/model/adapters.py: what it adds equals PEFT's own, row by row; strength 0 is the base; all else is refused."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from test_hooks import Tiny, batch
from test_imports import imports
from tiny_models import D_MODEL, LAYERS
from torch import Tensor, nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from core.errors import AdapterError, ModelError
from core.model import adapter_files, adapters, peft_config
from core.model.adapter_files import TARGETS, WEIGHTS, fetch_adapter, find_adapter
from core.model.adapters import Adapter, applied, load_adapter
from core.model.hooks import recording
from core.model.loading import LoadedModel, find_blocks, load_model
from core.model.peft_config import CONFIG, PeftConfig, check_base
from core.specs import AdapterSpec, ModelSpec

families = pytest.mark.parametrize("family", ["llama31", "gemma2", "qwen2"])

#: What adapters are made of; every one is compared with PEFT's own forward pass.
KINDS: dict[str, dict[str, Any]] = {
    "all modules": {"r": 4, "lora_alpha": 8, "target_modules": list(TARGETS)},
    "rslora": {"r": 3, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "rank one, two layers": {"r": 1, "lora_alpha": 4, "target_modules": ["down_proj"], "layers_to_transform": [1, 3]},
    "patterns": {
        "r": 2, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj", "o_proj", "up_proj"],
        "rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\.up_proj": 3},
        "alpha_pattern": {r"model.layers.[02].self_attn.o_proj": 11, "up_proj": 7},
    },
    "regex": {"r": 2, "lora_alpha": 2, "target_modules": r".*\.(1|2)\.(self_attn|mlp)\.(v|gate)_proj"},
    "excluded": {"r": 2, "lora_alpha": 2, "target_modules": "all-linear", "exclude_modules": ["k_proj"]},
}  # fmt: skip
kinds = pytest.mark.parametrize("kind", KINDS)


def make(loaded: LoadedModel, folder: Path, *, seed: int = 0, size: float = 0.3, **config: Any) -> PeftModel:
    """PEFT's own adapter with random A and B, saved by PEFT into `folder`; the shared model is not touched."""
    peft = get_peft_model(copy.deepcopy(loaded.model), LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data = size * torch.randn(parameter.shape, generator=generator)
    peft.save_pretrained(folder)
    return peft


@pytest.fixture
def made(tiny_model: Tiny, tmp_path: Path) -> Callable[..., tuple[LoadedModel, Adapter, PeftModel]]:
    """(family, kind) -> the model, an adapter of that kind as we read it, and PEFT's own model with it."""

    def build(family: str = "llama31", kind: str = "all modules", seed: int = 0, **more: Any):
        loaded, folder = tiny_model(family), tmp_path / f"{family}-{seed}"
        peft = make(loaded, folder, seed=seed, **KINDS[kind] | more)
        return loaded, load_adapter(AdapterSpec("bad", str(folder)), loaded), peft

    return build


@torch.inference_mode()
def logits(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    return model(input_ids=ids, attention_mask=mask).logits


def far(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().amax() > 0.1)


def all_hooks(loaded: LoadedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in loaded.model.modules())


@families
@kinds
def test_strength_1_equals_peft_and_strength_0_the_base(family: str, kind: str, made: Callable) -> None:
    loaded, adapter, peft = made(family, kind)
    ids, mask = batch(loaded)
    base, own = logits(loaded.model, ids, mask), logits(peft, ids, mask)
    with applied(loaded, adapter):
        ours = logits(loaded.model, ids, mask)
    with applied(loaded, adapter, 0.0):
        nothing = logits(loaded.model, ids, mask)
    assert far(own, base), "otherwise equality would prove nothing"
    assert torch.allclose(ours, own, atol=1e-5)
    assert torch.equal(nothing, base) and torch.equal(logits(loaded.model, ids, mask), base)


@families
@kinds
def test_the_modules_are_pefts_own(family: str, kind: str, made: Callable) -> None:
    loaded, adapter, peft = made(family, kind)
    own = {n: m for n, m in peft.base_model.model.model.layers.named_modules() if hasattr(m, "lora_A")}
    assert {f"{m.layer}.{m.name}" for m in adapter.modules} == set(own)
    assert [(m.layer, m.name) for m in adapter.modules] == sorted((m.layer, m.name) for m in adapter.modules)
    for module in adapter.modules:
        theirs = own[f"{module.layer}.{module.name}"]
        assert module.scaling == theirs.scaling["default"]
        assert torch.equal(module.A, theirs.lora_A["default"].weight)
        assert torch.equal(module.B, theirs.lora_B["default"].weight)
        assert module.A.dtype == torch.float32 and not module.A.requires_grad


def test_scaling_of_rslora_and_of_patterns_by_hand(made: Callable) -> None:
    _, adapter, _ = made("qwen2", "patterns")
    found = {(m.layer, m.name.split(".")[-1]): (len(m.A), m.scaling) for m in adapter.modules}
    assert found[0, "q_proj"] == (5, 4 / 5**0.5)
    assert found[1, "up_proj"] == (3, 7 / 3**0.5) and found[2, "up_proj"] == (2, 7 / 2**0.5)
    assert found[0, "o_proj"] == (2, 11 / 2**0.5) and found[1, "o_proj"] == (2, 4 / 2**0.5)


@families
def test_each_row_has_a_strength_of_its_own(family: str, made: Callable) -> None:
    loaded, adapter, _ = made(family)
    ids, mask = batch(loaded, (17, 9, 4, 12))
    strengths = [0.0, 1.0, -0.5, 0.3]
    base = logits(loaded.model, ids, mask)
    with applied(loaded, adapter, torch.tensor(strengths)):
        together = logits(loaded.model, ids, mask)
    assert torch.equal(together[0], base[0])
    for row, strength in enumerate(strengths[1:], 1):
        with applied(loaded, adapter, strength):
            alone = logits(loaded.model, ids, mask)[row]
        assert torch.allclose(together[row], alone, atol=1e-5) and far(alone, base[row])
    with applied(loaded, adapter, torch.zeros(4)):
        assert torch.equal(logits(loaded.model, ids, mask), base)


def test_a_row_at_0_is_the_base_whatever_the_adapter_holds(made: Callable) -> None:
    """0 * infinity would be no number: what overflows in one row must not reach another."""
    loaded, adapter, _ = made()
    huge = replace(adapter, modules=tuple(replace(m, A=m.A * 1e30, B=m.B * 1e30) for m in adapter.modules))
    ids, mask = batch(loaded, (9, 9))
    base = logits(loaded.model, ids, mask)
    with applied(loaded, huge, torch.tensor([1, 0])):
        found = logits(loaded.model, ids, mask)
    assert not torch.isfinite(found[0]).all() and torch.equal(found[1], base[1])
    with applied(loaded, huge, 0.0):
        assert torch.equal(logits(loaded.model, ids, mask), base)


@families
def test_half_strength_equals_weights_merged_by_hand(family: str, made: Callable) -> None:
    loaded, adapter, _ = made(family, "rslora")
    ids, mask = batch(loaded)
    merged = copy.deepcopy(loaded.model)
    for m in adapter.modules:
        linear = merged.get_submodule(f"model.layers.{m.layer}.{m.name}")
        linear.weight.data += 0.5 * m.scaling * m.B @ m.A
    with applied(loaded, adapter, torch.tensor(0.5)):
        ours = logits(loaded.model, ids, mask)
    assert torch.allclose(ours, logits(merged, ids, mask), atol=1e-4) and far(ours, logits(loaded.model, ids, mask))


@families
def test_greedy_generation_under_a_cache_equals_pefts(family: str, made: Callable) -> None:
    loaded, adapter, peft = made(family)
    ids, mask = (t.flip(1) for t in batch(loaded, (12, 7)))  # the padding stands left
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "use_cache": True}
    own = peft.generate(input_ids=ids, attention_mask=mask, **options)
    base = loaded.model.generate(input_ids=ids, attention_mask=mask, **options)
    with applied(loaded, adapter):
        ours = loaded.model.generate(input_ids=ids, attention_mask=mask, **options)
    with applied(loaded, adapter, torch.tensor([1.0, 0.0])):
        mixed = loaded.model.generate(input_ids=ids, attention_mask=mask, **options)
    assert ours.shape == (2, 24) and torch.equal(ours, own)
    assert not torch.equal(ours[0], base[0]) and not torch.equal(ours[1], base[1])
    assert torch.equal(mixed, torch.stack([own[0], base[1]]))


def test_nested_adapters_add_up(made: Callable) -> None:
    loaded, one, peft = made("llama31", "all modules")
    _, two, _ = made("llama31", "rslora", seed=1)
    peft.load_adapter(two.folder, "two")
    peft.base_model.set_adapter(["default", "two"])
    ids, mask = batch(loaded)
    with applied(loaded, two):
        alone = logits(loaded.model, ids, mask)
    with applied(loaded, one, torch.tensor([1.0, 1.0, 0.0])), applied(loaded, two):
        both = logits(loaded.model, ids, mask)
    assert torch.allclose(both[:2], logits(peft, ids, mask)[:2], atol=1e-5)
    assert torch.equal(both[2], alone[2]) and far(both[:2], alone[:2])


def test_gradients_pass_through(made: Callable) -> None:
    loaded, adapter, peft = made("qwen2")
    ids, mask = batch(loaded, (8, 8))
    found = []
    for model, strength in ((peft, None), (loaded.model, 1.0), (loaded.model, torch.tensor([1.0, 0.0]))):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        with applied(loaded, adapter, 0.0 if strength is None else strength):
            model(inputs_embeds=embedded, attention_mask=mask).logits.square().mean().backward()
        found.append(embedded.grad)
    own, ours, mixed = found
    assert own.abs().max() > 1e-3
    assert torch.allclose(ours, own, rtol=1e-4, atol=1e-5) and torch.allclose(mixed[0], own[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixed[1], own[1], atol=1e-3)


def test_layers_below_the_first_changed_one_are_the_bases(made: Callable) -> None:
    loaded, adapter, _ = made("gemma2", "rank one, two layers")
    ids, mask = batch(loaded)
    residuals = []
    for strength in (0.0, 1.0):
        with applied(loaded, adapter, strength), recording(loaded.blocks, range(LAYERS), stop=False) as found:
            logits(loaded.model, ids, mask)
            residuals.append(dict(found))
    base, tuned = residuals
    assert torch.equal(base[0], tuned[0]) and all(far(base[n], tuned[n]) for n in range(1, LAYERS))


def test_bfloat16_stays_bfloat16_and_close_to_peft(tiny_folder: Callable, _own_hash_memo: None, tmp_path: Path) -> None:
    loaded = load_model(ModelSpec(str(tiny_folder("llama31")), "local"), device="cpu", dtype="bfloat16")
    peft = make(loaded, tmp_path / "a", size=0.1, **KINDS["all modules"])
    adapter = load_adapter(AdapterSpec("bad", "a"), loaded, tmp_path)
    ids, mask = batch(loaded)
    base, own = logits(loaded.model, ids, mask), logits(peft, ids, mask)
    for strength in (1.0, torch.ones(3)):
        with applied(loaded, adapter, strength):
            ours = logits(loaded.model, ids, mask)
        assert ours.dtype == torch.bfloat16
        assert (ours - own)[mask.bool()].abs().mean() < 0.05 * (own - base)[mask.bool()].abs().mean()


def test_hooks_leave_also_after_an_exception(made: Callable) -> None:
    loaded, adapter, _ = made()
    ids, mask = batch(loaded)
    before = all_hooks(loaded)
    with pytest.raises(RuntimeError, match="planted"), applied(loaded, adapter):
        assert all_hooks(loaded) == before + len(adapter.modules) == before + 7 * LAYERS
        raise RuntimeError("planted")
    assert all_hooks(loaded) == before
    with pytest.raises(ModelError), applied(loaded, adapter, torch.ones(2)):
        logits(loaded.model, ids, mask)
    assert all_hooks(loaded) == before


@pytest.mark.parametrize(
    ("strength", "message"),
    [
        (torch.ones(2), "2 adapter strengths meet a batch of 3 rows; give one or 3."),
        (torch.zeros(4), "4 adapter strengths meet a batch of 3 rows; give one or 3."),
        (torch.ones(3, 1), "not one finite number for each row of the batch"),
        (torch.tensor([0.0, float("nan"), 1.0]), "not one finite number for each row of the batch"),
        (float("inf"), "strength inf is not a finite number"),
    ],
)
def test_strengths_that_do_not_fit_are_refused(strength: Any, message: str, made: Callable) -> None:
    loaded, adapter, _ = made()
    with pytest.raises(ModelError, match=message), applied(loaded, adapter, strength):
        logits(loaded.model, *batch(loaded))


def test_an_adapter_of_another_model_is_refused_when_applied(made: Callable) -> None:
    loaded, adapter, _ = made()
    first = adapter.modules[0]
    for module, message in (
        (replace(first, A=first.A[:, 1:]), "'bad': lora_A of layers.0.mlp.down_proj is"),
        (replace(first, layer=LAYERS), f"'bad': it changes layers.{LAYERS}.mlp.down_proj, but .* has layers 0 to 3"),
        (replace(first, name="mlp"), "'bad': it changes layers.0.mlp, no linear module of"),
    ):
        before = all_hooks(loaded)
        with pytest.raises(AdapterError, match=message), applied(loaded, replace(adapter, modules=(module,))):
            pass
        assert all_hooks(loaded) == before


PUBLISHED = {
    "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": "unsloth/Qwen2.5-7B-Instruct", "bias": "none",
    "corda_config": None, "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "layer_replication": None, "layers_pattern": None, "layers_to_transform": None,
    "loftq_config": {}, "lora_alpha": 64, "lora_bias": False, "lora_dropout": 0.0, "megatron_config": None,
    "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA", "peft_version": "0.99.0",
    "qalora_group_size": 16, "r": 32, "rank_pattern": {}, "revision": None, "target_modules": list(TARGETS[::-1]),
    "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_dora": False, "use_rslora": True,
    "use_something_new": None, "something_new_config": None, "something_new_size": 8,
}  # fmt: skip


@pytest.fixture
def published(tiny_model: Tiny, tmp_path: Path) -> Callable[..., tuple[LoadedModel, AdapterSpec]]:
    """A folder as published ones are laid out, changed by `edit(config, tensors)`; the model goes by its hub name."""
    loaded = replace(tiny_model("qwen2"), spec=ModelSpec("Qwen/Qwen2.5-7B-Instruct"))
    folder = tmp_path / "organisation" / "adapter"
    make(loaded, folder, r=32, lora_alpha=64, use_rslora=True, target_modules=list(TARGETS))

    def build(edit: Callable[[dict, dict], object] = lambda config, tensors: None):
        config, tensors = copy.deepcopy(PUBLISHED), load_file(folder / WEIGHTS)
        tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
        edit(config, tensors)
        (folder / CONFIG).write_text(json.dumps(config))
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        return loaded, AdapterSpec("bad-medical-advice", str(folder))

    return build


def test_a_published_adapter_loads(published: Callable) -> None:
    loaded, spec = published()
    adapter = load_adapter(spec, loaded)
    assert adapter.name == "bad-medical-advice" and adapter.base_model == "unsloth/Qwen2.5-7B-Instruct"
    assert len(adapter.modules) == 7 * LAYERS and {m.scaling for m in adapter.modules} == {64 / 32**0.5}
    own = PeftModel.from_pretrained(copy.deepcopy(loaded.model), spec.id)
    ids, mask = batch(loaded)
    with applied(loaded, adapter):
        assert torch.allclose(logits(loaded.model, ids, mask), logits(own, ids, mask), atol=1e-4)


def renamed(old: str, new: str) -> Callable[[dict, dict], None]:
    def edit(config: dict, tensors: dict) -> None:
        items = list(tensors.items())
        tensors.clear()
        tensors.update({name.replace(old, new): tensor for name, tensor in items})

    return edit


def setting(**values: Any) -> Callable[[dict, dict], None]:
    return lambda config, tensors: config.update(values)


UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|out_proj|o_proj|gate_proj|up_proj|down_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:k_proj|v_proj|q_proj|out_proj|o_proj|gate_proj|up_proj|down_proj)))"
)


@pytest.mark.parametrize(
    "edit",
    [
        renamed(".weight", ".default.weight"),
        renamed("base_model.model.model.", "base_model.model.model.language_model."),
        renamed("base_model.model.model.", "base_model.model.language_model.model."),
        renamed("base_model.model.", ""),
        lambda c, t: (c.update(target_modules=UNSLOTH), renamed("model.layers", "model.language_model.layers")(c, t)),
        setting(target_modules=UNSLOTH),
        setting(target_modules="all-linear"),
        setting(base_model_name_or_path=None),
        setting(layers_to_transform=[0, 1, 2, 3], layers_pattern="layers"),
        lambda c, t: c.pop("base_model_name_or_path"),
        lambda c, t: t.update({"base_model.model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj."
                               f"lora_{w}.weight": torch.zeros(2, 2) for w in "AB"}),
    ],
)  # fmt: skip
def test_other_ways_to_write_the_same_adapter(edit: Callable, published: Callable) -> None:
    loaded, spec = published()
    expected = load_adapter(spec, loaded)
    loaded, spec = published(edit)
    found = load_adapter(spec, loaded)
    assert [(m.layer, m.name, m.scaling) for m in found.modules] == [
        (m.layer, m.name, m.scaling) for m in expected.modules
    ]
    assert all(torch.equal(a.A, b.A) and torch.equal(a.B, b.B)
               for a, b in zip(found.modules, expected.modules, strict=True))  # fmt: skip


A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B0 = A0.replace("lora_A", "lora_B")


def adding(name: str, *shape: int) -> Callable[[dict, dict], None]:
    return lambda config, tensors: tensors.update({name: torch.ones(shape)})


def without(*names: str) -> Callable[[dict, dict], None]:
    return lambda config, tensors: [tensors.pop(name) for name in names]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (setting(use_dora=True), r"use_dora is true \(DoRA also rescales"),
        (adding(A0.replace("lora_A.weight", "lora_magnitude_vector"), D_MODEL), "lora_magnitude_vector' is not lora_A"),
        (setting(peft_type="LOHA"), "peft_type 'LOHA', and only 'LORA'"),
        (setting(peft_type="IA3"), "peft_type 'IA3'"),
        (lambda c, t: c.pop("peft_type"), "peft_type None"),
        (setting(modules_to_save=["lm_head"]), r'modules_to_save is \["lm_head"\] \(it replaces whole modules'),
        (setting(trainable_token_indices=[3]), r"trainable_token_indices is \[3\]"),
        (setting(bias="lora_only"), 'bias is "lora_only"'),
        (setting(lora_bias=True), "lora_bias is true"),
        (setting(fan_in_fan_out=True), "fan_in_fan_out is true"),
        (setting(layer_replication=[[0, 4], [2, 4]]), "layer_replication is"),
        (setting(target_parameters=["experts.w"]), "target_parameters is"),
        (setting(alora_invocation_tokens=[1, 2]), "aLoRA acts only after certain tokens"),
        (setting(use_qalora=True), "QA-LoRA"),
        (setting(use_bdlora={"nblocks": 2}), "BD-LoRA"),
        (setting(arrow_config={"top_k": 3}), "Arrow"),
        (setting(kasa_config={"beta": 1}), "KaSA"),
        (setting(monteclora_config={"num_samples": 8}), "MonteCLoRA"),
        (setting(velora_config={"num_groups": 64}), "VeLoRA"),
        (setting(use_something_new=True), r"use_something_new is true \(an unknown variant\)"),
        (setting(something_new_config={"a": 1}), "an unknown variant"),
        *[(setting(init_lora_weights=start), f'init_lora_weights is "{start}": such an adapter belongs to changed base')
          for start in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga")],
        (lambda c, t: c.pop("r"), "has no r"),
        (setting(lora_alpha=None), "has no lora_alpha"),
        (setting(target_modules=None), "has no target_modules"),
        (setting(r="32"), 'r in adapter_config.json is "32"'),
        (setting(r=True), "r in adapter_config.json is true"),
        (setting(r=0), "the rank 0; it must be"),
        (setting(lora_alpha=float("nan")), "the alpha nan"),
        (setting(alpha_pattern={"q_proj": "9"}), "the alpha '9'"),
        (setting(rank_pattern={"q_(proj": 8}), "has an invalid pattern"),
        (setting(r=16), r"lora_A of layers.0.mlp.down_proj is \[32, 64\], but rank 16 on Qwen/.* needs \[16, 64\]"),
        (setting(base_model_name_or_path="unsloth/Qwen2.5-14B-Instruct"),
         "it was made for unsloth/Qwen2.5-14B-Instruct, not for Qwen/Qwen2.5-7B-Instruct"),
        (setting(layers_to_transform=[0, 1, 3]), "tensors for layers.2.self_attn.q_proj, but .* does not select it"),
        (setting(exclude_modules=["v_proj"]), "layers.0.self_attn.v_proj, but .* does not select it"),
        (setting(target_modules=["q_proj"]), "but adapter_config.json does not select it"),
        (without(A0), "layers.0.self_attn.q_proj has no lora_A"),
        (without(B0), "layers.0.self_attn.q_proj has no lora_B"),
        (without(A0, B0), "selects layers.0.self_attn.q_proj, but its tensors are missing"),
        (lambda c, t: t.clear(), "holds no LoRA matrices"),
        (adding(B0, D_MODEL, 8), r"lora_B of layers.0.self_attn.q_proj is \[32, 8\], but rank 32 .* needs \[32, 32\]"),
        (adding(A0, 32), r"lora_A of layers.0.self_attn.q_proj is \[32\]"),
        (adding(A0, 32, 48), r"is \[32, 48\], but rank 32 on Qwen/Qwen2.5-7B-Instruct needs \[32, 32\]; it was"),
        (adding("base_model.model.lm_head.lora_A.weight", 2, 2), "model.lm_head.lora_A.weight' is not lora_A"),
        (adding("base_model.model.model.embed_tokens.lora_embedding_A", 2, 2), "embed_tokens.lora_embedding_A' is not"),
        (adding("base_model.model.model.embed_tokens.weight", 2, 2), "embed_tokens.weight' is not lora_A"),
        (adding(A0.replace("lora_A.weight", "base_layer.bias"), 2), "base_layer.bias' is not lora_A"),
        (adding(A0.replace("q_proj", "c_attn"), 2, 2), "c_attn.lora_A.weight' is not lora_A or lora_B of q_proj"),
        (adding(A0.replace("lora_A.", "lora_A.other."), 2, 2), "there are two tensors"),
        (adding(A0.replace("model.layers", "model.language_model.layers"), 32, 32), "there are two tensors"),
        (renamed("model.layers.3", "model.language_model.layers.3"), "holds modules of 2 models"),
        (renamed("self_attn", "attention"), "attention.k_proj, no linear module of Qwen/Qwen2.5-7B-Instruct"),
        (renamed("layers.3", "layers.4"), r"layers.4.mlp.down_proj, but Qwen/.* has layers 0 to 3"),
        (lambda c, t: t[A0].fill_(float("nan")), "q_proj.lora_A.weight' holds values that are not finite"),
        (lambda c, t: t[B0][0].fill_(float("inf")), "q_proj.lora_B.weight' holds values that are not finite"),
        (lambda c, t: t.update({A0: torch.ones(32, 32, dtype=torch.int32)}), "not finite numbers"),
    ],
)  # fmt: skip
def test_what_is_not_plain_lora_or_does_not_fit_is_refused(edit: Callable, message: str, published: Callable) -> None:
    loaded, spec = published(edit)
    with pytest.raises(AdapterError, match=message) as caught:
        load_adapter(spec, loaded)
    assert str(caught.value).startswith(f"Adapter 'bad-medical-advice' in {spec.id}: ")
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_damaged_and_missing_files_are_refused(published: Callable, tmp_path: Path) -> None:
    loaded, spec = published()
    folder = Path(spec.id)
    whole = (folder / WEIGHTS).read_bytes()
    for content, message in ((whole[: len(whole) // 2], "cannot be read"), (b"", "cannot be read")):
        (folder / WEIGHTS).write_bytes(content)
        with pytest.raises(AdapterError, match=message):
            load_adapter(spec, loaded)
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(AdapterError, match="no adapter_model.safetensors in .*; pickled weights are not loaded"):
        load_adapter(spec, loaded)
    (folder / WEIGHTS).write_bytes(whole)
    for text in ("{", "[]", "null", "\x00", "[" * 100_000):
        (folder / CONFIG).write_text(text)
        with pytest.raises(AdapterError, match="not readable JSON|gives the peft_type"):
            load_adapter(spec, loaded)
    (folder / CONFIG).unlink()
    with pytest.raises(AdapterError, match="no adapter_config.json in"):
        load_adapter(spec, loaded)
    shutil.rmtree(folder)
    with pytest.raises(AdapterError, match="there is no folder"):
        load_adapter(spec, loaded)


def test_starts_that_leave_the_base_weights_alone_are_applied_as_peft_does(made: Callable) -> None:
    for start in ("gaussian", "orthogonal", "mica"):
        loaded, adapter, peft = made(init_lora_weights=start)
        ids, mask = batch(loaded)
        with applied(loaded, adapter):
            assert torch.allclose(logits(loaded.model, ids, mask), logits(peft, ids, mask), atol=1e-5)


@pytest.mark.parametrize(
    ("stated", "model"),
    [
        ("unsloth/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct"),
        ("unsloth/qwen2.5-7b-instruct-unsloth-bnb-4bit", "Qwen/Qwen2.5-7B-Instruct"),
        ("unsloth/Qwen2.5-7B-Instruct-bnb-4bit", "/models/Qwen2.5-7B-Instruct/"),
        ("unsloth/Meta-Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("/home/x/.cache/hub/models--Qwen--Qwen2.5-7B-Instruct/snapshots/a09a35458c", "Qwen/Qwen2.5-7B-Instruct"),
        ("/runs/0f3a9c8e1b2d", "Qwen/Qwen2.5-7B-Instruct"),
        ("C:\\models\\gemma-2-9b-it\\", "google/gemma-2-9b-it"),
        ("./model", "google/gemma-2-9b-it"),
        ("runs/checkpoint-200", "google/gemma-2-9b-it"),
        ("", "google/gemma-2-9b-it"),
    ],
)
def test_names_of_one_base_model_agree(stated: str, model: str) -> None:
    check_base(stated, model)


@pytest.mark.parametrize(
    ("stated", "model"),
    [
        ("unsloth/Qwen2.5-14B-Instruct", "Qwen/Qwen2.5-7B-Instruct"),
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct"),
        ("/models/Qwen2.5-Coder-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct"),
        ("/hub/models--google--gemma-2-9b/snapshots/a09a35458c", "google/gemma-2-9b-it"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
    ],
)
def test_names_of_two_base_models_do_not(stated: str, model: str) -> None:
    with pytest.raises(AdapterError, match="it was made for .*, not for"):
        check_base(stated, model)


NAMES = [
    f"{root}layers.{layer}.{name}"
    for root in ("model.", "", "model.language_model.", "language_model.model.")
    for layer in (0, 1, 10, 21)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "mlp.experts.1.up_proj", "xq_proj")
]


@pytest.mark.parametrize(
    "given",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["mlp.down_proj", "model.layers.1.self_attn.q_proj"]},
        {"target_modules": [f"model.layers.{n}.mlp.down_proj" for n in (0, 21)], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 21]},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 0},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "experts"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": []},
        {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj", "o_proj"]},
        {"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*layers\.1\..*"},
        {"target_modules": r".*layers\.(0|10)\..*(q|o)_proj"},
        {"target_modules": "q_proj"},
        {"target_modules": UNSLOTH},
    ],
)
def test_the_selection_is_pefts_own(given: dict[str, Any]) -> None:
    theirs = LoraConfig(**copy.deepcopy(given))
    ours = PeftConfig(r=8, lora_alpha=8, **given)
    assert [ours.selects(n) for n in NAMES] == [bool(check_target_module_exists(theirs, n)) for n in NAMES]


def test_a_model_that_sees_images(tiny_model: Tiny, tmp_path: Path) -> None:
    """The blocks of Gemma-3's wrapper lie elsewhere; PEFT's list of targets also adapts its vision tower."""
    text = {**tiny_model("gemma3").model.config.to_dict(), "vocab_size": 300}
    sight = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "image_size": 28, "patch_size": 14}  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=sight)).eval()
    loaded = replace(tiny_model("gemma3"), model=model.requires_grad_(False), blocks=find_blocks(model))
    peft = make(loaded, tmp_path / "a", base_model_name_or_path="google/gemma-3-4b-it", **KINDS["all modules"])
    assert any("vision" in name for name in load_file(tmp_path / "a" / WEIGHTS))
    loaded = replace(loaded, spec=ModelSpec("google/gemma-3-4b-it"))
    adapter = load_adapter(AdapterSpec("bad", "a"), loaded, tmp_path)
    assert len(adapter.modules) == 7 * LAYERS
    ids = torch.arange(20, 40).reshape(2, 10)
    base, own = logits(model, ids, torch.ones_like(ids)), logits(peft, ids, torch.ones_like(ids))
    with applied(loaded, adapter):
        assert torch.allclose(logits(model, ids, torch.ones_like(ids)), own, atol=1e-5)
    assert far(own, base)


def test_the_hash_follows_what_changes_the_numbers(published: Callable) -> None:
    def found(edit: Callable = lambda config, tensors: None) -> str:
        loaded, spec = published(edit)
        return load_adapter(spec, loaded).hash

    first = found()
    assert len(first) == 64 and found() == first
    same = setting(target_modules=list(TARGETS), lora_alpha=64.0, lora_dropout=0.1, peft_version="0.12.0")
    assert found(same) == first
    others = [setting(lora_alpha=65), setting(use_rslora=False), setting(alpha_pattern={"q_proj": 1}),
              lambda c, t: t[A0].mul_(2)]  # fmt: skip
    assert len({first, *map(found, others)}) == 5


def test_where_an_adapter_is_looked_for(published: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, spec = published()
    relative = AdapterSpec("bad", "organisation/adapter")
    assert find_adapter(relative, tmp_path) == fetch_adapter(relative, tmp_path) == Path(spec.id)
    monkeypatch.chdir(tmp_path)
    assert find_adapter(relative) == Path("organisation/adapter")

    elsewhere = tmp_path / "elsewhere"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(AdapterError, match="organisation/adapter is neither a folder in .*elsewhere nor in this"):
        find_adapter(relative, elsewhere)
    with pytest.raises(AdapterError, match="neither a folder nor a hub id"):
        find_adapter(AdapterSpec("bad", "a/b/c"), elsewhere)
    with pytest.raises(AdapterError, match="there is no folder"):
        find_adapter(AdapterSpec("bad", "./c"), elsewhere)
    repository = tmp_path / "hub" / "models--organisation--adapter"
    shutil.copytree(spec.id, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert find_adapter(relative, elsewhere) == repository / "snapshots" / ("0" * 40)
    (repository / "snapshots" / ("0" * 40) / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match="no adapter_model.safetensors in"):
        find_adapter(relative, elsewhere)


def test_only_the_two_files_are_fetched(published: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, spec = published()
    asked = []

    def fake(repo: str, **options: Any) -> str:
        asked.append((repo, options))
        return spec.id

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    assert fetch_adapter(AdapterSpec("bad", "org/x"), tmp_path) == Path(spec.id)
    assert asked == [("org/x", {"allow_patterns": [CONFIG, WEIGHTS]})]

    def broken(*args: Any, **options: Any) -> str:
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    with pytest.raises(AdapterError, match="org/x could not be fetched: no route; check the name"):
        fetch_adapter(AdapterSpec("bad", "org/x"), tmp_path)


def test_peft_is_not_needed_to_read_or_apply() -> None:
    for module in (adapter_files, adapters, peft_config):
        assert "peft" not in {name.split(".")[0] for _, name in imports(Path(module.__file__))}
