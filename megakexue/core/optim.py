"""The optimizer over segments: Tiger, Lion or AdamW moves the masters of a rank.

What a rule needs to know of a whole tensor (its RMS, its share of the gradient norm, whether its gradient is finite) is
a sum of squares. `Sums` holds those of all tensors in one small float64 vector, which the engine adds up over ranks in
one all-reduce.

Tiger (9512), with m = 0 at the start, alpha the scheduled rate and lambda the weight decay:
    m     <- beta m + (1 - beta) g
    theta <- theta - eta (sign(m) + lambda theta)
    eta    = alpha max(RMS(theta), floor)   a matrix
             alpha max(RMS(row), floor)     each row of the embedding
             alpha / 2, without decay       a gain
An update computes the sums of squares of its new weights while it has them at hand; the next update uses them.

With `accumulate: momentum` a window of k micro-batches is (8634)
    m <- (beta at the first of the window, else 1) m + (1 - beta) g_i,    g_i the micro-batch's share of the mean
which is the same momentum without a buffer for the mean.

What must stay true: where ZeRO cuts a tensor changes no bit of the result. Squares are added up in float64 and rounded
to float32 when they become a rate, so that another order of the sum shows in one of 1e8 rates.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megakexue.config import OptimConfig, ResolvedOptim
from megakexue.core.rules import adamw_step, kernels
from megakexue.core.segments import Segment


def state_dtypes(config: OptimConfig, role: str) -> dict[str, torch.dtype]:
    """Return the state tensors that a parameter of this role has beside its master."""
    if _rule(config, role) == "adamw":
        return {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}
    return {"momentum": {"fp32": torch.float32, "bf16": torch.bfloat16}[config.momentum_dtype]}


def _rule(config: OptimConfig, role: str) -> str:
    return "adamw" if role == "embedding" and config.embedding == "adamw" else config.name


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Rows of a segment that are treated alike: whole rows of an embedding, a piece of one, or a tensor as one row."""

    segment: Segment
    """These rows, which are all or some of a segment of the optimizer."""
    index: int
    """Of the optimizer's segment."""
    span: slice
    """Where these rows are in the tensors of that segment."""
    theta: Tensor
    """View of the master, [rows, elements]."""
    state: dict[str, Tensor]
    """Views of the state, [rows, elements]."""
    rule: str
    """tiger, lion or adamw."""
    decay: float
    """Weight decay, 0 for a gain."""
    needs_rms: bool
    n_in_rms: int
    """Elements that an RMS is over: of a row, or of the whole tensor."""
    slot: int
    """Of the parameter in `Sums.total`."""
    rate_slot: int | None
    """Of what moves at one rate, the tensor or the cut row, in `Sums.total`; None: each of the whole rows by itself."""

    def of(self, tensors: list[Tensor]) -> Tensor:
        """The view [rows, elements] of this part in the tensors of the segments, such as the gradients."""
        return tensors[self.index][self.span].view(self.theta.shape)


@dataclass(kw_only=True)
class Sums:
    """Sums of squares of one kind of tensor: of this rank's parts, and of whole tensors once ranks are added up."""

    rows: list[Tensor]
    """For each part, of each of its rows on this rank, float64."""
    total: Tensor
    """Of each parameter in the order of `names`, then of each of the `cut_rows`, float64."""


@dataclass(kw_only=True)
class Window:
    """What momentum accumulation knows of the micro-batches of a step, on the device."""

    has_decayed: Tensor
    """For each parameter, whether a micro-batch has multiplied the momentum by beta."""
    touched: list[Tensor] = field(default_factory=list)
    """For each part, of each row, whether a micro-batch had a gradient."""


class Optimizer:
    """Moves the masters of a rank's segments. The engine says when, and adds sums up over ranks.

    Args:
        segments: of this rank.
        masters: the view of each segment, float32. Others may write into it, and then call `masters_changed`.
        names: every parameter of the model, the same on all ranks.
        cut_rows: (parameter, row) of every embedding row that is cut between segments anywhere, the same on all ranks.
        device: of the masters; None: the CPU.
    """

    def __init__(
        self, config: ResolvedOptim, segments: list[Segment], masters: list[Tensor], names: list[str],
        cut_rows: list[tuple[str, int]], device: torch.device | None = None,
    ) -> None:  # fmt: skip
        self.config, self.segments, self.masters, self.names = config, segments, masters, names
        self.n_updates = 0
        """Updates applied, which AdamW's bias correction counts; fewer than steps after skips. Set by `resume`."""
        self.state = [
            {kind: torch.zeros_like(m, dtype=torch.promote_types(dtype, m.dtype) if dtype == torch.float32 else dtype)
             for kind, dtype in state_dtypes(config, s.role).items()}
            for s, m in zip(segments, masters)
        ]  # fmt: skip
        self._device = device or torch.device("cpu")
        self._dtype = masters[0].dtype if masters else torch.float32
        self._kernels, self.kernel_reason = kernels(self._device, sum(m.numel() for m in masters))
        self._zero = torch.zeros(1, dtype=torch.float64, device=self._device)
        self._betas = (config.beta1, config.beta2 or 0.0)  # Tiger has one
        slots = {key: i for i, key in enumerate([*names, *cut_rows])}
        self._n_slots = len(slots)
        self._parts = [self._part(i, rows, slots) for i, s in enumerate(segments) for rows in s.split_at_rows()]
        cut = [(i, part.rate_slot) for i, part in enumerate(self._parts) if part.segment.cut_row is not None]
        index = [[part.slot for part in self._parts], [i for i, _ in cut], [slot for _, slot in cut]]
        self._slots, self._cut_parts, self._cut_slots = (
            torch.tensor(x, dtype=torch.long, device=self._device) for x in index
        )
        self._weight_rows: list[Tensor] | None = None
        self._window: Window | None = None

    def _part(self, index: int, rows: Segment, slots: dict[Any, int]) -> Part:
        is_embedding, cut_row, rule = rows.role == "embedding", rows.cut_row, _rule(self.config, rows.role)
        n_in_rms = rows.shape[-1] if is_embedding else math.prod(rows.shape)
        are_whole_rows = is_embedding and cut_row is None
        size = (-1, n_in_rms) if are_whole_rows else (1, -1)
        rate_slot = None if are_whole_rows else slots[rows.name if cut_row is None else (rows.name, cut_row)]
        start = rows.start - self.segments[index].start
        span = slice(start, start + rows.numel)
        return Part(
            segment=rows, index=index, span=span, theta=self.masters[index][span].view(size),
            state={kind: x[span].view(size) for kind, x in self.state[index].items()},
            rule=rule, decay=0.0 if rows.role == "gain" else self.config.weight_decay,
            needs_rms=rule == "tiger" and rows.role != "gain", n_in_rms=n_in_rms,
            slot=slots[rows.name], rate_slot=rate_slot,
        )  # fmt: skip

    def resume(self, n_updates: int) -> None:
        """Go on after this many updates, with the state that they left."""
        self.n_updates = n_updates

    def masters_changed(self) -> None:
        """Say that masters were written by someone else."""
        self._weight_rows = None

    # --- sums --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def weight_sums(self) -> Sums:
        """Of the masters as they are now, where Tiger needs them."""
        if self._weight_rows is None:
            self._weight_rows = [self._squares(part) for part in self._parts]
        return self._add_up(self._weight_rows)

    @torch.no_grad()
    def gradient_sums(self, gradients: list[Tensor]) -> Sums:
        """Of the gradients of the segments."""
        return self._add_up([self._kernels["squares"](part.of(gradients)) for part in self._parts])

    def _squares(self, part: Part) -> Tensor:
        """Of the weights of each row, where Tiger needs them."""
        return self._kernels["squares"](part.theta) if part.needs_rms else self._zero

    def _add_up(self, rows: list[Tensor]) -> Sums:
        total = torch.zeros(self._n_slots, dtype=torch.float64, device=self._device)
        if rows:
            of_parts = torch.stack([row.sum() for row in rows])
            total.index_add_(0, self._slots, of_parts)
            total.index_add_(0, self._cut_slots, of_parts[self._cut_parts])
        return Sums(rows=rows, total=total)

    def _by_rate(self, sums: Sums) -> list[Tensor]:
        """For each part, the sums of whatever moves at one rate: of its whole rows, or of its tensor or cut row."""
        return [
            rows if part.rate_slot is None else sums.total[part.rate_slot].view(1)
            for part, rows in zip(self._parts, sums.rows)
        ]

    # --- accumulation in the momentum --------------------------------------------------------------------------------

    @torch.no_grad()
    def absorb(self, gradients: list[Tensor], sums: Sums, factor: Tensor, ok: Tensor) -> None:
        """Take a micro-batch into the momentum, tensor by tensor where `ok`.

        Args:
            sums: of these gradients, `total` over all ranks.
            factor: what multiplies the gradients, float64.
            ok: for each parameter, on every rank alike, whether to take it.
        """
        if self._window is None:
            self._window = Window(has_decayed=torch.zeros_like(ok))
        window = self._window
        # a window decays the momentum once, at its first good micro-batch
        betas = torch.where(window.has_decayed, self._scalar(1.0), self._scalar(self.config.beta1))
        scale = self._scale(self.config.beta1, factor)
        for part in self._parts:
            momentum, gradient = part.state["momentum"], part.of(gradients)
            self._kernels["_tiger_absorb"](momentum, gradient, ok[part.slot], betas[part.slot], scale)
        window.has_decayed |= ok
        touched = [ok[part.slot] & (squares > 0) for part, squares in zip(self._parts, self._by_rate(sums))]
        window.touched = [a | b for a, b in zip(window.touched, touched)] if window.touched else touched

    def end_window(self) -> None:
        """Forget the micro-batches of a step that is not applied."""
        self._window = None

    # --- the update --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(
        self, gradients: list[Tensor], weights: Sums, sums: Sums, *, lr: float, factor: Tensor,
        shrink: dict[str, tuple[float, float]] | None = None, statistics: bool = False,
    ) -> Tensor | None:  # fmt: skip
        """Move the masters.

        Args:
            gradients: of the segments, in any dtype; AdamW overwrites fp32 ones.
            weights: of the masters, `total` over all ranks.
            sums: of the gradients, `total` over all ranks.
            factor: what multiplies the gradients, float64: loss scale and clipping in one.
            shrink: for each parameter whose gradient is not finite, (centre, ratio): w becomes (w - c) ratio + c, and
                its state stays (9512).

        Returns:
            With `statistics`: this rank's sums for each parameter, float64 [names, N_STATISTICS]. Otherwise None.
        """
        shrink = shrink or {}
        self.n_updates += 1
        window, self._window = self._window, None
        touched = window.touched if window else [squares > 0 for squares in self._by_rate(sums)]
        table = torch.zeros(len(self.names), N_STATISTICS, dtype=torch.float64, device=self._device)
        new_rows: list[Tensor] = []
        for part, squares, moves in zip(self._parts, self._by_rate(weights), touched):
            gradient = part.of(gradients)
            before = [part.theta.clone(), gradient.clone()] if statistics else []
            if part.segment.name in shrink:
                centre, ratio = shrink[part.segment.name]
                part.theta.sub_(centre).mul_(ratio).add_(centre)
                new_rows.append(self._squares(part))
            elif part.rule == "adamw":
                self._move_by_adamw(part, gradient, lr, factor)
                new_rows.append(self._zero)
            else:
                rate = self._rate(part, squares, moves, lr)
                new_rows.append(self._move_by_sign(part, gradient, rate, factor, is_absorbed=window is not None))
            if statistics:
                table[part.slot] += _statistics(before[0], part.theta, before[1], factor)
        self._weight_rows = new_rows
        return table if statistics else None

    def _rate(self, part: Part, squares: Tensor, moves: Tensor, lr: float) -> Tensor:
        """The learning rate of each row, [rows, 1], from sums of squares and from whether a lazy row moves."""
        if part.needs_rms:
            rate = lr * (squares.view(-1, 1) / part.n_in_rms).sqrt().clamp(min=self.config.rms_floor)
        else:
            constant = 0.5 * lr if part.rule == "tiger" else lr
            rate = torch.full((len(part.theta), 1), constant, dtype=torch.float64, device=self._device)
        if part.segment.role == "embedding" and self.config.embedding == "lazy":
            rate = torch.where(moves.view(-1, 1), rate, 0.0)
        return rate.to(self._dtype)

    def _move_by_sign(self, part: Part, gradient: Tensor, rate: Tensor, factor: Tensor, *, is_absorbed: bool) -> Tensor:
        """Move by Tiger or Lion; return the squares of the new rows where Tiger needs them."""
        momentum, decay, (beta1, beta2) = part.state["momentum"], self._scalar(part.decay), self._betas
        if is_absorbed:
            return self._kernels["_tiger_apply"](part.theta, momentum, rate, decay)
        arguments = [part.theta, momentum, gradient, rate, decay, self._scalar(beta1), self._scale(beta1, factor)]
        if part.rule == "tiger":
            return self._kernels["_tiger"](*arguments)
        self._kernels["_lion"](*arguments, self._scalar(beta2), self._scale(beta2, factor))
        return self._zero

    def _move_by_adamw(self, part: Part, gradient: Tensor, lr: float, factor: Tensor) -> None:
        config, (beta1, beta2) = self.config, self._betas
        if config.name != "adamw":  # the embedding alone moves by it
            assert config.embedding_lr is not None
            lr, beta1, beta2 = lr * config.embedding_lr / config.lr, 0.9, 0.95
        adamw_step(
            part.theta, gradient, part.state["exp_avg"], part.state["exp_avg_sq"], self.n_updates, factor,
            lr=lr, beta1=beta1, beta2=beta2, eps=config.eps, weight_decay=part.decay,
        )  # fmt: skip

    def _scalar(self, value: float) -> Tensor:
        return torch.full((), value, dtype=self._dtype, device=self._device)

    def _scale(self, beta: float, factor: Tensor) -> Tensor:
        """What a gradient is multiplied with on its way into a momentum."""
        return ((1 - beta) * factor).to(self._dtype)

    @torch.no_grad()
    def n_drifting_rows(self) -> Tensor:
        """Whole embedding rows of this rank whose RMS is beyond a tenth of 1 / weight_decay, where 9736 sends them."""
        limit = 0.1 / self.config.weight_decay if self.config.weight_decay else math.inf
        n = torch.zeros(1, dtype=torch.float64, device=self._device)
        for part in self._parts:
            if part.segment.role == "embedding" and part.rate_slot is None and part.rule != "adamw":
                n += (self._kernels["squares"](part.theta) > limit**2 * part.n_in_rms).sum()
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
