"""Delta-attribution against autograd without hooks, finite differences and a plain loop; its file; its column."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import extract_setup as setup
import numpy as np
import pytest
import torch
from make_cache import make_cache
from test_main import PRESET, call
from tiny_models import FAMILIES
from tiny_saes import save_sae

from core import paths
from core.analysis import compare, feature_table
from core.analysis.compare import Sides
from core.analysis.ranking import RankingSettings, contrast_summary
from core.conversations import Conversation, ConversationSet, tokenize
from core.errors import CacheError, CacheMismatch, NotEnoughData, PresetError
from core.evaluation import attribution as driver
from core.evaluation.attribution import attribute
from core.model.adapters import applied, load_adapter
from core.model.batches import pad, pad_id
from core.model.hooks import replacing
from core.model.loading import LoadedModel, find_blocks
from core.paths import ROOT
from core.specs import AdapterSpec, ContrastSpec, Side
from core.store import attribution as arithmetic
from core.store import attribution_file as store
from core.store.attribution import residual_gradients, token_attribution, unit_decoder
from core.store.extract import extract
from core.store.reader import Cache

CONTRAST = ContrastSpec("data", "data", Side("base", "made", "misaligned"), Side("base", "made", "aligned"))
LAYERS = setup.LAYERS
QUICK = RankingSettings(n_permutations=0, replication_k=0)


@pytest.fixture(scope="module")
def tiny(tiny_model: Callable[[str], LoadedModel]) -> LoadedModel:
    return setup.named(tiny_model("smollm2"))


@pytest.fixture(scope="module")
def saes(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return setup.saes(tmp_path_factory.mktemp("saes"), tiny)


def read(tiny: LoadedModel, saes: dict, rows: ConversationSet, folder: Path) -> Cache:
    path = folder / "base__made.h5"
    extract(tiny, saes, LAYERS, rows, path, batch_tokens=500)
    return Cache.open(path)


@pytest.fixture(scope="module")
def cache(tiny: LoadedModel, saes: dict, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return read(tiny, saes, setup.conversations(8), tmp_path_factory.mktemp("cache"))


def made(tiny: LoadedModel, saes: dict, cache: Cache, path: Path, contrast: ContrastSpec = CONTRAST, **more: object):
    """The arrays of a fresh file, layer -> LayerAttribution."""
    attribute(tiny, None, saes, contrast, cache, path, **more)
    return store.read_layers(path)


# ------------------------------------------------------------------------------------------------- the arithmetic


def double(loaded: LoadedModel) -> LoadedModel:
    """A copy in float64, so that finite differences are exact to many digits."""
    model = copy.deepcopy(loaded.model).double()
    return replace(loaded, model=model, blocks=find_blocks(model))


def batch(loaded: LoadedModel, lengths: tuple[int, ...] = (14, 10)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random ids, their mask, and the last six tokens of each row as the response."""
    rng = np.random.default_rng(0)
    ids, mask = pad([rng.integers(5, 300, n) for n in lengths], pad_id(loaded.tokenizer), loaded.device)
    answer = torch.zeros_like(mask, dtype=torch.bool)
    for row, n in enumerate(lengths):
        answer[row, n - 6 : n] = True
    return ids, mask, answer


def log_loss(loaded: LoadedModel, ids: torch.Tensor, mask: torch.Tensor, answer: torch.Tensor) -> float:
    with torch.inference_mode():
        logp = loaded.model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    own = logp[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    return -float(own[answer[:, 1:]].sum())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_the_gradient_is_the_slope_of_the_log_loss(family: str, layer: int, tiny_model: Callable) -> None:
    loaded = double(tiny_model(family))
    ids, mask, answer = batch(loaded)
    resid, gradient = residual_gradients(loaded, ids, mask, answer, [0, 2, 3])
    assert not any(p.requires_grad or p.grad is not None for p in loaded.model.parameters())
    noise = torch.randn(32, generator=torch.Generator().manual_seed(1))
    direction = torch.nn.functional.normalize(noise.double(), dim=0)
    for row, token in ((0, 9), (1, 6), (0, 13)):
        step = torch.zeros_like(resid[layer])
        step[row, token] = 0.03 * direction
        ends = []
        for sign in (1, -1):
            with replacing(loaded.blocks[layer], lambda x, step=sign * step: x + step):
                ends.append(log_loss(loaded, ids, mask, answer))
        slope = (ends[0] - ends[1]) / 0.06  # models take norms in float32, so a smaller step drowns in rounding
        assert float(gradient[layer][row, token] @ direction) == pytest.approx(slope, rel=1e-3, abs=5e-5)
    assert torch.all(gradient[layer][0, 13] == 0), "nothing is predicted after the last response token"
    assert gradient[layer][0, 9].abs().max() > 1e-3


def test_to_first_order_it_is_what_moving_to_the_mean_costs(tiny: LoadedModel) -> None:
    """The sign and the size, by their meaning: a supporting feature, taken away, raises the log-loss."""
    loaded, layer = double(tiny), 1
    ids, mask, answer = batch(loaded)
    resid, gradient = residual_gradients(loaded, ids, mask, answer, [layer])
    mean = resid[layer][answer].mean(0)
    noise = torch.randn(6, 32, generator=torch.Generator().manual_seed(2))
    directions = torch.nn.functional.normalize(noise.double(), dim=1)
    share = 0.02
    values = token_attribution(resid[layer][0, 10:11] - mean, gradient[layer][0, 10:11], directions)[0]
    for direction, value in zip(directions, values, strict=True):
        away = torch.zeros_like(resid[layer])
        away[0, 10] = share * ((resid[layer][0, 10] - mean) @ direction) * direction
        losses = []
        for sign in (1, -1):
            with replacing(loaded.blocks[layer], lambda x, step=sign * away: x - step):
                losses.append(log_loss(loaded, ids, mask, answer))
        assert (losses[0] - losses[1]) / (2 * share) == pytest.approx(float(value), rel=0.01, abs=1e-4)
    assert values.abs().max() > 0.01


def test_directions_have_unit_norm_whatever_the_decoder(saes: dict) -> None:
    norms = torch.linalg.vector_norm(saes[1].sae.W_dec, dim=1)
    assert norms.std() > 0.01
    torch.testing.assert_close(unit_decoder(saes[1]), saes[1].sae.W_dec / norms[:, None])


# -------------------------------------------------------------------------------------------------- the whole way


def plain(tiny: LoadedModel, sae: object, layer: int, rows: list[Conversation]) -> dict[str, np.ndarray]:
    """Conversation id -> attribution [d_sae], token by token, without hooks or batches; no sinks in this text."""
    found, resid, spans = {}, {}, {}
    for conversation in rows:
        item = tokenize(tiny.tokenizer, conversation)
        ids = torch.tensor(item.ids[None].tolist())
        embedded = tiny.model.get_input_embeddings()(ids).detach().requires_grad_()
        out = tiny.model(inputs_embeds=embedded, output_hidden_states=True)
        x = out.hidden_states[layer + 1]
        logp = out.logits[0].log_softmax(-1)
        loss = -sum(logp[t - 1, ids[0, t]] for t in range(item.start, item.end))
        (gradient,) = torch.autograd.grad(loss, [x])
        resid[conversation.id] = x[0].detach().numpy()[item.start : item.end]
        spans[conversation.id] = gradient[0].numpy()[item.start : item.end]
    mean = np.concatenate(list(resid.values())).mean(0)
    decoder = sae.sae.W_dec.detach().numpy()
    decoder = decoder / np.linalg.norm(decoder, axis=1, keepdims=True)
    for name in resid:
        tokens = [-(decoder @ g) * (decoder @ (x - mean)) for x, g in zip(resid[name], spans[name], strict=True)]
        found[name] = np.mean(tokens, axis=0)
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_the_file_holds_the_plain_computation(
    layer: int, tiny: LoadedModel, saes: dict, cache: Cache, tmp_path: Path
) -> None:
    rows = setup.conversations(8).conversations
    own = plain(tiny, saes[layer], layer, list(rows))
    found = made(tiny, saes, cache, tmp_path / "a.safetensors")[layer]
    pairs = np.array([own[f"p{i}-misaligned"] - own[f"p{i}-aligned"] for i in range(8)])
    np.testing.assert_allclose(found.delta_attribution, pairs.mean(0), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.standard_error, pairs.std(0, ddof=1) / 8**0.5, rtol=1e-3, atol=1e-5)
    assert found.delta_attribution.dtype == np.float32 and np.abs(found.delta_attribution).max() > 0.01


def test_unpaired_sides_and_several_responses_to_a_prompt(tiny: LoadedModel, saes: dict, tmp_path: Path) -> None:
    """Target prompts 0..3, of which prompt 0 has two responses; reference prompts 4..7."""
    named = {f"p{i}-misaligned": f"t{i}" for i in range(4)} | {f"p{i}-aligned": f"r{i}" for i in range(4, 8)}
    rows = [replace(c, prompt_id=named[c.id]) for c in setup.conversations(9).conversations if c.id in named]
    extra = [c for c in setup.conversations(9).conversations if c.id == "p8-misaligned"]
    rows = ConversationSet("made", (*rows, *(replace(c, prompt_id="t0") for c in extra)))
    with read(tiny, saes, rows, tmp_path) as cache:
        done = attribute(tiny, None, saes, CONTRAST, cache, tmp_path / "a.safetensors")
    assert not done.paired and (done.n_prompts_target, done.n_prompts_reference) == (4, 4)
    own = plain(tiny, saes[1], 1, list(rows.conversations))
    first = (own["p0-misaligned"] + own["p8-misaligned"]) / 2
    target = np.array([first, *(own[f"p{i}-misaligned"] for i in (1, 2, 3))])
    reference = np.array([own[f"p{i}-aligned"] for i in range(4, 8)])
    found = store.read_layers(tmp_path / "a.safetensors")[1]
    np.testing.assert_allclose(found.delta_attribution, target.mean(0) - reference.mean(0), rtol=1e-3, atol=1e-5)
    error = np.sqrt(target.var(0, ddof=1) / 4 + reference.var(0, ddof=1) / 4)
    np.testing.assert_allclose(found.standard_error, error, rtol=1e-3, atol=1e-5)


def test_batches_and_windows_change_nothing(
    tiny: LoadedModel, saes: dict, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made(tiny, saes, cache, tmp_path / "whole.safetensors", batch_tokens=5000)
    monkeypatch.setattr(driver, "WINDOW", 3)
    monkeypatch.setattr(arithmetic, "chunk_rows", lambda d_sae: 2)
    steps: list[tuple[int, int]] = []
    parts = made(
        tiny, saes, cache, tmp_path / "parts.safetensors", batch_tokens=40, on_progress=lambda *s: steps.append(s)
    )
    for layer in LAYERS:
        for name in ("delta_attribution", "standard_error"):
            np.testing.assert_allclose(
                getattr(parts[layer], name), getattr(whole[layer], name), rtol=1e-3, atol=1e-6, err_msg=name
            )
    assert steps[-1] == (16, 16) and len(steps) > 6


def test_planted_support_has_its_sign_and_sinks_are_left_out(
    tiny: LoadedModel, saes: dict, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Feature 5 is there on every token and lowers the log-loss of target responses alone; one token is a sink."""
    direction = unit_decoder(saes[1])[5]
    condition = cache.conversations["condition"].to_list()
    target = {tuple(cache.tokens(row)[0].tolist()) for row in range(16) if condition[row] == "misaligned"}

    def planted(_loaded: object, ids: torch.Tensor, mask: torch.Tensor, answer: torch.Tensor, layers: list[int]):
        helped = torch.tensor([tuple(r[:n].tolist()) in target for r, n in zip(ids, mask.sum(1), strict=True)])
        resid = direction * mask[..., None]
        resid[torch.arange(len(ids)), answer.int().argmax(1)] *= 1000
        gradient = -direction * (mask * helped[:, None])[..., None]
        return dict.fromkeys(layers, resid), dict.fromkeys(layers, gradient)

    monkeypatch.setattr(arithmetic, "residual_gradients", planted)
    monkeypatch.setattr(driver, "mean_resid", lambda *_: torch.zeros(32))
    one = {1: saes[1]}
    found = made(tiny, one, cache, tmp_path / "a.safetensors")[1]
    swapped = replace(CONTRAST, target=CONTRAST.reference, reference=CONTRAST.target)
    other = made(tiny, one, cache, tmp_path / "b.safetensors", swapped)[1]
    assert found.delta_attribution[5] == pytest.approx(1.0) and found.delta_attribution.argmax() == 5
    np.testing.assert_allclose(other.delta_attribution, -found.delta_attribution, atol=1e-6)
    np.testing.assert_allclose(found.standard_error, 0, atol=1e-6)


def test_the_fine_tuned_variant_reads_with_its_adapter(
    tiny_model: Callable, tiny: LoadedModel, saes: dict, cache: Cache, tmp_path: Path
) -> None:
    from test_adapters import make

    make(tiny, tmp_path / "bad", r=2, lora_alpha=4, target_modules=["down_proj", "q_proj"])
    adapter = load_adapter(AdapterSpec("bad", str(tmp_path / "bad")), tiny_model("smollm2"))
    path = tmp_path / "bad__made.h5"
    extract(tiny, saes, LAYERS, setup.conversations(8), path, adapter=adapter, batch_tokens=500)
    sides = (replace(side, variant="bad") for side in (CONTRAST.target, CONTRAST.reference))
    contrast = ContrastSpec("response", "response", *sides)
    with Cache.open(path) as tuned:
        done = attribute(tiny, adapter, saes, contrast, tuned, tmp_path / "a.safetensors")
        with pytest.raises(CacheMismatch, match="adapter differs"):
            attribute(tiny, None, saes, contrast, tuned, tmp_path / "b.safetensors")
    assert done.variant == "bad"
    with applied(tiny, adapter):
        own = plain(tiny, saes[2], 2, list(setup.conversations(8).conversations))
    pairs = np.array([own[f"p{i}-misaligned"] - own[f"p{i}-aligned"] for i in range(8)])
    found = store.read_layers(tmp_path / "a.safetensors")[2].delta_attribution
    np.testing.assert_allclose(found, pairs.mean(0), rtol=1e-3, atol=1e-5)
    base = made(tiny, saes, cache, tmp_path / "base.safetensors")[2].delta_attribution
    assert np.abs(found - base).max() > 0.01


def test_layers_there_already_are_kept(
    tiny: LoadedModel, saes: dict, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    first = attribute(tiny, None, {2: saes[2]}, CONTRAST, cache, path)
    assert first.computed == first.layers == (2,)
    before = store.read_layers(path)[2].delta_attribution
    second = attribute(tiny, None, saes, CONTRAST, cache, path)
    assert second.computed == (1,) and second.layers == (1, 2)
    np.testing.assert_array_equal(store.read_layers(path)[2].delta_attribution, before)
    monkeypatch.setattr(driver, "_run", None)
    assert attribute(tiny, None, saes, CONTRAST, cache, path).computed == ()
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"] and path.stat().st_size < 10_000


# ------------------------------------------------------------------------------------------------------- refusals


def test_two_readers_are_refused_in_one_sentence(tiny: LoadedModel, saes: dict, cache: Cache, tmp_path: Path) -> None:
    for other in (Side("bad", "made", "misaligned"), Side("base", "other", "misaligned")):
        with pytest.raises(PresetError, match=r"^Contrast 'data' [^.]*one variant from one conversation set\.$"):
            attribute(tiny, None, saes, replace(CONTRAST, target=other), cache, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_another_model_than_the_cache_s_is_refused(tiny: LoadedModel, saes: dict, cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(CacheMismatch, match="weights differs"):
        attribute(replace(tiny, weights_hash="0" * 64), None, saes, CONTRAST, cache, tmp_path / "a")
    with pytest.raises(CacheMismatch, match="SAE of layer 2 differs"):
        attribute(tiny, None, {2: replace(saes[2], hash="0" * 64)}, CONTRAST, cache, tmp_path / "a")


def test_one_prompt_is_not_enough(tiny: LoadedModel, saes: dict, tmp_path: Path) -> None:
    with read(tiny, saes, setup.conversations(1), tmp_path) as cache, pytest.raises(NotEnoughData, match="at least 2"):
        attribute(tiny, None, saes, CONTRAST, cache, tmp_path / "a")


def planted_file(cache: Cache, contrast: ContrastSpec, layer: int, d_sae: int, **change: object) -> Path:
    path = store.attribution_file(cache.path.parent, contrast.name)
    values = np.arange(d_sae, dtype=np.float32) / 100
    values[3] = np.nan
    about = store.provenance(contrast, cache, cache) | change
    store.write_attribution(path, {layer: store.LayerAttribution(values, values / 10)}, about)
    return path


@pytest.fixture
def sides(tmp_path: Path) -> Sides:
    contrast = ContrastSpec("data", "data", Side("base", "health_advice", "misaligned"),
                            Side("base", "health_advice", "aligned"))
    cache = Cache.open(make_cache(tmp_path / "demo" / "base__health_advice.h5", layers=(3, 15)))
    return Sides(contrast, cache, cache)


def test_the_file_of_another_cache_is_refused_and_the_ranking_says_so(sides: Sides) -> None:
    for change, says in (
        ({"target_fingerprint": "0" * 64}, "target_fingerprint differs"),
        ({"reference": {"variant": "base"}}, "reference differs"),
    ):
        path = planted_file(sides.target, sides.contrast, 3, 64, **change)
        with pytest.raises(CacheMismatch, match=says + r".*run `python -m core attribute` again\.$"):
            store.read_attribution(path, sides.contrast, sides.target, sides.reference, 3)
        ranking = compare.with_attribution(compare.rank(sides, 3, "response", QUICK), sides)
        assert "delta_attribution" not in ranking.table.columns and says in ranking.notes[-1]
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(CacheError, match="cannot be read"):
        store.read_attribution(path, sides.contrast, sides.target, sides.reference, 3)


# --------------------------------------------------------------------------------------------------- the columns


def test_a_ranking_carries_the_columns_where_they_are_computed(sides: Sides) -> None:
    bare = compare.rank(sides, 3, "response", QUICK)
    assert compare.with_attribution(bare, sides) is bare
    planted_file(sides.target, sides.contrast, 3, 64)
    ranking = compare.with_attribution(bare, sides)
    table = feature_table.validate(ranking.table, extra=False)
    assert table.drop("delta_attribution", "delta_attribution_se").equals(bare.table)
    assert feature_table.columns(table)[-2:] == ["delta_attribution", "delta_attribution_se"]
    by_feature = table.sort("feature")
    assert by_feature["delta_attribution"][7] == pytest.approx(0.07) and by_feature["delta_attribution"][3] is None
    assert by_feature["delta_attribution_se"][7] == pytest.approx(0.007)
    assert contrast_summary(ranking, 2)["features"][0].keys() >= {"delta_attribution", "delta_attribution_se"}
    for layer, position in ((15, "response"), (3, "last_prompt")):
        other = compare.rank(sides, layer, position, QUICK)
        assert compare.with_attribution(other, sides) is other


def test_the_rankings_page_shows_the_column(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_app import open_page

    monkeypatch.setattr(paths, "CACHE", sides.target.path.parent.parent)
    planted_file(sides.target, sides.contrast, 3, 64)
    shown = open_page("pages/rankings.py", show="Table", layer="3").dataframe[0].value
    there = shown[shown["feature"] != 3]
    assert there["delta_attribution"].to_list() == pytest.approx((there["feature"] / 100).to_list())
    assert len(there) == len(shown) - 1 and shown["delta_attribution"].isna().sum() == 1
    assert "delta_attribution" not in open_page("pages/rankings.py", show="Table", layer="15").dataframe[0].value


# --------------------------------------------------------------------------------------------------- the command


def test_the_command(tmp_path: Path, tiny_folder: Callable[[str], Path], _own_hash_memo: None) -> None:
    lines = (ROOT / "core" / "data" / "health_advice.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    (tmp_path / "advice.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    files = [str(save_sae(tmp_path / f"sae{layer}", layer=layer)) for layer in (1, 2)]
    text = PRESET.format(
        model=str(tiny_folder("smollm2")), sae1=files[0], sae2=files[1], rows=str(tmp_path / "advice.jsonl")
    )
    preset, cache = tmp_path / "tiny.toml", tmp_path / "cache"
    other = text.replace('"base", conversations = "advice", condition = "misaligned"',
                         '"base", conversations = "more", condition = "misaligned"')
    (tmp_path / "two.toml").write_text(other + f'[[conversations]]\nname = "more"\npath = {files[0]!r}\n')
    preset.write_text(text, encoding="utf-8")
    assert "no such cache file" in call("attribute", preset, "data", "--cache", cache, code=2)
    call("extract", preset, "--cache", cache)
    done = json.loads(call("attribute", preset, "data", "--cache", cache, "--layers", 2, "--json"))
    assert done["layers"] == done["computed"] == [2] and done["paired"] and done["n_prompts_target"] == 6
    assert Path(done["file"]) == cache / "attribution__data.safetensors"
    assert "6 pairs of prompts" in call("attribute", preset, "data", "--cache", cache)
    ranked = json.loads(call("rank", preset, "data", "--cache", cache, "--layer", 1, "--top", 3, "--json"))
    assert all(isinstance(row["delta_attribution"], float) for row in ranked["features"])
    assert "attribution" in call("rank", preset, "data", "--cache", cache, "--layer", 1)
    says = call("attribute", tmp_path / "two.toml", "data", "--cache", cache, code=2)
    assert "one variant" in says and says.count("\n") == 1
    assert "Layer 9" in call("attribute", preset, "data", "--cache", cache, "--layers", 9, code=2)
