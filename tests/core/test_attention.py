"""The backends against one another and against a loop over single documents; what a query may not see."""

import importlib.util
import itertools
import re
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from megakexue.config import MlaConfig, ModelConfig, UserError
from megakexue.core import attention
from megakexue.core.attention import BLOCK, FLASH_ATTN, Backend, Layout, attend, choose_backend
from megakexue.core.device import memory_gib
from megakexue.core.resolve import resolve
from tests.helpers import build
from tests.ranks import run_on_ranks

# said once by FlexAttention, which the tests run uncompiled on the CPU
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

CPU_BACKENDS: list[Backend] = ["reference", "sdpa", "blocked"]
CUDA_BACKENDS: list[Backend] = ["flash", "varlen", "flex", "sdpa"]
ROWS = (
    ([300],),
    ([1],),
    ([BLOCK], [BLOCK]),
    ([2 * BLOCK + 1],),
    ([1] * 40,),
    ([100, 60, 140], [300]),
    ([7, 293], [150] * 2),
    ([40, 24], [64], [1, 63]),
)


def documents(*rows: list[int]) -> tuple[Tensor, Tensor]:
    """Positions and boundaries of rows whose documents have these lengths."""
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in rows])
    ends = torch.tensor([n for lengths in rows for n in lengths]).cumsum(0)
    return positions, torch.cat([torch.zeros(1, dtype=torch.long), ends]).int()


def random_qkv(
    b: int, t: int, h: int, g: int, d: int, e: int, dtype: torch.dtype = torch.float64, s: int | None = None
) -> list[Tensor]:
    torch.manual_seed(t)
    shapes = ((b, t, h, d), (b, s or t, g, d), (b, s or t, g, e))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def attend_with(
    backend: Backend, inputs: list[Tensor], rows: tuple[Tensor, Tensor | None], scale: float, n_keys: int | None = None
) -> Tensor:
    """Attend with a layout of its own; `rows` are positions and boundaries."""
    q, k, v = inputs
    repeats = q.shape[2] // k.shape[2]
    layout = Layout(*rows, backend=backend, dtype=q.dtype, n_keys=n_keys, repeats=repeats)
    return attend(q, k, v, layout, scale=scale)


def one_document(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The formula for a single head of a single document, [t, d]."""
    scores = (q @ k.T * scale).masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), -torch.inf)
    return scores.softmax(-1) @ v


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("value_width", [8, 6])
def test_equals_each_document_alone(
    backend: Backend, rows: tuple[list[int], ...], heads: tuple[int, int], value_width: int
) -> None:
    h, g = heads
    b, t, d, scale = len(rows), sum(rows[0]), 8, 0.7
    q, k, v = random_qkv(b, t, h, g, d, value_width)
    out = attend_with(backend, [q, k, v], documents(*rows), scale)
    gradient = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), gradient)
    alone = torch.zeros_like(out)
    for i, lengths in enumerate(rows):
        start = 0
        for n in lengths:
            part = slice(start, start + n)
            for head in range(h):
                group = head // (h // g)
                alone[i, part, head] = one_document(q[i, part, head], k[i, part, group], v[i, part, group], scale)
            start += n
    assert torch.allclose(out, alone, atol=1e-12)
    for ours, theirs in zip(gradients, torch.autograd.grad(alone, (q, k, v), gradient)):
        assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("value_width", [8, 6])
def test_rows_of_one_document_need_no_boundaries(backend: Backend, value_width: int) -> None:
    inputs = random_qkv(2, 300, 4, 2, 8, value_width)
    positions, cu_seqlens = documents([300], [300])
    results = []
    for boundaries in (cu_seqlens, None):
        out = attend_with(backend, inputs, (positions, boundaries), 0.3)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for packed, unpacked in zip(*results):
        assert torch.allclose(packed, unpacked, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_layout_serves_all_layers(dtype: torch.dtype) -> None:
    rows = documents([100, 200], [300])
    layouts = {backend: Layout(*rows, backend=backend, dtype=dtype) for backend in CPU_BACKENDS}
    for h, g in ((4, 4), (4, 2), (6, 1)):
        q, k, v = random_qkv(2, 300, h, g, 8, 8, dtype)
        exact = attend(q, k, v, layouts["reference"], scale=0.3)
        for layout in layouts.values():
            out = attend(q, k, v, layout, scale=0.3)
            assert out.dtype == dtype
            assert torch.allclose(out, exact, atol=16 * torch.finfo(dtype).eps)


def test_a_layout_holds_the_mask_of_its_backend_alone() -> None:
    positions, cu_seqlens = documents([40, 60])
    packed = {"reference": "visible", "blocked": "blocks", "flex": "block_mask", "sdpa": "bias"}
    backends: list[Backend] = ["reference", "blocked", "flex", "sdpa", "flash", "varlen"]
    for backend in backends:

        def held(boundaries: Tensor | None, n_keys: int | None = None, backend: Backend = backend) -> set[str]:
            layout = Layout(positions, boundaries, backend=backend, dtype=torch.float32, n_keys=n_keys)
            return {name for name in packed.values() if getattr(layout, name, None) is not None}

        own = {packed[backend]} if backend in packed else set()
        assert held(cu_seqlens) == own
        # the kernels of torch are causal by themselves
        assert held(None) == (own if backend in ("reference", "blocked") else set())
        assert held(None, n_keys=100) == {"visible" if backend == "reference" else "bias"}


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float64(backend: Backend, dtype: torch.dtype) -> None:
    inputs = [x.detach().to(dtype) for x in random_qkv(2, 200, 4, 2, 16, 16)]
    rows = documents([150, 50], [200])
    exact = attend_with("reference", [x.double() for x in inputs], rows, 0.25)
    out = attend_with(backend, inputs, rows, 0.25)
    assert out.dtype == dtype
    # a few roundings of values of order one
    assert (out - exact).abs().max() < 8 * torch.finfo(dtype).eps


def test_the_reference_keeps_large_scores_in_float32() -> None:
    # scores of standard deviation 30, which bf16 would round to quarters
    inputs = [x.detach().bfloat16() for x in random_qkv(1, 200, 4, 2, 16, 16)]
    exact = attend_with("reference", [x.double() for x in inputs], documents([200]), 7.5)
    out = attend_with("reference", inputs, documents([200]), 7.5)
    # one rounding of the result, of at most 4
    assert (out - exact).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps / 2 + 1e-4


@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "flex"])
def test_neither_the_future_nor_another_document_is_seen(backend: Backend) -> None:
    rows = documents([60, 90, 50])
    q, k, v = (x.detach() for x in random_qkv(1, 200, 2, 1, 16, 16, torch.float32))
    before = attend_with(backend, [q, k, v], rows, 0.25)
    k[:, 100:150] *= 1e3
    v[:, 100:150] = 1e30  # a weight of 1e-30 would show
    after = attend_with(backend, [q, k, v], rows, 0.25)
    kept = [*range(0, 100), *range(150, 200)]
    assert torch.equal(after[:, kept], before[:, kept])
    assert not torch.isclose(after[:, 100:150], before[:, 100:150]).any()


# --- cached decoding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "flash", "varlen", "flex"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("value_width", [8, 6])
def test_cached_queries_equal_the_whole_rows(backend: Backend, heads: tuple[int, int], value_width: int) -> None:
    lengths, n_slots = (150, 90), 170
    q, k, v = (x.detach() for x in random_qkv(2, 150, *heads, 8, value_width, s=n_slots))
    whole = [
        attend_with("reference", [x[[i], :n] for x in (q, k, v)], (torch.arange(n)[None], None), 0.3)
        for i, n in enumerate(lengths)
    ]
    for n_queries in (1, 7, 64):
        # the last queries of each row, which stand at different positions
        positions = torch.stack([torch.arange(n - n_queries, n) for n in lengths])
        last = torch.stack([q[i, row] for i, row in enumerate(positions)])
        out = attend_with(backend, [last, k, v], (positions, None), 0.3, n_keys=n_slots)
        for i, row in enumerate(positions):
            assert torch.allclose(out[i], whole[i][0, row], atol=1e-12)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_prefill_in_chunks(backend: Backend) -> None:
    t, n_slots, chunk = 300, 384, 128
    q, k, v = (x.detach() for x in random_qkv(2, t, 4, 2, 8, 8, s=n_slots))
    k[:, t:], v[:, t:] = 0, 0
    positions = torch.arange(t).expand(2, t)
    whole = attend_with("reference", [q, k[:, :t], v[:, :t]], (positions, None), 0.3)
    for low in range(0, t, chunk):
        part = slice(low, min(low + chunk, t))
        out = attend_with(backend, [q[:, part], k, v], (positions[:, part], None), 0.3, n_keys=n_slots)
        assert torch.allclose(out, whole[:, part], atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_unused_slots_change_no_bit(backend: Backend) -> None:
    rows = torch.tensor([[5, 6, 7], [20, 21, 22]]), None
    q, k, v = (x.detach() for x in random_qkv(2, 3, 4, 2, 16, 16, torch.float32, s=32))
    k[0, 8:], v[0, 8:] = 0, 0
    before = attend_with(backend, [q, k, v], rows, 0.25, n_keys=32)
    k[0, 8:], v[0, 8:] = 1e3, 1e30
    assert torch.equal(attend_with(backend, [q, k, v], rows, 0.25, n_keys=32), before)


def test_absorbed_latent_attention() -> None:
    """All heads read one latent key of 512 + 64, whose first 512 are the value, as DeepSeek's MLA decodes."""
    q, k, _ = (x.detach() for x in random_qkv(2, 2, 4, 1, 576, 1, s=40))
    rows = torch.tensor([[30, 31], [6, 7]]), None
    out = attend_with("sdpa", [q, k, k[..., :512]], rows, 192**-0.5, n_keys=40)
    exact = attend_with("reference", [q, k, k[..., :512]], rows, 192**-0.5, n_keys=40)
    assert out.shape == (2, 2, 4, 512)
    assert torch.allclose(out, exact, atol=1e-12)


def test_the_layout_must_fit_the_keys() -> None:
    positions, cu_seqlens = documents([10])
    with pytest.raises(AssertionError, match="a cache holds one document a row"):
        Layout(positions, cu_seqlens, backend="sdpa", dtype=torch.float64, n_keys=10)
    for n_keys in (None, 11):
        with pytest.raises(AssertionError, match="keys that the layout does not know"):
            attend_with("sdpa", random_qkv(1, 10, 2, 2, 8, 8, s=12), (positions, None), 1.0, n_keys)


# --- FlexAttention, uncompiled and forward only on the CPU ---------------------------------------------------------


@pytest.mark.parametrize(
    "rows", [*ROWS, ([BLOCK - 1, BLOCK + 1, 3 * BLOCK, 5],), ([4 * BLOCK], [2 * BLOCK] * 2)], ids=str
)
def test_block_mask_is_the_one_of_torch(rows: tuple[list[int], ...]) -> None:
    positions, cu_seqlens = documents(*rows)
    (b, t), cpu = positions.shape, torch.device("cpu")
    ours = Layout(positions, cu_seqlens, backend="flex", dtype=torch.float32).block_mask
    visible = Layout(positions, cu_seqlens, backend="reference", dtype=torch.float32).visible
    assert torch.equal(create_mask(ours.mask_mod, b, None, t, t, cpu)[:, 0], visible)
    theirs = create_block_mask(ours.mask_mod, b, None, t, t, cpu)
    assert ours.shape == theirs.shape and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices",
                 "q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"):  # fmt: skip
        mine, wanted = getattr(ours, name), getattr(theirs, name)
        assert mine.dtype == wanted.dtype and torch.equal(mine, wanted), name


@pytest.mark.parametrize(
    ("rows", "heads", "widths"),
    [
        (([100, 60, 140], [300]), (4, 2), (16, 16)),
        (([130, 70], [200]), (6, 1), (24, 16)),
        (([200],), (3, 3), (16, 32)),
    ],
)
@pytest.mark.parametrize("is_packed", [True, False])
def test_flex_equals_the_reference(
    rows: tuple[list[int], ...], heads: tuple[int, int], widths: tuple[int, int], is_packed: bool
) -> None:
    positions, cu_seqlens = documents(*rows)
    places = (positions, cu_seqlens) if is_packed else (torch.arange(sum(rows[0])).expand_as(positions), None)
    inputs = [x.detach() for x in random_qkv(len(rows), sum(rows[0]), *heads, *widths, torch.float32)]
    out = attend_with("flex", inputs, places, 0.2)
    exact = attend_with("reference", [x.double() for x in inputs], places, 0.2)
    assert (out - exact).abs().max() < 1e-5  # float32 sums of 200 terms


# --- the choice ----------------------------------------------------------------------------------------------------


class Kernels:
    """A package as those of flash-attn: it loops over the documents, and notes the boundaries that it was given."""

    def __init__(self, module: str) -> None:
        self.module, self.boundaries, self.is_wrong, self.unpacked = module, [], False, 0  # type: ignore[var-annotated]

    def flash_attn_func(self, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool) -> Any:
        assert causal
        self.unpacked += 1
        n = torch.arange(len(q) + 1, dtype=torch.int32) * q.shape[1]
        out = self.loop(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), n, softmax_scale)
        return self.result(out.unflatten(0, q.shape[:2]))

    def flash_attn_varlen_func(
        self, q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, softmax_scale: float, causal: bool,
    ) -> Any:  # fmt: skip
        assert causal and cu_seqlens_q is cu_seqlens_k and cu_seqlens_q.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_k >= int(cu_seqlens_q.diff().max())
        self.boundaries.append(cu_seqlens_q.tolist())
        return self.result(self.loop(q, k, v, cu_seqlens_q, softmax_scale))

    def varlen_attn(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
        scale: float, window_size: tuple[int, int], enable_gqa: bool,
    ) -> Tensor:  # fmt: skip
        """Of torch."""
        assert window_size == (-1, 0) and enable_gqa and cu_seq_q is cu_seq_k and max_q == max_k
        self.boundaries.append(cu_seq_q.tolist())
        return self.loop(query, key, value, cu_seq_q, scale)

    def loop(self, q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, scale: float) -> Tensor:
        r = q.shape[1] // k.shape[1]
        parts = []
        for low, high in itertools.pairwise(boundaries.tolist()):
            rows = slice(low, high)
            heads = [one_document(q[rows, i], k[rows, i // r], v[rows, i // r], scale) for i in range(q.shape[1])]
            parts.append(torch.stack(heads, 1) * (2 if self.is_wrong else 1))
        return torch.cat(parts)

    def result(self, out: Tensor) -> Any:
        return (out, None) if self.module == "flash_attn.cute" else out


class NotInstalled:
    """Keeps what is installed on the machine of the tests from being found."""

    def find_spec(self, name: str, *_: object) -> None:
        if name.partition(".")[0] in ("flash_attn", "flash_attn_interface"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


class Machine:
    """A Hopper GPU with every kernel, of which the test takes parts away. Its numbers are on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch
        self.patch.setattr(sys, "meta_path", [NotInstalled(), *sys.meta_path])
        self.patch.setattr(attention, "_trial", partial(attention._trial, device="cpu"))
        self.flash = {version: Kernels(kernel.module) for version, kernel in FLASH_ATTN.items()}
        self.varlen = Kernels("torch")
        self.patch.setattr(varlen, "varlen_attn", self.varlen.varlen_attn)
        self.install(3, 4, 2)
        self.capability((9, 0))
        self.triton(True)

    def install(self, *versions: int) -> None:
        """Install these versions of flash-attn and no other."""
        for version, kernels in self.flash.items():
            if version in versions:
                self.patch.setitem(sys.modules, kernels.module, kernels)
            else:
                self.patch.delitem(sys.modules, kernels.module, raising=False)
        self.forget()

    def capability(self, value: tuple[int, int]) -> None:
        self.patch.setattr(torch.cuda, "get_device_capability", lambda *_: value)
        self.forget()

    def triton(self, is_installed: bool) -> None:
        self.patch.setattr(importlib.util, "find_spec", lambda name: object() if is_installed else None)

    def old_torch(self) -> None:
        self.patch.setattr(varlen, "varlen_attn", lambda query, key, value, is_causal: None)
        self.forget()

    @staticmethod
    def forget() -> None:
        attention._flash_attn.cache_clear()
        attention._varlen_obstacle.cache_clear()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    yield Machine(monkeypatch)
    Machine.forget()


def choice(setting: str = "auto", dtype: torch.dtype = torch.bfloat16, d: int = 128, e: int = 128) -> tuple[str, str]:
    return choose_backend(setting, "cuda", dtype, d, e)


NO_FLASH = "flash needs flash-attn (3: not installed, 4: not installed, 2: not installed): pip install 'megakexue[gpu]'"


def test_order_on_cuda(machine: Machine) -> None:
    first = "the first choice on CUDA, flash-attn"
    assert choice() == ("flash", f"{first} 3")
    assert choice("flash") == ("flash", "model.attention.backend, flash-attn 3")
    machine.install(4, 2)
    assert choice() == ("flash", f"{first} 4 (3: not installed)")
    machine.install(2)
    assert choice() == ("flash", f"{first} 2 (3: not installed, 4: not installed)")
    machine.install()
    assert choice() == ("varlen", NO_FLASH)
    machine.old_torch()
    assert choice() == ("flex", f"{NO_FLASH}; varlen needs a newer torch than {torch.__version__}")
    machine.triton(False)
    assert choice()[0] == "sdpa"
    assert choice()[1].endswith("; flex needs triton: pip install triton")


@pytest.mark.parametrize(
    ("capability", "widths", "version"),
    [
        ((8, 0), (128, 128), 2),
        ((8, 0), (192, 128), None),
        ((9, 0), (64, 64), 3),
        ((9, 0), (192, 128), 3),
        ((9, 0), (256, 256), 3),
        ((9, 0), (128, 64), None),
        ((10, 0), (128, 128), 4),
        ((10, 0), (192, 128), 4),
        ((10, 0), (256, 256), 2),
        ((12, 0), (128, 128), 2),
    ],
    ids=str,
)
def test_the_version_of_flash_attn(
    machine: Machine, capability: tuple[int, int], widths: tuple[int, int], version: int | None
) -> None:
    machine.capability(capability)
    backend, why = choice(d=widths[0], e=widths[1])
    if version is None:
        assert backend == "flex" and why.startswith("flash needs flash-attn (3: ") and "pip install" not in why
    else:
        assert backend == "flash" and f"flash-attn {version}" in why


def test_a_kernel_that_fails_here_is_passed_over(machine: Machine) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available\nCompile with TORCH_USE_CUDA_DSA")

    machine.flash[3].flash_attn_varlen_func = broken  # type: ignore[method-assign]
    machine.flash[4].is_wrong = True
    wrong = "its results are wrong"
    wanted = f"3: CUDA error: no kernel image is available, 4: {wrong}"
    assert choice() == ("flash", f"the first choice on CUDA, flash-attn 2 ({wanted})")
    machine.flash[2].is_wrong = machine.varlen.is_wrong = True
    machine.forget()
    backend, why = choice()
    assert backend == "flex"
    assert why == f"flash needs flash-attn ({wanted}, 2: {wrong}); varlen fails here ({wrong})"


@pytest.mark.parametrize("backend", ["flash 3", "flash 4", "flash 2", "varlen"])
def test_packed_rows_have_one_of_a_few_numbers_of_documents(machine: Machine, backend: str) -> None:
    name, _, version = backend.partition(" ")
    machine.install(*([int(version)] if version else []))
    kernels = machine.flash[int(version)] if version else machine.varlen
    assert choice()[0] == name
    inputs = [x.detach().bfloat16() for x in random_qkv(2, 64, 4, 2, 128, 128)]
    lengths = set()
    for n in range(2, 20):
        rows = documents([1] * (n - 2) + [64 - (n - 2)], [64])
        kernels.boundaries.clear()
        out = attend_with(name, inputs, rows, 0.1)  # type: ignore[arg-type]
        (given,) = kernels.boundaries
        # those of the row, and empty documents at the end of it
        assert given[: len(rows[1])] == rows[1].tolist() and set(given[len(rows[1]) :]) <= {128}
        lengths.add(len(given))
        exact = attend_with("reference", inputs, rows, 0.1)
        assert (out - exact).norm() < 2e-2 * exact.norm()
    assert lengths == {2 + 1, 4 + 1, 8 + 1, 16 + 1, 32 + 1}


@pytest.mark.parametrize("version", FLASH_ATTN)
def test_rows_of_one_document_on_cuda(machine: Machine, version: int) -> None:
    machine.install(version)
    machine.forget()
    inputs = [x.detach().bfloat16() for x in random_qkv(2, 64, 4, 2, 128, 128)]
    positions, cu_seqlens = documents([64], [64])
    out = attend_with("flash", inputs, (positions, None), 0.1)
    # that of version 2 is slower than cuDNN's
    assert machine.flash[version].unpacked == (version != 2)
    exact = attend_with("reference", inputs, (positions, cu_seqlens), 0.1)
    assert (out - exact).norm() < 2e-2 * exact.norm()


def test_what_no_flash_kernel_takes_goes_to_flex(machine: Machine) -> None:
    for d, e in ((288, 288), (100, 100)):
        backend, why = choice(d=d, e=e)
        widths = f"takes head widths that are multiples of 8 up to 256, not {d} and {e}"
        assert (backend, why) == ("flex", f"flash {widths}; varlen {widths}")
    backend, why = choice(dtype=torch.float32)
    assert backend == "flex" and why.startswith(
        "flash takes bf16 and fp16, not torch.float32: set engine.dtype; varlen"
    )
    machine.capability((7, 5))
    backend, why = choice(dtype=torch.float16)
    assert backend == "flex" and why.startswith("flash needs a GPU of compute capability 8.0 or newer; varlen")
    backend, why = choice(d=8, e=8, dtype=torch.float32)
    assert backend == "sdpa" and why.endswith("flex takes head widths from 16, not 8 and 8")


def test_order_on_cpu() -> None:
    def choice(setting: str) -> tuple[str, str]:
        return choose_backend(setting, "cpu", torch.float32, 192, 128)

    assert choice("auto") == ("blocked", "the fastest form on CPU")
    for backend in CPU_BACKENDS:
        assert choice(backend) == (backend, "model.attention.backend")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value_width", [8, 6])
def test_probabilities_that_are_computed_again_change_no_bit(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, value_width: int
) -> None:
    rows = documents([100, 60, 140], [300])

    def results() -> list[Tensor]:
        q, k, v = random_qkv(2, 300, 4, 2, 8, value_width, dtype)
        out = attend_with("blocked", [q, k, v], rows, 0.7)
        return [out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))]

    kept = results()
    monkeypatch.setattr(attention, "MAX_KEPT", 0)
    assert all(torch.equal(a, b) for a, b in zip(results(), kept))


def peak_of_a_long_row(mla: bool, n: int) -> tuple[float, float]:
    """Return the GiB that a process had at most, before and after both passes of a packed row of n tokens."""
    kind: dict[str, Any] = dict(n_kv_heads=1, d_head=16)
    if mla:
        kind = dict(mla=MlaConfig(d_latent=32, d_nope=8, d_rope=8, d_value=16))
    config = resolve(ModelConfig(vocab_size=512, d_model=64, n_layers=1, n_heads=1, d_ff=128, **kind), "tiger", n)
    backend, _ = choose_backend("auto", "cpu", torch.bfloat16, config.head_width, config.value_width)
    model = build(config, backend, torch.bfloat16)
    model.set_recompute("block")
    tokens = torch.randint(0, 512, (1, n))
    positions, boundaries = documents([n * 5 // 8, 100, n * 3 // 8 - 100])
    before = memory_gib(torch.device("cpu"))
    model(tokens, positions, boundaries, tokens).objective.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    return before, memory_gib(torch.device("cpu"))


@pytest.mark.slow
def test_a_packed_row_of_32k_tokens_needs_little_memory() -> None:
    for mla in (False, True):
        ((before, after),) = run_on_ranks(1, peak_of_a_long_row, mla, 2**15)
        # the mask alone would take 2 GiB, and so would the scores of one head
        assert after < 4 and after - before < 1.9, (mla, before, after)


def test_what_is_asked_for_must_run_here(machine: Machine) -> None:
    for backend in ("flash", "varlen", "flex"):
        message = f"model.attention.backend={backend} needs a CUDA device, not cpu; or use auto"
        with pytest.raises(UserError, match=message):
            choose_backend(backend, "cpu", torch.bfloat16, 64, 64)
        assert choice(backend)[0] == backend and choice(backend)[1].startswith("model.attention.backend")
    for backend in ("flash", "varlen"):
        with pytest.raises(
            UserError, match=f"backend={backend} takes bf16 and fp16, not torch.float32: set engine.dtype"
        ):
            choice(backend, dtype=torch.float32)
        with pytest.raises(UserError, match=f"{backend} takes head widths .* 8 up to 256, not 264 and 128; or use"):
            choice(backend, d=264)
    with pytest.raises(UserError, match="backend=varlen takes one head width for all, not 192 and 128; or use auto"):
        choice("varlen", d=192)
    with pytest.raises(UserError, match="backend=flex takes head widths from 16, not 8 and 128; or use auto"):
        choice("flex", d=8)
    machine.install()
    with pytest.raises(UserError, match=re.escape(f"model.attention.backend={NO_FLASH}; or use auto")):
        choice("flash")
    machine.old_torch()
    with pytest.raises(UserError, match=r"backend=varlen needs a newer torch than .*; or use auto"):
        choice("varlen")
    machine.triton(False)
    with pytest.raises(UserError, match="backend=flex needs triton: pip install triton; or use auto"):
        choice("flex")
    machine.capability((7, 0))
    with pytest.raises(UserError, match=r"backend=flash needs a GPU of compute capability 8\.0 or newer; or use auto"):
        choice("flash", dtype=torch.float16)


# --- CUDA ----------------------------------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# torch's compiler looks at .grad of all its inputs
compiles = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def assert_near_reference(
    backend: Backend, rows: tuple[list[int], ...], inputs: list[Tensor], is_packed: bool, tolerance: float
) -> None:
    """Compare results and gradients by their norms."""
    q, _, v = inputs
    try:
        choose_backend(backend, "cuda", q.dtype, q.shape[3], v.shape[3])
    except UserError as error:
        # widths and dtypes that a kernel does not take, or a GPU or torch too old for it, are no failure; flash-attn is
        # optional
        assert backend == "flash" or re.search("takes|compute capability|newer torch", str(error)), error
        pytest.skip(str(error))
    positions, cu_seqlens = documents(*rows)
    places = positions.cuda(), cu_seqlens.cuda() if is_packed else None
    torch.manual_seed(0)
    gradient = torch.randn(*q.shape[:3], v.shape[3], device="cuda")
    results = []
    kinds: list[tuple[Backend, torch.dtype]] = [(backend, q.dtype), ("reference", torch.float64)]
    for name, dtype in kinds:
        leaves = [x.detach().cuda().to(dtype).requires_grad_() for x in inputs]
        out = attend_with(name, leaves, places, q.shape[3] ** -0.5)
        assert out.dtype == dtype
        results.append([out, *torch.autograd.grad(out, leaves, gradient.to(dtype))])
    for what, ours, exact in zip(("out", "dq", "dk", "dv"), *results):
        assert torch.isfinite(ours).all(), what
        assert (ours - exact).norm() < tolerance * exact.norm(), what


@pytest.mark.gpu
@needs_cuda
@compiles
@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("widths", [(64, 64), (128, 128), (192, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_cuda_backends_equal_the_reference(backend: Backend, widths: tuple[int, int], dtype: torch.dtype) -> None:
    # bf16 rounds weights and their gradients to 2^-9; float32 may be multiplied as TF32, to 2^-11
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-3
    for heads in ((4, 4), (4, 2), (4, 1)):
        inputs = random_qkv(2, 320, *heads, *widths, dtype)
        assert_near_reference(backend, ([250, 70], [320]), inputs, True, tolerance)
        assert_near_reference(backend, ([320], [320]), inputs, False, tolerance)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("version", FLASH_ATTN)
@pytest.mark.parametrize("widths", [(64, 64), (128, 128), (192, 128)], ids=str)
def test_cuda_each_installed_flash_attn(version: int, widths: tuple[int, int]) -> None:
    """The choice shows only the first of them; a trial has results and gradients against the reference."""
    kernel = FLASH_ATTN[version]
    if torch.cuda.get_device_capability()[0] not in kernel.capabilities or not kernel.widths(*widths):
        pytest.skip(f"flash-attn {version} has no kernel for this GPU and widths {widths}")
    error = attention._trial(partial(attention._flash, version), torch.bfloat16, *widths)
    if error == "not installed":
        pytest.skip(f"flash-attn {version} is not installed")
    assert error is None


@pytest.mark.gpu
@needs_cuda
@compiles
@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("t", [192, 320, 256])
def test_cuda_rows_of_very_negative_scores_have_gradients(backend: Backend, is_packed: bool, t: int) -> None:
    """Where cuDNN's backward gave NaN: t % 128 = 64, and rows whose log-sum-exp is under -88.7 (pytorch 196678)."""
    k = 4 * torch.randn(2, t, 2, 64)
    q = -k.repeat_interleave(2, dim=2)  # a token's score with itself, its first row's only one, is about -128
    inputs = [x.bfloat16() for x in (q, k, torch.randn(2, t, 2, 64))]
    assert_near_reference(backend, ([t], [t]), inputs, is_packed, 3e-2)


@pytest.mark.gpu
@needs_cuda
@compiles
@pytest.mark.parametrize("widths", [(128, 128), (576, 512)], ids=str)
@pytest.mark.parametrize("n_queries", [1, 100])
def test_cuda_cached_queries_equal_the_reference(widths: tuple[int, int], n_queries: int) -> None:
    inputs = [x.detach().cuda() for x in random_qkv(2, n_queries, 8, 1, *widths, torch.bfloat16, s=333)]
    first = torch.tensor([[10], [200]], device="cuda")
    rows = first + torch.arange(n_queries, device="cuda"), None
    out = attend_with("flash", inputs, rows, 0.05, n_keys=333)
    exact = attend_with("reference", [x.double() for x in inputs], rows, 0.05, n_keys=333)
    assert (out - exact).norm() < 2e-2 * exact.norm()
