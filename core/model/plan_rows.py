"""A steering plan as rows of one batch: names become adapters and SAE features, pushes become interventions."""

from __future__ import annotations

from collections.abc import Callable

from core.errors import InterventionError
from core.model.adapters import Adapter
from core.model.dice import Sampling
from core.model.features import Feature
from core.model.interventions import AddDirection, ApplyLora, ClampFeature, Intervention
from core.model.probes import Probe
from core.model.rows import Row
from core.model.saes import LoadedSae
from core.model.scopes import Scope
from core.steering_plan import Pane, Plan

Adapters = Callable[[str], Adapter | None]
"""Variant -> its adapter; None for base."""
Saes = Callable[[int], LoadedSae | None]
"""Layer -> its SAE; None where there is none."""


def rows_of(plan: Plan, adapters: Adapters, saes: Saes) -> list[Row]:
    """One row a pane, in order. Raises a `MicroscopeError` for a variant, feature or scope that is not there."""
    scope = Scope.parse(plan.scope)
    sampling = Sampling(plan.dice.temperature, plan.dice.top_p, plan.dice.max_new_tokens, plan.dice.repetition_penalty)
    return [
        Row(pane.messages, interventions(pane, scope, adapters, saes), pane.seed, sampling, pane.name)
        for pane in plan.panes
    ]


def interventions(pane: Pane, scope: Scope, adapters: Adapters, saes: Saes) -> tuple[Intervention, ...]:
    """What is done to the model for one pane; the LoRA acts everywhere, the steering within `scope`."""
    adapter = adapters(pane.variant)
    made: list[Intervention] = [ApplyLora(adapter, pane.lora)] if adapter is not None else []
    made += [AddDirection(push.direction, push.strength, push.raw, scope) for push in pane.pushes]
    made += [ClampFeature(_sae(saes, hold.layer), hold.feature, hold.value, scope) for hold in pane.holds]
    return tuple(made)


def probes_of(plan: Plan, saes: Saes) -> tuple[Probe, ...]:
    """What is read in every pane: the plan's direction, then every feature that any pane holds."""
    held = dict.fromkeys((hold.layer, hold.feature) for pane in plan.panes for hold in pane.holds)
    features = tuple(Feature(_sae(saes, layer), feature) for layer, feature in held)
    return (plan.probe, *features) if plan.probe is not None else features


def _sae(saes: Saes, layer: int) -> LoadedSae:
    found = saes(layer)
    if found is None:
        raise InterventionError(f"Layer {layer} has no SAE, so none of its features can be held.")
    return found
