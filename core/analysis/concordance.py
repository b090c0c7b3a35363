"""Concordance: are the features that one contrast moves the ones another contrast moves? Two or three rankings in, one
table and the figures of their agreement out.

The features considered are those every contrast could test (the label-blind floor of the ranking), without format
features unless asked for. It compares where features stand, so it needs no text and no model, and it does not know
why two contrasts agree: shared features may follow the topic, the length or the fine-tuning as such, which is what
the benign controls beside each figure are for. Chance and its limits: see overlap.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Literal, get_args

import numpy as np
import polars as pl

from core.analysis import ends, feature_table, overlap
from core.analysis.ends import TAILS, Overlap, Tail
from core.analysis.overlap import Correlation
from core.analysis.ranking import Ranking
from core.errors import NotEnoughData, PresetError, SaeMismatch

Subtract = Literal["none", "effect", "mean"]

CAVEAT = (
    "The range of chance shuffles which feature is which. Features are not independent of each other, so true chance "
    "is wider; compare with the benign control."
)


@dataclass(frozen=True)
class ConcordanceSettings:
    """How a concordance is computed; travels with its result. Raises `PresetError` when a value is impossible."""

    k: int = 50
    """Features at each end that the sentence and the lists speak of."""
    ks: tuple[int, ...] = (10, 20, 50, 100, 200)
    """Sizes at which the overlap is counted; `k` is added, those above the number of features are left out."""
    include_format: bool = False
    """Consider format features too."""
    format_below: float = feature_table.FORMAT_BELOW
    """Content share, in any of the contrasts, below which a feature counts as format."""
    subtract: Subtract = "none"
    """What is taken off each contrast that has a control. `effect`: the control's effect size, a difference of two
    differently standardised numbers, so crude. `mean`: the control's mean difference, both in units of the contrast's
    own spread."""
    alpha: float = 0.05
    """q-value below which a feature counts as raised or suppressed in a contrast."""
    top_share: float = 0.05
    """Share of the features, by |effect|, that count so where a contrast has no q-values."""
    n_strata: int = 20
    """Groups of equally frequent features within which the stricter chance shuffles."""
    n_permutations: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [
            f"{name} = {getattr(self, name)!r} ({rule})"
            for name, fine, rule in (
                ("k", self.k >= 1, "at least 1"),
                ("ks", all(k >= 1 for k in self.ks), "each at least 1"),
                ("format_below", 0 <= self.format_below <= 1, "0 to 1"),
                ("subtract", self.subtract in get_args(Subtract), "none, effect or mean"),
                ("alpha", 0 < self.alpha < 1, "between 0 and 1"),
                ("top_share", 0 < self.top_share <= 1, "above 0, at most 1"),
                ("n_strata", self.n_strata >= 1, "at least 1"),
                ("n_permutations", self.n_permutations >= 1, "at least 1"),
                ("seed", self.seed >= 0, "at least 0"),
            )
            if not fine
        ]
        if wrong:
            raise PresetError(f"Impossible concordance settings: {'; '.join(wrong)}.")


@dataclass(frozen=True)
class Pair:
    """Rank correlation of two contrasts over all features considered."""

    names: tuple[str, str]
    spearman: Correlation


@dataclass(frozen=True)
class Concordance:
    """What two or three contrasts share at one layer and position."""

    table: pl.DataFrame = field(repr=False)
    """One row a feature considered: layer, feature, prevalence (share of responses it is active on, mean of the
    contrasts), content_share (lowest of the contrasts), quadrant, and for each contrast NAME: effect_NAME (standard
    deviations, after any subtraction), rank_NAME (1 = most raised), q_NAME, direction_NAME (1, 0, -1),
    raised_NAME and suppressed_NAME (place at that end, null if moved the other way), control_NAME (effect size in
    the benign control, null without one)."""
    names: tuple[str, ...]
    layer: int
    position: str
    d_sae: int
    n_eligible: int
    """Features that every contrast could test, format features included."""
    n_format_hidden: int
    overlaps: tuple[Overlap, ...]
    """Each end of each pair, and of all three."""
    pairs: tuple[Pair, ...]
    controlled: tuple[str, ...]
    """Contrasts whose benign control was given."""
    settings: ConcordanceSettings
    notes: tuple[str, ...]

    @property
    def n_features(self) -> int:
        """Features considered: the N of every chance."""
        return self.table.height

    def overlap_of(self, names: tuple[str, ...], tail: Tail) -> Overlap:
        return next(o for o in self.overlaps if set(o.names) == set(names) and o.tail == tail)

    def spearman(self, a: str, b: str) -> Correlation:
        return next(p.spearman for p in self.pairs if set(p.names) == {a, b})


def concord(
    rankings: Mapping[str, Ranking],
    controls: Mapping[str, Ranking] | None = None,
    settings: ConcordanceSettings = ConcordanceSettings(),
) -> Concordance:
    """Compare two or three rankings, keyed by contrast; `controls` holds the ranking of a contrast's benign control.

    Raises `PresetError` for another number of contrasts or two positions, `SaeMismatch` when layers or widths differ,
    `NotEnoughData` when k features cannot be chosen.
    """
    controls = {name: ranking for name, ranking in (controls or {}).items() if name in rankings}
    _check(rankings, controls)
    names, first = tuple(rankings), next(iter(rankings.values()))
    every = {name: _columns(ranking) for name, ranking in rankings.items()}
    every_control = {name: _columns(ranking) for name, ranking in controls.items()}
    if settings.subtract != "none":
        every |= {name: _less(every[name], control, settings.subtract) for name, control in every_control.items()}
    eligible = np.all([~np.isnan(one.rank) for one in every.values()], axis=0)
    share = np.fmin.reduce([one.content_share for one in every.values()])
    shown = eligible if settings.include_format else eligible & ~(share < settings.format_below)
    features = np.flatnonzero(shown)
    if len(features) < settings.k:
        raise NotEnoughData(
            f"{' and '.join(names)} at layer {first.layer}: {len(features)} features could be tested in all of them, "
            f"fewer than the {settings.k} asked for; take a smaller k, or contrasts with more prompts."
        )
    own = {name: one.take(features) for name, one in every.items()}
    control = {name: one.take(features) for name, one in every_control.items()}
    prevalence = np.mean([one.prevalence for one in own.values()], axis=0)
    strata = overlap.strata_of(prevalence, settings.n_strata)
    stand = {tail: {n: ends.places_at(tail, one.rank, one.effect) for n, one in own.items()} for tail in TAILS}
    beside = control if settings.subtract == "none" else {}
    stand_in = {tail: {n: ends.places_at(tail, one.rank, one.effect) for n, one in beside.items()} for tail in TAILS}
    table = _table(first.layer, features, prevalence, share[features], own, control, stand, settings)
    return Concordance(
        table=table,
        names=names,
        layer=first.layer,
        position=first.position,
        d_sae=first.table.height,
        n_eligible=int(eligible.sum()),
        n_format_hidden=int(eligible.sum()) - len(features),
        overlaps=ends.overlaps(
            names, stand, stand_in, strata, k=settings.k, ks=settings.ks, n_permutations=settings.n_permutations,
            seed=settings.seed,
        ),
        pairs=tuple(
            Pair((a, b), overlap.correlation(own[a].effect, own[b].effect, strata)) for a, b in combinations(names, 2)
        ),
        controlled=tuple(controls),
        settings=settings,
        notes=_notes(rankings, own, controls, settings),
    )


@dataclass(frozen=True)
class _Columns:
    """One ranking by feature: float64 [N] each, NaN for null."""

    effect: np.ndarray
    rank: np.ndarray
    """NaN where the contrast could not test the feature."""
    q_value: np.ndarray
    mean_diff: np.ndarray
    content_share: np.ndarray
    prevalence: np.ndarray
    """Share of responses, both sides together, on which the feature is active."""

    def take(self, features: np.ndarray) -> _Columns:
        return _Columns(*(values[features] for values in vars(self).values()))


def _check(rankings: Mapping[str, Ranking], controls: Mapping[str, Ranking]) -> None:
    if len(rankings) not in (2, 3):
        raise PresetError(f"A concordance takes two or three different contrasts; {len(rankings)} were given.")
    first, name = next(iter(rankings.values())), next(iter(rankings))
    for other, ranking in (*rankings.items(), *((f"the control of {n}", r) for n, r in controls.items())):
        if ranking.layer != first.layer or ranking.table.height != first.table.height:
            raise SaeMismatch(
                f"{name} is of layer {first.layer} with {first.table.height} features and {other} of layer "
                f"{ranking.layer} with {ranking.table.height}; compare contrasts extracted with the same SAE."
            )
        if ranking.position != first.position:
            raise PresetError(
                f"{name} was read at {first.position!r} and {other} at {ranking.position!r}; use one position."
            )


def _columns(ranking: Ranking) -> _Columns:
    table = ranking.table.sort("feature")
    names = ("effect_size", "rank", "q_value", "mean_diff", "content_share")
    active = table["frac_active_target"] * ranking.n_target + table["frac_active_reference"] * ranking.n_reference
    return _Columns(*(table[name].cast(pl.Float64).fill_null(np.nan).to_numpy() for name in names),
                    (active / (ranking.n_target + ranking.n_reference)).to_numpy())


def _less(own: _Columns, control: _Columns, subtract: Subtract) -> _Columns:
    """The contrast with its control taken off: new effects and ranks over what it could test, and no q-values."""
    if subtract == "effect":
        effect = own.effect - control.effect
    else:  # effect = mean_diff / spread, so the spread follows; it is unknown where there is no difference at all
        with np.errstate(divide="ignore", invalid="ignore"):
            effect = own.effect - control.mean_diff * np.where(own.mean_diff != 0, own.effect / own.mean_diff, np.nan)
    ranked = ~np.isnan(own.rank) & ~np.isnan(effect)
    rank = np.where(ranked, overlap.places(-effect, ranked).astype(np.float64), np.nan)
    return replace(own, effect=effect, rank=rank, q_value=np.full(len(effect), np.nan))


def _direction(one: _Columns, settings: ConcordanceSettings) -> np.ndarray:
    """int8 [N]: 1 raised, -1 suppressed, 0 neither; by q-value, or by |effect| where there are no q-values."""
    if np.isnan(one.q_value).all():
        moved = np.abs(one.effect) >= np.quantile(np.abs(one.effect), 1 - settings.top_share)
    else:
        moved = one.q_value < settings.alpha
    return (np.sign(one.effect) * moved).astype(np.int8)


def quadrant(directions: Mapping[str, np.ndarray]) -> np.ndarray:
    """str [N] from each contrast's direction [N]: shared (moved the same way in all), opposed (both ways), neither,
    or the names of those it is moved in, as in `data only` and, of three, `data and model only`."""
    stacked = np.stack(list(directions.values()))
    codes = (3 ** np.arange(len(stacked))) @ (stacked + 1)
    known, inverse = np.unique(codes, return_inverse=True)
    words = []
    for code in known.tolist():
        signs = {name: code // 3**i % 3 - 1 for i, name in enumerate(directions)}
        moved = [name for name, sign in signs.items() if sign]
        if len(set(signs.values()) - {0}) == 2:
            words.append("opposed")
        elif len(moved) == len(signs):
            words.append("shared")
        else:
            words.append(f"{' and '.join(moved)} only" if moved else "neither")
    return np.array(words, dtype=object)[inverse.reshape(-1)]


def _table(
    layer: int,
    features: np.ndarray,
    prevalence: np.ndarray,
    share: np.ndarray,
    own: Mapping[str, _Columns],
    control: Mapping[str, _Columns],
    stand: Mapping[Tail, Mapping[str, np.ndarray]],
    settings: ConcordanceSettings,
) -> pl.DataFrame:
    """`Concordance.table`."""
    n = len(features)
    directions = {name: _direction(one, settings) for name, one in own.items()}
    columns: dict[str, tuple[object, object]] = {
        "layer": (pl.Int64, np.full(n, layer)), "feature": (pl.Int64, features), "prevalence": (pl.Float64, prevalence),
        "content_share": (pl.Float64, share), "quadrant": (pl.String, quadrant(directions)),
    }  # fmt: skip
    for name, one in own.items():
        columns |= {
            f"effect_{name}": (pl.Float64, one.effect),
            f"rank_{name}": (pl.Int64, one.rank.astype(np.int64)),
            f"q_{name}": (pl.Float64, one.q_value),
            f"direction_{name}": (pl.Int8, directions[name]),
            **{f"{tail}_{name}": (pl.Int64, [None if p > n else p for p in places[name].tolist()])
               for tail, places in stand.items()},
            f"control_{name}": (pl.Float64, control[name].effect if name in control else np.full(n, np.nan)),
        }
    return pl.DataFrame([
        pl.Series(name, values, dtype=dtype, nan_to_null=True) for name, (dtype, values) in columns.items()
    ])


def _notes(
    rankings: Mapping[str, Ranking],
    own: Mapping[str, _Columns],
    controls: Mapping[str, Ranking],
    settings: ConcordanceSettings,
) -> tuple[str, ...]:
    """Plain sentences a reader must know."""
    notes = []
    without = [name for name in rankings if name not in controls]
    if settings.subtract != "none" and without:
        notes.append(f"Nothing is subtracted from {' and '.join(without)}: no benign control is at hand.")
    for name, one in own.items():
        if np.isnan(one.q_value).all():
            taken = settings.subtract != "none" and name in controls
            why = "its control is taken off" if taken else "q-values are withheld"
            notes.append(
                f"{name}: {why}, so the {settings.top_share:.0%} of the features with the largest effects count as "
                "raised or suppressed."
            )
    n_features = len(next(iter(own.values())).effect)
    left_out = [str(k) for k in settings.ks if k > n_features]
    if left_out:
        notes.append(f"Overlap at {', '.join(left_out)} is left out: only {n_features} features are considered.")
    notes += [f"{name}: {note}" for name, ranking in rankings.items() for note in ranking.notes]
    return (*notes, CAVEAT)
