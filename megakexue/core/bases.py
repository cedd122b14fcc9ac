"""The bound rule for RoPE's base (10122, arXiv 2405.14591), and the search for the bases that satisfy it.

With q and k of i.i.d. components, a similar key is preferred over a random one at distance m exactly when

    f_b(m) = sum_{i < d/2} cos(m b^(-2i/d)) >= 0.

A base b serves a context of L tokens when this holds for every m < L. Such a base is called valid.

Validity is not monotone in b: above a valid base there may be invalid ones. So bisection is wrong, and rounded values
that were published violate the rule (12000 for 2k, 27000 for 4k). Both searches below are exact instead: the rate at
which f_b(m) changes with ln b is bounded, so each evaluation proves that a whole interval of bases is valid or invalid.
rope_bases.tsv holds what they found for the usual widths and contexts.

An unrotated pair of a head adds cos 0 = 1. A head with n unrotated pairs has the rule f_b(m) + n >= 0. When at least
half of the head is unrotated, every base satisfies it. With fewer unrotated pairs the rule still admits useless bases:
5 for 96 rotated of 128 dimensions at 1k tokens. So a base is chosen by the rotated part alone: if that satisfies its
rule, the whole head does too.

What must stay true: f_b is computed in float64.
"""

import functools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from megakexue.config import ModelConfig, require

LOWEST_BASE = 2.0
"""The least base that the searches look at. For short contexts, or many unrotated pairs, it is valid already."""
N_NEAR = 64
"""Distances m that a search follows between two looks at all distances. 32 to 512 take about the same time."""
TABLE = Path(__file__).with_name("rope_bases.tsv")
"""Infimum and last invalid base by rotary width and context; tools/rope_base.py --write-table writes it."""


def cosine_sum(theta: Float64[np.ndarray, " pair"], context: int) -> Float64[np.ndarray, " position"]:
    """Return sum_i cos(m theta_i) for m = 0 ... context-1, in float64, accurate to about 1e-12 a pair.

    With m = s a + c, cos(m w) = cos(s a w) cos(c w) - sin(s a w) sin(c w): a product of two small matrices, so a
    context of 32k costs a millisecond.
    """
    step = max(1, math.isqrt(context))
    coarse = np.outer(step * np.arange(-(-context // step)), theta)
    fine = np.outer(np.arange(step), theta)
    total = np.hstack([np.cos(coarse), np.sin(coarse)]) @ np.hstack([np.cos(fine), -np.sin(fine)]).T
    return total.reshape(-1)[:context]


def powers(base: float, d_rotary: int) -> Float64[np.ndarray, " pair"]:
    """Return b^(-2i/d), the frequencies of plain RoPE."""
    return float(base) ** (-2.0 * np.arange(d_rotary // 2) / d_rotary)


def rotary_sum(base: float, d_rotary: int, context: int) -> Float64[np.ndarray, " position"]:
    """Return f_b(m) for m = 0 ... context-1."""
    return cosine_sum(powers(base, d_rotary), context)


def first_violation(base: float, d_rotary: int, context: int, n_unrotated: int = 0) -> int | None:
    """Return the first m < context with f_b(m) + n_unrotated < 0, or None when the base is valid."""
    return first_negative(rotary_sum(base, d_rotary, context) + n_unrotated)


def first_negative(f: Float64[np.ndarray, " position"]) -> int | None:
    """Return the first index of a negative value."""
    negative = np.flatnonzero(f < 0)
    return int(negative[0]) if negative.size else None


def _proven_from(d_rotary: int, context: int, n_unrotated: int) -> float:
    """Return ln of a base such that every base from it on is valid.

    It is found by bisection of a lower bound of f_b(m), in which cos(m theta) counts as -1 once m theta has passed pi:
    this bound falls with m and rises with b.

    Raises:
        UserError: there is no such base, as with a single pair.
    """
    x = 2.0 * np.arange(d_rotary // 2) / d_rotary

    def is_valid(log_base: float) -> bool:
        angle = (context - 1) * np.exp(-x * log_base)
        return float(np.cos(np.minimum(angle, math.pi)).sum()) + n_unrotated >= 0

    low, high = math.log(LOWEST_BASE), 300.0
    require(
        is_valid(high),
        f"no RoPE base satisfies the bound rule (10122) for a rotary width of {d_rotary} and {context} tokens: set "
        "model.rope.base to a number, or use a wider head or a shorter context",
    )
    if is_valid(low):
        return low
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if is_valid(middle) else (middle, high)
    return high


def _at(base: float, d_rotary: int, m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return f_b(m) and d f_b(m) / d ln b at the given distances."""
    x, theta = 2.0 * np.arange(d_rotary // 2) / d_rotary, powers(base, d_rotary)
    angles = np.outer(m, theta)
    return np.cos(angles).sum(1), m * (np.sin(angles) @ (x * theta))


def _rate(base: float, d_rotary: int) -> float:
    """Return K/m = sum_i (2i/d) b^(-2i/d), where K bounds |d f_b(m) / d ln b| for all bases from `base` up."""
    x = 2.0 * np.arange(d_rotary // 2) / d_rotary
    return float((x * base**-x).sum())


def _reach(gap: np.ndarray, slope: np.ndarray, m: np.ndarray, base: float, d_rotary: int) -> np.ndarray:
    """Return how far ln b can move, within bases from `base` up, before `gap` can fall to 0.

    The gap falls at the rate `slope` here, and nowhere faster than K. Its second derivative is at most
    m sum x^2 theta + m^2 sum x^2 theta^2, x = 2i/d. With this quadratic bound a search passes a zero in a few steps;
    with K alone the steps would become ever smaller.
    """
    x, theta = 2.0 * np.arange(d_rotary // 2) / d_rotary, powers(base, d_rotary)
    curvature = m * float((x**2 * theta).sum()) + m**2 * float((x**2 * theta**2).sum())
    root = np.sqrt(slope**2 + 2 * curvature * gap)
    return np.maximum(gap / (m * _rate(base, d_rotary)), (root - slope) / curvature)


def last_invalid_base(d_rotary: int, context: int, n_unrotated: int = 0, tolerance: float = 1e-7) -> float:
    """Return the base above which every base is valid, to a relative `tolerance`; LOWEST_BASE when all are valid.

    The search walks down from a base that is proven to have only valid ones above it. A look at all distances m proves
    an interval of bases valid, but for the few distances that are nearest to turning negative. These few are then
    followed through the interval, in steps of proven length.

    Raises:
        UserError: there is no such base.
    """
    log_base, lowest = _proven_from(d_rotary, context, n_unrotated), math.log(LOWEST_BASE)
    m, n_near = np.arange(1.0, context), min(N_NEAR, context - 2)
    while log_base > lowest:
        f = rotary_sum(math.exp(log_base), d_rotary, context)[1:] + n_unrotated
        if f.min() < 0:
            return math.exp(log_base)
        reach = f / (m * _rate(math.exp(log_base - 0.05), d_rotary))
        order = np.argpartition(reach, n_near)[: n_near + 1]
        near, end = m[order], log_base - max(min(0.05, reach[order[-1]]), tolerance)
        while log_base > end:
            f, slope = _at(math.exp(log_base), d_rotary, near)
            f += n_unrotated
            if f.min() < 0:
                return math.exp(log_base)
            log_base -= max(_reach(f, slope, near, math.exp(end), d_rotary).min(), tolerance)
        log_base = end
    return LOWEST_BASE


def infimum_base(d_rotary: int, context: int, n_unrotated: int = 0, tolerance: float = 1e-9) -> float:
    """Return the least valid base from LOWEST_BASE on, to a relative `tolerance`; what is returned is valid.

    The search walks up. A base is invalid as long as f_b is negative at a single distance, so the distances with the
    most negative values are followed, in steps of proven length. All distances are looked at where these few have
    turned positive.

    Raises:
        UserError: no base is valid.
    """
    _proven_from(d_rotary, context, n_unrotated)
    log_base = math.log(LOWEST_BASE)
    m, n_near = np.arange(1.0, context), min(N_NEAR, context - 2)
    while True:
        f = rotary_sum(math.exp(log_base), d_rotary, context)[1:] + n_unrotated
        if f.min(initial=0) >= 0:
            return math.exp(log_base)
        near = m[np.argpartition(f / m, n_near)[: n_near + 1]]
        while True:
            base = math.exp(log_base)
            f, slope = _at(base, d_rotary, near)
            bad = f + n_unrotated < 0
            if not bad.any():
                # the two ways to sum may differ in the sign of a value that is 0 but for rounding
                log_base += tolerance
                break
            gap = -f[bad] - n_unrotated
            log_base += max(_reach(gap, slope[bad], near[bad], base, d_rotary).max(), tolerance)


class Bases(NamedTuple):
    infimum: float
    last_invalid: float


@functools.cache
def shipped_bases() -> dict[tuple[int, int], Bases]:
    """Read rope_bases.tsv; return the bases by (rotary width, context)."""
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    rows = [line.split("\t") for line in lines[1:]]
    return {(int(d), int(context)): Bases(float(low), float(last)) for d, context, low, last in rows}


@functools.cache
def find_bases(d_rotary: int, context: int, n_unrotated: int = 0) -> Bases:
    """Return infimum and last invalid base, from the shipped table or by search: half a minute for 64k tokens."""
    if n_unrotated == 0 and (d_rotary, context) in shipped_bases():
        return shipped_bases()[d_rotary, context]
    infimum = infimum_base(d_rotary, context, n_unrotated)
    return Bases(infimum, last_invalid_base(d_rotary, context, n_unrotated))


def _round_up(base: float, n_digits: int) -> float:
    unit = 10.0 ** (math.floor(math.log10(base)) + 1 - n_digits)
    return float(f"{math.ceil(base / unit) * unit:.{n_digits}g}")


def safe_base(d_rotary: int, context: int, n_unrotated: int = 0) -> float:
    """Return the first base of three digits above the last invalid one, after a check that it is valid."""
    base = _round_up(find_bases(d_rotary, context, n_unrotated).last_invalid * (1 + 1e-6), 3)
    assert first_violation(base, d_rotary, context, n_unrotated) is None
    return base


def smallest_base(d_rotary: int, context: int, n_unrotated: int = 0) -> float:
    """Return the infimum, rounded up to seven digits, or to more where that is needed for a valid base."""
    infimum = find_bases(d_rotary, context, n_unrotated).infimum
    rounded = (_round_up(infimum, n_digits) for n_digits in range(7, 16))
    return next(base for base in rounded if first_violation(base, d_rotary, context, n_unrotated) is None)


def choose_base(config: ModelConfig, context: int) -> float:
    """Return `rope.base`; for auto, the base that `rope.rule` chooses for the rotated part of a head.

    An extension other than `base` keeps the base that the weights were trained with, which is the one for
    `rope.trained_context`.

    Raises:
        UserError: no base satisfies the rule for this width and context.
    """
    rope = config.rope
    if not isinstance(rope.base, str):
        return float(rope.base)
    if rope.trained_context is not None and rope.extension != "base":
        context = rope.trained_context
    choose = safe_base if rope.rule == "safe" else smallest_base
    return choose(config.rotary_width, context)
