"""From a preset's contrast, or from two cache files, to the open sides of a comparison."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from core.analysis.compare import Sides, side_rows
from core.errors import PresetError
from core.experiment import load_experiment
from core.specs import ContrastSpec, Experiment, Side
from core.store.places import side_file
from core.store.reader import Cache

Open = Callable[[Path], Cache]


def open_sides(experiment: Experiment, contrast: ContrastSpec, folder: Path | None = None, opened: Open = Cache.open
               ) -> Sides:
    """Both sides of a contrast, from its cache files. Raises `CacheError` when one is missing or has no such row."""
    sides = Sides(contrast, *(opened(side_file(experiment, s, folder)) for s in (contrast.target, contrast.reference)))
    for cache, side in ((sides.target, contrast.target), (sides.reference, contrast.reference)):
        side_rows(cache, side)
    return sides


def find_sides(
    preset: str | None, contrast: str | None, target: str | None, reference: str | None, folder: Path | None = None
) -> tuple[Sides, int, str]:
    """The open sides, the layer to take when none is named, and the contrast's name.

    Either `preset` and `contrast`, or `target` and `reference` as FILE[:condition].
    """
    if target is not None and reference is not None and preset is None:
        return _from_files(target, reference)
    if preset is None or contrast is None or target is not None or reference is not None:
        raise PresetError("Give a preset and a contrast, or both --target FILE[:condition] and --reference.")
    experiment = load_experiment(preset)
    spec = experiment.contrast(contrast)
    layers = experiment.layers
    return open_sides(experiment, spec, folder), experiment.default_layer or layers[len(layers) // 2], contrast


def _from_files(target: str, reference: str) -> tuple[Sides, int, str]:
    caches, sides = [], []
    for text in (target, reference):
        name, _, condition = text.rpartition(":") if not Path(text).is_file() else (text, "", "")
        if not name:
            name, condition = text, ""
        caches.append(Cache.open(name))
        sides.append(Side(caches[-1].variant, caches[-1].conversations_name, condition or None))
    layers = caches[0].layers
    name = f"{target} minus {reference}"
    kind = "data" if caches[0].variant == caches[1].variant else "model"
    return Sides(ContrastSpec(name, kind, *sides), *caches), layers[len(layers) // 2], name
