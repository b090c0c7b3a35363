"""The `lora` command's result as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from core.view.tokens import visible


def lora_text(result: Mapping[str, Any], names: Mapping[tuple[int, int], str]) -> str:
    """Where the update sits, the strongest components, firing, probes, prediction. names: (layer, feature) -> text."""
    lines = [
        str(result["file"]),
        f"{result['adapter']}: {result['n_components']:,} components, read on {result['n_conversations']:,} "
        f"conversations ({', '.join(result['sets'])}), {result['n_response_tokens']:,} response tokens",
        "",
        "share of the update on this text, by module: " + _shares(result["modules"], "kind"),
        "by layer: " + _shares(result["modules"], "layer"),
        "",
        f"{'component':<20} {'sigma':>7} {'share':>6} {'text':>6} {'cosine':>6}  writes or reads",
    ]
    for c in result["components"]:
        name = f"{c['layer']}.{c['module'].rsplit('.', 1)[-1]}.{c['index']}"
        lines.append(f"{name:<20} {c['singular_value']:>7.3g} {c['share']:>6.1%} {c['text_share']:>6.1%} "
                     f"{_form(c['cosine_with_direction'], '+.2f', 6)}  {_features(c, names)}".rstrip())
    if result["direction"]:
        lines.append(f"cosine: with the direction of {result['direction']}")
    lines += ["", *(f"{f['question']}: {f['n_passing']:,} of {f['n_components']:,} components differ at q < 0.05 "
                    f"({f['n_prompts']} prompts)" for f in result["firing"])]
    for p in result["probes"]:
        carried = "" if p["trained_on"] == p["question"] else f", trained on {p['trained_on']}"
        lines.append(f"probe of all scalars, {p['question']}{carried}: AUROC {p['auroc']:.2f} "
                     f"[{p['low']:.2f}, {p['high']:.2f}]")
    own = result["prediction_of_model_contrast"]
    for p in ([own] if own else []) + result["predictions_of_other_variants"]:
        lines += ["", f"what {p['predicted_by']} writes, against what {p['variant']} changes ({p['contrast']})",
                  f"{'layer':>5} {'cosine':>22} {'length':>7} {'explained':>9} {'pre-activation':>22} "
                  f"{'activation':>22}"]  # fmt: skip
        lines += [f"{row['layer']:>5} {_ranged(row, 'cosine'):>22} {_form(row['norm_ratio'], '.2f', 7)} "
                  f"{_form(row['explained'], '.1%', 9)} {_ranged(row, 'preactivation'):>22} "
                  f"{_ranged(row, 'activation'):>22}" for row in p["layers"]]
    return "\n".join([*lines, *([""] + result["notes"] if result["notes"] else [])])


def _shares(modules: Sequence[Mapping[str, Any]], by: str, most: int = 8) -> str:
    sums: dict[Any, float] = {}
    for m in modules:
        sums[m[by]] = sums.get(m[by], 0.0) + (m["text_share"] or 0.0)
    best = sorted(sums.items(), key=lambda item: -item[1])[:most]
    return ", ".join(f"{name} {share:.0%}" for name, share in best)


def _features(component: Mapping[str, Any], names: Mapping[tuple[int, int], str]) -> str:
    rows = [(f["layer"], f["feature"], f["cosine"]) for f in component["write_features"]]
    rows = rows or [(f["layer"], f["feature"], f["decoder_cosine"]) for f in component["read_features"]]
    told = [f"{f} {visible(names.get((layer, f), '')).strip()} {cosine:+.2f}" for layer, f, cosine in rows[:3]]
    return "; ".join(" ".join(t.split()) for t in told)


def _ranged(row: Mapping[str, Any], name: str) -> str:
    if row[name] is None:
        return "-"
    low, high = row[f"{name}_ci95"]
    return f"{row[name]:+.2f} [{_form(low, '+.2f', 0)}, {_form(high, '+.2f', 0)}]"


def _form(value: float | None, form: str, width: int) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"
