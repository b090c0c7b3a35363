"""Results as text for a terminal; the same figures that --json prints."""

from __future__ import annotations

from typing import Any


def ranking_text(summary: dict[str, Any]) -> str:
    """The head, the caveats and both tails of a `rank` result."""
    held = summary["replication"]
    lines = [
        f"{summary['contrast']}, layer {summary['layer']}, position {summary['position']}: "
        f"{summary['n_target']} against {summary['n_reference']} responses, {summary['n_prompts']} prompts"
        f"{' (paired)' if summary['paired'] else ''}; positive means higher in the target",
        f"{summary['n_tested']:,} features tested, {summary['n_format_hidden']:,} format features hidden; "
        f"length ratio {summary['length_ratio']:.3f}",
    ]
    if held:
        low, high = held["permuted_ci95"]
        lines.append(
            f"of the {held['k']} most raised and {held['k']} most suppressed features of one half of the prompts, "
            f"{held['n_raised_replicated']} and {held['n_suppressed_replicated']} replicate on the other half; "
            f"with permuted labels {held['permuted_mean']:.1f} in all (95% {low:.0f} to {high:.0f})"
        )
    lines += [*summary["notes"], "", f"{'feature':>8} {'effect':>7} {'mean diff':>10} {'AUROC':>6} {'q':>9}"]
    for row in summary["features"]:
        q = "-" if row["q_value"] is None else f"{row['q_value']:.1e}"
        lines.append(
            f"{row['feature']:>8} {row['effect_size']:>7.2f} {row['mean_diff']:>10.4f} {row['auroc']:>6.3f} {q:>9}"
        )
    return "\n".join(lines)
