"""Cross-entropy from hidden states, in chunks of tokens, with the gradients computed in the forward pass.

    loss = sum_n [ logsumexp_v(z_nv) - z_n,target(n) ],   z = logit_scale hidden W^T,   over targets not IGNORED.

The [tokens, vocabulary] logits of a batch never exist at once. The loss is a sum: whoever calls divides it by the
count of target tokens of the whole optimizer step, so that accumulation, ranks and padding cannot change it.

What must stay true: softmax and the loss are float32, from logits rounded to the dtype of the hidden states; equal to
`plain_cross_entropy` to rounding.
"""

from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from torch.nn import functional

from megakexue.config import IGNORED

CHUNK = 512
"""Tokens whose logits exist at a time."""


def plain_cross_entropy(
    hidden: Float[Tensor, "n m"], weight: Float[Tensor, "v m"], targets: Int64[Tensor, " n"], logit_scale: float
) -> Float32[Tensor, ""]:
    """Return the same sum from all logits at once: the reference of the tests."""
    logits = (functional.linear(hidden, weight) * logit_scale).float()
    return functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def cross_entropy(
    hidden: Float[Tensor, "n m"],
    weight: Float[Tensor, "v m"],
    targets: Int64[Tensor, " n"],
    logit_scale: float,
    gradient_scale: float | Float32[Tensor, ""] = 1.0,
) -> Float32[Tensor, ""]:
    """Return the sum of the losses over targets, in float32.

    Args:
        gradient_scale: the factor that the caller is about to multiply the sum with. The gradients are held in the
            dtype of `hidden` with it applied, so that fp16 neither under- nor overflows; any other factor is still
            right to rounding.
    """
    if not torch.is_grad_enabled():
        chunks = zip(hidden.split(CHUNK), targets.split(CHUNK))
        return torch.stack([plain_cross_entropy(h, weight, t, logit_scale) for h, t in chunks]).sum()
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, logit_scale, gradient_scale)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, logit_scale: float, gradient_scale: Any
    ) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden)
        # float32, since many chunks are added up
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for low in range(0, len(targets), CHUNK):
            rows = slice(low, low + CHUNK)
            target = targets[rows]
            kept = target != IGNORED
            index = target.where(kept, 0)[:, None]
            logits = (hidden[rows] @ weight.T).float().mul_(logit_scale)
            log_sum = logits.logsumexp(-1, keepdim=True)
            loss += (log_sum - logits.gather(1, index)).squeeze(1).where(kept, 0).sum()
            # softmax minus one-hot, in place of the logits
            d_logits = logits.sub_(log_sum).exp_()
            d_logits.scatter_add_(1, index, d_logits.new_full(index.shape, -1.0))
            d_logits.mul_(kept[:, None] * (logit_scale * gradient_scale))
            d_rounded = d_logits.to(hidden.dtype)
            torch.mm(d_rounded, weight, out=d_hidden[rows])
            d_weight += d_rounded.T @ hidden[rows]
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.gradient_scale, ctx.dtype = gradient_scale, weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *d_loss: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        d_hidden, d_weight = ctx.saved_tensors
        factor = d_loss[0] / ctx.gradient_scale
        return (d_hidden * factor).to(d_hidden.dtype), (d_weight * factor).to(ctx.dtype), None, None, None
