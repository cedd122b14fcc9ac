"""Muon's direction: the momentum of a whole matrix made orthogonal, wherever ZeRO keeps its elements.

    M <- beta M + (1 - beta) G              the momentum, elementwise on each rank's segments
    D  = beta M + (1 - beta) G              Nesterov
    O  = U V^T approximately, D = U S V^T   Newton-Schulz on the rank that owns the matrix
    W <- W - lr (0.2 sqrt(max(rows, columns)) O + decay W)

Newton-Schulz is that of Keller Jordan (kellerjordan.github.io/posts/muon): five times X <- a X + (b A + c A^2) X with
A = X X^T, from X = D / |D|. It takes singular values from 1/650 of |D| on to between 0.68 and 1.21, and smaller ones
part of the way. An orthogonal matrix has an RMS of 1 / sqrt(max(rows, columns)), so with the factor of Moonlight (arXiv
2502.16982; 10739) the update has an RMS of about 0.2, as AdamW's has, and AdamW's learning rates and decay carry over.
10592 is on why.

A matrix goes to its owner and back in two exchanges of all ranks, in rounds whose messages are bounded. At stage 0 the
owner has it already, and the results alone are sent.

What must stay true: an owner iterates on the whole matrix, in a tensor of its own, one matrix at a time. So the bits of
a result depend on the matrix and the device alone, and not on the owner, the cuts, or what else is in the message. On a
CPU the device includes the number of threads, as for every matrix product: set OMP_NUM_THREADS to compare runs.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from megakexue.core.owners import ITERATIONS, assign_owners

COEFFICIENTS = 3.4445, -4.7750, 2.0315
RMS = 0.2
"""Of an update at a rate of 1: what AdamW's usually has (Moonlight)."""
TINY = 1e-30
"""The least norm that a matrix is divided by: one of zeros stays so. Relative to gradients it is nothing, as Muon's
direction does not depend on their scale."""


def newton_schulz(x: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """Return a matrix with the singular vectors of x and singular values near 1, in its dtype."""
    a, b, c = COEFFICIENTS
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = x / torch.linalg.vector_norm(x, dtype=torch.float64).clamp(min=TINY).to(x.dtype)
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def update_scale(shape: tuple[int, ...]) -> float:
    """Return 0.2 sqrt(max(rows, columns)), which gives an orthogonal matrix of this shape an RMS of 0.2."""
    return RMS * max(shape) ** 0.5


Swap = Callable[[Tensor, list[int], list[int]], Tensor]
"""Sends a flat message, whose elements for each rank are counted in the first list and follow one another, and returns
what all ranks have sent to this one, in the order of ranks, counted in the second list."""


@dataclass(frozen=True, kw_only=True)
class Matrices:
    """Where all ranks keep the elements of the matrices that Muon moves, and how they come together.

    All but `rank` is the same on all ranks.
    """

    rank: int
    shapes: dict[str, tuple[int, ...]]
    held: Int64[Tensor, "matrices ranks 2"]
    """From which element of a matrix to which a rank holds it: its segment, on the host."""
    swap: Swap
    limit: int
    """Elements of a message, as far as matrices are smaller."""

    @classmethod
    def of_one_rank(cls, shapes: dict[str, tuple[int, ...]]) -> "Matrices":
        """Return those of a rank that has everything and nobody to exchange with."""
        held = torch.tensor([[[0, rows * columns]] for rows, columns in shapes.values()]).view(-1, 1, 2)
        return cls(rank=0, shapes=shapes, held=held, swap=lambda message, *_: message, limit=2**20)

    @cached_property
    def owners(self) -> dict[str, int]:
        return assign_owners(self.shapes, self.held.shape[1])

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.shapes)}

    @cached_property
    def rounds(self) -> list[list[str]]:
        """Names of the matrices that are exchanged at a time, the largest first.

        No rank sends or gets more than `limit` elements in a round, unless for one matrix.
        """
        rounds: list[list[str]] = []
        loads = torch.zeros(2, self.held.shape[1], dtype=torch.long)  # of holders, and of owners
        for name, owner in self.owners.items():
            start, stop = self.held[self._index[name]].unbind(-1)
            more = torch.stack([stop - start, torch.zeros_like(start)])
            more[1, owner] = more[0].sum()
            loads += more
            if not rounds or int(loads.max()) > self.limit:
                rounds.append([])
                loads = more
            rounds[-1].append(name)
        return rounds

    def _lengths(self, names: list[str]) -> tuple[Int64[Tensor, "n ranks"], Int64[Tensor, "n ranks"]]:
        """Return how many elements each rank sends to the owner of each matrix, and how many it gets back."""
        start, stop = self.held[[self._index[name] for name in names]].unbind(-1)
        back = stop - start
        owner = torch.tensor([self.owners[name] for name in names])[:, None]
        whole = torch.tensor([self.shapes[name][0] * self.shapes[name][1] for name in names])[:, None]
        others = torch.arange(back.shape[1]) != owner
        return back.where(~(others & (back.gather(1, owner) == whole)), 0), back

    def orthogonalise(
        self, take: Callable[[str], Tensor], give: Callable[[str, Tensor], None], *, dtype: torch.dtype,
        device: torch.device, left_out: Collection[str] = (),
    ) -> None:  # fmt: skip
        """Make every matrix orthogonal; a collective.

        Args:
            take: gives this rank's segment of a matrix, flat; is called once for each of which there is one.
            give: gets the same elements of the result, flat.
            dtype: of messages and iterations.
            left_out: matrices that are not taken, the same on all ranks.
        """
        for names in self.rounds:
            # a message has the order of ranks, and for each rank that of this list
            names = sorted((name for name in names if name not in left_out), key=lambda name: self.owners[name])
            if names:
                self._exchange(names, take, give, dtype, device)

    def _exchange(
        self, names: list[str], take: Callable[[str], Tensor], give: Callable[[str, Tensor], None], dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        there, back = self._lengths(names)
        owner = torch.tensor([self.owners[name] for name in names])
        is_own = owner == self.rank
        own = [name for name, mine in zip(names, is_own) if mine]
        message = torch.empty(int(there[:, self.rank].sum()), dtype=dtype, device=device)
        at = 0
        for name, n, n_held in zip(names, there[:, self.rank].tolist(), back[:, self.rank].tolist()):
            if n_held:
                part = take(name)  # moves the momentum, also where nothing is sent
                message[at : at + n] = part[:n]
            at += n
        to_owners, to_holders = _by_rank(there[:, self.rank], owner, back.shape[1]), back[is_own].sum(0).tolist()
        message = self.swap(message, to_owners, there[is_own].sum(0).tolist())
        message = self._iterate(own, message, there[is_own], back[is_own])
        message = self.swap(message, to_holders, _by_rank(back[:, self.rank], owner, back.shape[1]))
        for name, part in zip(names, message.split(back[:, self.rank].tolist())):
            if len(part):
                give(name, part)

    def _iterate(self, own: list[str], message: Tensor, there: Tensor, back: Tensor) -> Tensor:
        """Return the message to the holders of this rank's matrices, made from what they have sent."""
        received = list(zip(*(run.split(n.tolist()) for run, n in zip(message.split(there.sum(0).tolist()), there.T))))
        answer = message.new_empty(int(back.sum()))
        places = list(zip(*(run.split(n.tolist()) for run, n in zip(answer.split(back.sum(0).tolist()), back.T))))
        for name, parts, of_holders in zip(own, received, places):
            spans = self.held[self._index[name]].tolist()
            whole = message.new_empty(self.shapes[name])
            for part, (start, _) in zip(parts, spans):
                whole.view(-1)[start : start + len(part)] = part
            result = newton_schulz(whole).reshape(-1)
            for place, (start, stop) in zip(of_holders, spans):
                place.copy_(result[start:stop])
        return answer


def _by_rank(lengths: Tensor, owner: Tensor, n_ranks: int) -> list[int]:
    return torch.zeros(n_ranks, dtype=torch.long).index_add_(0, owner, lengths).tolist()
