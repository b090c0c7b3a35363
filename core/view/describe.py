"""Computed sentences and small selections of a ranking: what the pages say in words, each from the figures at hand.

Pure; returns Markdown in which foreign text is escaped.
"""

from __future__ import annotations

import math

import numpy as np
import polars as pl

from core.analysis import feature_table
from core.analysis.ranking import Ranking, Replication
from core.view.guide import markdown_safe

#: Column without which a depth chart has nothing to draw.
DEPTH_NEEDS = {"depth_counts": "n_raised", "depth_effects": "max_raised", "depth_separation": "resid_auroc"}


def ends(table: pl.DataFrame) -> dict[str, int]:
    """The features called `top` (most raised) and `bottom` (most suppressed), where there are any."""
    found = {"top": feature_table.top(table, 1), "bottom": feature_table.bottom(table, 1)}
    return {word: int(rows["feature"][0]) for word, rows in found.items() if rows.height}


def sample(ranking: Ranking) -> str:
    """What was compared, and the length difference."""
    unit = "matched prompts" if ranking.paired else "prompts, unpaired"
    words = (f"{ranking.n_target:,} {markdown_safe(ranking.target)} against {ranking.n_reference:,} "
             f"{markdown_safe(ranking.reference)} responses to {ranking.n_prompts:,} {unit}.")
    if not math.isfinite(ranking.length_ratio):
        return words
    change = ranking.length_ratio - 1
    how = "as long as" if abs(change) < 0.005 else f"{abs(change):.1%} {'longer' if change > 0 else 'shorter'} than"
    return (f"{words} {markdown_safe(ranking.target).capitalize()} responses are {how} the others on average "
            f"({ranking.mean_length_target:.1f} against {ranking.mean_length_reference:.1f} tokens).")


def held_out(found: Replication | None) -> str:
    """`87 of 100`, for a figure."""
    return "none" if found is None else f"{found.n_replicated:,} of {found.n_carried:,}"


def replication(found: Replication | None, *, waiting: bool = False) -> str:
    """One sentence: how many of the top features hold on the held-out half, against shuffled labels."""
    if found is None:
        return "Replication on a held-out half cannot be computed here."
    words = (f"Of the {found.n_raised} most raised and {found.n_suppressed} most suppressed features picked on one "
             f"half of the prompts ({found.n_prompts_discovery}), **{found.n_raised_replicated}** and "
             f"**{found.n_suppressed_replicated}** hold on the other half ({found.n_prompts_confirmation})")
    if waiting or not found.n_permutations:
        return f"{words}; with shuffled labels: being computed." if waiting else f"{words}."
    low, high = found.permuted_ci95
    return (f"{words}; with labels shuffled, {found.permuted_mean:.1f} of {found.n_carried} do on average "
            f"(95% range {low:.0f} to {high:.0f}, {found.n_permutations} shuffles).")


def one_line(table: pl.DataFrame, feature: int) -> str:
    """One feature in a line: number, name, effect size, q."""
    rows = table.filter(pl.col("feature") == feature)
    if rows.is_empty():
        return f"**Feature {feature}**"
    row = rows.row(0, named=True)
    effect = "no effect size" if row["effect_size"] is None else f"effect size {row['effect_size']:+.2f}"
    q = "not tested" if row["q_value"] is None else f"q = {row['q_value']:.2g}"
    return f"**Feature {feature}** · {markdown_safe(row['name'])}  \n{effect}, {q}"


def filtered(table: pl.DataFrame, *, find: str, tail: str, passing: bool) -> pl.DataFrame:
    """Rows of one tail (`both`, `raised`, `suppressed`), with `find` in label, what it fires on, tokens or number."""
    rows = table
    if tail != "both":
        rows = rows.filter(pl.col("effect_size") > 0 if tail == "raised" else pl.col("effect_size") < 0)
        rows = rows.sort("rank", descending=tail == "suppressed", nulls_last=True)
    if passing:
        rows = rows.filter(pl.col("direction") != "not significant")
    word = find.strip().lower()
    if word:
        rows = rows.filter(
            pl.col("label").str.to_lowercase().str.contains(word, literal=True)
            | pl.col("tokens").str.to_lowercase().str.contains(word, literal=True)
            | pl.col("fires_on").str.to_lowercase().str.contains(word, literal=True)
            | (pl.col("feature").cast(pl.String) == word)
        )
    return rows


def depth(rows: pl.DataFrame) -> str:
    """Which layer stands out, in a sentence."""
    parts = []
    passed = rows.drop_nulls("n_raised").with_columns(n=pl.col("n_raised") + pl.col("n_suppressed"))
    if passed.height and passed["n"].max():
        best = passed.sort("n", descending=True).row(0, named=True)
        parts.append(f"Most features pass at layer **{best['layer']}** ({best['n_raised']:,} raised, "
                     f"{best['n_suppressed']:,} suppressed).")
    clear = rows.drop_nulls("resid_auroc")
    if clear.height:
        best = clear.sort("resid_auroc", descending=True).row(0, named=True)
        parts.append(f"The residual mean difference separates the sides best at layer **{best['layer']}** (held-out "
                     f"AUROC {best['resid_auroc']:.2f}).")
    return " ".join(parts) or "No cached layer has enough conversations for these figures."


def figures(row: dict, ranking: Ranking) -> list[tuple[str, str, str]]:
    """(heading, value, word of the guide) of a feature's row in the ranking, for the figures on its page."""
    ranked = int(ranking.table["rank"].count())
    return [
        ("Rank", "none" if row["rank"] is None else f"{row['rank']:,} of {ranked:,}", "rank"),
        ("Effect size", _number(row["effect_size"], "+.2f"), "effect_size"),
        ("q", _number(row["q_value"], ".2g", "not tested"), "q_value"),
        ("AUROC", _number(row["auroc"], ".2f"), "auroc"),
        ("Content share", _number(row["content_share"], ".0%"), "content_share"),
    ]


def _number(value: float | None, form: str, otherwise: str = "none") -> str:
    return otherwise if value is None or not math.isfinite(value) else format(value, form)


def means(row: dict, ranking: Ranking) -> str:
    """Means and shares of both sides, in a sentence."""
    target, reference = markdown_safe(ranking.target), markdown_safe(ranking.reference)
    return (f"Mean activation **{row['mean_target']:.3g}** on {target} and **{row['mean_reference']:.3g}** on "
            f"{reference} responses; active on **{row['frac_active_target']:.0%}** and "
            f"**{row['frac_active_reference']:.0%}** of them.")


def zeros(values: pl.DataFrame, names: tuple[str, str]) -> str:
    """Share of responses on which the feature is silent, and the medians, by side."""
    parts = []
    for name in names:
        acts = values.filter(pl.col("side") == name)["activation"].to_numpy()
        if len(acts):
            parts.append(f"{markdown_safe(name)}: {np.mean(acts == 0):.0%} of {len(acts):,} responses at exactly 0, "
                         f"median {np.median(acts):.3g}")
    return "; ".join(parts).capitalize() + "."


def one_response(values: pl.DataFrame, response: str) -> str:
    """Where one response stands among all: its activation, and how many others have a smaller one."""
    row = values.filter(pl.col("id") == response)
    if not row.height:
        return "This contrast does not read it, so the feature's activation on it is not known."
    act = row["activation"][0]
    others = values.filter(pl.col("id") != response)["activation"]
    below = float((others < act).mean() or 0.0) if len(others) else 0.0
    silent = " (silent)" if act == 0 else ""
    return (f"Activation {act:.3g}{silent}, on the **{markdown_safe(row['side'][0])}** side; larger than on "
            f"{below:.0%} of the other {len(others):,} responses.")
