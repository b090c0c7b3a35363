"""From responses to prompts: pairing, averaging, dropping and length matching."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from core.analysis.units import Sample, build_units
from core.errors import NotEnoughData


def sample(name: str, ids: list[str], lengths: list[int] | None = None, d_sae: int = 5) -> Sample:
    acts = np.random.default_rng(len(ids)).random((len(ids), d_sae)).astype(np.float32)
    return Sample(name, sparse.csr_array(acts), np.array(ids), np.array(lengths or [10] * len(ids)))


def test_responses_are_averaged_within_prompts_and_prompts_aligned() -> None:
    target, reference = sample("t", ["b", "a", "b", "c", "b"], [1, 9, 2, 9, 3]), sample("r", ["c", "b", "a"])
    units = build_units(target, reference)
    assert units.paired and units.n_prompts == 3 and units.notes == ()
    assert units.target.prompt_ids.tolist() == units.reference.prompt_ids.tolist() == ["a", "b", "c"]
    dense = target.acts.toarray().astype(float)
    expected = [dense[1], dense[[0, 2, 4]].mean(0), dense[3]]
    np.testing.assert_allclose(units.target.prompts.toarray(), expected, rtol=1e-15)
    assert units.target.n_responses == 5 and units.target.mean_length == pytest.approx((9 + 2 + 9) / 3)


def test_prompts_without_a_partner_are_dropped_and_counted() -> None:
    units = build_units(sample("t", list("abcd")), sample("r", list("abcxyz")))
    assert units.paired and units.target.prompt_ids.tolist() == list("abc")
    assert "4 prompts stand on one side only (1 target, 3 reference)" in units.notes[0]


def test_few_shared_prompts_do_not_make_pairs() -> None:
    target, reference = sample("t", list("abcdefgh")), sample("r", list("abuvwxyz"))
    units = build_units(target, reference)
    assert not units.paired and units.target.n_prompts == 8 and units.n_prompts == 14
    assert "2 of the 8 prompts of the smaller side stand on both" in units.notes[0]
    assert build_units(target, reference, pairing="paired").target.n_prompts == 2
    assert build_units(target, reference, min_shared_share=0.25).paired


def test_length_matching() -> None:
    target, reference = sample("t", list("abcd"), [10, 20, 30, 40]), sample("r", list("abcd"), [10, 21, 60, 44])
    units = build_units(target, reference, max_length_ratio=1.1)
    assert units.target.prompt_ids.tolist() == list("abd") and "3 of 4" in units.notes[0]
    unpaired = build_units(target, sample("r", list("wxyz"), [43, 100, 10, 11]), max_length_ratio=1.1)
    assert unpaired.target.prompt_ids.tolist() == list("ad") and unpaired.reference.prompt_ids.tolist() == list("wy")
    with pytest.raises(NotEnoughData):
        build_units(target, sample("r", list("wxyz"), [900, 901, 902, 903]), max_length_ratio=1.1)


def test_a_sample_is_checked_and_leaves_its_input_alone() -> None:
    acts = sparse.csr_array((np.array([1.0, 2.0, 0.0], np.float32), np.array([1, 1, 0]), np.array([0, 3, 3])), (2, 3))
    made = Sample("s", acts, np.array([1, 2]), np.array([5, 5]))
    assert made.acts.nnz == 1 and made.acts[0, 1] == 3 and acts.nnz == 3 and made.prompt_ids.tolist() == ["1", "2"]
    with pytest.raises(ValueError, match="2 rows"):
        Sample("s", acts, np.array(["a"]), np.array([5, 5]))
