"""The parts of a step add up to it, and those of a GPU are read when they have passed.

tests/run/test_train.py has those of a real run.
"""

import time
from typing import Any

import pytest
import torch

from megakexue.run import clock
from megakexue.run.clock import PARTS, Clock


def seconds(**parts: float) -> dict[str, float]:
    return dict.fromkeys(PARTS, 0.0) | parts


def test_parts_add_up_and_come_back() -> None:
    own = Clock(torch.device("cpu"))
    own.enter("forward")  # outside of a step
    began = time.perf_counter()
    own.begin()
    time.sleep(0.01)
    with own.within("data"):
        time.sleep(0.02)
    own.enter("optimizer")
    with own.within("saving"), own.within("saving"):
        time.sleep(0.03)
    time.sleep(0.04)
    found = own.read()
    whole = time.perf_counter() - began
    assert list(found) == list(PARTS)
    assert sum(found.values()) == pytest.approx(whole, abs=2e-3)
    least = seconds(other=0.01, data=0.02, saving=0.03, optimizer=0.04)
    assert all(least[part] <= found[part] <= least[part] + 0.03 * (least[part] > 0) for part in PARTS)
    time.sleep(0.02)  # between two steps
    own.begin()
    assert sum(own.read().values()) < 0.01


class Event:
    """As torch.cuda.Event, on a device that has come to `passed`."""

    passed = 0.0

    def __init__(self, at_ms: float) -> None:
        self.at_ms = at_ms

    def query(self) -> bool:
        return self.at_ms <= Event.passed

    def elapsed_time(self, other: "Event") -> float:
        return other.at_ms - self.at_ms


def test_what_a_gpu_has_not_done_yet_counts_later(monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[Any] = [0, 10, 1000, 1500, 1510, 1520, 2500, 3000]
    monkeypatch.setattr(clock, "_event", lambda: Event(times.pop(0)))
    gpu = Clock(torch.device("cuda"))
    gpu.begin()
    gpu.enter("forward")
    gpu.enter("optimizer")
    Event.passed = 1200  # of a queue in which the optimizer runs until 1500
    assert gpu.read() == seconds(other=0.01, forward=0.99)
    gpu.begin()
    gpu.enter("forward")
    gpu.enter("reduction")
    Event.passed = 9999
    assert gpu.read() == seconds(optimizer=0.5, other=0.01, forward=0.98, reduction=0.5)
