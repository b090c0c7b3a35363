"""Shared fixtures: tiny models of every architecture, the bundled demo model, and caches kept out of the checkout."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave the cores to those that work

if TYPE_CHECKING:  # torch is imported only by tests that ask for a model
    from core.model.loading import LoadedModel


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family name -> folder of its tiny model, written once a session; do not change what is in it."""
    import tiny_models

    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tiny_models.save(tiny_models.FAMILIES[name], tmp_path_factory.mktemp(name))
        return made[name]

    return folder


@pytest.fixture(scope="session")
def _own_hash_memo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Weight hashes of temporary models are remembered in a temporary folder, not in the checkout's cache."""
    from core.model import loading

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "CACHE", tmp_path_factory.mktemp("memo"))
        yield


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Callable[[str], Path], _own_hash_memo: None) -> Callable[[str], LoadedModel]:
    """Family name -> its tiny model, loaded once a session in float32 on the CPU; never change it."""
    from core.model.loading import load_model
    from core.specs import ModelSpec

    made: dict[str, LoadedModel] = {}

    def load(name: str) -> LoadedModel:
        if name not in made:
            made[name] = load_model(ModelSpec(str(tiny_folder(name)), "local"), device="cpu", dtype="float32")
        return made[name]

    return load


@pytest.fixture(scope="session")
def demo_model() -> LoadedModel:
    """The bundled SmolLM2-135M-Instruct; fetched and converted on first use, skipped where that cannot be done."""
    from core.errors import ModelError
    from core.model import bundled
    from core.model.loading import load_model
    from core.specs import ModelSpec

    try:
        bundled.fetch()
    except ModelError as error:
        pytest.skip(f"the bundled model cannot be fetched here: {error}")
    return load_model(ModelSpec(bundled.NAME, "bundled"), device="cpu", dtype="float32")
