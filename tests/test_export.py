"""Tables as files: what is written reads back, and a failed write leaves the old file."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from core.analysis.export import write_table
from core.errors import PresetError

TABLE = pl.DataFrame({"layer": [1, 1], "feature": [0, 2], "effect_size": [0.5, None], "tokens": [["a", " b"], []]})


def test_parquet_and_json_read_back_and_csv_is_flat(tmp_path: Path) -> None:
    for suffix, read in ((".parquet", pl.read_parquet), (".json", pl.read_json)):
        path = tmp_path / f"table{suffix}"
        write_table(TABLE, path)
        assert read(path).select(TABLE.columns).to_dicts() == TABLE.to_dicts()
    write_table(TABLE, tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text().splitlines()[1] == "1,0,0.5,a |  b"


def test_bad_targets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PresetError, match=".xlsx"):
        write_table(TABLE, tmp_path / "table.xlsx")
    with pytest.raises(PresetError, match="no such folder"):
        write_table(TABLE, tmp_path / "none" / "table.csv")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.parquet"
    write_table(TABLE, path)
    before = path.read_bytes()

    def broken(self: pl.DataFrame, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pl.DataFrame, "write_parquet", broken)
    with pytest.raises(OSError):
        write_table(TABLE, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
