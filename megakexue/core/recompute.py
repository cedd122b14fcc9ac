"""What the backward pass computes again instead of keeping it, where its inputs wait, and long rows tile by tile.

What must stay true: what is computed again has the same bits, so `recomputed` changes no bit of a run. `in_tiles` adds
the gradients of weights up in another order, and changes rounding alone.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Tensor], *arguments: object, offload: bool = False) -> Tensor:
    """Call the function, and call it again in the backward pass instead of keeping what happens in it.

    Args:
        offload: keep the arguments that are tensors in the pinned memory of the host until then. The host does not wait
            for the copies, and the device does. On a CPU it is a copy without a gain.
    """
    where: AbstractContextManager[object] = save_on_cpu(pin_memory=True) if offload else nullcontext()
    with where:
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def in_tiles(
    function: Callable[..., Tensor], size: int, inputs: Sequence[Float[Tensor, "b t _"]], weights: Sequence[Tensor]
) -> Float[Tensor, "b t _"]:
    """Return function(*inputs) of a function that treats each token alone, computed for `size` tokens at a time.

    The backward pass computes it again, tile by tile. So of what happens in it, no more than one tile's exists at a
    time. The gradients of the weights are added up in float32, and reach them once.

    Args:
        weights: all parameters that the function uses.
    """
    if inputs[0].shape[1] <= size:
        return function(*inputs)
    if not torch.is_grad_enabled():
        return _forward(function, size, inputs)
    result: Tensor = _Tiles.apply(function, size, _Kept.apply(*inputs).grad_fn, len(inputs), *inputs, *weights)
    return result


def _tiles(size: int, tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    return list(zip(*(x.split(size, dim=1) for x in tensors)))


def _forward(function: Callable[..., Tensor], size: int, inputs: Sequence[Tensor]) -> Tensor:
    result = None
    for i, tile in enumerate(_tiles(size, inputs)):
        y = function(*tile)
        if result is None:
            result = y.new_empty(*inputs[0].shape[:2], *y.shape[2:])
        result[:, i * size : i * size + y.shape[1]] = y
    assert result is not None
    return result


class _Kept(torch.autograd.Function):
    """Keeps tensors as any operation does, so that a block that is computed again forgets them too.

    It comes before the tiles. So when a block is computed again for its backward pass, that ends here, and the tiles'
    forward pass is not repeated for nothing.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return tensors[0].new_empty(0)


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], size: int, kept: Any, n: int, *tensors: Tensor) -> Tensor:
        ctx.function, ctx.size, ctx.kept = function, size, kept
        ctx.weights = tensors[n:]  # which live as long as the model: no hook has to keep them
        return _forward(function, size, tensors[:n])

    @staticmethod
    def backward(ctx: Any, *d_results: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inputs: tuple[Tensor, ...] = ctx.kept.saved_tensors
        ctx.kept = None  # the last that holds them beside `inputs`
        d_inputs = [torch.empty_like(x) for x in inputs]
        d_weights = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in ctx.weights]
        for tile, d_tile, (d_result,) in zip(*(_tiles(ctx.size, x) for x in (inputs, d_inputs, d_results))):
            leaves = [x.detach().requires_grad_() for x in tile]
            with torch.enable_grad():
                result = ctx.function(*leaves)
            gradients = torch.autograd.grad(result, [*leaves, *ctx.weights], d_result)
            del result
            for total, gradient in zip(d_tile, gradients):
                total.copy_(gradient)
            for total, gradient in zip(d_weights, gradients[len(leaves) :]):
                total += gradient
        return *[None] * 4, *d_inputs, *(d.to(w.dtype) for d, w in zip(d_weights, ctx.weights))
