"""Extraction against an oracle that is slow and plain: dense, one conversation at a time, straight from the model."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import extract_setup as setup
import h5py
import numpy as np
import pytest
import torch

from core.conversations import RESPONSE, tokenize
from core.errors import CacheError, CacheMismatch, ModelError
from core.model.loading import LoadedModel
from core.store import extract as module
from core.store import shard, writer
from core.store.extract import extract
from core.store.reader import Cache
from core.store.stored_file import partial_folder

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def tiny(tiny_model: Callable[[str], LoadedModel]) -> LoadedModel:
    return setup.named(tiny_model("smollm2"))


@pytest.fixture(scope="module")
def tiny_saes(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return setup.saes(tmp_path_factory.mktemp("saes"), tiny)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD", 6)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")


@pytest.fixture(scope="module")
def finished(tiny: LoadedModel, tiny_saes: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken extraction, to compare with."""
    path = tmp_path_factory.mktemp("whole") / "base__made.h5"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SHARD", 6)
        patch.setenv("SOURCE_DATE_EPOCH", "0")
        extract(tiny, tiny_saes, setup.LAYERS, setup.conversations(), path, batch_tokens=200)
    return path


def oracle(tiny: LoadedModel, sae: object, layer: int, conversation: object) -> dict[str, np.ndarray]:
    item = tokenize(tiny.tokenizer, conversation)
    with torch.inference_mode():
        out = tiny.model(input_ids=torch.tensor(item.ids[None].tolist()), output_hidden_states=True)
        x = out.hidden_states[layer + 1][0]
        acts = sae.encode(x[item.start : item.end])
        last = sae.encode(x[item.start - 1 : item.start])[0]
    return {
        "mean": acts.mean(0).numpy(), "max": acts.max(0).values.numpy(), "last": last.numpy(),
        "frac_active": (acts > 0).float().mean(0).numpy(), "resid": x[item.start : item.end].mean(0).numpy(),
        "acts": acts.numpy(),
    }  # fmt: skip


def test_every_matrix_equals_the_plain_dense_computation(finished: Path, tiny: LoadedModel, tiny_saes: dict) -> None:
    rows = setup.conversations().conversations
    with Cache.open(finished) as cache:
        for layer in setup.LAYERS:
            wanted = [oracle(tiny, tiny_saes[layer].sae, layer, c) for c in rows]
            for name in ("mean", "max", "frac_active"):
                dense = cache.response(layer, name).toarray()
                np.testing.assert_allclose(dense, [w[name] for w in wanted], rtol=2e-3, atol=1e-4, err_msg=name)
            np.testing.assert_allclose(
                cache.last_prompt(layer).toarray(), [w["last"] for w in wanted], rtol=2e-3, atol=1e-4
            )
            resid = cache.resid(layer, "response")
            np.testing.assert_allclose(resid, [w["resid"] for w in wanted], rtol=1e-4, atol=1e-4)


def test_a_compact_file_is_the_full_one_rounded_and_cut(
    finished: Path, tiny: LoadedModel, tiny_saes: dict, tmp_path: Path
) -> None:
    path = tmp_path / finished.name
    extract(tiny, tiny_saes, setup.LAYERS, setup.conversations(), path, compact=True, batch_tokens=200)
    with Cache.open(finished) as full, Cache.open(path) as compact:
        assert compact.fingerprint != full.fingerprint and compact.conversations.equals(full.conversations)
        for layer in setup.LAYERS:
            a, b = full.response(layer).toarray(), compact.response(layer).toarray()
            np.testing.assert_allclose(b, a, rtol=2**-8, atol=0)
            assert (a != b).any()
            with pytest.raises(CacheError, match="is a compact file without 'max'"):
                compact.response(layer, "max")
            for position in ("response", "last_prompt"):
                a, b = full.resid(layer, position), compact.resid(layer, position)
                np.testing.assert_allclose(b, a, rtol=2**-12, atol=0)
                assert (a != b).any()
            np.testing.assert_array_equal(full.last_prompt(layer).toarray(), compact.last_prompt(layer).toarray())
            for feature in range(48):
                few, many = compact.contexts(layer, feature), full.contexts(layer, feature)
                kept = [c for name in ("aligned", "misaligned") for c in [m for m in many if m.condition == name][:3]]
                assert [(c.row, c.peak, c.value) for c in few] == [(c.row, c.peak, c.value) for c in kept]


def test_contexts_hold_the_strongest_windows(finished: Path, tiny: LoadedModel, tiny_saes: dict) -> None:
    rows = setup.conversations().conversations
    layer = setup.LAYERS[0]
    wanted = [oracle(tiny, tiny_saes[layer].sae, layer, c)["acts"] for c in rows]
    with Cache.open(finished) as cache:
        checked = 0
        for feature in range(48):
            found = cache.contexts(layer, feature)
            for condition in ("aligned", "misaligned"):
                tops = sorted(
                    (w[:, feature].max() for w, c in zip(wanted, rows, strict=True) if c.condition == condition),
                    reverse=True,
                )
                mine = [c for c in found if c.condition == condition]
                assert len(mine) == min(5, sum(t > 0 for t in tops))
                np.testing.assert_allclose([c.value for c in mine], tops[: len(mine)], rtol=2e-3, atol=1e-4)
            for context in found:
                item = tokenize(tiny.tokenizer, rows[context.row])
                acts = np.zeros(len(item))
                acts[item.start : item.end] = wanted[context.row][:, feature]
                peak = item.start + int(wanted[context.row][:, feature].argmax())
                begin = peak - context.peak
                part = slice(begin, begin + len(context.tokens))
                np.testing.assert_allclose(context.acts, acts[part], rtol=2e-3, atol=1e-4)
                assert context.acts[context.peak] == pytest.approx(context.value, rel=2e-3)
                texts = [tiny.tokenizer.decode([i]) for i in item.ids[part].tolist()]
                assert list(context.tokens) == texts
                assert list(context.in_response) == (item.roles[part] == RESPONSE).tolist()
                checked += 1
        assert checked > 100


def test_fires_on_names_the_commonest_peaks_with_the_token_before(finished: Path) -> None:
    with Cache.open(finished) as cache:
        info = cache.feature_info(1)
        for feature in (0, 5, 20, 47):
            found = [c for c in cache.contexts(1, feature)]
            pairs = ["".join(c.tokens[c.peak - 1 : c.peak + 1]).strip() for c in found]
            named = info["fires_on"][feature].to_list()
            assert len(named) == min(3, len(set(pairs))) and len(set(named)) == len(named)
            counts = sorted((pairs.count(p) for p in set(pairs)), reverse=True)
            assert [pairs.count(n) for n in named] == counts[: len(named)]


def test_feature_info_and_health(finished: Path, tiny: LoadedModel, tiny_saes: dict) -> None:
    rows = setup.conversations().conversations
    layer = setup.LAYERS[1]
    sae = tiny_saes[layer].sae
    acts = np.concatenate([oracle(tiny, sae, layer, c)["acts"] for c in rows])
    ids = np.concatenate([(t := tokenize(tiny.tokenizer, c)).ids[t.start : t.end] for c in rows])
    letters = np.array([any(ch.isalpha() for ch in tiny.tokenizer.decode([int(i)])) for i in ids])
    with Cache.open(finished) as cache:
        info, head = cache.feature_info(layer), cache.info(layer)
    mass = acts.sum(0)
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(info["content_share"], acts[letters].sum(0) / mass, rtol=1e-4)
    np.testing.assert_array_equal(info["n_active_tokens"], (acts > 0).sum(0))
    np.testing.assert_allclose(info["max_act"], acts.max(0), rtol=1e-4)
    assert head.health["l0"] == pytest.approx((acts > 0).sum(1).mean(), rel=1e-6)
    assert head.health["n_tokens"] == len(acts)
    assert 0 < head.health["fvu"] and head.health["masked_share"] == 0
    norm = tiny.final_norm.weight
    with torch.inference_mode():
        logits = (sae.W_dec * norm) @ tiny.unembedding.weight.T
    for feature in (0, 17, 47):
        best = [tiny.tokenizer.decode([i]) for i in logits[feature].topk(10).indices.tolist()]
        worst = [tiny.tokenizer.decode([i]) for i in logits[feature].topk(10, largest=False).indices.tolist()]
        assert info["top_tokens"][feature].to_list() == [t.replace("\0", "\u2400") for t in best]
        assert info["bottom_tokens"][feature].to_list() == [t.replace("\0", "\u2400") for t in worst]


def test_messages_read_back_as_written(finished: Path) -> None:
    with Cache.open(finished) as cache:
        assert cache.conversations["id"].to_list() == [c.id for c in setup.conversations().conversations]
        for row, conversation in enumerate(setup.conversations().conversations[:6]):
            turns = cache.messages(row)
            assert turns[-2:] == (("user", conversation.prompt[-1].content), ("response", conversation.response))


@pytest.mark.parametrize("stop_after", [1, 3, 6])
def test_a_stopped_run_resumes_and_ends_bit_identical(
    stop_after: int, finished: Path, tiny: LoadedModel, tiny_saes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / finished.name
    own = writer.Shards.write

    def write(self: writer.Shards, number: int, arrays: dict) -> None:
        if number == stop_after:
            raise KeyboardInterrupt
        own(self, number, arrays)

    with monkeypatch.context() as patch:
        patch.setattr(writer.Shards, "write", write)
        with pytest.raises(KeyboardInterrupt):
            extract(tiny, tiny_saes, setup.LAYERS, setup.conversations(), path, batch_tokens=200)
    assert not path.exists() and partial_folder(path).is_dir()
    with pytest.raises(CacheError, match="unfinished"):
        Cache.open(path)
    done = extract(tiny, tiny_saes, setup.LAYERS, setup.conversations(), path, batch_tokens=200)
    assert done.resumed
    assert path.read_bytes() == finished.read_bytes()
    assert not partial_folder(path).exists()


CHILD = """
import sys; sys.path.insert(0, {tests!r})
import extract_setup as setup, torch
from core.model.loading import load_model
from core.specs import ModelSpec
from core.store import extract as module
from pathlib import Path
torch.set_num_threads(1)
module.SHARD = 6
tiny = setup.named(load_model(ModelSpec({model!r}, "local"), device="cpu", dtype="float32"))
saes = setup.saes(Path({saes!r}), tiny)
module.extract(tiny, saes, setup.LAYERS, setup.conversations(), Path({path!r}), batch_tokens=200,
               on_progress=lambda p: print(p.conversations, flush=True))
"""


def test_kill_9_at_any_moment_then_resume(finished: Path, tiny: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "cache" / finished.name
    code = CHILD.format(tests=str(TESTS), model=tiny.folder, saes=str(tmp_path / "saes"), path=str(path))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=TESTS.parent)
    for line in child.stdout:
        if int(line) >= 12:
            time.sleep(0.005)
            child.send_signal(signal.SIGKILL)
            break
    child.wait()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=TESTS.parent)
    assert done.returncode == 0, done.stderr
    with Cache.open(path) as mine, Cache.open(finished) as whole:
        assert mine._file.attrs["content_hash"] == whole._file.attrs["content_hash"]
        assert mine.fingerprint == whole.fingerprint
    left = {p.name for p in path.parent.iterdir()}
    assert left <= {path.name}, "neither lock nor shards stay"


def test_a_finished_file_is_left_alone(finished: Path, tiny: LoadedModel, tiny_saes: dict) -> None:
    before = finished.stat().st_mtime_ns
    done = extract(tiny, tiny_saes, setup.LAYERS, setup.conversations(), finished, batch_tokens=200)
    assert done.tokens_per_second is None and done.n_conversations == 40 and not done.resumed
    assert finished.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("conversations_hash", {"conversations": setup.conversations(19)}),
        ("layers", {"layers": (1,)}),
        ("weights", {"weights_hash": "f" * 64}),
    ],
)
def test_another_spec_is_refused_by_name(
    field: str, change: dict, finished: Path, tiny: LoadedModel, tiny_saes: dict, tmp_path: Path
) -> None:
    if "weights_hash" in change:
        tiny = dataclasses.replace(tiny, **change)
    layers = change.get("layers", setup.LAYERS)
    rows = change.get("conversations", setup.conversations())
    with pytest.raises(CacheMismatch) as error:
        extract(tiny, tiny_saes, layers, rows, finished, batch_tokens=200)
    assert error.value.field == field and field in str(error.value)
    path = tmp_path / "x.h5"  # and an unfinished run of another spec
    writer.Shards(path, {"conversations_hash": "other"})
    with pytest.raises(CacheMismatch):
        extract(tiny, tiny_saes, layers, rows, path, batch_tokens=200)


def test_one_writer_at_a_time(tiny: LoadedModel, tiny_saes: dict, tmp_path: Path) -> None:
    from filelock import FileLock

    path = tmp_path / "x.h5"
    with FileLock(tmp_path / "x.h5.lock"), pytest.raises(CacheError, match="another process"):
        extract(tiny, tiny_saes, setup.LAYERS, setup.conversations(2), path, batch_tokens=200)


def test_out_of_memory_halves_the_batch_and_goes_on(
    finished: Path, tiny: LoadedModel, tiny_saes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, sizes = shard.resid_post, []

    def resid_post(loaded: LoadedModel, ids: torch.Tensor, mask: torch.Tensor, layers: tuple) -> dict:
        if len(ids) > 2:
            raise torch.OutOfMemoryError("out of memory")
        sizes.append(len(ids))
        return own(loaded, ids, mask, layers)

    monkeypatch.setattr(shard, "resid_post", resid_post)
    path = tmp_path / finished.name
    extract(tiny, tiny_saes, setup.LAYERS, setup.conversations(), path, batch_tokens=2000)
    assert max(sizes) <= 2 and sum(sizes) == 40
    with Cache.open(path) as mine, Cache.open(finished) as whole:
        np.testing.assert_allclose(mine.response(1).toarray(), whole.response(1).toarray(), rtol=2e-3, atol=1e-4)
    monkeypatch.setattr(shard, "resid_post", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")))
    with pytest.raises(ModelError, match="does not fit"):
        extract(tiny, tiny_saes, setup.LAYERS, setup.conversations(), tmp_path / "y.h5", batch_tokens=2000)


def test_other_runtime_errors_are_not_swallowed(
    tiny: LoadedModel, tiny_saes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> dict:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(shard, "resid_post", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        extract(tiny, tiny_saes, setup.LAYERS, setup.conversations(2), tmp_path / "x.h5", batch_tokens=200)


def test_a_full_disk_is_one_sentence_and_loses_nothing(
    finished: Path, tiny: LoadedModel, tiny_saes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / finished.name
    own, calls = writer.np.savez, []

    def savez(file: object, **arrays: np.ndarray) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        own(file, **arrays)

    with monkeypatch.context() as patch:
        patch.setattr(writer.np, "savez", savez)
        with pytest.raises(CacheError, match="disk is full"):
            extract(tiny, tiny_saes, setup.LAYERS, setup.conversations(), path, batch_tokens=200)
    done = extract(tiny, tiny_saes, setup.LAYERS, setup.conversations(), path, batch_tokens=200)
    assert done.resumed and path.read_bytes() == finished.read_bytes()


def test_without_saes_residuals_are_cached_alone(tiny: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    extract(tiny, {}, (0, 3), setup.conversations(4), path, batch_tokens=200)
    with Cache.open(path) as cache:
        assert cache.layers == (0, 3) and cache.info(3).d_sae == 0
        assert cache.resid(3, "response").shape == (8, 32)
        assert cache.verify() == []
        with pytest.raises(CacheError, match="without an SAE"):
            cache.response(3)


@pytest.mark.parametrize("family", ["qwen2", "llama31", "gemma2", "gemma3", "mistral"])
def test_every_architecture_extracts(
    family: str, tiny_model: Callable[[str], LoadedModel], tmp_path: Path
) -> None:
    loaded = setup.named(tiny_model(family))
    found = setup.saes(tmp_path / "saes", loaded)
    path = tmp_path / "x.h5"
    extract(loaded, found, setup.LAYERS, setup.conversations(4), path, batch_tokens=200)
    rows = setup.conversations(4).conversations
    with Cache.open(path) as cache:
        wanted = [oracle(loaded, found[2].sae, 2, c)["mean"] for c in rows]
        np.testing.assert_allclose(cache.response(2).toarray(), wanted, rtol=5e-3, atol=1e-3)


def test_attention_sinks_are_masked_and_counted(
    tiny: LoadedModel, tiny_saes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = shard.resid_post

    def with_sink(loaded: LoadedModel, ids: torch.Tensor, mask: torch.Tensor, layers: tuple) -> dict:
        found = {layer: x.clone() for layer, x in own(loaded, ids, mask, layers).items()}
        last = mask.sum(1) - 3  # a response token of every conversation, at one layer only
        found[1][torch.arange(len(ids)), last] *= 1000
        return found

    monkeypatch.setattr(shard, "resid_post", with_sink)
    path = tmp_path / "x.h5"
    extract(tiny, tiny_saes, setup.LAYERS, setup.conversations(4), path, batch_tokens=400)
    with Cache.open(path) as cache:
        n = int(cache.conversations["n_response_tokens"].sum())
        assert cache.info(1).health["masked_share"] == pytest.approx(8 / n)
        assert cache.info(1).health["n_tokens"] == n - 8
        assert cache.info(2).health["masked_share"] == 0
        assert cache.resid(1, "response").max() < 100


def test_two_layers_of_the_format_are_what_the_readme_says(finished: Path) -> None:
    with h5py.File(finished) as file:
        assert file.attrs["format"] == "em-microscope-cache" and file.attrs["complete"]
        assert file["layers/1/response/mean"].dtype == np.float16
        assert file["layers/1/response/indices"].dtype == np.uint16
        assert file["layers/1/resid_response"].dtype == np.float32
