"""core/model/hooks.py: what is recorded is the model's own resid_post; the pass stops; no hook is left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny_models import FAMILIES, LAYERS
from torch import Tensor, nn

from core.conversations import load_conversations, tokenize
from core.errors import ModelError
from core.model.batches import pad, pad_id
from core.model.hooks import parity, recording, replacing, resid_post
from core.model.loading import LoadedModel
from core.paths import DATA

every_family = pytest.mark.parametrize("family", FAMILIES)
Tiny = Callable[[str], LoadedModel]


def batch(loaded: LoadedModel, lengths: tuple[int, ...] = (17, 9, 4)) -> tuple[Tensor, Tensor]:
    """Random ids, longer than the tiny models' attention window of 6, right-padded."""
    generator = torch.Generator().manual_seed(0)
    size = loaded.model.config.vocab_size
    rows = [torch.randint(size, (n,), generator=generator).numpy() for n in lengths]
    return pad(rows, pad_id(loaded.tokenizer), loaded.device)


@contextmanager
def counting(blocks: nn.ModuleList) -> Iterator[list[int]]:
    """Yields the indices of the blocks that are entered, in order."""
    calls: list[int] = []
    handles = [block.register_forward_pre_hook(lambda *_, n=n: calls.append(n)) for n, block in enumerate(blocks)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def hooks(loaded: LoadedModel) -> set[int]:
    """Ids of all hooks on the blocks; transformers keeps one of its own there once hidden states were asked for."""
    return {id(f) for b in loaded.blocks for f in (*b._forward_hooks.values(), *b._forward_pre_hooks.values())}


@every_family
def test_hooked_residuals_equal_the_models_own_at_every_layer(family: str, tiny_model: Tiny) -> None:
    loaded = tiny_model(family)
    found = parity(loaded, *batch(loaded))
    assert list(found) == list(range(LAYERS))
    assert max(found.values()) < 1e-5


@every_family
def test_the_last_layer_is_taken_before_the_final_norm(family: str, tiny_model: Tiny) -> None:
    loaded = tiny_model(family)
    ids, mask = batch(loaded)
    last = resid_post(loaded, ids, mask, [LAYERS - 1])[LAYERS - 1]
    own = loaded.decoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
    keep = mask.bool()
    assert not torch.allclose(last[keep], own[keep], atol=1e-2), "the trap: hidden_states[-1] is not resid_post"
    assert torch.allclose(loaded.final_norm(last)[keep], own[keep], atol=1e-5)


def test_parity_notices_a_wrong_layer(tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_model("llama31")
    shifted = nn.ModuleList([loaded.blocks[0], *loaded.blocks[:-1]])
    wrong = LoadedModel(loaded.spec, loaded.model, loaded.tokenizer, shifted, loaded.folder, loaded.weights_hash)
    monkeypatch.setattr(LoadedModel, "decoder", property(lambda self: self.model.model))
    first, *others = parity(wrong, *batch(loaded)).values()
    assert first < 1e-5 and min(others) > 1e-2


@every_family
def test_the_logits_follow_from_the_last_residual(family: str, tiny_model: Tiny) -> None:
    """A second opinion by another way: norm and unembedding of the hooked residual give the model's logits."""
    loaded = tiny_model(family)
    ids, mask = batch(loaded, (12,))
    last = resid_post(loaded, ids, mask, [LAYERS - 1])[LAYERS - 1]
    logits = loaded.unembedding(loaded.final_norm(last))
    cap = getattr(loaded.model.config, "final_logit_softcapping", None)
    if cap:
        logits = torch.tanh(logits / cap) * cap
    assert torch.allclose(logits, loaded.model(input_ids=ids, attention_mask=mask).logits, atol=1e-4)


@every_family
def test_padding_does_not_change_a_row(family: str, tiny_model: Tiny) -> None:
    loaded = tiny_model(family)
    ids, mask = batch(loaded)
    together = resid_post(loaded, ids, mask, [1, 3])
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = resid_post(loaded, ids[row : row + 1, :length], mask[row : row + 1, :length], [1, 3])
        for layer in (1, 3):
            assert torch.allclose(together[layer][row, :length], alone[layer][0], atol=1e-5)


def test_the_tiny_gemma_2_is_sensitive_to_its_window_and_soft_capping(tiny_model: Tiny) -> None:
    """Otherwise parity on it would prove nothing about either."""
    loaded = tiny_model("gemma2")
    ids, mask = batch(loaded, (20,))
    before = resid_post(loaded, ids, mask, [LAYERS - 1])[LAYERS - 1]
    attention = loaded.blocks[0].self_attn
    cap, window = attention.attn_logit_softcapping, ids.clone()
    try:
        attention.attn_logit_softcapping = None
        uncapped = resid_post(loaded, ids, mask, [LAYERS - 1])[LAYERS - 1]
    finally:
        attention.attn_logit_softcapping = cap
    assert not torch.allclose(before, uncapped, atol=1e-3)
    window[0, 0] = (ids[0, 0] + 1) % loaded.model.config.vocab_size
    first = [resid_post(loaded, x, mask, [0])[0][0, 6:] for x in (ids, window)]
    assert torch.allclose(*first, atol=1e-6), "layer 0 slides: position 6 and later cannot see position 0"


@pytest.mark.parametrize("layers", [[0], [2], [0, 2], [2, 0], [3]])
def test_the_pass_stops_after_the_deepest_layer(layers: list[int], tiny_model: Tiny) -> None:
    loaded = tiny_model("qwen2")
    with counting(loaded.blocks) as calls:
        found = resid_post(loaded, *batch(loaded), layers)
    assert calls == list(range(max(layers) + 1))
    assert sorted(found) == sorted(layers)


def test_without_stop_the_whole_model_runs(tiny_model: Tiny) -> None:
    loaded = tiny_model("qwen2")
    ids, mask = batch(loaded)
    with counting(loaded.blocks) as calls, recording(loaded.blocks, [1], stop=False) as found:
        logits = loaded.model(input_ids=ids, attention_mask=mask).logits
    assert calls == list(range(LAYERS)) and list(found) == [1] and logits.shape[:2] == ids.shape


def test_no_gradient_is_kept(tiny_model: Tiny) -> None:
    loaded = tiny_model("qwen2")
    assert not resid_post(loaded, *batch(loaded), [1])[1].requires_grad


def test_hooks_leave_also_after_an_exception(tiny_model: Tiny) -> None:
    loaded = tiny_model("mistral")
    ids, mask = batch(loaded)
    before = hooks(loaded)
    resid_post(loaded, ids, mask, [0, 2])
    assert hooks(loaded) == before
    with pytest.raises(RuntimeError, match="planted"), recording(loaded.blocks, [0, 1]):
        assert len(hooks(loaded) - before) == 2
        raise RuntimeError("planted")
    assert hooks(loaded) == before
    with pytest.raises(IndexError):
        resid_post(loaded, ids + loaded.model.config.vocab_size, mask, [1])
    assert hooks(loaded) == before
    with pytest.raises(RuntimeError, match="planted"), replacing(loaded.blocks[0], lambda resid: resid):
        raise RuntimeError("planted")
    assert hooks(loaded) == before


@pytest.mark.parametrize("layer", [-1, LAYERS, 99])
def test_a_layer_that_does_not_exist_is_refused(layer: int, tiny_model: Tiny) -> None:
    loaded = tiny_model("llama31")
    before = hooks(loaded)
    with pytest.raises(ModelError, match=f"Layer {layer} does not exist; this model has layers 0 to {LAYERS - 1}"):
        resid_post(loaded, *batch(loaded), [1, layer])
    assert hooks(loaded) == before


@every_family
def test_replacing_changes_its_layer_and_those_above_only(family: str, tiny_model: Tiny) -> None:
    loaded = tiny_model(family)
    ids, mask = batch(loaded, (9,))
    layers = range(LAYERS)
    before = resid_post(loaded, ids, mask, layers)
    with replacing(loaded.blocks[1], lambda resid: resid):
        same = resid_post(loaded, ids, mask, layers)
    with replacing(loaded.blocks[1], lambda resid: resid + 1):
        after = resid_post(loaded, ids, mask, layers)
    assert all(torch.equal(before[n], same[n]) for n in layers)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1] + 1, after[1])
    assert not torch.allclose(before[2], after[2], atol=1e-3)


def test_parity_on_the_real_model(demo_model: LoadedModel) -> None:
    talk = load_conversations(DATA / "health_advice.jsonl", limit=2).conversations
    rows = [tokenize(demo_model.tokenizer, c).ids[:length] for c, length in zip(talk, (64, 40), strict=True)]
    found = parity(demo_model, *pad(rows, pad_id(demo_model.tokenizer), demo_model.device))
    assert len(found) == demo_model.n_layers == 30
    assert max(found.values()) < 1e-2, "residual norms reach thousands here, so this is a relative 1e-5"
