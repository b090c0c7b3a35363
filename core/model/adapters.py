"""Reads LoRA adapters in PEFT's format and adds them to a model's forward pass, at one strength or one for each row.

Refuses what it would not compute as PEFT does. Without peft; the files are read by adapter_files.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from core.errors import AdapterError, ModelError
from core.model.adapter_files import WEIGHTS, adapter_hash, check_pair, find_adapter, read_matrices
from core.model.hooks import changing
from core.model.loading import LoadedModel
from core.model.peft_config import CONFIG, PeftConfig, check_base, read_config
from core.specs import AdapterSpec


@dataclass(frozen=True)
class LoraModule:
    """What an adapter adds to one linear module: scaling * B A x (Hu et al. 2021, arXiv 2106.09685, section 4)."""

    layer: int
    """0-based decoder block."""
    name: str
    """Path within the block, e.g. `mlp.down_proj`."""
    A: Tensor
    """float32 [r, d_in]"""
    B: Tensor
    """float32 [d_out, r]"""
    scaling: float
    """lora_alpha / r, or lora_alpha / sqrt(r) when rsLoRA (Kalajdzievski 2023, arXiv 2312.03732)."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that fits the model it was loaded for."""

    name: str
    folder: str
    hash: str
    """SHA-256 over the weights file and every module's scaling."""
    base_model: str
    """What its configuration names as its base model; empty when it names none."""
    modules: tuple[LoraModule, ...]
    """In layer, then name order."""


def load_adapter(spec: AdapterSpec, loaded: LoadedModel, folder: Path | None = None) -> Adapter:
    """Read the adapter that `find_adapter` finds and check every matrix against `loaded`.

    Raises `AdapterError` when it is damaged, is more than plain LoRA, names another base model, or does not fit: a
    module or layer that the model lacks, a wrong shape, or tensors that differ from what its configuration selects.
    LoRA matrices of a vision tower are left out, as text does not pass through it.
    """
    place = find_adapter(spec, folder)
    try:
        config = read_config(place / CONFIG)
        check_base(config.base_model_name_or_path, loaded.spec.id)
        root, matrices = read_matrices(place / WEIGHTS)
        modules = tuple(_module(loaded, config, root, at, matrices[at]) for at in sorted(matrices))
        _check_selection(loaded, config, root, set(matrices))
    except AdapterError as error:
        raise AdapterError(f"Adapter {spec.name!r} in {place}: {error}") from None
    except re.error as error:
        raise AdapterError(f"Adapter {spec.name!r} in {place}: {CONFIG} has an invalid pattern: {error}.") from None
    found = adapter_hash(place / WEIGHTS, {f"{m.layer}.{m.name}": m.scaling for m in modules})
    return Adapter(spec.name, str(place), found, config.base_model_name_or_path, modules)


@contextmanager
def applied(loaded: LoadedModel, adapter: Adapter, strength: float | Tensor = 1.0) -> Iterator[None]:
    """Within the block, each of the adapter's modules returns its output + strength * scaling * B (A x).

    strength: one number, or [batch] with one for every row of whatever batch is passed through; rows at 0 are the
    base model's, bit for bit. Blocks nest, and their adapters add up. Gradients reach the activations, not the
    strength. Raises `ModelError` when strength is not finite or has another length than the batch, and `AdapterError`
    when the adapter was loaded for another model.
    """
    strength = _checked(strength)
    if isinstance(strength, float) and strength == 0:
        yield
        return
    targets = targets_of(loaded, adapter)
    additions = [_addition(lora, to.weight, strength) for lora, to in zip(adapter.modules, targets, strict=True)]
    with changing(list(zip(targets, additions, strict=True))):
        yield


def targets_of(loaded: LoadedModel, adapter: Adapter) -> list[nn.Linear]:
    """The model's linear modules that the adapter's modules add to, in their order.

    Raises `AdapterError` when the adapter was loaded for another model.
    """
    try:
        return [_target(loaded, lora, len(lora.A)) for lora in adapter.modules]
    except AdapterError as error:
        raise AdapterError(f"Adapter {adapter.name!r}: {error}") from None


def _checked(strength: float | Tensor) -> float | Tensor:
    if not isinstance(strength, Tensor) or strength.ndim == 0:
        strength = float(strength)
        if not math.isfinite(strength):
            raise ModelError(f"Adapter strength {strength} is not a finite number.")
        return strength
    if strength.ndim != 1 or not torch.isfinite(strength).all():
        raise ModelError(f"Adapter strengths {strength.tolist()} are not one finite number for each row of the batch.")
    return strength.detach().float()


def _addition(lora: LoraModule, weight: Tensor, strength: float | Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """(input [batch, position, d_in], output [batch, position, d_out]) -> the output with the adapter's part."""
    A, B = lora.A.to(weight), lora.B.to(weight)
    if isinstance(strength, float):
        factor = strength * lora.scaling
        return lambda x, output: output + functional.linear(functional.linear(x, A), B) * factor
    rows = strength.nonzero().ravel().to(weight.device)
    factors = lora.scaling * strength.to(weight.device)[rows, None, None]

    def add(x: Tensor, output: Tensor) -> Tensor:
        if len(x) != len(strength):
            raise ModelError(f"{len(strength)} adapter strengths meet a batch of {len(x)} rows; give one or {len(x)}.")
        new = output[rows] + functional.linear(functional.linear(x[rows], A), B) * factors
        return output.index_copy(0, rows, new.to(output.dtype))

    return add


def _module(
    loaded: LoadedModel, config: PeftConfig, root: str, at: tuple[int, str], pair: Mapping[str, np.ndarray]
) -> LoraModule:
    """A and B at `at` (layer, name) with their scaling, checked against the configuration and the model."""
    layer, name = at
    where = f"layers.{layer}.{name}"
    check_pair(where, pair)
    A, B = (torch.from_numpy(pair[which]) for which in "AB")
    lora = LoraModule(layer, name, A, B, config.scaling(root + where))
    _target(loaded, lora, config.rank(root + where))
    return lora


def _target(loaded: LoadedModel, lora: LoraModule, rank: int) -> nn.Linear:
    """The linear module that `lora`, of this rank, adds to."""
    where, model = f"layers.{lora.layer}.{lora.name}", loaded.spec.id
    if lora.layer >= loaded.n_layers:
        raise AdapterError(
            f"it changes {where}, but {model} has layers 0 to {loaded.n_layers - 1}; choose an adapter of this model."
        )
    module = dict(loaded.blocks[lora.layer].named_modules()).get(lora.name)
    if not isinstance(module, nn.Linear):
        raise AdapterError(f"it changes {where}, no linear module of {model}; choose an adapter of this model.")
    needs = {"A": (rank, module.in_features), "B": (module.out_features, rank)}
    for which, matrix in (("A", lora.A), ("B", lora.B)):
        if tuple(matrix.shape) != needs[which]:
            raise AdapterError(
                f"lora_{which} of {where} is {list(matrix.shape)}, but rank {rank} on {model} needs "
                f"{list(needs[which])}; it was made for another base model, or {CONFIG} is not its own."
            )
    return module


def _check_selection(loaded: LoadedModel, config: PeftConfig, root: str, found: set[tuple[int, str]]) -> None:
    """The file must hold the modules that the configuration selects, no more and no fewer."""
    for layer, block in enumerate(loaded.blocks):
        for name, module in block.named_modules():
            selected = isinstance(module, nn.Linear) and config.selects(f"{root}layers.{layer}.{name}")
            if selected and (layer, name) not in found:
                raise AdapterError(
                    f"{CONFIG} selects layers.{layer}.{name}, but its tensors are missing; fetch or save it again."
                )
            if not selected and (layer, name) in found:
                raise AdapterError(f"there are tensors for layers.{layer}.{name}, but {CONFIG} does not select it.")


