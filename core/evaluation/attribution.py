"""Delta-attribution of a contrast: which features make one model's target responses likelier than its reference ones.

Statistics follow the ranking: mean over a response's tokens, over a prompt's responses, then over prompts, paired
where both sides share them; feature values are held for a few prompts at a time. Knows the order of the work; the
formula and its source stand in core/store/attribution.py. One model's log-loss says nothing about another model, so
both sides must be read by one variant.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.analysis.compare import side_rows
from core.analysis.units import shared_prompts
from core.conversations import RESPONSE
from core.errors import CacheError, CacheMismatch, ModelError, NotEnoughData, PresetError
from core.model.adapters import Adapter, applied
from core.model.batches import plan_batches
from core.model.loading import LoadedModel
from core.model.saes import LoadedSae
from core.specs import ContrastSpec
from core.store import attribution_file as store
from core.store.attribution import Item, add_attribution, unit_decoder
from core.store.attribution_file import LayerAttribution
from core.store.reader import Cache

#: Conversations after which no further prompt joins those held in memory at once.
WINDOW = 16


@dataclass(frozen=True)
class Attribution:
    """What one call did."""

    file: Path
    contrast: str
    variant: str
    layers: tuple[int, ...]
    """All layers in the file."""
    computed: tuple[int, ...]
    """Those computed by this call; empty when the file held them already."""
    paired: bool
    n_prompts_target: int
    n_prompts_reference: int
    seconds: float


@dataclass(frozen=True)
class Prompts:
    """The rows of a cache that are read, by prompt."""

    sides: tuple[dict[str, list[int]], dict[str, list[int]]]
    """prompt id -> rows, of target and reference; when `paired`, both have the same prompts."""
    paired: bool

    @property
    def ids(self) -> list[str]:
        return sorted({*self.sides[0], *self.sides[1]})

    def rows(self, prompt: str) -> list[tuple[int, int]]:
        """(side, row) of one prompt; side is 0 for the target, 1 for the reference."""
        return [(n, row) for n, side in enumerate(self.sides) for row in side.get(prompt, ())]


class Moments:
    """Running mean and variance of arrays [d_sae], which are not kept (Welford 1962)."""

    def __init__(self, d_sae: int):
        self.n, self.mean, self._squares = 0, np.zeros(d_sae), np.zeros(d_sae)

    def add(self, value: np.ndarray) -> None:
        self.n += 1
        off = value - self.mean
        self.mean += off / self.n
        self._squares += off * (value - self.mean)

    @property
    def squared_error(self) -> np.ndarray:
        """Square of the mean's standard error."""
        return self._squares / (self.n - 1) / self.n


def one_reader(contrast: ContrastSpec) -> None:
    """Raises `PresetError` unless both sides are read by one variant from one conversation set."""
    target, reference = contrast.target, contrast.reference
    if (target.variant, target.conversations) != (reference.variant, reference.conversations):
        raise PresetError(
            f"Contrast {contrast.name!r} compares {target.describe()} with {reference.describe()}, but attribution "
            "explains one model's own log-loss: choose a contrast whose sides are read by one variant from one "
            "conversation set."
        )


def attribute(
    loaded: LoadedModel,
    adapter: Adapter | None,
    saes: Mapping[int, LoadedSae],
    contrast: ContrastSpec,
    cache: Cache,
    path: Path,
    *,
    batch_tokens: int = 1024,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Attribution:
    """Write the delta-attribution of `contrast` at the layers of `saes` to `path`; layers there already are kept.

    The text is that of `cache`, which must hold both sides. One forward and one backward pass a batch serve all
    layers. Raises `PresetError` when two variants read the sides, `CacheMismatch` when the cache was made by other
    weights, another adapter or other SAEs, `NotEnoughData` below two prompts.
    """
    one_reader(contrast)
    _check_readers(loaded, adapter, saes, cache)
    prompts = choose_prompts(contrast, cache)
    about = {
        "contrast": contrast.name,
        **store.provenance(contrast, cache, cache),
        "adapter": cache.spec["adapter"],
        "saes": cache.spec["saes"],
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "direction": "row of W_dec at unit norm",
        "unit": "prompt",
        "paired": prompts.paired,
        "n_prompts_target": len(prompts.sides[0]),
        "n_prompts_reference": len(prompts.sides[1]),
    }
    begin, kept = time.monotonic(), _layers_there(path, about)
    missing = [layer for layer in sorted(saes) if layer not in kept]
    if missing:
        with applied(loaded, adapter) if adapter else nullcontext():
            found = _run(loaded, {n: saes[n] for n in missing}, prompts, cache, batch_tokens, on_progress)
        kept |= found
        store.write_attribution(path, dict(sorted(kept.items())), about)
    return Attribution(
        file=path,
        contrast=contrast.name,
        variant=contrast.target.variant,
        layers=tuple(sorted(kept)),
        computed=tuple(missing),
        paired=prompts.paired,
        n_prompts_target=about["n_prompts_target"],
        n_prompts_reference=about["n_prompts_reference"],
        seconds=time.monotonic() - begin,
    )


def _check_readers(
    loaded: LoadedModel, adapter: Adapter | None, saes: Mapping[int, LoadedSae], cache: Cache
) -> None:
    made_by: list[tuple[str, Any, Any]] = [
        ("weights", loaded.weights_hash, cache.spec["weights"]),
        ("adapter", adapter.hash if adapter else None, cache.spec["adapter"]),
    ]
    for layer, sae in saes.items():
        made_by.append((f"the SAE of layer {layer}", sae.hash, cache.spec["saes"].get(str(layer))))
    for field, expected, found in made_by:
        if expected != found:
            raise CacheMismatch(cache.path, field, expected, found)


def _layers_there(path: Path, about: Mapping[str, Any]) -> dict[int, LayerAttribution]:
    """What an earlier call left, if it was about the same."""
    try:
        store.check_provenance(path, store.read_about(path), about)
        return store.read_layers(path)
    except CacheError:
        return {}


def choose_prompts(contrast: ContrastSpec, cache: Cache) -> Prompts:
    """The prompts that are read: all, or those on both sides when they are enough to pair (as in a ranking)."""
    ids = cache.conversations["prompt_id"].to_list()
    sides: tuple[dict[str, list[int]], dict[str, list[int]]] = ({}, {})
    for found, side in zip(sides, (contrast.target, contrast.reference), strict=True):
        for row in side_rows(cache, side).tolist():
            found.setdefault(ids[row], []).append(row)
    shared, paired = shared_prompts(*(np.array(sorted(side)) for side in sides))
    if paired:
        sides = tuple({prompt: side[prompt] for prompt in shared.tolist()} for side in sides)
    if min(map(len, sides)) < 2:
        raise NotEnoughData(
            f"Contrast {contrast.name!r} has {len(sides[0])} target and {len(sides[1])} reference prompts; "
            "a delta-attribution needs at least 2 a side."
        )
    return Prompts(sides, paired)


def _run(
    loaded: LoadedModel,
    saes: Mapping[int, LoadedSae],
    prompts: Prompts,
    cache: Cache,
    batch_tokens: int,
    on_progress: Callable[[int, int], None],
) -> dict[int, LayerAttribution]:
    means = {layer: mean_resid(cache, layer, prompts).to(loaded.device) for layer in saes}
    directions = {layer: unit_decoder(sae) for layer, sae in saes.items()}
    n_moments = 1 if prompts.paired else 2
    moments = {layer: [Moments(sae.d_sae) for _ in range(n_moments)] for layer, sae in saes.items()}
    done, total = 0, sum(len(prompts.rows(p)) for p in prompts.ids)
    for window in _windows(prompts):
        groups, items = _items(cache, prompts, window)
        sums = {n: torch.zeros(len(groups), len(d), device=loaded.device) for n, d in directions.items()}
        for batch in plan_batches([len(item.ids) for item in items], batch_tokens):
            chosen = [items[i] for i in batch]
            try:
                add_attribution(loaded, chosen, means, directions, sums)
            except torch.OutOfMemoryError:
                raise ModelError(
                    f"A batch of {batch_tokens} tokens does not fit into memory with its gradients; give a smaller "
                    "--batch-tokens, or another --device or --dtype."
                ) from None
            done += len(batch)
            on_progress(done, total)
        for layer, found in sums.items():
            values = dict(zip(groups, found.cpu().double().numpy(), strict=True))
            for prompt in window:
                if prompts.paired:
                    moments[layer][0].add(values[prompt, 0] - values[prompt, 1])
                else:
                    for side in (0, 1):
                        if (prompt, side) in values:
                            moments[layer][side].add(values[prompt, side])
    return {layer: _difference(found) for layer, found in moments.items()}


def _difference(moments: Sequence[Moments]) -> LayerAttribution:
    delta = moments[0].mean if len(moments) == 1 else moments[0].mean - moments[1].mean
    error = np.sqrt(sum(m.squared_error for m in moments))
    return LayerAttribution(delta.astype(np.float32), error.astype(np.float32))


def _windows(prompts: Prompts) -> Iterator[list[str]]:
    """Whole prompts, in order, until `WINDOW` conversations are reached."""
    window, n = [], 0
    for prompt in prompts.ids:
        window.append(prompt)
        n += len(prompts.rows(prompt))
        if n >= WINDOW:
            yield window
            window, n = [], 0
    if window:
        yield window


def _items(cache: Cache, prompts: Prompts, window: Sequence[str]) -> tuple[list[tuple[str, int]], list[Item]]:
    """(prompt, side) of every group of the window, and its conversations."""
    members = [(prompt, side, row) for prompt in window for side, row in prompts.rows(prompt)]
    groups = list(dict.fromkeys((prompt, side) for prompt, side, _ in members))
    items = []
    for prompt, side, row in members:
        ids, roles = cache.tokens(row)
        response = np.flatnonzero(roles == RESPONSE)
        weight = 1 / len(prompts.sides[side][prompt])
        items.append(Item(ids, int(response[0]), int(response[-1]) + 1, groups.index((prompt, side)), weight))
    return groups, items


def mean_resid(cache: Cache, layer: int, prompts: Prompts) -> Tensor:
    """float32 [d_model]: mean resid_post over the response tokens of every conversation read, from the cache.

    Responses are weighed by their tokens; attention sinks, which the cached means leave out, count in the weight.
    """
    rows = [row for prompt in prompts.ids for _, row in prompts.rows(prompt)]
    weight = cache.conversations["n_response_tokens"].to_numpy()[rows].astype(np.float64)
    resid = cache.resid(layer, "response")[rows].astype(np.float64)
    return torch.from_numpy(((weight @ resid) / weight.sum()).astype(np.float32))
