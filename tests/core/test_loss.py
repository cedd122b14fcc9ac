"""The objective against autograd in float64, and against numbers known by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megakexue.config import IGNORED, LossConfig
from megakexue.core import loss as loss_module
from megakexue.core.device import has_compiler
from megakexue.core.loss import PLAIN, Losses, cross_entropy, plain_cross_entropy, unit_rows
from tests.ranks import run_on_ranks

Z_LOSS = LossConfig(z_loss=0.01)
EMO = LossConfig(emo=True)
ALL = LossConfig(emo=True, emo_max_ratio=8.0, z_loss=0.01)
configs = pytest.mark.parametrize("config", [PLAIN, Z_LOSS, EMO, ALL], ids=["plain", "z_loss", "emo", "all"])


def inputs(dtype: torch.dtype, n: int = 70) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(n, 24, dtype=dtype, requires_grad=True)
    weight = torch.randn(101, 24, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 101, (n,))
    targets[::7] = IGNORED
    return hidden, weight, targets


def frozen_rows(config: LossConfig, dtype: torch.dtype) -> Tensor | None:
    if not config.emo:
        return None
    return unit_rows(torch.randn(101, 24, generator=torch.Generator().manual_seed(1))).to(dtype)


def plain_objective(
    hidden: Tensor, weight: Tensor, targets: Tensor, logit_scale: float, config: LossConfig, rows: Tensor | None
) -> Tensor:
    """The formulas as they are written, in the dtype of the inputs, for autograd."""
    logits = functional.linear(hidden, weight) * logit_scale
    objective = functional.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)
    if rows is not None:
        cost = 1 - (logits.softmax(-1) @ rows * rows[targets.clamp(min=0)]).sum(-1)
        ratio = (objective / (cost + 1e-10)).clamp(max=config.emo_max_ratio).detach()
        objective = 0.5 * (objective + ratio * cost)
    objective = objective + config.z_loss * logits.logsumexp(-1) ** 2
    return objective[targets != IGNORED].sum()


@configs
@pytest.mark.parametrize("chunk", [1, 16, 70, 512])
@pytest.mark.parametrize("gradient_scale", [1.0, 0.25, 3e-4])
def test_equals_autograd(
    monkeypatch: pytest.MonkeyPatch, config: LossConfig, chunk: int, gradient_scale: float
) -> None:
    monkeypatch.setattr(loss_module, "LOSS_CHUNK", {"cpu": chunk})
    hidden, weight, targets = inputs(torch.float64)
    rows = frozen_rows(config, torch.float64)
    ours = cross_entropy(hidden, weight, targets, 0.7, gradient_scale, config, rows)
    exact = plain_objective(hidden, weight, targets, 0.7, config, rows)
    assert ours.objective.dtype == ours.cross_entropy.dtype == torch.float32
    assert ours.objective.item() == pytest.approx(exact.item(), rel=1e-6)
    of_tokens = plain_cross_entropy(hidden, weight, targets, 0.7)
    assert ours.cross_entropy.item() == pytest.approx(of_tokens.sum().item(), rel=1e-6)
    torch.testing.assert_close(ours.of_tokens, of_tokens, rtol=1e-5, atol=1e-6)
    # the gradients are those of the factor that the caller uses, whether it announced this one or another
    for factor in (gradient_scale, 0.125):
        fresh = cross_entropy(hidden, weight, targets, 0.7, gradient_scale, config, rows).objective
        for a, b in zip(
            torch.autograd.grad(fresh * factor, (hidden, weight)),
            torch.autograd.grad(exact * factor, (hidden, weight), retain_graph=True),
        ):
            # softmax is float32 whatever the inputs are
            assert torch.allclose(a, b, rtol=1e-5, atol=3e-6 * factor)


def test_the_inputs_reach_both_sides_of_the_bound_on_the_ratio() -> None:
    hidden, weight, targets = inputs(torch.float32)
    rows = frozen_rows(EMO, torch.float32)
    # one target at a time: a bound above its CE / C does not change its objective
    tokens = (targets != IGNORED).nonzero().flatten().tolist()
    for config in (EMO, ALL):
        limited = 0
        for i in tokens:
            a, b = (
                cross_entropy(
                    hidden[i : i + 1],
                    weight,
                    targets[i : i + 1],
                    0.7,
                    1.0,
                    LossConfig(emo=True, emo_max_ratio=bound),
                    rows,
                ).objective
                for bound in (config.emo_max_ratio, 1e9)
            )
            limited += int(a < b)
        assert 0 < limited < len(tokens)


@configs
def test_the_cross_entropy_is_the_same_to_the_bit_and_has_no_gradient(config: LossConfig) -> None:
    hidden, weight, targets = inputs(torch.float32)
    plain = cross_entropy(hidden, weight, targets, 1.0)
    losses = cross_entropy(hidden, weight, targets, 1.0, 1.0, config, frozen_rows(config, torch.float32))
    assert torch.equal(plain.objective, plain.cross_entropy)
    assert torch.equal(losses.cross_entropy, plain.cross_entropy)
    assert losses.objective.requires_grad and not losses.cross_entropy.requires_grad
    assert torch.equal(losses.of_tokens, plain.of_tokens) and not losses.of_tokens.requires_grad


@configs
def test_without_gradients_both_are_the_cross_entropy(config: LossConfig) -> None:
    hidden, weight, targets = inputs(torch.float32, n=1100)
    rows = frozen_rows(config, torch.float32)
    with torch.no_grad():
        evaluated = cross_entropy(hidden, weight, targets, 1.0, 1.0, config, rows)
    trained = cross_entropy(hidden, weight, targets, 1.0, 1.0, config, rows)
    assert evaluated.objective.item() == evaluated.cross_entropy.item()
    assert evaluated.cross_entropy.item() == pytest.approx(trained.cross_entropy.item(), rel=1e-6)


@configs
def test_all_ignored_is_zero_with_zero_gradients(config: LossConfig) -> None:
    hidden, weight, targets = inputs(torch.float32)
    targets[:] = IGNORED
    losses = cross_entropy(hidden, weight, targets, 1.0, 1.0, config, frozen_rows(config, torch.float32))
    assert losses.objective.item() == losses.cross_entropy.item() == 0
    assert all((g == 0).all() for g in torch.autograd.grad(losses.objective, (hidden, weight)))


@configs
def test_bfloat16_keeps_float32_losses(config: LossConfig) -> None:
    hidden, weight, targets = inputs(torch.bfloat16)
    rows = frozen_rows(config, torch.bfloat16)
    exact = plain_objective(
        hidden.double(), weight.double(), targets, 1.0, config, None if rows is None else rows.double()
    )
    ours = cross_entropy(hidden, weight, targets, 1.0, 1.0, config, rows).objective
    # only logits and distances are rounded: 2^-9 of values up to 20, averaged out over 60 targets
    assert ours.item() == pytest.approx(exact.item(), rel=1e-3)


@configs
def test_fp16_gradients_neither_vanish_nor_overflow(config: LossConfig) -> None:
    # one token of a batch of a million: without the scale its gradients are below fp16's smallest number
    hidden, weight, targets = inputs(torch.float16)
    rows = frozen_rows(config, torch.float16)
    scale = 65536.0 / 1e6
    losses = cross_entropy(hidden, weight, targets, 1.0, scale, config, rows)
    a = torch.autograd.grad(losses.objective * scale, (hidden, weight))
    h, w = hidden.double().detach().requires_grad_(), weight.double().detach().requires_grad_()
    exact_objective = plain_objective(h, w, targets, 1.0, config, None if rows is None else rows.double())
    b = torch.autograd.grad(exact_objective * scale, (h, w))
    for ours, exact in zip(a, b):
        # float32 logits are the precision of the reference here
        assert (ours.double() - exact).norm() < 5e-3 * exact.norm()


def test_extreme_logits() -> None:
    hidden = torch.tensor([[1000.0], [-1000.0]])
    weight = torch.tensor([[1.0], [-1.0]])
    targets = torch.tensor([0, 0])
    assert cross_entropy(hidden, weight, targets, 1.0).objective.item() == pytest.approx(2000.0)
    # CE is 0 and 2000, and C is 0 and 2, so the bound limits the second ratio; logsumexp is 1000 both times
    losses = cross_entropy(
        hidden, weight, targets, 1.0, 1.0, LossConfig(emo=True, emo_max_ratio=10.0, z_loss=1e-3), unit_rows(weight)
    )
    assert losses.objective.item() == pytest.approx(2000 / 2 + 10 * 2 / 2 + 2000)
    assert losses.cross_entropy.item() == pytest.approx(2000.0)
    uniform = cross_entropy(torch.zeros(5, 3), torch.ones(50, 3), torch.arange(5), 1.0)
    assert uniform.objective.item() == pytest.approx(5 * math.log(50), rel=1e-6)


def test_z_loss_of_a_uniform_model() -> None:
    losses = cross_entropy(torch.zeros(5, 3), torch.ones(50, 3), torch.arange(5), 1.0, 1.0, LossConfig(z_loss=0.1))
    assert losses.objective.item() == pytest.approx(5 * (math.log(50) + 0.1 * math.log(50) ** 2), rel=1e-6)


def emo_cost(p: list[float], target: int, rows: Tensor) -> float:
    """C of one token that is predicted with probabilities `p`."""
    logits, weight = torch.tensor([p]).log(), torch.eye(len(p))
    config = LossConfig(emo=True, emo_max_ratio=0.5)  # it always limits the ratio: no test has a CE below C / 2
    losses = cross_entropy(logits, weight, torch.tensor([target]), 1.0, 1.0, config, rows)
    return (2 * losses.objective.item() - losses.cross_entropy.item()) / 0.5


def test_emo_costs_known_by_hand() -> None:
    assert emo_cost([0.7, 0.3], 0, torch.eye(2)) == pytest.approx(0.3, abs=1e-6)
    assert emo_cost([0.7, 0.3], 0, torch.tensor([[0.6, 0.8], [0.6, 0.8]])) == pytest.approx(0, abs=1e-6)
    assert emo_cost([0.7, 0.3], 0, torch.tensor([[0.6, 0.8], [-0.6, -0.8]])) == pytest.approx(0.6, abs=1e-6)
    assert emo_cost([1 / 8] * 8, 5, torch.eye(8)) == pytest.approx(1 - 1 / 8, abs=1e-6)


def test_emo_is_as_large_as_the_cross_entropy_up_to_the_bound() -> None:
    logits, nats = torch.tensor([[0.7, 0.3]]).log(), -math.log(0.7)
    for max_ratio, expected in ((3.0, nats), (1.0, (nats + 0.3) / 2)):  # CE / C is 1.19
        config = LossConfig(emo=True, emo_max_ratio=max_ratio)
        losses = cross_entropy(logits, torch.eye(2), torch.tensor([0]), 1.0, 1.0, config, torch.eye(2))
        assert losses.objective.item() == pytest.approx(expected, rel=1e-6)


def test_emo_of_a_model_that_is_right() -> None:
    # C is 6e-4 here; rounding the rows to bfloat16 changes 1 - <sum_i p_i e_i, e_t> by more than that
    rows = unit_rows(torch.randn(101, 101, generator=torch.Generator().manual_seed(1))).bfloat16()
    logits = torch.full((101, 101), -8.0, requires_grad=True)
    with torch.no_grad():
        logits.fill_diagonal_(4.0)
    targets, weight = torch.arange(101), torch.eye(101)
    ours = cross_entropy(logits, weight, targets, 1.0, 1.0, EMO, rows).objective
    exact_logits = logits.detach().double().requires_grad_()
    exact_rows = functional.normalize(rows.double(), dim=1)
    exact = plain_objective(exact_logits, weight.double(), targets, 1.0, EMO, exact_rows)
    assert ours.item() == pytest.approx(exact.item(), rel=1e-3)
    a, b = torch.autograd.grad(ours, logits)[0], torch.autograd.grad(exact, exact_logits)[0]
    assert (a.double() - b).norm() < 1e-2 * b.norm()


def test_equal_rows_that_rounding_makes_too_long_cost_nothing() -> None:
    rows = torch.tensor([[0.6, 0.8], [0.6, 0.8]]).bfloat16()
    assert (rows.double() ** 2).sum(1).min() > 1.003  # so that 1 - <e_0, e_1> is below 0
    logits = torch.tensor([[0.7, 0.3]]).log().requires_grad_()
    losses = cross_entropy(logits, torch.eye(2), torch.tensor([0]), 1.0, 1.0, EMO, rows)
    assert losses.objective.item() == losses.cross_entropy.item() / 2
    gradient = torch.autograd.grad(losses.objective, logits)[0]
    assert torch.allclose(gradient, torch.tensor([[-0.15, 0.15]]))


def test_emo_trains_hidden_and_weight_and_leaves_its_rows() -> None:
    hidden, weight, targets = inputs(torch.float32)
    rows = unit_rows(weight)
    assert not rows.requires_grad
    rows.requires_grad_()
    cross_entropy(hidden, weight, targets, 1.0, 1.0, EMO, rows).objective.backward()
    assert hidden.grad is not None and weight.grad is not None and rows.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_emo_rows_have_length_one_in_float32(dtype: torch.dtype) -> None:
    weight = torch.randn(11, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[3], weight[4] = 0, weight[5] * 1e-4
    rows = unit_rows(weight)
    assert rows.dtype == torch.float32
    lengths = torch.ones(11)
    lengths[3] = 0
    assert torch.allclose(rows.norm(dim=1), lengths, atol=1e-6)


def test_a_row_of_zeros_is_at_distance_one_from_all_others() -> None:
    rows = unit_rows(torch.tensor([[0.0, 0.0, 0.0], [3.0, 4.0, 0.0], [0.0, 2.0, 0.0]]))
    assert emo_cost([0.2, 0.5, 0.3], 0, rows) == pytest.approx(0.8, abs=1e-6)
    assert emo_cost([0.2, 0.5, 0.3], 1, rows) == pytest.approx(0.2 + 0.3 * (1 - 0.8), abs=1e-6)


@pytest.mark.parametrize("config", [PLAIN, EMO], ids=["rows without emo", "emo without rows"])
def test_emo_and_its_rows_go_together(config: LossConfig) -> None:
    rows = torch.eye(2) if config == PLAIN else None
    hidden = torch.zeros(1, 2, requires_grad=True)
    with pytest.raises(AssertionError, match=r"loss.emo and emo_rows go together"):
        cross_entropy(hidden, torch.eye(2), torch.tensor([0]), 1.0, 1.0, config, rows)


def compiled_and_eager(cases: list[LossConfig]) -> list[tuple[Losses, Losses, list[Tensor], list[Tensor]]]:
    """The losses and gradients of both, in a process without the type checks of the tests."""
    done = []
    for config in cases:
        of_both: list[Any] = []
        for is_compiled in (False, True):
            torch.manual_seed(0)
            hidden, weight = torch.randn(700, 64, requires_grad=True), torch.randn(300, 64).mul_(0.1).requires_grad_()
            targets = torch.randint(0, 300, (700,))
            targets[::7] = IGNORED
            rows = unit_rows(weight) if config.emo else None
            losses = cross_entropy(hidden, weight, targets, 1.3, torch.tensor(0.01), config, rows, is_compiled)
            (losses.objective * 0.01).backward()
            of_both += [Losses(*(x.detach() for x in losses)), [hidden.grad, weight.grad]]
        done.append((of_both[0], of_both[2], of_both[1], of_both[3]))
    return done


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="needs g++")
def test_the_compiled_loss_is_the_eager_one() -> None:
    (done,) = run_on_ranks(1, compiled_and_eager, [PLAIN, LossConfig(z_loss=1e-3), LossConfig(emo=True, z_loss=1e-3)])
    for eager, compiled, gradients, compiled_gradients in done:
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=0)
        for gradient, other in zip(gradients, compiled_gradients, strict=True):
            assert (gradient - other).abs().max() <= 1e-6 * gradient.abs().max()
