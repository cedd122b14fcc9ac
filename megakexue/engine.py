"""The only file that knows DeepSpeed: build, forward and backward, step, and the segment table for every stage.

What DeepSpeed does for us: it holds weights, gradients and masters as the ZeRO stage says, reduces gradients, and
gathers weights. What it must not do, and is told not to: check for non-finite values, scale the loss, clip, or drive
the learning rate. It would do each of them differently by stage and precision, and in silence; they are ours
(megakexue/guard.py, megakexue/optim.py).

One step:
    1. the global number of target tokens is known before the first backward, so the loss of each micro-batch is its
       sum times loss_scale * world_size / n_targets (DeepSpeed averages over ranks);
    2. after the last backward one all-reduce gives every rank the same loss and gradient norm, in float64, so that
       neither depends on how ZeRO cut the tensors;
    3. the guard decides; the optimizer is told the decision and one factor (unscaling and clipping);
    4. DeepSpeed's step runs in either case: with a decision of `skipped` it finds the masters unchanged, and clears
       its own gradient state in its own way.

What must stay true: every element of every parameter is in exactly one segment over all ranks (stage 0: on every
rank); masters are float32; module weights are the masters, cast, after every load and every step.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from megakexue import dist
from megakexue.attention import choose_backend
from megakexue.config import Config, EngineConfig
from megakexue.data import Batch
from megakexue.guard import Guard, Status
from megakexue.model import Decoder, axes, shape
from megakexue.optim import MOMENTS, AdamW, Segment, clip_factor, parameter_groups


@dataclass(frozen=True, kw_only=True)
class StepResult:
    loss: float
    """Mean cross-entropy over the target tokens of all ranks, in nats, without z-loss or EMO."""
    grad_norm: float
    """Before clipping."""
    n_targets: int
    status: Status
    bad_ranks: list[int]
    """Ranks whose own loss was not finite."""


def start(config: EngineConfig) -> dist.Ranks:
    """Join the world: set up the environment, DeepSpeed's quiet start, and the process group."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    dist.set_environment_of_one()
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
    deepspeed.init_distributed(timeout=timedelta(seconds=config.timeout_s), verbose=False)
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
        "gradient_accumulation_steps": n_micro_batches,
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
        groups = parameter_groups(named, config.optim, {name: axes(name).role for name, _ in named})
        self.optimizer = AdamW(groups, config.optim)
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=self.optimizer, config=self.deepspeed_config)
        self.module: Decoder = self._engine.module
        self.flats: list[Tensor] = []
        """This rank's flat float32 masters, the very tensors that the optimizer keys its state by."""
        self.segments: list[Segment] = []
        self._find_segments()
        self._silence_overflow_checks()
        self.emo_rows: Tensor | None = None
        """With `loss.emo`: the rows of the head that training started from, of length 1."""

    # --- the segment table -----------------------------------------------------------------------------------------

    @property
    def is_sharded(self) -> bool:
        """Whether ranks hold different segments; at stage 0 all hold everything."""
        return self.config.engine.zero_stage > 0

    def _find_segments(self) -> None:
        """Fill `flats` and `segments`, by where DeepSpeed put each parameter."""
        inner = self._engine.optimizer
        if inner is self.optimizer:  # stage 0, fp32: the parameters themselves
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

    def _silence_overflow_checks(self) -> None:
        """Switch off what no config key switches off: checks after which a step is dropped without a word."""
        inner = self._engine.optimizer
        if hasattr(inner, "check_grad_overflow"):  # stages 1, 2 in fp16
            inner.check_grad_overflow = False
        if hasattr(inner, "fp32_groups"):  # stage 0 in half precision: its step is these lines and the checks

            def step() -> None:
                pairs = [pair for groups in zip(inner.fp16_groups, inner.fp32_groups) for pair in zip(*groups)]
                for weight, master in pairs:
                    master.grad = weight.grad.float()
                self.optimizer.step()
                for weight, master in pairs:
                    weight.data.copy_(master.data)
                    master.grad = weight.grad = None

            inner.step = step

    def state_tensors(self, kinds: Iterable[str]) -> Iterator[tuple[Segment, dict[str, Tensor]]]:
        """Yield each segment of this rank with its views into `master` and the optimizer's state tensors."""
        for segment in self.segments:
            flat = self.flats[segment.flat]
            moments = self.optimizer.moments(flat) if set(kinds) - {"master"} else {}
            tensors = {"master": flat} | moments
            yield segment, {kind: segment.of(tensors[kind]) for kind in kinds}

    @property
    def state_kinds(self) -> tuple[str, ...]:
        """The names of all state tensors: the master and the optimizer's."""
        return ("master", *MOMENTS[self.config.optim.name])

    # --- weights ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def load(self, read: Callable[[str, Segment], Tensor], kinds: Iterable[str] = ("master",)) -> None:
        """Fill the state tensors of `kinds` from `read(kind, segment)`, then the module's weights from the masters.

        The one way to start: fresh, resumed or from a bundle. Weights put into the module itself would be reverted by
        the first step, since DeepSpeed's masters would be stale.
        """
        for segment, views in self.state_tensors(kinds):
            for kind, view in views.items():
                value = read(kind, segment)
                assert value.numel() == segment.numel, f"{kind} of {segment} was given {value.numel()} elements"
                view.copy_(value.reshape(-1))
        self._refresh_module()

    def _refresh_module(self) -> None:
        inner = self._engine.optimizer
        if inner is self.optimizer:
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
    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, the module's weight in the training dtype) for every parameter, whole, on every rank."""
        import deepspeed

        for name, p in self.module.named_parameters():
            gathered = hasattr(p, "ds_id")
            with deepspeed.zero.GatheredParameters([p]) if gathered else nullcontext():
                yield name, p.data.clone()

    def check_weights(self) -> None:
        """Assert on every rank that the module's weights are its masters, cast."""
        own: dict[str, list[Segment]] = {}
        for segment in self.segments:
            own.setdefault(segment.name, []).append(segment)
        for name, weight in self.full_weights():
            for segment in own.get(name, []):
                master = segment.of(self.flats[segment.flat]).to(weight.dtype)
                assert torch.equal(weight.view(-1)[segment.start : segment.stop], master), f"stale weights: {segment}"

    # --- one optimizer step ----------------------------------------------------------------------------------------

    def train_step(self, batches: list[Batch], lr: float, step: int) -> StepResult:
        """Take the micro-batches of one optimizer step, and apply the update unless the guard says otherwise."""
        assert len(batches) == self.n_micro_batches
        self._engine.train()
        counts = torch.tensor(sum(batch.n_targets for batch in batches), dtype=torch.float64, device=self.device)
        # stays on the device, so that the forward pass need not wait for the number
        n_targets = dist.sum_over_ranks(counts).clamp(min=1)
        scale = (self.guard.loss_scale * self.ranks.world_size / n_targets).float()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for i, batch in enumerate(batches):
            losses = self._engine(
                *self._inputs(batch), gradient_scale=scale, loss=self.config.loss, emo_rows=self.emo_rows
            )
            self._engine.backward(losses.objective * scale, scale_wrt_gas=False)
            loss_sum += losses.cross_entropy
            if i < len(batches) - 1:
                self._engine.step()  # counts the micro-step; the update is below
        numbers = torch.stack([loss_sum, self._squared_norm()])
        loss_total, squares, count = torch.cat([dist.sum_over_ranks(numbers), n_targets[None]]).tolist()
        loss_scale = self.guard.loss_scale
        loss_mean, grad_norm = loss_total / count, squares**0.5 / loss_scale
        status = self.guard.decide(loss_mean, grad_norm, step)
        applied = status == "applied"
        factor = clip_factor(self.config.optim, grad_norm) / loss_scale if applied else 0.0
        self.optimizer.prepare(is_applied=applied, lr=lr, gradient_factor=factor)
        self._engine.step()
        assert self.optimizer.has_stepped == applied, "DeepSpeed dropped a step, or took one that was to be skipped"
        bad_ranks: list[int] = []
        if not applied:
            flags = dist.gather({str(self.ranks.rank): bool(loss_sum.isfinite())})
            bad_ranks = [int(rank) for rank, is_finite in flags.items() if not is_finite]
        return StepResult(loss=loss_mean, grad_norm=grad_norm, n_targets=int(count), status=status, bad_ranks=bad_ranks)

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

    def _squared_norm(self) -> Tensor:
        """This rank's share of the squared norm of the reduced gradients."""
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        if not self.is_sharded and not self.ranks.is_first:
            return squares  # every rank holds every gradient: count them once
        for gradient in self._gradients():
            # float64: any finite gradient has a finite square, and the order of the sum does not matter to float32;
            # in pieces, since torch makes a float64 copy
            for piece in gradient.view(-1).split(2**24):
                squares += torch.linalg.vector_norm(piece, dtype=torch.float64).square()
        return squares

    def _gradients(self) -> Iterator[Tensor]:
        """The reduced gradients of this rank between backward and step; any padding in them is zero."""
        inner = self._engine.optimizer
        if hasattr(inner, "averaged_gradients"):
            for pieces in inner.averaged_gradients.values():
                yield from pieces
        else:
            for p in self.module.parameters():
                assert p.grad is not None
                yield p.grad
