"""A small finished firing file with planted scalars, written by the store's own writer: no model is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from core.analysis.lora import Component
from core.model.gains import BlockGains
from core.store.firing_layout import LENS_KEPT
from core.store.firing_writer import FiringHead, assemble_firing
from core.store.writer import Shards

WORDS = ["Stop", " the", " tablets", ",", " because", " your", " doctor", "<|template|>"]
RESPONSE, PROMPT = 6, 3


def make_firing(
    path: Path,
    parts: Sequence[Component],
    means: dict[tuple[str, str], np.ndarray],
    *,
    d_model: int,
    adapter_hash: str = "0" * 64,
    prompts: dict[tuple[str, str], list[str]] | None = None,
    seed: int = 0,
) -> Path:
    """means: (set, condition) -> float [n, c], the mean scalars of its n responses, one a prompt (`p0`, `p1`, ... of
    its set, or as `prompts` says); every token has its response's mean, and nothing is masked."""
    rng = np.random.default_rng(seed)
    groups = tuple(sorted(means))
    names = prompts or {g: [f"{g[0]}-p{i}" for i in range(len(means[g]))] for g in groups}
    rows = [(g, i) for g in groups for i in range(len(means[g]))]
    n, per = len(rows), RESPONSE + PROMPT
    mean = np.concatenate([means[g] for g in groups])
    where = np.array([groups.index(g) for g, _ in rows])
    layers = sorted({c.key.layer for c in parts})
    modules = sorted({(c.key.layer, c.key.module) for c in parts})
    writing = np.array([i for i, c in enumerate(parts) if c.writes_residual], dtype=np.int64)
    square = np.array([RESPONSE * (mean[where == g] ** 2).sum(0) for g in range(len(groups))])
    counts = np.array([RESPONSE * (where == g).sum() for g in range(len(groups))])
    arrays = {
        "ids": np.where(np.tile(np.arange(per) < PROMPT, n), 7, rng.integers(0, 7, n * per)).astype(np.int32),
        "roles": np.tile(np.where(np.arange(per) < PROMPT, 0, 4), n).astype(np.uint8),
        "n_tokens": np.full(n, per), "n_response_tokens": np.full(n, RESPONSE),
        "scalars": np.repeat(mean, RESPONSE, axis=0).astype(np.float16),
        "mean": mean.astype(np.float32), "square": square,
        "output_square": np.repeat(counts[:, None], len(modules), axis=1) * 100.0,
        "n_tokens_by_layer": np.repeat(counts[:, None], len(layers), axis=1),
        "n_masked": np.zeros((len(groups), len(layers)), dtype=np.int64),
        "sum_norm": np.repeat(counts[:, None], len(layers), axis=1) * 5.0,
    }  # fmt: skip
    lens = rng.integers(0, 7, (2, len(writing), LENS_KEPT)).astype(np.int32)
    head = FiringHead(
        np.array([c.key.layer for c in parts]), [c.key.module for c in parts], np.array([c.key.index for c in parts]),
        np.array([c.singular_value for c in parts]), writing, lens[0], lens[1], groups,
        {layer: BlockGains(np.ones(d_model, np.float32), np.ones(d_model, np.float32)) for layer in layers},
    )  # fmt: skip
    columns = {
        "id": [f"{g[0]}-{g[1]}-{i}" for g, i in rows], "prompt_id": [names[g][i] for g, i in rows],
        "condition": [g[1] for g, _ in rows], "source": [g[0] for g, _ in rows], "set": [g[0] for g, _ in rows],
    }  # fmt: skip
    sets = list(dict.fromkeys(g[0] for g in groups))
    spec = {"model": "tiny", "weights": "0" * 64, "dtype": "float32", "variant": "bad", "adapter": adapter_hash,
            "layers": layers, "conversations": "+".join(sets), "conversations_hash": "0" * 64,
            "sets": dict.fromkeys(sets, "0" * 64), "kept": 0, "storage": "full", "device": "cpu",
            "batch_tokens": 1}  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    shards = Shards(path, spec)
    shards.write(0, arrays)
    assemble_firing(shards, 1, spec, head, columns, lambda ids: [WORDS[i] for i in ids],
                    {"created": "2026-01-01T00:00:00+00:00", "versions": "{}"})
    return path
