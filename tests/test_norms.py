"""core/model/norms.py: a module is given gain * residual / root mean square in every family; Gemma writes so too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_hooks import batch
from tiny_models import FAMILIES, LAYERS
from torch import nn

from core.errors import ModelError
from core.model.hooks import changing, resid_post
from core.model.norms import block_gains, block_norms, norm_epsilon


def unit(x: torch.Tensor, epsilon: float) -> np.ndarray:
    return (x / torch.sqrt(x.square().mean(-1, keepdim=True) + epsilon)).double().numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gains_are_those_on_the_way_in_and_out(family: str, tiny_model: Callable) -> None:
    loaded = tiny_model(family)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # weights of a fresh model are all alike
        norms = [p for n, p in loaded.model.named_parameters() if "layernorm" in n]
        before = [p.clone() for p in norms]
        for p in norms:
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    try:
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def keep(name: str) -> Callable:
            return lambda x, out: seen.__setitem__(name, (x, out)) or out

        ids, mask = batch(loaded, (9, 9))
        block = loaded.blocks[2]
        taps = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        with changing([(m, keep(n)) for n, m in taps.items()]):
            resid = resid_post(loaded, ids, mask, [1, 2])
        gains, found = block_gains(loaded, 2), block_norms(loaded, 2)
    finally:
        with torch.no_grad():
            for p, old in zip(norms, before, strict=True):
                p.copy_(old)
    epsilon = norm_epsilon(found.attention)
    assert 0 < epsilon < 1e-4
    assert gains.attention.std() > 0.1 and gains.mlp.std() > 0.1, "otherwise folding would prove nothing"
    np.testing.assert_allclose(seen["self_attn.q_proj"][0].double(), gains.attention * unit(resid[1], epsilon),
                               rtol=1e-3, atol=1e-4)
    written = [seen[n][1] for n in ("self_attn.o_proj", "mlp.down_proj")]
    if family.startswith("gemma"):
        written = [torch.from_numpy(g * unit(w, epsilon)) for g, w in
                   zip((gains.after_attention, gains.after_mlp), written, strict=True)]
    else:
        assert gains.after_attention is None and gains.after_mlp is None
    middle = resid[1] + written[0]
    np.testing.assert_allclose(seen["mlp.up_proj"][0].double(), gains.mlp * unit(middle, epsilon), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(resid[2].double(), (middle + written[1]).double(), rtol=1e-3, atol=1e-4)


def test_a_block_with_other_norms_is_refused(tiny_model: Callable) -> None:
    loaded = tiny_model("llama31")
    blocks = nn.ModuleList([nn.Linear(2, 2) for _ in range(LAYERS)])
    with pytest.raises(ModelError, match="Block 1 of .* has no input_layernorm"):
        block_norms(replace(loaded, blocks=blocks), 1)
    block = nn.Module()
    block.input_layernorm = block.post_attention_layernorm = nn.LayerNorm(loaded.d_model)
    nn.init.ones_(block.input_layernorm.bias)
    with pytest.raises(ModelError, match="does more than divide"):
        block_gains(replace(loaded, blocks=nn.ModuleList([block])), 0)
