"""The gains of a decoder block's norms: what a LoRA's read and write vectors pass through. Reads weights, runs no text.

Names the norms of the tested families: two before attention and MLP, and in Gemma two more after them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from core.errors import ModelError
from core.model.gains import BlockGains
from core.model.loading import LoadedModel


@dataclass(frozen=True)
class BlockNorms:
    """The norms of one decoder block."""

    attention: nn.Module
    """Before attention."""
    mlp: nn.Module
    """Before the MLP."""
    after_attention: nn.Module | None
    """Between attention and the residual stream; None where there is none."""
    after_mlp: nn.Module | None


def block_norms(loaded: LoadedModel, layer: int) -> BlockNorms:
    """The block's norms by what they act on. Raises `ModelError` for a block that names them otherwise.

    Llama, Qwen2 and Mistral call the norm before the MLP `post_attention_layernorm`; Gemma calls that one
    `pre_feedforward_layernorm`, and its `post_attention_layernorm` acts on what attention has put out.
    """
    block = loaded.blocks[layer]
    sandwiched = hasattr(block, "pre_feedforward_layernorm")
    names = (
        "input_layernorm",
        "pre_feedforward_layernorm" if sandwiched else "post_attention_layernorm",
        "post_attention_layernorm" if sandwiched else None,
        "post_feedforward_layernorm" if sandwiched else None,
    )
    for name in names:
        if name is not None and not isinstance(getattr(block, name, None), nn.Module):
            raise ModelError(
                f"Block {layer} of {loaded.spec.id} has no {name}, so the norms around its modules are not known; "
                "LoRA vectors are read of models built as Llama, Qwen2, Mistral and Gemma are."
            )
    return BlockNorms(*(None if name is None else getattr(block, name) for name in names))


def block_gains(loaded: LoadedModel, layer: int) -> BlockGains:
    """The gains of the block's norms. Raises `ModelError` when one is not gain * x / (root mean square of x)."""
    norms = block_norms(loaded, layer)
    return BlockGains(*(
        None if norm is None else _gain(loaded, norm)
        for norm in (norms.attention, norms.mlp, norms.after_attention, norms.after_mlp)
    ))  # fmt: skip


def norm_epsilon(norm: nn.Module) -> float:
    """What the norm adds to the mean square before its root is taken."""
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)))


@torch.inference_mode()
def _gain(loaded: LoadedModel, norm: nn.Module) -> np.ndarray:
    """The norm of a vector of ones is its gain: the weight, or 1 + the weight in Gemma."""
    ones = torch.ones(2, loaded.d_model, device=loaded.device, dtype=loaded.dtype)
    ones[1] *= -2
    found = norm(ones).float().cpu()
    if not torch.allclose(found[1], -found[0], rtol=1e-2, atol=1e-3):
        raise ModelError(f"A norm of {loaded.spec.id} does more than divide by the root mean square; it is not read.")
    return found[0].numpy()
