"""Tiles against the whole row, what they keep, and what waits in the host's memory."""

import itertools
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megakexue.config import MlaConfig
from megakexue.core.recompute import in_tiles, recomputed
from tests.helpers import build, positions_of, tiny


def gradients(tile: int | None, again: bool, offload: bool = False) -> tuple[list[Tensor], int]:
    """The result and all gradients of a function of two inputs and two weights, and how often it is called."""
    generator = torch.Generator().manual_seed(0)
    x, y, w, gain = (
        torch.randn(*size, generator=generator, dtype=torch.float64, requires_grad=True)
        for size in ((2, 10, 3), (2, 10, 4), (5, 7), (5,))
    )
    calls = 0

    def function(a: Tensor, b: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return functional.linear(torch.cat([a, b], dim=-1), w).sin() * gain

    def run(a: Tensor, b: Tensor) -> Tensor:
        return function(a, b) if tile is None else in_tiles(function, tile, (a, b), (w, gain))

    a, b = x.exp(), y.exp()
    result = recomputed(run, a, b, offload=offload) if again else run(a, b)
    result.square().sum().backward()
    return [result.detach(), *(t.grad for t in (x, y, w, gain) if t.grad is not None)], calls


def test_tiles_are_the_row() -> None:
    expected, _ = gradients(None, again=False)
    assert len(expected) == 5
    for tile, again in itertools.product((1, 3, 5, 11), (False, True)):
        for got, right in zip(gradients(tile, again)[0], expected, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-13, atol=1e-13)


def test_a_tile_is_computed_twice_also_in_a_block_that_is_computed_again() -> None:
    assert gradients(5, again=False)[1] == gradients(5, again=True)[1] == 2 * 2
    assert gradients(3, again=True)[1] == 2 * 4
    with torch.no_grad():  # and once where there is no backward pass
        calls: list[int] = []

        def double(a: Tensor) -> Tensor:
            calls.append(a.shape[1])
            return 2 * a

        assert torch.equal(in_tiles(double, 3, (torch.ones(1, 7, 2),), ()), torch.full((1, 7, 2), 2.0))
    assert calls == [3, 3, 1]


def test_what_waits_on_the_host_changes_no_bit_and_leaves_the_device() -> None:
    for got, right in zip(gradients(4, True, offload=True)[0], gradients(4, True)[0], strict=True):
        assert torch.equal(got, right)
    x = torch.ones(1, 4, 2, requires_grad=True)
    for offload in (False, True):
        inner = x + 1
        result, is_there = recomputed(torch.exp, inner, offload=offload), weakref.ref(inner)
        del inner
        assert (is_there() is None) == offload
        result.sum().backward()


@pytest.mark.parametrize("residual", ["deepnorm", "prenorm"])
@pytest.mark.parametrize("mla", [None, MlaConfig(d_latent=8, d_nope=4, d_rope=4, d_value=6)], ids=["gqa", "mla"])
def test_a_model_in_tiles_is_the_model(residual: str, mla: MlaConfig | None) -> None:
    kind: dict[str, Any] = dict(mla=mla, n_kv_heads=None) if mla else {}
    model = build(tiny(residual=residual, **kind), "blocked", torch.float64)
    tokens = torch.randint(0, 97, (2, 33), generator=torch.Generator().manual_seed(1))
    found = []
    for recompute, tile in (("none", None), ("none", 8), ("block", 8), ("block", 40)):
        model.set_recompute(recompute, tile_tokens=tile)  # type: ignore[arg-type]
        model.zero_grad()
        logits = model(tokens, positions_of(tokens))
        logits.logsumexp(-1).sum().backward()
        found.append([logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for got in found[1:]:
        for g, right in zip(got, found[0], strict=True):
            torch.testing.assert_close(g, right, rtol=1e-11, atol=1e-12)
