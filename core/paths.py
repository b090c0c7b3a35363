"""Where things lie: the checkout's root, what ships in it, the cache. And how a file is written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "core" / "data"
PRESETS = ROOT / "core" / "presets"
CACHE = Path(os.environ.get("EM_MICROSCOPE_CACHE", ROOT / "cache"))


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path` through a temporary name, so that a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`write_whole` of indented JSON; NaN is refused, so the file stays strict JSON."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """`write_whole` of one JSON value a line."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))
