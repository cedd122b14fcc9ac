"""RoPE: the bound rule for the base, frequencies for longer contexts, the query's factor, the tables of cos and sin.

The bound rule (10122, arXiv 2405.14591). With q and k of i.i.d. components, a similar key is preferred over a random
one at distance m exactly when

    f_b(m) = sum_{i < d/2} cos(m b^(-2i/d)) >= 0.

A base serves a context of L tokens when this holds for every m < L. Validity is not monotone in b, so bisection is
wrong; rounded published values violate it (12000 for 2k, 27000 for 4k). Both searches below are exact instead: the
rate at which f_b(m) changes with ln b is bounded, so each evaluation proves a whole interval of bases valid or invalid.
rope_bases.tsv holds what they found for the usual widths and contexts.

An unrotated pair of a head is cos 0 = 1: a partly rotated head has f_b(m) + n >= 0, n its unrotated pairs, which is
vacuous when at least half of the head is unrotated. Short of that it admits bases that are no use: 5 for 96 of 128
dimensions at 1k tokens. So a base is chosen by the rotated part alone, which implies the rule of the head.

The query's factor (8823, 9812, 9859, YaRN's temperature): scores are multiplied by a function of n = keys that the
query may see in its own document = position + 1. Since RoPE is linear, it is folded into the query's cos and sin.

What must stay true: f_b, the angles and the factors are computed in float64; tables are float32 and live outside any
module, so that casting a model cannot touch them.
"""

import functools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from megakexue.config import ModelConfig, RopeConfig, require

LOWEST_BASE = 2.0
"""Where the searches end or begin. Short contexts, or many unrotated pairs, admit every base from there on."""
N_NEAR = 64
"""Distances that a search follows between two looks at all of them; 32 to 512 take about as long."""
TABLE = Path(__file__).with_name("rope_bases.tsv")
"""Infimum and last invalid base by width and context, written by tools/rope_base.py --write-table."""


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


def _powers(base: float, d_rotary: int) -> Float64[np.ndarray, " pair"]:
    """RoPE's own frequencies b^(-2i/d)."""
    return float(base) ** (-2.0 * np.arange(d_rotary // 2) / d_rotary)


def rotary_sum(base: float, d_rotary: int, context: int) -> Float64[np.ndarray, " position"]:
    """Return f_b(m) for m = 0 ... context-1."""
    return cosine_sum(_powers(base, d_rotary), context)


def first_violation(base: float, d_rotary: int, context: int, n_unrotated: int = 0) -> int | None:
    """Return the first m < context with f_b(m) + n_unrotated < 0, or None when the base is valid."""
    return first_negative(rotary_sum(base, d_rotary, context) + n_unrotated)


def first_negative(f: Float64[np.ndarray, " position"]) -> int | None:
    """Return the first index of a negative value."""
    negative = np.flatnonzero(f < 0)
    return int(negative[0]) if negative.size else None


def _proven_from(d_rotary: int, context: int, n_unrotated: int) -> float:
    """Return ln of a base from which on every base is valid, by bisection of a bound that is monotone in b.

    The bound takes cos(m theta) for -1 once m theta has passed pi, so that it falls with m and rises with b.

    Raises:
        UserError: there is none, as with a single pair.
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
    """Return f_b(m) and d f_b(m) / d ln b at a few distances."""
    x, theta = 2.0 * np.arange(d_rotary // 2) / d_rotary, _powers(base, d_rotary)
    angles = np.outer(m, theta)
    return np.cos(angles).sum(1), m * (np.sin(angles) @ (x * theta))


def _rate(base: float, d_rotary: int) -> float:
    """Bound |d f_b(m) / d ln b| / m for all bases from `base` up: K/m = sum_i (2i/d) b^(-2i/d)."""
    x = 2.0 * np.arange(d_rotary // 2) / d_rotary
    return float((x * base**-x).sum())


def _reach(gap: np.ndarray, slope: np.ndarray, m: np.ndarray, base: float, d_rotary: int) -> np.ndarray:
    """Return how far ln b can move, within bases from `base` up, before `gap` can fall to 0.

    The gap falls at the rate `slope` here, at most K anywhere, with a second derivative of at most
    m sum x^2 theta + m^2 sum x^2 theta^2, x = 2i/d. The quadratic bound passes a zero in a few steps, up to which K
    alone would creep.
    """
    x, theta = 2.0 * np.arange(d_rotary // 2) / d_rotary, _powers(base, d_rotary)
    curvature = m * float((x**2 * theta).sum()) + m**2 * float((x**2 * theta**2).sum())
    root = np.sqrt(slope**2 + 2 * curvature * gap)
    return np.maximum(gap / (m * _rate(base, d_rotary)), (root - slope) / curvature)


def last_invalid_base(d_rotary: int, context: int, n_unrotated: int = 0, tolerance: float = 1e-7) -> float:
    """Return the base above which every base is valid, to a relative `tolerance`; LOWEST_BASE when all are valid.

    Walks down from where all bases are proven valid. A look at all distances m proves a window of bases for all but
    the few that are nearest to turning negative; these are followed through it, each step of a proven length.

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
    """Return b* = inf of the valid bases from LOWEST_BASE on, to a relative `tolerance`; what is returned is valid.

    Walks up: a base is invalid as long as a single distance is negative, so the most negative ones are followed, each
    step of a proven length, and all are looked at where these have turned positive.

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
                log_base += tolerance  # on the sign of a sum that is 0 up to rounding, the two ways need not agree
                break
            gap = -f[bad] - n_unrotated
            log_base += max(_reach(gap, slope[bad], near[bad], base, d_rotary).max(), tolerance)


class Bases(NamedTuple):
    infimum: float
    last_invalid: float


@functools.cache
def shipped_bases() -> dict[tuple[int, int], Bases]:
    """Read rope_bases.tsv: by (rotary width, context)."""
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    rows = [line.split("\t") for line in lines[1:]]
    return {(int(d), int(context)): Bases(float(low), float(last)) for d, context, low, last in rows}


@functools.cache
def find_bases(d_rotary: int, context: int, n_unrotated: int = 0) -> Bases:
    """Return infimum and last invalid base, from the shipped table or else by search: half a minute for 64k tokens."""
    if n_unrotated == 0 and (d_rotary, context) in shipped_bases():
        return shipped_bases()[d_rotary, context]
    infimum = infimum_base(d_rotary, context, n_unrotated)
    return Bases(infimum, last_invalid_base(d_rotary, context, n_unrotated))


def _round_up(base: float, n_digits: int) -> float:
    unit = 10.0 ** (math.floor(math.log10(base)) + 1 - n_digits)
    return float(f"{math.ceil(base / unit) * unit:.{n_digits}g}")


def safe_base(d_rotary: int, context: int, n_unrotated: int = 0) -> float:
    """Return the first base of three digits above the last invalid one, verified."""
    base = _round_up(find_bases(d_rotary, context, n_unrotated).last_invalid * (1 + 1e-6), 3)
    assert first_violation(base, d_rotary, context, n_unrotated) is None
    return base


def smallest_base(d_rotary: int, context: int, n_unrotated: int = 0) -> float:
    """Return the infimum rounded up to seven digits, or as many more as it takes to be valid."""
    infimum = find_bases(d_rotary, context, n_unrotated).infimum
    rounded = (_round_up(infimum, n_digits) for n_digits in range(7, 16))
    return next(base for base in rounded if first_violation(base, d_rotary, context, n_unrotated) is None)


def choose_base(config: ModelConfig, context: int) -> float:
    """Return `rope.base`, or for auto what `rope.rule` takes for the rotated part of a head.

    Extensions other than `base` start from the base that the weights were trained with, so they look no further than
    `rope.trained_context`.

    Raises:
        UserError: the rule has no answer for this width and context.
    """
    rope = config.rope
    if not isinstance(rope.base, str):
        return float(rope.base)
    if rope.extension not in (None, "base"):
        assert rope.trained_context is not None
        context = rope.trained_context
    choose = safe_base if rope.rule == "safe" else smallest_base
    return choose(config.rotary_width, context)


def frequencies(rope: RopeConfig, d_rotary: int) -> Float64[np.ndarray, " pair"]:
    """Return the angle between neighbouring positions of each pair, for a resolved config.

    With theta the trained frequencies and k = context / trained_context:

        interpolate   theta / k
        ntk           base k, which is lambda = k^(2/d) of 9675
        ntk_exact     base k^(d/(d-2)): the last pair is theta / k (9675)
        ntk_mixed     theta_i / exp(a (i+1)^e) with a (d/2)^e = ln k, e = ntk_mixed_exponent (9706)
        yarn          (g + (1 - g) / k) theta with g = (r - 1) / 31 in [0, 1], r = theta trained_context / 2 pi, the
                      turns that a pair takes in the trained context (9948)

    Raises:
        UserError: ntk_exact of a single pair.
    """
    assert not isinstance(rope.base, str), "resolve the config first"
    base, d = float(rope.base), d_rotary
    theta = _powers(base, d)
    if rope.extension in (None, "base"):
        return theta
    assert rope.context is not None and rope.trained_context is not None, "resolve the config first"
    k = rope.context / rope.trained_context
    if rope.extension == "interpolate":
        return theta / k
    if rope.extension == "ntk":
        return _powers(base * k, d)
    if rope.extension == "ntk_exact":
        require(d > 2, f"model.rope.extension=ntk_exact needs a rotary width above {d}: use interpolate")
        return _powers(base * k ** (d / (d - 2)), d)
    if rope.extension == "ntk_mixed":
        digit = np.arange(1, d // 2 + 1) / (d // 2)
        return theta / np.exp(math.log(k) * digit**rope.ntk_mixed_exponent)
    assert rope.extension == "yarn"
    kept = np.clip((theta * rope.trained_context / (2 * math.pi) - 1) / 31, 0, 1)
    return theta * (kept + (1 - kept) / k)


def temperature(rope: RopeConfig) -> float:
    """Return what YaRN multiplies the scores by, (0.1 ln k + 1)^2 (9948); 1 without it."""
    if rope.extension != "yarn" or rope.yarn_temperature is False:
        return 1.0
    assert rope.context is not None and rope.trained_context is not None, "resolve the config first"
    return (0.1 * math.log(rope.context / rope.trained_context) + 1) ** 2


def base_notes(config: ModelConfig) -> list[str]:
    """Say what a user should know of the base of a resolved config; what violates the rule begins with WARNING.

    The sum is that of the true frequencies, since the derivation of the rule holds for any. For an extension other
    than `base` a violation is a remark: its base belongs to the weights.
    """
    rope, d, head = config.rope, config.rotary_width, config.head_width
    assert not isinstance(rope.base, str) and rope.context is not None, "resolve the config first"
    n_unrotated = (head - d) // 2
    f = cosine_sum(frequencies(rope, d), rope.context)
    alone, whole = first_negative(f), first_negative(f + n_unrotated)
    notes = []
    if n_unrotated >= d / 2:
        notes.append(
            f"RoPE rotates {d} of a head's {head} dimensions: with half or more of them unrotated every base satisfies "
            "the bound rule (10122); model.rope.base=auto applies it to the rotated part alone"
        )
    if alone is None:
        return notes
    if rope.extension in (None, "base"):
        setting = f"model.rope.base={rope.base:.10g}"
        if (d, rope.context) in shipped_bases():
            remedy = f"model.rope.base={safe_base(d, rope.context):.10g} satisfies it"
        else:
            remedy = f"tools/rope_base.py --d-rotary {d} --context {rope.context} finds one that satisfies it"
    else:
        setting = f"model.rope.extension={rope.extension} from {rope.trained_context} tokens"
        remedy = "model.rope.extension=base with a new base can satisfy it, after finetuning"
    if whole is None:
        of, m, value = "for the rotated part alone, which is stricter, ", alone, f[alone]
    else:
        of, m, value = "", whole, f[whole] + n_unrotated
    is_warning = whole is not None and rope.extension in (None, "base")
    notes.append(
        f"{'WARNING: ' if is_warning else ''}{setting} violates the bound rule (10122) {of}at {m} of {rope.context} "
        f"tokens: f({m}) = {value:.3g} is the first below 0; {remedy}"
    )
    return notes


def log_n_factor(n: Int64[Tensor, "*n"] | Float[Tensor, "*n"], base: float, floor: int) -> Float64[Tensor, "*n"]:
    """Return ln(max(n, floor)) / ln(base) for n visible keys (8823; the floor is bert4keras's)."""
    return n.double().clamp(min=floor).log() / math.log(base)


def query_factor(n: Int64[Tensor, "*n"] | Float[Tensor, "*n"], config: ModelConfig) -> Float64[Tensor, "*n"]:
    """Return what multiplies a query that sees n keys: `attention.scale` and `similarity`, and YaRN's temperature.

    Sources: log_n 8823; log_n_clipped 9706; gradient_max, whose optimum for normal scores is fitted by
    0.84 sqrt(ln n), and gradient_max_constant 9812; cosine with log_n, 4 ln n, 9859 (with constant it is 1, and the
    softmax scale has the 4 ln n).
    """
    attention, rope = config.attention, config.rope
    floor = attention.log_n_floor or 16
    if attention.similarity == "cosine" and attention.scale == "log_n":
        factor = 4 * log_n_factor(n, math.e, floor)
    elif attention.scale == "log_n":
        factor = log_n_factor(n, attention.log_n_base or 512, floor)
    elif attention.scale == "log_n_clipped":
        base = attention.log_n_base or rope.trained_context or rope.context
        assert base is not None, "resolve the config first"
        factor = log_n_factor(n, base, 1).clamp(min=1)
    elif attention.scale == "gradient_max":
        factor = 0.84 * log_n_factor(n, math.e, floor).sqrt()
    else:
        constant = {"constant": 1.0, "gradient_max_constant": 2.5}[attention.scale]
        factor = torch.full_like(n, constant, dtype=torch.float64)
    return factor * temperature(rope)


class Rotary(NamedTuple):
    """cos and sin of each token, for `rotate`."""

    query: Float32[Tensor, "b t 2 pair"]
    """Times the factor."""
    key: Float32[Tensor, "b t 2 pair"]
    factor: Float32[Tensor, "b t"] | None
    """Of the query, for what is not rotated; None where it is 1 for every position."""


class RotaryTables:
    """cos, sin and query factor by position, float32, kept on the device where they are used.

    They grow on demand by doubling, since decoding asks for one more position each time.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.theta = frequencies(config.rope, config.rotary_width)
        attention = config.attention
        self.has_factor = attention.scale != "constant" or temperature(config.rope) != 1
        self._tables: Rotary | None = None

    def __call__(self, positions: Int64[Tensor, "b t"], n_positions: int) -> Rotary:
        """Gather the rows of `positions`, all of which must be below `n_positions`."""
        tables, device = self._tables, positions.device
        size = 0 if tables is None else len(tables.key)
        if tables is None or size < n_positions or tables.key.device != device:
            if size < n_positions:
                size = max(n_positions, 2 * size)
            tables = self._tables = self._make(size, device)
        key = tables.key[positions]
        if tables.factor is None:
            return Rotary(key, key, None)
        return Rotary(tables.query[positions], key, tables.factor[positions])

    def _make(self, size: int, device: torch.device) -> Rotary:
        position = torch.arange(size, dtype=torch.float64)
        angles = torch.outer(position, torch.from_numpy(self.theta))
        cos_sin = torch.stack([angles.cos(), angles.sin()], dim=1)
        key = cos_sin.float().to(device)
        if not self.has_factor:
            return Rotary(key, key, None)
        factor = query_factor(position + 1, self.config)
        query = cos_sin * factor[:, None, None]
        return Rotary(query.float().to(device), key, factor.float().to(device))


def rotate(
    x: Float[Tensor, "b t h d"], cos_sin: Float32[Tensor, "b t 2 pair"], factor: Float32[Tensor, "b t"] | None = None
) -> Float[Tensor, "b t h d"]:
    """Rotate the last 2 pair entries of each head, as pairs (x_j, x_(j + pair)), and multiply the rest by `factor`.

    In float32, or float64 for x in float64, rounded once at the end. `cos_sin` has its own factor folded in.
    """
    cos, sin = cos_sin[:, :, None, 0], cos_sin[:, :, None, 1]
    n_rest = x.shape[-1] - 2 * cos.shape[-1]
    wide = x if x.dtype == torch.float64 else x.float()
    first, second = wide[..., n_rest:].chunk(2, dim=-1)
    parts = [first * cos - second * sin, second * cos + first * sin]
    if n_rest:
        rest = wide[..., :n_rest]
        parts.insert(0, rest if factor is None else rest * factor[:, :, None, None])
    return torch.cat(parts, dim=-1).to(x.dtype)
