"""Run a function on N real processes joined by gloo, and get back what each returned."""

import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _child(function: Callable, rank: int, n: int, port: int, args: tuple, results: Any) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    import torch

    torch.set_num_threads(1)
    try:
        # plain pickle: the queue's own would share tensors' memory, which ends with this process
        results.put((rank, True, pickle.dumps(function(*args))))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))


def run_on_ranks(n: int, function: Callable, *args: Any, timeout_s: float = 540) -> list[Any]:
    """Call `function(*args)` in `n` processes at once; return the results in the order of ranks.

    The function must be importable (a module's top level), and what it returns must pickle. The first failure of any
    rank raises here with its traceback, and ends the others.
    """
    context = get_context("spawn")
    results, port = context.Queue(), free_port()
    processes = [context.Process(target=_child, args=(function, r, n, port, args, results)) for r in range(n)]
    for process in processes:
        process.start()
    values: dict[int, Any] = {}
    try:
        for _ in range(n):
            rank, ok, value = results.get(timeout=timeout_s)
            assert ok, f"rank {rank} of {n} failed:\n{value}"
            values[rank] = pickle.loads(value)
    finally:
        for process in processes:
            process.join(20 if len(values) == n else 0)
            process.kill()
    return [values[rank] for rank in range(n)]
