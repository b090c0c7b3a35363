"""What LoRA components do to features: the linear reading of their firing, and how much of what is measured it tells.

A component adds singular value x scalar x write direction to the residual stream. Taken straight to the dictionary of a
layer above, that moves a feature's pre-activation by singular value x mean scalar x (write . encoder direction). It
leaves out what later layers make of it, what q, k, v, gate and up change (they write nowhere), and the features'
threshold; hence the comparison with the caches of the fine-tuned model and of base reading the same text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl
from scipy import sparse

from core.analysis import resampling
from core.analysis.lora import Component
from core.analysis.lora_firing import Group, group_rows
from core.analysis.lora_space import WriteSpace, write_space
from core.analysis.statistics import column_ranks
from core.dictionary import Dictionary
from core.directions import cosine
from core.errors import CacheError, CacheMismatch, NotEnoughData, SaeMismatch
from core.store.firing_file import Firing
from core.store.reader import Cache

#: Features active on a smaller share of the responses of both sides together are left out of correlations.
PREVALENCE = 0.05
#: Bootstrap resamples of prompts behind an interval.
RESAMPLES = 200


@dataclass(frozen=True, eq=False)
class Writes:
    """What an adapter's residual-writing components add, by response."""

    space: WriteSpace
    written: np.ndarray = field(repr=False)
    """float64 [n, w]: singular value x mean of what multiplies the write direction, over the response; NaN where a
    response has no counted token."""
    component: np.ndarray = field(repr=False)
    """int64 [w]: each one's place among all of the adapter's components."""

    def vectors(self, rows: np.ndarray, up_to: int, d_model: int) -> np.ndarray:
        """float64 [n, d_model]: the sum of what layers 0 to `up_to` write, of each of `rows`."""
        own = self.space.rows(up_to=up_to)
        return self.written[np.ix_(rows, own)] @ self.space.vectors[own] if len(own) else np.zeros((len(rows), d_model))


def writes(firing: Firing, parts: Sequence[Component]) -> Writes:
    """The firing file and the adapter's components, put together. Raises `CacheMismatch` when they are of different
    adapters."""
    own = [(c.key.layer, c.key.module, c.key.index) for c in parts]
    if own != firing.components.select("layer", "module", "index").rows():
        raise CacheMismatch(firing.path, "components", f"{len(parts)} of the adapter's", firing.components.height,
                            "run `python -m core lora` again")
    space = write_space(parts, firing.gains)
    values = np.array([c.singular_value for c in space.parts])
    return Writes(space, firing.written().astype(np.float64) * values, firing.writing)


def groups_of(firing: Firing, names: Sequence[str] | None = None) -> dict[str, Group]:
    """Name -> every group of responses in the file, of the sets in `names` when given."""
    found = [Group(s, c) for s, c in firing.groups if names is None or s in names]
    return {g.name: g for g in found}


def effect_table(
    firing: Firing, made: Writes, dictionary: Dictionary, component: int | None = None
) -> pl.DataFrame:
    """What a component, or all up to the dictionary's layer, does to each feature, in units of pre-activation.

    layer, feature, effect (mean over all responses, prompts alike), one column `effect: GROUP` for each group, cosine
    (of the written direction, or of the sum, with the encoder direction), rank (by effect; 1 is the most raised). It
    joins with every other table by layer and feature. Raises `CacheError` for a component above the dictionary or one
    that does not write, `SaeMismatch` for a dictionary that scales its input.
    """
    _check_dictionary(dictionary, made)
    if component is None:
        own = made.space.rows(up_to=dictionary.layer)
    else:
        own = np.flatnonzero(made.component == component)
        if not len(own):
            raise CacheError(f"{firing.path}: component {component} does not write into the residual stream.")
        key = made.space.parts[own[0]].key
        if key.layer > dictionary.layer:
            raise CacheError(f"Component {key} writes above layer {dictionary.layer}; choose a dictionary at or above "
                             f"layer {key.layer}.")  # fmt: skip
    rows = np.arange(firing.conversations.height)
    columns = {"effect": _prompt_mean(firing, made.written[:, own], rows)}
    for name, group in groups_of(firing).items():
        columns[f"effect: {name}"] = _prompt_mean(firing, made.written[:, own], group_rows(firing, group))
    directions = made.space.vectors[own] if len(own) else np.zeros((0, dictionary.d_model))
    vectors = {name: values @ directions for name, values in columns.items()}
    effects = {name: (v.astype(np.float32) @ dictionary.W_enc).astype(np.float64) for name, v in vectors.items()}
    size = np.linalg.norm(dictionary.W_enc, axis=0) * np.linalg.norm(vectors["effect"])
    table = pl.DataFrame({
        "layer": np.full(dictionary.d_sae, dictionary.layer, dtype=np.int64),
        "feature": np.arange(dictionary.d_sae, dtype=np.int64),
        **effects,
        "cosine": np.divide(effects["effect"], size, out=np.zeros(dictionary.d_sae), where=size > 0),
    })
    return table.with_columns(rank=pl.col("effect").rank("ordinal", descending=True).cast(pl.Int64))


def movers(firing: Firing, made: Writes, dictionary: Dictionary, feature: int) -> pl.DataFrame:
    """Which components move a feature: component (place in the adapter), layer, module, index, effect; all that write
    up to the dictionary's layer, the largest magnitude first. Their effects sum to `effect_table`'s."""
    _check_dictionary(dictionary, made)
    own = made.space.rows(up_to=dictionary.layer)
    mean = _prompt_mean(firing, made.written[:, own], np.arange(firing.conversations.height))
    encoder = dictionary.W_enc[:, feature].astype(np.float64)
    effect = mean * (made.space.vectors[own] @ encoder if len(own) else np.zeros(0))
    keys = [made.space.parts[i].key for i in own.tolist()]
    table = pl.DataFrame({
        "component": made.component[own], "layer": [k.layer for k in keys], "module": [k.module for k in keys],
        "index": [k.index for k in keys], "effect": effect,
    }, schema={"component": pl.Int64, "layer": pl.Int64, "module": pl.String, "index": pl.Int64, "effect": pl.Float64})
    return table.sort(pl.col("effect").abs(), descending=True)


@dataclass(frozen=True)
class Interval:
    """A figure plus and minus 1.96 standard errors over resamples of prompts.

    Not percentiles: a resample adds noise of its own, which lowers every correlation in it.
    """

    value: float
    ci95: tuple[float, float]


@dataclass(frozen=True, eq=False)
class Prediction:
    """How much of the measured model contrast at one layer the linear reading tells."""

    layer: int
    n_prompts: int
    cosine: Interval
    """Of the mean written vector with the measured mean residual difference, fine-tuned minus base."""
    norm_ratio: float
    """Length of the written vector over that of the measured difference."""
    explained: float
    """1 - |measured - written|^2 / |measured|^2: the share that the written vector accounts for as it is, without
    being scaled; below 0 where it is worse than predicting nothing."""
    preactivation: Interval | None
    """Spearman correlation over features of the predicted with the measured change of pre-activation (encoder
    direction . residual difference); None without a dictionary."""
    activation: Interval | None
    """Spearman correlation of the predicted effect with the measured mean difference of feature activation."""
    n_features: int
    """Features compared: active on at least `PREVALENCE` of the responses of both sides."""
    table: pl.DataFrame | None = field(repr=False, default=None)
    """layer, feature, effect (predicted), preactivation (measured), mean_diff (measured activation)."""


def predict(
    firing: Firing, made: Writes, set_name: str, target: Cache, reference: Cache, layer: int,
    dictionary: Dictionary | None = None, *, seed: int = 0, own: bool = True,
) -> Prediction:  # fmt: skip
    """Predicted against measured at `layer`, on one conversation set that `target` (the adapter) and `reference` (base)
    both read. With `own` false the target may be another adapter, whose change this one then predicts: a control.

    Raises `CacheMismatch` when the files are of other adapters, models or conversations, `NotEnoughData` below two
    prompts.
    """
    rows, measured, prompts = _aligned(firing, set_name, target, reference, own)
    delta = target.resid(layer, "response")[measured[0]].astype(np.float64) - reference.resid(layer, "response")[
        measured[1]
    ].astype(np.float64)
    given = made.vectors(rows, layer, delta.shape[1])
    _, inverse, counts = np.unique(prompts, return_inverse=True, return_counts=True)
    weights = 1 / counts[inverse]
    rng = np.random.default_rng(seed)
    times = resampling.multiplicities(prompts, prompts[:0], RESAMPLES, rng)[0] * weights
    times = np.concatenate([weights[None], times])
    times /= times.sum(axis=1, keepdims=True)
    p, d = times @ given, times @ delta  # [1 + RESAMPLES, d_model], the sample itself first
    cosines = np.array([cosine(a, b) for a, b in zip(p, d, strict=True)])
    square = float(d[0] @ d[0])
    explained = 1 - float(((d[0] - p[0]) ** 2).sum()) / square if square else float("nan")
    ratio = float(np.linalg.norm(p[0]) / np.sqrt(square)) if square else float("nan")
    n_prompts = len(np.unique(prompts))
    if dictionary is None:
        return Prediction(layer, n_prompts, _interval(cosines), ratio, explained, None, None, 0)
    _check_dictionary(dictionary, made)
    acts = [cache.response(layer)[r] for cache, r in zip((target, reference), measured, strict=True)]
    active = sum(np.bincount(a.indices, minlength=dictionary.d_sae) for a in acts) / (2 * len(rows))
    chosen = np.flatnonzero(active >= PREVALENCE)
    W = dictionary.W_enc[:, chosen].astype(np.float64)
    difference = (acts[0] - acts[1])[:, chosen].toarray().astype(np.float64)
    effect, linear, moved = p @ W, d @ W, times @ difference
    spearmans = [_spearmans(effect, other) for other in (linear, moved)]
    table = pl.DataFrame({
        "layer": np.full(len(chosen), layer, dtype=np.int64), "feature": chosen.astype(np.int64),
        "effect": effect[0], "preactivation": linear[0], "mean_diff": moved[0],
    })
    return Prediction(layer, n_prompts, _interval(cosines), ratio, explained, _interval(spearmans[0]),
                      _interval(spearmans[1]), len(chosen), table)


def component_cosines(made: Writes, vectors: Mapping[str, np.ndarray]) -> pl.DataFrame:
    """Cosine of every write direction with each of `vectors` [d_model]: component, then a column a name."""
    table = {"component": made.component}
    for name, vector in vectors.items():
        table[name] = np.array([cosine(w, np.asarray(vector)) for w in made.space.vectors], dtype=np.float64)
    return pl.DataFrame(table).fill_nan(None)


def _spearmans(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float64 [n]: rank correlation of each row of a [n, m] with the same row of b; NaN where one does not vary."""
    centred = []
    for values in (a, b):
        n, m = values.shape
        stored = sparse.csc_array(
            (values.ravel(), np.tile(np.arange(m), n), np.arange(0, n * m + 1, m)), shape=(m, n)
        )  # every value stored, zeros too
        ranks = column_ranks(stored).ranks.reshape(n, m)
        centred.append(ranks - ranks.mean(axis=1, keepdims=True))
    size = np.sqrt((centred[0] ** 2).sum(1) * (centred[1] ** 2).sum(1))
    return np.divide((centred[0] * centred[1]).sum(1), size, out=np.full(len(a), np.nan), where=size > 0)


def _interval(drawn: np.ndarray) -> Interval:
    value, error = float(drawn[0]), float(np.std(drawn[1:], ddof=1))
    return Interval(value, (value - 1.96 * error, value + 1.96 * error))


def _check_dictionary(dictionary: Dictionary, made: Writes) -> None:
    if dictionary.normalize_activations != "none":
        raise SaeMismatch(
            f"The SAE {dictionary.sae_id} scales its input ({dictionary.normalize_activations}), so what is written "
            "does not move its pre-activations linearly."
        )
    if len(made.space.parts) and made.space.vectors.shape[1] != dictionary.d_model:
        raise SaeMismatch(f"The SAE {dictionary.sae_id} has d_model {dictionary.d_model}, the adapter writes "
                          f"{made.space.vectors.shape[1]}.")  # fmt: skip


def _prompt_mean(firing: Firing, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """float64 [k]: mean of values [n, k] over `rows`, responses averaged within a prompt, then prompts."""
    prompts = firing.conversations["prompt_id"].gather(rows.tolist()).to_numpy().astype(str)
    known = np.isfinite(values[rows]).all(axis=1)
    _, inverse, counts = np.unique(prompts[known], return_inverse=True, return_counts=True)
    if not len(counts):
        return np.zeros(values.shape[1])
    weights = 1 / counts[inverse]
    return weights @ values[rows][known] / weights.sum()


def _aligned(
    firing: Firing, set_name: str, target: Cache, reference: Cache, own: bool
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Rows of the firing file, of both caches, and prompt ids, conversation by conversation."""
    expected = firing.spec["sets"].get(set_name)
    if expected is None:
        raise CacheError(f"{firing.path}: holds no firing on {set_name!r}; it holds {', '.join(firing.spec['sets'])}.")
    wanted = [(cache, field, firing.spec[field]) for cache in (target, reference) for field in ("weights", "dtype")]
    wanted += [(cache, "conversations_hash", expected) for cache in (target, reference)]
    wanted += [(target, "adapter", firing.spec["adapter"])] * own + [(reference, "adapter", None)]
    for cache, name, value in wanted:
        if cache.spec[name] != value:
            raise CacheMismatch(cache.path, name, value, cache.spec[name])
    table = firing.conversations
    rows = np.flatnonzero((table["set"] == set_name).to_numpy())
    rows = rows[np.isfinite(firing.written()[rows]).all(axis=1)]
    ids = table["id"].gather(rows.tolist()).to_list()
    places = []
    for cache in (target, reference):
        at = {name: i for i, name in enumerate(cache.conversations["id"].to_list())}
        places.append(np.array([at[name] for name in ids], dtype=np.int64))
    prompts = table["prompt_id"].gather(rows.tolist()).to_numpy().astype(str)
    if len(np.unique(prompts)) < 2:
        raise NotEnoughData(f"{firing.path}: {set_name} has fewer than two prompts, so nothing can be compared.")
    return rows, (places[0], places[1]), prompts
