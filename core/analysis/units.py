"""From responses to the independent units of a contrast: prompts, paired where both sides share them.

Averages several responses of one prompt, drops what has no partner, matches lengths when asked, and says in plain
sentences what it dropped. It does not know any statistic.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from scipy import sparse

from core.errors import CacheError, NotEnoughData, SaeMismatch

Pairing = Literal["auto", "paired", "unpaired"]

#: Share of the smaller side's prompts that must be on both sides for prompts to be paired.
MIN_SHARED_SHARE = 0.5


@dataclass(frozen=True)
class Sample:
    """One side of a contrast at one layer and position; a row is a response."""

    name: str
    acts: sparse.csr_array = field(repr=False)
    """float32 [n_responses, d_sae], >= 0: mean over the response's tokens, or the value at the last prompt token."""
    prompt_ids: np.ndarray = field(repr=False)
    """str [n_responses]"""
    lengths: np.ndarray = field(repr=False)
    """int [n_responses]: response tokens."""

    def __post_init__(self) -> None:
        acts = sparse.csr_array(self.acts)
        if not acts.has_canonical_format or (acts.nnz and not acts.data.all()):
            acts = acts.copy()
            acts.sum_duplicates()
            acts.eliminate_zeros()
        if acts.nnz and not (np.isfinite(acts.data).all() and acts.data.min() >= 0):
            at = int(np.flatnonzero(~np.isfinite(acts.data) | (acts.data < 0))[0])
            row = int(np.searchsorted(acts.indptr, at, side="right")) - 1
            raise CacheError(
                f"{self.name}: response {row}, feature {acts.indices[at]} has activation {acts.data[at]}, "
                "not a finite number >= 0; extract this file again."
            )
        prompt_ids, lengths = np.asarray(self.prompt_ids).astype(str), np.asarray(self.lengths)
        if prompt_ids.shape != (acts.shape[0],) or lengths.shape != (acts.shape[0],):
            raise ValueError(
                f"{self.name}: {acts.shape[0]} rows of activations, {prompt_ids.shape} prompt ids, "
                f"{lengths.shape} lengths"
            )
        for name, value in (("acts", acts), ("prompt_ids", prompt_ids), ("lengths", lengths)):
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class SideUnits:
    """One side, cut to what is compared and put into an order that does not depend on the order of the rows."""

    responses: sparse.csc_array = field(repr=False)
    """float32 [n_responses, d_sae]"""
    prompts: sparse.csc_array = field(repr=False)
    """float32 or float64 [n_prompts, d_sae]: mean over the prompt's responses."""
    prompt_ids: np.ndarray = field(repr=False)
    """str [n_prompts], sorted."""
    mean_length: float
    """Response tokens, averaged within prompts, then over prompts."""

    @property
    def n_responses(self) -> int:
        return self.responses.shape[0]

    @property
    def n_prompts(self) -> int:
        return self.prompts.shape[0]


@dataclass(frozen=True)
class Units:
    """Both sides. When `paired`, row i of either side's `prompts` is the same prompt."""

    target: SideUnits
    reference: SideUnits
    paired: bool
    notes: tuple[str, ...]

    @property
    def n_prompts(self) -> int:
        """Different prompts compared."""
        return len(np.union1d(self.target.prompt_ids, self.reference.prompt_ids))


def build_units(
    target: Sample,
    reference: Sample,
    *,
    pairing: Pairing = "auto",
    min_shared_share: float = MIN_SHARED_SHARE,
    max_length_ratio: float | None = None,
) -> Units:
    """Pair, match and average.

    "auto" pairs when at least two prompts, and `min_shared_share` of the side with fewer prompts, are on both sides.
    `max_length_ratio` keeps pairs of prompts whose mean response lengths differ by at most that factor; unpaired, it
    matches prompts of the two sides one to one by length. Raises `SaeMismatch` when the widths differ and
    `NotEnoughData` when fewer than two prompts a side are left.
    """
    if target.acts.shape[1] != reference.acts.shape[1]:
        raise SaeMismatch(
            f"{target.name} has {target.acts.shape[1]} features and {reference.name} {reference.acts.shape[1]}; "
            "compare files extracted with the same SAE."
        )
    ids_target, ids_reference = np.unique(target.prompt_ids), np.unique(reference.prompt_ids)
    fewer = min(len(ids_target), len(ids_reference))
    shared, enough = shared_prompts(ids_target, ids_reference, min_shared_share)
    paired = pairing == "paired" or (pairing == "auto" and enough)
    notes: list[str] = []
    if paired:
        dropped = len(ids_target) + len(ids_reference) - 2 * len(shared)
        if dropped:
            notes.append(
                f"{dropped} prompts stand on one side only ({len(ids_target) - len(shared)} target, "
                f"{len(ids_reference) - len(shared)} reference) and are left out of the pairs."
            )
        ids_target = ids_reference = shared
    elif len(shared):
        notes.append(
            f"{len(shared)} of the {fewer} prompts of the smaller side stand on both but the test is unpaired, "
            "so these are counted as if they were independent."
        )
    if max_length_ratio is not None:
        before = (len(ids_target), len(ids_reference))
        ids_target, ids_reference = _length_matched(
            _prompt_lengths(target, ids_target), _prompt_lengths(reference, ids_reference), paired, max_length_ratio
        )
        notes.append(
            f"Lengths are matched within a factor of {max_length_ratio:g}: {len(ids_target)} of {before[0]} target and "
            f"{len(ids_reference)} of {before[1]} reference prompts are kept."
        )
    for sample, ids in ((target, ids_target), (reference, ids_reference)):
        if len(ids) < 2:
            kind = "paired prompts" if paired else "prompts"
            raise NotEnoughData(
                f"{sample.name}: {len(ids)} {kind} to compare, and a contrast needs at least 2 a side; "
                "add conversations or compare other conditions."
            )
    return Units(_side(target, ids_target), _side(reference, ids_reference), paired, tuple(notes))


def shared_prompts(
    target: np.ndarray, reference: np.ndarray, min_shared_share: float = MIN_SHARED_SHARE
) -> tuple[np.ndarray, bool]:
    """Prompt ids on both sides, sorted, and whether they are enough to pair: two, and a share of the smaller side."""
    shared = np.intersect1d(target, reference)
    fewer = min(len(np.unique(target)), len(np.unique(reference)))
    return shared, len(shared) >= max(2, min_shared_share * fewer)


def _prompt_lengths(sample: Sample, ids: np.ndarray) -> dict[str, float]:
    """Mean response length of each prompt in `ids`."""
    known, inverse, counts = np.unique(sample.prompt_ids, return_inverse=True, return_counts=True)
    means = np.bincount(inverse, weights=sample.lengths) / counts
    return dict(zip(ids.tolist(), means[np.searchsorted(known, ids)].tolist(), strict=True))


def _length_matched(
    target: dict[str, float], reference: dict[str, float], paired: bool, ratio: float
) -> tuple[np.ndarray, np.ndarray]:
    """Ids kept on either side. Unpaired: one pass over both sides sorted by length gives the most matches."""
    if paired:
        kept = [p for p, n in target.items() if max(n, reference[p]) <= ratio * min(n, reference[p])]
        return np.array(kept, dtype=str), np.array(kept, dtype=str)
    left, right = (sorted((n, p) for p, n in side.items()) for side in (target, reference))
    kept_left, kept_right = [], []
    i = j = 0
    while i < len(left) and j < len(right):
        a, b = left[i][0], right[j][0]
        if max(a, b) <= ratio * min(a, b):
            kept_left.append(left[i][1])
            kept_right.append(right[j][1])
            i, j = i + 1, j + 1
        elif a < b:
            i += 1
        else:
            j += 1
    return np.array(kept_left, dtype=str), np.array(kept_right, dtype=str)


def _side(sample: Sample, ids: np.ndarray) -> SideUnits:
    rows = np.flatnonzero(np.isin(sample.prompt_ids, ids))
    mass = sample.acts @ np.ones(sample.acts.shape[1])
    rows = rows[np.lexsort((mass[rows], sample.lengths[rows], sample.prompt_ids[rows]))]
    acts = sample.acts if np.array_equal(rows, np.arange(sample.acts.shape[0])) else sample.acts[rows]
    responses = acts.tocsc()
    known, inverse, counts = np.unique(sample.prompt_ids[rows], return_inverse=True, return_counts=True)
    prompts = responses
    if len(known) < len(rows):
        ones = np.ones(len(rows))
        member = sparse.csr_array((ones, (inverse, np.arange(len(rows)))), shape=(len(known), len(rows)))
        prompts = member @ acts  # float64
        prompts.data /= np.repeat(counts, np.diff(prompts.indptr))
        prompts = prompts.tocsc()
    lengths = np.bincount(inverse, weights=sample.lengths[rows]) / counts
    return SideUnits(responses, prompts, known, float(lengths.mean()))
