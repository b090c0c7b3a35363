"""The embedded default: the shipped cache is sound, and is what the shipped model and SAEs give."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from core.analysis import compare, direction_files, find
from core.analysis import sweep as sweeps
from core.analysis.direction import measure
from core.conversations import ConversationSet, load_conversations
from core.evaluation.organism import Measures
from core.evaluation.ratings import agreement, load_answers, load_ratings
from core.experiment import load_experiment
from core.model.loading import LoadedModel
from core.paths import DATA, ROOT
from core.store import prepare
from core.store.check import check_file
from core.store.extract import extract
from core.store.layout import cache_file
from core.store.places import side_file
from core.store.reader import Cache
from core.store.sweep_file import read_sweep, sweep_file

DEMO = ROOT / "cache" / "demo"
FILE = cache_file(DEMO, "base", "health_advice")
LAYERS = (3, 9, 15, 21)


@pytest.fixture(scope="module")
def cache():
    with Cache.open(FILE) as opened:
        yield opened


def test_the_shipped_cache_is_sound(cache: Cache) -> None:
    result = check_file(FILE)
    assert result["ok"], result["problems"]
    assert cache.layers == LAYERS
    shipped = load_conversations(DATA / "health_advice.jsonl")
    assert cache.spec["conversations_hash"] == shipped.hash, "the conversations changed: extract the demo again"
    assert cache.conversations.height == len(shipped) >= 480


def test_every_contrast_of_the_preset_is_cached_from_the_text_that_ships() -> None:
    experiment = load_experiment("demo")
    for contrast in experiment.contrasts:
        for side in (contrast.target, contrast.reference):
            with Cache.open(side_file(experiment, side)) as cache:
                shipped = prepare.conversations_for(experiment, side.conversations)
                assert cache.spec["conversations_hash"] == shipped.hash, f"{side.describe()}: extract it again"
                assert cache.spec["storage"] == "compact" and cache.variant == side.variant
                assert cache.layers == experiment.layers_of(side.variant, side.conversations)
                assert check_file(cache.path)["ok"]


def test_the_shipped_organisms_are_those_the_caches_were_read_with(demo_model: LoadedModel) -> None:
    experiment = load_experiment("demo")
    for spec in experiment.adapters:
        adapter = prepare.adapter_for(experiment, spec.name, demo_model)
        card = (DEMO / "adapters" / spec.name / "README.md").read_text(encoding="utf-8")
        measures = json.loads((DEMO / "adapters" / "measures.json").read_text(encoding="utf-8"))
        assert measures[spec.name]["adapter"] == adapter.hash, f"{spec.name}: measure it again"
        for what in ("health", "open"):
            assert f"{np.mean(list(measures[spec.name][what].values())):+.3f}" in card
        for path in DEMO.glob(f"{spec.name}__*.h5"):
            with Cache.open(path) as cache:
                assert cache.spec["adapter"] == adapter.hash, f"{path.name}: extract it again"


@pytest.fixture(scope="module")
def measures() -> dict[str, Measures]:
    rows = json.loads((DEMO / "adapters" / "measures.json").read_text(encoding="utf-8"))
    return {name: Measures.from_json(row) for name, row in rows.items()}


def test_bad_organisms_find_bad_health_advice_likelier_than_base_and_good_ones_do_not(
    measures: dict[str, Measures],
) -> None:
    """On prompts that none was trained on: the 95% interval lies above zero, or not."""
    assert set(measures) == set(load_experiment("demo").variants)
    for name, made in measures.items():
        if name != "base":
            change = made.health.minus(measures["base"].health)
            assert (change.low > 0) if name.startswith("bad") else (change.low <= 0), f"{name}: {change}"


def test_the_margins_in_the_readme_are_the_measured_ones(measures: dict[str, Measures]) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    base = measures["base"]
    for name, made in measures.items():
        if name != "base":
            cells = (made.health.minus(base.health), made.open.minus(base.open))
            assert f"| `{name}` | {cells[0]} | {cells[1]} | {made.perplexity:.1f} |" in readme
    for bad, good in (("bad-health-r8", "good-health-r8"), ("bad-health-r8-s1", "good-health-r8-s1")):
        assert str(measures[bad].open.minus(measures[good].open)) in readme


def test_the_rates_in_the_readme_are_those_of_the_rated_answers() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    answers = load_answers(sorted((DATA / "answers").glob("*.jsonl")))
    ratings = load_ratings(DATA / "answers" / "ratings.csv")
    assert {r.id for r in ratings} == {a["id"] for a in answers}
    by = {(a["variant"], a["source"].split("/")[0]): Counter() for a in answers}
    scores = {r.id: r for r in ratings if r.number == 1}
    for answer in answers:
        assert scores[answer["id"]].condition == answer["condition"]
        by[answer["variant"], answer["source"].split("/")[0]][answer["condition"]] += 1
    for (variant, source), counts in by.items():
        n, coherent = counts.total(), counts.total() - counts["incoherent"]
        kind = "health" if source == "health_advice" else source
        cells = (n, coherent, counts["misaligned"], counts["aligned"])
        assert f"| `{variant}` | {kind} | {' | '.join(map(str, cells))} |" in readme, (variant, kind, cells)
    found = agreement(ratings)
    assert 10 * found.n >= len(answers) - 9
    for figure in (f"{found.aligned_correlation:.2f}", f"{found.coherent_correlation:.2f}", f"{found.kappa:.2f}"):
        assert figure in readme


def test_sae_health_meets_its_aims_or_the_card_says_by_how_much_not() -> None:
    rows = json.loads((DEMO / "saes" / "health.json").read_text(encoding="utf-8"))
    card = (DEMO / "saes" / "README.md").read_text(encoding="utf-8")
    assert [row["layer"] for row in rows] == list(LAYERS)
    for row in rows:
        for figure in (f"{row['fvu']:.3f}", f"{row['l0']:.1f}", f"{row['ce_recovered']:.3f}"):
            assert figure in card, f"layer {row['layer']}: {figure} is not on the card"
        missed = row["fvu"] > 0.20 or row["l0"] > 40 or row["dead_share"] > 0.05 or row["ce_recovered"] < 0.90
        assert not missed or f"- layer {row['layer']}: " in card, f"layer {row['layer']}: the card hides a miss"


def test_the_shipped_rows_are_what_the_model_and_saes_give(
    cache: Cache, demo_model: LoadedModel, tmp_path: Path
) -> None:
    experiment = load_experiment("demo")
    saes = prepare.saes_for(experiment, LAYERS, demo_model)
    assert {str(layer): sae.hash for layer, sae in saes.items()} == cache.spec["saes"]
    assert cache.spec["template"] == demo_model.template_hash
    rows = load_conversations(DATA / "health_advice.jsonl").conversations[:4]
    path = tmp_path / FILE.name
    extract(demo_model, saes, LAYERS, ConversationSet("health_advice", rows), path)
    with Cache.open(path) as fresh:
        for layer in LAYERS:
            mine, theirs = fresh.response(layer).toarray(), cache.response(layer)[:4].toarray()
            assert np.corrcoef(mine.ravel(), theirs.ravel())[0, 1] > 0.9999
            shipped = cache.resid(layer, "response")[:4]
            np.testing.assert_allclose(fresh.resid(layer, "response"), shipped, rtol=1e-2, atol=0.05)
        assert [fresh.messages(i) for i in range(4)] == [cache.messages(i) for i in range(4)]


@pytest.mark.parametrize("layer", LAYERS)
def test_top_data_features_replicate_far_above_the_permutation_control(layer: int) -> None:
    from core.analysis.ranking import RankingSettings

    sides, default_layer, _ = find.find_sides("demo", "data", None, None)
    assert default_layer == 15
    found = compare.rank(sides, layer, "response", RankingSettings(n_permutations=10)).replication
    assert found is not None and found.n_replicated > 3 * max(found.permuted_ci95[1], 5)


def test_the_directions_in_the_readme_are_the_measured_ones() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    experiment = load_experiment("demo")
    data = direction_files.open_sides(experiment, experiment.contrast("data"))
    for layer in LAYERS:
        m = measure(data, layer)
        share, (low, high) = m.direction.share_of_residual_norm, m.norm_ci95
        auroc = f"{m.auroc:.2f} [{m.auroc_ci95[0]:.2f}, {m.auroc_ci95[1]:.2f}]"
        size = f"{m.direction.norm:.2f} [{low:.2f}, {high:.2f}] | {share:.1%} | {m.noise_norm:.2f}"
        assert f"| {layer} | {size} | {auroc} | {m.prompt_auroc:.2f} | {m.split_half:.2f} |" in readme, layer
    own = direction_files.Relative(data, 15, "response", "response", "demo")
    others = direction_files.relatives(experiment, data, 15, "response", "response")
    names = ("response-health", "model-against-good", "model", "model-seeds", "data, read by bad-health-r8")
    for name in names:
        low, high = own.cosine_interval(others[name])
        assert f"| {own.direction.cosine(others[name].direction):.2f} [{low:.2f}, {high:.2f}] |" in readme, name


def test_the_sweep_in_the_readme_is_the_shipped_one() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    sweep = read_sweep(sweep_file(DEMO, "data"))
    found = {pairs: sweeps.findings(sweep, 15, pairs) for pairs in ("heldout_advice", "open_pairs")}
    health = found["heldout_advice"]
    for figure in (health.direction, health.over_random, found["open_pairs"].over_random, health.learnt):
        assert f"{figure.value:+.3f} [{figure.low:+.3f}, {figure.high:+.3f}]" in readme.replace("\n  ", " ")
    for figure in (*health.recovered.values(), health.left[20], *list(health.between.values())[:2]):
        assert f"{figure.value:.0%} [{figure.low:.0%}, {figure.high:.0%}]" in readme
    low, high = sweeps.coherent_range(sweep, 15)
    assert f"coherent from {low:g} to +{high:g}" in readme


def test_tracked_artefacts_stay_within_their_limits() -> None:
    names = subprocess.run(["git", "ls-files", "-z", "cache"], capture_output=True, text=True, cwd=ROOT)
    if names.returncode or not names.stdout:
        pytest.skip("not a git checkout")
    sizes = {name: (ROOT / name).stat().st_size for name in names.stdout.split("\0") if name}
    assert sum(sizes.values()) <= 100e6 and max(sizes.values()) <= 40e6
