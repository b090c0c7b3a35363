"""Reads a text with a model and says, token by token, how far its residual lies along a direction."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch

from core.directions import Direction
from core.errors import DirectionError
from core.model.adapters import Adapter, applied
from core.model.hooks import resid_post
from core.model.loading import LoadedModel


def project(
    loaded: LoadedModel, ids: np.ndarray, direction: Direction, adapter: Adapter | None = None
) -> np.ndarray:
    """float32 [n]: x . v_hat of every token of `ids` [n], in residual units, as base or with `adapter` at strength 1.

    Raises `DirectionError` when the direction has another width than the model, or none.
    """
    if direction.d_model != loaded.d_model:
        raise DirectionError(
            f"Direction {direction.name!r} has d_model {direction.d_model}, {loaded.spec.id} has {loaded.d_model}."
        )
    unit = torch.from_numpy(direction.unit).to(loaded.device)
    batch = torch.as_tensor(np.asarray(ids, dtype=np.int64), device=loaded.device)[None]
    with applied(loaded, adapter) if adapter else nullcontext():
        resid = resid_post(loaded, batch, torch.ones_like(batch), [direction.layer])[direction.layer]
    return (resid[0].float() @ unit).cpu().numpy()
