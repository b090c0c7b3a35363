"""A direction among its relatives, and back from a saved direction to the caches it was made from.

Knows presets and where cache files lie; the arithmetic is in direction.py and decompose.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from core.analysis.compare import Sides
from core.analysis.direction import (
    WEIGHTINGS,
    contrast_direction,
    cosine_interval,
    feature_differences,
    is_nothing,
    pools,
)
from core.analysis.find import Open, open_sides
from core.directions import Direction
from core.errors import CacheError, CacheMismatch, DirectionError
from core.experiment import load_experiment
from core.specs import POSITIONS, ContrastSpec, Experiment, SaeSpec, Side
from core.store.direction_file import Place, is_ours, load_direction, load_vector
from core.store.places import side_file
from core.store.reader import Cache


@dataclass(frozen=True, eq=False)
class Relative:
    """A direction that another can be held against, and where it is made from."""

    sides: Sides
    layer: int
    position: str
    weighting: str
    preset: str = ""
    direction: Direction = field(init=False, repr=False)

    def __post_init__(self) -> None:
        made = contrast_direction(self.sides, self.layer, self.position, self.weighting, self.preset)
        object.__setattr__(self, "direction", made)

    def cosine_interval(self, other: Relative) -> tuple[float, float]:
        """95% interval of the cosine between both directions, prompts drawn anew on either side."""
        return cosine_interval(*(pools(r.sides, r.layer, r.position, r.weighting) for r in (self, other)))


def readers(
    experiment: Experiment, contrast: ContrastSpec, folder: Path | None = None, opened: Open = Cache.open
) -> dict[str, Sides]:
    """Variant -> the contrast's text as that variant reads it, wherever it is cached; the contrast's own reader first.

    Empty for a contrast between two readers. A file that cannot be used is left out.
    """
    own = contrast.target.variant
    if own != contrast.reference.variant:
        return {}
    found = {}
    for variant in (own, *(v for v in experiment.variants if v != own)):
        read = replace(contrast, target=replace(contrast.target, variant=variant),
                       reference=replace(contrast.reference, variant=variant))
        if all(side_file(experiment, side, folder).is_file() for side in (read.target, read.reference)):
            try:
                found[variant] = open_sides(experiment, read, folder, opened)
            except CacheError:
                continue
    return found


def across_layers(sides: Sides, position: str, weighting: str, preset: str = "") -> dict[str, Relative]:
    """`layer L` -> the contrast's direction there."""
    made = {f"layer {n}": Relative(sides, n, position, weighting, preset) for n in sides.layers}
    return _something(made)


def across_ways(sides: Sides, layer: int, preset: str = "") -> dict[str, Relative]:
    """Position and weighting -> the direction at `layer`; a position where both sides are the same is left out."""
    return _something({
        _way(position, weighting): Relative(sides, layer, position, weighting, preset)
        for position in POSITIONS for weighting in WEIGHTINGS if weighting == "response" or position == "response"
    })


def across_contrasts(
    experiment: Experiment, layer: int, position: str, weighting: str, folder: Path | None = None,
    opened: Open = Cache.open,
) -> dict[str, Relative]:
    """Contrast -> its direction at `layer`, for every contrast that is cached there; other readers of the same text as
    `contrast, read by variant`."""
    found: dict[str, Relative] = {}
    seen = {(_text(c), c.target.variant) for c in experiment.contrasts}
    for contrast in experiment.contrasts:
        try:
            everyone = readers(experiment, contrast, folder, opened)
            everyone = everyone or {"": open_sides(experiment, contrast, folder, opened)}
        except CacheError:
            continue
        for variant, sides in everyone.items():
            own = variant in ("", contrast.target.variant)
            if layer not in sides.layers or (not own and (_text(contrast), variant) in seen):
                continue
            seen.add((_text(contrast), variant))
            name = contrast.name if own else f"{contrast.name}, read by {variant}"
            found[name] = Relative(sides, layer, position, weighting, experiment.name)
    return _something(found)


def relatives(
    experiment: Experiment, sides: Sides, layer: int, position: str, weighting: str, folder: Path | None = None,
    opened: Open = Cache.open,
) -> dict[str, Relative]:
    """Everything the direction of `sides` at `layer` can be held against, by name; itself left out."""
    name = sides.contrast.name
    found = {
        **across_layers(sides, position, weighting, experiment.name),
        **across_ways(sides, layer, experiment.name),
        **across_contrasts(experiment, layer, position, weighting, folder, opened),
    }
    own = (f"layer {layer}", _way(position, weighting), name)
    return {k: r for k, r in found.items() if k not in own}


def caches_of(direction: Direction, experiment: Experiment, folder: Path | None = None, opened: Open = Cache.open
              ) -> Sides:
    """The open sides that a direction was made from. Raises `DirectionError` for a vector made elsewhere, and
    `CacheMismatch` when the caches have been made anew since."""
    origin = direction.origin
    if origin.get("kind") != "contrast":
        raise DirectionError(
            f"Direction {direction.name!r} was not made from a contrast, so there are no mean feature activations for "
            "an exact decomposition; use encoder, cosine, omp or nnls."
        )
    sides = open_sides(experiment, experiment.contrast(origin["contrast"]), folder, opened)
    for side in ("target", "reference"):
        cache: Cache = getattr(sides, side)
        if cache.fingerprint != origin[f"{side}_fingerprint"]:
            raise CacheMismatch(
                cache.path, "fingerprint", origin[f"{side}_fingerprint"], cache.fingerprint,
                "the file was made anew since the direction was; make the direction again",
            )  # fmt: skip
    return sides


def differences_of(direction: Direction, sides: Sides) -> np.ndarray:
    """float64 [d_sae]: the feature differences that belong to a direction made from `sides`."""
    return feature_differences(sides, direction.layer, direction.origin["position"], direction.origin["weighting"])


def load_any(
    file: Path, layer: int | None = None, key: str | None = None, preset: str | None = None, folder: Path | None = None
) -> tuple[Direction, Experiment]:
    """A direction of ours, or a vector made elsewhere for which `layer` and `preset` are given; with its experiment.

    Raises `DirectionError` naming what has to be given.
    """
    if is_ours(file):
        found = load_direction(file, layer)
        named = preset or found.origin.get("preset")
        if not named:
            raise DirectionError(f"{file}: does not name its preset; give it with --preset.")
        return found, load_experiment(named)
    if preset is None or layer is None:
        raise DirectionError(f"{file}: is no direction file of this program; give --layer and --preset with it.")
    experiment = load_experiment(preset)
    model = experiment.model
    if not (model.d_model and model.n_layers):
        raise DirectionError(f"{file}: preset {preset!r} does not state d_model and n_layers of {model.id}; add them.")
    place = Place(model.id, layer, model.d_model, model.n_layers, resid_norm(experiment, layer, folder))
    return load_vector(file, place, key), experiment


def resid_norm(experiment: Experiment, layer: int, folder: Path | None = None, opened: Open = Cache.open
               ) -> float | None:
    """Mean residual norm at response tokens of `layer`, from the first cache that has it; the base's before others'."""
    cache = any_cache(experiment, layer, folder, opened)
    return cache.info(layer).health.get("mean_resid_norm") if cache else None


def any_cache(experiment: Experiment, layer: int, folder: Path | None = None, opened: Open = Cache.open, *,
              features: bool = False) -> Cache | None:
    """The first readable cache of the experiment's contrasts that holds `layer` (with `features`, read by an SAE)."""
    sides = dict.fromkeys(s for c in experiment.contrasts for s in (c.reference, c.target))
    for side in sorted(sides, key=lambda s: s.variant != "base"):
        try:
            cache = opened(side_file(experiment, side, folder))
        except CacheError:
            continue
        if layer in cache.layers and (not features or cache.info(layer).d_sae):
            return cache
    return None


def sae_spec(experiment: Experiment, layer: int) -> SaeSpec:
    """The experiment's SAE at `layer`. Raises `DirectionError` where it has none."""
    spec = experiment.sae(layer)
    if spec is None:
        layers = ", ".join(str(s.layer) for s in experiment.saes) or "no layer"
        raise DirectionError(
            f"Preset {experiment.name!r} has no SAE at layer {layer} to decompose with; it has SAEs at {layers}."
        )
    return spec


def _way(position: str, weighting: str) -> str:
    words = {"response": "each response counts once", "token": "each token counts once"}
    return "last prompt token" if position == "last_prompt" else f"response tokens, {words[weighting]}"


def _text(contrast: ContrastSpec) -> tuple[Side, Side]:
    """What is read, whoever reads it."""
    return replace(contrast.target, variant=""), replace(contrast.reference, variant="")


def _something(found: dict[str, Relative]) -> dict[str, Relative]:
    return {name: r for name, r in found.items() if not is_nothing(r.direction)}
