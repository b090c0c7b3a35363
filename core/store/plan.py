"""What an experiment would load, compute and store, with estimates of memory, disk and time. Touches no weights.

Resolves every SAE against sae-lens' registry (through core.model.saes, imported when it is needed) or the cfg.json on
disk, and reads the conversation files. Does not run, fetch or tokenize anything, and imports no torch of its own.
The arithmetic of the estimates is in estimates.py.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.conversations import ConversationSet, load_conversations
from core.errors import PresetError, SaeMismatch
from core.experiment import conversations_path
from core.paths import CACHE
from core.specs import CONDITIONS, NO_CONDITION, Experiment, ModelSpec, SaeSpec, hook_point, same_model
from core.store.estimates import (
    CHARACTERS_PER_TOKEN,
    TEMPLATE_TOKENS,
    Estimates,
    PlannedConversations,
    PlannedLayer,
    duration_text,
    estimate,
    in_hub_cache,
    sae_bytes,
    size_text,
)

if TYPE_CHECKING:
    from core.model.saes import RegistryEntry

Lookup = Callable[[str, str], "RegistryEntry"]

#: Active features a token, where neither the registry nor the SAE's configuration states it (assumed).
DEFAULT_L0 = 64.0

#: Widths as registry ids write them.
_WIDTHS = {"4k": 2**12, "16k": 2**14, "32k": 2**15, "65k": 2**16, "131k": 2**17, "262k": 2**18, "524k": 2**19}
_WIDTHS |= {"1m": 2**20}

#: Releases whose ids do not tell the width (the trainer's configuration does), and k of their trainers 0 to 3.
_RELEASES = {"llama-3.1-8b-instruct-andyrdt": 131_072, "qwen2.5-7b-instruct-andyrdt": 131_072}
_TRAINER_K = (32, 64, 128, 256)

#: What a release or id says when its SAEs read another place than resid_post.
_NOT_RESID_POST = re.compile(r"hook_(?!resid_post)\w+|(?<![a-z])(?:att|attn|mlp|transcoders?|clt)(?![a-z])")


@dataclass(frozen=True)
class Extraction:
    """One cache file: a model variant reading one conversation set."""

    variant: str
    conversations: str


@dataclass(frozen=True)
class Plan:
    """Everything `plan PRESET` says."""

    preset: str
    model: str
    variants: tuple[str, ...]
    layers: tuple[PlannedLayer, ...]
    conversations: tuple[PlannedConversations, ...]
    contrasts: tuple[str, ...]
    extractions: tuple[Extraction, ...]
    estimates: Estimates

    def to_json(self) -> dict[str, Any]:
        """The stable shape of `plan --json`."""
        keys = ("layer", "sae_release", "sae_id", "d_sae", "hook_point")
        estimates = asdict(self.estimates)
        return {
            "preset": self.preset,
            "model": self.model,
            "variants": list(self.variants),
            "layers": [{key: getattr(layer, key) for key in keys} for layer in self.layers],
            "conversations": [c.name for c in self.conversations],
            "contrasts": list(self.contrasts),
            "estimates": {key: estimates[key] for key in ("memory_bytes", "disk_bytes", "seconds")},
        }

    def describe(self) -> str:
        """The plan as text for people, layer by layer, ending with the estimates and what they assume."""
        lines = [f"{self.preset}: {self.model}, variants {', '.join(self.variants)}"]
        for one in self.layers:
            width = "width known once fetched" if one.d_sae is None else f"{one.d_sae:,} features"
            sae = f"{one.sae_release} {one.sae_id} ({width}, L0 about {one.l0:.0f})"
            lines.append(f"  layer {one.layer:>2}  {sae if one.sae_id else 'residuals only'}")
        for one in self.conversations:
            lines.append(f"  {one.name}: {one.n_conversations:,} conversations, about {one.n_tokens:,} tokens")
        lines += [f"  contrast {name}" for name in self.contrasts]
        e = self.estimates
        lines.append(
            f"  about {size_text(e.memory_bytes)} of memory, {duration_text(e.seconds)} on {e.device} in {e.dtype}, "
            f"{size_text(e.download_bytes)} to fetch, {size_text(e.cache_bytes)} for {len(self.extractions)} caches"
        )
        return "\n".join([*lines, "Assumed:", *(f"  {a}" for a in e.assumptions)])


def make_plan(
    experiment: Experiment,
    cache_dir: Path | None = None,
    *,
    device: str | None = None,
    batch_tokens: int = 4096,
    skip_bad: bool = False,
    lookup: Lookup | None = None,
) -> Plan:
    """Plan every extraction the contrasts need (base on every file when there are none).

    cache_dir: the preset's own cache folder, where local SAEs lie; `cache/<preset>` when None. device: cpu, cuda or
    mps; guessed from the machine when None. skip_bad: leave unusable conversations out instead of raising. lookup:
    `core.model.saes.lookup` unless another is given.
    Raises `SaeMismatch` (unknown release or id with near misses, other layer, width or model), `PresetError` (no
    conversations for a side of a contrast) and `BadConversation`.
    """
    cache_dir = CACHE / experiment.name if cache_dir is None else Path(cache_dir)
    layers = tuple(_plan_layer(experiment, layer, cache_dir, lookup) for layer in sorted(experiment.layers))
    sets = _read_conversations(experiment, skip_bad)
    conversations = tuple(_measure(name, path, found) for name, (path, found) in sets.items())
    sides = [side for c in experiment.contrasts for side in (c.reference, c.target)]
    needed = tuple(dict.fromkeys(Extraction(side.variant, side.conversations) for side in sides))
    extractions = needed or tuple(Extraction("base", c.name) for c in conversations)
    by_name, used = {c.name: c for c in conversations}, {e.variant for e in extractions}
    return Plan(
        preset=experiment.name,
        model=experiment.model.id,
        variants=experiment.variants,
        layers=layers,
        conversations=conversations,
        contrasts=tuple(c.name for c in experiment.contrasts),
        extractions=extractions,
        estimates=estimate(
            experiment.model,
            layers,
            [
                replace(by_name[e.conversations], layers=experiment.layers_of(e.variant, e.conversations))
                for e in extractions
            ],
            [a for a in experiment.adapters if a.name in used],
            device=device or guess_device(),
            dtype=experiment.dtype,
            batch_tokens=batch_tokens,
        ),
    )


def guess_device() -> str:
    """The device torch would most likely choose here, told without importing it."""
    if shutil.which("nvidia-smi"):
        return "cuda"
    return "mps" if platform.system() == "Darwin" and platform.machine() == "arm64" else "cpu"


# ----------------------------------------------------------------------------------------------------- layers


def _plan_layer(experiment: Experiment, layer: int, cache_dir: Path, lookup: Lookup | None) -> PlannedLayer:
    spec = experiment.sae(layer)
    if spec is None:
        return PlannedLayer(layer, hook_point(layer))
    if spec.release == "local":
        return _local(experiment.model, spec, cache_dir)
    if lookup is None:
        from core.model.saes import lookup
    return _registered(experiment.model, spec, lookup(spec.release, spec.sae_id))


def _registered(model: ModelSpec, spec: SaeSpec, entry: RegistryEntry) -> PlannedLayer:
    where = f"SAE {spec.sae_id} ({spec.release})"
    found = re.search(r"(?:layer_|blocks\.)(\d+)", spec.sae_id)
    if found and int(found.group(1)) != spec.layer:
        raise SaeMismatch(f"{where}: is of layer {found.group(1)}, but the preset gives it for layer {spec.layer}.")
    elsewhere = _NOT_RESID_POST.search(f"{spec.release} {spec.sae_id}")
    if elsewhere:
        raise SaeMismatch(f"{where}: reads {elsewhere.group()}, not resid_post; choose a residual stream SAE.")
    _check_model(where, model, entry.model)
    width = re.search(r"width_(\d+[km])", spec.sae_id)
    d_sae = _WIDTHS.get(width.group(1)) if width else _RELEASES.get(spec.release)
    average = re.search(r"average_l0_(\d+)", entry.path)
    trainer = re.search(r"trainer_([0-3])$", spec.sae_id) if spec.release in _RELEASES else None
    stated = entry.l0 or (average and average.group(1)) or (trainer and _TRAINER_K[int(trainer.group(1))])
    return PlannedLayer(
        layer=spec.layer,
        hook_point=spec.hook_point,
        sae_release=spec.release,
        sae_id=spec.sae_id,
        d_sae=d_sae,
        l0=float(stated or DEFAULT_L0),
        source=f"{entry.repo_id}/{entry.path}",
        neuronpedia_id=spec.neuronpedia_id or entry.neuronpedia_id,
        download_bytes=0 if in_hub_cache(entry.repo_id, entry.path) else sae_bytes(model.d_model, d_sae),
    )


def _local(model: ModelSpec, spec: SaeSpec, cache_dir: Path) -> PlannedLayer:
    folder = cache_dir / spec.sae_id  # an absolute sae_id replaces cache_dir
    path = folder / "cfg.json"
    if not path.is_file():
        raise SaeMismatch(f"{folder}: no cfg.json there; give a folder in sae-lens' layout, or run `train-sae`.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        metadata = config.get("metadata") or {}
        d_in, d_sae = int(config["d_in"]), int(config["d_sae"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SaeMismatch(f"{path}: d_in and d_sae cannot be read ({error!r}); copy the SAE again.") from None
    if model.d_model and d_in != model.d_model:
        raise SaeMismatch(f"{path}: reads d_model {d_in}, {model.id} has {model.d_model}; choose its own SAEs.")
    hook = metadata.get("hook_name") or config.get("hook_name")
    if hook != spec.hook_point:
        raise SaeMismatch(f"{path}: was trained at {hook or 'an unstated hook point'}, not at {spec.hook_point}.")
    _check_model(str(path), model, metadata.get("model_name") or config.get("model_name"))
    training = metadata.get("training") or {}
    return PlannedLayer(
        layer=spec.layer,
        hook_point=spec.hook_point,
        sae_release=spec.release,
        sae_id=spec.sae_id,
        d_sae=d_sae,
        l0=float(config.get("k") or training.get("k") or DEFAULT_L0),
        source=str(folder),
        neuronpedia_id=spec.neuronpedia_id,
    )


def _check_model(where: str, model: ModelSpec, stated: str | None) -> None:
    names = (model.id, *model.sae_names)
    if stated is None or not any(same_model(stated, name) for name in names):
        raise SaeMismatch(
            f"{where}: was trained on {stated or 'an unstated model'}, not on {' or '.join(names)}; "
            "list the name under `sae_names` of the preset if that is intended."
        )


# ---------------------------------------------------------------------------------------------- conversations


def _read_conversations(experiment: Experiment, skip_bad: bool) -> dict[str, tuple[Path, ConversationSet]]:
    sides = [side for c in experiment.contrasts for side in (c.target, c.reference)]
    allowed = (*CONDITIONS, *(side.condition for side in sides if side.condition))
    sets = {}
    for spec in experiment.conversations:
        path = conversations_path(experiment, spec.name)
        rows = load_conversations(path, name=spec.name, skip_bad=skip_bad, conditions=allowed, keep=spec.keeps)
        sets[spec.name] = (path, rows)
    for contrast in experiment.contrasts:
        for side in (contrast.target, contrast.reference):
            found = {c.condition for c in sets[side.conversations][1].conversations}
            if side.condition is not None and side.condition not in found:
                labels = ", ".join(sorted(found - {NO_CONDITION})) or "none"
                raise PresetError(
                    f"Preset {experiment.name!r}, contrast {contrast.name!r}: no conversation of "
                    f"{side.conversations!r} has condition {side.condition!r}; it has {labels}."
                )
    return sets


def _measure(name: str, path: Path, found: ConversationSet) -> PlannedConversations:
    characters = sum(len(m.content) for c in found.conversations for m in c.messages)
    response = sum(len(c.response) for c in found.conversations)
    template = TEMPLATE_TOKENS * sum(len(c.messages) for c in found.conversations)
    return PlannedConversations(
        name=name,
        path=str(path),
        n_conversations=len(found),
        n_tokens=round(characters / CHARACTERS_PER_TOKEN) + template,
        n_response_tokens=round(response / CHARACTERS_PER_TOKEN),
    )
