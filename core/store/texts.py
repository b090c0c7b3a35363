"""Plain-text files (JSONL with `text`) -> texts. Knows no chat template and no model."""

from __future__ import annotations

import json
from pathlib import Path

from core.conversations import bad_row, encoding_error, text_lines
from core.errors import BadConversation
from core.paths import DATA

#: Texts that ship: short passages on many subjects, none of them advice on health.
UNRELATED_TEXT = DATA / "unrelated_text.jsonl"


def load_texts(path: str | Path, limit: int | None = None) -> tuple[str, ...]:
    """The `text` of every line of a JSONL file, the first `limit` of them.

    Raises `BadConversation` with file and line at the first row that is not an object with a text `text` or is not
    UTF-8; and when the file is missing or empty.
    """
    path = Path(path)
    if not path.is_file():
        raise BadConversation(f"{path}: no such file; give the path of a .jsonl file of objects with a `text`.")
    found: list[str] = []
    for line, raw in text_lines(path):
        if limit is not None and len(found) >= limit:
            break
        if isinstance(raw, UnicodeDecodeError):
            raise encoding_error(path, line, raw)
        if not raw.strip():
            continue
        try:
            row = json.loads(raw)
        except json.JSONDecodeError as error:
            raise bad_row(path, line, f"is not valid JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str) or not row["text"].strip():
            raise bad_row(path, line, "has no text in `text`; each line is an object with a `text`")
        found.append(row["text"])
    if not found:
        raise BadConversation(f"{path}: holds no text; give objects with a `text`, one a line.")
    return tuple(found)
