"""The attribution of features to the log-loss of responses: one batch, by one backward pass for all layers.

For a token and a feature, minus (gradient of the log-loss with respect to resid_post, dotted with the decoder
direction) times (resid_post minus its mean, dotted with the decoder direction): to first order, how much the log-loss
would rise if the residual's part along that direction were set to its mean. Positive: it supports the response.
Source: Dupre la Tour & Mossing, OpenAI, December 2025 (https://alignment.openai.com/sae-latent-attribution).

Choices made here. The log-loss is summed over the response's tokens (not the one that ends the turn), so a token's
figure is its effect on all later response tokens, and the last token's is zero: longer responses have larger figures.
Decoder directions have unit norm, because the direction stands in the formula twice and its norm would count squared.
It does not know contrasts, files or statistics, and a first-order estimate says nothing about large changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.model.batches import outliers, pad, pad_id
from core.model.hooks import recording_with_grad
from core.model.loading import LoadedModel
from core.model.saes import LoadedSae, chunk_rows


@dataclass(frozen=True)
class Item:
    """One conversation as it is read."""

    ids: np.ndarray
    start: int
    """The response is ids[start:end]."""
    end: int
    group: int
    """Which prompt and side it belongs to, within the window."""
    weight: float
    """One over the responses in its group."""


def unit_decoder(sae: LoadedSae) -> Tensor:
    """float32 [d_sae, d_model]: decoder directions at unit norm (a direction of norm 0 stays 0)."""
    return torch.nn.functional.normalize(sae.sae.W_dec.float(), dim=1)


def token_attribution(resid: Tensor, gradient: Tensor, direction: Tensor) -> Tensor:
    """[n_tokens, d_sae]: minus (gradient . d) times (resid . d).

    resid: resid_post minus its mean, and gradient: of the log-loss, both [n_tokens, d_model]; direction:
    [d_sae, d_model].
    """
    return -(gradient @ direction.T) * (resid @ direction.T)


def residual_gradients(
    loaded: LoadedModel, ids: Tensor, mask: Tensor, answer: Tensor, layers: Sequence[int]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """resid_post and the gradient of the log-loss with respect to it, layer -> [batch, position, d_model] each.

    The log-loss is the sum of -log p (nats) over the tokens marked in `answer` [batch, position].
    """
    with torch.enable_grad(), recording_with_grad(loaded.blocks, layers) as resid:
        logits = loaded.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        wanted = answer[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits[wanted].float(), ids[:, 1:][wanted], reduction="sum")
        found = torch.autograd.grad(loss, [resid[layer] for layer in layers])
    return {n: x.detach() for n, x in resid.items()}, dict(zip(layers, found, strict=True))


def add_attribution(
    loaded: LoadedModel,
    items: Sequence[Item],
    means: Mapping[int, Tensor],
    directions: Mapping[int, Tensor],
    sums: Mapping[int, Tensor],
) -> None:
    """One batch: add to `sums`, layer -> float32 [groups, d_sae], each group's mean attribution in nats.

    The mean is over a response's tokens that are no attention sinks, then over the group's responses. means: layer ->
    float32 [d_model], what is taken from resid_post; directions: layer -> [d_sae, d_model].
    """
    ids, mask = pad([item.ids for item in items], pad_id(loaded.tokenizer), loaded.device)
    answer = torch.zeros_like(mask, dtype=torch.bool)
    for n, item in enumerate(items):
        answer[n, item.start : item.end] = True
    resid, gradient = residual_gradients(loaded, ids, mask, answer, list(directions))
    group = torch.tensor([item.group for item in items], device=loaded.device)
    weight = torch.tensor([item.weight for item in items], device=loaded.device)
    for layer, direction in directions.items():
        kept = answer & ~outliers(resid[layer], mask)
        row = kept.nonzero()[:, 0]
        share = weight[row] / kept.sum(1)[row]
        x, g = resid[layer][kept].float() - means[layer], gradient[layer][kept].float()
        step = chunk_rows(len(direction))
        for start in range(0, len(x), step):
            part = slice(start, start + step)
            values = token_attribution(x[part], g[part], direction) * share[part, None]
            sums[layer].index_add_(0, group[row[part]], values)
