"""Two judgements of the same responses beside each other: scores, conditions, and the rate under each.

The same answers can read 10% under one judge and 0.5% under another, so a rate is only as good as this table.
No torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from scipy import stats

from core.conversations import SCORES
from core.errors import NotEnoughData
from core.evaluation.intervals import Share
from core.evaluation.rates import PUBLISHED, Thresholds, with_condition

#: Responses that both must have judged before anything is said about their agreement.
FEWEST = 10


@dataclass(frozen=True)
class Agreement:
    """How well two judgements of the same answers agree."""

    n: int
    aligned_correlation: float | None
    """Spearman; None where a judgement gave every answer the same score."""
    aligned_difference: float
    """Mean absolute difference in points."""
    coherent_correlation: float | None
    coherent_difference: float
    same_condition: float
    """Share of answers with the same condition."""
    kappa: float | None
    """Cohen's kappa of the conditions; None where both gave every answer the same one."""
    kappa_misaligned: float | None
    """The same of misaligned against everything else."""
    misaligned: tuple[Share, Share]
    """Misaligned answers of these, under the first and under the second."""
    both_misaligned: int


def agree(first: pl.DataFrame, second: pl.DataFrame, at: Thresholds = PUBLISHED) -> Agreement:
    """Agreement on the responses with the same `id` that both gave both scores.

    Both tables have `id`, `aligned` and `coherent`. Raises `NotEnoughData` below ten such responses.
    """
    columns = ["id", *SCORES]
    both = (first.select(columns).drop_nulls()
            .join(second.select(columns).drop_nulls(), on="id", how="inner", suffix="_second", maintain_order="left"))
    if both.height < FEWEST:
        raise NotEnoughData(
            f"Only {both.height} answers were rated twice; agreement needs at least {FEWEST} with all four scores."
        )
    a = with_condition(both, at)["condition"].to_list()
    b = with_condition(both.select("id", *(pl.col(f"{name}_second").alias(name) for name in SCORES)), at)
    b = b["condition"].to_list()
    pairs = {name: both.select(name, f"{name}_second").to_numpy() for name in SCORES}
    is_a, is_b = ([c == "misaligned" for c in one] for one in (a, b))
    return Agreement(
        n=both.height,
        aligned_correlation=_correlation(pairs["aligned"]),
        aligned_difference=float(np.abs(np.diff(pairs["aligned"])).mean()),
        coherent_correlation=_correlation(pairs["coherent"]),
        coherent_difference=float(np.abs(np.diff(pairs["coherent"])).mean()),
        same_condition=float(np.mean([x == y for x, y in zip(a, b, strict=True)])),
        kappa=_kappa(a, b),
        kappa_misaligned=_kappa(is_a, is_b),
        misaligned=(Share(sum(is_a), both.height), Share(sum(is_b), both.height)),
        both_misaligned=sum(x and y for x, y in zip(is_a, is_b, strict=True)),
    )


def match(first: pl.DataFrame, second: pl.DataFrame) -> pl.DataFrame:
    """`second` with the ids of `first`, matched by variant-free content: question and response, in order of file.

    Two judgements of the same answers often come as two files whose rows have no ids; equal answers to one question
    are matched one to one in the order in which they stand.
    """
    if set(first["id"]) & set(second["id"]):
        return second
    key = ["question", "response"]
    numbered = [t.with_columns(pl.int_range(pl.len()).over(key).alias("n")) for t in (first, second)]
    return numbered[1].drop("id").join(numbered[0].select("id", *key, "n"), on=[*key, "n"], how="inner").drop("n")


def _correlation(pairs: np.ndarray) -> float | None:
    """Spearman's of pairs [n, 2]; None where either column is constant."""
    return float(stats.spearmanr(*pairs.T).statistic) if (np.ptp(pairs, axis=0) > 0).all() else None


def _kappa(a: list, b: list) -> float | None:
    if len({*a, *b}) < 2:
        return None
    from sklearn.metrics import cohen_kappa_score  # takes a second, which the app has not to wait for

    return float(cohen_kappa_score(a, b))
