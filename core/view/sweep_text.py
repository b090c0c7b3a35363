"""A sweep in words: for the terminal, and as sentences for the page. Pure."""

from __future__ import annotations

from typing import Any

from core.analysis.sweep import Figure, Findings, clear, known_shift
from core.steering_plan import Pane, Plan
from core.store.sweep_file import Sweep
from core.view.guide import markdown_safe


def figure(f: Figure, form: str = "+.3f") -> str:
    """`+0.123 (95% +0.100 to +0.150)`"""
    if f.low is None or f.high is None:
        return format(f.value, form)
    return f"{f.value:{form}} (95% {f.low:{form}} to {f.high:{form}})"


def range_words(ends: tuple[float, float] | None) -> str:
    return "not measured" if ends is None else f"{ends[0]:+g} to {ends[1]:+g} mean residual norms"


def finding_sentences(f: Findings, variant: str | None) -> list[str]:
    """The three findings, each a sentence or two of Markdown."""
    said = [f"**Against random.** Adding the direction instead of subtracting it, at {f.strength:g}, moves the margin "
            f"by **{figure(f.direction)}** nats per token (n = {f.direction.n} pairs)"]
    if f.randoms:
        values = " and ".join(f"{r.value:+.3f}" for r in f.randoms)
        said[0] += f"; random directions of the same length by {values}"
    if f.over_random is not None:
        told = "more than random" if clear(f.over_random) and f.over_random.value > 0 else "not told from random"
        said[0] += f". Difference {figure(f.over_random)}: {told}"
    said[0] += "."
    if f.recovered:
        shares = "; ".join(f"the {k} best features together {_percent(v)}, what they leave {_percent(f.left[k])}"
                           for k, v in f.recovered.items())
        said.append(f"**As features.** Of that effect, at {f.part_strength:g}: {shares}.")
    if f.learnt is not None and not clear(f.learnt):
        said.append(f"**Ablated.** {markdown_safe(variant or '')} is not told from base here: {figure(f.learnt)}. "
                    "There is nothing to restore.")
    if f.learnt is not None and f.restored:
        gone = "; ".join(f"{name} {_percent(v)}" for name, v in f.restored.items())
        words = (f"**Ablated.** {markdown_safe(variant or '')} lies {figure(f.learnt)} from base. Projecting the "
                 f"direction out of it takes back: {gone}. 100% would be base; below 0 is further away.")
        if f.base_ablated:
            own = "; ".join(f"{name} {v.value:+.3f}" for name, v in f.base_ablated.items())
            both = "; ".join(f"{name} {_percent(v)}" for name, v in f.between.items())
            words += (f" Text does not lie around 0 along the direction, so this is itself a push: it shifts base by "
                      f"{own}. With the same done to both, of their difference is gone: {both}.")
        said.append(words)
    return said


def known_margin(pane: Pane, plan: Plan, sweep: Sweep | None) -> str:
    """What the sweep measured of a pane that does just what one of its points does; empty for any other."""
    if sweep is None or pane.variant != "base" or pane.holds or plan.scope != "all" or len(pane.pushes) != 1:
        return ""
    push, pairs = pane.pushes[0], next(iter(sweep.pairs))
    if push.raw or push.direction.name != sweep.contrast or push.direction.layer not in sweep.layers:
        return ""
    found = known_shift(sweep, push.direction.layer, push.strength, pairs)
    return "" if found is None else f"sweep: margin {found.value:+.2f} (n = {found.n})"


def sweep_text(result: dict[str, Any]) -> str:
    """The terminal's text of a `sweep` result."""
    lines = [f"{result['file']}: {result['n_points']} points, contrast {result['contrast']}"]
    for layer, ends in result["coherent"].items():
        lines.append(f"layer {layer}: coherent from {range_words(tuple(ends) if ends else None)}")
    for f in result["findings"]:
        lines.append(f"layer {f['layer']}, {f['pairs']}: margin added minus subtracted at {f['strength']:g}: "
                     f"{_json(f['direction'])}")
        lines += [f"  random: {_json(r)}" for r in f["random"]]
        lines += [f"  {k} best features: {_json(v, '.0%')} of it; what they leave: {_json(f['remainder'][k], '.0%')}"
                  for k, v in f["recovered"].items()]
        if f["learnt"]:
            lines.append(f"  {result['variant']} minus base: {_json(f['learnt'])}")
        lines += [f"  ablated {name}: {_json(v, '.0%')} of it gone" for name, v in f["restored"].items()]
        lines += [f"  the same on base: {name} {_json(v)}" for name, v in f["base_ablated"].items()]
        lines += [f"  done to both, {name}: {_json(v, '.0%')} of the difference gone"
                  for name, v in f["restored_both_ablated"].items()]
    return "\n".join(lines)


def _percent(f: Figure) -> str:
    return figure(f, ".0%")


def _json(value: dict[str, Any], form: str = "+.3f") -> str:
    low, high = value["ci95"] or (None, None)
    return figure(Figure(value["value"], low, high, value["n"]), form)
