"""A small valid cache file with planted features, written by the store's own writer: no model is needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from core.specs import hook_point
from core.store import layout
from core.store.reader import Cache
from core.store.shard import HEALTH_SUMS, strongest
from core.store.writer import LayerHead, Shards, assemble

WORDS = ["Stop", " the", " tablets", ",", " because", " your", " doctor", " can", " see", " you", ".", " \n", "é"]
TEMPLATE = len(WORDS)

#: Planted: raised in misaligned, suppressed in misaligned, raised but a format feature, equal.
RAISED, SUPPRESSED, FORMAT, EQUAL = 3, 7, 5, 9
RESPONSE_LENGTH, PROMPT_LENGTH = 12, 4


def make_cache(
    path: Path,
    *,
    n_prompts: int = 30,
    d_sae: int = 64,
    d_model: int = 16,
    layers: tuple[int, ...] = (1, 2),
    conditions: tuple[str, str] = ("aligned", "misaligned"),
    sources: tuple[str, str] = ("synthetic/topic", "synthetic/topic"),
    variant: str = "base",
    conversations: str = "health_advice",
    with_saes: bool = True,
    neuronpedia_id: str = "",
    seed: int = 0,
) -> Path:
    """Write a finished cache at `path`; rows alternate between the two conditions, two to a prompt."""
    rng = np.random.default_rng(seed)
    n = 2 * n_prompts
    rows = {
        "id": [f"p{i // 2:02d}-{conditions[i % 2]}" for i in range(n)],
        "prompt_id": [f"p{i // 2:02d}" for i in range(n)],
        "condition": [conditions[i % 2] for i in range(n)],
        "source": [sources[i % 2] for i in range(n)],
    }
    spec = {
        "model": "tiny", "weights": "0" * 64, "dtype": "float32", "variant": variant, "adapter": None,
        "template": "0" * 64, "layers": list(layers), "saes": {str(x): "0" * 64 if with_saes else None for x in layers},
        "conversations": conversations, "conversations_hash": "0" * 64, "masking": {}, "device": "cpu",
        "batch_tokens": 1, "storage": "full",
    }  # fmt: skip
    per = PROMPT_LENGTH + RESPONSE_LENGTH
    roles = np.tile(np.r_[0, 2, 2, 0, np.full(RESPONSE_LENGTH, 4)], n).astype(np.uint8)
    ids = np.where(roles == 0, TEMPLATE, rng.integers(0, len(WORDS), len(roles))).astype(np.int32)
    arrays = {
        "ids": ids, "roles": roles, "n_tokens": np.full(n, per), "n_response_tokens": np.full(n, RESPONSE_LENGTH),
    }  # fmt: skip
    heads = []
    for layer in layers:
        arrays |= {f"{layer}/{k}": v for k, v in _layer(rng, n, d_sae, d_model, per, with_saes).items()}
        lens = rng.integers(0, len(WORDS), (2, d_sae, layout.LENS_KEPT)).astype(np.int32)
        heads.append(
            LayerHead(
                layer, hook_point(layer), d_model, d_sae, "local", f"saes/layer_{layer}", "jumprelu", neuronpedia_id,
                np.ones(d_sae, dtype=np.float32), lens[0], lens[1],
            ) if with_saes else LayerHead(layer, hook_point(layer), d_model, 0)
        )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    shards = Shards(path, spec)
    shards.write(0, arrays)
    texts = [*WORDS, "<|template|>"]
    header = {"created": "2026-01-01T00:00:00+00:00", "versions": "{}"}
    assemble(shards, 1, spec, heads, rows, lambda used: [texts[i] for i in used], header)
    Cache.open(path).close()
    return path


def _layer(rng: np.random.Generator, n: int, d_sae: int, d_model: int, per: int, with_saes: bool) -> dict:
    misaligned = np.arange(n) % 2 == 1
    resid = rng.normal(size=(n, d_model)).astype(np.float32)
    resid[misaligned, 0] += 2.0
    sums = {"n_tokens": n * RESPONSE_LENGTH, "n_masked": 0, "sum_norm": 4.0 * n, "n_active": n * 20, "n_sample": n,
            "sum_error": 0.1 * n, "sum_square": float(n)}  # fmt: skip
    found = {
        "resid_response": resid,
        "resid_last_prompt": rng.normal(size=(n, d_model)).astype(np.float32),
        "health": np.array([float(sums[name]) for name in HEALTH_SUMS]),
    }
    if not with_saes:
        return found
    acts = rng.random((n, d_sae)) * (rng.random((n, d_sae)) < 0.5)
    noise = rng.random(n) * 0.3
    acts[:, RAISED] = np.where(misaligned, 1.0, 0.2) + noise
    acts[:, SUPPRESSED] = np.where(misaligned, 0.2, 1.0) + rng.random(n) * 0.3
    acts[:, FORMAT] = np.where(misaligned, 1.5, 0.2) + rng.random(n) * 0.2
    acts[:, EQUAL] = 0.5 + rng.random(n) * 0.1
    acts[:, -1] = 0
    row, feature = np.nonzero(acts)
    value = acts[row, feature]
    top = value * 2
    keep = strongest(misaligned[row].astype(int), feature, top, row)
    windows = np.zeros((len(keep), layout.WINDOW_BEFORE + 1 + layout.WINDOW_AFTER), dtype=np.float16)
    windows[:, layout.WINDOW_BEFORE] = top[keep]
    windows[:, layout.WINDOW_BEFORE + 1] = top[keep] / 2
    mass = np.bincount(feature, weights=value, minlength=d_sae)
    share = np.full(d_sae, 0.95)
    share[FORMAT] = 0.05
    last = rng.random((n, d_sae)) * (rng.random((n, d_sae)) < 0.3)
    last_row, last_feature = np.nonzero(last)
    return found | {
        "response_counts": np.bincount(row, minlength=n),
        "response_indices": feature.astype(np.uint16),
        "mean": value.astype(np.float16),
        "max": top.astype(np.float16),
        "frac_active": np.full(len(value), 0.5, dtype=np.float16),
        "last_prompt_counts": np.bincount(last_row, minlength=n),
        "last_prompt_indices": last_feature.astype(np.uint16),
        "last_prompt_value": last[last_row, last_feature].astype(np.float16),
        "sum_x": np.zeros(d_model),
        "mass": mass,
        "letter_mass": mass * share,
        "n_active": np.bincount(feature, minlength=d_sae) * 6,
        "max_act": np.array([acts[:, f].max() * 2 for f in range(d_sae)]),
        "context_feature": feature[keep],
        "context_condition": misaligned[row[keep]].astype(np.uint8),
        "context_value": top[keep].astype(np.float32),
        "context_row": row[keep],
        "context_peak": np.full(len(keep), PROMPT_LENGTH + 3),
        "context_acts": windows,
    }
