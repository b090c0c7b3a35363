"""Tables of contrasts, computed once: rankings, the depth view, concordance, the values of one feature.

They are cached by the files they were read from (path, time and size) and the settings. Errors stop the page with one
sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import streamlit as st

from core.analysis import compare
from core.analysis import depth as by_depth
from core.analysis.compare import Sides
from core.analysis.concordance import Concordance, ConcordanceSettings
from core.analysis.concordance_files import RANKING, Contrasts, concord_at, every_layer
from core.analysis.find import open_sides
from core.analysis.ranking import Ranking, RankingSettings
from core.errors import MicroscopeError
from core.specs import ContrastSpec
from core.store.reader import Cache, Context
from core.view.inventory import FileKey
from core.view.session.caches import open_cache, open_key, side_keys
from core.view.session.chosen import View
from core.view.session.messages import stop_with

#: Shuffles of the permutation control: enough for a mean and a range.
PERMUTATIONS = 20
#: What the first chart waits for: everything but the permutation control, which takes longest.
QUICK = RankingSettings(n_permutations=0)


def load_ranking(chosen: View, sides: Sides, settings: RankingSettings = QUICK) -> Ranking:
    """The ranking, with delta-attribution where it was computed; with `QUICK` settings in well under a second.

    Errors stop the page with one sentence. The attribution is read anew each time, so a fresh one is seen.
    """
    try:
        ranking = _ranking(*side_keys(sides), chosen.contrast, chosen.layer, chosen.position, settings)
        return compare.with_attribution(ranking, sides)
    except MicroscopeError as error:
        stop_with(error)


@st.cache_data(max_entries=64, show_spinner=False)
def _ranking(target: FileKey, reference: FileKey, contrast: ContrastSpec, layer: int, position: str,
             settings: RankingSettings) -> Ranking:
    return compare.rank(Sides(contrast, open_key(*target), open_key(*reference)), layer, position, settings)


def load_rankings(chosen: View, names: Sequence[str]) -> dict[str, Ranking]:
    """Rankings of several contrasts at the chosen layer and position; those that cannot be ranked are left out."""
    found = {}
    for name in names:
        contrast = chosen.experiment.contrast(name)
        try:
            sides = open_sides(chosen.experiment, contrast, None, open_cache)
            found[name] = _ranking(*side_keys(sides), contrast, chosen.layer, chosen.position, QUICK)
        except MicroscopeError:
            continue
    return found


def example_rows(sides: Sides, n: int = 6) -> list[tuple[str, Cache, list[int]]]:
    """(side's name, its cache, a few of its rows spread over the file) for target and reference."""
    found = []
    for name, cache, side in zip(sides.names, (sides.target, sides.reference),
                                 (sides.contrast.target, sides.contrast.reference), strict=True):
        rows = compare.side_rows(cache, side)
        found.append((name, cache, rows[np.linspace(0, len(rows) - 1, min(n, len(rows))).astype(int)].tolist()))
    return found


def load_depth(chosen: View, sides: Sides, settings: RankingSettings = QUICK) -> pl.DataFrame:
    """One row a cached layer: the fields of `Depth`."""
    settings = replace(settings, replication_k=0)
    try:
        rows = [_depth(*side_keys(sides), chosen.contrast, layer, chosen.position, settings) for layer in sides.layers]
    except MicroscopeError as error:
        stop_with(error)
    return pl.DataFrame([vars(row) for row in rows], infer_schema_length=None)


@st.cache_data(max_entries=256, show_spinner=False)
def _depth(target: FileKey, reference: FileKey, contrast: ContrastSpec, layer: int, position: str,
           settings: RankingSettings) -> by_depth.Depth:
    return by_depth.depth(Sides(contrast, open_key(*target), open_key(*reference)), layer, position, settings)


def load_concordance(chosen: View, found: Contrasts, settings: ConcordanceSettings) -> Concordance:
    """What the contrasts share at the chosen layer and position. Errors stop the page with one sentence."""
    try:
        return _concordance(_contrasts_key(found), chosen.layer, chosen.position, settings, found)
    except MicroscopeError as error:
        stop_with(error)


@st.cache_data(max_entries=64, show_spinner=False)
def _concordance(key: tuple[Any, ...], layer: int, position: str, settings: ConcordanceSettings,
                 _found: Contrasts) -> Concordance:
    return concord_at(_found, layer, position, settings, _remembered_rank)


def load_every_layer(chosen: View, found: Contrasts, settings: ConcordanceSettings) -> list[Concordance]:
    """The same at every cached layer."""
    try:
        return _every_layer(_contrasts_key(found), chosen.position, settings, found)
    except MicroscopeError as error:
        stop_with(error)


@st.cache_data(max_entries=16, show_spinner=False)
def _every_layer(key: tuple[Any, ...], position: str, settings: ConcordanceSettings,
                 _found: Contrasts) -> list[Concordance]:
    return every_layer(_found, position, settings, _remembered_rank)


def _remembered_rank(sides: Sides, layer: int, position: str) -> Ranking:
    return _ranking(*side_keys(sides), sides.contrast, layer, position, RANKING)


def _contrasts_key(found: Contrasts) -> tuple[Any, ...]:
    opened = (*found.sides.items(), *found.controls.items())
    return (*((name, sides.contrast, *side_keys(sides)) for name, sides in opened), found.missing)


def load_values(chosen: View, sides: Sides, feature: int) -> pl.DataFrame:
    """Activation of one feature on every response of both sides."""
    try:
        return compare.feature_values(sides, chosen.layer, chosen.position, feature)
    except MicroscopeError as error:
        stop_with(error)


def load_contexts(chosen: View, sides: Sides, feature: int) -> tuple[list[Context], list[Context]]:
    """Strongest contexts of one feature on the target's side and on the reference's."""
    try:
        return compare.contexts(sides, chosen.layer, feature)
    except MicroscopeError as error:
        stop_with(error)
