"""Who is behind, and what failed first: a thread in each rank, which talks to the others over the store.

The main thread marks where it is (`Watch.mark`). Ranks make the same marks in the same order, so the one with the
fewest is behind. The thread sends the newest mark each second, in worlds of thousands less often: a message that is
also a sign of life. The first rank reads those of all ranks. It reports a stall once, and then every rank writes its
stacks into its log:

    no sign of life    a rank has sent nothing for `stall_s`: it is stopped, or its host is lost
    no progress        all ranks send, but none has made a mark for `stall_s`, nor for five times as long as its phase
                       has taken so far; ten times `stall_s` in a phase that has never ended yet, for it may compile

The first failure of any rank is written under one key, where nobody can replace it. Who sees it there gives his main
thread END_S to come to its end, and then ends the process. The first rank says it on the screen; where it is dead,
another one. An error of a collective is a failure of this rank only if no other rank has failed or fallen silent.

What must stay true: a blocked main thread never keeps the process from its end; only the thread touches its connection
to the store; all times are by this rank's own clock, which stands still while the process is stopped.
"""

import faulthandler
import itertools
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from torch.distributed import PrefixStore

from megakexue import dist
from megakexue.config import UserError
from megakexue.launcher import host_of_each_rank
from megakexue.run.guard import TrainingStopped
from megakexue.run.preemption import Preempted
from megakexue.run.rendezvous import NotAllHere

END_S = 5.0
"""That a main thread has to come to its end after another rank has failed."""
SAID_S = 10.0
"""After which another rank than the first says what has failed."""
SEARCH_S = 15.0
"""After an error of a collective: in which the failure of another rank must show."""
SILENT_BEATS = 4
"""Missed by a rank that is dead, if a collective has failed too."""
SILENT = "stopped, swapped out, or a lost host or network"
ENDED = "its end"
"""The phase of a rank that has come to its end."""

log = logging.getLogger("megakexue")
_number = itertools.count()


# --- what there is to say --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What a rank has failed with, or what is known of a rank that can say nothing."""

    rank: int
    host: str
    """"": not known."""
    kind: str
    """`error` or `stopped`."""
    text: str
    code: int
    """The exit code of all ranks."""
    remedy: str = ""
    """How to go on, where the text does not say it."""
    is_dead: bool = False
    """Whether the rank can say nothing itself."""

    def words(self, own: str | None = None) -> str:
        """What is said last. `own`: the text of the rank that says it; the same one needs no name."""
        where = "" if own == self.text else f"{name_ranks({self.rank: self.host})}: "
        return f"{self.kind}: {where}{self.text}" + (f"\n{self.remedy}" if self.remedy else "")


class Failed(SystemExit):
    """Another rank has failed first: this one ends in silence, with the exit code of the failure."""

    code: int


@dataclass(kw_only=True)
class Seen:
    """What a rank was last seen at. Times are seconds of the clock of who has seen it."""

    heard: float
    """When it last gave a sign of life."""
    moved: float
    """When it last made a mark."""
    message: bytes = b""
    count: int = -1
    """Of its marks. -1: nothing was ever heard."""
    phase: str = "the start"
    place: str = "the start"
    """Step, phase and more."""
    host: str = ""

    def hear(self, message: bytes, now: float) -> None:
        """Take note of the newest message, which may be the old one."""
        if message != self.message:
            _, count, self.phase, self.place, self.host = json.loads(message)
            self.moved = now if count != self.count else self.moved
            self.message, self.count, self.heard = message, count, now


def name_ranks(hosts: dict[int, str], n_shown: int = 4) -> str:
    """Name ranks by their hosts: the first few of them, and how many more there are."""
    by_host: dict[str, list[int]] = {}
    for rank, host in hosts.items():
        by_host.setdefault(host, []).append(rank)
    parts = []
    for host, ranks in itertools.islice(by_host.items(), n_shown):
        more = f" and {len(ranks) - n_shown} more" if len(ranks) > n_shown else ""
        shown = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:n_shown]))}{more}"
        parts.append(f"{shown} on {host}" if host else shown)
    rest = [f"{len(by_host) - n_shown} more hosts"] if len(by_host) > n_shown else []
    return "; ".join(parts + rest)


def find_stall(
    seen: dict[int, Seen], now: float, stall_s: float, longest: dict[str, float]
) -> tuple[float, str] | None:
    """Return since when there is a stall, by the clock of `now`, and whose fault it is; None: there is none.

    Args:
        longest: seconds that each phase has usually taken at most; a phase that has never ended is not in it.
    """
    seen = {rank: s for rank, s in seen.items() if s.phase != ENDED}
    silent = {rank: s for rank, s in seen.items() if now - s.heard > stall_s}
    if silent:
        first = min(silent.values(), key=lambda s: s.heard)
        named = name_ranks({rank: s.host for rank, s in silent.items()})
        return first.heard, (
            f"no sign of life for {now - first.heard:.0f} s from {named} (last at {first.place}, "
            f"{_time_of(first.heard, now)}): {SILENT}"
        )
    since = max((s.moved for s in seen.values()), default=now)
    least = min((s.count for s in seen.values()), default=0)
    behind = {rank: s for rank, s in seen.items() if s.count == least}
    slowest = next(iter(behind.values()), None)
    if slowest is None:
        return None
    usual = longest.get(slowest.phase)
    if now - since <= (10 * stall_s if usual is None else max(stall_s, 5 * usual)):
        return None
    where = f"at {slowest.place}, since {_time_of(slowest.moved, now)}"
    if len(behind) == len(seen):
        return since, f"no progress for {now - since:.0f} s: {'all ranks are' if len(seen) > 1 else 'it is'} {where}"
    named = name_ranks({rank: s.host for rank, s in behind.items()})
    return since, f"no progress for {now - since:.0f} s: {named}: behind the others, {where}"


def _aside(action: Callable[[], None]) -> None:
    """Do something in a thread of its own, and wait for END_S at most: the file system of the run folder may hang."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(END_S)


def _time_of(moment: float, now: float) -> str:
    """The time of day of a moment of our clock."""
    return time.strftime("%T", time.localtime(time.time() - (now - moment)))


def own_host(ranks: dist.Ranks) -> str:
    """The name of this host: the one that the launcher was given, or its own."""
    names = host_of_each_rank()
    return names[ranks.rank] if len(names) == ranks.world_size else socket.gethostname()


def _kind_and_text(error: BaseException) -> tuple[str, str]:
    if isinstance(error, TrainingStopped):
        return "stopped", str(error)
    if isinstance(error, UserError):
        return "error", str(error)
    line = next(iter(str(error).splitlines()), "")
    return "error", f"{type(error).__name__}: {line}" if line else type(error).__name__


def _code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1


def is_of_others(error: BaseException) -> bool:
    """Whether an error says no more than that some other rank has failed: it is of a collective, or of a meeting."""
    is_gloo = isinstance(error, RuntimeError) and "/gloo/" in str(error)
    return is_gloo or isinstance(error, (torch.distributed.DistError, SystemExit))


# --- the watch -------------------------------------------------------------------------------------------------------


class Watch:
    """Watches a run, from the process group to its end. Made by the main thread of all ranks, in the same order.

    Attributes:
        say: takes a line for the user.
        close_screen: called before the process is ended from the thread.
        saved: returns the step of the newest checkpoint; None: there is none.
    """

    handled: ClassVar[BaseException | None] = None
    """The error of this process that is said on the screen, by whichever rank."""

    def __init__(self, ranks: dist.Ranks, stall_s: float) -> None:
        self.say: Callable[[str], None] = lambda text: print(text, flush=True)
        self.close_screen: Callable[[], None] = lambda: None
        self.saved: Callable[[], int | None] = lambda: None
        self._ranks, self._stall_s, self._host = ranks, stall_s, own_host(ranks)
        self._is_alone = ranks.world_size == 1
        # another rank notices that the first one is stopped: one on its host, and one on the next
        self._is_deputy = not ranks.is_first and ranks.rank in (1, ranks.local_world_size)
        self._interval = max(1.0, ranks.world_size / 1000)
        self._search_s = max(SEARCH_S, 2 * SILENT_BEATS * self._interval)
        self._store: Any = None
        self._log: BinaryIO | None = None
        self._clock = self._marked = 0.0
        self._longest: dict[str, float] = {}
        self._step, self._count, self._phase, self._place = 0, 0, "the start", "the start"
        self._n_sent = self._n_heard = self._n_stalls = 0
        self._seen: dict[int, Seen] = {}
        self._stalled_since: float | None = None
        self._own: BaseException | None = None
        self._noted, self._failed_at = 0.0, ""
        self._failure: Failure | None = None
        self._is_leaving = self._is_closed = self._is_store_lost = False
        self._wake, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def mark(self, phase: str, more: str = "", *, step: int | None = None) -> None:
        """Say that this rank comes to a phase, of `step` or the step before: no message, and no wait for anybody."""
        now, before = self._clock, self._phase
        if before not in self._longest:
            self._longest[before] = 0.0  # the first time compiles, and is not usual
        elif self._stalled_since is None:
            self._longest[before] = max(self._longest[before], now - self._marked)
        self._step = self._step if step is None else step
        self._marked, self._phase, self._place = now, phase, f"step {self._step}, {phase}{more}"
        self._count += 1

    def log_to(self, path: Path) -> None:
        """Write stacks to the end of this log, by a descriptor that is ready when the main thread is not."""
        self._log = open(path, "ab", buffering=0)

    def __enter__(self) -> "Watch":
        if not self._is_alone:
            # a connection of its own: a call that waits blocks the others of its connection
            self._store = PrefixStore(f"megakexue/watch/{next(_number)}", dist.store().clone())
            if self._ranks.is_first:  # reading a key that is missing waits for it
                self._store.multi_set(self._beats(), [""] * self._ranks.world_size)
        self._thread.start()
        if self._is_deputy:
            threading.Thread(target=self._watch_first, daemon=True).start()
        return self

    def leaving(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Take note of how the main thread leaves the run, before it closes what is open. A later call does nothing."""
        if self._is_leaving:
            return
        self._failed_at = self._place
        self.mark("closing")
        if error is not None and not isinstance(error, Preempted):
            if log.handlers:
                log.error("failed at %s", self._failed_at, exc_info=(kind, error, trace))
            self._own, self._noted = error, self._clock
        self._is_leaving = True
        self._wake.set()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.leaving(kind, error, trace)
        if self._own is None or self._is_alone:
            self._close()
            return
        Watch.handled = error
        self._ended.set()
        self._wake.set()
        self._thread.join(self._search_s + 2 * SAID_S)
        if self._failure is None:  # the thread waits for a store that is stopped
            print(self._own_failure(self._own).words(), file=sys.stderr, flush=True)
        elif is_of_others(self._own) and self._failure.rank != self._ranks.rank:
            Watch.handled = Failed(self._failure.code)
            raise Watch.handled from error

    def _close(self) -> None:
        """End the thread, and then wait for those of the other ranks: the store may be in this process."""
        self._is_closed = True
        self._wake.set()
        self._thread.join(END_S)
        if self._log:
            self._log.close()
        if self._is_alone or self._thread.is_alive():
            return
        with suppress(RuntimeError):  # the first rank was killed at its very end
            self._phase = ENDED
            self._send()
            self._wait_for_all("done")

    def _wait_for_all(self, counter: str) -> None:
        """Say that this rank is done with the store; as the first rank, wait for all that are alive."""
        self._store.add(counter, 1)
        n, end = self._ranks.world_size - len(self._silent()), time.monotonic() + END_S
        while self._ranks.is_first and self._store.add(counter, 0) < n and time.monotonic() < end:
            time.sleep(0.02)

    def _silent(self) -> list[int]:
        """Ranks that are dead, as far as this one has seen them."""
        silent_s = SILENT_BEATS * self._interval
        return [rank for rank, seen in self._seen.items() if self._clock - seen.heard > silent_s]

    # --- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            before = time.monotonic()
            while not self._is_closed and self._failure is None:
                now = time.monotonic()
                # at most: a process that was stopped has seen nothing meanwhile, and must not blame others
                self._clock += min(now - before, 2 * self._interval)
                before = now
                if self._log:  # if Python cannot run until then, a C thread writes the stacks
                    faulthandler.dump_traceback_later(self._stall_s + 2 * self._interval, file=self._log)
                self._round()
                if self._failure is None:
                    self._wake.wait(self._interval)
                    self._wake.clear()
        except RuntimeError as error:
            if self._is_leaving and self._own is None:
                return  # a normal end, and the first rank was faster
            if log.handlers:
                log.error("the store does not answer: %s", str(error).partition("\n")[0])
            self._failure, self._is_store_lost = self._lost(0), True
        finally:
            faulthandler.cancel_dump_traceback_later()
        if self._failure is not None:
            self._end(self._failure)

    def _beats(self) -> list[str]:
        return [f"beat/{rank}" for rank in range(self._ranks.world_size)]

    def _beat(self) -> bytes:
        self._n_sent += 1
        return json.dumps([self._n_sent, self._count, self._phase, self._place, self._host]).encode()

    def _send(self) -> None:
        self._store.set(f"beat/{self._ranks.rank}", self._beat())

    def _round(self) -> None:
        if self._is_alone:
            self._look({0: self._beat()})
            return
        self._send()
        if self._store.check(["failure"]):
            self._failure = Failure(**json.loads(self._store.get("failure")))
        elif self._own is not None:
            self._search(self._own)
        elif self._ranks.is_first:
            self._look(self._read())
        else:
            if self._is_deputy and self._hear({0: self._store.get("beat/0")}):
                self._n_heard += 1
            if self._store.check([f"stall/{self._n_stalls}"]):
                self._n_stalls += 1
                self._dump(self._place)

    def _read(self) -> dict[int, bytes]:
        return dict(enumerate(self._store.multi_get(self._beats())))

    def _hear(self, messages: dict[int, bytes]) -> bool:
        """Take note of newest messages; return whether any of them is new."""
        is_new = False
        for rank, message in messages.items():
            seen = self._seen.setdefault(rank, Seen(heard=self._clock, moved=self._clock))
            is_new |= message != seen.message
            seen.hear(message, self._clock)
        return is_new

    # --- who is behind -----------------------------------------------------------------------------------------------

    def _look(self, messages: dict[int, bytes]) -> None:
        """Report a stall when it is found, and that it is over."""
        self._hear(messages)
        found = find_stall(self._seen, self._clock, self._stall_s, self._longest)
        if found and self._stalled_since is None:
            self._stalled_since, text = found
            place = self._place  # to tell it may take a while
            self._tell(f"WARNING: {text}; {self._where_stacks_are()}")
            if not self._is_alone:
                self._store.set(f"stall/{self._n_stalls}", "")
            self._n_stalls += 1
            self._dump(place)
        elif not found and self._stalled_since is not None:
            self._tell(f"goes on after {self._clock - self._stalled_since:.0f} s")
            self._stalled_since = None
            for seen in self._seen.values():  # who was stopped has made no mark yet
                seen.moved = self._clock

    def _where_stacks_are(self) -> str:
        return f"stacks are in {Path(self._log.name).parent}" if self._log else "it has no log yet"

    def _tell(self, text: str) -> None:
        with suppress(OSError):
            self.say(text)
        if log.handlers:  # without any, Python would print it
            _aside(lambda: log.warning("%s", text.removeprefix("WARNING: ")))

    def _dump(self, place: str) -> None:
        _aside(lambda: self._write_stacks(place))

    def _write_stacks(self, place: str) -> None:
        with suppress(OSError, ValueError):  # a full disk; a log that the main thread has just closed
            if self._log:
                line = f"{time.strftime('%F %T')} stalled at {place}; the stacks of all threads:\n"
                self._log.write(line.encode())
                faulthandler.dump_traceback(file=self._log)

    def _watch_first(self) -> None:
        """In a thread of a deputy: say it where the first rank gives no sign of life, perhaps since its store hangs."""
        n_heard = silent_s = 0
        while not self._is_closed and self._failure is None and not self._is_leaving:
            self._ended.wait(1.0)
            if n_heard != self._n_heard:
                if silent_s > self._stall_s:
                    self._tell(f"rank 0 is back: goes on after {silent_s} s")
                n_heard, silent_s = self._n_heard, 0
                continue
            silent_s += 1
            if silent_s - 1 <= self._stall_s < silent_s:
                seen = self._seen.get(0) or Seen(heard=0.0, moved=0.0)
                self._tell(
                    f"WARNING: no sign of life for {silent_s} s from {name_ranks({0: seen.host})} (last at "
                    f"{seen.place}): {SILENT}; this rank is at {self._place}"
                )

    # --- what failed first -------------------------------------------------------------------------------------------

    def _own_failure(self, error: BaseException) -> Failure:
        kind, text = _kind_and_text(error)
        is_surprise = not isinstance(error, (UserError, TrainingStopped))
        if is_surprise:
            text += f", at {self._failed_at}" + (f"; the traceback is in {self._log.name}" if self._log else "")
        return Failure(
            rank=self._ranks.rank, host=self._host, kind=kind, text=text, code=_code(error),
            remedy=self._remedy() if is_surprise else "",
        )  # fmt: skip

    def _remedy(self) -> str:
        step = self.saved()
        return "the same command begins anew" if step is None else f"the same command goes on from step {step}"

    def _lost(self, rank: int) -> Failure:
        """What is known of a rank that ended without a word."""
        seen = self._seen.get(rank) or Seen(heard=self._clock, moved=self._clock)
        text = (
            f"ended without a word (last sign of life at {_time_of(seen.heard, self._clock)}, {seen.place}): killed, "
            "stopped, out of memory, or a lost host; `dmesg -T | tail` there says which"
        )
        return Failure(rank=rank, host=seen.host, kind="error", text=text, code=1, remedy=self._remedy(), is_dead=True)

    def _search(self, error: BaseException) -> None:
        """Find out whose failure the end of this rank is, and write it where nobody has written another one."""
        since, rank = self._clock - self._noted, None
        if is_of_others(error):
            if self._ranks.is_first or since > self._search_s / 2:  # not all of thousands at once
                self._hear(self._read())
                rank = next(iter(self._silent()), None)
            if rank is None and since < self._search_s:
                return
        failure = self._own_failure(error) if rank is None else self._lost(rank)
        written = self._store.compare_set("failure", "", json.dumps(asdict(failure)))
        self._failure = Failure(**json.loads(written))

    def _end(self, failure: Failure) -> None:
        """Have it said on one screen, and end this process, unless the main thread does."""
        own = self._own_failure(self._own).text if self._own else None
        if own != failure.text and log.handlers:
            _aside(lambda: log.error("%s", failure.words()))
        with suppress(RuntimeError):
            if not self._ranks.is_first:
                self._store.add("read", 1)
        if not self._ended.wait(END_S):
            _aside(self.close_screen)
        if self._is_to_say(failure):
            print(failure.words(own), file=sys.stderr, flush=True)
        with suppress(RuntimeError):
            if self._ranks.is_first:
                self._store.set("said", "")
                self._wait_for_all("read")
        if not self._ended.is_set():
            os._exit(failure.code)

    def _is_to_say(self, failure: Failure) -> bool:
        """Whether this rank says it: the first one, or if it does not, whoever is the first to notice."""
        if self._ranks.is_first or self._is_store_lost:
            return self._ranks.is_first or self._is_deputy
        end = time.monotonic() + (0 if failure.is_dead and failure.rank == 0 else SAID_S)
        try:
            while time.monotonic() < end:
                if self._store.check(["said"]):
                    return False
                time.sleep(0.1)
            return self._store.compare_set("said", "", str(self._ranks.rank)) == str(self._ranks.rank).encode()
        except RuntimeError:  # the store has gone with the first rank, which has said it
            return False


@contextmanager
def ending() -> Iterator[None]:
    """End the program as its run ends: with its exit code, and without a traceback of what the watch has said."""
    try:
        yield
    except BaseException as error:
        if error is Watch.handled or isinstance(error, Preempted):
            # everything is closed; taking down what has lost its ranks may hang, and a cluster does not wait
            with suppress(OSError, ValueError):
                sys.stdout.flush()
            os._exit(_code(error))
        if isinstance(error, (TrainingStopped, NotAllHere)):
            print(f"stopped: {error}", file=sys.stderr, flush=True)
            sys.exit(1)
        raise
