"""The bound rule against the article's and recomputed values, the log n factors, the tables, relativity."""

import math

import numpy as np
import pytest
import torch

from megakexue.config import AttentionConfig, UserError
from megakexue.rope import (
    RotaryTables,
    first_violation,
    infimum_base,
    last_invalid_base,
    log_n_factor,
    rotary_sum,
    rotate,
    safe_base,
)


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


@pytest.mark.parametrize(
    ("d", "context", "infimum"),
    [(128, 512, 2065.8), (128, 1024, 4293.44), (128, 2048, 11587.24), (128, 4096, 26952.34),
     (64, 1024, 7753.0), (64, 2048, 29617), (32, 512, 12487.2), (96, 1024, 4956.9), (256, 2048, 6563.9)],
)  # fmt: skip
def test_infimum(d: int, context: int, infimum: float) -> None:
    found = infimum_base(d, context)
    assert found == pytest.approx(infimum, rel=1e-5)
    assert first_violation(found * (1 + 1e-7), d, context) is None
    assert first_violation(found * (1 - 1e-7), d, context) is not None


@pytest.mark.parametrize(
    ("base", "context", "violation"),
    [(4293, 1024, 1009), (4294, 1024, None), (12000, 2048, 1554), (16000, 2048, None), (27000, 4096, 4079),
     (83763, 8192, 8172), (83764, 8192, None), (230000, 16384, 12865), (310000, 16384, 12223), (640000, 32768, 27685),
     (500000, 8192, None), (10000, 4096, 1707)],
)  # fmt: skip
def test_published_bases_and_their_first_violation(base: float, context: int, violation: int | None) -> None:
    assert first_violation(float(base), 128, context) == violation


@pytest.mark.parametrize(
    ("d", "context", "last"), [(128, 512, 2934), (128, 1024, 6018), (128, 2048, 22763), (128, 4096, 58788)]
)
def test_last_invalid_base_of_a_fine_grid(d: int, context: int, last: float) -> None:
    found = last_invalid_base(d, context)
    assert found == pytest.approx(last, rel=2e-4)
    # nothing on a grid above it is invalid, though validity is not monotone below it
    grid = np.geomspace(found * (1 + 1e-6), found * 30, 400)
    assert all(first_violation(float(b), d, context) is None for b in grid)
    below = [first_violation(float(b), d, context) for b in np.linspace(infimum_base(d, context) + 1, found, 200)]
    assert None in below and any(v is not None for v in below)


def test_safe_base_is_verified_and_short() -> None:
    base = safe_base(64, 256)
    assert first_violation(base, 64, 256) is None
    assert base > last_invalid_base(64, 256)
    assert float(f"{base:.3g}") == pytest.approx(base)


def test_no_base_for_a_narrow_head_and_a_long_context() -> None:
    with pytest.raises(UserError, match=r"no RoPE base up to 1000 x 4096 .* rotary width of 16: set model.rope.base"):
        safe_base(16, 4096)
    with pytest.raises(UserError, match=r"no RoPE base up to 1000 x 1024 is valid for a rotary width of 4"):
        infimum_base(4, 1024)


def test_log_n_factors() -> None:
    # 8823 with bert4keras's floor of 16; each doubling adds 1/9
    known = {1: 4 / 9, 16: 4 / 9, 17: 0.454163, 32: 0.555556, 100: 0.738206, 511: 0.999687, 512: 1, 513: 1.000313,
             1000: 1.107309, 4096: 1.333333, 131072: 1.888889}  # fmt: skip
    n = torch.tensor(list(known))
    assert log_n_factor(n, 512, 16).tolist() == pytest.approx(list(known.values()), abs=1e-6)
    doubled = log_n_factor(torch.tensor([1024, 2048]), 512, 16)
    assert (doubled[1] - doubled[0]).item() == pytest.approx(1 / 9, abs=1e-15)


@pytest.mark.parametrize("scale", ["log_n", "constant"])
def test_scores_depend_on_distance_and_the_visible_keys(scale: str) -> None:
    attention = AttentionConfig(scale=scale)  # type: ignore[arg-type]
    tables = RotaryTables(32, 1e4, attention)
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32)

    def score(t: int, s: int) -> float:
        at = [tables(torch.tensor([[p]]), 4096) for p in (t, s)]
        return float((rotate(q, at[0][:, :, 0]) * rotate(k, at[1][:, :, 1])).sum())

    for t, s in ((700, 650), (4000, 3950), (60, 10)):
        factor = math.log(max(t + 1, 16)) / math.log(512) if scale == "log_n" else 1.0
        assert score(t, s) / factor == pytest.approx(score(511, 461), rel=1e-4)  # the factor of 512 keys is 1


def test_table_at_a_far_position_is_exact_to_float32() -> None:
    # half-precision tables are off by whole radians here
    tables = RotaryTables(128, 1e7, AttentionConfig())
    at = 131_071
    angles = at * 1e7 ** (-2 * np.arange(64) / 128)
    row = tables(torch.tensor([[at]]), at + 1)[0, 0]
    assert row.dtype == torch.float32
    factor = math.log(at + 1) / math.log(512)
    assert row[0, 0].numpy() == pytest.approx(np.cos(angles) * factor, abs=2e-7)
    assert row[1, 1].numpy() == pytest.approx(np.sin(angles), abs=1e-7)


def test_tables_grow_on_demand() -> None:
    tables = RotaryTables(8, 1e4, AttentionConfig())
    short = tables(torch.tensor([[3]]), 4)
    assert torch.equal(tables(torch.tensor([[3]]), 100), short)
    assert tables(torch.tensor([[99]]), 100).shape == (1, 1, 2, 2, 4)
