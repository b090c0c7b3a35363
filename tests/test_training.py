"""SAE training on a tiny model: the stream holds the model's own residuals, resumes exactly, and training learns."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import extract_setup as setup
import numpy as np
import pytest
import torch
from tiny_saes import save_sae

from core.conversations import RESPONSE, USER, tokenize
from core.errors import CacheMismatch
from core.model.loading import LoadedModel
from core.model.saes import encode_sparse, load_sae
from core.specs import SaeSpec
from core.training import stream as module
from core.training.sae import SaeTraining, batches, measure, reconstruction_health, splice_losses, train
from core.training.stream import SPLITS, StreamSpec, collect, is_heldout, prompt_key


@pytest.fixture(scope="module")
def tiny(tiny_model: Callable[[str], LoadedModel]) -> LoadedModel:
    return setup.named(tiny_model("smollm2"))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "made.jsonl"
    rows = [
        {"id": c.id, "messages": [{"role": m.role, "content": m.content} for m in c.messages]}
        for c in setup.conversations(60).conversations
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def spec(file: Path) -> StreamSpec:
    return StreamSpec((str(file),), (), (1, 2), 10**6, heldout_share=0.2, batch_tokens=300)


def test_the_stream_is_the_models_own_residuals(tiny: LoadedModel, file: Path, tmp_path: Path) -> None:
    stream = collect(tiny, spec(file), tmp_path)
    wanted: dict[str, list] = {name: [] for name in SPLITS}
    seen: set[str] = set()
    prompts: dict[str, set] = {name: set() for name in SPLITS}
    for conversation in module._choose(spec(file)):
        item = tokenize(tiny.tokenizer, conversation)
        split = SPLITS[is_heldout(prompt_key(conversation), 0.2)]
        keep = item.roles == RESPONSE
        if prompt_key(conversation) not in seen:
            keep |= item.roles == USER
        seen.add(prompt_key(conversation))
        prompts[split].add(prompt_key(conversation))
        keep[item.last_prompt] = True
        with torch.inference_mode():
            out = tiny.model(input_ids=torch.tensor([item.ids.tolist()]), output_hidden_states=True)
        wanted[split].append(out.hidden_states[2][0].numpy()[keep])
    assert not prompts["train"] & prompts["heldout"] and prompts["heldout"]
    for split in SPLITS:
        mine, own = stream.residuals(split, 1), np.concatenate(wanted[split])
        assert mine.shape == own.shape
        order = [np.lexsort(np.asarray(x, dtype=np.float32)[:, :3].round(1).T) for x in (mine, own)]
        np.testing.assert_allclose(mine[order[0]].astype(float).sum(), own[order[1]].astype(float).sum(), rtol=1e-2)
        np.testing.assert_allclose(np.sort(mine.astype(float).ravel()), np.sort(own.ravel()), atol=0.02)


def test_a_killed_collection_resumes_to_the_same_bytes(
    tiny: LoadedModel, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 32)
    whole = collect(tiny, spec(file), tmp_path / "whole")
    own, calls = module._append, []

    def stops(*arguments: object) -> None:
        own(*arguments)  # the residuals are written, the state is not
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_append", stops)
        with pytest.raises(KeyboardInterrupt):
            collect(tiny, spec(file), tmp_path / "broken")
    resumed = collect(tiny, spec(file), tmp_path / "broken")
    assert resumed.n_tokens == whole.n_tokens and len(calls) == 2
    for split in SPLITS:
        np.testing.assert_array_equal(resumed.residuals(split, 2), whole.residuals(split, 2))
    with pytest.raises(CacheMismatch):
        collect(tiny, replace(spec(file), seed=1), tmp_path / "broken")


def test_training_learns_and_health_is_measured(tiny: LoadedModel, file: Path, tmp_path: Path) -> None:
    stream = collect(tiny, spec(file), tmp_path / "stream")
    settings = SaeTraining(d_sae=64, k=8, epochs=60, batch=128, lr=3e-3, dead_window=50, read_l0=9)
    folder = train(stream, 1, "tiny", settings, tmp_path / "saes")
    sae = load_sae(SaeSpec(1, "local", str(folder)), d_model=32, model_names=["tiny"])
    health = reconstruction_health(sae, stream)
    untrained = load_sae(
        SaeSpec(1, "local", str(save_sae(tmp_path / "random", d_sae=64))), d_model=32, model_names=["tiny"]
    )
    assert health["fvu"] < 0.35 < reconstruction_health(untrained, stream)["fvu"]
    trained_on = torch.from_numpy(np.asarray(stream.residuals("train", 1), dtype=np.float32))
    assert len(encode_sparse(sae.sae, trained_on).value) / len(trained_on) == pytest.approx(9, rel=0.02)
    assert 6 < health["l0"] < 12
    x = torch.from_numpy(np.asarray(stream.residuals("heldout", 1), dtype=np.float32))
    with torch.inference_mode():
        own = ((x - sae.sae(x)) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert health["fvu"] == pytest.approx(float(own), rel=1e-4)
    assert health["l0"] == pytest.approx(len(encode_sparse(sae.sae, x).value) / len(x))

    items = [tokenize(tiny.tokenizer, c) for c in setup.conversations(6).conversations]
    (whole,) = measure(tiny, [sae], stream, items)
    assert whole.ce > 0 and whole.n_ce_tokens == sum(i.end - i.start for i in items)
    recovered = (whole.ce_zero - whole.ce_spliced) / (whole.ce_zero - whole.ce)
    assert whole.ce_recovered == pytest.approx(recovered)


def test_splicing_the_residual_itself_changes_nothing(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from core.training import sae as training

    monkeypatch.setattr(training, "reconstruct", lambda _sae, x: x)
    sae = setup.saes(tmp_path, tiny, (2,))[2]
    items = [tokenize(tiny.tokenizer, c) for c in setup.conversations(5).conversations]
    clean, spliced, zero, n = splice_losses(tiny, [sae], items, batch_tokens=100)
    assert spliced[2] == pytest.approx(clean, rel=1e-6) and abs(zero[2] - clean) > 1e-3
    own = 0.0
    for item in items:
        ids = torch.tensor([item.ids.tolist()])
        with torch.inference_mode():
            logp = tiny.model(ids).logits[0].log_softmax(-1)
        own -= float(logp[torch.arange(item.start - 1, item.end - 1), ids[0, item.start : item.end]].sum())
    assert clean == pytest.approx(own / n, rel=1e-4)


def test_what_is_spliced_in_is_the_reconstruction(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from core.training import sae as training

    sae = setup.saes(tmp_path, tiny, (2,))[2]
    items = [tokenize(tiny.tokenizer, c) for c in setup.conversations(5).conversations]
    own = splice_losses(tiny, [sae], items, batch_tokens=100)[1][2]
    monkeypatch.setattr(training, "reconstruct", lambda _sae, x: torch.zeros_like(x))
    clean, spliced, zero, _ = splice_losses(tiny, [sae], items, batch_tokens=100)
    assert spliced[2] == pytest.approx(zero[2]) and spliced[2] != pytest.approx(clean) and own != pytest.approx(clean)


def test_batches_cover_an_epoch_once_in_a_seeded_order() -> None:
    rows = np.arange(40, dtype=np.float16)[:, None]
    first = [next_batch[:, 0].tolist() for next_batch, _ in zip(batches(rows, 10, 0), range(4), strict=False)]
    assert sorted(sum(first, [])) == list(range(40))
    assert first == [b[:, 0].tolist() for b, _ in zip(batches(rows, 10, 0), range(4), strict=False)]
    assert first != [b[:, 0].tolist() for b, _ in zip(batches(rows, 10, 1), range(4), strict=False)]


def test_held_out_share_is_about_what_was_asked() -> None:
    share = np.mean([is_heldout(f"prompt {i}", 0.05) for i in range(20_000)])
    assert 0.045 < share < 0.055
