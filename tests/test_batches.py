"""core/model/batches.py: batches keep to the budget and lose nothing; sinks do not depend on a row's company."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from core.model.batches import OUTLIER_FACTOR, outliers, pad, pad_id, plan_batches


@pytest.mark.parametrize("budget", [1, 7, 64, 1000, 10**9])
@pytest.mark.parametrize("seed", range(5))
def test_a_plan_holds_every_index_once_within_the_budget_longest_first(seed: int, budget: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 90, size=57).tolist()
    plan = plan_batches(lengths, budget)
    assert sorted(i for batch in plan for i in batch) == list(range(57))
    for batch in plan:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
    flat = [lengths[i] for batch in plan for i in batch]
    assert flat == sorted(lengths, reverse=True)


def test_a_plan_fills_its_batches() -> None:
    lengths = np.random.default_rng(1).integers(1, 90, size=200).tolist()
    for batch, following in zip(plan := plan_batches(lengths, 256), plan[1:], strict=False):
        assert (len(batch) + 1) * lengths[batch[0]] > 256, f"{following[0]} would have fitted too"


def test_a_row_longer_than_the_budget_goes_alone_and_nothing_gives_no_batch() -> None:
    assert plan_batches([5, 100, 5], 10) == [[1], [0, 2]]
    assert plan_batches([], 10) == []


def test_equal_lengths_keep_their_order_so_that_a_plan_is_reproducible() -> None:
    assert plan_batches([3] * 5, 6) == [[0, 1], [2, 3], [4]]


def test_padding_is_on_the_right_and_masked() -> None:
    ids, mask = pad([np.array([5, 6, 7], np.int32), np.array([8], np.int32)], 9, torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert ids.dtype == mask.dtype == torch.int64


def test_the_padding_id_is_pad_then_eos_then_zero() -> None:
    assert pad_id(SimpleNamespace(pad_token_id=0, eos_token_id=2)) == 0
    assert pad_id(SimpleNamespace(pad_token_id=None, eos_token_id=2)) == 2
    assert pad_id(SimpleNamespace()) == 0


def planted(lengths: list[int], sinks: list[tuple[int, int]], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Residuals of norm near 1, but 50 at the planted sinks and 1000 in the padding."""
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    resid = torch.nn.functional.normalize(torch.randn(len(lengths), width, 16, generator=generator), dim=-1)
    resid *= 1 + 0.2 * torch.rand(len(lengths), width, 1, generator=generator)
    for row, position in sinks:
        resid[row, position] *= 50
    return torch.where(mask[..., None] == 1, resid, 1000.0), mask


def test_planted_sinks_are_found_and_padding_is_none() -> None:
    resid, mask = planted([12, 7, 3], [(0, 0), (0, 5), (1, 0)], 12)
    assert outliers(resid, mask).nonzero().tolist() == [[0, 0], [0, 5], [1, 0]]


def test_outliers_do_not_depend_on_the_company_or_on_the_padding() -> None:
    resid, mask = planted([12, 7, 3], [(0, 0), (1, 2)], 12)
    resid[2] *= 200  # a loud neighbour must not raise the others' threshold
    together = outliers(resid, mask)
    for row, length in enumerate([12, 7, 3]):
        alone = outliers(resid[row : row + 1, :length], mask[row : row + 1, :length])
        assert torch.equal(together[row, :length], alone[0])


def test_the_threshold_is_ten_times_the_median_and_holds_in_half_precision() -> None:
    resid = torch.ones(1, 9, 4)
    resid[0, 0] *= OUTLIER_FACTOR * 1.01
    resid[0, 1] *= OUTLIER_FACTOR * 0.99
    for dtype in (torch.float32, torch.float16):
        found = outliers((resid * 2000).to(dtype), torch.ones(1, 9, dtype=torch.int64))
        assert found.nonzero().tolist() == [[0, 0]], "float16 norms of long vectors overflow unless widened"
