"""One LoRA over the rows of a batch, each at its own strength and at its own positions.

Computes as core.model.adapters.applied does, and as PEFT at strength 1; this one also follows positions, drops rows
that leave the batch, and can keep the scalars A_i . x. No gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from core.model.adapters import Adapter, targets_of
from core.model.hooks import ModuleChange
from core.model.loading import LoadedModel
from core.model.scopes import ALL, Scope


class LoraRows:
    """strength: float32 [rows]. A single row serves a batch of any size."""

    def __init__(
        self, loaded: LoadedModel, adapter: Adapter, strength: Tensor, scope: Scope, *, record: bool = False
    ) -> None:
        self.adapter, self.scope = adapter, scope
        self._targets: list[nn.Linear] = targets_of(loaded, adapter)
        like = [target.weight for target in self._targets]
        self._A = [module.A.to(weight) for module, weight in zip(adapter.modules, like, strict=True)]
        self._B = [module.B.to(weight) for module, weight in zip(adapter.modules, like, strict=True)]
        self._record = record
        self._hidden: dict[int, Tensor] = {}
        self._n_rows = len(strength)
        self._any_batch = len(strength) == 1
        self._set(strength.to(loaded.device))

    def _set(self, strength: Tensor) -> None:
        self._strength = strength
        rows = strength.nonzero().ravel().tolist()
        if self._any_batch or len(rows) == self._n_rows:
            self._at: slice | Tensor = slice(None)
        elif rows and rows == list(range(rows[0], rows[-1] + 1)):
            self._at = slice(rows[0], rows[-1] + 1)  # a view instead of a copy
        else:
            self._at = torch.tensor(rows, dtype=torch.int64, device=strength.device)
        self._empty = not rows

    def keep(self, indices: Tensor) -> None:
        """Go on with these rows: int64 [rows]."""
        self._n_rows, self._any_batch = len(indices), False
        self._set(self._strength[indices])

    def changes(self, masks: Mapping[Scope, Tensor]) -> list[ModuleChange]:
        """(linear module, change) for one forward pass. masks: scope -> bool [batch, position]."""
        self._hidden = {}
        if self._empty:
            return []
        factor = self._strength[self._at, None, None]
        if self.scope != ALL:
            within = masks[self.scope][self._at]
            if not within.any():
                return []
            factor = factor * within[..., None]
        return [
            (target, self._addition(n, module.scaling * factor))
            for n, (target, module) in enumerate(zip(self._targets, self.adapter.modules, strict=True))
        ]

    def _addition(self, n: int, factor: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        at, A, B = self._at, self._A[n], self._B[n]
        factor = factor.to(A.dtype)

        def add(x: Tensor, output: Tensor) -> Tensor:
            hidden = functional.linear(x[at], A)
            if self._record:
                self._hidden[n] = hidden
            part = functional.linear(hidden, B) * factor
            if isinstance(at, slice):
                output[at] += part
                return output
            return output.index_add_(0, at, part)

        return add

    def scalars(self) -> Tensor:
        """float32 [batch, position, sum of ranks]: A_i . x of the last pass; empty when nothing was kept."""
        if not self._hidden:
            return torch.empty(0)
        kept = torch.cat([self._hidden[n] for n in range(len(self._targets))], -1).float()
        if isinstance(self._at, slice) and self._at == slice(None):
            return kept
        whole = kept.new_full((self._n_rows, *kept.shape[1:]), torch.nan)
        whole[self._at] = kept
        return whole
