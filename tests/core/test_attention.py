"""The backends against one another and against a loop over single documents; what a query may not see."""

import importlib.util
import re
import sys
import types

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from megakexue.config import UserError
from megakexue.core.attention import BLOCK, MAX_BLOCKED, Backend, Layout, attend, choose_backend

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


class Machine:
    """A machine with a GPU, of which the test takes parts away."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch
        self.flash_attn("flash_attn_func", "flash_attn_varlen_func")
        self.capability((9, 0))
        self.triton(True)
        self.patch.setattr(varlen, "varlen_attn", lambda query, key, value, is_causal, enable_gqa: None)

    def flash_attn(self, *functions: str) -> None:
        module = types.ModuleType("flash_attn")
        for name in functions:
            setattr(module, name, None)
        self.patch.setitem(sys.modules, "flash_attn", module if functions else None)

    def capability(self, value: tuple[int, int]) -> None:
        self.patch.setattr(torch.cuda, "get_device_capability", lambda: value)

    def triton(self, is_installed: bool) -> None:
        self.patch.setattr(importlib.util, "find_spec", lambda name: object() if is_installed else None)

    def old_torch(self) -> None:
        self.patch.setattr(varlen, "varlen_attn", lambda query, key, value, is_causal: None)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def choice(setting: str = "auto", dtype: torch.dtype = torch.bfloat16, d: int = 128, e: int = 128) -> tuple[str, str]:
    return choose_backend(setting, "cuda", dtype, d, e, 4096)


def test_order_on_cuda(machine: Machine) -> None:
    assert choice() == ("flash", "the first choice on CUDA")
    for functions in ((), ("flash_attn_unpadded_func",)):  # not installed; version 1
        machine.flash_attn(*functions)
        backend, why = choice()
        assert backend == "varlen"
        assert why.startswith("flash needs flash-attn 2 (") and why.endswith("): pip install 'megakexue[gpu]'")
    machine.old_torch()
    assert choice() == ("flex", f"{why}; varlen needs a newer torch than {torch.__version__}")
    machine.triton(False)
    assert choice()[0] == "sdpa"
    assert choice()[1].endswith("; flex needs triton: pip install triton")


def test_what_no_flash_kernel_takes_goes_to_flex(machine: Machine) -> None:
    for d, e in ((192, 128), (288, 288), (100, 100)):
        backend, why = choice(d=d, e=e)
        widths = f"takes one head width for all, a multiple of 8 up to 256, not {d} and {e}"
        assert (backend, why) == ("flex", f"flash {widths}; varlen {widths}")
    assert choice(d=256, e=256)[0] == "flash"
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
    def choice(setting: str, d: int, e: int, seq_len: int) -> tuple[str, str]:
        return choose_backend(setting, "cpu", torch.float32, d, e, seq_len)

    assert choice("auto", 64, 64, MAX_BLOCKED) == ("blocked", "the fastest form on CPU for packed documents")
    backend, why = choice("auto", 64, 64, MAX_BLOCKED + 1)
    assert backend == "sdpa" and why == "rows of 4097 tokens are too long for the blocked form's memory"
    backend, why = choice("auto", 192, 128, MAX_BLOCKED + 1)
    assert backend == "blocked" and why == "on CPU no other form takes values of width 128 beside keys of 192"
    for backend in CPU_BACKENDS:
        assert choice(backend, 192, 128, 8192) == (backend, "model.attention.backend")


def test_what_is_asked_for_must_run_here(machine: Machine) -> None:
    for backend in ("flash", "varlen", "flex"):
        message = f"model.attention.backend={backend} needs a CUDA device, not cpu; or use auto"
        with pytest.raises(UserError, match=message):
            choose_backend(backend, "cpu", torch.bfloat16, 64, 64, 512)
        assert choice(backend) == (backend, "model.attention.backend")
    for backend in ("flash", "varlen"):
        with pytest.raises(
            UserError, match=f"backend={backend} takes bf16 and fp16, not torch.float32: set engine.dtype"
        ):
            choice(backend, dtype=torch.float32)
        with pytest.raises(UserError, match=f"{backend} takes one head width for all, .* not 192 and 128; or use auto"):
            choice(backend, d=192)
    with pytest.raises(UserError, match="backend=flex takes head widths from 16, not 8 and 128; or use auto"):
        choice("flex", d=8)
    machine.flash_attn()
    with pytest.raises(
        UserError, match=r"=flash needs flash-attn 2 \(.*\): pip install 'megakexue\[gpu\]'; or use auto"
    ):
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
        choose_backend(backend, "cuda", q.dtype, q.shape[3], v.shape[3], q.shape[1])
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
