"""SAE health on two variants: planted drops are flagged, equal ones are not; the command measures and keeps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import extract_setup as setup
import pytest
import torch
from make_cache import make_cache
from test_adapters import make
from test_main import PRESET, call
from tiny_saes import save_sae

from core import paths
from core.analysis import health
from core.analysis.compare import Sides
from core.analysis.health import compare_health, read_spliced, spliced_file
from core.conversations import tokenize
from core.errors import CacheError
from core.evaluation import sae_health
from core.model.adapters import applied, load_adapter
from core.model.loading import LoadedModel
from core.paths import ROOT
from core.specs import AdapterSpec, ContrastSpec, Side
from core.store.reader import Cache

LAYER = 3


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Cache, Cache]:
    """A variant and base that read the same text, with the same health."""
    folder = tmp_path / "demo"
    target, reference = (
        Cache.open(make_cache(folder / f"{variant}__health_advice.h5", layers=(LAYER, 15), variant=variant))
        for variant in ("bad-health-r8", "base")
    )
    return target, reference


def with_health(cache: Cache, monkeypatch: pytest.MonkeyPatch, **figures: float) -> None:
    own = cache.info
    monkeypatch.setattr(cache, "info", lambda layer: replace(own(layer), health=own(layer).health | figures))


def rows(target: float, reference: float, **target_changes: object) -> list[dict]:
    """What `sae-health` would have written about the caches of `pair`."""
    common = {"layer": LAYER, "adapter": None, "weights": "0" * 64, "sae": "0" * 64, "conversations_hash": "a"}
    return [
        common | {"variant": "base", "ce_recovered": reference},
        common | {"variant": "bad-health-r8", "ce_recovered": target} | target_changes,
    ]


# --------------------------------------------------------------------------------------------------- the comparison


def test_equal_health_is_not_flagged_and_its_figures_are_said(pair: tuple[Cache, Cache]) -> None:
    found = compare_health(*pair, LAYER, None)
    assert not found.worse and found.ce_recovered_target is None
    assert found.fvu_target == found.fvu_reference == pair[0].info(LAYER).health["fvu"]
    assert found.sentence == (
        f"The SAE of layer 3 explains bad-health-r8 no worse than base (FVU {found.fvu_target:.3f} against "
        f"{found.fvu_reference:.3f}, L0 {found.l0_target:.1f} against {found.l0_reference:.1f}, cross-entropy "
        "recovered not measured)."
    )


@pytest.mark.parametrize(("target", "reference", "worse"), [
    (0.24, 0.20, True), (0.20, 0.24, False), (0.219, 0.20, False), (0.221, 0.20, True),
    (0.059, 0.05, False), (0.061, 0.05, True),  # 18% higher, but not by 0.01
    (float("nan"), 0.2, False),
])  # fmt: skip
def test_a_higher_fvu_is_flagged_by_both_margins(
    target: float, reference: float, worse: bool, pair: tuple[Cache, Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    for cache, fvu in zip(pair, (target, reference), strict=True):
        with_health(cache, monkeypatch, fvu=fvu)
    found = compare_health(*pair, LAYER, None)
    assert found.worse is worse
    assert ("may be differences in what the SAE misses" in found.sentence) is worse
    assert ("is not known" in found.sentence) is math.isnan(target)


@pytest.mark.parametrize(("target", "worse"), [(0.94, True), (0.96, False), (0.99, False), (None, False)])
def test_less_cross_entropy_recovered_is_flagged(
    target: float | None, worse: bool, pair: tuple[Cache, Cache]
) -> None:
    found = compare_health(*pair, LAYER, rows(target, 0.97))
    assert found.worse is worse and found.ce_recovered_target == target
    words = "not measured" if target is None else f"{target:.3f} against 0.970"
    assert f"cross-entropy recovered {words}" in found.sentence


@pytest.mark.parametrize("change", [
    {"adapter": "1" * 64}, {"sae": "1" * 64}, {"weights": "1" * 64}, {"layer": 15}, {"conversations_hash": "b"},
    {"variant": "other"},
])  # fmt: skip
def test_figures_of_something_else_do_not_count(change: dict, pair: tuple[Cache, Cache]) -> None:
    assert compare_health(*pair, LAYER, rows(0.5, 0.97)).worse
    found = compare_health(*pair, LAYER, rows(0.5, 0.97, **change))
    assert not found.worse and found.ce_recovered_target is None and found.ce_recovered_reference is None


def test_different_conversations_are_said(pair: tuple[Cache, Cache], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pair[0].spec, "conversations_hash", "1" * 64)
    assert "on different conversations" in compare_health(*pair, LAYER, None).sentence


def test_a_layer_without_an_sae_is_refused(tmp_path: Path) -> None:
    with Cache.open(make_cache(tmp_path / "x.h5", layers=(LAYER,), with_saes=False)) as cache:
        with pytest.raises(CacheError, match="without an SAE"):
            compare_health(cache, cache, LAYER, None)


def sides(pair: tuple[Cache, Cache], kind: str = "model") -> Sides:
    name = "health_advice"
    return Sides(ContrastSpec("model", kind, Side("bad-health-r8", name), Side("base", name)), *pair)


def test_only_model_contrasts_carry_it_and_a_damaged_file_is_said(pair: tuple[Cache, Cache]) -> None:
    assert health.of_sides(sides(pair, "data"), LAYER) is None
    file = spliced_file(pair[0].path.parent)
    assert read_spliced(file) is None and not health.of_sides(sides(pair), LAYER).worse
    file.write_text(json.dumps(rows(0.5, 0.97)))
    assert health.of_sides(sides(pair), LAYER).worse
    for text in ("[1, 2", "{}", "[3]"):
        file.write_text(text)
        found = health.of_sides(sides(pair), LAYER)
        assert not found.worse and "sae_health.json" in found.sentence


def test_the_pages_warn_beside_a_model_contrast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_app import open_page, words

    from core.experiment import load_experiment

    folder = tmp_path / "demo"
    make_cache(folder / "base__health_advice.h5", layers=(LAYER, 15))
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    contrast = next(c for c in load_experiment("demo").contrasts if c.kind == "model")
    for seed, side in enumerate((contrast.target, contrast.reference)):
        path = folder / f"{side.variant}__{side.conversations}.h5"
        make_cache(path, layers=(LAYER, 15), variant=side.variant, conversations=side.conversations, seed=seed)
    known = rows(0.5, 0.97, variant=contrast.target.variant)
    spliced_file(folder).write_text(json.dumps(known))
    app = open_page("pages/rankings.py", contrast=contrast.name, layer=str(LAYER))
    assert any("what the SAE misses" in str(w.value) for w in app.warning)
    for page, more in (("pages/feature.py", {}), ("pages/rankings.py", {"show": "Depth"})):
        warned = open_page(page, contrast=contrast.name, layer=str(LAYER), **more).warning
        assert sum("what the SAE misses" in str(w.value) for w in warned) == 1, page
    spliced_file(folder).unlink()
    app = open_page("pages/rankings.py", contrast=contrast.name, layer=str(LAYER))
    assert not app.warning and "no worse than base" in words(app)
    assert "The SAE of layer" not in words(open_page("pages/rankings.py", contrast="data", layer=str(LAYER)))


# -------------------------------------------------------------------------------------------------- the measurement


@pytest.fixture(scope="module")
def tiny(tiny_model: Callable[[str], LoadedModel]) -> LoadedModel:
    return setup.named(tiny_model("smollm2"))


@pytest.fixture(scope="module")
def adapter(tiny_model: Callable[[str], LoadedModel], tmp_path_factory: pytest.TempPathFactory):
    loaded, folder = tiny_model("smollm2"), tmp_path_factory.mktemp("bad")
    make(loaded, folder, r=2, lora_alpha=4, target_modules=["down_proj"])
    return load_adapter(AdapterSpec("bad", str(folder)), loaded)


def test_what_is_measured_is_the_variants_own(tiny: LoadedModel, adapter, tmp_path: Path) -> None:
    saes, text = setup.saes(tmp_path, tiny), setup.conversations(6)
    found = sae_health.measure_variants(tiny, saes, {"base": None, "bad": adapter}, text, tmp_path / "h.json")
    assert [(h.variant, h.layer) for h in found] == [("base", 1), ("base", 2), ("bad", 1), ("bad", 2)]
    items = [tokenize(tiny.tokenizer, c) for c in text.conversations]
    for h in found:
        x, losses = [], []
        for item in items:
            ids = torch.tensor([item.ids.tolist()])
            with torch.inference_mode(), applied(tiny, adapter, float(h.variant == "bad")):
                out = tiny.model(ids, output_hidden_states=True)
            x.append(out.hidden_states[h.layer + 1][0, item.start : item.end])
            logp = out.logits[0].log_softmax(-1)
            losses.append(-logp[torch.arange(item.start - 1, item.end - 1), ids[0, item.start : item.end]])
        x, sae = torch.cat(x), saes[h.layer].sae
        with torch.inference_mode():
            fvu = (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
            l0 = (sae.encode(x) > 0).sum(1).float().mean()
        assert h.fvu == pytest.approx(float(fvu), rel=1e-4) and h.l0 == pytest.approx(float(l0), rel=1e-5)
        assert h.ce == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)
        assert h.ce_recovered == sae_health.recovered(h.ce, h.ce_spliced, h.ce_zero)
        assert h.adapter == (adapter.hash if h.variant == "bad" else None) and h.sae == saes[h.layer].hash
        assert h.n_tokens == len(x) and h.n_conversations == 12
    assert abs(found[0].ce - found[2].ce) > 1e-3


def test_a_dictionary_that_is_perfect_on_base_and_noise_on_the_variant_is_flagged(
    tiny: LoadedModel, adapter, tmp_path: Path, pair: tuple[Cache, Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: what stands in for the SAE rebuilds base's residuals exactly, and gives noise for any other."""
    from core.training import sae as training

    saes, text = setup.saes(tmp_path, tiny, (1,)), setup.conversations(4)
    def perfect_on_base(_sae: object, x: torch.Tensor) -> torch.Tensor:
        if measuring == "base":
            return x
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) * x.std()

    for module in (training, sae_health):
        monkeypatch.setattr(module, "reconstruct", perfect_on_base)
    made = []
    for measuring, one in (("base", None), ("bad-health-r8", adapter)):
        made += sae_health.measure_variants(tiny, saes, {measuring: one}, text, tmp_path / "h.json")
    assert made[0].fvu == pytest.approx(0, abs=1e-9) and made[0].ce_spliced == pytest.approx(made[0].ce)
    assert made[1].fvu > 0.5 and abs(made[1].ce_spliced - made[1].ce) > 0.01
    for cache, measured in zip(pair, made[::-1], strict=True):
        with_health(cache, monkeypatch, fvu=measured.fvu)
        figures = {"weights": measured.weights, "adapter": measured.adapter, "saes": {str(LAYER): measured.sae}}
        for field, value in figures.items():
            monkeypatch.setitem(cache.spec, field, value)
    spliced = [row | {"layer": LAYER} for row in read_spliced(tmp_path / "h.json")]
    found = compare_health(*pair, LAYER, spliced)
    assert found.worse and found.fvu_target > 0.5 and found.fvu_reference == pytest.approx(0, abs=1e-9)


def test_what_is_recovered_runs_from_the_zeros_to_the_untouched_model() -> None:
    assert sae_health.recovered(2.0, 2.0, 6.0) == 1 and sae_health.recovered(2.0, 6.0, 6.0) == 0
    assert sae_health.recovered(2.0, 3.0, 6.0) == 0.75 and sae_health.recovered(2.0, 7.0, 6.0) < 0
    assert sae_health.recovered(2.0, 2.5, 2.0) is None and sae_health.recovered(2.0, 2.5, 1.9) is None


def test_held_out_prompts_come_first_and_pairs_stay_together() -> None:
    from core.split import heldout_prompts

    text = setup.conversations(20)
    held = heldout_prompts(c.prompt_id for c in text.conversations)
    chosen = sae_health.choose_conversations(text, 10).conversations
    assert len(chosen) == 10 and {c.prompt_id for c in chosen[:8]} == held
    assert sum(c.condition == "aligned" for c in chosen) == 5
    assert len(sae_health.choose_conversations(text, 100)) == 40


def test_the_command_keeps_what_was_not_asked_for(
    tmp_path: Path, tiny_model: Callable, tiny_folder: Callable[[str], Path]
) -> None:
    lines = (ROOT / "core" / "data" / "health_advice.jsonl").read_text(encoding="utf-8").splitlines()[:30]
    (tmp_path / "advice.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    files = [str(save_sae(tmp_path / f"sae{layer}", layer=layer)) for layer in (1, 2)]
    make(tiny_model("smollm2"), tmp_path / "bad", r=2, lora_alpha=4, target_modules=["down_proj"])
    side = "{{ variant = {!r}, conversations = 'advice', condition = 'aligned' }}"
    text = PRESET.format(
        model=str(tiny_folder("smollm2")), sae1=files[0], sae2=files[1], rows=str(tmp_path / "advice.jsonl")
    ) + (
        f'[[adapters]]\nname = "bad"\nid = {str(tmp_path / "bad")!r}\n[[contrasts]]\nname = "model"\nkind = "model"\n'
        f"target = {side.format('bad')}\nreference = {side.format('base')}\n"
    )
    preset, cache = tmp_path / "tiny.toml", tmp_path / "cache"
    preset.write_text(text, encoding="utf-8")
    call("sae-health", preset, "--cache", cache, "--limit", 6, "--layers", 1)
    first = json.loads((cache / "sae_health.json").read_text())
    assert [(r["variant"], r["layer"]) for r in first] == [("base", 1), ("bad", 1)]
    assert {"fvu", "l0", "ce", "ce_spliced", "ce_zero", "ce_recovered", "n_tokens", "conversations"} <= set(first[0])
    made = json.loads(call("sae-health", preset, "--cache", cache, "--limit", 4, "--variants", "base", "--json"))
    assert [(r["variant"], r["layer"]) for r in made] == [("base", 1), ("base", 2)]
    second = json.loads((cache / "sae_health.json").read_text())
    assert second == [*made, first[1]] and second[0]["n_conversations"] == 4
    says = call("sae-health", preset, "--cache", cache, "--variants", "worse", code=2)
    assert "'worse'" in says and says.count("\n") == 1

    for variant in ("base", "bad"):
        call("extract", preset, "--cache", cache, "--variant", variant)
    call("sae-health", preset, "--cache", cache, "--limit", 6)
    ranked = json.loads(call("rank", preset, "model", "--cache", cache, "--layer", 1, "--json"))
    spliced = {r["variant"]: r for r in json.loads((cache / "sae_health.json").read_text()) if r["layer"] == 1}
    assert ranked["sae_health"]["target"] == "bad"
    assert ranked["sae_health"]["ce_recovered_target"] == spliced["bad"]["ce_recovered"]
    assert ranked["notes"][-1] == ranked["sae_health"]["sentence"]
    assert "sae_health" not in json.loads(call("rank", preset, "data", "--cache", cache, "--layer", 1, "--json"))
