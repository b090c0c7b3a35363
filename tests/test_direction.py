"""The direction of a contrast: what it is, how it is weighted, and whether its figures know signal from noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from make_cache import make_cache
from scipy.stats import mannwhitneyu

from core.analysis import direction as directions
from core.analysis import resampling
from core.analysis.compare import Sides
from core.analysis.direction import Pool, contrast_direction, cosine_table, feature_differences, measure, prompt_auroc
from core.directions import Direction
from core.errors import CacheError, DirectionError
from core.specs import ContrastSpec, Side
from core.store.reader import Cache

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Sides:
    cache = Cache.open(make_cache(tmp_path_factory.mktemp("cache") / "base__health_advice.h5"))
    sided = (Side("base", "health_advice", c) for c in ("misaligned", "aligned"))
    return Sides(ContrastSpec("data", "data", *sided), cache, cache)


def means(cache: Cache, layer: int, weights: np.ndarray | None = None) -> np.ndarray:
    bad = cache.conversations["condition"].to_numpy() == "misaligned"
    resid = cache.resid(layer, "response").astype(float)
    w = np.ones(len(resid)) if weights is None else weights
    return np.average(resid[bad], axis=0, weights=w[bad]) - np.average(resid[~bad], axis=0, weights=w[~bad])


def test_it_is_the_difference_of_means_with_its_origin(sides: Sides) -> None:
    found = contrast_direction(sides, 2, preset="mine")
    assert np.allclose(found.vector, means(sides.target, 2), atol=1e-5)
    assert found.resid_norm == sides.reference.info(2).health["mean_resid_norm"]
    assert found.origin["contrast"] == "data" and found.origin["preset"] == "mine"
    assert found.origin["target"] == "base reading misaligned health_advice"
    assert found.origin["target_fingerprint"] == sides.target.fingerprint
    assert not any("/" in value for value in found.origin.values()), "a file of it names no folder of this machine"


def test_token_weighting_counts_every_token_once(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.arange(1, len(sides.target.conversations) + 1)
    table = sides.target.conversations.with_columns(n_response_tokens=lengths)
    monkeypatch.setitem(sides.target.__dict__, "conversations", table)
    found = contrast_direction(sides, 1, weighting="token")
    assert np.allclose(found.vector, means(sides.target, 1, lengths.astype(float)), atol=1e-5)
    assert not np.allclose(found.vector, contrast_direction(sides, 1).vector, atol=1e-3)
    acts = sides.target.response(1).toarray()
    bad = table["condition"].to_numpy() == "misaligned"
    wanted = np.average(acts[bad], axis=0, weights=lengths[bad]) - np.average(acts[~bad], axis=0, weights=lengths[~bad])
    assert np.allclose(feature_differences(sides, 1, weighting="token"), wanted, atol=1e-5)
    with pytest.raises(DirectionError, match="within responses alone"):
        contrast_direction(sides, 1, "last_prompt", "token")


def pool(shift: float, n: int, prompts: str = "p", d: int = 24, seed: int = 0) -> Pool:
    rng = np.random.default_rng(seed)
    resid = rng.standard_normal((n, d))
    resid[:, 0] += shift
    return Pool(resid, np.array([f"{prompts}{i}" for i in range(n)]), np.ones(n))


def figures(target: Pool, reference: Pool, sides: Sides, monkeypatch: pytest.MonkeyPatch) -> directions.Measured:
    monkeypatch.setattr(directions, "pools", lambda *_: (target, reference))
    return measure(sides, 1)


def test_a_planted_difference_is_trusted(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    found = figures(pool(4, 80), pool(0, 80, seed=1), sides, monkeypatch)
    assert found.auroc > 0.98 and found.auroc_ci95[0] > 0.9 and found.prompt_auroc == 0.5
    assert found.split_half > 0.9 and found.resample_cosine > 0.9
    assert found.norm_ci95[0] < 4 < found.norm_ci95[1] and found.noise_norm < 1.5
    assert found.n_prompts == 80


def test_noise_is_not(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    found = figures(pool(0, 80), pool(0, 80, seed=1), sides, monkeypatch)
    assert found.auroc_ci95[0] < 0.5 < found.auroc_ci95[1]
    assert found.split_half_ci95[0] < 0 < found.split_half_ci95[1] and abs(found.split_half) < 0.2
    assert 0.35 < found.resample_cosine < 0.65, "as the docstring says: resamples share their responses"
    assert found.noise_norm == pytest.approx(found.direction.norm, rel=0.4)


def test_the_auroc_is_scipys_fold_by_fold() -> None:
    target, reference = pool(1, 41), pool(0, 37, "q", seed=1)
    found, _ = directions.heldout_auroc(target, reference)
    folds = resampling.folds(target.prompt_ids, reference.prompt_ids)
    won = pairs = 0.0
    for fold in range(resampling.FOLDS):
        a, b = (f == fold for f in folds)
        v = target.resid[~a].mean(0) - reference.resid[~b].mean(0)
        won += mannwhitneyu(target.resid[a] @ v, reference.resid[b] @ v).statistic
        pairs += a.sum() * b.sum()
    assert found == pytest.approx(won / pairs, abs=1e-6)


def test_what_the_prompt_alone_tells() -> None:
    assert prompt_auroc(pool(0, 30), pool(0, 30)) == 0.5
    assert prompt_auroc(pool(0, 30), pool(0, 30, "other")) == 1.0
    some = Pool(np.zeros((3, 2)), np.array(["a", "a", "b"]), np.ones(3))
    rest = Pool(np.zeros((3, 2)), np.array(["a", "b", "b"]), np.ones(3))
    assert prompt_auroc(some, rest) == pytest.approx((2 * 2 + 2 * 0.5 * 1 + 1 * 0.5 * 2) / 9)


def test_too_few_prompts_give_none_and_no_error(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    found = figures(pool(1, 3), pool(0, 3, seed=1), sides, monkeypatch)
    assert found.auroc is None and found.auroc_ci95 is None
    lone = figures(pool(1, 1, "x"), pool(0, 9, seed=1), sides, monkeypatch)
    assert lone.split_half is None and lone.split_half_ci95 is None


def test_results_do_not_depend_on_the_order_of_rows(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pool(1, 40), pool(0, 40, seed=1)
    order = RNG.permutation(40)
    shuffled = Pool(b.resid[order], b.prompt_ids[order], b.weights)
    one, other = (figures(a, x, sides, monkeypatch) for x in (b, shuffled))
    assert one.auroc == pytest.approx(other.auroc) and one.noise_norm == pytest.approx(other.noise_norm)


def test_the_interval_of_a_cosine_holds_the_planted_one_and_narrows_with_prompts() -> None:
    def pair(n: int, seed: int, second: float) -> tuple[Pool, Pool]:
        target = pool(3, n, seed=seed)
        target.resid[:, 1] += second
        return target, pool(0, n, seed=seed + 1)

    wide, narrow = (directions.cosine_interval(pair(n, 1, 0.0), pair(n, 3, 3.0)) for n in (20, 400))
    assert narrow[0] < 2**-0.5 < narrow[1] and narrow[1] - narrow[0] < (wide[1] - wide[0]) / 2


def test_cosine_table() -> None:
    x, y, zero = (Direction(n, "m", 1, np.array(v)) for n, v in
                  {"x": [1.0, 0], "y": [1.0, 1.0], "zero": [0.0, 0.0]}.items())
    table = cosine_table({"x": x, "y": y, "zero": zero})
    assert table.height == 9
    assert table["cosine"].to_list()[:5] == pytest.approx([1, 2**-0.5, None, 2**-0.5, 1])


def test_layers_and_features_that_are_not_there(sides: Sides, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="layer 9 is not cached"):
        measure(sides, 9)
    bare = Cache.open(make_cache(tmp_path / "bare.h5", with_saes=False))
    with pytest.raises(CacheError, match="cached without an SAE"):
        feature_differences(Sides(sides.contrast, bare, bare), 1)
