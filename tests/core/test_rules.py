"""The kernels do what their rules do on whole tensors, compiled or not; AdamW's, whatever lies in one flat tensor."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megakexue.core.rules import CHUNK, COMPILE_FROM, PIECE, adamw_step, kernels, squares
from tests.ranks import run_on_ranks


def kernel_arguments(kernel: str, rows: int, width: int, dtypes: tuple[torch.dtype, torch.dtype]) -> list[Any]:
    """What the optimizer gives a kernel: a rate and a decay for each unit, some of them zero; no weights in fp32."""
    generator = torch.Generator().manual_seed(0)
    theta, momentum, gradient = (torch.randn(rows, width, generator=generator) for _ in range(3))
    momentum, gradient = momentum.to(dtypes[0]), gradient.to(dtypes[1])
    rate = torch.rand(rows, 1, generator=torch.Generator().manual_seed(1))
    if rows > 1:
        rate[::3] = 0
    decay = torch.full((rows, 1), 0.013)
    decay[1::3] = 0
    beta, scale, beta2, scale2 = (torch.tensor(v) for v in (0.965, 0.035, 0.98, 0.02))
    weights = None if dtypes[1] == torch.float32 else torch.zeros(rows, width, dtype=dtypes[1])
    arguments: dict[str, list[Any]] = {
        "_tiger": [theta, weights, momentum, gradient, rate, decay, beta, scale],
        "_tiger_absorb": [momentum, gradient, rate > 0.5, torch.where(decay > 0, beta, 1.0), scale],
        "_tiger_apply": [theta, weights, momentum, rate, decay],
        "_lion": [theta, weights, momentum, gradient, rate, decay, beta, scale, beta2, scale2],
        "_muon_direction": [momentum.float(), gradient, beta, scale],
        "_muon": [theta, weights, momentum.float(), rate, decay, scale2],
        "squares": [theta],
    }
    return arguments[kernel]


KERNELS = ("_tiger", "_tiger_absorb", "_tiger_apply", "_lion", "_muon_direction", "_muon", "squares")
LAYOUTS = [(1, CHUNK - 1), (1, CHUNK), (1, 3 * CHUNK + 5), (700, 300), (3, CHUNK + 7), (CHUNK + 3, 2), (5, 6), (1, 1)]
HALF = (torch.bfloat16, torch.bfloat16)


def at_once(kernel: str, arguments: list[Any]) -> tuple[list[Any], Tensor | None]:
    """Return the arguments and the result of a kernel, by the formula on whole tensors, not by the kernels' code."""
    if kernel == "squares":
        return arguments, (arguments[0].double() ** 2).sum(-1)
    if kernel == "_muon_direction":
        m, g, beta, scale = arguments
        new_m = beta * m + scale * g.float()
        return [new_m, *arguments[1:]], beta * new_m + scale * g.float()
    if kernel == "_tiger_absorb":
        m, g, ok, beta, scale = arguments
        return [torch.where(ok, beta * m.float() + scale * g.float(), m.float()).to(m.dtype), *arguments[1:]], None
    theta, weights, m, *_ = arguments
    if kernel == "_muon":
        *_, rate, decay, scale = arguments
        new = theta - (scale * m + decay * theta) * rate
        return [new, None if weights is None else new.to(weights.dtype), *arguments[2:]], None
    if kernel == "_lion":
        *_, g, rate, decay, beta1, scale1, beta2, scale2 = arguments
        direction, new_m = beta1 * m.float() + scale1 * g.float(), beta2 * m.float() + scale2 * g.float()
    elif kernel == "_tiger":
        *_, g, rate, decay, beta, scale = arguments
        direction = new_m = beta * m.float() + scale * g.float()
    else:
        *_, rate, decay = arguments
        direction = new_m = m.float()
    new = theta - (direction.sign() + decay * theta) * rate
    cast = None if weights is None else new.to(weights.dtype)
    return [new, cast, new_m.to(m.dtype), *arguments[3:]], None if kernel == "_lion" else (new.double() ** 2).sum(-1)


def compare_kernels(n_elements: int, layouts: list[tuple[int, int]]) -> str:
    """Assert that each kernel does what `at_once` does; return how these kernels run."""
    functions, size, reason = kernels(torch.device("cpu"), n_elements)
    assert functions.keys() == set(KERNELS) and size == (PIECE if n_elements else CHUNK)
    for kernel, (rows, width), dtypes in itertools.product(KERNELS, layouts, (HALF, (torch.float32, torch.float32))):
        arguments = kernel_arguments(kernel, rows, width, dtypes)
        left, total = at_once(kernel, [x if x is None else x.clone() for x in arguments])
        result = functions[kernel](*arguments)
        where = f"{kernel} {rows} x {width} {dtypes[0]}"
        for got, expected in zip(arguments, left, strict=True):
            assert (got is None and expected is None) or torch.equal(got, expected), where
        assert (result is None) == (total is None), where
        if kernel == "_muon_direction":
            assert total is not None and torch.equal(result, total), where
        elif total is not None:
            assert result.shape == (rows,) and result.dtype == torch.float64, where
            assert torch.allclose(result, total, rtol=1e-12, atol=0), where
    return reason


def test_kernels_do_what_the_rules_say() -> None:
    assert compare_kernels(0, LAYOUTS) == f"in chunks of 65,536: fewer than {COMPILE_FROM:,} elements a rank"


def compare_compiled() -> str:
    return compare_kernels(COMPILE_FROM, [(1, 3 * CHUNK + 5), (700, 300), (5, 6)])


@pytest.mark.slow
def test_compiled_kernels_change_nothing() -> None:
    *_, reason = kernels(torch.device("cpu"), COMPILE_FROM)
    if "compiled" not in reason:
        pytest.skip(f"kernels run {reason}")
    # in a process of its own, where no check of annotations disturbs the compiler
    assert run_on_ranks(1, compare_compiled) == ["compiled: one pass over the state, for 16,777,216 elements a rank"]


def test_which_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels(torch.device("cuda"), 1)[2] == "compiled: one pass over the state"
    assert "fewer than" in kernels(torch.device("cpu"), COMPILE_FROM - 1)[2]
    monkeypatch.setenv("CXX", "no-such-compiler")
    functions, _, reason = kernels(torch.device("cpu"), COMPILE_FROM)
    assert reason == "in chunks of 65,536: no C++ compiler found"
    assert functions["squares"](torch.ones(2, 3)).tolist() == squares(torch.ones(2, 3)).tolist() == [3, 3]


def test_absorbing_nothing_keeps_what_is_there() -> None:
    momentum, gradient = torch.tensor([[1.0, 2.0]]), torch.tensor([[math.nan, math.inf]])
    functions, *_ = kernels(torch.device("cpu"), 0)
    functions["_tiger_absorb"](momentum, gradient, torch.tensor(False), torch.tensor(0.5), torch.tensor(0.5))
    assert momentum.tolist() == [[1, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_moves_a_flat_tensor_as_its_tensors_by_themselves(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = 1000, 3, 17, 41, 1, 2000
    numbers: dict[str, Any] = dict(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8)
    theta, g, m, v = (torch.randn(sum(lengths), generator=generator) for _ in range(4))
    tensors = theta, g.to(dtype), m, v.square()
    factor, places = torch.tensor(0.3, dtype=torch.float64), torch.arange(sum(lengths)).split(lengths)
    alone = [[x.clone() for x in whole.split(lengths)] for whole in tensors]
    nothing = torch.empty(0, dtype=torch.long)
    for i, (w, own, a, b) in enumerate(zip(*alone)):
        adamw_step(w, own, a, b, nothing, 3, factor, weight_decay=0.0 if i % 2 else 0.1, **numbers)
    adamw_step(*tensors, torch.cat(places[1::2]), 3, factor, weight_decay=0.1, **numbers)
    for i in (0, 2, 3):
        assert torch.equal(tensors[i], torch.cat(alone[i])), i
