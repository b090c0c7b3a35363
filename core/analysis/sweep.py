"""What a sweep says: curves with intervals, the range in which text stays coherent, and its three findings.

Every effect is a difference of margins prompt by prompt, and intervals resample prompts (BCa, Efron 1987); those of the
text resample questions with all their answers. The random directions are as long as the direction.

Coherent, at one strength: the answers' perplexity under the unsteered base is at most `PERPLEXITY` times that of
unsteered answers, and their share of repeated 4-token sequences at most `REPEATED` above it. Both are needed: a loop is
repetitive but likely, word salad unlikely but never repeats. The range is the unbroken run of such strengths around 0.
No torch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from scipy import stats

from core.store.sweep_file import Point, Sweep

PERPLEXITY, REPEATED = 2.0, 0.2
RESAMPLES = 4000


@dataclass(frozen=True)
class Figure:
    """A figure with its 95% interval (None where it cannot be had) over n units."""

    value: float
    low: float | None
    high: float | None
    n: int

    def to_json(self) -> dict[str, Any]:
        ends = None if self.low is None or self.high is None else [round(self.low, 4), round(self.high, 4)]
        return {"value": round(self.value, 4), "ci95": ends, "n": self.n}


@dataclass(frozen=True)
class Findings:
    """The findings at one layer on one pair set. Shifts in nats per token, of the margin."""

    layer: int
    pairs: str
    strength: float
    """Adding minus subtracting at this strength is the effect of a direction: the largest coherent one at which random
    directions were measured too."""
    direction: Figure
    randoms: tuple[Figure, ...]
    """The same of each random direction."""
    over_random: Figure | None
    """Direction minus the mean of the random ones."""
    part_strength: float | None
    """At which reconstructions are compared with the whole."""
    recovered: dict[int, Figure]
    """k -> effect of the k best features' sum as a share of the whole direction's; empty where that is not clear."""
    left: dict[int, Figure]
    """k -> the same of what they leave."""
    learnt: Figure | None
    """Margin of the fine-tuned variant minus the base's. Where it is not clear of 0, there is nothing to restore and
    what follows is empty."""
    restored: dict[str, Figure]
    """What is ablated -> share of `learnt` that is gone: 1 is back at base, below 0 further away."""
    base_ablated: dict[str, Figure]
    """What is ablated -> shift of the base's own margin. Text does not lie around 0 along the direction, so projecting
    it out is itself a push."""
    between: dict[str, Figure]
    """What is ablated in both -> share of `learnt`, the difference between the two, that is gone."""


def mean_figure(values: Sequence[float], seed: int = 0) -> Figure:
    """Mean of `values` [units] with its interval."""
    values = np.asarray(values, dtype=float)
    return _figure((values,), lambda v, axis: v.mean(axis=axis), seed)


def share_figure(parts: Sequence[float], wholes: Sequence[float], seed: int = 0) -> Figure:
    """sum(parts) / sum(wholes), both [units], resampled together."""
    return _figure((np.asarray(parts, dtype=float), np.asarray(wholes, dtype=float)),
                   lambda a, b, axis: a.sum(axis=axis) / b.sum(axis=axis), seed)


def clear(figure: Figure) -> bool:
    """Whether its interval leaves out 0; a share of a figure that does not means nothing."""
    return figure.low is not None and figure.high is not None and figure.low * figure.high > 0


def _figure(columns: tuple[np.ndarray, ...], statistic: Callable[..., Any], seed: int) -> Figure:
    value, n = float(statistic(*columns, axis=0)), len(columns[0])
    if n < 2 or all(np.ptp(c) == 0 for c in columns):
        return Figure(value, None, None, n)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        made = stats.bootstrap(columns, statistic, paired=len(columns) > 1, vectorized=True, n_resamples=RESAMPLES,
                               rng=np.random.default_rng(seed))
    low, high = (float(x) for x in made.confidence_interval)
    return Figure(value, low, high, n) if math.isfinite(low) and math.isfinite(high) else Figure(value, None, None, n)


def unsteered(sweep: Sweep, variant: str = "base") -> Point | None:
    return next(iter(sweep.find("unsteered", 0, variant)), None)


def curves(sweep: Sweep, layer: int, pairs: str) -> pl.DataFrame:
    """One row a series and strength: series, kind, k, strength, shift (of the margin) with low, high, n.

    Random directions are one series: their mean, prompt by prompt. Strength 0 is in every series.
    """
    rows = []
    base = _margins(unsteered(sweep), pairs)
    series: dict[tuple[str, str, int], dict[float, list[np.ndarray]]] = {}
    for kind, name in (("direction", "direction"), ("random", "random"), ("components", "{k} best features"),
                       ("remainder", "without its {k} best")):
        for point in sweep.find(kind, layer):
            values = _margins(point, pairs)
            if values is not None and base is not None:
                at = series.setdefault((name.format(k=point.k), kind, point.k), {})
                at.setdefault(point.strength, []).append(values - base)
    for (name, kind, k), strengths in series.items():
        for strength, shifts in sorted({0.0: [np.zeros_like(base)], **strengths}.items()):
            f = mean_figure(np.mean(shifts, axis=0))
            rows.append({"series": name, "kind": kind, "k": k, "strength": strength, "shift": f.value,
                         "low": f.value if f.low is None else f.low, "high": f.value if f.high is None else f.high,
                         "n": f.n})
    return pl.DataFrame(rows, schema={"series": pl.String, "kind": pl.String, "k": pl.Int64, "strength": pl.Float64,
                                      "shift": pl.Float64, "low": pl.Float64, "high": pl.Float64, "n": pl.Int64})


def quality(sweep: Sweep, layer: int) -> pl.DataFrame:
    """One row a series and strength: perplexity of the answers under the unsteered base, share of repeated 4-token
    sequences, share of answers that ended, share misaligned (null without a judge); with low and high of the first
    two, questions resampled; n answers."""
    rows = []
    base = unsteered(sweep)
    for kind in ("direction", "random"):
        for point in [*sweep.find(kind, layer), *([base] if base is not None else [])]:
            if not point.answers:
                continue
            nats, said = _by_question(point, "nats"), _by_question(point, "repeated")
            f, r = mean_figure(nats), mean_figure(said)
            rows.append({
                "series": kind, "strength": point.strength, "perplexity": math.exp(f.value),
                "perplexity_low": math.exp(f.value if f.low is None else f.low),
                "perplexity_high": math.exp(f.value if f.high is None else f.high), "repeated": r.value,
                "repeated_low": r.value if r.low is None else r.low,
                "repeated_high": r.value if r.high is None else r.high,
                "ended": float(np.mean([a.ended for a in point.answers])), "n": len(point.answers),
                "misaligned": None if point.n_misaligned is None else point.n_misaligned / len(point.answers),
            })  # fmt: skip
    names = ("perplexity", "perplexity_low", "perplexity_high", "repeated", "repeated_low", "repeated_high", "ended",
             "misaligned")
    table = pl.DataFrame(rows, schema={"series": pl.String, "strength": pl.Float64, "n": pl.Int64,
                                       **dict.fromkeys(names, pl.Float64)})
    return table.sort("series", "strength")


def coherent_range(sweep: Sweep, layer: int) -> tuple[float, float] | None:
    """The strengths of the direction around 0 between which every measured one is coherent; None when unmeasured."""
    base = unsteered(sweep)
    found = {p.strength: p for p in sweep.find("direction", layer) if p.answers}
    if base is None or not base.answers or not found:
        return None

    def coherent(point: Point) -> bool:
        worse = float(_by_question(point, "nats").mean() - _by_question(base, "nats").mean())
        more = float(_by_question(point, "repeated").mean() - _by_question(base, "repeated").mean())
        return worse <= math.log(PERPLEXITY) and more <= REPEATED

    ends = []
    for side in (sorted((s for s in found if s < 0), reverse=True), sorted(s for s in found if s > 0)):
        reached = 0.0
        for strength in side:
            if not coherent(found[strength]):
                break
            reached = strength
        ends.append(reached)
    return ends[0], ends[1]


def findings(sweep: Sweep, layer: int, pairs: str) -> Findings | None:
    """None where the direction was not measured on these pairs at any strength both ways."""
    both = _both_ways(sweep, "direction", layer, pairs)
    if not both:
        return None
    ends = coherent_range(sweep, layer)
    limit = min(-ends[0], ends[1]) if ends else math.inf
    draws = [_both_ways(sweep, "random", layer, pairs, draw=d) for d in _draws(sweep, "random", layer)]
    draws = [found for found in draws if set(found) & set(both)]
    strength = _strongest(set(both).intersection(*draws) or set(both), limit)
    randoms = [found[strength] for found in draws if strength in found]
    over = mean_figure(both[strength] - np.mean(randoms, axis=0)) if randoms else None
    ks = sorted({p.k for p in sweep.find("components", layer)})
    parts = {(kind, k): _both_ways(sweep, kind, layer, pairs, k=k) for kind in ("components", "remainder") for k in ks}
    shared = set(both).intersection(*parts.values()) if ks else set()
    at = _strongest(shared, limit) if shared else None

    def shares(kind: str) -> dict[int, Figure]:
        if at is None or not clear(mean_figure(both[at])):
            return {}
        return {k: share_figure(parts[kind, k][at], both[at]) for k in ks}

    tuned = sweep.spec.get("variant")
    base, fine = _margins(unsteered(sweep), pairs), _margins(unsteered(sweep, tuned), pairs) if tuned else None
    restored: dict[str, Figure] = {}
    moved: dict[str, Figure] = {}
    between: dict[str, Figure] = {}
    ablated: dict[str, np.ndarray] = {}
    learnt = mean_figure(fine - base) if fine is not None else None
    if learnt is not None and clear(learnt):
        for name, point in _ablations(sweep, layer, tuned):
            if (values := _margins(point, pairs)) is not None:
                ablated[name] = values
                restored[name] = share_figure(fine - values, fine - base)
        for name, point in _ablations(sweep, layer, "base"):
            if (values := _margins(point, pairs)) is not None:
                moved[name] = mean_figure(values - base)
                if name in ablated:
                    between[name] = share_figure((fine - base) - (ablated[name] - values), fine - base)
    return Findings(
        layer, pairs, strength, mean_figure(both[strength]), tuple(mean_figure(r) for r in randoms), over, at,
        shares("components"), shares("remainder"), learnt, restored, moved, between,
    )  # fmt: skip


def summary(sweep: Sweep) -> dict[str, Any]:
    """All findings as JSON."""
    found = [f for layer in sweep.layers for pairs in sweep.pairs if (f := findings(sweep, layer, pairs)) is not None]
    return {
        "contrast": sweep.contrast, "layers": list(sweep.layers), "variant": sweep.spec.get("variant"),
        "coherent": {str(layer): coherent_range(sweep, layer) for layer in sweep.layers},
        "findings": [
            {
                "layer": f.layer, "pairs": f.pairs, "strength": f.strength, "direction": f.direction.to_json(),
                "random": [r.to_json() for r in f.randoms],
                "direction_over_random": f.over_random.to_json() if f.over_random else None,
                "part_strength": f.part_strength,
                "recovered": {str(k): v.to_json() for k, v in f.recovered.items()},
                "remainder": {str(k): v.to_json() for k, v in f.left.items()},
                "learnt": f.learnt.to_json() if f.learnt else None,
                "restored": {name: v.to_json() for name, v in f.restored.items()},
                "base_ablated": {name: v.to_json() for name, v in f.base_ablated.items()},
                "restored_both_ablated": {name: v.to_json() for name, v in f.between.items()},
            }
            for f in found
        ],
    }  # fmt: skip


def known_shift(sweep: Sweep, layer: int, strength: float, pairs: str) -> Figure | None:
    """Shift of the base's margin at a strength of the direction that was measured; None elsewhere."""
    base = _margins(unsteered(sweep), pairs)
    point = next((p for p in sweep.find("direction", layer) if math.isclose(p.strength, strength, abs_tol=1e-6)), None)
    values = _margins(point, pairs)
    return mean_figure(values - base) if values is not None and base is not None else None


def _ablations(sweep: Sweep, layer: int, variant: str) -> list[tuple[str, Point]]:
    found = [("at its layer", p) for p in sweep.find("ablate", layer, variant)]
    found += [("at every layer", p) for p in sweep.find("ablate-everywhere", layer, variant)]
    return found + [(f"random {p.draw} at every layer", p) for p in sweep.find("ablate-random", layer, variant)]


def _both_ways(sweep: Sweep, kind: str, layer: int, pairs: str, **more: int) -> dict[float, np.ndarray]:
    """Strength above 0 -> margin when added minus when subtracted, [prompts]; strengths measured both ways."""
    at = {p.strength: _margins(p, pairs) for p in sweep.find(kind, layer, **more)}
    return {s: v - at[-s] for s, v in at.items() if s > 0 and v is not None and at.get(-s) is not None}


def _strongest(strengths: set[float], limit: float) -> float:
    """The largest up to `limit`; the smallest of all where none is."""
    return max([s for s in strengths if s <= limit + 1e-9], default=min(strengths))


def _draws(sweep: Sweep, kind: str, layer: int) -> list[int]:
    return sorted({p.draw for p in sweep.find(kind, layer)})


def _margins(point: Point | None, pairs: str) -> np.ndarray | None:
    values = point.margins.get(pairs) if point is not None else None
    return None if values is None else np.asarray(values, dtype=float)


def _by_question(point: Point, name: str) -> np.ndarray:
    """Mean of one figure of the answers, question by question."""
    asked = np.array([a.prompt for a in point.answers])
    values = np.array([getattr(a, name) for a in point.answers])
    return np.array([values[asked == q].mean() for q in np.unique(asked)])
