"""Losses by source, and bits per byte: sums over rows of the losses that a step or a validation has anyway.

    nats per token   loss / tokens             of the target tokens
    bits per byte    loss / (ln 2 bytes)       of the bytes that these tokens stand for

Bits per byte do not depend on the tokenizer. A mark such as EOS stands for no byte, and what its prediction costs
counts; a byte piece stands for one. The space that some tokenizers of others put before a document counts.

What must stay true: no second forward pass, no wait for the device and no message but in `add_up`, which is called for
the steps that are recorded.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from megakexue import dist
from megakexue.config import IGNORED
from megakexue.run.records import SourceLoss


class RowLosses(NamedTuple):
    """Of one micro-batch of this rank."""

    sources: list[int]
    """Of each row, by number; rows of padding alone have none and are the last."""
    targets: Int64[Tensor, "b u"]
    """On the CPU."""
    losses: Float64[Tensor, " b"]
    """The summed cross-entropy of each row, on the device."""


def name_sources(paths: list[str]) -> list[str]:
    """Return a short name for each source: the last part of its path, or the path where two have the same."""
    names = [Path(path).name for path in paths]
    return [path if names.count(name) > 1 else name for name, path in zip(names, paths)]


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


def bits_per_byte(loss: float, n_bytes: float) -> float:
    """`loss`: the sum, in nats. nan where there are no bytes."""
    return loss / math.log(2) / n_bytes if n_bytes else math.nan
