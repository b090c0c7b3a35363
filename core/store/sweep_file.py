"""What a sweep measured, as JSON: `cache/<preset>/sweep__<contrast>.json`. Read by pages; no model, no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from core.errors import CacheError
from core.paths import write_whole

FORMAT = "em-microscope-sweep"
FORMAT_VERSION = 1

Kind = Literal["unsteered", "direction", "random", "components", "remainder", "ablate", "ablate-everywhere",
               "ablate-random"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Swept:
    """One answer that was sampled at a point."""

    prompt: int
    """Number of the prompt in `Sweep.prompts`."""
    seed: int
    n_tokens: int
    nats: float
    """Mean negative log-probability of its tokens under the unsteered base, after the same prompt; nats per token."""
    repeated: float
    """Share of its 4-token sequences that it had said before."""
    ended: bool


@dataclass(frozen=True)
class Point:
    """One thing done to the model, and what was measured of it."""

    kind: Kind
    layer: int
    variant: str = "base"
    strength: float = 0.0
    """Mean residual norms; 0 where nothing is added."""
    draw: int = 0
    """Which random direction."""
    k: int = 0
    """How many features, for `components` and for the `remainder` that they leave."""
    margins: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Pair set -> margin of each of its prompts, in the order of `Sweep.pairs`; nats per token."""
    answers: tuple[Swept, ...] = ()
    n_misaligned: int | None = None
    """By the judge, of `answers`; None without one."""

    @property
    def key(self) -> str:
        """Its own among the points of a sweep."""
        return f"{self.variant}/{self.kind}/{self.layer}/{self.strength:g}/{self.draw}/{self.k}"


@dataclass(frozen=True)
class Sweep:
    """All points, and what they have in common."""

    spec: Mapping[str, Any]
    """Everything that decides a figure: model, weights, contrast, directions' digests, pairs, prompts, sampling."""
    points: tuple[Point, ...]

    @property
    def contrast(self) -> str:
        return self.spec["contrast"]

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.spec["layers"])

    @property
    def pairs(self) -> dict[str, list[str]]:
        """Pair set -> ids of its prompts."""
        return self.spec["pairs"]

    @property
    def prompts(self) -> list[str]:
        return self.spec["prompts"]

    def find(self, kind: Kind, layer: int, variant: str = "base", **more: Any) -> list[Point]:
        """Points of a kind, by strength; an unsteered point belongs to every layer."""
        found = [p for p in self.points if p.kind == kind and p.variant == variant
                 and (kind == "unsteered" or p.layer == layer)
                 and all(getattr(p, name) == value for name, value in more.items())]
        return sorted(found, key=lambda p: (p.strength, p.draw))


def sweep_file(folder: Path, contrast: str) -> Path:
    return folder / f"sweep__{contrast}.json"


def write_sweep(path: Path, sweep: Sweep) -> Path:
    """Whole or not at all; one point a line, so that it stays small and can be compared."""
    head = json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, "spec": sweep.spec}, ensure_ascii=False,
                      allow_nan=False)
    lines = ",\n".join(json.dumps(point_json(p), ensure_ascii=False, allow_nan=False) for p in sweep.points)
    write_whole(path, f'{head[:-1]}, "points": [\n{lines}\n]}}\n')
    return path


def read_sweep(path: Path) -> Sweep:
    """Raises `CacheError` when the file is missing, damaged or another's."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CacheError(f"{path}: no such sweep; make it with `python -m core sweep`.") from None
    except (OSError, ValueError) as error:
        raise CacheError(f"{path}: the sweep cannot be read ({error}); make it again.") from None
    if not isinstance(found, dict) or (found.get("format"), found.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise CacheError(f"{path}: is no sweep of this program's format {FORMAT_VERSION}; make it again.")
    try:
        return Sweep(found["spec"], tuple(point_of(row) for row in found["points"]))
    except (KeyError, TypeError) as error:
        raise CacheError(f"{path}: a point cannot be read ({error}); make it again.") from None


def point_json(point: Point) -> dict[str, Any]:
    """A point as JSON, without what is empty."""
    row = asdict(point)
    row["answers"] = [[a.prompt, a.seed, a.n_tokens, a.nats, a.repeated, int(a.ended)] for a in point.answers]
    return {name: value for name, value in row.items() if value not in (0, 0.0, (), [], {}, None) or name == "layer"}


def point_of(row: Mapping[str, Any]) -> Point:
    """A point from `point_json`. Raises TypeError or KeyError for anything else."""
    given = dict(row)
    given["margins"] = {name: tuple(values) for name, values in given.get("margins", {}).items()}
    given["answers"] = tuple(Swept(*figures, bool(ended)) for *figures, ended in given.get("answers", ()))
    return Point(**given)
