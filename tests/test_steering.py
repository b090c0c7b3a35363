"""Interventions as computed: where they act and where not, in which order, and for which row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from steering_setup import direction, exact_sae, hooks, lora, random_sae
from test_hooks import batch
from tiny_models import LAYERS
from torch import Tensor

from core.errors import AdapterError, InterventionError, ModelError
from core.model.adapters import applied
from core.model.features import Feature
from core.model.hooks import recording
from core.model.interventions import (
    AblateDirection,
    AddDirection,
    ApplyLora,
    ClampFeature,
    Intervention,
    ScaleFeature,
    ablate_each,
)
from core.model.loading import LoadedModel
from core.model.scopes import PROMPT, RESPONSE, Scope, positions_of
from core.model.steering import Steering, steered

Tiny = Callable[[str], LoadedModel]
families = pytest.mark.parametrize("family", ["llama31", "gemma2", "qwen2"])
N_PROMPT = (5, 3, 2)


@torch.inference_mode()
def residuals(
    loaded: LoadedModel, rows: Sequence[Sequence[Intervention]], left: bool = False, n_prompt: Sequence[int] = N_PROMPT
) -> list[Tensor]:
    """resid_post of every layer [row, position, d_model], with padding as zeros, in the order of right padding."""
    ids, mask = batch(loaded)
    ids, mask = ids[: len(rows)], mask[: len(rows)]
    if left:
        shifts = [int(n) for n in (mask == 0).sum(1)]
        ids, mask = (torch.stack([r.roll(s) for r, s in zip(t, shifts, strict=True)]) for t in (ids, mask))
    steering = Steering(loaded, rows, n_prompt[: len(rows)])
    positions = positions_of(mask)
    with steering.during(positions), recording(loaded.blocks, range(LAYERS), stop=False) as found:
        loaded.model(input_ids=ids, attention_mask=mask, position_ids=positions.clamp(min=0))
    assert not steering.broken()
    found = [found[layer] * mask[..., None] for layer in range(LAYERS)]
    if left:
        found = [torch.stack([r.roll(-s, 0) for r, s in zip(x, shifts, strict=True)]) for x in found]
    return found


@families
def test_layers_below_are_untouched_and_the_vector_is_added_at_its_own(family: str, tiny_model: Tiny) -> None:
    loaded = tiny_model(family)
    item = AddDirection(direction(loaded, 2), 0.5)
    base, new = residuals(loaded, [(), (), ()]), residuals(loaded, [(item,), (), ()])
    assert torch.equal(base[0], new[0]) and torch.equal(base[1], new[1])
    assert torch.equal(new[2][0], base[2][0] + torch.from_numpy(item.vector))
    assert np.linalg.norm(item.vector) == pytest.approx(3.0, rel=1e-5)
    assert (new[3][0] - base[3][0]).abs().max() > 0.1
    for layer in range(LAYERS):
        assert torch.equal(base[layer][1:], new[layer][1:])


@families
def test_ablation_leaves_nothing_along_the_direction(family: str, tiny_model: Tiny) -> None:
    loaded = tiny_model(family)
    d, other = direction(loaded, 2, 0), direction(loaded, 2, 1)
    oblique = d + other
    row = (AblateDirection(d), AddDirection(d, 1.0), AddDirection(other, 1.0), AblateDirection(oblique),
           AblateDirection(other, strength=0.5), ClampFeature(exact_sae(2), 3, 5.0))  # fmt: skip
    before, new = residuals(loaded, [()])[2], residuals(loaded, [row])[2]
    for vector in (d.unit, oblique.unit, other.unit):
        assert (before @ torch.tensor(vector)).abs().max() > 0.5
        assert (new @ torch.tensor(vector)).abs().max() < 1e-4
    everywhere = residuals(loaded, [(AblateDirection(d, everywhere=True),)])
    assert all((x @ torch.tensor(d.unit)).abs().max() < 1e-4 for x in everywhere)
    each = [direction(loaded, layer, layer) for layer in range(LAYERS)]
    for x, own in zip(residuals(loaded, [ablate_each(each)]), each, strict=True):
        assert (x @ torch.tensor(own.unit)).abs().max() < 1e-4


def test_half_an_ablation_leaves_half(tiny_model: Tiny) -> None:
    loaded, d = tiny_model("llama31"), direction(tiny_model("llama31"))
    before, half = residuals(loaded, [()])[2], residuals(loaded, [(AblateDirection(d, strength=0.5),)])[2]
    unit = torch.tensor(d.unit)
    assert torch.allclose(half @ unit, before @ unit / 2, atol=1e-5)
    assert torch.allclose(half - (half @ unit)[..., None] * unit, before - (before @ unit)[..., None] * unit, atol=1e-5)


def test_a_clamped_feature_has_its_value_and_the_others_theirs(tiny_model: Tiny) -> None:
    loaded, sae = tiny_model("llama31"), exact_sae(2)
    before = residuals(loaded, [()])[2]
    new = residuals(loaded, [(ClampFeature(sae, 3, 7.5), ScaleFeature(sae, 5, -2.0))])[2]
    old, now = sae.sae.encode(before[0]), before.new_tensor(0) + sae.sae.encode(new[0])
    here = old[:, 3] > 0  # where x . w is negative the SAE reads 0, and its error keeps the negative part
    assert here.any() and not here.all() and old[:, 5].max() > 0.5
    assert torch.allclose(now[here, 3], torch.tensor(7.5), atol=1e-4)
    w = sae.sae.W_dec[3]
    assert torch.allclose((new[0] @ w)[~here], (before[0] @ w)[~here] + 7.5, atol=1e-4)
    assert torch.allclose(
        new[0] @ sae.sae.W_dec[5], (before[0] @ sae.sae.W_dec[5]).where(old[:, 5] == 0, -2 * old[:, 5]), atol=1e-4
    )
    rest = [f for f in range(32) if f not in (3, 5)]
    assert torch.allclose(now[:, rest], old[:, rest], atol=1e-4)


@pytest.mark.parametrize("normalize", ["none", "constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("architecture", ["jumprelu", "standard", "topk"])
def test_the_saes_error_is_kept(tiny_model: Tiny, tmp_path: Path, architecture: str, normalize: str) -> None:
    """The change is that of the SAE's own reconstruction when its activations are edited, whatever its kind."""
    loaded = tiny_model("llama31")
    sae = random_sae(tmp_path / "sae", 2, architecture, normalize)
    before = residuals(loaded, [()])[2][0]
    acts = sae.sae.encode(before)
    strongest = int(acts.amax(0).argmax())
    for item, wanted in ((ClampFeature(sae, strongest, 4.0), torch.tensor(4.0)),
                         (ScaleFeature(sae, strongest, 3.0), 3 * acts[:, strongest])):  # fmt: skip
        edited = acts.clone()
        edited[:, strongest] = wanted
        theirs = []
        for given in (edited, acts):
            sae.sae.encode(before)  # decode undoes the normalisation of what was encoded last
            theirs.append(sae.sae.decode(given))
        new = residuals(loaded, [(item,)])[2][0]
        assert torch.allclose(new - before, theirs[0] - theirs[1], atol=1e-4)
        assert (new - before).abs().max() > 0.1


def test_the_order_in_which_they_are_given_does_not_matter(tiny_model: Tiny) -> None:
    loaded = tiny_model("gemma2")
    d, e = direction(loaded, 2, 0), direction(loaded, 2, 1)
    items = [AddDirection(d, 1.0), ApplyLora(lora(loaded), 0.7), ClampFeature(exact_sae(2), 3, 5.0), AblateDirection(e),
             ScaleFeature(exact_sae(2), 4, 2.0), AddDirection(e, -0.5)]  # fmt: skip
    one, other = residuals(loaded, [items])[3], residuals(loaded, [items[::-1]])[3]
    assert torch.allclose(one, other, atol=1e-5)
    assert (one - residuals(loaded, [()])[3]).abs().max() > 0.5


@families
def test_rows_do_not_see_each_others_interventions(family: str, tiny_model: Tiny) -> None:
    loaded = tiny_model(family)
    rows = [
        (AddDirection(direction(loaded, 1), 1.0), ClampFeature(exact_sae(2), 1, 4.0, RESPONSE)),
        (ApplyLora(lora(loaded), 1.0, PROMPT), AblateDirection(direction(loaded, 2, 4))),
        (ApplyLora(lora(loaded, 1), 2.0), ScaleFeature(exact_sae(2), 2, 0.0)),
    ]
    together = residuals(loaded, rows)
    for n in range(3):
        alone = residuals(loaded, [rows[n] if m == n else () for m in range(3)])
        for layer in range(LAYERS):
            assert torch.allclose(together[layer][n], alone[layer][n], atol=2e-5)


@families
@pytest.mark.parametrize("scope", ["prompt", "response", "first:2"])
def test_scopes_hold_whatever_the_padding(family: str, scope: str, tiny_model: Tiny) -> None:
    loaded = tiny_model(family)
    where = Scope.parse(scope)
    for make in (
        lambda: AddDirection(direction(loaded, 2), 1.0, scope=where),
        lambda: AblateDirection(direction(loaded, 2), scope=where),
        lambda: AblateDirection(direction(loaded, 2), strength=0.5, scope=where),
        lambda: ClampFeature(exact_sae(2), 3, 9.0, scope=where),
    ):
        base, new = residuals(loaded, [()] * 3)[2], residuals(loaded, [(make(),)] * 3)[2]
        changed = (base - new).abs().amax(-1) > 1e-6
        lengths = (17, 9, 4)
        for n, (n_prompt, length) in enumerate(zip(N_PROMPT, lengths, strict=True)):
            inside = {"prompt": range(n_prompt), "response": range(n_prompt, length)}.get(
                where.kind, range(n_prompt, min(n_prompt + 2, length))
            )
            assert changed[n].nonzero().ravel().tolist() == list(inside)
        assert torch.allclose(residuals(loaded, [(make(),)] * 3, left=True)[2], new, atol=1e-4)


def test_a_lora_is_applied_as_everywhere_else_and_within_its_scope(tiny_model: Tiny) -> None:
    loaded = tiny_model("qwen2")
    adapter, (ids, mask) = lora(loaded), batch(loaded)
    with torch.inference_mode(), applied(loaded, adapter, torch.tensor([1.0, 0.0, 0.5])):
        with recording(loaded.blocks, [3], stop=False) as found:
            loaded.model(input_ids=ids, attention_mask=mask)
    ours = residuals(loaded, [(ApplyLora(adapter),), (), (ApplyLora(adapter, 0.2), ApplyLora(adapter, 0.3))])[3]
    assert torch.allclose(ours, found[3] * mask[..., None], atol=1e-5)
    base, prompt = residuals(loaded, [()] * 3)[3], residuals(loaded, [(ApplyLora(adapter, scope=RESPONSE),)] * 3)[3]
    assert torch.equal(base[0, :5], prompt[0, :5]) and (base[0, 5:] - prompt[0, 5:]).abs().max() > 0.1


def test_probes_read_what_is_left_after_the_changes(tiny_model: Tiny) -> None:
    loaded, sae = tiny_model("llama31"), exact_sae(2)
    d, e = direction(loaded, 2), direction(loaded, 1, 3)
    ids, mask = batch(loaded)
    rows = [(AddDirection(d, 1.0), ClampFeature(sae, 3, 7.5)), (), ()]
    probes = [Feature(sae, 3), d, e, Feature(sae, 9)]
    steering = Steering(loaded, rows, N_PROMPT, probes, lora_scalars=True)
    with torch.inference_mode(), steering.during(positions_of(mask)):
        loaded.model(input_ids=ids, attention_mask=mask)
    read, found = steering.readings().probes, residuals(loaded, rows)
    assert read.shape == (3, 17, 4)
    for n, length in enumerate((17, 9, 4)):
        at = (n, slice(length))
        assert torch.allclose(read[at][:, 1], found[2][at] @ torch.tensor(d.unit), atol=1e-5)
        assert torch.allclose(read[at][:, 2], found[1][at] @ torch.tensor(e.unit), atol=1e-5)
        acts = sae.sae.encode(found[2][at])
        assert torch.allclose(read[at][:, [0, 3]], acts[:, [3, 9]], atol=1e-5)
    assert steering.readings().lora == ()


def test_lora_scalars_are_a_times_x(tiny_model: Tiny) -> None:
    loaded = tiny_model("llama31")
    adapter, (ids, mask) = lora(loaded), batch(loaded)
    for rows, active in (
        ([(), (ApplyLora(adapter),), ()], [1]),
        ([(ApplyLora(adapter),), (), (ApplyLora(adapter, 2),)], [0, 2]),
    ):
        steering = Steering(loaded, rows, N_PROMPT, lora_scalars=True)
        seen: list[Tensor] = []
        handle = loaded.blocks[1].mlp.down_proj.register_forward_hook(lambda m, x, y, into=seen: into.append(x[0]))
        try:
            with torch.inference_mode(), steering.during(positions_of(mask)):
                loaded.model(input_ids=ids, attention_mask=mask)
        finally:
            handle.remove()
        (scalars,) = steering.readings().lora
        assert scalars.shape == (3, 17, 8)
        assert torch.allclose(scalars[active][..., :2], (seen[0] @ adapter.modules[0].A.T)[active], atol=1e-5)
        assert torch.isnan(scalars).all(-1).any(-1).nonzero().ravel().tolist() == [
            n for n in range(3) if n not in active
        ]


def test_a_residual_that_explodes_is_told_by_row(tiny_model: Tiny) -> None:
    loaded, (ids, mask) = tiny_model("llama31"), batch(tiny_model("llama31"))
    steering = Steering(
        loaded, [(), (ClampFeature(exact_sae(2), 3, 1e25),), (AddDirection(direction(loaded), 1.0),)], N_PROMPT
    )
    with torch.inference_mode(), steering.during(positions_of(mask)):
        loaded.model(input_ids=ids, attention_mask=mask)
    assert list(steering.broken()) == [1] and "layer 2's residual overflows" in steering.broken()[1]


def test_every_row_alike_in_any_pass(tiny_model: Tiny) -> None:
    loaded, (ids, mask) = tiny_model("qwen2"), batch(tiny_model("qwen2"))
    row = (AddDirection(direction(loaded, 1), 1.0), AblateDirection(direction(loaded, 2, 5)),
           ApplyLora(lora(loaded), 0.5), ClampFeature(exact_sae(2), 3, 4.0),
           AblateDirection(direction(loaded, 3, 5), strength=0.5))  # fmt: skip
    with torch.inference_mode(), steered(loaded, row), recording(loaded.blocks, [3], stop=False) as found:
        loaded.model(input_ids=ids, attention_mask=mask)
    assert torch.allclose(found[3] * mask[..., None], residuals(loaded, [row] * 3)[3], atol=1e-5)
    with (
        pytest.raises(InterventionError, match="Scope prompt needs prompts"),
        steered(loaded, (replace(row[0], scope=PROMPT),)),
    ):
        pass
    with (
        pytest.raises(InterventionError, match="nan, which is not a finite"),
        steered(loaded, (ApplyLora(lora(loaded), np.nan),)),
    ):
        pass


def test_what_was_made_for_another_model_is_refused(tiny_model: Tiny) -> None:
    loaded = tiny_model("llama31")
    d = direction(loaded)
    wrong = {
        "lives in other, not in": AddDirection(replace(d, model="other"), 1.0),
        "has d_model 3": AddDirection(replace(d, vector=np.ones(3)), 1.0),
    }
    for says, item in wrong.items():
        with pytest.raises(InterventionError, match=says):
            Steering(loaded, [(item,)], [1])
    with pytest.raises(ModelError, match="Layer 7 does not exist"):
        Steering(loaded, [()], [1], [replace(d, layer=7)])
    deep = lora(loaded)
    with pytest.raises(AdapterError, match="layers 0 to 3"):
        Steering(loaded, [(ApplyLora(replace(deep, modules=(replace(deep.modules[0], layer=9),))),)], [1])
    with pytest.raises(InterventionError, match="feature of layer 2 twice"):
        Steering(loaded, [(ClampFeature(exact_sae(), 3, 1.0), ScaleFeature(exact_sae(), 3, 1.5))], [1])


def test_no_hook_stays_also_after_an_exception(tiny_model: Tiny) -> None:
    loaded = tiny_model("llama31")
    before = hooks(loaded)
    steering = Steering(loaded, [(AddDirection(direction(loaded), 1.0), ApplyLora(lora(loaded)))], [1])
    with pytest.raises(ZeroDivisionError), steering.during(torch.zeros(1, 1, dtype=torch.int64)):
        assert hooks(loaded) == before + 1 + 4
        raise ZeroDivisionError
    assert hooks(loaded) == before
