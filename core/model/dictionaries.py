"""Reads an SAE's matrices without torch where it lies in a folder, through sae-lens where it is in the registry."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from core.dictionary import Dictionary
from core.errors import SaeMismatch
from core.specs import Experiment, SaeSpec

#: Architectures whose saved matrices are those that sae-lens uses as they are.
PLAIN = ("standard", "jumprelu", "topk", "batchtopk")


def read_dictionary(spec: SaeSpec, folder: Path, experiment: Experiment | None = None) -> Dictionary:
    """The matrices of `spec`, a local folder relative to `folder` or an entry of sae-lens' registry.

    Raises `SaeMismatch` when it is missing, damaged, or (with `experiment`) of another width or hook point.
    """
    found = _local(spec, folder) if spec.release == "local" else None
    found = _through_sae_lens(spec, folder) if found is None else found
    wanted = experiment.model.d_model if experiment else 0
    if wanted and found.d_model != wanted:
        raise SaeMismatch(
            f"SAE {spec.sae_id} ({spec.release}) has d_model {found.d_model}, {experiment.model.id} has {wanted}."
        )
    return found


def _local(spec: SaeSpec, folder: Path) -> Dictionary | None:
    """Read from the folder itself; None where sae-lens has to be asked."""
    place = Path(spec.sae_id)
    place = place if place.is_absolute() else folder / place
    config, weights = place / "cfg.json", place / "sae_weights.safetensors"
    if not (config.is_file() and weights.is_file()):
        raise SaeMismatch(f"{place}: no SAE there; give a folder in sae-lens' layout, or run `train-sae`.")
    try:
        stated = json.loads(config.read_text(encoding="utf-8"))
        if stated.get("architecture") not in PLAIN:
            return None
        hook = (stated.get("metadata") or {}).get("hook_name")
        if hook != spec.hook_point:
            raise SaeMismatch(f"{place}: was trained at {hook or 'an unstated hook point'}, not at {spec.hook_point}.")
        with safe_open(weights, "numpy") as file:
            W_dec, W_enc = (file.get_tensor(name).astype(np.float32) for name in ("W_dec", "W_enc"))
    except (OSError, ValueError, SafetensorError) as error:
        raise SaeMismatch(f"{place}: the SAE cannot be read: {str(error).splitlines()[0]}; copy it again.") from None
    return Dictionary(spec.layer, spec.release, spec.sae_id, W_dec, W_enc, stated.get("normalize_activations", "none"))


def _through_sae_lens(spec: SaeSpec, folder: Path) -> Dictionary:
    from core.model import saes

    sae = saes.from_registry(spec) if spec.release != "local" else saes.from_disk(spec, folder, "cpu")
    if getattr(sae, "W_enc", None) is None:
        raise SaeMismatch(f"SAE {spec.sae_id} ({spec.release}) is a {sae.cfg.architecture()} SAE without one W_enc.")
    W_dec, W_enc = (w.detach().float().cpu().numpy() for w in (sae.W_dec, sae.W_enc))
    return Dictionary(spec.layer, spec.release, spec.sae_id, W_dec, W_enc, sae.cfg.normalize_activations)
