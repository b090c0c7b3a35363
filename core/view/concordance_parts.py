"""What the Concordance page says and lists: which contrasts to begin with, groups of features, rows of a table.

Pure, like describe.py: returns Markdown in which foreign text is escaped, and tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import polars as pl

from core.analysis.concordance import Concordance
from core.analysis.concordance_report import Words, figure, listed, sentence
from core.analysis.ends import TAILS, Tail
from core.specs import ContrastSpec, Experiment
from core.view.guide import markdown_safe


def others(experiment: Experiment, first: ContrastSpec) -> list[str]:
    """Contrasts that can be compared with `first`: all others, benign controls last."""
    controls = {c.control for c in experiment.contrasts}
    names = [c.name for c in experiment.contrasts if c.name != first.name]
    return sorted(names, key=lambda name: name in controls)


def begin_with(experiment: Experiment, first: ContrastSpec, ready: Callable[[ContrastSpec], bool]) -> list[str]:
    """Contrasts to compare with `first` before anything is chosen: one of each other kind, cached ones before others.

    Where there is no other kind, the first contrast that is not its own benign control.
    """
    controls = {c.control for c in experiment.contrasts}
    named = [experiment.contrast(name) for name in others(experiment, first)]
    own = [c for c in named if c.name not in controls] or named
    found: dict[str, str] = {}
    for contrast in sorted(own, key=lambda c: not ready(c)):
        if contrast.kind != first.kind:
            found.setdefault(contrast.kind, contrast.name)
    able = [name for name in found.values() if ready(experiment.contrast(name))]
    return able or list(found.values())[:1] or [c.name for c in own[:1]]


def headline(found: Concordance, tail: Tail, words: Mapping[str, Words]) -> tuple[str, str]:
    """(the sentence of the chosen end, that of the other end)."""
    other = next(t for t in TAILS if t != tail)
    return markdown_safe(sentence(found, tail, words)), markdown_safe(sentence(found, other, words))


def legend(specs: Sequence[ContrastSpec], words: Mapping[str, Words]) -> str:
    """What each word for a contrast stands for, where words differ from titles."""
    parts = [f"**{markdown_safe(words[s.name].short)}**: {markdown_safe(s.title or s.name)}" for s in specs
             if words[s.name].short != (s.title or s.name)]
    return "  \n".join(parts)


def chance(found: Concordance, tail: Tail) -> str:
    """Both chances of the first two contrasts in a sentence, and what they leave out."""
    at = found.overlap_of(found.names[:2], tail).at_k(found.settings.k)
    return (
        f"{found.n_features:,} features could be tested in all of them. Chance for the first two: "
        f"{figure(at.uniform.expected)} if every feature were as likely as any other, {figure(at.matched.expected)} "
        "among features active about as often; the larger is the one quoted."
    )


def figures(found: Concordance, tail: Tail, words: Mapping[str, Words]) -> list[tuple[str, str, str]]:
    """(heading, value, word of the guide) for the figures above the charts."""
    made, several = [], len(found.names) > 2
    for pair in combinations(found.names, 2):
        rho = found.spearman(*pair)
        heading = f"Spearman, {called(pair, words)}" if several else "Spearman"
        made.append((heading, f"{rho.rho:+.2f}" if math.isfinite(rho.rho) else "none", "spearman"))
    if not several:
        one = found.overlap_of(found.names, tail)
        made.append(("Rank-biased overlap", f"{one.rbo:.2f}" if math.isfinite(one.rbo) else "none", "rbo"))
    quadrants = found.table["quadrant"]
    made.append(("Moved alike in all", f"{(quadrants == 'shared').sum():,}", "quadrant"))
    made.append(("Opposed", f"{(quadrants == 'opposed').sum():,}", "quadrant"))
    return made


def with_table(found: Concordance, table: pl.DataFrame) -> Concordance:
    """The same with names joined to its table."""
    return replace(found, table=table)


def pairs(found: Concordance) -> dict[str, tuple[str, str]]:
    """Key for the URL -> a pair of contrasts."""
    return {"+".join(pair): pair for pair in combinations(found.names, 2)}


def called(names: Sequence[str], words: Mapping[str, Words]) -> str:
    """`data and model`."""
    return " and ".join(words[name].short for name in names)


def control_note(found: Concordance, pair: tuple[str, str], words: Mapping[str, Words]) -> str:
    """For which contrast the benign control stands in, in the curve of overlap by k; empty without one."""
    able = [name for name in reversed(pair) if name in found.controlled] if found.settings.subtract == "none" else []
    return f"Benign control: its ranking in the place of {markdown_safe(words[able[0]].short)}." if able else ""


def groups(found: Concordance, tail: Tail, words: Mapping[str, Words]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Key for the URL -> (heading with its count, contrasts whose top k it is): shared by all, by two, by one."""
    made = {}
    for size in range(len(found.names), 0, -1):
        for names in combinations(found.names, size):
            count = listed(found, tail, names).height
            whole = "In all three" if size == 3 else "In both"
            heading = whole if size == len(found.names) else f"Only {called(names, words)}"
            made["+".join(names)] = (f"{heading} ({count:,})", names)
    return made


def rows(found: Concordance, tail: Tail, within: Sequence[str], words: Mapping[str, Words]) -> pl.DataFrame:
    """One list for reading: feature, name, and the effect and place of each contrast, under words of their own."""
    table = listed(found, tail, within)
    return table.select(
        "feature", "name",
        *(pl.col(f"effect_{n}").alias(f"Effect, {words[n].short}") for n in found.names),
        *(pl.col(f"{tail}_{n}").alias(f"Place, {words[n].short}") for n in found.names),
    )


def one_line(found: Concordance, feature: int, words: Mapping[str, Words]) -> str:
    """One feature in two lines: number, name, and its effect in every contrast."""
    table = found.table.filter(pl.col("feature") == feature)
    if table.is_empty():
        return f"**Feature {feature}**  \nnot considered here: too rare in one of the contrasts, or a format feature"
    row = table.row(0, named=True)
    parts = []
    for name in found.names:
        q, control = row[f"q_{name}"], row[f"control_{name}"]
        more = [] if q is None else [f"q = {q:.2g}"]
        more += [] if control is None else [f"benign control {control:+.2f}"]
        beside = f" ({', '.join(more)})" if more else ""
        parts.append(f"{markdown_safe(words[name].short)} {row[f'effect_{name}']:+.2f}{beside}")
    return f"**Feature {feature}** · {markdown_safe(row['name'])}  \nEffect size: {'; '.join(parts)}"
