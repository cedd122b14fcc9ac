"""What the collectives return, on several ranks and alone."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from megakexue.dist import barrier, count_over_ranks, exchange, gather, host_group, read_ranks, sum_over_ranks
from tests.ranks import run_on_ranks
from tests.test_launcher import STARTED


def collectives() -> tuple[Any, ...]:
    torch.distributed.init_process_group("gloo")
    ranks = read_ranks()
    group = host_group("test", 60.0)
    assert host_group("test", 60.0) is group
    barrier()
    total = sum_over_ranks(torch.tensor([1.5, ranks.rank], dtype=torch.float64)).tolist()
    merged = gather({f"rank {ranks.rank}": ranks.rank})
    counts = count_over_ranks([True, ranks.is_first, False], group)
    n = ranks.rank + 1  # to rank i as many elements as its number, and none to the first
    found = exchange(torch.full((3,), float(n), dtype=torch.bfloat16), [0, 1, 2], [ranks.rank] * 3).tolist()
    torch.distributed.destroy_process_group()
    return total, merged, counts, found


@pytest.mark.slow
def test_every_rank_gets_the_result_of_a_collective() -> None:
    results = run_on_ranks(3, collectives)
    found = [result[-1] for result in results]
    assert found == [[], [1, 2, 3], [1, 1, 2, 2, 3, 3]]
    assert [result[:-1] for result in results] == [
        ([4.5, 3.0], {"rank 0": 0, "rank 1": 1, "rank 2": 2}, [3, 1, 0])
    ] * 3  # fmt: skip


def test_collectives_of_a_process_alone() -> None:
    barrier()
    assert gather({"a": 1}) == {"a": 1}
    assert sum_over_ranks(torch.tensor([2.0])).tolist() == [2.0]
    assert exchange(torch.tensor([2.0]), [1], [1]).tolist() == [2.0]


@pytest.mark.slow
def test_a_world_of_one_needs_no_port() -> None:
    """Two processes that look for a free port at the same moment may find the same, and one of them fails."""
    code = """
import os
from megakexue.config import EngineConfig
from megakexue.run.engine import start
from torch.distributed.distributed_c10d import _get_default_store as store

ranks = start(EngineConfig())
inner = store()
while hasattr(inner, "underlying_store"):
    inner = inner.underlying_store
print(ranks.world_size, type(inner).__name__, "MASTER_PORT" in os.environ)
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(STARTED)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["1 HashStore False"], done.stdout + done.stderr
