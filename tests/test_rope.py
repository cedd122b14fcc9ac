"""The bound rule against the article's and recomputed values, the shipped bases, extensions, factors and the tables."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megakexue.config import AttentionConfig, MlaConfig, ModelConfig, RopeConfig, UserError
from megakexue.rope import (
    LOWEST_BASE,
    RotaryTables,
    base_notes,
    choose_base,
    cosine_sum,
    find_bases,
    first_violation,
    frequencies,
    infimum_base,
    last_invalid_base,
    log_n_factor,
    query_factor,
    rotary_sum,
    rotate,
    safe_base,
    shipped_bases,
    smallest_base,
    temperature,
)


def model(d_head: int = 128, rope: RopeConfig | None = None, **changes: Any) -> ModelConfig:
    """A config of one head of the given width."""
    rope = rope or RopeConfig()
    sizes = {"vocab_size": 8, "d_model": d_head, "n_layers": 1, "n_heads": 1, "d_ff": 8}
    return ModelConfig(**sizes, rope=rope, **changes)  # type: ignore[arg-type]


def extended(extension: str, k: float = 8, base: float = 1e4, **changes: Any) -> RopeConfig:
    """A resolved extension from 1024 tokens to k times as many."""
    return RopeConfig(extension=extension, base=base, trained_context=1024, context=int(1024 * k), **changes)  # type: ignore[arg-type]


# --- the bound rule ---------------------------------------------------------------------------------------------------


def test_rotary_sum_known_values() -> None:
    # f_b(m) of 10122 for d = 128, b = 10^4, in float64
    m = [0, 1, 2, 10, 100, 1000, 1706, 1707, 2047, 4095]
    known = [64, 62.093683806, 57.381860553, 42.820022898, 30.543454701, 10.177728132, 0.068603397, -0.498931530,
             8.724044033, -4.252391810]  # fmt: skip
    assert rotary_sum(1e4, 128, 4096)[m] == pytest.approx(known, abs=1e-9)


@pytest.mark.parametrize(("d", "base", "context"), [(128, 1e4, 4096), (96, 54600.0, 1000), (2, 10.0, 7), (64, 5e5, 1)])
def test_rotary_sum_equals_the_plain_sum(d: int, base: float, context: int) -> None:
    theta = base ** (-2.0 * np.arange(d // 2) / d)
    plain = np.cos(np.outer(np.arange(context), theta)).sum(1)
    assert rotary_sum(base, d, context) == pytest.approx(plain, abs=1e-10)
    assert cosine_sum(theta, context) == pytest.approx(plain, abs=1e-10)


@pytest.mark.parametrize(
    ("context", "base", "lowest", "argmin", "violation"),
    [(1024, 4293, -0.015673, 1009, 1009), (1024, 4294, 0.020318, None, None), (1024, 4300, 0.248977, None, None),
     (2048, 11587, -0.003393, 1788, 1788), (2048, 11588, 0.010525, 1788, None),
     (2048, 12000, -3.130625, 1800, 1554),  # published by 10122
     (2048, 16000, 2.023421, None, None),  # published by arXiv 2405.14591
     (4096, 26952, -0.004739, 4012, 4012), (4096, 26953, 0.009261, 4012, None),
     (4096, 27000, -0.484564, 4080, 4079),  # published by both
     (8192, 83763, -0.014015, 8172, 8172), (8192, 83764, 0.002653, 8172, None), (8192, 84000, 0.918520, None, None),
     (16384, 231643, -0.001933, 15643, 15643), (16384, 231644, 0.001058, None, None),
     (16384, 230000, -1.836, None, 12865), (16384, 310000, -1.861, None, 12223),  # published
     (32768, 629978, -0.000970, 30704, 30704), (32768, 629979, 0.002723, None, None),
     (32768, 630000, 0.081470, None, None), (32768, 640000, -1.937949, None, 27685),  # published
     (65536, 2.1e6, 1.5437, None, None),
     (131072, 4.9e6, -0.349, None, 125573), (131072, 7.8e6, -1.016, None, 128915),  # published
     (8192, 5e5, 5.97, None, None), (4096, 1e4, -8.36, None, 1707), (2048, 1e4, -1.824489, 1970, 1707)],
)  # fmt: skip
def test_published_and_rounded_bases(
    context: int, base: float, lowest: float, argmin: int | None, violation: int | None
) -> None:
    f = rotary_sum(float(base), 128, context)
    digits = len(f"{lowest:.10f}".rstrip("0").split(".")[1])
    assert f.min() == pytest.approx(lowest, abs=0.6 * 10**-digits)  # all the digits that were noted
    assert argmin is None or f.argmin() == argmin
    assert first_violation(float(base), 128, context) == violation


@pytest.mark.parametrize(
    ("d", "base", "m"),
    [(128, 500, 171), (128, 1e3, 361), (128, 1e4, 1707), (128, 1e5, 7757), (128, 1.6e5, 9125), (128, 5e5, 18438),
     (128, 1e6, 27115), (128, 5e6, 82999), (128, 1e7, 144660),
     (64, 1e3, 197), (64, 1e4, 725), (64, 1e5, 3616), (64, 5e5, 9937), (64, 1e6, 6235), (64, 1e7, 45826),
     (32, 1e4, 474), (32, 1e5, 1283), (32, 1e6, 3478), (256, 1e4, 2653), (256, 1e6, 71627)],
)  # fmt: skip
def test_first_violation_by_base(d: int, base: float, m: int) -> None:
    assert first_violation(float(base), d, m + 1) == m
    assert first_violation(float(base), d, m) is None


INFIMA = {
    128: {512: 2065.8, 1024: 4293.44, 2048: 11587.24, 4096: 26952.34, 8192: 83763.84, 16384: 231643.65,
          32768: 629978.3, 65536: 2.09018e6, 131072: 4.86910e6},
    64: {512: 3438.9, 1024: 7753.0, 2048: 29617, 4096: 100070, 8192: 323744},
    96: {512: 2094.7, 1024: 4956.9, 2048: 18742, 4096: 54600, 8192: 103141},
    192: {512: 1516.4, 1024: 3109.3, 2048: 7670.9, 4096: 23347, 8192: 49739},
    256: {512: 1280.6, 1024: 2967.5, 2048: 6563.9, 4096: 17733, 8192: 41307},
    32: {512: 12487, 1024: 58153},
}  # fmt: skip
LAST_INVALID = {512: 2934, 1024: 6018, 2048: 22763, 4096: 58788, 8192: 394289, 16384: 1.321e6, 32768: 3.325e6}


def test_shipped_bases_against_grid_searches() -> None:
    table = shipped_bases()
    for d, row in INFIMA.items():
        for context, infimum in row.items():
            # all digits noted; the grids of the longest contexts were 1e-4 apart
            n_decimals = len(str(infimum).partition(".")[2])
            tolerance = 1e-4 * infimum if context > 32768 else 0.6 * 10**-n_decimals
            assert table[d, context].infimum == pytest.approx(infimum, abs=tolerance)
    for context, last in LAST_INVALID.items():
        # the largest invalid base on a grid is a little below the last one
        found = table[128, context].last_invalid
        assert last * (1 - 5e-4) < found < last * (1 + 5e-4)
        assert found >= last or context in (16384, 32768)  # which were rounded


def test_shipped_table_is_complete_and_sound() -> None:
    table = shipped_bases()
    contexts = [2**i for i in range(8, 18)]
    assert set(table) == {(d, context) for d in (32, 48, 64, 80, 96, 128, 192, 256) for context in contexts}
    for (d, context), bases in table.items():
        if context <= 16384:
            for base in (safe_base(d, context), smallest_base(d, context)):
                assert first_violation(base, d, context) is None
            assert bases.infimum <= smallest_base(d, context) < bases.infimum * (1 + 1e-6)
            assert bases.last_invalid < safe_base(d, context) <= bases.last_invalid * 1.0101
            for below in (bases.infimum * (1 - 1e-6), bases.last_invalid * (1 - 1e-6)):
                assert first_violation(below, d, context) is not None


@pytest.mark.parametrize("d", [32, 48, 64, 80, 96, 128, 192, 256])
def test_short_rows_of_the_table_are_found_again(d: int) -> None:
    for context in (256, 512, 1024, 2048):
        assert infimum_base(d, context) == pytest.approx(shipped_bases()[d, context].infimum, rel=5e-9)
        assert last_invalid_base(d, context) == pytest.approx(shipped_bases()[d, context].last_invalid, rel=5e-7)


def test_a_longer_row_of_the_table_is_found_again() -> None:
    assert infimum_base(64, 8192) == pytest.approx(shipped_bases()[64, 8192].infimum, rel=5e-9)
    assert last_invalid_base(64, 8192) == pytest.approx(shipped_bases()[64, 8192].last_invalid, rel=5e-7)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(2, 600), st.data())
def test_searches_are_exact(n_pairs: int, context: int, data: st.DataObject) -> None:
    d, n_unrotated = 2 * n_pairs, data.draw(st.integers(0, n_pairs // 2))
    infimum, last = infimum_base(d, context, n_unrotated), last_invalid_base(d, context, n_unrotated)
    assert infimum <= last * (1 + 1e-6)

    def lowest(base: float) -> float:
        return float(rotary_sum(base, d, context).min()) + n_unrotated

    # at the zero of a sum, rounding decides
    assert lowest(infimum) >= -1e-9
    assert all(lowest(base) >= -1e-9 for base in np.geomspace(last * (1 + 1e-6), last * 1e4, 100).tolist())
    if infimum > LOWEST_BASE:
        assert all(lowest(base) < 1e-9 for base in np.geomspace(LOWEST_BASE, infimum * (1 - 1e-6), 100).tolist())
    if last > LOWEST_BASE:
        assert lowest(last * (1 - 1e-6)) < 1e-9


def test_validity_is_not_monotone() -> None:
    grid = np.linspace(infimum_base(128, 2048) + 1, last_invalid_base(128, 2048), 200)
    below = [first_violation(float(b), 128, 2048) for b in grid]
    assert None in below and any(m is not None for m in below)


def test_contexts_that_every_base_serves() -> None:
    for arguments in ((64, 1), (64, 2), (2, 2), (2, 9, 1), (64, 1024, 28), (64, 1024, 32)):
        assert infimum_base(*arguments) == last_invalid_base(*arguments) == LOWEST_BASE, arguments


def test_unrotated_pairs_lower_the_bases_to_no_use() -> None:
    # of a head of 128 dimensions: 16 unrotated pairs of 64, at 1k tokens; alone 4956.9 and 12695
    assert infimum_base(96, 1024, 16) == pytest.approx(4.969260, rel=1e-6)
    assert last_invalid_base(96, 1024, 16) == pytest.approx(390.4086, rel=1e-6)
    assert first_violation(390.4, 96, 1024, 16) is not None and first_violation(390.41, 96, 1024, 16) is None


def test_no_base_for_a_single_pair() -> None:
    message = (
        r"no RoPE base satisfies the bound rule \(10122\) for a rotary width of 2 and 4096 tokens: set "
        r"model.rope.base to a number, or use a wider head or a shorter context"
    )
    for search in (safe_base, smallest_base, infimum_base, last_invalid_base):
        with pytest.raises(UserError, match=message):
            search(2, 4096)


# --- the base of a config ---------------------------------------------------------------------------------------------


def test_choose_base() -> None:
    assert choose_base(model(rope=RopeConfig(base=12345)), 4096) == 12345.0
    assert choose_base(model(), 4096) == 58800.0
    assert choose_base(model(rope=RopeConfig(rule="infimum")), 4096) == 26952.34
    # not in the table
    assert (40, 300) not in shipped_bases()
    assert last_invalid_base(40, 300) < choose_base(model(40), 300) < last_invalid_base(40, 300) * 1.0101
    smallest = choose_base(model(40, RopeConfig(rule="infimum")), 300)
    assert infimum_base(40, 300) <= smallest < infimum_base(40, 300) * (1 + 1e-6)


def test_extensions_start_from_the_trained_base() -> None:
    for extension in ("interpolate", "ntk", "ntk_exact", "ntk_mixed", "yarn"):
        temperature = False if extension == "yarn" else None
        rope = RopeConfig(extension=extension, trained_context=1024, yarn_temperature=temperature)  # type: ignore[arg-type]
        assert choose_base(model(rope=rope), 8192) == choose_base(model(), 1024) == 6020.0
    assert choose_base(model(rope=RopeConfig(extension="base", trained_context=1024)), 8192) == 395000.0


def test_a_partly_rotated_head_has_the_base_of_its_rotated_part() -> None:
    for config in (
        model(128, RopeConfig(fraction=0.25)),
        model(32),
        model(mla=MlaConfig(d_nope=96, d_rope=32)),
    ):
        assert choose_base(config, 1024) == safe_base(32, 1024) == 153000.0
    assert choose_base(model(128, RopeConfig(fraction=0.75)), 1024) == safe_base(96, 1024)


def test_notes_on_a_base() -> None:
    def notes(context: int, **changes: Any) -> list[str]:
        d_head, mla = changes.pop("d_head", 128), changes.pop("mla", None)
        return base_notes(model(d_head, RopeConfig(context=context, **changes), mla=mla))

    assert notes(4096, base=58800.0) == notes(1707, base=1e4) == []
    assert notes(4096, base=1e4) == [
        "WARNING: model.rope.base=10000 violates the bound rule (10122) at 1707 of 4096 tokens: f(1707) = -0.499 is "
        "the first below 0; model.rope.base=58800 satisfies it"
    ]
    assert notes(1708, base=1e4)[0].endswith(
        "; tools/rope_base.py --d-rotary 128 --context 1708 finds one that satisfies it"
    )
    assert notes(4096, base=1e4, extension="base", trained_context=1024) == notes(4096, base=1e4)

    # 48 unrotated pairs outweigh the 16 rotated ones
    vacuous = (
        "RoPE rotates 32 of a head's 128 dimensions: with half or more of them unrotated every base satisfies the "
        "bound rule (10122); model.rope.base=auto applies it to the rotated part alone"
    )
    remark = (
        "model.rope.base=10000 violates the bound rule (10122) for the rotated part alone, which is stricter, at 474 "
        "of 1024 tokens: f(474) = -0.551 is the first below 0; model.rope.base=153000 satisfies it"
    )
    assert notes(1024, base=1e4, fraction=0.25) == notes(1024, base=1e4, mla=MlaConfig()) == [vacuous, remark]
    assert notes(1024, base=153000.0, fraction=0.25) == [vacuous]

    # 16 unrotated pairs: the rule of the head is weaker than that of its rotated part
    (remark,) = notes(1024, base=5000.0, fraction=0.75)
    assert remark.startswith("model.rope.base=5000 violates the bound rule (10122) for the rotated part alone, ")
    (warning,) = notes(1024, base=390.4, fraction=0.75)
    m = first_violation(390.4, 96, 1024, 16)
    assert warning.startswith(
        f"WARNING: model.rope.base=390.4 violates the bound rule (10122) at {m} of 1024 tokens: f({m}) = -"
    )
    assert warning.endswith(f"; model.rope.base={safe_base(96, 1024):.10g} satisfies it")


def test_notes_on_an_extension_are_of_its_own_frequencies() -> None:
    # base k is too small a base for k times the context, as 9675 says: it works up to about half of it
    rope = extended("ntk", k=8, base=6020.0)
    m = first_violation(6020.0 * 8, 128, 8192)
    assert m == 4482
    assert base_notes(model(rope=rope)) == [
        "model.rope.extension=ntk from 1024 tokens violates the bound rule (10122) at 4482 of 8192 tokens: "
        "f(4482) = -0.107 is the first below 0; model.rope.extension=base with a new base can satisfy it, after "
        "finetuning"
    ]
    # interpolation is the same sum in smaller steps
    assert base_notes(model(rope=extended("interpolate", base=6100.0))) == []


# --- frequencies ------------------------------------------------------------------------------------------------------

PAIR = np.arange(64)
THETA = 1e4 ** (-2 * PAIR / 128)


def test_plain_frequencies() -> None:
    for rope in (RopeConfig(base=1e4), RopeConfig(base=10000), extended("base")):
        assert frequencies(rope, 128) == pytest.approx(THETA, rel=1e-14)
    assert frequencies(RopeConfig(base=1e4), 128).dtype == np.float64


def test_interpolation_is_the_same_angle_at_the_stretched_position() -> None:
    theta = frequencies(extended("interpolate"), 128)
    assert 8 * 1000 * theta == pytest.approx(1000 * THETA, rel=1e-14)


def test_ntk() -> None:
    # 9675: theta_m = n / (beta lambda)^(m-1), beta = 10000^(2/d), lambda = k^(2/d)
    theta = frequencies(extended("ntk"), 128)
    assert theta == pytest.approx((1e4 ** (2 / 128) * 8 ** (2 / 128)) ** -PAIR.astype(float), rel=1e-13)
    assert theta[0] == 1
    assert theta[-1] > THETA[-1] / 8
    exact = frequencies(extended("ntk_exact"), 128)
    assert exact == pytest.approx((1e4 ** (2 / 128) * 8 ** (2 / 126)) ** -PAIR.astype(float), rel=1e-13)
    assert (exact[0], exact[-1]) == (1, pytest.approx(THETA[-1] / 8, rel=1e-14))
    with pytest.raises(UserError, match=r"ntk_exact needs a rotary width above 2: use interpolate"):
        frequencies(extended("ntk_exact"), 2)


def test_ntk_mixed() -> None:
    # 9706 with exponent 1: NTK-fixed, n / (lambda (beta lambda)^(m-1)) for the digits m = 1 ... d/2
    beta, scale = 1e4 ** (2 / 128), 8 ** (2 / 128)
    fixed = frequencies(extended("ntk_mixed", ntk_mixed_exponent=1.0), 128)
    assert fixed == pytest.approx(1 / (scale * (beta * scale) ** PAIR), rel=1e-13)
    # towards exponent 0: interpolation
    near = frequencies(extended("ntk_mixed", ntk_mixed_exponent=1e-9), 128)
    assert near == pytest.approx(frequencies(extended("interpolate"), 128), rel=1e-7)
    # the article's own exponent: a (d/2)^0.625 = ln k
    mixed = frequencies(extended("ntk_mixed"), 128)
    a = math.log(8) / 64**0.625
    assert mixed == pytest.approx(THETA / np.exp(a * (PAIR + 1) ** 0.625), rel=1e-13)
    assert mixed[-1] == pytest.approx(THETA[-1] / 8, rel=1e-14)


def test_yarn() -> None:
    # 9948: pairs of more than 32 turns in the trained context are kept, of less than one interpolated
    theta, turns = frequencies(extended("yarn"), 128), THETA * 1024 / (2 * math.pi)
    kept, interpolated = turns > 32, turns < 1
    assert 0 < kept.sum() and 0 < interpolated.sum() and (~kept & ~interpolated).sum() > 5
    assert theta[kept] == pytest.approx(THETA[kept], rel=1e-14)
    assert theta[interpolated] == pytest.approx(THETA[interpolated] / 8, rel=1e-14)
    share = (turns - 1) / 31
    between = ~kept & ~interpolated
    assert theta[between] == pytest.approx((THETA * (share + (1 - share) / 8))[between], rel=1e-13)
    assert (np.diff(theta) < 0).all()


def test_yarn_agrees_with_transformers_at_both_ends() -> None:
    # its ramp between the ends is linear in the pair's index instead of its turns, and its ends may be rounded outwards
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    scaling = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 1024, "truncate": False}
    config = LlamaConfig(
        hidden_size=128, num_attention_heads=1, head_dim=128, rope_theta=1e4, max_position_embeddings=8192,
        rope_scaling=scaling,
    )  # fmt: skip
    theirs, factor = rope_utils.ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    turns = THETA * 1024 / (2 * math.pi)
    ends = (turns > 32) | (turns < 1)
    ours = frequencies(extended("yarn"), 128)
    assert ours[ends] == pytest.approx(theirs.numpy()[ends], rel=1e-5)  # float32
    assert factor**2 == pytest.approx(temperature(extended("yarn")), rel=1e-12)  # theirs is on query and key


def test_temperature() -> None:
    assert temperature(extended("yarn")) == pytest.approx((0.1 * math.log(8) + 1) ** 2, rel=1e-15)
    assert temperature(extended("yarn", yarn_temperature=True)) == temperature(extended("yarn"))
    for rope in (extended("yarn", yarn_temperature=False), extended("ntk"), RopeConfig()):
        assert temperature(rope) == 1


# --- the query's factor -----------------------------------------------------------------------------------------------


def factors(n: list[int], rope: RopeConfig | None = None, **attention: Any) -> list[float]:
    config = model(rope=rope, attention=AttentionConfig(**attention))
    factor = query_factor(torch.tensor(n), config)
    assert factor.dtype == torch.float64
    return factor.tolist()


def test_log_n_factors() -> None:
    # 8823 with bert4keras's floor of 16; each doubling adds 1/9
    known = {1: 4 / 9, 16: 4 / 9, 17: 0.454163, 32: 0.555556, 64: 0.666667, 100: 0.738206, 128: 0.777778,
             256: 0.888889, 511: 0.999687, 512: 1, 513: 1.000313, 1000: 1.107309, 1024: 1.111111, 2048: 1.222222,
             4096: 1.333333, 8192: 1.444444, 16384: 1.555556, 32768: 1.666667, 65536: 1.777778,
             131072: 1.888889}  # fmt: skip
    n = torch.tensor(list(known))
    assert log_n_factor(n, 512, 16).tolist() == pytest.approx(list(known.values()), abs=1e-6)
    assert factors(list(known)) == log_n_factor(n, 512, 16).tolist()
    doubled = factors([1024, 2048])
    assert doubled[1] - doubled[0] == pytest.approx(1 / 9, abs=1e-15)
    assert factors([4, 8, 100], log_n_base=100, log_n_floor=8) == pytest.approx(
        [math.log(8) / math.log(100)] * 2 + [1], rel=1e-15
    )


def test_clipped_log_n_factors() -> None:
    # 9706, and Qwen's list: log(i, seq_length) if i > seq_length else 1
    n = [1, 2, 16, 2047, 2048, 2049, 4096, 32767]
    qwen = [math.log(i, 2048) if i > 2048 else 1 for i in n]
    position = torch.tensor(n) - 1
    rerope = ((position.double() + 1).log() / math.log(2048)).clip(1)
    for rope, base in (
        (RopeConfig(base=1e4, context=2048), None),
        (RopeConfig(base=1e4, context=8192), 2048.0),
        (RopeConfig(base=1e4, context=8192, extension="ntk", trained_context=2048), None),
    ):
        found = factors(n, rope, scale="log_n_clipped", log_n_base=base)
        assert found == pytest.approx(qwen, rel=1e-14)
        assert found == pytest.approx(rerope.tolist(), rel=1e-14)


def test_gradient_maximising_factors() -> None:
    # 9812: the alpha that maximises alpha (1 - e^(alpha^2) / n), for normal scores
    optima = {64: 1.549, 128: 1.711, 256: 1.864, 512: 2.008, 1024: 2.147, 2048: 2.279, 4096: 2.406, 8192: 2.528,
              20000: 2.678}  # fmt: skip
    alpha = np.linspace(0.5, 3, 25001)
    for n, optimum in optima.items():
        assert alpha[np.argmax(alpha * (1 - np.exp(alpha**2) / n))] == pytest.approx(optimum, abs=6e-4)
    found = factors(list(optima), scale="gradient_max")
    assert found == pytest.approx([0.84 * math.sqrt(math.log(n)) for n in optima], rel=1e-15)
    for n, factor in zip(optima, found, strict=True):
        # the article's fit is for long contexts: 11 % off at 64 tokens, 5 % from 512 on, 2 % from 4096 on
        assert factor == pytest.approx(optima[n], rel=0.11 if n < 512 else 0.05 if n < 4096 else 0.02)
    assert factors([1, 16], scale="gradient_max") == pytest.approx([0.84 * math.sqrt(math.log(16))] * 2)
    assert factors([1, 4], scale="gradient_max", log_n_floor=4) == pytest.approx([0.84 * math.sqrt(math.log(4))] * 2)
    assert factors([1, 9999], scale="gradient_max_constant") == [2.5, 2.5]


def test_constant_and_key_norm_factors() -> None:
    assert factors([1, 9999], scale="constant") == [1, 1]
    assert factors([1, 512], similarity="key_norm") == factors([1, 512])


def test_cosine_factors() -> None:
    rope = RopeConfig(base=1e4, context=8192)
    # 9859: 4 ln n, n the visible keys or half of the training length
    assert factors([1, 16, 4096], rope, similarity="cosine") == pytest.approx(
        [4 * math.log(16), 4 * math.log(16), 33.2711], abs=1e-4
    )
    # the latter is the softmax scale of a resolved config, so that a longer context does not change it
    assert factors([1, 4096], rope, similarity="cosine", scale="constant") == [1, 1]


def test_the_temperature_multiplies_the_factor() -> None:
    rope = extended("yarn")
    t = (0.1 * math.log(8) + 1) ** 2
    assert factors([1, 5], rope, scale="constant") == pytest.approx([t, t], rel=1e-15)
    both = extended("yarn", yarn_temperature=True)
    assert factors([512, 1024], both) == pytest.approx([t, t * 10 / 9], rel=1e-14)
    off = extended("yarn", yarn_temperature=False)
    assert factors([512, 1024], off) == pytest.approx([1, 10 / 9], rel=1e-14)


# --- tables and rotation ----------------------------------------------------------------------------------------------


def at(tables: RotaryTables, position: int) -> Any:
    return tables(torch.tensor([[position]]), 4096)


@pytest.mark.parametrize("scale", ["log_n", "log_n_clipped", "constant", "gradient_max", "gradient_max_constant"])
@pytest.mark.parametrize("fraction", [1.0, 0.75, 0.25])
def test_scores_depend_on_distance_and_the_visible_keys(scale: str, fraction: float) -> None:
    rope = RopeConfig(base=1e4, context=1000, fraction=fraction)
    config = model(32, rope, attention=AttentionConfig(scale=scale))  # type: ignore[arg-type]
    tables = RotaryTables(config)
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32)

    def score(t: int, s: int) -> float:
        query, key = at(tables, t), at(tables, s)
        rotated = rotate(q, query.query, query.factor) * rotate(k, key.key)
        return float(rotated.sum()) / query_factor(torch.tensor([t + 1]), config).item()

    assert abs(score(511, 461)) > 0.1
    for t, s in ((700, 650), (4000, 3950), (60, 10)):
        assert score(t, s) == pytest.approx(score(511, 461), rel=1e-4)


def test_rotation_equals_complex_multiplication_of_the_last_part() -> None:
    config = model(32, RopeConfig(base=100, context=64, fraction=0.5))
    tables, torch_x = RotaryTables(config), torch.randn(2, 3, 4, 32, dtype=torch.float64)
    positions = torch.tensor([[0, 5, 63], [7, 7, 1]])
    rotary = tables(positions, 64)
    x = torch_x.numpy()
    pairs = x[..., 16:24] + 1j * x[..., 24:]
    theta = 100.0 ** (-2 * np.arange(8) / 16)
    pairs = pairs * np.exp(1j * positions.numpy()[:, :, None, None] * theta)
    expected = np.concatenate([x[..., :16], pairs.real, pairs.imag], axis=-1)
    assert rotate(torch_x, rotary.key).numpy() == pytest.approx(expected, abs=5e-7)
    factor = query_factor(positions + 1, config).numpy()[:, :, None, None]
    assert rotate(torch_x, rotary.query, rotary.factor).numpy() == pytest.approx(expected * factor, abs=5e-7)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_rotation_rounds_once(fraction: float) -> None:
    rotary = RotaryTables(model(32, RopeConfig(base=100, context=64, fraction=fraction)))(torch.arange(9)[None], 9)
    x = torch.randn(1, 9, 2, 32)
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype)
        assert torch.equal(
            rotate(half, rotary.query, rotary.factor), rotate(half.float(), rotary.query, rotary.factor).to(dtype)
        )
        assert torch.equal(rotate(half, rotary.key)[..., : round(32 * (1 - fraction))],
                           half[..., : round(32 * (1 - fraction))])  # fmt: skip
    # float64 stays float64, so that growth can be shown exact
    exact, single = rotate(x.double(), rotary.key), rotate(x, rotary.key)
    assert exact.dtype == torch.float64 and not torch.equal(exact, single.double())


def test_gradients_reach_both_parts() -> None:
    rotary = RotaryTables(model(32, RopeConfig(base=100, context=64, fraction=0.5)))(torch.arange(5)[None], 5)
    x = torch.randn(1, 5, 1, 32, requires_grad=True)
    rotate(x, rotary.query, rotary.factor).square().sum().backward()
    assert x.grad is not None and rotary.factor is not None
    # a rotation keeps lengths, so the gradient is 2 factor^2 x
    torch.testing.assert_close(x.grad, 2 * rotary.factor[..., None, None] ** 2 * x.detach())


def test_table_at_a_far_position_is_exact_to_float32() -> None:
    # half-precision tables are off by whole radians here
    position = 131_071
    angles = position * 1e7 ** (-2 * np.arange(64) / 128)
    rotary = RotaryTables(model(rope=RopeConfig(base=1e7, context=131072)))(torch.tensor([[position]]), position + 1)
    assert rotary.query.dtype == rotary.key.dtype == torch.float32
    factor = math.log(position + 1) / math.log(512)
    assert rotary.query[0, 0, 0].numpy() == pytest.approx(np.cos(angles) * factor, abs=2e-7)
    assert rotary.key[0, 0, 1].numpy() == pytest.approx(np.sin(angles), abs=1e-7)
    assert rotary.factor is not None and rotary.factor.item() == pytest.approx(factor, rel=1e-7)


def test_tables_use_the_frequencies_of_the_extension() -> None:
    rope = extended("yarn")
    rotary = at(RotaryTables(model(rope=rope, attention=AttentionConfig(scale="constant"))), 1000)
    angles = 1000 * frequencies(rope, 128)
    assert rotary.key[0, 0, 1].numpy() == pytest.approx(np.sin(angles), abs=1e-7)
    assert rotary.query[0, 0, 1].numpy() == pytest.approx(np.sin(angles) * temperature(rope), abs=2e-7)


def test_no_factor_where_it_is_1_everywhere() -> None:
    constant = AttentionConfig(scale="constant")
    for config in (model(attention=constant, rope=RopeConfig(base=1e4)),
                   model(attention=constant, rope=extended("yarn", yarn_temperature=False))):  # fmt: skip
        rotary = at(RotaryTables(config), 5)
        assert rotary.factor is None and rotary.query is rotary.key
    for config in (model(attention=constant, rope=extended("yarn")), model(rope=RopeConfig(base=1e4))):
        rotary = at(RotaryTables(config), 5)
        expected = query_factor(torch.tensor([[6]]), config)
        assert rotary.factor is not None and rotary.factor.tolist() == expected.float().tolist() != [[1]]


def test_tables_grow_by_doubling_and_follow_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = RotaryTables(model(8, RopeConfig(base=1e4)))
    made, make = [], RotaryTables._make
    monkeypatch.setattr(RotaryTables, "_make", lambda self, *size: made.append(size[0]) or make(self, *size))
    first = tables(torch.tensor([[3]]), 4)
    for n in range(4, 101):
        last = tables(torch.tensor([[n - 1]]), n)
    assert made == [4, 8, 16, 32, 64, 128]
    again = tables(torch.tensor([[3]]), 4)
    assert all(torch.equal(old, new) for old, new in zip(first, again, strict=True))
    fresh = RotaryTables(model(8, RopeConfig(base=1e4)))(torch.tensor([[99]]), 100)
    assert all(torch.equal(old, new) for old, new in zip(last, fresh, strict=True))
    assert tables(torch.zeros(1, 3, dtype=torch.long, device="meta"), 4).key.device.type == "meta"
    assert torch.equal(tables(torch.tensor([[3]]), 4).key, first.key)


def test_every_scale_has_its_tables() -> None:
    # replace keeps the checks of the config
    for scale in ("log_n", "log_n_clipped", "constant", "gradient_max", "gradient_max_constant"):
        attention = AttentionConfig(scale=scale)  # type: ignore[arg-type]
        config = replace(model(rope=RopeConfig(base=1e4, context=64)), attention=attention)
        rotary = RotaryTables(config)(torch.arange(64)[None], 64)
        factor = query_factor(torch.arange(64) + 1, config)
        expected = rotary.key * factor.float()[None, :, None, None]
        assert rotary.query.numpy() == pytest.approx(expected.numpy(), rel=3e-7, abs=1e-9)


def test_find_bases_prefers_the_table_and_knows_unrotated_pairs() -> None:
    assert find_bases(128, 131072) is shipped_bases()[128, 131072]  # a search takes a minute
    assert find_bases(32, 256, 2).infimum < find_bases(32, 256).infimum
