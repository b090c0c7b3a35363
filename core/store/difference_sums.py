"""Sums of an activation difference lens over texts: what is left out as an attention sink, what a mean is taken over.

Arithmetic alone; knows no model, no texts and no file.

Attention sinks are left out: a token whose norm, read by either variant, exceeds OUTLIER_FACTOR times the median norm
of base at that layer over all texts and all token positions but the very first (which is itself the usual sink, so a
median within five tokens would be a poor measure). A position where that leaves fewer than half of the texts is left
out whole at that layer, as what remains would be a selection.

Where the tokenizer adds a BOS, that one is the usual sink, and it is no position here. Where it adds none (SmolLM2,
Qwen), the text's first token is: it stays position 1, measured wherever it is not a sink, but takes no part in the mean
over positions, which would otherwise be of other tokens at some layers than at others (in SmolLM2-135M its norm is 9
times the median at layer 2, 1 at layer 9, 152 at layer 11, 7 at layer 29).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.model.batches import OUTLIER_FACTOR


@dataclass(frozen=True)
class Means:
    """Of one variant; the fields of `DifferenceLens` with these names, and base's mean residual."""

    difference: np.ndarray
    base: np.ndarray
    """float32 [n_layers, k + 1, d_model]; NaN where no text was counted, as in all of these."""
    resid_norm: np.ndarray
    consistency: np.ndarray
    split_half: np.ndarray
    n_counted: np.ndarray


@dataclass
class Sums:
    """Running sums over texts, apart for even and odd texts (first axis, the two halves); place 0 is the mean over
    positions."""

    difference: np.ndarray
    """float64 [2, n_layers, k + 1, d_model]"""
    unit: np.ndarray
    """float64 [2, n_layers, k + 1, d_model]: differences at unit norm."""
    base: np.ndarray
    """float64 [n_layers, k + 1, d_model]"""
    norm: np.ndarray
    """float64 [n_layers, k + 1]: norms of base's residual."""
    count: np.ndarray
    """int64 [2, n_layers, k + 1]"""

    @classmethod
    def zeros(cls, n_layers: int, places: int, d_model: int) -> Sums:
        whole, both = (n_layers, places, d_model), (2, n_layers, places, d_model)
        return cls(np.zeros(both), np.zeros(both), np.zeros(whole), np.zeros(whole[:2]), np.zeros(both[:3], np.int64))

    def add(self, layer: int, start: int, base: Tensor, tuned: Tensor, median: float, mean_from: int) -> None:
        """Add a batch at one layer: `base` and `tuned` are [batch, k, d_model], the batch's first text is `start`."""
        base, tuned = base.float(), tuned.float()
        norm = torch.linalg.vector_norm(base, dim=-1)
        largest = torch.maximum(norm, torch.linalg.vector_norm(tuned, dim=-1))
        keep = largest <= OUTLIER_FACTOR * median  # [batch, k]
        changed, base, norm = (_with_mean(x, keep, mean_from) for x in (tuned - base, base, norm[..., None]))
        unit = torch.nn.functional.normalize(changed, dim=-1)
        whole = keep[:, mean_from - 1 :].any(1, keepdim=True)
        counted = torch.cat([whole, keep], dim=1).cpu().numpy()  # [batch, k + 1]
        changed, unit, base, norm = (x.double().numpy() for x in (changed.cpu(), unit.cpu(), base.cpu(), norm.cpu()))
        odd = np.arange(start, start + len(counted)) % 2 == 1
        for half, rows in enumerate((~odd, odd)):
            self.difference[half, layer] += changed[rows].sum(0)
            self.unit[half, layer] += unit[rows].sum(0)
            self.count[half, layer] += counted[rows].sum(0)
        self.base[layer] += base.sum(0)
        self.norm[layer] += norm.sum(0)[:, 0]

    def means(self, n_texts: int) -> Means:
        """What was summed over `n_texts` texts, as means; places with fewer than half of them are left out."""
        n = self.count.sum(0)  # [n_layers, k + 1]
        n[2 * n < n_texts] = 0
        with np.errstate(invalid="ignore", divide="ignore"):
            weight = np.where(n > 0, 1 / n, np.nan)  # NaN stays NaN in all that is made with it
            halves = self.difference * (weight > 0)[..., None]
            return Means(
                difference=(halves.sum(0) * weight[..., None]).astype(np.float32),
                base=(self.base * weight[..., None]).astype(np.float32),
                resid_norm=(self.norm * weight).astype(np.float32),
                consistency=(self._agreement() * weight).astype(np.float32),
                split_half=(_cosine(*halves)).astype(np.float32),
                n_counted=n.astype(np.int32),
            )

    def _agreement(self) -> np.ndarray:
        """Sum of the cosines of each text's difference with the mean of the half it is not in; noise alone gives 0.

        The mean of cosines with one vector is the mean unit difference dotted with that vector's unit.
        """
        size = np.linalg.norm(self.difference, axis=-1)
        return sum((self.unit[own] * self.difference[1 - own]).sum(-1) / size[1 - own] for own in (0, 1))


def _with_mean(values: Tensor, keep: Tensor, mean_from: int) -> Tensor:
    """[batch, k, d] -> [batch, k + 1, d]: before the positions, their mean over the kept ones from `mean_from` on; what
    is not kept becomes 0."""
    kept = values * keep[..., None]
    taken = slice(mean_from - 1, None)
    mean = kept[:, taken].sum(1, keepdim=True) / keep[:, taken].sum(1).clamp(min=1)[:, None, None]
    return torch.cat([mean, kept], dim=1)


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Over the last axis; NaN where one of the two is 0."""
    size = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.where(size > 0, (a * b).sum(-1) / size, np.nan)
