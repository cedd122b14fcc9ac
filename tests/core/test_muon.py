"""Newton-Schulz against an SVD in float64, and matrices that come together from any ranks."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megakexue.core.muon import Matrices, newton_schulz, update_scale
from tests.core.test_optim import Model, Swap, assert_same_bits, make_config, random_tensors

LOW, HIGH, FROM = 0.68, 1.21, 1 / 650
"""Between which five iterations bring every singular value from a share of the norm on."""


def spectrum(n_values: int, smallest: float) -> Tensor:
    """Singular values from 1 to `smallest`, divided by their norm."""
    values = torch.logspace(0, math.log10(smallest), n_values, dtype=torch.float64)
    return values / values.norm()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32), (1, 9), (9, 1)], ids=str)
def test_newton_schulz_against_an_svd(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    values = spectrum(min(shape), smallest=0.005)
    x = 7.3 * u @ torch.diag(values) @ vt
    # in the basis of the singular vectors of x the result is diagonal: the directions are those of x
    inside = u.T @ newton_schulz(x) @ vt.T
    found = inside.diagonal()
    assert torch.allclose(inside, torch.diag(found), rtol=0, atol=1e-12)
    expected = values.clone()
    for _ in range(5):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    assert torch.allclose(found, expected, rtol=1e-9, atol=0)
    assert values.min() > FROM and LOW < found.min() and found.max() < HIGH
    # and U V^T itself is near: the angle between both, as vectors
    cosine = float(found.sum() / found.norm() / len(found) ** 0.5)
    assert cosine > 0.98
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 0.06)):
        assert torch.allclose(newton_schulz(x.to(dtype)).double(), newton_schulz(x), rtol=0, atol=tolerance)


def test_the_band_for_every_singular_value() -> None:
    values = torch.logspace(math.log10(FROM), 0, 100_000, dtype=torch.float64)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert LOW < values.min() < LOW + 0.01 and HIGH - 0.01 < values.max() < HIGH


def test_newton_schulz_of_any_scale_and_of_nothing() -> None:
    x = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    for scale in (2.0**-60, 2.0**60):
        assert torch.equal(newton_schulz(x * scale), newton_schulz(x))
    assert not newton_schulz(torch.zeros(6, 9)).any()
    for huge in (torch.full((6, 9), 3e38), torch.full((6, 9), 3e38, dtype=torch.bfloat16)):  # whose norm is beyond it
        assert newton_schulz(huge).isfinite().all()


def test_an_update_has_the_rms_of_adamw() -> None:
    for shape in ((64, 256), (256, 64), (128, 128)):
        u, _, vt = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(2)), full_matrices=False)
        assert float((update_scale(shape) * u @ vt).square().mean().sqrt()) == pytest.approx(0.2, rel=1e-5)


SHAPES: dict[str, tuple[int, ...]] = {
    "embedding": (5, 6), "wide": (4, 7), "gain": (6,), "tall": (9, 3), "square": (5, 5), "row": (1, 6), "head": (5, 6)
}  # fmt: skip
N = sum(math.prod(shape) for shape in SHAPES.values())


def trained(cuts: tuple[int, ...], limit: int) -> list[dict[str, Tensor]]:
    model = Model(make_config("muon", lr=0.02, clip="min"), random_tensors(SHAPES, 0), cuts, limit=limit)
    for step in range(3):
        gradients = random_tensors(SHAPES, 1 + step)
        model.step(gradients, shrink={"tall": (0.0, 0.99)} if step == 1 else {})
    return [model.whole(kind) for kind in ("theta", "momentum", "exp_avg", "exp_avg_sq")]


@given(st.lists(st.integers(0, N), max_size=5), st.integers(1, 200))
@settings(deadline=None, max_examples=20)
def test_no_cut_and_no_size_of_messages_changes_a_bit(cuts: list[int], limit: int) -> None:
    for found, expected in zip(trained(tuple(sorted(cuts)), limit), trained((), 1000), strict=True):
        assert_same_bits(found, expected)


def test_two_updates_are_the_formula() -> None:
    config, theta = make_config("muon", lr=0.02, weight_decay=0.3), random_tensors(SHAPES, 0)
    assert (config.beta1, config.weight_decay) == (0.95, 0.3)
    model, momentum = Model(config, theta), {name: torch.zeros_like(w) for name, w in theta.items()}
    for step in range(2):
        gradients = random_tensors(SHAPES, 1 + step)
        model.step({name: 4 * g for name, g in gradients.items()}, factor=0.25)
        for name in ("wide", "tall", "square", "row"):
            momentum[name] = 0.95 * momentum[name] + gradients[name]  # a sum, as Moonlight's
            direction = newton_schulz(gradients[name] + 0.95 * momentum[name])
            by = 0.02 * 0.2 * max(SHAPES[name]) ** 0.5 * direction
            theta[name] = theta[name] * (1 - 0.02 * 0.3) - by
            assert torch.allclose(model.theta[name], theta[name], rtol=0, atol=1e-6), name
    adamw = Model(make_config("adamw", lr=0.02, weight_decay=0.3), random_tensors(SHAPES, 0))
    for step in range(2):
        adamw.step(random_tensors(SHAPES, 1 + step), factor=1.0)
    for name in ("embedding", "gain", "head"):
        assert torch.allclose(model.theta[name], adamw.theta[name], rtol=1e-6, atol=1e-7), name
    assert model.whole("exp_avg").keys() == {"embedding", "gain", "head"} == SHAPES.keys() - model.momentum.keys()


def matrices(spans: list[list[tuple[int, int]]], limit: int) -> Matrices:
    """Matrices of 6 x 4, of which each rank has what its list says."""
    held = torch.tensor(spans).transpose(0, 1)
    return Matrices(rank=0, shapes={f"{i}": (6, 4) for i in range(len(held))}, held=held, swap=no_swap, limit=limit)


def no_swap(*_: Any) -> Tensor:
    raise AssertionError


def test_rounds_are_bounded_for_who_holds_and_for_who_owns() -> None:
    whole, nothing = (0, 24), (0, 0)
    first_has_all = matrices([[whole] * 6, [nothing] * 6], limit=48)
    assert list(first_has_all.owners.values()) == [0, 1] * 3
    assert [len(names) for names in first_has_all.rounds] == [2, 2, 2]  # the first rank sends 48 of both
    halves = matrices([[(0, 12)] * 6, [(12, 24)] * 6], limit=48)
    assert [len(names) for names in halves.rounds] == [4, 2]
    replicated = matrices([[whole] * 6] * 2, limit=96)
    assert [len(names) for names in replicated.rounds] == [4, 2]  # an owner sends each of its two to both
    assert [len(names) for names in matrices([[whole] * 3], limit=1).rounds] == [1, 1, 1]


def test_where_ranks_have_everything_only_results_are_sent() -> None:
    """At stage 0: the sum of what is sent to owners is what they send to themselves."""
    import threading

    shapes: dict[str, tuple[int, ...]] = {"a": (6, 4), "b": (3, 8), "c": (5, 5)}
    values, n_ranks, found, sent = random_tensors(shapes, 0), 3, [dict[str, Tensor]() for _ in range(3)], [0, 0, 0]
    held = torch.tensor([[[0, math.prod(s)]] * n_ranks for s in shapes.values()])
    swap = Swap(n_ranks)

    def of_rank(rank: int) -> None:
        inner = swap.of_rank(rank)

        def counted(message: Tensor, to: list[int], received: list[int]) -> Tensor:
            sent[rank] += sum(n for i, n in enumerate(to) if i != rank)
            return inner(message, to, received)

        all_ = Matrices(rank=rank, shapes=shapes, held=held, swap=counted, limit=1000)
        all_.orthogonalise(
            lambda name: values[name].view(-1), lambda name, x: found[rank].update({name: x.view(shapes[name])}),
            dtype=torch.float32, device=torch.device("cpu"),
        )  # fmt: skip

    threads = [threading.Thread(target=of_rank, args=(rank,)) for rank in range(n_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for of_this in found:
        assert_same_bits(dict(sorted(of_this.items())), {name: newton_schulz(x) for name, x in values.items()})
    assert sum(sent) == (n_ranks - 1) * sum(math.prod(s) for s in shapes.values())
