"""Trains BatchTopK SAEs with sae-lens' trainer on a stream of one model's residuals, and measures their health.

Saved as sae-lens saves them (a JumpReLU SAE), weights in float16. Does not decide which text is read: see stream.py.
Source: BatchTopK, Bussmann et al. 2024 (arXiv 2412.06410).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.conversations import RESPONSE, USER, TokenizedConversation
from core.errors import ModelError
from core.model.batches import outliers, pad, pad_id, plan_batches
from core.model.hooks import replacing, resid_post
from core.model.loading import LoadedModel
from core.model.saes import LoadedSae, encode_sparse, reconstruct
from core.specs import hook_point
from core.training.stream import Stream


@dataclass(frozen=True)
class SaeTraining:
    """Settings of one run; every layer uses the same."""

    d_sae: int = 4096
    k: int = 32
    """Mean active features per token during training."""
    epochs: float = 1.0
    batch: int = 2048
    lr: float = 8e-4
    decay_share: float = 0.2
    """Last share of the steps over which the learning rate falls to zero."""
    dead_window: int = 120
    """Steps without firing after which the auxiliary loss pulls a feature back."""
    read_l0: float = 36.0
    """Mean active features per token when the SAE is read: the threshold is set for it after training."""
    seed: int = 0


@dataclass(frozen=True)
class SaeHealth:
    """How well an SAE stands for the residuals it reads, on held-out text."""

    layer: int
    fvu: float
    """Fraction of variance unexplained, over all held-out tokens."""
    l0: float
    """Mean active features per token."""
    dead_share: float
    """Share of features that never fire on `n_dead_tokens` tokens of the training stream."""
    n_tokens: int
    n_dead_tokens: int
    ce: float
    """Mean cross-entropy of held-out response tokens, nats per token, model untouched."""
    ce_spliced: float
    """The same with the reconstruction in place of resid_post at user and response tokens."""
    ce_zero: float
    """The same with zeros in place of it."""
    ce_recovered: float
    """(ce_zero - ce_spliced) / (ce_zero - ce)"""
    n_ce_tokens: int


def batches(residuals: np.ndarray, size: int, seed: int) -> Iterator[Tensor]:
    """Endless shuffled float32 batches [size, d_model], without replacement within an epoch."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(residuals))
        for start in range(0, len(order) - size + 1, size):
            rows = np.sort(order[start : start + size])  # sorted reads are kinder to the disk
            yield torch.from_numpy(np.asarray(residuals[rows], dtype=np.float32))


def train(
    stream: Stream, layer: int, model_name: str, settings: SaeTraining, folder: Path, device: str = "cpu"
) -> Path:
    """Train one SAE and save it in sae-lens' layout under `folder/layer_{L}`."""
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, LoggingConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(settings.seed + layer)
    residuals = stream.residuals("train", layer)
    total = int(settings.epochs * len(residuals)) // settings.batch * settings.batch
    steps = total // settings.batch
    config = BatchTopKTrainingSAEConfig(
        d_in=stream.d_model,
        d_sae=settings.d_sae,
        k=settings.k,
        dtype="float32",
        device=device,
        apply_b_dec_to_input=True,
        normalize_activations="expected_average_only_in",
        metadata=SAEMetadata(
            model_name=model_name,
            hook_name=hook_point(layer),
            training=asdict(settings) | {"n_stream_tokens": len(residuals)},
        ),
    )
    sae = BatchTopKTrainingSAE(config)
    with torch.no_grad():  # start from the mean, so that no feature is spent on it
        sample = torch.from_numpy(np.asarray(residuals[: 50_000], dtype=np.float32))
        scale = stream.d_model**0.5 / sample.norm(dim=1).mean()
        sae.b_dec.copy_(sample.mean(0) * scale)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=total,
            train_batch_size_samples=settings.batch,
            lr=settings.lr,
            lr_end=0.0,
            lr_warm_up_steps=min(50, steps // 5),
            lr_decay_steps=int(settings.decay_share * steps),
            dead_feature_window=settings.dead_window,
            device=device,
            n_batches_for_norm_estimate=20,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae,
        batches(residuals, settings.batch, settings.seed + layer),
    )
    trained = trainer.fit()
    target, unfinished = folder / f"layer_{layer}", folder / f".layer_{layer}.tmp"
    weights, _ = trained.save_inference_model(unfinished)
    save_file({name: tensor.half() for name, tensor in load_file(weights).items()}, weights)
    calibrate(unfinished, residuals, settings.read_l0)
    unfinished.rename(target)
    return target


#: Training tokens on which a threshold is set.
CALIBRATION_TOKENS = 50_000


def calibrate(folder: Path, residuals: np.ndarray, l0: float) -> float:
    """Set the one threshold of a saved JumpReLU SAE so that `l0` features a token exceed it; returns the threshold.

    BatchTopK's running threshold is tied to the k of training. A little below it the reconstruction still gains, so
    the threshold is set on training tokens (never on held-out ones) for the L0 at which the SAE is to be read.
    """
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder, dtype="float32")
    rows = np.linspace(0, len(residuals) - 1, min(CALIBRATION_TOKENS, len(residuals))).astype(int)
    with torch.no_grad():
        sae.threshold.mul_(0.5)
    acts = encode_sparse(sae, torch.from_numpy(np.asarray(residuals[rows], dtype=np.float32)))
    wanted = round(l0 * len(rows))
    if len(acts.value) < wanted:
        raise ModelError(f"{folder}: too few features fire for an L0 of {l0:g}; train with a larger k.")
    threshold = float(acts.value.topk(wanted).values[-1])
    weights = load_file(folder / "sae_weights.safetensors")
    weights["threshold"] = torch.full_like(weights["threshold"], threshold)
    save_file(weights, folder / "sae_weights.safetensors")
    return threshold


@torch.inference_mode()
def reconstruction_health(loaded_sae: LoadedSae, stream: Stream, *, dead_tokens: int = 500_000) -> dict[str, float]:
    """FVU and L0 on the held-out split, and the share of features silent over `dead_tokens` training tokens."""
    sae, layer = loaded_sae.sae, loaded_sae.layer
    x = torch.from_numpy(np.asarray(stream.residuals("heldout", layer), dtype=np.float32))
    error = float((x - reconstruct(sae, x)).double().square().sum())
    variance = float((x - x.mean(0)).double().square().sum())
    fired = torch.zeros(loaded_sae.d_sae, dtype=torch.bool)
    train_split = stream.residuals("train", layer)
    n_dead = min(dead_tokens, len(train_split))
    for start in range(0, n_dead, 20_000):
        part = torch.from_numpy(np.asarray(train_split[start : min(start + 20_000, n_dead)], dtype=np.float32))
        fired[encode_sparse(sae, part).feature.unique()] = True
    return {
        "fvu": error / variance,
        "l0": len(encode_sparse(sae, x).value) / len(x),
        "dead_share": float((~fired).float().mean()),
        "n_tokens": len(x),
        "n_dead_tokens": n_dead,
    }


@torch.inference_mode()
def splice_losses(
    loaded: LoadedModel, saes: Sequence[LoadedSae], items: Sequence[TokenizedConversation], batch_tokens: int = 2048
) -> tuple[float, dict[int, float], dict[int, float], int]:
    """Cross-entropy of response tokens: untouched, spliced by layer, zeroed by layer; and the number of tokens.

    User and response tokens are replaced; template tokens and attention sinks, which no SAE is trained on, are not.
    """
    sums: dict[tuple[int | None, str], float] = {}
    n_tokens = 0
    for batch in plan_batches([len(item) for item in items], batch_tokens):
        ids, mask = pad([items[i].ids for i in batch], pad_id(loaded.tokenizer), loaded.device)
        roles = np.zeros(mask.shape, dtype=np.uint8)
        for n, i in enumerate(batch):
            roles[n, : len(items[i])] = items[i].roles
        read = torch.from_numpy((roles == USER) | (roles == RESPONSE)).to(loaded.device)
        answer = torch.from_numpy(roles == RESPONSE).to(loaded.device)
        resid = resid_post(loaded, ids, mask, [s.layer for s in saes])
        n_tokens += int(answer.sum())
        sums[None, "clean"] = sums.get((None, "clean"), 0.0) + _loss(loaded, ids, mask, answer)
        for s in saes:
            where = read & ~outliers(resid[s.layer], mask)
            spliced = resid[s.layer].clone()
            spliced[where] = reconstruct(s.sae, resid[s.layer][where])
            zeroed = resid[s.layer].clone()
            zeroed[where] = 0
            for name, new in (("spliced", spliced), ("zero", zeroed)):
                with replacing(loaded.blocks[s.layer], lambda _x, new=new: new):
                    sums[s.layer, name] = sums.get((s.layer, name), 0.0) + _loss(loaded, ids, mask, answer)
    per_token = {key: value / n_tokens for key, value in sums.items()}
    return (
        per_token[None, "clean"],
        {s.layer: per_token[s.layer, "spliced"] for s in saes},
        {s.layer: per_token[s.layer, "zero"] for s in saes},
        n_tokens,
    )


def _loss(loaded: LoadedModel, ids: Tensor, mask: Tensor, answer: Tensor) -> float:
    """Summed negative log-probability, nats, of the tokens marked in `answer` [batch, position]."""
    logits: Any = loaded.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    wanted = answer[:, 1:]
    return float(torch.nn.functional.cross_entropy(logits[wanted].float(), ids[:, 1:][wanted], reduction="sum"))


def measure(
    loaded: LoadedModel, saes: Sequence[LoadedSae], stream: Stream, heldout: Sequence[TokenizedConversation]
) -> list[SaeHealth]:
    """All health figures of all layers, on held-out text."""
    clean, spliced, zero, n = splice_losses(loaded, saes, heldout)
    return [
        SaeHealth(
            layer=s.layer,
            **reconstruction_health(s, stream),
            ce=clean,
            ce_spliced=spliced[s.layer],
            ce_zero=zero[s.layer],
            ce_recovered=(zero[s.layer] - spliced[s.layer]) / (zero[s.layer] - clean),
            n_ce_tokens=n,
        )
        for s in saes
    ]
