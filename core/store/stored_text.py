"""The conversations and their tokens as every HDF5 file of the store keeps them: table, ids, roles, texts."""

from __future__ import annotations

from functools import cached_property

import h5py
import numpy as np
import polars as pl

from core.conversations import ROLES

#: Columns of the table of conversations that every file has.
COLUMNS = ("id", "prompt_id", "condition", "source", "n_tokens", "n_response_tokens")
#: Those that some files have as well.
FURTHER = ("set",)


class StoredText:
    """The part of an open file that is about text."""

    _file: h5py.File

    @cached_property
    def conversations(self) -> pl.DataFrame:
        """One row a conversation, in file order; row numbers index every matrix."""
        group = self._file["conversations"]
        names = (*COLUMNS, *(name for name in FURTHER if name in group))
        columns = {
            name: group[name].asstr()[...] if h5py.check_string_dtype(group[name].dtype) else group[name][...]
            for name in names
        }
        return pl.DataFrame({name: list(v) if v.dtype == object else v for name, v in columns.items()})

    def tokens(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and roles of one conversation."""
        group = self._file["tokens"]
        begin, end = (int(i) for i in group["offsets"][row : row + 2])
        return group["ids"][begin:end], group["roles"][begin:end]

    def messages(self, row: int) -> tuple[tuple[str, str], ...]:
        """Role and text of each turn, joined from the stored tokens; template tokens are left out."""
        ids, roles = self.tokens(row)
        turns: list[tuple[int, list[str]]] = []
        for token, role in zip(ids.tolist(), roles.tolist(), strict=True):
            if role == 0:
                turns.append((0, []))
            elif turns and turns[-1][0] == role:
                turns[-1][1].append(self._token_text[token])
            else:
                turns.append((role, [self._token_text[token]]))
        return tuple((ROLES[role], "".join(parts).strip()) for role, parts in turns if role)

    @cached_property
    def _token_text(self) -> dict[int, str]:
        group = self._file["tokens"]
        texts = group["vocab_text"].asstr()[...]
        return dict(zip(group["vocab_ids"][...].tolist(), texts.tolist(), strict=True))
