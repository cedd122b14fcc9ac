"""Ranks: who am I, and the few collectives that the trainer itself calls.

A launcher sets RANK, WORLD_SIZE, LOCAL_RANK and the address of rank 0; without them this process is a world of one.
"""

import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from megakexue.config import UserError


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The place of this process: in the world, on its node, and on the axes that the world is divided by.

    Neighbouring ranks form a sequence group, whose members share rows: rank = data_rank * sequence_size +
    sequence_rank. What is counted in rows is divided among data ranks; what is counted in processes, among the world.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    """Ranks on this node."""
    sequence_size: int = 1
    """Ranks that share the same rows; there is no more than one yet."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        return self.rank // self.sequence_size

    @property
    def data_size(self) -> int:
        """Ranks that take rows of their own."""
        return self.world_size // self.sequence_size

    @property
    def sequence_rank(self) -> int:
        return self.rank % self.sequence_size


ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1)
"""The place of a program that has no launcher."""


def read_ranks() -> Ranks:
    """Read this process's place in the world from the environment of the launcher.

    Raises:
        UserError: only some of the launcher's variables are set.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    values = [os.environ.get(name) for name in names]
    if values == [None, None, None]:
        for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
            if int(os.environ.get(name, "1")) > 1:
                raise UserError(
                    f"{name}={os.environ[name]} says that several processes were started, but RANK, WORLD_SIZE and "
                    "LOCAL_RANK are not set: start with `deepspeed launch/train.py`, or set them for each process"
                )
        return ALONE
    missing = [name for name, value in zip(names, values) if value is None]
    if missing:
        raise UserError(f"the launcher set some of {names} but not {missing}: start with `deepspeed launch/train.py`")
    rank, world_size, local_rank = (int(value) for value in values if value is not None)
    # torchrun says LOCAL_WORLD_SIZE, DeepSpeed's launcher LOCAL_SIZE
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    if local is None:
        raise UserError("the launcher set neither LOCAL_WORLD_SIZE nor LOCAL_SIZE: set it to the ranks of this node")
    return Ranks(rank=rank, world_size=world_size, local_rank=local_rank, local_world_size=int(local))


def set_environment_of_one() -> bool:
    """Set the variables of a world of one, and return True, unless a launcher has set its own."""
    if "RANK" in os.environ:
        return False
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    return True


def sum_over_ranks(values: Tensor) -> Tensor:
    """Add a small tensor over all ranks, in place; every rank gets the same bits."""
    if torch_dist.is_initialized() and torch_dist.get_world_size() > 1:
        torch_dist.all_reduce(values)
    return values


def barrier() -> None:
    if torch_dist.is_initialized() and torch_dist.get_world_size() > 1:
        # an all-reduce instead of torch's barrier, which warns on NCCL when it has to guess the device; reading the
        # result makes this process wait, where NCCL alone would only make its stream wait
        device = "cuda" if torch_dist.get_backend() == "nccl" else "cpu"
        total = torch.zeros(1, device=device)
        torch_dist.all_reduce(total)
        total.item()


@cache
def host_group(user: str, timeout_s: float) -> Any:
    """Return a gloo group of all ranks for one thread alone; the first call for a `user` is a collective.

    Collectives on it do not wait for the GPU, and do not mix with those of other threads.
    """
    if torch_dist.get_world_size() == 1:
        return None
    return torch_dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))


def gather(own: dict[str, Any], group: Any = None) -> dict[str, Any]:
    """Merge a small dict of every rank, on every rank. `group`: a `host_group`; None: the one of training."""
    if not torch_dist.is_initialized() or torch_dist.get_world_size() == 1:
        return own
    parts: list[Any] = [None] * torch_dist.get_world_size()
    torch_dist.all_gather_object(parts, own, group=group)
    return {key: value for part in parts for key, value in part.items()}


def count_over_ranks(flags: list[bool], group: Any) -> list[int]:
    """Return for each flag on how many ranks it is set, on every rank."""
    counts = torch.tensor(flags, dtype=torch.int32)
    if torch_dist.get_world_size() > 1:
        torch_dist.all_reduce(counts, group=group)
    return counts.tolist()


def store() -> Any:
    """The key-value store by which the ranks have found one another: any thread may use it at any time."""
    return torch_dist.distributed_c10d._get_default_store()


def say_last(message: str, patience_s: float = 3.0) -> None:
    """Print on stderr why this rank ends. What the first rank says too, other ranks leave to it.

    No collective: ranks that do not fail may be waiting elsewhere, so this one waits for `patience_s` at most.
    """
    is_first = not torch_dist.is_initialized() or torch_dist.get_rank() == 0
    if is_first:
        print(message, file=sys.stderr, flush=True)
    elif not _first_says(message, patience_s):
        print(f"rank {torch_dist.get_rank()}: {message}", file=sys.stderr, flush=True)
    if not is_first or not torch_dist.is_initialized() or torch_dist.get_world_size() == 1:
        return
    with suppress(RuntimeError):
        store().set("megakexue/last", message)
        # the store is in this process, which stays until the others have read it
        end = time.monotonic() + patience_s
        while store().add("megakexue/read", 0) < torch_dist.get_world_size() - 1 and time.monotonic() < end:
            time.sleep(0.05)


def _first_says(message: str, patience_s: float) -> bool:
    with suppress(RuntimeError):  # the first rank has gone, or says nothing
        store().wait(["megakexue/last"], timedelta(seconds=patience_s))
        said = store().get("megakexue/last").decode()
        store().add("megakexue/read", 1)
        return said == message
    return False
