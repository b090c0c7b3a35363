"""A feature table as a file: Parquet, CSV or JSON by its suffix, written whole or not at all."""

from __future__ import annotations

import io
import os
from pathlib import Path

import polars as pl

from core.errors import PresetError

SUFFIXES = (".parquet", ".csv", ".json")


def flat(table: pl.DataFrame) -> pl.DataFrame:
    """The table with lists joined by ` | `, as CSV has no lists."""
    lists = [name for name, dtype in table.schema.items() if isinstance(dtype, pl.List)]
    return table.with_columns(pl.col(name).cast(pl.List(pl.String)).list.join(" | ") for name in lists)


def parquet_bytes(table: pl.DataFrame) -> bytes:
    """The content of a Parquet file."""
    buffer = io.BytesIO()
    table.write_parquet(buffer)
    return buffer.getvalue()


def write_table(table: pl.DataFrame, path: Path) -> None:
    """Write `table` to `path`. Raises `PresetError` for an unknown suffix or a folder that is not there."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise PresetError(f"{path}: unknown table form {path.suffix!r}; end the name in {', '.join(SUFFIXES)}.")
    if not path.parent.is_dir():
        raise PresetError(f"{path.parent}: no such folder; make it first.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.suffix == ".parquet":
            table.write_parquet(temporary)
        elif path.suffix == ".csv":
            flat(table).write_csv(temporary)
        else:
            table.write_json(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
