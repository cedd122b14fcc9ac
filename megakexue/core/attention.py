"""Causal attention inside documents: one signature, several backends with equal results.

    o_t = sum_s softmax_s(scale q_t . k_s) v_s,   s <= t and s in the document of t.

Letters as in megakexue/core/axes.py: b batch, t query position, s key position, h query heads, g key/value heads,
r = h/g query heads in a group, d head width, e value width. Query head i reads key/value head i // r.

`model.attention.backend: auto` takes the first of these that can run here (`choose_backend`):

    CUDA   flash    flash-attn 3, 4 or 2, the first that is installed and runs here (`FLASH_ATTN`): bf16 or fp16
           varlen   the kernel of flash-attn 2 in torch, for e = d <= 256
           flex     FlexAttention, compiled: any dtype and widths from 16, such as MLA's 192/128
           sdpa     torch's scaled dot product attention: anything, with a mask of b t^2 numbers for packed documents
    CPU    blocked  plain matrix products: any widths; keeps h t^2 / 2 probabilities of a row for the backward pass, or
                    none of a row of more than MAX_KEPT tokens

The order on CUDA is that of published speeds on an H100; tools/benchmarks/gpu.sh measures it.

`reference` is the formula in float32, for tests. When each row is one document (no boundaries), flash-attn 2, varlen
and flex give way to sdpa, whose kernels are causal by themselves: cuDNN's on Hopper is about twice as fast as those of
flash-attn 2. Cached decoding is sdpa with a mask for every backend but reference, except that the first tokens
of a cache are like rows of one document.

What must stay true: the backends agree to rounding, with scores and the sums of the softmax in float32 or better
(blocked rounds the scores to the dtype of its inputs). A key that a query may not see has a weight of exactly zero.
So no finite number in it changes a bit of the result, but a NaN or an infinity would spread. Unused slots of a cache
are therefore zeros.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from megakexue.config import UserError
from megakexue.core.entropy import Observer
from megakexue.core.sequence import Sequence

Backend = Literal["flash", "varlen", "flex", "sdpa", "blocked", "reference"]

# what each backend takes and returns
Queries = Float[Tensor, "b t h d"]
Keys = Float[Tensor, "b s g d"]
Values = Float[Tensor, "b s g e"]
Mixed = Float[Tensor, "b t h e"]

BLOCK = 128
"""Queries in a block, in the blocked form and in FlexAttention. In a row of 512, 4 blocks compute 5/8 of the square."""
MAX_KEPT = 4096
"""Tokens in a row, up to which the blocked form keeps its probabilities for the backward pass."""


class _Kernel(NamedTuple):
    """A version of flash-attn: where it is, and what it takes by its own source (of August 2026)."""

    module: str
    capabilities: tuple[int, ...]
    """Of GPUs, their first numbers."""
    widths: Callable[[int, int], bool]
    """Whether it has a forward and a backward pass for such keys and values."""


FLASH_ATTN = {
    # hopper/flash_api.cpp: mha_fwd takes a second width in this range, and mha_bwd rounds both up to the larger;
    # hopper/test_flash_attn.py tests both passes so. It has kernels for older GPUs, which nobody measured against 2.
    3: _Kernel("flash_attn_interface", (9,), lambda d, e: d == e or (128 < d <= 192 and 96 < e <= 128)),
    # flash_attn/cute/interface.py, _validate_head_dims; tests/cute/test_flash_attn.py tests the backward pass for these
    # alone, and with two widths only where each query head has a key of its own, which is so in MLA
    4: _Kernel("flash_attn.cute", (9, 10, 11), lambda d, e: d == e <= 128 or (d, e) == (192, 128)),
    2: _Kernel("flash_attn", (8, 9, 10, 11, 12), lambda d, e: d == e),
}
"""By version, the faster ones first."""


def _obstacle(backend: str, device: str, dtype: torch.dtype, d_head: int, d_value: int) -> str | None:
    """Return why a backend cannot run here, with the remedy if there is one; None: it can."""
    if backend not in ("flash", "varlen", "flex"):
        return None
    if device != "cuda":
        return f"needs a CUDA device, not {device}"
    if backend == "flex":
        if min(d_head, d_value) < 16:
            return f"takes head widths from 16, not {d_head} and {d_value}"
        return None if importlib.util.find_spec("triton") else "needs triton: pip install triton"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"takes bf16 and fp16, not {dtype}: set engine.dtype"
    if any(width > 256 or width % 8 for width in (d_head, d_value)):
        return f"takes head widths that are multiples of 8 up to 256, not {d_head} and {d_value}"
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    if backend == "varlen":
        return _varlen_obstacle(dtype, d_head, d_value)
    version, why = _flash_attn(dtype, d_head, d_value)
    remedy = ": pip install 'megakexue[gpu]'" if "2: not installed" in why else ""
    return None if version else f"needs flash-attn ({why}){remedy}"


@cache
def _varlen_obstacle(dtype: torch.dtype, d_head: int, d_value: int) -> str | None:
    from torch.nn.attention import varlen

    if d_head != d_value:
        return f"takes one head width for all, not {d_head} and {d_value}"
    if "enable_gqa" not in inspect.signature(varlen.varlen_attn).parameters:
        return f"needs a newer torch than {torch.__version__}"
    error = _trial(_varlen, dtype, d_head, d_value)
    return None if error is None else f"fails here ({error})"


@cache
def _flash_attn(dtype: torch.dtype, d_head: int, d_value: int) -> tuple[int, str]:
    """Return the first version of flash-attn that runs here, 0 for none, and why those before it do not."""
    capability = torch.cuda.get_device_capability()
    obstacles: list[str] = []
    error: str | None
    for version, kernel in FLASH_ATTN.items():
        if capability[0] not in kernel.capabilities:
            error = f"has no kernels for compute capability {capability[0]}.{capability[1]}"
        elif not kernel.widths(d_head, d_value):
            error = f"takes no head widths of {d_head} and {d_value}"
        else:
            error = _trial(partial(_flash, version), dtype, d_head, d_value)
        if error is None:
            return version, ", ".join(obstacles)
        obstacles.append(f"{version}: {error}")
    return 0, ", ".join(obstacles)


def _trial(
    kernel: Callable[..., Tensor], dtype: torch.dtype, d_head: int, d_value: int, device: str = "cuda"
) -> str | None:
    """Attend to a short packed row, forward and backward, and return what went wrong; None: nothing.

    It makes the import that `attend` makes. A package may be built for another torch or GPU, or without some widths.
    """
    positions = torch.tensor([[*range(20), *range(8), *range(4)]], device=device)
    boundaries = torch.tensor([0, 20, 28, 32], dtype=torch.int32, device=device)
    generator, results = torch.Generator().manual_seed(0), []
    inputs = [torch.randn(1, 32, 2, n, generator=generator).to(device, dtype) for n in (d_head, d_head, d_value)]
    backends: tuple[Backend, ...] = ("flash", "reference")
    try:
        for backend in backends:
            layout = Layout(positions, boundaries, backend=backend, dtype=dtype)
            function: Callable[..., Tensor] = kernel if backend == "flash" else _reference
            with torch.inference_mode(False), torch.enable_grad():
                leaves = [x.clone().requires_grad_() for x in inputs]
                out = function(*leaves, layout, d_head**-0.5)
                results.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(*results)]
    except Exception as error:  # a broken package may raise anything
        if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("flash_attn"):
            return "not installed"
        return str(error).strip().partition("\n")[0] or type(error).__name__
    # rounding to bf16 makes about 0.005; NaN fails too
    return None if all(x < 0.1 for x in errors) else "its results are wrong"


def choose_backend(setting: str, device: str, dtype: torch.dtype, d_head: int, d_value: int) -> tuple[Backend, str]:
    """Return the backend for a type of device ("cuda", "cpu"), and the reason, which a run prints at its start.

    Raises:
        UserError: the config asks for a backend that cannot run here.
    """
    if setting != "auto":
        obstacle = _obstacle(setting, device, dtype, d_head, d_value)
        if obstacle is not None:
            raise UserError(f"model.attention.backend={setting} {obstacle}; or use auto")
        return setting, "model.attention.backend" + _version(setting, dtype, d_head, d_value)  # type: ignore[return-value]
    if device == "cuda":
        obstacles: list[str] = []
        candidates: tuple[Backend, ...] = ("flash", "varlen", "flex")
        for backend in candidates:
            obstacle = _obstacle(backend, device, dtype, d_head, d_value)
            if obstacle is None:
                why = "; ".join(obstacles) or "the first choice on CUDA"
                return backend, why + _version(backend, dtype, d_head, d_value)
            obstacles.append(f"{backend} {obstacle}")
        return "sdpa", "; ".join(obstacles)
    return "blocked", "the fastest form on CPU"


def _version(backend: str, dtype: torch.dtype, d_head: int, d_value: int) -> str:
    """Return what is to be said of flash-attn where it is chosen."""
    if backend != "flash":
        return ""
    version, why = _flash_attn(dtype, d_head, d_value)
    return f", flash-attn {version}" + (f" ({why})" if why else "")


Blocks = list[tuple[int, int, int, Tensor]]
"""Of (low, high, begin, bias): the queries low to high of a row see keys from begin to high. The bias [1 or rows,
queries, keys] is for the last of these keys: 0, or -inf for a key that is not seen after all."""


class Layout:
    """What each query of a batch may see, in the form that the backend needs; made once, before the first layer.

    Args:
        positions: of the queries in their documents, from 0.
        cu_seqlens: boundaries of packed documents over the flattened b*t tokens, row ends included; None: each row is
            one document.
        backend: of `attend`. Cached decoding uses the masks of sdpa with any backend but reference.
        dtype: of the queries.
        n_keys: None: the keys are the row's own tokens. A number is cached decoding: key s of a row is the token at
            position s of its only document, and rows may be at different positions.
        repeats: in cached decoding, the query heads that share one key/value head.
        is_absorbed: LatentAttention is to use its absorbed form; `attend` does not read it.
        sequence: the ranks that share these rows, of whose tokens this one has a part; `positions` and `cu_seqlens` are
            of the whole rows.
        observer: is shown the queries and keys of each layer.
    """

    visible: Bool[Tensor, "#b t s"]
    """Of reference: True where a query sees a key."""
    blocks: list[tuple[slice, Blocks]]
    """Of blocked: rows, and the blocks of queries in these rows."""
    block_mask: Any
    """Of flex with packed documents: a BlockMask."""
    documents: Int32[Tensor, " p"]
    """Of flash and varlen with packed documents: their boundaries, padded to one of a few lengths."""
    bias: Float[Tensor, "#b 1 rt s"] | None
    """Of sdpa, and of cached decoding: 0 where a query sees a key, else -inf; None: a query sees all keys up to its own
    position, which the kernel knows by itself."""

    def __init__(
        self, positions: Int64[Tensor, "b t"], cu_seqlens: Int32[Tensor, " n"] | None, *, backend: Backend,
        dtype: torch.dtype, n_keys: int | None = None, repeats: int = 1, is_absorbed: bool = False,
        sequence: Sequence | None = None, observer: Observer | None = None,
    ) -> None:  # fmt: skip
        assert n_keys is None or cu_seqlens is None, "a cache holds one document a row"
        assert n_keys is None or sequence is None, "a cache holds whole rows"
        self.sequence, self.observer = sequence, observer
        self.positions, self.cu_seqlens, self.backend, self.is_absorbed = positions, cu_seqlens, backend, is_absorbed
        self.is_cached, self.n_keys = n_keys is not None, positions.shape[1] if n_keys is None else n_keys
        is_packed = cu_seqlens is not None
        if backend == "reference":
            self.visible = self._visible()
        elif self.is_cached:
            self.bias = _bias(self._visible()[:, None].repeat(1, 1, repeats, 1), dtype)
        elif backend == "blocked":
            self.blocks = _blocks(positions, is_packed, dtype)
        elif backend == "flex" and is_packed:
            self.block_mask = _block_mask(positions)
        elif cu_seqlens is not None and backend in ("flash", "varlen"):
            self.documents = _padded(cu_seqlens, positions.numel())
        else:
            self.bias = _bias(self._visible()[:, None], dtype) if backend == "sdpa" and is_packed else None

    def _visible(self) -> Bool[Tensor, "#b t s"]:
        key = torch.arange(self.n_keys, device=self.positions.device)
        if self.is_cached:
            return key <= self.positions[:, :, None]
        causal = key <= key[:, None]
        return causal[None] if self.cu_seqlens is None else causal & (key >= _starts(self.positions)[:, :, None])


def _padded(cu_seqlens: Int32[Tensor, " n"], n_tokens: int) -> Int32[Tensor, " p"]:
    """Add empty documents at the end until their number is a power of two.

    So the shapes that a kernel, its plan and its buffers see do not change with each batch. Not more than that, since
    the backward pass has a buffer of up to 128 rows for each document. Empty documents leave at once: flash-attn 2 and
    torch in compute_attn_1rowblock and compute_dq_dk_dv_1colblock; 3 and 4 have tests of them (zero_lengths).
    """
    n_documents = len(cu_seqlens) - 1
    return functional.pad(cu_seqlens, (0, (1 << (n_documents - 1).bit_length()) - n_documents), value=n_tokens)


def _starts(positions: Int64[Tensor, "b t"]) -> Int64[Tensor, "b t"]:
    """Return the first key of each query's document."""
    return torch.arange(positions.shape[1], device=positions.device) - positions


def _bias(visible: Bool[Tensor, "..."], dtype: torch.dtype) -> Float[Tensor, "..."]:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


def _blocks(positions: Int64[Tensor, "b t"], is_packed: bool, dtype: torch.dtype) -> list[tuple[slice, Blocks]]:
    """Return pairs of rows and their blocks; rows in one pair are computed together."""
    (b, t), starts = positions.shape, _starts(positions)
    # rows have different documents, and a long row alone skips more keys than all of them together
    is_alone = is_packed and t > 2 * BLOCK
    # at once, since reading single numbers of a tensor is slow
    first_keys = starts.tolist() if is_packed else [[0] * t]
    index = torch.arange(t, device=positions.device)
    result = []
    for rows in [slice(i, i + 1) for i in range(b)] if is_alone else [slice(0, b)]:
        blocks = []
        for low in range(0, t, BLOCK):
            high = min(low + BLOCK, t)
            begin = min(row[low] for row in first_keys[rows])
            latest = max(row[high - 1] for row in first_keys[rows])
            # with one document in the block, all its queries see all keys before the block
            key = index[begin if latest > begin else low : high]
            seen = (key <= index[low:high, None])[None]
            if latest > begin:
                seen = seen & (key >= starts[rows, low:high, None])
            blocks.append((low, high, begin, _bias(seen, dtype)))
        result.append((rows, blocks))
    return result


def _block_mask(positions: Int64[Tensor, "b t"]) -> Any:
    """Return the BlockMask that FlexAttention's create_block_mask gives, without its b t^2 comparisons."""
    from torch.nn.attention.flex_attention import BlockMask

    t, starts = positions.shape[1], _starts(positions)
    low = torch.arange(0, t, BLOCK, device=positions.device)
    high = low + BLOCK
    # starts never fall along a row, so the ends of a block bound it
    first, last = starts[:, low, None], starts[:, high.clamp(max=t) - 1, None]
    touched = (low <= low[:, None]) & (high > first)
    full = (high <= low[:, None]) & (low >= last) & (high[:, None] <= t)
    ordered = []
    for kind in (touched & ~full, full):
        order = kind.int().argsort(dim=-1, descending=True, stable=True)
        ordered.append((kind.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]))
    return BlockMask.from_kv_blocks(
        *ordered[0],
        *ordered[1],
        BLOCK_SIZE=BLOCK,
        # a lower bound instead of an equality of document numbers: one load less for each pair
        mask_mod=lambda b, h, query, key: (key <= query) & (key >= starts[b, query]),
        seq_lengths=(t, t),
    )


def attend(q: Queries, k: Keys, v: Values, layout: Layout, *, scale: float) -> Mixed:
    """Attend to the keys that `layout` shows, by its backend, with the softmax of scale * q.k.

    d and e may differ, except in varlen and in flash but for MLA's 192 and 128.
    """
    assert k.shape[1] == layout.n_keys, "keys that the layout does not know"
    if layout.observer is not None:
        layout.observer.see_attention(q, k, layout.positions, scale)
    backend = layout.backend
    if backend == "reference":
        return _reference(q, k, v, layout, scale)
    if layout.is_cached:
        return _sdpa_cached(q, k, v, layout, scale)
    if backend == "blocked":
        return _blocked(q, k, v, layout, scale)
    if backend == "flash":
        return _flash(_flash_attn(q.dtype, q.shape[3], v.shape[3])[0], q, k, v, layout, scale)
    if backend == "varlen" and layout.cu_seqlens is not None:
        return _varlen(q, k, v, layout, scale)
    if backend == "flex" and layout.cu_seqlens is not None:
        return _flex(q, k, v, layout, scale)
    return _sdpa(q, k, v, layout, scale)


def attend_shared(q: Queries, k: Keys, v: Values, layout: Layout, *, scale: float) -> Mixed:
    """Attend as `attend` does, where ranks share the rows: with the tokens of this rank, for the tokens of this rank.

    Where there are fewer key/value heads than ranks, each goes to all ranks that need it.
    """
    sequence = layout.sequence
    if sequence is None:
        return attend(q, k, v, layout, scale=scale)
    n_ranks, d, e = sequence.size, q.shape[3], v.shape[3]
    repeats = max(1, n_ranks // k.shape[2])
    parts = q, *(x.repeat_interleave(repeats, dim=2) if repeats > 1 else x for x in (k, v))
    q, k, v = sequence.to_heads(*(x.unflatten(2, (n_ranks, -1)).flatten(3) for x in parts))
    q, k, v = (x.unflatten(2, (-1, width)) for x, width in ((q, d), (k, d), (v, e)))
    mixed = attend(q, k, v, layout, scale=scale)
    return sequence.to_tokens(mixed.flatten(2)).unflatten(3, (-1, e)).flatten(2, 3)


def _reference(q: Queries, k: Keys, v: Values, layout: Layout, scale: float) -> Mixed:
    dtype = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(dtype).unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("btgrd,bsgd->bgrts", grouped, k.to(dtype)).mul(scale)
    weights = scores.masked_fill(~layout.visible[:, None, None], -torch.inf).softmax(-1)
    return torch.einsum("bgrts,bsge->btgre", weights, v.to(dtype)).flatten(2, 3).to(q.dtype)


def _sdpa(q: Queries, k: Keys, v: Values, layout: Layout, scale: float) -> Mixed:
    mask = layout.bias
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    is_grouped = q.shape[1] != k.shape[1]
    if is_grouped and q.device.type == "cuda" and (mask is not None or q.dtype == torch.float32 or q.shape[3] > 256):
        # of the kernels, only the memory-efficient one takes such inputs, and it takes no groups; without it, the math
        # form would keep the whole square
        r = q.shape[1] // k.shape[1]
        k, v, is_grouped = k.repeat_interleave(r, dim=1), v.repeat_interleave(r, dim=1), False
    return _fused(q, k, v, mask, scale=scale, enable_gqa=is_grouped).transpose(1, 2)


def _sdpa_cached(q: Queries, k: Keys, v: Values, layout: Layout, scale: float) -> Mixed:
    """Attend with few queries to many keys. The heads of a group become queries, so that the cache is never copied."""
    t, g, r = q.shape[1], k.shape[2], q.shape[2] // k.shape[2]
    q = q.unflatten(2, (g, r)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    out = _fused(q, k.transpose(1, 2), v.transpose(1, 2), layout.bias, scale=scale)
    return out.unflatten(2, (r, t)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    """Call torch's kernel on [b, heads, tokens, width]; without a mask, it is causal."""
    options |= {"attn_mask": mask, "is_causal": mask is None}
    if q.device.type == "cpu":  # torch's own order is right, and to state one takes as long as a token's attention
        return functional.scaled_dot_product_attention(q, k, v, **options)
    # cuDNN's backward gives NaN with a mask on some lengths (pytorch 196678), so a mask never reaches it
    backends = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if mask is None:
        fast = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
        # torch's own order: cuDNN is the faster one from Hopper on
        is_old = q.is_cuda and torch.cuda.get_device_capability(q.device) < (9, 0)
        backends = [*(reversed(fast) if is_old else fast), *backends]
    with sdpa_kernel(backends, set_priority=True):
        return functional.scaled_dot_product_attention(q, k, v, **options)


def _blocked(q: Queries, k: Keys, v: Values, layout: Layout, scale: float) -> Mixed:
    """Compute each block of queries against the keys that it can see, in plain matrix products.

    On CPU this is faster than the fused kernel, most of all in bf16 and with packed documents
    (tools/benchmarks/kernels.py).
    """
    g = k.shape[2]
    # the heads of a group become rows of one matrix, so that k and v are never copied per head
    q = q.unflatten(2, (g, -1)).permute(0, 2, 3, 1, 4)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    out = [
        _Blocked.apply(*(x[rows].flatten(0, 1) for x in (q, k, v)), blocks, scale).unflatten(0, (-1, g))
        for rows, blocks in layout.blocks
    ]
    return (torch.cat(out) if len(out) > 1 else out[0]).permute(0, 3, 1, 2, 4).flatten(2, 3)


class _Blocked(torch.autograd.Function):
    """The blocked form of q [bg, r, t, d], k [bg, t, d], v [bg, t, e].

    It has a backward pass of its own, since that of autograd would fill and add a whole k and v for each block, which
    takes a fifth of the time. Probabilities are kept for it in rows of up to MAX_KEPT tokens, and computed again in
    longer ones, whose memory is linear in t.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float) -> Tensor:
        is_kept = any(ctx.needs_input_grad) and q.shape[2] <= MAX_KEPT
        out, sizes = q.new_empty(*q.shape[:3], v.shape[2]), _sizes(q, blocks)
        # one piece of memory, since fresh pages for each block cost as much as a product
        weights = q.new_empty(sum(sizes) if is_kept else max(sizes))
        parts = weights.split(sizes) if is_kept else [weights[:size] for size in sizes]
        for (low, high, begin, bias), part in zip(blocks, parts):
            weight = _probabilities(q[:, :, low:high], k[:, begin:high], bias, scale, part)
            out[:, :, low:high] = (weight @ v[:, begin:high]).unflatten(1, (q.shape[1], -1))
        ctx.save_for_backward(q, k, v, *([weights] if is_kept else []))
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        r, unused, sizes = q.shape[1], q.new_empty(1), _sizes(q, ctx.blocks)
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        room, again = q.new_empty(2, max(sizes))
        parts = kept[0].split(sizes) if kept else [again[:size] for size in sizes]
        for (low, high, begin, bias), size, part in zip(ctx.blocks, sizes, parts):
            queries, d_part = (x[:, :, low:high].flatten(1, 2) for x in (q, d_out))
            weight = part.view(len(q), -1, high - begin)
            if not kept:
                _probabilities(q[:, :, low:high], k[:, begin:high], bias, ctx.scale, part)
            d_v[:, begin:high].baddbmm_(weight.transpose(1, 2), d_part)
            d_scores = torch.bmm(d_part, v[:, begin:high].transpose(1, 2), out=room[:size].view_as(weight))
            torch.ops.aten._softmax_backward_data(d_scores, weight, -1, weight.dtype, grad_input=d_scores)
            d_k[:, begin:high].baddbmm_(d_scores.transpose(1, 2), queries, alpha=ctx.scale)
            d_queries = torch.baddbmm(unused, d_scores, k[:, begin:high], beta=0, alpha=ctx.scale)
            d_q[:, :, low:high] = d_queries.unflatten(1, (r, -1))
        return d_q, d_k, d_v, None, None


def _sizes(q: Tensor, blocks: Blocks) -> list[int]:
    """Return the number of probabilities of each block."""
    return [q.shape[0] * q.shape[1] * (high - low) * (high - begin) for low, high, begin, _ in blocks]


def _probabilities(q: Tensor, k: Tensor, bias: Tensor, scale: float, memory: Tensor) -> Tensor:
    """Return the softmax [bg, r n, s] of a block: of queries [bg, r, n, d] over keys [bg, s, d], in `memory`."""
    weight = memory.view(len(q), -1, k.shape[1])
    torch.baddbmm(q.new_empty(1), q.flatten(1, 2), k.transpose(1, 2), beta=0, alpha=scale, out=weight)
    if len(bias) > 1:
        bias = bias.repeat_interleave(len(q) // len(bias), 0)
    weight.unflatten(1, (q.shape[1], -1))[..., -bias.shape[2] :] += bias[:, None]
    return torch.ops.aten._softmax(weight, -1, False, out=weight)


def _flash(version: int, q: Queries, k: Keys, v: Values, layout: Layout, scale: float) -> Mixed:
    if layout.cu_seqlens is None and version == 2:
        return _sdpa(q, k, v, layout, scale)
    module = importlib.import_module(FLASH_ATTN[version].module)
    b, t = q.shape[:2]
    options: dict[str, Any] = dict(softmax_scale=scale, causal=True)
    if layout.cu_seqlens is None:
        out = module.flash_attn_func(q, k, v, **options)
    else:
        # by name, since version 4 has another order; t for the longest document: an upper bound is enough for the
        # kernel's grid, and the true one would wait for the GPU
        options |= dict(cu_seqlens_q=layout.documents, cu_seqlens_k=layout.documents, max_seqlen_q=t, max_seqlen_k=t)
        out = module.flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), **options)
    # version 4 and betas of 3 return the sums of the softmax too
    out = out[0] if isinstance(out, tuple) else out
    return out.view(b, t, *out.shape[-2:])


def _varlen(q: Queries, k: Keys, v: Values, layout: Layout, scale: float) -> Mixed:
    from torch.nn.attention.varlen import varlen_attn

    b, t = q.shape[:2]
    boundaries = (layout.documents, layout.documents, t, t)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    # not cuDNN, which torch might choose instead: its backward pass gave NaN before (see `_fused`)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = varlen_attn(q, k, v, *boundaries, scale=scale, window_size=(-1, 0), enable_gqa=True)
    assert isinstance(out, Tensor)
    return out.unflatten(0, (b, t))


def _flex(q: Queries, k: Keys, v: Values, layout: Layout, scale: float) -> Mixed:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    flex = _flex_attention(is_compiled=q.device.type == "cuda")
    return flex(q, k, v, block_mask=layout.block_mask, scale=scale, enable_gqa=True).transpose(1, 2)


@cache
def _flex_attention(is_compiled: bool) -> Any:
    """Import FlexAttention, which takes seconds. Uncompiled, it keeps the whole square and has no backward on CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if is_compiled else flex_attention
