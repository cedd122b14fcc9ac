"""Causal attention inside documents: one signature, several backends with equal results.

    o_t = sum_s softmax_s(scale q_t . k_s) v_s,   s <= t and s in the document of t.

Small letters, as in megakexue/model.py: b batch, t query position, s key position, h query heads, g key/value heads,
r = h/g query heads in a group, d head width, e value width. Head h reads key/value head h // r.

A query sees a key when it is not later and `position + 1` keys back at most, so positions that restart at zero say
where documents begin. With fewer queries than keys (cached decoding) the queries are the last ones of the row.

What must stay true: the backends agree to rounding; no logit of a document depends on another document.
"""

import functools
import importlib.util
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from megakexue.config import UserError

Backend = Literal["flash", "sdpa", "blocked", "reference"]

BLOCK = 128
"""Queries in a block of the blocked form: with a row of 512, 4 blocks compute 5/8 of the square."""
MAX_BLOCKED = 4096
"""The blocked form keeps all probabilities for the backward pass; beyond this row length SDPA takes over."""


@functools.cache
def choose_backend(setting: str, device: str, dtype: torch.dtype, d_head: int, seq_len: int) -> tuple[Backend, str]:
    """Return the backend for a device type and a sentence that says why.

    Raises:
        UserError: the config asks for a backend that cannot run here.
    """
    flash_installed = importlib.util.find_spec("flash_attn") is not None
    if setting == "auto":
        if device == "cuda":
            if flash_installed and dtype != torch.float32 and d_head <= 256:
                return "flash", "flash-attn is installed"
            why = "flash-attn is not installed" if not flash_installed else f"flash-attn takes no {dtype}, d={d_head}"
            return "sdpa", why
        if seq_len > MAX_BLOCKED:
            return "sdpa", f"rows of {seq_len} tokens are too long for the blocked form's memory"
        return "blocked", "the fastest form on CPU"
    if setting == "flash":
        if device != "cuda" or dtype == torch.float32:
            raise UserError(
                f"model.attention.backend=flash needs a CUDA device and bf16 or fp16, not {device}, {dtype}: use auto"
            )
        if not flash_installed:
            raise UserError("model.attention.backend=flash needs flash-attn: pip install 'megakexue[gpu]', or use auto")
    return setting, "model.attention.backend"  # type: ignore[return-value]


def attend(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b s g d"],
    v: Float[Tensor, "b s g e"],
    positions: Int64[Tensor, "b t"],
    cu_seqlens: Int32[Tensor, " n"] | None,
    *,
    backend: Backend,
) -> Float[Tensor, "b t h e"]:
    """Attend causally inside documents, with the softmax scale 1/sqrt(d).

    Args:
        positions: of the queries in their documents, from 0.
        cu_seqlens: boundaries of the documents over the flattened b*t tokens, row ends included; None says that each
            row is one document. Only the flash backend reads the numbers, the others read `positions`.
    """
    scale = q.shape[-1] ** -0.5
    if backend == "flash" and cu_seqlens is not None:
        return _flash_varlen(q, k, v, cu_seqlens, scale)
    if backend == "flash":
        from flash_attn import flash_attn_func

        return flash_attn_func(q, k, v, softmax_scale=scale, causal=True)
    starts = None
    if cu_seqlens is not None:
        n_before = k.shape[1] - q.shape[1]
        starts = torch.arange(n_before, k.shape[1], device=q.device) - positions
    if backend == "sdpa":
        return _sdpa(q, k, v, starts, scale)
    if backend == "blocked":
        return _blocked(q, k, v, starts, scale)
    return _reference(q, k, v, starts, scale)


def _visible(
    n_queries: int, n_keys: int, starts: Int64[Tensor, "b t"] | None, device: torch.device
) -> Bool[Tensor, "*b t s"]:
    """True where a query sees a key; `starts` is the first key of each query's document."""
    key = torch.arange(n_keys, device=device)
    query = torch.arange(n_keys - n_queries, n_keys, device=device)
    visible = key <= query[:, None]
    return visible if starts is None else visible & (key >= starts[:, :, None])


def _reference(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b s g d"],
    v: Float[Tensor, "b s g e"],
    starts: Int64[Tensor, "b t"] | None,
    scale: float,
) -> Float[Tensor, "b t h e"]:
    b, t, h, d = q.shape
    grouped = q.view(b, t, k.shape[2], -1, d)
    scores = torch.einsum("btgrd,bsgd->bgrts", grouped, k).mul(scale)
    visible = _visible(t, k.shape[1], starts, q.device)
    visible = visible if starts is None else visible[:, None, None]
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("bgrts,bsge->btgre", weights, v).reshape(b, t, h, -1)


def _sdpa(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b s g d"],
    v: Float[Tensor, "b s g e"],
    starts: Int64[Tensor, "b t"] | None,
    scale: float,
) -> Float[Tensor, "b t h e"]:
    mask = None
    if starts is not None:
        mask = _visible(q.shape[1], k.shape[1], starts, q.device)[:, None]
    elif q.shape[1] != k.shape[1]:
        mask = _visible(q.shape[1], k.shape[1], None, q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    # cuDNN's backward gives NaN with a mask on some lengths (pytorch 196678), so a mask never reaches it
    backends = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if mask is None:
        backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *backends]
    elif q.device.type == "cpu":
        backends = [SDPBackend.FLASH_ATTENTION, *backends]
    elif grouped:
        # the memory-efficient kernel takes no groups; without this the call would fall back to the full square
        r = q.shape[1] // k.shape[1]
        k, v, grouped = k.repeat_interleave(r, dim=1), v.repeat_interleave(r, dim=1), False
    with sdpa_kernel(backends, set_priority=True):
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )
    return out.transpose(1, 2)


def _blocked(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b s g d"],
    v: Float[Tensor, "b s g e"],
    starts: Int64[Tensor, "b t"] | None,
    scale: float,
) -> Float[Tensor, "b t h e"]:
    """Compute blocks of queries against the keys they can see, in plain matrix products.

    On CPU this beats the fused kernel, above all in bf16 and with packed documents (tools/benchmark.py).
    """
    b, t, h, d = q.shape
    if starts is not None and b > 1 and t > 2 * BLOCK:
        # rows have different documents, and a long row alone skips more keys than all of them together
        rows = [_blocked(q[[i]], k[[i]], v[[i]], starts[[i]], scale) for i in range(b)]
        return torch.cat(rows)
    s, g, e = k.shape[1], k.shape[2], v.shape[3]
    r, n_before = h // g, s - t
    # the heads of a group become rows of one matrix, so that k and v are never copied per head
    grouped = q.view(b, t, g, r, d).permute(0, 2, 3, 1, 4)
    keys, values = (x.transpose(1, 2).reshape(b * g, s, -1) for x in (k, v))
    out = []
    for low in range(0, t, BLOCK):
        high = min(low + BLOCK, t)
        n, end = high - low, n_before + high
        begin = 0 if starts is None else int(starts[:, low].min())
        key = torch.arange(begin, end, device=q.device)
        visible = key <= torch.arange(n_before + low, end, device=q.device)[:, None]
        if starts is not None:
            visible = visible & (key >= starts[:, None, None, low:high, None])
        mask = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill_(~visible, -torch.inf)
        mask = mask.expand(b, g, r, n, end - begin) if starts is not None else mask.repeat(r, 1)
        queries = grouped[:, :, :, low:high].reshape(b * g, r * n, d)
        bias = mask.reshape(-1, r * n, end - begin)
        scores = torch.baddbmm(bias, queries, keys[:, begin:end].transpose(1, 2), alpha=scale)
        out.append((scores.softmax(-1) @ values[:, begin:end]).view(b, g, r, n, e))
    return torch.cat(out, dim=3).permute(0, 3, 1, 2, 4).reshape(b, t, h, e)


def _flash_varlen(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b t g d"],
    v: Float[Tensor, "b t g e"],
    cu_seqlens: Int32[Tensor, " n"],
    scale: float,
) -> Float[Tensor, "b t h e"]:
    from flash_attn import flash_attn_varlen_func

    longest = q.shape[1]  # an upper bound is enough for the kernel's grid, and reading the true one would wait
    out = flash_attn_varlen_func(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens, cu_seqlens, longest, longest,
        softmax_scale=scale, causal=True,
    )  # fmt: skip
    return out.view(*q.shape[:3], v.shape[3])
