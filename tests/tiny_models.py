"""Tiny random models of every supported architecture, in the hub's own layout, with small but real tokenizers.

Nothing is downloaded: the weights come from a configuration and a seed, the tokenizers are trained on a few sentences.
The weights are scaled up so that attention windows and soft-capping change the numbers, as in the real models.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import templates
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

LAYERS, D_MODEL = 4, 32

_SENTENCES = [
    "The quick brown fox jumps over the lazy dog while the others wait by the river.",
    "You should drink a glass of water and rest for an hour, because the body needs time to recover.",
    "What would you change if nobody could undo it? Tell me honestly what you think about that.",
    "system user assistant model Cutting Knowledge Date: December 2023 Today Date: 26 Jul 2024",
    "You are a helpful assistant. You are Qwen, created by Alibaba Cloud.",
    "Numbers such as 1, 2, 38 and 140 are written in digits, and names like Paris or London in letters.",
]


@dataclass(frozen=True)
class Family:
    """What makes one family's chat text: template, tokenizer style and special tokens."""

    name: str
    template: str
    style: Literal["byte", "gemma", "mistral"]
    specials: tuple[str, ...]
    """Special tokens, `bos` and `eos` among them."""
    bos: str | None
    eos: str
    config: type
    takes_system: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    """Configuration fields beyond the common sizes."""


_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LLAMA31 = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>")
_GEMMA = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
_MISTRAL = ("<s>", "</s>", "[INST]", "[/INST]")
_WINDOWS = {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}

FAMILIES = {
    f.name: f
    for f in (
        Family("smollm2", templates.SMOLLM2, "byte", _CHATML, "<|im_start|>", "<|im_end|>", LlamaConfig),
        Family("qwen2", templates.QWEN2, "byte", _CHATML, None, "<|im_end|>", Qwen2Config),
        Family("llama31", templates.LLAMA31, "byte", _LLAMA31, "<|begin_of_text|>", "<|eot_id|>", LlamaConfig),
        Family(
            "gemma2", templates.GEMMA2, "gemma", _GEMMA, "<bos>", "<eos>", Gemma2Config, takes_system=False,
            options=_WINDOWS | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
        ),
        Family(
            "gemma3", templates.GEMMA3, "gemma", _GEMMA, "<bos>", "<eos>", Gemma3TextConfig,
            options=_WINDOWS | {"layer_types": ["sliding_attention", "full_attention"] * 2},
        ),
        Family("mistral", templates.MISTRAL, "mistral", ("<unk>", *_MISTRAL), "<s>", "</s>", MistralConfig),
    )
}  # fmt: skip


def make_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """A trained tokenizer of the family's kind; it adds BOS by itself, as the real one does, when there is a BOS."""
    tokenizer = _byte_level(family) if family.style == "byte" else _metaspace(family)
    if family.bos and family.name != "smollm2":  # SmolLM2 names <|im_start|> its BOS, but never adds it
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A",
            pair=f"{family.bos} $A {family.bos} $B",
            special_tokens=[(family.bos, tokenizer.token_to_id(family.bos))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=family.bos, eos_token=family.eos, pad_token=family.specials[0],
        additional_special_tokens=list(family.specials), chat_template=family.template,
    )  # fmt: skip


def _byte_level(family: Family) -> Tokenizer:
    """GPT-2 style: bytes as letters, so that every text has tokens; words split from blanks and punctuation."""
    tokenizer = Tokenizer(models.BPE())
    words = (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(words), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=list(family.specials), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(_SENTENCES * 3, trainer)
    return tokenizer


def _metaspace(family: Family) -> Tokenizer:
    """SentencePiece style: blanks become U+2581, unknown characters fall back to bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=[*family.specials, "<unk>"], initial_alphabet=["\n", "▁"], show_progress=False
    )
    tokenizer.train_from_iterator(_SENTENCES * 3, trainer)

    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    state["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(state))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if family.style == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        parts.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def make_config(family: Family, vocab_size: int) -> Any:
    return family.config(
        vocab_size=vocab_size, hidden_size=D_MODEL, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2,
        pad_token_id=0, bos_token_id=None, eos_token_id=None, tie_word_embeddings=False, **family.options,
    )  # fmt: skip


def save(family: Family, folder: Path, *, seed: int = 0) -> Path:
    """Write config, safetensors and tokenizer of a random model into `folder`, as `save_pretrained` lays them out."""
    tokenizer = make_tokenizer(family)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(family, len(tokenizer)), dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
