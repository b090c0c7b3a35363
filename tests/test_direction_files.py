"""`direction` and `decompose` from end to end on a tiny model, and a direction's way back to its caches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from make_cache import make_cache
from test_main import PRESET, call
from tiny_saes import save_sae

from core import paths
from core.analysis import direction_files as files
from core.analysis.direction import contrast_direction, feature_differences
from core.errors import CacheMismatch, DirectionError, PresetError
from core.experiment import load_experiment
from core.paths import ROOT
from core.store.direction_file import load_direction, load_directions, save_directions
from core.store.reader import Cache


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[[str], Path]) -> Path:
    """A preset of one's own on a tiny model, extracted: `tiny.toml` and `cache/`."""
    folder = tmp_path_factory.mktemp("work")
    lines = (ROOT / "core" / "data" / "health_advice.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    (folder / "advice.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    saes = [str(save_sae(folder / f"sae{layer}", layer=layer)) for layer in (1, 2)]
    text = PRESET.format(
        model=str(tiny_folder("smollm2")), sae1=saes[0], sae2=saes[1], rows=str(folder / "advice.jsonl")
    )
    text = text.replace("[model]", "[model]\nd_model = 32\nn_layers = 4")
    (folder / "tiny.toml").write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "CACHE", tmp_path_factory.mktemp("unused"))
        call("extract", folder / "tiny.toml", "--cache", folder / "cache")
        yield folder


@pytest.fixture
def made(workplace: Path, tmp_path: Path) -> Path:
    call("direction", workplace / "tiny.toml", "data", "--cache", workplace / "cache", "--layer", 2, "--out",
         tmp_path / "d.safetensors")  # fmt: skip
    return tmp_path / "d.safetensors"


def decomposed(workplace: Path, file: Path, *more: object) -> dict:
    return json.loads(call("decompose", file, "--preset", workplace / "tiny.toml", "--cache", workplace / "cache",
                           "--json", *more))  # fmt: skip


def test_direction_prints_and_writes_what_it_is(workplace: Path, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "all.safetensors"
    found = json.loads(call("direction", workplace / "tiny.toml", "data", "--cache", workplace / "cache", "--layer", 2,
                            "--out", out, "--all-layers", "--json"))  # fmt: skip
    assert {"file", "layer", "norm", "share_of_residual_norm", "heldout_auroc", "ci95", "cosines"} <= set(found)
    one = load_direction(made)
    assert one.norm == pytest.approx(found["norm"]) and one.layer == found["layer"] == 2
    assert [d.layer for d in load_directions(out)] == [1, 2]
    assert np.array_equal(load_direction(out, 2).vector, one.vector)
    assert found["cosines"]["layer 1"] == pytest.approx(one.cosine(load_direction(out, 1)))
    assert "last prompt token" not in found["cosines"], "both sides answer the same prompts"
    low, high = found["cosines_ci95"]["layer 1"]
    assert low < found["cosines"]["layer 1"] < high
    text = call("direction", workplace / "tiny.toml", "data", "--cache", workplace / "cache")
    assert "held-out AUROC" in text and "40 prompts" not in text and "20 prompts" in text


def test_the_exact_error_term_is_the_difference_of_mean_sae_errors(
    workplace: Path, made: Path, tiny_model: Callable
) -> None:
    """Closes against the model and sae-lens themselves, token by token."""
    from sae_lens import SAE

    from core.conversations import load_conversations, tokenize
    from core.model.hooks import resid_post

    loaded = tiny_model("smollm2")
    sae = SAE.load_from_disk(workplace / "sae2", device="cpu")
    errors: dict[str, list] = {"misaligned": [], "aligned": []}
    for c in load_conversations(workplace / "advice.jsonl", name="advice").conversations:
        item = tokenize(loaded.tokenizer, c)
        ids = torch.tensor(item.ids)[None]
        x = resid_post(loaded, ids, torch.ones_like(ids), [2])[2][0, item.start : item.end]
        errors[c.condition].append((x - sae(x)).mean(0).detach().numpy())
    wanted = np.mean(errors["misaligned"], axis=0) - np.mean(errors["aligned"], axis=0)
    vector = load_direction(made).vector.astype(float)
    found = decomposed(workplace, made, "--method", "exact")
    assert found["error_share"] == pytest.approx(float(wanted @ vector / (vector @ vector)), abs=2e-3)
    assert found["error_norm_share"] == pytest.approx(np.linalg.norm(wanted) / np.linalg.norm(vector), abs=2e-3)


def test_every_method_answers_in_the_same_shape(workplace: Path, made: Path, tmp_path: Path) -> None:
    for method in ("exact", "encoder", "cosine", "omp", "nnls"):
        found = decomposed(workplace, made, "--method", method, "--top", 5)
        assert found["method"] == method and 0 < len(found["features"]) <= 5
        assert {"layer", "feature", "coefficient", "cosine", "rank"} <= set(found["features"][0])
        assert {"k", "share", "random_share"} <= set(found["explained_norm"][0])
    out = tmp_path / "table.parquet"
    assert "explained" in call("decompose", made, "--preset", workplace / "tiny.toml", "--cache", workplace / "cache",
                               "--out", out)  # fmt: skip
    assert {"feature", "coefficient", "fires_on", "tokens"} <= set(pl.read_parquet(out).columns)


def test_a_vector_made_elsewhere_is_decomposed_and_has_no_exact_sum(workplace: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.random.default_rng(0).standard_normal(32))
    found = decomposed(workplace, tmp_path / "v.npy", "--layer", 1, "--method", "cosine")
    assert found["layer"] == 1
    preset = ("--preset", workplace / "tiny.toml", "--cache", workplace / "cache")
    for arguments, says in (
        ((*preset, "--layer", 1, "--method", "exact"), "not made from a contrast"),
        (preset, "give --layer and --preset"),
        ((*preset, "--layer", 3), "no SAE at layer 3"),
        ((*preset, "--layer", 1, "--method", "lasso"), "use one of exact"),
    ):
        assert says in call("decompose", tmp_path / "v.npy", *arguments, code=2)
    direction, _ = files.load_any(tmp_path / "v.npy", 1, None, str(workplace / "tiny.toml"), workplace / "cache")
    with Cache.open(workplace / "cache" / "base__advice.h5") as cache:
        assert direction.resid_norm == cache.info(1).health["mean_resid_norm"]


def test_a_direction_finds_its_caches_and_notices_new_ones(workplace: Path, made: Path) -> None:
    direction, experiment = load_direction(made), load_experiment(workplace / "tiny.toml")
    sides = files.caches_of(direction, experiment, workplace / "cache")
    assert np.array_equal(files.differences_of(direction, sides), feature_differences(sides, 2))
    other = direction.named("data", target_fingerprint="0" * 64)
    with pytest.raises(CacheMismatch, match="make the direction again"):
        files.caches_of(other, experiment, workplace / "cache")
    with pytest.raises(PresetError):
        files.load_any(made)  # the preset is a file of one's own, so its name alone does not find it


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """Caches under the demo's names: base and two fine-tunes read the same text, base alone a second set."""
    for variant, seed in (("bad-health-r8", 1), ("good-health-r8", 2), ("base", 3)):
        make_cache(tmp_path / f"{variant}__bad_answers.h5", variant=variant, conversations="bad_answers", seed=seed,
                   layers=(9, 15), sources=("health_advice/x", "open/x"))  # fmt: skip
    make_cache(tmp_path / "base__health_advice.h5", seed=4, layers=(3, 15))
    make_cache(tmp_path / "base__open_answers.h5", conversations="open_answers", seed=5, layers=(15,))
    return tmp_path


def test_relatives_are_layers_ways_contrasts_and_readers(demo: Path) -> None:
    experiment = load_experiment("demo")
    sides = files.open_sides(experiment, experiment.contrast("response"), demo)
    assert list(files.readers(experiment, sides.contrast, demo)) == ["bad-health-r8", "base", "good-health-r8"]
    found = files.relatives(experiment, sides, 15, "response", "response", demo)
    assert "layer 9" in found and "layer 15" not in found
    assert {"last prompt token", "response tokens, each token counts once"} <= set(found)
    assert {"data", "response-good", "response, read by base"} <= set(found) and "response" not in found
    assert "response, read by good-health-r8" not in found, "that is response-good"
    assert "response-good, read by base" not in found, "the same text once"
    own = contrast_direction(sides, 15)
    read = files.readers(experiment, sides.contrast, demo)["base"]
    other = contrast_direction(read, 15)
    assert found["response, read by base"].direction.cosine(own) == pytest.approx(other.cosine(own))
    assert files.readers(experiment, experiment.contrast("model"), demo) == {}


def test_the_norm_is_the_bases_where_it_is_cached(demo: Path) -> None:
    experiment = load_experiment("demo")
    with Cache.open(demo / "base__health_advice.h5") as cache:
        assert files.resid_norm(experiment, 3, demo) == cache.info(3).health["mean_resid_norm"]
    assert files.resid_norm(experiment, 21, demo) is None


def test_files_that_do_not_say_enough(tmp_path: Path, demo: Path) -> None:
    experiment = load_experiment("demo")
    own = contrast_direction(files.open_sides(experiment, experiment.contrast("data"), demo), 15)
    with pytest.raises(DirectionError, match="does not name its preset"):
        files.load_any(save_directions(tmp_path / "d.safetensors", [own]))
    with pytest.raises(DirectionError, match="SAEs at 3, 9, 15, 21"):
        files.sae_spec(experiment, 4)


@pytest.mark.parametrize("name", ["base__bad_answers", "base__good_answers", "bad-health-r8__health_advice"])
def test_the_demo_carries_the_second_reader(name: str) -> None:
    with Cache.open(ROOT / "cache" / "demo" / f"{name}.h5") as cache:
        assert cache.variant == name.split("__")[0] and all(cache.info(n).d_sae == 0 for n in cache.layers)
