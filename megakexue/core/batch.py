"""A batch: rows of tokens, what each token is to predict, and where documents begin.

A row of t + 1 tokens gives t inputs and t targets. A document begins at each BOS, at the start of each row (which may
cut through a document), and at the padding that ends a row.

What must stay true: no target is a BOS or PAD; positions restart exactly where `cu_seqlens` has a boundary, so that
attention, RoPE and log n see the same documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from megakexue.config import IGNORED


@dataclass(frozen=True, kw_only=True)
class Position:
    """Sample number `sample` of epoch number `epoch`, both from 0; as a state, the next one to read."""

    epoch: int = 0
    sample: int = 0


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of one rank, on the CPU."""

    tokens: Int64[Tensor, "b u"]
    targets: Int64[Tensor, "b u"]
    """The next token; IGNORED where that is PAD, or a BOS, which no document can predict. EOS is a target, also where
    it is the same id."""
    positions: Int64[Tensor, "b t"]
    """They restart at 0 at each document, at each row, and at the padding that ends a row. Of all tokens of the rows,
    also in a `part`; else u = t."""
    cu_seqlens: Int32[Tensor, " n"]
    """The boundaries for varlen attention: where positions restart in the flattened tokens, and last b t."""
    n_targets: int
    samples: list[Position]
    """Which samples these are, row by row; `Batches.names` names their shards. One that is cut into several rows is
    there for each. Rows of padding alone have none and are the last."""
    sources: list[int] = field(default_factory=list)
    """Of which source each row is, by number, as `samples`. Empty: not known."""

    @property
    def boundaries(self) -> Int32[Tensor, " n"] | None:
        """`cu_seqlens`, or None where each row is one document: then plain causal attention gives the same result, and
        its kernels are cheaper."""
        return None if len(self.cu_seqlens) == len(self.tokens) + 1 else self.cu_seqlens

    def part(self, rank: int, size: int) -> "Batch":
        """Return these rows with the tokens and targets of one of `size` ranks that share them."""
        if size == 1:
            return self
        tokens, targets = (x.chunk(size, dim=1)[rank].contiguous() for x in (self.tokens, self.targets))
        return replace(self, tokens=tokens, targets=targets, n_targets=int((targets != IGNORED).sum()))


def make_batch(
    rows: Int64[np.ndarray, "b t1"], samples: list[Position], *, bos_id: int, pad_id: int, eos_id: int | None = None,
    sources: Sequence[int] = (),
) -> Batch:  # fmt: skip
    """Return rows of t1 = t + 1 tokens as inputs and targets, with the documents in them.

    Args:
        samples, sources: of the first rows; the rows after them hold PAD alone.
        eos_id: matters where it is BOS or PAD too (megakexue/text/pack.py). Then it is EOS after a token of a text,
            and so a target.
    """
    tokens, following = rows[:, :-1], rows[:, 1:]
    b, t = tokens.shape
    is_ignored = (following == pad_id) | (following == bos_id)
    if eos_id in (bos_id, pad_id):
        is_ignored &= (following != eos_id) | (tokens == eos_id) | (tokens == pad_id)
    targets = np.where(is_ignored, IGNORED, following)
    is_start = tokens == bos_id
    if eos_id == bos_id:
        is_start[:, 1:] &= is_start[:, :-1]
    is_start[:, 1:] |= (tokens[:, 1:] == pad_id) & (tokens[:, :-1] != pad_id)
    is_start[:, 0] = True
    column = np.arange(t)
    positions = column - np.maximum.accumulate(np.where(is_start, column, 0), axis=1)
    cu_seqlens = np.append(np.flatnonzero(is_start), b * t).astype(np.int32)
    return Batch(
        tokens=torch.from_numpy(np.ascontiguousarray(tokens)),
        targets=torch.from_numpy(targets),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        n_targets=int((targets != IGNORED).sum()),
        samples=samples,
        sources=list(sources),
    )
