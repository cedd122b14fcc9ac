"""The guard: the one owner of non-finite values and of the fp16 loss scale.

DeepSpeed would drop a non-finite step in silence, in some modes, before the optimizer sees it. Here one decision is
taken per step, from numbers that all ranks have already added up, before anything changes; each step ends in exactly
one status, which is logged and counted.

What must stay true: the same inputs give the same decision on every rank; all state is in `state_dict`.
"""

import math
from typing import Any, Literal

from megakexue.config import GuardConfig

Status = Literal["applied", "skipped"]

MIN_LOSS_SCALE = 2.0**-14
"""Below this fp16 could not hold the gradients anyway; the scale stays and the bad steps count on."""


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says what happened, where, and what to do."""


class Guard:
    def __init__(self, config: GuardConfig, dtype: str) -> None:
        self.config, self.scales_loss = config, dtype == "fp16"
        self.loss_scale = config.initial_loss_scale if self.scales_loss else 1.0
        self.n_good_in_row = 0
        self.n_bad_in_row = 0
        self.reason_to_stop: str | None = None
        """Set by `decide` when this step must be the last: the policy is `stop`, or too many were bad in a row."""

    def decide(self, loss: float, grad_norm: float, step: int) -> Status:
        """Return the fate of a step from the loss and gradient norm of all ranks together."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.n_bad_in_row = 0
            self.n_good_in_row += 1
            if self.scales_loss and self.n_good_in_row % self.config.loss_scale_window == 0:
                self.loss_scale *= 2
            return "applied"
        self.n_good_in_row = 0
        self.n_bad_in_row += 1
        what = f"step {step}: loss {loss}, gradient norm {grad_norm}"
        # in fp16 a scale that is too large is the ordinary cause, and the loss itself is finite
        is_overflow = self.scales_loss and math.isfinite(loss)
        if self.scales_loss:
            self.loss_scale = max(self.loss_scale / 2, MIN_LOSS_SCALE)
        if self.config.on_nonfinite == "stop" and not is_overflow:
            self.reason_to_stop = f"{what}; guard.on_nonfinite=stop ends the run here"
        elif self.n_bad_in_row >= self.config.max_bad_steps:
            self.reason_to_stop = (
                f"{what}; {self.n_bad_in_row} bad steps in a row (guard.max_bad_steps): no weight has changed since "
                "the last good one; lower optim.lr or look at the rows, then run the same command again"
            )
        return "skipped"

    def state_dict(self) -> dict[str, Any]:
        names = ("scales_loss", "loss_scale", "n_good_in_row", "n_bad_in_row")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`; a loss scale means nothing when the run went to or from fp16 since."""
        if state["scales_loss"] and self.scales_loss:
            self.loss_scale = state["loss_scale"]
        self.n_good_in_row, self.n_bad_in_row = state["n_good_in_row"], state["n_bad_in_row"]
