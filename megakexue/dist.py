"""The few collectives that the trainer itself calls, and the place of this process among the ranks."""

from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from megakexue.launcher import ALONE, Ranks, read_environment, read_ranks

__all__ = [
    "ALONE", "Ranks", "barrier", "count_over_ranks", "exchange", "gather", "host_group", "max_over_ranks",
    "read_environment",
    "read_ranks", "sequence_swap", "store", "sum_over_ranks",
]  # fmt: skip


def sum_over_ranks(values: Tensor) -> Tensor:
    """Add a small tensor over all ranks, in place; every rank gets the same bits."""
    if torch_dist.is_initialized() and torch_dist.get_world_size() > 1:
        torch_dist.all_reduce(values)
    return values


def max_over_ranks(values: Tensor) -> Tensor:
    """Take the largest of all ranks, in place."""
    if torch_dist.is_initialized() and torch_dist.get_world_size() > 1:
        torch_dist.all_reduce(values, op=torch_dist.ReduceOp.MAX)
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


class _Swap(torch.autograd.Function):
    """Send x[i] to rank i of a group, and get what they send to this one; the gradient takes the same way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group, received = group, torch.empty_like(x)
        torch_dist.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Swap.apply(gradient.contiguous(), ctx.group), None


def sequence_swap(ranks: Ranks, timeout_s: float) -> Callable[[Tensor], Tensor]:
    """Make the groups of ranks that share rows, a collective; return the exchange in this rank's own."""
    timeout = timedelta(seconds=timeout_s)
    group, _ = torch_dist.new_subgroups(ranks.sequence_size, timeout=timeout)
    return lambda x: _Swap.apply(x, group)


def exchange(message: Tensor, sent: list[int], received: list[int]) -> Tensor:
    """Send the parts of a flat message to the ranks, and return what they have sent to this one, in their order.

    Args:
        sent, received: elements for each rank, and from each.
    """
    if not torch_dist.is_initialized() or torch_dist.get_world_size() == 1:
        return message
    answer = message.new_empty(sum(received))
    torch_dist.all_to_all_single(answer, message, received, sent)
    return answer


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
