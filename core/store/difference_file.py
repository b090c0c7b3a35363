"""The file of an activation difference lens: what one variant's residuals differ by from base on unrelated text.

Knows the file's form and what can be read off it, not how the numbers are made (difference.py); imports no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from core.errors import CacheError, CacheMismatch
from core.store.layout import NOT_FINGERPRINTED, fingerprint

FORMAT = "em-microscope-difference"
FORMAT_VERSION = 1

#: Logit-lens tokens kept a layer, place and sign.
TOKENS_KEPT = 20
#: Features kept a layer and sign.
FEATURES_KEPT = 10
#: A file's name is this, the variant's name and `.safetensors`.
PREFIX = "difference__"

_VALUES = ("difference", "resid_norm", "consistency", "split_half")
_COUNTS = ("n_counted", "promoted", "suppressed", "base_promoted")


@dataclass(frozen=True)
class SaeStamp:
    """The SAE whose decoder directions one layer's difference was compared with."""

    release: str
    sae_id: str
    d_sae: int


@dataclass(frozen=True)
class LensTokens:
    """Token texts of a logit lens, strongest first; empty where there is no difference."""

    promoted: list[str]
    suppressed: list[str]
    base: list[str]
    """What base's own mean residual at the same place promotes."""


@dataclass(frozen=True, eq=False)
class DifferenceLens:
    """Mean residual differences, variant minus base, at every layer's resid_post and every place.

    Place p in 1..k is the p-th token of the text (BOS is not counted), place 0 the mean over positions `mean_from` to
    k. The text is the unit: at place 0 each text counts once, as the mean over its positions that were not left out.
    """

    spec: Mapping[str, Any]
    """Everything that decides the numbers."""
    n_texts: int
    n_short: int
    """Texts left out because they have fewer than k tokens."""
    difference: np.ndarray = field(repr=False)
    """float32 [n_layers, k + 1, d_model], residual units; NaN where no text was counted."""
    resid_norm: np.ndarray = field(repr=False)
    """float32 [n_layers, k + 1]: mean norm of base's residual."""
    consistency: np.ndarray = field(repr=False)
    """float32 [n_layers, k + 1]: mean cosine of a text's difference with the mean of the other half of the texts."""
    split_half: np.ndarray = field(repr=False)
    """float32 [n_layers, k + 1]: cosine of the mean differences of the two halves; NaN where nothing differs."""
    n_counted: np.ndarray = field(repr=False)
    """int32 [n_layers, k + 1]: texts counted, attention sinks left out."""
    promoted: np.ndarray = field(repr=False)
    """int32 [n_layers, k + 1, TOKENS_KEPT]: token ids, strongest first; -1 where nothing differs."""
    suppressed: np.ndarray = field(repr=False)
    base_promoted: np.ndarray = field(repr=False)
    """As `promoted`, of base's mean residual itself; -1 where no text was counted."""
    token_texts: Mapping[int, str] = field(repr=False)
    features: pl.DataFrame = field(repr=False)
    """layer, feature, cosine of place 0's difference with the feature's decoder direction; the most raised
    FEATURES_KEPT a layer first, then the most suppressed, strongest first each."""
    saes: Mapping[int, SaeStamp]

    @property
    def variant(self) -> str:
        return self.spec["variant"]

    @property
    def mean_from(self) -> int:
        """2 where the tokenizer adds no BOS, so that position 1 is the model's very first token; else 1."""
        return self.spec["mean_from"]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.spec)

    @property
    def n_layers(self) -> int:
        return self.difference.shape[0]

    @property
    def k(self) -> int:
        return self.difference.shape[1] - 1

    @property
    def norm(self) -> np.ndarray:
        """float32 [n_layers, k + 1]: norm of the mean difference, residual units."""
        return np.linalg.norm(self.difference, axis=-1)

    @property
    def share(self) -> np.ndarray:
        """float32 [n_layers, k + 1]: `norm` over the mean norm of base's residual."""
        return self.norm / self.resid_norm

    @property
    def masked_share(self) -> np.ndarray:
        """float64 [n_layers, k]: share of texts left out at each position as attention sinks."""
        return 1 - self.n_counted[:, 1:] / self.n_texts

    def cosine_with(self, other: DifferenceLens) -> np.ndarray:
        """float32 [n_layers, places both have]: cosine of the two variants' mean differences; NaN where one is 0."""
        places = min(self.k, other.k) + 1
        a, b = self.difference[:, :places], other.difference[:, :places]
        size = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        with np.errstate(invalid="ignore"):
            return np.where(size > 0, (a * b).sum(axis=-1) / size, np.nan)

    def tokens(self, layer: int, place: int) -> LensTokens:
        """The logit lens of the difference, and base's own, at one layer and place."""
        kinds = (self.promoted, self.suppressed, self.base_promoted)
        return LensTokens(*([self.token_texts[i] for i in kind[layer, place].tolist() if i >= 0] for kind in kinds))


def difference_file(folder: Path, variant: str) -> Path:
    """Where the difference lens of a variant lies."""
    return Path(folder) / f"{PREFIX}{variant}.safetensors"


def difference_files(folder: Path) -> dict[str, Path]:
    """Variant -> file, of every difference lens in a folder, in name order."""
    return {path.stem.removeprefix(PREFIX): path for path in sorted(Path(folder).glob(f"{PREFIX}*.safetensors"))}


def write_difference(path: Path, lens: DifferenceLens) -> None:
    """Write the file whole or not at all. Raises `CacheError` when the folder cannot be written."""
    arrays = {name: np.ascontiguousarray(getattr(lens, name), dtype=np.float32) for name in _VALUES}
    arrays |= {name: np.ascontiguousarray(getattr(lens, name), dtype=np.int32) for name in _COUNTS}
    for name, dtype in (("layer", np.int32), ("feature", np.int32), ("cosine", np.float32)):
        arrays[f"features/{name}"] = lens.features[name].to_numpy().astype(dtype)
    about = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "fingerprint": lens.fingerprint,
        "spec": dict(lens.spec),
        "n_texts": lens.n_texts,
        "n_short": lens.n_short,
        "token_texts": {str(i): text for i, text in lens.token_texts.items()},
        "saes": {str(layer): vars(stamp) for layer, stamp in lens.saes.items()},
    }
    content = save(arrays, metadata={k: json.dumps(v, ensure_ascii=False) for k, v in about.items()})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise CacheError(f"{path}: cannot be written ({error.strerror}); give another --cache.") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_difference(path: Path, expect: Mapping[str, Any] | None = None) -> DifferenceLens:
    """The lens of a file.

    Raises `CacheError` when the file is missing, damaged or not one of these; with `expect` (fields of a spec),
    `CacheMismatch` naming the first of them that the file was made under another value of.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            about = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            if about.get("format") != FORMAT:
                raise CacheError(f"{path}: this is no difference lens of this program; remove it.")
            if about.get("format_version") != FORMAT_VERSION:
                found = about.get("format_version")
                raise CacheError(f"{path}: format version {found}, this program reads {FORMAT_VERSION}; make it anew.")
            arrays = {name: file.get_tensor(name) for name in file.keys()}
        lens = _lens(about, arrays)
    except FileNotFoundError:
        raise CacheError(f"{path}: no such file; run `python -m core difference` to make it.") from None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CacheError(f"{path}: the file cannot be read ({first}); remove it and make it anew.") from None
    if about.get("fingerprint") != lens.fingerprint:
        raise CacheError(f"{path}: fingerprint and spec disagree; remove the file and make it anew.")
    check_spec(path, expect or {}, lens.spec)
    return lens


def check_spec(path: Path, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise `CacheMismatch` naming the first field of `expected` that decides a number and that `found` has not."""
    for name in sorted(set(expected) - set(NOT_FINGERPRINTED)):
        if found.get(name) != expected[name]:
            way_out = "give another --cache directory, or remove the file"
            raise CacheMismatch(path, name, expected[name], found.get(name), way_out)


def _lens(about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> DifferenceLens:
    """Raises KeyError or ValueError when something is missing or does not fit."""
    places = arrays["difference"].shape[:2]
    for name in (*_VALUES, *_COUNTS):
        if arrays[name].shape[:2] != places:
            raise ValueError(f"{name} has {arrays[name].shape[:2]} layers and places, difference has {places}")
    if not isinstance(about["spec"].get("variant"), str) or about["spec"].get("mean_from") not in (1, 2):
        raise ValueError("its spec names no variant or no first position of the mean")
    texts = {int(i): str(text) for i, text in about["token_texts"].items()}
    used = {int(i) for name in ("promoted", "suppressed", "base_promoted") for i in np.unique(arrays[name])}
    if not used - {-1} <= set(texts):
        raise ValueError("texts of tokens are missing")
    return DifferenceLens(
        spec=about["spec"],
        n_texts=int(about["n_texts"]),
        n_short=int(about["n_short"]),
        **{name: arrays[name] for name in (*_VALUES, *_COUNTS)},
        token_texts=texts,
        features=pl.DataFrame({name: arrays[f"features/{name}"] for name in ("layer", "feature", "cosine")}),
        saes={int(layer): SaeStamp(**stamp) for layer, stamp in about["saes"].items()},
    )
