"""One layer's SAE as two matrices of plain numbers: what a decomposition needs. Knows no torch and no files."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

#: Rows of the decoder handled at once, so that nothing as large as the decoder is made beside it.
CHUNK = 4096


@dataclass(frozen=True, eq=False)
class Dictionary:
    """Decoder and encoder directions of an SAE at resid_post of `layer`."""

    layer: int
    release: str
    sae_id: str
    W_dec: np.ndarray = field(repr=False)
    """float32 [d_sae, d_model], as the SAE has them: not of unit norm unless it keeps them so."""
    W_enc: np.ndarray = field(repr=False)
    """float32 [d_model, d_sae]"""
    normalize_activations: str = "none"
    """How the SAE scales its input (sae-lens' name); only `none` reads a difference of residuals linearly."""

    @property
    def d_sae(self) -> int:
        return self.W_dec.shape[0]

    @property
    def d_model(self) -> int:
        return self.W_dec.shape[1]

    @cached_property
    def norms(self) -> np.ndarray:
        """float32 [d_sae]: norms of the decoder directions; 0 for features that write nothing."""
        found = np.empty(self.d_sae, dtype=np.float32)
        for start in range(0, self.d_sae, CHUNK):
            found[start : start + CHUNK] = np.linalg.norm(self.W_dec[start : start + CHUNK], axis=1)
        return found

    def atoms(self, features: np.ndarray | list[int]) -> np.ndarray:
        """float64 [d_model, n]: decoder directions of `features`, a column each."""
        return self.W_dec[np.asarray(features, dtype=np.int64)].astype(np.float64).T

    def decode(self, coefficients: np.ndarray) -> np.ndarray:
        """float64 [d_model]: sum over features of coefficient x decoder direction, without the bias."""
        used = np.flatnonzero(coefficients)
        total = np.zeros(self.d_model)
        for start in range(0, len(used), CHUNK):
            part = used[start : start + CHUNK]
            total += coefficients[part].astype(np.float64) @ self.W_dec[part].astype(np.float64)
        return total
