"""Opens a finished cache file and hands out its tables and sparse matrices. Never loads a model or imports torch."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import polars as pl
from scipy.sparse import csr_array

from core.conversations import RESPONSE
from core.errors import CacheError
from core.specs import POSITIONS
from core.store import layout
from core.store.stored_file import Kind, StoredFile

#: Texts that say what a feature fires on.
FIRES_ON_KEPT = 3


@dataclass(frozen=True)
class LayerInfo:
    """One cached layer: which SAE read it, and how well."""

    layer: int
    hook_point: str
    d_model: int
    d_sae: int
    """0 where no SAE was given: only residuals are cached."""
    sae_release: str
    sae_id: str
    architecture: str
    neuronpedia_id: str | None
    health: dict[str, float]
    """fvu, l0 (mean active features per response token), dead_share (features silent on every response token),
    n_tokens (response tokens read), n_health_tokens (of them, sampled for fvu), masked_share (response tokens left
    out as attention sinks), mean_resid_norm."""


@dataclass(frozen=True)
class Context:
    """A window of text around the strongest activation of a feature in one response."""

    row: int
    condition: str
    value: float
    tokens: tuple[str, ...]
    acts: np.ndarray
    """float32 [len(tokens)]; 0 outside the response, where the SAE was not read."""
    peak: int
    in_response: tuple[bool, ...]


class Cache(StoredFile):
    """One extraction: a model variant, a conversation set, its layers. Open it with `Cache.open`; close when done."""

    KIND = Kind(layout.FORMAT, layout.FORMAT_VERSION, "a cache", "cache", "extract")

    def __init__(self, path: Path, file: h5py.File):
        super().__init__(path, file)
        self.versions: dict[str, str] = json.loads(file.attrs["versions"])

    # ------------------------------------------------------------------------------------- what it is about

    @property
    def model_id(self) -> str:
        return self.spec["model"]

    @property
    def variant(self) -> str:
        return self.spec["variant"]

    @property
    def conversations_name(self) -> str:
        return self.spec["conversations"]

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.spec["layers"])

    def info(self, layer: int) -> LayerInfo:
        attrs = self._layer(layer).attrs
        return LayerInfo(
            layer=layer,
            hook_point=str(attrs["hook_point"]),
            d_model=int(attrs["d_model"]),
            d_sae=int(attrs["d_sae"]),
            sae_release=str(attrs["sae_release"]),
            sae_id=str(attrs["sae_id"]),
            architecture=str(attrs["architecture"]),
            neuronpedia_id=str(attrs["neuronpedia_id"]) or None,
            health={k: float(v) for k, v in self._layer(layer)["health"].attrs.items()},
        )

    # ------------------------------------------------------------------------------------------- matrices

    def response(self, layer: int, statistic: str = "mean") -> csr_array:
        """float32 [n_conversations, d_sae]: `mean`, `max` or `frac_active` over each response's tokens."""
        if statistic not in layout.RESPONSE_STATISTICS:
            raise CacheError(f"Unknown statistic {statistic!r}; use one of {', '.join(layout.RESPONSE_STATISTICS)}.")
        if statistic not in self._sae_layer(layer)["response"]:
            raise CacheError(
                f"{self.path}: is a compact file without {statistic!r}; write storage = 'full' in the preset and "
                "extract again."
            )
        return self._matrix(layer, "response", statistic)

    def last_prompt(self, layer: int) -> csr_array:
        """float32 [n_conversations, d_sae]: feature activations at the last token before the response."""
        return self._matrix(layer, "last_prompt", "value")

    def resid(self, layer: int, position: str) -> np.ndarray:
        """float32 [n_conversations, d_model] resid_post: mean over response tokens, or at the last prompt token."""
        if position not in POSITIONS:
            raise CacheError(f"Unknown position {position!r}; use one of {', '.join(POSITIONS)}.")
        return self._layer(layer)[f"resid_{position}"][...]

    def _matrix(self, layer: int, position: str, name: str) -> csr_array:
        group = self._sae_layer(layer)[position]
        shape = (len(group["indptr"]) - 1, int(self._layer(layer).attrs["d_sae"]))
        data = group[name][...].astype(np.float32)
        return csr_array((data, group["indices"][...].astype(np.int32), group["indptr"][...]), shape=shape)

    # ------------------------------------------------------------------------------------- feature reading

    def content_share(self, layer: int) -> np.ndarray:
        """float32 [d_sae]: share of each feature's activation mass on tokens with letters; NaN when never active."""
        return self._sae_layer(layer)["feature_info/content_share"][...]

    def feature_info(self, layer: int) -> pl.DataFrame:
        """feature, decoder_norm, content_share (NaN when never active), n_active_tokens, max_act, top_tokens,
        bottom_tokens (logit lens, strongest first), fires_on (what stands at the peaks of its strongest contexts,
        the token before included; the commonest first)."""
        group = self._sae_layer(layer)["feature_info"]
        text = self._token_text
        lens = {
            f"{side}_tokens": [[text[i] for i in row] for row in group[f"{side}_ids"][...].tolist()]
            for side in ("top", "bottom")
        }
        names = ("decoder_norm", "content_share", "n_active_tokens", "max_act")
        numbers = {name: group[name][...] for name in names}
        return pl.DataFrame({"feature": np.arange(len(numbers["max_act"]), dtype=np.int64), **numbers, **lens,
                             "fires_on": self._fires_on(layer)})

    def _fires_on(self, layer: int) -> list[list[str]]:
        """For each feature, the distinct two-token texts that end at the peaks of its contexts, commonest first."""
        group, tokens = self._sae_layer(layer)["contexts"], self._file["tokens"]
        ids, text = tokens["ids"][...], self._token_text
        at = tokens["offsets"][...][group["row"][...]] + group["peak"][...]
        pairs = [f"{text[a]}{text[b]}".strip() for a, b in zip(ids[at - 1].tolist(), ids[at].tolist(), strict=True)]
        indptr = group["indptr"][...].tolist()
        return [
            [found for found, _ in Counter(pairs[a:b]).most_common(FIRES_ON_KEPT)]
            for a, b in zip(indptr, indptr[1:], strict=False)
        ]

    def contexts(self, layer: int, feature: int) -> list[Context]:
        """The strongest windows of one feature, condition by condition, strongest first."""
        group = self._sae_layer(layer)["contexts"]
        d_sae = int(self._layer(layer).attrs["d_sae"])
        if not 0 <= feature < d_sae:
            raise CacheError(f"Feature {feature} does not exist; layer {layer} has features 0 to {d_sae - 1}.")
        begin, end = (int(i) for i in group["indptr"][feature : feature + 2])
        rows, peaks, values = (group[name][begin:end] for name in ("row", "peak", "value"))
        acts = group["acts"][begin:end].astype(np.float32)
        return [
            self._context(int(row), int(peak), float(value), window)
            for row, peak, value, window in zip(rows, peaks, values, acts, strict=True)
        ]

    def _context(self, row: int, peak: int, value: float, window: np.ndarray) -> Context:
        ids, roles = self.tokens(row)
        start, stop = max(0, peak - layout.WINDOW_BEFORE), min(len(ids), peak + layout.WINDOW_AFTER + 1)
        first = start - (peak - layout.WINDOW_BEFORE)
        return Context(
            row=row,
            condition=self.conversations["condition"][row],
            value=value,
            tokens=tuple(self._token_text[i] for i in ids[start:stop].tolist()),
            acts=window[first : first + stop - start],
            peak=peak - start,
            in_response=tuple(bool(r == RESPONSE) for r in roles[start:stop]),
        )

    def _layer(self, layer: int) -> h5py.Group:
        if layer not in self.layers:
            cached = ", ".join(map(str, self.layers))
            raise CacheError(f"{self.path}: layer {layer} is not cached; it holds layers {cached}.")
        return self._file[f"layers/{layer}"]

    def _sae_layer(self, layer: int) -> h5py.Group:
        group = self._layer(layer)
        if not group.attrs["d_sae"]:
            raise CacheError(f"{self.path}: layer {layer} was cached without an SAE, so it has residuals only.")
        return group
