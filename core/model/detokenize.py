"""Token by token -> text that only ever grows: a character of several tokens appears when its last token is there.

Knows a tokenizer's `decode` and nothing of models.
"""

from __future__ import annotations

from typing import Any

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """The text of a growing list of tokens, special tokens left out.

    Each token is decoded together with those since the last but one that completed a character, so that blanks at
    the start of words come out as in the whole text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._from, self._shown = 0, 0

    def push(self, token: int) -> str:
        """What the token adds; empty while a character is unfinished."""
        self._ids.append(token)
        return self._new(final=False)

    def close(self) -> str:
        """What was held back: an unfinished character reads U+FFFD."""
        return self._new(final=True)

    def _new(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._from : self._shown])
        now = self._decode(self._ids[self._from :])
        if len(now) <= len(before) or (now.endswith(_UNFINISHED) and not final):
            return ""
        self._from, self._shown = self._shown, len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ""
