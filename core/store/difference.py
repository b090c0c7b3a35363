"""Activation difference lens: mean residual difference, variant minus base, on the first tokens of unrelated text.

The baseline that needs no SAE (Minder et al. 2510.13900): what a narrow fine-tune learnt shows on text that has
nothing to do with it. Every layer's resid_post in one pass; the logit lens of the mean difference and of base's own
mean residual; cosines with decoder directions where there are SAEs. Does not know the file's form
(difference_file.py) nor how sums are kept and sinks left out (difference_sums.py), and does not steer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from core.conversations import token_texts
from core.errors import NotEnoughData
from core.model.adapters import Adapter, applied
from core.model.batches import OUTLIER_FACTOR
from core.model.hooks import resid_post
from core.model.loading import LoadedModel
from core.model.saes import LoadedSae
from core.store.difference_file import (
    FEATURES_KEPT,
    TOKENS_KEPT,
    DifferenceLens,
    SaeStamp,
    check_spec,
    read_difference,
    write_difference,
)
from core.store.difference_sums import Sums
from core.store.extract import vector_lens

#: Tokens read of each text.
K = 5

#: Texts in one batch; all have the same few tokens, so nothing is padded.
BATCH = 64


@dataclass(frozen=True)
class FirstTokens:
    """What is read: the same number of tokens of every text."""

    rows: list[list[int]]
    """[n_texts][n_prefix + k] token ids."""
    n_prefix: int
    """Tokens that the tokenizer puts before a text (BOS)."""
    n_short: int
    """Texts left out because they have fewer than k tokens."""
    k: int

    @property
    def mean_from(self) -> int:
        """The first position (counted from 1) that the mean over positions takes in."""
        return 1 if self.n_prefix or self.k == 1 else 2


def first_tokens(tokenizer: Any, texts: Sequence[str], k: int) -> FirstTokens:
    """The first `k` tokens of each text behind what the tokenizer puts before it.

    Raises `NotEnoughData` below four texts of `k` tokens: halves of one text have no mean to speak of.
    """
    rows, n_prefix, n_short = [], 0, 0
    for text in texts:
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = tokenizer(text)["input_ids"]
        n_prefix = next(n for n in range(len(whole) + 1) if whole[n : n + len(plain)] == plain)
        if len(plain) < k:
            n_short += 1
        else:
            rows.append(whole[: n_prefix + k])
    if len(rows) < 4:
        raise NotEnoughData(f"{len(rows)} texts have {k} tokens or more; a difference lens needs at least 4.")
    return FirstTokens(rows, n_prefix, n_short, k)


def make_spec(
    loaded: LoadedModel, adapter: Adapter, tokens: FirstTokens, saes: dict[str, str] | None = None
) -> dict[str, Any]:
    """Everything that decides a file's numbers, as JSON; without `saes` (layer -> hash), what is known beforehand."""
    known = {
        "model": loaded.spec.id,
        "weights": loaded.weights_hash,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "variant": adapter.name,
        "adapter": adapter.hash,
        "texts_hash": hashlib.sha256(json.dumps(tokens.rows).encode()).hexdigest(),
        "k": tokens.k,
        "mean_from": tokens.mean_from,
        "outlier_factor": OUTLIER_FACTOR,
        "device": loaded.device.type,
    }
    return known if saes is None else {**known, "saes": saes}


def make_difference(
    loaded: LoadedModel,
    adapter: Adapter,
    texts: Sequence[str],
    path: Path,
    *,
    k: int = K,
    saes: Iterable[LoadedSae] = (),
) -> DifferenceLens:
    """Compute the lens and write it to `path`, over a file of the same spec.

    Raises `CacheMismatch` when the file there is of another spec (before anything is computed, but for a change of
    SAEs), `CacheError` when it is damaged, `NotEnoughData` as `difference_lens`.
    """
    if path.is_file():
        read_difference(path, make_spec(loaded, adapter, first_tokens(loaded.tokenizer, texts, k)))
    lens = difference_lens(loaded, adapter, texts, k=k, saes=saes)
    if path.is_file():
        check_spec(path, lens.spec, read_difference(path).spec)
    write_difference(path, lens)
    return lens


@torch.inference_mode()
def difference_lens(
    loaded: LoadedModel, adapter: Adapter, texts: Sequence[str], *, k: int = K, saes: Iterable[LoadedSae] = ()
) -> DifferenceLens:
    """The lens of one variant on the first `k` tokens of each text; `saes` are taken up one by one.

    Memory does not grow with the number of texts (three short passes: base's norms, then base and variant side by
    side). Raises `NotEnoughData` as `first_tokens`.
    """
    tokens = first_tokens(loaded.tokenizer, texts, k)
    rows, own = tokens.rows, slice(tokens.n_prefix, None)
    medians = median_norms(loaded, rows)
    sums = Sums.zeros(loaded.n_layers, k + 1, loaded.d_model)
    for start in range(0, len(rows), BATCH):
        base = _read(loaded, rows[start : start + BATCH])
        with applied(loaded, adapter):
            tuned = _read(loaded, rows[start : start + BATCH])
        for layer in range(loaded.n_layers):
            sums.add(layer, start, base[layer][:, own], tuned[layer][:, own], float(medians[layer]), tokens.mean_from)
    return _finish(loaded, adapter, tokens, sums, saes)


def median_norms(loaded: LoadedModel, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """float64 [n_layers]: median norm of base's residual over all texts and positions but the very first."""
    norms: list[list[Tensor]] = [[] for _ in range(loaded.n_layers)]
    for start in range(0, len(rows), BATCH):
        for layer, resid in _read(loaded, rows[start : start + BATCH]).items():
            norms[layer].append(torch.linalg.vector_norm(resid.float(), dim=-1).cpu())
    first = 1 if len(rows[0]) > 1 else 0
    return np.array([np.median(torch.cat(of_layer)[:, first:].numpy()) for of_layer in norms])


def _read(loaded: LoadedModel, rows: Sequence[Sequence[int]]) -> dict[int, Tensor]:
    """resid_post [batch, position, d_model] of every layer; all rows are of one length."""
    ids = torch.tensor(rows, dtype=torch.int64, device=loaded.device)
    return resid_post(loaded, ids, torch.ones_like(ids), range(loaded.n_layers))


def _finish(
    loaded: LoadedModel,
    adapter: Adapter,
    tokens: FirstTokens,
    sums: Sums,
    saes: Iterable[LoadedSae],
) -> DifferenceLens:
    means = sums.means(len(tokens.rows))
    difference, n = means.difference, means.n_counted
    differs = np.linalg.norm(np.nan_to_num(difference), axis=-1) > 0
    promoted, suppressed = _lens(loaded, difference, differs)
    base_promoted, _ = _lens(loaded, means.base, n > 0)
    used = sorted({int(i) for ids in (promoted, suppressed, base_promoted) for i in np.unique(ids)} - {-1})
    features, stamps, hashes = _features(difference[:, 0], differs[:, 0], saes)
    return DifferenceLens(
        spec=make_spec(loaded, adapter, tokens, hashes),
        n_texts=len(tokens.rows),
        n_short=tokens.n_short,
        difference=difference,
        resid_norm=means.resid_norm,
        consistency=means.consistency,
        split_half=means.split_half,
        n_counted=n,
        promoted=promoted,
        suppressed=suppressed,
        base_promoted=base_promoted,
        token_texts=dict(zip(used, token_texts(loaded.tokenizer, used), strict=True)),
        features=features,
        saes=stamps,
    )


def _lens(loaded: LoadedModel, vectors: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Most promoted and most suppressed token ids, int32 [n_layers, k + 1, TOKENS_KEPT]; -1 where not `wanted`."""
    found = tuple(np.full((*wanted.shape, TOKENS_KEPT), -1, dtype=np.int32) for _ in range(2))
    if wanted.any():
        for side, ids in zip(found, vector_lens(loaded, torch.from_numpy(vectors[wanted]), TOKENS_KEPT), strict=True):
            side[wanted] = ids
    return found


def _features(
    difference: np.ndarray, differs: np.ndarray, saes: Iterable[LoadedSae]
) -> tuple[pl.DataFrame, dict[int, SaeStamp], dict[str, str]]:
    """Features by cosine of their decoder direction with the layer's mean difference, a layer's SAE at a time."""
    tables, stamps, hashes = [], {}, {}
    for sae in saes:
        stamps[sae.layer] = SaeStamp(sae.spec.release, sae.spec.sae_id, sae.d_sae)
        hashes[str(sae.layer)] = sae.hash
        if not differs[sae.layer]:
            continue
        decoder = sae.sae.W_dec.float()
        wanted = torch.nn.functional.normalize(torch.from_numpy(difference[sae.layer]).to(decoder.device), dim=0)
        cosine = decoder @ wanted / torch.linalg.vector_norm(decoder, dim=1).clamp(min=1e-12)
        kept = min(FEATURES_KEPT, sae.d_sae // 2)
        found = [cosine.topk(kept, largest=largest) for largest in (True, False)]
        tables.append(pl.DataFrame({
            "layer": np.full(2 * kept, sae.layer, dtype=np.int32),
            "feature": torch.cat([side.indices for side in found]).int().cpu().numpy(),
            "cosine": torch.cat([side.values for side in found]).float().cpu().numpy(),
        }))  # fmt: skip
    empty = pl.DataFrame(schema={"layer": pl.Int32, "feature": pl.Int32, "cosine": pl.Float32})
    return pl.concat([empty, *tables]), stamps, hashes
