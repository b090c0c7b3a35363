"""What every HDF5 file of the store has in common: how it is opened, checked, verified and closed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import h5py

from core.errors import CacheError, CacheMismatch
from core.store import layout
from core.store.stored_text import StoredText

REQUIRED_ATTRIBUTES = ("format_version", "fingerprint", "spec", "content_hash", "created")


@dataclass(frozen=True)
class Kind:
    """A file format, and the words that errors use."""

    format: str
    version: int
    name: str
    """With its article: `a cache`."""
    short: str
    """`cache`, as in "no such cache file"."""
    command: str
    """The command that makes such files."""


class StoredFile(StoredText):
    """An open, finished file. Made with `open`; close when done, or use it as a context."""

    KIND: ClassVar[Kind]

    def __init__(self, path: Path, file: h5py.File):
        self.path, self._file = path, file
        self.fingerprint = str(file.attrs["fingerprint"])
        self.spec: dict[str, Any] = json.loads(file.attrs["spec"])
        self.created = str(file.attrs["created"])

    @classmethod
    def open(cls, path: str | Path, expect: Mapping[str, Any] | None = None) -> Self:
        """Open read-only. Raises `CacheError` when the file is missing, incomplete, truncated or of another kind, and
        `CacheMismatch` when it was made under another spec than `expect`."""
        path, command = Path(path), cls.KIND.command
        if not path.is_file():
            hint = "; an unfinished run lies beside it" if partial_folder(path).is_dir() else ""
            raise CacheError(f"{path}: no such {cls.KIND.short} file{hint}; run `python -m core {command}` to make it.")
        try:
            file = h5py.File(path, "r")
        except OSError as error:
            kind = "truncated" if "truncated" in str(error) else "not a readable HDF5 file"
            raise CacheError(f"{path}: the file is {kind}; remove it and {command} again.") from None
        try:
            _check_header(path, file, cls.KIND)
            if expect is not None:
                compare_specs(path, expect, json.loads(file.attrs["spec"]))
            return cls(path, file)
        except BaseException:
            file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def verify(self) -> list[str]:
        """Problems found by reading every byte: check sums, content hash, fingerprint. Empty means sound."""
        try:
            found = layout.content_hash(self._file)
        except OSError as error:
            return [f"a dataset cannot be read ({str(error).splitlines()[0]}); {self.KIND.command} again"]
        stated = self._file.attrs["content_hash"]
        problems = [] if found == stated else [f"content hash is {found[:12]}, the file states {stated[:12]}"]
        if layout.fingerprint(self.spec) != self.fingerprint:
            problems.append("the fingerprint does not belong to the stored spec")
        return problems


def partial_folder(path: Path) -> Path:
    """Where the shards of an unfinished extraction of `path` lie."""
    return path.with_name(path.name + ".partial")


def compare_specs(path: Path, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise `CacheMismatch` naming the first field that changes a number and differs."""
    for field in sorted({*expected, *found} - set(layout.NOT_FINGERPRINTED)):
        if expected.get(field) != found.get(field):
            raise CacheMismatch(path, field, expected.get(field), found.get(field))


def _check_header(path: Path, file: h5py.File, kind: Kind) -> None:
    """Raise `CacheError` unless the file is whole and of this kind."""
    if file.attrs.get("format") != kind.format:
        raise CacheError(
            f"{path}: this HDF5 file is not {kind.name} of EM Microscope; give one that `{kind.command}` wrote."
        )
    if not file.attrs.get("complete", False):
        raise CacheError(f"{path}: the extraction was never finished; remove the file and {kind.command} again.")
    found = int(file.attrs.get("format_version", -1))
    if found != kind.version:
        raise CacheError(f"{path}: format version {found}, this program reads {kind.version}; make it anew.")
    missing = [name for name in REQUIRED_ATTRIBUTES if name not in file.attrs]
    if missing:
        raise CacheError(f"{path}: attributes {', '.join(missing)} are missing; {kind.command} again.")
