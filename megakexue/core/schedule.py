"""The learning-rate schedule and clipping: two factors of an update.

What must stay true: the schedule is a function of our own step counter alone, so that a resumed run goes on with it.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from megakexue.config import OptimConfig


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


def clip_factor(config: OptimConfig, grad_norm: Tensor) -> Tensor:
    """Return what clipping multiplies a gradient of this norm with: form 1 (min) or form 2 (smooth) of 7469."""
    if config.clip is None:
        return torch.ones_like(grad_norm)
    if config.clip == "min":
        return (config.clip_norm / grad_norm).clamp(max=1.0)
    return config.clip_norm / (grad_norm + config.clip_norm)
