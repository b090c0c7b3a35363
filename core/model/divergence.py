"""How far an intervention moves a row's predictions: KL divergence from the unsteered row on the same text.

One forward pass of both over the finished text, without a cache: what is compared are distributions at temperature 1.
Knows no sampling settings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from core.model.interventions import Intervention
from core.model.loading import LoadedModel
from core.model.rows import Answer
from core.model.scopes import positions_of
from core.model.steering import Steering

#: Positions whose distributions over the whole vocabulary are held at once.
CHUNK = 32


@torch.inference_mode()
def divergence(loaded: LoadedModel, answer: Answer, reference: Sequence[Intervention] = ()) -> np.ndarray:
    """float32 [n_tokens], nats: KL(row || reference) of the distribution from which each token of the answer was drawn.

    reference: the interventions of the unsteered row, e.g. the LoRA alone for a steered fine-tuned model; the base
    model when empty. NaN for a row that cannot be run.
    """
    n_prompt, n_tokens = len(answer.prompt_ids), answer.n_tokens
    if answer.row.problem or any(item.problem for item in reference):
        return np.full(n_tokens, np.nan, dtype=np.float32)
    if n_tokens == 0:
        return np.zeros(0, dtype=np.float32)
    text = np.concatenate([answer.prompt_ids, answer.ids[:-1]])  # the last token predicts nothing that was said
    ids = torch.from_numpy(text).to(loaded.device).expand(2, -1)
    steering = Steering(loaded, [answer.row.interventions, reference], [n_prompt] * 2)
    mask = torch.ones_like(ids)
    with steering.during(positions_of(mask)):
        logits = loaded.model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=n_tokens).logits
    found = []
    for part in logits.split(CHUNK, dim=1):
        steered, plain = part.float().log_softmax(-1)
        found.append((steered.exp() * (steered - plain)).sum(-1))
    return torch.cat(found).clamp(min=0).cpu().numpy()
