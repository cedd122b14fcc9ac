"""The guard: the one owner of non-finite values, of spikes, and of the fp16 loss scale.

DeepSpeed would drop a non-finite step in silence, in some modes, before the optimizer sees it. Here one decision is
taken per step, from numbers that all ranks have already added up, before anything changes; each step ends in exactly
one status, which is logged and counted.

A spike is a loss, or a logarithm of the gradient norm (norms vary by factors), far above the last applied steps:

    value > median + spike_sigmas · max(1.4826 · median(|values - median|), MIN_SIGMA)

1.4826 makes a median deviation the standard deviation of a Gaussian; unlike a mean and a variance it does not move
with the spikes themselves. Only upwards, since a falling loss is what training is for.

What must stay true: the same inputs give the same decision on every rank; all state is in `GuardState`, and is finite.
"""

import math
import sys
from collections import deque
from dataclasses import dataclass, fields
from statistics import median

from megakexue.config import GuardConfig, Status

MIN_LOSS_SCALE = 2.0**-14
"""Below this fp16 could not hold the gradients anyway; the scale stays and the bad steps count on."""

MIN_SIGMA = 0.01
"""In nats for the loss, a ratio of 1 % for the norm. A nearly constant window would make rounding noise a spike: bf16
keeps 2^-8 = 0.4 % of a value. At 6 sigmas it lets pass 0.06 nats and 6 %, which hurt nobody."""

RECOVERED = 1000
"""Steps applied in a row after which earlier rollbacks are forgiven."""

FATES: dict[str, Status] = {
    "log": "applied", "skip": "skipped", "shrink": "shrunk", "rollback": "rolled back", "stop": "skipped",
}  # fmt: skip

REMEDY = (
    "the last good state is in the newest checkpoint; lower optim.lr or look at the rows, "
    "then run the same command again"
)


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says what happened, where, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What becomes of a step."""

    status: Status
    note: str | None = None
    """What happened, one line for the log; None when nothing did."""
    reason_to_stop: str | None = None
    """Why this step must be the last: the policy is `stop`, or too many steps were bad in a row."""


@dataclass(kw_only=True)
class GuardState:
    """What the guard remembers from step to step, as trainer.json holds it."""

    scales_loss: bool
    """Whether the run computes in fp16."""
    loss_scale: float
    n_good_in_row: int = 0
    """Finite steps, which the loss scale follows: a spike is not its fault."""
    n_bad_in_row: int = 0
    """Steps that were not applied, for whatever reason."""
    n_applied_in_row: int = 0
    n_rollbacks: int = 0
    """Since RECOVERED steps were last applied in a row."""
    losses: list[float]
    """Of the last applied steps, which a spike is compared with."""
    log_norms: list[float]


class Guard:
    def __init__(self, config: GuardConfig, dtype: str) -> None:
        self.config, self.scales_loss = config, dtype == "fp16"
        self.loss_scale = config.initial_loss_scale if self.scales_loss else 1.0
        self.n_good_in_row = self.n_bad_in_row = self.n_applied_in_row = self.n_rollbacks = 0
        self.losses: deque[float] = deque(maxlen=config.spike_window)
        self.log_norms: deque[float] = deque(maxlen=config.spike_window)

    def decide(self, loss: float, grad_norm: float, step: int) -> Decision:
        """Return the fate of a step from the loss and (unscaled) gradient norm of all ranks together.

        The step that ends the run is skipped whatever the policy, so that it can be replayed.
        """
        what = f"step {step}: loss {loss:.6g}, gradient norm {grad_norm:.6g}"
        if math.isfinite(loss) and math.isfinite(grad_norm):
            status, cause, more = self._judge_finite(loss, grad_norm)
        else:
            status, cause, more = self._judge_nonfinite(loss)
        self.n_bad_in_row = 0 if status == "applied" else self.n_bad_in_row + 1
        self.n_applied_in_row = self.n_applied_in_row + 1 if status == "applied" else 0
        self.n_rollbacks = 0 if self.n_applied_in_row == RECOVERED else self.n_rollbacks + (status == "rolled back")
        reason = self._reason_to_stop(what + more, cause)
        status = "skipped" if reason else status
        if status == "applied" and self.config.on_spike:
            self.losses.append(loss)
            self.log_norms.append(log_of(grad_norm))
        note = f"{what}{more}; {status} ({cause})" if cause else None
        return Decision(status=status, note=note, reason_to_stop=reason)

    def _judge_finite(self, loss: float, grad_norm: float) -> tuple[Status, str, str]:
        """Return status, the setting that caused it (empty: nothing happened), and what there is to add."""
        self.n_good_in_row += 1
        if self.scales_loss and self.n_good_in_row % self.config.loss_scale_window == 0:
            self.loss_scale *= 2
        policy = self.config.on_spike
        if policy and (spike := self._spike(loss, grad_norm)):
            return FATES[policy], f"guard.on_spike={policy}", f": a spike, {spike}"
        return "applied", "", ""

    def _judge_nonfinite(self, loss: float) -> tuple[Status, str, str]:
        self.n_good_in_row, more = 0, ""
        if self.scales_loss:
            self.loss_scale = max(self.loss_scale / 2, MIN_LOSS_SCALE)
            more = f", fp16 loss scale now {self.loss_scale:g}"
            if math.isfinite(loss):  # the ordinary fault of a scale that is too large, whatever the policy
                return "skipped", "a gradient overflowed fp16", more
        return FATES[self.config.on_nonfinite], f"guard.on_nonfinite={self.config.on_nonfinite}", more

    def _reason_to_stop(self, what: str, cause: str) -> str | None:
        is_spike = cause.startswith("guard.on_spike")
        remedy = REMEDY + ("; set guard.on_spike=log if this level is right" if is_spike else "")
        if cause == "guard.on_nonfinite=stop":
            return f"{what}; {cause} ends the run here; {remedy}"
        if self.n_bad_in_row >= self.config.max_bad_steps:
            return f"{what}; {self.n_bad_in_row} bad steps in a row (guard.max_bad_steps); {remedy}"
        if self.n_rollbacks >= self.config.max_bad_steps:
            return (
                f"{what}; {self.n_rollbacks} times rolled back (guard.max_bad_steps) without {RECOVERED} good steps in "
                f"a row, so the run gets nowhere; {remedy}"
            )
        return None

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

    @property
    def state(self) -> GuardState:
        values = {field.name: getattr(self, field.name) for field in fields(GuardState)}
        return GuardState(**values | {"losses": list(self.losses), "log_norms": list(self.log_norms)})

    def load(self, state: GuardState) -> None:
        """Go on from `state`; a loss scale means nothing when the run went to or from fp16 since."""
        if state.scales_loss and self.scales_loss:
            self.loss_scale = state.loss_scale
        self.n_good_in_row, self.n_bad_in_row = state.n_good_in_row, state.n_bad_in_row
        self.n_applied_in_row, self.n_rollbacks = state.n_applied_in_row, state.n_rollbacks
        self.load_window(state)

    def load_window(self, state: GuardState) -> None:
        """Take only the window of `state`: after a rollback, that of the checkpoint whose weights are back.

        Where the loss falls fast, a newer window would take the older weights' loss for a spike at every step.
        """
        for window, saved in ((self.losses, state.losses), (self.log_norms, state.log_norms)):
            window.clear()
            if self.config.on_spike:
                window.extend(saved)  # as many of the newest as spike_window holds


def log_of(norm: float) -> float:
    """ln norm; of the smallest float for a norm of 0, so that the window stays finite."""
    return math.log(max(norm, sys.float_info.min))


def above(value: float, window: deque[float]) -> tuple[float, float]:
    """Return the window's median, and by how many of its (robust) standard deviations `value` is above it."""
    center = median(window)
    deviation = median(abs(x - center) for x in window)
    return center, (value - center) / max(1.4826 * deviation, MIN_SIGMA)
