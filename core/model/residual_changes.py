"""The changes of one layer's resid_post, batched: each row has its own vectors, features, strengths and positions.

Every change maps resid float32 [batch, position, d_model] to the new one; positions come as masks, scope -> bool
[batch, position]. A change made for one row serves a batch of any size. In what order they act, and on which layer, is
decided in core.model.steering.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from core.errors import InterventionError
from core.model.features import decoder_rows, read_features, row_scale
from core.model.interventions import AblateDirection, AddDirection, ClampFeature, ScaleFeature
from core.model.loading import LoadedModel
from core.model.saes import LoadedSae
from core.model.scopes import Scope

Masks = Mapping[Scope, Tensor]


class Change(ABC):
    """One step of what is done to a layer's resid_post."""

    scopes: tuple[Scope, ...]
    _rows: dict[str, Tensor]
    """Tensors whose first axis is the row."""

    @abstractmethod
    def __call__(self, resid: Tensor, masks: Masks) -> Tensor: ...

    def keep(self, indices: Tensor) -> None:
        """Go on with these rows: int64 [rows]."""
        self._rows = {name: tensor[indices] for name, tensor in self._rows.items()}


class Add(Change):
    """Adds to each row the sum of its vectors."""

    def __init__(self, scope: Scope, rows: Sequence[Sequence[AddDirection]], loaded: LoadedModel) -> None:
        total = torch.zeros(len(rows), 1, loaded.d_model)
        for n, row in enumerate(rows):
            for item in row:
                total[n, 0] += torch.from_numpy(item.vector)
        self.scopes, self._rows = (scope,), {"total": total.to(loaded.device)}

    def __call__(self, resid: Tensor, masks: Masks) -> Tensor:
        return torch.where(masks[self.scopes[0]][..., None], resid + self._rows["total"], resid)


class PartlyAblate(Change):
    """Takes from each row `strength` of its part along one vector (rows without one: of nothing)."""

    def __init__(self, scope: Scope, rows: Sequence[Sequence[AblateDirection]], loaded: LoadedModel) -> None:
        unit, taken = torch.zeros(len(rows), loaded.d_model, 1), torch.zeros(len(rows), loaded.d_model, 1)
        for n, row in enumerate(rows):
            for item in row:
                unit[n, :, 0] = torch.from_numpy(item.direction.unit.copy())
                taken[n] = item.strength * unit[n]
        self.scopes = (scope,)
        self._rows = {"unit": unit.to(loaded.device), "taken": taken.to(loaded.device)}

    def __call__(self, resid: Tensor, masks: Masks) -> Tensor:
        less = resid - (resid @ self._rows["unit"]) @ self._rows["taken"].transpose(1, 2)
        return torch.where(masks[self.scopes[0]][..., None], less, resid)


class ProjectOut(Change):
    """Leaves nothing in each row along any of its vectors: their span is projected out."""

    def __init__(self, scope: Scope, rows: Sequence[Sequence[AblateDirection]], loaded: LoadedModel) -> None:
        bases = [_basis([item.direction.unit for item in row], loaded.d_model) for row in rows]
        basis = torch.zeros(len(rows), loaded.d_model, max(b.shape[1] for b in bases))
        for n, vectors in enumerate(bases):
            basis[n, :, : vectors.shape[1]] = vectors
        self.scopes, self._rows = (scope,), {"basis": basis.to(loaded.device)}

    def __call__(self, resid: Tensor, masks: Masks) -> Tensor:
        basis = self._rows["basis"]
        less = resid - (resid @ basis) @ basis.transpose(1, 2)
        return torch.where(masks[self.scopes[0]][..., None], less, resid)


class EditFeatures(Change):
    """Clamps and scales features of one SAE: x + sum of (a' - a) W_dec[f], every a read from the same x."""

    def __init__(
        self, sae: LoadedSae, rows: Sequence[Sequence[ClampFeature | ScaleFeature]], loaded: LoadedModel
    ) -> None:
        features = sorted({item.feature for row in rows for item in row})
        self.scopes = tuple(sorted({item.scope for row in rows for item in row}, key=str))
        size = (len(rows), len(features))
        factor, value = torch.ones(size), torch.zeros(size)
        here = torch.zeros(len(rows), len(features), len(self.scopes), dtype=torch.bool)
        for n, row in enumerate(rows):
            if len({item.feature for item in row}) < len(row):
                raise InterventionError(
                    f"A row clamps or scales one feature of layer {sae.layer} twice; give each feature once."
                )
            for item in row:
                at = features.index(item.feature)
                clamped = isinstance(item, ClampFeature)
                factor[n, at], value[n, at] = (0.0, item.value) if clamped else (item.factor, 0.0)
                here[n, at, self.scopes.index(item.scope)] = True
        self._sae = sae.sae
        self._features = torch.tensor(features, device=loaded.device)
        self._decoder = decoder_rows(sae.sae, self._features)
        self._rows = {name: t.to(loaded.device) for name, t in (("factor", factor), ("value", value), ("here", here))}

    def __call__(self, resid: Tensor, masks: Masks) -> Tensor:
        within = torch.stack([masks[scope] for scope in self.scopes], -1)  # [batch, position, scope]
        edited = (within[:, :, None, :] & self._rows["here"][:, None]).any(-1)  # [batch, position, feature]
        edited = edited.expand(*resid.shape[:2], -1)
        at = edited.any(-1)
        if not at.any():
            return resid
        batch = at.nonzero()[:, 0] if len(self._rows["factor"]) > 1 else torch.zeros_like(at.nonzero()[:, 0])
        chosen = resid[at]  # [tokens, d_model]
        acts = read_features(self._sae, chosen, self._features)
        wanted = acts * self._rows["factor"][batch] + self._rows["value"][batch]
        change = torch.where(edited[at], wanted - acts, 0.0)
        new = resid.clone()
        new[at] = chosen + row_scale(self._sae, chosen) * (change @ self._decoder)
        return new


def _basis(vectors: Sequence, d_model: int) -> Tensor:
    """Orthonormal basis [d_model, k] of the span, by SVD, so that parallel vectors count once."""
    if not vectors:
        return torch.zeros(d_model, 0)
    stacked = torch.stack([torch.from_numpy(v.copy()).double() for v in vectors], 1)
    left, values, _ = torch.linalg.svd(stacked, full_matrices=False)
    return left[:, values > 1e-6 * values[0]].float()
