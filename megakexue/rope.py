"""RoPE: the bound rule for the base, and the rotary tables with the log n factor folded into the query's.

The bound rule (10122, arXiv 2405.14591). With q and k of i.i.d. components, a similar key is preferred over a random
one at distance m exactly when

    f_b(m) = sum_{i < d/2} cos(m b^(-2i/d)) >= 0.

A base serves a context of L tokens when this holds for every m < L. Validity is not monotone in b, so bisection is
wrong; rounded published values violate it (12000 for 2k, 27000 for 4k). Both searches below are exact instead: f_b(m)
changes with ln b at a rate of at most K(m), so each evaluation proves a whole interval of bases valid or invalid.

The log n factor (8823): scores are multiplied by ln(max(n, floor)) / ln(base), n = keys that the query may see in its
own document = position + 1. Since RoPE is linear, the factor is folded into the query's cos and sin.

What must stay true: f_b, the angles and the factors are computed in float64; tables are float32 and live outside any
module, so that casting a model cannot touch them.
"""

import functools
import math

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from megakexue.config import AttentionConfig, UserError

SEARCH_LIMIT = 1000
"""The search for a safe base starts at this multiple of the context (the article's own range)."""


def rotary_sum(base: float, d_rotary: int, context: int) -> npt.NDArray[np.float64]:
    """Return f_b(m) for m = 0 ... context-1, in float64, accurate to about 1e-12 d.

    With m = s a + c, cos(m w) = cos(s a w) cos(c w) - sin(s a w) sin(c w): a product of two small matrices, so a
    context of 32k costs a millisecond.
    """
    theta = base ** (-2.0 * np.arange(d_rotary // 2) / d_rotary)
    step = max(1, math.isqrt(context))
    coarse = np.outer(step * np.arange(-(-context // step)), theta)
    fine = np.outer(np.arange(step), theta)
    total = np.cos(coarse) @ np.cos(fine).T - np.sin(coarse) @ np.sin(fine).T
    return total.reshape(-1)[:context]


def _slope(base: float, d_rotary: int, context: int) -> npt.NDArray[np.float64]:
    """Bound |d f_b(m) / d ln b| for all bases from `base` up: m sum_i (2i/d) b^(-2i/d)."""
    x = 2.0 * np.arange(d_rotary // 2) / d_rotary
    return np.arange(context) * float((x * base**-x).sum()) + 1e-300


def first_violation(base: float, d_rotary: int, context: int) -> int | None:
    """Return the first m < context with f_b(m) < 0, or None when the base is valid."""
    negative = np.flatnonzero(rotary_sum(base, d_rotary, context) < 0)
    return int(negative[0]) if negative.size else None


def last_invalid_base(d_rotary: int, context: int, tolerance: float = 1e-7) -> float:
    """Return the base above which every base up to SEARCH_LIMIT * context is valid, to a relative `tolerance`.

    Walks down from the limit: where min_m f/K = r, every base in [b e^-r, b] is valid, as K is evaluated at the lower
    end of the step.

    Raises:
        UserError: the limit itself is invalid, so no safe base exists in the range.
    """
    log_base = math.log(SEARCH_LIMIT * context)
    while True:
        f = rotary_sum(math.exp(log_base), d_rotary, context)
        if f.min() < 0:
            if log_base == math.log(SEARCH_LIMIT * context):
                raise UserError(
                    f"no RoPE base up to {SEARCH_LIMIT} x {context} satisfies the bound rule for a rotary width of "
                    f"{d_rotary}: set model.rope.base to a number, or use a wider head or a shorter context"
                )
            return math.exp(log_base)
        reach = 0.05
        reach = min(reach, float((f / _slope(math.exp(log_base - reach), d_rotary, context))[1:].min()))
        log_base -= max(reach, tolerance)


def infimum_base(d_rotary: int, context: int, tolerance: float = 1e-9) -> float:
    """Return b* = inf of the valid bases, to a relative `tolerance`.

    Walks up from 2: where some f = -c < 0, every base in [b, b e^(c/K)] is invalid.

    Raises:
        UserError: no base up to SEARCH_LIMIT * context is valid.
    """
    log_base = math.log(2.0)
    while log_base <= math.log(SEARCH_LIMIT * context):
        base = math.exp(log_base)
        f = rotary_sum(base, d_rotary, context)
        if f.min() >= 0:
            return base
        log_base += max(float((-f / _slope(base, d_rotary, context)).max()), tolerance)
    raise UserError(f"no RoPE base up to {SEARCH_LIMIT} x {context} is valid for a rotary width of {d_rotary}")


@functools.cache
def safe_base(d_rotary: int, context: int) -> float:
    """Return a base for `context` tokens above the last invalid one, rounded up to three digits and verified."""
    lowest = last_invalid_base(d_rotary, context)
    unit = 10.0 ** (math.floor(math.log10(lowest)) - 2)
    base = math.ceil(lowest / unit * (1 + 1e-6)) * unit
    assert first_violation(base, d_rotary, context) is None
    return base


def log_n_factor(n: Int64[Tensor, "*n"] | Float[Tensor, "*n"], base: int, floor: int) -> Float[Tensor, "*n"]:
    """Return ln(max(n, floor)) / ln(base) in float64 for n visible keys (8823; the floor is bert4keras's)."""
    return n.double().clamp(min=floor).log() / math.log(base)


class RotaryTables:
    """cos and sin by position, float32, grown on demand and kept on the device where they are used.

    Query tables carry the log n factor of position + 1 visible keys when `attention.scale` is log_n.
    """

    def __init__(self, d_rotary: int, base: float, attention: AttentionConfig) -> None:
        self.d_rotary, self.base, self.attention = d_rotary, base, attention
        self._tables: Float32[Tensor, "position 2 2 pair"] | None = None

    def __call__(self, positions: Int64[Tensor, "b t"], n_positions: int) -> Float32[Tensor, "b t 2 2 pair"]:
        """Gather [query or key, cos or sin] for each position; all of them must be below `n_positions`."""
        tables = self._tables
        if tables is None or len(tables) < n_positions or tables.device != positions.device:
            tables = self._tables = self._make(n_positions).to(positions.device)
        return tables[positions]

    def _make(self, n_positions: int) -> Float32[Tensor, "position 2 2 pair"]:
        theta = self.base ** (-2.0 * torch.arange(self.d_rotary // 2, dtype=torch.float64) / self.d_rotary)
        position = torch.arange(n_positions, dtype=torch.float64)
        angles = torch.outer(position, theta)
        key = torch.stack([angles.cos(), angles.sin()], dim=1)
        query = key
        if self.attention.scale == "log_n":
            factor = log_n_factor(position + 1, self.attention.log_n_base, self.attention.log_n_floor)
            query = key * factor[:, None, None]
        return torch.stack([query, key], dim=1).float()


def rotate(x: Float[Tensor, "b t h d"], cos_sin: Float32[Tensor, "b t 2 pair"]) -> Float[Tensor, "b t h d"]:
    """Rotate the pairs (x_j, x_(j + d/2)) in float32, rounding once at the end."""
    cos, sin = cos_sin[:, :, None, 0], cos_sin[:, :, None, 1]
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
