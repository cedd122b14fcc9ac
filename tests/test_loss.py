"""The chunked cross-entropy against the plain one."""

import math

import pytest
import torch

from megakexue import loss as loss_module
from megakexue.config import IGNORED
from megakexue.loss import cross_entropy, plain_cross_entropy


def inputs(dtype: torch.dtype, n: int = 70) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(n, 24, dtype=dtype, requires_grad=True)
    weight = torch.randn(101, 24, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 101, (n,))
    targets[::7] = IGNORED
    return hidden, weight, targets


@pytest.mark.parametrize("chunk", [1, 16, 70, 512])
@pytest.mark.parametrize("gradient_scale", [1.0, 0.25, 3e-4])
def test_equals_the_plain_loss(monkeypatch: pytest.MonkeyPatch, chunk: int, gradient_scale: float) -> None:
    monkeypatch.setattr(loss_module, "CHUNK", chunk)
    hidden, weight, targets = inputs(torch.float64)
    ours = cross_entropy(hidden, weight, targets, 0.7, gradient_scale)
    plain = plain_cross_entropy(hidden, weight, targets, 0.7)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
    # any factor, the announced one or another, gives the gradients of that factor
    for factor in (gradient_scale, 0.125):
        fresh = cross_entropy(hidden, weight, targets, 0.7, gradient_scale)
        for a, b in zip(
            torch.autograd.grad(fresh * factor, (hidden, weight)),
            torch.autograd.grad(plain * factor, (hidden, weight), retain_graph=True),
        ):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6 * factor)


def test_without_gradients_it_is_the_same_number() -> None:
    hidden, weight, targets = inputs(torch.float32, n=1100)
    with torch.no_grad():
        evaluated = cross_entropy(hidden, weight, targets, 1.0)
    assert evaluated.item() == pytest.approx(cross_entropy(hidden, weight, targets, 1.0).item(), rel=1e-6)


def test_all_ignored_is_zero_with_zero_gradients() -> None:
    hidden, weight, targets = inputs(torch.float32)
    targets[:] = IGNORED
    loss = cross_entropy(hidden, weight, targets, 1.0)
    assert loss.item() == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (hidden, weight)))


def test_bfloat16_keeps_a_float32_loss() -> None:
    hidden, weight, targets = inputs(torch.bfloat16)
    exact = plain_cross_entropy(hidden.double(), weight.double(), targets, 1.0)
    # only the logits are rounded: 2^-9 of values up to 20, averaged out over 60 targets
    assert cross_entropy(hidden, weight, targets, 1.0).item() == pytest.approx(exact.item(), rel=1e-3)


def test_fp16_gradients_neither_vanish_nor_overflow() -> None:
    # one token in a million of a batch: unscaled, its gradients are below fp16's smallest number
    hidden, weight, targets = inputs(torch.float16)
    scale = 65536.0 / 1e6
    a = torch.autograd.grad(cross_entropy(hidden, weight, targets, 1.0, scale) * scale, (hidden, weight))
    h, w = hidden.double().detach().requires_grad_(), weight.double().detach().requires_grad_()
    b = torch.autograd.grad(plain_cross_entropy(h, w, targets, 1.0) * scale, (h, w))
    for ours, exact in zip(a, b):
        # float32 logits are the precision of the reference here
        assert (ours.double() - exact).norm() < 5e-3 * exact.norm()


def test_extreme_logits() -> None:
    hidden = torch.tensor([[1000.0], [-1000.0]])
    weight = torch.tensor([[1.0], [-1.0]])
    loss = cross_entropy(hidden, weight, torch.tensor([0, 0]), 1.0)
    assert loss.item() == pytest.approx(2000.0)
    uniform = cross_entropy(torch.zeros(5, 3), torch.ones(50, 3), torch.arange(5), 1.0)
    assert uniform.item() == pytest.approx(5 * math.log(50), rel=1e-6)
