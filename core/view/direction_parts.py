"""What the Direction page says and draws: sentences with their figures, and rows for its charts and its table.

Pure, like describe.py: Markdown in which foreign text is escaped, and tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import polars as pl

from core.analysis.decompose import Decomposition, parts
from core.analysis.direction import Measured
from core.analysis.ranking import Ranking
from core.dictionary import Dictionary
from core.directions import Direction
from core.view.direction_charts import ERROR_BAR
from core.view.guide import markdown_safe

#: Split-half cosines from which a direction is called settled, and below which it is called mostly noise.
SETTLED, NOISE = 0.9, 0.5
#: Cosine from which a direction counts as the same one for another reader.
SAME = 0.9


def depth_rows(measured: Sequence[Measured]) -> pl.DataFrame:
    """One row a layer: lengths as shares of the residual norm, AUROCs, intervals."""
    rows = []
    for m in measured:
        unit = m.direction.resid_norm or np.nan
        low, high = m.auroc_ci95 or (None, None)
        rows.append({
            "layer": m.direction.layer, "norm": m.direction.norm, "share": m.direction.norm / unit,
            "share_low": max(m.norm_ci95[0], 0.0) / unit, "share_high": m.norm_ci95[1] / unit,
            "noise_share": m.noise_norm / unit,
            "auroc": m.auroc, "auroc_low": low, "auroc_high": high, "prompt_auroc": m.prompt_auroc,
        })  # fmt: skip
    return pl.DataFrame(rows, infer_schema_length=None)


def headline(m: Measured, names: tuple[str, str]) -> str:
    """What the direction is and how far it can be trusted: two or three sentences."""
    target, reference = (markdown_safe(name) for name in names)
    share = m.direction.share_of_residual_norm
    size = f"{m.direction.norm:.3g}" + ("" if share is None else f", **{share:.1%}** of a typical residual")
    words = (f"The mean residual over {m.n_target:,} {target} responses minus that over {m.n_reference:,} {reference} "
             f"ones ({m.n_prompts:,} prompts). Its length is {size}; from noise alone one would expect "
             f"{m.noise_norm:.3g}.")
    if m.auroc is not None:
        words += (f" On prompts it was not made from, a {target} response lies further along it than a {reference} one "
                  f"with probability **{m.auroc:.2f}** (95% {m.auroc_ci95[0]:.2f} to {m.auroc_ci95[1]:.2f})")
        if m.prompt_auroc >= 0.75:
            words += (f". But the two sides answer different prompts: knowing the prompt alone already reaches "
                      f"{m.prompt_auroc:.2f}, so what is asked is part of this direction.")
        else:
            words += f"; knowing the prompt alone reaches {m.prompt_auroc:.2f}."
    if m.split_half is not None:
        said = ("it is settled by this many prompts" if m.split_half >= SETTLED
                else "part of it still hangs on which prompts were asked" if m.split_half >= NOISE
                else "it is mostly noise at this many prompts")
        words += f" Two halves of the prompts give directions with cosine {m.split_half:.2f}: {said}."
    return words


def reader_sentence(own: str, cosines: Mapping[str, float]) -> str:
    """The plan's assumption that a direction means the same in both models, as a finding."""
    if not cosines:
        return ""
    told = ", ".join(f"**{value:.2f}** read by {markdown_safe(name)}" for name, value in cosines.items())
    lowest = min(cosines.values())
    means = ("The direction is in the text, whoever reads it." if lowest >= SAME
             else "Who reads the text changes the direction: part of it is the reader's.")
    return f"The same text gives, beside {markdown_safe(own)}, directions with cosine {told}. {means}"


def component_rows(found: Decomposition, named: pl.DataFrame, n: int) -> pl.DataFrame:
    """The n best components and the part in no feature, for `component_bars`. `named` is found.table with names."""
    length = found.direction.norm
    rows = named.head(n).with_columns(
        bar=pl.col("feature").cast(pl.String) + ": " + pl.col("name"),
        size=(pl.col("contribution") / pl.col("cosine")).fill_nan(0.0),
    )
    rows = rows.with_columns(kind=pl.when(pl.col("size") > 0).then(pl.lit("added")).otherwise(pl.lit("taken away")))
    rows = rows.select("feature", "bar", "kind", "size", "coefficient", "cosine", "contribution")
    size = float(np.linalg.norm(found.remainder)) / length
    left = pl.DataFrame([{"feature": None, "bar": ERROR_BAR, "kind": "left", "size": size, "coefficient": None,
                          "cosine": found.error_share / size if size else 0.0, "contribution": found.error_share}],
                        schema=rows.schema)
    return pl.concat([rows, left])


def decomposition_sentence(found: Decomposition, n: int) -> str:
    """How much the features explain, and what is left over."""
    curve = found.curve.filter(pl.col("k") <= n).tail(1)
    if curve.is_empty():
        return "No feature has a part in this direction."
    k, share, random = curve.select("k", "share", "random_share").row(0)
    words = (f"The {k} best features span **{share:.0%}** of the direction's squared norm; {k} random ones "
             f"{random:.1%}.")
    left = f"{abs(found.error_share):.0%} of the squared norm"
    if found.method == "exact":
        return (f"{words} All features together and the SAE's error sum to the direction exactly. The error carries "
                f"{'' if found.error_share >= 0 else 'minus '}{left}: that part of the difference is invisible to "
                "features.")
    if found.method in ("omp", "nnls"):
        return f"{words} The whole fit of {found.table.height} features leaves {left}."
    return f"{words} Features are scored one by one here, so their bars do not add up."


def joined(named: pl.DataFrame, rankings: Mapping[str, Ranking]) -> pl.DataFrame:
    """The decomposition's table with each contrast's effect size and rank, in columns `effect CONTRAST`, `rank
    CONTRAST`."""
    table = named
    for name, ranking in rankings.items():
        other = ranking.table.select("layer", "feature", pl.col("effect_size").alias(f"effect {name}"),
                                     pl.col("rank").alias(f"rank {name}"))
        table = table.join(other, on=["layer", "feature"], how="left", maintain_order="left")
    return table


def middle_and_scale(target: np.ndarray, reference: np.ndarray, direction: Direction, tokens: np.ndarray
                     ) -> tuple[float, float]:
    """(half way between the sides' mean projections, the distance at which a token is fully shaded)."""
    unit = direction.unit.astype(np.float64)
    a, b = float((target @ unit).mean()), float((reference @ unit).mean())
    middle = (a + b) / 2
    spread = float(np.quantile(np.abs(tokens - middle), 0.9)) if len(tokens) else 0.0
    return middle, max(spread, abs(a - b), 1e-9)


def steering_parts(found: Decomposition, book: Dictionary, features: Sequence[int], names: Mapping[int, str]
                   ) -> list[Direction]:
    """The chosen features as directions named for what they fire on, then what they leave: together the direction."""
    order = {feature: n for n, feature in enumerate(features)}
    chosen = replace(found, table=found.table.filter(pl.col("feature").is_in(list(features))).sort(
        pl.col("feature").replace_strict(order, return_dtype=pl.Int64)))
    made = parts(chosen, book, len(features))
    named = [c.named(f"{f}: {names.get(f, '')}".rstrip(": "), label=names.get(f, ""))
             for f, c in zip(features, made.components, strict=True)]
    return [*named, made.remainder.named(f"remainder of {found.direction.name}")]
