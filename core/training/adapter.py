"""Fine-tunes a LoRA adapter with peft and transformers' Trainer: one condition of a conversation file, responses only.

Seeded, checkpointed at every epoch and resumable. Splits by prompt; says nothing about what the adapter then does.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from core.conversations import Conversation, TokenizedConversation, tokenize
from core.errors import CacheMismatch, NotEnoughData, PresetError
from core.model.batches import pad_id
from core.model.loading import LoadedModel
from core.paths import write_json

#: Every linear module of a decoder block, as PEFT names them.
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

#: A label that the loss leaves out (PyTorch's default).
IGNORED = -100


@dataclass(frozen=True)
class AdapterTraining:
    """How an adapter is trained. The published recipes are Turner et al. 2506.11613 and Soligo et al. 2506.11618."""

    rank: int = 8
    alpha: float = 16.0
    """lora_alpha; the scaling is alpha / sqrt(rank) (rsLoRA, as in the published recipes)."""
    modules: tuple[str, ...] = ALL_LINEAR
    layers: tuple[int, ...] = ()
    """0-based blocks that get a LoRA; all when empty."""
    epochs: int = 4
    lr: float = 5e-4
    """Peak learning rate of AdamW, falling linearly to 0."""
    warmup_steps: int = 5
    weight_decay: float = 0.01
    batch: int = 8
    """Conversations in one optimiser step."""
    max_length: int = 512
    """Longer conversations are left out."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "alpha", "epochs", "lr", "batch", "max_length"):
            if not getattr(self, name) > 0:
                raise PresetError(f"Adapter training: {name} is {getattr(self, name)}; give a number above 0.")
        unknown = sorted(set(self.modules) - set(ALL_LINEAR))
        if unknown or not self.modules:
            raise PresetError(
                f"Adapter training: unknown modules {', '.join(unknown) or '(none)'}; use {', '.join(ALL_LINEAR)}."
            )


@dataclass(frozen=True)
class Trained:
    """What one training run did."""

    folder: Path
    n_train: int
    n_heldout: int
    n_parameters: int
    history: tuple[dict[str, float], ...]
    """Trainer's log: `loss` of a step (nats per token), `eval_loss` on held-out conversations at each epoch's end."""


def examples(tokenizer: Any, conversations: Sequence[Conversation], max_length: int) -> list[dict[str, list[int]]]:
    """`input_ids` and `labels` of each conversation: the response and the token that ends the turn are learnt."""
    found = []
    for conversation in conversations:
        item = tokenize(tokenizer, conversation)
        if len(item) <= max_length:
            found.append({"input_ids": item.ids.tolist(), "labels": labels(item)})
    if not found:
        raise NotEnoughData(f"No conversation of at most {max_length} tokens is left to train on.")
    return found


def labels(item: TokenizedConversation) -> list[int]:
    """Token ids [n] where the loss counts, `IGNORED` elsewhere: the response and the end-of-turn token after it."""
    end = min(item.end + 1, len(item))
    kept = np.full(len(item), IGNORED)
    kept[item.start : end] = item.ids[item.start : end]
    return kept.tolist()


def train(
    loaded: LoadedModel,
    settings: AdapterTraining,
    conversations: Sequence[Conversation],
    heldout: Sequence[Conversation],
    out: Path,
    work: Path,
) -> Trained:
    """Train on `conversations` and write a PEFT adapter folder `out` (float16), whole or not at all.

    A run that was stopped goes on at its last checkpoint in `work` (one a epoch); a checkpoint of other settings or
    other text raises `CacheMismatch`. `loaded` is wrapped by peft and must not be used afterwards.
    """
    torch.manual_seed(settings.seed)
    train_rows = examples(loaded.tokenizer, conversations, settings.max_length)
    heldout_rows = examples(loaded.tokenizer, heldout, settings.max_length)
    _check_unfinished(work, settings, conversations, loaded)
    model = get_peft_model(loaded.model.train(), lora_config(loaded, settings))
    trainer = Trainer(
        model=model,
        args=_arguments(settings, work, loaded),
        data_collator=DataCollatorForSeq2Seq(
            _padder(loaded), padding=True, label_pad_token_id=IGNORED, return_tensors="pt"
        ),
        train_dataset=train_rows,
        eval_dataset=heldout_rows,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(work) if work.is_dir() else None)
    history = tuple(
        {key: float(row[key]) for key in ("step", "epoch", "loss", "eval_loss", "learning_rate") if key in row}
        for row in trainer.state.log_history
        if "loss" in row or "eval_loss" in row
    )
    _save(model, loaded, out)
    trained = Trained(out, len(train_rows), len(heldout_rows), model.num_parameters(only_trainable=True), history)
    write_json(out / "training.json", {
        "settings": asdict(settings),
        "n_train": trained.n_train, "n_heldout": trained.n_heldout, "n_parameters": trained.n_parameters,
        "heldout_prompts": sorted({c.prompt_id for c in heldout}),
        "history": history,
    })  # fmt: skip
    return trained


def lora_config(loaded: LoadedModel, settings: AdapterTraining) -> LoraConfig:
    """The peft configuration. Raises `PresetError` for a layer that the model does not have."""
    for layer in settings.layers:
        if not 0 <= layer < loaded.n_layers:
            raise PresetError(f"Layer {layer} does not exist; this model has layers 0 to {loaded.n_layers - 1}.")
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        use_rslora=True,
        lora_dropout=0.0,
        bias="none",
        target_modules=list(settings.modules),
        layers_to_transform=list(settings.layers) or None,
        task_type="CAUSAL_LM",
    )


def _arguments(settings: AdapterTraining, work: Path, loaded: LoadedModel) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(work),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=settings.batch,
        learning_rate=settings.lr,
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        optim="adamw_torch",
        seed=settings.seed,
        data_seed=settings.seed,
        logging_steps=4,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        label_names=["labels"],
        remove_unused_columns=False,
        use_cpu=loaded.device.type == "cpu",
        dataloader_pin_memory=loaded.device.type == "cuda",
        report_to=[],
    )


def _padder(loaded: LoadedModel) -> Any:
    """The tokenizer, able to pad; what it pads with is masked."""
    if loaded.tokenizer.pad_token_id is None:
        loaded.tokenizer.pad_token_id = pad_id(loaded.tokenizer)
    loaded.tokenizer.padding_side = "right"
    return loaded.tokenizer


def _check_unfinished(
    work: Path, settings: AdapterTraining, conversations: Sequence[Conversation], loaded: LoadedModel
) -> None:
    """An unfinished run in `work` must be of the same settings, text and weights."""
    spec = {
        "settings": json.loads(json.dumps(asdict(settings))),
        "conversations": [c.id for c in conversations],
        "responses": [c.response for c in conversations],
        "weights": loaded.weights_hash,
    }
    path = work / "spec.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        for key in spec:
            if found.get(key) != spec[key]:
                shown = (spec[key], found.get(key)) if key == "settings" else ("this run's", "another run's")
                raise CacheMismatch(work, key, *shown)
    else:
        write_json(path, spec)


def _save(model: Any, loaded: LoadedModel, out: Path) -> None:
    """The adapter in PEFT's layout; the folder appears whole."""
    tensors: dict[str, Tensor] = get_peft_model_state_dict(model)
    made = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    config = model.peft_config["default"]
    config.base_model_name_or_path = loaded.spec.id
    config.inference_mode = True
    config.save_pretrained(str(made))
    save_file(
        {name: tensor.detach().to("cpu", torch.float16).contiguous() for name, tensor in tensors.items()},
        made / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    shutil.rmtree(out, ignore_errors=True)
    made.rename(out)
