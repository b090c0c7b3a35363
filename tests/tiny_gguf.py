"""A tiny random llama as a GGUF file, whose tokenizer has every number from 0 to 100 as one token.

For a real llama.cpp server in tests. Its output favours number tokens, as a judge's does, so that the probability-
weighted score is not nothing.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

D_MODEL, LAYERS, HEADS, KV_HEADS, FFN = 64, 2, 4, 2, 96
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def vocabulary(numbers: bool) -> tuple[list[str], list[str]]:
    """(tokens, merges) of a byte-level BPE; with `numbers`, those of two and three digits are merged."""
    tokens, merges = [*SPECIALS, *sorted(ByteLevel.alphabet())], []
    for n in range(10, 101) if numbers else ():
        text = str(n)
        merges.append(f"{text[:-1]} {text[-1]}")
        tokens.append(text)
    return tokens, merges


def write(path: Path, *, numbers: bool = True, seed: int = 0) -> Path:
    """Write the model; the same seed gives the same weights."""
    rng = np.random.default_rng(seed)
    tokens, merges = vocabulary(numbers)
    out = gguf.GGUFWriter(path, "llama")
    out.add_name("tiny-judge")
    out.add_context_length(4096)
    out.add_embedding_length(D_MODEL)
    out.add_block_count(LAYERS)
    out.add_feed_forward_length(FFN)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KV_HEADS)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_dimension_count(D_MODEL // HEADS)
    out.add_rope_freq_base(10000.0)
    out.add_vocab_size(len(tokens))
    out.add_file_type(gguf.LlamaFileType.ALL_F32)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("llama-bpe")
    out.add_token_list(tokens)
    out.add_token_types([gguf.TokenType.CONTROL] * len(SPECIALS)
                        + [gguf.TokenType.NORMAL] * (len(tokens) - len(SPECIALS)))  # fmt: skip
    out.add_token_merges(merges or ["Ġ Ġ"])
    out.add_bos_token_id(0)
    out.add_eos_token_id(2)
    out.add_pad_token_id(0)
    out.add_add_bos_token(False)
    out.add_chat_template(TEMPLATE)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> np.ndarray:
        return (rng.normal(size=(rows, columns)) * scale / np.sqrt(columns)).astype(np.float32)

    width = D_MODEL // HEADS * KV_HEADS
    out.add_tensor("token_embd.weight", matrix(len(tokens), D_MODEL, 4.0))
    for n in range(LAYERS):
        for name, shape in (("attn_q", (D_MODEL, D_MODEL)), ("attn_k", (width, D_MODEL)), ("attn_v", (width, D_MODEL)),
                            ("attn_output", (D_MODEL, D_MODEL)), ("ffn_gate", (FFN, D_MODEL)),
                            ("ffn_up", (FFN, D_MODEL)), ("ffn_down", (D_MODEL, FFN))):  # fmt: skip
            out.add_tensor(f"blk.{n}.{name}.weight", matrix(*shape, 1.5))
        for name in ("attn_norm", "ffn_norm"):
            out.add_tensor(f"blk.{n}.{name}.weight", np.ones(D_MODEL, np.float32))
    out.add_tensor("output_norm.weight", np.ones(D_MODEL, np.float32))
    head = matrix(len(tokens), D_MODEL, 0.5)
    favoured = [i for i, token in enumerate(tokens) if token.isascii() and token.isdecimal()]
    head[favoured] = matrix(len(favoured), D_MODEL, 4.0)
    out.add_tensor("output.weight", head)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path
