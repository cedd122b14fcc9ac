"""The bound rule against published and recomputed values, the searches, the shipped table, the base of a config."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakexue.config import MlaConfig, ModelConfig, RopeConfig, UserError
from megakexue.core.bases import (
    LOWEST_BASE,
    choose_base,
    cosine_sum,
    find_bases,
    first_violation,
    infimum_base,
    last_invalid_base,
    rotary_sum,
    safe_base,
    shipped_bases,
    smallest_base,
)


def model(d_head: int = 128, rope: RopeConfig | None = None, mla: MlaConfig | None = None) -> ModelConfig:
    """A config of one head of the given width."""
    rope = rope or RopeConfig()
    return ModelConfig(vocab_size=8, d_model=d_head, n_layers=1, n_heads=1, d_ff=8, rope=rope, mla=mla)


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


INFIMA: dict[int, dict[int, float]] = {
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


def test_find_bases_prefers_the_table_and_knows_unrotated_pairs() -> None:
    assert find_bases(128, 131072) is shipped_bases()[128, 131072]  # a search takes a minute
    assert find_bases(32, 256, 2).infimum < find_bases(32, 256).infimum
