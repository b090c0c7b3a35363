"""Where an experiment's files lie, whether or not they exist. Opens none, and loads no model."""

from __future__ import annotations

from pathlib import Path

from core import paths
from core.specs import Experiment, Side
from core.store.layout import cache_file


def experiment_folder(experiment: Experiment) -> Path:
    """Where an experiment's cache files, labels, local SAEs and adapters lie."""
    return paths.CACHE / experiment.name


def side_file(experiment: Experiment, side: Side, folder: Path | None = None) -> Path:
    """The cache file of one side of a contrast, in `folder` where one is given."""
    return cache_file(folder or experiment_folder(experiment), side.variant, side.conversations)
