"""The proof of a growth: both models compute the logits of the same tokens while the weights are made.

One part of a model is in memory at a time, so that a proof needs no more memory than the growth itself. float64 judges
the maps, before anything is rounded; float32 judges the weights as they are written and trained on.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from megakexue.bundle.grow import Growth, Read, row_chunks
from megakexue.config import IGNORED, ResolvedModel
from megakexue.core.attention import Layout
from megakexue.core.axes import parameter_names
from megakexue.core.batch import Batch
from megakexue.core.decoder import Block, Norm
from megakexue.core.rope import RotaryTables

NO_EPS = 1e-30
"""A norm_eps that is not felt, and still keeps a row of zeros from being divided by zero."""


class Trace:
    """The forward pass of a decoder of which one part at a time is in memory."""

    def __init__(self, config: ResolvedModel, batch: Batch, dtype: torch.dtype) -> None:
        self.config, self.dtype, self._tokens = config, dtype, batch.tokens
        self._rotary = RotaryTables(config)(batch.positions, batch.tokens.shape[1])
        self._layout = Layout(batch.positions, batch.cu_seqlens, backend="reference", dtype=dtype)
        self._x = torch.full((*batch.tokens.shape, config.d_model), math.nan, dtype=dtype)
        self._n_embedded = 0
        self._logits: list[Tensor] = []

    def embed(self, rows: Float[Tensor, "rows m"]) -> None:
        """Take the next rows of the embedding."""
        place = self._tokens - self._n_embedded
        here = (place >= 0) & (place < len(rows))
        self._x[here] = rows[place[here]].to(self.dtype) * self.config.embed_scale
        self._n_embedded += len(rows)

    @torch.no_grad()
    def block(self, weights: dict[str, Tensor]) -> None:
        """Go through the next block, whose parameters have names such as attention.wq."""
        with torch.device("meta"):
            block = Block(self.config)
        block.load_state_dict({name: w.to(self.dtype) for name, w in weights.items()}, assign=True)
        self._x = block(self._x, self._rotary, self._layout, None)

    @torch.no_grad()
    def norm(self, gain: Float[Tensor, " m"]) -> None:
        """Go through the norm before the head."""
        norm = Norm(len(gain), self.config.norm_eps)
        norm.gain = torch.nn.Parameter(gain.to(self.dtype))
        self._x = norm(self._x)

    def head(self, rows: Float[Tensor, "rows m"]) -> None:
        """Take the next rows of the head."""
        self._logits.append(functional.linear(self._x.flatten(0, 1), rows.to(self.dtype)) * self.config.logit_scale)

    @property
    def logits(self) -> Float[Tensor, "tokens v"]:
        return torch.cat(self._logits, dim=1)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far the logits of the grown model are from those of the old one, on the same tokens, in one precision."""

    dtype: str
    norm_eps: float
    """That both were computed with."""
    largest: float
    """Over all tokens and the old vocabulary."""
    deviation: float
    """Of the old model's logits, the unit of the bound."""
    bound: float
    losses: tuple[float, float]
    """Mean cross-entropy of the next tokens in nats, of the old model and of the grown one."""

    @property
    def is_small(self) -> bool:
        return self.largest <= self.bound  # NaN is not


def grown_weights(
    growth: Growth, read: Read, batch: Batch, report: Callable[[list[Difference]], None]
) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter of the grown model, float32, and compare its function with the old one's on the way.

    float64 judges the maps, without norm_eps where that is felt, to 1e-11; float32 the weights as they are yielded, to
    1e-4 of the logits' deviation, or 1e-3 where norm_eps is felt.

    Args:
        report: called at the end with both differences; raises to refuse them.
    """
    eps = NO_EPS if growth.feels_eps else growth.new.norm_eps
    before, after = (
        [Trace(dataclasses.replace(config, norm_eps=eps), batch, torch.float64), Trace(config, batch, torch.float32)]
        for config in (growth.old, growth.new)
    )

    def old_chunks(name: str) -> Iterator[Tensor]:
        weight = read(name)
        for rows in row_chunks(len(weight), weight[0].numel()):
            yield weight[rows].double()

    for _ in _trace(growth.old, before, old_chunks):
        pass
    yield from _trace(growth.new, after, lambda name: growth.chunks(name, read))
    report([_difference(a, b, batch, growth.feels_eps) for a, b in zip(before, after)])


def _trace(
    config: ResolvedModel, traces: list[Trace], chunks: Callable[[str], Iterator[Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Go through a model in the order of its forward pass, and yield each parameter once, rounded to float32.

    Args:
        traces: one for each precision that weights are to be used in.
        chunks: a parameter's rows, some at a time, float64.
    """
    names = parameter_names(config)

    def fed(name: str, feed: Callable[[Trace, Tensor], None]) -> Tensor:
        parts = []
        for chunk in chunks(name):
            for trace in traces:
                feed(trace, chunk)
            parts.append(chunk.float())
        return torch.cat(parts)

    yield "embedding.weight", fed("embedding.weight", Trace.embed)
    for i in range(config.n_layers):
        prefix = f"blocks.{i}."
        block = {name: torch.cat(list(chunks(name))) for name in names if name.startswith(prefix)}
        for trace in traces:
            trace.block({name.removeprefix(prefix): w for name, w in block.items()})
        for name in block:
            yield name, block[name].float()
    if "norm.gain" in names:
        yield "norm.gain", fed("norm.gain", Trace.norm)
    head = "embedding.weight" if config.tie_embeddings else "head.weight"
    weight = fed(head, Trace.head)
    if not config.tie_embeddings:
        yield head, weight


def _difference(before: Trace, after: Trace, batch: Batch, feels_eps: bool) -> Difference:
    old, new, targets = before.logits, after.logits, batch.targets.flatten()
    deviation = float(old.std())
    in_float32 = (1e-3 if feels_eps else 1e-4) * deviation
    bound = in_float32 if before.dtype == torch.float32 else 1e-11 * max(1.0, deviation)
    losses = [float(functional.cross_entropy(x, targets, ignore_index=IGNORED)) for x in (old, new)]
    return Difference(
        dtype=str(before.dtype).removeprefix("torch."), norm_eps=before.config.norm_eps, deviation=deviation,
        bound=bound, largest=float((new[:, : old.shape[1]] - old).abs().max()), losses=(losses[0], losses[1]),
    )  # fmt: skip
