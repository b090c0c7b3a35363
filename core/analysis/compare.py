"""From a contrast and its cache files to the tables the pages draw: sides, ranking, values of a feature.

Knows caches and the analysis room, not Streamlit: the command line can call the same functions.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from core.analysis.feature_table import attach
from core.analysis.ranking import Ranking, RankingSettings, Sample, rank_features
from core.errors import CacheError, CacheMismatch
from core.specs import ContrastSpec, Side, in_source
from core.store.attribution_file import attribution_file, read_attribution
from core.store.reader import Cache, Context

#: Total variation distance of the sides' sources above which an unpaired contrast is said to compare subjects too.
SUBJECTS_DIFFER = 0.25
#: A message lists at most this many conditions or sources.
MOST_NAMED = 12


@dataclass(frozen=True)
class Sides:
    """The two sides of a contrast with their open caches (the same cache twice when one file holds both)."""

    contrast: ContrastSpec
    target: Cache
    reference: Cache

    @property
    def names(self) -> tuple[str, str]:
        """Two different words for target and reference: what differs between them, condition before variant."""
        t, r = self.contrast.target, self.contrast.reference
        for field in ("condition", "variant", "conversations", "source"):
            a, b = getattr(t, field), getattr(r, field)
            if a and b and a != b:
                return a, b
        return "target", "reference"

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(layer for layer in self.target.layers if layer in self.reference.layers)


def side_rows(cache: Cache, side: Side) -> np.ndarray:
    """Rows [n] of the cache that belong to `side`. Raises `CacheError` when its condition or source has none."""
    table = cache.conversations
    rows = np.arange(table.height)
    for column, wanted in (("condition", side.condition), ("source", side.source)):
        if wanted is None and len(rows):
            continue
        values = table[column].gather(rows.tolist())
        belongs = pl.Series([in_source(v, wanted) for v in values]) if column == "source" else values == wanted
        if not belongs.any():
            who = f"{side.condition} conversation" if column == "source" and side.condition else "conversation"
            names = sorted({v or "(none)" for v in values.to_list()})
            found = ", ".join(names[:MOST_NAMED]) + (", ..." if len(names) > MOST_NAMED else "")
            raise CacheError(f"{cache.path}: no {who} has {column} {wanted!r}; it holds {found or 'no conversations'}.")
        rows = rows[belongs.to_numpy()]
    return rows


def make_sample(cache: Cache, side: Side, name: str, layer: int, position: str) -> Sample:
    """Feature activations of one side at one layer and position. Raises `CacheError` without an SAE there."""
    if layer not in cache.layers:
        raise CacheError(f"{cache.path}: layer {layer} is not cached; it holds {', '.join(map(str, cache.layers))}.")
    if cache.info(layer).d_sae == 0:
        raise CacheError(f"{cache.path}: layer {layer} was cached without an SAE, so it has no features.")
    rows = side_rows(cache, side)
    acts = cache.last_prompt(layer) if position == "last_prompt" else cache.response(layer, "mean")
    table = cache.conversations[rows.tolist()]
    return Sample(
        name=name,
        acts=acts[rows],
        prompt_ids=table["prompt_id"].to_numpy(),
        lengths=table["n_response_tokens"].to_numpy(),
    )


def rank(sides: Sides, layer: int, position: str, settings: RankingSettings) -> Ranking:
    """The ranking of one contrast at one layer and position.

    Raises `CacheMismatch` when the sides were read with different SAEs: their feature numbers mean different things.
    """
    saes = [cache.spec["saes"].get(str(layer)) for cache in (sides.target, sides.reference)]
    if saes[0] != saes[1]:
        raise CacheMismatch(sides.reference.path, f"the SAE of layer {layer}", saes[0], saes[1])
    content = sides.target.content_share(layer)
    if sides.reference.path != sides.target.path:
        other = sides.reference.content_share(layer)
        content = np.where(np.isnan(content), other, content)
    target, reference = (
        make_sample(cache, side, name, layer, position)
        for cache, side, name in zip(
            (sides.target, sides.reference), (sides.contrast.target, sides.contrast.reference), sides.names, strict=True
        )
    )
    made = rank_features(target, reference, layer=layer, position=position, content_share=content, settings=settings)
    return made if made.paired else replace(made, notes=(*made.notes, *subject_notes(sides)))


def subject_notes(sides: Sides) -> tuple[str, ...]:
    """A sentence when the sides of an unpaired contrast answer different kinds of question.

    A response's kind is its source up to the first slash. The sides differ when the total variation distance of their
    kinds is above `SUBJECTS_DIFFER`: then what they speak about is part of every difference.
    """
    shares = []
    for cache, side in ((sides.target, sides.contrast.target), (sides.reference, sides.contrast.reference)):
        sources = cache.conversations["source"].gather(side_rows(cache, side).tolist())
        kinds = [source.split("/")[0] for source in sources]
        shares.append({kind: n / len(kinds) for kind, n in Counter(kinds).items()})
    kinds = sorted(shares[0].keys() | shares[1].keys())
    distance = sum(abs(shares[0].get(k, 0.0) - shares[1].get(k, 0.0)) for k in kinds) / 2
    if distance <= SUBJECTS_DIFFER:
        return ()
    told = [
        f"{max(share.values()):.0%} of the {name} responses are from {max(share, key=share.get) or '(no source)'}"
        for name, share in zip(sides.names, shares, strict=True)
    ]
    return (
        f"The sides answer different kinds of question: {told[0]}, {told[1]}. "
        "What they speak about is part of every difference here; compare with the control, or within one source.",
    )


def with_attribution(ranking: Ranking, sides: Sides) -> Ranking:
    """The ranking with the columns delta_attribution and delta_attribution_se, where `attribute` has computed them.

    They are of all prompts of the contrast, also where the ranking keeps length-matched ones. A file that belongs to
    other caches, or cannot be read, is left aside with a note. Only for position `response`.
    """
    path = attribution_file(sides.target.path.parent, sides.contrast.name)
    if ranking.position != "response" or not os.path.isfile(path):
        return ranking
    try:
        found = read_attribution(path, sides.contrast, sides.target, sides.reference, ranking.layer)
    except CacheError as error:
        return replace(ranking, notes=(*ranking.notes, f"Delta-attribution is left out: {error}"))
    return ranking if found is None else replace(ranking, table=attach(ranking.table, found))


def feature_values(sides: Sides, layer: int, position: str, feature: int) -> pl.DataFrame:
    """One row a response: `side` (name), `activation` (>= 0), `row` and `id` of the conversation."""
    parts = []
    specs = (sides.contrast.target, sides.contrast.reference)
    for cache, side, name in zip((sides.target, sides.reference), specs, sides.names, strict=True):
        rows = side_rows(cache, side)
        sample = make_sample(cache, side, name, layer, position)
        parts.append(pl.DataFrame({
            "side": [name] * len(rows),
            "activation": sample.acts[:, [feature]].toarray().ravel().astype(float),
            "row": rows,
            "id": cache.conversations["id"].gather(rows.tolist()),
        }))
    return pl.concat(parts)


def contexts(sides: Sides, layer: int, feature: int) -> tuple[list[Context], list[Context]]:
    """The strongest contexts of one feature on the target's side and on the reference's, strongest first."""
    found = []
    for cache, side in ((sides.target, sides.contrast.target), (sides.reference, sides.contrast.reference)):
        rows = set(side_rows(cache, side).tolist())
        own = [c for c in cache.contexts(layer, feature) if c.row in rows and c.value > 0]
        found.append(sorted(own, key=lambda c: -c.value))
    return found[0], found[1]
