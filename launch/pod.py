#!/usr/bin/env python
"""Start the ranks of one of several nodes, and end with one exit code: what a pod of launch/kubernetes.yaml runs.

Its place among the nodes is JOB_COMPLETION_INDEX, which an indexed Job sets.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megakexue.config import PREEMPTED, as_integer, require, run_program

PATIENCE_S = 60.0
"""Which ranks have to end by themselves when one has ended."""


def start_rank(command: list[str], rank: int, world_size: int, local_size: int) -> subprocess.Popen[bytes]:
    place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank % local_size, "LOCAL_SIZE": local_size}
    variables = os.environ | {name: str(number) for name, number in place.items()}
    return subprocess.Popen([sys.executable, "-u", *command], env=variables)


def wait_for(ranks: list[subprocess.Popen[bytes]], signals: list[int]) -> int:
    """Pass signals on until all ranks have ended; return 0 or 75 if all say so, 2 if one does, otherwise 1."""
    deadline = None
    while any(rank.poll() is None for rank in ranks):
        if deadline is None and any(rank.returncode is not None for rank in ranks):
            deadline = time.monotonic() + PATIENCE_S
        is_late = deadline is not None and time.monotonic() > deadline
        for number in [signal.SIGKILL] if is_late else [signals.pop() for _ in signals]:
            for rank in ranks:
                rank.send_signal(number)
        time.sleep(0.2)
    # whom SIGTERM has ended was not ready for it, and had nothing to save
    codes = {PREEMPTED if rank.returncode == -signal.SIGTERM else rank.returncode for rank in ranks}
    return codes.pop() if codes in ({0}, {PREEMPTED}) else 2 if 2 in codes else 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""example:
  JOB_COMPLETION_INDEX=0 launch/pod.py --nodes 2 --ranks 8 launch/train.py configs/1b.yaml train.run=runs/1b

MASTER_ADDR and MASTER_PORT say where rank 0 is. SIGTERM, which Kubernetes sends to this process alone, is passed on to
the ranks, which save and end. Exit codes: 0 or 75 (saved after a signal) if all ranks of the node say so, 2 (a mistake
in the command, the config or the data) if any does, 1 otherwise. torchrun would make 1 of each that is not 0.""",
    )
    parser.add_argument("command", nargs="+", metavar="PROGRAM", help="a Python file and its arguments")
    parser.add_argument("--nodes", type=as_integer, required=True, metavar="N", help="of the job, all alike")
    parser.add_argument("--ranks", type=as_integer, required=True, metavar="N", help="of each node, one a GPU")
    args = parser.parse_intermixed_args()
    require(args.nodes > 0 and args.ranks > 0, "--nodes and --ranks must be 1 or more")
    index = os.environ.get("JOB_COMPLETION_INDEX", "")
    require(
        index.isdecimal() and int(index) < args.nodes,
        f"JOB_COMPLETION_INDEX={index} must be a whole number from 0 to {args.nodes - 1}: an indexed Job sets it",
    )
    require(Path(args.command[0]).is_file(), f"there is no program {args.command[0]}: such as launch/train.py")
    signals: list[int] = []
    # before anything starts, since a signal that the first process of a container does not expect is lost
    signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    first, world_size = int(index) * args.ranks, args.nodes * args.ranks
    ranks = [start_rank(args.command, first + i, world_size, args.ranks) for i in range(args.ranks)]
    sys.exit(wait_for(ranks, signals))


if __name__ == "__main__":
    run_program(main)
