"""Losses by source, and bits per byte: sums over rows of the losses that a step or a validation has anyway.

    nats per token   loss / tokens             of the target tokens
    bits per byte    loss / (ln 2 bytes)       of the bytes that these tokens stand for

Bits per byte do not depend on the tokenizer. A mark such as EOS stands for no byte, and what its prediction costs
counts; a byte piece stands for one. The space that some tokenizers of others put before a document counts.

What must stay true: no second forward pass, no wait for the device and no message but in `add_up`, which is called for
the steps that are recorded.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from megakexue import dist
from megakexue.config import IGNORED
from megakexue.core.batch import Batch
from megakexue.dist import Ranks
from megakexue.run.records import SourceLoss


class RowLosses(NamedTuple):
    """Of one micro-batch of this rank."""

    sources: list[int]
    """Of each row, by number; rows of padding alone have none and are the last."""
    targets: Int64[Tensor, "b u"]
    """On the CPU."""
    losses: Float64[Tensor, " b"]
    """The summed cross-entropy of each row, on the device."""


def add_up(
    rows: list[RowLosses], names: list[str], n_bytes: npt.NDArray[np.int64]
) -> tuple[float, dict[str, SourceLoss]]:
    """Add up the rows of all ranks, a collective: return bits per byte of all, and the losses of each source.

    Args:
        names: of the sources, by number; one that had no target is left out.
        n_bytes: that each token id stands for.
    """
    sums = torch.zeros(len(names), 3, dtype=torch.float64)
    for sources, targets, losses in rows:
        n = len(sources)
        is_target = targets[:n] != IGNORED
        of_bytes = torch.from_numpy(n_bytes)[targets[:n].where(is_target, 0)] * is_target
        columns = losses[:n].cpu(), is_target.sum(1).double(), of_bytes.sum(1).double()
        sums.index_add_(0, torch.tensor(sources, dtype=torch.int64), torch.stack(columns, dim=1))
    device = rows[0].losses.device
    totals = dist.sum_over_ranks(sums.to(device)).tolist()
    losses_by_source = {
        name: SourceLoss(loss=loss / n, n_tokens=int(n), bits_per_byte=bits_per_byte(loss, size))
        for name, (loss, n, size) in zip(names, totals, strict=True)
        if n
    }
    loss, _, size = map(sum, zip(*totals))
    return bits_per_byte(loss, size), losses_by_source


class Tally:
    """Counts what the steps of a start read: rows and target tokens by source."""

    def __init__(self, n_sources: int, seq_len: int, ranks: Ranks) -> None:
        self._counts = torch.zeros(n_sources, 2, dtype=torch.float64)
        self._seq_len, self._is_counting = seq_len, ranks.sequence_rank == 0
        """Ranks that share rows are given the same ones: the first of them counts."""

    def add(self, batches: list[Batch]) -> None:
        """Count the micro-batches of a step of this rank."""
        for batch in batches if self._is_counting else []:
            n = len(batch.sources)
            targets = batch.targets[:n]
            lengths = torch.full((n,), targets.shape[1], dtype=torch.float64)  # a stage may cut the rows
            counts = torch.stack([lengths, (targets != IGNORED).sum(1).double()], dim=1)
            self._counts.index_add_(0, torch.tensor(batch.sources), counts)

    def over_ranks(self, device: torch.device) -> list[tuple[int, int]]:
        """Return rows and tokens of each source, over all ranks and all steps of this start: a collective."""
        counts = dist.sum_over_ranks(self._counts.to(device, copy=True)).tolist()
        return [(int(length) // self._seq_len, int(tokens)) for length, tokens in counts]


def bits_per_byte(loss: float, n_bytes: float) -> float:
    """`loss`: the sum, in nats. nan where there are no bytes."""
    return loss / math.log(2) / n_bytes if n_bytes else math.nan
