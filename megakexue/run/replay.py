"""Compute a step that the guard stopped again, and name the module where the first non-finite value appears.

    RUN/dumps/step_00000012/      the format of a checkpoint (megakexue/run/checkpoint.py), of what went into that step:
      rank_00000.safetensors      master/parameter/start -> elements; batch.i.field: micro-batch i of that rank
      rank_00001.safetensors      ...
      trainer.json                step, reason, config, world_size, loss_scale, rows
      manifest.json

One process computes micro-batch after micro-batch, without DeepSpeed: the weights are the masters in the training
dtype, the objective has the factor loss_scale world_size / n_targets of the step. Which module is named:

    forward    the first one, in the order of execution, whose output is not finite. A module inside another is done
               first. Where finite outputs become an input that is not, the module that made this input of them is
               named: a block for its residual sums.
    backward   the same with gradients: the first module that returns a gradient to its input that is not finite, the
               first parameter with such a gradient, or the module in which finite gradients were added up.
    weights    where the module has a weight that is not finite itself, this weight is named.

What must stay true: the forward pass is that of the training, bit for bit on the same kind of device; gradients are so
to rounding, since those that flow together at a module's input are added up in another order.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from megakexue.config import IGNORED, EngineConfig, LossConfig, ResolvedModel, UserError, build, require
from megakexue.core.attention import Backend, choose_backend
from megakexue.core.axes import axes, shape
from megakexue.core.batch import Batch
from megakexue.core.decoder import Decoder
from megakexue.core.device import DTYPES
from megakexue.core.segments import Segment
from megakexue.files import read_json, verify
from megakexue.run import checkpoint
from megakexue.run.state import TRAINER, StoppedState

Direction = Literal["forward", "backward"]

MASTER = "fp32 master"
"""What is not finite when a weight was so before it was cast."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The first non-finite value of a micro-batch."""

    rank: int
    micro_batch: int
    direction: Direction
    name: str
    """Of a module or parameter, as in the checkpoint; `decoder` is the whole."""
    what: str
    """Of it: output, gradient, ..."""
    n_nan: int
    n_inf: int
    n_elements: int
    largest_input: float | None
    """Largest finite magnitude in what it was computed from: a module's inputs, in the backward pass the gradient of
    its output, for a weight its fp32 master. None: nothing finite, or no numbers but tokens."""
    rows: list[Any]
    """Where the data rows come from, only of those with a non-finite value where the tensor tells them apart."""

    def __str__(self) -> str:
        counts = [f"{n} {kind}" for n, kind in ((self.n_nan, "NaN"), (self.n_inf, "Inf")) if n]
        inputs = f", from finite values up to {self.largest_input:.3g}" if self.largest_input is not None else ""
        rows = f"; rows: {', '.join(map(str, self.rows))}" if self.rows else ""
        return (
            f"{self.direction}: {self.name}: {self.what} has {' and '.join(counts)} of {self.n_elements} elements"
            f"{inputs}{rows}"
        )


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    rank: int
    micro_batch: int
    loss: float | None
    """Mean cross-entropy over its own targets, in nats; None: not finite."""
    finding: Finding | None
    """None: the forward pass, the loss and every gradient are finite."""

    def __str__(self) -> str:
        loss = "" if self.loss is None else f"loss {self.loss:.4f}, "
        return f"rank {self.rank} micro-batch {self.micro_batch}: {loss}{self.finding or 'finite'}"


@dataclass(frozen=True, kw_only=True)
class Replay:
    dtype: str
    training_dtype: str
    left_out: list[str]
    """What of the step was not computed."""
    loss_scale: float
    notes: list[str]
    """What differs from the training, and weights that are not finite."""
    micro_batches: list[MicroBatch]
    is_finite: bool
    """Whether the run's own step was."""
    overflowing_sums: list[str]
    """Parameters of which each micro-batch's gradient is finite, and their sum is not."""

    @property
    def findings(self) -> list[Finding]:
        return [m.finding for m in self.micro_batches if m.finding]

    @property
    def conclusion(self) -> str:
        """What the numbers say, and what to try next."""
        findings, n = self.findings, len(self.micro_batches)
        if findings:
            names = Counter((f.direction, f.name, f.what) for f in findings)
            (direction, name, what), most = names.most_common(1)[0]
            where = f"{len(findings)} of {n} micro-batches are not finite, {most} of them first at {name} ({direction})"
            if what == MASTER:
                return f"{where}. An earlier step has spoilt this weight: go on from a checkpoint before it."
            if self.dtype == "fp32":
                return (
                    f"{where}. This is no overflow of a narrow dtype: the weights have diverged, or the code is wrong."
                )
            then = f"Compute it with --dtype fp32: if that is finite, {self.dtype} has overflowed, else more is wrong."
            if direction == "backward" and self.loss_scale > 1:
                then = f"The forward pass is finite, so the loss scale of {self.loss_scale:g} may be too large. {then}"
            return f"{where}. {then}"
        if self.overflowing_sums:
            names_text = ", ".join(self.overflowing_sums[:3]) + (", ..." if len(self.overflowing_sums) > 3 else "")
            return (
                f"each of {n} micro-batches is finite, but the sum of their gradients overflows {self.dtype} in "
                f"{len(self.overflowing_sums)} parameters: {names_text}."
            )
        if self.dtype != self.training_dtype:
            return (
                f"everything is finite in {self.dtype}, but the run computed in {self.training_dtype}: if it is not "
                f"finite without --dtype, {self.training_dtype} has overflowed; weights and data are sound."
            )
        if self.is_finite:
            return "everything is finite here, as it was in the run, which a spike has stopped: look at the rows."
        left_out = "".join(f"{part}, which was left out, " for part in self.left_out)
        return (
            "everything is finite here, and so is the sum of the gradients, so the values came from somewhere else: "
            f"{left_out}the reduction over ranks, the accumulation of micro-batches in {self.dtype}, another kernel of "
            "the run's device, or faulty hardware."
        )


class Dump:
    """What a stopped step was computed from."""

    def __init__(self, folder: str | Path) -> None:
        """Check the hashes and read the description.

        Raises:
            UserError: the folder is no dump but a checkpoint or something else, or it is damaged.
        """
        self.folder = Path(folder)
        for name in ("manifest.json", TRAINER):
            require((self.folder / name).is_file(), f"{folder} is no dump of a stopped step: it has no {name}")
        files = verify(self.folder, checkpoint.FORMAT)
        missing = {"reason", "rows", "is_finite"} - read_json(self.folder / TRAINER, "the description of a dump").keys()
        require(
            not missing,
            f"{folder} is no dump of a stopped step: its trainer.json lacks {sorted(missing)}; a checkpoint has no "
            "batches, a dump is in RUN/dumps",
        )
        self.state = StoppedState.read(self.folder)
        self.world_size = self.state.world_size
        where, config = str(self.folder / TRAINER), self.state.config
        # these sections alone: the others say nothing about the computation
        self.model = build(ResolvedModel, config["model"], where=where)
        self.loss = build(LossConfig, config["loss"], where=where)
        engine = build(EngineConfig, config["engine"], where=where)
        self.dtype, self._sequence_size = engine.dtype, engine.sequence_ranks
        self._names = [checkpoint.file_name(rank) for rank in range(self.world_size)]
        lost = [name for name in self._names if name not in files]
        require(not lost, f"{folder}: world_size={self.world_size}, but manifest.json lacks {lost}: copy it again")
        self._reader = checkpoint.Reader(self.folder)
        self._files = [safe_open(self.folder / name, framework="pt") for name in self._names]
        for name, file in zip(self._names, self._files):
            require("batch.0.tokens" in file.keys(), f"{folder} is no dump of a stopped step: {name} has no batches")

    def master(self, name: str) -> Tensor:
        """Return a parameter in fp32, put together from the pieces of all ranks."""
        size = shape(name, self.model)
        return self._reader.read("master", Segment.whole(name, axes(name).role, size)).view(size)

    def n_targets(self) -> int:
        """Target tokens of the whole step, over all ranks and micro-batches."""
        return sum(batch.n_targets for rank in self.with_rows(range(self.world_size)) for batch in self.batches(rank))

    def with_rows(self, ranks: Iterable[int]) -> list[int]:
        """Return the ranks whose rows are those of `ranks`: of some that share rows, the first one."""
        return sorted({rank - rank % self._sequence_size for rank in ranks})

    def batches(self, rank: int) -> Iterator[Batch]:
        """Yield the micro-batches of a rank in their order; their `samples` are not in the dump."""
        file, i = self._files[rank], 0
        while f"batch.{i}.tokens" in file.keys():
            fields = {name: file.get_tensor(f"batch.{i}.{name}") for name in ("tokens", "targets", "positions")}
            n_targets = int((fields["targets"] != IGNORED).sum())
            cu_seqlens = file.get_tensor(f"batch.{i}.cu_seqlens")
            yield Batch(**fields, cu_seqlens=cu_seqlens, n_targets=n_targets, samples=[])
            i += 1

    def row_names(self, rank: int, micro_batch: int, chosen: list[int]) -> list[Any]:
        """Where rows `chosen` of a micro-batch come from; rows of mere padding come from nowhere."""
        names = self.state.rows[str(rank)][micro_batch]
        return [names[i] for i in chosen if i < len(names)]


def replay(
    dump: Dump,
    *,
    device: torch.device,
    dtype: str | None = None,
    ranks: list[int] | None = None,
    report: Callable[[MicroBatch], None] = lambda _: None,
) -> Replay:
    """Compute the step of a dump again, with the micro-batches of `ranks` (default: all).

    Args:
        dtype: a key of `device.DTYPES` (default: that of the training).
        report: called with each micro-batch when it is done.

    Raises:
        UserError: the dump has no such rank.
    """
    dtype = dtype or dump.dtype
    for rank in ranks or []:
        require(0 <= rank < dump.world_size, f"--rank {rank}: the dump has ranks 0 to {dump.world_size - 1}")
    everybody = dump.with_rows(range(dump.world_size))
    chosen = dump.with_rows(ranks) if ranks else everybody
    model, notes = _model(dump, device, DTYPES[dtype])
    loss, left_out = dump.loss, []
    if len(chosen) < len(everybody):
        left_out.append(f"the work of {len(everybody) - len(chosen)} of {len(everybody)} ranks")
    if loss.emo:
        loss = replace(loss, emo=False, emo_max_ratio=LossConfig().emo_max_ratio)
        left_out.append("EMO (loss.emo)")
        notes.append(
            "EMO is left out, since the dump has no frozen head: losses and gradients are those of loss.emo=false"
        )
    bad_weights, bad_notes = _bad_weights(dump, model, dtype)
    watch = _Watch(dump, model, bad_weights)
    factor = dump.state.loss_scale * dump.world_size / torch.tensor(max(1, dump.n_targets()), dtype=torch.float64)
    scale = factor.to(device).float()

    micro_batches: list[MicroBatch] = []
    overflowing_sums: list[str] = []
    is_sum_whole = True
    for rank in chosen:
        for i, batch in enumerate(dump.batches(rank)):
            watch.start(rank, i, batch.tokens.shape)
            boundaries = None if batch.boundaries is None else batch.boundaries.to(device)
            inputs = batch.tokens.to(device), batch.positions.to(device), boundaries, batch.targets.to(device)
            losses = model(*inputs, gradient_scale=scale, loss=loss)
            if watch.finding is None:
                (losses.objective * scale).backward()
            cross_entropy = float(losses.cross_entropy) / max(1, batch.n_targets)
            loss_or_none = cross_entropy if math.isfinite(cross_entropy) else None
            done = MicroBatch(rank=rank, micro_batch=i, loss=loss_or_none, finding=watch.finding)
            micro_batches.append(done)
            report(done)
            is_sum_whole = is_sum_whole and watch.finding is None
            if is_sum_whole and not overflowing_sums:
                # autograd has added up the gradients of all micro-batches so far, in the dtype of the weights
                overflowing_sums = [name for name, p in model.named_parameters() if not _is_finite(p.grad)]
            else:
                model.zero_grad()
    return Replay(
        dtype=dtype, training_dtype=dump.dtype, left_out=left_out, loss_scale=dump.state.loss_scale,
        notes=notes + bad_notes, micro_batches=micro_batches, is_finite=dump.state.is_finite,
        overflowing_sums=overflowing_sums if is_sum_whole else [],
    )  # fmt: skip


def _model(dump: Dump, device: torch.device, dtype: torch.dtype) -> tuple[Decoder, list[str]]:
    """Return the decoder with the masters in `dtype`, and a note on its attention when it is not the training's."""
    config, notes = dump.model, []
    arguments = device.type, dtype, config.head_width, config.value_width
    backend: Backend
    try:
        backend, _ = choose_backend(config.attention.backend, *arguments)
    except UserError as error:
        backend, _ = choose_backend("auto", *arguments)
        notes.append(f"the attention is {backend}: {error}")
    with torch.device(device):
        model = Decoder(config, backend).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(dump.master(name))
    return model.train(), notes


def _is_finite(x: Tensor | None) -> bool:
    return x is None or bool(x.isfinite().all())


def _largest(tensors: list[Tensor]) -> float | None:
    """The largest finite magnitude, None when there is no finite number."""
    parts = [x[x.isfinite()].abs() for x in (x.detach() for x in tensors)]
    return max((float(x.max()) for x in parts if x.numel()), default=None)


def _activations(args: tuple) -> list[Tensor]:
    """A module's inputs, without constants such as the attention factor and the loss's scale."""
    return [x for x in args if isinstance(x, Tensor) and x.requires_grad]


@dataclass(frozen=True, kw_only=True)
class _Bad:
    """A tensor that is not finite: the fields of a `Finding` that do not depend on the place in the step."""

    name: str
    what: str
    n_nan: int
    n_inf: int
    n_elements: int
    largest_input: float | None


def _describe(name: str, what: str, x: Tensor, inputs: list[Tensor]) -> _Bad:
    """Count the elements of x, which was computed from `inputs`."""
    n_nan, n_inf = int(x.isnan().sum()), int(x.isinf().sum())
    return _Bad(name=name, what=what, n_nan=n_nan, n_inf=n_inf, n_elements=x.numel(), largest_input=_largest(inputs))


def _bad_weights(dump: Dump, model: Decoder, dtype: str) -> tuple[dict[str, _Bad], list[str]]:
    """Return the weights that are not finite by the module that has them, and a note on each."""
    by_module: dict[str, _Bad] = {}
    notes = []
    for name, p in model.named_parameters():
        if not _is_finite(p):
            master = dump.master(name)
            weight = _describe(name, f"weight cast to {dtype}" if _is_finite(master) else MASTER, p, [master])
            counts = f"{weight.n_nan} NaN and {weight.n_inf} Inf of {weight.n_elements} elements"
            notes.append(f"{name}: {weight.what} has {counts}")
            for owner, module in model.named_modules():
                if any(q is p for q in module.parameters(recurse=False)):  # a tied head has the embedding's
                    by_module.setdefault(owner, weight)
    return by_module, notes


class _Watch:
    """Hooks on every module and parameter of a decoder that keep the first non-finite value of a micro-batch."""

    def __init__(self, dump: Dump, model: Decoder, bad_weights: dict[str, _Bad]) -> None:
        self._dump, self._bad_weights = dump, bad_weights
        self._running: list[tuple[str, list[Tensor]]] = []
        """The modules that are in their forward pass, the innermost last, with their inputs."""
        self._arriving: dict[str, list[Tensor]] = {}
        """The largest magnitude in the gradient of each module's output, on the device: a list for `_look`."""
        for name, module in model.named_modules():
            module.register_forward_pre_hook(partial(self._enter, name or "decoder"))
            module.register_forward_hook(partial(self._leave, name or "decoder"))
        for name, p in model.named_parameters():
            # the gradient of this micro-batch alone, before autograd adds it to the sum
            p.register_hook(partial(self._take_gradient, name.rpartition(".")[0], name, "gradient"))

    def start(self, rank: int, micro_batch: int, batch_shape: torch.Size) -> None:
        self.finding: Finding | None = None
        self._rank, self._micro_batch, self._batch_shape = rank, micro_batch, batch_shape
        self._arriving.clear()

    def _enter(self, name: str, module: nn.Module, args: tuple) -> tuple:
        for x in _activations(args):
            caller, inputs = self._running[-1]
            self._look("forward", caller, f"input that it makes for {name}", x, inputs)
        self._running.append((name, _activations(args)))
        return tuple(self._own(name, x) if isinstance(x, Tensor) and x.requires_grad else x for x in args)

    def _own(self, name: str, x: Tensor) -> Tensor:
        """Return x as a tensor whose gradient is what this module returns, without that of x's other uses."""
        x = x.view_as(x)
        x.register_hook(partial(self._take_gradient, name, name, "gradient of its input"))
        return x

    def _leave(self, name: str, module: nn.Module, args: tuple, output: Any) -> None:
        _, inputs = self._running.pop()
        caller = self._running[-1][0] if self._running else name
        for x in output if isinstance(output, tuple) else (output,):
            self._look("forward", name, "output", x, inputs)
            if x.requires_grad:
                x.register_hook(partial(self._give_gradient, caller, name))

    def _give_gradient(self, caller: str, name: str, gradient: Tensor) -> None:
        self._take_gradient(caller, caller, f"gradient that it adds up for the output of {name}", gradient)
        self._arriving[name] = [torch.linalg.vector_norm(gradient, torch.inf)]

    def _take_gradient(self, source: str, name: str, what: str, gradient: Tensor) -> None:
        """Look at a gradient that the module `source` has computed."""
        self._look("backward", name, what, gradient, self._arriving.get(source, []))

    def _look(self, direction: Direction, name: str, what: str, x: Tensor, inputs: list[Tensor]) -> None:
        if self.finding is not None or _is_finite(x):
            return
        rows = list(range(self._batch_shape[0]))
        if what != "gradient" and x.shape[:2] == self._batch_shape:
            rows = (~x.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        bad = self._bad_weights.get(name) or _describe(name, what, x, inputs)
        names = self._dump.row_names(self._rank, self._micro_batch, rows)
        self.finding = Finding(
            rank=self._rank, micro_batch=self._micro_batch, direction=direction, **vars(bad), rows=names
        )
