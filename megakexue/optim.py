"""The optimizer's update rule, the learning-rate schedule and clipping, over segments.

Under ZeRO an optimizer does not see parameters but flat fp32 slices that cut through them. A `Segment` says which
elements of which parameter a slice holds; rules that need whole tensors or rows are written over segments.

DeepSpeed calls `step()`, but the decision and the factor come from the trainer through `prepare`: whether the step is
applied at all (one decision of all ranks, see megakexue/guard.py) and what the gradients are multiplied with (loss
scale and clipping in one). A step that is not applied changes nothing.

What must stay true: the schedule is a function of our own step counter alone.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

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


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW behind the trainer's decision: `prepare` before each step, else the step does nothing."""

    def __init__(self, groups: list[dict], config: OptimConfig) -> None:
        super().__init__(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
        self._is_applied, self._gradient_factor = False, 1.0

    def prepare(self, *, is_applied: bool, lr: float, gradient_factor: float) -> None:
        """Set what the next `step` does. DeepSpeed may call `step` several times for one update (stage 3)."""
        self._is_applied, self._gradient_factor = is_applied, gradient_factor
        for group in self.param_groups:
            group["lr"] = lr

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        if not self._is_applied:
            return
        if self._gradient_factor != 1.0:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.mul_(self._gradient_factor)
        super().step()

    def moments(self, flat: Tensor) -> dict[str, Tensor]:
        """The state tensors of a flat tensor, made (zero) when they do not exist yet."""
        state = self.state[flat]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            for name in MOMENTS["adamw"]:
                state[name] = torch.zeros_like(flat)
        return {name: state[name] for name in MOMENTS["adamw"]}

    def set_n_updates(self, n_updates: int) -> None:
        """Set the number of updates so far, which the bias correction needs, in every state that exists."""
        for state in self.state.values():
            state["step"].fill_(float(n_updates))
