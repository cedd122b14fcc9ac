"""One optimizer step under DeepSpeed: build, forward and backward, and the step that all ranks take together.

This file and zero.py alone know DeepSpeed. DeepSpeed holds weights, gradients and masters as the ZeRO stage says,
reduces gradients, and gathers weights. Its own step is replaced, so that it does not check for non-finite values, scale
the loss, clip, set the learning rate, or move weights: it would do each of these in silence, and differently by stage
and precision. They are ours (megakexue/run/guard.py, megakexue/core/optim.py).

One step:
    1. the global number of target tokens is known before the first backward, so the loss of each micro-batch is its
       sum times loss_scale * world_size / n_targets (DeepSpeed averages over ranks);
    2. after the last backward one all-reduce gives every rank the same loss, and of every parameter the square of the
       gradient's norm and Tiger's sums, in float64, so that none depends on how ZeRO cut the tensors;
    3. the guard decides from them, before anything has changed; the optimizer moves the masters, or does not;
    4. DeepSpeed's gradients are cleared, and its weights are the masters, cast, again.
With `optim.accumulate: momentum` 2 happens after each backward, and the gradient goes into the momentum where it is
finite, which is decided on the device.

What must stay true: masters are float32; module weights are the masters, cast, after every load and every step.
"""

import atexit
import ctypes
import gc
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megakexue import dist
from megakexue.config import EngineConfig, ResolvedConfig, Status, require
from megakexue.core.attention import choose_backend
from megakexue.core.axes import axes, matrix_shapes, parameter_names, shape
from megakexue.core.batch import Batch
from megakexue.core.costs import flops_per_token
from megakexue.core.decoder import Block, Cache, Decoder, centre, initial_weight
from megakexue.core.device import DTYPES, find_device, has_compiler
from megakexue.core.entropy import Observer
from megakexue.core.loss import Losses, unit_rows
from megakexue.core.muon import Matrices
from megakexue.core.optim import N_STATISTICS, Optimizer, Sums
from megakexue.core.schedule import clip_factor
from megakexue.core.segments import Segment, cut_rows
from megakexue.core.sequence import Sequence
from megakexue.run.by_source import RowLosses
from megakexue.run.clock import Clock
from megakexue.run.guard import Guard
from megakexue.run.records import AttentionStatistics
from megakexue.run.rendezvous import join
from megakexue.run.zero import STAGES, OwnGradients

COMPILE_FROM = 1e15
"""FLOP a rank from which `auto` compiles on a CPU: hours of work, of which compiling saves a quarter."""
LOAD_ELEMENTS = 2**21
"""Of a segment that are read at a time: 8 MiB."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    loss: float
    """Mean cross-entropy over the target tokens of all ranks, in nats, without z-loss or EMO."""
    grad_norm: float
    """Before clipping. With `optim.accumulate: momentum`, the root mean square of the micro-batches' own."""
    n_targets: int
    status: Status
    note: str | None
    """What the guard has to say about this step."""
    reason_to_stop: str | None
    """Why the guard wants this step to be the last; None: training goes on."""
    bad_loss_ranks: list[int] = field(default_factory=list)
    """Ranks whose own loss was not finite."""
    bad_gradient_ranks: list[int] = field(default_factory=list)
    """Ranks whose own loss was finite, but not their own gradient, before it was added to those of others."""
    bad_tensors: list[str] = field(default_factory=list)
    """Parameters whose gradient was not finite, in the model's order."""
    statistics: dict[str, list[float]] | None = None
    """Where asked for: the sums of `optim.N_STATISTICS` of each parameter."""
    n_drifting_rows: int = 0
    """Where statistics were asked for: see `Optimizer.n_drifting_rows`."""
    attention: list[AttentionStatistics] = field(default_factory=list)
    """Where asked for, by layer."""
    largest_logit: float | None = None
    """Where asked for: of the output."""

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(kw_only=True)
class _Gradient:
    """What the micro-batches of a step come to, the same on all ranks but for the pieces, on the device."""

    pieces: list[Tensor]
    """The reduced gradient, flat, as the masters of this rank lie; with `accumulate: momentum`, of the last
    micro-batch."""
    sums: Sums
    """Of the squares of these pieces."""
    weights: Sums
    """Of the squares of the masters."""
    factor: Tensor
    """What the pieces are multiplied with: loss scale and clipping in one."""
    loss: Tensor
    """The summed cross-entropy of all ranks, float64."""
    own_loss: Tensor
    """Of this rank."""
    squares: Tensor
    """Of each parameter, of the mean gradient times the loss scale, float64."""
    is_bad: Tensor
    """For each parameter, whether a gradient of it may not be used."""


class _NoOptimizer(torch.optim.Optimizer):
    """What DeepSpeed is told the optimizer is: it holds the parameters, and its step does nothing."""

    def __init__(self, parameters: Iterator[torch.nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.0})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does, whose own method imports its compiler: two seconds of each start."""
        self.param_groups.append(self.defaults | param_group | {"params": list(param_group["params"])})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


def start(config: EngineConfig, facts: dict[str, str] | None = None) -> dist.Ranks:
    """Join the world: set up the environment, DeepSpeed's quiet start, and the process group.

    Args:
        facts: what must be equal on all ranks, from `facts.host_facts`; None: what torch knows is compared alone.

    Raises:
        UserError, NotAllHere: the launcher says too little or what cannot be; or as `rendezvous.join`.
    """
    os.environ |= dist.read_environment()
    ranks = dist.read_ranks()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    # the decorator of an optimizer that we do not use: it imports torch's compiler, for two seconds
    deepspeed.runtime.compiler.compile = lambda: deepspeed.runtime.compiler.dummy_decorator
    # about what they call themselves, which no user can change
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed)\b")
    if get_accelerator().device_name() == "cpu":
        # otherwise the first start compiles a C++ op for minutes, and a kill meanwhile leaves a lock that hangs others
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # true of fused kernels only: plain fp16 works on any CPU, slowly
        get_accelerator().is_fp16_supported = lambda: True
        _keep_freed_memory()
        # numbers below 1e-38 make arithmetic a hundred times slower, and AdamW's moments of rare rows decay to them
        torch.set_flush_denormal(True)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks.local_world_size))
    else:
        torch.cuda.set_device(find_device(index=ranks.local_rank))
    if not torch.distributed.is_initialized():
        join(ranks, dict(facts or {}), get_accelerator().communication_backend_name(), config)
    deepspeed.init_distributed(verbose=False)  # takes the group that is there
    # a garbage collection need not look at what is imported: stage 3 collects when it starts, which took a second
    gc.freeze()
    atexit.register(gc.unfreeze)  # or libraries complain that their objects outlive the interpreter
    return replace(ranks, sequence_size=config.sequence_ranks)


def _keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next tensors, up to 32 MiB each, the most that it takes.

    It would give it back to the system, and get fresh pages, which the system fills with zeros: a sixth of a step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc's, with the numbers of M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
        mallopt(-1, -1)
        mallopt(-3, 2**25)


def deepspeed_config(config: ResolvedConfig, n_micro_batches: int) -> dict[str, Any]:
    """Return the DeepSpeed dictionary: everything that is ours is switched off in it."""
    stage, dtype, bucket = config.engine.zero_stage, config.engine.dtype, config.engine.bucket_elements
    zero: dict[str, Any] = {"stage": stage}
    if stage in (1, 2):
        # reduced to the owner instead of summed everywhere: 4 bytes a parameter on the wire instead of 6
        zero |= {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket,
                 "use_multi_rank_bucket_allreduce": False, "compute_grad_norm": False}  # fmt: skip
    if stage == 3:
        zero |= {"reduce_bucket_size": bucket, "stage3_prefetch_bucket_size": bucket // 10}
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        # absorbed into the momentum, each micro-batch is reduced as a step of its own
        "gradient_accumulation_steps": 1 if config.optim.accumulate == "momentum" else n_micro_batches,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "steps_per_print": 2**62,
        # a static loss scale of 1 and no check: the guard owns both
        "bf16": {"enabled": dtype == "bf16", "check_grad_overflow": False},
        "fp16": {"enabled": dtype == "fp16", "loss_scale": 1.0},
    }


def choose_compile(config: ResolvedConfig, device: torch.device, world_size: int) -> tuple[bool, str]:
    """Return whether the model is compiled, and the reason, which a run prints at its start.

    It depends on the config and the machine alone, so that a run that is started again computes the same bits.

    Raises:
        UserError: the config asks for it, and there is no compiler.
    """
    setting = config.engine.compile
    if setting == "off" or (device.type == "cuda" and setting == "on"):
        return setting == "on", "engine.compile"
    if device.type == "cuda":
        return True, "the default on a GPU"
    if setting == "on":
        require(has_compiler(), "engine.compile=on needs a C++ compiler, and there is no g++: install it, or use auto")
        return True, "engine.compile"
    tokens = config.batch_tokens * config.train.steps / world_size
    flops = tokens * flops_per_token(config.model, (config.data.seq_len + 1) / 2)
    if flops < COMPILE_FROM:
        return False, f"{flops:.1e} FLOP a rank are too few to earn the compiler's minute"
    return (True, f"{flops:.1e} FLOP a rank earn it") if has_compiler() else (False, "there is no C++ compiler, g++")


class Engine:
    """A decoder under DeepSpeed. Weights are undefined until `load`."""

    def __init__(self, config: ResolvedConfig, ranks: dist.Ranks) -> None:
        import deepspeed

        self.config, self.ranks, self.device = config, ranks, find_device(index=ranks.local_rank)
        self.clock = Clock(self.device)
        self.dtype = DTYPES[config.engine.dtype]
        self.guard = Guard(config.guard, config.engine.dtype)
        self.n_micro_batches = config.train.n_micro_batches(ranks.data_size)
        self.deepspeed_config = deepspeed_config(config, self.n_micro_batches)
        model = config.model
        where = self.device.type, self.dtype, model.head_width, model.value_width
        backend, self.backend_reason = choose_backend(model.attention.backend, *where)
        partitioned = config.engine.zero_stage == 3
        build = deepspeed.zero.Init(config_dict_or_path=self.deepspeed_config) if partitioned else self.device
        with build, torch.device(self.device) if partitioned else nullcontext():
            module = Decoder(model, backend)
        parameters = dict(module.named_parameters())
        # what one rank adds up is its own
        self._own_gradients = OwnGradients(parameters.values()) if ranks.world_size > 1 else None
        self.is_compiled, self.compile_reason = choose_compile(config, self.device, ranks.world_size)
        options = config.engine
        module.set_recompute(options.recompute, offload=options.recompute_offload, tile_tokens=options.tile_tokens)
        if self.is_compiled:  # before DeepSpeed, which wraps what it finds
            module.compile_parts()
        if partitioned:
            # gathered block by block: the hooks of smaller modules would break graphs, run again where the forward pass
            # does, and change the order in which gradients are added up
            deepspeed.utils.set_z3_leaf_modules(module, [Block])
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=_NoOptimizer(module.parameters()), config=self.deepspeed_config
        )
        self.module: Decoder = self._engine.module
        names = {id(p): name for name, p in parameters.items()}

        def make(p: Tensor, start: int, stop: int, flat: int, offset: int) -> Segment:
            name = names[id(p)]
            role, size = axes(name).role, shape(name, model)
            return Segment(name=name, role=role, shape=size, start=start, stop=stop, flat=flat, offset=offset)

        layout = self._layout = STAGES[config.engine.zero_stage](self._engine, make, parameters, ranks)
        self._engine.optimizer.step = layout.clear
        # what DeepSpeed calls when the last gradient is there: all of the reduction at stage 0, else the last buckets
        self._engine.allreduce_gradients = self.clock.within("reduction")(self._engine.allreduce_gradients)
        self.segments = layout.segments
        of_ranks = dist.gather({str(ranks.rank): cut_rows(self.segments)})
        cut = sorted({row for rows in of_ranks.values() for row in rows})
        tensors = self.segments, layout.flats
        matrices = self._matrices() if config.optim.name == "muon" else None
        self.optimizer = Optimizer(config.optim, *tensors, parameter_names(model), cut, layout.shares, matrices)
        self._sequence: Sequence | None = None
        if ranks.sequence_size > 1:
            swap = dist.sequence_swap(ranks, config.engine.timeout_s)
            self._sequence = Sequence(rank=ranks.sequence_rank, size=ranks.sequence_size, swap=swap)
        self._copies = torch.cuda.Stream() if self.device.type == "cuda" else None
        self._emo_rows: Tensor | None = None
        self._observer: Observer | None = None
        self._readers: list[Callable[[], None]] = []
        self.row_losses: list[RowLosses] = []
        """Of the micro-batches of the last step or validation, for `by_source.add_up`."""
        self.mark: Callable[..., None] = lambda *_: None
        """Is told what phase of a step begins, as `Watch.mark`."""

    def _matrices(self) -> Matrices:
        """Tell all ranks which elements of matrices each has."""
        shapes, ranks = matrix_shapes(self.config.model), self.ranks
        own = {s.name: [s.start, s.stop] for s in self.segments}
        held = torch.zeros(len(shapes), ranks.world_size, 2, dtype=torch.long)
        held[:, ranks.rank] = torch.tensor([own.get(name, [0, 0]) for name in shapes])
        held = dist.sum_over_ranks(held.to(self.device)).cpu()
        limit = self.config.engine.bucket_elements
        return Matrices(rank=ranks.rank, shapes=shapes, held=held, swap=dist.exchange, limit=limit)

    @property
    def is_sharded(self) -> bool:
        """Whether ranks hold different segments; at stage 0 all hold everything."""
        return self.config.engine.zero_stage > 0

    def state_tensors(self) -> Iterator[tuple[Segment, dict[str, Tensor]]]:
        """Yield each segment of this rank with its `master` and the optimizer's state tensors."""
        for segment, master, state in zip(self.segments, self.optimizer.masters, self.optimizer.state):
            yield segment, {"master": master} | state

    def before_next_change(self, wait: Callable[[], None]) -> None:
        """Call `wait` once before masters or state change next: it waits for somebody who is still reading them."""
        self._readers.append(wait)

    def _wait_for_readers(self) -> None:
        if self._readers:
            with self.clock.within("saving"):
                while self._readers:
                    self._readers.pop()()

    # --- weights ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def load(self, read: Callable[[str, Segment], Tensor], *, with_state: bool = False) -> None:
        """Fill the masters from `read("master", segment)`, the module's weights from them, and compare both.

        The one way to start: fresh, resumed, from a bundle or grown. Weights put into the module itself would be
        reverted by the first step, since DeepSpeed's masters would be stale. A long segment is read in parts, so that
        no host needs room for more than its own share.

        Args:
            with_state: fill the optimizer's state tensors too; otherwise they stay as they are.
        """
        self._wait_for_readers()
        for segment, views in self.state_tensors():
            for kind, view in views.items():
                if kind == "master" or with_state:
                    for part, target in zip(segment.split(LOAD_ELEMENTS), view.split(LOAD_ELEMENTS), strict=True):
                        value = read(kind, part)
                        assert value.numel() == part.numel, f"{kind} of {part} was given {value.numel()} elements"
                        target.copy_(value.reshape(-1))
        self.optimizer.masters_changed()
        for master, share in zip(self._layout.flats, self._layout.shares):
            if share is not None:
                share.copy_(master)
        self._layout.gather()
        self.check_weights()

    def load_new(self, seed: int) -> None:
        """Load the initial weights of `seed`, with one whole tensor in memory at a time."""
        whole: dict[str, Tensor] = {}

        def read(kind: str, segment: Segment) -> Tensor:
            if segment.name not in whole:  # the parts of a parameter follow one another
                whole.clear()
                whole[segment.name] = initial_weight(segment.name, self.config.model, seed).view(-1)
            return whole[segment.name][segment.start : segment.stop]

        self.load(read)

    @torch.no_grad()
    def check_weights(self) -> None:
        """Assert on every rank that the module's weights are its masters, cast."""
        for segment in self.segments:
            for view in self._layout.weights(segment):
                for part, weight in zip(segment.split(LOAD_ELEMENTS), view.split(LOAD_ELEMENTS), strict=True):
                    own = part.of(self._layout.flats[part.flat])
                    assert torch.equal(weight, own.to(weight.dtype)), f"stale weights: {part}"

    def compare_tokens_by(self, head: Tensor) -> None:
        """Keep the rows of a head [v, m], at length 1, by which `loss.emo` compares tokens while the head trains on."""
        self._emo_rows = unit_rows(head).to(self.device, self.dtype)

    # --- one optimizer step ----------------------------------------------------------------------------------------

    def train_step(
        self, batches: list[Batch], lr: float, step: int, *, statistics: bool = False,
        between: Callable[[], Any] = lambda: None,
    ) -> StepResult:  # fmt: skip
        """Take the micro-batches of one optimizer step, and do what the guard says.

        Args:
            between: called between micro-batches as long as nothing has changed; may raise to give the step up.
        """
        assert len(batches) == self.n_micro_batches
        self.clock.enter("reduction")
        whole = batches[0].targets
        batches = [self._part(batch) for batch in batches]
        self._observer = Observer(whole, batches[0].targets, self.device) if statistics else None
        self.row_losses.clear()
        self._engine.train()
        if self._own_gradients:
            self._own_gradients.begin_step()
        counts = torch.tensor(sum(batch.n_targets for batch in batches), dtype=torch.float64, device=self.device)
        # stays on the device, so that the forward pass need not wait for the number
        n_targets = dist.sum_over_ranks(counts).clamp(min=1)
        loss_scale = self.guard.loss_scale
        scale = (loss_scale * self.ranks.world_size / n_targets).float()
        if self.config.optim.accumulate == "momentum":
            gradient = self._absorbed(batches, scale)
        else:
            gradient = self._summed(batches, scale, between)
        self.mark("the end of the backward pass")
        # the one time that the host waits for the device
        numbers = torch.cat([gradient.loss[None], n_targets[None], gradient.squares, gradient.is_bad]).tolist()
        self.clock.enter("other")
        loss_sum, count, *of_parameters = numbers
        names = self.optimizer.names
        squares, is_bad = of_parameters[: len(names)], of_parameters[len(names) :]
        loss, grad_norm = loss_sum / count, sum(squares) ** 0.5 / loss_scale
        decision = self.guard.decide(loss, grad_norm, step)
        result = StepResult(
            loss=loss, grad_norm=grad_norm, n_targets=int(count), status=decision.status, note=decision.note,
            reason_to_stop=decision.reason_to_stop,
        )  # fmt: skip
        to_shrink = [name for name, flag in zip(names, is_bad) if flag]
        result = self._update(result, gradient, lr, to_shrink, statistics=statistics)
        if not result.is_finite:
            by_loss, by_gradient = self._bad_ranks(gradient.own_loss, math.isfinite(grad_norm))
            # the squares say it, for what may not be used depends on the policy
            tensors = [name for name, square in zip(names, squares) if not math.isfinite(square)]
            result = replace(result, bad_tensors=tensors, bad_loss_ranks=by_loss, bad_gradient_ranks=by_gradient)
        return result

    def _bad_ranks(self, own_loss: Tensor, is_finite: bool) -> tuple[list[int], list[int]]:
        """Return the ranks whose own loss is not finite, and those with a finite one whose own gradient is not.

        Args:
            is_finite: whether the gradient of all ranks is.
        """
        is_bad = not own_loss.isfinite(), not (self._own_gradients.are_finite() if self._own_gradients else is_finite)
        of_ranks = {int(rank): bad for rank, bad in dist.gather({str(self.ranks.rank): is_bad}).items()}
        by_loss = [rank for rank, (loss, _) in of_ranks.items() if loss]
        return by_loss, [rank for rank, (loss, gradient) in of_ranks.items() if gradient and not loss]

    def _summed(self, batches: list[Batch], scale: Tensor, between: Callable[[], Any]) -> _Gradient:
        """Let DeepSpeed add the micro-batches' gradients up, and reduce their sum."""
        own_loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for i, batch in enumerate(batches):
            self.mark("micro-batch", f" {i + 1} of {len(batches)}")
            own_loss += self._backward(batch, scale)
            if i < len(batches) - 1:
                self._engine.step()  # counts the micro-step
                between()
        pieces = self._layout.gradients()
        sums, weights = self.optimizer.gradient_sums(pieces), self.optimizer.weight_sums()
        loss = self._add_over_ranks(own_loss, sums, weights)
        squares = sums.total[: len(self.optimizer.names)]
        is_good = self._is_good(loss, squares)
        return _Gradient(
            pieces=pieces, sums=sums, weights=weights, factor=self._gradient_factor(squares, is_good), loss=loss,
            own_loss=own_loss, squares=squares, is_bad=~is_good,
        )  # fmt: skip

    def _absorbed(self, batches: list[Batch], scale: Tensor) -> _Gradient:
        """Reduce each micro-batch as a step of its own, and take it into the momentum where it is finite (8634)."""
        n, names = len(batches), self.optimizer.names
        own_loss, loss = torch.zeros(2, dtype=torch.float64, device=self.device)
        mean_squares = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        is_bad = torch.zeros(len(names), dtype=torch.bool, device=self.device)
        for i, batch in enumerate(batches):
            self.mark("micro-batch", f" {i + 1} of {n}")
            cross_entropy = self._backward(batch, scale)
            own_loss += cross_entropy
            pieces = self._layout.gradients()
            sums = self.optimizer.gradient_sums(pieces)
            weights = self.optimizer.weight_sums() if i == n - 1 else None
            loss_of_batch = self._add_over_ranks(cross_entropy, sums, weights)
            squares = sums.total[: len(names)] * n**2  # of the mean gradient, as far as this micro-batch shows it
            is_good = self._is_good(loss_of_batch, squares)
            factor = self._gradient_factor(squares, is_good)
            self.clock.enter("optimizer")
            self._wait_for_readers()
            self.optimizer.absorb(pieces, sums, factor, is_good)
            loss += loss_of_batch
            mean_squares += squares / n
            is_bad |= ~is_good
            if i < n - 1:
                del pieces
                self._engine.step()  # clears the gradient that the momentum has
        self.clock.enter("reduction")
        assert weights is not None
        return _Gradient(
            pieces=pieces, sums=sums, weights=weights, factor=factor, loss=loss, own_loss=own_loss,
            squares=mean_squares, is_bad=is_bad,
        )  # fmt: skip

    def _update(
        self, result: StepResult, gradient: _Gradient, lr: float, to_shrink: list[str], *, statistics: bool
    ) -> StepResult:
        """Move the masters if the step is to be taken, free the gradients, and make the weights the masters again."""
        self.mark("the optimizer")
        self.clock.enter("optimizer")
        is_taken, sums = result.status in ("applied", "shrunk"), None
        self._wait_for_readers()
        if is_taken:
            ratio = self.config.guard.shrink_ratio
            shrink = {name: (centre(name, self.config.model), ratio) for name in to_shrink}
            assert bool(shrink) == (result.status == "shrunk")
            sums = self.optimizer.step(
                gradient.pieces, gradient.weights, gradient.sums, lr=lr, factor=gradient.factor, shrink=shrink,
                statistics=statistics and not shrink,
            )  # fmt: skip
        else:
            self.optimizer.end_window()
        gradient.pieces.clear()
        self._engine.step()
        if is_taken:
            self._layout.gather()
        self.clock.enter("other")
        return result if sums is None else self._with_statistics(result, sums)

    def _backward(self, batch: Batch, scale: Tensor) -> Tensor:
        """Take a micro-batch through the model and back; return the sum of its cross-entropy, float32."""
        options = {"gradient_scale": scale, "loss": self.config.loss, "emo_rows": self._emo_rows}
        options |= {"sequence": self._sequence, "observer": self._observer}
        self.clock.enter("forward")
        losses = self._engine(*self._inputs(batch), **options)
        if self._observer:  # not what is computed again, and no other micro-batch
            self._observer.is_open = False
        self.clock.enter("backward")
        self._engine.backward(losses.objective * scale, scale_wrt_gas=False)
        self.clock.enter("reduction")
        self._keep_rows(batch, losses)
        return losses.cross_entropy

    def _keep_rows(self, batch: Batch, losses: Losses) -> None:
        of_rows = losses.of_tokens.view(batch.targets.shape).sum(1, dtype=torch.float64)
        self.row_losses.append(RowLosses(batch.sources, batch.targets, of_rows))

    def _add_over_ranks(self, loss: Tensor, sums: Sums, weights: Sums | None) -> Tensor:
        """Add up the loss and the sums of all ranks in one all-reduce; return the loss."""
        both = [sums, weights] if weights is not None else [sums]
        totals = torch.cat([s.total for s in both])
        if not self.is_sharded and not self.ranks.is_first:
            totals.zero_()  # every rank holds every tensor: count them once
        summed = dist.sum_over_ranks(torch.cat([loss.double()[None], totals]))
        loss, *totals = summed.split([1] + [len(s.total) for s in both])
        for s, total in zip(both, totals):
            s.total = total
        return loss[0]

    def _is_good(self, loss: Tensor, squares: Tensor) -> Tensor:
        """For each parameter, on every rank alike, whether its gradient may be used."""
        is_good = squares.isfinite() & loss.isfinite()
        # shrink is a matter of single tensors, unless fp16's loss scale was too large for all of them
        if self.config.guard.on_nonfinite != "shrink" or self.guard.scales_loss:
            is_good = is_good.all().expand_as(is_good)
        return is_good

    def _gradient_factor(self, squares: Tensor, is_good: Tensor) -> Tensor:
        """What the gradients are multiplied with: loss scale and clipping in one, by the norm of what is used."""
        norm = torch.where(is_good, squares, 0.0).sum().sqrt() / self.guard.loss_scale
        return clip_factor(self.config.optim, norm) / self.guard.loss_scale

    def _with_statistics(self, result: StepResult, sums: Tensor) -> StepResult:
        # a tied embedding gets a gradient in every row
        drifting = self.optimizer.n_drifting_rows() * (not self.config.model.tie_embeddings)
        total = torch.cat([sums.view(-1), drifting])
        if self.is_sharded:
            dist.sum_over_ranks(total)
        table = dict(zip(self.optimizer.names, total[:-1].view(-1, N_STATISTICS).tolist()))
        result = replace(result, statistics=table, n_drifting_rows=int(total[-1].item()))
        return self._with_attention(result) if result.is_finite else result

    def _with_attention(self, result: StepResult) -> StepResult:
        assert self._observer is not None
        sums = dist.sum_over_ranks(self._observer.sums())
        largest = dist.max_over_ranks(self._observer.largest())
        # no rank may have had a target in these rows; and a product may overflow that the loss does not need
        if not (sums.isfinite().all() and largest.isfinite().all()):
            return result
        *of_layers, largest_logit = largest.tolist()
        attention = [
            AttentionStatistics(
                entropy=entropy / n, relative_entropy=relative / max(1.0, n_relative), largest_logit=top
            )
            for (entropy, n, relative, n_relative), top in zip(sums.tolist(), of_layers, strict=True)
        ]
        return replace(result, attention=attention, largest_logit=largest_logit)

    # --- evaluation ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluation_loss(self, batch: Batch) -> Tensor:
        """Return the sum of the cross-entropy of this rank's part of a micro-batch, float32, on its device."""
        self._engine.eval()
        batch = self._part(batch)
        losses = self._engine(*self._inputs(batch), sequence=self._sequence)
        self._keep_rows(batch, losses)
        return losses.cross_entropy

    def validation_loss(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """Return (mean loss in nats, target tokens) over the micro-batches of all ranks, on every rank.

        Sums are float64 and divided once, so the mean does not depend on the number of ranks.

        Args:
            batches: as many on each rank, such as `Batches.first_rows` yields.
        """
        self.row_losses.clear()
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in batches:
            loss = self.evaluation_loss(batch)
            total += torch.stack([loss.double(), loss.new_tensor(self._part(batch).n_targets, dtype=torch.float64)])
        loss_sum, n_tokens = dist.sum_over_ranks(total).tolist()
        return loss_sum / max(1, n_tokens), int(n_tokens)

    @torch.no_grad()
    def continued(self, prompts: list[list[int]], n_tokens: int, vocab_size: int) -> list[list[int]]:
        """Return the `n_tokens` most probable tokens, one after the other, that follow each prompt.

        All ranks compute it, through the same collectives: none stops early, since hosts that round differently might
        choose other tokens. It is eager, also where blocks are compiled.

        Args:
            vocab_size: of the tokenizer; ids from there on are never chosen.
        """
        self._engine.eval()
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        longest, row = int(lengths.max()), torch.arange(len(prompts), device=self.device)
        # the padding at the right of a prompt is overwritten in the cache before any query sees it
        tokens = torch.tensor([p + p[:1] * (longest - len(p)) for p in prompts], device=self.device)
        positions = torch.arange(longest, device=self.device).expand(len(prompts), -1)
        last, caches, found = lengths - 1, [Cache() for _ in self.module.blocks], []
        for i in range(n_tokens):
            self.mark("samples", f", token {i + 1} of {n_tokens}")
            logits = self._engine(tokens, positions, caches=caches, n_positions=longest + i)
            found.append(logits[row, last, :vocab_size].argmax(-1))
            tokens, positions, last = found[-1][:, None], (lengths + i)[:, None], torch.zeros_like(last)
        return torch.stack(found, dim=1).tolist()

    def _part(self, batch: Batch) -> Batch:
        """The tokens and targets of this rank in rows that it shares with others."""
        return batch.part(self.ranks.sequence_rank, self.ranks.sequence_size)

    def _inputs(self, batch: Batch) -> tuple[Tensor | None, ...]:
        """Tokens, positions, boundaries and targets on the device."""
        host = batch.tokens, batch.positions, batch.boundaries, batch.targets
        if self._copies is None:
            return host
        # the host is a micro-batch ahead of the GPU: on a stream of their own the copies need not wait for its kernels,
        # and from pinned memory the host need not wait for them
        with torch.cuda.stream(self._copies):
            inputs = tuple(x if x is None else x.pin_memory().to(self.device, non_blocking=True) for x in host)
        kernels = torch.cuda.current_stream()
        kernels.wait_stream(self._copies)
        for x in inputs:
            if x is not None:
                x.record_stream(kernels)
        return inputs
