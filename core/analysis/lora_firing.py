"""When LoRA components fire: their mean scalar by condition, tested with the prompt as the unit, and read by a probe.

A component's sign is a convention (core/analysis/lora.py), so raised and lowered mean the same; what counts is how far
the conditions are apart. Reads firing files; knows no model and no page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from scipy import sparse

from core.analysis import resampling
from core.analysis.statistics import benjamini_hochberg, paired_effect, rank_sum, signed_rank, unpaired_effect
from core.analysis.units import shared_prompts
from core.errors import NotEnoughData
from core.store.firing_file import Firing

#: Conditions that are held against each other, target first, where a set has both.
OPPOSED = (("misaligned", "aligned"), ("bad", "good"))
#: Fewest prompts a side with which a probe is fitted.
MIN_PROMPTS = 10
#: Bootstrap resamples of prompts behind an interval.
RESAMPLES = 400


@dataclass(frozen=True)
class Group:
    """Responses of one conversation set and condition."""

    set: str
    condition: str

    @property
    def name(self) -> str:
        return f"{self.set}, {self.condition}" if self.condition else self.set


@dataclass(frozen=True)
class Question:
    """Two groups of responses that scalars might tell apart."""

    name: str
    target: Group
    reference: Group


def group_rows(firing: Firing, group: Group) -> np.ndarray:
    """int [n]: the rows of a group."""
    table = firing.conversations
    same = (table["set"] == group.set) & (table["condition"] == group.condition)
    return np.flatnonzero(same.to_numpy())


def questions(firing: Firing) -> tuple[Question, ...]:
    """Within each set that has two opposed conditions, the one against the other; between two such sets, which of them
    it is, with the reference condition alone, so that the answer is about the subject."""
    found, within = [], []
    for name in dict.fromkeys(s for s, _ in firing.groups):
        for target, reference in OPPOSED:
            if {(name, target), (name, reference)} <= set(firing.groups):
                found.append(Question(f"{target} or {reference}, {name}", Group(name, target), Group(name, reference)))
                within.append(Group(name, reference))
                break
    for i, one in enumerate(within):
        for other in within[i + 1 :]:
            found.append(Question(f"{one.set} or {other.set}, {one.condition}", one, other))
    return tuple(found)


def firing_table(firing: Firing, question: Question) -> pl.DataFrame:
    """A row a component: how its mean scalar differs between the two groups, in the order of the file.

    layer, module, kind, index; mean_target, mean_reference (means over prompts); effect_size (paired d_z or Hedges g,
    over prompts); auroc (of responses, pairs ignored); p_value (signed-rank, or rank-sum over prompts when unpaired);
    q_value (Benjamini-Hochberg over all components); n_target, n_reference (responses), n_prompts. Raises
    `NotEnoughData` below two prompts a side.
    """
    target, reference = (_Side(firing, group) for group in (question.target, question.reference))
    shared, paired = shared_prompts(target.prompts, reference.prompts)
    if paired:
        target, reference = target.only(shared), reference.only(shared)
    for side, group in ((target, question.target), (reference, question.reference)):
        if len(np.unique(side.prompts)) < 2:
            raise NotEnoughData(f"{firing.path}: {group.name} has fewer than two prompts to compare; read more of it.")
    responses = rank_sum(*_raised(target.means, reference.means))
    a, b = target.by_prompt(), reference.by_prompt()
    size = np.sqrt((np.concatenate([a, b]) ** 2).mean(0))
    if paired:
        d = a - b
        effect = paired_effect(d.sum(0), (d**2).sum(0), len(d), size)
        p_value = signed_rank(sparse.csc_array(d)).p_value
    else:
        effect = unpaired_effect(a.sum(0), (a**2).sum(0), len(a), b.sum(0), (b**2).sum(0), len(b), size)
        p_value = rank_sum(*_raised(a, b)).p_value
    return firing.components.select("layer", "module", "kind", "index").with_columns(
        mean_target=pl.Series(a.mean(0)), mean_reference=pl.Series(b.mean(0)),
        effect_size=pl.Series(effect).fill_nan(None), auroc=pl.Series(responses.auroc), p_value=pl.Series(p_value),
        q_value=pl.Series(benjamini_hochberg(p_value)), n_target=pl.lit(len(target.means)),
        n_reference=pl.lit(len(reference.means)), n_prompts=pl.lit(len(np.union1d(target.prompts, reference.prompts))),
    )  # fmt: skip


@dataclass(frozen=True)
class Auroc:
    """Chance that a response of the target has a higher score than one of the reference, with its interval."""

    value: float
    ci95: tuple[float, float]
    """2.5% and 97.5% points over resamples of prompts."""
    n_target: int
    n_reference: int
    n_prompts: int


def component_auroc(firing: Firing, question: Question, component: int) -> Auroc:
    """Of one component's mean scalar."""
    sides = [_Side(firing, group, component) for group in (question.target, question.reference)]
    return auroc(*(s.means[:, 0] for s in sides), *(s.prompts for s in sides))


def auroc(
    target: np.ndarray, reference: np.ndarray, target_prompts: np.ndarray, reference_prompts: np.ndarray,
    n_resamples: int = RESAMPLES, seed: int = 0,
) -> Auroc:  # fmt: skip
    """Of scores [n] and [m]; all responses of a prompt are drawn together."""
    wins = (target[:, None] > reference[None, :]) + 0.5 * (target[:, None] == reference[None, :])
    rng = np.random.default_rng(seed)
    times = resampling.multiplicities(target_prompts, reference_prompts, n_resamples, rng)
    pairs = times[0].sum(1) * times[1].sum(1)
    drawn = ((times[0] @ wins) * times[1]).sum(1)[pairs > 0] / pairs[pairs > 0]
    n_prompts = len(np.union1d(target_prompts, reference_prompts))
    return Auroc(float(wins.mean()), resampling.interval(drawn), len(target), len(reference), n_prompts)


@dataclass(frozen=True)
class Probe:
    """How well a logistic probe of mean scalars tells two groups apart, on prompts that it was not fitted on."""

    question: str
    trained_on: str
    """The same question (folds of prompts), or another one whose probe is carried over."""
    layer: int | None
    """Whose components' scalars were used; None for all layers together."""
    n_scalars: int
    auroc: Auroc


def probe(firing: Firing, question: Question, layer: int | None = None) -> Probe:
    """Grouped logistic regression over all scalars of `layer`, or of the adapter (5 folds, all of a prompt's responses
    in one). Raises `NotEnoughData` below `MIN_PROMPTS` prompts a side."""
    sides, columns = _probe_sides(firing, question, layer)
    folds = resampling.folds(*(s.prompts for s in sides))
    scores = [np.zeros(len(s.means)) for s in sides]
    for fold in range(resampling.FOLDS):
        held = [f == fold for f in folds]
        fitted = _fit(*(s.means[~h][:, columns] for s, h in zip(sides, held, strict=True)))
        for score, side, h in zip(scores, sides, held, strict=True):
            score[h] = fitted(side.means[h][:, columns])
    return Probe(question.name, question.name, layer, int(columns.sum()), _within_folds(scores, folds, sides))


def carried(firing: Firing, trained: Question, question: Question, layer: int | None = None) -> Probe:
    """The probe of `trained`, fitted on all of it, judged on `question`: whether the two are one distinction.

    The questions must have no prompt in common, or the probe would be judged on what it was fitted on.
    """
    first, columns = _probe_sides(firing, trained, layer)
    second, _ = _probe_sides(firing, question, layer)
    if len(np.intersect1d(*(np.concatenate([s.prompts for s in pair]) for pair in (first, second)))):
        raise NotEnoughData(f"{trained.name!r} and {question.name!r} share prompts, so no probe is carried over.")
    fitted = _fit(*(s.means[:, columns] for s in first))
    found = auroc(*(fitted(s.means[:, columns]) for s in second), *(s.prompts for s in second))
    return Probe(question.name, trained.name, layer, int(columns.sum()), found)


def probe_table(firing: Firing, layers: Sequence[int | None] | None = None) -> pl.DataFrame:
    """Every question's probe, and every carried one, at all layers together and layer by layer.

    question, trained_on, layer (null for all), n_scalars, auroc, low, high, n_target, n_reference, n_prompts.
    Questions that the sample cannot support are left out.
    """
    asked = questions(firing)
    rows = []
    for layer in (None, *firing.layers.tolist()) if layers is None else layers:
        for question in asked:
            for trained in asked:
                try:
                    found = (probe(firing, question, layer) if trained is question
                             else carried(firing, trained, question, layer))  # fmt: skip
                except NotEnoughData:
                    continue
                rows.append({
                    "question": found.question, "trained_on": found.trained_on, "layer": layer,
                    "n_scalars": found.n_scalars, "auroc": found.auroc.value, "low": found.auroc.ci95[0],
                    "high": found.auroc.ci95[1], "n_target": found.auroc.n_target,
                    "n_reference": found.auroc.n_reference, "n_prompts": found.auroc.n_prompts,
                })  # fmt: skip
    schema = {"question": pl.String, "trained_on": pl.String, "layer": pl.Int64, "n_scalars": pl.Int64,
              "auroc": pl.Float64, "low": pl.Float64, "high": pl.Float64, "n_target": pl.Int64,
              "n_reference": pl.Int64, "n_prompts": pl.Int64}  # fmt: skip
    return pl.DataFrame(rows, schema=schema)


def _within_folds(
    scores: Sequence[np.ndarray], folds: Sequence[np.ndarray], sides: Sequence[_Side]
) -> Auroc:
    """AUROC over pairs of responses of one held-out fold: another fold's probe has a scale of its own."""
    a, b = scores
    same = (folds[0][:, None] == folds[1][None, :]).astype(np.float64)
    wins = same * ((a[:, None] > b[None, :]) + 0.5 * (a[:, None] == b[None, :]))
    rng = np.random.default_rng(0)
    times = resampling.multiplicities(*(s.prompts for s in sides), RESAMPLES, rng)
    pairs = ((times[0] @ same) * times[1]).sum(1)
    drawn = ((times[0] @ wins) * times[1]).sum(1)[pairs > 0] / pairs[pairs > 0]
    n_prompts = len(np.union1d(*(s.prompts for s in sides)))
    return Auroc(float(wins.sum() / same.sum()), resampling.interval(drawn), len(a), len(b), n_prompts)


class _Side:
    """Mean scalars of one group's responses; those without any counted token are left out."""

    def __init__(self, firing: Firing, group: Group, component: int | None = None):
        rows = group_rows(firing, group)
        means = firing.mean(component)[rows].astype(np.float64)
        means = means if component is None else means[:, None]
        whole = np.isfinite(means).all(axis=1)
        self.means = means[whole]
        """float64 [n, c], or [n, 1] of one component"""
        self.prompts = firing.conversations["prompt_id"].gather(rows.tolist()).to_numpy().astype(str)[whole]
        """str [n]"""

    def only(self, prompts: np.ndarray) -> _Side:
        kept = np.isin(self.prompts, prompts)
        made = object.__new__(_Side)
        made.means, made.prompts = self.means[kept], self.prompts[kept]
        return made

    def by_prompt(self) -> np.ndarray:
        """float64 [n_prompts, c]: means over each prompt's responses, prompts in sorted order."""
        known, inverse, counts = np.unique(self.prompts, return_inverse=True, return_counts=True)
        total = np.zeros((len(known), self.means.shape[1]))
        np.add.at(total, inverse, self.means)
        return total / counts[:, None]


def _raised(a: np.ndarray, b: np.ndarray) -> tuple[sparse.csc_array, sparse.csc_array]:
    """Both shifted so that every value is above 0, which changes no rank."""
    lowest = np.minimum(a.min(0), b.min(0))
    scale = np.maximum(np.maximum(a.max(0), b.max(0)) - lowest, 1e-30)
    return tuple(sparse.csc_array((x - lowest) / scale + 1.0) for x in (a, b))


def _probe_sides(firing: Firing, question: Question, layer: int | None) -> tuple[list[_Side], np.ndarray]:
    sides = [_Side(firing, group) for group in (question.target, question.reference)]
    fewest = min(len(np.unique(s.prompts)) for s in sides)
    if fewest < MIN_PROMPTS:
        raise NotEnoughData(f"{question.name!r} has {fewest} prompts on one side; a probe needs {MIN_PROMPTS}.")
    columns = np.ones(firing.components.height, dtype=bool)
    return sides, columns if layer is None else (firing.components["layer"] == layer).to_numpy()


def _fit(target: np.ndarray, reference: np.ndarray):
    """Scores of a logistic regression on standardised scalars; the penalty's C is 1 / (number of scalars), so that
    the prior width of the logit does not grow with their number, and nothing is tuned."""
    from sklearn.linear_model import LogisticRegression  # a second to import

    x = np.concatenate([target, reference])
    middle, spread = x.mean(0), x.std(0)
    spread[spread == 0] = 1.0
    y = np.r_[np.ones(len(target)), np.zeros(len(reference))]
    model = LogisticRegression(C=1 / x.shape[1], max_iter=1000).fit((x - middle) / spread, y)
    return lambda values: model.decision_function((values - middle) / spread)
