"""Run a function on N real processes joined by gloo: get back what each returned, or have them to kill.

A rank is a fork of a server that has imported torch, DeepSpeed and the trainer once, since importing takes some eight
seconds. What must stay true: the imports start no thread and touch no device, for a fork would copy them in pieces. A
rank has the environment, the folder, stdout and stderr that its caller has at the time. But what libraries read on
import they have read in the server, all ranks have its hash seed, and no atexit handler runs at a rank's end.
"""

import faulthandler
import itertools
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

FIXED = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    # what /proc/cpuinfo says of the CPU is enough: torch would compile a trial for each of its extensions, for half a
    # minute in each empty cache
    "TORCHINDUCTOR_VEC_ISA_OK": "1",
}
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "hypothesis",
        "torch._inductor.compile_fx",
        "deepspeed",
        "streaming.base.stream",
        "megakexue.run.train",
        "megakexue.text.prepare",
    ]
)


PORTS = itertools.cycle(range(first := 10_000 + 100 * (os.getpid() % 200), first + 100))


def free_port() -> int:
    """A port that is free, and stays so until it is used.

    The kernel gives ports from 32768 on to whoever asks for any; below them each pytest process has a hundred.
    """
    while True:
        with suppress(OSError), socket.socket() as s:
            s.bind(("127.0.0.1", next(PORTS)))
            return s.getsockname()[1]


def _rank(environment: dict[str, str], outputs: list[Connection], function: Callable, args: tuple) -> None:
    assert len(os.listdir(f"/proc/{os.getppid()}/task")) == 1, "the server was forked while it had threads"
    os.environ.clear()
    os.environ.update(environment)
    for number, output in enumerate(outputs, start=1):
        os.dup2(output.fileno(), number)
    faulthandler.dump_traceback_later(500)  # where it hangs, before the caller loses patience
    import torch

    torch.set_num_threads(1)
    function(*args)


def start_on_ranks(n: int, function: Callable, *args: Any) -> list[BaseProcess]:
    """Start `function(*args)` in `n` processes at once, for the caller to join or to kill.

    The function must be importable (a module's top level). A rank that raises prints its traceback and ends with exit
    code 1; one that is killed by a signal has its negative number as exit code.
    """
    with mock.patch.dict(os.environ, FIXED | {"PYTHONPATH": os.pathsep.join(sys.path)}):
        forkserver.ensure_running()
    shared = os.environ | FIXED | {
        "WORLD_SIZE": str(n), "LOCAL_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    # the server has the stdout of the test that was the first to need it; a connection is what hands files on
    outputs = [Connection(os.dup(number), readable=False) for number in (1, 2)]
    processes: list[BaseProcess] = []
    for rank in range(n):
        environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(CONTEXT.Process(target=_rank, args=(environment, outputs, function, args)))
        processes[-1].start()
        if rank == 0 and n > 1:
            time.sleep(0.1)  # others that find no store on rank 0 try again half a second later
    return processes


def _write_result(folder: Path, function: Callable, args: tuple) -> None:
    path = folder / os.environ["RANK"]
    try:
        path.write_bytes(pickle.dumps(function(*args)))
    except BaseException:
        path.with_suffix(".error").write_text(traceback.format_exc())
        raise


def run_on_ranks(n: int, function: Callable, *args: Any, timeout_s: float = 540) -> list[Any]:
    """Call `function(*args)` in `n` processes at once; return the results in the order of ranks.

    The function must be importable (a module's top level), and what it returns must pickle. The first failure of any
    rank raises here with its traceback, and ends the others.
    """
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / str(rank) for rank in range(n)]
        deadline = time.monotonic() + timeout_s
        processes = start_on_ranks(n, _write_result, Path(folder), function, args)
        running = dict(enumerate(processes))
        try:
            while running:
                ended = wait([process.sentinel for process in running.values()], deadline - time.monotonic())
                assert ended, f"ranks {sorted(running)} of {n} have not ended after {timeout_s} s"
                for rank, code in [(rank, process.exitcode) for rank, process in running.items()]:
                    if code is not None:
                        del running[rank]
                        error = paths[rank].with_suffix(".error")
                        reason = error.read_text() if error.exists() else f"exit code {code}"
                        assert code == 0, f"rank {rank} of {n} failed:\n{reason}"
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [pickle.loads(path.read_bytes()) for path in paths]
