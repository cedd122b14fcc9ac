"""Causal attention inside documents: one signature, several backends with equal results.

    o_t = sum_s softmax_s(scale q_t . k_s) v_s,   s <= t and s in the document of t.

Small letters, as in megakexue/model.py: b batch, t query position, s key position, h query heads, g key/value heads,
r = h/g query heads in a group, d head width, e value width. Head h reads key/value head h // r.

The choice of `model.attention.backend: auto`, by what can run here (`choose_backend`):

    CUDA   flash    flash-attn 2, installed: bf16 or fp16, e = d <= 256
           varlen   the same kernel of torch, same conditions
           flex     FlexAttention, compiled: any dtype and widths from 16, such as MLA's 192/128
           sdpa     torch's scaled dot product attention: anything, with a mask of b t^2 numbers for packed documents
    CPU    blocked  plain matrix products: any widths; keeps h t^2 / 2 probabilities a row for the backward pass
           sdpa     for rows above MAX_BLOCKED tokens, when e = d; with e != d torch would keep even more than blocked

`reference` is the formula in float32, for tests. Rows that are one document each (no boundaries) and cached decoding
have no use for varlen and flex: there they are sdpa, which has causal kernels for the first and masks for the second.

What must stay true: the backends agree to rounding, with scores and the softmax's sums in float32 or better (blocked
rounds the scores to the dtype of its inputs); a key that a query may not see has weight exactly zero, so that nothing
finite in it changes a bit, and only a NaN or an infinity would spread. Unused slots of a cache are therefore zeros.
"""

import importlib.util
import inspect
from functools import cache, cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from megakexue.config import UserError

Backend = Literal["flash", "varlen", "flex", "sdpa", "blocked", "reference"]

BLOCK = 128
"""Queries in a block, of the blocked form and of FlexAttention: with a row of 512, 4 blocks are 5/8 of the square."""
MAX_BLOCKED = 4096
"""The blocked form keeps all probabilities for the backward pass; beyond this row length SDPA takes over."""


def _obstacle(backend: str, device: str, dtype: torch.dtype, d_head: int, d_value: int) -> str | None:
    """Say why a backend cannot run here, with the remedy where there is one; None: it can."""
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
    if d_head != d_value or d_head > 256 or d_head % 8 != 0:
        return f"takes one head width for all, a multiple of 8 up to 256, not {d_head} and {d_value}"
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    if backend == "varlen":
        from torch.nn.attention import varlen

        can = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters
        return None if can else f"needs a newer torch than {torch.__version__}"
    try:
        # as `attend` will, which also finds a build for another torch, and FlashAttention 4 alone under the same name
        from flash_attn import flash_attn_func, flash_attn_varlen_func  # noqa: F401
    except ImportError as error:
        return f"needs flash-attn 2 ({error}): pip install 'megakexue[gpu]'"
    return None


def choose_backend(
    setting: str, device: str, dtype: torch.dtype, d_head: int, d_value: int, seq_len: int
) -> tuple[Backend, str]:
    """Return the backend for a device type and the reason, which is printed at the start.

    Raises:
        UserError: the config asks for a backend that cannot run here.
    """
    if setting != "auto":
        obstacle = _obstacle(setting, device, dtype, d_head, d_value)
        if obstacle is not None:
            raise UserError(f"model.attention.backend={setting} {obstacle}; or use auto")
        return setting, "model.attention.backend"  # type: ignore[return-value]
    if device == "cuda":
        obstacles: list[str] = []
        candidates: tuple[Backend, ...] = ("flash", "varlen", "flex")
        for backend in candidates:
            obstacle = _obstacle(backend, device, dtype, d_head, d_value)
            if obstacle is None:
                return backend, "; ".join(obstacles) or "the first choice on CUDA"
            obstacles.append(f"{backend} {obstacle}")
        return "sdpa", "; ".join(obstacles)
    if d_head != d_value:
        return "blocked", f"on CPU no other form takes values of width {d_value} beside keys of {d_head}"
    if seq_len > MAX_BLOCKED:
        return "sdpa", f"rows of {seq_len} tokens are too long for the blocked form's memory"
    return "blocked", "the fastest form on CPU for packed documents"


class Layout:
    """What each query of a batch may see; one object for all layers, so that each mask is built once a batch.

    Args:
        positions: of the queries in their documents, from 0.
        cu_seqlens: boundaries of packed documents over the flattened b*t tokens, row ends included; None: each row is
            one document.
        n_keys: None: the keys are the row's own tokens. A number is cached decoding: key s of a row is the token at
            position s of its only document, and rows may be at different positions.
    """

    def __init__(
        self, positions: Int64[Tensor, "b t"], cu_seqlens: Int32[Tensor, " n"] | None, *, n_keys: int | None = None
    ) -> None:
        assert n_keys is None or cu_seqlens is None, "a cache holds one document a row"
        self.positions, self.cu_seqlens, self.n_keys = positions, cu_seqlens, n_keys
        self._biases: dict[tuple[torch.dtype, int], Tensor] = {}
        self._blocks: dict[torch.dtype, list[tuple[slice, list[tuple[int, int, int, Tensor]]]]] = {}

    @property
    def is_cached(self) -> bool:
        return self.n_keys is not None

    @cached_property
    def starts(self) -> Int64[Tensor, "b t"]:
        """The first key of each query's document."""
        assert not self.is_cached
        return torch.arange(self.positions.shape[1], device=self.positions.device) - self.positions

    @cached_property
    def visible(self) -> Bool[Tensor, "#b t s"]:
        """True where a query sees a key."""
        t, device = self.positions.shape[1], self.positions.device
        if self.n_keys is not None:
            return torch.arange(self.n_keys, device=device) <= self.positions[:, :, None]
        key = torch.arange(t, device=device)
        causal = key <= key[:, None]
        return causal[None] if self.cu_seqlens is None else causal & (key >= self.starts[:, :, None])

    def bias(self, dtype: torch.dtype, repeats: int) -> Float[Tensor, "#b 1 rt s"]:
        """Return 0 where a query sees a key, else -inf, with the queries repeated for the heads of a group."""
        if (dtype, repeats) not in self._biases:
            visible = self.visible[:, None].repeat(1, 1, repeats, 1)
            self._biases[dtype, repeats] = _bias(visible, dtype)
        return self._biases[dtype, repeats]

    def blocks(self, dtype: torch.dtype) -> list[tuple[slice, list[tuple[int, int, int, Tensor]]]]:
        """Return (rows, blocks) pairs; in a block (low, high, begin, bias) queries low to high see keys begin to high.

        The bias is for the last of these keys, [1 or rows, queries, keys]: 0, or -inf for what is not seen after all.
        """
        if dtype not in self._blocks:
            (b, t), device = self.positions.shape, self.positions.device
            is_packed = self.cu_seqlens is not None
            # rows have different documents, and a long row alone skips more keys than all of them together
            alone = is_packed and t > 2 * BLOCK
            # at once, since reading single numbers of a tensor is slow
            starts = self.starts.tolist() if is_packed else [[0] * t]
            index = torch.arange(t, device=device)
            self._blocks[dtype] = []
            for rows in [slice(i, i + 1) for i in range(b)] if alone else [slice(0, b)]:
                row_blocks = []
                for low in range(0, t, BLOCK):
                    high = min(low + BLOCK, t)
                    begin, latest = min(row[low] for row in starts[rows]), max(row[high - 1] for row in starts[rows])
                    # with one document in the block, all its queries see all keys before the block
                    key = index[begin if latest > begin else low : high]
                    seen = (key <= index[low:high, None])[None]
                    if latest > begin:
                        seen = seen & (key >= self.starts[rows, low:high, None])
                    row_blocks.append((low, high, begin, _bias(seen, dtype)))
                self._blocks[dtype].append((rows, row_blocks))
        return self._blocks[dtype]

    @cached_property
    def block_mask(self) -> Any:
        """The BlockMask that FlexAttention's create_block_mask gives, without its b t^2 comparisons."""
        from torch.nn.attention.flex_attention import BlockMask

        t, starts = self.positions.shape[1], self.starts

        low = torch.arange(0, t, BLOCK, device=starts.device)
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


def _bias(visible: Bool[Tensor, "..."], dtype: torch.dtype) -> Float[Tensor, "..."]:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


def attend(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b s g d"],
    v: Float[Tensor, "b s g e"],
    layout: Layout,
    *,
    backend: Backend,
    scale: float,
) -> Float[Tensor, "b t h e"]:
    """Attend to the keys that `layout` shows, with the softmax of scale * q.k.

    d and e may differ, except in flash and varlen.
    """
    assert k.shape[1] == (q.shape[1] if layout.n_keys is None else layout.n_keys), "keys that the layout does not know"
    if backend == "reference":
        return _reference(q, k, v, layout, scale)
    if layout.is_cached:
        return _sdpa_cached(q, k, v, layout, scale)
    if backend == "blocked":
        return _blocked(q, k, v, layout, scale)
    if backend == "flash":
        return _flash(q, k, v, layout, scale)
    if backend == "varlen" and layout.cu_seqlens is not None:
        return _varlen(q, k, v, layout.cu_seqlens, scale)
    if backend == "flex" and layout.cu_seqlens is not None:
        return _flex(q, k, v, layout, scale)
    return _sdpa(q, k, v, layout, scale)


def _reference(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b s g d"],
    v: Float[Tensor, "b s g e"],
    layout: Layout,
    scale: float,
) -> Float[Tensor, "b t h e"]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(dtype).unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("btgrd,bsgd->bgrts", grouped, k.to(dtype)).mul(scale)
    weights = scores.masked_fill(~layout.visible[:, None, None], -torch.inf).softmax(-1)
    return torch.einsum("bgrts,bsge->btgre", weights, v.to(dtype)).flatten(2, 3).to(q.dtype)


def _sdpa(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b t g d"],
    v: Float[Tensor, "b t g e"],
    layout: Layout,
    scale: float,
) -> Float[Tensor, "b t h e"]:
    mask = None if layout.cu_seqlens is None else layout.bias(q.dtype, 1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    is_grouped = q.shape[1] != k.shape[1]
    # cuDNN's backward gives NaN with a mask on some lengths (pytorch 196678), so a mask never reaches it
    backends = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if mask is None:
        backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *backends]
    elif q.device.type == "cpu":
        backends = [SDPBackend.FLASH_ATTENTION, *backends]
    if is_grouped and q.device.type == "cuda" and (mask is not None or q.dtype == torch.float32 or q.shape[3] > 256):
        # only the memory-efficient kernel takes these; it takes no groups, and the next in line keeps the whole square
        r = q.shape[1] // k.shape[1]
        k, v, is_grouped = k.repeat_interleave(r, dim=1), v.repeat_interleave(r, dim=1), False
    with sdpa_kernel(backends, set_priority=True):
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=is_grouped
        )
    return out.transpose(1, 2)


def _sdpa_cached(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b s g d"],
    v: Float[Tensor, "b s g e"],
    layout: Layout,
    scale: float,
) -> Float[Tensor, "b t h e"]:
    """Attend with few queries to many keys: the heads of a group become queries, so the cache is never copied."""
    t, g, r = q.shape[1], k.shape[2], q.shape[2] // k.shape[2]
    q = q.unflatten(2, (g, r)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    backends = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if q.device.type == "cpu":
        backends = [SDPBackend.FLASH_ATTENTION, *backends]
    with sdpa_kernel(backends, set_priority=True):
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=layout.bias(q.dtype, r), scale=scale)
    return out.unflatten(2, (r, t)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _blocked(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b t g d"],
    v: Float[Tensor, "b t g e"],
    layout: Layout,
    scale: float,
) -> Float[Tensor, "b t h e"]:
    """Compute blocks of queries against the keys they can see, in plain matrix products.

    On CPU this beats the fused kernel, above all in bf16 and with packed documents (tools/benchmark.py).
    """
    g = k.shape[2]
    # the heads of a group become rows of one matrix, so that k and v are never copied per head
    q = q.unflatten(2, (g, -1)).permute(0, 2, 3, 1, 4)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    out = [
        _Blocked.apply(*(x[rows].flatten(0, 1) for x in (q, k, v)), blocks, scale).unflatten(0, (-1, g))
        for rows, blocks in layout.blocks(q.dtype)
    ]
    return (torch.cat(out) if len(out) > 1 else out[0]).permute(0, 3, 1, 2, 4).flatten(2, 3)


class _Blocked(torch.autograd.Function):
    """The blocked form over q [bg, r, t, d], k [bg, t, d], v [bg, t, e].

    Left to autograd, the backward pass would fill and add a whole k and v for each block, a fifth of the time.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: list[tuple[int, int, int, Tensor]], scale: float
    ) -> Tensor:
        r, unused = q.shape[1], q.new_empty(1)
        out, weights = q.new_empty(*q.shape[:3], v.shape[2]), []
        for low, high, begin, bias in blocks:
            keys = k[:, begin:high].transpose(1, 2)
            scores = torch.baddbmm(unused, q[:, :, low:high].flatten(1, 2), keys, beta=0, alpha=scale)
            if len(bias) > 1:
                bias = bias.repeat_interleave(len(q) // len(bias), 0)
            scores.unflatten(1, (r, -1))[..., -bias.shape[2] :] += bias[:, None]
            weight = scores.softmax(-1)
            out[:, :, low:high] = (weight @ v[:, begin:high]).unflatten(1, (r, -1))
            if any(ctx.needs_input_grad):
                weights.append(weight)
        ctx.save_for_backward(q, k, v, *weights)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *weights = ctx.saved_tensors
        r, unused = q.shape[1], q.new_empty(1)
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (low, high, begin, _), weight in zip(ctx.blocks, weights):
            queries, keys, d_part = (
                q[:, :, low:high].flatten(1, 2),
                k[:, begin:high],
                d_out[:, :, low:high].flatten(1, 2),
            )
            d_v[:, begin:high].baddbmm_(weight.transpose(1, 2), d_part)
            d_weight = d_part @ v[:, begin:high].transpose(1, 2)
            d_scores = torch._softmax_backward_data(d_weight, weight, -1, weight.dtype)
            d_k[:, begin:high].baddbmm_(d_scores.transpose(1, 2), queries, alpha=ctx.scale)
            d_queries = torch.baddbmm(unused, d_scores, keys, beta=0, alpha=ctx.scale)
            d_q[:, :, low:high] = d_queries.unflatten(1, (r, -1))
        return d_q, d_k, d_v, None, None


def _flash(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b t g d"],
    v: Float[Tensor, "b t g e"],
    layout: Layout,
    scale: float,
) -> Float[Tensor, "b t h e"]:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    if layout.cu_seqlens is None:
        return flash_attn_func(q, k, v, softmax_scale=scale, causal=True)
    b, t = q.shape[:2]
    longest = t  # an upper bound is enough for the kernel's grid, and reading the true one would wait
    boundaries = (layout.cu_seqlens, layout.cu_seqlens, longest, longest)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return flash_attn_varlen_func(q, k, v, *boundaries, softmax_scale=scale, causal=True).unflatten(0, (b, t))


def _varlen(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b t g d"],
    v: Float[Tensor, "b t g e"],
    cu_seqlens: Int32[Tensor, " n"],
    scale: float,
) -> Float[Tensor, "b t h e"]:
    from torch.nn.attention.varlen import varlen_attn

    b, t = q.shape[:2]
    boundaries = (cu_seqlens, cu_seqlens, t, t)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    # cuDNN, torch's other choice, would plan anew for each number of documents
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = varlen_attn(q, k, v, *boundaries, scale=scale, window_size=(-1, 0), enable_gqa=True)
    assert isinstance(out, Tensor)
    return out.unflatten(0, (b, t))


def _flex(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b t g d"],
    v: Float[Tensor, "b t g e"],
    layout: Layout,
    scale: float,
) -> Float[Tensor, "b t h e"]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    flex = _flex_attention(is_compiled=q.device.type == "cuda")
    return flex(q, k, v, block_mask=layout.block_mask, scale=scale, enable_gqa=True).transpose(1, 2)


@cache
def _flex_attention(is_compiled: bool) -> Any:
    """Import FlexAttention, which takes seconds; uncompiled, it keeps the whole square and has no backward on CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if is_compiled else flex_attention
