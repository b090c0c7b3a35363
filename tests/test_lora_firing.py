"""core/analysis/lora_firing.py on planted scalars, against scipy and scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from make_firing import make_firing
from scipy import stats
from sklearn.metrics import roc_auc_score

from core.analysis.lora import components
from core.analysis.lora_firing import (
    Group,
    Question,
    auroc,
    carried,
    component_auroc,
    firing_table,
    probe,
    probe_table,
    questions,
)
from core.errors import NotEnoughData
from core.model.adapter_files import AdapterFactors, LoraFactors
from core.store.firing_file import Firing

D, N = 12, 40
#: Planted: tells conditions apart in health alone; in both sets; tells the sets apart; tells nothing.
NARROW, BROAD, SUBJECT, NOTHING = 0, 1, 2, 3


def adapter() -> AdapterFactors:
    rng = np.random.default_rng(0)
    modules = [LoraFactors(layer, "mlp.down_proj", rng.standard_normal((2, 8)), rng.standard_normal((D, 2)), 1.0)
               for layer in (1, 2)]  # fmt: skip
    return AdapterFactors("bad", "", "0" * 64, "", tuple(modules))


def planted(n: int = N, seed: int = 0) -> dict[tuple[str, str], np.ndarray]:
    rng = np.random.default_rng(seed)
    found = {}
    for name in ("health", "open"):
        topic = rng.standard_normal((n, 4))  # a prompt's own part, alike in both of its answers
        for condition in ("misaligned", "aligned"):
            values = topic + 0.3 * rng.standard_normal((n, 4))
            bad = condition == "misaligned"
            values[:, NARROW] += 1.0 * bad * (name == "health")
            values[:, BROAD] += 1.5 * bad
            values[:, SUBJECT] += 4.0 * (name == "open")
            found[name, condition] = values
    return found


@pytest.fixture(scope="module")
def means() -> dict:
    return planted()


@pytest.fixture(scope="module")
def firing(means: dict, tmp_path_factory: pytest.TempPathFactory):
    path = make_firing(tmp_path_factory.mktemp("f") / "bad__health+open.h5", components(adapter()), means, d_model=D)
    with Firing.open(path) as found:
        yield found


def asked(firing: Firing) -> dict[str, Question]:
    return {q.name: q for q in questions(firing)}


HEALTH, OPEN = "misaligned or aligned, health", "misaligned or aligned, open"
SETS = "health or open, aligned"


def test_questions_follow_from_the_sets_and_conditions(firing: Firing) -> None:
    assert list(asked(firing)) == [HEALTH, OPEN, SETS]
    assert asked(firing)[SETS].target == Group("health", "aligned")


def test_tests_are_scipys_and_find_what_was_planted(firing: Firing, means: dict) -> None:
    table = firing_table(firing, asked(firing)[HEALTH])
    a, b = (means["health", c].astype(np.float32).astype(float) for c in ("misaligned", "aligned"))
    for i, row in enumerate(table.iter_rows(named=True)):
        assert row["mean_target"] == pytest.approx(a[:, i].mean(), rel=1e-5)
        assert row["effect_size"] == pytest.approx((a - b)[:, i].mean() / (a - b)[:, i].std(ddof=1), rel=1e-5)
        assert row["p_value"] == pytest.approx(stats.wilcoxon((a - b)[:, i], method="exact").pvalue, rel=1e-6)
        won = stats.mannwhitneyu(a[:, i], b[:, i]).statistic / N**2
        assert row["auroc"] == pytest.approx(won)
        assert (row["n_target"], row["n_reference"], row["n_prompts"]) == (N, N, N)
    assert (table["q_value"] < 0.01).to_list() == [True, True, False, False]
    np.testing.assert_allclose(table["q_value"], stats.false_discovery_control(table["p_value"]))
    assert (firing_table(firing, asked(firing)[OPEN])["q_value"] < 0.01).to_list() == [False, True, False, False]


def test_unpaired_sets_are_compared_by_prompt_as_well(firing: Firing, means: dict) -> None:
    table = firing_table(firing, asked(firing)[SETS])
    a, b = (means[s, "aligned"] for s in ("health", "open"))
    p = [stats.mannwhitneyu(a[:, i], b[:, i], method="asymptotic").pvalue for i in range(4)]
    np.testing.assert_allclose(table["p_value"], p, rtol=1e-4)
    assert table["effect_size"][SUBJECT] < -2 and abs(table["effect_size"][NOTHING]) < 1
    assert table["n_prompts"][0] == 2 * N


def test_several_responses_of_a_prompt_count_once(tmp_path: Path) -> None:
    one = planted(10)
    twice = {key: np.concatenate([v, v]) for key, v in one.items()}
    prompts = {key: [f"{key[0]}-p{i % 10}" for i in range(20)] for key in one}
    tables = []
    for name, given, ids in (("one", one, None), ("twice", twice, prompts)):
        path = make_firing(tmp_path / f"{name}.h5", components(adapter()), given, d_model=D, prompts=ids)
        with Firing.open(path) as firing:
            tables.append(firing_table(firing, asked(firing)[HEALTH]))
    assert tables[1]["n_target"][0] == 20 and tables[1]["n_prompts"][0] == 10
    for column in ("effect_size", "p_value", "mean_target"):
        np.testing.assert_allclose(tables[0][column], tables[1][column], rtol=1e-5)


def test_auroc_is_scikit_learns_and_prompts_are_drawn_whole(firing: Firing, means: dict) -> None:
    found = component_auroc(firing, asked(firing)[HEALTH], BROAD)
    a, b = (means["health", c][:, BROAD] for c in ("misaligned", "aligned"))
    assert found.value == pytest.approx(roc_auc_score(np.r_[np.ones(N), np.zeros(N)], np.r_[a, b]))
    assert found.ci95[0] < found.value < found.ci95[1] and found.n_prompts == N
    few = np.repeat(["x", "y"], 20)
    wide, narrow = auroc(a, b, few, few), auroc(a, b, np.arange(N).astype(str), np.arange(N).astype(str))
    assert wide.n_prompts == 2 and np.ptp(narrow.ci95) > 0
    paired = auroc(a, b, np.arange(N).astype(str), (np.arange(N) + N).astype(str))
    assert np.ptp(paired.ci95) > np.ptp(narrow.ci95), "unpaired prompts are drawn apart, so their topics add noise"


def test_a_probe_finds_what_is_there_and_nothing_else(firing: Firing) -> None:
    q = asked(firing)
    assert probe(firing, q[HEALTH], 1).auroc.value > 0.9
    assert probe(firing, q[OPEN], 1).auroc.value > 0.75
    assert probe(firing, q[SETS], 2).auroc.value > 0.95
    idle = probe(firing, q[HEALTH], 2).auroc
    assert idle.ci95[0] < 0.5 < idle.ci95[1]
    assert probe(firing, q[HEALTH]).n_scalars == 4 and probe(firing, q[HEALTH], 1).n_scalars == 2


def test_no_prompt_is_on_both_sides_of_a_fold(firing: Firing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that only remember a prompt's own part, which both of its answers share, must not tell them apart."""
    from core.analysis import lora_firing as module

    seen = []
    own = module._fit

    def fit(target: np.ndarray, reference: np.ndarray):
        seen.append((len(target), len(reference)))
        return own(target, reference)

    monkeypatch.setattr(module, "_fit", fit)
    probe(firing, asked(firing)[HEALTH])
    assert seen == [(32, 32)] * 5  # each fold leaves out 8 prompts with both of their answers


def test_a_carried_probe_says_whether_two_distinctions_are_one(firing: Firing) -> None:
    q = asked(firing)
    found = carried(firing, q[HEALTH], q[OPEN], 1)
    assert found.auroc.value > 0.65 and found.trained_on == HEALTH and found.question == OPEN
    with pytest.raises(NotEnoughData, match="share prompts"):
        carried(firing, q[HEALTH], q[SETS])


def test_the_table_has_every_probe_that_can_be_had(firing: Firing) -> None:
    table = probe_table(firing)
    assert table.height == 3 * 5 and table["layer"].to_list()[:5] == [None] * 5
    assert (table["low"] <= table["auroc"] + 0.05).all() and set(table["layer"].drop_nulls()) == {1, 2}


def test_labels_shuffled_within_prompts_tell_nothing(tmp_path: Path, means: dict) -> None:
    rng = np.random.default_rng(1)
    shuffled = {k: v.copy() for k, v in means.items()}
    for name in ("health", "open"):
        flip = rng.random(N) < 0.5
        a, b = (means[name, c] for c in ("misaligned", "aligned"))
        shuffled[name, "misaligned"][flip], shuffled[name, "aligned"][flip] = b[flip], a[flip]
    path = make_firing(tmp_path / "x.h5", components(adapter()), shuffled, d_model=D)
    with Firing.open(path) as firing:
        q = asked(firing)
        assert (firing_table(firing, q[HEALTH])["q_value"] > 0.05).all()
        assert 0.3 < probe(firing, q[HEALTH]).auroc.value < 0.7


def test_too_few_prompts_are_refused_in_words(tmp_path: Path) -> None:
    for n, says in ((1, "fewer than two prompts"), (4, "has 4 prompts on one side; a probe needs 10")):
        path = make_firing(tmp_path / f"{n}.h5", components(adapter()), planted(n), d_model=D)
        with Firing.open(path) as firing:
            with pytest.raises(NotEnoughData, match=says):
                (firing_table if n == 1 else probe)(firing, asked(firing)[HEALTH])
            assert probe_table(firing).height == 0
