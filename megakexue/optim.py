"""Tiger, Lion and AdamW over segments; the learning-rate schedule and clipping.

Under ZeRO an optimizer does not see parameters but flat fp32 slices that cut through them. A `Segment` says which
elements of which parameter a slice holds, and all rules here are written over segments. What a rule needs of a whole
tensor (its RMS, its share of the gradient norm, whether its gradient is finite) is a sum of squares: `Sums` adds up all
tensors of a rank in one small float64 vector, which the engine adds up over ranks in one all-reduce.

Tiger (9512), with m = 0 at the start, alpha the scheduled rate and lambda the weight decay:
    m     <- beta m + (1 - beta) g
    theta <- theta - eta (sign(m) + lambda theta)
    eta    = alpha max(RMS(theta), floor)   a matrix
             alpha max(RMS(row), floor)     each row of the embedding
             alpha / 2, without decay       a gain
Its sums of squares are those of the update before: the update leaves them behind while the elements are at hand.

With `accumulate: momentum` a window of k micro-batches is (8634)
    m <- (beta at the first of the window, else 1) m + (1 - beta) g_i,    g_i the micro-batch's share of the mean
which is the same momentum without a buffer for the mean.

What must stay true: the schedule is a function of our own step counter alone; each operation rounds once and by itself
(no fused multiply-add on CPU), so that where ZeRO cuts a tensor changes no bit; squares are added in float64 and
rounded to float32 when they become a rate, so that the order of the sum does not show but once in 1e8.
"""

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megakexue.config import OptimConfig


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Elements start:stop of a flattened parameter, at offset:offset+(stop-start) of flat tensor number `flat`."""

    name: str
    role: str
    shape: tuple[int, ...]
    start: int
    stop: int
    flat: int
    offset: int

    @property
    def numel(self) -> int:
        return self.stop - self.start

    def split(self, n: int) -> "list[Segment]":
        """Return its parts of `n` elements, the last one of what is left."""
        starts = range(self.start, self.stop, n)
        return [replace(self, start=i, stop=min(i + n, self.stop), offset=self.offset + i - self.start) for i in starts]

    def of(self, flat: Tensor) -> Tensor:
        """The view of this segment in its flat tensor."""
        return flat.detach().view(-1)[self.offset : self.offset + self.numel]


# --- schedule and clipping -------------------------------------------------------------------------------------------


def lr_factor(config: OptimConfig, step: int, n_steps: int) -> float:
    """Return the schedule's factor for the update that makes step number `step` (from 1) of `n_steps`.

    Warmup rises linearly and reaches 1 at update `warmup_steps`. `piecewise` is the schedule of 9512: linear through
    the sorted points, from (0, 0) when no point 0 is given, constant after the last.
    """
    if config.schedule == "piecewise":
        points = sorted(({0: 0.0} | config.points).items())
        for (low, low_factor), (high, high_factor) in pairwise(points):
            if step < high:
                return low_factor + (high_factor - low_factor) * (step - low) / (high - low)
        return points[-1][1]
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, n_steps - config.warmup_steps)
        return config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * progress)) / 2
    assert config.decay_steps is not None
    progress = max(0, step - (n_steps - config.decay_steps)) / config.decay_steps
    return 1 - (1 - config.final_lr) * progress


def clip_factor(config: OptimConfig, grad_norm: Tensor) -> Tensor:
    """Return what clipping multiplies a gradient of this norm with: form 1 (min) or form 2 (smooth) of 7469."""
    if config.clip is None:
        return torch.ones_like(grad_norm)
    if config.clip == "min":
        return (config.clip_norm / grad_norm).clamp(max=1.0)
    return config.clip_norm / (grad_norm + config.clip_norm)


# --- the rules, as pure functions of equally shaped tensors ----------------------------------------------------------


def absorb(momentum: Tensor, gradient: Tensor, beta: Tensor, scale: Tensor) -> Tensor:
    """Return beta m + scale g in the dtype of the scalars, fp32 in training."""
    return beta * momentum.to(beta.dtype) + scale * gradient.to(beta.dtype)


def sign_step(theta: Tensor, direction: Tensor, lr: Tensor, decay: Tensor) -> Tensor:
    """Return theta - lr (sign(direction) + decay theta)."""
    return theta - (torch.sign(direction) + decay * theta) * lr


def tiger_update(
    theta: Tensor, momentum: Tensor, gradient: Tensor, lr: Tensor, decay: Tensor, beta: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return theta and m after one update of Tiger (9512); scale is (1 - beta) times what multiplies the gradient."""
    momentum = absorb(momentum, gradient, beta, scale)
    return sign_step(theta, momentum, lr, decay), momentum


def lion_update(
    theta: Tensor, momentum: Tensor, gradient: Tensor, lr: Tensor, decay: Tensor, beta1: Tensor, scale1: Tensor,
    beta2: Tensor, scale2: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return theta and m after one update of Lion (9473, arXiv 2302.06675): the step first, then the momentum."""
    theta = sign_step(theta, absorb(momentum, gradient, beta1, scale1), lr, decay)
    return theta, absorb(momentum, gradient, beta2, scale2)


def squares(x: Tensor) -> Tensor:
    """Return the sum of squares of each row, float64."""
    return x.double().square().sum(-1)


# In place over [rows, elements]: one pass over memory when compiled. Those of Tiger return squares(theta).


def _tiger(theta: Tensor, momentum: Tensor, gradient: Tensor, *scalars: Tensor) -> Tensor:
    new, m = tiger_update(theta, momentum, gradient, *scalars)
    momentum.copy_(m)
    theta.copy_(new)
    return squares(new)


def _tiger_absorb(momentum: Tensor, gradient: Tensor, ok: Tensor, beta: Tensor, scale: Tensor) -> None:
    # a selection, since zero times NaN is NaN
    momentum.copy_(torch.where(ok, absorb(momentum, gradient, beta, scale), momentum.to(beta.dtype)))


def _tiger_apply(theta: Tensor, momentum: Tensor, lr: Tensor, decay: Tensor) -> Tensor:
    new = sign_step(theta, momentum.to(theta.dtype), lr, decay)
    theta.copy_(new)
    return squares(new)


def _lion(theta: Tensor, momentum: Tensor, gradient: Tensor, *scalars: Tensor) -> None:
    new, m = lion_update(theta, momentum, gradient, *scalars)
    momentum.copy_(m)
    theta.copy_(new)


CHUNK = 2**16
"""Elements that a CPU core takes through all operations of a rule while they are in its cache."""
COMPILE_FROM = 2**24
"""Elements of a rank from which on a CPU the compiler's start-up (seconds, half a minute the first time) pays."""


def _in_chunks(function: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """Run `function` over pieces that fit the cache; arguments with as many columns, or rows, are cut along."""

    def run(*arguments: Tensor) -> Tensor | None:
        rows, width = arguments[0].shape
        if rows * width <= CHUNK:
            return function(*arguments)
        axis, size = (1, CHUNK) if rows == 1 else (0, max(1, CHUNK // width))
        n = arguments[0].shape[axis]
        results = []
        for at in range(0, n, size):
            cut = [
                x.narrow(axis, at, min(size, n - at)) if x.dim() == 2 and x.shape[axis] == n else x for x in arguments
            ]
            results.append(function(*cut))
        if results[0] is None:
            return None
        return torch.cat(results) if axis == 0 else torch.stack(results).sum(0)  # type: ignore[arg-type]

    return run


def kernels(device: torch.device, n_elements: int) -> tuple[dict[str, Callable[..., Any]], str]:
    """Return the rules as one-pass kernels for this device, and a sentence that says which and why."""
    rules = {f.__name__: f for f in (_tiger, _tiger_absorb, _tiger_apply, _lion, squares)}
    if device.type == "cuda":
        reason = "compiled: one pass over the state"
    elif n_elements >= COMPILE_FROM and shutil.which(os.environ.get("CXX", "g++")):
        reason = f"compiled: one pass over the state, for {n_elements:,} elements a rank"
    else:
        fewer = f"fewer than {COMPILE_FROM:,} elements a rank" if n_elements < COMPILE_FROM else "no C++ compiler found"
        return {name: _in_chunks(f) for name, f in rules.items()}, f"in chunks of {CHUNK:,}: {fewer}"

    def by_size(rule: Callable[..., Any]) -> Callable[..., Any]:
        compiled = torch.compile(rule, dynamic=True)
        # a kernel is laid out for the first size that it meets, so gains and pieces of rows must not be among them
        return lambda *arguments: (compiled if arguments[0].numel() >= CHUNK else rule)(*arguments)

    return {name: by_size(f) for name, f in rules.items()}, reason


# --- the optimizer over segments -------------------------------------------------------------------------------------


def state_dtypes(config: OptimConfig, role: str) -> dict[str, torch.dtype]:
    """The state tensors that a parameter of this role has beside its master."""
    if _rule(config, role) == "adamw":
        return {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}
    return {"momentum": {"fp32": torch.float32, "bf16": torch.bfloat16}[config.momentum_dtype]}


def _rule(config: OptimConfig, role: str) -> str:
    return "adamw" if role == "embedding" and config.embedding == "adamw" else config.name


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows of a segment that are treated alike: whole rows of an embedding, a piece of one, or a tensor's elements."""

    segment: int
    start: int
    stop: int
    n_rows: int
    row: int | None = None
    """The row of which this is a piece; the rest is in another segment."""

    def of(self, x: Tensor) -> Tensor:
        """The view [n_rows, elements] of this part in its segment's tensor."""
        return x[self.start : self.stop].view(self.n_rows, -1)


def parts(segments: list[Segment]) -> list[Part]:
    """Cut the segments of embeddings at the ends of rows."""
    found = []
    for i, s in enumerate(segments):
        if s.role != "embedding":
            found.append(Part(segment=i, start=0, stop=s.numel, n_rows=1))
            continue
        width = s.shape[-1]
        first, last = -(-s.start // width) * width, s.stop // width * width  # the whole rows
        first, last = min(first, s.stop), max(last, min(first, s.stop))
        for start, stop in ((s.start, first), (first, last), (last, s.stop)):
            if start < stop:
                whole = start == first and stop == last
                found.append(
                    Part(
                        segment=i, start=start - s.start, stop=stop - s.start,
                        n_rows=(stop - start) // width if whole else 1, row=None if whole else start // width,
                    )
                )  # fmt: skip
    return found


def cut_rows(segments: list[Segment]) -> list[tuple[str, int]]:
    """The embedding rows of which these segments hold a piece only."""
    return [(segments[part.segment].name, part.row) for part in parts(segments) if part.row is not None]


@dataclass(kw_only=True)
class Sums:
    """Sums of squares of one kind of tensor: of this rank's parts, and of whole tensors once ranks are added up."""

    rows: list[Tensor]
    """For each part, of each of its rows on this rank, float64."""
    total: Tensor
    """Of each parameter in the order of `names`, then of each of the `cut_rows`, float64."""


@dataclass(kw_only=True)
class Window:
    """What momentum accumulation knows of the micro-batches of a step, by parameter, on the device."""

    has_decayed: Tensor
    touched: list[Tensor] = field(default_factory=list)


class Optimizer:
    """Moves the masters of a rank's segments. The engine says when, and adds sums up over ranks.

    Args:
        segments: of this rank.
        masters: the view of each segment, float32.
        names: every parameter of the model, the same on all ranks.
        cut_rows: (parameter, row) of every embedding row that is cut between segments anywhere, the same on all ranks.
        device: of the masters; None: the CPU.
    """

    def __init__(
        self,
        config: OptimConfig,
        segments: list[Segment],
        masters: list[Tensor],
        names: list[str],
        cut_rows: list[tuple[str, int]],
        device: torch.device | None = None,
    ) -> None:
        assert config.lr is not None and config.weight_decay is not None, "resolve the config first"
        self.config, self.segments, self.masters, self.names = config, segments, masters, names
        self.n_updates = 0
        """Updates applied, which AdamW's bias correction counts; fewer than steps after skips."""
        self.state = [
            {kind: torch.zeros_like(m, dtype=torch.promote_types(dtype, m.dtype) if dtype == torch.float32 else dtype)
             for kind, dtype in state_dtypes(config, s.role).items()}
            for s, m in zip(segments, masters)
        ]  # fmt: skip
        self._parts = parts(segments)
        slots = {name: i for i, name in enumerate(names)} | {key: len(names) + i for i, key in enumerate(cut_rows)}
        self._device = device or torch.device("cpu")
        self._dtype = masters[0].dtype if masters else torch.float32
        self._n_slots = len(slots)
        self._name_slots = [slots[segments[p.segment].name] for p in self._parts]
        self._row_slots = [None if p.row is None else slots[segments[p.segment].name, p.row] for p in self._parts]
        cut = [(i, slot) for i, slot in enumerate(self._row_slots) if slot is not None]
        index = [self._name_slots, [slot for _, slot in cut], [i for i, _ in cut]]
        self._name_index, self._row_index, self._cut_index = (
            torch.tensor(x, dtype=torch.long, device=self._device) for x in index
        )
        self._kernels, self.kernel_reason = kernels(self._device, sum(m.numel() for m in masters))
        self._zero = torch.zeros(1, dtype=torch.float64, device=self._device)
        roles = [segments[part.segment].role for part in self._parts]
        self._needs_rms = [role != "gain" and _rule(config, role) == "tiger" for role in roles]
        self._weight_rows: list[Tensor] | None = None
        self._window: Window | None = None
        self.last_statistics: Tensor | None = None

    def masters_changed(self) -> None:
        """Say that masters were written by someone else."""
        self._weight_rows = None

    # --- sums --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def weight_sums(self) -> Sums:
        """Of the masters as they are now, where Tiger needs them."""
        if self._weight_rows is None:
            self._weight_rows = self._row_sums(self.masters, self._needs_rms)
        return self._add_up(self._weight_rows)

    @torch.no_grad()
    def gradient_sums(self, gradients: list[Tensor]) -> Sums:
        """Of the gradients of the segments."""
        return self._add_up(self._row_sums(gradients, [True] * len(self._parts)))

    def _row_sums(self, tensors: list[Tensor], wanted: list[bool]) -> list[Tensor]:
        return [
            self._kernels["squares"](part.of(tensors[part.segment])) if is_wanted else self._zero
            for part, is_wanted in zip(self._parts, wanted)
        ]

    def _add_up(self, rows: list[Tensor]) -> Sums:
        total = torch.zeros(self._n_slots, dtype=torch.float64, device=self._device)
        if rows:
            of_parts = torch.stack([row.sum() for row in rows])
            total.index_add_(0, self._name_index, of_parts)
            total.index_add_(0, self._row_index, of_parts[self._cut_index])
        return Sums(rows=rows, total=total)

    # --- accumulation in the momentum --------------------------------------------------------------------------------

    @torch.no_grad()
    def absorb(self, gradients: list[Tensor], sums: Sums, factor: Tensor, ok: Tensor) -> None:
        """Take a micro-batch into the momentum, tensor by tensor where `ok`.

        Args:
            sums: of these gradients, `total` over all ranks.
            factor: what multiplies the gradients, float64.
            ok: for each parameter, on every rank alike, whether to take it.
        """
        assert self.config.beta1 is not None
        if self._window is None:
            self._window = Window(has_decayed=torch.zeros_like(ok))
        window = self._window
        # the decay belongs to the window: its first good micro-batch does it, whichever that is
        betas = torch.where(window.has_decayed, self._scalar(1.0), self._scalar(self.config.beta1))
        scale = ((1 - self.config.beta1) * factor).to(self._dtype)
        for i, part in enumerate(self._parts):
            slot = self._name_slots[i]
            momentum = part.of(self.state[part.segment]["momentum"])
            self._kernels["_tiger_absorb"](momentum, part.of(gradients[part.segment]), ok[slot], betas[slot], scale)
        window.has_decayed |= ok
        touched = [ok[slot] & moved for slot, moved in zip(self._name_slots, self._touched(sums))]
        window.touched = [a | b for a, b in zip(window.touched, touched)] if window.touched else touched

    def _touched(self, sums: Sums) -> list[Tensor]:
        """For each part, of each row, whether it has a gradient, wherever the rest of the row is."""
        return [
            rows > 0 if slot is None else (sums.total[slot] > 0).view(1)
            for rows, slot in zip(sums.rows, self._row_slots)
        ]

    # --- the update --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(
        self,
        gradients: list[Tensor],
        weights: Sums,
        sums: Sums,
        *,
        lr: float,
        factor: Tensor,
        shrink: dict[str, tuple[float, float]] | None = None,
        statistics: bool = False,
    ) -> None:
        """Move the masters.

        Args:
            gradients: of the segments, in any dtype; AdamW overwrites fp32 ones.
            weights: of the masters, `total` over all ranks.
            sums: of the gradients, `total` over all ranks.
            factor: what multiplies the gradients, float64: loss scale and clipping in one.
            shrink: for each parameter whose gradient is not finite, (centre, ratio): w becomes (w - c) ratio + c, and
                its state stays (9512).
            statistics: leave the sums that `N_STATISTICS` lists in `last_statistics`.
        """
        shrink = shrink or {}
        self.n_updates += 1
        window, self._window = self._window, None
        touched = window.touched if window else self._touched(sums)
        rates = self._rates(weights, touched, lr)
        zero, weight_decay = self._scalar(0.0), self._scalar(self.config.weight_decay)
        rows: list[Tensor] = []
        self.last_statistics = None
        if statistics:
            self.last_statistics = torch.zeros(len(self.names), N_STATISTICS, dtype=torch.float64, device=self._device)
        for i, part in enumerate(self._parts):
            segment = self.segments[part.segment]
            theta, gradient = part.of(self.masters[part.segment]), part.of(gradients[part.segment])
            state = {kind: part.of(x) for kind, x in self.state[part.segment].items()}
            before = (theta.clone(), gradient.clone()) if statistics else None
            if segment.name in shrink:
                centre, ratio = shrink[segment.name]
                theta.sub_(centre).mul_(ratio).add_(centre)
                rows.append(self._kernels["squares"](theta) if self._needs_rms[i] else self._zero)
            else:
                rows.append(
                    self._update(segment, theta, gradient, state, rates[i],
                                 zero if segment.role == "gain" else weight_decay, lr, factor,
                                 is_absorbed=window is not None)
                )  # fmt: skip
            if before is not None:
                assert self.last_statistics is not None
                self.last_statistics[self._name_slots[i]] += _statistics(before[0], theta, before[1], factor)
        self._weight_rows = rows

    def end_window(self) -> None:
        """Forget the micro-batches of a step that is not applied."""
        self._window = None

    def _update(
        self, segment: Segment, theta: Tensor, gradient: Tensor, state: dict[str, Tensor], rate: Tensor, decay: Tensor,
        lr: float, factor: Tensor, *, is_absorbed: bool,
    ) -> Tensor:  # fmt: skip
        config, rule = self.config, _rule(self.config, segment.role)
        assert config.lr is not None and config.beta1 is not None
        if rule == "adamw":
            betas = (config.beta1, config.beta2 or 0.0)
            if config.name != "adamw":
                assert config.embedding_lr is not None
                lr, betas = lr * config.embedding_lr / config.lr, (0.9, 0.95)
            weight_decay = 0.0 if segment.role == "gain" else config.weight_decay
            flats = (theta, gradient, state["exp_avg"], state["exp_avg_sq"])
            size = theta.numel() if gradient.dtype == theta.dtype else PIECE[theta.device.type]
            for w, g, m, v in zip(*(x.reshape(-1).split(size) for x in flats)):
                _adamw(w, g, m, v, self.n_updates, lr, betas, config.eps, weight_decay, factor)
            return self._zero
        momentum, scale = state["momentum"], ((1 - config.beta1) * factor).to(self._dtype)
        beta1 = self._scalar(config.beta1)
        if rule == "lion":
            assert config.beta2 is not None
            scale2 = ((1 - config.beta2) * factor).to(self._dtype)
            scalars = (rate, decay, beta1, scale, self._scalar(config.beta2), scale2)
            self._kernels["_lion"](theta, momentum, gradient, *scalars)
            return self._zero
        if is_absorbed:
            return self._kernels["_tiger_apply"](theta, momentum, rate, decay)
        return self._kernels["_tiger"](theta, momentum, gradient, rate, decay, beta1, scale)

    def _rates(self, weights: Sums, touched: list[Tensor], lr: float) -> list[Tensor]:
        """The learning rate of each part, [n_rows, 1]."""
        rates = []
        for part, rows, name, row, moved in zip(self._parts, weights.rows, self._name_slots, self._row_slots, touched):
            segment = self.segments[part.segment]
            if self.config.name != "tiger":
                rate = torch.full((part.n_rows, 1), lr, dtype=torch.float64, device=self._device)
            elif segment.role == "gain":
                rate = torch.full((1, 1), 0.5 * lr, dtype=torch.float64, device=self._device)
            else:
                if segment.role != "embedding":
                    means = weights.total[name].view(1, 1) / math.prod(segment.shape)
                elif row is not None:
                    means = weights.total[row].view(1, 1) / segment.shape[-1]
                else:
                    means = rows.view(-1, 1) / segment.shape[-1]
                rate = lr * means.sqrt().clamp(min=self.config.rms_floor)
            if segment.role == "embedding" and self.config.embedding == "lazy":
                rate = torch.where(moved.view(-1, 1), rate, 0.0)
            rates.append(rate.to(self._dtype))
        return rates

    def _scalar(self, value: float | None) -> Tensor:
        assert value is not None
        return torch.full((), value, dtype=self._dtype, device=self._device)

    @torch.no_grad()
    def n_drifting_rows(self) -> Tensor:
        """Whole embedding rows of this rank whose RMS is beyond a tenth of 1 / weight_decay, where 9736 sends them."""
        limit = 0.1 / self.config.weight_decay if self.config.weight_decay else math.inf
        n = torch.zeros(1, dtype=torch.float64, device=self._device)
        for part in self._parts:
            segment = self.segments[part.segment]
            if segment.role == "embedding" and part.row is None and _rule(self.config, "embedding") != "adamw":
                rows = self._kernels["squares"](part.of(self.masters[part.segment]))
                n += (rows > limit**2 * segment.shape[-1]).sum()
        return n


# --- statistics ------------------------------------------------------------------------------------------------------

N_STATISTICS = 7
"""Sums over a tensor's elements: of weight^2, change^2, gradient^2, -change * gradient, elements with a gradient, those
of them that moved against its sign, elements."""


def _statistics(before: Tensor, after: Tensor, gradient: Tensor, factor: Tensor) -> Tensor:
    total = torch.zeros(N_STATISTICS, dtype=torch.float64, device=before.device)
    pieces = zip(before.view(-1).split(2**22), after.view(-1).split(2**22), gradient.reshape(-1).split(2**22))
    for old, new, g in pieces:  # float64 copies of a piece at a time
        old64, change, g64 = old.double(), new.double() - old.double(), g.double() * factor
        against = (torch.sign(change) == -torch.sign(g64)) & (g64 != 0)
        total += torch.stack([
            old64.square().sum(), change.square().sum(), g64.square().sum(), -(change * g64).sum(), (g64 != 0).sum(),
            against.sum(), torch.full_like(factor, old.numel()),
        ])  # fmt: skip
    return total


# --- AdamW's kernel --------------------------------------------------------------------------------------------------


def _adamw(
    theta: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, n_updates: int, lr: float,
    betas: tuple[float, float], eps: float, weight_decay: float | None, factor: Tensor,
) -> None:  # fmt: skip
    """Call torch's fused AdamW on flat tensors; an fp32 gradient is overwritten.

    On CPU it computes the last elements of a tensor, those that do not fill a vector register, in scalar code that
    rounds differently, so the result would depend on where ZeRO cut; here they go through the vector code too.
    """
    assert weight_decay is not None
    kinds = [theta, gradient.to(theta.dtype), exp_avg, exp_avg_sq]
    calls = [kinds]
    n = kinds[0].numel() // LANES * LANES
    tails = [x[n:] for x in kinds]
    if theta.device.type == "cpu" and tails[0].numel():
        padded = [torch.zeros(LANES, dtype=x.dtype) for x in kinds]
        for whole, tail in zip(padded, tails):
            whole[: tail.numel()] = tail
        calls = [padded, *([[x[:n] for x in kinds]] if n else [])]
    for w, g, m, v in calls:
        # the kernel wants a counter for each tensor, and adds the one itself
        adamw(
            [w], [g], [m], [v], [], [torch.full((), n_updates - 1.0, device=w.device)], fused=True, amsgrad=False,
            maximize=False, lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay,
            grad_scale=(1 / factor).to(w.dtype), found_inf=torch.zeros((), device=w.device),
        )  # fmt: skip
    if calls[0] is not kinds:
        for whole, tail in zip(padded, tails):
            tail.copy_(whole[: tail.numel()])


LANES = 16
"""fp32 elements in the widest vector register of a CPU."""
PIECE = {"cpu": 2**20, "cuda": 2**26}
"""Elements of a gradient that are made fp32 at a time: what a cache holds, or what keeps launches few."""
