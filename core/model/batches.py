"""Tokenized conversations -> right-padded batches of similar length, and which tokens are attention sinks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from core.conversations import TokenizedConversation
from core.errors import ModelError

#: A token is masked as an attention sink when its residual norm exceeds this multiple of its conversation's median.
OUTLIER_FACTOR = 10.0


def plan_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices grouped longest first, so that rows x longest stays within `budget` tokens (one row always fits)."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for index in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def each_batch(
    items: Sequence[TokenizedConversation],
    budget: int,
    read: Callable[[Sequence[int]], None],
    on_batch: Callable[[int], None] = lambda n_tokens: None,
) -> None:
    """Call `read` with the indices of each batch of `items`, and `on_batch` with its number of tokens.

    Out of memory halves the batch and goes on, so `read` must leave no trace when it fails; raises `ModelError` when
    one conversation alone does not fit.
    """
    queue = plan_batches([len(item) for item in items], budget)[::-1]
    while queue:
        batch = queue.pop()
        try:
            read(batch)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            if len(batch) == 1:
                raise ModelError(
                    f"Conversation {items[batch[0]].conversation.id!r} ({len(items[batch[0]])} tokens) does not fit "
                    "into memory on its own; shorten it, or use another --device or --dtype."
                ) from None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            queue += [batch[len(batch) // 2 :], batch[: len(batch) // 2]]
            continue
        on_batch(sum(len(items[i]) for i in batch))


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(
        text in str(error).lower() for text in ("can't allocate memory", "not enough memory", "out of memory")
    )


def pad(rows: Sequence[np.ndarray], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ids and mask, both int64 [batch, position]."""
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for n, row in enumerate(rows):
        ids[n, : len(row)] = row
        mask[n, : len(row)] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def pad_id(tokenizer: object) -> int:
    """Some token id to pad with; padding is masked, so any will do."""
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if value is not None:
            return int(value)
    return 0


def outliers(resid: Tensor, mask: Tensor) -> Tensor:
    """Attention sinks: bool [batch, position], where the norm exceeds 10x the median of its own conversation.

    resid: [batch, position, d_model]; mask: [batch, position], 1 at real tokens. Padding is never an outlier.
    The median is taken within the conversation, so the answer does not depend on what else is in the batch.
    """
    norms = torch.linalg.vector_norm(resid.float(), dim=-1)
    median = norms.masked_fill(mask == 0, torch.nan).nanmedian(dim=1, keepdim=True).values
    return (norms > OUTLIER_FACTOR * median) & (mask != 0)
