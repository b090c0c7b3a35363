"""What the sidebar has chosen, as every page and loader is given it."""

from __future__ import annotations

from dataclasses import dataclass

from core.specs import ContrastSpec, Experiment


@dataclass(frozen=True)
class View:
    """What the sidebar has chosen, shared by every page."""

    experiment: Experiment
    contrast: ContrastSpec
    layer: int
    position: str

    def link(self, **changes: object) -> dict[str, str]:
        """URL parameters of this view with some of them changed, for a link to another page."""
        now = {"experiment": self.experiment.name, "contrast": self.contrast.name, "layer": self.layer,
               "position": self.position}
        return {k: str(v) for k, v in {**now, **changes}.items()}
