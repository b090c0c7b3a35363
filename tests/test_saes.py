"""SAEs: sae-lens' own encode is the oracle; what does not belong to the model is refused; memory is bounded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_saes import save_sae

from core.errors import SaeMismatch
from core.model import saes
from core.specs import SaeSpec

ARCHITECTURES = ("jumprelu", "standard", "topk")


def load(folder: Path, **more: object) -> saes.LoadedSae:
    return saes.load_sae(SaeSpec(1, "local", str(folder)), **{"d_model": 32, "model_names": ["org/Tiny"], **more})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("budget", [1, 4 * 4 * 48 * 5, 2**30], ids=["one token", "five tokens", "all at once"])
def test_sparse_encoding_is_sae_lens_encode(tmp_path: Path, architecture: str, budget: int) -> None:
    loaded = load(save_sae(tmp_path, architecture=architecture))
    x = torch.randn(23, 32, generator=torch.Generator().manual_seed(1))
    found = saes.encode_sparse(loaded.sae, x, budget)
    dense = torch.zeros(23, 48)
    dense[found.token, found.feature] = found.value
    with torch.inference_mode():
        torch.testing.assert_close(dense, loaded.sae.encode(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(saes.reconstruct(loaded.sae, x, budget), loaded.sae(x), rtol=1e-5, atol=1e-6)
    assert 0 < len(found.value) < 23 * 48
    assert (found.token.diff() >= 0).all(), "sorted by token"


def test_no_dense_tensor_exceeds_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(save_sae(tmp_path))
    seen: list[int] = []
    own = type(loaded.sae).encode

    def encode(self: object, x: torch.Tensor) -> torch.Tensor:
        acts = own(self, x)
        seen.append(4 * acts.numel() * acts.element_size())
        return acts

    monkeypatch.setattr(type(loaded.sae), "encode", encode)
    budget = 4 * 4 * 48 * 5
    saes.encode_sparse(loaded.sae, torch.randn(23, 32), budget)
    assert len(seen) == 5 and max(seen) <= budget


def test_encoding_nothing_gives_nothing(tmp_path: Path) -> None:
    loaded = load(save_sae(tmp_path))
    found = saes.encode_sparse(loaded.sae, torch.empty(0, 32))
    assert (found.n_tokens, len(found.value), found.d_sae) == (0, 0, 48)


def test_a_131k_wide_sae_is_read_a_few_tokens_at_a_time() -> None:
    assert saes.chunk_rows(131_072) * 131_072 * 4 * 4 <= saes.ENCODE_BUDGET
    assert saes.chunk_rows(10**9) == 1


@pytest.mark.parametrize(
    ("made", "asked", "says"),
    [
        ({"d_in": 16}, {}, "d_model 16"),
        ({"hook_name": "blocks.2.hook_resid_post"}, {}, "blocks.2.hook_resid_post"),
        ({"hook_name": "blocks.1.hook_mlp_out"}, {}, "blocks.1.hook_mlp_out"),
        ({"hook_name": None}, {}, "an unstated hook point"),
        ({"model_name": "other-model"}, {}, "other-model"),
        ({"model_name": None}, {}, "an unstated model"),
    ],
)
def test_an_sae_of_something_else_is_refused(tmp_path: Path, made: dict, asked: dict, says: str) -> None:
    with pytest.raises(SaeMismatch, match=says) as error:
        load(save_sae(tmp_path, **made), **asked)
    assert str(error.value).count("\n") == 0


def test_another_stated_name_is_accepted_when_the_preset_lists_it(tmp_path: Path) -> None:
    folder = save_sae(tmp_path, model_name="gemma-2-9b")
    with pytest.raises(SaeMismatch):
        load(folder, model_names=["google/gemma-2-9b-it"])
    load(folder, model_names=["google/gemma-2-9b-it", "gemma-2-9b"])


def test_missing_and_damaged_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SaeMismatch, match="no cfg.json"):
        load(tmp_path / "nowhere")
    folder = save_sae(tmp_path / "sae")
    weights = folder / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(SaeMismatch, match="cannot be read"):
        load(folder)


def test_hash_follows_weights_and_settings(tmp_path: Path) -> None:
    first = load(save_sae(tmp_path / "a")).hash
    assert load(save_sae(tmp_path / "b")).hash == first
    assert load(save_sae(tmp_path / "c", seed=1)).hash != first
    config = tmp_path / "b" / "cfg.json"
    written = json.loads(config.read_text()) | {"apply_b_dec_to_input": False}
    config.write_text(json.dumps(written))
    assert load(tmp_path / "b").hash != first


def test_registry_lookup_resolves_and_names_near_misses() -> None:
    entry = saes.lookup("gemma-scope-9b-it-res-canonical", "layer_9/width_16k/canonical")
    assert entry.repo_id == "google/gemma-scope-9b-it-res"
    with pytest.raises(SaeMismatch, match="layer_9/width_16k/canonical"):
        saes.lookup("gemma-scope-9b-it-res-canonical", "layer_9/width_16k/canonicl")
    with pytest.raises(SaeMismatch, match="gemma-scope-9b-it-res-canonical"):
        saes.lookup("gemma-scope-9b-it-res-cannonical", "layer_9/width_16k/canonical")
