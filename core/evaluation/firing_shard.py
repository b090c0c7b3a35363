"""One shard of a firing run: conversations through the fine-tuned model -> plain arrays. Knows no file format.

A component's scalar is read . x at its module's input. Statistics run over response tokens that are no attention sinks
at the component's layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from core.analysis.lora import Component
from core.conversations import Conversation, TokenizedConversation, tokenize
from core.model.batches import each_batch, outliers, pad, pad_id
from core.model.hooks import changing, resid_post
from core.model.loading import LoadedModel
from core.model.norms import block_norms, norm_epsilon
from core.store.firing_writer import FiringHead
from core.store.layout import to_float16


@dataclass(frozen=True, eq=False)
class Tap:
    """One module that the adapter changes, and what is read at it."""

    module: nn.Module
    layer: int
    at: slice
    """Its components among all."""
    read: Tensor = field(repr=False)
    """float32 [k, d_in]"""
    writing: slice | None
    """Its components among those that write into the residual stream."""
    epsilon: float | None
    """Of the norm that its output goes through on the way into the residual stream; None without one."""


@dataclass(eq=False)
class Sums:
    """What the batches of a shard add up to; rows and tokens count within the shard."""

    scalars: np.ndarray
    mean: np.ndarray
    written: np.ndarray | None
    square: np.ndarray
    output_square: np.ndarray
    n_tokens_by_layer: np.ndarray
    n_masked: np.ndarray
    sum_norm: np.ndarray


def make_taps(loaded: LoadedModel, parts: Sequence[Component], head: FiringHead) -> list[Tap]:
    """What is read at each module that the adapter changes, in the order of the head's modules."""
    found = []
    places = list(zip(head.layer.tolist(), head.module, strict=True))
    for layer, name in head.modules:
        at = [i for i, place in enumerate(places) if place == (layer, name)]
        own = slice(at[0], at[-1] + 1)
        writing, epsilon = None, None
        if parts[at[0]].writes_residual:
            first = int(np.searchsorted(head.writing, at[0]))
            writing = slice(first, first + len(at))
            norms = block_norms(loaded, layer)
            after = norms.after_mlp if parts[at[0]].key.kind == "down_proj" else norms.after_attention
            epsilon = None if after is None else norm_epsilon(after)
        read = torch.from_numpy(np.array([parts[i].read for i in at])).float().to(loaded.device)
        found.append(Tap(loaded.blocks[layer].get_submodule(name), layer, own, read, writing, epsilon))
    return found


def read_shard(
    loaded: LoadedModel,
    taps: Sequence[Tap],
    head: FiringHead,
    rows: Sequence[Conversation],
    groups: Sequence[int],
    batch_tokens: int,
    on_batch: Callable[[int], None] = lambda n_tokens: None,
) -> dict[str, np.ndarray]:
    """Run `rows` through the model once, the adapter applied, and return the shard's arrays."""
    items = [tokenize(loaded.tokenizer, c) for c in rows]
    starts = np.concatenate([[0], np.cumsum([item.end - item.start for item in items])])
    c, n_layers, n_groups = len(head.layer), len(head.layers), len(head.groups)
    sums = Sums(
        scalars=np.full((int(starts[-1]), c), np.nan, dtype=np.float16),
        mean=np.full((len(items), c), np.nan, dtype=np.float32),
        written=np.full((len(items), len(head.writing)), np.nan, dtype=np.float32)
        if any(t.epsilon is not None for t in taps) else None,
        square=np.zeros((n_groups, c)),
        output_square=np.zeros((n_groups, len(head.modules))),
        n_tokens_by_layer=np.zeros((n_groups, n_layers), dtype=np.int64),
        n_masked=np.zeros((n_groups, n_layers), dtype=np.int64),
        sum_norm=np.zeros((n_groups, n_layers)),
    )  # fmt: skip
    each_batch(items, batch_tokens, lambda batch: _read_batch(loaded, taps, head, items, groups, batch, starts, sums),
               on_batch)
    return {
        "ids": np.concatenate([item.ids for item in items]).astype(np.int32),
        "roles": np.concatenate([item.roles for item in items]).astype(np.uint8),
        "n_tokens": np.array([len(item) for item in items], dtype=np.int64),
        "n_response_tokens": np.diff(starts).astype(np.int64),
        **{name: value for name, value in vars(sums).items() if value is not None},
    }


def _read_batch(
    loaded: LoadedModel,
    taps: Sequence[Tap],
    head: FiringHead,
    items: Sequence[TokenizedConversation],
    groups: Sequence[int],
    batch: Sequence[int],
    starts: np.ndarray,
    sums: Sums,
) -> None:
    ids, mask = pad([items[i].ids for i in batch], pad_id(loaded.tokenizer), loaded.device)
    row = torch.cat([torch.full((items[i].end - items[i].start,), n) for n, i in enumerate(batch)])
    column = torch.cat([torch.arange(items[i].start, items[i].end) for i in batch])
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(n: int) -> Callable[[Tensor, Tensor], Tensor]:
        def tap(x: Tensor, output: Tensor) -> Tensor:
            scalars = x[row, column].float() @ taps[n].read.T
            seen[n] = scalars.cpu(), output[row, column].float().square().sum(-1).cpu()
            return output

        return tap

    with changing([(t.module, keep(n)) for n, t in enumerate(taps)]):  # after the adapter's own, so it is in the output
        resid = resid_post(loaded, ids, mask, head.layers)
    kept = {layer: (~outliers(x, mask)[row.to(x.device), column.to(x.device)]).cpu() for layer, x in resid.items()}
    norms = {layer: torch.linalg.vector_norm(x[row, column].float(), dim=-1).cpu() for layer, x in resid.items()}
    # only now is anything added: a batch that ran out of memory left no trace
    index = np.asarray(batch)
    token = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in batch])
    group = np.asarray(groups)[index][row.numpy()]
    for n, layer in enumerate(head.layers):
        counted = kept[layer].numpy()
        np.add.at(sums.n_tokens_by_layer[:, n], group[counted], 1)
        np.add.at(sums.n_masked[:, n], group[~counted], 1)
        np.add.at(sums.sum_norm[:, n], group[counted], norms[layer].double().numpy()[counted])
    for n, tap in enumerate(taps):
        scalars, square = (t.double().numpy() for t in seen[n])
        counted = kept[tap.layer].numpy()
        sums.scalars[token[counted], tap.at] = to_float16(scalars[counted].astype(np.float32))
        sums.mean[index, tap.at] = _means(scalars, row.numpy(), counted, len(batch))
        np.add.at(sums.square[:, tap.at], group[counted], scalars[counted] ** 2)
        np.add.at(sums.output_square[:, n], group[counted], square[counted])
        if tap.writing is not None and sums.written is not None:
            scale = 1.0
            if tap.epsilon is not None:
                scale = np.sqrt(square / tap.module.out_features + tap.epsilon)[:, None]
            sums.written[index, tap.writing] = _means(scalars / scale, row.numpy(), counted, len(batch))


def _means(values: np.ndarray, row: np.ndarray, counted: np.ndarray, n_rows: int) -> np.ndarray:
    """float64 [n_rows, k]: mean of the counted values [tokens, k] of each row; NaN where none is counted."""
    total = np.zeros((n_rows, values.shape[1]))
    np.add.at(total, row[counted], values[counted])
    number = np.bincount(row[counted], minlength=n_rows)[:, None]
    return np.divide(total, number, out=np.full_like(total, np.nan), where=number > 0)
