"""Labels a user writes for features: one JSON file beside the caches, written whole, and joined to feature tables.

A label belongs to an SAE's feature, not to a cache file: its key is `release|sae_id|feature`, so it outlives a new
extraction. Knows nothing of Streamlit. Writers in one process take turns; two processes writing at the very same
moment are not kept apart, and the later one wins for the feature it wrote.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import polars as pl

from core.errors import MicroscopeError
from core.paths import write_json
from core.store.reader import Cache

FILE = "labels.json"
FORMAT = "em-microscope-labels"
VERSION = 1
MAX_LENGTH = 200

#: Columns of a feature table that say what a feature is, in an export.
NAMING = ("label", "fires_on", "tokens")

#: How many texts name a feature that has no label.
NAME_TOKENS = 4

_writing = threading.Lock()


class LabelError(MicroscopeError):
    """A label cannot be kept."""


@dataclass(frozen=True)
class Labels:
    """Labels by key, as read from one file, and one sentence when the file could not be read."""

    path: Path
    texts: dict[str, str] = field(default_factory=dict)
    problem: str | None = None

    def get(self, release: str, sae_id: str, feature: int) -> str:
        return self.texts.get(key(release, sae_id, feature), "")

    def of_sae(self, release: str, sae_id: str) -> dict[int, str]:
        """Feature index -> label, for one SAE."""
        head = key(release, sae_id, 0)[:-1]
        return {int(k[len(head):]): v for k, v in self.texts.items() if k.startswith(head)}


def key(release: str, sae_id: str, feature: int) -> str:
    """`release|sae_id|feature`; a bar inside a name is written as %7C so that keys stay apart."""
    return "|".join([*(part.replace("%", "%25").replace("|", "%7C") for part in (release, sae_id)), str(int(feature))])


def read_labels(folder: Path) -> Labels:
    """Labels of `folder/labels.json`; none when there is no file. A damaged file gives no labels and a `problem`."""
    path = Path(folder) / FILE
    try:
        raw = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Labels(path)
    except (OSError, UnicodeDecodeError) as error:
        return Labels(path, problem=_problem(path, f"cannot be read ({error})"))
    try:
        value = json.loads(raw)
    except json.JSONDecodeError as error:
        return Labels(path, problem=_problem(path, f"is not valid JSON ({error.msg} on line {error.lineno})"))
    found = value.get("labels") if isinstance(value, dict) else None
    if not isinstance(found, dict) or value.get("format") != FORMAT:
        return Labels(path, problem=_problem(path, "is not a label file of this program"))
    if value.get("version") != VERSION:
        return Labels(path, problem=_problem(path, f"has version {value.get('version')!r}, not {VERSION}"))
    texts = {k: v["text"] for k, v in found.items() if _well_formed(k, v)}
    bad = len(found) - len(texts)
    problem = (
        f"{path} has {bad} of {len(found)} labels in an unknown form, which are not shown; mend the file "
        "(the next label written sets it aside and keeps the others)."
    ) if bad else None
    return Labels(path, texts, problem)


def write_label(folder: Path, release: str, sae_id: str, feature: int, text: str) -> Labels:
    """Keep `text` as the feature's label; an empty text removes it. Returns the labels as they now are.

    The file is read again first, so labels written meanwhile are kept. A damaged file is set aside under the name
    `labels.damaged-<time>.json` before a new one is begun. Raises `LabelError` when the text is too long or the
    folder cannot be written.
    """
    text = " ".join(text.split())
    if len(text) > MAX_LENGTH:
        raise LabelError(f"The label has {len(text)} characters; keep it to {MAX_LENGTH}.")
    path = Path(folder) / FILE
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    with _writing:
        try:
            before = read_labels(folder)
            kept = _entries(path) if before.texts else {}
            if before.problem:
                path.replace(_aside(path, now))
            kept.pop(key(release, sae_id, feature), None)
            if text:
                kept[key(release, sae_id, feature)] = {"text": text, "written": now}
            value = {"format": FORMAT, "version": VERSION, "labels": dict(sorted(kept.items()))}
            write_json(path, value)
        except OSError as error:
            raise LabelError(f"The label could not be written to {path} ({error.strerror}); "
                             "make the folder writable, or free some space.") from None
    return read_labels(folder)


def with_names(table: pl.DataFrame, info: pl.DataFrame, labels: dict[int, str]) -> pl.DataFrame:
    """Join `label` (text, "" when none), `fires_on` and `tokens` (logit lens) as text, and `name`: the label, else
    what the feature fires on, else its tokens.

    `table` is a feature table of one layer, `info` has `feature`, `fires_on`, `top_tokens` (lists of str), `labels` is
    feature -> text. Row order and row count are those of `table`.
    """
    fires_on, tokens = (
        pl.col(name).list.head(NAME_TOKENS).list.eval(
            pl.element().str.replace_all("\n", "\u21b5").str.replace_all("\t", "\u21e5").str.strip_chars(" ")
        ).list.join(" \u00b7 ")
        for name in ("fires_on", "top_tokens")
    )
    dtype = table.schema["feature"]
    tokens = info.select(pl.col("feature").cast(dtype), fires_on=fires_on, tokens=tokens)
    own = pl.DataFrame({"feature": list(labels), "label": list(labels.values())},
                       schema={"feature": dtype, "label": pl.String})
    joined = table.join(tokens, on="feature", how="left", maintain_order="left")
    joined = joined.join(own, on="feature", how="left", maintain_order="left")
    return joined.with_columns(pl.col("label", "fires_on", "tokens").fill_null("")).with_columns(
        pl.when(pl.col("label") != "").then(pl.col("label"))
        .when(pl.col("fires_on") != "").then(pl.col("fires_on"))
        .when(pl.col("tokens") != "").then(pl.col("tokens"))
        .otherwise(pl.lit("no tokens recorded")).alias("name")
    )


def named_by_cache(table: pl.DataFrame, cache: Cache, layer: int) -> pl.DataFrame:
    """`with_names` by what a cache knows of the layer's features, and the labels kept beside it."""
    info = cache.info(layer)
    own = read_labels(cache.path.parent).of_sae(info.sae_release, info.sae_id)
    return with_names(table, cache.feature_info(layer), own)


def _entries(path: Path) -> dict[str, dict[str, str]]:
    """Entries in a known form, with their time of writing."""
    found = json.loads(path.read_text(encoding="utf-8"))["labels"]
    return {k: v for k, v in found.items() if _well_formed(k, v)}


def _well_formed(k: str, v: object) -> bool:
    return k.count("|") == 2 and k.rpartition("|")[2].isdecimal() and isinstance(v, dict) and isinstance(
        v.get("text"), str
    )


def _problem(path: Path, what: str) -> str:
    return f"{path} {what}: its labels are not shown; mend or remove the file (the next label written sets it aside)."


def _aside(path: Path, now: str) -> Path:
    stem = f"{path.stem}.damaged-{now.replace(':', '').replace('-', '')}"
    n, aside = 1, path.with_name(f"{stem}.json")
    while aside.exists():
        n += 1
        aside = path.with_name(f"{stem}-{n}.json")
    return aside
