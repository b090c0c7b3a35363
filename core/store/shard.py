"""One shard: some conversations through the model and its SAEs -> plain arrays. Knows no file format.

Statistics run over response tokens that are no attention sinks. Feature activations are never held dense beyond one
encoding chunk (see model/saes.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from core.conversations import TokenizedConversation
from core.model.batches import each_batch, outliers, pad, pad_id
from core.model.hooks import resid_post
from core.model.loading import LoadedModel
from core.model.saes import LoadedSae, SparseActs, encode_sparse
from core.store import layout

#: Every n-th response token is reconstructed, to measure the fraction of variance unexplained.
HEALTH_STRIDE = 8

Arrays = dict[str, np.ndarray]


@dataclass
class LayerParts:
    """What the batches of a shard add up to at one layer; rows and tokens count within the shard."""

    resid_response: np.ndarray
    resid_last_prompt: np.ndarray
    key: list[np.ndarray] = field(default_factory=list)
    """row * d_sae + feature, of each feature active in a response"""
    stats: list[np.ndarray] = field(default_factory=list)
    """float32 [3 + 1, n]: mean, max, frac_active, token index of the peak within the response"""
    last_key: list[np.ndarray] = field(default_factory=list)
    last_value: list[np.ndarray] = field(default_factory=list)
    token: list[np.ndarray] = field(default_factory=list)
    """index of the response token within the shard, of each single activation"""
    feature: list[np.ndarray] = field(default_factory=list)
    value: list[np.ndarray] = field(default_factory=list)
    health: dict[str, float] = field(default_factory=dict)
    sum_x: np.ndarray | None = None

    def count(self, **values: float) -> None:
        for name, value in values.items():
            self.health[name] = self.health.get(name, 0.0) + value


def response_statistics(acts: SparseActs, row: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per-response statistics of sparse activations, without a dense [response, d_sae] tensor.

    row: int64 [n_tokens], response of each token, ascending; counts: int64 [n_responses], tokens in each.
    Returns key int64 [n] (row * d_sae + feature, ascending), stats float64 [3, n] (mean over all of the response's
    tokens, max, share of its tokens active) and peak int64 [n], the first token index that reaches the max.
    """
    key = row[acts.token] * acts.d_sae + acts.feature
    order = torch.argsort(key, stable=True)
    unique, lengths = torch.unique_consecutive(key[order], return_counts=True)
    value = acts.value[order].double()
    total = counts[unique // acts.d_sae].clamp(min=1).double()
    mean = torch.segment_reduce(value, "sum", lengths=lengths) / total
    top = torch.segment_reduce(value, "max", lengths=lengths)
    reaches = value == torch.repeat_interleave(top, lengths)
    token = torch.where(reaches, acts.token[order].double(), torch.inf)
    peak = torch.segment_reduce(token, "min", lengths=lengths).long()
    return unique, torch.stack([mean, top, lengths.double() / total]), peak


def read_shard(
    loaded: LoadedModel,
    saes: Mapping[int, LoadedSae],
    layers: Sequence[int],
    items: Sequence[TokenizedConversation],
    conditions: Sequence[int],
    letters: np.ndarray,
    batch_tokens: int,
    on_batch: Callable[[int], None] = lambda n_tokens: None,
) -> Arrays:
    """Run `items` through the model once and return the shard's arrays, named `{layer}/{array}`.

    conditions: index of each item's condition; letters: bool [vocabulary], whether a token has a letter.
    Out of memory halves the batch and goes on; raises `ModelError` when one conversation alone does not fit.
    """
    starts = np.concatenate([[0], np.cumsum([item.end - item.start for item in items])])
    parts = {
        layer: LayerParts(*(np.zeros((len(items), loaded.d_model), dtype=np.float32) for _ in range(2)))
        for layer in layers
    }

    def read(batch: Sequence[int]) -> None:
        _read_batch(loaded, saes, layers, items, batch, starts, letters, parts)

    each_batch(items, batch_tokens, read, on_batch)
    arrays: Arrays = {
        "ids": np.concatenate([item.ids for item in items]).astype(np.int32),
        "roles": np.concatenate([item.roles for item in items]).astype(np.uint8),
        "n_tokens": np.array([len(item) for item in items], dtype=np.int64),
        "n_response_tokens": np.diff(starts).astype(np.int64),
    }
    for layer in layers:
        sae = saes.get(layer)
        found = _finish_layer(parts[layer], items, starts, np.asarray(conditions), letters, sae and sae.d_sae)
        arrays.update({f"{layer}/{name}": values for name, values in found.items()})
    return arrays


def _read_batch(
    loaded: LoadedModel,
    saes: Mapping[int, LoadedSae],
    layers: Sequence[int],
    items: Sequence[TokenizedConversation],
    batch: Sequence[int],
    starts: np.ndarray,
    letters: np.ndarray,
    parts: Mapping[int, LayerParts],
) -> None:
    ids, mask = pad([items[i].ids for i in batch], pad_id(loaded.tokenizer), loaded.device)
    resid = resid_post(loaded, ids, mask, layers)
    row = torch.cat([torch.full((items[i].end - items[i].start,), n) for n, i in enumerate(batch)])
    column = torch.cat([torch.arange(items[i].start, items[i].end) for i in batch])
    token = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in batch])
    last = torch.tensor([items[i].last_prompt for i in batch])
    index = np.asarray(batch)
    results = []
    for layer in layers:
        x = resid[layer]
        kept = (~outliers(x, mask)[row, column]).cpu()
        response = x[row[kept], column[kept]].float()
        last_prompt = x[torch.arange(len(batch)), last].float()
        results.append(_encode(saes.get(layer), response, last_prompt, row[kept], len(batch), len(kept)))
        results[-1]["token"] = token[kept.numpy()]
    for layer, result in zip(layers, results, strict=True):  # only now: a batch that ran out of memory left no trace
        _collect(parts[layer], saes.get(layer), index, result)


def _encode(
    sae: LoadedSae | None, response: Tensor, last_prompt: Tensor, row: Tensor, n_rows: int, n_tokens: int
) -> dict:
    counts = torch.bincount(row, minlength=n_rows)
    precise = _precise(response)
    sums = torch.segment_reduce(precise, "sum", lengths=counts.to(precise.device), axis=0, initial=0)
    result = {
        "resid_response": (sums.cpu() / counts.clamp(min=1)[:, None]).float().numpy(),
        "resid_last_prompt": last_prompt.cpu().numpy(),
        "health": {
            "n_tokens": len(response),
            "n_masked": n_tokens - len(response),
            "sum_norm": float(torch.linalg.vector_norm(precise, dim=1).sum()),
        },
    }
    if sae is None:
        return result
    acts = encode_sparse(sae.sae, response)
    where = precise.device
    acts = SparseActs(*(t.to(where) for t in (acts.token, acts.feature, acts.value)), acts.n_tokens, acts.d_sae)
    key, stats, peak = response_statistics(acts, row.to(where), counts.to(where))
    at_last = encode_sparse(sae.sae, last_prompt)
    sample = response[::HEALTH_STRIDE]
    with torch.inference_mode():
        error = _precise(sample - sae.sae(sample)).square().sum()
    sample = _precise(sample)
    result["health"] |= {
        "n_active": len(acts.value),
        "n_sample": len(sample),
        "sum_error": float(error),
        "sum_square": float(sample.square().sum()),
    }
    return result | {
        "sum_x": sample.sum(0).cpu().numpy(),
        "key": key.cpu().numpy(),
        "stats": stats.cpu().numpy(),
        "peak": peak.cpu().numpy(),
        "act_token": acts.token.cpu().numpy(),
        "act_feature": acts.feature.cpu().numpy(),
        "act_value": acts.value.cpu().numpy(),
        "last_row": at_last.token.cpu().numpy(),
        "last_feature": at_last.feature.cpu().numpy(),
        "last_value": at_last.value.cpu().numpy(),
    }


def _precise(x: Tensor) -> Tensor:
    """float64, on the CPU where the device has none (Apple's MPS)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def _collect(part: LayerParts, sae: LoadedSae | None, index: np.ndarray, result: dict) -> None:
    """Add one batch's result, its rows renumbered to the shard's."""
    part.resid_response[index] = result["resid_response"]
    part.resid_last_prompt[index] = result["resid_last_prompt"]
    part.count(**result["health"])
    if sae is None:
        return
    part.sum_x = result["sum_x"] + (0 if part.sum_x is None else part.sum_x)
    token = result["token"]
    part.key.append(index[result["key"] // sae.d_sae] * sae.d_sae + result["key"] % sae.d_sae)
    part.stats.append(np.vstack([result["stats"], token[result["peak"]]]))
    part.last_key.append(index[result["last_row"]] * sae.d_sae + result["last_feature"])
    part.last_value.append(result["last_value"])
    part.token.append(token[result["act_token"]])
    part.feature.append(result["act_feature"])
    part.value.append(result["act_value"])


def _finish_layer(
    part: LayerParts,
    items: Sequence[TokenizedConversation],
    starts: np.ndarray,
    conditions: np.ndarray,
    letters: np.ndarray,
    d_sae: int | None,
) -> Arrays:
    arrays: Arrays = {
        "resid_response": part.resid_response,
        "resid_last_prompt": part.resid_last_prompt,
        "health": np.array([part.health.get(name, 0.0) for name in HEALTH_SUMS]),
    }
    if d_sae is None:
        return arrays
    n = len(items)
    key, stats = np.concatenate(part.key), np.concatenate(part.stats, axis=1)
    order = np.argsort(key, kind="stable")
    row, feature, stats = key[order] // d_sae, key[order] % d_sae, stats[:, order]
    last_key, last_value = np.concatenate(part.last_key), np.concatenate(part.last_value)
    last_order = np.argsort(last_key, kind="stable")
    token, single = np.concatenate(part.token), np.concatenate(part.feature)
    value = np.concatenate(part.value)
    response_ids = np.concatenate([item.ids[item.start : item.end] for item in items])
    index_dtype = layout.index_dtype(d_sae)
    arrays |= {
        "response_counts": np.bincount(row, minlength=n),
        "response_indices": feature.astype(index_dtype),
        **{name: layout.to_float16(stats[i]) for i, name in enumerate(layout.RESPONSE_STATISTICS)},
        "last_prompt_counts": np.bincount(last_key // d_sae, minlength=n),
        "last_prompt_indices": (last_key[last_order] % d_sae).astype(index_dtype),
        "last_prompt_value": layout.to_float16(last_value[last_order]),
        "sum_x": part.sum_x,
        "mass": np.bincount(single, weights=value, minlength=d_sae),
        "letter_mass": np.bincount(single, weights=value * letters[response_ids[token]], minlength=d_sae),
        "n_active": np.bincount(single, minlength=d_sae),
        "max_act": _max_by_feature(feature, stats[1], d_sae),
    }
    keep = strongest(conditions[row], feature, stats[1], row)
    peak_token = stats[3, keep].astype(np.int64)
    offsets = np.array([item.start for item in items], dtype=np.int64)
    arrays |= {
        "context_condition": conditions[row[keep]].astype(np.uint8),
        "context_feature": feature[keep].astype(np.int64),
        "context_value": stats[1, keep].astype(np.float32),
        "context_row": row[keep].astype(np.int64),
        "context_peak": peak_token - starts[row[keep]] + offsets[row[keep]],
        "context_acts": _windows(feature[keep], peak_token, starts, row[keep], token, single, value),
    }
    return arrays


#: Order of the sums in a shard's `health` array.
HEALTH_SUMS = ("n_tokens", "n_masked", "sum_norm", "n_active", "n_sample", "sum_error", "sum_square")


def _max_by_feature(feature: np.ndarray, top: np.ndarray, d_sae: int) -> np.ndarray:
    found = np.zeros(d_sae)
    np.maximum.at(found, feature, top)
    return found


def strongest(
    condition: np.ndarray, feature: np.ndarray, value: np.ndarray, row: np.ndarray, kept: int = layout.CONTEXTS_KEPT
) -> np.ndarray:
    """Indices of the `kept` strongest of each (feature, condition), sorted so; ties go to the earlier conversation."""
    order = np.lexsort((row, -value, condition, feature))
    group = feature[order].astype(np.int64) * 256 + condition[order]
    first = np.flatnonzero(np.r_[True, group[1:] != group[:-1]]) if len(group) else np.empty(0, dtype=np.int64)
    rank = np.arange(len(group)) - np.repeat(first, np.diff(np.r_[first, len(group)]))
    return order[rank < kept]


def _windows(
    feature: np.ndarray,
    peak: np.ndarray,
    starts: np.ndarray,
    row: np.ndarray,
    token: np.ndarray,
    single: np.ndarray,
    value: np.ndarray,
) -> np.ndarray:
    """Activations of one feature around each peak, float16 [n, window]; 0 outside the response."""
    n_tokens = int(starts[-1])
    keys = single.astype(np.int64) * n_tokens + token
    order = np.argsort(keys)
    keys, value = keys[order], value[order]
    position = peak[:, None] + np.arange(-layout.WINDOW_BEFORE, layout.WINDOW_AFTER + 1)
    inside = (position >= starts[row][:, None]) & (position < starts[row + 1][:, None])
    wanted = feature[:, None].astype(np.int64) * n_tokens + position
    if not len(keys):
        return np.zeros(position.shape, dtype=np.float16)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return layout.to_float16(np.where(inside & (keys[at] == wanted), value[at], 0.0))
