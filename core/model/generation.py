"""One decode loop over a batch of prompts: sampling with a seed of its own for every row.

Whatever interventions are active around the call act on it. Does not know conversations files, nor what is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from core.conversations import Message, render
from core.errors import PresetError
from core.model.batches import pad_id
from core.model.loading import LoadedModel


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 1.0
    """0 takes the most probable token."""
    top_p: float = 1.0
    """Nucleus sampling (Holtzman et al. 1904.09751): the most probable tokens that reach this share; 1: all."""
    max_new_tokens: int = 120

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise PresetError(f"Temperature {self.temperature} is below 0; give 0 (most probable token) or more.")
        if not 0 < self.top_p <= 1:
            raise PresetError(f"top_p is {self.top_p}; give a share above 0, up to 1 (every token).")
        if self.max_new_tokens < 1:
            raise PresetError(f"{self.max_new_tokens} new tokens were asked for; give at least 1.")


@dataclass(frozen=True)
class Generated:
    """One row's answer."""

    ids: np.ndarray
    """int64 [n]: new tokens, without the one that ended the turn."""
    ended: bool
    """Whether the model ended its turn, rather than being cut at `max_new_tokens`."""


def prompt_ids(loaded: LoadedModel, messages: Sequence[Message]) -> np.ndarray:
    """Token ids [n] of the chat template up to where the assistant begins to speak."""
    text = render(loaded.tokenizer, messages, add_generation_prompt=True)
    return np.asarray(loaded.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)


def stop_ids(loaded: LoadedModel) -> tuple[int, ...]:
    """Tokens that end a turn: the generation configuration's and the tokenizer's own."""
    configured = loaded.model.generation_config.eos_token_id
    many = configured if isinstance(configured, list) else [configured]
    return tuple({int(i) for i in (*many, loaded.tokenizer.eos_token_id) if i is not None})


@torch.inference_mode()
def generate(
    loaded: LoadedModel,
    prompts: Sequence[np.ndarray],
    seeds: Sequence[int],
    sampling: Sampling = Sampling(),
    on_step: Callable[[int], None] = lambda n_running: None,
) -> list[Generated]:
    """Answers to `prompts` (token ids each), all in one batch; rows that end leave it.

    Row i draws one uniform number a token from its own generator, seeded with seeds[i], and takes the token at that
    quantile of its distribution: the same seed with another intervention meets the same luck.
    """
    stops = torch.tensor(stop_ids(loaded), device=loaded.device)
    ids, mask = _left_pad(prompts, pad_id(loaded.tokenizer), loaded.device)
    dice = [torch.Generator().manual_seed(seed) for seed in seeds]
    rows = list(range(len(prompts)))
    new: list[list[int]] = [[] for _ in rows]
    ended = [False] * len(rows)
    cache = DynamicCache(config=loaded.model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for _ in range(sampling.max_new_tokens):
        logits = loaded.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1].float()  # fmt: skip
        chosen = _choose(logits, [dice[row] for row in rows], sampling)
        stopped = torch.isin(chosen, stops)
        for row, token, stop in zip(rows, chosen.tolist(), stopped.tolist(), strict=True):
            ended[row] = stop
            if not stop:
                new[row].append(token)
        on_step(len(rows))
        going = torch.nonzero(~stopped).ravel()
        if len(going) == 0:
            break
        if len(going) < len(rows):
            cache.batch_select_indices(going)
            rows = [rows[i] for i in going.tolist()]
            mask, positions, chosen = mask[going], positions[going], chosen[going]
        ids = chosen[:, None]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return [Generated(np.asarray(tokens, dtype=np.int64), end) for tokens, end in zip(new, ended, strict=True)]


def _left_pad(rows: Sequence[np.ndarray], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Left-padded ids and mask, int64 [batch, position]: every row's last token stands in the last column."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for n, row in enumerate(rows):
        ids[n, width - len(row) :] = torch.from_numpy(np.asarray(row, dtype=np.int64))
        mask[n, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


def _choose(logits: Tensor, dice: Sequence[torch.Generator], sampling: Sampling) -> Tensor:
    """Token ids [batch], each at its row's quantile of the tokens in the nucleus; logits: [batch, vocabulary]."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    luck = torch.stack([torch.rand((), generator=die, dtype=torch.float64) for die in dice]).to(logits.device)
    shares = torch.softmax(logits.double() / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        ordered, at = shares.sort(dim=-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p
        shares = shares.masked_fill(outside.scatter(-1, at, outside), 0.0)
    cumulative = shares.cumsum(-1)
    at = torch.searchsorted(cumulative, luck[:, None] * cumulative[:, -1:], right=True).squeeze(-1)
    return at.clamp(max=logits.shape[-1] - 1)
