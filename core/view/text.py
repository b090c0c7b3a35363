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
    carried = "delta_attribution" in next(iter(summary["features"]), {})
    heading = f"{'feature':>8} {'effect':>7} {'mean diff':>10} {'AUROC':>6} {'q':>9}"
    lines += [*summary["notes"], "", heading + (f" {'attribution (s.e.)':>22}" if carried else "")]
    for row in summary["features"]:
        q = "-" if row["q_value"] is None else f"{row['q_value']:.1e}"
        lines.append(
            f"{row['feature']:>8} {row['effect_size']:>7.2f} {row['mean_diff']:>10.4f} {row['auroc']:>6.3f} {q:>9}"
            + (f" {_attribution(row):>22}" if carried else "")
        )
    return "\n".join(lines)


def _attribution(row: dict[str, Any]) -> str:
    value, error = row["delta_attribution"], row["delta_attribution_se"]
    return "-" if value is None or error is None else f"{value:+.2e} ({error:.0e})"


def organism_text(result: dict[str, Any]) -> str:
    """Margins and perplexity of a `train-adapter` result, the base beside."""
    lines = [result["adapter"]]
    for name, row in result["measures"].items():
        lines.append(f"{name}: perplexity of unrelated text {row['perplexity']:.1f}")
        for what, words in (("health", "held-out health pairs"), ("open", "open pairs")):
            for key, label in ((what, "margin"), (f"{what}_minus_base", "margin minus base")):
                if key in row:
                    e = row[key]
                    lines.append(
                        f"  {words}, {label}: {e['mean']:+.3f} nats per token "
                        f"(95% {e['low']:+.3f} to {e['high']:+.3f}; n {e['n']})"
                    )
    return "\n".join(lines)


def concordance_text(summary: dict[str, Any]) -> str:
    """The agreement of two or three contrasts, overlap by k, what they share, and the sentence."""
    names = summary["contrasts"]
    lines = [
        f"{', '.join(names)}: layer {summary['layer']}, position {summary['position']}, {summary['n_features']:,} "
        f"features considered, {summary['n_format_hidden']:,} format features hidden",
    ]
    for pair, one in summary["spearman"].items():
        rbo = summary["rank_biased_overlap"][pair]["raised"]
        lines.append(f"{pair}: Spearman {_or_none(one['rho'], '+.2f')}, rank-biased overlap of the raised "
                     f"{_or_none(rbo['value'], '.3f')} (chance {_or_none(rbo['expected'], '.3f')})")
    for tail, key in (("raised", "overlap_at_k"), ("suppressed", "overlap_at_k_suppressed")):
        lines += ["", f"{'most ' + tail:>15} {'shared':>7} {'chance':>14} {'as frequent':>14}  benign control"]
        for at in summary[key]:
            beside = ", ".join(f"{name} {n}" for name, n in at["controls"].items()) or "-"
            chance = f"{_range(at, ''):>14} {_range(at, '_matched'):>14}"
            lines.append(f"{at['k']:>15} {at['observed']:>7} {chance}  {beside}")
    lists = {"shared by all": summary["shared"]}
    lists |= {f"shared by {pair.replace('|', ' and ')}": rows for pair, rows in summary["shared_by_two"].items()}
    lists |= {f"{name} only": rows for name, rows in summary["exclusive"].items()}
    for title, rows in lists.items():
        lines += ["", title, f"{'end':<10} {'feature':>8} " + " ".join(f"{name[:12]:>12}" for name in names)]
        for row in rows:
            effects = " ".join(f"{row[f'effect_{name}']:>+12.2f}" for name in names)
            lines.append(f"{row['tail']:<10} {row['feature']:>8} {effects}  {row.get('name', '')}".rstrip())
    lines += [""] if summary["by_layer"] else []
    for one in summary["by_layer"]:
        at = next(a for a in one["overlap_at_k"] if a["k"] == summary["k"])
        rho = ", ".join(f"{pair} {_or_none(s['rho'], '+.2f')}" for pair, s in one["spearman"].items())
        lines.append(f"layer {one['layer']}: Spearman {rho}; {at['observed']} of {at['k']} raised shared, "
                     f"chance {_range(at, '_matched')}")
    return "\n".join([*lines, "", *summary["notes"], "", summary["sentence"]])


def _range(at: dict[str, Any], kind: str) -> str:
    low, high = at[f"ci95{kind}"]
    return f"{at[f'expected{kind}']:.1f} ({low:.0f}-{high:.0f})"


def _or_none(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)


def attribution_text(result: dict[str, Any]) -> str:
    """What an `attribute` call did."""
    n, m = result["n_prompts_target"], result["n_prompts_reference"]
    over = f"{n:,} pairs of prompts" if result["paired"] else f"{n:,} target and {m:,} reference prompts"
    layers = ", ".join(map(str, result["layers"]))
    done = f"{result['seconds']:,.0f} s" if result["computed"] else "was complete already"
    return f"{result['file']}: delta-attribution of {result['contrast']} at layers {layers}, over {over}; {done}"


def sae_health_text(rows: list[dict[str, Any]], file: str) -> str:
    """A line for each variant and layer of a `sae-health` result."""
    lines = [f"{file}: cross-entropy in nats per response token"]
    for row in rows:
        fvu, share = (("-" if row[name] is None else f"{row[name]:.3f}") for name in ("fvu", "ce_recovered"))
        lines.append(
            f"{row['variant']}, layer {row['layer']}: FVU {fvu}, L0 {row['l0']:.1f}, CE {row['ce']:.3f}, spliced "
            f"{row['ce_spliced']:.3f}, zeroed {row['ce_zero']:.3f}, recovered {share}"
        )
    return "\n".join(lines)


def ratings_text(result: dict[str, Any]) -> str:
    """Conditions by variant of an `apply-ratings` result, and how well the two passes agree."""
    lines = [f"{result['file']}: {result['n']} answers"]
    for variant, counts in result["conditions"].items():
        lines.append(f"{variant}: {', '.join(f'{n} {condition}' for condition, n in counts.items())}")
    if found := result["agreement"]:
        scores = "; ".join(
            f"{name}: Spearman {_or_none(found[f'{name}_correlation'], '.2f')}, mean difference "
            f"{found[f'{name}_difference']:.1f} points"
            for name in ("aligned", "coherent")
        )
        lines.append(f"two passes over {found['n']} answers: {scores}; same condition {found['same_condition']:.0%}, "
                     f"kappa {_or_none(found['kappa'], '.2f')}")
    return "\n".join(lines)
