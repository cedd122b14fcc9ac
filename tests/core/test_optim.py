"""The rules against NumPy, the published implementation and torch, bit for bit, wherever ZeRO cuts the tensors."""

import functools
import itertools
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megakexue.config import OptimConfig, ResolvedOptim
from megakexue.core import optim, rules
from megakexue.core.device import DTYPES
from megakexue.core.muon import Matrices
from megakexue.core.optim import N_STATISTICS, Optimizer, Sums, _statistics
from megakexue.core.resolve import resolve_optim
from megakexue.core.rules import tiger_update
from megakexue.core.schedule import clip_factor
from megakexue.core.segments import Segment, cut_rows

Tensors = dict[str, Tensor]
ROLES = {"embedding": "embedding", "head": "head", "gain": "gain", "bias": "gain"}
FLOAT32_BETA = float(np.float32(0.965))
"""A beta that float32 holds exactly, since the betas of a window are float32."""


def make_config(name: Any = "tiger", **settings: Any) -> ResolvedOptim:
    return resolve_optim(OptimConfig(name=name, **{"warmup_steps": 0, "clip": None} | settings), False)


class Swap:
    """The exchange of ranks that are threads, as `dist.exchange` makes it between processes."""

    def __init__(self, n_ranks: int) -> None:
        self.barrier = threading.Barrier(n_ranks, timeout=60)
        self.messages: list[list[Tensor]] = [[]] * n_ranks
        self.n_rounds = 0

    def of_rank(self, rank: int) -> Callable[[Tensor, list[int], list[int]], Tensor]:
        def swap(message: Tensor, sent: list[int], received: list[int]) -> Tensor:
            self.messages[rank] = list(message.split(sent))
            self.n_rounds += rank == 0
            self.barrier.wait()
            parts = [of_rank[rank].clone() for of_rank in self.messages]
            assert [len(part) for part in parts] == received
            self.barrier.wait()
            return torch.cat(parts)

        return swap


def matrices_of(ranks: list[list[Segment]], weights: Tensors, limit: int) -> list[Matrices]:
    """What each rank knows of the matrices that Muon moves."""
    shapes = {name: tuple(w.shape) for name, w in weights.items() if ROLES.get(name, "matrix") == "matrix"}
    held = torch.zeros(len(shapes), len(ranks), 2, dtype=torch.long)
    for rank, segments in enumerate(ranks):
        for s in segments:
            if s.name in shapes:
                held[list(shapes).index(s.name), rank] = torch.tensor([s.start, s.stop])
    swap = Swap(len(ranks))
    return [Matrices(rank=i, shapes=shapes, held=held, swap=swap.of_rank(i), limit=limit) for i in range(len(ranks))]


class Model:
    """Whole tensors, concatenated and cut at `cuts` into the slices of ranks, as under ZeRO 1 and 2."""

    def __init__(
        self, config: ResolvedOptim, weights: Tensors, cuts: tuple[int, ...] = (), dtype: torch.dtype | None = None,
        limit: int = 20,
    ) -> None:  # fmt: skip
        self.config, self.shapes = config, {name: tuple(w.shape) for name, w in weights.items()}
        ranks: list[list[Segment]] = []
        for low, high in itertools.pairwise([0, *cuts, sum(w.numel() for w in weights.values())]):
            segments, at = [], 0
            for name, w in weights.items():
                start, stop = max(low - at, 0), min(high - at, w.numel())
                if start < stop:
                    segments.append(
                        Segment(
                            name=name, role=ROLES.get(name, "matrix"), shape=tuple(w.shape), start=start, stop=stop,
                            flat=0, offset=at + start - low,
                        )
                    )  # fmt: skip
                at += w.numel()
            ranks.append(segments)
        cut = sorted({row for segments in ranks for row in cut_rows(segments)})
        self.ranks = []
        matrices = matrices_of(ranks, weights, limit) if config.name == "muon" else [None] * len(ranks)
        for segments, of_rank in zip(ranks, matrices):
            flats = self.cut(segments, weights)
            # with a dtype, there are weights beside the masters
            cast = [None if dtype is None else torch.zeros_like(flat, dtype=dtype) for flat in flats]
            self.ranks.append(Optimizer(config, segments, flats, list(weights), cut, cast, of_rank))

    def cut(self, segments: list[Segment], tensors: Tensors) -> list[Tensor]:
        """The flat tensor of a rank."""
        pieces = [tensors[s.name].view(-1)[s.start : s.stop] for s in segments]
        return [torch.cat([torch.empty(0, dtype=next(iter(tensors.values())).dtype), *pieces])]

    def add_up(self, sums: list[Sums]) -> list[Sums]:
        """Over ranks, as the engine's all-reduce does."""
        total = torch.stack([s.total for s in sums]).sum(0)
        for s in sums:
            s.total = total
        return sums

    def gradient_sums(self, gradients: Tensors) -> list[Sums]:
        return self.add_up([o.gradient_sums(self.cut(o.segments, gradients)) for o in self.ranks])

    def weight_sums(self) -> list[Sums]:
        return self.add_up([o.weight_sums() for o in self.ranks])

    def factor(self, sums: Sums) -> Tensor:
        return clip_factor(self.config, sums.total[: len(self.shapes)].sum().sqrt())

    def absorb(self, gradients: Tensors, factor: float | None = None, bad: tuple[str, ...] = ()) -> None:
        ok = torch.tensor([name not in bad for name in self.shapes])
        sums = self.gradient_sums(gradients)
        scale = self.factor(sums[0]) if factor is None else torch.tensor(factor, dtype=torch.float64)
        for o, s in zip(self.ranks, sums):
            o.absorb(self.cut(o.segments, gradients), s, scale, ok)

    def step(
        self, gradients: Tensors, lr: float | None = None, factor: float | None = None, statistics: bool = False,
        shrink: dict[str, tuple[float, float]] | None = None,
    ) -> list[Tensor | None]:  # fmt: skip
        """Move all ranks; return the statistics of each."""
        sums, weights = self.gradient_sums(gradients), self.weight_sums()
        scale = self.factor(sums[0]) if factor is None else torch.tensor(factor, dtype=torch.float64)
        rate = lr if lr is not None else self.config.lr

        def of_rank(rank: tuple[Optimizer, Sums, Sums]) -> Tensor | None:
            o, s, w = rank
            flats = self.cut(o.segments, gradients)
            return o.step(flats, w, s, lr=rate, factor=scale, shrink=shrink, statistics=statistics)

        of_ranks = list(zip(self.ranks, sums, weights))
        if self.config.name != "muon":
            return [of_rank(rank) for rank in of_ranks]
        with ThreadPoolExecutor(len(of_ranks)) as threads:  # they wait for one another
            return list(threads.map(of_rank, of_ranks))

    def whole(self, kind: str) -> Tensors:
        """The masters (`theta`) or a state tensor of each parameter that has it."""
        found: dict[str, list[Tensor]] = {}
        for o in self.ranks:
            for s, master, state in zip(o.segments, o.masters, o.state):
                found.setdefault(s.name, []).extend(x for k, x in [("theta", master), *state.items()] if k == kind)
        return {name: torch.cat(pieces).view(self.shapes[name]).clone() for name, pieces in found.items() if pieces}

    @property
    def theta(self) -> Tensors:
        return self.whole("theta")

    @property
    def momentum(self) -> Tensors:
        return self.whole("momentum")


def add_tables(tables: list[Tensor | None]) -> Tensor:
    """Add up the statistics of all ranks."""
    given_ = [table for table in tables if table is not None]
    assert len(given_) == len(tables)
    return torch.stack(given_).sum(0)


def float64(**values: Any) -> Tensors:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def assert_same_bits(got: Tensors, expected: Tensors) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        assert torch.equal(got[name], expected[name]), f"{name}\n{got[name] - expected[name]}"


# --- Tiger against the published rule --------------------------------------------------------------------------------


def test_known_answers() -> None:
    weights = float64(w=[[3, -4], [0, 5]], embedding=[[1, 1], [3, 4]], gain=[1, 2], bias=[0, 0.5])
    gradients = float64(w=[[1, -2], [0, -0.5]], embedding=[[1, -1], [0, 2]], gain=[1, -1], bias=[-1, 0])
    model = Model(make_config(embedding="dense"), weights)
    model.step(gradients)
    expected = float64(
        w=[[2.9963584000768893, -3.9963230447378297], [0, 5.003358757210636]],
        embedding=[[0.99899, 1.00099], [2.999893933982822, 3.9963230447378297]],
        gain=[0.9995, 2.0005],
        bias=[0.0005, 0.5],
    )
    assert_same_bits(model.theta, expected)
    first = model.momentum
    for name, m in float64(
        w=[[0.035, -0.07], [0, -0.0175]], embedding=[[0.035, -0.035], [0, 0.07]], gain=[0.035, -0.035], bias=[-0.035, 0]
    ).items():
        assert torch.allclose(first[name], m, rtol=1e-15, atol=0)  # 1 - 0.965 is 0.03500000000000003

    gradients["gain"] = torch.tensor([math.nan, 1.0], dtype=torch.float64)
    sums = model.gradient_sums(gradients)[0]
    assert [name for name, total in zip(weights, sums.total) if not total.isfinite()] == ["gain"]
    model.step(gradients, shrink={"gain": (1.0, 0.99)})
    second = model.theta
    w = [[2.9927175713016467, -3.9926468681104006], [0, 5.006716803168384]]
    assert_same_bits({"w": second["w"]}, float64(w=w))
    assert second["gain"].tolist() == pytest.approx([0.999505, 1.990495], rel=1e-15, abs=0)
    assert second["bias"].tolist() == [0.001, 0.5]
    assert torch.equal(model.momentum["gain"], first["gain"])
    assert model.ranks[0].n_updates == 2


class Published:
    """bojone/tiger, variable by variable in NumPy: (8634) and (9512) with its NaN policy, t counting micro-batches."""

    def __init__(self, config: ResolvedOptim, weights: Tensors, k: int) -> None:
        self.config, self.k, self.t = config, k, 0
        self.theta = {name: w.numpy().copy() for name, w in weights.items()}
        self.m = {name: np.zeros_like(w) for name, w in self.theta.items()}

    def micro_step(self, gradients: Tensors) -> None:
        lr, beta, decay = self.config.lr, self.config.beta1, self.config.weight_decay
        for name, gradient in gradients.items():
            g, theta = gradient.numpy(), self.theta[name]
            b1 = beta if self.t % self.k == 0 else 1.0
            b2 = (1 - beta) / self.k
            rate: Any = lr if (self.t + 1) % self.k == 0 else 0.0
            d, c = decay, 0.0
            is_nan = np.isnan(g).any()
            if is_nan:
                b1, g = 1.0, np.zeros_like(g)
            if name in ("gain", "bias"):
                rate, d, c = rate * 0.5, 0.0, 1.0 if name == "gain" else 0.0
            elif name == "embedding":
                rate = rate * np.sqrt(np.mean(theta**2, axis=-1, keepdims=True))
            else:
                rate = rate * np.sqrt(np.mean(theta**2))
            m = b1 * self.m[name] + b2 * g
            u = (np.sign(m) + d * theta) * rate
            self.m[name] = m
            self.theta[name] = (theta - c) * 0.99 + c if is_nan else theta - u
        self.t += 1


SHAPES: dict[str, tuple[int, ...]] = {"embedding": (9, 6), "w": (7, 11), "gain": (5,), "bias": (3,), "head": (4, 6)}


def dyadic(seed: int) -> Tensors:
    """Random weights whose squares float64 adds without rounding, so that the order of a sum changes no bit."""
    return {name: (w * 64).round() / 64 for name, w in random_tensors(SHAPES, seed, torch.float64).items()}


@pytest.mark.parametrize("seed", range(20))
def test_one_update_is_the_published_one_bit_for_bit(seed: int) -> None:
    config = make_config(embedding="dense", lr=1.76e-3, weight_decay=0.013)
    weights, start = dyadic(seed), random_tensors(SHAPES, 1000 + seed, torch.float64)
    gradients = random_tensors(SHAPES, 2000 + seed, torch.float64)
    if seed % 2:
        gradients["w"][1, 2] = math.nan
    model, published = Model(config, weights), Published(config, weights, k=1)
    for segment, state in zip(model.ranks[0].segments, model.ranks[0].state):
        state["momentum"].copy_(start[segment.name].view(-1))
    published.m = {name: m.numpy().copy() for name, m in start.items()}
    # loss scale and clipping arrive as one factor, here a power of two that rounds nothing
    scaled = {name: 1024 * g for name, g in gradients.items()}
    model.step(scaled, factor=2.0**-10, shrink={"w": (0.0, 0.99)} if seed % 2 else {})
    published.micro_step(gradients)
    assert_same_bits(model.theta, {name: torch.from_numpy(x) for name, x in published.theta.items()})
    assert_same_bits(model.momentum, {name: torch.from_numpy(x) for name, x in published.m.items()})


@pytest.mark.parametrize("accumulate", ["gradient", "momentum"])
@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_many_updates_are_the_published_ones(k: int, accumulate: Any) -> None:
    config = make_config(embedding="dense", accumulate=accumulate, beta1=FLOAT32_BETA, lr=1e-2)
    weights = random_tensors(SHAPES, 0, torch.float64)
    model, published = Model(config, weights), Published(config, weights, k)
    for update in range(10):
        batches = [random_tensors(SHAPES, 1 + k * update + i, torch.float64) for i in range(k)]
        for gradients in batches:
            published.micro_step(gradients)
            if accumulate == "momentum":
                model.absorb(gradients, factor=1 / k)
        mean = {name: torch.stack([batch[name] for batch in batches]).mean(0) for name in weights}
        model.step(batches[-1] if accumulate == "momentum" else mean)
        for name, m in model.momentum.items():
            assert np.abs(m.numpy() - published.m[name]).max() < 1e-15  # elements are about 0.1
    for name, theta in model.theta.items():
        # the order of the sums in ten RMS: ten roundings of elements of about 1
        assert np.abs(theta.numpy() - published.theta[name]).max() < 4e-15, name
    assert model.ranks[0].n_updates == 10


# --- where we differ from the published rule on purpose --------------------------------------------------------------


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_an_infinite_gradient_is_not_finite(value: float) -> None:
    # the published rule looks for NaN alone: an infinity goes into its momentum and never leaves
    config = make_config(embedding="dense")
    weights, gradients = dyadic(0), random_tensors(SHAPES, 1, torch.float64)
    gradients["embedding"][3, 1] = value
    gradients["w"][0, 0] = 1e30  # large is not infinite, though float32 cannot square it
    gradients = {name: g.float() for name, g in gradients.items()}
    model, published = Model(config, weights), Published(config, weights, k=1)
    (sums,) = model.gradient_sums(gradients)
    bad = [name for name, total in zip(weights, sums.total) if not total.isfinite()]
    assert bad == ["embedding"]
    model.step(gradients, shrink={"embedding": (0.0, 0.99)})
    published.micro_step({name: g.double() for name, g in gradients.items()})
    assert torch.equal(model.theta["embedding"], weights["embedding"] * 0.99)
    assert not model.momentum["embedding"].any()
    assert np.isinf(published.m["embedding"]).any() == math.isinf(value)
    for name in weights.keys() - {"embedding"}:
        assert np.abs(model.theta[name].numpy() - published.theta[name]).max() < 1e-16


@pytest.mark.parametrize("bad", [(), (0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)])
def test_a_window_decays_and_shrinks_once_whichever_micro_batch_is_bad(bad: tuple[int, ...]) -> None:
    # the published rule does not decay when the first is bad, and shrinks once for each that is
    config = make_config(accumulate="momentum", embedding="dense", beta1=FLOAT32_BETA)
    weights, start = dyadic(0), random_tensors(SHAPES, 1, torch.float64)
    model, published = Model(config, weights), Published(config, weights, k=3)
    for segment, state in zip(model.ranks[0].segments, model.ranks[0].state):
        state["momentum"].copy_(start[segment.name].view(-1))
    published.m = {name: m.numpy().copy() for name, m in start.items()}
    batches = [random_tensors(SHAPES, 2 + i, torch.float64) for i in range(3)]
    good = {name: sum(b[name] for i, b in enumerate(batches) if name != "w" or i not in bad) for name in weights}
    for i, gradients in enumerate(batches):
        if i in bad:
            gradients["w"][2, 3] = math.nan
        model.absorb(gradients, factor=1 / 3, bad=("w",) if i in bad else ())
        published.micro_step(gradients)
    model.step(batches[-1], shrink={"w": (0.0, 0.99)} if bad else {})
    momentum, theta = model.momentum, model.theta
    for name in weights:
        expected = FLOAT32_BETA * start[name] + (1 - FLOAT32_BETA) / 3 * good[name]
        if name == "w" and len(bad) == 3:
            expected = start[name]
        assert torch.allclose(momentum[name], expected, rtol=0, atol=1e-15), name
    if bad:
        assert torch.equal(theta["w"], weights["w"] * 0.99)
        shrunk = np.abs(published.theta["w"] - weights["w"].numpy() * 0.99 ** len(bad)).max() < 1e-15
        assert shrunk == (2 in bad)  # otherwise the published variable moves as well
        assert np.allclose(published.m["w"], momentum["w"], rtol=0, atol=1e-15) == (0 not in bad or len(bad) == 3)
    for name in weights.keys() - ({"w"} if bad else set()):
        assert np.abs(theta[name].numpy() - published.theta[name]).max() < 1e-15


def test_an_all_zero_matrix_or_row_learns() -> None:
    # by the published rule, an RMS of zero gives a rate of zero for ever
    config = make_config(lr=0.5, rms_floor=2.0**-9, embedding="dense")
    weights = float64(w=[[0, 0], [0, 0]], embedding=[[0, 0], [3, 4]], small=[[2.0**-10, 0]])
    gradients = float64(w=[[1, -2], [0, 3]], embedding=[[1, -1], [1, 1]], small=[[1, 1]])
    model, published = Model(config, weights), Published(config, weights, k=1)
    model.step(gradients)
    published.micro_step(gradients)
    assert not published.theta["w"].any() and not published.theta["embedding"][0].any()
    assert model.theta["w"].tolist() == [[-(2**-10), 2**-10], [0, -(2**-10)]]
    assert model.theta["embedding"][0].tolist() == [-(2**-10), 2**-10]
    assert model.theta["small"].tolist() == [[2**-10 - (1 + 0.01 * 2**-10) * 2**-10, -(2**-10)]]
    assert np.array_equal(model.theta["embedding"][1].numpy(), published.theta["embedding"][1])


def test_shrink_draws_to_the_centre_and_leaves_state_alone() -> None:
    for name in ("tiger", "lion", "adamw", "muon"):
        model = Model(make_config(name), random_tensors(SHAPES, 0))
        gradients = random_tensors(SHAPES, 1)
        model.step(gradients)
        before = {kind: model.whole(kind) for kind in ("theta", "momentum", "exp_avg", "exp_avg_sq")}
        bad = {"gain": (0.7, 0.9), "w": (0.0, 0.9)}
        for tensor in bad:
            gradients[tensor].view(-1)[0] = math.nan
        model.step(gradients, factor=1.0, shrink=bad)
        for tensor, theta in model.theta.items():
            old = before["theta"][tensor]
            if tensor in bad:
                centre, ratio = bad[tensor]
                assert torch.allclose(theta, centre + ratio * (old - centre), rtol=1e-6, atol=1e-7)
                for kind in model.config.state_dtypes(ROLES.get(tensor, "matrix")):
                    assert torch.equal(model.whole(kind)[tensor], before[kind][tensor])
            else:
                assert (theta != old).all() and theta.isfinite().all(), f"{name} {tensor}"
    # again and again, a gain comes to its centre
    model = Model(make_config(), {"gain": torch.tensor([-5.0, 3.0])})
    for _ in range(150):
        model.step({"gain": torch.tensor([math.nan, 1.0])}, shrink={"gain": (1.0, 0.9)})
    assert torch.allclose(model.theta["gain"], torch.ones(2), atol=1e-5)


def test_a_step_that_is_not_applied_ends_its_window() -> None:
    config = make_config(accumulate="momentum", beta1=0.5, embedding="dense")
    model = Model(config, {"w": torch.ones(1, 2)})
    one = {"w": torch.ones(1, 2)}
    model.absorb(one, factor=1.0)
    model.ranks[0].end_window()
    assert torch.equal(model.theta["w"], torch.ones(1, 2)) and model.ranks[0].n_updates == 0
    model.absorb(one, factor=1.0)  # m = 0.5 * 0.5 + 0.5
    model.absorb(one, factor=1.0)
    assert model.momentum["w"].tolist() == [[1.25, 1.25]]
    model.step(one)
    model.step(one)  # and a step without a window takes the gradient itself
    assert model.momentum["w"].tolist() == [[1.125, 1.125]]


# --- Lion ------------------------------------------------------------------------------------------------------------


def test_lion_is_the_published_one_bit_for_bit() -> None:
    config = make_config("lion", embedding="dense", lr=3e-3, weight_decay=0.05)
    assert (config.beta1, config.beta2) == (0.95, 0.98)
    weights = random_tensors(SHAPES, 0, torch.float64)
    model = Model(config, weights)
    theta = {name: w.numpy().copy() for name, w in weights.items()}
    m = {name: np.zeros_like(w) for name, w in theta.items()}
    for step in range(10):
        gradients = random_tensors(SHAPES, 1 + step, torch.float64)
        lr = 3e-3 / (1 + step)
        model.step({name: g * 8 for name, g in gradients.items()}, lr=lr, factor=0.125)
        for name, gradient in gradients.items():
            g, decay = gradient.numpy(), 0.0 if name in ("gain", "bias") else 0.05
            u = np.sign(0.95 * m[name] + (1 - 0.95) * g)
            theta[name] = theta[name] - (u + decay * theta[name]) * lr
            m[name] = 0.98 * m[name] + (1 - 0.98) * g
    assert_same_bits(model.theta, {name: torch.from_numpy(x) for name, x in theta.items()})
    assert_same_bits(model.momentum, {name: torch.from_numpy(x) for name, x in m.items()})


# --- AdamW -----------------------------------------------------------------------------------------------------------


def test_adamw_equals_torch_and_float64() -> None:
    config = make_config("adamw", lr=1e-2, weight_decay=0.1)
    start = random_tensors(SHAPES, 0)
    model = Model(config, start)
    parameters = {name: torch.nn.Parameter(w.clone()) for name, w in start.items()}
    gains = [parameters["gain"], parameters["bias"]]
    others = [parameters[name] for name in ("embedding", "w", "head")]
    groups = [{"params": gains, "weight_decay": 0.0}, {"params": others, "weight_decay": 0.1}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    exact: dict[str, list[Any]] = {name: [w.double().numpy(), 0.0, 0.0] for name, w in start.items()}
    for t in range(1, 6):
        gradients = random_tensors(SHAPES, t)
        model.step(gradients, factor=0.5)
        for name, p in parameters.items():
            p.grad = gradients[name] * 0.5
            theta, m, v = exact[name]
            g = gradients[name].double().numpy() * 0.5
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            theta = theta * (1 - 1e-2 * (0.0 if name in ("gain", "bias") else 0.1))
            theta = theta - 1e-2 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
            exact[name] = [theta, m, v]
        reference.step()
    for name, theta in model.theta.items():
        assert torch.allclose(theta, parameters[name].data, rtol=1e-6, atol=1e-7)
        assert np.allclose(theta.numpy(), exact[name][0], rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("name", ["tiger", "lion"])
def test_embedding_by_adamw_moves_the_embedding_alone(name: str) -> None:
    weights = random_tensors(SHAPES, 0)
    base = {"lr": 1e-2, "weight_decay": 0.02}
    model = Model(make_config(name, embedding="adamw", embedding_lr=3e-3, eps=1e-5, **base), weights)
    plain = Model(make_config(name, embedding="dense", **base), weights)
    p = torch.nn.Parameter(weights["embedding"].clone())
    reference = torch.optim.AdamW([p], betas=(0.9, 0.95), eps=1e-5, weight_decay=0.02, foreach=False)
    for step in range(8):
        gradients, schedule = random_tensors(SHAPES, 1 + step), 1 / (1 + step)
        gradients["embedding"][step % 5] = 0  # AdamW moves this row too
        for each in (model, plain):
            each.step(gradients, lr=1e-2 * schedule, factor=0.25)
        reference.param_groups[0]["lr"] = 3e-3 * schedule
        p.grad = gradients["embedding"] * 0.25
        reference.step()
    ours, theirs = model.theta, plain.theta
    assert torch.allclose(ours.pop("embedding"), p.data, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(theirs.pop("embedding"), p.data, rtol=1e-3)
    assert_same_bits(ours, theirs)
    assert model.whole("exp_avg").keys() == {"embedding"} == SHAPES.keys() - model.momentum.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_of_a_long_tensor_does_not_depend_on_cuts(dtype: torch.dtype) -> None:
    # long enough that torch splits the kernel over threads, and that a gradient of half precision is taken in pieces;
    # neither may bring the kernel's scalar code back
    shape: dict[str, tuple[int, ...]] = {"w": (3, 400_001)}
    cuts = (1, 17, 65_535, 65_537, 140_002, 1_200_000)
    models = [Model(make_config("adamw"), random_tensors(shape, 0), c) for c in ((), cuts)]
    for step in range(2):
        gradients = {"w": random_tensors(shape, 1 + step)["w"].to(dtype)}
        for model in models:
            model.step(gradients, factor=0.3)
    assert_same_bits(models[1].theta, models[0].theta)


def test_a_resumed_optimizer_goes_on() -> None:
    first, second = (Model(make_config("adamw", lr=1e-2), random_tensors(SHAPES, 0)) for _ in range(2))
    for step in range(3):
        first.step(random_tensors(SHAPES, 1 + step))
    (old,), (new,) = first.ranks, second.ranks
    for theirs, ours in zip(
        [*old.masters, *(x for s in old.state for x in s.values())],
        [*new.masters, *(x for s in new.state for x in s.values())],
    ):
        ours.copy_(theirs)
    new.resume(old.n_updates)
    for model in (first, second):
        model.step(random_tensors(SHAPES, 9))
    assert old.n_updates == new.n_updates == 4
    assert_same_bits(second.theta, first.theta)


# --- pieces, wherever ZeRO cuts --------------------------------------------------------------------------------------

CUT_SHAPES: dict[str, tuple[int, ...]] = {"embedding": (4, 5), "gain": (2,), "w": (3, 4), "head": (2, 3)}
N_ELEMENTS = sum(math.prod(shape) for shape in CUT_SHAPES.values())
CUT_CONFIGS = {
    "tiger": make_config(lr=0.1, clip="min"),
    "tiger dense": make_config(lr=0.1, clip="smooth", embedding="dense"),
    "tiger in momentum": make_config(lr=0.1, clip="min", accumulate="momentum"),
    "tiger bf16": make_config(lr=0.1, clip="min", momentum_dtype="bf16"),
    "tiger, embedding by adamw": make_config(lr=0.1, clip="min", embedding="adamw", embedding_lr=0.02),
    "lion": make_config("lion", lr=0.1, clip="min"),
    "adamw": make_config("adamw", lr=0.1, clip="min"),
    "muon": make_config("muon", lr=0.1, clip="min"),
}


def train(config: ResolvedOptim, cuts: tuple[int, ...]) -> list[Tensors]:
    """Take three steps with rows without gradient, and with a shrunk tensor in the second; return what they leave."""
    model = Model(config, random_tensors(CUT_SHAPES, 0), cuts)
    for step in range(3):
        k = 2 if config.accumulate == "momentum" else 1
        shrink = {"w": (0.0, 0.99)} if step == 1 else {}
        for i in range(k):
            gradients = random_tensors(CUT_SHAPES, 1 + 2 * step + i)
            row = gradients["embedding"]
            row[(step + i) % 4] = 0
            row[(step + i + 1) % 4, :-1] = 0  # one element of the row has a gradient
            row[(step + i + 2) % 4, 1:] = 0
            if shrink and i == 0:
                gradients["w"][2, 3] = math.nan
            if k > 1:
                model.absorb(gradients, factor=0.5, bad=tuple(shrink) if i == 0 else ())
        statistics = model.step(gradients, factor=0.5 if shrink else None, shrink=shrink, statistics=step == 2)
    kinds = [model.whole(kind) for kind in ("theta", "momentum", "exp_avg", "exp_avg_sq")]
    return [*kinds, {"statistics": add_tables(statistics)}]


@functools.cache
def train_uncut(name: str) -> list[Tensors]:
    return train(CUT_CONFIGS[name], ())


def compare_with_whole(cuts: tuple[int, ...]) -> None:
    for name, config in CUT_CONFIGS.items():
        *got, statistics = train(config, cuts)
        *expected, whole_statistics = train_uncut(name)
        for kind, expected_kind in zip(got, expected):
            assert_same_bits(kind, expected_kind)
        # sums in float64, in another order
        assert torch.allclose(statistics["statistics"], whole_statistics["statistics"], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "cuts",
    [
        (5,), (7, 9), (6, 7, 8, 9), (0, 0, 13, 13, 13), (N_ELEMENTS, N_ELEMENTS), (19, 20, 21, 22, 23),
        tuple(range(1, N_ELEMENTS)),
    ],
)  # fmt: skip
def test_no_cut_changes_a_bit(cuts: tuple[int, ...]) -> None:
    compare_with_whole(cuts)


@given(st.lists(st.integers(0, N_ELEMENTS), max_size=6))
@settings(deadline=None, max_examples=8)
def test_no_random_cut_changes_a_bit(cuts: list[int]) -> None:
    compare_with_whole(tuple(sorted(cuts)))


@pytest.mark.parametrize("size", [1, 7, 16])
def test_no_size_of_pieces_changes_a_bit(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(rules, "CHUNK", size)
    monkeypatch.setattr(optim, "NARROW", 2)  # so that some widths are above 1
    compare_with_whole((11, 13, 30))


@given(st.lists(st.integers(0, N_ELEMENTS), max_size=6), st.integers(1, 40), st.integers(1, 4))
@settings(deadline=None, max_examples=30)
def test_pieces_hold_each_row_in_whole_units(cuts: list[int], size: int, narrow: int) -> None:
    weights = {name: torch.arange(math.prod(s), dtype=torch.float32) for name, s in CUT_SHAPES.items()}
    weights = {name: w.view(CUT_SHAPES[name]) for name, w in weights.items()}
    with mock.patch.object(rules, "CHUNK", size), mock.patch.object(optim, "NARROW", narrow):
        ranks = Model(make_config(), weights, tuple(sorted(cuts))).ranks
    width = CUT_SHAPES["embedding"][-1]
    for o in ranks:
        rows = [
            (s.name, i // width if s.name == "embedding" else 0) for s in o.segments for i in range(s.start, s.stop)
        ]
        numbers = {row: float(i) for i, row in enumerate(dict.fromkeys(rows))}  # in the order of the optimizer
        expected = torch.tensor([numbers[row] for row in rows])
        assert o._n_rows == len(numbers)
        found = torch.full_like(expected, -1)
        sums = torch.zeros(o._n_rows, dtype=torch.float64)
        of_rows = torch.arange(float(o._n_rows))[:, None]
        pieces = [piece for span in o._spans for piece in span.pieces]
        assert len(pieces) <= 2 * len(rows) / size + 5
        for piece in pieces:
            units = piece.of(found)
            units.copy_(piece.spread(of_rows).expand_as(units))
            assert units.numel() <= size and (piece.width >= narrow or piece.width == 1 or len(units) == 1)
            sums[piece.rows] += optim._add_up(torch.full((len(units),), float(piece.width)).double(), piece.offsets)
        assert torch.equal(found, expected)
        assert sums.tolist() == [rows.count(row) for row in numbers]


# --- one pass over a flat slice --------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts the operations of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        make_config(), make_config(accumulate="momentum"), make_config(embedding="adamw", embedding_lr=1e-3),
        make_config("lion"), make_config("adamw"),
    ],
)  # fmt: skip
def test_an_update_takes_as_many_operations_for_ten_tensors_as_for_a_hundred(
    config: ResolvedOptim, dtype: torch.dtype
) -> None:
    counts = []
    for n in (10, 100):
        weights = {"embedding": torch.ones(10, 32)}
        weights |= {f"{i}": torch.ones(2000 // n, 32) for i in range(n)} | {
            "gain": torch.ones(32),
            "bias": torch.ones(5),
        }
        flat = torch.cat([w.view(-1) for w in weights.values()])
        segments, at = [], 0
        for name, w in weights.items():
            whole = Segment.whole(name, ROLES.get(name, "matrix"), tuple(w.shape))
            segments.append(replace(whole, offset=at))
            at += w.numel()
        optimizer = Optimizer(config, segments, [flat], list(weights), [], [torch.empty_like(flat, dtype=dtype)])
        gradient, one = [torch.ones_like(flat, dtype=dtype)], torch.ones((), dtype=torch.float64)
        with Operations() as operations:
            sums = optimizer.gradient_sums(gradient)
            if config.accumulate == "momentum":
                optimizer.absorb(gradient, sums, one, torch.ones(len(weights), dtype=torch.bool))
            optimizer.step(gradient, optimizer.weight_sums(), sums, lr=1e-3, factor=one)
        counts.append(len(operations.names))
    assert counts[0] == counts[1] < 500, counts


WIDE_SHAPES: dict[str, tuple[int, ...]] = {
    "embedding": (40, 96), "gain": (96,), "w": (64, 96), "bias": (1,), "v": (96, 160), "head": (40, 96)
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cuts", [(), (96 * 7, 96 * 60), (5, 1000, 96 * 50 + 1, 30_000, 30_001)])
def test_one_pass_is_the_rules_on_each_tensor(cuts: tuple[int, ...], dtype: torch.dtype) -> None:
    config = make_config(lr=0.03, weight_decay=0.1)
    theta = random_tensors(WIDE_SHAPES, 0)
    model = Model(config, theta, cuts, dtype)
    momentum = {name: torch.zeros_like(w) for name, w in theta.items()}
    beta, scale = torch.tensor(config.beta1), torch.tensor((1 - config.beta1) * 0.5)
    for step in range(3):
        gradients = {name: g.to(dtype) for name, g in random_tensors(WIDE_SHAPES, 1 + step).items()}
        gradients["embedding"][step::5] = 0
        model.step(gradients, factor=0.5)
        for name, w in theta.items():
            g, is_gain = gradients[name], name in ("gain", "bias")
            squares = w.double().square()
            rms = (squares.mean(-1, keepdim=True) if name == "embedding" else squares.mean()).sqrt()
            lr = torch.full_like(rms, 0.5 * config.lr) if is_gain else config.lr * rms.clamp(min=config.rms_floor)
            if name == "embedding":
                lr = lr * g.any(-1, keepdim=True)
            decay = torch.tensor(0.0 if is_gain else config.weight_decay)
            theta[name], momentum[name] = tiger_update(w, momentum[name], g, lr.float(), decay, beta, scale)
        assert_same_bits(model.theta, theta)
        assert_same_bits(model.momentum, momentum)
        for o in model.ranks:  # the weights are written in the same pass
            assert all(torch.equal(w, flat.to(dtype)) for w, flat in zip(o._weights, o._flats) if w is not None)
    first, second = ([s.total for s in model.gradient_sums(gradients)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_padding_between_tensors_counts_for_nothing() -> None:
    segments = [
        Segment(name=name, role=role, shape=shape, start=0, stop=math.prod(shape), flat=0, offset=offset)
        for name, role, shape, offset in (("embedding", "embedding", (2, 3), 1), ("w", "matrix", (2, 2), 9))
    ]
    flat, gradient = torch.full((14,), 2.0), torch.full((14,), math.nan)
    for s in segments:
        s.of(gradient).fill_(1)
    for config in (make_config(), make_config(accumulate="momentum"), make_config("lion"), make_config("adamw")):
        optimizer = Optimizer(config, segments, [flat], ["w", "embedding"], [])
        sums, one = optimizer.gradient_sums([gradient]), torch.ones((), dtype=torch.float64)
        assert sums.total.tolist() == [4, 6]
        if config.accumulate == "momentum":
            optimizer.absorb([gradient], sums, one, torch.tensor([True, True]))
        optimizer.step([gradient.clone()], optimizer.weight_sums(), sums, lr=0.1, factor=one)
        assert all(master.isfinite().all() and (master < 2).all() for master in optimizer.masters)
        assert all(x.isfinite().all() for state in optimizer.state for x in state.values())
        flat.fill_(2.0)


# --- rows of the embedding (9736) ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiger", "lion"])
def test_a_row_without_gradient_rests_while_its_momentum_decays(name: str) -> None:
    shapes: dict[str, tuple[int, ...]] = {"embedding": (5, 4), "w": (5, 4), "gain": (4,)}
    weights = random_tensors(shapes, 0)
    lazy = Model(make_config(name, weight_decay=0.1), weights)
    dense = Model(make_config(name, weight_decay=0.1, embedding="dense"), weights)
    assert lazy.config.embedding == "lazy"
    first, second = random_tensors(shapes, 1), random_tensors(shapes, 2)
    for model in (lazy, dense):
        model.step(first)
    assert_same_bits(lazy.theta, dense.theta)
    before, momentum = lazy.theta, lazy.momentum
    rests = torch.tensor([True, False, True, False, False])
    second["embedding"][rests] = 0
    second["embedding"][1] = torch.tensor([1e-30, 0, 0, 0])  # enough for the row to move
    for tensor in ("w", "gain"):
        second[tensor] = torch.zeros_like(second[tensor])  # only the embedding is lazy
    for model in (lazy, dense):
        model.step(second)
    moved = lazy.theta["embedding"] != before["embedding"]
    assert torch.equal(moved, ~rests[:, None].expand(5, 4))
    assert (dense.theta["embedding"] != before["embedding"]).all()
    assert torch.equal(lazy.theta["embedding"][~rests], dense.theta["embedding"][~rests])
    for tensor in ("w", "gain"):
        assert torch.equal(lazy.theta[tensor], dense.theta[tensor]) and (lazy.theta[tensor] != before[tensor]).all()
    assert_same_bits(lazy.momentum, dense.momentum)
    beta = lazy.config.beta1 if name == "tiger" else lazy.config.beta2
    assert torch.equal(lazy.momentum["embedding"][rests], momentum["embedding"][rests] * torch.tensor(beta))


@pytest.mark.parametrize("element", range(6))
@pytest.mark.parametrize("name", ["tiger", "lion"])
def test_a_row_that_is_cut_moves_on_all_ranks(name: str, element: int) -> None:
    weights = {"embedding": random_tensors({"e": (3, 6)}, 0)["e"]}
    model = Model(make_config(name), weights, (8, 10))  # row 1 in three pieces
    assert [cut_rows(o.segments) for o in model.ranks] == [[("embedding", 1)]] * 3
    gradients = {"embedding": torch.zeros(3, 6)}
    gradients["embedding"][1, element] = 1e-30  # its square is zero in float32
    model.step({"embedding": torch.ones(3, 6)})
    before = model.theta["embedding"]
    model.step(gradients)
    assert (model.theta["embedding"] != before).all(-1).tolist() == [False, True, False]
    assert torch.equal(model.theta["embedding"][[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("cuts", [(), (5,), (4, 6)])
def test_a_row_moves_with_a_gradient_in_any_micro_batch(cuts: tuple[int, ...]) -> None:
    weights = {"embedding": random_tensors({"e": (4, 3)}, 0)["e"]}
    model = Model(make_config(accumulate="momentum"), weights, cuts)

    def of_rows(*rows: int) -> Tensors:
        gradient = torch.zeros(4, 3)
        gradient[list(rows), 2] = 1
        return {"embedding": gradient}

    def step(batches: list[Tensors], bad: tuple[int, ...] = ()) -> list[bool]:
        before = model.theta["embedding"]
        for i, batch in enumerate(batches):
            model.absorb(batch, factor=0.5, bad=("embedding",) if i in bad else ())
        model.step(batches[-1])
        return (model.theta["embedding"] != before).any(-1).tolist()

    model.absorb({"embedding": torch.ones(4, 3)}, factor=1.0)  # so that every row has a momentum to move by
    model.step({"embedding": torch.ones(4, 3)})
    assert step([of_rows(0), of_rows(1)]) == [True, True, False, False]
    assert step([of_rows(3), of_rows()]) == [False, False, False, True]
    assert step([of_rows(), of_rows()]) == [False] * 4
    assert step([of_rows(0, 1), of_rows(2)], bad=(0,)) == [False, False, True, False]


@pytest.mark.parametrize(("name", "lr", "decay"), [("tiger", 0.1, 0.01), ("lion", 0.5, 0.1)])
def test_the_drift_of_rare_rows(name: str, lr: float, decay: float) -> None:
    # 9736: a momentum that decays keeps its sign, which moves a dense row to +-1 / weight_decay
    weights = {"embedding": 0.3 * random_tensors({"e": (4, 5)}, 0)["e"]}
    rare = torch.zeros(4, 5)
    rare[2] = torch.tensor([1.0, -1.0, 1e-3, -1e-3, 2.0])
    for embedding in ("dense", "lazy"):
        model = Model(make_config(name, lr=lr, weight_decay=decay, embedding=embedding), weights)
        optimizer = model.ranks[0]
        model.step({"embedding": rare})
        assert optimizer.n_drifting_rows() == 0
        after_one = model.theta["embedding"]
        for _ in range(300):
            model.step({"embedding": torch.zeros(4, 5)})
        row = model.theta["embedding"][2]
        if embedding == "dense":
            assert torch.allclose(row, -torch.sign(rare[2]) / decay, rtol=0.02)
            assert optimizer.n_drifting_rows() == 1
        else:
            assert torch.equal(model.theta["embedding"], after_one)
            assert optimizer.n_drifting_rows() == 0


def test_drifting_rows_are_beyond_a_tenth_of_where_they_go() -> None:
    e = torch.ones(5, 4) * torch.tensor([0.0, 4.999, 5.001, -5.001, 5.001])[:, None]
    e[4, 0] = 0  # the RMS counts, not the largest element
    weights = {"embedding": e, "w": torch.full((3, 3), 1e3), "gain": torch.full((3,), 1e3)}
    tiger = Model(make_config(weight_decay=0.02), weights)
    assert tiger.ranks[0].n_drifting_rows() == 2
    assert [o.n_drifting_rows() for o in Model(make_config(weight_decay=0.02), weights, (10, 16)).ranks] == [0, 1, 0]
    for config in (make_config(weight_decay=0.0), make_config("adamw", weight_decay=0.02)):
        assert Model(config, weights).ranks[0].n_drifting_rows() == 0


# --- sums, dtypes, statistics ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", ["gradient", "momentum"])
@pytest.mark.parametrize("cuts", [(), (3, 4, 20, 100)])
def test_the_update_leaves_the_sums_of_the_weights_behind(cuts: tuple[int, ...], accumulate: Any) -> None:
    model = Model(make_config(accumulate=accumulate), random_tensors(SHAPES, 0), cuts)
    gradients = random_tensors(SHAPES, 1)
    for step in range(3):
        if accumulate == "momentum":
            model.absorb(gradients, factor=1.0)
        model.step(gradients, factor=1.0, shrink={"w": (0.0, 0.5), "embedding": (0.0, 0.5)} if step == 1 else {})
        left = model.weight_sums()[0].total.clone()
        theta = model.theta
        needed = [i for i, name in enumerate(SHAPES) if name not in ("gain", "bias")]
        expected = [float(theta[name].double().square().sum()) for name in SHAPES]
        assert left[needed].tolist() == pytest.approx([expected[i] for i in needed], rel=1e-14)
        needed += range(len(SHAPES), len(left))  # the rows that are cut
        for o in model.ranks:
            o.masters_changed()
        assert torch.allclose(model.weight_sums()[0].total[needed], left[needed], rtol=1e-14, atol=0)
    for o in model.ranks:
        for master in o.masters:
            master.mul_(2)
        o.masters_changed()
    assert torch.allclose(model.weight_sums()[0].total[needed], 4 * left[needed], rtol=1e-14, atol=0)


def test_sums_are_of_squares_that_float32_cannot_hold() -> None:
    gradients = {"embedding": torch.full((9, 6), 1e-30), "w": torch.full((7, 11), 1e30)}
    model = Model(make_config(), {name: torch.ones_like(g) for name, g in gradients.items()}, (20, 60))
    total = model.gradient_sums(gradients)[0].total.tolist()
    assert total == pytest.approx([54e-60, 77e60, 6e-60, 6e-60][: len(total)], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["tiger", "lion", "adamw", "muon"])
def test_gradients_of_half_precision_count_as_their_float32(name: str, dtype: torch.dtype) -> None:
    models = [Model(make_config(name), random_tensors(SHAPES, 0)) for _ in range(2)]
    for step in range(3):
        gradients = {n: g.to(dtype) for n, g in random_tensors(SHAPES, 1 + step).items()}
        for model, given_ in zip(models, (gradients, {n: g.float() for n, g in gradients.items()})):
            model.step(given_, factor=0.3)
    assert_same_bits(models[0].theta, models[1].theta)


def test_a_momentum_of_bf16_turns_few_signs() -> None:
    shapes: dict[str, tuple[int, ...]] = {"embedding": (200, 40), "w": (300, 400), "gain": (400,)}
    assert make_config(momentum_dtype="bf16").state_dtypes("matrix") == {"momentum": "bf16"}
    models = [Model(make_config(momentum_dtype=dtype), random_tensors(shapes, 0)) for dtype in ("fp32", "bf16")]
    for step in range(50):
        for model in models:
            model.step(random_tensors(shapes, 1 + step), factor=1.0)
    exact, half = (model.momentum for model in models)
    for name in shapes:
        assert half[name].dtype == torch.bfloat16 and models[1].theta[name].dtype == torch.float32
    n = sum(x.numel() for x in exact.values())
    agree = sum(int((torch.sign(exact[name]) == torch.sign(half[name])).sum()) for name in shapes) / n
    # 0.9989 measured; gradients without any mean, as here, leave the most momenta near zero
    assert 0.9985 < agree < 1


def test_states_by_rule() -> None:
    fp32, bf16 = "fp32", "bf16"
    adamw = {"exp_avg": fp32, "exp_avg_sq": fp32}
    for config, of_embedding, of_matrix in (
        (make_config(), {"momentum": fp32}, {"momentum": fp32}),
        (make_config(momentum_dtype="bf16"), {"momentum": bf16}, {"momentum": bf16}),
        (make_config(embedding="adamw", momentum_dtype="bf16"), adamw, {"momentum": bf16}),
        (make_config("lion"), {"momentum": fp32}, {"momentum": fp32}),
        (make_config("adamw"), adamw, adamw), (make_config("muon"), adamw, {"momentum": fp32}),
    ):  # fmt: skip
        of_others = adamw if config.name == "muon" else of_matrix
        assert config.state_dtypes("embedding") == of_embedding and config.state_dtypes("matrix") == of_matrix
        assert config.state_dtypes("head") == config.state_dtypes("gain") == of_others
        for o in Model(config, random_tensors(SHAPES, 0), (10, 60)).ranks:
            for s, master, state in zip(o.segments, o.masters, o.state):
                dtypes = {kind: DTYPES[name] for kind, name in config.state_dtypes(s.role).items()}
                assert {k: v.dtype for k, v in state.items()} == dtypes
                assert all(v.shape == master.shape and not v.any() for v in state.values())


@pytest.mark.parametrize("name", ["tiger", "lion", "adamw", "muon"])
@pytest.mark.parametrize("cuts", [(), (3, 50, 99)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics(name: str, cuts: tuple[int, ...], dtype: torch.dtype) -> None:
    model = Model(make_config(name, lr=0.03), random_tensors(SHAPES, 0), cuts)
    assert model.step(random_tensors(SHAPES, 1)) == [None] * len(model.ranks)
    gradients = random_tensors(SHAPES, 2)
    gradients["embedding"][2:5] = 0
    gradients["w"][1, 1] = 0
    before = model.theta
    table = add_tables(model.step({n: g.to(dtype) for n, g in gradients.items()}, factor=0.25, statistics=True))
    after = model.theta
    assert table.shape == (len(SHAPES), N_STATISTICS)
    for row, tensor in zip(table, SHAPES):
        old, new = before[tensor].double().numpy(), after[tensor].double().numpy()
        g, change = gradients[tensor].to(dtype).double().numpy() * 0.25, new - old
        has = g != 0
        expected = [
            (old**2).sum(), (change**2).sum(), (g**2).sum(), -(change * g).sum(), has.sum(),
            (has & (change * g < 0)).sum(), old.size,
        ]  # fmt: skip
        assert row.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-18), tensor
        assert 0 < row[5] < row[4] or tensor not in ("embedding", "w")  # some went along, some against
    assert model.step(random_tensors(SHAPES, 3)) == [None] * len(model.ranks)


def test_statistics_of_a_tensor_longer_than_a_piece() -> None:
    n = 2**22 + 3
    before, after, gradient = torch.ones(n), torch.full((n,), 0.5), torch.full((n,), 2.0)
    after[-1], gradient[-2] = 2.0, 0.0
    row = _statistics(before, after, gradient, torch.tensor(0.5, dtype=torch.float64))
    assert row.tolist() == [n, 0.25 * (n - 1) + 1, n - 1, 0.5 * (n - 2) - 1, n - 1, n - 2, n]
