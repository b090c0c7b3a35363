"""Directions, SAEs and adapters for the tiny models, with known truth where that is possible."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tiny_models import D_MODEL

from core.directions import Direction
from core.model.adapters import Adapter, LoraModule
from core.model.loading import LoadedModel
from core.model.saes import LoadedSae
from core.specs import SaeSpec, hook_point

PROMPTS = ("Why?", "Tell me honestly what you think about a glass of water and the river.", "Paris or London?")


def direction(loaded: LoadedModel, layer: int = 2, seed: int = 0, resid_norm: float | None = 6.0) -> Direction:
    vector = np.random.default_rng(seed).standard_normal(loaded.d_model)
    return Direction(f"d{seed}", loaded.spec.id, layer, vector, resid_norm)


def exact_sae(layer: int = 2, n_features: int = D_MODEL) -> LoadedSae:
    """Orthonormal decoder rows, tied encoder, no bias: a feature's activation is x . w where that is positive."""
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    metadata = SAEMetadata(model_name="tiny", hook_name=hook_point(layer))
    sae = StandardSAE(StandardSAEConfig(d_in=D_MODEL, d_sae=n_features, metadata=metadata))
    rows = np.linalg.qr(np.random.default_rng(layer).standard_normal((D_MODEL, D_MODEL)))[0][:n_features]
    with torch.no_grad():
        for parameter in (sae.b_enc, sae.b_dec):
            parameter.zero_()
        sae.W_dec.copy_(torch.from_numpy(rows).float())
        sae.W_enc.copy_(torch.from_numpy(rows.T.copy()).float())
    return LoadedSae(SaeSpec(layer, "local", "planted"), sae.eval().requires_grad_(False), f"exact {layer}")


def random_sae(folder: Path, layer: int = 2, architecture: str = "jumprelu", normalize: str = "none") -> LoadedSae:
    """An SAE that reconstructs nothing well: its error is large and must be kept."""
    from sae_lens import SAE
    from tiny_saes import save_sae

    sae = SAE.load_from_disk(save_sae(folder, layer=layer, architecture=architecture))
    sae.cfg.normalize_activations = normalize
    sae._setup_activation_normalization()
    return LoadedSae(
        SaeSpec(layer, "local", str(folder)), sae.eval().requires_grad_(False), f"{architecture} {normalize}"
    )


def lora(loaded: LoadedModel, seed: int = 0, size: float = 0.3, name: str = "bad") -> Adapter:
    """Rank 2 on the reading and the writing modules of two layers."""
    generator = torch.Generator().manual_seed(seed)
    modules = []
    for layer in (1, 2):
        for part in ("mlp.down_proj", "self_attn.q_proj"):
            linear = loaded.blocks[layer].get_submodule(part)
            A = size * torch.randn(2, linear.in_features, generator=generator)
            B = size * torch.randn(linear.out_features, 2, generator=generator)
            modules.append(LoraModule(layer, part, A, B, 2.0))
    return Adapter(name, "", f"{name} {seed}", "", tuple(modules))


def hooks(loaded: LoadedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in loaded.model.modules())
