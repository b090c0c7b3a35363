"""A judge that is a local transformers model, with the same weighting as an endpoint's log-probabilities.

Where the tokenizer has every number from 0 to 100 as one token, exactly the score of core/evaluation/readings.py. Where
it writes numbers digit by digit (SmolLM2, Qwen, Gemma), the probability of each number is the product over its tokens,
times that of not going on to a longer one; a number of two digits is taken to be complete, but for 10.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from core.conversations import Message
from core.errors import JudgeError
from core.evaluation.readings import LEAST_MASS, TOP, Reading, Stamp, from_shares, weighted
from core.model.batches import pad_id, plan_batches
from core.model.generation import prompt_ids
from core.model.loading import LoadedModel

#: Tokens in one batch, padding included.
BATCH_TOKENS = 2048

NUMBERS = range(101)


class LocalJudge:
    """See the module. Whatever interventions are active around a call take part."""

    def __init__(self, loaded: LoadedModel, batch_tokens: int = BATCH_TOKENS):
        self.loaded, self.batch_tokens = loaded, batch_tokens
        self.sequences = number_tokens(loaded)

    @property
    def one_token(self) -> bool:
        """Whether every number is one token."""
        return all(len(ids) == 1 for ids in self.sequences.values())

    @property
    def stamp(self) -> Stamp:
        return Stamp(f"local:{self.loaded.spec.id}", {
            "weights": self.loaded.weights_hash, "template": self.loaded.template_hash,
            "dtype": str(self.loaded.dtype).removeprefix("torch."),
            "scoring": "weighted" if self.one_token else "digits", "top_logprobs": TOP if self.one_token else None,
            "least_mass": LEAST_MASS,
        })  # fmt: skip

    @torch.inference_mode()
    def read(
        self, prompts: Sequence[str], done: Callable[[int, Reading], None], failed: Callable[[int, str], None]
    ) -> None:
        """See `Judge.read`. Prompts are read in batches of similar length."""
        rows = [prompt_ids(self.loaded, (Message("user", prompt),)) for prompt in prompts]
        longest = getattr(self.loaded.model.config, "max_position_embeddings", None) or max(map(len, rows), default=0)
        fit = [i for i, row in enumerate(rows) if len(row) + 3 <= longest]
        for i in set(range(len(rows))) - set(fit):
            failed(i, f"the prompt has {len(rows[i])} tokens, more than the {longest} the model reads")
        for batch in plan_batches([len(rows[i]) for i in fit], self.batch_tokens):
            chosen = [fit[n] for n in batch]
            for index, reading in zip(chosen, self._readings([rows[i] for i in chosen]), strict=True):
                done(index, reading)

    def _readings(self, rows: Sequence[np.ndarray]) -> list[Reading]:
        ids, mask = _left_pad(rows, pad_id(self.loaded.tokenizer), self.loaded.device)
        cache = DynamicCache(config=self.loaded.model.config)
        logprobs = self._step(ids, mask, cache)
        top = logprobs.topk(min(TOP, logprobs.shape[-1]), dim=-1)
        pairs = [
            [(self.loaded.tokenizer.decode([token]), value) for token, value in zip(*row, strict=True)]
            for row in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]
        sizes = [len(row) for row in rows]
        if self.one_token:
            return [weighted(row, tokens_in=n) for row, n in zip(pairs, sizes, strict=True)]
        shares = self._shares(logprobs, mask, cache)
        return [
            from_shares(dict(zip(NUMBERS, row.tolist(), strict=True)), "digits", row_pairs[0][0], tokens_in=n)
            for row, row_pairs, n in zip(shares, pairs, sizes, strict=True)
        ]

    def _shares(self, logprobs: Tensor, mask: Tensor, cache: DynamicCache) -> np.ndarray:
        """Probability of every number, float64 [rows, 101]; `logprobs` [rows, vocabulary] at the first position.

        Level by level: what was written so far is a prefix; its probability goes to the prefixes one token longer, and
        what is left of it to the number that it is itself. The cache holds a row for each prompt and open prefix.
        """
        found = np.zeros((len(mask), len(NUMBERS)))
        number_of = {ids: n for n, ids in self.sequences.items()}
        level: list[tuple[int, ...]] = [()]
        chances = np.ones((len(mask), 1))  # [prompts, prefixes of this level]
        while level:
            flat = logprobs.view(len(mask), len(level), -1)
            longer, ahead = [], []
            for k, prefix in enumerate(level):
                nexts = sorted({ids[len(prefix)] for ids in self.sequences.values() if ids[: len(prefix)] == prefix
                                and len(ids) > len(prefix)})  # fmt: skip
                going = flat[:, k, nexts].double().exp().cpu().numpy()
                if prefix in number_of:
                    found[:, number_of[prefix]] = chances[:, k] * np.clip(1 - going.sum(axis=1), 0, 1)
                for j, token in enumerate(nexts):
                    name = (*prefix, token)
                    if any(len(ids) > len(name) and ids[: len(name)] == name for ids in self.sequences.values()):
                        longer.append((k, name))
                        ahead.append(chances[:, k] * going[:, j])
                    else:
                        found[:, number_of[name]] = chances[:, k] * going[:, j]
            if not longer:
                break
            kept = torch.tensor([row * len(level) + k for row in range(len(mask)) for k, _ in longer])
            cache.batch_select_indices(kept.to(mask.device))
            mask_rows = mask.repeat_interleave(len(longer), dim=0)
            depth = len(longer[0][1])
            mask_rows = torch.cat([mask_rows, mask_rows.new_ones(len(mask_rows), depth)], dim=1)
            ids = torch.tensor([name[-1] for _, name in longer], device=mask.device).repeat(len(mask))[:, None]
            logprobs = self._step(ids, mask_rows, cache)
            level, chances = [name for _, name in longer], np.stack(ahead, axis=1)
        return found

    def _step(self, ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """Log-probabilities [rows, vocabulary] of the token after `ids`; the cache grows by them."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        logits = self.loaded.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1].float()  # fmt: skip
        return torch.log_softmax(logits, dim=-1)


def number_tokens(loaded: LoadedModel) -> dict[int, tuple[int, ...]]:
    """Number -> its tokens, as the model would write it at the beginning of an answer.

    Raises `JudgeError` where the tokenizer joins a number with the template before it.
    """
    before = prompt_ids(loaded, (Message("user", "How many?"),))
    text = loaded.tokenizer.decode(before, clean_up_tokenization_spaces=False)
    found = {}
    for number in NUMBERS:
        ids = loaded.tokenizer(f"{text}{number}", add_special_tokens=False)["input_ids"]
        if list(ids[: len(before)]) != before.tolist() or len(ids) == len(before):
            raise JudgeError(f"{loaded.spec.id}: its tokenizer joins numbers with the template; use another judge.")
        found[number] = tuple(int(i) for i in ids[len(before) :])
    return found


def _left_pad(rows: Sequence[np.ndarray], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Left-padded ids and mask, int64 [batch, position]."""
    width = max(len(row) for row in rows)
    ids, mask = np.full((len(rows), width), pad, dtype=np.int64), np.zeros((len(rows), width), dtype=np.int64)
    for n, row in enumerate(rows):
        ids[n, width - len(row) :], mask[n, width - len(row) :] = row, 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
