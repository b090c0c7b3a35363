"""Matrices read without torch are those that sae-lens uses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from core.errors import SaeMismatch
from core.model.dictionaries import read_dictionary
from core.model.saes import load_sae
from core.specs import SaeSpec


@pytest.mark.parametrize("architecture", ["jumprelu", "standard", "topk"])
def test_the_same_matrices_as_sae_lens(tmp_path: Path, architecture: str) -> None:
    import tiny_saes

    tiny_saes.save_sae(tmp_path / "sae", architecture=architecture)
    spec = SaeSpec(1, "local", "sae")
    found = read_dictionary(spec, tmp_path)
    sae = load_sae(spec, d_model=32, model_names=("tiny",), folder=tmp_path).sae
    assert np.array_equal(found.W_dec, sae.W_dec.detach().numpy())
    assert np.array_equal(found.W_enc, sae.W_enc.detach().numpy())
    assert np.allclose(found.norms, np.linalg.norm(found.W_dec, axis=1))
    acts = np.random.default_rng(0).random(48)
    decoded = sae.decode(sae.W_dec.new_tensor(acts)).detach().numpy() - sae.b_dec.detach().numpy()
    assert np.allclose(found.decode(acts), decoded, atol=1e-5)


def test_what_is_missing_or_elsewhere_is_refused(tmp_path: Path) -> None:
    import tiny_saes

    with pytest.raises(SaeMismatch, match="no SAE there"):
        read_dictionary(SaeSpec(1, "local", "absent"), tmp_path)
    tiny_saes.save_sae(tmp_path / "sae", layer=1)
    with pytest.raises(SaeMismatch, match="not at blocks.2"):
        read_dictionary(SaeSpec(2, "local", "sae"), tmp_path)
    (tmp_path / "sae" / "sae_weights.safetensors").write_bytes(b"no")
    with pytest.raises(SaeMismatch, match="cannot be read"):
        read_dictionary(SaeSpec(1, "local", "sae"), tmp_path)
