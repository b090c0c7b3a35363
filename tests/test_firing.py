"""core/evaluation/firing.py against PEFT's own forward pass, one conversation at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import firing_setup as setup
import h5py
import numpy as np
import pytest
import torch
from filelock import FileLock
from test_adapters import KINDS

from core.conversations import tokenize
from core.errors import CacheError, CacheMismatch, ModelError
from core.evaluation import firing as module
from core.evaluation import firing_shard
from core.evaluation.firing import join_sets
from core.store import writer
from core.store.firing_file import Firing

KIND = "patterns"  # rsLoRA, ranks and alphas by module


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD", 6)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")


@pytest.fixture(scope="module")
def made(tiny_model: Callable, tmp_path_factory: pytest.TempPathFactory) -> setup.Made:
    return setup.build(tiny_model("llama31"), tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def finished(made: setup.Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run that keeps every token of every component."""
    path = tmp_path_factory.mktemp("whole") / "bad__made+other.h5"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SHARD", 6)
        patch.setenv("SOURCE_DATE_EPOCH", "0")
        setup.run(made, path, keep=0)
    return path


def oracle(made: setup.Made, conversation: object) -> dict[str, dict[str, np.ndarray]]:
    """By module: PEFT's own delta on each response token, and the module's output, from PEFT's own forward pass."""
    item = tokenize(made.loaded.tokenizer, conversation)
    seen: dict[str, dict[str, np.ndarray]] = {}
    own = {n: m for n, m in made.peft.base_model.model.model.layers.named_modules() if hasattr(m, "lora_A")}

    def hook(name: str, layer: torch.nn.Module) -> Callable:
        def keep(_m: object, inputs: tuple, output: torch.Tensor) -> None:
            x = inputs[0]
            delta = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
            part = slice(item.start, item.end)
            seen[name] = {"delta": delta[0, part].double().numpy(), "output": output[0, part].double().numpy()}

        return keep

    handles = [layer.register_forward_hook(hook(name, layer)) for name, layer in own.items()]
    try:
        with torch.inference_mode():
            made.peft(input_ids=torch.tensor(item.ids[None].tolist()))
    finally:
        for handle in handles:
            handle.remove()
    return seen


@pytest.mark.parametrize(("family", "kind"), [(f, k) for f in ("llama31", "gemma2", "qwen2") for k in
                                              ("all modules", KIND, "rank one, two layers")])
def test_scalars_times_vectors_are_what_peft_adds_on_every_token(
    family: str, kind: str, tiny_model: Callable, tmp_path: Path
) -> None:
    made = setup.build(tiny_model(family), tmp_path / "a", kind)
    setup.run(made, tmp_path / "x.h5", keep=0)
    rows = join_sets(setup.sets())[0].conversations
    with Firing.open(tmp_path / "x.h5") as firing:
        means, begin = firing.mean(), 0
        squares = np.zeros(len(made.parts))
        outputs: dict[str, float] = {}
        for row in range(0, len(rows)):
            wanted = oracle(made, rows[row])
            n = len(next(iter(wanted.values()))["delta"])
            scalars = np.stack([firing.scalars(i)[begin : begin + n] for i in range(len(made.parts))], axis=1)
            begin += n
            np.testing.assert_allclose(means[row], scalars.mean(0), rtol=3e-3, atol=3e-3)
            for name, found in wanted.items():
                own = [i for i, c in enumerate(made.parts) if f"{c.key.layer}.{c.key.module}" == name]
                ours = sum(made.parts[i].singular_value * np.outer(scalars[:, i], made.parts[i].write) for i in own)
                np.testing.assert_allclose(ours, found["delta"], rtol=2e-3, atol=2e-3 * np.abs(found["delta"]).max())
                outputs[name] = outputs.get(name, 0.0) + (found["output"] ** 2).sum()
            squares += (scalars.astype(np.float64) ** 2).sum(0)
        table = firing.components
        share = np.array([c.singular_value for c in made.parts]) ** 2 * squares
        np.testing.assert_allclose(table["text_share"], share / share.sum(), rtol=1e-2, atol=1e-6)
        for layer, name, relative in firing.modules.select("layer", "module", "relative").iter_rows():
            own = [i for i, c in enumerate(made.parts) if (c.key.layer, c.key.module) == (layer, name)]
            assert relative == pytest.approx(np.sqrt(share[own].sum() / outputs[f"{layer}.{name}"]), rel=1e-2)


@pytest.mark.parametrize("family", ["llama31", "gemma2", "gemma3"])
def test_what_is_written_is_what_the_residual_stream_receives(
    family: str, tiny_model: Callable, tmp_path: Path
) -> None:
    """singular value x written x write direction is the adapter's part of what is added, through Gemma's norm."""
    from core.analysis.lora_space import write_space
    from core.model.norms import block_gains, block_norms

    made = setup.build(tiny_model(family), tmp_path / "a")
    setup.run(made, tmp_path / "x.h5", keep=0)
    rows = join_sets(setup.sets())[0].conversations
    gains = {layer: block_gains(made.loaded, layer) for layer in range(4)}
    space = write_space(made.parts, gains)
    with Firing.open(tmp_path / "x.h5") as firing:
        for layer in range(4):
            np.testing.assert_allclose(firing.gains[layer].mlp, gains[layer].mlp, rtol=1e-3)
        values = np.array([c.singular_value for c in space.parts])
        for row in (0, 5, 20):
            wanted = oracle(made, rows[row])
            for name, found in wanted.items():
                layer, module_name = name.split(".", 1)
                own = space.rows(layer=int(layer), module=module_name)
                if not len(own):
                    continue
                ours = (firing.written()[row, own] * values[own]) @ space.vectors[own]
                norms = block_norms(made.loaded, int(layer))
                after = norms.after_mlp if module_name.endswith("down_proj") else norms.after_attention
                theirs = found["delta"]
                if after is not None:  # the norm is linear once its scale is that of the whole output
                    rms = np.sqrt((found["output"] ** 2).mean(-1, keepdims=True) + 1e-6)
                    gain = gains[int(layer)].after_mlp if "mlp" in module_name else gains[int(layer)].after_attention
                    theirs = theirs / rms * gain
                np.testing.assert_allclose(ours, theirs.mean(0), rtol=5e-3, atol=5e-3 * np.abs(theirs).max())


def test_a_compact_file_is_the_full_one_rounded_and_keeps_the_strongest(
    made: setup.Made, finished: Path, tmp_path: Path
) -> None:
    setup.run(made, tmp_path / "x.h5", compact=True, keep=3)
    with Firing.open(finished) as full, Firing.open(tmp_path / "x.h5") as compact:
        assert compact.fingerprint != full.fingerprint
        off = np.abs(compact.mean() - full.mean())
        assert (off <= full.mean().std(0) / 15).all() and (off > 0).any()
        strongest = np.argsort(-full.components["on_text"].to_numpy())[:3]
        assert set(np.flatnonzero(compact.components["kept"].to_numpy())) == set(strongest)
        for i in range(len(made.parts)):
            found = compact.scalars(i)
            assert (found is None) == (i not in strongest)
            if found is not None:
                np.testing.assert_allclose(found, full.scalars(i), rtol=2**-6)
        assert full.components["kept"].all() and full.components["text_share"].sum() == pytest.approx(1)


def test_sets_conditions_and_tokens_read_back(made: setup.Made, finished: Path) -> None:
    rows = join_sets(setup.sets())[0].conversations
    with Firing.open(finished) as firing:
        table = firing.conversations
        assert table["id"].to_list() == [c.id for c in rows]
        assert table["set"].to_list() == ["made"] * 18 + ["other"] * 3
        assert firing.groups == (("made", "aligned"), ("made", "misaligned"), ("other", "aligned"))
        assert firing.conversations_name == "made+other" and firing.adapter == "bad"
        values = firing.on_tokens(19, 4)
        item = tokenize(made.loaded.tokenizer, rows[19])
        assert "".join(firing.texts(19)) == made.loaded.tokenizer.decode(item.ids)
        assert np.isnan(values[: item.start]).all() and np.isfinite(values[item.start : item.end]).all()
        assert firing.mean(4)[19] == pytest.approx(values[item.start : item.end].mean(), abs=2e-3)
        top, bottom = firing.lens(next(i for i, c in enumerate(made.parts) if c.key.kind == "down_proj"))
        assert len(top) == len(bottom) == 10 and firing.lens(next(
            i for i, c in enumerate(made.parts) if c.key.kind == "q_proj")) == ([], [])
        assert firing.verify() == [] and firing.masked_share == 0
        assert firing.mean_resid_norm(2) > 0 and firing.mean_resid_norm(9) is None


def test_the_logit_lens_is_that_of_the_write_vectors(made: setup.Made, finished: Path) -> None:
    loaded = made.loaded
    with Firing.open(finished) as firing:
        for i, c in enumerate(made.parts):
            if c.writes_residual:
                logits = (torch.from_numpy(c.write).float() * loaded.final_norm.weight) @ loaded.unembedding.weight.T
                best = [loaded.tokenizer.decode([t]) for t in logits.topk(3).indices.tolist()]
                assert firing.lens(i)[0][:3] == [t.replace("\0", "\u2400") for t in best]


@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_stopped_run_resumes_and_ends_bit_identical(
    stop_after: int, made: setup.Made, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, own = tmp_path / finished.name, writer.Shards.write

    def write(self: writer.Shards, number: int, arrays: dict) -> None:
        if number == stop_after:
            raise KeyboardInterrupt
        own(self, number, arrays)

    with monkeypatch.context() as patch:
        patch.setattr(writer.Shards, "write", write)
        with pytest.raises(KeyboardInterrupt):
            setup.run(made, path, keep=0)
    assert not path.exists()
    with pytest.raises(CacheError, match="an unfinished run lies beside it"):
        Firing.open(path)
    done = setup.run(made, path, keep=0)
    assert done.resumed and path.read_bytes() == finished.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]
    again = setup.run(made, path, keep=0)
    assert again.tokens_per_second is None and not again.resumed


def test_another_spec_is_refused(made: setup.Made, finished: Path, tiny_model: Callable, tmp_path: Path) -> None:
    with pytest.raises(CacheMismatch, match="kept differs"):
        setup.run(made, finished, keep=5)
    other = setup.build(tiny_model("llama31"), tmp_path / "b", seed=1)
    with pytest.raises(CacheMismatch, match="adapter differs"):
        setup.run(other, finished, keep=0)


def test_one_writer_at_a_time(made: setup.Made, tmp_path: Path) -> None:
    with FileLock(tmp_path / "x.h5.lock"), pytest.raises(CacheError, match="another process"):
        setup.run(made, tmp_path / "x.h5")


def test_out_of_memory_halves_the_batch_and_goes_on(
    made: setup.Made, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, sizes = firing_shard.resid_post, []

    def resid_post(loaded: object, ids: torch.Tensor, mask: torch.Tensor, layers: tuple) -> dict:
        found = own(loaded, ids, mask, layers)
        if len(ids) > 2:
            raise torch.OutOfMemoryError("out of memory")
        sizes.append(len(ids))
        return found

    monkeypatch.setattr(firing_shard, "resid_post", resid_post)
    setup.run(made, tmp_path / "x.h5", keep=0, batch_tokens=2000)
    assert max(sizes) <= 2 and sum(sizes) == 21
    with Firing.open(tmp_path / "x.h5") as mine, Firing.open(finished) as whole:
        np.testing.assert_allclose(mine.mean(), whole.mean(), rtol=2e-3, atol=1e-4)
        np.testing.assert_allclose(mine.components["on_text"], whole.components["on_text"], rtol=1e-4)
    monkeypatch.setattr(firing_shard, "resid_post",
                        lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")))
    with pytest.raises(ModelError, match="does not fit"):
        setup.run(made, tmp_path / "y.h5")


def test_attention_sinks_are_left_out_and_counted(
    made: setup.Made, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = firing_shard.resid_post

    def with_sink(loaded: object, ids: torch.Tensor, mask: torch.Tensor, layers: tuple) -> dict:
        found = {layer: x.clone() for layer, x in own(loaded, ids, mask, layers).items()}
        found[1][torch.arange(len(ids)), mask.sum(1) - 4] *= 1000  # a response token of each, at layer 1 alone
        return found

    monkeypatch.setattr(firing_shard, "resid_post", with_sink)
    setup.run(made, tmp_path / "x.h5", keep=0)
    with Firing.open(tmp_path / "x.h5") as firing, Firing.open(finished) as whole:
        n = int(firing.conversations["n_response_tokens"].sum())
        assert firing.masked_share == pytest.approx(21 / (4 * n))
        at_1 = next(i for i, c in enumerate(made.parts) if c.key.layer == 1)
        assert np.isnan(firing.scalars(at_1)).sum() == 21 and not np.isnan(firing.scalars(0)).any()
        end = int(firing.conversations["n_response_tokens"][0])
        assert firing.mean(at_1)[0] == pytest.approx(np.nanmean(firing.scalars(at_1)[:end]), abs=3e-3)
        np.testing.assert_array_equal(firing.scalars(0), whole.scalars(0))
        assert firing.mean_resid_norm(1) < 100


def test_memory_does_not_grow_with_the_conversations(made: setup.Made, tmp_path: Path) -> None:
    """A shard's arrays are of the shard's size, whatever stands before it."""
    seen = []
    own = firing_shard.read_shard

    def read(*arguments: object, **options: object) -> dict:
        arrays = own(*arguments, **options)
        seen.append(sum(a.nbytes for a in arrays.values()))
        return arrays

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "read_shard", read)
        setup.run(made, tmp_path / "x.h5")
    assert len(seen) == 4 and max(seen[:3]) < 1.6 * min(seen[:3])


def test_foreign_and_damaged_files_are_refused(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    for content, says in ((b"nothing", "not a readable HDF5 file"), (finished.read_bytes()[:3000], "truncated")):
        path.write_bytes(content)
        with pytest.raises(CacheError, match=says):
            Firing.open(path)
    with h5py.File(path, "w") as file:
        file.attrs["format"] = "em-microscope-cache"
    with pytest.raises(CacheError, match="is not a firing file of EM Microscope; give one that `lora` wrote"):
        Firing.open(path)
    path.write_bytes(finished.read_bytes())
    with h5py.File(path, "r+") as file:
        file["components/square"][0, 0] += 1
    with Firing.open(path) as firing:
        assert "content hash" in firing.verify()[0]


def test_kinds_cover_both_scalings() -> None:
    assert KINDS[KIND]["use_rslora"] and "use_rslora" not in KINDS["all modules"]


def test_check_tells_sound_firing_files_from_damaged_ones(finished: Path, tmp_path: Path) -> None:
    from core.store.check import check_file

    found = check_file(finished)
    assert found["ok"] and set(found["layers"]) == {"0", "1", "2", "3"} and found["layers"]["1"]["masked_share"] == 0
    bad = tmp_path / "bad.h5"
    bad.write_bytes(finished.read_bytes())
    with h5py.File(bad, "r+") as file:
        file["components/mean"][0, 0] += 1
    assert not check_file(bad)["ok"] and "content hash" in check_file(bad)["problems"][0]
