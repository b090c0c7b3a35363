"""core/analysis/lora.py and lora_space.py against the dense product, PEFT's own delta, and planted spaces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from test_adapters import KINDS, families, kinds, make

from core.analysis.lora import component_table, components, effective_rank, factored_svd, module_table
from core.analysis.lora_space import (
    angle_table,
    cosines,
    principal_angles,
    read_direction,
    write_direction,
    write_space,
)
from core.errors import AdapterError
from core.model.adapter_files import AdapterFactors, LoraFactors, read_factors
from core.model.gains import BlockGains
from core.specs import AdapterSpec


def rebuilt(parts, layer: int, name: str) -> np.ndarray:
    own = [c for c in parts if (c.key.layer, c.key.module) == (layer, name)]
    return sum(c.singular_value * np.outer(c.write, c.read) for c in own)


def mixed(adapter: AdapterFactors, seed: int = 5) -> AdapterFactors:
    """(A, B) -> (M A, B M^-1) with a random M a module (a number of either sign at rank 1), in float32 again."""
    rng = np.random.default_rng(seed)
    modules = []
    for n, m in enumerate(adapter.modules):
        r = len(m.A)
        M = rng.standard_normal((r, r)) if r > 1 else np.array([[(-1) ** n * rng.uniform(0.3, 3)]])
        modules.append(replace(m, A=(M @ m.A).astype(np.float32), B=(m.B @ np.linalg.inv(M)).astype(np.float32)))
    return replace(adapter, modules=tuple(modules))


@pytest.fixture
def read(tiny_model: Callable, tmp_path: Path) -> Callable[..., tuple[AdapterFactors, object]]:
    def build(family: str = "llama31", kind: str = "all modules", seed: int = 0):
        peft = make(tiny_model(family), tmp_path / f"{family}{seed}", seed=seed, **KINDS[kind])
        return read_factors(AdapterSpec("bad", str(tmp_path / f"{family}{seed}"))), peft

    return build


@families
@kinds
def test_components_sum_to_pefts_own_delta_on_real_inputs(family: str, kind: str, read: Callable) -> None:
    adapter, peft = read(family, kind)
    parts = components(adapter)
    modules = {n: m for n, m in peft.base_model.model.model.layers.named_modules() if hasattr(m, "lora_A")}
    assert {f"{m.layer}.{m.name}" for m in adapter.modules} == set(modules)
    torch.manual_seed(1)
    for m in adapter.modules:
        own = modules[f"{m.layer}.{m.name}"]
        x = torch.randn(7, m.A.shape[1])
        with torch.inference_mode():
            theirs = (own(x) - own.base_layer(x)).double().numpy()
        ours = x.double().numpy() @ rebuilt(parts, m.layer, m.name).T
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())
        assert np.abs(theirs).max() > 0.1, "otherwise equality would prove nothing"


@kinds
def test_nothing_depends_on_the_basis_of_the_factors(kind: str, read: Callable) -> None:
    adapter, _ = read(kind=kind)
    first, second = components(adapter), components(mixed(adapter))
    assert not np.allclose(adapter.modules[0].A, mixed(adapter).modules[0].A)
    assert [c.key for c in first] == [c.key for c in second]
    for a, b in zip(first, second, strict=True):
        assert a.singular_value == pytest.approx(b.singular_value, rel=1e-3)
        np.testing.assert_allclose(a.write, b.write, atol=2e-3)
        np.testing.assert_allclose(a.read, b.read, atol=2e-3)
    for table in (component_table, module_table):
        one, two = table(first), table(second)
        for name in ("share", "singular_value", "norm", "effective_rank"):
            if name in one.columns:
                np.testing.assert_allclose(one[name], two[name], rtol=2e-3)
    overlaps = [a.overlap for a in principal_angles(first, second)]
    np.testing.assert_allclose(overlaps, 1.0, atol=1e-5)


def test_the_svd_is_that_of_the_dense_product() -> None:
    rng = np.random.default_rng(0)
    B, A = rng.standard_normal((40, 5)), rng.standard_normal((5, 30))
    found = factored_svd(B, A, 0.7)
    values = np.linalg.svd(0.7 * B @ A, compute_uv=False)
    np.testing.assert_allclose(found.values, values[:5], rtol=1e-10)
    np.testing.assert_allclose(found.left * found.values @ found.right, 0.7 * B @ A, atol=1e-10)
    np.testing.assert_allclose(found.left.T @ found.left, np.eye(5), atol=1e-10)
    largest = found.left[np.abs(found.left).argmax(0), np.arange(5)]
    assert (largest > 0).all()


def test_rank_one_is_only_normalised() -> None:
    rng = np.random.default_rng(1)
    B, A = -rng.random((9, 1)), rng.standard_normal((1, 6))
    found = factored_svd(B, A, -2.0)
    assert found.values == pytest.approx([2 * np.linalg.norm(B) * np.linalg.norm(A)])
    np.testing.assert_allclose(found.left[:, 0], -B[:, 0] / np.linalg.norm(B))
    np.testing.assert_allclose(found.right[0], 1 * A[0] / np.linalg.norm(A))
    np.testing.assert_allclose(found.left * found.values @ found.right, -2 * B @ A)


def test_what_is_not_there_is_no_component() -> None:
    rng = np.random.default_rng(2)
    B, A = rng.standard_normal((12, 3)), rng.standard_normal((3, 10))
    B[:, 2] = B[:, 0] + B[:, 1]  # of rank 2
    assert len(factored_svd(B.astype(np.float32), A.astype(np.float32)).values) == 2
    assert len(factored_svd(0 * B, A).values) == len(factored_svd(B, A, 0.0).values) == 0
    assert len(factored_svd(0 * B[:, :1], A[:1]).values) == 0
    empty = AdapterFactors("a", "", "", "", (LoraFactors(0, "mlp.down_proj", A[:, :4], 0 * B, 1.0),))
    assert components(empty) == () and module_table(()).height == 0


def test_shares_and_effective_rank() -> None:
    eye = np.eye(4)
    modules = (LoraFactors(0, "mlp.down_proj", eye[:2], 3 * eye[:, :2], 1.0),
               LoraFactors(2, "self_attn.q_proj", eye[:1], eye[:, :1], 2.0))  # fmt: skip
    parts = components(AdapterFactors("a", "", "", "", modules))
    table = module_table(parts)
    assert table["share"].to_list() == pytest.approx([18 / 22, 4 / 22])
    assert table["norm"].to_list() == pytest.approx([18**0.5, 2])
    assert table["effective_rank"].to_list() == pytest.approx([2, 1])
    assert sum(c.share for c in parts) == pytest.approx(1)
    assert effective_rank(np.array([1.0, 1, 1, 1e-9])) == pytest.approx(3, abs=1e-5)
    assert [str(c.key) for c in parts] == ["0.down_proj.0", "0.down_proj.1", "2.q_proj.0"]


def gains(d: int, gemma: bool) -> BlockGains:
    rng = np.random.default_rng(3)
    made = [rng.uniform(0.5, 2, d).astype(np.float32) for _ in range(4)]
    return BlockGains(*made) if gemma else BlockGains(*made[:2])


@pytest.mark.parametrize("gemma", [False, True])
def test_directions_of_each_module(gemma: bool, read: Callable) -> None:
    parts = components(read("gemma2" if gemma else "llama31")[0])
    own = gains(32, gemma)
    for c in parts:
        writes, reads = write_direction(c, own), read_direction(c, own)
        assert (writes is None) == (c.key.kind not in ("o_proj", "down_proj"))
        assert (reads is None) == (c.key.kind in ("o_proj", "down_proj"))
        if reads is not None:
            np.testing.assert_allclose(reads, c.read * (own.mlp if c.key.kind in ("gate_proj", "up_proj") else
                                                        own.attention))
        if writes is not None and gemma:
            np.testing.assert_allclose(writes, c.write * (own.after_mlp if c.key.kind == "down_proj" else
                                                          own.after_attention))
        elif writes is not None:
            np.testing.assert_array_equal(writes, c.write)


def test_principal_angles_are_scipys_and_planted_spaces_are_found(read: Callable) -> None:
    a, b = components(read(seed=0)[0]), components(read(seed=1)[0])
    found = {(s.layer, s.module): s for s in principal_angles(a, b)}
    assert {m.rsplit(".")[-1] for _, m in found} == {"o_proj", "down_proj"}
    spaces = [write_space(a), write_space(b)]
    for (layer, module), angles in found.items():
        U, V = (s.vectors[s.rows(layer=layer, module=module)].T for s in spaces)
        np.testing.assert_allclose(angles.cosines, np.sort(np.cos(subspace_angles(U, V)))[::-1], atol=1e-7)
        assert 0 < angles.weighted < 1 and angles.chance == 4 / 32
    for one in principal_angles(a, a):
        assert one.overlap == pytest.approx(1) and one.weighted == pytest.approx(1)
    assert angle_table(list(found.values())).height == 8
    mean = np.mean([s.overlap for s in found.values()])
    assert mean == pytest.approx(4 / 32, abs=0.06), "random spaces overlap by chance alone"


def test_adapters_of_other_widths_are_refused() -> None:
    def one(d: int) -> tuple:
        return components(AdapterFactors("a", "", "", "", (LoraFactors(0, "mlp.down_proj", np.eye(d)[:1],
                                                                       np.eye(d)[:, :1], 1.0),)))

    with pytest.raises(AdapterError, match="different width"):
        principal_angles(one(4), one(5))
    with pytest.raises(AdapterError, match="different widths"):
        write_space(one(4) + one(5))
    assert np.isnan(cosines(np.zeros((1, 3)), np.ones((1, 3)))).all()
