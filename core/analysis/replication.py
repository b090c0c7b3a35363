"""Split-half replication of a ranking by prompt, against a permutation control.

The k most raised and k most suppressed features of one half of the prompts (discovery, by effect size) are tested on
the other half (confirmation): a feature replicates when its difference there has the same sign and its two-sided
p-value passes Benjamini-Hochberg over the features carried over. The control repeats all of it with the labels
permuted: flipped within pairs, or dealt out anew over the prompts of each half when unpaired. It does not know
conversations or files, and it says nothing of data drawn in another way: both halves share one source.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from core.analysis import statistics
from core.analysis.units import Units
from core.errors import NotEnoughData


@dataclass(frozen=True)
class Replication:
    """How many of the discovery half's top features hold on the confirmation half. Prompts, seed and k travel along."""

    k: int
    """Features asked for at each end."""
    n_raised: int
    """Raised features carried over: k, or fewer when the half has fewer."""
    n_suppressed: int
    n_raised_replicated: int
    n_suppressed_replicated: int
    n_candidates: int
    """Features the ends were chosen from: tested ones, without format features unless asked for."""
    n_prompts_discovery: int
    n_prompts_confirmation: int
    permuted_mean: float
    """Mean of the features (both ends together) that replicate under permuted labels."""
    permuted_ci95: tuple[float, float]
    """2.5% and 97.5% points of the same over the permutations."""
    rank_correlation: float
    """Spearman correlation of the effect sizes of all candidates between the halves; NaN when undefined."""
    n_permutations: int
    alpha: float
    seed: int

    @property
    def n_replicated(self) -> int:
        return self.n_raised_replicated + self.n_suppressed_replicated

    @property
    def n_carried(self) -> int:
        return self.n_raised + self.n_suppressed


@dataclass(frozen=True)
class _Ends:
    """Candidate columns at either end, the strongest first."""

    raised: np.ndarray
    suppressed: np.ndarray


@dataclass(frozen=True)
class _Half:
    """One half of the prompts. Paired: `values` are differences [n_prompts, n_candidates], a label is +1 or -1.

    Unpaired: `values` are both sides stacked, a label is 1 for the target and 0 for the reference.
    """

    values: sparse.csc_array
    labels: np.ndarray
    scale: np.ndarray
    """[n_candidates]: root mean square of the values compared."""
    paired: bool
    n_prompts: int

    def permuted(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """[n + 1, n_rows] labels: the true ones first."""
        if self.paired:
            drawn = rng.choice([-1.0, 1.0], size=(n, len(self.labels)))
        else:
            drawn = rng.permuted(np.tile(self.labels, (n, 1)), axis=1)
        return np.vstack([self.labels, drawn])

    def effects(self, labels: np.ndarray) -> np.ndarray:
        """Effect sizes [n_labellings, n_candidates] for labels [n_labellings, n_rows], in one product."""
        values, n_rows = self.values, len(self.labels)
        total = (values.T @ labels.T).T
        squares = values.power(2)
        if self.paired:
            return statistics.paired_effect(total, statistics.column_sums(squares), n_rows, self.scale)
        squares_target = (squares.T @ labels.T).T
        n_target = int(self.labels.sum())
        return statistics.unpaired_effect(
            total, squares_target, n_target, statistics.column_sums(values) - total,
            statistics.column_sums(squares) - squares_target, n_rows - n_target, self.scale,
        )  # fmt: skip

    def p_values(self, columns: np.ndarray, labels: np.ndarray) -> np.ndarray:
        chosen = self.values[:, columns]
        if self.paired:
            signed = sparse.csc_array((chosen.data * labels[chosen.indices], chosen.indices, chosen.indptr),
                                      shape=chosen.shape)
            return statistics.signed_rank(signed).p_value
        chosen = chosen.tocsr()
        return statistics.rank_sum(chosen[labels == 1].tocsc(), chosen[labels == 0].tocsc()).p_value


def replicate(
    units: Units, candidates: np.ndarray, *, k: int, alpha: float, n_permutations: int, seed: int
) -> Replication:
    """Replicate the ends of the ranking over `candidates` (feature indices) and run the control.

    Raises `NotEnoughData` when there is nothing to choose from or the halves are too small for any feature to pass.
    """
    if len(candidates) == 0:
        raise NotEnoughData("No feature passed the floor, so there is nothing to replicate.")
    in_discovery = _discovery_prompts(units, seed)
    discovery = _half(units, candidates, in_discovery, True)
    confirmation = _half(units, candidates, in_discovery, False)
    for half in (discovery, confirmation):
        sizes = (half.n_prompts,) if half.paired else (int(half.labels.sum()), int((1 - half.labels).sum()))
        if min(sizes) < 2 or statistics.smallest_p(sizes[0], sizes[-1], paired=half.paired) > alpha:
            raise NotEnoughData(
                f"Replication is left out: half of the prompts ({half.n_prompts}) is too few for any p-value below "
                f"{alpha:g}; add prompts."
            )
    rng = np.random.default_rng(seed)
    labels_discovery = discovery.permuted(rng, n_permutations)
    labels_confirmation = confirmation.permuted(rng, n_permutations)
    effects_discovery = discovery.effects(labels_discovery)
    effects_confirmation = confirmation.effects(labels_confirmation)

    held, first = [], None
    for found, again, labels in zip(effects_discovery, effects_confirmation, labels_confirmation, strict=True):
        ends = _ends(found, k)
        counts = _count(confirmation, ends, again, labels, alpha)
        first = first or (ends, counts)
        held.append(sum(counts))
    ends, (n_raised_replicated, n_suppressed_replicated) = first
    control = np.array(held[1:], dtype=float)
    return Replication(
        k=k,
        n_raised=len(ends.raised),
        n_suppressed=len(ends.suppressed),
        n_raised_replicated=n_raised_replicated,
        n_suppressed_replicated=n_suppressed_replicated,
        n_candidates=len(candidates),
        n_prompts_discovery=discovery.n_prompts,
        n_prompts_confirmation=confirmation.n_prompts,
        permuted_mean=float(control.mean()) if len(control) else float("nan"),
        permuted_ci95=tuple(np.quantile(control, [0.025, 0.975]).tolist()) if len(control) else (np.nan, np.nan),
        rank_correlation=statistics.spearman(effects_discovery[0], effects_confirmation[0]),
        n_permutations=n_permutations,
        alpha=alpha,
        seed=seed,
    )


def _ends(effects: np.ndarray, k: int) -> _Ends:
    order = np.argsort(-effects, kind="stable")  # NaN goes last
    down = np.argsort(effects, kind="stable")
    return _Ends(raised=order[:k][effects[order[:k]] > 0], suppressed=down[:k][effects[down[:k]] < 0])


def _count(half: _Half, ends: _Ends, effects: np.ndarray, labels: np.ndarray, alpha: float) -> tuple[int, int]:
    """Raised and suppressed features that replicate on `half`."""
    columns = np.concatenate([ends.raised, ends.suppressed])
    if len(columns) == 0:
        return 0, 0
    wanted = np.repeat([1.0, -1.0], [len(ends.raised), len(ends.suppressed)])
    p = np.where(np.isnan(effects[columns]), 1.0, half.p_values(columns, labels))  # undefined: a failed replication
    passed = (statistics.benjamini_hochberg(p) < alpha) & (np.sign(effects[columns]) == wanted)
    return int(passed[wanted > 0].sum()), int(passed[wanted < 0].sum())


def _discovery_prompts(units: Units, seed: int) -> np.ndarray:
    """Ids of the discovery half, by hash of the prompt id: the same whatever the order of rows, and whichever sides a
    prompt is on. Prompts on both sides, on the target only and on the reference only are each split in half."""
    target, reference = units.target.prompt_ids, units.reference.prompt_ids
    groups = (
        np.intersect1d(target, reference),
        np.setdiff1d(target, reference),
        np.setdiff1d(reference, target),
    )
    chosen: list[str] = []
    for group in groups:
        ordered = sorted(group.tolist(), key=lambda p: hashlib.sha256(f"{seed}:{p}".encode()).digest())
        chosen += ordered[: (len(ordered) + 1) // 2]
    return np.array(chosen, dtype=str)


def _half(units: Units, candidates: np.ndarray, in_discovery: np.ndarray, discovery: bool) -> _Half:
    sides, n_rows = [], []
    prompts: set[str] = set()
    for side in (units.target, units.reference):
        mask = np.isin(side.prompt_ids, in_discovery) == discovery
        prompts |= set(side.prompt_ids[mask].tolist())
        values = side.prompts[:, candidates].astype(np.float64)
        sides.append(values.tocsr()[np.flatnonzero(mask)].tocsc())
        n_rows.append(int(mask.sum()))
    squares = sum(statistics.column_sums(v.power(2)) for v in sides)
    scale = np.sqrt(squares / max(sum(n_rows), 1))
    if units.paired:
        values, labels = (sides[0] - sides[1]).tocsc(), np.ones(n_rows[0])
    else:
        values = sparse.csc_array(sparse.vstack(sides, format="csc"))
        labels = np.repeat([1.0, 0.0], n_rows)
    return _Half(values, labels, scale, units.paired, len(prompts))
