"""The guard: the one owner of non-finite values, of spikes, and of the fp16 loss scale.

DeepSpeed would drop a non-finite step in silence, in some modes, before the optimizer sees it. Here one decision is
taken per step, from numbers that all ranks have already added up, before anything changes; each step ends in exactly
one status, which is logged and counted.

A spike is a loss, or a logarithm of the gradient norm (norms vary by factors), far above the last applied steps:

    value > median + spike_sigmas · max(1.4826 · median(|values - median|), MIN_SIGMA)

1.4826 makes a median deviation the standard deviation of a Gaussian; unlike a mean and a variance it does not move
with the spikes themselves. Only upwards, since a falling loss is what training is for.

What must stay true: the same inputs give the same decision on every rank; all state is in `state_dict`, and is finite.
"""

import math
import sys
from collections import deque
from statistics import median
from typing import Any

from megakexue.config import GuardConfig, Status

MIN_LOSS_SCALE = 2.0**-14
"""Below this fp16 could not hold the gradients anyway; the scale stays and the bad steps count on."""

MIN_SIGMA = 0.01
"""In nats for the loss, a ratio of 1 % for the norm. A nearly constant window would make rounding noise a spike: bf16
keeps 2^-8 = 0.4 % of a value. At 6 sigmas it lets pass 0.06 nats and 6 %, which hurt nobody."""

RECOVERED = 1000
"""Steps applied in a row after which earlier rollbacks are forgiven."""

COUNTS = ("n_good_in_row", "n_bad_in_row", "n_applied_in_row", "n_rollbacks")

FATES: dict[str, Status] = {
    "log": "applied", "skip": "skipped", "shrink": "shrunk", "rollback": "rolled back", "stop": "skipped",
}  # fmt: skip

REMEDY = (
    "the last good state is in the newest checkpoint; lower optim.lr or look at the rows, "
    "then run the same command again"
)


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says what happened, where, and what to do."""


class Guard:
    def __init__(self, config: GuardConfig, dtype: str) -> None:
        self.config, self.scales_loss = config, dtype == "fp16"
        self.loss_scale = config.initial_loss_scale if self.scales_loss else 1.0
        self.n_good_in_row = 0
        """Finite steps, which the loss scale follows: a spike is not its fault."""
        self.n_bad_in_row = 0
        """Steps that were not applied, for whatever reason."""
        self.n_applied_in_row = 0
        self.n_rollbacks = 0
        """Since RECOVERED steps were last applied in a row."""
        self.losses: deque[float] = deque(maxlen=config.spike_window)
        self.log_norms: deque[float] = deque(maxlen=config.spike_window)
        self.note: str | None = None
        """What happened at this step, one line for the log; None when nothing did."""
        self.reason_to_stop: str | None = None
        """Set by `decide` when this step must be the last: the policy is `stop`, or too many were bad in a row."""

    def decide(self, loss: float, grad_norm: float, step: int) -> Status:
        """Return the fate of a step from the loss and (unscaled) gradient norm of all ranks together.

        The step that ends the run is skipped whatever the policy, so that it can be replayed.
        """
        self.note = self.reason_to_stop = None
        what, cause, remedy = f"step {step}: loss {loss:.6g}, gradient norm {grad_norm:.6g}", "", REMEDY
        status: Status = "applied"
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.n_good_in_row += 1
            if self.scales_loss and self.n_good_in_row % self.config.loss_scale_window == 0:
                self.loss_scale *= 2
            if self.config.on_spike and (spike := self._spike(loss, grad_norm)):
                status, cause = FATES[self.config.on_spike], f"guard.on_spike={self.config.on_spike}"
                what += f": a spike, {spike}"
                remedy += "; set guard.on_spike=log if this level is right"
        else:
            self.n_good_in_row = 0
            status, cause = FATES[self.config.on_nonfinite], f"guard.on_nonfinite={self.config.on_nonfinite}"
            if self.scales_loss:
                self.loss_scale = max(self.loss_scale / 2, MIN_LOSS_SCALE)
                what += f", fp16 loss scale now {self.loss_scale:g}"
                if math.isfinite(loss):  # the ordinary fault of a scale that is too large, whatever the policy
                    status, cause = "skipped", "a gradient overflowed fp16"

        self.n_bad_in_row = 0 if status == "applied" else self.n_bad_in_row + 1
        self.n_applied_in_row = self.n_applied_in_row + 1 if status == "applied" else 0
        self.n_rollbacks = 0 if self.n_applied_in_row == RECOVERED else self.n_rollbacks + (status == "rolled back")
        if cause == "guard.on_nonfinite=stop":
            self.reason_to_stop = f"{what}; {cause} ends the run here; {remedy}"
        elif self.n_bad_in_row >= self.config.max_bad_steps:
            self.reason_to_stop = f"{what}; {self.n_bad_in_row} bad steps in a row (guard.max_bad_steps); {remedy}"
        elif self.n_rollbacks >= self.config.max_bad_steps:
            self.reason_to_stop = (
                f"{what}; {self.n_rollbacks} times rolled back (guard.max_bad_steps) without {RECOVERED} good steps in "
                f"a row, so the run gets nowhere; {remedy}"
            )
        if self.reason_to_stop:
            status = "skipped"
        if cause:
            self.note = f"{what}; {status} ({cause})"
        if status == "applied" and self.config.on_spike:
            self.losses.append(loss)
            self.log_norms.append(log_of(grad_norm))
        return status

    def _spike(self, loss: float, grad_norm: float) -> str:
        """Say by how much the step is above the window; empty when it is no spike."""
        n, found = len(self.losses), []
        if n < self.config.spike_window // 2:
            return ""
        center, sigmas = above(loss, self.losses)
        if sigmas > self.config.spike_sigmas:
            found.append(f"the loss {sigmas:.1f} sigmas above {center:.6g}")
        center, sigmas = above(log_of(grad_norm), self.log_norms)
        if sigmas > self.config.spike_sigmas:
            found.append(f"the norm {sigmas:.1f} sigmas above {math.exp(center):.6g}")
        return f"{' and '.join(found)}, the median of the last {n} applied steps" if found else ""

    def state_dict(self) -> dict[str, Any]:
        names = ("scales_loss", "loss_scale", *COUNTS)
        window = {"losses": list(self.losses), "log_norms": list(self.log_norms)}
        return {name: getattr(self, name) for name in names} | window

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`; a loss scale means nothing when the run went to or from fp16 since."""
        if state["scales_loss"] and self.scales_loss:
            self.loss_scale = state["loss_scale"]
        for name in COUNTS:
            setattr(self, name, state[name])
        self.load_window(state)

    def load_window(self, state: dict[str, Any]) -> None:
        """Take only the window of `state`: after a rollback, that of the checkpoint whose weights are back.

        Where the loss falls fast, the weights of some hundred steps ago would all be spikes to a newer window.
        """
        for name, window in (("losses", self.losses), ("log_norms", self.log_norms)):
            window.clear()
            if self.config.on_spike:
                window.extend(state.get(name, []))  # as many of the newest as spike_window holds


def log_of(norm: float) -> float:
    """ln norm; of the smallest float for a norm of 0, so that the window stays finite."""
    return math.log(max(norm, sys.float_info.min))


def above(value: float, window: deque[float]) -> tuple[float, float]:
    """Return the window's median, and by how many of its (robust) standard deviations `value` is above it."""
    center = median(window)
    deviation = median(abs(x - center) for x in window)
    return center, (value - center) / max(1.4826 * deviation, MIN_SIGMA)
