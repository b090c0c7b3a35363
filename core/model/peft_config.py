"""Reads PEFT's adapter_config.json: which modules a LoRA selects, at which rank and scaling, for which base model.

Follows the rules of peft 0.21 and refuses whatever is more than plain LoRA. Knows no tensors and does not import peft.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from core.errors import AdapterError
from core.specs import same_model

CONFIG = "adapter_config.json"

#: Settings that make an adapter more than scaling * B A, and how.
_MORE_THAN_LORA = {
    "use_dora": "DoRA also rescales the norms of the weights",
    "use_qalora": "QA-LoRA pools the input",
    "use_bdlora": "BD-LoRA has block-diagonal matrices",
    "kasa_config": "KaSA changes the base weights",
    "arrow_config": "Arrow routes between adapters",
    "monteclora_config": "MonteCLoRA samples its matrices",
    "velora_config": "VeLoRA carries tensors of its own",
    "alora_invocation_tokens": "aLoRA acts only after certain tokens",
    "layer_replication": "it copies decoder blocks",
    "target_parameters": "it changes parameters that are not linear modules",
    "modules_to_save": "it replaces whole modules",
    "trainable_token_indices": "it changes token embeddings",
    "lora_bias": "it adds biases",
    "fan_in_fan_out": "it was made for transposed weights",
}

#: Settings that sound like variants (`use_...`, `..._config`) and change no number once the adapter is trained.
_HARMLESS = ("use_rslora", "eva_config", "corda_config", "loftq_config", "lora_ga_config", "megatron_config",
             "runtime_config")  # fmt: skip

#: Initialisations that leave the base weights as they are; PEFT's others take part of them into the adapter.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")

_TYPES: dict[str, type | tuple[type, ...]] = {
    "r": int, "lora_alpha": (int, float), "target_modules": (str, list), "exclude_modules": (str, list),
    "layers_to_transform": (int, list), "layers_pattern": (str, list), "rank_pattern": dict, "alpha_pattern": dict,
    "use_rslora": bool, "base_model_name_or_path": str,
}  # fmt: skip


@dataclass(frozen=True)
class PeftConfig:
    """The fields of PEFT's LoraConfig, by their own names, that decide what a plain LoRA adds, and to which modules."""

    r: int
    lora_alpha: float
    target_modules: str | list[str]
    """Ends of module names, or a pattern of whole names, or `all-linear`."""
    exclude_modules: str | list[str] = field(default_factory=list)
    layers_to_transform: int | list[int] = field(default_factory=list)
    """0-based blocks; all when empty."""
    layers_pattern: str | list[str] = field(default_factory=list)
    """What the list of blocks is called."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Pattern of a module name's end -> its rank, instead of `r`."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    base_model_name_or_path: str = ""

    def selects(self, module: str) -> bool:
        """Whether PEFT changes the linear module of this full name (`tuners_utils.check_target_module_exists`)."""
        excluded, targets = self.exclude_modules, self.target_modules
        if re.fullmatch(excluded, module) if isinstance(excluded, str) else _ends(module, excluded):
            return False
        if isinstance(targets, str):
            return targets.lower() == "all-linear" or re.fullmatch(targets, module) is not None
        if module in targets or self.layers_to_transform == []:
            return _ends(module, targets)
        return _ends(module, targets) and self._transforms(module)

    def _transforms(self, module: str) -> bool:
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        starts = [rf"(?:^|.*?\.){pattern}" for pattern in patterns if pattern] or [r".*?\.[^.]*"]
        found = next((m for m in (re.match(rf"{start}\.(?P<layer>\d+)\.", module) for start in starts) if m), None)
        layers = self.layers_to_transform if isinstance(self.layers_to_transform, list) else [self.layers_to_transform]
        return found is not None and int(found["layer"]) in layers

    def rank(self, module: str) -> int:
        """The rank of the module of this full name."""
        rank = _by_pattern(self.rank_pattern, module, self.r)
        if not isinstance(rank, int) or rank < 1:
            raise AdapterError(f"{CONFIG} gives {module} the rank {rank!r}; it must be a whole number above 0.")
        return rank

    def scaling(self, module: str) -> float:
        """lora_alpha / r, or lora_alpha / sqrt(r) when rsLoRA, of the module of this full name."""
        alpha, rank = _by_pattern(self.alpha_pattern, module, self.lora_alpha), self.rank(module)
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise AdapterError(f"{CONFIG} gives {module} the alpha {alpha!r}; it must be a finite number.")
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_config(file: Path) -> PeftConfig:
    """Raises `AdapterError` when the file is not readable, or says anything but plain LoRA."""
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{CONFIG} is not readable JSON: {str(error).rstrip('.')}; fetch it again.") from None
    if not isinstance(written, dict) or written.get("peft_type") != "LORA":
        found = written.get("peft_type") if isinstance(written, dict) else type(written).__name__
        raise AdapterError(f"{CONFIG} gives the peft_type {found!r}, and only 'LORA' adapters are applied.")
    _check_plain(written)
    given = {f.name: written.get(f.name) for f in fields(PeftConfig)}
    for key, value in given.items():
        if value is None and key in ("r", "lora_alpha", "target_modules"):
            raise AdapterError(f"{CONFIG} has no {key}, without which the adapter cannot be applied.")
        fits = isinstance(value, _TYPES[key]) and isinstance(value, bool) == (key == "use_rslora")
        if value is not None and not fits:
            raise AdapterError(f"{key} in {CONFIG} is {_short(value)}, which PEFT does not write; fetch it again.")
    return PeftConfig(**{key: value for key, value in given.items() if value is not None})


def _check_plain(written: dict[str, Any]) -> None:
    for key, value in written.items():
        variant = (key.startswith("use_") or key.endswith("_config")) and key not in _HARMLESS
        if value and (variant or key in _MORE_THAN_LORA):
            why = _MORE_THAN_LORA.get(key, "an unknown variant")
            raise AdapterError(f"{key} is {_short(value)} ({why}), and only plain LoRA is applied.")
    bias, start = written.get("bias"), written.get("init_lora_weights")
    if bias not in (None, "none"):
        raise AdapterError(f"bias is {_short(bias)} (it changes biases), and only plain LoRA is applied.")
    if start not in _PLAIN_STARTS:
        raise AdapterError(
            f"init_lora_weights is {_short(start)}: such an adapter belongs to changed base weights; save it again "
            "with peft's path_initial_model_for_weight_conversion."
        )


def check_base(stated: str, model_id: str) -> None:
    """Raises `AdapterError` when the base model that an adapter states is another one than `model_id`.

    Organisation, case, folder and 4-bit mirrors do not matter; a name that says nothing, such as a hash, passes.
    """
    found, expected = _model_name(stated), _model_name(model_id)
    if found and expected and not same_model(found, expected):
        raise AdapterError(
            f"it was made for {stated}, not for {model_id}; if they are the same model, change base_model_name_or_path "
            f"in {CONFIG}."
        )


def _model_name(text: str) -> str:
    """The model that a hub id or a folder names; empty when its last part says nothing."""
    path = text.replace("\\", "/").rstrip("/")
    snapshot = re.search(r"models--(?:[^/]*--)?([^/]+)/snapshots/[^/]+$", path)
    name = snapshot.group(1) if snapshot else path.rsplit("/", 1)[-1]
    name = re.sub(r"(-unsloth)?-bnb-4bit$|^meta-(?=llama-3)", "", name, flags=re.IGNORECASE)
    says_nothing = r"\.*|[0-9a-f]{7,64}|(base[-_]?)?model|(checkpoint|step)-?\d+"
    return "" if re.fullmatch(says_nothing, name, flags=re.IGNORECASE) else name


def _ends(module: str, parts: list[str]) -> bool:
    return any(module == part or module.endswith(f".{part}") for part in parts)


def _by_pattern(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the module's name (PEFT's `get_pattern_key`)."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _short(value: Any) -> str:
    return json.dumps(value)[:60]
