"""The guard's decisions, the loss scale's path, and its messages."""

import math

import pytest

from megakexue.config import GuardConfig
from megakexue.guard import Guard, TrainingStopped


def test_a_run_of_bad_steps_stops_with_the_remedy() -> None:
    guard = Guard(GuardConfig(max_bad_steps=3), "bf16")
    assert guard.decide(1.0, 1.0, 1, "rows") == "applied"
    assert guard.decide(math.nan, 1.0, 2, "rows") == "skipped"
    assert guard.decide(1.0, math.inf, 3, "rows") == "skipped"
    assert guard.decide(1.0, 1.0, 4, "rows") == "applied"
    guard.decide(math.nan, math.nan, 5, "rows")
    guard.decide(math.nan, math.nan, 6, "rows")
    with pytest.raises(TrainingStopped, match=r"step 7: .* 3 bad steps in a row .* lower optim.lr"):
        guard.decide(math.nan, math.nan, 7, "rows")
    assert guard.loss_scale == 1


def test_stop_policy() -> None:
    guard = Guard(GuardConfig(on_nonfinite="stop"), "fp32")
    with pytest.raises(TrainingStopped, match=r"step 9: loss nan, gradient norm 1.*rows here; guard.on_nonfinite=stop"):
        guard.decide(math.nan, 1.0, 9, "here")


def test_fp16_loss_scale() -> None:
    guard = Guard(GuardConfig(initial_loss_scale=1024.0, loss_scale_window=2, on_nonfinite="stop"), "fp16")
    scales = []
    for norm in (1.0, 1.0, math.inf, 1.0, 1.0, 1.0, math.nan):
        guard.decide(2.0, norm, 1, "rows")  # a finite loss with infinite gradients is the scale's fault: no stop
        scales.append(guard.loss_scale)
    assert scales == [1024, 2048, 1024, 1024, 2048, 2048, 1024]
    with pytest.raises(TrainingStopped, match="loss nan"):
        guard.decide(math.nan, math.nan, 8, "rows")


def test_state_goes_through_a_checkpoint() -> None:
    guard = Guard(GuardConfig(loss_scale_window=3), "fp16")
    for norm in (1.0, 1.0, 1.0, math.inf, 1.0):
        guard.decide(1.0, norm, 1, "rows")
    copy = Guard(GuardConfig(loss_scale_window=3), "fp16")
    copy.load_state_dict(guard.state_dict())
    for norm in (1.0, 1.0, math.inf, 1.0):
        assert copy.decide(1.0, norm, 1, "rows") == guard.decide(1.0, norm, 1, "rows")
        assert copy.state_dict() == guard.state_dict()
