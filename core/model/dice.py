"""How the next token is chosen: each row of a batch with settings and dice of its own. Knows logits, not models.

Every row draws one uniform number a token from its own generator and takes the token at that quantile of its
distribution, in the order of the vocabulary: the same seed under another intervention meets the same luck (common
random numbers), so what differs between two rows is the intervention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import PresetError

#: Tokens among which the nucleus is looked for first, as sorting a whole vocabulary is slow.
NUCLEUS = 1024


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 1.0
    """0 takes the most probable token."""
    top_p: float = 1.0
    """Nucleus sampling (Holtzman et al. 1904.09751): the most probable tokens that reach this share; 1: all."""
    max_new_tokens: int = 120
    repetition_penalty: float = 1.0
    """Logits of tokens in the prompt or the answer are divided (negative ones multiplied) by it; 1: left alone
    (Keskar et al. 1909.05858, section 4.1)."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise PresetError(f"Temperature {self.temperature} is below 0; give 0 (most probable token) or more.")
        if not 0 < self.top_p <= 1:
            raise PresetError(f"top_p is {self.top_p}; give a share above 0, up to 1 (every token).")
        if self.max_new_tokens < 1:
            raise PresetError(f"{self.max_new_tokens} new tokens were asked for; give at least 1.")
        if not 0 < self.repetition_penalty < float("inf"):
            raise PresetError(f"A repetition penalty of {self.repetition_penalty} was asked for; give one above 0.")


#: Every token in its proportion, at most 120 of them.
PLAIN = Sampling()


def choose(
    logits: Tensor, dice: Sequence[torch.Generator], settings: Sequence[Sampling], seen: Sequence[Sequence[int]] = ()
) -> Tensor:
    """Token ids int64 [batch].

    logits: float32 [batch, vocabulary]; seen: every row's tokens so far, needed where its repetition penalty is not 1.
    """
    for n, setting in enumerate(settings):
        if setting.repetition_penalty != 1:
            logits = _penalised(logits, n, seen[n], setting.repetition_penalty)
    drawn = [n for n, setting in enumerate(settings) if setting.temperature > 0]
    if not drawn:
        return logits.argmax(-1)
    if len(drawn) == len(settings):
        return _at_quantiles(logits, dice, settings)
    chosen = logits.argmax(-1)
    chosen[drawn] = _at_quantiles(logits[drawn], [dice[n] for n in drawn], [settings[n] for n in drawn])
    return chosen


def _at_quantiles(logits: Tensor, dice: Sequence[torch.Generator], settings: Sequence[Sampling]) -> Tensor:
    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    luck = torch.stack([torch.rand((), generator=die, dtype=torch.float64) for die in dice]).to(logits.device)
    shares = torch.softmax(logits.double() / column([s.temperature for s in settings]), dim=-1)
    top_p = column([s.top_p for s in settings])
    if any(s.top_p < 1 for s in settings):
        shares = _nucleus(shares, top_p)
    cumulative = shares.cumsum(-1)
    at = torch.searchsorted(cumulative, luck[:, None] * cumulative[:, -1:], right=True).squeeze(-1)
    return at.clamp(max=logits.shape[-1] - 1)


def _nucleus(shares: Tensor, top_p: Tensor) -> Tensor:
    """`shares` [batch, vocabulary] with 0 for the tokens outside each row's nucleus; rows at top_p 1 keep all."""
    narrow = (top_p < 1).squeeze(-1)
    ordered, at = shares.topk(min(NUCLEUS, shares.shape[-1]), dim=-1)
    if (ordered[narrow].sum(-1) < top_p[narrow, 0]).any():
        ordered, at = shares.sort(dim=-1, descending=True)
    inside = (ordered.cumsum(-1) - ordered < top_p) | (~narrow)[:, None]
    kept = torch.zeros_like(shares).scatter(-1, at, torch.where(inside, ordered, 0.0))
    return torch.where(narrow[:, None], kept, shares)


def _penalised(logits: Tensor, row: int, seen: Sequence[int], penalty: float) -> Tensor:
    ids = torch.tensor(sorted(set(seen)), device=logits.device)
    logits = logits.clone()
    old = logits[row, ids]
    logits[row, ids] = torch.where(old < 0, old * penalty, old / penalty)
    return logits
