#!/usr/bin/env python
"""Start a program on all hosts of a hostfile by ssh, one process a slot, and start it again if it fails.

For those who have ssh and no scheduler. This host needs no ssh to itself.
"""

# On each host a supervisor, this file with --on-host, is the parent of its ranks. It takes orders from stdin: a line of
# JSON that says what to start, so that no secret is in a command line, and then numbers of signals. It writes events to
# stdout, a JSON list a line. The end of its stdin says that the launcher is gone, however that came about.

import argparse
import ctypes
import json
import math
import os
import queue
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from megakexue.config import PREEMPTED, UserError, as_integer, as_number, load_config, require, run_program
from megakexue.files import write_whole
from megakexue.hosts import Host, deepspeed_env, hosts_variable, passed, read_hostfile, ssh_command

ANSWER_S = 60.0
"""In which every host must have answered."""
PATIENCE_S = 25.0
"""Which ranks have to end by themselves when one has failed."""
BURST_S = 5.0
"""Signals that come so soon after the first are the same request, as in megakexue/run/preemption.py."""
LONGEST_PAUSE_S = 600.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
REACHED = "`ssh -o BatchMode=yes HOST true` must work from here, and this folder and this Python must be there"

# --- on each host ----------------------------------------------------------------------------------------------------


def on_host() -> None:
    events: queue.Queue[tuple[Any, ...]] = queue.Queue(1000)  # a rank that writes faster than ssh waits
    emit("ready", free_port())
    if not (line := sys.stdin.readline()):
        return
    order = json.loads(line)
    # all before the first thread: a fork copies the locks that threads hold
    ranks = {rank: start_rank(order, own) for rank, own in enumerate(order["ranks"], order["first"])}
    for rank, process in ranks.items():
        watch_rank(rank, process, events)
    threading.Thread(target=read_orders, args=(events,), daemon=True).start()
    while ranks:
        try:
            kind, *values = events.get(timeout=10)
        except queue.Empty:
            kind, values = "alive", []  # a connection that is gone shows only where something is sent
        if kind == "order":
            for process in ranks.values():
                # not yet waited for, so its number is its own
                (os.killpg if values == [signal.SIGKILL] else os.kill)(process.pid, values[0])
        elif kind == "end":
            emit(kind, values[0], ranks.pop(values[0]).wait())
        else:
            emit(kind, *values)


def emit(*event: Any) -> None:
    show(1, json.dumps(event).encode() + b"\n")


def free_port() -> int:
    """A port that is free; below 32768, from where on the kernel gives ports to whoever asks for any."""
    while True:
        with suppress(OSError), socket.socket() as s:
            s.bind(("", random.randrange(20_000, 30_000)))
            return s.getsockname()[1]


def start_rank(order: dict[str, Any], own: dict[str, str]) -> subprocess.Popen[bytes]:
    libc = ctypes.CDLL(None)

    def die_with_supervisor() -> None:
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    return subprocess.Popen(
        order["command"], env=os.environ | order["env"] | own, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if order["is_first"] else subprocess.DEVNULL, stderr=subprocess.PIPE,
        start_new_session=True, preexec_fn=die_with_supervisor if hasattr(libc, "prctl") else None,
    )  # fmt: skip


def watch_rank(rank: int, process: subprocess.Popen[bytes], events: queue.Queue[tuple[Any, ...]]) -> None:
    pumps = [
        threading.Thread(target=pump, args=(kind, rank, stream, events), daemon=True)
        for kind, stream in (("out", process.stdout), ("err", process.stderr)) if stream
    ]  # fmt: skip

    def wait() -> None:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        os.killpg(process.pid, signal.SIGKILL)  # what it has started and left; its own number is still taken
        for thread in pumps:
            thread.join(2)  # a process of another session may keep its output open
        events.put(("end", rank))

    for thread in (*pumps, threading.Thread(target=wait, daemon=True)):
        thread.start()


def pump(kind: str, rank: int, stream: IO[bytes], events: queue.Queue[tuple[Any, ...]]) -> None:
    while line := stream.readline(65536):  # by lines, so that those of two ranks do not mix
        events.put((kind, rank, line.decode("latin-1")))  # any bytes come through


def read_orders(events: queue.Queue[tuple[Any, ...]]) -> None:
    for line in sys.stdin:
        events.put(("order", int(line)))
    events.put(("order", int(signal.SIGTERM)))  # the launcher is gone: the ranks may save, if they can at once
    time.sleep(PATIENCE_S)
    events.put(("order", int(signal.SIGKILL)))


def show(number: int, data: bytes) -> None:
    """Write to a file descriptor. What is shown is not worth the run's end: its reader may have left."""
    with suppress(OSError):
        while data:
            data = data[os.write(number, data) :]


# --- the launcher ----------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    show(2, text.encode() + b"\n")


class Attempt:
    """One start of all ranks, until none is left.

    What happens comes through `inbox`: (host, kind, ...) from the hosts, (-1, "signal", number) from the user.
    """

    def __init__(self, hosts: list[Host], command: list[str], env: dict[str, str], inbox: Any) -> None:
        self.hosts, self.command, self.env, self.inbox = hosts, command, env, inbox
        self.names = [host.address for host in hosts]
        self.ports: dict[int, int] = {}
        self.codes: dict[int, int] = {}
        """Exit codes by rank; of one that a signal has ended, its negative number."""
        self.problem: str | None = None
        """What failed first."""
        self.has_started, self.asked_at, self.kills = False, math.inf, 0
        self.deadline = time.monotonic() + ANSWER_S
        self.supervisors = {i: start_supervisor(host) for i, host in enumerate(hosts)}
        for i, process in self.supervisors.items():
            threading.Thread(target=listen, args=(i, process, inbox), daemon=True).start()

    def run(self) -> int:
        """Return the exit code: 0 or 75 if all ranks say so, 2 if one does, otherwise 1."""
        while self.supervisors:
            if time.monotonic() >= self.deadline:
                self.on_deadline()
            with suppress(queue.Empty):
                host, kind, *values = self.inbox.get(timeout=1)
                if kind != "alive":
                    getattr(self, f"on_{kind}")(host, *values)
        codes = set(self.codes.values())
        if self.problem is None and codes in ({0}, {PREEMPTED}):
            return codes.pop()
        self.problem = self.problem or "some ranks were done, and others saved after a signal"
        return 2 if 2 in codes else 1

    def on_ready(self, host: int, port: int) -> None:
        self.ports[host] = port
        if len(self.ports) == len(self.hosts) and not self.problem:
            self.has_started, self.deadline = True, math.inf
            for i in self.supervisors:
                self.send(i, json.dumps(self.order(i)))

    def order(self, i: int) -> dict[str, Any]:
        slots = [host.slots for host in self.hosts]
        first = sum(slots[:i])
        shared = {
            "WORLD_SIZE": str(sum(slots)), "LOCAL_SIZE": str(slots[i]), "MASTER_ADDR": self.names[0],
            "MASTER_PORT": str(self.ports[0]), "MEGAKEXUE_HOSTS": hosts_variable(self.hosts),
        }  # fmt: skip
        own = [shared | {"RANK": str(first + k), "LOCAL_RANK": str(k)} for k in range(slots[i])]
        return dict(command=self.command, env=self.env, first=first, ranks=own, is_first=i == 0)

    def on_out(self, host: int, rank: int, text: str) -> None:
        show(1, text.encode("latin-1"))

    def on_err(self, host: int, rank: int, text: str) -> None:
        end = b"\n" if host and not text.endswith("\n") else b""
        show(2, (f"{self.names[host]} rank {rank}: ".encode() if host else b"") + text.encode("latin-1") + end)

    def on_said(self, host: int, line: str) -> None:
        say(f"{self.names[host]}: {line.rstrip()}")

    def on_end(self, host: int, rank: int, code: int) -> None:
        self.codes[rank] = code
        if code not in (0, PREEMPTED):
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            self.fail(f"{self.names[host]} rank {rank} {how}")

    def on_gone(self, host: int, code: int) -> None:
        del self.supervisors[host]
        first = sum(h.slots for h in self.hosts[:host])
        if not self.has_started:
            self.fail(f"{self.names[host]} was not reached, or could not begin: {REACHED}")
        elif any(rank not in self.codes for rank in range(first, first + self.hosts[host].slots)):
            self.fail(f"{self.names[host]} was lost (exit code {code} of its connection)")

    def on_signal(self, host: int, number: int) -> None:
        name = signal.Signals(number).name
        if not self.has_started:
            self.fail(f"{name} came before the start")
        elif self.asked_at == math.inf:
            again = f"the same again, more than {BURST_S:g} s later, kills them"
            say(f"{name}: the ranks are asked to save and end; {again}")
            self.order_all(signal.SIGTERM)
        elif time.monotonic() - self.asked_at > BURST_S:
            self.fail(f"a second {name} killed the ranks")
            self.deadline = time.monotonic()
        self.asked_at = min(self.asked_at, time.monotonic())

    def on_deadline(self) -> None:
        if not self.has_started and not self.problem:
            silent = [name for i, name in enumerate(self.names) if i not in self.ports]
            self.fail(f"no answer within {ANSWER_S:g} s from {', '.join(silent)}: {REACHED}")
        elif self.kills == 0:
            self.order_all(signal.SIGKILL)
            self.kills, self.deadline = 1, time.monotonic() + 5
        else:  # a network that is gone, or a host that hangs
            for process in self.supervisors.values():
                process.kill()
            self.deadline = math.inf

    def fail(self, words: str) -> None:
        """Keep what failed first, and let the others end."""
        if self.problem:
            return
        self.problem, self.deadline = words, time.monotonic() + (PATIENCE_S if self.has_started else 0.0)
        if self.has_started:
            return say(f"{words}; the other ranks have {PATIENCE_S:g} s to end")
        for process in self.supervisors.values():
            with suppress(OSError):
                assert process.stdin is not None
                process.stdin.close()

    def order_all(self, number: int) -> None:
        for i in self.supervisors:
            self.send(i, str(int(number)))

    def send(self, host: int, line: str) -> None:
        pipe = self.supervisors[host].stdin
        with suppress(OSError, ValueError):  # it is gone, and listen() tells, or it was closed
            assert pipe is not None
            pipe.write(line + "\n")
            pipe.flush()


def start_supervisor(host: Host) -> subprocess.Popen[str]:
    command = [sys.executable, os.path.abspath(__file__), "--on-host"]
    if not host.is_here:
        found = {name: value for name, value in passed(os.environ).items() if name.startswith("PYTHON")}
        command = ssh_command(host, command, env=found, folder=os.getcwd())
    # in a session of its own, so that Ctrl-C reaches the launcher alone
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, **pipes, text=True, encoding="utf-8", errors="replace", start_new_session=True)


def listen(host: int, process: subprocess.Popen[str], inbox: Any) -> None:
    assert process.stdout is not None and process.stderr is not None

    def hear(stream: IO[str]) -> None:
        for line in stream:
            inbox.put((host, "said", line))

    errors = threading.Thread(target=hear, args=(process.stderr,), daemon=True)
    errors.start()
    for line in process.stdout:
        with suppress(ValueError):  # what else a login prints
            if isinstance(event := json.loads(line), list):
                inbox.put((host, *event))
    errors.join(2)  # a shared connection of ssh stays open
    inbox.put((host, "gone", process.wait()))


def newest_step(run: Path | None) -> int:
    """The step of the newest checkpoint; -1: there is none, or none that is seen from here."""
    found = [re.fullmatch(r"step_(\d+)", path.name) for path in run.glob("checkpoints/step_*")] if run else []
    return max((int(match[1]) for match in found if match), default=-1)


def run_folder(arguments: list[str]) -> Path | None:
    """The train.run of a command line CONFIG key=value ...; None: it is none, and then every restart counts."""
    try:
        return Path(load_config(arguments[0], arguments[1:]).train.run) if arguments else None
    except UserError:
        return None


def is_interrupted(inbox: queue.SimpleQueue[tuple[Any, ...]], pause_s: float) -> bool:
    """Wait; return whether the user has sent a signal. A host may still have something to say of the last start."""
    end = time.monotonic() + pause_s
    while (left := end - time.monotonic()) > 0:
        with suppress(queue.Empty):
            if inbox.get(timeout=left)[1] == "signal":
                return True
    return False


def keep_going(args: argparse.Namespace, hosts: list[Host], env: dict[str, str]) -> int:
    """Start, and start again; return the exit code."""
    inbox: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, lambda n, _: inbox.put((-1, "signal", n)))
    run, n_failed, was_started = run_folder(args.command[1:]), 0, False
    while True:
        step = newest_step(run)
        attempt = Attempt(hosts, [sys.executable, "-u", *args.command], env, inbox)
        code = attempt.run()
        was_started |= attempt.has_started
        what = attempt.problem or "a host asked for the end"
        is_final = code in (0, 2) or attempt.asked_at < math.inf or not was_started
        if is_final or (code == PREEMPTED and not args.restart_preempted):
            break
        n_failed = 1 if newest_step(run) > step else n_failed + 1
        if n_failed > args.retries:
            break
        pause = min(args.pause * 2 ** (n_failed - 1), LONGEST_PAUSE_S)
        say(f"failed: {what}; restart {n_failed} of {args.retries} in {pause:g} s")
        if is_interrupted(inbox, pause):
            break
    if attempt.problem:
        goes_on = was_started and code != 2
        say(f"failed: {attempt.problem}" + ("; the same command goes on from the last checkpoint" if goes_on else ""))
    return code


def write_deepspeed_env() -> None:
    path = Path(".deepspeed_env")
    require(not path.exists(), f"{path} is there already: remove it, or change it by hand")
    text = deepspeed_env(os.environ)
    os.umask(0o077)  # keys of buckets are in it
    write_whole(path, text)
    print(f"wrote {path} with {len(text.splitlines())} variables; `deepspeed --hostfile` sends them from this folder")


def variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    require(bool(equals and re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII)), f"--env {text}: write NAME=VALUE")
    return name, value


def main() -> None:
    if sys.argv[1:] == ["--on-host"]:
        return on_host()
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  launch/cluster.py --hostfile hosts launch/train.py configs/1b.yaml train.run=runs/1b
  launch/cluster.py --hostfile hosts --env NCCL_SOCKET_IFNAME=ib0 --retries 10 launch/train.py configs/1b.yaml
  launch/cluster.py --hostfile hosts -- tools/inject_faults.py configs/1b.yaml --n-faults 20
  launch/cluster.py --write-deepspeed-env       for deepspeed --hostfile hosts ...

A hostfile has a line `NAME slots=N` for each host, as DeepSpeed's. The first host has rank 0. Each rank runs this
Python with -u in a folder of this name, and gets the variables that a run needs (megakexue/hosts.py has the list).
The screen shows what the first host's ranks write, and of the other hosts stderr, with host and rank before each line.

The first Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP lets the ranks save and end; the next one, more than five seconds later,
kills them. If a rank fails, the others have 25 s to end. If the launcher dies, so do the ranks, and nothing else is
ever ended on a host. Exit codes: 0 all ranks are done, 75 all have saved after a signal, 2 a mistake in the command,
the config or the data, 1 anything else.

After code 1 all ranks start again, on a fresh port. Restarts are counted, and the count begins anew when the run has a
newer checkpoint than at the last start. What is never restarted: code 2, a launch that was sent a signal, and a first
start that does not reach all hosts.""",
    )
    parser.add_argument("command", nargs="*", metavar="PROGRAM", help="a Python file and its arguments")
    parser.add_argument("--hostfile", metavar="FILE", help="lines of NAME slots=N")
    parser.add_argument("--retries", type=as_integer, default=3, metavar="N", help="restarts in a row (default: 3)")
    parser.add_argument(
        "--pause", type=as_number, default=10.0, metavar="S",
        help="seconds before the first restart, doubled each time up to 600 (default: 10)",
    )  # fmt: skip
    parser.add_argument(
        "--restart-preempted", action="store_true",
        help="also restart after code 75, if the launcher itself was sent no signal, as when a host is taken away",
    )  # fmt: skip
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable for all ranks")
    parser.add_argument(
        "--write-deepspeed-env", action="store_true",
        help="write .deepspeed_env with the variables that a run needs, and end",
    )  # fmt: skip
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    args = parser.parse_intermixed_args(own)
    args.command += sys.argv[len(own) + 2 :]
    if args.write_deepspeed_env:
        return write_deepspeed_env()
    require(args.hostfile is not None and bool(args.command), "--hostfile and a program are needed: see --help")
    require(args.retries >= 0 and args.pause >= 0, "--retries and --pause must be 0 or more")
    hosts = read_hostfile(args.hostfile)
    for name in {host.address for host in hosts} & {"localhost", "127.0.0.1"}:
        require(len(hosts) == 1, f"{args.hostfile}: other hosts cannot reach {name}: write the name that they know")
    require(Path(args.command[0]).is_file(), f"there is no program {args.command[0]}: such as launch/train.py")
    sys.exit(keep_going(args, hosts, passed(os.environ) | dict(map(variable, args.env))))


if __name__ == "__main__":
    run_program(main)
