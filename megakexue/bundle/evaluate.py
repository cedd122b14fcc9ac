"""The loss of a model on given rows by the position in the document, also of weights that are used in another way.

The loss at position p is that of predicting token p + 1 from the p + 1 tokens up to p. Averaged over rows that one
document fills, it shows whether a model has a use for context beyond the length it was trained on (9706, 9708).

What must stay true: sums are float64 and divided once. A position counts from the start of the document in the row, as
in attention and RoPE, so it says how many tokens the model could see.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn import functional

from megakexue.config import IGNORED, ModelConfig, ResolvedModel, build, require
from megakexue.core.batch import Batch
from megakexue.core.decoder import Decoder
from megakexue.core.resolve import resolve

CHUNK = 512
"""Tokens whose logits exist at a time, in float32, and once more as log-softmax."""
BATCH_TOKENS = 4096
"""Tokens that go through the model at a time; a longer row goes alone."""


@dataclass(frozen=True, kw_only=True)
class PositionLoss:
    """The summed loss, in nats, of the target tokens at positions start ... stop - 1."""

    start: int
    stop: int
    n_tokens: int
    loss_sum: float

    @property
    def loss(self) -> float:
        """Nats per token; NaN without tokens."""
        return self.loss_sum / self.n_tokens if self.n_tokens else float("nan")


def position_edges(seq_len: int, first: int = 16) -> list[int]:
    """Return the borders of the usual intervals: 0, `first`, twice that and so on below `seq_len`, and `seq_len`."""
    edges = [0]
    while first < seq_len:
        edges.append(first)
        first *= 2
    return [*edges, seq_len]


@torch.no_grad()
def loss_by_position(
    model: Decoder, batches: Iterable[Batch], edges: list[int], *, one_document: bool = False
) -> list[PositionLoss]:
    """Sum the losses of all targets, for each interval of `edges` over the targets whose position is in it.

    Args:
        batches: of any number of rows. The logits of CHUNK tokens exist at a time.
        edges: increasing, from 0 to at least the row length.
        one_document: count only rows that one document (or a part of one) fills. Then all intervals are of the same
            rows. Otherwise late positions come from long documents alone, whose text may be easier or harder.
    """
    assert edges[0] == 0 and all(low < high for low, high in pairwise(edges)), edges
    device = next(model.parameters()).device
    loss_sums = torch.zeros(len(edges) - 1, dtype=torch.float64)
    counts = torch.zeros(len(edges) - 1, dtype=torch.int64)
    for batch in batches:
        b, t = batch.tokens.shape
        assert t <= edges[-1], f"rows of {t} tokens are beyond the last of edges={edges}"
        targets = _of_one_document(batch) if one_document else batch.targets
        kept = targets != IGNORED
        if not kept.any():
            continue
        tokens, positions, cu_seqlens = (x.to(device) for x in (batch.tokens, batch.positions, batch.cu_seqlens))
        hidden = model.hidden(tokens, positions, cu_seqlens, n_positions=t).flatten(0, 1)
        chunks = zip(hidden.split(CHUNK), targets.to(device).flatten().split(CHUNK))
        parts = [functional.cross_entropy(model.head(x), y, ignore_index=IGNORED, reduction="none") for x, y in chunks]
        losses = torch.cat(parts).view(b, t).cpu().double()[kept]
        interval = torch.bucketize(batch.positions[kept], torch.tensor(edges[1:]), right=True)
        loss_sums += torch.bincount(interval, weights=losses, minlength=len(loss_sums))
        counts += torch.bincount(interval, minlength=len(counts))
    return [
        PositionLoss(start=start, stop=stop, n_tokens=int(n), loss_sum=float(total))
        for (start, stop), n, total in zip(pairwise(edges), counts, loss_sums)
    ]


def _of_one_document(batch: Batch) -> Int64[Tensor, "b t"]:
    """Return the targets of rows that one document fills; others are IGNORED."""
    return batch.targets.where(batch.positions[:, -1:] == batch.positions.shape[1] - 1, IGNORED)


def cut(batch: Batch, length: int) -> Iterator[Batch]:
    """Yield the same tokens and targets in rows of `length`, and what is left of each row: none sees what was before.

    So a document begins anew at each cut, as in data that was prepared with shorter rows.
    """
    n_whole = batch.tokens.shape[1] // length * length
    pieces = [
        [x[:, :n_whole].reshape(-1, length) for x in (batch.tokens, batch.targets, batch.positions)],
        [x[:, n_whole:] for x in (batch.tokens, batch.targets, batch.positions)],
    ]
    for tokens, targets, positions in pieces:
        if tokens.numel():
            positions = positions.minimum(torch.arange(positions.shape[1]))
            starts = (positions.flatten() == 0).nonzero()[:, 0]
            yield Batch(
                tokens=tokens, targets=targets, positions=positions, samples=[],
                cu_seqlens=functional.pad(starts, (0, 1), value=positions.numel()).int(),
                n_targets=int((targets != IGNORED).sum()),
            )  # fmt: skip


def loss_when_cut(model: Decoder, batches: Iterable[Batch], length: int, *, one_document: bool = False) -> PositionLoss:
    """Sum the losses of the targets that `loss_by_position` counts, with at most `length` tokens before each.

    `one_document` is about the rows as they are before they are cut.
    """
    if one_document:
        batches = (dataclasses.replace(batch, targets=_of_one_document(batch)) for batch in batches)
    return loss_by_position(model, (piece for batch in batches for piece in cut(batch, length)), [0, length])[0]


def changed(config: ResolvedModel, changes: list[str]) -> tuple[ResolvedModel, str]:
    """Return a bundle's config with changes such as `rope.base=5e5`, resolved, and the attention backend to use.

    The backend is the one that the changes name, or "auto". Where the scale or the similarity of attention changes, the
    numbers that follow from it are chosen anew. An extension starts from the context of the bundle.

    Raises:
        UserError: a change needs other weights, has no effect, or does not fit the others.
    """
    values: dict[str, Any] = dataclasses.asdict(config)
    given: dict[str, str | None] = {}
    for change in changes:
        key, equals, text = change.partition("=")
        section, _, name = key.removeprefix("model.").partition(".")
        require(
            equals == "=" and section in ("attention", "rope") and name not in ("", "qkv_bias", "qk_norm"),
            f"--set {change}: it must be attention.NAME=VALUE or rope.NAME=VALUE: nothing else can change without "
            "other weights",
        )
        values[section][name] = given[f"{section}.{name}"] = None if text == "null" else text
    backend = given.get("attention.backend") or "auto"
    values["attention"]["backend"] = backend  # a bundle names that of the machine it was trained on
    context = config.rope.context
    if {"attention.scale", "attention.similarity"} & given.keys():
        following = {"log_n_base", "log_n_floor", "softmax_scale"} - {key.partition(".")[2] for key in given}
        values["attention"] |= dict.fromkeys(following)
        if values["attention"]["scale"] == "log_n_clipped" and "log_n_base" in following:
            values["attention"]["log_n_base"] = context
    if given.get("rope.extension") is not None:
        require(
            config.rope.extension in (None, "base"),
            f"--set rope.extension={given['rope.extension']}: the bundle is already extended, by "
            f"{config.rope.extension} from {config.rope.trained_context} to {context} tokens",
        )
        require(given["rope.extension"] != "base", "--set rope.extension=base: without training, set rope.base alone")
        values["rope"]["trained_context"] = given.get("rope.trained_context", str(context))
        require(
            values["rope"]["trained_context"] == str(context) and "rope.context" in given,
            f"--set rope.extension={given['rope.extension']}: the bundle was trained for {context} tokens: add "
            f"--set rope.context=N, above {context}, and leave rope.trained_context as it is",
        )
    new = resolve(build(ModelConfig, values, where="--set"), "adamw", context)
    if new.rope.extension is None:  # then the context only chooses the base
        new = dataclasses.replace(new, rope=dataclasses.replace(new.rope, context=context))
    same = dataclasses.replace(config, attention=dataclasses.replace(config.attention, backend=new.attention.backend))
    require(
        new != same or given.keys() <= {"attention.backend"},
        f"--set {' --set '.join(changes)} changes nothing that is computed",
    )
    return new, backend
