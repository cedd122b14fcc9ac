"""Signals: known to all ranks at one meeting, also to one that waits in C; a second one and the grace time end it."""

import fcntl
import os
import signal
import subprocess
import sys
import termios
import threading
import time
from typing import Any

import pytest

from megakexue.config import PREEMPTED
from megakexue.run.preemption import Interruption, Preempted, Preemption
from tests.helpers import ROOT
from tests.ranks import run_on_ranks, start_on_ranks


def make(grace_s: float = 60.0) -> Preemption:
    from megakexue.config import EngineConfig
    from megakexue.run.engine import start

    return Preemption(start(EngineConfig()), grace_s=grace_s, timeout_s=60.0)


def end_of(meeting: Any, **arguments: Any) -> tuple[str, Any]:
    """What a meeting comes to: its answer, or why it ended and what the program would exit with."""
    try:
        return "went on", meeting(**arguments)
    except Interruption as interruption:
        try:
            interruption.end()
        except SystemExit as end:
            return str(interruption), end.code
        except ValueError as error:
            return str(interruption), error


def meetings() -> list[Any]:
    rank, answers = int(os.environ["RANK"]), []
    preemption = make()
    answers.append(end_of(preemption.meet, flag=True))
    answers.append(end_of(preemption.meet, flag=rank == 0))
    answers.append(end_of(preemption.meet, error=ValueError("no shard") if rank == 1 else None))
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    preemption = make()
    with preemption.listening():
        signal.signal(signal.SIGALRM, lambda *_: None)
        os.kill(os.getpid(), signal.SIGALRM)  # somebody else's
        time.sleep(0.2)
        answers.append(end_of(preemption.meet, flag=True))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    with preemption.listening():
        if rank == 1:
            # in the meeting, where this rank waits in C for the other one, which looks into the store
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        else:
            deadline = time.monotonic() + 30
            while not preemption.is_requested():
                assert time.monotonic() < deadline
                time.sleep(0.05)
        # rank 1 came to this meeting before it was asked, so only the other one says so
        answers.append(end_of(preemption.meet))
        os.kill(os.getpid(), signal.SIGTERM)  # in the burst: the launcher passes the same on
        time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGTERM)  # on the way out: ignored
    return answers


def test_all_ranks_leave_at_the_same_meeting() -> None:
    first, second = run_on_ranks(2, meetings)
    assert first[:2] == second[:2] == [("went on", True), ("went on", False)]
    # who has failed says why, and the others exit with the code of a mistake
    assert first[2] == ("rank 1 failed: no shard", 2)
    assert second[2][0] == "rank 1 failed: no shard" and str(second[2][1]) == "no shard"
    assert first[3] == second[3] == ("went on", True)
    assert first[4] == second[4] == ("SIGUSR1 on rank 1", PREEMPTED)
    assert Preempted().code == PREEMPTED == 75


def lose_the_terminal() -> list[str]:
    """Have stdout and stderr on a terminal of this process's own that is closed; return what happens then."""
    os.setsid()
    keyboard, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    preemption = make()
    for number in (1, 2):
        os.dup2(terminal, number)
    with preemption.listening():
        os.close(keyboard)
        deadline = time.monotonic() + 30
        while not preemption.is_requested():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.2)
        print("saved", flush=True)  # as the trainer does
        return [end_of(preemption.meet)[0]]


@pytest.mark.skipif(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, reason="the tests run under nohup")
def test_a_terminal_that_is_closed_is_a_signal_and_writing_goes_on() -> None:
    assert run_on_ranks(1, lose_the_terminal) == [["SIGHUP on rank 0"]]


def test_under_nohup_a_hangup_stays_ignored() -> None:
    code = """
import os, signal, time
from tests.run.test_preemption import end_of, make

with make().listening() as preemption:
    os.kill(os.getpid(), signal.SIGHUP)
    time.sleep(0.3)
    print(end_of(preemption.meet, flag=True))
"""
    command = ["nohup", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["('went on', True)"], done.stdout + done.stderr


def hang(grace_s: float, second_after_s: float | None, burst_s: float) -> None:
    """Be signalled in a main thread that goes on waiting."""
    from megakexue.run import preemption as module

    module.BURST_S = burst_s
    with make(grace_s).listening():
        os.kill(os.getpid(), signal.SIGTERM)
        if second_after_s is not None:
            time.sleep(second_after_s)
            os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(60)


@pytest.mark.parametrize(
    ("grace_s", "second_after_s", "code", "words"),
    [
        (60.0, 1.0, 128 + signal.SIGINT, "error: rank 0: a second SIGINT: not saved"),
        (1.0, None, 1, "error: rank 0: not saved within checkpoint.grace_s=1: some rank hangs"),
    ],
)
def test_a_second_signal_and_the_grace_time_end_at_once(
    capfd: pytest.CaptureFixture[str], grace_s: float, second_after_s: float | None, code: int, words: str
) -> None:
    (process,) = start_on_ranks(1, hang, grace_s, second_after_s, 0.5)
    process.join(40)
    assert process.exitcode == code
    assert words in capfd.readouterr().err
