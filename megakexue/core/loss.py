"""What is trained on: cross-entropy from hidden states, with z-loss and EMO where the config asks for them.

Of one target token t, from the logits z = logit_scale hidden W^T, with p = softmax(z):

    CE        = logsumexp(z) - z_t
    z-loss    = z_loss logsumexp(z)^2                    natural logarithm (PaLM, arXiv 2204.02311, section 5)
    EMO       = (CE + ratio C) / 2                       (9797; arXiv 2310.04691)
        C     = sum_i p_i (1 - <e_i, e_t>) = 1 - <sum_i p_i e_i, e_t>
        ratio = min(CE / (C + 1e-10), emo_max_ratio)     a constant to the gradient
        e     = rows of the head at the start of training, normalised to length 1. They stay as they are: training
                could make C zero by making all rows equal
    objective = (CE or EMO) + z-loss, summed over the targets that are not IGNORED

    gradients to z_j: of CE p_j - [j = t], of z-loss 2 z_loss logsumexp(z) p_j, of C p_j (1 - <e_j, e_t> - C)

The [tokens, vocabulary] logits of a batch never exist at once: the gradients are computed in the forward pass, in
chunks of tokens. The gradient of C needs every distance 1 - <e_j, e_t> anyway. So C is computed as the mean of the
distances under p, which saves the product sum_i p_i e_i. The distance of t to itself is set to 0, so that C is a sum
without cancellation: it keeps its digits where p_t is near 1, and neither C nor the ratio falls below 0.

What must stay true: the losses are sums. The caller divides them by the count of target tokens of the whole optimizer
step, so that accumulation, ranks and padding cannot change them. Softmax and losses are float32, from logits that were
rounded to the dtype of the hidden states. The cross-entropy equals `plain_cross_entropy` up to rounding, and the terms
that are added to it do not change a bit of it.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from torch.nn import functional

from megakexue.config import IGNORED, LOSS_CHUNK, LossConfig
from megakexue.core.device import compiled

Scale = float | Float32[Tensor, ""]
"""What the caller multiplies an objective with; a tensor where it is known on the device only."""

PLAIN = LossConfig()
"""Cross-entropy and nothing else."""


class Losses(NamedTuple):
    """Sums over targets."""

    objective: Float32[Tensor, ""]
    """What to train on."""
    cross_entropy: Float32[Tensor, ""]
    """The cross-entropy alone, without gradient: what to log."""
    of_tokens: Float32[Tensor, " n"]
    """The cross-entropy of each target, without gradient; 0 where it is IGNORED."""


def plain_cross_entropy(
    hidden: Float[Tensor, "n m"], weight: Float[Tensor, "v m"], targets: Int64[Tensor, " n"], logit_scale: float
) -> Float32[Tensor, " n"]:
    """Return the cross-entropy of each target from all logits at once: the reference of the tests."""
    logits = functional.linear(hidden, weight).float() * logit_scale
    return functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")


@torch.no_grad()
def unit_rows(weight: Float[Tensor, "v m"]) -> Float32[Tensor, "v m"]:
    """Return the rows of a head at length 1, as EMO keeps them while the head is trained.

    A row of zeros stays zero: its token is at distance 1 from all others, like a row that is orthogonal to them.
    """
    return functional.normalize(weight.float(), dim=1)


def cross_entropy(
    hidden: Float[Tensor, "n m"], weight: Float[Tensor, "v m"], targets: Int64[Tensor, " n"], logit_scale: float,
    gradient_scale: Scale = 1.0, config: LossConfig = PLAIN, emo_rows: Float[Tensor, "v m"] | None = None,
    is_compiled: bool = False,
) -> Losses:  # fmt: skip
    """Return the objective and the cross-entropy; without gradients (evaluation) the cross-entropy as both.

    Args:
        gradient_scale: the factor that the caller is about to multiply the objective with. The gradients are stored
            in the dtype of `hidden` after this factor, so that fp16 neither under- nor overflows. If the caller
            multiplies with another factor, the gradients are still right up to rounding.
        emo_rows: `unit_rows` of the head at the start of training, if and only if `config.emo`. Distances are
            computed in the dtype of `emo_rows`, and no gradient reaches it.
        is_compiled: make one kernel of all that happens between the logits and their gradient.
    """
    if not torch.is_grad_enabled():
        size = LOSS_CHUNK[hidden.device.type]
        chunks = zip(hidden.split(size), targets.split(size))
        of_tokens = torch.cat([plain_cross_entropy(h, weight, t, logit_scale) for h, t in chunks])
        return Losses(of_tokens.sum(), of_tokens.sum(), of_tokens)
    assert config.emo == (emo_rows is not None), "loss.emo and emo_rows go together"
    kernels = _kernels(is_compiled)
    return Losses(*_ChunkedLoss.apply(hidden, weight, targets, logit_scale, gradient_scale, config, emo_rows, kernels))


def _logit_gradient(
    logits: Tensor, target: Tensor, logit_scale: float, gradient_scale: Scale, config: LossConfig,
    emo_rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradient to the logits [n, v], in their dtype, the sums of objective and cross-entropy, and the latter
    of each token [n].

    The gradient is factor softmax + ratio / 2 weighted - share [j = t], times the two scales.
    """
    kept = target != IGNORED
    index = target.where(kept, 0)[:, None]
    wide = logits.float().mul_(logit_scale)
    log_sum = wide.logsumexp(-1, keepdim=True)
    cross_entropy = log_sum - wide.gather(1, index)
    softmax = wide.sub_(log_sum).exp_()  # in place of the logits
    objective, share = cross_entropy, 1.0
    factor: float | Tensor = 1.0
    if emo_rows is not None:
        distance = torch.addmm(emo_rows.new_ones(1), emo_rows[index[:, 0]], emo_rows.T, alpha=-1)
        # rounding puts the distance of equal rows a little above or below 0
        weighted = softmax * distance.clamp_(min=0).scatter_(1, index, 0)
        del distance
        cost = weighted.sum(-1, keepdim=True)
        ratio = (cross_entropy / (cost + 1e-10)).clamp_(max=config.emo_max_ratio)
        objective, share = (cross_entropy + ratio * cost) / 2, 0.5
        factor = (1 - ratio * cost) / 2
    if config.z_loss:
        objective = objective + config.z_loss * log_sum.square()
        factor = factor + 2 * config.z_loss * log_sum
    d_logits = softmax if config == PLAIN else softmax.mul_(factor)
    if emo_rows is not None:
        d_logits.addcmul_(weighted, ratio / 2)
        del weighted
    d_logits.scatter_add_(1, index, d_logits.new_full(index.shape, -share))
    d_logits.mul_(kept[:, None] * (logit_scale * gradient_scale))
    objective, of_tokens = (x.squeeze(1).where(kept, 0) for x in (objective, cross_entropy))
    return d_logits.to(logits.dtype), objective.sum(), of_tokens.sum(), of_tokens


def _add(total: Tensor, part: Tensor) -> None:
    total += part


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return (gradient * factor).to(dtype)


class _Kernels(NamedTuple):
    """What the loss does beside its matrix products."""

    gradient: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    add: Callable[[Tensor, Tensor], None]
    scaled: Callable[[Tensor, Tensor, torch.dtype], Tensor]


@cache
def _kernels(is_compiled: bool) -> _Kernels:
    made: Callable[..., Any] = compiled if is_compiled else lambda function: function
    return _Kernels(made(_logit_gradient), made(_add), made(_scaled))


class _ChunkedLoss(torch.autograd.Function):
    """The forward pass computes the gradients too; the backward pass multiplies them with a factor."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, logit_scale: float, gradient_scale: Scale,
        config: LossConfig, emo_rows: Tensor | None, kernels: "_Kernels",
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        objective_sum = torch.zeros((), dtype=torch.float32, device=hidden.device)
        cross_entropy_sum = torch.zeros_like(objective_sum)
        of_tokens = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden)
        # float32, since many chunks are added up
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)

        def add(rows: slice) -> None:  # a function, so that a chunk's logits are gone before the next one's come
            logits = hidden[rows] @ weight.T
            arguments = logits, targets[rows], logit_scale, gradient_scale, config, emo_rows
            d_logits, objective, cross_entropy, of_tokens[rows] = kernels.gradient(*arguments)
            objective_sum.add_(objective)
            cross_entropy_sum.add_(cross_entropy)
            torch.mm(d_logits, weight, out=d_hidden[rows])
            kernels.add(d_weight, d_logits.T @ hidden[rows])

        size = LOSS_CHUNK[hidden.device.type]
        for low in range(0, len(targets), size):
            add(slice(low, low + size))
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.gradient_scale, ctx.dtype, ctx.kernels = gradient_scale, weight.dtype, kernels
        ctx.mark_non_differentiable(cross_entropy_sum, of_tokens)
        return objective_sum, cross_entropy_sum, of_tokens

    @staticmethod
    def backward(ctx: Any, *d_losses: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        d_hidden, d_weight = ctx.saved_tensors
        factor = d_losses[0] / ctx.gradient_scale
        scaled = ctx.kernels.scaled
        return scaled(d_hidden, factor, d_hidden.dtype), scaled(d_weight, factor, ctx.dtype), *[None] * 6
