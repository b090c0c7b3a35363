"""Estimates of memory, disk and time for one experiment: arithmetic over published sizes, nothing is run.

Every assumed figure is a constant here and is told in `Estimates.assumptions`. Does not know presets' files, the
registry or tokenizers, and imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from core.errors import PresetError
from core.model import bundled
from core.specs import AdapterSpec, ModelSpec
from core.store import layout

#: English chat text; 4.6 measured with SmolLM2's tokenizer on health_advice.jsonl, so this errs on the long side.
CHARACTERS_PER_TOKEN = 4.3
#: Begin and end marks, role and newlines of one message in a chat template (assumed).
TEMPLATE_TOKENS = 6

#: Sustained FLOP/s by device. cpu is for one core: 1.4e10 to 2.2e10 were measured with SmolLM2-135M in float32 on a
#: busy machine with two cores. cuda (one data-centre GPU, bfloat16) and mps are assumed, not measured.
FLOPS_CPU_CORE = 2e10
FLOPS = {"cuda": 6e13, "mps": 2e12}

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
#: Python, torch and transformers before any weights (assumed).
RUNTIME_BYTES = 700 * 2**20
#: A block's own tensors for one token, as multiples of d_model (attention and MLP at their widest; assumed).
WORKING_WIDTH = 16
#: Dense feature activations while encoding: ENCODE_BUDGET of core.model.saes, which is not imported for its torch.
ENCODE_BYTES = 64 * 2**20

#: Share of a response's activations that fall on a feature not yet seen in that response (assumed).
NEW_FEATURE_SHARE = 1 / 3
#: Bytes of one token of a stored context (id and value), and of one logit-lens token.
CONTEXT_TOKEN_BYTES, LENS_TOKEN_BYTES = 6, 8
#: Width counted for an SAE whose width is known only after fetching (assumed).
UNKNOWN_D_SAE = 2**14
#: A rank-32 LoRA on all matrices in float32, as a share of the bfloat16 weights (80.7 M parameters for Qwen2.5 7B).
ADAPTER_SHARE = 0.02


@dataclass(frozen=True)
class PlannedLayer:
    """One layer of the cache and its SAE, if any."""

    layer: int
    hook_point: str
    sae_release: str | None = None
    sae_id: str | None = None
    d_sae: int | None = 0
    """Number of features; 0 without an SAE; None when it is known only after fetching."""
    l0: float = 0.0
    """Expected active features a token."""
    source: str = ""
    """Hub repository and path, or the folder on disk."""
    neuronpedia_id: str | None = None
    download_bytes: int = 0


@dataclass(frozen=True)
class PlannedConversations:
    """One conversation file, with token counts estimated from characters."""

    name: str
    path: str
    n_conversations: int
    n_tokens: int
    n_response_tokens: int
    layers: tuple[int, ...] = ()
    """Layers that its cache file keeps; all that are planned when empty."""


@dataclass(frozen=True)
class Estimates:
    """Peak memory, disk (downloads still to come and all cache files) and computing time, with what they assume."""

    memory_bytes: int
    disk_bytes: int
    download_bytes: int
    cache_bytes: int
    seconds: float
    device: str
    dtype: str
    assumptions: tuple[str, ...]


def estimate(
    model: ModelSpec,
    layers: Sequence[PlannedLayer],
    read: Sequence[PlannedConversations],
    adapters: Sequence[AdapterSpec],
    *,
    device: str,
    dtype: str = "",
    batch_tokens: int = 4096,
) -> Estimates:
    """Estimate the extraction of `layers` (not empty) from every file in `read`, once for each entry.

    read: one entry a cache file, so a file read by two variants stands twice. adapters: those that are read by.
    device: cpu, cuda, cuda:N or mps. dtype: of the weights; chosen by device when empty. Raises `PresetError`.
    """
    kind = device.split(":")[0]
    dtype = dtype or ("bfloat16" if kind == "cuda" else "float32")
    if dtype not in BYTES or kind not in ("cpu", *FLOPS):
        raise PresetError(
            f"No estimate for dtype {dtype!r} on device {device!r}; use {', '.join(BYTES)} on cpu, cuda or mps."
        )
    speed = FLOPS_CPU_CORE * (os.cpu_count() or 1) if kind == "cpu" else FLOPS[kind]
    deepest = max(one.layer for one in layers)
    saes = sum(sae_bytes(model.d_model, one.d_sae) for one in layers)
    activations = batch_tokens * model.d_model * (WORKING_WIDTH * BYTES[dtype] + 4 * len(layers))
    memory = RUNTIME_BYTES + model.n_parameters * BYTES[dtype] + saes + activations + ENCODE_BYTES

    depth = (deepest + 1) / model.n_layers if model.n_layers else 1.0
    in_blocks = max(0, model.n_parameters - model.vocab_size * model.d_model) * depth
    encoding = 2 * sum(model.d_model * _width(one.d_sae) for one in layers)
    seconds = sum(c.n_tokens for c in read) * 2 * (in_blocks + encoding) / speed

    away = [a for a in adapters if not Path(a.id).expanduser().exists() and not in_hub_cache(a.id)]
    download = _model_download(model) + sum(one.download_bytes for one in layers)
    download += len(away) * ADAPTER_SHARE * 2 * model.n_parameters
    cache = sum(_cache_bytes(model.d_model, layers, c) for c in read)
    unknown = () if model.n_parameters else ("Weights: not counted, the preset states no n_parameters.",)
    measured = "measured on two busy cores" if kind == "cpu" else "assumed, not measured"
    return Estimates(
        memory_bytes=round(memory),
        disk_bytes=round(download + cache),
        download_bytes=round(download),
        cache_bytes=round(cache),
        seconds=round(seconds, 1),
        device=device,
        dtype=dtype,
        assumptions=(
            f"Time: {speed:.1e} FLOP/s sustained on {device} ({measured}), 2 FLOP a parameter and token up to layer "
            f"{deepest}, one dense encoding and one reconstruction for each SAE; loading and fetching are not counted.",
            f"Text: {CHARACTERS_PER_TOKEN} characters a token and {TEMPLATE_TOKENS} template tokens a message; "
            "no tokenizer was used.",
            f"Memory: all weights in {dtype}, SAEs in float32, a batch of {batch_tokens:,} tokens, "
            f"{size_text(RUNTIME_BYTES)} for Python and torch.",
            f"Cache: {NEW_FEATURE_SHARE:.0%} of a response's activations fall on a feature new to it, two conditions, "
            "no gain from compression.",
            *unknown,
            f"Downloads: what the local caches lack; SAEs in float32, each adapter at {ADAPTER_SHARE:.0%} of the "
            "weights (rank-1 ones are far smaller).",
        ),
    )


def _width(d_sae: int | None) -> int:
    return UNKNOWN_D_SAE if d_sae is None else d_sae


def sae_bytes(d_model: int, d_sae: int | None) -> int:
    """float32 encoder, decoder, biases and thresholds of one SAE."""
    width = _width(d_sae)
    return 4 * (2 * d_model * width + 2 * width + d_model) if width else 0


def _cache_bytes(d_model: int, layers: Sequence[PlannedLayer], read: PlannedConversations) -> float:
    """One cache file: token ids and roles, residual rows in float32, sparse rows in float16, contexts, lens tokens."""
    n = read.n_conversations
    context = 2 * layout.CONTEXTS_KEPT * (layout.WINDOW_BEFORE + 1 + layout.WINDOW_AFTER) * CONTEXT_TOKEN_BYTES
    total = 5.0 * read.n_tokens
    for one in layers:
        if read.layers and one.layer not in read.layers:
            continue
        total += 2 * 4 * d_model * n
        d_sae = _width(one.d_sae)
        index = layout.index_dtype(d_sae).itemsize
        per_response = min(d_sae, one.l0 * read.n_response_tokens / n * NEW_FEATURE_SHARE)
        total += n * (per_response * (3 * 2 + index) + one.l0 * (2 + index))
        total += min(d_sae, n * per_response) * context
        total += d_sae * 2 * layout.LENS_KEPT * LENS_TOKEN_BYTES
    return total


def _model_download(model: ModelSpec) -> int:
    """Bytes of weights still to bring: bfloat16 from the hub; the bundled model is kept in float32."""
    if model.source == "bundled":
        return 0 if (bundled.model_folder() / "model.safetensors").is_file() else 4 * model.n_parameters
    if model.source == "local" or Path(model.id).is_dir() or in_hub_cache(model.id):
        return 0
    return 2 * model.n_parameters


def in_hub_cache(repo_id: str, path: str = "") -> bool:
    """Whether the hub's local cache holds weights of this repository, under `path` when given."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}" / "snapshots"
    names = ("*.safetensors", "*.npz", "*.pt")
    return folder.is_dir() and any(next(folder.glob(f"*/{path or '.'}/{name}"), None) for name in names)


def size_text(n: float) -> str:
    for unit in ("bytes", "KB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}"
        n /= 1000
    return f"{n:.1f} GB"


def duration_text(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
