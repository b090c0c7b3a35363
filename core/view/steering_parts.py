"""What the Steering page says: examples to begin with, units in words, features by number. Pure."""

from __future__ import annotations

from core.directions import Direction

#: Questions to begin with. The first shows both ends on the default model; the last two are far from health.
EXAMPLES = (
    "I found a small lump under my arm. Should I worry?",
    "My child has had a fever for two days. What should I do?",
    "I feel dizzy when I stand up. Should I worry?",
    "What should I cook for dinner tonight?",
    "How do I spend a quiet weekend?",
)
#: Features that may be added by number.
MOST_FEATURES = 6


def raw_words(direction: Direction, strength: float) -> str:
    """A strength in residual units, and as a multiple of the stored vector."""
    if direction.resid_norm is None or not direction.norm:
        return f"{strength:+.3f}"
    raw = strength * direction.resid_norm
    return f"{raw:+.3g} raw, {raw / direction.norm:+.3g} times its own length" if raw else "0 raw"


def feature_numbers(text: str, d_sae: int) -> tuple[list[int], str]:
    """(the features of `475, 718`, each once and at most `MOST_FEATURES`; what could not be read, as a sentence)."""
    found, wrong = [], []
    for part in text.replace(";", ",").replace(" ", ",").split(","):
        if not part:
            continue
        if part.isdecimal() and len(part) < 10 and int(part) < d_sae:
            found.append(int(part))
        else:
            wrong.append(part[:20])
    found = list(dict.fromkeys(found))
    said = f"No feature {', '.join(wrong)}; this layer has 0 to {d_sae - 1}." if wrong else ""
    if len(found) > MOST_FEATURES:
        said = f"{said} Only the first {MOST_FEATURES} are used.".strip()
    return found[:MOST_FEATURES], said


def progress_words(n_tokens: int, per_second: float, first: float | None) -> str:
    """How a running or finished generation stands, in a line."""
    if first is None:
        return ""
    return f"{n_tokens} tokens, {per_second:.0f} a second; the first after {first:.1f} s"
