"""Saving while training goes on: `Saver` writes one checkpoint in a thread, `Saves` says when, and what came of it.

The thread first copies the tensors to host memory. Training waits for the copy only when it is about to change them, so
the copy runs beside the forward and backward pass of the next step, and the writing beside the steps that follow. The
ranks agree over a process group of the thread's own.
"""

import dataclasses
import logging
import math
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megakexue import dist
from megakexue.config import CheckpointConfig
from megakexue.run.checkpoint import random_state, step_folders, step_of, write
from megakexue.run.engine import Engine
from megakexue.run.guard import TrainingStopped
from megakexue.run.state import StoppedState, TrainerState

RETRY_S = (1.0, 10.0)
"""Waits before the last save of a run is tried again; earlier ones are tried again some steps later."""

log = logging.getLogger("megakexue")


class Saver:
    """Writes the checkpoints of a run, one at a time.

    Host memory: a copy of what this rank owns, kept for the next save. `waited_s` is how long training stood still for
    the last save; it is logged.
    """

    def __init__(self, engine: Engine, config: CheckpointConfig) -> None:
        self._engine, self._config = engine, config
        self._group = dist.host_group("saver", engine.config.engine.timeout_s)
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.waited_s = 0.0
        self._stream = torch.cuda.Stream(engine.device) if engine.device.type == "cuda" else None

    def start(
        self, folder: Path, state: TrainerState, own: dict[str, Tensor] | None = None, *, keep_last: int | None = None
    ) -> None:
        """Begin to write the checkpoint of `state.step` into `folder`; on all ranks together, after `finish`.

        Args:
            state: that of the first rank is written.
            own: more tensors of this rank, by names without a slash, for a step that went wrong: without them, state
                that is not finite is not saved, since keeping the last ones would remove the good ones.
            keep_last: remove all but so many, other than `config.keep_last`.
        """
        assert self._thread is None, "finish() the last one first"
        began = time.perf_counter()
        self._error, self.waited_s = None, 0.0
        live = _own_tensors(self._engine)
        small = {f"rng/{name}": words for name, words in random_state().items()} | (own or {})
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream())  # for the update that has just been launched
        copied = threading.Event()

        def copy() -> None:
            try:
                self._copy(live)
            finally:
                copied.set()
            if own is None:
                _check_finite(self._copies)

        def work() -> None:
            final = folder / f"step_{state.step:08d}"
            try:
                write(copy, lambda: self._copies | small, state, final, self._engine.ranks, self._group)
                if self._engine.ranks.is_first:
                    self._remove_old(folder, state.step, keep_last or self._config.keep_last)
            except Exception as error:  # training must hear of it, whatever it is
                self._error = error
                return
            n_bytes = sum(x.nbytes for x in self._copies.values())
            log.info("saved %s: %.3g GB of this rank in %.2f s", final, n_bytes / 1e9, time.perf_counter() - began)

        def wait() -> None:
            began = time.perf_counter()
            copied.wait()
            self.waited_s += time.perf_counter() - began

        self._engine.before_next_change(wait)
        # a daemon: where a rank hangs, the interpreter must be able to end
        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()
        self.waited_s += time.perf_counter() - began
        if not self._config.asynchronous:
            self._thread.join()
            self._copies.clear()
            self.waited_s = time.perf_counter() - began

    @property
    def has_finished(self) -> bool:
        """Whether a save was begun and its thread has come to an end."""
        return self._thread is not None and not self._thread.is_alive()

    def finish(self) -> bool:
        """Wait for the save that was begun, and return whether there was one; on all ranks together.

        Raises:
            OSError: it has failed, on all ranks alike. The checkpoints before it are as they were.
            Exception: of any other kind: the ranks could not agree, perhaps because one has gone.
        """
        if self._thread is None:
            return False
        began = time.perf_counter()
        self._thread.join()
        self._thread = None
        self.waited_s += time.perf_counter() - began
        log.info("training stood still for %.3f s of that save", self.waited_s)
        if self._error:
            raise self._error
        return True

    def close(self, error: BaseException | None) -> None:
        """Let a save that was begun come to its end, whatever has happened to training: the other ranks write too."""
        if self._thread is not None:
            if error:
                log.error("%r; a save that was begun goes on", error)
            self._thread.join()

    def _copy(self, live: dict[str, Tensor]) -> None:
        on_device = self._stream is not None
        if on_device:
            torch.cuda.set_device(self._engine.device)
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            for key, tensor in live.items():
                if key not in self._copies:
                    self._copies[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_device)
                self._copies[key].copy_(tensor, non_blocking=True)
        if self._stream:
            self._stream.synchronize()

    def _remove_old(self, folder: Path, step: int, keep_last: int) -> None:
        """Remove checkpoints before `step` but the newest regular ones and every n-th.

        Those between the steps at which one is due, as a signal leaves them, are removed as soon as there is a newer
        one, so that interruptions do not decide what is kept. A user's own folders have other names.
        """
        every, for_ever = self._config.every_steps, self._config.keep_every
        n_regular = int(step % every == 0)
        for path in step_folders(folder):
            old = step_of(path)
            if old < step and not (for_ever and old % for_ever == 0):
                n_regular += old % every == 0
                if old % every or n_regular > keep_last:
                    shutil.rmtree(path, ignore_errors=True)


def _own_tensors(engine: Engine) -> dict[str, Tensor]:
    """What this rank writes: at stage 0, where all hold everything, its share of the segments."""
    ranks = engine.ranks
    return {
        f"{kind}/{segment.name}/{segment.start}": view
        for i, (segment, views) in enumerate(engine.state_tensors())
        if engine.is_sharded or i % ranks.world_size == ranks.rank
        for kind, view in views.items()
    }


def _check_finite(tensors: dict[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise OSError(f"{key} is not finite, and such a checkpoint would be of no use")


class Saves:
    """When checkpoints are due, and what has come of those that were begun. All ranks know the same.

    A save is begun at a step (`begin`), and its end is taken note of where all ranks meet next (`settle`). One that has
    failed is tried again 1, 2, 4, ... steps later, at most `checkpoint.every_steps`.

    Attributes:
        saved: step of the newest checkpoint that is known to be whole; None: there is none.
    """

    def __init__(
        self, engine: Engine, folder: Path, saved: int | None, *, say: Callable[[str], None], sync: Callable[[], None]
    ) -> None:
        """
        Args:
            say: takes a line for the user.
            sync: pushes the records of the run to the disk, so that a checkpoint is never ahead of them.
        """
        self._engine, self._folder, self._say, self._sync = engine, folder, say, sync
        self._saver = Saver(engine, engine.config.checkpoint)
        self._every, guard = engine.config.checkpoint.every_steps, engine.config.guard
        self._may_roll_back = "rollback" in (guard.on_nonfinite, guard.on_spike)
        self.saved = self._begun = saved
        self._n_failures, self._retry_at = 0, math.inf

    def __enter__(self) -> "Saves":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._saver.close(error)

    @property
    def has_finished(self) -> bool:
        """Whether a save of this rank has come to its end and waits to be settled."""
        return self._saver.has_finished

    def is_due(self, step: int) -> bool:
        """Whether to begin a save before the step that follows `step`."""
        # a run that may roll back needs something to go back to from the start
        is_regular = step % self._every == 0 if step else self._may_roll_back
        return self._begun != step and (is_regular or step >= self._retry_at)

    def begin(self, state: TrainerState) -> None:
        self.settle(state.step)
        self._begun, self._retry_at = state.step, math.inf
        self._sync()
        self._saver.start(self._folder, self._complete(state))

    def settle(self, step: int, *, is_last: bool = False) -> None:
        """Take note of how the save that was begun has ended; `step` is the present one.

        Raises:
            TrainingStopped: the ranks cannot agree on a checkpoint any more.
        """
        error: Exception | None = None
        try:
            if not self._saver.finish():
                return
        except Exception as failure:
            error = failure
        ranks = self._engine.ranks
        ends = dist.gather({str(ranks.rank): (str(error), isinstance(error, OSError))} if error else {})
        if not ends:
            self.saved, self._n_failures, self._retry_at = self._begun, 0, math.inf
            return
        for rank, (text, is_agreed) in ends.items():
            if not is_agreed or len(ends) < ranks.world_size:
                raise TrainingStopped(
                    f"the ranks cannot agree on a checkpoint any more (rank {rank}: {text}): run the same command again"
                )
        self._begun, self._retry_at = self.saved, step + min(2**self._n_failures, self._every)
        self._n_failures += 1
        then = "" if is_last else f"; training goes on, and tries again at step {self._retry_at}"
        self._say(f"WARNING: {error}{then}; if the disk is full, make room")

    def save_and_wait(self, state: TrainerState) -> None:
        """Have a checkpoint of this step, before the program ends.

        Raises:
            TrainingStopped: it cannot be written.
        """
        self.settle(state.step)
        for wait_s in (0.0, *RETRY_S):
            if self.saved == state.step:
                return
            time.sleep(wait_s)
            self.begin(state)
            self.settle(state.step, is_last=True)
        if self.saved != state.step:
            before = "the start" if self.saved is None else f"step {self.saved}"
            raise TrainingStopped(
                f"the checkpoint of step {state.step} cannot be written to {self._folder}: make room, then run the "
                f"same command again: it goes on from {before}"
            )

    def dump(self, folder: Path, state: StoppedState, own: dict[str, Tensor]) -> None:
        """Write the state before a step that went wrong, with its micro-batches `own`, and wait for it.

        Raises:
            Exception: of any kind: it cannot be written.
        """
        self._saver.start(folder, self._complete(state), own, keep_last=1)
        self._saver.finish()

    def _complete(self, state: TrainerState) -> TrainerState:
        return dataclasses.replace(state, n_updates=self._engine.optimizer.n_updates, guard=self._engine.guard.state)
