"""Schedules and clipping by known values, AdamW against torch's reference and against every way of cutting."""

import numpy as np
import pytest
import torch

from megakexue.config import OptimConfig
from megakexue.optim import AdamW, Segment, clip_factor, lr_factor


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
    # 7469: form 2 lies between half of form 1 and form 1
    for norm in (0.0, 0.5, 2.0, 3.0, 1e6):
        low = clip_factor(OptimConfig(clip="smooth", clip_norm=2.0), norm)
        high = clip_factor(OptimConfig(clip="min", clip_norm=2.0), norm)
        assert 0.5 * high <= low <= high
        assert norm * high <= 2.0 * (1 + 1e-15)
    assert clip_factor(OptimConfig(clip="smooth", clip_norm=2.0), 6.0) == 0.25
    assert clip_factor(OptimConfig(clip=None), 1e9) == 1


def run_adamw(config: OptimConfig, weights: list[torch.Tensor], gradients: list[list[torch.Tensor]]) -> AdamW:
    parameters = [torch.nn.Parameter(w) for w in weights]
    optimizer = AdamW([{"params": parameters, "weight_decay": config.weight_decay}], config)
    for step in gradients:
        for p, g in zip(parameters, step):
            p.grad = g.clone()
        optimizer.prepare(is_applied=True, lr=config.lr, gradient_factor=0.5)
        optimizer.step()
    return optimizer


def test_adamw_equals_torch_and_float64() -> None:
    config = OptimConfig(lr=1e-2, weight_decay=0.1)
    torch.manual_seed(0)
    start = torch.randn(7, 11)
    gradients = [torch.randn(7, 11) for _ in range(5)]
    ours = start.clone()
    run_adamw(config, [ours], [[g] for g in gradients])
    reference = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([reference], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False)
    theta, m, v = start.double().numpy(), np.zeros((7, 11)), np.zeros((7, 11))
    for t, gradient in enumerate(gradients, start=1):
        reference.grad = gradient * 0.5
        optimizer.step()
        g = gradient.double().numpy() * 0.5
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        theta = theta * (1 - 1e-2 * 0.1) - 1e-2 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
    assert torch.allclose(ours, reference.data, rtol=1e-6, atol=1e-7)
    assert np.allclose(ours.numpy(), theta, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("cuts", [[], [1], [5, 6], [15, 17], [16, 64], [3, 40, 41, 90, 999]])
def test_adamw_does_not_depend_on_where_zero_cuts(cuts: list[int]) -> None:
    config = OptimConfig(lr=1e-2)
    torch.manual_seed(0)
    start, gradients = torch.randn(1003), [torch.randn(1003) for _ in range(4)]
    whole = start.clone()
    run_adamw(config, [whole], [[g] for g in gradients])
    pieces = [piece.clone() for piece in torch.tensor_split(start, cuts)]
    run_adamw(config, pieces, [list(torch.tensor_split(g, cuts)) for g in gradients])
    assert torch.equal(torch.cat(pieces), whole)


def test_a_step_that_is_not_applied_changes_nothing() -> None:
    config = OptimConfig()
    weight = torch.randn(5)
    before = weight.clone()
    optimizer = run_adamw(config, [weight], [])
    parameter = optimizer.param_groups[0]["params"][0]
    parameter.grad = torch.full((5,), torch.nan)
    optimizer.step()  # as DeepSpeed calls it while it starts
    optimizer.prepare(is_applied=False, lr=1.0, gradient_factor=0.0)
    optimizer.step()
    assert torch.equal(weight, before) and optimizer.n_updates == 0


def test_segment_views_its_elements() -> None:
    segment = Segment(name="w", role="matrix", shape=(4, 5), start=3, stop=9, flat=0, offset=2)
    flat = torch.arange(20.0)
    segment.of(flat).zero_()
    assert segment.numel == 6 and flat.count_nonzero() == 13 and (flat[2:8] == 0).all()
