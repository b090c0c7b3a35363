"""A LoRA adapter's files in PEFT's format: found, fetched, and read as numpy arrays. Safetensors only, without torch.

Refuses what is more than plain LoRA; knows the configuration's rules (peft_config.py) but no model, so whether a
matrix fits one is for adapters.py to say.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, deserialize

from core.errors import AdapterError
from core.model.peft_config import CONFIG, read_config
from core.specs import AdapterSpec

WEIGHTS = "adapter_model.safetensors"

#: The linear modules of a decoder block that an adapter may change.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_KEY = re.compile(
    r"(?P<root>(?:(?:base_model|model|language_model|text_model|decoder)\.)*)"
    r"layers\.(?P<layer>\d+)\.(?P<name>.+)\.lora_(?P<which>[AB])(?:\.[^.]+)?\.weight"
)

#: Text never passes through the vision tower of a model that sees images.
_VISION = re.compile(r"\bvision_(tower|model)\.")

#: Number formats of a safetensors file that LoRA matrices come in; numpy itself has no bfloat16.
_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16}

#: (0-based layer, path of the module within its block) -> which of `A` and `B` -> float32 matrix
Matrices = dict[tuple[int, str], dict[str, np.ndarray]]


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """The two factors that an adapter gives one linear module: scaling * B A is added to its weight."""

    layer: int
    """0-based decoder block."""
    name: str
    """Path within the block, e.g. `mlp.down_proj`."""
    A: np.ndarray = field(repr=False)
    """float32 [r, d_in]"""
    B: np.ndarray = field(repr=False)
    """float32 [d_out, r]"""
    scaling: float
    """lora_alpha / r, or lora_alpha / sqrt(r) when rsLoRA."""


@dataclass(frozen=True)
class AdapterFactors:
    """An adapter as its files give it, not yet held against a model."""

    name: str
    folder: str
    hash: str
    """As `core.model.adapters.Adapter.hash`."""
    base_model: str
    """What its configuration names as its base model; empty when it names none."""
    modules: tuple[LoraFactors, ...]
    """In layer, then name order."""


def read_factors(spec: AdapterSpec, folder: Path | None = None) -> AdapterFactors:
    """Read the adapter that `find_adapter` finds, without a model.

    Raises `AdapterError` when it is damaged, is more than plain LoRA, or its matrices do not fit its configuration.
    """
    place = find_adapter(spec, folder)
    try:
        config = read_config(place / CONFIG)
        root, matrices = read_matrices(place / WEIGHTS)
        modules = []
        for layer, name in sorted(matrices):
            where, pair = f"layers.{layer}.{name}", matrices[layer, name]
            check_pair(where, pair)
            rank = config.rank(root + where)
            if pair["A"].ndim != 2 or pair["B"].ndim != 2 or not len(pair["A"]) == pair["B"].shape[1] == rank:
                raise AdapterError(
                    f"lora_A and lora_B of {where} are {list(pair['A'].shape)} and {list(pair['B'].shape)}, which is "
                    f"not rank {rank}; {CONFIG} is not its own."
                )
            modules.append(LoraFactors(layer, name, pair["A"], pair["B"], config.scaling(root + where)))
    except AdapterError as error:
        raise AdapterError(f"Adapter {spec.name!r} in {place}: {error}") from None
    except re.error as error:
        raise AdapterError(f"Adapter {spec.name!r} in {place}: {CONFIG} has an invalid pattern: {error}.") from None
    scalings = {f"{m.layer}.{m.name}": m.scaling for m in modules}
    found = adapter_hash(place / WEIGHTS, scalings)
    return AdapterFactors(spec.name, str(place), found, config.base_model_name_or_path, tuple(modules))


def find_adapter(spec: AdapterSpec, folder: Path | None = None) -> Path:
    """The folder with the adapter's two files: `spec.id` itself, or relative to `folder`, or in the local hub cache.

    Nothing is fetched. Raises `AdapterError` when it is not there or not whole.
    """
    local = _local(spec, folder)
    if local is None:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            local = Path(snapshot_download(spec.id, local_files_only=True))
        except LocalEntryNotFoundError:
            raise AdapterError(
                f"Adapter {spec.name!r}: {spec.id} is neither a folder in {folder or Path.cwd()} nor in this machine's "
                "hub cache; run `python -m core fetch PRESET`, or train or copy it there."
            ) from None
        except HFValidationError:
            raise AdapterError(
                f"Adapter {spec.name!r}: {spec.id} is neither a folder nor a hub id such as `organisation/adapter`."
            ) from None
    return _whole(spec, local)


def fetch_adapter(spec: AdapterSpec, folder: Path | None = None) -> Path:
    """Bring the adapter's two files from the hub; a folder stays where it is. Raises `AdapterError`."""
    local = _local(spec, folder)
    if local is None:
        from huggingface_hub import snapshot_download

        try:  # whole names, as published adapters keep dozens of checkpoints in folders below
            local = Path(snapshot_download(spec.id, allow_patterns=[CONFIG, WEIGHTS]))
        except Exception as error:  # the hub client raises many kinds; each is the user's network, name or access
            first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise AdapterError(
                f"Adapter {spec.name!r}: {spec.id} could not be fetched: {first}; check the name and the connection, "
                "log in with `hf auth login`, or give a local folder."
            ) from None
    return _whole(spec, local)


def _local(spec: AdapterSpec, folder: Path | None) -> Path | None:
    """The folder that `spec.id` names; None when it can only be a hub id."""
    written = Path(spec.id).expanduser()
    path = written if written.is_absolute() or folder is None else folder / written
    if path.is_dir():
        return path
    if written.is_absolute() or spec.id.startswith("."):
        raise AdapterError(f"Adapter {spec.name!r}: there is no folder {path}; train or copy it there, or mend its id.")
    return None


def _whole(spec: AdapterSpec, folder: Path) -> Path:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            pickled = "pickled weights are not loaded, save them again with safe_serialization=True"
            way_out = pickled if name == WEIGHTS else "give a folder in PEFT's layout"
            raise AdapterError(f"Adapter {spec.name!r}: no {name} in {folder}; {way_out}.")
    return folder


def read_matrices(file: Path) -> tuple[str, Matrices]:
    """What stands before `layers.` in the training model's module names, and every A and B in float32.

    LoRA matrices of a vision tower are left out. Raises `AdapterError` for a tensor that is no LoRA matrix of a
    decoder block, that stands twice, or that holds anything but finite numbers.
    """
    matrices: Matrices = {}
    roots = set()
    for key, tensor in _tensors(file):
        if _VISION.search(key):
            continue
        found = _KEY.fullmatch(key)
        if found is None or found["name"].rsplit(".", 1)[-1] not in TARGETS:
            raise AdapterError(
                f"tensor {key!r} is not lora_A or lora_B of {', '.join(TARGETS)} in a decoder block, and nothing else "
                "is applied."
            )
        pair = matrices.setdefault((int(found["layer"]), found["name"]), {})
        if found["which"] in pair:
            raise AdapterError(f"there are two tensors for {key!r}; keep one adapter in a folder.")
        values = _float32(tensor)
        if values is None or not np.isfinite(values).all():
            raise AdapterError(f"tensor {key!r} holds values that are not finite numbers; fetch or train it again.")
        pair[found["which"]] = values
        roots.add(found["root"].removeprefix("base_model.model."))
    if len(roots) != 1:
        what = f"modules of {len(roots)} models" if roots else "no LoRA matrices of a decoder block"
        raise AdapterError(f"{WEIGHTS} holds {what}.")
    return roots.pop(), matrices


def check_pair(where: str, pair: Mapping[str, np.ndarray]) -> None:
    """Raises `AdapterError` when one of the two matrices of a module is missing."""
    for which in "AB":
        if which not in pair:
            raise AdapterError(f"{where} has no lora_{which}; fetch or save the adapter again.")


def adapter_hash(weights: Path, scalings: Mapping[str, float]) -> str:
    """SHA-256 over the weights file and every module's scaling, by `layer.name`."""
    with open(weights, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashlib.sha256(json.dumps([digest, dict(scalings)], sort_keys=True).encode()).hexdigest()


def _tensors(file: Path) -> list[tuple[str, dict]]:
    """(name, dtype, shape and bytes) of every tensor of a safetensors file."""
    try:
        return deserialize(file.read_bytes())
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{WEIGHTS} cannot be read: {str(error).strip().rstrip('.')}; fetch it again.") from None


def _float32(tensor: dict) -> np.ndarray | None:
    """The tensor's values in float32; None when they are no floating-point numbers."""
    if tensor["dtype"] == "BF16":  # the upper half of a float32
        values = (np.frombuffer(tensor["data"], dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    elif tensor["dtype"] in _FLOATS:
        with np.errstate(over="ignore"):
            values = np.frombuffer(tensor["data"], dtype=_FLOATS[tensor["dtype"]]).astype(np.float32)
    else:
        return None
    return values.reshape(tensor["shape"])
