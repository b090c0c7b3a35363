"""When the components of a LoRA fire: their scalars on every response token of conversations, into one HDF5 file.

The fine-tuned variant reads, and each component's scalar is read . x at its module's own input, so that
singular value x scalar x write vector, summed over a module's components, is exactly what the adapter adds there.
Resumes after a kill at the last whole shard, as an extraction does. Knows the order of the work and the arithmetic
to firing_shard.py, the format to core/store/firing_layout.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.analysis.lora import Component
from core.analysis.lora_space import write_space
from core.conversations import ConversationSet, token_texts
from core.evaluation.firing_shard import Tap, make_taps, read_shard
from core.model.adapters import Adapter, applied
from core.model.loading import LoadedModel
from core.model.norms import block_gains
from core.store.extract import Progress, header, make_spec, vector_lens
from core.store.firing_file import Firing
from core.store.firing_layout import COMPACT_KEPT, KEPT, LENS_KEPT
from core.store.firing_writer import FiringHead, assemble_firing
from core.store.one_writer import one_writer
from core.store.writer import Shards

#: Conversations in a shard: what a killed run may lose.
SHARD = 64


@dataclass(frozen=True)
class FiringRun:
    """What one call did."""

    file: Path
    n_conversations: int
    n_response_tokens: int
    n_components: int
    tokens_per_second: float | None
    """None when nothing was left to do."""
    fingerprint: str
    resumed: bool


def join_sets(sets: Sequence[ConversationSet]) -> tuple[ConversationSet, list[str]]:
    """Several conversation sets as one, and for each conversation the name of the set it came from."""
    rows = tuple(c for s in sets for c in s.conversations)
    name = "+".join(s.name for s in sets)
    skipped = tuple(reason for s in sets for reason in s.skipped)
    return ConversationSet(name, rows, skipped), [s.name for s in sets for _ in s.conversations]


def firing_spec(
    loaded: LoadedModel, adapter: Adapter, sets: Sequence[ConversationSet], *, keep: int, compact: bool,
    batch_tokens: int,
) -> dict[str, Any]:
    """Everything that decides a firing file's numbers, as JSON."""
    joined, names = join_sets(sets)
    layers = sorted({m.layer for m in adapter.modules})
    spec = make_spec(loaded, {}, layers, joined, adapter=adapter, compact=compact, batch_tokens=batch_tokens)
    spec.pop("saes")
    return spec | {"sets": {s.name: s.hash for s in sets}, "kept": keep}


def read_firing(
    loaded: LoadedModel,
    adapter: Adapter,
    parts: Sequence[Component],
    sets: Sequence[ConversationSet],
    path: Path,
    *,
    keep: int | None = None,
    compact: bool = False,
    batch_tokens: int = 2048,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> FiringRun:
    """Write the firing file at `path`, or go on where a killed run stopped; a finished file is left as it is.

    parts: the adapter's components, as core.analysis.lora makes them; keep: how many of them, the strongest on this
    text, keep their scalar on every token (0: all). A compact file rounds, and keeps fewer.
    Raises `CacheMismatch` when a file or unfinished run there has another spec, `CacheError` when another process is
    writing it or the disk is full, `SpanError` when a response cannot be found.
    """
    keep = (COMPACT_KEPT if compact else KEPT) if keep is None else keep
    conversations, from_set = join_sets(sets)
    spec = firing_spec(loaded, adapter, sets, keep=keep, compact=compact, batch_tokens=batch_tokens)
    with one_writer(path):
        if path.is_file():
            return _describe(path, spec, None, resumed=False)
        shards = Shards(path, spec)
        resumed = shards.done > 0
        head = _head(loaded, parts, sorted(set(zip(from_set, _conditions(conversations), strict=True))))
        taps = make_taps(loaded, parts, head)
        with applied(loaded, adapter):
            speed = _run(loaded, taps, head, conversations, from_set, shards, batch_tokens, on_progress)
        columns = {n: [getattr(c, n) for c in conversations.conversations]
                   for n in ("id", "prompt_id", "condition", "source")}
        assemble_firing(
            shards, _n_shards(conversations), spec, head, columns | {"set": from_set},
            lambda ids: token_texts(loaded.tokenizer, ids), header(),
        )  # fmt: skip
        return _describe(path, spec, speed, resumed=resumed)


def _conditions(conversations: ConversationSet) -> list[str]:
    return [c.condition for c in conversations.conversations]


def _n_shards(conversations: ConversationSet) -> int:
    return -(-len(conversations) // SHARD)


def _head(loaded: LoadedModel, parts: Sequence[Component], groups: Sequence[tuple[str, str]]) -> FiringHead:
    layers = sorted({c.key.layer for c in parts})
    gains = {layer: block_gains(loaded, layer) for layer in layers}
    space = write_space(parts, gains)
    top, bottom = np.zeros((2, 0, LENS_KEPT), dtype=np.int32)
    if len(space.parts):
        top, bottom = vector_lens(loaded, torch.from_numpy(space.vectors).float(), LENS_KEPT)
    return FiringHead(
        layer=np.array([c.key.layer for c in parts]),
        module=[c.key.module for c in parts],
        index=np.array([c.key.index for c in parts]),
        singular_value=np.array([c.singular_value for c in parts]),
        writing=np.array([i for i, c in enumerate(parts) if c.writes_residual], dtype=np.int64),
        top_ids=top,
        bottom_ids=bottom,
        groups=tuple(groups),
        gains=gains,
    )


def _run(
    loaded: LoadedModel,
    taps: Sequence[Tap],
    head: FiringHead,
    conversations: ConversationSet,
    from_set: Sequence[str],
    shards: Shards,
    batch_tokens: int,
    on_progress: Callable[[Progress], None],
) -> float:
    """Write the missing shards; returns tokens per second of this run."""
    rows = conversations.conversations
    begin, tokens = time.monotonic(), 0
    for number in range(shards.done, _n_shards(conversations)):
        chosen = slice(number * SHARD, (number + 1) * SHARD)

        def on_batch(n_tokens: int, number: int = number) -> None:
            nonlocal tokens
            tokens += n_tokens
            on_progress(Progress(number * SHARD, len(rows), tokens, time.monotonic() - begin))

        groups = [head.groups.index((s, c.condition)) for s, c in zip(from_set[chosen], rows[chosen], strict=True)]
        shards.write(number, read_shard(loaded, taps, head, rows[chosen], groups, batch_tokens, on_batch))
        on_progress(Progress(min((number + 1) * SHARD, len(rows)), len(rows), tokens, time.monotonic() - begin))
    return tokens / max(time.monotonic() - begin, 1e-9)


def _describe(path: Path, spec: Mapping[str, Any], speed: float | None, *, resumed: bool) -> FiringRun:
    with Firing.open(path, expect=spec) as firing:
        table = firing.conversations
        return FiringRun(path, table.height, int(table["n_response_tokens"].sum()), firing.components.height, speed,
                         firing.fingerprint, resumed)
