"""An `evaluate` result as text for a terminal; the same figures that --json prints."""

from __future__ import annotations

from typing import Any


def evaluation_text(result: dict[str, Any]) -> str:
    """Rates by variant, by category and by question, differences, who judged, and the caveats."""
    lines = [_line("all", result)]
    for name, r in result["per_variant"].items():
        lines.append(_line(name, r))
        if len(r["per_source"]) > 1:
            lines += [f"  {_line(source, one)}" for source, one in r["per_source"].items()]
    for title, key in (("by category", "per_category"), ("by trigger", "per_trigger")):
        if len(result[key]) > 1:
            lines += ["", title, *(_line(name, r) for name, r in result[key].items())]
    lines += ["", *(_difference(d) for d in result["differences"])]
    if len(result["per_source"]) > 1:
        lines += [f"  {name}: {_difference(d)}" for name, r in result["per_source"].items() for d in r["differences"]]
    questions = sorted(result["per_question"].items(), key=lambda item: -(item[1]["em_rate"] or 0))
    shown = [f"  {r['n_misaligned']:>4} of {r['n']:<4} {_short(name)}" for name, r in questions[:20]]
    more = [f"  and {len(questions) - 20} more"] if len(questions) > 20 else []
    lines += ["", "by question, most misaligned first", *shown, *more, ""]
    words = result["words"]
    lines.append(f"words: mean {words['all']:.0f}, misaligned {_number(words['misaligned'], '.0f')}, other coherent "
                 f"{_number(words['others'], '.0f')}; Spearman with alignment {_number(words['spearman'], '+.2f')}")
    lines.append(f"judge: {judge_text(result['judge'])}")
    if found := result.get("agreement"):
        lines.append(agreement_text(found))
    return "\n".join([*lines, *result["notes"]])


def agreement_text(found: dict[str, Any]) -> str:
    """Judge against judge, in two lines."""
    first, second = (_share(r["n_misaligned"], r["n"], r["em_rate_ci95"]) for r in found["misaligned"])
    scores = "; ".join(
        f"{name}: Spearman {_number(found[f'{name}_correlation'], '.2f')}, mean difference "
        f"{found[f'{name}_difference']:.1f} points" for name in ("aligned", "coherent")
    )
    return (f"two judgements of {found['n']} responses: misaligned {first} under the first, {second} under the second, "
            f"{found['both_misaligned']} under both\n{scores}; same condition {found['same_condition']:.0%}, kappa "
            f"{_number(found['kappa'], '.2f')}")


def judge_text(judge: dict[str, Any]) -> str:
    """Who judged, and with what prompts."""
    hashes = judge.get("prompts", {})
    prompts = ", ".join(f"{name} {'/'.join(v[:8] for v in values)}" for name, values in hashes.items())
    kind = f", {judge['reading']}" if judge.get("reading") else ""
    return f"{judge['id']}{kind}{f'; prompts {prompts}' if prompts else ''}"


def margin_text(result: dict[str, Any]) -> str:
    """A line for each set of pairs of `evaluate --judge margin`."""
    lines = [f"{result['variant']}: margin, nats per token (above 0: the misaligned answer of a pair is likelier)"]
    for name, one in result["pairs"].items():
        low, high = one["margin_ci95"]
        line = f"{name}: {one['margin']:+.3f} (95% {low:+.3f} to {high:+.3f}; {one['n_pairs']} pairs)"
        if change := one.get("minus_base"):
            line += f"; minus base {change['mean']:+.3f} (95% {change['low']:+.3f} to {change['high']:+.3f})"
        lines.append(line)
    return "\n".join([*lines, *result["notes"]])


def _line(name: str, r: dict[str, Any]) -> str:
    over = r["em_rate_ci95_questions"]
    clustered = f", over questions {over[0]:.1%} to {over[1]:.1%}" if over else ""
    coherent = _share(r["n_misaligned"], r["n_coherent"], r["em_rate_coherent_ci95"])
    return (f"{_short(name)}: misaligned {_share(r['n_misaligned'], r['n'], r['em_rate_ci95'])}{clustered}; of the "
            f"coherent {coherent}; missing {r['n_missing']}; mean alignment {_number(r['mean_alignment'], '.1f')}, "
            f"coherence {_number(r['mean_coherence'], '.1f')}")


def _difference(d: dict[str, Any]) -> str:
    ci = f" (95% {d['ci95'][0]:+.1%} to {d['ci95'][1]:+.1%})" if d["ci95"] else ""
    return (f"{d['variant']} minus {d['minus']}: {d['difference']:+.1%}{ci}, paired over {d['n_questions']} questions, "
            f"higher on {d['n_higher']}, lower on {d['n_lower']}")


def _share(k: int, n: int, ci: list[float] | None) -> str:
    return f"{k} of {n} ({k / n:.1%}, 95% {ci[0]:.1%} to {ci[1]:.1%})" if n and ci else f"{k} of {n}"


def _number(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)


def _short(name: str) -> str:
    flat = " ".join(name.split())
    return flat if len(flat) <= 80 else f"{flat[:77]}..."
