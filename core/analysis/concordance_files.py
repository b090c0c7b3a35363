"""From a preset's contrasts and their cache files to a concordance: sides, benign controls, every layer.

Knows presets and caches; what is computed from the rankings is in concordance.py. A benign control that is not cached
or cannot be ranked is left out with a note, never silently; anything wrong with a contrast itself is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from core.analysis import compare, health
from core.analysis.compare import Sides
from core.analysis.concordance import Concordance, ConcordanceSettings, concord
from core.analysis.find import find_sides
from core.analysis.ranking import Ranking, RankingSettings
from core.errors import CacheError, NotEnoughData, PresetError, SaeMismatch
from core.experiment import load_experiment
from core.specs import ContrastSpec

RANKING = RankingSettings(replication_k=0)

#: From the sides of a contrast, a layer and a position to its ranking.
Rank = Callable[[Sides, int, str], Ranking]


@dataclass(frozen=True)
class Contrasts:
    """Open sides of two or three contrasts, and of the benign controls that are cached."""

    sides: dict[str, Sides]
    controls: dict[str, Sides]
    """Contrast -> the sides of its control."""
    missing: tuple[str, ...]
    """One sentence a control that is left out."""
    default_layer: int

    @property
    def specs(self) -> list[ContrastSpec]:
        return [one.contrast for one in self.sides.values()]

    @property
    def layers(self) -> list[int]:
        """Cached with an SAE on every side of every contrast."""
        caches = [cache for one in self.sides.values() for cache in (one.target, one.reference)]
        return [n for n in caches[0].layers if all(n in c.layers and c.info(n).d_sae for c in caches)]


def open_contrasts(preset: str, names: Sequence[str], folder: Path | None = None) -> Contrasts:
    """Open what two or three contrasts of `preset` need. Raises `PresetError` for another number, or one twice."""
    twice = next((name for name in names if list(names).count(name) > 1), None)
    if twice is not None:
        raise PresetError(f"Contrast {twice!r} is given twice; a concordance compares different contrasts.")
    if len(names) not in (2, 3):
        raise PresetError(f"A concordance takes two or three contrasts of a preset; {len(names)} were given.")
    experiment = load_experiment(preset)
    opened = {name: find_sides(preset, name, None, None, folder) for name in names}
    controls, missing = {}, []
    for name in names:
        control = experiment.contrast(name).control
        if control is None or control in names:
            continue
        try:
            controls[name] = find_sides(preset, control, None, None, folder)[0]
        except CacheError as reason:
            missing.append(left_out(control, name, reason))
    layer = next(iter(opened.values()))[1]
    return Contrasts({name: sides for name, (sides, _, _) in opened.items()}, controls, tuple(missing), layer)


def left_out(control: str, name: str, reason: Exception) -> str:
    """The note for a control that cannot be shown."""
    return f"{control}, the benign control of {name}, is left out: {reason}"


def check_same_sae(sides: Mapping[str, Sides], layer: int) -> None:
    """Raise `SaeMismatch` when two caches were read with different SAEs, as feature numbers then mean other things."""
    first = None
    for name, one in sides.items():
        for cache in (one.target, one.reference):
            if layer not in cache.layers:
                continue  # said when it is ranked
            sae = cache.spec["saes"].get(str(layer))
            if first is not None and sae != first[1]:
                raise SaeMismatch(
                    f"{first[0]} and {name} were read with different SAEs at layer {layer} ({first[2]} and "
                    f"{cache.path}); extract both with the same SAE to compare them."
                )
            first = first or (name, sae, cache.path)


def rank(sides: Sides, layer: int, position: str) -> Ranking:
    """A contrast's ranking as a concordance needs it: every feature's place and no replication, which takes longest."""
    return compare.rank(sides, layer, position, RANKING)


def concord_at(
    found: Contrasts, layer: int, position: str, settings: ConcordanceSettings, rank: Rank = rank
) -> Concordance:
    """The concordance at one layer and position. `rank` may be one that remembers rankings."""
    check_same_sae({**found.sides, **{f"the control of {n}": s for n, s in found.controls.items()}}, layer)
    rankings = {name: rank(sides, layer, position) for name, sides in found.sides.items()}
    controls, missing = {}, list(found.missing)
    for name, sides in found.controls.items():
        try:
            controls[name] = rank(sides, layer, position)
        except (CacheError, NotEnoughData) as reason:
            missing.append(left_out(sides.contrast.name, name, reason))
    made = concord(rankings, controls, settings)
    return replace(made, notes=(*missing, *made.notes))


def sae_flags(found: Contrasts, layer: int) -> tuple[str, ...]:
    """A sentence for each contrast of two models where the SAE explains the target worse than the reference."""
    compared = {name: health.of_sides(sides, layer) for name, sides in found.sides.items() if layer in sides.layers}
    return tuple(f"{name}: {one.sentence}" for name, one in compared.items() if one is not None and one.worse)


def every_layer(
    found: Contrasts, position: str, settings: ConcordanceSettings, rank: Rank = rank
) -> list[Concordance]:
    """The concordance at each cached layer that has the data; without the controls, unless they are subtracted."""
    if settings.subtract == "none":
        found = replace(found, controls={}, missing=())
    made = []
    for layer in found.layers:
        try:
            made.append(concord_at(found, layer, position, settings, rank))
        except NotEnoughData:
            continue
    return made


def context_text(sides: Sides, layer: int, feature: int) -> str:
    """The feature's strongest context on either side, the peak between angle marks; empty when it has none."""
    windows = sorted((w for side in compare.contexts(sides, layer, feature) for w in side), key=lambda w: -w.value)
    if not windows:
        return ""
    tokens = list(windows[0].tokens)
    tokens[windows[0].peak] = f"«{tokens[windows[0].peak]}»"
    return "".join(tokens)
