"""Results of `direction` and `decompose`: what --json prints, and the same as text for a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from core.analysis.decompose import Decomposition
from core.analysis.direction import Measured
from core.analysis.direction_files import Relative
from core.view.labels import NAMING

#: Points of the curve that are printed.
KS = (1, 2, 5, 10, 20, 50, 64, 100, 200)


def direction_summary(found: Measured, own: Relative, others: dict[str, Relative], file: Path | None) -> dict[str, Any]:
    """A measured direction with its cosines, as plain values."""
    d = found.direction
    return {
        "file": str(file) if file else None,
        "contrast": d.name,
        "layer": d.layer,
        "hook_point": d.hook_point,
        "position": d.origin["position"],
        "weighting": d.origin["weighting"],
        "n_target": found.n_target,
        "n_reference": found.n_reference,
        "n_prompts": found.n_prompts,
        "norm": d.norm,
        "norm_ci95": list(found.norm_ci95),
        "noise_norm": found.noise_norm,
        "share_of_residual_norm": d.share_of_residual_norm,
        "heldout_auroc": found.auroc,
        "ci95": list(found.auroc_ci95) if found.auroc_ci95 else None,
        "prompt_auroc": found.prompt_auroc,
        "resample_cosine": found.resample_cosine,
        "resample_ci95": list(found.resample_ci95),
        "split_half": found.split_half,
        "split_half_ci95": list(found.split_half_ci95) if found.split_half_ci95 else None,
        "cosines": {name: d.cosine(other.direction) for name, other in others.items()},
        "cosines_ci95": {name: list(own.cosine_interval(other)) for name, other in others.items()},
    }


def direction_text(summary: dict[str, Any]) -> str:
    """Head, figures with their intervals, cosines."""
    share = summary["share_of_residual_norm"]
    lines = [
        f"{summary['contrast']}, layer {summary['layer']}, position {summary['position']}, weighted by "
        f"{summary['weighting']}: {summary['n_target']} against {summary['n_reference']} responses, "
        f"{summary['n_prompts']} prompts; target minus reference",
        f"norm {summary['norm']:.3g} {_range(summary['norm_ci95'], '.3g')}"
        + ("" if share is None else f", {share:.1%} of the mean residual norm")
        + f"; {summary['noise_norm']:.3g} were it noise alone",
    ]
    if summary["heldout_auroc"] is None:
        lines.append("held-out AUROC: too few prompts")
    else:
        lines.append(
            f"held-out AUROC {summary['heldout_auroc']:.3f} {_range(summary['ci95'], '.3f')}; knowing the prompt alone "
            f"reaches {summary['prompt_auroc']:.2f}"
        )
    lines.append(
        f"cosine of two resamples {summary['resample_cosine']:.3f} {_range(summary['resample_ci95'], '.3f')} "
        "(noise: about 0.5)"
    )
    if summary["split_half"] is not None:
        lines.append(
            f"cosine of two halves of the prompts {summary['split_half']:.3f} "
            f"{_range(summary['split_half_ci95'], '.3f')} (noise: about 0)"
        )
    if summary["cosines"]:
        lines += ["", "cosine with"]
        intervals = summary["cosines_ci95"]
        lines += [f"  {value:+.2f} {_range(intervals[name], '+.2f')}  {name}"
                  for name, value in summary["cosines"].items()]
    return "\n".join(lines)


def decomposition_summary(found: Decomposition, table: pl.DataFrame, top: int) -> dict[str, Any]:
    """A decomposition's first features and its curve, as plain values. `table` is found.table, named or not."""
    columns = ["layer", "feature", "coefficient", "cosine", "contribution", "rank"]
    columns += [name for name in NAMING if name in table.columns]
    curve = found.curve.filter(pl.col("k").is_in([*KS, found.curve.height]))
    return {
        "direction": found.direction.name,
        "layer": found.direction.layer,
        "norm": found.direction.norm,
        "method": found.method,
        "explained_norm": [
            {"k": row["k"], "share": row["share"], "random_share": row["random_share"],
             "random_ci95": [row["random_low"], row["random_high"]]}
            for row in curve.iter_rows(named=True)
        ],
        "error_share": found.error_share,
        "error_norm_share": found.error_norm_share,
        "n_features": table.height,
        "features": table.head(top).select(columns).to_dicts(),
    }  # fmt: skip


def decomposition_text(summary: dict[str, Any]) -> str:
    """Head, the curve and the features."""
    lines = [
        f"{summary['direction']}, layer {summary['layer']}, by {summary['method']}: {summary['n_features']:,} "
        f"features; not accounted for: {summary['error_share']:+.1%} of the squared norm",
        "explained (random features): "
        + ", ".join(f"{p['k']}: {p['share']:.1%} ({p['random_share']:.1%})" for p in summary["explained_norm"]),
        "",
        f"{'rank':>4} {'feature':>8} {'coefficient':>12} {'cosine':>7} {'share':>7}  fires on",
    ]
    for row in summary["features"]:
        name = row.get("label") or row.get("fires_on") or row.get("tokens") or ""
        lines.append(
            f"{row['rank']:>4} {row['feature']:>8} {row['coefficient']:>12.4g} {row['cosine']:>+7.3f} "
            f"{row['contribution']:>+7.1%}  {name}"
        )
    return "\n".join(lines)


def _range(ci95: list[float], form: str) -> str:
    return f"[{ci95[0]:{form}}, {ci95[1]:{form}}]"
