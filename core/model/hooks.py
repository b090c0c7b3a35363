"""Records resid_post at chosen layers and stops the forward pass after the last one. The only torch hooks are here.

The block itself is hooked: transformers' `hidden_states[-1]` is taken after the final norm and is not resid_post.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from core.errors import ModelError
from core.model.loading import LoadedModel

ModuleChange = tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]
"""A module, and what turns its input and output, both [batch, position, its own width], into its new output."""


class _Stop(Exception):
    """Ends the forward pass once the deepest wanted layer has been seen."""


def _residual(output: object) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def check_layers(blocks: nn.ModuleList, layers: Sequence[int]) -> None:
    """Raises `ModelError` for a layer that the model does not have."""
    for layer in layers:
        if not 0 <= layer < len(blocks):
            raise ModelError(f"Layer {layer} does not exist; this model has layers 0 to {len(blocks) - 1}.")


@contextmanager
def recording(blocks: nn.ModuleList, layers: Sequence[int], *, stop: bool = True) -> Iterator[dict[int, Tensor]]:
    """Within the block, every forward pass fills the yielded dict with layer -> resid_post [batch, position, d_model].

    With `stop`, the deepest layer's hook ends the pass: call through `run`, which swallows that signal.
    """
    check_layers(blocks, layers)
    found: dict[int, Tensor] = {}
    deepest = max(layers)

    def hook(layer: int) -> Callable[..., None]:
        def record(_module: nn.Module, _inputs: object, output: object) -> None:
            found[layer] = _residual(output)
            if stop and layer == deepest:
                raise _Stop

        return record

    handles = [blocks[layer].register_forward_hook(hook(layer)) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recording_with_grad(blocks: nn.ModuleList, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Like `recording` without `stop`, but what is recorded can be differentiated with respect to.

    The shallowest layer's resid_post becomes a leaf of the graph, so no weight needs a gradient and nothing below
    that layer is kept. Run the forward pass with gradients enabled, then `torch.autograd.grad(loss, [found[layer]])`.
    """
    check_layers(blocks, layers)
    found: dict[int, Tensor] = {}

    def hook(layer: int) -> Callable[..., object]:
        def record(_module: nn.Module, _inputs: object, output: object) -> object:
            resid = _residual(output)
            found[layer] = resid if resid.requires_grad else resid.detach().requires_grad_()
            return (found[layer], *output[1:]) if isinstance(output, tuple) else found[layer]

        return record

    handles = [blocks[layer].register_forward_hook(hook(layer)) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replacing(block: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block, `change` is applied to the block's resid_post [batch, position, d_model]."""
    with replacing_each([(block, change)]):
        yield


@contextmanager
def replacing_each(changes: Sequence[tuple[nn.Module, Callable[[Tensor], Tensor]]]) -> Iterator[None]:
    """Like `replacing`, at several blocks."""

    def hook(change: Callable[[Tensor], Tensor]) -> Callable[..., object]:
        def replace(_module: nn.Module, _inputs: object, output: object) -> object:
            new = change(_residual(output))
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return replace

    handles = [block.register_forward_hook(hook(change)) for block, change in changes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def changing(changes: Sequence[ModuleChange]) -> Iterator[None]:
    """Within the block, each module returns change(input, output); both [batch, position, its own width].

    Several changes of one module, nested blocks included, act in order, each on what the one before returned.
    """

    def hook(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda _module, inputs, output: change(inputs[0], output)

    handles = [module.register_forward_hook(hook(change)) for module, change in changes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def resid_post(loaded: LoadedModel, ids: Tensor, mask: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    """resid_post [batch, position, d_model] at `layers`, of right-padded `ids` [batch, position] under `mask`."""
    with recording(loaded.blocks, layers) as found:
        try:
            loaded.decoder(input_ids=ids, attention_mask=mask, use_cache=False)
        except _Stop:
            pass
    return found


@torch.inference_mode()
def parity(loaded: LoadedModel, ids: Tensor, mask: Tensor) -> dict[int, float]:
    """Largest absolute difference, layer by layer, between the hooked resid_post and the model's own outputs.

    `hidden_states[L + 1]` is compared for every layer but the last; for the last, which transformers returns after
    the final norm, the hooked residual is sent through that norm first. Padding positions are left out.
    """
    layers = range(loaded.n_layers)
    hooked = resid_post(loaded, ids, mask, layers)
    own = loaded.decoder(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True).hidden_states
    keep = mask.bool()
    last = loaded.n_layers - 1
    hooked[last] = loaded.final_norm(hooked[last])
    return {layer: float((hooked[layer] - own[layer + 1])[keep].abs().max()) for layer in layers}
