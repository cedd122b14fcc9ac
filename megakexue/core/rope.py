"""RoPE: the frequencies for longer contexts, the factor of the query, and the tables of cos and sin.

The base, and the rule for it, are in megakexue/core/bases.py.

The factor of the query (8823, 9812, 9859, and YaRN's temperature): scores are multiplied by a function of n, the number
of keys that the query may see in its own document, which is its position + 1. RoPE is linear, so the factor is
multiplied into the query's cos and sin.

What must stay true: frequencies, angles and factors are computed in float64; tables are float32 and belong to no
module, so that casting a model does not reach them.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from megakexue.config import ResolvedModel, ResolvedRope, require
from megakexue.core.bases import cosine_sum, first_negative, powers, safe_base, shipped_bases


def frequencies(rope: ResolvedRope, d_rotary: int) -> Float64[np.ndarray, " pair"]:
    """Return theta: the angle in radians by which each pair turns from one position to the next.

    With k = context / trained_context, and on the right theta of the trained model, base^(-2i/d):

        interpolate   theta / k
        ntk           base k, which is lambda = k^(2/d) of 9675
        ntk_exact     base k^(d/(d-2)): the last pair is theta / k (9675)
        ntk_mixed     theta_i / exp(a (i+1)^e) with a (d/2)^e = ln k, e = ntk_mixed_exponent (9706)
        yarn          (g + (1 - g) / k) theta with g = (r - 1) / 31 in [0, 1], r = theta trained_context / 2 pi, the
                      turns that a pair takes in the trained context (9948)
        llama3        the same with g = (r - slow) / (fast - slow) in [0, 1], and llama3_factor for k; it is
                      _compute_llama3_parameters of transformers
        longrope      theta_i / longrope_factors_i (arXiv 2402.13753)

    Raises:
        UserError: ntk_exact of a single pair.
    """
    base, d = rope.base, d_rotary
    theta = powers(base, d)
    if rope.trained_context is None or rope.extension == "base":
        return theta
    k = rope.stretch
    if rope.extension == "interpolate":
        return theta / k
    if rope.extension == "ntk":
        return powers(base * k, d)
    if rope.extension == "ntk_exact":
        require(d > 2, f"model.rope.extension=ntk_exact needs a rotary width above {d}: use interpolate")
        return powers(base * k ** (d / (d - 2)), d)
    if rope.extension == "ntk_mixed":
        digit = np.arange(1, d // 2 + 1) / (d // 2)
        return theta / np.exp(math.log(k) * digit**rope.ntk_mixed_exponent)
    if rope.longrope_factors is not None:
        return theta / np.array(rope.longrope_factors)
    slow, fast = 1.0, 32.0
    if rope.extension == "llama3":
        assert rope.llama3_factor is not None, "resolve first"
        slow, fast, k = rope.llama3_slow, rope.llama3_fast, rope.llama3_factor
    kept = np.clip((theta * rope.trained_context / (2 * math.pi) - slow) / (fast - slow), 0, 1)
    return theta * (kept + (1 - kept) / k)


def temperature(rope: ResolvedRope) -> float:
    """Return what YaRN multiplies the scores by, (0.1 ln k + 1)^2 (9948); 1 without it."""
    if rope.extension != "yarn" or rope.yarn_temperature is False:
        return 1.0
    return (0.1 * math.log(rope.stretch) + 1) ** 2


def base_notes(config: ResolvedModel) -> list[str]:
    """Return sentences on the base that a user should read; one on a violation of the bound rule begins with WARNING.

    The sum of the rule is taken over the frequencies in use, whatever the extension, since the derivation of the rule
    holds for any frequencies. For an extension other than `base` a violation is only a remark, since the base belongs
    to the weights.
    """
    rope, d, head = config.rope, config.rotary_width, config.head_width
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


def query_factor(n: Int64[Tensor, "*n"] | Float[Tensor, "*n"], config: ResolvedModel) -> Float64[Tensor, "*n"]:
    """Return the factor of a query that sees n keys: that of `attention.scale` and `similarity`, and the temperature.

    Sources: log_n 8823; log_n_clipped 9706; gradient_max 9812, whose optimum for normal scores is fitted by
    0.84 sqrt(ln n), and gradient_max_constant 9812; cosine with log_n, 4 ln n, 9859. For cosine with constant the
    factor is 1: its 4 ln n is a number in the softmax scale.
    """
    attention, rope = config.attention, config.rope
    floor = attention.log_n_floor or 16
    if attention.similarity == "cosine" and attention.scale == "log_n":
        factor = 4 * log_n_factor(n, math.e, floor)
    elif attention.scale == "log_n":
        factor = log_n_factor(n, attention.log_n_base or 512, floor)
    elif attention.scale == "log_n_clipped":
        base = attention.log_n_base or rope.trained_context or rope.context
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
    """For queries: multiplied by the factor."""
    key: Float32[Tensor, "b t 2 pair"]
    factor: Float32[Tensor, "b t"] | None
    """Of a query, for the part that is not rotated; None: it is 1 at every position."""


class RotaryTables:
    """cos, sin and query factor by position, float32, on the device where they were last used.

    They grow by doubling, since decoding asks for one more position each time.
    """

    def __init__(self, config: ResolvedModel) -> None:
        self.config = config
        self.theta = frequencies(config.rope, config.rotary_width)
        self.has_factor = config.attention.scale != "constant" or temperature(config.rope) != 1
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
    cos, sin = cos_sin[:, :, None].unbind(3)
    n_rest = x.shape[-1] - 2 * cos.shape[-1]
    wide = x if x.dtype == torch.float64 else x.float()
    first, second = wide[..., n_rest:].chunk(2, dim=-1)
    parts = [first * cos - second * sin, second * cos + first * sin]
    if n_rest:
        rest = wide[..., :n_rest]
        parts.insert(0, rest if factor is None else rest * factor[:, :, None, None])
    return torch.cat(parts, dim=-1).to(x.dtype)
