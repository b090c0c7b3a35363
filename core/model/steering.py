"""Computes interventions: different ones for every row of a batch, in the fixed order of core.model.interventions.

    steering = Steering(loaded, rows, n_prompt)         rows: one sequence of interventions for each row of the batch
    with steering.during(positions):                    the hooks are there only within the block
        loaded.model(...)
    steering.keep(indices)                              rows left the batch

and, where every row of whatever batch is passed through gets the same (a measure of a steered model):

    with steered(loaded, interventions):
        margins(loaded, conversations)

Rows without an intervention at a place are the base model's there, bit for bit. Arithmetic is in float32 and returns to
the model's number format. It can also read, after all changes of a layer, what `probes` asks for. Knows no tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from core.directions import Direction
from core.errors import InterventionError
from core.model.hooks import changing, check_layers, replacing_each
from core.model.interventions import (
    AblateDirection,
    AddDirection,
    ApplyLora,
    ClampFeature,
    Intervention,
    ScaleFeature,
)
from core.model.loading import LoadedModel
from core.model.lora_rows import LoraRows
from core.model.probes import Probe, readers
from core.model.residual_changes import Add, Change, EditFeatures, PartlyAblate, ProjectOut
from core.model.scopes import ALL, Scope
from core.specs import same_model

#: Where the longest residual of a row is left this many times longer than it was (or than 1, for those of zero norm
#: that an unused start token may have), that is a mistake rather than steering.
MAX_GROWTH = 1e4


@dataclass(frozen=True)
class Readings:
    """What one forward pass read."""

    probes: Tensor
    """float32 [batch, position, probe]: after all changes of the probe's layer."""
    lora: tuple[Tensor, ...]
    """One for each adapter of `Steering.loras`: float32 [batch, position, scalar], A_i . x of every module's every
    rank in module order; NaN in rows without that adapter."""


class Steering:
    """Interventions of the rows of a batch, ready to run. Not thread-safe: it belongs to one decode loop."""

    def __init__(
        self,
        loaded: LoadedModel,
        rows: Sequence[Sequence[Intervention]],
        n_prompt: Sequence[int],
        probes: Sequence[Probe] = (),
        *,
        lora_scalars: bool = False,
    ) -> None:
        """n_prompt: how many tokens of each row are its prompt.

        Raises `InterventionError` when something was made for another model, and `AdapterError` when an adapter does
        not fit. The `problem` of an intervention is not looked at here.
        """
        for item in (*(i for row in rows for i in row), *probes):
            _check(loaded, item)
        rows = [[i for i in row if not i.nothing] for row in rows]
        self._loaded = loaded
        self._n_prompt = torch.tensor(n_prompt, device=loaded.device)
        self._changes = _changes(loaded, rows)
        self._loras = _loras(loaded, rows, record=lora_scalars)
        self._probes = readers(loaded.device, probes)
        self._n_probes = len(probes)
        self._found: dict[int, Tensor] = {}
        self._grown: dict[int, Tensor] = {}
        scopes = {scope for changes in self._changes.values() for change in changes for scope in change.scopes}
        self._scopes = scopes | {lora.scope for lora in self._loras}
        self._masks: dict[Scope, Tensor] = {}
        self._real = torch.empty(0)

    @property
    def loras(self) -> tuple[LoraRows, ...]:
        return self._loras

    @contextmanager
    def during(self, positions: Tensor) -> Iterator[None]:
        """Within the block the model is steered. positions: int64 [batch, position], absolute, -1 at padding."""
        self._found, self._grown = {}, {}
        self._real = positions >= 0
        self._masks = {scope: scope.covers(positions, self._n_prompt) for scope in self._scopes}
        modules = [pair for lora in self._loras for pair in lora.changes(self._masks)]
        layers = sorted({*self._changes, *self._probes})
        blocks = [(self._loaded.blocks[layer], self._at(layer)) for layer in layers]
        with changing(modules), replacing_each(blocks):
            yield

    def keep(self, indices: Tensor) -> None:
        """Go on with these rows, in this order: int64 [rows]."""
        self._n_prompt = self._n_prompt[indices]
        for changes in self._changes.values():
            for change in changes:
                change.keep(indices)
        for lora in self._loras:
            lora.keep(indices)

    def readings(self) -> Readings:
        """What the last pass read."""
        found = [self._found[n] for n in range(self._n_probes)]
        return Readings(torch.stack(found, -1) if found else torch.empty(0), tuple(x.scalars() for x in self._loras))

    def broken(self) -> dict[int, str]:
        """Row of the last pass -> why what was done to it cannot be meant."""
        if not self._grown:
            return {}
        layers = sorted(self._grown)
        flags = torch.stack([self._grown[layer] for layer in layers])
        if not flags.any():
            return {}
        first = {n: layers[int(flags[:, n].nonzero()[0])] for n in range(flags.shape[1]) if flags[:, n].any()}
        return {n: f"layer {at}'s residual overflows or grows over {MAX_GROWTH:,.0f}-fold" for n, at in first.items()}

    def _at(self, layer: int) -> Callable[[Tensor], Tensor]:
        changes, probes = self._changes.get(layer, ()), self._probes.get(layer, ())

        def change(resid: Tensor) -> Tensor:
            new = resid.float()
            for step in changes:
                new = step(new, self._masks)
            if changes:
                before, after = (
                    torch.where(self._real, x.square().sum(-1), 0.0).amax(-1) for x in (resid.float(), new)
                )
                self._grown[layer] = torch.isfinite(before) & ~(after <= MAX_GROWTH**2 * before.clamp(min=1.0))
            for reader in probes:
                self._found.update(reader(new))
            return new.to(resid.dtype) if changes else resid

        return change


@contextmanager
def steered(loaded: LoadedModel, interventions: Sequence[Intervention]) -> Iterator[None]:
    """Within the block every row of every batch gets these interventions, all of scope `all`.

    Raises `InterventionError` for another scope, as a plain forward pass does not say where its prompts end, and for
    a strength that no model survives.
    """
    for item in interventions:
        if item.scope != ALL:
            raise InterventionError(f"Scope {item.scope} needs prompts; use Steering, or scope all.")
        if item.problem:
            raise InterventionError(f"This cannot be done to the model: {item.problem}.")
    steering = Steering(loaded, [interventions], [0])
    with steering.during(torch.zeros(1, 1, dtype=torch.int64, device=loaded.device)):
        yield


def _check(loaded: LoadedModel, item: Intervention | Probe) -> None:
    """Raises `InterventionError` when the item does not belong to this model."""
    what: Direction | None = item if isinstance(item, Direction) else getattr(item, "direction", None)
    if what is not None:
        check_layers(loaded.blocks, [what.layer])
        names = (loaded.spec.id, *loaded.spec.sae_names)
        if not any(same_model(what.model, name) for name in names):
            raise InterventionError(
                f"Direction {what.name!r} lives in {what.model or 'an unstated model'}, not in {loaded.spec.id}; make "
                "it from a cache of this model."
            )
        if what.d_model != loaded.d_model:
            raise InterventionError(
                f"Direction {what.name!r} has d_model {what.d_model}, {loaded.spec.id} has {loaded.d_model}; make it "
                "from a cache of this model."
            )
    sae = getattr(item, "sae", None)
    if sae is not None:
        check_layers(loaded.blocks, [sae.layer])
        if sae.d_model != loaded.d_model:
            raise InterventionError(f"The SAE of layer {sae.layer} reads d_model {sae.d_model}, not {loaded.d_model}.")


def _changes(loaded: LoadedModel, rows: Sequence[Sequence[Intervention]]) -> dict[int, tuple[Change, ...]]:
    """Layer -> what is done to its resid_post, in order."""
    found: dict[int, list[Change]] = {}

    def at(layer: int, kind: type | tuple[type, ...], wanted: Callable = lambda item: True) -> list[list]:
        def here(item: Intervention) -> bool:
            everywhere = getattr(item, "everywhere", False)
            return isinstance(item, kind) and wanted(item) and (everywhere or item.layer == layer)

        return [[item for item in row if here(item)] for row in rows]

    def scopes(chosen: Sequence[Sequence[Intervention]]) -> list[Scope]:
        return sorted({i.scope for row in chosen for i in row}, key=str)

    def within(chosen: Sequence[Sequence[Intervention]], scope: Scope) -> list[list]:
        return [[i for i in row if i.scope == scope] for row in chosen]

    for layer in range(loaded.n_layers):
        steps: list[Change] = []
        added = at(layer, AddDirection)
        steps += [Add(scope, within(added, scope), loaded) for scope in scopes(added)]
        features = at(layer, (ClampFeature, ScaleFeature))
        saes = {i.sae.hash: i.sae for row in features for i in row}
        steps += [
            EditFeatures(sae, [[i for i in row if i.sae.hash == key] for row in features], loaded)
            for key, sae in saes.items()
        ]
        part = at(layer, AblateDirection, lambda i: i.strength != 1)
        for n in range(max(map(len, part), default=0)):
            nth = [row[n : n + 1] for row in part]
            steps += [PartlyAblate(scope, within(nth, scope), loaded) for scope in scopes(nth)]
        whole = at(layer, AblateDirection, lambda i: i.strength == 1)
        steps += [ProjectOut(scope, within(whole, scope), loaded) for scope in scopes(whole)]
        if steps:
            found[layer] = steps
    return {layer: tuple(steps) for layer, steps in found.items()}


def _loras(loaded: LoadedModel, rows: Sequence[Sequence[Intervention]], *, record: bool) -> tuple[LoraRows, ...]:
    given = [(n, i) for n, row in enumerate(rows) for i in row if isinstance(i, ApplyLora)]
    found = []
    for key, scope in dict.fromkeys((i.adapter.hash, i.scope) for _, i in given):
        strengths = torch.zeros(len(rows))
        for n, i in given:
            if (i.adapter.hash, i.scope) == (key, scope):
                strengths[n] += i.strength
                adapter = i.adapter
        found.append(LoraRows(loaded, adapter, strengths, scope, record=record))
    return tuple(found)
