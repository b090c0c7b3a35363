"""What can be read at every token: the projection on a direction, or a feature's activation. Changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from core.directions import Direction
from core.model.features import Feature, read_features

Probe = Direction | Feature
"""A direction reads x . v with v of norm 1, in the residual's units; a feature its activation, in its SAE's."""

Reader = Callable[[Tensor], dict[int, Tensor]]
"""resid float32 [batch, position, d_model] -> number of the probe: float32 [batch, position]."""


def readers(device: torch.device, probes: Sequence[Probe]) -> dict[int, list[Reader]]:
    """Layer -> what reads there: all directions in one product, the features of one SAE in one encoding."""
    groups: dict[tuple[int, str], list[int]] = {}
    for n, probe in enumerate(probes):
        groups.setdefault((probe.layer, probe.sae.hash if isinstance(probe, Feature) else ""), []).append(n)
    found: dict[int, list[Reader]] = {}
    for (layer, _), numbers in groups.items():
        chosen = [probes[n] for n in numbers]
        found.setdefault(layer, []).append(
            _of_features(chosen, numbers, device)
            if isinstance(chosen[0], Feature)
            else _of_directions(chosen, numbers, device)
        )
    return found


def _of_directions(directions: Sequence[Direction], numbers: Sequence[int], device: torch.device) -> Reader:
    units = torch.stack([torch.tensor(direction.unit) for direction in directions], 1).to(device)
    return lambda resid: dict(zip(numbers, (resid @ units).unbind(-1), strict=True))


def _of_features(features: Sequence[Feature], numbers: Sequence[int], device: torch.device) -> Reader:
    sae, at = features[0].sae.sae, torch.tensor([f.feature for f in features], device=device)

    def read(resid: Tensor) -> dict[int, Tensor]:
        acts = read_features(sae, resid.flatten(0, 1), at).unflatten(0, resid.shape[:2])
        return dict(zip(numbers, acts.unbind(-1), strict=True))

    return read
