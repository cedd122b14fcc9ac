"""Ranks that share rows: outside of attention each has a part of the tokens, in attention all tokens and some heads.

This is the exchange of DeepSpeed-Ulysses (arXiv 2309.14509): before attention, what a rank has made of its tokens goes
to the ranks that have the heads; after it, the results go back. Everything else in a model looks at one token alone.

    letters as in megakexue/core/axes.py; P ranks, u = t / P tokens of a rank

What must stay true: rank i has the tokens i u to (i + 1) u - 1 of each row, and the heads i h / P to (i + 1) h / P - 1;
all ranks make the same exchanges in the same order, one message each.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """The place of this rank among those that share its rows."""

    rank: int
    size: int
    swap: Callable[[Tensor], Tensor]
    """Sends x[i] of a contiguous x [P, ...] to rank i, and returns what they have sent, in the order of ranks. Its
    gradient takes the same way back."""

    def own(self, x: Shaped[Tensor, "b t *n"]) -> Shaped[Tensor, "b u *n"]:
        """Return this rank's part of the tokens."""
        return x.unflatten(1, (self.size, -1))[:, self.rank]

    def to_heads(self, *parts: Shaped[Tensor, "b u P _"]) -> list[Shaped[Tensor, "b t _"]]:
        """Send parts[:, :, i] to rank i; return what this rank gets of each part, from all tokens."""
        message = torch.cat(parts, dim=-1).permute(2, 0, 1, 3).contiguous()
        received = self.swap(message).permute(1, 0, 2, 3).flatten(1, 2)
        return list(received.split([part.shape[-1] for part in parts], dim=-1))

    def to_tokens(self, x: Shaped[Tensor, "b t w"]) -> Shaped[Tensor, "b u P w"]:
        """Send the tokens of rank i to it; return what all ranks have made of this rank's tokens."""
        return self.swap(x.unflatten(1, (self.size, -1)).transpose(0, 1).contiguous()).permute(1, 2, 0, 3)
