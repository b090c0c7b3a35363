"""Traces: which entry belongs to which token, and LoRA norms that do not depend on how B A is factored."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from core.model.adapters import Adapter, LoraModule
from core.model.traces import LoraTrace, Trace


def test_the_prompt_comes_first() -> None:
    trace = Trace("d", "projection", 2, None, 3, np.arange(5.0, dtype=np.float32))
    assert trace.prompt.tolist() == [0, 1, 2] and trace.response.tolist() == [3, 4]


def test_norms_are_those_of_the_output_whatever_the_factors() -> None:
    torch.manual_seed(0)
    shapes = ((3, 8, 5), (1, 8, 6))
    modules = tuple(
        LoraModule(n, "mlp.down_proj", torch.randn(r, d), torch.randn(out, r), 0.5 + n)
        for n, (r, d, out) in enumerate(shapes)
    )
    mixing = [torch.randn(3, 3), torch.tensor([[-2.0]])]
    mixed = tuple(replace(m, A=M @ m.A, B=m.B @ torch.linalg.inv(M)) for m, M in zip(modules, mixing, strict=True))
    x = torch.randn(7, 8)
    wanted = torch.stack([(m.scaling * x @ m.A.T @ m.B.T).norm(dim=-1) for m in modules], 1).numpy()
    for made in (modules, mixed):
        scalars = torch.cat([x @ m.A.T for m in made], 1).numpy()
        found = LoraTrace(Adapter("a", "", "", "", made), 2, scalars).norms()
        assert found.shape == (7, 2) and np.allclose(found, wanted, rtol=1e-3)
