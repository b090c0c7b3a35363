"""One writer to a file at a time; readers need no lock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from core.errors import CacheError


@contextmanager
def one_writer(path: Path) -> Iterator[None]:
    """Within the block no other process writes `path`; its folder is made. Raises `CacheError` when one does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(path.name + ".lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise CacheError(f"{path}: another process is writing this file; wait for it, or stop it first.") from None
    try:
        yield
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)
