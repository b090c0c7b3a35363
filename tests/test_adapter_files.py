"""core/model/adapter_files.py: what it reads without torch is what the model is given, in every number format."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_adapters import KINDS, families, kinds, make

from core.errors import AdapterError
from core.model.adapter_files import TARGETS, WEIGHTS, read_factors
from core.model.adapters import load_adapter
from core.model.peft_config import CONFIG
from core.paths import ROOT
from core.specs import AdapterSpec


@families
@kinds
def test_factors_are_those_given_to_the_model(family: str, kind: str, tiny_model: Callable, tmp_path: Path) -> None:
    loaded, spec = tiny_model(family), AdapterSpec("bad", "a")
    make(loaded, tmp_path / "a", **KINDS[kind])
    adapter, factors = load_adapter(spec, loaded, tmp_path), read_factors(spec, tmp_path)
    assert (factors.name, factors.hash, factors.folder) == (adapter.name, adapter.hash, adapter.folder)
    assert [(f.layer, f.name, f.scaling) for f in factors.modules] == [
        (m.layer, m.name, m.scaling) for m in adapter.modules
    ]
    for own, theirs in zip(factors.modules, adapter.modules, strict=True):
        assert own.A.dtype == own.B.dtype == np.float32
        np.testing.assert_array_equal(own.A, theirs.A.numpy())
        np.testing.assert_array_equal(own.B, theirs.B.numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_number_format_reads_as_torch_reads_it(dtype: torch.dtype, tiny_model: Callable, tmp_path: Path) -> None:
    make(tiny_model("llama31"), tmp_path, r=4, lora_alpha=8, target_modules=list(TARGETS))
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    for factors in read_factors(AdapterSpec("bad", str(tmp_path))).modules:
        for which in "AB":
            key = f"base_model.model.model.layers.{factors.layer}.{factors.name}.lora_{which}.weight"
            np.testing.assert_array_equal(getattr(factors, which), tensors[key].float().numpy())


@pytest.mark.parametrize(("r", "says"), [(3, "which is not rank 3"), (0, "the rank 0")])
def test_matrices_that_are_not_of_the_stated_rank_are_refused(
    r: int, says: str, tiny_model: Callable, tmp_path: Path
) -> None:
    make(tiny_model("llama31"), tmp_path, r=4, lora_alpha=8, target_modules=["down_proj"])
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"r": r}))
    with pytest.raises(AdapterError, match=says) as caught:
        read_factors(AdapterSpec("bad", str(tmp_path)))
    assert str(caught.value).startswith(f"Adapter 'bad' in {tmp_path}: ")


def test_a_missing_or_damaged_file_is_refused(tiny_model: Callable, tmp_path: Path) -> None:
    make(tiny_model("llama31"), tmp_path, r=4, lora_alpha=8, target_modules=["down_proj"])
    tensors = load_file(tmp_path / WEIGHTS)
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match="has no lora_B"):
        read_factors(AdapterSpec("bad", str(tmp_path)))
    (tmp_path / WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(AdapterError, match="cannot be read"):
        read_factors(AdapterSpec("bad", str(tmp_path)))


def test_reading_an_adapter_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from core.model.adapter_files import read_factors\nfrom core.specs import AdapterSpec\n"
        "found = read_factors(AdapterSpec('bad', 'adapters/bad-health-r1'), Path('cache/demo'))\n"
        "assert len(found.modules) == 9 and 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
