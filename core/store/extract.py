"""Conversations through a model and its SAEs once, into one cache file. Resumes after a kill at the last whole shard.

Knows the order of the work, not the file format (layout.py, writer.py) nor the arithmetic (shard.py).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core import __version__
from core.conversations import Conversation, ConversationSet, token_texts, tokenize
from core.errors import SpanError
from core.model.adapters import Adapter, applied
from core.model.batches import OUTLIER_FACTOR
from core.model.loading import LoadedModel
from core.model.saes import LoadedSae
from core.specs import hook_point
from core.store import layout
from core.store.one_writer import one_writer
from core.store.reader import Cache
from core.store.shard import read_shard
from core.store.writer import LayerHead, Shards, assemble

#: Conversations in a shard: what a killed run may lose.
SHARD = 64

#: Bytes of logits held at once while the logit lens is taken.
LENS_BUDGET = 128 * 2**20

PACKAGES = ("torch", "transformers", "sae-lens", "numpy", "h5py")


@dataclass(frozen=True)
class Progress:
    """How far an extraction is."""

    conversations: int
    n_conversations: int
    tokens: int
    """Tokens read in this run."""
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Extraction:
    """What one call did."""

    file: Path
    n_conversations: int
    n_tokens: int
    n_response_tokens: int
    tokens_per_second: float | None
    """None when nothing was left to do."""
    fingerprint: str
    resumed: bool
    skipped: tuple[str, ...] = ()


def make_spec(
    loaded: LoadedModel,
    saes: Mapping[int, LoadedSae],
    layers: Sequence[int],
    conversations: ConversationSet,
    *,
    adapter: Adapter | None = None,
    compact: bool = False,
    batch_tokens: int,
) -> dict[str, Any]:
    """Everything that decides a cache file's numbers, as JSON."""
    return {
        "model": loaded.spec.id,
        "weights": loaded.weights_hash,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "variant": adapter.name if adapter else "base",
        "adapter": adapter.hash if adapter else None,
        "template": loaded.template_hash,
        "layers": list(layers),
        "saes": {str(layer): saes[layer].hash if layer in saes else None for layer in layers},
        "conversations": conversations.name,
        "conversations_hash": conversations.hash,
        "masking": {
            "outlier_factor": OUTLIER_FACTOR,
            "response": "tokens of the last assistant turn, no special or template token, no attention sink",
            "last_prompt": "last token before the response",
        },
        "storage": "compact" if compact else "full",
        "device": loaded.device.type,
        "batch_tokens": batch_tokens,
    }


def extract(
    loaded: LoadedModel,
    saes: Mapping[int, LoadedSae],
    layers: Sequence[int],
    conversations: ConversationSet,
    path: Path,
    *,
    adapter: Adapter | None = None,
    compact: bool = False,
    batch_tokens: int = 2048,
    skip_bad: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Extraction:
    """Write the cache file at `path`, or go on where a killed run stopped; a finished file is left as it is.

    With `adapter`, the fine-tuned variant reads: the base model with the adapter applied at strength 1. A `compact`
    file keeps the mean over each response alone and rounded residuals, at about half the size.
    Raises `CacheMismatch` when a file or unfinished run there has another spec, `CacheError` when another process is
    writing it or the disk is full, `SpanError` when a response cannot be found (with `skip_bad`, it is left out).
    """
    layers = sorted(layers)
    conversations, skipped = _readable(loaded, conversations, skip_bad)
    spec = make_spec(
        loaded, saes, layers, conversations, adapter=adapter, compact=compact, batch_tokens=batch_tokens
    )
    with one_writer(path):
        if path.is_file():
            return _describe(path, spec, None, resumed=False, skipped=skipped)
        shards = Shards(path, spec)
        resumed = shards.done > 0
        with applied(loaded, adapter) if adapter else nullcontext():
            speed = _run(loaded, saes, layers, conversations, shards, batch_tokens, on_progress)
        heads = [_head(loaded, saes.get(layer), layer) for layer in layers]
        assemble(
            shards,
            _n_shards(conversations),
            spec,
            heads,
            _columns(conversations.conversations),
            lambda ids: token_texts(loaded.tokenizer, ids),
            header(),
        )
        return _describe(path, spec, speed, resumed=resumed, skipped=skipped)


def _readable(loaded: LoadedModel, conversations: ConversationSet, skip_bad: bool) -> tuple[ConversationSet, tuple]:
    """With `skip_bad`, the conversations whose response span can be proven, and a sentence for each other one."""
    if not skip_bad:
        return conversations, ()
    kept, skipped = [], []
    for conversation in conversations.conversations:
        try:
            tokenize(loaded.tokenizer, conversation)
        except SpanError as error:
            skipped.append(str(error))
        else:
            kept.append(conversation)
    return ConversationSet(conversations.name, tuple(kept), conversations.skipped), tuple(skipped)


def _n_shards(conversations: ConversationSet) -> int:
    return -(-len(conversations) // SHARD)


def _run(
    loaded: LoadedModel,
    saes: Mapping[int, LoadedSae],
    layers: Sequence[int],
    conversations: ConversationSet,
    shards: Shards,
    batch_tokens: int,
    on_progress: Callable[[Progress], None],
) -> float:
    """Write the missing shards; returns tokens per second of this run."""
    rows = conversations.conversations
    names = sorted({c.condition for c in rows})
    letters = letter_table(loaded.tokenizer)
    begin, tokens = time.monotonic(), 0
    for number in range(shards.done, _n_shards(conversations)):
        part = rows[number * SHARD : (number + 1) * SHARD]
        items = [tokenize(loaded.tokenizer, c) for c in part]

        def on_batch(n_tokens: int, number: int = number) -> None:
            nonlocal tokens
            tokens += n_tokens
            on_progress(Progress(number * SHARD, len(rows), tokens, time.monotonic() - begin))

        conditions = [names.index(c.condition) for c in part]
        # Not kept in a variable: the next shard is not read beside this one's arrays.
        shards.write(number, read_shard(loaded, saes, layers, items, conditions, letters, batch_tokens, on_batch))
        on_progress(Progress(number * SHARD + len(part), len(rows), tokens, time.monotonic() - begin))
    return tokens / max(time.monotonic() - begin, 1e-9)


def letter_table(tokenizer: Any) -> np.ndarray:
    """bool [vocabulary]: whether a token's text has a letter in it (any script)."""
    texts = token_texts(tokenizer, range(len(tokenizer)))
    return np.array([any(ch.isalpha() for ch in text) for text in texts])


def _columns(rows: Sequence[Conversation]) -> dict[str, list[str]]:
    return {name: [getattr(c, name) for c in rows] for name in ("id", "prompt_id", "condition", "source")}


def header() -> dict[str, str]:
    epoch = os.environ.get("SOURCE_DATE_EPOCH")  # the convention of reproducible builds
    moment = datetime.fromtimestamp(int(epoch), UTC) if epoch else datetime.now(UTC)
    versions = {"em-microscope": __version__, **{p: importlib.metadata.version(p) for p in PACKAGES}}
    return {"created": moment.isoformat(timespec="seconds"), "versions": json.dumps(versions)}


def _head(loaded: LoadedModel, sae: LoadedSae | None, layer: int) -> LayerHead:
    if sae is None:
        return LayerHead(layer, hook_point(layer), loaded.d_model, 0)
    top, bottom = logit_lens(loaded, sae)
    return LayerHead(
        layer=layer,
        hook_point=hook_point(layer),
        d_model=loaded.d_model,
        d_sae=sae.d_sae,
        sae_release=sae.spec.release,
        sae_id=sae.spec.sae_id,
        architecture=sae.architecture,
        neuronpedia_id=sae.neuronpedia_id or "",
        decoder_norm=torch.linalg.vector_norm(sae.sae.W_dec.float(), dim=1).cpu().numpy(),
        top_ids=top,
        bottom_ids=bottom,
    )


def logit_lens(loaded: LoadedModel, sae: LoadedSae) -> tuple[np.ndarray, np.ndarray]:
    """Tokens each decoder direction promotes and suppresses most, int32 [d_sae, LENS_KEPT] each, strongest first."""
    return vector_lens(loaded, sae.sae.W_dec, layout.LENS_KEPT)


@torch.inference_mode()
def vector_lens(loaded: LoadedModel, vectors: torch.Tensor, kept: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens each vector promotes and suppresses most, int32 [n, kept] each, strongest first. vectors: [n, d_model].

    The vector times the final norm's weight (its scale is left out: a direction has none), times the unembedding.
    Source: the logit lens (nostalgebraist 2020), applied to decoder directions as Neuronpedia does.
    """
    unembedding = loaded.unembedding.weight  # [vocabulary, d_model]
    gain = loaded.final_norm(torch.ones(1, loaded.d_model, device=unembedding.device, dtype=unembedding.dtype))
    read = vectors.to(unembedding.device, torch.float32) * gain.float()
    rows = max(1, LENS_BUDGET // (4 * unembedding.shape[0]))
    found: tuple[list, list] = ([], [])
    for start in range(0, len(read), rows):
        logits = (read[start : start + rows].to(unembedding.dtype) @ unembedding.T).float()
        for side, largest in zip(found, (True, False), strict=True):
            side.append(logits.topk(kept, dim=1, largest=largest).indices.int().cpu().numpy())
    top, bottom = (np.concatenate(side) for side in found)
    return top, bottom


def _describe(path: Path, spec: Mapping[str, Any], speed: float | None, *, resumed: bool, skipped: tuple) -> Extraction:
    with Cache.open(path, expect=spec) as cache:
        table = cache.conversations
        return Extraction(
            file=path,
            n_conversations=len(table),
            n_tokens=int(table["n_tokens"].sum()),
            n_response_tokens=int(table["n_response_tokens"].sum()),
            tokens_per_second=speed,
            fingerprint=cache.fingerprint,
            resumed=resumed,
            skipped=skipped,
        )
