"""Directions on disk: safetensors with their origin, written whole; and vectors made elsewhere, read with care.

Our own files hold one tensor `directions` [n, d_model] float32 and, as metadata, what each row is. A vector made
elsewhere says neither its layer nor its model, so both are given with it; what cannot be told apart is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from core.directions import Direction
from core.errors import DirectionError

FORMAT = "em-microscope-direction"
FORMAT_VERSION = 1
TENSOR = "directions"

#: Endings of files that torch writes.
TORCH_ENDINGS = (".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Place:
    """The residual stream that a vector made elsewhere is said to live in."""

    model: str
    layer: int
    d_model: int
    n_layers: int
    resid_norm: float | None = None


def save_directions(path: Path, directions: Sequence[Direction]) -> Path:
    """Write directions of one width to `path` (.safetensors), through a temporary name. Exact: float32 as they are."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise DirectionError(f"{path}: directions are written as .safetensors; give the file that ending.")
    content = as_bytes(directions)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise DirectionError(f"{path}: cannot be written: {error.strerror or error}.") from None
    finally:
        temporary.unlink(missing_ok=True)
    return path


def as_bytes(directions: Sequence[Direction]) -> bytes:
    """The content of a direction file."""
    if not directions or len({d.d_model for d in directions}) != 1:
        raise DirectionError("A direction file takes one or more directions of one width.")
    rows = [{"name": d.name, "model": d.model, "layer": d.layer, "resid_norm": d.resid_norm, "origin": dict(d.origin)}
            for d in directions]
    metadata = {"format": FORMAT, "format_version": str(FORMAT_VERSION),
                TENSOR: json.dumps(rows, ensure_ascii=False, sort_keys=True)}
    return save({TENSOR: np.stack([d.vector for d in directions])}, metadata)


def is_ours(path: Path) -> bool:
    """Whether `path` is a direction file that this program wrote."""
    if Path(path).suffix != ".safetensors":
        return False
    try:
        with safe_open(path, "numpy") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


def load_directions(path: Path) -> list[Direction]:
    """Every direction of a file that this program wrote. Raises `DirectionError` when it is missing or another file."""
    path = Path(path)
    tensors, metadata = _safetensors(path)
    if metadata.get("format") != FORMAT:
        raise DirectionError(
            f"{path}: does not say which layer and model its vectors belong to; give the layer with it (--layer), or "
            "make it with `python -m core direction`."
        )
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise DirectionError(
            f"{path}: format version {metadata.get('format_version')}, this program reads {FORMAT_VERSION}."
        )
    try:
        rows, vectors = json.loads(metadata[TENSOR]), tensors[TENSOR]
        return [Direction(row["name"], row["model"], row["layer"], vector, row["resid_norm"], row["origin"])
                for row, vector in zip(rows, vectors, strict=True)]
    except (KeyError, ValueError, TypeError) as error:
        raise DirectionError(f"{path}: the directions cannot be read ({error}); make the file again.") from None


def load_direction(path: Path, layer: int | None = None) -> Direction:
    """The one direction of a file of ours, or its one at `layer`."""
    found = load_directions(path)
    chosen = [d for d in found if layer is None or d.layer == layer]
    if len(chosen) != 1:
        layers = ", ".join(str(d.layer) for d in found)
        raise DirectionError(f"{path}: holds directions of layers {layers}; choose one of them with --layer.")
    return chosen[0]


def load_vector(path: Path, place: Place, key: str | None = None) -> Direction:
    """A vector made elsewhere: [d_model], or a stack over layers, from .safetensors, .npy or a torch file.

    A stack of n_layers rows holds resid_post of layer i in row i; one of n_layers + 1 rows is taken as transformers'
    `hidden_states`, so layer i is in row i + 1 and its last row, which is after the final norm, is refused. Torch
    files are opened with weights_only, so they hold plain tensors or nothing is read. Raises `DirectionError`.
    """
    path = Path(path)
    if not 0 <= place.layer < place.n_layers:
        raise DirectionError(
            f"{path}: layer {place.layer} does not exist; {place.model} has layers 0 to {place.n_layers - 1}."
        )
    name, array = _one(path, _arrays(path), key)
    if array.dtype.kind not in "fiu":
        raise DirectionError(f"{path}: tensor {name!r} is {array.dtype}, not of real numbers.")
    vector, row = _row(path, name, np.squeeze(array), place)
    origin = {"kind": "file", "file": path.name, "tensor": name, **({"row": str(row)} if row is not None else {})}
    return Direction(path.stem, place.model, place.layer, vector.astype(np.float32), place.resid_norm, origin)


def _row(path: Path, name: str, array: np.ndarray, place: Place) -> tuple[np.ndarray, int | None]:
    """(vector [d_model], the row of the stack it was or None)."""
    if array.shape == (place.d_model,):
        return array, None
    if array.ndim == 2 and array.shape[1] == place.d_model and array.shape[0] in (place.n_layers, place.n_layers + 1):
        hidden_states = array.shape[0] == place.n_layers + 1
        if hidden_states and place.layer == place.n_layers - 1:
            raise DirectionError(
                f"{path}: {name!r} has {array.shape[0]} rows, as hidden_states have, whose last is after the final "
                f"norm and not resid_post of layer {place.layer}; choose an earlier layer."
            )
        row = place.layer + hidden_states
        return array[row], row
    raise DirectionError(
        f"{path}: {name!r} is {list(array.shape)}, but a direction of {place.model} is [{place.d_model}], or a stack "
        f"[{place.n_layers}, {place.d_model}] over its layers; it was made for another model."
    )


def _one(path: Path, arrays: Mapping[str, np.ndarray], key: str | None) -> tuple[str, np.ndarray]:
    names = ", ".join(sorted(arrays)[:12]) or "none"
    if key is not None:
        if key not in arrays:
            raise DirectionError(f"{path}: has no tensor {key!r}; it holds {names}.")
        return key, arrays[key]
    if len(arrays) != 1:
        raise DirectionError(f"{path}: holds {len(arrays)} tensors ({names}); say which one with --key.")
    return next(iter(arrays.items()))


def _arrays(path: Path) -> Mapping[str, np.ndarray]:
    """Name -> array of a vector file, by its ending."""
    if path.suffix == ".safetensors":
        return _safetensors(path)[0]
    if not path.is_file():
        raise DirectionError(f"{path}: no such file.")
    if path.suffix == ".npy":
        try:
            return {path.stem: np.load(path, allow_pickle=False)}
        except (OSError, ValueError, EOFError) as error:
            raise DirectionError(f"{path}: is no plain NumPy array ({_first(error)}).") from None
    if path.suffix in TORCH_ENDINGS:
        return _torch_arrays(path)
    raise DirectionError(f"{path}: a vector is read from .safetensors, .npy or a torch file (.pt, .pth, .bin).")


def _safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    if not path.is_file():
        raise DirectionError(f"{path}: no such file; make it with `python -m core direction`.")
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            try:
                return {name: file.get_tensor(name) for name in names}, metadata
            except TypeError:  # bfloat16, which NumPy does not know
                return _torch_safetensors(path), metadata
    except (OSError, SafetensorError) as error:
        raise DirectionError(f"{path}: is no safetensors file ({_first(error)}).") from None


def _torch_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors.torch import load_file

    return {name: tensor.float().numpy() for name, tensor in load_file(path).items()}


def _torch_arrays(path: Path) -> dict[str, np.ndarray]:
    import torch

    try:
        held: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # weights_only raises many kinds; each means: not plain tensors
        raise DirectionError(
            f"{path}: holds more than plain tensors and is not opened ({_first(error)}); save the tensor alone, best "
            "as .safetensors."
        ) from None
    if isinstance(held, torch.Tensor):
        held = {path.stem: held}
    if isinstance(held, (list, tuple)) and held and all(isinstance(t, torch.Tensor) for t in held):
        if len({t.shape for t in held}) == 1:
            held = {path.stem: torch.stack(list(held))}
    if not isinstance(held, Mapping):
        raise DirectionError(f"{path}: holds a {type(held).__name__}, not a tensor or named tensors.")
    return {str(k): t.detach().float().numpy() for k, t in held.items() if isinstance(t, torch.Tensor)}


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
