"""Where the time of a step goes: data, forward, backward, reduction, optimizer, saving, other.

    data        until all ranks have their rows of the step
    forward     the model and the loss
    backward    the gradients; with more than one rank DeepSpeed reduces most of them within it, bucket by bucket
    reduction   what of that is left after the last gradient, the sums over all ranks, and the wait for the slowest rank
    optimizer   the masters, the weights made of them, and their exchange between ranks
    saving      what a checkpoint holds up: its beginning, and the wait for its copy
    other       the rest: the guard, the profiler, what the program itself takes

On a CPU these are times of the process. On a GPU they are times of the device's own queue, between events that are
read when they have passed: what the device does for a part, or waits for it. No step waits for that. The end of the
optimizer's kernels comes after the step has returned, so that they count in the step after.

What must stay true: the parts of a step add up to its time, on a GPU over several steps.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

Part = Literal["data", "forward", "backward", "reduction", "optimizer", "saving", "other"]
PARTS: tuple[Part, ...] = ("data", "forward", "backward", "reduction", "optimizer", "saving", "other")


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Clock:
    """Is told which part of a step begins. Between `read` and `begin` it stands still."""

    def __init__(self, device: torch.device) -> None:
        is_gpu = device.type == "cuda"
        self._now: Callable[[], Any] = _event if is_gpu else time.perf_counter
        self._is_gpu = is_gpu
        self._part: Part | None = None
        """None: it stands still."""
        self._since: Any = None
        self._spans: list[tuple[Part, Any, Any]] = []
        """Of parts that have ended, and were not read yet: when each began and ended."""

    def begin(self) -> None:
        self._part, self._since = "other", self._now()

    def enter(self, part: Part) -> None:
        """From here on it is time of `part`. Outside of a step, nothing happens."""
        if self._part is not None and part != self._part:
            now = self._now()
            self._spans.append((self._part, self._since, now))
            self._part, self._since = part, now

    @contextmanager
    def within(self, part: Part) -> Iterator[None]:
        """The block is time of `part`; after it, the part before goes on."""
        before = self._part
        self.enter(part)
        yield
        if before is not None:
            self.enter(before)

    def read(self) -> dict[str, float]:
        """End the step; return the seconds of each part since the last call, as far as the device has come."""
        if self._part is not None:
            self._spans.append((self._part, self._since, self._now()))
            self._part = None
        n_passed = len(self._spans)
        if self._is_gpu:  # they pass in order
            n_passed = next((i for i, (*_, end) in enumerate(self._spans) if not end.query()), n_passed)
        seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        for part, start, end in self._spans[:n_passed]:
            seconds[part] += start.elapsed_time(end) / 1000 if self._is_gpu else end - start
        del self._spans[:n_passed]
        return seconds
