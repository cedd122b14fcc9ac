"""The schedule and the clipping factors at points known by hand."""

import pytest
import torch

from megakexue.config import OptimConfig
from megakexue.core.schedule import clip_factor, lr_factor


def test_piecewise_schedule_of_the_reference_implementation() -> None:
    points = {40000: 1.0, 160000: 0.5, 640000: 0.1, 1280000: 0.01}
    config = OptimConfig(schedule="piecewise", warmup_steps=0, points=points)
    at = [0, 20_000, 40_000, 100_000, 160_000, 400_000, 640_000, 960_000, 1_280_000, 2_000_000]
    known = [0, 0.5, 1, 0.75, 0.5, 0.3, 0.1, 0.055, 0.01, 0.01]
    assert [lr_factor(config, t, 2_000_000) for t in at] == pytest.approx(known, abs=1e-15)
    flat = OptimConfig(schedule="piecewise", warmup_steps=0, points={0: 1.0})
    assert lr_factor(flat, 0, 10) == lr_factor(flat, 10, 10) == 1


def test_cosine_and_wsd() -> None:
    cosine = OptimConfig(warmup_steps=10, final_lr=0.1)
    factors = [lr_factor(cosine, step, 110) for step in range(1, 111)]
    assert factors[0] == 0.1 and factors[4] == 0.5 and factors[9] == 1
    assert factors[59] == pytest.approx(0.55) and factors[109] == pytest.approx(0.1)
    assert factors[9:] == sorted(factors[9:], reverse=True)
    wsd = OptimConfig(schedule="wsd", warmup_steps=10, decay_steps=20, final_lr=0.0)
    factors = [lr_factor(wsd, step, 100) for step in range(1, 101)]
    assert factors[9:80] == [1] * 71 and factors[89] == pytest.approx(0.5) and factors[99] == 0
    assert lr_factor(OptimConfig(warmup_steps=0), 1, 1) == pytest.approx(0.1)


def test_clipping_forms() -> None:
    norms = torch.tensor([0.0, 0.5, 2.0, 3.0, 1e6], dtype=torch.float64)
    low = clip_factor(OptimConfig(clip="smooth", clip_norm=2.0), norms)
    high = clip_factor(OptimConfig(clip="min", clip_norm=2.0), norms)
    assert low.dtype == high.dtype == torch.float64
    assert high.tolist() == pytest.approx([1, 1, 1, 2 / 3, 2e-6], rel=1e-15)
    assert low.tolist() == pytest.approx([1, 0.8, 0.5, 0.4, 2 / 1000002], rel=1e-15)
    assert (0.5 * high <= low).all() and (low <= high).all()  # 7469: form 2 lies between half of form 1 and form 1
    assert clip_factor(OptimConfig(clip=None), norms).tolist() == [1.0] * 5
