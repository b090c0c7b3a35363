"""sae-lens SAEs: found in its registry or on disk, checked against the model, and encoded without large dense tensors.

Checks what SAE metadata says instead of trusting it: width, hook point and model name. Knows nothing of conversations.
`import sae_lens` takes seconds, so it happens inside the functions that need it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from core.errors import SaeMismatch
from core.specs import SaeSpec, same_model

#: Dense feature activations, of all chunks' temporaries together, never exceed this many bytes.
ENCODE_BUDGET = 64 * 2**20


@dataclass(frozen=True)
class RegistryEntry:
    """One SAE of sae-lens' registry."""

    release: str
    sae_id: str
    repo_id: str
    model: str
    path: str
    neuronpedia_id: str | None
    l0: float | None
    conversion: str | None


@dataclass(frozen=True)
class LoadedSae:
    """An SAE that belongs to this model's layer."""

    spec: SaeSpec
    sae: Any
    hash: str
    """SHA-256 over its float32 weights and the settings that decide its output."""
    neuronpedia_id: str | None = None

    @property
    def layer(self) -> int:
        return self.spec.layer

    @property
    def d_sae(self) -> int:
        return int(self.sae.cfg.d_sae)

    @property
    def d_model(self) -> int:
        return int(self.sae.cfg.d_in)

    @property
    def architecture(self) -> str:
        return self.sae.cfg.architecture()


@dataclass(frozen=True)
class SparseActs:
    """Feature activations > 0 of n_tokens tokens, sorted by token, then feature."""

    token: Tensor
    """int64 [nnz]"""
    feature: Tensor
    """int64 [nnz]"""
    value: Tensor
    """float32 [nnz]"""
    n_tokens: int
    d_sae: int


def lookup(release: str, sae_id: str) -> RegistryEntry:
    """Resolve a release and id in sae-lens' registry, offline. Raises `SaeMismatch` with near misses."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory = get_pretrained_saes_directory()
    if release not in directory:
        raise SaeMismatch(f"SAE release {release!r} is not in sae-lens' registry{_near(release, directory)}.")
    entry = directory[release]
    if sae_id not in entry.saes_map:
        raise SaeMismatch(f"SAE id {sae_id!r} is not in release {release!r}{_near(sae_id, entry.saes_map)}.")
    return RegistryEntry(
        release=release,
        sae_id=sae_id,
        repo_id=entry.repo_id,
        model=entry.model,
        path=entry.saes_map[sae_id],
        neuronpedia_id=entry.neuronpedia_id.get(sae_id),
        l0=entry.expected_l0.get(sae_id) or None,
        conversion=entry.conversion_func,
    )


def _near(name: str, known: Sequence[str] | dict[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.3)
    return f"; did you mean {', '.join(close)}" if close else ""


def load_sae(
    spec: SaeSpec,
    *,
    d_model: int,
    model_names: Sequence[str],
    folder: Path | None = None,
    device: str | torch.device = "cpu",
) -> LoadedSae:
    """Load one SAE in float32 and check that it reads resid_post of `spec.layer` in one of `model_names`.

    A `local` release is a folder in sae-lens' own layout (cfg.json, sae_weights.safetensors), relative to `folder`.
    Raises `SaeMismatch` when width, hook point or model name is another one or is not stated.
    """
    if spec.release == "local":
        sae, neuronpedia_id = from_disk(spec, folder, device), spec.neuronpedia_id
        stated_model, fallback_hook = sae.cfg.metadata.get("model_name"), None
    else:
        entry = lookup(spec.release, spec.sae_id)
        sae, neuronpedia_id = from_registry(spec, device), spec.neuronpedia_id or entry.neuronpedia_id
        stated_model = sae.cfg.metadata.get("model_name") or entry.model
        found = re.search(r"layer_(\d+)", spec.sae_id)
        fallback_hook = f"blocks.{found.group(1)}.hook_resid_post" if found else None
    where = f"SAE {spec.sae_id} ({spec.release})"
    if int(sae.cfg.d_in) != d_model:
        raise SaeMismatch(f"{where} reads d_model {sae.cfg.d_in}, this model has {d_model}; choose its own SAEs.")
    hook = sae.cfg.metadata.get("hook_name") or fallback_hook
    if hook != spec.hook_point:
        raise SaeMismatch(f"{where} was trained at {hook or 'an unstated hook point'}, not at {spec.hook_point}.")
    if stated_model is None or not any(same_model(stated_model, name) for name in model_names):
        raise SaeMismatch(
            f"{where} was trained on {stated_model or 'an unstated model'}, not on {' or '.join(model_names)}; "
            "list the name under `sae_names` of the preset if that is intended."
        )
    sae.eval().requires_grad_(False)
    return LoadedSae(spec, sae, _sae_hash(sae), neuronpedia_id)


def from_disk(spec: SaeSpec, folder: Path | None, device: str | torch.device) -> Any:
    from sae_lens import SAE

    path = Path(spec.sae_id)
    path = path if path.is_absolute() or folder is None else folder / path
    for name in ("cfg.json", "sae_weights.safetensors"):
        if not (path / name).is_file():
            raise SaeMismatch(f"{path}: no {name} there; give a folder in sae-lens' layout, or run `train-sae`.")
    try:
        return SAE.load_from_disk(path, device=str(device), dtype="float32")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SaeMismatch(f"{path}: the SAE cannot be read: {first}; train or copy it again.") from None


def from_registry(spec: SaeSpec, device: str | torch.device = "cpu") -> Any:
    """sae-lens' own SAE object of a registry entry, fetched from the hub when it is not there yet."""
    from sae_lens import SAE

    try:
        return SAE.from_pretrained(spec.release, spec.sae_id, device=str(device), dtype="float32")
    except OSError as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SaeMismatch(
            f"SAE {spec.sae_id} ({spec.release}) could not be fetched: {first}; check the connection and log in."
        ) from None


def _sae_hash(sae: Any) -> str:
    digest = hashlib.sha256()
    settings = {k: sae.cfg.to_dict().get(k) for k in ("architecture", "apply_b_dec_to_input", "normalize_activations")}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(sae.state_dict().items()):
        digest.update(name.encode())
        digest.update(memoryview(tensor.detach().float().cpu().contiguous().numpy()).cast("B"))
    return digest.hexdigest()


def chunk_rows(d_sae: int, budget: int = ENCODE_BUDGET) -> int:
    """How many tokens are encoded at once: sae-lens holds about four dense float32 copies while it encodes."""
    return max(1, budget // (4 * 4 * d_sae))


@torch.inference_mode()
def encode_sparse(sae: Any, resid: Tensor, budget: int = ENCODE_BUDGET) -> SparseActs:
    """sae-lens' own `encode` of resid [n_tokens, d_model], chunk by chunk, kept sparse.

    At most `budget` bytes of dense [tokens, d_sae] tensors exist at any time (but at least one token is encoded).
    """
    rows = chunk_rows(int(sae.cfg.d_sae), budget)
    tokens, features, values = [], [], []
    for start in range(0, len(resid), rows):
        acts = sae.encode(resid[start : start + rows])
        token, feature = acts.nonzero(as_tuple=True)
        values.append(acts[token, feature].float())
        tokens.append(token + start)
        features.append(feature)
    empty = torch.empty(0, dtype=torch.int64, device=resid.device)
    return SparseActs(
        torch.cat(tokens) if tokens else empty,
        torch.cat(features) if features else empty,
        torch.cat(values) if values else empty.float(),
        len(resid),
        int(sae.cfg.d_sae),
    )


@torch.inference_mode()
def reconstruct(sae: Any, resid: Tensor, budget: int = ENCODE_BUDGET) -> Tensor:
    """The SAE's reconstruction of resid [n_tokens, d_model], chunk by chunk, in resid's dtype."""
    rows = chunk_rows(int(sae.cfg.d_sae), budget)
    parts = [sae(resid[start : start + rows]).to(resid.dtype) for start in range(0, len(resid), rows)]
    return torch.cat(parts) if parts else resid.clone()


def bridge(model_name: str, loaded: Any) -> Any:
    """sae-lens' `SAETransformerBridge` around a loaded model, which it rebuilds in place: hand it one of its own."""
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    return SAETransformerBridge.boot_transformers(
        model_name, hf_model=loaded.model, tokenizer=loaded.tokenizer, device=str(loaded.device), dtype=loaded.dtype
    )
