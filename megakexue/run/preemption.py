"""Preemption: a signal to any rank saves the run and ends it, with an exit code that says so.

    SIGTERM, SIGINT, SIGUSR1,     all ranks save together and exit with PREEMPTED; the same command goes on
    SIGHUP unless under nohup
    the same again, later         this rank exits at once; what it was writing is never trusted
    `grace_s` after the first     the same: some rank does not answer, and the cluster is about to kill anyway

A thread takes the signals, since Python's own handlers run only when the main thread comes back from C, and it may be
waiting in a collective for a rank that waits for data. It tells the other ranks through the store by which they have
found one another; who waits for data looks there. The decision is taken where all ranks meet: before each step, between
the micro-batches of an accumulation, before each validation batch (`meet`). Rank A may see the signal one meeting
earlier than rank B, but all leave at the same one, with weights, state and data position of the last finished step.

What must stay true: nothing changes the weights or the optimizer's state between the last step and the save.
"""

import itertools
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from megakexue import dist
from megakexue.config import PREEMPTED

# nohup starts a program with SIGHUP ignored; SIGINT is ignored in what a script starts with &, which is nobody's wish
IS_UNDER_NOHUP = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, *(() if IS_UNDER_NOHUP else (signal.SIGHUP,)))
BURST_S = 5.0
"""Signals that come so soon after the first are the same request: a launcher passes on what its group has got too."""

_number = itertools.count()


class Preempted(SystemExit):
    """The run is saved; ends the process with code PREEMPTED if nobody catches it."""

    code: int

    def __init__(self) -> None:
        super().__init__(PREEMPTED)


class Interruption(Exception):
    """Raised on all ranks at the same meeting. `error`: this rank's own failure, if it was one."""

    def __init__(self, reason: str, error: Exception | None, *, is_failure: bool) -> None:
        super().__init__(reason)
        self.error, self.is_failure = error, is_failure

    def end(self) -> NoReturn:
        """Leave the program, once everything is saved."""
        if self.error:
            raise self.error
        raise SystemExit(2) if self.is_failure else Preempted


class Preemption:
    """Where signals arrive and ranks agree on them. Made after the process group, by the main thread of all ranks."""

    def __init__(self, ranks: dist.Ranks, *, grace_s: float, timeout_s: float) -> None:
        self._group = dist.host_group("preemption", timeout_s)
        self._key = f"megakexue/preemption/{next(_number)}"
        self._rank, self._is_alone, self._grace_s = ranks.rank, ranks.world_size == 1, grace_s
        self._reason: str | None = None

    # --- signals -----------------------------------------------------------------------------------------------------

    @contextmanager
    def listening(self) -> Iterator["Preemption"]:
        """Take the signals until the block is left; if one has come, ignore further ones for the rest of the process.

        The launcher ends the other ranks when one has exited, and these may still be on their way out. Ranks that have
        failed ignore signals too: they still say why.
        """
        is_failing = False
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        old_handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        old_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._watch, args=(reader,), daemon=True)
        thread.start()
        try:
            yield self
        except BaseException:
            is_failing = not self._is_alone
            raise
        finally:
            signal.set_wakeup_fd(old_fd)
            for number, handler in old_handlers.items():
                signal.signal(number, signal.SIG_IGN if self._reason or is_failing else handler)
            os.close(writer)  # ends the thread
            thread.join()
            os.close(reader)

    def _watch(self, reader: int) -> None:
        began = timeout = None
        while True:
            ready, _, _ = select.select([reader], [], [], timeout)
            numbers = os.read(reader, 64) if ready else b""
            if ready and not numbers:
                return
            if not ready:
                leave(1, f"rank {self._rank}: not saved within checkpoint.grace_s={self._grace_s:g}: some rank hangs")
            for number in set(numbers).intersection(SIGNALS):  # the descriptor tells of other handlers' signals too
                if number == signal.SIGHUP:
                    _leave_lost_outputs()
                if began is None:
                    began, timeout = time.monotonic(), self._grace_s
                    self._reason = f"{signal.Signals(number).name} on rank {self._rank}"
                    # by another thread: the store may be busy, and this one keeps the time
                    threading.Thread(target=self._tell, daemon=True).start()
                elif time.monotonic() - began > BURST_S:
                    leave(128 + number, f"rank {self._rank}: a second {signal.Signals(number).name}: not saved")
            if began is not None:
                timeout = max(0.0, began + self._grace_s - time.monotonic())

    def _tell(self) -> None:
        with suppress(Exception):  # rank 0, which holds the store, may be gone
            dist.store().set(self._key, self._reason)

    # --- agreement ---------------------------------------------------------------------------------------------------

    def is_requested(self) -> bool:
        """Whether this rank or, by its store, another one was asked to stop: costs a message, so ask while waiting."""
        if self._reason is None and dist.store().check([self._key]):
            self._reason = dist.store().get(self._key).decode()
        return self._reason is not None

    def meet(self, *, error: Exception | None = None, flag: bool = False) -> bool:
        """Wait for all ranks; raise Interruption on all of them if any was asked to stop or has failed.

        Args:
            error: why this rank cannot go on.

        Returns:
            Whether `flag` is set on all ranks.
        """
        flags = [self._reason is not None, error is not None, not flag]
        n_asked, n_failed, n_without = dist.count_over_ranks(flags, self._group)
        if n_asked or n_failed:
            own = (error and f"rank {self._rank} failed: {error}") if n_failed else self._reason
            said = [text for text in dist.gather({str(self._rank): own}, self._group).values() if text]
            reason = "; ".join(dict.fromkeys(said))
            self._reason = self._reason or reason  # the launcher will end this rank too
            raise Interruption(reason, error, is_failure=n_failed > 0)
        return n_without == 0


def _leave_lost_outputs() -> None:
    """Let stdout and stderr go nowhere if their terminal or reader is gone: a write would fail, and then the save."""
    for number in (1, 2):
        poll = select.poll()
        poll.register(number, 0)
        if any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


def leave(code: int, message: str) -> NoReturn:
    """End this process at once, whatever its other threads are doing."""
    with suppress(OSError):
        os.write(sys.stderr.fileno(), f"error: {message}\n".encode())
    os._exit(code)
