"""The entropy of attention and the largest logits, observed in the forward pass of one micro-batch.

    s_j = scale q . k_j      p = softmax(s)      H = -sum_j p_j ln p_j = logsumexp(s) - sum_j p_j s_j

over the n keys that a query sees, in nats. H is 0 where a query looks at one key, and ln n where it looks at all alike:
then H / ln n is 1 (8823, 9593).

What must stay true: nothing that the forward pass computes is changed, and no number is waited for. The formula is
computed in float32 or better, whatever the backend, for some queries: up to N_QUERIES of the first N_ROWS rows, evenly
spread over the tokens that have a target. In rows of up to N_QUERIES / N_ROWS tokens these are all.
"""

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from megakexue.config import IGNORED

N_ROWS = 4
N_QUERIES = 1024
N_OUTPUTS = 128
"""Tokens whose output logits are looked at."""
CHUNK = 64
"""Queries of a row at a time, at most."""
MAX_ELEMENTS = 2**25
"""Of the keys and what is made of scores that exist at a time, in float32: 128 MiB, or the keys of one head."""
N_COPIES = 4
"""Tensors of the size of the scores that exist at a time."""


class Observer:
    """Is shown what one forward pass makes, as long as it `is_open`, layer by layer.

    Args:
        targets: of the whole rows, on the CPU.
        own_targets: of the tokens of this rank, where ranks share the rows; else the same.
        device: of the model.
    """

    def __init__(
        self, targets: Int64[Tensor, "b t"], own_targets: Int64[Tensor, "b u"], device: torch.device
    ) -> None:  # fmt: skip
        self.is_open = True
        rows = targets[:N_ROWS]
        self._queries = [_thinned(row, N_QUERIES // len(rows)).to(device) for row in rows]
        self._outputs = _thinned(own_targets.flatten(), N_OUTPUTS).to(device)
        self._sums: list[Float64[Tensor, " n"]] = []
        self._largest: list[Float64[Tensor, ""]] = []

    @torch.no_grad()
    def see_attention(
        self, q: Float[Tensor, "b t h d"], k: Float[Tensor, "b t g d"], positions: Int64[Tensor, "b t"], scale: float
    ) -> None:  # fmt: skip
        """Take note of a layer. Query head i reads key head i // (h / g); positions restart at each document."""
        if not self.is_open:
            return
        dtype = torch.promote_types(q.dtype, torch.float32)
        (t, g, d), repeats = k.shape[1:], q.shape[2] // k.shape[2]
        n_queries = min(CHUNK, max(1, (MAX_ELEMENTS // t - d) // (N_COPIES * repeats)))
        n_groups = max(1, MAX_ELEMENTS // (t * (d + N_COPIES * repeats * n_queries)))
        sums, largest = [], []
        for row, queries in enumerate(self._queries):
            for low in range(0, g, n_groups):
                keys = k[row, :, low : low + n_groups].to(dtype)
                heads = slice(low * repeats, (low + n_groups) * repeats)
                for own in queries.split(n_queries) if len(queries) else ():
                    of_queries = q[row, own, heads].to(dtype).unflatten(1, (-1, repeats))
                    scores = torch.einsum("tgrd,sgd->grts", of_queries, keys) * scale
                    found, top = _of_scores(scores, own, positions[row, own])
                    sums.append(found)
                    largest.append(top)
        self._sums.append(torch.stack(sums).sum(0) if sums else q.new_zeros(4, dtype=torch.float64))
        self._largest.append(_largest(largest, q))

    @torch.no_grad()
    def see_output(self, hidden: Float[Tensor, "n m"], weight: Float[Tensor, "v m"], scale: float) -> None:
        """Take note of the logits: scale * hidden weight^T, of all tokens of this rank."""
        if self.is_open:
            parts = [hidden[own] @ weight.mT for own in self._outputs.split(CHUNK) if len(own)]
            self._largest.append(_largest([part.max().double() * scale for part in parts], hidden))

    def sums(self) -> Float64[Tensor, "l 4"]:
        """For each layer, to be added over ranks: the sum of H, the number of pairs of a query and a head, the sum of
        H / ln n where n > 1, and the number of these."""
        return torch.stack(self._sums)

    def largest(self) -> Float64[Tensor, " l1"]:
        """The largest logit of attention of each layer, and of the output; -inf where this rank saw none."""
        return torch.stack(self._largest)


def _thinned(targets: Int64[Tensor, " t"], n: int) -> Int64[Tensor, " q"]:
    """Return the indices of up to n tokens with a target, evenly spread."""
    found = (targets != IGNORED).nonzero()[:, 0]
    return found if len(found) <= n else found[torch.linspace(0, len(found) - 1, n).round().long()]


def _of_scores(
    scores: Float[Tensor, "g r t s"], queries: Int64[Tensor, " t"], positions: Int64[Tensor, " t"]
) -> tuple[Float64[Tensor, " n"], Float64[Tensor, ""]]:
    """Return the four sums of some queries, and their largest logit. All logits are given, those unseen too."""
    key = torch.arange(scores.shape[-1], device=scores.device)
    is_hidden = (key > queries[:, None]) | (key < (queries - positions)[:, None])
    normalizer = scores.masked_fill(is_hidden, -torch.inf).logsumexp(-1, keepdim=True)
    logits = scores.masked_fill(is_hidden, 0.0)
    probabilities = (scores - normalizer).exp().masked_fill(is_hidden, 0.0)
    entropy = (normalizer[..., 0] - (probabilities * logits).sum(-1)).double()
    # of one key: nothing to be compared with
    relative = torch.where(positions > 0, entropy / positions.add(1).double().log(), 0.0)
    n_heads = entropy[..., 0].numel()
    n, n_relative = torch.full_like(positions, n_heads).sum(), (positions > 0).sum() * n_heads
    sums = torch.stack([entropy.sum(), n.double(), relative.sum(), n_relative.double()])
    return sums, scores.masked_fill(is_hidden, -torch.inf).max().double()


def _largest(found: list[Float64[Tensor, ""]], like: Tensor) -> Float64[Tensor, ""]:
    return torch.stack(found).max() if found else like.new_full((), -torch.inf, dtype=torch.float64)
