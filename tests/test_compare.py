"""From cache files to tables: sides, planted features, residual separation; a mismatch is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from make_cache import EQUAL, FORMAT, RAISED, SUPPRESSED, make_cache

from core.analysis import compare, depth, feature_table
from core.analysis.compare import Sides
from core.analysis.ranking import RankingSettings
from core.errors import CacheError, CacheMismatch
from core.specs import ContrastSpec, Side
from core.store.reader import Cache

QUICK = RankingSettings(n_permutations=0)


def contrast(target: str = "misaligned", reference: str = "aligned", variant: str = "base") -> ContrastSpec:
    name = "health_advice"
    return ContrastSpec("data", "data", Side(variant, name, target), Side("base", name, reference))


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Sides:
    cache = Cache.open(make_cache(tmp_path_factory.mktemp("compare") / "one.h5"))
    return Sides(contrast(), cache, cache)


def test_planted_features_stand_at_the_ends(sides: Sides) -> None:
    table = feature_table.hide_format(compare.rank(sides, 1, "response", QUICK).table)
    assert feature_table.top(table, 1)["feature"].to_list() == [RAISED]
    assert feature_table.bottom(table, 1)["feature"].to_list() == [SUPPRESSED]
    assert FORMAT not in table["feature"]


def test_swapping_the_sides_turns_the_signs(sides: Sides) -> None:
    swapped = Sides(contrast("aligned", "misaligned"), sides.target, sides.reference)
    a, b = (compare.rank(s, 1, "response", QUICK).table.sort("feature")["mean_diff"] for s in (sides, swapped))
    np.testing.assert_allclose(a.to_numpy(), -b.to_numpy(), atol=1e-12)


def test_sides_about_different_subjects_are_said_to_be_so_unless_paired(tmp_path: Path) -> None:
    unpaired = RankingSettings(n_permutations=0, pairing="unpaired")
    for sources, says in ((("open/money", "health/skin"), True), (("open/money", "open/power"), False)):
        with Cache.open(make_cache(tmp_path / f"{says}.h5", sources=sources)) as cache:
            both = Sides(contrast(), cache, cache)
            notes = " ".join(compare.rank(both, 1, "response", unpaired).notes)
            assert says == (
                "100% of the misaligned responses are from health, 100% of the aligned responses are from open" in notes
            )
            assert "different kinds of question" not in " ".join(compare.rank(both, 1, "response", QUICK).notes)


def test_values_are_the_cache_s_own_rows(sides: Sides) -> None:
    values = compare.feature_values(sides, 1, "response", EQUAL)
    dense = sides.target.response(1).toarray()[:, EQUAL]
    for name in ("misaligned", "aligned"):
        rows = np.flatnonzero(sides.target.conversations["condition"].to_numpy() == name)
        part = values.filter(values["side"] == name)
        assert part["row"].to_list() == rows.tolist()
        np.testing.assert_allclose(part["activation"].to_numpy(), dense[rows])


def test_the_position_chooses_the_matrix(sides: Sides) -> None:
    values = compare.feature_values(sides, 1, "last_prompt", EQUAL)["activation"].to_numpy()
    rows = compare.feature_values(sides, 1, "last_prompt", EQUAL)["row"].to_numpy()
    np.testing.assert_allclose(values, sides.target.last_prompt(1).toarray()[rows, EQUAL])


def test_contexts_of_each_side_are_strongest_first(sides: Sides) -> None:
    found = compare.contexts(sides, 1, RAISED)
    for windows, condition in zip(found, ("misaligned", "aligned"), strict=True):
        assert windows and {w.condition for w in windows} == {condition}
        assert [w.value for w in windows] == sorted((w.value for w in windows), reverse=True)


def test_residuals_separate_where_planted_and_not_where_not(sides: Sides) -> None:
    response, share = depth.residual_separation(sides, 1, "response")
    last_prompt, _ = depth.residual_separation(sides, 1, "last_prompt")
    assert response > 0.8 and 0.25 < last_prompt < 0.75  # held out, so noise is no better than a coin
    resid = sides.target.resid(1, "response").astype(float)
    bad = sides.target.conversations["condition"].to_numpy() == "misaligned"
    gap = np.linalg.norm(resid[bad].mean(0) - resid[~bad].mean(0))
    assert share == pytest.approx(gap / np.linalg.norm(resid, axis=1).mean())


def test_depth_counts_what_passes_without_format_features(sides: Sides) -> None:
    found = depth.depth(sides, 1, "response", QUICK)
    table = feature_table.hide_format(compare.rank(sides, 1, "response", QUICK).table)
    passed = table.filter(table["q_value"] < QUICK.alpha)
    assert found.n_raised == (passed["effect_size"] > 0).sum() >= 1
    assert found.max_suppressed == pytest.approx(-table["effect_size"].min())


@pytest.mark.parametrize(("target", "reference", "names"), [
    (Side("base", "x", "misaligned"), Side("base", "x", "aligned"), ("misaligned", "aligned")),
    (Side("bad", "x", "aligned"), Side("base", "x", "aligned"), ("bad", "base")),
    (Side("base", "x"), Side("base", "y"), ("x", "y")),
    (Side("base", "x", "misaligned"), Side("base", "x"), ("target", "reference")),
    (Side("base", "x", source="one"), Side("base", "x", source="two"), ("one", "two")),
])
def test_sides_are_named_by_what_differs(target: Side, reference: Side, names: tuple[str, str]) -> None:
    assert Sides(ContrastSpec("c", "data", target, reference), None, None).names == names


@pytest.fixture
def sourced(sides: Sides) -> Callable[[str, str | None, str | None], Sides]:
    """Sides on the same cache with a source each: prompts p00 to p09 are of `x/one`, p10 to p19 of `x/two`, the rest
    of `xy`."""
    cache, table = sides.target, sides.target.conversations
    number = table["prompt_id"].str.slice(1).cast(int)
    sources = ["x/one" if n < 10 else "x/two" if n < 20 else "xy" for n in number]
    cache.__dict__["conversations"] = table.with_columns(source=pl.Series(sources))

    def make(condition: str = "misaligned", target: str | None = None, reference: str | None = None) -> Sides:
        spec = ContrastSpec("c", "data", Side("base", "health_advice", condition, target),
                            Side("base", "health_advice", "aligned", reference))
        return Sides(spec, cache, cache)

    yield make
    cache.__dict__["conversations"] = table


@pytest.mark.parametrize(("source", "prompts"), [("x", range(20)), ("x/two", range(10, 20)), ("xy", range(20, 30)),
                                                 (None, range(30))])
def test_a_source_keeps_its_own_conversations_and_those_below_it(sourced, source: str | None, prompts: range) -> None:
    one = sourced(target=source, reference=source)
    for cache, side in ((one.target, one.contrast.target), (one.reference, one.contrast.reference)):
        table = cache.conversations[compare.side_rows(cache, side).tolist()]
        assert table["prompt_id"].to_list() == [f"p{n:02d}" for n in prompts]
        assert set(table["condition"]) == {side.condition}
    assert compare.rank(one, 1, "response", QUICK).n_prompts == len(prompts)
    values = compare.feature_values(one, 1, "response", RAISED)
    assert values.height == 2 * len(prompts) and set(values["id"].str.slice(0, 3)) == {f"p{n:02d}" for n in prompts}


def test_contexts_and_residuals_are_of_the_source(sourced) -> None:
    one = sourced(target="x/one", reference="xy")
    for found, prefix in zip(compare.contexts(one, 1, EQUAL), ("x/one", "xy"), strict=True):
        assert {one.target.conversations["source"][w.row] for w in found} <= {prefix}
    whole = compare.contexts(sourced(), 1, EQUAL)
    kept = [compare.contexts(sourced(target=s, reference=s), 1, EQUAL) for s in ("x", "xy")]
    assert [sum(len(k[side]) for k in kept) for side in (0, 1)] == [len(side) for side in whole]
    assert depth.residual_separation(one, 1, "response") != depth.residual_separation(sourced(), 1, "response")


def test_an_absent_source_is_refused_naming_those_there(sourced) -> None:
    with pytest.raises(CacheError, match="no misaligned conversation has source 'x/three'; it holds x/one, x/two, xy"):
        compare.side_rows(sourced().target, Side("base", "health_advice", "misaligned", "x/three"))
    with pytest.raises(CacheError, match="no conversation has source 'o'"):
        compare.side_rows(sourced().target, Side("base", "health_advice", source="o"))


def test_an_absent_condition_or_layer_is_refused(sides: Sides) -> None:
    with pytest.raises(CacheError, match="'good'.*aligned, misaligned"):
        compare.side_rows(sides.target, Side("base", "health_advice", "good"))
    with pytest.raises(CacheError, match="layer 9 is not cached"):
        compare.make_sample(sides.target, Side("base", "health_advice", "aligned"), "a", 9, "response")


def test_two_saes_cannot_be_compared(sides: Sides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Cache.open(make_cache(tmp_path / "other.h5", variant="bad", seed=1))
    both = Sides(contrast("aligned", "aligned", "bad"), other, sides.reference)
    assert compare.rank(both, 1, "response", QUICK).paired
    monkeypatch.setitem(other.spec["saes"], "1", "1" * 64)
    with pytest.raises(CacheMismatch, match="the SAE of layer 1"):
        compare.rank(both, 1, "response", QUICK)
