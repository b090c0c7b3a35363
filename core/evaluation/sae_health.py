"""How well the SAEs stand for the residuals of each model variant: FVU, L0, cross-entropy with the SAE spliced in.

Every variant reads the same conversations, held-out prompts first, so that no organism was trained on most of them.
Writes the figures beside the cache files; core/analysis/health.py compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from core.analysis.health import read_spliced
from core.conversations import ConversationSet, TokenizedConversation, tokenize
from core.model.adapters import Adapter, applied
from core.model.batches import outliers, pad, pad_id, plan_batches
from core.model.hooks import resid_post
from core.model.loading import LoadedModel
from core.model.saes import LoadedSae, encode_sparse, reconstruct
from core.paths import write_json
from core.split import split
from core.training.sae import splice_losses


@dataclass(frozen=True)
class VariantHealth:
    """One SAE on one variant; figures are None where they are undefined."""

    variant: str
    layer: int
    fvu: float | None
    """Fraction of variance unexplained, over the response tokens that are no attention sinks."""
    l0: float
    """Mean active features per such token."""
    ce: float
    """Mean cross-entropy of response tokens, nats per token, the variant untouched."""
    ce_spliced: float
    """The same with the reconstruction in place of resid_post at user and response tokens."""
    ce_zero: float
    """The same with zeros in place of it."""
    ce_recovered: float | None
    """(ce_zero - ce_spliced) / (ce_zero - ce); None where zeros do no harm."""
    n_tokens: int
    """Response tokens."""
    n_conversations: int
    conversations: str
    conversations_hash: str
    """Of the conversations read."""
    weights: str
    """Hash of the base model's weights."""
    adapter: str | None
    """Hash of the adapter; None for base."""
    sae: str


def choose_conversations(rows: ConversationSet, limit: int) -> ConversationSet:
    """At most `limit` conversations, those of held-out prompts first, each part in file order."""
    train, heldout = split(rows.conversations)
    return ConversationSet(rows.name, tuple((heldout + train)[:limit]))


def measure_variants(
    loaded: LoadedModel,
    saes: Mapping[int, LoadedSae],
    variants: Mapping[str, Adapter | None],
    rows: ConversationSet,
    path: Path,
    *,
    batch_tokens: int = 2048,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[VariantHealth]:
    """Measure every variant (None: base) and keep the figures in `path`, variant by variant.

    Figures of other variants and layers stay in the file. Raises `CacheError` when the file there is damaged.
    """
    read_spliced(path)  # a damaged file is found before the work, not after it
    items = [tokenize(loaded.tokenizer, c) for c in rows.conversations]
    found: list[VariantHealth] = []
    for n, (name, adapter) in enumerate(variants.items()):
        on_progress(n, len(variants))
        new = measure(loaded, adapter, saes, name, rows, items, batch_tokens)
        keep(path, new)
        found += new
    on_progress(len(variants), len(variants))
    return found


def measure(
    loaded: LoadedModel,
    adapter: Adapter | None,
    saes: Mapping[int, LoadedSae],
    variant: str,
    rows: ConversationSet,
    items: Sequence[TokenizedConversation],
    batch_tokens: int = 2048,
) -> list[VariantHealth]:
    """The health of every SAE on one variant, which reads `items`, the tokens of `rows`."""
    chosen = [saes[layer] for layer in sorted(saes)]
    with applied(loaded, adapter) if adapter else nullcontext():
        clean, spliced, zero, n_tokens = splice_losses(loaded, chosen, items, batch_tokens)
        figures = reconstruction(loaded, chosen, items, batch_tokens)
    return [
        VariantHealth(
            variant=variant,
            layer=s.layer,
            fvu=figures[s.layer][0],
            l0=figures[s.layer][1],
            ce=clean,
            ce_spliced=spliced[s.layer],
            ce_zero=zero[s.layer],
            ce_recovered=recovered(clean, spliced[s.layer], zero[s.layer]),
            n_tokens=n_tokens,
            n_conversations=len(rows),
            conversations=rows.name,
            conversations_hash=rows.hash,
            weights=loaded.weights_hash,
            adapter=adapter.hash if adapter else None,
            sae=s.hash,
        )
        for s in chosen
    ]


def recovered(clean: float, spliced: float, zero: float) -> float | None:
    """Share of the cross-entropy between zeros and the untouched model that the reconstruction recovers.

    None where zeros do no harm, as in an untrained model: then there is nothing to recover.
    """
    return (zero - spliced) / (zero - clean) if zero > clean else None


@torch.inference_mode()
def reconstruction(
    loaded: LoadedModel, saes: Sequence[LoadedSae], items: Sequence[TokenizedConversation], batch_tokens: int
) -> dict[int, tuple[float | None, float]]:
    """layer -> (FVU, L0) over the response tokens of `items` that are no attention sinks."""
    sums = {s.layer: [0.0, 0.0, 0, 0] for s in saes}  # squared error, squares, active features, tokens
    totals = {s.layer: torch.zeros(loaded.d_model, dtype=torch.float64) for s in saes}
    for batch in plan_batches([len(item) for item in items], batch_tokens):
        ids, mask = pad([items[i].ids for i in batch], pad_id(loaded.tokenizer), loaded.device)
        answer = torch.zeros_like(mask, dtype=torch.bool)
        for n, i in enumerate(batch):
            answer[n, items[i].start : items[i].end] = True
        resid = resid_post(loaded, ids, mask, [s.layer for s in saes])
        for s in saes:
            x = resid[s.layer][answer & ~outliers(resid[s.layer], mask)].float()
            error = (x - reconstruct(s.sae, x)).cpu().double()
            active = len(encode_sparse(s.sae, x).value)
            x = x.cpu().double()
            totals[s.layer] += x.sum(0)
            new = (float(error.square().sum()), float(x.square().sum()), active, len(x))
            sums[s.layer] = [a + b for a, b in zip(sums[s.layer], new, strict=True)]
    found = {}
    for layer, (error, square, active, n) in sums.items():
        variance = square - float(totals[layer].square().sum()) / max(1, n)
        found[layer] = (error / variance if variance > 0 else None, active / max(1, n))
    return found


def keep(path: Path, new: Sequence[VariantHealth]) -> None:
    """Put `new` into the file at `path`, in place of rows of the same variant and layer; the other rows stay."""
    rows = {(row["variant"], row["layer"]): row for row in read_spliced(path) or []}
    rows |= {(h.variant, h.layer): asdict(h) for h in new}
    write_json(path, [rows[key] for key in sorted(rows, key=lambda k: (k[0] != "base", *k))])
