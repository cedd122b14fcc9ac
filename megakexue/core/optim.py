"""The optimizer over segments: Tiger, Lion, AdamW or Muon moves the masters of a rank.

What a rule needs to know of a whole tensor (its RMS, its share of the gradient norm, whether its gradient is finite) is
a sum of squares. `Sums` holds those of all tensors in one small float64 vector, which the engine adds up over ranks in
one all-reduce.

Tiger (9512), with m = 0 at the start, alpha the scheduled rate and lambda the weight decay:
    m     <- beta m + (1 - beta) g
    theta <- theta - eta (sign(m) + lambda theta)
    eta    = alpha max(RMS(theta), floor)   a matrix
             alpha max(RMS(row), floor)     each row of the embedding
             alpha / 2, without decay       a gain or a bias
An update computes the sums of squares of its new weights while it has them at hand; the next update uses them. It also
writes the weights of the model, in their dtype, where they are another tensor than the masters.

An update takes as many operations for ten tensors of a flat slice as for a thousand. A *row* is what moves at one rate:
a tensor, a row of the embedding, or what this rank has of either. What a row needs lies in vectors over all rows. A
kernel takes a *piece* of the slice, with many rows in it, as [units, width]: the width divides every row in it, so a
unit has one rate, and the sum of a row is that of its units, in their order. Where ZeRO leaves odd lengths the width is
1, and each element of a piece has a rate and a square of its own for a moment.

With `accumulate: momentum` a window of k micro-batches is (8634)
    m <- (beta at the first of the window, else 1) m + (1 - beta) g_i,    g_i the micro-batch's share of the mean
which is the same momentum without a buffer for the mean.

What must stay true: where ZeRO cuts a tensor changes no bit of the result. Squares are added up in float64 and rounded
to float32 when they become a rate, so that another order of the sum shows in one of 1e8 rates.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby, pairwise, repeat
from typing import Any

import torch
from torch import Tensor

from megakexue.config import ResolvedOptim
from megakexue.core.device import DTYPES
from megakexue.core.muon import Matrices, update_scale
from megakexue.core.rules import adamw_step, kernels
from megakexue.core.segments import Segment, parts_with_padding

GAINS = ("gain", "bias")
"""The roles that have no decay, and half of Tiger's rate, which is no share of their RMS."""

# --- pieces ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """Elements of a span that a kernel takes at a time, as [units, width]; each row in it is a number of units."""

    elements: slice
    """Of the span."""
    rows: slice
    """Of all rows of this rank: those of which elements are here."""
    width: int
    row_of_unit: Tensor | None
    """int32, counted from the first row here; None: the units are the rows."""
    offsets: Tensor | None
    """Of the units with which rows begin, and at last the number of units; None: the units are the rows."""

    def of(self, x: Tensor) -> Tensor:
        """The view [units, width] of a tensor over the span."""
        return x[self.elements].view(-1, self.width)

    def spread(self, of_rows: Tensor) -> Tensor:
        """[all rows, 1] -> [units, 1]"""
        here = of_rows[self.rows]
        return here if self.row_of_unit is None else here.index_select(0, self.row_of_unit)


def _add_up(values: Tensor, offsets: Tensor | None) -> Tensor:
    """Add up from each offset to the next one, in the same order each time; None: return the values."""
    # on CUDA a row is one block of threads, without atomics
    return values if offsets is None else torch.segment_reduce(values, "sum", offsets=offsets, unsafe=True)


NARROW, WIDE = 32, 8192
"""Widths. Below the first, a loop over a unit costs more than a rate for each element. With few units that are wider
than the second, a GPU would not be busy."""


def _pieces(bounds: list[int], first_row: int, size: int, device: torch.device) -> list[Piece]:
    """Cut a span into pieces of at most `size` elements.

    Args:
        bounds: where rows begin in the span, and at last its length.
        first_row: the number of the first.
    """
    pieces, edges = [], {0, bounds[-1]}
    # what ZeRO leaves of a row at either end is by itself where its length would decide the width of others too
    lengths = [b - a for a, b in pairwise(bounds)]
    common = math.gcd(*lengths[1:-1])
    if not common or lengths[0] % common:
        edges.add(bounds[1])
    if not common or lengths[-1] % common:
        edges.add(bounds[-2])
    for start, stop in pairwise(sorted(edges)):
        while start < stop:
            end = min(start + size, stop)
            # a row that does not fit begins the next piece, and so most pieces of long rows have one row alone; two
            # pieces that follow one another have more than `size` elements, so there are not many
            last = bounds[bisect_right(bounds, end) - 1]
            end = last if last > start else end
            low, high = bisect_right(bounds, start), bisect_left(bounds, end)
            lengths = [b - a for a, b in pairwise([start, *bounds[low:high], end])]
            rows = slice(first_row + low - 1, first_row + high)
            pieces.append(_piece(slice(start, end), rows, lengths, device))
            start = end
    return pieces


def _piece(elements: slice, rows: slice, lengths: list[int], device: torch.device) -> Piece:
    width = math.gcd(*lengths)
    if len(set(lengths)) == 1 and (len(lengths) == 1 or width >= NARROW):
        return Piece(elements=elements, rows=rows, width=width, row_of_unit=None, offsets=None)
    width = next(w for w in range(min(width, WIDE), 0, -1) if width % w == 0) if width >= NARROW else 1
    counts = torch.tensor(lengths) // width
    return Piece(
        elements=elements, rows=rows, width=width,
        row_of_unit=torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(counts).to(device),
        offsets=torch.tensor([0, *counts.cumsum(0).tolist()], device=device),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Span:
    """Elements of a flat tensor, one after another, that move by one rule."""

    flat: int
    elements: slice
    """Of the flat tensor."""
    rule: str
    """tiger, lion, muon or adamw."""
    theta: Tensor
    """View of the masters, as all tensors here are flat views of these elements."""
    weights: Tensor | None
    """The model's, in their dtype; None: they are theta."""
    state: dict[str, Tensor]
    undecayed: Tensor
    """Places of the elements without weight decay, where AdamW has one."""
    pieces: list[Piece]

    def of(self, flats: list[Tensor]) -> Tensor:
        """These elements of flat tensors such as the gradients."""
        return flats[self.flat][self.elements]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What is known of the rows of this rank: a vector each."""

    slot: Tensor
    """Of the parameter in `Sums.total`."""
    rate_slot: Tensor
    """Of what moves at one rate, the tensor or the cut row, in `Sums.total`."""
    is_whole: Tensor
    """Whether it is a whole row of an embedding, which has a rate of its own instead."""
    n_in_rms: Tensor
    """Elements that an RMS is over: of a row, or of the whole tensor."""
    needs_rms: Tensor
    factor: Tensor
    """Of the learning rate: 1/2 for a gain under Tiger, 0 for padding."""
    decay: Tensor
    """Weight decay, 0 for a gain; [rows, 1] in the dtype of the masters."""
    is_lazy: Tensor
    """Whether it rests where it has no gradient."""


# --- the optimizer ---------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Sums:
    """Sums of squares of one kind of tensor: of this rank's rows, and of whole tensors once ranks are added up."""

    rows: Tensor
    """Of what this rank has of each row, float64."""
    total: Tensor
    """Of each parameter in the order of `names`, then of each of the `cut_rows`, float64."""


@dataclass(kw_only=True)
class Window:
    """What momentum accumulation knows of the micro-batches of a step, on the device."""

    has_decayed: Tensor
    """For each parameter, whether a micro-batch has multiplied the momentum by beta."""
    touched: Tensor
    """For each row, whether a micro-batch had a gradient."""


class Optimizer:
    """Moves the masters of a rank. The engine says when, and adds sums up over ranks.

    Args:
        segments: of this rank, one for a parameter at most.
        flats: the masters, flat tensors in which the segments lie, float32. Others may write into them, and then call
            `masters_changed`.
        names: every parameter of the model, the same on all ranks.
        cut_rows: (parameter, row) of every embedding row that is cut between segments anywhere, the same on all ranks.
        weights: for each flat tensor, that of the same elements of the model's weights, which an update writes; None:
            they are the masters.
        matrices: with Muon, how whole matrices come together.
    """

    def __init__(
        self, config: ResolvedOptim, segments: list[Segment], flats: list[Tensor], names: list[str],
        cut_rows: list[tuple[str, int]], weights: list[Tensor | None] | None = None,
        matrices: Matrices | None = None,
    ) -> None:  # fmt: skip
        self.config, self.segments, self.names, self._matrices = config, segments, names, matrices
        assert (matrices is not None) == (config.name == "muon")
        self.n_updates = 0
        """Updates applied, which AdamW's bias correction counts; fewer than steps after skips. Set by `resume`."""
        self._flats, self._weights = [flat.detach().view(-1) for flat in flats], weights or [None] * len(flats)
        self.masters = [s.of(self._flats[s.flat]) for s in segments]
        """The view of each segment."""
        self._device, self._dtype = self._flats[0].device, self._flats[0].dtype
        self._kernels, self._size, self.kernel_reason = kernels(self._device, sum(m.numel() for m in self.masters))
        if matrices is not None:
            self.kernel_reason += f"; Newton-Schulz in {str(self._matrix_dtype).removeprefix('torch.')}"
        self._betas = (config.beta1, config.beta2 or 0.0)  # Tiger has one
        ordered = sorted(segments, key=lambda s: (s.flat, s.offset))
        groups = [list(g) for _, g in groupby(ordered, key=lambda s: (s.flat, config.rule(s.role)))]
        self._lay_out_rows([part for group in groups for part in parts_with_padding(group)], cut_rows)
        views: dict[Segment, dict[str, Tensor]] = {}
        self._spans = []
        for group in groups:
            first, last = group[0], group[-1]
            state = self._new_state(first.role, last.offset + last.numel - first.offset)
            self._spans.append(self._span(group, state))
            views |= {s: {k: x.narrow(0, s.offset - first.offset, s.numel) for k, x in state.items()} for s in group}
        self.state = [views[s] for s in segments]
        """The views of each segment."""
        self._weight_rows: Tensor | None = None
        self._window: Window | None = None

    def _new_state(self, role: str, n: int) -> dict[str, Tensor]:
        return {
            kind: torch.zeros(n, dtype=self._dtype if dtype == "fp32" else DTYPES[dtype], device=self._device)
            for kind, dtype in self.config.state_dtypes(role).items()
        }

    def _lay_out_rows(self, parts: list[Segment], cut_rows: list[tuple[str, int]]) -> None:
        """Make the vectors over rows, and what adds rows up to parameters and to cut rows."""
        counts = [part.numel // part.row_numel for part in parts]
        starts = list(accumulate(counts, initial=0))
        self._n_rows, self._n_slots = starts.pop(), len(self.names) + len(cut_rows)
        self._first_row = {(part.flat, part.offset): row for part, row in zip(parts, starts)}
        slots: dict[Any, int] = {key: i for i, key in enumerate([*self.names, *cut_rows])}
        table = torch.tensor([self._row(part, slots) for part in parts], dtype=torch.float64).view(len(parts), 8)
        of_rows = table.repeat_interleave(torch.tensor(counts, dtype=torch.long), 0).to(self._device)
        slot, rate_slot, is_whole, n_in_rms, needs_rms, factor, decay, is_lazy = of_rows.unbind(1)
        self._rows = Rows(
            slot=slot.long(), rate_slot=rate_slot.long(), is_whole=is_whole.bool(), n_in_rms=n_in_rms,
            needs_rms=needs_rms.bool(), factor=factor, decay=decay.to(self._dtype)[:, None], is_lazy=is_lazy.bool(),
        )  # fmt: skip
        # the rows of a parameter follow one another; padding has a slot of its own behind all others
        by_name = groupby(zip(parts, counts), key=lambda x: x[0].name)
        runs = [(name, sum(n for _, n in run)) for name, run in by_name]
        cut = [(row, slots[part.name, part.cut_row]) for part, row in zip(parts, starts) if part.cut_row is not None]
        index = [
            [slots.get(name, self._n_slots) for name, _ in runs], list(accumulate([n for _, n in runs], initial=0)),
            [row for row, _ in cut], [slot for _, slot in cut],
        ]  # fmt: skip
        self._run_slots, self._run_offsets, self._cut_rows, self._cut_slots = (
            torch.tensor(x, dtype=torch.long, device=self._device) for x in index
        )

    def _row(self, part: Segment, slots: dict[Any, int]) -> tuple[float, ...]:
        """The numbers of `Rows` for the rows of a part."""
        if part.role == "padding":  # which does not move
            return 0, 0, False, 1, False, 0, 0, False
        is_embedding, is_gain, rule = part.role == "embedding", part.role in GAINS, self.config.rule(part.role)
        rate_slot = slots[part.name if part.cut_row is None else (part.name, part.cut_row)]
        return (
            slots[part.name], rate_slot, is_embedding and part.cut_row is None,
            part.shape[-1] if is_embedding else math.prod(part.shape), rule == "tiger" and not is_gain,
            0.5 if rule == "tiger" and is_gain else 1.0, 0.0 if is_gain else self.config.weight_decay,
            is_embedding and self.config.embedding == "lazy",
        )  # fmt: skip

    def _span(self, segments: list[Segment], state: dict[str, Tensor]) -> Span:
        """The span of segments that follow one another, with padding between them at most."""
        parts = parts_with_padding(segments)
        flat, first, rule = parts[0].flat, parts[0].offset, self.config.rule(segments[0].role)
        places = [range(part.offset - first, part.offset - first + part.numel, part.row_numel) for part in parts]
        bounds = [*(start for place in places for start in place), places[-1].stop]
        elements, weights = slice(first, first + bounds[-1]), self._weights[flat]
        gains = [s for s in segments if s.role in GAINS and rule == "adamw" and self.config.weight_decay]
        undecayed = [torch.arange(s.offset - first, s.offset - first + s.numel) for s in gains]
        return Span(
            flat=flat, elements=elements, rule=rule, theta=self._flats[flat][elements],
            weights=None if weights is None else weights[elements], state=state,
            undecayed=torch.cat([torch.empty(0, dtype=torch.long), *undecayed]).to(self._device),
            pieces=_pieces(bounds, self._first_row[flat, first], self._size, self._device),
        )  # fmt: skip

    @cached_property
    def _spans_of_segments(self) -> list[Span]:
        """A span for each segment, for what looks at tensors one by one."""
        return [self._span([segment], state) for segment, state in zip(self.segments, self.state)]

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
            self._weight_rows = self._squares([(s, s.theta) for s in self._spans if s.rule == "tiger"])
        return self._total(self._weight_rows)

    @torch.no_grad()
    def gradient_sums(self, gradients: list[Tensor]) -> Sums:
        """Of flat gradients, which lie as the masters do."""
        return self._total(self._squares([(span, span.of(gradients)) for span in self._spans]))

    def _squares(self, tensors: list[tuple[Span, Tensor]]) -> Tensor:
        """For each row, of tensors over spans; 0 for rows of other spans."""
        rows = self._no_sums()
        for span, x in tensors:
            for piece in span.pieces:
                rows[piece.rows].add_(_add_up(self._kernels["squares"](piece.of(x)), piece.offsets))
        return rows

    def _no_sums(self) -> Tensor:
        return torch.zeros(self._n_rows, dtype=torch.float64, device=self._device)

    def _total(self, rows: Tensor) -> Sums:
        total = torch.zeros(self._n_slots + 1, dtype=torch.float64, device=self._device)
        if self._n_rows:
            total[self._run_slots] = _add_up(rows, self._run_offsets)
            total[self._cut_slots] = rows[self._cut_rows]
        return Sums(rows=rows, total=total[:-1])

    def _by_rate(self, sums: Sums) -> Tensor:
        """For each row, the sum of what moves at one rate: of the whole row, or of its tensor or cut row."""
        return torch.where(self._rows.is_whole, sums.rows, sums.total[self._rows.rate_slot])

    # --- accumulation in the momentum --------------------------------------------------------------------------------

    @torch.no_grad()
    def absorb(self, gradients: list[Tensor], sums: Sums, factor: Tensor, ok: Tensor) -> None:
        """Take a micro-batch into the momentum, tensor by tensor where `ok`.

        Args:
            gradients: flat, as the masters lie.
            sums: of these gradients, `total` over all ranks.
            factor: what multiplies the gradients, float64.
            ok: for each parameter, on every rank alike, whether to take it.
        """
        has_decayed = self._window.has_decayed if self._window else torch.zeros_like(ok)
        # a window decays the momentum once, at its first good micro-batch
        betas = torch.where(has_decayed, self._scalar(1.0), self._scalar(self.config.beta1))
        scale, row_ok = self._scale(self.config.beta1, factor), ok[self._rows.slot]
        of_rows = row_ok[:, None], betas[self._rows.slot, None]
        for span in self._spans:
            momentum, gradient = span.state["momentum"], span.of(gradients)
            for piece in span.pieces:
                takes = [piece.spread(x) for x in of_rows]
                self._kernels["_tiger_absorb"](piece.of(momentum), piece.of(gradient), *takes, scale)
        touched = row_ok & (self._by_rate(sums) > 0)
        if self._window:
            touched |= self._window.touched
        self._window = Window(has_decayed=has_decayed | ok, touched=touched)

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
            gradients: flat, as the masters lie, in any dtype; AdamW overwrites fp32 ones.
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
        rates = self._rates(weights, window.touched if window else self._by_rate(sums) > 0, lr)
        table = torch.zeros(len(self.names), N_STATISTICS, dtype=torch.float64, device=self._device)
        new_rows = self._no_sums()
        names, spans = [""] * len(self._spans), self._spans
        if shrink or statistics:
            names, spans = [segment.name for segment in self.segments], self._spans_of_segments
        for name, span in zip(names, spans):
            gradient = span.of(gradients)
            before = [span.theta.clone(), gradient.clone()] if statistics else []
            if name in shrink:
                self._shrink(span, *shrink[name], new_rows)
            elif span.rule == "muon":
                continue  # all of these together, below
            elif span.rule == "adamw":
                self._move_by_adamw(span, gradient, lr, factor)
            else:
                self._move_by_sign(span, gradient, rates, factor, new_rows, is_absorbed=window is not None)
            if statistics:
                table[self.names.index(name)] += _statistics(before[0], span.theta, before[1], factor)
        if self._matrices is not None:
            self._move_by_muon(gradients, lr, factor, shrink, table if statistics else None)
        self._weight_rows = new_rows
        return table if statistics else None

    def _rates(self, weights: Sums, moves: Tensor, lr: float) -> Tensor:
        """The learning rate of each row, [rows, 1], from sums of squares and from whether a lazy row moves."""
        rms = (self._by_rate(weights) / self._rows.n_in_rms).sqrt().clamp(min=self.config.rms_floor)
        rate = lr * self._rows.factor * torch.where(self._rows.needs_rms, rms, 1.0)
        return torch.where(moves | ~self._rows.is_lazy, rate, 0.0).to(self._dtype)[:, None]

    def _shrink(self, span: Span, centre: float, ratio: float, new_rows: Tensor) -> None:
        span.theta.sub_(centre).mul_(ratio).add_(centre)
        if span.weights is not None:
            span.weights.copy_(span.theta)
        if span.rule == "tiger":
            new_rows += self._squares([(span, span.theta)])

    def _move_by_sign(
        self, span: Span, gradient: Tensor, rates: Tensor, factor: Tensor, new_rows: Tensor, *, is_absorbed: bool
    ) -> None:
        """Move by Tiger or Lion; Tiger adds the squares of the new weights to `new_rows`."""
        beta1, beta2 = self._betas
        kernel = self._kernels["_tiger_apply" if is_absorbed else f"_{span.rule}"]
        scalars = [] if is_absorbed else [self._scalar(beta1), self._scale(beta1, factor)]
        if span.rule == "lion":
            scalars += [self._scalar(beta2), self._scale(beta2, factor)]
        for piece in span.pieces:
            weights = None if span.weights is None else piece.of(span.weights)
            tensors = [piece.of(span.state["momentum"]), *([] if is_absorbed else [piece.of(gradient)])]
            of_units = [piece.spread(rates), piece.spread(self._rows.decay)]
            squares = kernel(piece.of(span.theta), weights, *tensors, *of_units, *scalars)
            if squares is not None:
                new_rows[piece.rows].add_(_add_up(squares, piece.offsets))

    def _move_by_adamw(self, span: Span, gradient: Tensor, lr: float, factor: Tensor) -> None:
        config, (beta1, beta2) = self.config, self._betas
        if config.name != "adamw":  # the embedding alone moves by it, or what is no matrix to Muon
            beta1, beta2 = 0.9, 0.95
            lr *= config.embedding_lr / config.lr if config.embedding_lr else 1.0
        adamw_step(
            span.theta, gradient, span.state["exp_avg"], span.state["exp_avg_sq"], span.undecayed, self.n_updates,
            factor, lr=lr, beta1=beta1, beta2=beta2, eps=config.eps, weight_decay=config.weight_decay,
        )  # fmt: skip
        if span.weights is not None:
            span.weights.copy_(span.theta)

    def _move_by_muon(
        self, gradients: list[Tensor], lr: float, factor: Tensor, shrink: Collection[str], table: Tensor | None
    ) -> None:
        """Move all matrices but those that shrink, a collective; add their statistics to the table, if there is one."""
        assert self._matrices is not None
        beta, scale = self._scalar(self.config.beta1), self._scale(self.config.beta1, factor)
        rate, decay = self._scalar(lr), self._scalar(self.config.weight_decay)
        own = {segment.name: i for i, segment in enumerate(self.segments)}

        def take(name: str) -> Tensor:
            segment, momentum = self.segments[own[name]], self.state[own[name]]["momentum"]
            gradient = segment.of(gradients[segment.flat])
            direction = torch.empty_like(gradient, dtype=self._matrix_dtype)
            for m, g, d in zip(*(x.split(self._size) for x in (momentum, gradient, direction))):
                d.copy_(self._kernels["_muon_direction"](m, g, beta, scale))
            return direction

        def give(name: str, direction: Tensor) -> None:
            segment, theta = self.segments[own[name]], self.masters[own[name]]
            weights, before = self._weights[segment.flat], theta.clone() if table is not None else theta
            of_weights = repeat(None) if weights is None else segment.of(weights).split(self._size)
            scalars = rate, decay, self._scalar(update_scale(segment.shape))
            for w, cast, d in zip(theta.split(self._size), of_weights, direction.split(self._size)):
                self._kernels["_muon"](w, cast, d, *scalars)
            if table is not None:
                gradient = segment.of(gradients[segment.flat])
                table[self.names.index(name)] += _statistics(before, theta, gradient, factor)

        self._matrices.orthogonalise(take, give, dtype=self._matrix_dtype, device=self._device, left_out=shrink)

    @property
    def _matrix_dtype(self) -> torch.dtype:
        """What Newton-Schulz computes in: 16 bits where a GPU trains in them, else the masters' own."""
        weights = self._weights[0]
        is_half = self._device.type == "cuda" and weights is not None and weights.dtype != self._dtype
        return torch.bfloat16 if is_half else self._dtype

    def _scalar(self, value: float) -> Tensor:
        return torch.full((), value, dtype=self._dtype, device=self._device)

    def _scale(self, beta: float, factor: Tensor) -> Tensor:
        """What a gradient is multiplied with on its way into a momentum."""
        return ((1 - beta) * factor).to(self._dtype)

    @torch.no_grad()
    def n_drifting_rows(self) -> Tensor:
        """Whole embedding rows of this rank whose RMS is beyond a tenth of 1 / weight_decay, where 9736 sends them."""
        limit = 0.1 / self.config.weight_decay if self.config.weight_decay else math.inf
        # rows that AdamW moves are 0 here, and do not drift
        squares = self._squares([(span, span.theta) for span in self._spans if span.rule != "adamw"])
        drifts = self._rows.is_whole & (squares > limit**2 * self._rows.n_in_rms)
        return drifts.sum(dtype=torch.float64)[None]


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
