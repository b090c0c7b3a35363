"""core/analysis/lora_effect.py: planted features are read back, and where writing is all there is, it predicts all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import extract_setup
import firing_setup as setup
import numpy as np
import pytest
from make_firing import make_firing
from test_lora import mixed

from core.analysis.decompose import decompose
from core.analysis.lora import components
from core.analysis.lora_effect import component_cosines, effect_table, movers, predict, writes
from core.dictionary import Dictionary
from core.directions import Direction
from core.errors import CacheError, CacheMismatch, SaeMismatch
from core.evaluation.firing import read_firing
from core.model.adapter_files import AdapterFactors, LoraFactors
from core.store.extract import extract
from core.store.firing_file import Firing
from core.store.reader import Cache

D, D_SAE = 24, 24
FEATURES = (3, 11, 19)


def dictionary(layer: int = 2) -> Dictionary:
    """Decoder directions at right angles, the encoder their transpose: an encoder that reads what is written."""
    atoms = np.linalg.qr(np.random.default_rng(0).standard_normal((D, D)))[0].astype(np.float32)
    return Dictionary(layer, "local", "sae", atoms, atoms.T.copy())


def planted(layer: int = 1) -> AdapterFactors:
    """Rank 3 on one down_proj: its B columns are decoder directions, of sizes that tell them apart."""
    rng = np.random.default_rng(1)
    A = np.linalg.qr(rng.standard_normal((16, 3)))[0].T
    B = (dictionary().W_dec[list(FEATURES)] * np.array([[6.0], [3.0], [1.5]])).T
    module = LoraFactors(layer, "mlp.down_proj", A.astype(np.float32), B.astype(np.float32), 0.5)
    return AdapterFactors("bad", "", "0" * 64, "", (module,))


@pytest.mark.parametrize("mix", [False, True])
def test_b_columns_that_are_decoder_directions_are_read_back_exactly(mix: bool, tmp_path: Path) -> None:
    adapter = mixed(planted()) if mix else planted()
    parts = components(adapter)
    assert [c.singular_value for c in parts] == pytest.approx([3.0, 1.5, 0.75], rel=1e-4)
    scalars = np.array([[2.0, -1.0, 4.0]] * 5)
    path = make_firing(tmp_path / "x.h5", parts, {("s", "bad"): scalars, ("s", "good"): -scalars[:2]}, d_model=D)
    book = dictionary()
    with Firing.open(path) as firing:
        made = writes(firing, parts)
        for i, feature in enumerate(FEATURES):
            written = Direction("w", "tiny", 2, made.space.vectors[i])
            for method in ("omp", "cosine", "encoder", "nnls"):
                forward = written * np.sign(parts[i].write @ book.W_dec[feature])  # nnls takes no negative part
                found = decompose(forward, book, method, k=4)
                assert found.table["feature"][0] == feature
                assert found.table["cosine"][0] == pytest.approx(1, abs=1e-4)
                assert found.curve["share"][0] == pytest.approx(1, abs=1e-6)
            one = effect_table(firing, made, book, i)
            sign = np.sign(parts[i].write @ book.W_dec[feature])
            wanted = np.zeros(D_SAE)
            wanted[feature] = sign * parts[i].singular_value * scalars[0, i]
            np.testing.assert_allclose(one["effect: s, bad"], wanted, atol=2e-3)
            np.testing.assert_allclose(one["effect: s, good"], -wanted, atol=2e-3)
            np.testing.assert_allclose(one["effect"], wanted * 3 / 5, atol=2e-3)  # by prompt; two have both
        everything = effect_table(firing, made, book)
        summed = sum(effect_table(firing, made, book, i)["effect"].to_numpy() for i in range(3))
        np.testing.assert_allclose(everything["effect"], summed, atol=1e-5)
        assert everything["rank"].min() == 1 and everything["rank"].n_unique() == D_SAE
        for feature in (FEATURES[0], 5):
            found = movers(firing, made, book, feature)
            assert found["effect"].sum() == pytest.approx(everything["effect"][feature], abs=1e-4)
        assert movers(firing, made, book, FEATURES[1])["component"][0] == 1
        cosines = component_cosines(made, {"a": book.W_dec[FEATURES[2]], "zero": np.zeros(D)})
        assert abs(cosines["a"][2]) == pytest.approx(1, abs=1e-4) and cosines["zero"].null_count() == 3


def test_a_component_above_the_dictionary_or_that_does_not_write_has_no_effect(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    modules = (*planted(layer=3).modules,
               LoraFactors(4, "self_attn.q_proj", rng.standard_normal((1, D)), rng.standard_normal((D, 1)), 1.0))
    parts = components(AdapterFactors("bad", "", "0" * 64, "", modules))
    path = make_firing(tmp_path / "x.h5", parts, {("s", ""): np.ones((3, 4))}, d_model=D)
    with Firing.open(path) as firing:
        made = writes(firing, parts)
        with pytest.raises(CacheError, match="writes above layer 2"):
            effect_table(firing, made, dictionary(), 0)
        with pytest.raises(CacheError, match="component 3 does not write"):
            effect_table(firing, made, dictionary(5), 3)
        assert not effect_table(firing, made, dictionary())["effect"].to_numpy().any()
        assert movers(firing, made, dictionary(), 0).height == 0
        with pytest.raises(SaeMismatch, match="scales its input"):
            effect_table(firing, made, replace(dictionary(), normalize_activations="layer_norm"))
        with pytest.raises(CacheMismatch, match="components"):
            writes(firing, parts[:-1])


@pytest.fixture(scope="module")
def measured(tiny_model: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple]:
    """(layers the adapter's modules are at, their names) -> firing, writes, target and reference cache, dictionary."""
    opened = []

    def build(name: str, layers: list[int], modules: list[str], seed: int = 0) -> tuple:
        folder = tmp_path_factory.mktemp(name)
        loaded = tiny_model("llama31")
        found = extract_setup.saes(folder, loaded)
        made = setup.build(loaded, folder / "a", "rslora", seed=seed, target_modules=modules,
                           layers_to_transform=layers, size=0.05)
        rows = setup.sets()[:1]
        read_firing(loaded, made.adapter, made.parts, rows, folder / "f.h5", keep=0)
        for variant, adapter in (("bad", made.adapter), ("base", None)):
            extract(loaded, found, (1, 2), rows[0], folder / f"{variant}.h5", adapter=adapter)
        files = [Firing.open(folder / "f.h5"), Cache.open(folder / "bad.h5"), Cache.open(folder / "base.h5")]
        opened.extend(files)
        sae = found[2].sae
        book = Dictionary(2, "local", "sae", sae.W_dec.detach().numpy(), sae.W_enc.detach().numpy())
        return files[0], writes(files[0], made.parts), *files[1:], book

    yield build
    for file in opened:
        file.close()


def test_where_only_that_layer_writes_the_prediction_is_the_whole_difference(measured: Callable) -> None:
    found = predict_at_2(measured("one", [2], ["down_proj"]))
    assert found.cosine.value == pytest.approx(1, abs=1e-4) and found.explained == pytest.approx(1, abs=1e-3)
    assert found.norm_ratio == pytest.approx(1, abs=1e-3) and found.preactivation.value > 0.999
    assert found.activation.value > 0.5 and found.n_prompts == 9
    np.testing.assert_allclose(found.table["effect"], found.table["preactivation"], atol=1e-4)


def predict_at_2(given: tuple):
    firing, made, target, reference, book = given
    return predict(firing, made, "made", target, reference, 2, book)


def test_what_later_layers_make_of_it_is_not_in_the_reading(measured: Callable) -> None:
    first = predict_at_2(measured("below", [0], ["down_proj"]))
    assert 0 < first.cosine.value < 0.999 and first.explained < 0.99
    none = predict_at_2(measured("above", [3], ["down_proj"]))
    assert np.isnan(none.cosine.value) and np.isnan(none.explained)
    reads = predict_at_2(measured("reads", [1], ["gate_proj"]))
    assert np.isnan(reads.cosine.value) and reads.norm_ratio == 0 and reads.explained == pytest.approx(0)


def test_an_interval_shrinks_to_nothing_where_every_prompt_agrees(measured: Callable) -> None:
    found = predict_at_2(measured("one", [2], ["down_proj"]))
    assert np.ptp(found.cosine.ci95) < 1e-3
    wide = predict_at_2(measured("below", [0], ["down_proj"]))
    assert np.ptp(wide.cosine.ci95) > np.ptp(found.cosine.ci95)


def test_files_of_another_adapter_set_or_text_are_refused(measured: Callable) -> None:
    firing, made, target, reference, book = measured("one", [2], ["down_proj"])
    other = measured("other", [2], ["down_proj"], seed=3)
    with pytest.raises(CacheMismatch, match="adapter differs"):
        predict(firing, made, "made", other[2], reference, 2, book)
    control = predict(firing, made, "made", other[2], reference, 2, book, own=False)
    assert abs(control.cosine.value) < 0.9, "another adapter's change is not this one's"
    with pytest.raises(CacheMismatch, match="adapter differs"):
        predict(firing, made, "made", target, target, 2, book)
    with pytest.raises(CacheError, match="holds no firing on 'x'; it holds made"):
        predict(firing, made, "x", target, reference, 2, book)


def test_rank_correlations_are_scipys() -> None:
    from scipy.stats import spearmanr

    from core.analysis.lora_effect import _spearmans

    rng = np.random.default_rng(4)
    a, b = rng.integers(-3, 4, (5, 40)).astype(float), rng.standard_normal((5, 40))
    b[:, :10] = 0
    np.testing.assert_allclose(_spearmans(a, b), [spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)])
    assert np.isnan(_spearmans(np.zeros((1, 4)), np.arange(4.0)[None]))[0]
