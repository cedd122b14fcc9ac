"""Which rank makes which matrix orthogonal, for Muon. Plain numbers, without torch, so that a plan can ask too.

Newton-Schulz wants a matrix whole, and ZeRO cuts it among ranks. So each matrix has an owner.

What must stay true: the answer depends on the shapes and the number of ranks alone, so that all ranks have the same.
"""

import heapq
import math

ITERATIONS = 5


def newton_schulz_flops(shape: tuple[int, ...]) -> int:
    """Return the FLOPs of a matrix: in each iteration X X^T, A A and B X, where X has the fewer rows."""
    few, many = sorted(shape)
    return ITERATIONS * (4 * few * few * many + 2 * few**3)


def assign_owners(shapes: dict[str, tuple[int, ...]], n_ranks: int) -> dict[str, int]:
    """Return the owner of each matrix, by name in the order of their costs, the largest first.

    Each goes to the rank that has the least to do so far; among equals to the first. A cost is rows * columns *
    min(rows, columns).
    """
    costs = {name: math.prod(shape) * min(shape) for name, shape in shapes.items()}
    loads = [(0, rank) for rank in range(n_ranks)]
    owners = {}
    for name in sorted(costs, key=lambda name: -costs[name]):  # the sort is stable
        load, rank = loads[0]
        owners[name] = rank
        heapq.heapreplace(loads, (load + costs[name], rank))
    return owners


def largest_flops(shapes: dict[str, tuple[int, ...]], n_ranks: int) -> int:
    """Return the Newton-Schulz FLOPs of a step on the rank that has most of them."""
    totals = [0] * n_ranks
    for name, rank in assign_owners(shapes, n_ranks).items():
        totals[rank] += newton_schulz_flops(shapes[name])
    return max(totals)
