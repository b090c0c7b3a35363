"""What the Difference lens page and the command's text say: sentences with their figures, rows for the charts, JSON.

Pure, like describe.py: returns Markdown in which foreign text is escaped, tables, and plain text for a terminal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import polars as pl

from core.specs import Experiment
from core.store.difference_file import DifferenceLens
from core.view.guide import markdown_safe
from core.view.tokens import visible

#: Split-half cosines from which a difference is called stable, and below which it is called mostly noise.
STABLE, NOISE = 0.9, 0.5

#: Logit-lens tokens a line of the terminal's table shows.
TEXT_TOKENS = 6

#: What the page says that its figures do not show.
CAVEATS = (
    "**A size is not a harm.** Any fine-tune leaves a difference, a benign one too: read the two variants beside each "
    "other, and take only what the benign one lacks as a trace of the bad data.",
    "**A token list is a hint.** The logit lens reads a vector as if no layer came after it; early layers seldom give "
    "readable tokens, and some tokens come up for almost any vector.",
    "**Nothing here is causal.** Whether the difference makes the model misbehave is a question for steering with it.",
    "**One shift, few places.** It is the mean over the first tokens of plain text without a chat template. What the "
    "variant does only in answers, or only on some subjects, averages out here.",
    "**A cosine is small in many dimensions.** Features are listed by rank, also where none is close: compare with the "
    "figure for a random direction.",
)


def difference_command(experiment: Experiment, variant: str | None = None) -> str:
    """The command that makes a variant's file; the preset's first adapter when none is named."""
    names = [adapter.name for adapter in experiment.adapters]
    return f"python -m core difference {experiment.name} {variant or next(iter(names), 'ADAPTER')}"


def ordered(files: Mapping[str, Path], experiment: Experiment) -> dict[str, Path]:
    """The files in the order of the preset's variants, then those it does not name."""
    known = list(experiment.variants)
    return dict(sorted(files.items(), key=lambda item: known.index(item[0]) if item[0] in known else len(known)))


def place_name(lens: DifferenceLens, place: int) -> str:
    """`mean over positions 2 to 5`, `position 3`."""
    if place or lens.mean_from == lens.k:
        return f"position {place or lens.k}"
    return f"mean over positions {lens.mean_from} to {lens.k}"


def headline(lens: DifferenceLens, layer: int, place: int) -> str:
    """How large the difference is here, and how surely: one or two sentences."""
    name = markdown_safe(lens.variant)
    where = f"at layer {layer} ({place_name(lens, place)})"
    if not lens.n_counted[layer, place]:
        return (f"Most of the texts have an attention sink {where}, so too little is left of **{name}** to compare; "
                "choose another position.")
    norm, resid = float(lens.norm[layer, place]), float(lens.resid_norm[layer, place])
    if norm == 0:
        return f"**{name}** does not differ from base {where}: its adapter changes nothing up to there."
    half = float(lens.split_half[layer, place])
    means = ("the same shift whichever texts are read" if half >= STABLE
             else "so part of it hangs on the texts" if half >= NOISE else "so it is mostly noise here")
    return (f"On the first {lens.k} tokens of {lens.n_texts:,} unrelated texts, **{name}** differs from base by "
            f"**{norm / resid:.1%}** of the residual norm {where}: {norm:.3g} against {resid:.3g}. Two halves of the "
            f"texts agree on its direction with cosine **{half:.2f}**, {means}; a single text's difference has cosine "
            f"{float(lens.consistency[layer, place]):.2f} with the mean of other texts.")


def beside(lens: DifferenceLens, other: DifferenceLens, layer: int, place: int) -> str:
    """How the second variant compares, and how much of the first one's difference it shares."""
    name, second = markdown_safe(lens.variant), markdown_safe(other.variant)
    share, cosine = float(other.share[layer, place]), float(lens.cosine_with(other)[layer, place])
    if not math.isfinite(share):
        return f"Of **{second}** nothing is left to compare here."
    if not math.isfinite(cosine):
        return f"**{second}** differs by **{share:.1%}** here; with one of the two at zero there is no cosine."
    mine, theirs = lens.tokens(layer, place), other.tokens(layer, place)
    both, own = len(set(mine.promoted) & set(theirs.promoted)), len(set(mine.promoted) & set(mine.base))
    return (f"**{second}** differs by **{share:.1%}**, in a direction with cosine **{cosine:.2f}** to that of {name}. "
            f"Of the {len(mine.promoted)} tokens that the difference of {name} promotes most, **{both}** are also "
            f"promoted by that of {second}, and **{own}** by base's own residual.")


def incomparable(lens: DifferenceLens, other: DifferenceLens) -> str:
    """One sentence where two files were not made alike; empty where they were. Not the variant, nor its SAEs."""
    names = {"weights": "model weights", "texts_hash": "texts", "k": "numbers of tokens", "dtype": "number formats"}
    if lens.difference.shape[::2] != other.difference.shape[::2]:
        return f"The files of {lens.variant} and {other.variant} are of different models and cannot be compared."
    unlike = [word for field, word in names.items() if lens.spec.get(field) != other.spec.get(field)]
    if not unlike:
        return ""
    return (f"The files of {lens.variant} and {other.variant} were made with different {' and '.join(unlike)}: compare "
            "them with care, or make one of them anew.")


def masked(lens: DifferenceLens) -> str:
    """Where tokens were left out as attention sinks, and whether position 1 is part of the mean; empty when all are
    in."""
    parts = []
    for position, share in enumerate(lens.masked_share.T, 1):
        layers = np.flatnonzero(share > 0)
        if len(layers):
            most, least = share[layers].max(), share[layers].min()
            amount = f"{most:.0%}" if round(most, 2) == round(least, 2) else f"{least:.0%} to {most:.0%}"
            parts.append(f"position {position} at layers {_spans(layers)} ({amount} of the texts)")
    said = f"Left out as attention sinks: {'; '.join(parts)}. " if parts else ""
    if lens.mean_from > 1:
        said += ("Position 1 takes no part in the mean: this tokenizer adds no BOS, so the text's first token is the "
                 "model's very first one.")
    return said.strip()


def _spans(layers: np.ndarray) -> str:
    """0-based layers as `2 to 9, 14`."""
    runs = np.split(layers, np.flatnonzero(np.diff(layers) > 1) + 1)
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def random_cosine(d_sae: int, d_model: int) -> float:
    """About the largest cosine that a random direction has with `d_sae` random ones.

    A cosine of random directions is close to normal with variance 1 / d_model; this is its 1 / d_sae upper quantile.
    """
    return NormalDist().inv_cdf(1 - 1 / max(d_sae, 2)) / math.sqrt(d_model)


def depth_rows(lenses: Mapping[str, DifferenceLens], place: int) -> pl.DataFrame:
    """One row a variant and layer: variant, layer, norm, resid_norm, share, split_half, consistency, n; null where
    there is no such figure."""
    rows = [
        {"variant": name, "layer": layer, "n": int(lens.n_counted[layer, place]),
         **{column: _or_none(getattr(lens, column)[layer, place])
            for column in ("norm", "resid_norm", "share", "split_half", "consistency")}}
        for name, lens in lenses.items() for layer in range(lens.n_layers)
    ]
    columns = ("norm", "resid_norm", "share", "split_half", "consistency")
    return pl.DataFrame(rows, schema={"variant": pl.String, "layer": pl.Int64, "n": pl.Int64,
                                      **{column: pl.Float64 for column in columns}})


def features_at(lens: DifferenceLens, layer: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(raised, suppressed): feature and cosine, strongest first; empty where the layer has no SAE or no difference."""
    rows = lens.features.filter(pl.col("layer") == layer).select("feature", "cosine")
    kept = rows.height // 2
    return rows.head(kept), rows.tail(kept)


def _or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def summary(lens: DifferenceLens, file: Path) -> dict[str, Any]:
    """The `difference` command's JSON: the mean over positions, a layer at a time; null where there is no figure."""
    layers = []
    for row in depth_rows({lens.variant: lens}, 0).drop("variant").to_dicts():
        tokens = lens.tokens(row["layer"], 0)
        raised, suppressed = features_at(lens, row["layer"])
        layers.append({
            **row, "n_by_position": lens.n_counted[row["layer"], 1:].tolist(),
            "promoted": tokens.promoted, "suppressed": tokens.suppressed, "base_promoted": tokens.base,
            "features_raised": raised.to_dicts(), "features_suppressed": suppressed.to_dicts(),
        })  # fmt: skip
    return {
        "file": str(file), "variant": lens.variant, "k": lens.k, "place": place_name(lens, 0), "n_texts": lens.n_texts,
        "n_short": lens.n_short, "fingerprint": lens.fingerprint, "masked": masked(lens), "layers": layers,
    }  # fmt: skip


def difference_text(result: dict[str, Any]) -> str:
    """A `difference` result for a terminal: a line a layer."""
    lines = [f"{result['file']}", f"{result['variant']} minus base on the first {result['k']} tokens of "
             f"{result['n_texts']:,} texts ({result['n_short']} shorter ones left out); {result['place']}",
             *([result["masked"]] if result["masked"] else []), "",
             f"{'layer':>5} {'share':>7} {'split half':>10} {'consistency':>11}  most promoted tokens"]  # fmt: skip
    for row in result["layers"]:
        figures = [_form(row["share"], ".1%", 7), _form(row["split_half"], ".2f", 10),
                   _form(row["consistency"], ".2f", 11)]  # fmt: skip
        tokens = " ".join(visible(token).strip() for token in row["promoted"][:TEXT_TOKENS])
        lines.append(f"{row['layer']:>5} {' '.join(figures)}  {tokens}".rstrip())
    return "\n".join(lines)


def _form(value: float | None, form: str, width: int) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"
