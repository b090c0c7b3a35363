"""The dice: samples follow the distribution, the nucleus is transformers' own, every row has its own settings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import RepetitionPenaltyLogitsProcessor, TopPLogitsWarper

from core.errors import PresetError
from core.model import dice
from core.model.dice import Sampling, choose


def draws(logits: torch.Tensor, n: int, setting: Sampling) -> np.ndarray:
    """Counts of n draws from `logits` [vocabulary]."""
    made = [torch.Generator().manual_seed(i) for i in range(n)]
    return np.bincount(choose(logits.repeat(n, 1), made, [setting] * n).numpy(), minlength=len(logits))


def test_samples_follow_the_softmax() -> None:
    """Chi-square of 4,000 draws of one token against the distribution itself."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    expected = torch.softmax(logits.double() / 0.7, -1).numpy() * 4000
    assert stats.chisquare(draws(logits, 4000, Sampling(temperature=0.7)), expected).pvalue > 1e-3


@pytest.mark.parametrize("top_p", (0.01, 0.5, 0.8, 0.95))
def test_the_nucleus_is_transformers_own(top_p: float) -> None:
    """Over many draws exactly the tokens appear that transformers' warper keeps, in their proportions."""
    logits = torch.randn(9, generator=torch.Generator().manual_seed(4)) * 1.5
    kept = TopPLogitsWarper(top_p)(None, logits[None])[0]
    counts = draws(logits, 4000, Sampling(top_p=top_p))
    inside = torch.isfinite(kept).numpy()
    assert (counts[~inside] == 0).all() and (counts[inside] > 0).all()
    if inside.sum() > 1:
        expected = torch.softmax(kept.double(), -1).numpy()[inside] * 4000
        assert stats.chisquare(counts[inside], expected).pvalue > 1e-3


def test_a_nucleus_wider_than_the_first_look_is_found_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[4.0], [1], [0.1], [2], [1]]
    )
    settings = [Sampling(top_p=p) for p in (0.5, 0.9, 0.99, 0.2, 1.0)]
    wide = [choose(logits, [torch.Generator().manual_seed(s)] * 5, settings).tolist() for s in range(40)]
    monkeypatch.setattr(dice, "NUCLEUS", 20)
    assert wide == [choose(logits, [torch.Generator().manual_seed(s)] * 5, settings).tolist() for s in range(40)]


def test_a_row_takes_what_it_takes_alone() -> None:
    logits = torch.randn(4, 200, generator=torch.Generator().manual_seed(1))
    settings = [Sampling(0.0), Sampling(0.7, 0.9), Sampling(1.5), Sampling(1.0, 0.3, repetition_penalty=1.4)]
    seen = [(), (), (), tuple(range(60))]
    for seed in range(20):
        together = choose(logits, [torch.Generator().manual_seed(seed + n) for n in range(4)], settings, seen)
        for n in range(4):
            die = [torch.Generator().manual_seed(seed + n)]
            assert choose(logits[n : n + 1], die, [settings[n]], [seen[n]]).tolist() == [together[n]]
    assert together[0] == logits[0].argmax()


def test_the_repetition_penalty_is_transformers_own() -> None:
    logits, seen = torch.tensor([[3.0, -1.0, 2.9, 0.5]]), [0, 1, 1]
    theirs = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([seen]), logits.clone())
    die = [torch.Generator()]
    for shift in (torch.zeros(4), torch.tensor([0, 3.5, 0, 0]), torch.tensor([0.0, 0, 0, 2.0])):
        theirs = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([seen]), logits + shift)
        assert choose(logits + shift, die, [Sampling(0.0, repetition_penalty=1.5)], [seen]) == theirs.argmax()
    assert (
        choose(logits, die, [Sampling(0.0)])
        == 0
        != choose(logits, die, [Sampling(0.0, repetition_penalty=1.5)], [seen])
    )


def test_impossible_settings_are_refused() -> None:
    for settings, says in (
        ({"temperature": -1}, "Temperature"), ({"temperature": float("nan")}, "Temperature"),
        ({"max_new_tokens": 0}, "at least 1"), ({"top_p": 0.0}, "top_p"), ({"top_p": 1.1}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition penalty"), ({"repetition_penalty": float("inf")}, "repetition"),
    ):  # fmt: skip
        with pytest.raises(PresetError, match=says):
            Sampling(**settings)
