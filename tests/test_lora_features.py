"""core/analysis/lora_features.py: which dictionary a component is held against, and planted vectors read back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_lora_effect import FEATURES, D, dictionary, planted

from core.analysis.lora import Component, ComponentKey, components
from core.analysis.lora_features import as_direction, nearest_layer, read_features, write_features
from core.errors import AdapterError
from core.model.gains import BlockGains

ONES = BlockGains(np.ones(D, np.float32), np.ones(D, np.float32))


def part(layer: int, module: str, read: np.ndarray | None = None, write: np.ndarray | None = None) -> Component:
    unit = np.eye(D)[0]
    return Component(ComponentKey(layer, module, 0), 2.0, unit if write is None else write,
                     unit if read is None else read, 1.0)


@pytest.mark.parametrize(("layer", "module", "wanted"), [
    (9, "mlp.down_proj", 9), (10, "mlp.down_proj", 15), (29, "self_attn.o_proj", 21), (0, "mlp.down_proj", 3),
    (10, "self_attn.q_proj", 9), (9, "mlp.up_proj", 3), (3, "mlp.gate_proj", 3), (0, "self_attn.k_proj", 3),
    (29, "mlp.gate_proj", 21),
])  # fmt: skip
def test_the_nearest_dictionary_that_could_see_it(layer: int, module: str, wanted: int) -> None:
    assert nearest_layer(part(layer, module), (3, 9, 15, 21)) == wanted
    assert nearest_layer(part(layer, module), ()) is None


def test_planted_write_vectors_are_their_features() -> None:
    book = dictionary()
    for c, feature in zip(components(planted()), FEATURES, strict=True):
        found = write_features(c, ONES, book, "tiny", "omp", 3)
        assert found.table["feature"][0] == feature and abs(found.table["cosine"][0]) == pytest.approx(1, abs=1e-4)
        assert found.direction.origin["index"] == str(c.key.index)


def test_read_vectors_are_read_through_the_norm_s_gain() -> None:
    book, gain = dictionary(), np.random.default_rng(0).uniform(0.5, 2, D).astype(np.float32)
    atom = book.W_dec[7].astype(np.float64)
    inner = atom / gain  # what the module must listen to, so that through the gain it is the feature
    c = part(3, "mlp.up_proj", read=inner / np.linalg.norm(inner))
    gains = replace(ONES, mlp=gain)
    found = read_features(c, gains, book)
    assert found.table["feature"][0] == 7 and found.layer == 2
    assert found.table["decoder_cosine"][0] == pytest.approx(1, abs=1e-5)
    assert found.table["encoder_cosine"][0] == pytest.approx(1, abs=1e-5)
    assert read_features(c, ONES, book).table["decoder_cosine"][0] < 0.999, "without the gain it is another vector"


def test_what_does_not_touch_the_residual_stream_is_refused_in_words() -> None:
    for module, space in (("mlp.down_proj", "the MLP's hidden space"), ("self_attn.o_proj", "the attention heads")):
        with pytest.raises(AdapterError, match=f"reads {space}, not the residual stream"):
            read_features(part(1, module), ONES, dictionary())
    with pytest.raises(AdapterError, match="1.q_proj.0 does not write"):
        as_direction(part(1, "self_attn.q_proj"), ONES, "tiny")


def test_a_component_becomes_a_direction_with_its_origin() -> None:
    c = part(4, "mlp.down_proj")
    found = as_direction(c, replace(ONES, after_mlp=np.full(D, 3, np.float32)), "tiny", size=-2.0, resid_norm=5.0,
                         adapter="bad")
    np.testing.assert_array_equal(found.vector, -6 * np.eye(D)[0].astype(np.float32))
    assert (found.layer, found.name, found.resid_norm) == (4, "bad 4.down_proj.0", 5.0)
    assert found.origin["module"] == "mlp.down_proj" and found.origin["adapter"] == "bad"
