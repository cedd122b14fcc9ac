"""The guard's decisions, the loss scale's path, and its messages."""

import math
import re

from megakexue.config import GuardConfig
from megakexue.guard import Guard


def test_a_run_of_bad_steps_stops_with_the_remedy() -> None:
    guard = Guard(GuardConfig(max_bad_steps=3), "bf16")
    assert guard.decide(1.0, 1.0, 1) == "applied"
    assert guard.decide(math.nan, 1.0, 2) == "skipped"
    assert guard.decide(1.0, math.inf, 3) == "skipped"
    assert guard.decide(1.0, 1.0, 4) == "applied"
    guard.decide(math.nan, math.nan, 5)
    guard.decide(math.nan, math.nan, 6)
    assert guard.reason_to_stop is None
    assert guard.decide(math.nan, math.nan, 7) == "skipped"
    assert guard.reason_to_stop is not None
    assert re.match(r"step 7: .* 3 bad steps in a row .* lower optim.lr", guard.reason_to_stop)
    assert guard.loss_scale == 1


def test_stop_policy() -> None:
    guard = Guard(GuardConfig(on_nonfinite="stop"), "fp32")
    assert guard.decide(math.nan, 1.0, 9) == "skipped"
    assert guard.reason_to_stop == ("step 9: loss nan, gradient norm 1.0; guard.on_nonfinite=stop ends the run here")


def test_fp16_loss_scale() -> None:
    guard = Guard(GuardConfig(initial_loss_scale=1024.0, loss_scale_window=2, on_nonfinite="stop"), "fp16")
    scales = []
    for norm in (1.0, 1.0, math.inf, 1.0, 1.0, 1.0, math.nan):
        guard.decide(2.0, norm, 1)  # a finite loss with infinite gradients is the scale's fault: no stop
        scales.append(guard.loss_scale)
    assert scales == [1024, 2048, 1024, 1024, 2048, 2048, 1024]
    assert guard.reason_to_stop is None
    guard.decide(math.nan, math.nan, 8)
    assert guard.reason_to_stop is not None and "loss nan" in guard.reason_to_stop


def test_state_goes_through_a_checkpoint() -> None:
    guard = Guard(GuardConfig(loss_scale_window=3), "fp16")
    for norm in (1.0, 1.0, 1.0, math.inf, 1.0):
        guard.decide(1.0, norm, 1)
    copy = Guard(GuardConfig(loss_scale_window=3), "fp16")
    copy.load_state_dict(guard.state_dict())
    for norm in (1.0, 1.0, math.inf, 1.0):
        assert copy.decide(1.0, norm, 1) == guard.decide(1.0, norm, 1)
        assert copy.state_dict() == guard.state_dict()


def test_a_loss_scale_does_not_leave_fp16() -> None:
    half, full = Guard(GuardConfig(), "fp16"), Guard(GuardConfig(), "bf16")
    half.loss_scale = 8.0
    full.load_state_dict(half.state_dict())
    assert full.loss_scale == 1
    fresh = Guard(GuardConfig(), "fp16")
    fresh.load_state_dict(full.state_dict())
    assert fresh.loss_scale == 65536
