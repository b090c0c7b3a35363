"""core/model/loading.py: folders, hub caches, refusals, and the block list of every architecture."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import D_MODEL, FAMILIES, LAYERS
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from core.errors import ModelError
from core.model import loading
from core.model.loading import (
    LoadedModel,
    choose_device,
    choose_dtype,
    decoder_of,
    find_blocks,
    find_folder,
    load_model,
    load_tokenizer,
    weights_hash,
)
from core.specs import ModelSpec

REPO, SHA = "tiny-lab/Tiny-Llama-Instruct", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def copy(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    return shutil.copytree(tiny_folder("llama31"), tmp_path / "model")


def local(folder: Path) -> ModelSpec:
    return ModelSpec(str(folder), "local")


# ------------------------------------------------------------------------------------------------ architectures


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_loads_with_its_blocks_decoder_and_norm(
    family: str, tiny_model: Callable[[str], LoadedModel]
) -> None:
    loaded = tiny_model(family)
    assert loaded.blocks is loaded.model.model.layers and loaded.decoder is loaded.model.model
    assert loaded.final_norm is loaded.model.model.norm and loaded.unembedding is loaded.model.lm_head
    assert (loaded.n_layers, loaded.d_model, loaded.dtype) == (LAYERS, D_MODEL, torch.float32)
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())


def test_gemma_2_runs_eager_attention_which_soft_caps(tiny_model: Callable[[str], LoadedModel]) -> None:
    assert tiny_model("gemma2").model.config._attn_implementation == "eager"


def test_a_gemma_3_that_sees_images_has_its_language_blocks_found() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = Gemma3Config(
        text_config=sizes | {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64},
        vision_config=sizes | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(config)
    blocks = find_blocks(model)
    assert type(blocks[0]).__name__ == "Gemma3DecoderLayer" and len(blocks) == 4
    decoder = decoder_of(model, blocks)
    assert type(decoder).__name__ == "Gemma3TextModel" and hasattr(decoder, "norm")


class Foreign(nn.Module):
    """A model of unknown make: two lists that could be its blocks, or none."""

    def __init__(self, *lengths: int, layers: int = 3):
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=layers, hidden_size=4)
        for n, length in enumerate(lengths):
            setattr(self, f"list{n}", nn.ModuleList(nn.Linear(4, 4) for _ in range(length)))


def test_ambiguous_blocks_are_refused_and_can_be_named() -> None:
    model = Foreign(3, 3, 2)
    with pytest.raises(ModelError, match="Found 2 lists of 3 decoder blocks in Foreign") as caught:
        find_blocks(model)
    assert "list0 (3), list1 (3), list2 (2)" in str(caught.value) and 'blocks = "path.to.list"' in str(caught.value)
    assert find_blocks(model, "list1") is model.list1


def test_absent_blocks_and_wrong_names_are_refused() -> None:
    with pytest.raises(ModelError, match="Found 0 lists of 3 decoder blocks in Foreign .lists: none."):
        find_blocks(Foreign())
    with pytest.raises(ModelError, match="No block list 'model.layers' in this model; its lists are list0"):
        find_blocks(Foreign(3), "model.layers")
    with pytest.raises(ModelError, match="'list1' has 2 entries, but the configuration says 3 layers"):
        find_blocks(Foreign(3, 2), "list1")


def test_blocks_named_in_the_spec_reach_the_loaded_model(copy: Path) -> None:
    assert load_model(ModelSpec(str(copy), "local", blocks="model.layers"), device="cpu").n_layers == LAYERS
    with pytest.raises(ModelError, match="No block list 'nowhere'"):
        load_model(ModelSpec(str(copy), "local", blocks="nowhere"), device="cpu")


# ---------------------------------------------------------------------------------------------------- locations


@pytest.fixture
def hub(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An offline hub cache that holds the tiny model, laid out as huggingface_hub lays it out."""
    import huggingface_hub.constants

    root = tmp_path / "hf" / "hub"
    repo = root / f"models--{REPO.replace('/', '--')}"
    snapshot = repo / "snapshots" / SHA
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for n, file in enumerate(sorted(copy.iterdir())):
        blob = repo / "blobs" / f"{n:040x}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(SHA)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_a_hub_model_is_read_from_the_hub_cache(hub: Path, copy: Path) -> None:
    assert find_folder(ModelSpec(REPO)) == hub
    assert find_folder(ModelSpec(REPO, revision=SHA)) == hub
    loaded = load_model(ModelSpec(REPO), device="cpu")
    assert loaded.n_layers == LAYERS
    assert loaded.weights_hash == weights_hash(copy), "the same bytes give the same hash wherever they lie"


@pytest.mark.parametrize("spec", [ModelSpec("tiny-lab/other"), ModelSpec(REPO, revision="v9")])
def test_a_hub_model_that_is_not_there_says_how_to_fetch_it(hub: Path, spec: ModelSpec) -> None:
    with pytest.raises(ModelError, match="is not on this machine; run `python -m core fetch PRESET` first") as caught:
        find_folder(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a/b/c", "./no/such/folder", "two words"])
def test_what_is_neither_folder_nor_hub_id_is_said(name: str) -> None:
    with pytest.raises(ModelError, match="neither a folder nor a hub id"):
        find_folder(ModelSpec(name))


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no config.json there"):
        load_model(local(tmp_path))


def test_the_bundled_model_before_its_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.bundled, "CACHE", tmp_path)
    with pytest.raises(ModelError, match="not converted yet; run `python -m core fetch demo` once"):
        find_folder(ModelSpec("SmolLM2-135M-Instruct", "bundled"))


# ----------------------------------------------------------------------------------------------------- refusals


def test_pickled_weights_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(1)}, copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no .safetensors weights there; pickled weights are not loaded"):
        load_model(local(copy))


def test_truncated_weights_are_refused(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="the weights in .* cannot be loaded") as caught:
        load_model(local(copy))
    assert "\n" not in str(caught.value)


def test_missing_tensors_are_refused_and_not_made_up(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.3.mlp.down_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 tensors are missing .* model.layers.3.mlp.down_proj.weight"):
        load_model(local(copy))


def test_tensors_of_another_size_are_refused(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(D_MODEL + 1)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load_model(local(copy))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_a_chat_template_is_refused(copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="has no chat template; use an instruct model"):
        load_tokenizer(local(copy))


def test_a_folder_without_a_tokenizer_is_refused(copy: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (copy / name).unlink()
    with pytest.raises(ModelError, match="the tokenizer in|no chat template|no character offsets"):
        load_tokenizer(local(copy))


@pytest.mark.parametrize("config", ["{", '{"model_type": "no-such-model"}', "{}"])
def test_a_damaged_or_unknown_configuration_is_refused(copy: Path, config: str) -> None:
    (copy / "config.json").write_text(config)
    with pytest.raises(ModelError) as caught:
        load_model(local(copy))
    assert "\n" not in str(caught.value)


def test_remote_code_is_never_run(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "own.py").write_text("raise SystemExit('remote code was run')")
    with pytest.raises(ModelError):
        load_model(local(copy))


# -------------------------------------------------------------------------------------------- numbers and hashes


def test_device_and_dtype_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda, mps = torch.device("cpu"), torch.device("cuda"), torch.device("mps")
    assert choose_dtype(cuda) is torch.bfloat16 and choose_dtype(cpu) is choose_dtype(mps) is torch.float32
    assert choose_dtype(cpu, "float16") is torch.float16
    with pytest.raises(ModelError, match="Unknown dtype 'int8'; use one of float32, bfloat16, float16"):
        choose_dtype(cpu, "int8")

    for has_cuda, has_mps, expected in [(True, True, cuda), (False, True, mps), (False, False, cpu)]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda has=has_cuda: has)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda has=has_mps: has)
        assert choose_device() == expected and choose_device("cpu") == cpu
    with pytest.raises(ModelError, match="no CUDA; use --device cpu"):
        choose_device("cuda:0")
    with pytest.raises(ModelError, match="Unknown device 'gpu'"):
        choose_device("gpu")


def test_the_weights_come_in_the_dtype_asked_for(copy: Path) -> None:
    loaded = load_model(local(copy), device="cpu", dtype="bfloat16")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}


def test_one_byte_changes_the_weights_hash(copy: Path, _own_hash_memo: None) -> None:
    before = weights_hash(copy)
    assert weights_hash(copy) == before
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    changed = weights_hash(copy)
    assert changed != before
    content[-1] ^= 1
    weights.write_bytes(content)
    assert weights_hash(copy) == before


def test_shards_are_all_hashed(copy: Path, _own_hash_memo: None) -> None:
    before = weights_hash(copy)
    AutoModelForCausalLM.from_pretrained(copy).save_pretrained(copy, max_shard_size="40KB")
    (copy / "model.safetensors").unlink()
    assert len(list(copy.glob("*.safetensors"))) > 1
    sharded = weights_hash(copy)
    assert sharded != before and load_model(local(copy), device="cpu").weights_hash == sharded
    last = sorted(copy.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1] + b"\x01")
    assert weights_hash(copy) != sharded


def test_the_memo_of_hashes_survives_damage(copy: Path, _own_hash_memo: None) -> None:
    before = weights_hash(copy)
    (loading.CACHE / "weights" / "hashes.json").write_text("{ damaged")
    assert weights_hash(copy) == before


def test_the_template_hash_changes_with_the_template(copy: Path, tiny_model: Callable[[str], LoadedModel]) -> None:
    before = tiny_model("llama31").template_hash
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert load_model(local(copy), device="cpu").template_hash != before
