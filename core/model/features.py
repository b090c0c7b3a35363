"""Single features of an SAE in the residual stream: read by the SAE's own encoder, moved along its decoder direction.

The SAE's input normalisation, where it has one, is undone: a change of one feature's activation by 1 moves the residual
by `row_scale(resid) * decoder_row`, exactly as the SAE's own decoder would. Knows no batch of rows and no hooks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from core.errors import InterventionError
from core.model.saes import LoadedSae, chunk_rows


@dataclass(frozen=True, eq=False)
class Feature:
    """One feature of one SAE."""

    sae: LoadedSae = field(repr=False)
    feature: int

    def __post_init__(self) -> None:
        if not 0 <= self.feature < self.sae.d_sae:
            raise InterventionError(
                f"Layer {self.sae.layer} has no feature {self.feature}; its SAE has 0 to {self.sae.d_sae - 1}."
            )

    @property
    def layer(self) -> int:
        return self.sae.layer


@torch.inference_mode()
def read_features(sae: Any, resid: Tensor, features: Tensor) -> Tensor:
    """Activations float32 [n_tokens, n_features] of resid [n_tokens, d_model]; sae-lens' own `encode`, in chunks."""
    rows = chunk_rows(int(sae.cfg.d_sae))
    parts = [sae.encode(resid[start : start + rows])[:, features].float() for start in range(0, len(resid), rows)]
    return torch.cat(parts) if parts else resid.new_zeros(0, len(features))


@torch.inference_mode()
def decoder_rows(sae: Any, features: Tensor) -> Tensor:
    """What one unit of each feature adds to the SAE's normalised output: float32 [n_features, d_model].

    Taken from the SAE's own `decode`, so that architectures that scale activations by decoder norms are right too.
    """
    acts = torch.zeros(len(features), int(sae.cfg.d_sae), device=features.device)
    acts[torch.arange(len(features)), features] = 1.0
    probe = torch.linspace(-1.0, 1.0, int(sae.cfg.d_in), device=features.device).expand(len(features), -1)
    outputs = []
    for given in (acts, torch.zeros_like(acts)):
        sae.run_time_activation_norm_fn_in(probe)  # its inverse, inside decode, needs to have seen an input
        outputs.append(sae.decode(given))
    return ((outputs[0] - outputs[1]) / row_scale(sae, probe)).float()


def row_scale(sae: Any, resid: Tensor) -> Tensor:
    """Factor [..., 1] by which the SAE's output is rescaled to that of resid [..., d_model]."""
    kind = sae.cfg.normalize_activations
    if kind == "constant_norm_rescale":
        return torch.linalg.vector_norm(resid, dim=-1, keepdim=True) / resid.shape[-1] ** 0.5
    if kind == "layer_norm":
        return resid.std(dim=-1, keepdim=True)
    return resid.new_ones(*resid.shape[:-1], 1)
