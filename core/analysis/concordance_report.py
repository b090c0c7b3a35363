"""A concordance in words and as JSON: the sentence with its figures, and the lists of shared and exclusive features.

Every figure in the sentence is taken from the result at hand. It does not compute any, and does not know files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import polars as pl

from core.analysis import ends
from core.analysis.concordance import Concordance
from core.analysis.ends import TAILS, AtK, Chance, Tail
from core.specs import ContrastSpec

#: What a contrast of each kind is called where the kinds compared are different: alone, and after "raised".
KIND_WORDS = {
    "data": ("data", "by the data"),
    "model": ("model", "in the model"),
    "response": ("responses", "in the responses"),
}


@dataclass(frozen=True)
class Words:
    """How one contrast is called."""

    short: str
    """`data`, or its title."""
    phrase: str
    """`by the data`: what follows "raised"."""


def words_for(specs: Sequence[ContrastSpec]) -> dict[str, Words]:
    """Contrast -> its words: by kind where the kinds differ, else by title, else by name."""
    if len({spec.kind for spec in specs}) == len(specs):
        return {spec.name: Words(*KIND_WORDS[spec.kind]) for spec in specs}
    titles = [spec.title or spec.name for spec in specs]
    called = titles if len(set(titles)) == len(titles) else [spec.name for spec in specs]
    return {spec.name: Words(title, f"in “{title}”") for spec, title in zip(specs, called, strict=True)}


def sentence(found: Concordance, tail: Tail, words: Mapping[str, Words] | None = None) -> str:
    """What one end shares: of the first contrast's top k, how many are in the others', against chance and control."""
    words = words or {name: Words(name, f"in {name}") for name in found.names}
    first, *others = found.names
    start = "With the benign control taken off, of" if found.settings.subtract != "none" else "Of"
    at = {names: found.overlap_of(names, tail).at_k(found.settings.k) for names in _groups(found.names)}
    mine = at[first, others[0]].sizes[0]
    if not mine:
        return f"No feature is {tail} {words[first].phrase}."
    start += f" the {_count(mine, 'feature')} most {tail} {words[first].phrase}, "
    parts = []
    for other in others:
        pair = at[first, other]
        verb = "is" if pair.observed == 1 else "are"
        where = f"among the {pair.sizes[1]:,} most {tail} {words[other].phrase}"
        parts.append((f"{pair.observed:,} {verb} also {where}", _beside(pair, first, other, words)))
    if len(others) == 1:
        (claim, beside), = parts
        return f"{start}{claim}; {'; '.join(beside)}."
    all_three = at[found.names]
    claims = " and ".join(f"{claim} ({'; '.join(beside)})" for claim, beside in parts)
    verb = "is" if all_three.observed == 1 else "are"
    return f"{start}{claims}; {all_three.observed:,} {verb} in all three ({_chance(all_three.stricter)})."


def _beside(at: AtK, first: str, other: str, words: Mapping[str, Words]) -> list[str]:
    found = [_chance(at.stricter)]
    if other in at.controls:
        found.append(f"benign control {at.controls[other]:,}")
    elif first in at.controls:
        found.append(f"benign control ({words[first].short}) {at.controls[first]:,}")
    return found


def _chance(chance: Chance) -> str:
    low, high = chance.ci95
    return f"chance {figure(chance.expected)}, 95% range {low:.0f} to {high:.0f}"


def figure(value: float) -> str:
    """`14`, `0.8`, `0.03`, `below 0.01`."""
    if value >= 0.095:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.005 or value == 0 else "below 0.01"


def _count(n: int, noun: str) -> str:
    return noun if n == 1 else f"{n:,} {noun}s"


def _groups(names: Sequence[str]) -> list[tuple[str, ...]]:
    return [*combinations(names, 2), *([tuple(names)] if len(names) > 2 else [])]


def listed(found: Concordance, tail: Tail, within: Collection[str]) -> pl.DataFrame:
    """Features in the top k, at one end, of exactly the contrasts `within`; the best mean place among these first.

    The columns are those of `Concordance.table` and `place` (the mean place).
    """
    wanted = pl.lit(True)
    for name in found.names:
        inside = (pl.col(f"{tail}_{name}") <= found.settings.k).fill_null(False)
        wanted = wanted & (inside if name in within else ~inside)
    place = pl.mean_horizontal([pl.col(f"{tail}_{name}") for name in within])
    return found.table.filter(wanted).with_columns(place.alias("place")).sort("place", "feature")


def concordance_summary(
    found: Concordance,
    top: int = 20,
    *,
    words: Mapping[str, Words] | None = None,
    context: Callable[[str, int], str] | None = None,
    layers: Sequence[Concordance] = (),
) -> dict[str, Any]:
    """The `concordance` result for JSON: at most `top` features a list; no NaN, only null.

    `overlap_at_k` is of the raised end of all contrasts. `context` gives a text for a contrast's name and a feature;
    `layers` are the same comparison at other layers.
    """
    names = found.names

    def rows(within: Sequence[str]) -> list[dict[str, Any]]:
        made = []
        for tail in TAILS:
            for row in listed(found, tail, within).head(top).to_dicts():
                more = {"context": context(within[0], row["feature"])} if context else {}
                made.append({"tail": tail, **row, **more})
        return made

    pairs = {
        "|".join(pair): {tail: _at_k(found, pair, tail) for tail in TAILS} for pair in combinations(names, 2)
    }
    return {
        "contrasts": list(names),
        "layer": found.layer,
        "position": found.position,
        "k": found.settings.k,
        "d_sae": found.d_sae,
        "n_features": found.n_features,
        "n_format_hidden": found.n_format_hidden,
        "controlled": list(found.controlled),
        "spearman": _spearman(found),
        "rank_biased_overlap": {
            "|".join(pair): {
                tail: {
                    "value": _number(found.overlap_of(pair, tail).rbo),
                    "expected": _number(found.overlap_of(pair, tail).rbo_expected),
                    "p": ends.persistence(found.settings.k),
                }
                for tail in TAILS
            }
            for pair in combinations(names, 2)
        },
        "overlap_at_k": _at_k(found, names, "raised"),
        "overlap_at_k_suppressed": _at_k(found, names, "suppressed"),
        "pairs": pairs if len(names) > 2 else {},
        "quadrants": dict(found.table["quadrant"].value_counts(sort=True).iter_rows()),
        "shared": rows(names),
        "shared_by_two": {"|".join(p): rows(p) for p in combinations(names, 2)} if len(names) > 2 else {},
        "exclusive": {name: rows([name]) for name in names},
        "by_layer": [
            {"layer": one.layer, "n_features": one.n_features, "spearman": _spearman(one),
             "overlap_at_k": _at_k(one, names, "raised"), "overlap_at_k_suppressed": _at_k(one, names, "suppressed")}
            for one in layers
        ],
        "settings": {**asdict(found.settings), "ks": list(found.settings.ks)},
        "notes": list(found.notes),
        "sentence": " ".join(sentence(found, tail, words) for tail in TAILS),
    }  # fmt: skip


def _spearman(found: Concordance) -> dict[str, Any]:
    return {
        "|".join(p.names): {"rho": _number(p.spearman.rho), "n": p.spearman.n,
                            "ci95": [_number(x) for x in p.spearman.ci95], "expected": _number(p.spearman.expected)}
        for p in found.pairs
    }  # fmt: skip


def _at_k(found: Concordance, names: Sequence[str], tail: Tail) -> list[dict[str, Any]]:
    return [
        {"k": at.k, "observed": at.observed, "expected": at.uniform.expected, "ci95": list(at.uniform.ci95),
         "expected_matched": at.matched.expected, "ci95_matched": list(at.matched.ci95), "controls": at.controls}
        for at in found.overlap_of(tuple(names), tail).at
    ]  # fmt: skip


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
