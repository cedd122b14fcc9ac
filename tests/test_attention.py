"""The backends against one another and against a loop over single documents; what a query may not see."""

import pytest
import torch
from torch import Tensor

from megakexue.attention import BLOCK, Backend, attend, choose_backend
from megakexue.config import UserError

CPU_BACKENDS: list[Backend] = ["reference", "sdpa", "blocked"]


def documents(*rows: list[int]) -> tuple[Tensor, Tensor]:
    """Positions and boundaries of rows whose documents have these lengths."""
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in rows])
    ends = torch.tensor([n for lengths in rows for n in lengths]).cumsum(0)
    return positions, torch.cat([torch.zeros(1, dtype=torch.long), ends]).int()


def random_qkv(b: int, t: int, s: int, h: int, g: int, d: int, e: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(t)
    shapes = ((b, t, h, d), (b, s, g, d), (b, s, g, e))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    "rows",
    [
        ([300],),
        ([1],),
        ([BLOCK], [BLOCK]),
        ([2 * BLOCK + 1],),
        ([1] * 40,),
        ([100, 60, 140], [300]),
        ([7, 293], [150] * 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
def test_equals_each_document_alone(backend: Backend, rows: tuple[list[int], ...], heads: tuple[int, int]) -> None:
    h, g = heads
    b, t, d = len(rows), sum(rows[0]), 8
    q, k, v = random_qkv(b, t, t, h, g, d, d, torch.float64)
    positions, cu_seqlens = documents(*rows)
    out = attend(q, k, v, positions, cu_seqlens, backend=backend)
    gradient = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), gradient)
    alone = torch.zeros_like(out)
    for i, lengths in enumerate(rows):
        start = 0
        for n in lengths:
            part = slice(start, start + n)
            for head in range(h):
                qd, kd, vd = q[i, part, head], k[i, part, head // (h // g)], v[i, part, head // (h // g)]
                scores = (qd @ kd.T / d**0.5).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
                alone[i, part, head] = scores.softmax(-1) @ vd
            start += n
    assert torch.allclose(out, alone, atol=1e-12)
    for ours, theirs in zip(gradients, torch.autograd.grad(alone, (q, k, v), gradient)):
        assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("backend", ["sdpa", "blocked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float64(backend: Backend, dtype: torch.dtype) -> None:
    q, k, v = random_qkv(2, 200, 200, 4, 2, 16, 16, torch.float64)
    positions, cu_seqlens = documents([150, 50], [200])
    exact = attend(q, k, v, positions, cu_seqlens, backend="reference")
    out = attend(q.to(dtype), k.to(dtype), v.to(dtype), positions, cu_seqlens, backend=backend)
    assert out.dtype == dtype
    # a few roundings of values of order one
    assert (out - exact).abs().max() < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_rows_of_one_document_need_no_boundaries(backend: Backend) -> None:
    q, k, v = random_qkv(2, 150, 150, 4, 2, 8, 8, torch.float64)
    positions, cu_seqlens = documents([150], [150])
    with_boundaries = attend(q, k, v, positions, cu_seqlens, backend=backend)
    without = attend(q, k, v, positions, None, backend=backend)
    assert torch.allclose(with_boundaries, without, atol=1e-12)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_few_queries_are_the_last_of_the_row(backend: Backend) -> None:
    q, k, v = random_qkv(2, 150, 150, 4, 2, 8, 8, torch.float64)
    positions, _ = documents([150], [150])
    whole = attend(q, k, v, positions, None, backend="reference")
    for n in (1, 7, 140):
        last = attend(q[:, -n:], k, v, positions[:, -n:], None, backend=backend)
        assert torch.allclose(last, whole[:, -n:], atol=1e-12)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_value_width_of_its_own(backend: Backend) -> None:
    q, k, v = random_qkv(1, 140, 140, 4, 2, 8, 6, torch.float64)
    positions, cu_seqlens = documents([100, 40])
    reference = attend(q, k, v, positions, cu_seqlens, backend="reference")
    assert reference.shape == (1, 140, 4, 6)
    assert torch.allclose(attend(q, k, v, positions, cu_seqlens, backend=backend), reference, atol=1e-12)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_neither_the_future_nor_another_document_is_seen(backend: Backend) -> None:
    positions, cu_seqlens = documents([60, 90, 50])
    q, k, v = random_qkv(1, 200, 200, 2, 1, 8, 8, torch.float32)
    before = attend(q, k, v, positions, cu_seqlens, backend=backend)
    with torch.no_grad():
        k[:, 100:150] += 5
        v[:, 100:150] = 1e30  # a weight of 1e-30 would show
    after = attend(q, k, v, positions, cu_seqlens, backend=backend)
    kept = [*range(0, 60), *range(150, 200)]
    assert torch.equal(after[:, kept], before[:, kept])
    if backend == "reference" or backend == "blocked":
        assert not torch.equal(after[:, 100:150], before[:, 100:150])


def test_choice_of_backend() -> None:
    assert choose_backend("auto", "cpu", torch.float32, 64, 512) == ("blocked", "the fastest form on CPU")
    assert choose_backend("auto", "cpu", torch.float32, 64, 8192)[0] == "sdpa"
    assert choose_backend("reference", "cpu", torch.float32, 64, 512) == ("reference", "model.attention.backend")
    backend, why = choose_backend("auto", "cuda", torch.float32, 64, 512)
    assert backend == "sdpa" and "flash-attn" in why
    with pytest.raises(UserError, match="flash needs a CUDA device and bf16 or fp16, not cpu"):
        choose_backend("flash", "cpu", torch.bfloat16, 64, 512)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_backends_equal_the_reference() -> None:
    positions, cu_seqlens = documents([150, 50], [200])
    q, k, v = (x.detach().cuda() for x in random_qkv(2, 200, 200, 4, 2, 64, 64, torch.float32))
    exact = attend(q, k, v, positions.cuda(), cu_seqlens.cuda(), backend="reference")
    backends: list[Backend] = ["sdpa"]
    if choose_backend("auto", "cuda", torch.bfloat16, 64, 200)[0] == "flash":
        backends.append("flash")
    for backend in backends:
        args = [x.bfloat16() for x in (q, k, v)]
        out = attend(*args, positions.cuda(), cu_seqlens.cuda(), backend=backend)
        assert (out - exact).abs().max() < 8 * torch.finfo(torch.bfloat16).eps
