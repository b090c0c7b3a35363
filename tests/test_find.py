"""Sides from a preset's contrast or from files: the right rows on the right side, and one sentence otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
from make_cache import RAISED, SUPPRESSED, make_cache

from core.analysis import compare
from core.analysis.feature_table import hide_format
from core.analysis.find import find_sides
from core.analysis.ranking import RankingSettings
from core.errors import CacheError, PresetError

QUICK = RankingSettings(replication_k=0)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("cache") / "base__health_advice.h5")


def ends(sides: compare.Sides) -> tuple[int, int]:
    ranked = hide_format(compare.rank(sides, 1, "response", QUICK).table).drop_nulls("rank")
    return ranked["feature"][0], ranked["feature"][-1]


def test_a_file_and_condition_on_each_side(file: Path) -> None:
    sides, layer, name = find_sides(None, None, f"{file}:misaligned", f"{file}:aligned")
    assert layer == 2 and "misaligned" in name and ends(sides) == (RAISED, SUPPRESSED)
    swapped, *_ = find_sides(None, None, f"{file}:aligned", f"{file}:misaligned")
    assert ends(swapped) == (SUPPRESSED, RAISED)


def test_a_presets_contrast_in_another_folder(file: Path) -> None:
    sides, layer, name = find_sides("demo", "data", None, None, file.parent)
    assert (layer, name) == (15, "data") and ends(sides) == (RAISED, SUPPRESSED)


def test_what_does_not_make_two_sides(file: Path, tmp_path: Path) -> None:
    half = ("demo", None, None, None), (None, None, str(file), None)
    for arguments in (*half, ("demo", "data", str(file), str(file))):
        with pytest.raises(PresetError, match="preset and a contrast"):
            find_sides(*arguments)
    with pytest.raises(PresetError, match="with itself"):
        find_sides(None, None, str(file), str(file))
    with pytest.raises(CacheError, match="no such cache file"):
        find_sides(None, None, f"{tmp_path / 'none.h5'}:a", f"{file}:aligned")
    sides, *_ = find_sides(None, None, f"{file}:good", f"{file}:aligned")
    with pytest.raises(CacheError, match="condition 'good'"):
        compare.rank(sides, 1, "response", QUICK)
