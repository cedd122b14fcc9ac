"""The only file that knows DeepSpeed: build, forward and backward, step, and the segment table for every stage.

What DeepSpeed does for us: it holds weights, gradients and masters as the ZeRO stage says, reduces gradients, and
gathers weights. What it must not do, and cannot, since its own step is replaced: check for non-finite values, scale the
loss, clip, drive the learning rate, or move weights. It would do each of them differently by stage and precision, and
in silence; they are ours (megakexue/guard.py, megakexue/optim.py).

One step:
    1. the global number of target tokens is known before the first backward, so the loss of each micro-batch is its
       sum times loss_scale * world_size / n_targets (DeepSpeed averages over ranks);
    2. after the last backward one all-reduce gives every rank the same loss, and of every parameter the square of the
       gradient's norm and Tiger's sums, in float64, so that none depends on how ZeRO cut the tensors;
    3. the guard decides from them, before anything has changed; the optimizer moves the masters, or does not;
    4. DeepSpeed's gradients are cleared, and its weights are the masters, cast, again.
With `optim.accumulate: momentum` 2 happens after each backward, and the gradient goes into the momentum where it is
finite, which is decided on the device.

What must stay true: every element of every parameter is in exactly one segment over all ranks (stage 0: on every
rank); masters are float32; module weights are the masters, cast, after every load and every step.
"""

import atexit
import gc
import math
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from megakexue import dist
from megakexue.attention import choose_backend
from megakexue.config import Config, EngineConfig, Status
from megakexue.data import Batch
from megakexue.guard import Guard
from megakexue.model import Decoder, axes, centre, initial_weight, parameter_names, shape
from megakexue.optim import N_STATISTICS, Optimizer, Segment, Sums, clip_factor, cut_rows

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
    bad_ranks: list[int] = field(default_factory=list)
    """Ranks whose own loss was not finite."""
    bad_tensors: list[str] = field(default_factory=list)
    """Parameters whose gradient was not finite, in the model's order."""
    statistics: dict[str, list[float]] | None = None
    """Where asked for: the sums of `optim.N_STATISTICS` of each parameter."""
    n_drifting_rows: int = 0
    """Where statistics were asked for: see `Optimizer.n_drifting_rows`."""


class _NoOptimizer(torch.optim.Optimizer):
    """What DeepSpeed is told the optimizer is: it holds the parameters, and its step does nothing."""

    def __init__(self, parameters: Iterator[torch.nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


def start(config: EngineConfig) -> dist.Ranks:
    """Join the world: set up the environment, DeepSpeed's quiet start, and the process group."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    is_alone = dist.set_environment_of_one()
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    if get_accelerator().device_name() == "cpu":
        # otherwise the first start compiles a C++ op for minutes, and a kill meanwhile leaves a lock that hangs others
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # true of fused kernels only: plain fp16 works on any CPU, slowly
        get_accelerator().is_fp16_supported = lambda: True
        # numbers below 1e-38 make arithmetic a hundred times slower, and AdamW's moments of rare rows decay to them
        torch.set_flush_denormal(True)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.read_ranks().local_world_size))
    else:
        torch.cuda.set_device(dist.device())
    timeout = timedelta(seconds=config.timeout_s)
    if is_alone:
        # without a port, since another process that starts at the same moment may take the one that was free
        backend = get_accelerator().communication_backend_name()
        torch.distributed.init_process_group(
            backend, store=torch.distributed.HashStore(), rank=0, world_size=1, timeout=timeout
        )
    deepspeed.init_distributed(timeout=timeout, verbose=False)
    # a garbage collection need not look at what is imported: stage 3 collects when it starts, which took a second
    gc.freeze()
    atexit.register(gc.unfreeze)  # or libraries complain that their objects outlive the interpreter
    return dist.read_ranks()


def deepspeed_config(config: Config, n_micro_batches: int) -> dict[str, Any]:
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


class Engine:
    """A decoder under DeepSpeed. `config.model` must be resolved; weights are undefined until `load`."""

    def __init__(self, config: Config, ranks: dist.Ranks) -> None:
        import deepspeed

        self.config, self.ranks, self.device = config, ranks, dist.device()
        self.dtype = dist.DTYPES[config.engine.dtype]
        self.guard = Guard(config.guard, config.engine.dtype)
        self.n_micro_batches = config.train.n_micro_batches(ranks.world_size)
        self.deepspeed_config = deepspeed_config(config, self.n_micro_batches)
        backend, self.backend_reason = choose_backend(
            config.model.attention.backend,
            self.device.type,
            self.dtype,
            config.model.head_width,
            config.model.value_width,
            config.data.seq_len,
        )
        partitioned = config.engine.zero_stage == 3
        build = deepspeed.zero.Init(config_dict_or_path=self.deepspeed_config) if partitioned else self.device
        with build, torch.device(self.device) if partitioned else nullcontext():
            module = Decoder(config.model, backend)
        named = [(name, p) for name, p in module.named_parameters()]
        self._names = {id(p): name for name, p in named}
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=_NoOptimizer(module.parameters()), config=self.deepspeed_config
        )
        self.module: Decoder = self._engine.module
        self.flats: list[Tensor] = []
        """This rank's flat float32 masters."""
        self.segments: list[Segment] = []
        self._find_segments()
        self._engine.optimizer.step = self._clear_gradients
        masters = [segment.of(self.flats[segment.flat]) for segment in self.segments]
        of_ranks = dist.gather({str(ranks.rank): cut_rows(self.segments)})
        cut = sorted({row for rows in of_ranks.values() for row in rows})
        names = parameter_names(config.model)
        self.optimizer = Optimizer(config.optim, self.segments, masters, names, cut, self.device)
        self.emo_rows: Tensor | None = None
        """With `loss.emo`: the rows of the head that training started from, of length 1."""
        self.before_change: Callable[[], None] = lambda: None
        """Called before masters or state change; waits for who is still reading them."""

    # --- the segment table -----------------------------------------------------------------------------------------

    @property
    def is_sharded(self) -> bool:
        """Whether ranks hold different segments; at stage 0 all hold everything."""
        return self.config.engine.zero_stage > 0

    def _find_segments(self) -> None:
        """Fill `flats` and `segments`, by where DeepSpeed put each parameter."""
        inner = self._engine.optimizer
        if isinstance(inner, _NoOptimizer):  # stage 0, fp32: the parameters themselves
            for group in inner.param_groups:
                for p in group["params"]:
                    self._add_segment(p, 0, p.numel(), len(self.flats), 0)
                    self.flats.append(p)
        elif hasattr(inner, "fp32_groups"):  # stage 0: a whole fp32 copy of each parameter
            for weights, masters in zip(inner.fp16_groups, inner.fp32_groups):
                for p, master in zip(weights, masters):
                    self._add_segment(p, 0, p.numel(), len(self.flats), 0)
                    self.flats.append(master)
        elif hasattr(inner, "single_partition_of_fp32_groups"):  # stages 1, 2: one slice of each group
            for i, flat in enumerate(inner.single_partition_of_fp32_groups):
                whole, size = inner.bit16_groups_flat[i], int(inner.partition_size[i])
                for p in inner.bit16_groups[i]:
                    # a parameter's address in the flat buffer is its offset, whatever the order and the padding
                    at = (p.data_ptr() - whole.data_ptr()) // whole.element_size()
                    low = max(at, self.ranks.rank * size)
                    high = min(at + p.numel(), (self.ranks.rank + 1) * size)
                    if low < high:
                        self._add_segment(p, low - at, high - at, i, low - self.ranks.rank * size)
                self.flats.append(flat)
        else:  # stage 3: each parameter is cut into one equal piece a rank, the last one padded
            assert hasattr(inner, "fp32_partitioned_groups_flat"), f"{type(inner)} has no segment table"
            for i, flat in enumerate(inner.fp32_partitioned_groups_flat):
                offset = 0
                for p in inner.fp16_groups[i]:
                    size = p.partition_numel()
                    low, high = self.ranks.rank * size, min((self.ranks.rank + 1) * size, p.ds_numel)
                    if low < high:
                        self._add_segment(p, low, high, i, offset)
                    offset += size
                self.flats.append(flat)

    def _add_segment(self, p: Tensor, start: int, stop: int, flat: int, offset: int) -> None:
        name = self._names[id(p)]
        segment = Segment(
            name=name, role=axes(name).role, shape=shape(name, self.config.model),
            start=start, stop=stop, flat=flat, offset=offset,
        )  # fmt: skip
        self.segments.append(segment)

    def state_tensors(self) -> Iterator[tuple[Segment, dict[str, Tensor]]]:
        """Yield each segment of this rank with its `master` and the optimizer's state tensors."""
        for segment, master, state in zip(self.segments, self.optimizer.masters, self.optimizer.state):
            yield segment, {"master": master} | state

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
        self.before_change()
        for segment, views in self.state_tensors():
            for kind, view in views.items():
                if kind == "master" or with_state:
                    for part, target in zip(segment.split(LOAD_ELEMENTS), view.split(LOAD_ELEMENTS), strict=True):
                        value = read(kind, part)
                        assert value.numel() == part.numel, f"{kind} of {part} was given {value.numel()} elements"
                        target.copy_(value.reshape(-1))
        self.optimizer.masters_changed()
        self._refresh_module()
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

    def _refresh_module(self) -> None:
        inner = self._engine.optimizer
        if isinstance(inner, _NoOptimizer):
            return
        if hasattr(inner, "fp32_groups"):
            for weights, masters in zip(inner.fp16_groups, inner.fp32_groups):
                for p, master in zip(weights, masters):
                    p.data.copy_(master.data)
        elif hasattr(inner, "single_partition_of_fp32_groups"):
            inner.update_lp_params()
        else:
            # small parameters are kept gathered, and gathering them again would keep the old values
            inner._partition_all_parameters()
            for weights, master in zip(inner.fp16_partitioned_groups_flat, inner.fp32_partitioned_groups_flat):
                weights.data.copy_(master.data)
            for i in range(len(inner.fp16_partitioned_groups_flat)):
                inner._unflatten_partitioned_parameters(i)
            if inner.persistent_parameters:
                inner.persistent_parameters[0].all_gather(inner.persistent_parameters)

    @torch.no_grad()
    def check_weights(self) -> None:
        """Assert on every rank that the module's weights are its masters, cast.

        At stage 3 those are the rank's own pieces, which every gather starts from, and what is kept gathered.
        """
        weights = dict(self.module.named_parameters())
        for segment in self.segments:
            p = weights[segment.name]
            views = [p.view(-1)[segment.start : segment.stop]] if p.numel() else []
            if hasattr(p, "ds_tensor"):
                views.append(p.ds_tensor.view(-1)[: segment.numel])
            assert views, f"no weight of {segment}"
            for view in views:
                for part, weight in zip(segment.split(LOAD_ELEMENTS), view.split(LOAD_ELEMENTS), strict=True):
                    master = part.of(self.flats[part.flat]).to(weight.dtype)
                    assert torch.equal(weight, master), f"stale weights: {part}"

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
        self._engine.train()
        names, in_momentum = self.optimizer.names, self.config.optim.accumulate == "momentum"
        counts = torch.tensor(sum(batch.n_targets for batch in batches), dtype=torch.float64, device=self.device)
        # stays on the device, so that the forward pass need not wait for the number
        n_targets = dist.sum_over_ranks(counts).clamp(min=1)
        loss_scale = self.guard.loss_scale
        scale = (loss_scale * self.ranks.world_size / n_targets).float()
        own_loss, loss = torch.zeros(2, dtype=torch.float64, device=self.device)
        squares = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        is_bad = torch.zeros(len(names), dtype=torch.bool, device=self.device)
        for i, batch in enumerate(batches):
            losses = self._engine(
                *self._inputs(batch), gradient_scale=scale, loss=self.config.loss, emo_rows=self.emo_rows
            )
            self._engine.backward(losses.objective * scale, scale_wrt_gas=False)
            own_loss += losses.cross_entropy
            is_last = i == len(batches) - 1
            gradients: list[Tensor] = []
            if in_momentum or is_last:
                gradients = self._gradients()
                sums = self.optimizer.gradient_sums(gradients)
                weights = self.optimizer.weight_sums() if is_last else None
                new_loss = self._add_over_ranks(losses.cross_entropy if in_momentum else own_loss, sums, weights)
                # of the mean gradient, as far as these micro-batches show it
                new_squares = sums.total[: len(names)] * (len(batches) ** 2 if in_momentum else 1)
                is_good = self._is_good(new_loss, new_squares)
                factor = self._gradient_factor(new_squares, is_good)
                if in_momentum:
                    self.before_change()
                    self.optimizer.absorb(gradients, sums, factor, is_good)
                loss += new_loss
                squares += new_squares / (len(batches) if in_momentum else 1)
                is_bad |= ~is_good
            if not is_last:
                del gradients
                self._engine.step()  # counts the micro-step, and clears a gradient that the momentum has
                if not in_momentum:
                    between()
        loss_total, count, *numbers = torch.cat([loss[None], n_targets[None], squares, is_bad]).tolist()
        loss_mean, grad_norm = loss_total / count, sum(numbers[: len(names)]) ** 0.5 / loss_scale
        status = self.guard.decide(loss_mean, grad_norm, step)
        bad = [name for name, flag in zip(names, numbers[len(names) :]) if flag]
        result = StepResult(
            loss=loss_mean, grad_norm=grad_norm, n_targets=int(count), status=status, note=self.guard.note
        )
        self.before_change()
        if status in ("applied", "shrunk"):
            ratio = self.config.guard.shrink_ratio
            shrink = {name: (centre(name, self.config.model), ratio) for name in bad}
            assert weights is not None and bool(shrink) == (status == "shrunk")
            self.optimizer.step(
                gradients, weights, sums, lr=lr, factor=factor, shrink=shrink, statistics=statistics and not shrink
            )  # fmt: skip
        else:
            self.optimizer.end_window()
        del gradients
        self._engine.step()
        if status in ("applied", "shrunk"):
            self._refresh_module()
            if statistics and status == "applied":
                result = self._with_statistics(result)
        if bad or not math.isfinite(loss_mean):
            flags = dist.gather({str(self.ranks.rank): bool(own_loss.isfinite())})
            bad_ranks = [int(rank) for rank, is_finite in flags.items() if not is_finite]
            result = replace(result, bad_ranks=bad_ranks, bad_tensors=bad)
        return result

    def _add_over_ranks(self, loss: Tensor, sums: Sums, weights: Sums | None) -> Tensor:
        """Add up the loss and the sums of all ranks in one all-reduce; return the loss."""
        both = [sums, weights] if weights is not None else [sums]
        totals = torch.cat([s.total for s in both])
        if not self.is_sharded and not self.ranks.is_first:
            totals.zero_()  # every rank holds every tensor: count them once
        loss, *totals = dist.sum_over_ranks(torch.cat([loss.double()[None], totals])).split(
            [1] + [len(s.total) for s in both]
        )
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

    def _with_statistics(self, result: StepResult) -> StepResult:
        sums = self.optimizer.last_statistics
        assert sums is not None
        # a tied embedding gets a gradient in every row
        drifting = self.optimizer.n_drifting_rows() * (not self.config.model.tie_embeddings)
        total = torch.cat([sums.view(-1), drifting])
        if self.is_sharded:
            dist.sum_over_ranks(total)
        table = total[:-1].view(-1, N_STATISTICS).tolist()
        return replace(
            result, statistics=dict(zip(self.optimizer.names, table)), n_drifting_rows=int(total[-1].item())
        )  # fmt: skip

    @torch.no_grad()
    def evaluation_loss(self, batch: Batch) -> Tensor:
        """Return the sum of the cross-entropy of this rank's micro-batch, float32, on its device."""
        self._engine.eval()
        return self._engine(*self._inputs(batch)).cross_entropy

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        def put(x: Tensor) -> Tensor:
            return x.to(self.device, non_blocking=True)

        # rows that are one document each need no boundaries, and get the cheaper kernels
        one_document = len(batch.cu_seqlens) == len(batch.tokens) + 1
        boundaries = None if one_document else put(batch.cu_seqlens)
        return put(batch.tokens), put(batch.positions), boundaries, put(batch.targets)

    def _gradients(self) -> list[Tensor]:
        """The reduced gradient of each segment between backward and step, flat, in the dtype of training."""
        inner = self._engine.optimizer
        if not hasattr(inner, "averaged_gradients"):  # stage 0
            named = dict(self.module.named_parameters())
            return [named[segment.name].grad.view(-1) for segment in self.segments]  # type: ignore[union-attr]
        pieces: dict[tuple[int, int], Tensor] = {}
        for flat, of_flat in inner.averaged_gradients.items():
            offset = 0
            for piece in of_flat:
                pieces[flat, offset] = piece
                offset += piece.numel()
        return [pieces[s.flat, s.offset].view(-1)[: s.numel] for s in self.segments]

    def _clear_gradients(self) -> None:
        """What DeepSpeed's own step does to its gradients; `zero_grad` follows."""
        inner = self._engine.optimizer
        if hasattr(inner, "single_partition_of_fp32_groups"):
            inner.micro_step_id = -1
            inner._release_preflattened_grad_buffers()
            for of_group in (inner.averaged_gradients, inner.all_grad_tensors):
                for i in of_group:
                    of_group[i] = None
        elif hasattr(inner, "fp32_partitioned_groups_flat"):
            inner._pre_step()
            inner.averaged_gradients = {}
