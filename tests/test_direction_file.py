"""Directions survive a file exactly; vectors made elsewhere are read where they are clear and refused where not."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from core.directions import Direction
from core.errors import DirectionError
from core.store.direction_file import (
    Place,
    is_ours,
    load_direction,
    load_directions,
    load_vector,
    save_directions,
)

RNG = np.random.default_rng(0)
PLACE = Place("tiny", layer=2, d_model=6, n_layers=4, resid_norm=3.0)


def some(layer: int = 2, **more: object) -> Direction:
    return Direction("bad minus good", "tiny", layer, RNG.standard_normal(6), 1.25, {"contrast": "data"}, **more)


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    written = [some(1), some(3)]
    path = save_directions(tmp_path / "deep" / "d.safetensors", written)
    assert is_ours(path)
    for a, b in zip(written, load_directions(path), strict=True):
        assert np.array_equal(a.vector, b.vector)
        assert (a.name, a.model, a.layer, a.resid_norm, dict(a.origin)) == (
            b.name, b.model, b.layer, b.resid_norm, dict(b.origin)
        )  # fmt: skip
    assert load_direction(path, 3).layer == 3
    with pytest.raises(DirectionError, match="layers 1, 3; choose one"):
        load_direction(path)
    assert os.listdir(path.parent) == ["d.safetensors"]


def test_stacks_over_layers_and_hidden_states(tmp_path: Path) -> None:
    stack = RNG.standard_normal((5, 6)).astype(np.float32)
    np.save(tmp_path / "layers.npy", stack[:4])
    np.save(tmp_path / "states.npy", stack)
    assert np.array_equal(load_vector(tmp_path / "layers.npy", PLACE).vector, stack[2])
    found = load_vector(tmp_path / "states.npy", PLACE)
    assert np.array_equal(found.vector, stack[3]) and found.origin["row"] == "3"
    with pytest.raises(DirectionError, match="after the final norm"):
        load_vector(tmp_path / "states.npy", Place("tiny", 3, 6, 4))


def test_every_form_of_a_vector_made_elsewhere(tmp_path: Path) -> None:
    vector = RNG.standard_normal(6).astype(np.float32)
    np.save(tmp_path / "a.npy", vector[None])
    save_file({"v": vector}, tmp_path / "b.safetensors")
    torch.save(torch.from_numpy(vector), tmp_path / "c.pt")
    torch.save({"v": torch.from_numpy(vector), "layer": 2}, tmp_path / "d.pt")
    torch.save([torch.from_numpy(vector)] * 4, tmp_path / "e.pt")
    for name in ("a.npy", "b.safetensors", "c.pt", "d.pt", "e.pt"):
        found = load_vector(tmp_path / name, PLACE)
        assert np.array_equal(found.vector, vector), name
        assert (found.layer, found.resid_norm, found.origin["kind"]) == (2, 3.0, "file")
    assert not is_ours(tmp_path / "b.safetensors") and not is_ours(tmp_path / "a.npy")


def test_bfloat16_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file as save_torch

    vector = torch.arange(6).bfloat16()
    save_torch({"v": vector}, tmp_path / "half.safetensors")
    assert np.array_equal(load_vector(tmp_path / "half.safetensors", PLACE).vector, vector.float().numpy())


class Surprise:
    """What a pickle could run."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("ran",)


def test_what_is_unclear_or_unsafe_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("wide.npy", np.ones(7))
    np.save("stack.npy", np.ones((3, 6)))
    np.save("words.npy", np.array(["a"] * 6))
    np.save("object.npy", np.array([Surprise()], dtype=object), allow_pickle=True)
    save_file({"a": np.ones(6), "b": np.ones(6)}, "two.safetensors")
    torch.save(Surprise(), "surprise.pt")
    torch.save(3, "number.pt")
    Path("text.safetensors").write_text("no")
    Path("vector.txt").write_text("1 2 3")
    for name, says in {
        "wide.npy": r"is \[7\], but a direction of tiny is \[6\]",
        "stack.npy": r"\[3, 6\]",
        "words.npy": "not of real numbers",
        "object.npy": "no plain NumPy array",
        "two.safetensors": "2 tensors .a, b.; say which one",
        "surprise.pt": "more than plain tensors",
        "number.pt": "holds a int",
        "text.safetensors": "no safetensors file",
        "vector.txt": "read from .safetensors, .npy or a torch file",
        "absent.npy": "no such file",
    }.items():
        with pytest.raises(DirectionError, match=says):
            load_vector(Path(name), PLACE)
    assert not Path("ran").exists()
    assert np.array_equal(load_vector(Path("two.safetensors"), PLACE, "b").vector, np.ones(6, np.float32))
    with pytest.raises(DirectionError, match="layers 0 to 3"):
        load_vector(Path("wide.npy"), Place("tiny", 4, 6, 4))
    with pytest.raises(DirectionError, match="does not say which layer"):
        load_directions(Path("two.safetensors"))
    with pytest.raises(DirectionError, match="ending"):
        save_directions(Path("d.pt"), [some()])
