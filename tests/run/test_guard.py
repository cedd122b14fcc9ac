"""The guard's decisions, the loss scale's path, what it calls a spike, and its messages."""

import dataclasses
import json
import math
import random
import time
from collections import deque
from typing import Any

import pytest

from megakexue.config import GuardConfig, Status, build
from megakexue.run import guard as module
from megakexue.run.guard import MIN_LOSS_SCALE, MIN_SIGMA, REMEDY, Decision, GuardState, above

BAD = [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.inf), (1.0, math.nan), (math.nan, math.nan)]


class Guard(module.Guard):
    """A guard whose last decision is kept, so that a test can ask for each part of it."""

    last = Decision(status="applied")

    def judge(self, loss: float, grad_norm: float, step: int) -> Status:
        self.last = self.decide(loss, grad_norm, step)
        return self.last.status

    @property
    def note(self) -> str | None:
        return self.last.note

    @property
    def reason_to_stop(self) -> str | None:
        return self.last.reason_to_stop


def steady(n: int, seed: int = 0, norm_sigma: float = 0.3) -> list[tuple[float, float]]:
    """Losses around 3 with noise 0.05, and log-normal norms around 1."""
    rng = random.Random(seed)
    return [(rng.gauss(3.0, 0.05), rng.lognormvariate(0.0, norm_sigma)) for _ in range(n)]


def feed(guard: Guard, values: list[tuple[float, float]], first: int = 1) -> list[str]:
    return [guard.judge(loss, norm, step) for step, (loss, norm) in enumerate(values, first)]


def through_json(guard: Guard, config: GuardConfig, dtype: str = "bf16") -> Guard:
    copy = Guard(config, dtype)
    copy.load(build(GuardState, json.loads(json.dumps(vars(guard.state), allow_nan=False)), where="trainer.json"))
    return copy


# --- non-finite values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("policy", "status"), [("shrink", "shrunk"), ("skip", "skipped"), ("rollback", "rolled back"), ("stop", "skipped")]
)
@pytest.mark.parametrize(("loss", "norm"), BAD)
def test_a_nonfinite_step_goes_by_the_policy(policy: Any, status: str, loss: float, norm: float, dtype: str) -> None:
    guard = Guard(GuardConfig(on_nonfinite=policy), dtype)
    assert guard.judge(2.5, 0.5, 8) == "applied" and guard.note is None
    assert guard.judge(loss, norm, 9) == status
    what = f"step 9: loss {loss:g}, gradient norm {norm:g}"
    assert guard.note == f"{what}; {status} (guard.on_nonfinite={policy})"
    ends = f"{what}; guard.on_nonfinite=stop ends the run here; {REMEDY}"
    assert guard.reason_to_stop == (ends if policy == "stop" else None)
    assert (guard.loss_scale, guard.n_good_in_row, guard.n_bad_in_row) == (1.0, 0, 1)
    assert guard.judge(2.5, 0.5, 10) == "applied"
    assert (guard.note, guard.reason_to_stop, guard.n_good_in_row, guard.n_bad_in_row) == (None, None, 1, 0)


@pytest.mark.parametrize(("policy", "status"), [("shrink", "shrunk"), ("skip", "skipped"), ("rollback", "rolled back")])
def test_bad_steps_in_a_row_end_the_run_and_change_nothing(policy: Any, status: str) -> None:
    guard = Guard(GuardConfig(on_nonfinite=policy, max_bad_steps=3), "bf16")
    good, bad = (1.0, 1.0), (math.nan, 0.25)
    if policy != "rollback":  # of which those that are not in a row count too
        feed(guard, [good, bad, bad])
    assert feed(guard, [good, bad, bad]) == ["applied", status, status]
    assert guard.reason_to_stop is None
    assert guard.judge(*bad, 7) == "skipped"
    what = "step 7: loss nan, gradient norm 0.25"
    assert guard.note == f"{what}; skipped (guard.on_nonfinite={policy})"
    assert guard.reason_to_stop == (
        f"{what}; 3 bad steps in a row (guard.max_bad_steps); the last good state is in the newest checkpoint; "
        "lower optim.lr or look at the rows, then run the same command again"
    )


def test_spikes_and_nonfinite_steps_count_together() -> None:
    guard = Guard(GuardConfig(on_nonfinite="shrink", on_spike="rollback", max_bad_steps=3), "bf16")
    feed(guard, [(3.0, 1.0)] * 64)
    assert feed(guard, [(9.0, 1.0), (math.nan, 1.0)], 65) == ["rolled back", "shrunk"]
    assert guard.judge(9.0, 1.0, 67) == "skipped"
    assert guard.reason_to_stop == (
        "step 67: loss 9, gradient norm 1: a spike, the loss 600.0 sigmas above 3, the median of the last 64 applied "
        f"steps; 3 bad steps in a row (guard.max_bad_steps); {REMEDY}; set guard.on_spike=log if this level is right"
    )


# --- the loss scale of fp16 ----------------------------------------------------------------------------------------


def test_the_loss_scale_doubles_and_halves() -> None:
    config = GuardConfig(initial_loss_scale=1024.0, loss_scale_window=2, on_nonfinite="stop")
    guard = Guard(config, "fp16")
    scales, notes = [], []
    for step, norm in enumerate((1.0, 1.0, math.inf, 1.0, 1.0, 1.0, math.nan)):
        status = guard.judge(2.0, norm, step)
        assert status == ("applied" if math.isfinite(norm) else "skipped")
        assert guard.reason_to_stop is None  # a finite loss with infinite gradients is the scale's fault: no stop
        scales.append(guard.loss_scale)
        notes.append(guard.note)
    assert scales == [1024, 2048, 1024, 1024, 2048, 2048, 1024]
    overflow = "; skipped (a gradient overflowed fp16)"
    assert notes[2] == f"step 2: loss 2, gradient norm inf, fp16 loss scale now 1024{overflow}"
    assert notes[6] == f"step 6: loss 2, gradient norm nan, fp16 loss scale now 1024{overflow}"
    assert notes[:2] + notes[3:6] == [None] * 5
    guard.judge(math.nan, math.nan, 8)
    assert guard.loss_scale == 512
    assert guard.reason_to_stop == (
        "step 8: loss nan, gradient norm nan, fp16 loss scale now 512; guard.on_nonfinite=stop ends the run here; "
        + REMEDY
    )


@pytest.mark.parametrize(("policy", "status"), [("shrink", "shrunk"), ("rollback", "rolled back")])
def test_in_fp16_only_an_overflow_is_the_scales_fault(policy: Any, status: str) -> None:
    guard = Guard(GuardConfig(on_nonfinite=policy), "fp16")
    assert feed(guard, [(2.0, math.inf), (math.nan, math.inf), (math.inf, 1.0)]) == ["skipped", status, status]
    assert guard.loss_scale == 65536 / 8


def test_the_loss_scale_has_a_floor_and_overflows_end_the_run_too() -> None:
    guard = Guard(GuardConfig(initial_loss_scale=2.0**-12, max_bad_steps=5), "fp16")
    assert feed(guard, [(2.0, math.inf)] * 4) == ["skipped"] * 4
    assert guard.loss_scale == MIN_LOSS_SCALE and guard.reason_to_stop is None
    guard.judge(2.0, math.inf, 5)
    assert guard.reason_to_stop is not None and "; 5 bad steps in a row (guard.max_bad_steps); " in guard.reason_to_stop


def test_a_skipped_spike_is_not_the_loss_scales_fault() -> None:
    guard = Guard(GuardConfig(on_spike="skip", loss_scale_window=66), "fp16")
    feed(guard, [(3.0, 1.0)] * 64)
    assert feed(guard, [(9.0, 1.0)]) == ["skipped"] and guard.loss_scale == 65536
    assert feed(guard, [(3.0, 1.0)]) == ["applied"] and guard.loss_scale == 2 * 65536


# --- spikes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "status"), [("log", "applied"), ("skip", "skipped"), ("rollback", "rolled back")])
def test_a_spike_goes_by_the_policy(policy: Any, status: str) -> None:
    guard = Guard(GuardConfig(on_spike=policy), "bf16")
    feed(guard, [(3.0, 0.5)] * 100)
    assert guard.note is None
    median = "the median of the last 100 applied steps"
    for (loss, norm), spike in {
        (4.5, 0.5): f"the loss 150.0 sigmas above 3, {median}",
        (3.0, 5.0): f"the norm 230.3 sigmas above 0.5, {median}",
        (4.5, 5.0): f"the loss 150.0 sigmas above 3 and the norm 230.3 sigmas above 0.5, {median}",
    }.items():
        fresh = through_json(guard, guard.config)
        assert fresh.judge(loss, norm, 101) == status
        what = f"step 101: loss {loss:g}, gradient norm {norm:g}"
        assert fresh.note == f"{what}: a spike, {spike}; {status} (guard.on_spike={policy})"
        assert fresh.reason_to_stop is None and fresh.n_bad_in_row == (policy != "log")
        assert list(fresh.losses) == [3.0] * 100 + [loss] * (policy == "log")
        assert fresh.judge(3.0, 0.5, 102) == "applied" and fresh.note is None


def test_only_upwards() -> None:
    guard = Guard(GuardConfig(on_spike="skip"), "bf16")
    feed(guard, steady(128))
    assert guard.judge(0.1, 1e-6, 129) == "applied" and guard.note is None


def test_a_new_level_is_accepted_by_log_and_ends_the_run_otherwise() -> None:
    level = [(loss + 1.5, norm) for loss, norm in steady(200, seed=1)]
    guard = Guard(GuardConfig(on_spike="log"), "bf16")
    feed(guard, steady(128))
    noted = []
    for step, (loss, norm) in enumerate(level):
        assert guard.judge(loss, norm, step) == "applied"
        noted.append(guard.note is not None)
    assert all(noted[:40]) and not any(noted[64:])
    guard = Guard(GuardConfig(on_spike="skip"), "bf16")
    feed(guard, steady(128))
    assert feed(guard, level[:20]) == ["skipped"] * 20
    assert guard.reason_to_stop is not None
    assert guard.reason_to_stop.endswith(f"{REMEDY}; set guard.on_spike=log if this level is right")


@pytest.mark.parametrize("window", [8, 15, 128])
def test_no_check_before_half_a_window(window: int) -> None:
    config = GuardConfig(on_spike="skip", spike_window=window)
    guard = Guard(config, "bf16")
    feed(guard, [(3.0, 1.0)] * (window // 2 - 1))
    assert through_json(guard, config).judge(9.0, 1.0, 1) == "applied"
    guard.judge(3.0, 1.0, 1)
    assert through_json(guard, config).judge(9.0, 1.0, 1) == "skipped"
    feed(guard, [(3.0, 1.0)] * 300)
    assert len(guard.losses) == len(guard.log_norms) == window


def test_off_keeps_no_window() -> None:
    guard = Guard(GuardConfig(on_spike=None), "bf16")
    assert feed(guard, [*steady(200), (99.0, 1e9)]) == ["applied"] * 201
    assert guard.note is None
    assert guard.state.losses == guard.state.log_norms == []


def test_the_formula() -> None:
    window = deque([1.0, 2.0, 4.0, 8.0, 16.0])  # median 4, deviations 3 2 0 4 12: median 3
    center, sigmas = above(10.0, window)
    assert center == 4 and sigmas == pytest.approx(6 / (1.4826 * 3), rel=1e-12)
    assert above(4.5, deque([4.0] * 9)) == (4.0, 0.5 / MIN_SIGMA)
    guard = Guard(GuardConfig(on_spike="skip", spike_window=8, spike_sigmas=2.0), "bf16")
    losses = [0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 4.0]  # median 2, deviations 2 2 1 0 1 2 2: median 2
    for factor, status in ((0.999, "applied"), (1.001, "skipped")):
        guard.losses.clear()
        guard.losses.extend(losses)
        guard.log_norms.extend([0.0] * 7)
        assert guard.judge(2 + 2 * 1.4826 * 2 * factor, 1.0, 8) == status


def test_rounding_noise_in_a_constant_window_is_no_spike() -> None:
    guard = Guard(GuardConfig(on_spike="skip"), "bf16")
    feed(guard, [(1e-4, 0.5)] * 128)
    assert guard.judge(1e-4 + 0.05, 0.5 * (1 + 2**-6), 1) == "applied"
    assert guard.judge(1e-4 + 0.07, 0.5, 1) == "skipped" and guard.judge(1e-4, 0.54, 1) == "skipped"


@pytest.mark.parametrize("n_zeros", [1, 30])
def test_a_norm_of_zero_is_a_value_like_others(n_zeros: int) -> None:
    config = GuardConfig(on_spike="skip")
    guard = Guard(config, "bf16")
    assert feed(guard, [(3.0, 1.0)] * 70 + [(3.0, 0.0)] * n_zeros) == ["applied"] * (70 + n_zeros)
    guard = through_json(guard, config)  # refuses what is not finite
    assert feed(guard, [(3.0, 1.0), (3.0, 10.0)]) == ["applied", "skipped"]


@pytest.mark.parametrize("policy", ["shrink", "skip", "rollback"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_what_was_not_applied_never_enters_the_window(policy: Any, dtype: str) -> None:
    config = GuardConfig(on_nonfinite=policy, on_spike="skip")
    disturbed, calm = Guard(config, dtype), Guard(config, dtype)
    before, after = steady(100), steady(200, seed=1)
    after[50], after[120] = (4.5, 1.0), (3.0, 20.0)
    feed(disturbed, before)
    feed(calm, before)
    feed(disturbed, [*BAD, (9.0, 1.0), (3.0, 99.0)])
    assert disturbed.state.losses == calm.state.losses
    fates = feed(disturbed, after)
    assert fates == feed(calm, after) and fates.count("skipped") == 2
    assert disturbed.losses == calm.losses and disturbed.log_norms == calm.log_norms


def test_real_jumps_are_always_found() -> None:
    missed = {"loss": 0, "norm": 0}
    for seed in range(100):
        guard = Guard(GuardConfig(on_spike="skip"), "bf16")
        # ten is 7.7 sigmas of norms with sigma 0.3, which an estimate from 64 values may miss: half of that here
        feed(guard, steady(64 + seed, seed, norm_sigma=0.15))
        loss, norm = steady(1, seed + 1000, norm_sigma=0.15)[0]
        missed["loss"] += guard.judge(loss + 1.5, norm, 1) != "skipped"
        missed["norm"] += guard.judge(loss, 10 * norm, 1) != "skipped"
    assert missed == {"loss": 0, "norm": 0}


@pytest.mark.parametrize("noise", [0.02, 0.05, 0.15])
def test_a_falling_loss_in_warmup_has_no_false_spike(noise: float) -> None:
    n_alarms = 0
    for seed in range(5):
        rng, guard = random.Random(seed), Guard(GuardConfig(), "bf16")
        for step in range(1500):
            # 8 to 3 in two time scales; the norm first grows with the learning rate, then falls tenfold
            loss = 3.0 + 1.5 * math.exp(-step / 2000) + 3.5 * math.exp(-step / 150)
            norm = 0.3 + 2.5 * min(step / 60, 1.0) * math.exp(-step / 400)
            guard.judge(loss + rng.gauss(0.0, noise), norm * rng.lognormvariate(0.0, 0.3), step)
            n_alarms += guard.note is not None
    assert n_alarms == 0


def test_log_normal_norms_have_no_false_spike() -> None:
    guard, n_alarms = Guard(GuardConfig(), "bf16"), 0
    for step, (loss, norm) in enumerate(steady(20_000)):
        guard.judge(loss, norm, step)
        n_alarms += guard.note is not None
    assert n_alarms <= 1  # measured: 0 in 60000


def test_after_a_rollback_the_checkpoints_window_fits_its_weights() -> None:
    config = GuardConfig(on_spike="rollback")
    early, live = Guard(config, "bf16"), Guard(config, "bf16")
    feed(early, [(loss + 2.0, norm) for loss, norm in steady(128)])
    feed(live, steady(128))
    assert feed(live, [(math.nan, 1.0), (5.0, 1.0), (5.0, 1.0)]) == ["skipped", "rolled back", "rolled back"]
    live.load_window(early.state)
    assert live.n_bad_in_row == 3 and live.n_good_in_row == 2
    assert live.judge(5.0, 1.0, 1) == "applied"


# --- the state -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_resumed_decides_as_never_stopped(dtype: str) -> None:
    config = GuardConfig(on_spike="skip", on_nonfinite="rollback", loss_scale_window=30)
    values = steady(400)
    for i in (150, 151, 260, 330):
        values[i] = (4.0, 1.0)
    values[200], values[201], values[301] = (3.0, math.inf), (math.nan, 1.0), (3.0, 15.0)
    never_stopped = Guard(config, dtype)
    expected = feed(never_stopped, values)
    assert expected.count("skipped") >= 5
    for stop in (3, 63, 64, 151, 201, 259, 300):
        guard = Guard(config, dtype)
        fates = feed(guard, values[:stop])
        resumed = through_json(guard, config, dtype)
        assert resumed.state == guard.state
        assert fates + feed(resumed, values[stop:]) == expected
        assert resumed.state == never_stopped.state


def test_the_state_is_json_in_the_worst_case() -> None:
    guard = Guard(GuardConfig(), "fp16")
    for loss, norm in [*BAD, (0.0, 0.0), (1e308, 1e308), (-1e308, 5e-324)] * 20:
        guard.judge(loss, norm, 1)
    state = dataclasses.asdict(guard.state)
    assert json.loads(json.dumps(state, allow_nan=False)) == state
    assert state["losses"] and state.keys() == {
        "scales_loss", "loss_scale", "n_good_in_row", "n_bad_in_row", "n_applied_in_row", "n_rollbacks",
        "losses", "log_norms",
    }  # fmt: skip


def test_a_smaller_window_keeps_the_newest() -> None:
    guard = Guard(GuardConfig(), "bf16")
    feed(guard, steady(200))
    small = through_json(guard, GuardConfig(spike_window=16))
    assert list(small.losses) == list(guard.losses)[-16:] and list(small.log_norms) == list(guard.log_norms)[-16:]
    large = through_json(small, GuardConfig(spike_window=64, on_spike="skip"))
    assert large.judge(9.0, 1.0, 1) == "applied"  # not half of 64 yet
    assert len(large.losses) == 17


def test_a_window_that_is_not_wanted_any_more_is_dropped() -> None:
    off, on = GuardConfig(on_spike=None), GuardConfig(on_spike="skip")
    guard = Guard(on, "bf16")
    feed(guard, steady(128))
    without = through_json(guard, off)
    assert not without.losses and not without.log_norms and without.judge(9.0, 1.0, 1) == "applied"
    again = through_json(without, on)
    assert again.n_good_in_row == 129 and again.judge(9.0, 1.0, 1) == "applied" and len(again.losses) == 1


def test_a_loss_scale_does_not_leave_fp16() -> None:
    half, full = Guard(GuardConfig(), "fp16"), Guard(GuardConfig(), "bf16")
    half.loss_scale = 8.0
    feed(half, steady(3))
    full.load(half.state)
    assert full.loss_scale == 1 and full.losses == half.losses
    fresh = Guard(GuardConfig(), "fp16")
    fresh.load(full.state)
    assert fresh.loss_scale == 65536
    fresh.load(half.state)
    assert fresh.loss_scale == 8


def test_a_decision_takes_no_time() -> None:
    guard = Guard(GuardConfig(), "bf16")
    feed(guard, steady(128))
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        feed(guard, steady(100))
        best = min(best, (time.perf_counter() - start) / 100)
    assert best < 1e-3  # measured 6e-5 s; the margin is for busy machines


def test_rollbacks_that_get_nowhere_stop_the_run() -> None:
    config = GuardConfig(on_nonfinite="rollback", max_bad_steps=3)
    guard = Guard(config, "bf16")
    for _ in range(2):
        assert guard.judge(math.nan, 1.0, 1) == "rolled back"
        for step in range(999):
            assert guard.judge(1.0, 1.0, step) == "applied"
    resumed = through_json(guard, config)
    for each in (guard, resumed):
        assert each.judge(math.nan, 1.0, 7) == "skipped"
        assert each.reason_to_stop is not None
        assert "step 7: " in each.reason_to_stop
        words = "3 times rolled back (guard.max_bad_steps) without 1000 good steps in a row, so the run gets nowhere"
        assert words in each.reason_to_stop
    # a thousand good steps forgive
    guard = Guard(config, "bf16")
    for _ in range(5):
        assert guard.judge(math.nan, 1.0, 1) == "rolled back" and guard.reason_to_stop is None
        for step in range(1000):
            guard.judge(1.0, 1.0, step)
