"""Scores on disk, by content: the same prompt put to the same judge is never paid for twice, also after a kill.

`cache/judgements/<judge>.jsonl`, a line a score, appended and flushed as scores come in. A line holds everything that a
score depends on (judge, settings, hash of the judge prompt, hash of the whole prompt). No torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from core import paths
from core.errors import CacheError
from core.evaluation.readings import Reading, Stamp


def score_file(stamp: Stamp, folder: Path | None = None) -> Path:
    """Where the scores of a judge lie."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stamp.id).strip("-")[:80]
    return (folder or paths.CACHE / "judgements") / f"{name}.jsonl"


def score_key(stamp: Stamp, prompt: str) -> str:
    """SHA-256 of who judges, how, and the whole prompt."""
    text = json.dumps([stamp.id, stamp.settings, prompt], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


class ScoreStore:
    """The scores of one file, open for one run; see `open_store`. `put` may be called from several threads."""

    def __init__(self, path: Path, file: IO[str], found: dict[str, Reading]):
        self.path, self._file, self._found = path, file, found
        self._writing = threading.Lock()

    def __len__(self) -> int:
        return len(self._found)

    def get(self, key: str) -> Reading | None:
        return self._found.get(key)

    def put(self, key: str, reading: Reading, stamp: Stamp, prompt_hash: str) -> None:
        """Keep a score, on disk before this returns; a key that is there already is left as it is."""
        with self._writing:
            if key in self._found:
                return
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            line = {"key": key, "judge": stamp.id, "settings": stamp.settings, "prompt": prompt_hash,
                    **asdict(reading), "created": now}  # fmt: skip
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            self._found[key] = reading


@contextmanager
def open_store(path: Path) -> Iterator[ScoreStore]:
    """The scores in `path`, to be added to; one writer at a time.

    A last line that a kill left half-written is cut off. Raises `CacheError` for a file that is in use or damaged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise CacheError(f"{path}: another run is writing scores to it; wait for that one to end.") from None
    try:
        found = _read(path)
        with open(path, "a", encoding="utf-8") as file:
            yield ScoreStore(path, file, found)
    finally:
        lock.release()


def _read(path: Path) -> dict[str, Reading]:
    if not path.is_file():
        return {}
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    found = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
            shares = {int(k): float(v) for k, v in row["distribution"].items()}
            kept = {k: row[k] for k in ("score", "kind", "said", "why", "mass", "tokens_in", "tokens_out")}
            found[row["key"]] = Reading(**kept, distribution=shares)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CacheError(f"{path}:{number}: is no score of this program; remove the line or the file.") from None
    return found
