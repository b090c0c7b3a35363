"""Small random SAEs in sae-lens' own layout, of the architectures that published releases load as."""

from __future__ import annotations

from pathlib import Path

import torch

from core.specs import hook_point


def save_sae(
    folder: Path,
    *,
    layer: int = 1,
    d_in: int = 32,
    d_sae: int = 48,
    architecture: str = "jumprelu",
    model_name: str | None = "tiny",
    hook_name: str | None = "own",
    apply_b_dec_to_input: bool = True,
    seed: int = 0,
) -> Path:
    """Write an SAE that fires on about a third of its features; returns its folder."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    kinds = {
        "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig, {}),
        "standard": (StandardSAE, StandardSAEConfig, {}),
        "topk": (TopKSAE, TopKSAEConfig, {"k": 7}),
    }
    sae_class, config_class, extra = kinds[architecture]
    stated = {"model_name": model_name, "hook_name": hook_point(layer) if hook_name == "own" else hook_name}
    metadata = SAEMetadata(**{k: v for k, v in stated.items() if v is not None})
    torch.manual_seed(seed)
    sae = sae_class(
        config_class(d_in=d_in, d_sae=d_sae, apply_b_dec_to_input=apply_b_dec_to_input, metadata=metadata, **extra)
    )
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            noise = torch.rand_like(parameter) * 0.3 if name == "threshold" else torch.randn_like(parameter) * 0.1
            parameter.copy_(noise)
    sae.save_model(folder)
    return folder
