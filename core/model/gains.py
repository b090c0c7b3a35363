"""What the norms of one decoder block multiply by: plain arrays, without torch. core/model/norms.py reads them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, eq=False)
class BlockGains:
    """The gain of each norm of a block, float32 [d_model]; the division by the root mean square depends on the token
    and is no part of it."""

    attention: np.ndarray = field(repr=False)
    """Of the norm before attention."""
    mlp: np.ndarray = field(repr=False)
    """Of the norm before the MLP."""
    after_attention: np.ndarray | None = field(default=None, repr=False)
    """Of the norm between attention and the residual stream; None where there is none (all but Gemma)."""
    after_mlp: np.ndarray | None = field(default=None, repr=False)
