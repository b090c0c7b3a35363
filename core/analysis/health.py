"""Does an SAE explain a fine-tuned variant as well as base? Stands beside every comparison of two models.

An SAE trained on base may miss what fine-tuning added; a feature that rises may then be the SAE failing. Compares FVU
and L0 from the cache files, and the cross-entropy recovered when the reconstruction is spliced in, where `sae-health`
has measured it. A drop is a warning, not proof; and an SAE that explains both equally well may still miss something.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.analysis.compare import Sides
from core.errors import CacheError
from core.store.reader import Cache

#: The SAE explains the target worse when its FVU is higher by more than both of these shares, the first of the
#: reference's FVU ...
FVU_RELATIVE, FVU_ABSOLUTE = 0.10, 0.01
#: ... or when the share of cross-entropy recovered is lower by more than this.
CE_RECOVERED = 0.02


@dataclass(frozen=True)
class HealthComparison:
    """One layer's SAE on two variants; figures are None where they do not exist."""

    layer: int
    target: str
    """Variant."""
    reference: str
    fvu_target: float | None
    """Fraction of variance unexplained, on the response tokens of the cache file."""
    fvu_reference: float | None
    l0_target: float | None
    """Mean active features per response token."""
    l0_reference: float | None
    ce_recovered_target: float | None
    """(CE with zeros - CE with the reconstruction) / (CE with zeros - CE), on the conversations of `sae-health`."""
    ce_recovered_reference: float | None
    worse: bool
    sentence: str


def spliced_file(folder: Path) -> Path:
    """Where `sae-health` writes what it measured."""
    return Path(folder) / "sae_health.json"


def read_spliced(path: Path) -> list[dict[str, Any]] | None:
    """The rows of `sae-health`, None when there is no file. Raises `CacheError` when it is damaged."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CacheError(f"{path}: cannot be read ({error}); remove it and run `python -m core sae-health`.") from None
    keyed = isinstance(rows, list) and all(isinstance(row, dict) and {"variant", "layer"} <= set(row) for row in rows)
    if not keyed:
        raise CacheError(f"{path}: is no list of measurements; remove it and run `python -m core sae-health`.")
    return rows


def of_sides(sides: Sides, layer: int) -> HealthComparison | None:
    """The comparison that belongs beside a contrast; None unless it compares two models at a layer with an SAE."""
    if sides.contrast.kind != "model" or not (sides.target.info(layer).d_sae and sides.reference.info(layer).d_sae):
        return None
    path = spliced_file(sides.target.path.parent)
    try:
        return compare_health(sides.target, sides.reference, layer, read_spliced(path))
    except CacheError as error:
        found = compare_health(sides.target, sides.reference, layer, None)
        return replace(found, sentence=f"{found.sentence} {error}")


def compare_health(
    target: Cache, reference: Cache, layer: int, spliced: Sequence[Mapping[str, Any]] | None
) -> HealthComparison:
    """How the SAE of `layer` stands on two caches. Raises `CacheError` where the layer has no SAE or is not cached.

    `worse` when the FVU is higher by more than 10% of the reference's and by more than 0.01, or when the
    cross-entropy recovered is lower by more than 0.02. Rows of `spliced` count only when they were measured with the
    caches' own weights, adapter and SAE, and on the same conversations for both.
    """
    for cache in (target, reference):
        if not cache.info(layer).d_sae:
            raise CacheError(f"{cache.path}: layer {layer} was cached without an SAE, so it has no health to compare.")
    figures = {
        name: [_finite(cache.info(layer).health.get(name)) for cache in (target, reference)] for name in ("fvu", "l0")
    }
    rows = [_row(cache, layer, spliced or ()) for cache in (target, reference)]
    same = None not in rows and rows[0].get("conversations_hash") == rows[1].get("conversations_hash")
    figures["ce_recovered"] = [_finite(row.get("ce_recovered")) if same else None for row in rows]
    worse = _fvu_worse(*figures["fvu"]) or _ce_worse(*figures["ce_recovered"])
    return HealthComparison(
        layer=layer,
        target=target.variant,
        reference=reference.variant,
        **{f"{name}_{side}": values[i] for name, values in figures.items() for i, side in _SIDES},
        worse=worse,
        sentence=_sentence(layer, target, reference, figures, worse),
    )


_SIDES = ((0, "target"), (1, "reference"))


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _row(cache: Cache, layer: int, spliced: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    own = {
        "variant": cache.variant, "layer": layer, "adapter": cache.spec["adapter"], "weights": cache.spec["weights"],
        "sae": cache.spec["saes"].get(str(layer)),
    }  # fmt: skip
    return next((row for row in spliced if all(row.get(k) == v for k, v in own.items())), None)


def _fvu_worse(target: float | None, reference: float | None) -> bool:
    if target is None or reference is None:
        return False
    return target - reference > max(FVU_RELATIVE * reference, FVU_ABSOLUTE)


def _ce_worse(target: float | None, reference: float | None) -> bool:
    return target is not None and reference is not None and reference - target > CE_RECOVERED


def _sentence(
    layer: int, target: Cache, reference: Cache, figures: Mapping[str, Sequence[float | None]], worse: bool
) -> str:
    forms = (("fvu", "FVU", ".3f"), ("l0", "L0", ".1f"), ("ce_recovered", "cross-entropy recovered", ".3f"))
    parts = [
        f"{words} {figures[name][0]:{form}} against {figures[name][1]:{form}}"
        if None not in figures[name] else f"{words} not measured"
        for name, words, form in forms
    ]  # fmt: skip
    if target.spec["conversations_hash"] != reference.spec["conversations_hash"]:
        parts.append("FVU and L0 on different conversations")
    names, shown = (target.variant, reference.variant), ", ".join(parts)
    if not worse and None in figures["fvu"]:
        return f"How well the SAE of layer {layer} explains {names[0]} and {names[1]} is not known ({shown})."
    what = f"The SAE of layer {layer} explains {names[0]} {'worse' if worse else 'no worse'} than {names[1]} ({shown})"
    return what + (": differences between the models may be differences in what the SAE misses." if worse else ".")
