"""The kernels do what their rules do on whole tensors, however they are cut or compiled."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from megakexue.core.rules import CHUNK, COMPILE_FROM, kernels, squares
from tests.ranks import run_on_ranks


def kernel_arguments(kernel: str, rows: int, width: int, dtypes: tuple[torch.dtype, torch.dtype]) -> list[Tensor]:
    """What the optimizer gives a kernel: a rate for each row, some of them zero."""
    generator = torch.Generator().manual_seed(0)
    theta, momentum, gradient = (torch.randn(rows, width, generator=generator) for _ in range(3))
    momentum, gradient = momentum.to(dtypes[0]), gradient.to(dtypes[1])
    rate = torch.rand(rows, 1, generator=torch.Generator().manual_seed(1))
    if rows > 1:
        rate[::3] = 0
    decay, beta, scale, beta2, scale2 = (torch.tensor(v) for v in (0.013, 0.965, 0.035, 0.98, 0.02))
    return {
        "_tiger": [theta, momentum, gradient, rate, decay, beta, scale],
        "_tiger_absorb": [momentum, gradient, torch.tensor(True), beta, scale],
        "_tiger_apply": [theta, momentum, rate, decay],
        "_lion": [theta, momentum, gradient, rate, decay, beta, scale, beta2, scale2],
        "squares": [theta],
    }[kernel]


KERNELS = ("_tiger", "_tiger_absorb", "_tiger_apply", "_lion", "squares")
LAYOUTS = [(1, CHUNK - 1), (1, CHUNK), (1, 3 * CHUNK + 5), (700, 300), (3, CHUNK + 7), (CHUNK + 3, 2), (5, 6), (1, 1)]
HALF = (torch.bfloat16, torch.bfloat16)


def at_once(kernel: str, arguments: list[Tensor]) -> tuple[list[Tensor], Tensor | None]:
    """Return the arguments and the result of a kernel, by the formula on whole tensors, not by the kernels' code."""
    if kernel == "squares":
        return arguments, (arguments[0].double() ** 2).sum(-1)
    if kernel == "_tiger_absorb":
        m, g, _, beta, scale = arguments
        return [(beta * m.float() + scale * g.float()).to(m.dtype), *arguments[1:]], None
    theta, m, *_ = arguments
    if kernel == "_lion":
        _, _, g, rate, decay, beta1, scale1, beta2, scale2 = arguments
        direction, new_m = beta1 * m.float() + scale1 * g.float(), beta2 * m.float() + scale2 * g.float()
    elif kernel == "_tiger":
        _, _, g, rate, decay, beta, scale = arguments
        direction = new_m = beta * m.float() + scale * g.float()
    else:
        _, _, rate, decay = arguments
        direction = new_m = m.float()
    new = theta - (direction.sign() + decay * theta) * rate
    return [new, new_m.to(m.dtype), *arguments[2:]], None if kernel == "_lion" else (new.double() ** 2).sum(-1)


def compare_kernels(n_elements: int, layouts: list[tuple[int, int]]) -> str:
    """Assert that each kernel does what `at_once` does; return how these kernels run."""
    functions, reason = kernels(torch.device("cpu"), n_elements)
    assert functions.keys() == set(KERNELS)
    for kernel, (rows, width), dtypes in itertools.product(KERNELS, layouts, (HALF, (torch.float32, torch.float32))):
        arguments = kernel_arguments(kernel, rows, width, dtypes)
        left, total = at_once(kernel, [x.clone() for x in arguments])
        result = functions[kernel](*arguments)
        where = f"{kernel} {rows} x {width} {dtypes[0]}"
        for got, expected in zip(arguments, left, strict=True):
            assert torch.equal(got, expected), where
        assert (result is None) == (total is None), where
        if total is not None:
            assert result.shape == (rows,) and result.dtype == torch.float64, where
            assert torch.allclose(result, total, rtol=1e-12, atol=0), where
    return reason


def test_chunks_change_nothing() -> None:
    assert compare_kernels(0, LAYOUTS) == f"in chunks of 65,536: fewer than {COMPILE_FROM:,} elements a rank"


def compare_compiled() -> str:
    return compare_kernels(COMPILE_FROM, [(1, 3 * CHUNK + 5), (700, 300), (5, 6)])


@pytest.mark.slow
def test_compiled_kernels_change_nothing() -> None:
    _, reason = kernels(torch.device("cpu"), COMPILE_FROM)
    if "compiled" not in reason:
        pytest.skip(f"kernels run {reason}")
    # in a process of its own, where no check of annotations disturbs the compiler
    assert run_on_ranks(1, compare_compiled) == ["compiled: one pass over the state, for 16,777,216 elements a rank"]


def test_which_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels(torch.device("cuda"), 1)[1] == "compiled: one pass over the state"
    assert "fewer than" in kernels(torch.device("cpu"), COMPILE_FROM - 1)[1]
    monkeypatch.setenv("CXX", "no-such-compiler")
    functions, reason = kernels(torch.device("cpu"), COMPILE_FROM)
    assert reason == "in chunks of 65,536: no C++ compiler found"
    assert functions["squares"](torch.ones(2, 3)).tolist() == squares(torch.ones(2, 3)).tolist() == [3, 3]


def test_absorbing_nothing_keeps_what_is_there() -> None:
    momentum, gradient = torch.tensor([[1.0, 2.0]]), torch.tensor([[math.nan, math.inf]])
    functions, _ = kernels(torch.device("cpu"), 0)
    functions["_tiger_absorb"](momentum, gradient, torch.tensor(False), torch.tensor(0.5), torch.tensor(0.5))
    assert momentum.tolist() == [[1, 2]]
