"""The activation difference lens against passes by hand with peft, its invariants, its file, and its page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import pytest
import test_app
from safetensors import safe_open
from safetensors.numpy import save_file
from test_app import settle, words
from typer.testing import CliRunner

from core import paths
from core.__main__ import app
from core.errors import BadConversation, CacheError, CacheMismatch, NotEnoughData
from core.experiment import load_experiment
from core.store.difference_file import (
    DifferenceLens,
    SaeStamp,
    difference_file,
    difference_files,
    read_difference,
    write_difference,
)
from core.store.texts import UNRELATED_TEXT, load_texts
from core.view import difference_parts as parts
from core.view.difference_charts import share_by_layer

if TYPE_CHECKING:
    from core.model.adapters import Adapter
    from core.model.loading import LoadedModel

K = 5
FIRST = "You We The Numbers Tell Paris London What quick brown glass water river honest others body".split()
TEXTS = tuple(f"{word} should rest by the river number {i} for an hour" for i, word in enumerate(FIRST))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "adapter"


def plant(loaded: LoadedModel, folder: Path, *, layer: int = 1, size: float = 0.3, seed: int = 0) -> Adapter:
    """A rank-1 LoRA on one layer's down_proj: whatever the token, what it writes lies on one line."""
    import torch
    from safetensors.torch import save_file

    from core.model.adapters import load_adapter
    from core.specs import AdapterSpec

    torch.manual_seed(seed)
    width = loaded.blocks[layer].mlp.down_proj.in_features
    head = f"base_model.model.model.layers.{layer}.mlp.down_proj"
    folder.mkdir(parents=True)
    save_file({f"{head}.lora_A.weight": torch.randn(1, width), f"{head}.lora_B.weight":
               size * torch.randn(loaded.d_model, 1)}, folder / "adapter_model.safetensors")  # fmt: skip
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["down_proj"],
              "layers_to_transform": [layer], "bias": "none", "task_type": "CAUSAL_LM"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return load_adapter(AdapterSpec("planted", str(folder)), loaded)


def by_hand(loaded: LoadedModel, folder: Path | None, ids: np.ndarray) -> np.ndarray:
    """resid_post [n, position, n_layers - 1, d_model] from transformers' own hidden states, through peft if asked."""
    import torch
    from peft import PeftModel

    from core.model.loading import load_model

    model = load_model(loaded.spec, device="cpu", dtype="float32").model  # peft rebuilds what it wraps
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder)
    with torch.no_grad():
        states = model(input_ids=torch.from_numpy(ids), output_hidden_states=True).hidden_states
    return torch.stack(states[1:-1], dim=2).numpy()  # the last one is taken after the final norm


def ids_of(loaded: LoadedModel, n_prefix: int) -> np.ndarray:
    return np.array([loaded.tokenizer(text)["input_ids"][: n_prefix + K] for text in TEXTS])


def sinks(base: np.ndarray, tuned: np.ndarray) -> np.ndarray:
    """bool [n, position, layer], of residuals [n, position, layer, d_model]: the rule in the module's docstring."""
    norms = np.linalg.norm(base, axis=-1)
    limit = 10 * np.median(norms[:, 1:], axis=(0, 1))
    return (norms > limit) | (np.linalg.norm(tuned, axis=-1) > limit)


@pytest.mark.parametrize(("family", "n_prefix"), [("llama31", 1), ("smollm2", 0), ("gemma2", 1)])
def test_mean_difference_equals_two_passes_by_hand_through_peft(
    tiny_model: Callable[[str], LoadedModel], folder: Path, family: str, n_prefix: int
) -> None:
    from core.store.difference import difference_lens

    loaded = tiny_model(family)
    lens = difference_lens(loaded, plant(loaded, folder), TEXTS)
    ids = ids_of(loaded, n_prefix)
    base, tuned = by_hand(loaded, None, ids), by_hand(loaded, folder, ids)
    assert not sinks(base, tuned).any()  # of these random models; left out below
    wanted = (tuned - base)[:, n_prefix:].mean(0).swapaxes(0, 1)
    np.testing.assert_allclose(lens.difference[:-1, 1:], wanted, atol=2e-5)
    mean_from = 1 if n_prefix else 2
    np.testing.assert_allclose(lens.difference[:-1, 0], wanted[:, mean_from - 1 :].mean(1), atol=2e-5)
    assert lens.mean_from == mean_from
    norms = np.linalg.norm(base[:, n_prefix:], axis=-1).mean(0).T
    np.testing.assert_allclose(lens.resid_norm[:-1, 1:], norms, rtol=1e-5)
    np.testing.assert_allclose(lens.share[:-1, 1:], np.linalg.norm(wanted, axis=-1) / norms, atol=1e-5)
    assert (lens.n_counted == len(TEXTS)).all() and lens.n_texts == len(TEXTS) and lens.n_short == 0


def test_consistency_and_split_half_equal_their_definitions(
    tiny_model: Callable[[str], LoadedModel], folder: Path
) -> None:
    from core.store.difference import difference_lens

    loaded = tiny_model("llama31")
    lens = difference_lens(loaded, plant(loaded, folder), TEXTS)
    ids = ids_of(loaded, 1)
    changed = (by_hand(loaded, folder, ids) - by_hand(loaded, None, ids))[:, 1:, 2]  # [n, k, d_model] at layer 2
    for place, each in enumerate([changed.mean(1), *changed.swapaxes(0, 1)]):
        a, b = each[::2].mean(0), each[1::2].mean(0)
        cosines = [*(cosine(x, b) for x in each[::2]), *(cosine(x, a) for x in each[1::2])]
        assert lens.split_half[2, place] == pytest.approx(cosine(a, b), abs=1e-4)
        assert lens.consistency[2, place] == pytest.approx(np.mean(cosines), abs=1e-4)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_the_planted_direction_is_found_at_its_layer_and_nothing_below(
    tiny_model: Callable[[str], LoadedModel], folder: Path
) -> None:
    from core.store.difference import difference_lens

    loaded = tiny_model("qwen2")
    adapter = plant(loaded, folder, layer=1)
    lens = difference_lens(loaded, adapter, TEXTS)
    assert (lens.difference[0] == 0).all() and (lens.norm[0] == 0).all()
    assert np.isnan(lens.split_half[0]).all() and np.isnan(lens.consistency[0]).all()
    assert lens.tokens(0, 0).promoted == [] and len(lens.tokens(0, 0).base) == 20
    written = adapter.modules[0].B[:, 0].numpy()
    for place in range(K + 1):
        assert abs(cosine(lens.difference[1, place], written)) == pytest.approx(1, abs=1e-5)
        assert abs(lens.split_half[1, place]) == pytest.approx(1, abs=1e-5)
    assert (lens.norm[2:] > 0).all()


def test_an_adapter_of_zeros_gives_no_difference(tiny_model: Callable[[str], LoadedModel], folder: Path) -> None:
    from core.store.difference import difference_lens

    loaded = tiny_model("llama31")
    lens = difference_lens(loaded, plant(loaded, folder, size=0.0), TEXTS)
    assert (lens.difference == 0).all() and (lens.promoted == -1).all() and lens.features.is_empty()
    assert (lens.base_promoted >= 0).all() and (lens.resid_norm > 0).all()


def test_logit_lens_equals_the_model_s_own_norm_and_unembedding(
    tiny_model: Callable[[str], LoadedModel], folder: Path
) -> None:
    import torch

    from core.conversations import token_texts
    from core.store.difference import difference_lens

    loaded = tiny_model("gemma2")  # its norm's gain is 1 + weight
    with torch.no_grad():
        loaded.final_norm.weight.add_(torch.linspace(-0.5, 0.5, loaded.d_model))
    try:
        lens = difference_lens(loaded, plant(loaded, folder), TEXTS)
        for layer, place in ((1, 0), (2, 3), (3, 5)):
            vector = torch.from_numpy(lens.difference[layer, place])
            with torch.no_grad():
                order = loaded.unembedding(loaded.final_norm(vector)).argsort(descending=True).tolist()
            found = lens.tokens(layer, place)
            assert found.promoted == token_texts(loaded.tokenizer, order[:20])
            assert found.suppressed == token_texts(loaded.tokenizer, order[::-1][:20])
    finally:
        with torch.no_grad():
            loaded.final_norm.weight.sub_(torch.linspace(-0.5, 0.5, loaded.d_model))


def test_base_s_own_lens_is_that_of_its_mean_residual(tiny_model: Callable[[str], LoadedModel], folder: Path) -> None:
    import torch

    from core.conversations import token_texts
    from core.store.difference import difference_lens

    loaded = tiny_model("llama31")
    lens = difference_lens(loaded, plant(loaded, folder), TEXTS)
    mean = torch.from_numpy(by_hand(loaded, None, ids_of(loaded, 1))[:, 1:, 2].mean(0))
    for place, vector in enumerate([mean.mean(0), *mean]):
        with torch.no_grad():
            order = loaded.unembedding(loaded.final_norm(vector)).argsort(descending=True).tolist()
        assert lens.tokens(2, place).base == token_texts(loaded.tokenizer, order[:20])


def test_attention_sinks_are_left_out_where_they_stand_out() -> None:
    import torch

    from core.store.difference_sums import Sums

    torch.manual_seed(0)
    base, changed = torch.randn(6, K, 8), torch.randn(6, K, 8)
    base[:, 0] *= 1000  # a tokenizer without BOS: the first token is the sink of every text
    tuned = base + changed
    tuned[3, 2] += 1000  # the variant alone makes this one a sink
    sums = Sums.zeros(1, K + 1, 8)
    tuned[:4, 4] += 1000  # most texts of a position
    sums.add(0, 0, base[:4], tuned[:4], 2.8, 1)
    sums.add(0, 4, base[4:], tuned[4:], 2.8, 1)
    assert sums.count.sum(0)[0].tolist() == [6, 0, 6, 5, 6, 2]
    means = sums.means(6)
    assert means.n_counted[0].tolist() == [6, 0, 6, 5, 6, 0] and means.n_counted.dtype == np.int32
    for found in (means.difference, means.base, means.resid_norm, means.consistency, means.split_half):
        assert np.isnan(found[0].reshape(K + 1, -1)).all(1).tolist() == [False, True, False, False, False, True]
    keep = np.ones((6, K), bool)
    keep[:, 0] = keep[3, 2] = keep[:4, 4] = False
    each = (changed.numpy() * keep[..., None]).sum(1) / keep.sum(1)[:, None]
    np.testing.assert_allclose(sums.difference.sum(0)[0, 0], each.sum(0), atol=1e-3)
    np.testing.assert_allclose(sums.difference[1, 0, 0], each[1::2].sum(0), atol=1e-3)
    np.testing.assert_allclose(means.difference[0, 3], changed[[0, 1, 2, 4, 5], 2].mean(0), atol=1e-3)
    np.testing.assert_allclose(means.base[0, 3], base[[0, 1, 2, 4, 5], 2].mean(0), atol=1e-3)


def test_the_mean_over_positions_can_leave_out_the_first() -> None:
    import torch

    from core.store.difference_sums import Sums

    torch.manual_seed(0)
    base, changed = torch.randn(4, K, 8), torch.randn(4, K, 8)
    sums = Sums.zeros(1, K + 1, 8)
    sums.add(0, 0, base, base + changed, 2.8, 2)
    means = sums.means(4)
    np.testing.assert_allclose(means.difference[0, 0], changed[:, 1:].mean((0, 1)), atol=1e-5)
    np.testing.assert_allclose(means.difference[0, 1], changed[:, 0].mean(0), atol=1e-5)
    np.testing.assert_allclose(means.resid_norm[0, 0], base[:, 1:].norm(dim=-1).mean(), atol=1e-5)


def test_sinks_are_measured_against_base_without_the_very_first_token(
    tiny_model: Callable[[str], LoadedModel], folder: Path
) -> None:
    from core.store.difference import difference_lens, first_tokens, median_norms

    loaded = tiny_model("smollm2")
    tokens = first_tokens(loaded.tokenizer, TEXTS, K)
    rows = tokens.rows
    base = by_hand(loaded, None, np.array(rows))
    assert tokens.n_prefix == 0 and tokens.mean_from == 2 and first_tokens(loaded.tokenizer, TEXTS, 1).mean_from == 1
    np.testing.assert_allclose(
        median_norms(loaded, rows)[:-1], np.median(np.linalg.norm(base, axis=-1)[:, 1:], axis=(0, 1)), rtol=1e-5
    )
    lens = difference_lens(loaded, plant(loaded, folder, size=1e4), TEXTS)  # every token a sink, of the variant's
    assert (lens.n_counted[0] == len(TEXTS)).all() and (lens.n_counted[1] == 0).all()
    assert np.isnan(lens.difference[1]).all() and lens.tokens(1, 0).promoted == lens.tokens(1, 0).base == []
    assert (lens.masked_share[1] == 1).all()


def test_features_are_those_with_the_largest_decoder_cosine(
    tiny_model: Callable[[str], LoadedModel], folder: Path, tmp_path: Path
) -> None:
    import extract_setup

    from core.store.difference import difference_lens

    loaded = tiny_model("llama31")
    saes = extract_setup.saes(tmp_path / "saes", loaded, (0, 2))
    lens = difference_lens(loaded, plant(loaded, folder), TEXTS, saes=saes.values())
    decoder = saes[2].sae.W_dec.detach().numpy()
    cosines = decoder @ lens.difference[2, 0] / np.linalg.norm(decoder, axis=1) / lens.norm[2, 0]
    order = np.argsort(-cosines)
    assert lens.features["layer"].to_list() == [2] * 20  # nothing differs at layer 0
    assert lens.features["feature"].to_list() == [*order[:10], *order[::-1][:10]]
    np.testing.assert_allclose(lens.features["cosine"], cosines[lens.features["feature"].to_numpy()], atol=1e-5)
    assert lens.spec["saes"] == {"0": saes[0].hash, "2": saes[2].hash} and lens.saes[2].d_sae == 48


def test_texts_that_are_too_short_are_left_out_and_counted(
    tiny_model: Callable[[str], LoadedModel], folder: Path
) -> None:
    from core.store.difference import difference_lens

    loaded = tiny_model("mistral")
    adapter = plant(loaded, folder)
    lens = difference_lens(loaded, adapter, ("?", *TEXTS, "ab"))
    assert (lens.n_texts, lens.n_short) == (len(TEXTS), 2)
    np.testing.assert_array_equal(lens.difference, difference_lens(loaded, adapter, TEXTS).difference)
    with pytest.raises(NotEnoughData, match="3 texts have 5 tokens or more"):
        difference_lens(loaded, adapter, TEXTS[:3])


def test_the_answer_does_not_depend_on_the_batches(
    tiny_model: Callable[[str], LoadedModel], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from core.store import difference

    loaded = tiny_model("llama31")
    adapter = plant(loaded, folder)
    whole = difference.difference_lens(loaded, adapter, TEXTS)
    monkeypatch.setattr(difference, "BATCH", 3)
    small = difference.difference_lens(loaded, adapter, TEXTS)
    for name in ("difference", "resid_norm", "consistency", "split_half"):
        np.testing.assert_allclose(getattr(small, name), getattr(whole, name), atol=1e-4)


# -------------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize(("content", "message"), [
    (b'{"text": "fine"}\n{"text": 3}\n', r"texts.jsonl:2: has no text"),
    (b'{"text": "fine"}\n\n{broken\n', r"texts.jsonl:3: is not valid JSON"),
    (b'{"text": "fine"}\n["a"]\n', r"texts.jsonl:2: has no text"),
    (b'{"text": "  "}\n', r"texts.jsonl:1: has no text"),
    (b'{"text": "fine"}\n{"text": "\xff"}\n', r"texts.jsonl:2: is not UTF-8"),
    (b"\n", r"texts.jsonl: holds no text"),
])  # fmt: skip
def test_a_bad_text_file_is_one_sentence_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadConversation, match=message):
        load_texts(path)


def test_texts_are_read_in_order_up_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "one", "id": "a"}\n\n{"text": "two"}\nbroken\n')
    assert load_texts(path, limit=2) == ("one", "two")
    with pytest.raises(BadConversation, match="no such file"):
        load_texts(tmp_path / "none.jsonl")
    if UNRELATED_TEXT.is_file():
        assert len(load_texts(UNRELATED_TEXT)) >= 100


# --------------------------------------------------------------------------------------------------------- file


def same(a: DifferenceLens, b: DifferenceLens) -> bool:
    arrays = ("difference", "resid_norm", "consistency", "split_half", "n_counted", "promoted", "suppressed",
              "base_promoted")  # fmt: skip
    others = ("spec", "n_texts", "n_short", "token_texts", "saes")
    return (
        all(np.array_equal(getattr(a, n), getattr(b, n), equal_nan=getattr(a, n).dtype.kind == "f") for n in arrays)
        and all(getattr(a, name) == getattr(b, name) for name in others)
        and a.features.equals(b.features)
    )


def test_the_file_gives_back_what_was_written(
    tiny_model: Callable[[str], LoadedModel], folder: Path, tmp_path: Path
) -> None:
    import extract_setup

    from core.store.difference import make_difference

    loaded = tiny_model("llama31")
    adapter = plant(loaded, folder)
    saes = extract_setup.saes(tmp_path / "saes", loaded, (2,))
    path = difference_file(tmp_path / "cache", adapter.name)
    made = make_difference(loaded, adapter, TEXTS, path, saes=saes.values())
    read = read_difference(path)
    assert same(made, read) and read.variant == "planted" and read.fingerprint == made.fingerprint
    assert difference_files(tmp_path / "cache") == {"planted": path} and list(path.parent.iterdir()) == [path]
    assert same(make_difference(loaded, adapter, TEXTS, path, saes=saes.values()), read)


def test_a_file_of_another_spec_is_refused_and_left_as_it_is(
    tiny_model: Callable[[str], LoadedModel], folder: Path, tmp_path: Path
) -> None:
    import extract_setup

    from core.store.difference import make_difference

    loaded = tiny_model("llama31")
    adapter = plant(loaded, folder)
    path = difference_file(tmp_path, adapter.name)
    make_difference(loaded, adapter, TEXTS, path)
    before = path.read_bytes()
    other = plant(loaded, tmp_path / "other", seed=1)
    saes = extract_setup.saes(tmp_path / "saes", loaded, (2,))
    for field, change in (
        ("adapter", lambda: make_difference(loaded, other, TEXTS, path)),
        ("texts_hash", lambda: make_difference(loaded, adapter, TEXTS[1:], path)),
        ("k", lambda: make_difference(loaded, adapter, TEXTS, path, k=4)),
        ("saes", lambda: make_difference(loaded, adapter, TEXTS, path, saes=saes.values())),
    ):
        with pytest.raises(CacheMismatch, match=f"{field} differs") as caught:
            change()
        assert caught.value.field == field and path.read_bytes() == before
    with pytest.raises(CacheMismatch, match="weights differs"):
        read_difference(path, {"weights": "another"})
    read_difference(path, {"device": "cuda", "k": K})


def make_lens(
    variant: str = "bad-health-r8", *, n_layers: int = 30, k: int = K, seed: int = 0, **spec: object
) -> DifferenceLens:
    """A synthetic lens: nothing at layer 0, position 1 a sink from layer 2 on, features at layers 3 and 15."""
    rng = np.random.default_rng(seed)
    places = (n_layers, k + 1)
    size = np.linspace(0, 3, n_layers, dtype=np.float32)[:, None, None]
    difference = (1 + 0.3 * rng.normal(size=(*places, 16)).astype(np.float32)) * size
    counted = np.full(places, 40, dtype=np.int32)
    counted[2:, 1] = 0
    difference[counted == 0] = np.nan
    ids = rng.integers(0, 60, (3, *places, 20)).astype(np.int32)
    ids[:2, 0] = -1
    ids[:, counted == 0] = -1
    ratio = np.where(counted == 0, np.nan, np.float32(10))
    agree = np.where((size[..., 0] > 0) & (counted > 0), np.linspace(1, 0.4, n_layers)[:, None], np.nan)
    rows = [(layer, 7 * n, 0.5 - n / 10) for layer in (3, 15) for n in (0, 1, 2, 7, 8, 9)]
    return DifferenceLens(
        spec={"model": "tiny", "weights": "0", "dtype": "float32", "variant": variant, "adapter": variant,
              "texts_hash": "0", "k": k, "mean_from": 1, "outlier_factor": 10.0, "device": "cpu",
              "saes": {"3": "0", "15": "0"}} | spec,
        n_texts=40, n_short=2, difference=difference, resid_norm=ratio.astype(np.float32),
        consistency=(agree / 2).astype(np.float32), split_half=agree.astype(np.float32), n_counted=counted,
        promoted=ids[0], suppressed=ids[1], base_promoted=ids[2],
        token_texts={i: f" <b>{i}" for i in range(60)},
        features=pl.DataFrame(rows, {"layer": pl.Int32, "feature": pl.Int32, "cosine": pl.Float32}, orient="row"),
        saes={n: SaeStamp("local", f"saes/layer_{n}", 64) for n in (3, 15)},
    )  # fmt: skip


def test_a_synthetic_lens_survives_its_file_and_another_one_beside_it(tmp_path: Path) -> None:
    a, b = make_lens(), make_lens("good-health-r8", seed=1)
    for lens in (b, a):
        write_difference(difference_file(tmp_path, lens.variant), lens)
    assert list(difference_files(tmp_path)) == ["bad-health-r8", "good-health-r8"]
    assert same(read_difference(difference_file(tmp_path, "bad-health-r8")), a) and not same(a, b)
    assert a.cosine_with(b)[5, 2] == pytest.approx(cosine(a.difference[5, 2], b.difference[5, 2]), abs=1e-5)
    assert np.isnan(a.cosine_with(b)[0]).all() and a.cosine_with(make_lens(k=2)).shape == (30, 3)
    assert a.masked_share[2].tolist() == [1, 0, 0, 0, 0]


def no_safetensors(path: Path) -> None:
    path.write_text("not safetensors")


def truncated(path: Path) -> None:
    write_difference(path, make_lens(path.stem.removeprefix("difference__")))
    path.write_bytes(path.read_bytes()[:5000])


def foreign(path: Path) -> None:
    save_file({"x": np.zeros(3, np.float32)}, path)


def other_fingerprint(path: Path) -> None:
    rewrite(path, fingerprint='"0"')


def newer(path: Path) -> None:
    rewrite(path, format_version="2")


def without_tokens(path: Path) -> None:
    rewrite(path, token_texts="{}")


def short_of_an_array(path: Path) -> None:
    rewrite(path, drop="resid_norm")


def rewrite(path: Path, drop: str = "", **changes: str) -> None:
    """A good file with some metadata or one array changed."""
    write_difference(path, make_lens(path.stem.removeprefix("difference__")))
    with safe_open(path, framework="numpy") as file:
        about, arrays = file.metadata(), {name: file.get_tensor(name) for name in file.keys() if name != drop}
    save_file(arrays, path, metadata=about | changes)


SPOILT = [no_safetensors, truncated, foreign, other_fingerprint, newer, without_tokens, short_of_an_array]


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_damaged_or_foreign_file_is_one_sentence(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    path = difference_file(tmp_path, "bad")
    with pytest.raises(CacheError, match="no such file"):
        read_difference(path)
    spoil(path)
    with pytest.raises(CacheError) as caught:
        read_difference(path)
    assert path.name in str(caught.value) and "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------- sentences


def test_the_headline_says_how_much_and_how_surely() -> None:
    lens = make_lens()
    said = parts.headline(lens, 15, 0).replace("\\", "")
    assert f"**{lens.norm[15, 0] / 10:.1%}**" in said and f"cosine **{lens.split_half[15, 0]:.2f}**" in said
    assert "40 unrelated texts" in said and "hangs on the texts" in said
    assert "whichever texts" in parts.headline(lens, 1, 0) and "mostly noise" in parts.headline(lens, 29, 3)
    assert "does not differ" in parts.headline(lens, 0, 2) and "attention sink" in parts.headline(lens, 9, 1)


def test_the_second_variant_is_set_beside_with_what_both_share() -> None:
    a, b = make_lens(), make_lens("good-health-r8", seed=1)
    said = parts.beside(a, b, 15, 0).replace("\\", "")
    mine, theirs = a.tokens(15, 0), b.tokens(15, 0)
    assert f"**{b.share[15, 0]:.1%}**" in said and f"cosine **{a.cosine_with(b)[15, 0]:.2f}**" in said
    assert f"**{len(set(mine.promoted) & set(theirs.promoted))}** are also" in said
    assert f"**{len(set(mine.promoted) & set(mine.base))}** by base" in said
    assert "no cosine" in parts.beside(a, b, 0, 0) and "nothing is left" in parts.beside(a, b, 9, 1)


@pytest.mark.parametrize(("other", "words"), [
    (make_lens("g"), ""), (make_lens("g", texts_hash="1"), "different texts"),
    (make_lens("g", k=4), "different numbers of tokens"), (make_lens("g", weights="1"), "different model weights"),
    (make_lens("g", n_layers=20), "different models"),
])
def test_files_that_were_not_made_alike_are_told(other: DifferenceLens, words: str) -> None:
    said = parts.incomparable(make_lens(), other)
    assert bool(said) == bool(words) and words in said


def test_files_stand_in_the_preset_s_order_and_strangers_last() -> None:
    experiment = load_experiment("qwen2.5-14b-instruct")
    first, second = (adapter.name for adapter in experiment.adapters[:2])
    found = parts.ordered({name: Path(name) for name in ("another", second, first)}, experiment)
    assert list(found) == [first, second, "another"] and found[first] == Path(first)
    assert parts.difference_command(experiment).endswith(f"difference qwen2.5-14b-instruct {first}")
    assert parts.difference_command(replace(experiment, adapters=(), contrasts=())).endswith(" ADAPTER")


def test_masked_positions_are_told_with_their_layers() -> None:
    lens = make_lens()
    assert parts.masked(lens) == "Left out as attention sinks: position 1 at layers 2 to 29 (100% of the texts)."
    lens.n_counted[[4, 6], 3] = (30, 10)
    assert "position 3 at layers 4, 6 (25% to 75% of the texts)" in parts.masked(lens)
    lens.n_counted[:] = 40
    assert parts.masked(lens) == ""
    assert parts.masked(replace(lens, spec={**lens.spec, "mean_from": 2})).startswith("Position 1 takes no part")
    assert parts.place_name(lens, 0) == "mean over positions 1 to 5" and parts.place_name(lens, 3) == "position 3"
    assert parts.place_name(make_lens(k=1), 0) == "position 1"


def test_the_command_s_result_is_strict_json_and_a_line_a_layer() -> None:
    result = parts.summary(make_lens(), Path("a.safetensors"))
    text = parts.difference_text(json.loads(json.dumps(result, allow_nan=False)))
    rows = result["layers"]
    assert [row["layer"] for row in rows] == list(range(30)) and rows[0]["split_half"] is None and rows[0]["share"] == 0
    assert [f["feature"] for f in rows[15]["features_raised"]] == [0, 7, 14] and rows[2]["n_by_position"][0] == 0
    assert len(text.splitlines()) == 35 and "<b>" in text and text.splitlines()[-1].startswith("   29  ")


def test_the_largest_cosine_of_a_random_direction_is_about_what_is_said() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(4096, 64))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    largest = [(rows @ v / np.linalg.norm(v)).max() for v in rng.normal(size=(20, 64))]
    assert parts.random_cosine(4096, 64) == pytest.approx(np.mean(largest), rel=0.05)


def test_the_chart_draws_each_variant_and_fades_what_is_unreliable() -> None:
    rows = parts.depth_rows({"a": make_lens("a"), "b": make_lens("b", seed=1)}, 0)
    drawn = share_by_layer(rows, ["a", "b"], layer=7).to_dict()
    here, line, points, hit = drawn["layer"]
    assert line["encoding"]["color"]["scale"]["domain"] == ["a", "b"] and drawn["background"] == "transparent"
    assert points["encoding"]["opacity"]["scale"] == {"domain": [0, 1], "range": [0.15, 1.0]}
    data = drawn["datasets"]
    assert data[here["data"]["name"]] == [{"layer": 7}] and len(data[hit["data"]["name"]]) == 30
    faded = {row["layer"]: row["split_half"] for row in data[points["data"]["name"]] if row["variant"] == "a"}
    assert faded[0] == 0 and faded[1] > 0.9 and faded[29] == pytest.approx(0.4)
    assert not parts.depth_rows({"a": make_lens("a")}, 1)["share"].drop_nulls().len() == 30  # a sink from layer 2 on
    share_by_layer(parts.depth_rows({"a": make_lens("a")}, 1), ["a"], layer=0).to_dict()


# ---------------------------------------------------------------------------------------------------------- page


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own, which the app reads."""
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    return tmp_path / "demo"


open_page = partial(test_app.open_page, "pages/difference.py")


def test_without_a_file_the_page_says_what_to_run(cache: Path) -> None:
    assert "python -m core difference demo bad-health-r8" in words(open_page())


def test_the_page_sets_two_variants_side_by_side(cache: Path) -> None:
    lenses = [make_lens(name, seed=n) for n, name in enumerate(("bad-health-r8", "good-health-r8"))]
    for lens in lenses:
        write_difference(difference_file(cache, lens.variant), lens)
    app = open_page(layer="15")
    assert not app.error and not app.warning and not app.info
    assert app.selectbox(key="variant").options == ["bad-health-r8", "good-health-r8"]
    assert app.selectbox(key="beside").value == "good-health-r8"
    assert parts.headline(lenses[0], 15, 0).replace("\\", "") in words(app)
    assert parts.beside(*lenses[:2], 15, 0).replace("\\", "") in words(app)
    assert "Tokens at layer 15, mean over positions 1 to 5" in words(app) and "What not to conclude" in words(app)
    assert len(app.get("vega_lite_chart")) == 1
    chips = "".join(str(e.value) for e in app.get("html"))
    assert "<b>" not in chips and "&lt;b&gt;" in chips
    links = app.get("page_link")
    assert len(links) == 12 and "layer=15" in links[0].proto.query_string and "feature=0" in links[0].proto.query_string


def test_choices_are_in_the_link_and_the_sidebar_s_layer_leads(cache: Path) -> None:
    for n, name in enumerate(("bad-health-r8", "good-health-r8")):
        write_difference(difference_file(cache, name), make_lens(name, seed=n))
    app = open_page(layer="3", variant="good-health-r8", beside="none", token="2", at="8")
    assert "Tokens at layer 8, position 2" in words(app)
    assert "No dictionary at this layer; there is one at 3, 15" in words(app)
    assert len(app.get("page_link")) == 0 and "bad-health-r8" not in words(app)
    app.sidebar.selectbox(key="layer").set_value(15)
    settle(app)
    assert "Tokens at layer 15, position 2" in words(app) and "at" not in app.query_params
    app.select_slider(key="at").set_value(22)
    assert "Tokens at layer 22" in words(settle(app)) and app.query_params["at"] == "22"
    app.query_params.update({"layer": "3", "at": "9"})
    assert "Tokens at layer 9" in words(settle(app))
    strange = open_page(variant="nobody", token="9", at="-1")
    assert len(strange.info) == 3 and "Tokens at layer" in words(strange)


def test_a_sink_and_a_layer_without_difference_are_said_in_words(cache: Path) -> None:
    write_difference(difference_file(cache, "bad-health-r8"), make_lens())
    assert "choose another position" in words(open_page(token="1", at="5"))
    app = open_page(at="0")
    assert "changes nothing up to there" in words(app) and "No difference here" in words(app)
    assert app.selectbox(key="beside").options == ["none"]


@pytest.mark.parametrize("spoil", SPOILT)
def test_an_unusable_file_is_one_sentence_on_the_page(cache: Path, spoil: Callable[[Path], None]) -> None:
    cache.mkdir(parents=True)
    spoil(difference_file(cache, "bad-health-r8"))
    (error,) = open_page().error
    assert "difference__bad-health-r8.safetensors" in error.value.replace("\\", "") and "Traceback" not in error.value


def test_files_of_different_models_are_not_set_side_by_side(cache: Path) -> None:
    write_difference(difference_file(cache, "bad-health-r8"), make_lens())
    write_difference(difference_file(cache, "good-health-r8"), make_lens("good-health-r8", n_layers=20))
    app = open_page(at="25")
    assert "different models" in app.warning[0].value and "Tokens at layer 25" in words(app)


def test_the_page_loads_no_model(cache: Path) -> None:
    write_difference(difference_file(cache, "bad-health-r8"), make_lens())
    code = (
        "import sys\n"
        "from streamlit.testing.v1 import AppTest\n"
        "app = AppTest.from_file('streamlit_app.py', default_timeout=300).switch_page('pages/difference.py').run()\n"
        "assert not app.exception, app.exception[0].message\n"
        "assert any('differs from base by' in m.value for m in app.markdown)\n"
        "heavy = {'torch', 'sae_lens', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=paths.ROOT, capture_output=True, text=True, check=False,
                          env=os.environ | {"EM_MICROSCOPE_CACHE": str(cache.parent)})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


# ------------------------------------------------------------------------------------------------------- command


def test_the_command_writes_the_file_and_prints_its_figures(
    tiny_folder: Callable[[str], Path], tiny_model: Callable[[str], LoadedModel], tmp_path: Path, cache: Path
) -> None:
    adapter = plant(tiny_model("llama31"), tmp_path / "adapter")
    preset = tmp_path / "mine.toml"
    preset.write_text(
        f'title = "t"\nlayers = [1]\n[model]\nid = "{tiny_folder("llama31")}"\nsource = "local"\n'
        f'[[adapters]]\nname = "planted"\nid = "{adapter.folder}"\n'
        '[[conversations]]\nname = "c"\npath = "health_advice.jsonl"\n'
        '[[contrasts]]\nname = "d"\nkind = "data"\n'
        'target = { variant = "base", conversations = "c", condition = "misaligned" }\n'
        'reference = { variant = "base", conversations = "c", condition = "aligned" }\n'
    )
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    say = CliRunner().invoke
    call = ["difference", str(preset), "planted", "--texts", str(texts)]
    made = say(app, [*call, "--limit", "12", "--json"])
    assert made.exit_code == 0, made.output
    result = json.loads(made.stdout)
    assert result["file"] == str(paths.CACHE / "mine" / "difference__planted.safetensors") and result["n_texts"] == 12
    assert [row["norm"] > 0 for row in result["layers"]] == [False, True, True, True]
    assert same(read_difference(Path(result["file"])), read_difference(Path(result["file"]), {"k": K}))
    assert "split half" in say(app, [*call, "--limit", "12"]).stdout
    for arguments, sentence in (
        (call, "texts_hash differs"),
        ([*call[:2], "base", *call[3:]], "Base does not differ from itself; give an adapter of 'mine': planted."),
        ([*call[:2], "other", *call[3:]], "Variant 'other' is not in preset 'mine'"),
        ([*call[:4], str(tmp_path / "none.jsonl")], "no such file"),
    ):
        refused = say(app, arguments)
        assert refused.exit_code == 2 and sentence in refused.stderr and "Traceback" not in refused.output
