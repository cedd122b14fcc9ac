"""The optimizer's update rule, the learning-rate schedule and clipping, over segments.

Under ZeRO an optimizer does not see parameters but flat fp32 slices that cut through them. A `Segment` says which
elements of which parameter a slice holds; rules that need whole tensors or rows are written over segments.

DeepSpeed calls `step()`, but the decision and the factor come from the trainer through `prepare`: whether the step is
applied at all (one decision of all ranks, see megakexue/guard.py) and what the gradients are multiplied with (loss
scale and clipping in one). A step that is not applied changes nothing.

What must stay true: the schedule is a function of our own step counter alone.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megakexue.config import OptimConfig

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq")}
"""The state tensors of each optimizer, each as large as the parameters."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Elements start:stop of a flattened parameter, at offset:offset+(stop-start) of flat tensor number `flat`."""

    name: str
    role: str
    shape: tuple[int, ...]
    start: int
    stop: int
    flat: int
    offset: int

    @property
    def numel(self) -> int:
        return self.stop - self.start

    def of(self, flat: Tensor) -> Tensor:
        """The view of this segment in its flat tensor."""
        return flat.detach().view(-1)[self.offset : self.offset + self.numel]


def lr_factor(config: OptimConfig, step: int, n_steps: int) -> float:
    """Return the schedule's factor for the update that makes step number `step` (from 1) of `n_steps`.

    Warmup rises linearly and reaches 1 at update `warmup_steps`. `piecewise` is the schedule of 9512: linear through
    the sorted points, from (0, 0) when no point 0 is given, constant after the last.
    """
    if config.schedule == "piecewise":
        points = sorted(({0: 0.0} | config.points).items())
        for (low, low_factor), (high, high_factor) in pairwise(points):
            if step < high:
                return low_factor + (high_factor - low_factor) * (step - low) / (high - low)
        return points[-1][1]
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, n_steps - config.warmup_steps)
        return config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * progress)) / 2
    assert config.decay_steps is not None
    progress = max(0, step - (n_steps - config.decay_steps)) / config.decay_steps
    return 1 - (1 - config.final_lr) * progress


def clip_factor(config: OptimConfig, grad_norm: float) -> float:
    """Return what clipping multiplies the gradient with: form 1 (min) or form 2 (smooth) of 7469."""
    if config.clip is None:
        return 1.0
    if config.clip == "min":
        return 1.0 if grad_norm <= config.clip_norm else config.clip_norm / grad_norm
    return config.clip_norm / (grad_norm + config.clip_norm)


def parameter_groups(named: Iterable[tuple[str, Tensor]], config: OptimConfig, roles: dict[str, str]) -> list[dict]:
    """Two groups: matrices and embeddings are decayed, gains are not."""
    named = list(named)
    gains = [p for name, p in named if roles[name] == "gain"]
    others = [p for name, p in named if roles[name] != "gain"]
    return [{"params": others, "weight_decay": config.weight_decay}, {"params": gains, "weight_decay": 0.0}]


class AdamW(torch.optim.Optimizer):
    """AdamW behind the trainer's decision: `prepare` before each step, else the step does nothing.

    The kernel is torch's fused one. On CPU it computes the last elements of a tensor, those that do not fill a vector
    register, in scalar code that rounds differently, so the result would depend on where ZeRO cut; here they go
    through the vector code too.
    """

    def __init__(self, groups: list[dict], config: OptimConfig) -> None:
        super().__init__(groups, {"lr": config.lr})
        self.config = config
        self.n_updates = 0
        """Updates applied, which the bias correction counts; fewer than steps after skips."""
        self._is_applied, self._gradient_factor = False, 1.0
        self.has_stepped = False
        """Whether `step` has run since `prepare`: what the engine was told to apply was applied."""

    def prepare(self, *, is_applied: bool, lr: float, gradient_factor: float) -> None:
        """Set what the next `step` does. DeepSpeed may call `step` several times for one update (stage 3)."""
        self._is_applied, self._gradient_factor = is_applied, gradient_factor
        self.has_stepped = False
        for group in self.param_groups:
            group["lr"] = lr

    def moments(self, flat: Tensor) -> dict[str, Tensor]:
        """The state tensors of a flat tensor, made (zero) when they do not exist yet."""
        state = self.state[flat]
        for name in MOMENTS["adamw"]:
            if name not in state:
                state[name] = torch.zeros_like(flat)
        return dict(state)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        if not self._is_applied:
            return
        self.n_updates += not self.has_stepped
        self.has_stepped = True
        for group in self.param_groups:
            flats = [p for p in group["params"] if p.grad is not None]
            if not flats:  # stage 3 steps one sub-group at a time
                continue
            if self._gradient_factor != 1.0:
                torch._foreach_mul_([p.grad for p in flats], self._gradient_factor)
            kinds = [[p.data for p in flats], [p.grad for p in flats]]
            kinds += [[self.moments(p)[name] for p in flats] for name in MOMENTS["adamw"]]
            if flats[0].device.type == "cpu":
                _through_vector_code(self._update, kinds, group)
            else:
                self._update(kinds, group)

    def _update(self, kinds: list[list[Tensor]], group: dict[str, Any]) -> None:
        weights, gradients, exp_avgs, exp_avg_sqs = kinds
        # the kernel wants a counter for each tensor, and adds the one itself
        steps = [torch.full((), self.n_updates - 1.0, device=w.device) for w in weights]
        adamw(
            weights, gradients, exp_avgs, exp_avg_sqs, [], steps, fused=True, amsgrad=False, maximize=False,
            lr=group["lr"], beta1=self.config.beta1, beta2=self.config.beta2, eps=self.config.eps,
            weight_decay=group["weight_decay"],
        )  # fmt: skip


LANES = 16
"""fp32 elements in the widest vector register of a CPU."""


def _through_vector_code(
    update: Callable[[list[list[Tensor]], dict[str, Any]], None], kinds: list[list[Tensor]], group: dict[str, Any]
) -> None:
    """Call `update` with whole registers only: the tensors without their tails, and the padded tails in one tensor."""
    flat = [[x.view(-1) for x in tensors] for tensors in kinds]
    whole = [x.numel() // LANES * LANES for x in flat[0]]
    tails = [torch.zeros(len(whole), LANES) for _ in flat]
    for tensors, padded in zip(flat, tails):
        for row, x, n in zip(padded, tensors, whole):
            row[: x.numel() - n] = x[n:]
    bodies = [[x[:n] for x, n in zip(tensors, whole) if n] for tensors in flat]
    update([[*tensors, padded] for tensors, padded in zip(bodies, tails)], group)
    for tensors, padded in zip(flat, tails):
        for row, x, n in zip(padded, tensors, whole):
            x[n:] = row[: x.numel() - n]
