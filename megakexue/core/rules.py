"""The rules of Tiger, Lion, Muon and AdamW, and the kernels that run them in one pass over memory.

A rule is a pure function of tensors of one shape. Its kernel works in place on [units, width], with a rate for each
unit. The scalars are tensors, so that no step waits for the device.

What must stay true: each operation rounds once and by itself (no fused multiply-add on CPU), so that the places where
ZeRO cuts a tensor change no bit. This holds for the kernels too, however they are compiled or cut into chunks.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megakexue.core.device import has_compiler

# --- the rules, as pure functions ------------------------------------------------------------------------------------


def absorb(momentum: Tensor, gradient: Tensor, beta: Tensor, scale: Tensor) -> Tensor:
    """Return beta m + scale g in the dtype of the scalars, fp32 in training."""
    return beta * momentum.to(beta.dtype) + scale * gradient.to(beta.dtype)


def sign_step(theta: Tensor, direction: Tensor, lr: Tensor, decay: Tensor) -> Tensor:
    """Return theta - lr (sign(direction) + decay theta)."""
    return theta - (torch.sign(direction) + decay * theta) * lr


def tiger_update(
    theta: Tensor, momentum: Tensor, gradient: Tensor, lr: Tensor, decay: Tensor, beta: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return theta and m after one update of Tiger (9512); scale is (1 - beta) times what multiplies the gradient."""
    momentum = absorb(momentum, gradient, beta, scale)
    return sign_step(theta, momentum, lr, decay), momentum


def lion_update(
    theta: Tensor, momentum: Tensor, gradient: Tensor, lr: Tensor, decay: Tensor, beta1: Tensor, scale1: Tensor,
    beta2: Tensor, scale2: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return theta and m after one update of Lion (9473, arXiv 2302.06675): the step first, then the momentum."""
    theta = sign_step(theta, absorb(momentum, gradient, beta1, scale1), lr, decay)
    return theta, absorb(momentum, gradient, beta2, scale2)


def muon_step(theta: Tensor, direction: Tensor, lr: Tensor, decay: Tensor, scale: Tensor) -> Tensor:
    """Return theta - lr (scale direction + decay theta), the direction being orthogonal (megakexue/core/muon.py)."""
    return theta - (scale * direction.to(theta.dtype) + decay * theta) * lr


def squares(x: Tensor) -> Tensor:
    """Return the sum of squares of each unit, float64."""
    return x.double().square().sum(-1)


# --- the rules in place: weights are theta in another dtype; what moves theta by Tiger returns squares(theta) --------


def _tiger(theta: Tensor, weights: Tensor | None, momentum: Tensor, gradient: Tensor, *scalars: Tensor) -> Tensor:
    new, m = tiger_update(theta, momentum, gradient, *scalars)
    momentum.copy_(m)
    _put(new, theta, weights)
    return squares(new)


def _tiger_absorb(momentum: Tensor, gradient: Tensor, ok: Tensor, beta: Tensor, scale: Tensor) -> None:
    # `where`, since a gradient that is multiplied by zero can still be NaN
    momentum.copy_(torch.where(ok, absorb(momentum, gradient, beta, scale), momentum.to(beta.dtype)))


def _tiger_apply(theta: Tensor, weights: Tensor | None, momentum: Tensor, lr: Tensor, decay: Tensor) -> Tensor:
    new = sign_step(theta, momentum.to(theta.dtype), lr, decay)
    _put(new, theta, weights)
    return squares(new)


def _lion(theta: Tensor, weights: Tensor | None, momentum: Tensor, gradient: Tensor, *scalars: Tensor) -> None:
    new, m = lion_update(theta, momentum, gradient, *scalars)
    momentum.copy_(m)
    _put(new, theta, weights)


def _muon_direction(momentum: Tensor, gradient: Tensor, beta: Tensor, scale: Tensor) -> Tensor:
    m = absorb(momentum, gradient, beta, scale)
    momentum.copy_(m)
    return absorb(m, gradient, beta, scale)  # Nesterov: as if the gradient came once more


def _muon(theta: Tensor, weights: Tensor | None, direction: Tensor, *scalars: Tensor) -> None:
    _put(muon_step(theta, direction, *scalars), theta, weights)


def _put(new: Tensor, theta: Tensor, weights: Tensor | None) -> None:
    theta.copy_(new)
    if weights is not None:
        weights.copy_(new)


# --- the kernels -----------------------------------------------------------------------------------------------------

CHUNK = 2**16
"""Elements that fit the cache of a CPU core through all operations of a rule."""
PIECE = 2**26
"""Elements that a compiled kernel takes at a time: enough that no launch counts, while what it leaves is small."""
COMPILE_FROM = 2**24
"""On CPU, compile for this many elements a rank or more: fewer do not pay for the compiler's start, which takes
seconds, and half a minute the first time."""


def kernels(device: torch.device, n_elements: int) -> tuple[dict[str, Callable[..., Any]], int, str]:
    """Return the kernels for this device by name, how many elements to give them at a time, and how they run and why.

    Args:
        n_elements: of all masters of this rank.
    """
    rules = {f.__name__: f for f in (_tiger, _tiger_absorb, _tiger_apply, _lion, _muon_direction, _muon, squares)}
    if device.type == "cuda":
        reason = "compiled: one pass over the state"
    elif n_elements >= COMPILE_FROM and has_compiler():
        reason = f"compiled: one pass over the state, for {n_elements:,} elements a rank"
    else:
        fewer = f"fewer than {COMPILE_FROM:,} elements a rank" if n_elements < COMPILE_FROM else "no C++ compiler found"
        return dict(rules), CHUNK, f"in chunks of {CHUNK:,}: {fewer}"

    def by_size(rule: Callable[..., Any]) -> Callable[..., Any]:
        compiled = torch.compile(rule, dynamic=True)
        # the compiler lays a kernel out for the first size that it gets, so it must get no gain and no piece of a row
        return lambda *arguments: (compiled if arguments[0].numel() >= CHUNK else rule)(*arguments)

    compiled = {name: by_size(f) for name, f in rules.items()}
    if device.type == "cpu":
        compiled |= {name: _cast_after(compiled[name]) for name in ("_tiger", "_tiger_apply", "_lion", "_muon")}
    return compiled, PIECE, reason


def _cast_after(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Write the weights by an operation of its own, since two writes beside a sum become two loops in C++."""

    def run(theta: Tensor, weights: Tensor | None, *arguments: Tensor) -> Tensor | None:
        result = kernel(theta, None, *arguments)
        if weights is not None:
            weights.copy_(theta)
        return result

    return run


# --- AdamW's kernel --------------------------------------------------------------------------------------------------

LANES = 16
"""fp32 elements in the widest vector register of a CPU."""
HALF_PIECE = {"cpu": 2**20, "cuda": 2**26}
"""Elements of a half-precision gradient that are made fp32 at a time. CPU: they fit the cache; CUDA: few launches."""


def adamw_step(
    theta: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, undecayed: Tensor, n_updates: int,
    factor: Tensor, *, weight_decay: float, **numbers: float,
) -> None:  # fmt: skip
    """Move a flat theta and its state in place by AdamW. An fp32 gradient is overwritten.

    torch's kernel has one weight decay. The few elements without any are moved once more, from a copy: so there are two
    calls, however many tensors lie here, and each element has the bits of a call for its tensor alone.

    Args:
        undecayed: places of the elements without weight decay.
        n_updates: with this one, for the bias correction.
        factor: what multiplies the gradient.
        numbers: lr, beta1, beta2 and eps.
    """
    moved = theta, exp_avg, exp_avg_sq
    few = [x[undecayed] for x in (theta, gradient, exp_avg, exp_avg_sq)] if len(undecayed) else []
    size = theta.numel() if gradient.dtype == theta.dtype else HALF_PIECE[theta.device.type]
    for tensors, decay in (((theta, gradient, exp_avg, exp_avg_sq), weight_decay), (few, 0.0)):
        for w, g, m, v in zip(*(x.split(size) for x in tensors)):
            _fused_adamw([w, g.to(w.dtype), m, v], n_updates, factor, numbers | {"weight_decay": decay})
    if few:
        for x, new in zip(moved, (few[0], few[2], few[3])):
            x[undecayed] = new


def _fused_adamw(tensors: list[Tensor], n_updates: int, factor: Tensor, numbers: dict[str, Any]) -> None:
    """Call torch's kernel on a flat theta, gradient, exp_avg and exp_avg_sq.

    On CPU the kernel computes the last elements, which do not fill a vector register, in scalar code that rounds
    differently. The result would then depend on where ZeRO cut the tensor. So these go through the vector code too, in
    a copy that fills a register.
    """
    calls = [tensors]
    n = tensors[0].numel() // LANES * LANES
    tails = [x[n:] for x in tensors]
    if tensors[0].device.type == "cpu" and tails[0].numel():
        padded = [torch.zeros(LANES, dtype=x.dtype) for x in tensors]
        for copy, tail in zip(padded, tails):
            copy[: tail.numel()] = tail
        calls = [padded, *([[x[:n] for x in tensors]] if n else [])]
    for w, g, m, v in calls:
        # the kernel wants a counter for each tensor, and adds 1 to it
        adamw(
            [w], [g], [m], [v], [], [torch.full((), n_updates - 1.0, device=w.device)], fused=True, amsgrad=False,
            maximize=False, grad_scale=(1 / factor).to(w.dtype), found_inf=torch.zeros((), device=w.device), **numbers,
        )  # fmt: skip
    if calls[0] is not tensors:
        for copy, tail in zip(padded, tails):
            tail.copy_(copy[: tail.numel()])
