"""Where along the text an intervention acts: everywhere, on the prompt, on the response, or on its first tokens.

Decided by the absolute position of a token in its own row, so padding on either side and a KV cache change nothing.
Knows neither interventions nor models.

The prompt ends with the template's opening of the assistant's turn, and its last token is the one from which the first
response token is predicted. So `prompt` can change the first response token directly, and `response` cannot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from core.errors import InterventionError


@dataclass(frozen=True)
class Scope:
    """A set of positions. Written `all`, `prompt`, `response` or `first:N`."""

    kind: Literal["all", "prompt", "response", "first"] = "all"
    n: int = 0
    """How many response tokens `first` takes; 0 for the other kinds."""

    def __post_init__(self) -> None:
        if self.kind not in ("all", "prompt", "response", "first") or (self.n > 0) != (self.kind == "first"):
            raise InterventionError(f"There is no scope {self}; use all, prompt, response or first:N, N > 0.")

    @classmethod
    def parse(cls, text: str) -> Scope:
        """`all`, `prompt`, `response` or `first:N`. Raises `InterventionError` for anything else."""
        kind, _, n = text.strip().partition(":")
        if (n.isdecimal() if kind == "first" else not n) and kind in ("all", "prompt", "response", "first"):
            return cls(kind, int(n or 0))
        raise InterventionError(f"There is no scope {text!r}; use all, prompt, response or first:N, N > 0.")

    def __str__(self) -> str:
        return f"first:{self.n}" if self.kind == "first" else self.kind

    def covers(self, positions: Tensor, n_prompt: Tensor) -> Tensor:
        """bool [batch, position]. positions: int64 [batch, position], -1 at padding; n_prompt: int64 [batch]."""
        start = n_prompt[:, None]
        if self.kind == "all":
            return positions >= 0
        if self.kind == "prompt":
            return (positions >= 0) & (positions < start)
        if self.kind == "response":
            return positions >= start
        return (positions >= start) & (positions < start + self.n)


ALL = Scope()
PROMPT = Scope("prompt")
RESPONSE = Scope("response")


def positions_of(mask: Tensor) -> Tensor:
    """Absolute position of every token, -1 at padding: int64 [batch, position]; mask: the same shape, 1 at tokens."""
    mask = mask.long()
    return (mask.cumsum(1) - 1).masked_fill(mask == 0, -1)
