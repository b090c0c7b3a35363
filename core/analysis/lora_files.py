"""From a preset and an adapter to the open files a LoRA is read from: factors, firing, caches of its model contrast.

Knows presets and where files lie; the arithmetic is in the other lora modules. Loads no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from core.analysis.compare import Sides
from core.analysis.direction import contrast_direction, is_nothing
from core.analysis.direction_files import Open, open_sides
from core.analysis.lora import Component, components
from core.analysis.lora_effect import Prediction, Writes, predict, writes
from core.conversations import ConversationSet
from core.dictionary import Dictionary
from core.directions import Direction
from core.errors import AdapterError, CacheError, CacheMismatch, MicroscopeError
from core.model.adapter_files import AdapterFactors, read_factors
from core.specs import AdapterSpec, ContrastSpec, Experiment
from core.store.firing_file import Firing
from core.store.places import experiment_folder
from core.store.reader import Cache

Dictionaries = Callable[[int], Dictionary | None]


@dataclass(frozen=True, eq=False)
class OpenLora:
    """An adapter's components with their firing."""

    factors: AdapterFactors
    parts: tuple[Component, ...] = field(repr=False)
    firing: Firing

    @cached_property
    def writes(self) -> Writes:
        return writes(self.firing, self.parts)

    def component(self, layer: int, kind: str, index: int) -> int | None:
        """The place of a component among all; None where the adapter has no such."""
        for i, c in enumerate(self.parts):
            if (c.key.layer, c.key.kind, c.key.index) == (layer, kind, index):
                return i
        return None


def adapter_spec(experiment: Experiment, name_or_folder: str) -> AdapterSpec:
    """The preset's adapter by name, or any folder in PEFT's layout. Raises `AdapterError` when it is neither."""
    for spec in experiment.adapters:
        if spec.name == name_or_folder:
            return spec
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        return AdapterSpec(folder.resolve().name, str(folder.resolve()))
    known = ", ".join(a.name for a in experiment.adapters) or "none"
    raise AdapterError(f"{name_or_folder!r} is neither an adapter of preset {experiment.name!r} (it has {known}) nor a "
                       "folder.")  # fmt: skip


def check_sets(firing: Firing, sets: Sequence[ConversationSet], kept: int | None = None) -> None:
    """Raise `CacheMismatch` when the file was made from other conversations, or keeps another number of components."""
    for s in sets:
        if firing.spec["sets"].get(s.name) != s.hash:
            raise CacheMismatch(firing.path, f"conversations {s.name}", s.hash, firing.spec["sets"].get(s.name))
    if kept is not None and firing.spec["kept"] != kept:
        raise CacheMismatch(firing.path, "kept", kept, firing.spec["kept"])


def open_lora(experiment: Experiment, spec: AdapterSpec, firing: Firing) -> OpenLora:
    """Put an open firing file beside its adapter. Raises `CacheMismatch` when it is another's."""
    factors = read_factors(spec, experiment_folder(experiment))
    if firing.spec["adapter"] != factors.hash:
        raise CacheMismatch(firing.path, "adapter", factors.hash, firing.spec["adapter"],
                            "the adapter has changed since; remove the file and run `python -m core lora` again")
    return OpenLora(factors, components(factors), firing)


@dataclass(frozen=True, eq=False)
class ContrastPrediction:
    """How much of one model contrast an adapter's firing predicts, by layer."""

    contrast: str
    of: str
    """The fine-tuned variant that was measured."""
    by: str
    """The adapter whose firing predicts."""
    layers: tuple[Prediction, ...]


def predict_contrast(
    lora: OpenLora, contrast: ContrastSpec, sides: Sides, dictionaries: Dictionaries
) -> ContrastPrediction:
    """The prediction of `contrast` (a variant minus base) at every layer that both sides have cached."""
    of, by = contrast.target.variant, lora.firing.adapter
    found = tuple(
        predict(lora.firing, lora.writes, contrast.target.conversations, sides.target, sides.reference, layer,
                dictionaries(layer), own=of == by)
        for layer in sides.layers
    )  # fmt: skip
    return ContrastPrediction(contrast.name, of, by, found)


def predictions(
    experiment: Experiment, lora: OpenLora, dictionaries: Dictionaries, folder: Path | None = None,
    opened: Open = Cache.open,
) -> tuple[tuple[ContrastPrediction, ...], tuple[str, ...]]:
    """The adapter's own model contrast, then as controls those of the other adapters of which the same set is cached;
    and a sentence for each that is left out."""
    found, notes = [], []
    names = dict.fromkeys([lora.firing.adapter, *(a.name for a in experiment.adapters)])
    for name in names:
        contrast = experiment.model_contrast(name)
        if contrast is None or contrast.target.conversations not in lora.firing.spec["sets"]:
            if name == lora.firing.adapter:
                notes.append(f"No model contrast of {name} reads a conversation set of {lora.firing.path.name}, so "
                             "there is nothing to compare the prediction with.")
            continue
        try:
            sides = open_sides(experiment, contrast, folder, opened)
            found.append(predict_contrast(lora, contrast, sides, dictionaries))
        except MicroscopeError as error:
            notes.append(f"{contrast.name} is left out: {error}")
    return tuple(found), tuple(notes)


def contrast_directions(
    experiment: Experiment, contrast: ContrastSpec, folder: Path | None = None, opened: Open = Cache.open
) -> dict[int, Direction]:
    """Layer -> the contrast's direction, mean over response tokens, at every layer cached on both sides."""
    sides = open_sides(experiment, contrast, folder, opened)
    made = {n: contrast_direction(sides, n, "response", "response", experiment.name) for n in sides.layers}
    return {n: d for n, d in made.items() if not is_nothing(d)}


def usual_contrast(
    experiment: Experiment, folder: Path | None = None, opened: Open = Cache.open
) -> ContrastSpec | None:
    """The contrast whose direction components are held against when none is named: the first response contrast, else
    the first data contrast, whose files can be opened."""
    for kind in ("response", "data"):
        for contrast in experiment.contrasts:
            if contrast.kind == kind:
                try:
                    open_sides(experiment, contrast, folder, opened)
                except CacheError:
                    continue
                return contrast
    return None


def direction_for(component: Component, directions: Mapping[int, Direction]) -> Direction | None:
    """The direction of the first layer at or above the component's, else of the last; None where there is none."""
    above = [n for n in directions if n >= component.key.layer]
    chosen: Sequence[int] = [min(above)] if above else sorted(directions)[-1:]
    return directions[chosen[0]] if chosen else None
