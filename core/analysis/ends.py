"""The two ends of named rankings, the most raised and the most suppressed: how many features they share at each k,
beside what chance and a benign control give.

Works on places (see overlap.py, which has the arithmetic); does not know tables, effects or files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from core.analysis import overlap

Tail = Literal["raised", "suppressed"]
TAILS: tuple[Tail, ...] = ("raised", "suppressed")


@dataclass(frozen=True)
class Chance:
    """Overlap to expect of rankings that have nothing to do with each other, in features."""

    expected: float
    """Exact."""
    ci95: tuple[float, float]
    """2.5% and 97.5% points over the permutations: where chance falls, not how sure the observed figure is."""


@dataclass(frozen=True)
class AtK:
    """Features in every top k."""

    k: int
    sizes: tuple[int, ...]
    """Features in each contrast's top k: k, or fewer when fewer are moved in that direction."""
    observed: int
    uniform: Chance
    """Every feature as likely as any other."""
    matched: Chance
    """Features traded only for others that are active about as often: frequent ones have larger effects everywhere."""
    controls: dict[str, int]
    """Contrast -> the overlap when its benign control stands in its place; contrasts without one are left out."""

    @property
    def stricter(self) -> Chance:
        """The chance that is harder to beat."""
        return self.matched if self.matched.expected >= self.uniform.expected else self.uniform


@dataclass(frozen=True)
class Overlap:
    """Agreement of one end of two or three rankings."""

    names: tuple[str, ...]
    tail: Tail
    at: tuple[AtK, ...]
    """By growing k."""
    rbo: float
    """Extrapolated rank-biased overlap, p = 1 - 1/k; NaN for three contrasts or an empty end."""
    rbo_expected: float
    """Its mean when features are traded for others active about as often."""

    def at_k(self, k: int) -> AtK:
        return next(a for a in self.at if a.k == k)


def places_at(tail: Tail, rank: np.ndarray, effect: np.ndarray) -> np.ndarray:
    """int64 [N] places at one end, in the order of `rank` (NaN: unranked). Only features moved that way stand there."""
    moved = (effect > 0 if tail == "raised" else effect < 0) & ~np.isnan(rank)
    return overlap.places(rank if tail == "raised" else -rank, moved)


def overlaps(
    names: tuple[str, ...],
    stand: Mapping[Tail, Mapping[str, np.ndarray]],
    stand_in: Mapping[Tail, Mapping[str, np.ndarray]],
    strata: np.ndarray,
    *,
    k: int,
    ks: Sequence[int],
    n_permutations: int,
    seed: int,
) -> tuple[Overlap, ...]:
    """Both ends of every pair of `names`, and of all when there are three.

    `stand` holds the places [N] of each contrast at each end, `stand_in` those of benign controls by the contrast
    they are the control of, `strata` (int [N]) the groups within which the matched chance shuffles.
    """
    kinds = {"uniform": np.zeros(len(strata), dtype=np.int64), "matched": strata}
    sizes = sorted({n for n in (*ks, k) if n <= len(strata)})
    rng = np.random.default_rng(seed)
    # One set of shuffles serves every pair and both ends; by sorted name, so that swapping contrasts changes nothing.
    drawn = {
        kind: {name: overlap.shuffles(groups, n_permutations, rng) for name in sorted(names)[1:]}
        for kind, groups in kinds.items()
    }
    found = []
    for group in (*combinations(names, 2), *([names] if len(names) > 2 else [])):
        ordered = sorted(group)
        for tail, places in stand.items():
            stacked = np.stack([places[name] for name in ordered])
            uniform, matched = (
                _chances(stacked, groups, [drawn[kind][name] for name in ordered[1:]], sizes)
                for kind, groups in kinds.items()
            )
            beside = {
                name: overlap.observed(np.stack([own if x == name else places[x] for x in group]), sizes)
                for name, own in stand_in.get(tail, {}).items()
                if name in group
            }
            shared = overlap.observed(stacked, sizes)
            at = tuple(
                AtK(n, tuple(int((places[name] <= n).sum()) for name in group), int(shared[i]), uniform[i],
                    matched[i], {name: int(counts[i]) for name, counts in beside.items()})
                for i, n in enumerate(sizes)
            )  # fmt: skip
            rbo = rbo_expected = float("nan")
            if len(group) == 2:
                rbo, rbo_expected = overlap.rank_biased_of(*stacked, strata, persistence(k))
            found.append(Overlap(group, tail, at, rbo, rbo_expected))
    return tuple(found)


def persistence(k: int) -> float:
    """The p of rank-biased overlap that puts about 86% of the weight on the first k places."""
    return 1 - 1 / max(k, 2)


def _chances(rankings: np.ndarray, strata: np.ndarray, drawn: list[np.ndarray], ks: list[int]) -> list[Chance]:
    means = overlap.expected(rankings, strata, ks)
    bounds = np.quantile(overlap.shuffled(rankings, drawn, ks), [0.025, 0.975], axis=0, method="inverted_cdf")
    return [Chance(float(m), (float(a), float(b))) for m, a, b in zip(means, *bounds, strict=True)]
