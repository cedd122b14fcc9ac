"""What is observed of attention is the formula in float64, for every kind and backend, and changes nothing."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megakexue.config import IGNORED
from megakexue.core import entropy
from megakexue.core.attention import Backend
from megakexue.core.decoder import Decoder
from megakexue.core.entropy import Observer
from tests.helpers import KINDS, build, positions_of, tiny

CPU = torch.device("cpu")


def by_hand(q: Tensor, k: Tensor, queries: list[list[int]], documents: Tensor, scale: float) -> list[float]:
    """Mean entropy, its mean share of ln n, and the largest logit; one query and head after the other."""
    repeats, values, shares, largest = q.shape[2] // k.shape[2], [], [], -math.inf
    for row, of_row in enumerate(queries):
        for t in of_row:
            seen = [s for s in range(t + 1) if documents[row, s] == documents[row, t]]
            for head in range(q.shape[2]):
                logits = scale * (k[row, seen, head // repeats].double() @ q[row, t, head].double())
                p = logits.softmax(0)
                values.append(-(p * p.log()).sum().item())
                largest = max(largest, logits.max().item())
                if len(seen) > 1:
                    shares.append(values[-1] / math.log(len(seen)))
    return [sum(values) / len(values), sum(shares) / len(shares), largest]


def seen_by(observer: Observer) -> list[list[float]]:
    """The same of each layer, and the largest output logit."""
    *largest, output = observer.largest().tolist()
    layers = [[h / n, r / m, top] for (h, n, r, m), top in zip(observer.sums().tolist(), largest, strict=True)]
    return [*layers, [output]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entropy_is_that_of_a_dense_softmax(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of packed rows, one of which ends in padding and one has no target; they are more than are looked at."""
    monkeypatch.setattr(entropy, "N_QUERIES", 40)
    monkeypatch.setattr(entropy, "CHUNK", 4)
    # one key head at a time, and of it two queries
    monkeypatch.setattr(entropy, "MAX_ELEMENTS", 30 * (8 + entropy.N_COPIES * 3 * 2))
    generator = torch.Generator().manual_seed(0)
    q = (3 * torch.randn(5, 30, 6, 8, generator=generator)).to(dtype)
    k = torch.randn(5, 30, 2, 8, generator=generator).to(dtype)
    starts = torch.zeros(5, 30, dtype=torch.int64)
    starts[0, [7, 8]] = starts[1, 22] = starts[2, 12] = 1
    documents = starts.cumsum(1)
    positions = torch.tensor([[t - row[: t + 1].index(row[t]) for t in range(30)] for row in documents.tolist()])
    targets = torch.ones(5, 30, dtype=torch.int64)
    targets[1, 22:] = targets[2, 11] = targets[3] = IGNORED
    observer = Observer(targets, targets, CPU)
    observer.see_attention(q, k, positions, 0.25)
    observer.see_output(q[:, :, 0].flatten(0, 1), k[0, :, 0], 0.5)
    # 10 of each of the first four rows, evenly spread, the first and the last included
    has_target = [[t for t in range(30) if targets[row, t] != IGNORED] for row in range(4)]
    chosen = [[own[round(i * (len(own) - 1) / 9)] for i in range(10)] if own else [] for own in has_target]
    found, output = seen_by(observer)
    assert found == pytest.approx(by_hand(q, k, chosen, documents, 0.25), rel=1e-5)
    assert observer.sums()[0, [1, 3]].tolist() == [
        180.0,
        6.0 * sum(positions[r, t] > 0 for r in range(4) for t in chosen[r]),
    ]
    # of up to 128 tokens of all rows
    logits = 0.5 * (q[:, :, 0].flatten(0, 1) @ k[0, :, 0].mT)
    own = [i for i, target in enumerate(targets.flatten().tolist()) if target != IGNORED]
    assert len(own) <= 128 and output == [logits[own].max().item()]


def test_extremes_are_none_and_all() -> None:
    """0 where a query looks at one key, ln n where it looks at all alike; logits so large that exp would overflow."""
    targets, positions = torch.ones(1, 8, dtype=torch.int64), torch.arange(8)[None]
    q = torch.full((1, 8, 1, 4), 1.0)
    own = torch.eye(8)[None, :, None] * 1000
    observer = Observer(targets, targets, CPU)
    observer.see_attention(q, torch.zeros(1, 8, 1, 4), positions, 1.0)
    observer.see_attention(own, own, positions, 1.0)
    observer.see_output(torch.zeros(8, 4), torch.zeros(9, 4), 1.0)
    alike, one, _ = seen_by(observer)
    assert alike == pytest.approx([sum(math.log(n) for n in range(1, 9)) / 8, 1.0, 0.0], rel=1e-6)
    assert one == [0.0, 0.0, 1e6]


def test_a_batch_without_targets_says_so() -> None:
    targets = torch.full((2, 6), IGNORED)
    observer = Observer(targets, targets, CPU)
    observer.see_attention(torch.ones(2, 6, 2, 4), torch.ones(2, 6, 1, 4), positions_of(targets), 1.0)
    observer.see_output(torch.ones(12, 4), torch.ones(9, 4), 1.0)
    assert observer.sums().tolist() == [[0.0] * 4] and observer.largest().tolist() == [-math.inf] * 2


def pass_through(
    model: Decoder, observer: Observer | None, boundaries: Tensor | None, positions: Tensor
) -> list[Tensor]:
    """Loss and gradients of a step, in which no micro-batch but this one is observed."""
    tokens = torch.arange(2 * 24).view(2, 24) % 97
    model.zero_grad()
    losses = model(tokens, positions, boundaries, (tokens + 1) % 97, observer=observer)
    if observer is not None:
        observer.is_open = False
    losses.objective.backward()
    if observer is not None:
        model(tokens, positions, boundaries, tokens, observer=observer)
    return [losses.cross_entropy.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kind", ["gqa", "biases and norms of heads", "mqa", "mla", "mla with whole queries"])
def test_each_kind_and_backend_is_observed_alike_and_as_it_was(kind: str) -> None:
    config = tiny(**KINDS[kind])
    positions = torch.cat([torch.arange(24), torch.arange(10), torch.arange(14)]).view(2, 24)
    packed = torch.tensor([0, 24, 34, 48], dtype=torch.int32)
    backends: tuple[Backend, ...] = ("reference", "blocked", "sdpa")
    found: list[Any] = []
    for backend in backends:
        model = build(config, backend)
        for recompute in ("none", "block"):
            model.set_recompute(recompute)  # type: ignore[arg-type]
            targets = torch.ones(2, 24, dtype=torch.int64)
            observer = Observer(targets, targets, CPU)
            seen = pass_through(model, observer, packed, positions)
            assert all(map(torch.equal, seen, pass_through(model, None, packed, positions))), (backend, recompute)
            found.append(seen_by(observer))
    assert len(found[0]) == config.n_layers + 1
    for other in found[1:]:
        assert [x for layer in other for x in layer] == pytest.approx(
            [x for layer in found[0] for x in layer], rel=1e-4
        )
    # the first layer by hand, whose input is the embedding
    model = build(config)
    with torch.no_grad():
        rotary = model.rotary(positions, 24)
        q, k, _ = model.blocks[0].attention.project(model.embedding(torch.arange(48).view(2, 24) % 97), rotary)  # type: ignore[union-attr, operator]
    documents = torch.tensor([[0] * 24, [1] * 10 + [2] * 14])
    expected = by_hand(q, k, [list(range(24))] * 2, documents, config.attention.softmax_scale)
    assert found[0][0] == pytest.approx(expected, rel=1e-4)
