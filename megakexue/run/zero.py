"""Where DeepSpeed keeps weights, gradients and masters: a class for each way in which ZeRO cuts them.

    stage    class         masters                              gradients of this rank
    0        Replicated    every parameter, on every rank       every parameter
    1, 2     Sliced        one slice of each flat group         of that slice
    3        Partitioned   one piece of every parameter         of these pieces

Each has `flats`, this rank's flat float32 masters; `shares`, for each the flat tensor of the same elements of the
module's weights, None where these are the masters; `segments`, which say what elements of which parameter lie where in
them; `gradients`, a flat tensor for each, the reduced gradient in the dtype of training, to be asked for once between
backward and step; `clear`, which frees the gradients as DeepSpeed's own step does (its `zero_grad` follows); `gather`,
which makes the module's weights what the shares of all ranks are; and `weights`, the places where this rank keeps the
weights of a segment.

One rank has nothing to reduce. DeepSpeed would copy each gradient into a bucket, divide it by one and copy it back, so
at stages 0 to 2 its reduction is left out there, and a gradient stays where autograd puts it.

What must stay true: every element of every parameter is in exactly one segment over all ranks (stage 0: on every
rank). These classes rest on private attributes of DeepSpeed's optimizers: pyproject.toml bounds its version for them.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from megakexue.core.segments import Segment
from megakexue.dist import Ranks

MakeSegment = Callable[[Tensor, int, int, int, int], Segment]
"""Of a parameter: elements start to stop, in flat tensor number `flat` from `offset` on."""


class Replicated:
    """Stage 0. In fp32 the masters are the parameters themselves; else DeepSpeed has a float32 copy of each."""

    def __init__(self, engine: Any, make: MakeSegment, parameters: dict[str, nn.Parameter], ranks: Ranks) -> None:
        inner = engine.optimizer
        if ranks.world_size == 1:
            engine.enable_backward_allreduce = False
        if hasattr(inner, "fp32_groups"):
            groups = zip(inner.fp16_groups, inner.fp32_groups)
            self._pairs = [pair for weights, masters in groups for pair in zip(weights, masters)]
        else:
            self._pairs = [(p, p) for group in inner.param_groups for p in group["params"]]
        self._parameters = parameters
        self.flats = [master.detach().view(-1) for _, master in self._pairs]
        self.shares = [None if p is master else p.detach().view(-1) for p, master in self._pairs]
        self.segments = [make(p, 0, p.numel(), i, 0) for i, (p, _) in enumerate(self._pairs)]

    def gradients(self) -> list[Tensor]:
        return [p.grad.view(-1) for p, _ in self._pairs]

    def clear(self) -> None:
        pass

    def gather(self) -> None:
        pass

    def weights(self, segment: Segment) -> list[Tensor]:
        return [self._parameters[segment.name].view(-1)]


class Sliced:
    """Stages 1 and 2: the parameters of a group lie in one flat buffer, of which each rank owns an equal slice."""

    def __init__(self, engine: Any, make: MakeSegment, parameters: dict[str, nn.Parameter], ranks: Ranks) -> None:
        inner, rank = engine.optimizer, ranks.rank
        self._inner, self._parameters, self._is_alone = inner, parameters, ranks.world_size == 1
        if self._is_alone:
            engine.enable_backward_allreduce = False
            inner.process_gradients = lambda parameter, group: None  # what the hook of a gradient calls
        self.flats: list[Tensor] = list(inner.single_partition_of_fp32_groups)
        self.shares = [slices[rank] for slices in inner.parallel_partitioned_bit16_groups]
        self.segments: list[Segment] = []
        for i in range(len(self.flats)):
            whole, size = inner.bit16_groups_flat[i], int(inner.partition_size[i])
            for p in inner.bit16_groups[i]:
                # a parameter's address in the flat buffer is its offset, whatever the order and the padding
                at = (p.data_ptr() - whole.data_ptr()) // whole.element_size()
                low, high = max(at, rank * size), min(at + p.numel(), (rank + 1) * size)
                if low < high:
                    self.segments.append(make(p, low - at, high - at, i, low - rank * size))

    def gradients(self) -> list[Tensor]:
        if self._is_alone:  # these have the order of the flat buffer, and no padding before its end
            pieces = [[p.grad for p in group] for group in self._inner.round_robin_bit16_groups]
        else:  # these are the slice from its beginning to its end
            pieces = [self._inner.averaged_gradients[i] for i in range(len(self.flats))]
        flats = [torch.cat([piece.reshape(-1) for piece in of_flat]) for of_flat in pieces]
        self._inner.zero_grad()
        self._inner.averaged_gradients.clear()
        return flats

    def clear(self) -> None:
        self._inner.micro_step_id = -1
        self._inner._release_preflattened_grad_buffers()
        for of_group in (self._inner.averaged_gradients, self._inner.all_grad_tensors):
            for i in of_group:
                of_group[i] = None

    def gather(self) -> None:
        if not self._is_alone:
            for whole, share in zip(self._inner.bit16_groups_flat, self.shares):
                torch.distributed.all_gather_into_tensor(whole, share)

    def weights(self, segment: Segment) -> list[Tensor]:
        return [self._parameters[segment.name].view(-1)[segment.start : segment.stop]]


class Partitioned:
    """Stage 3: each parameter is cut into equal pieces, one a rank, the last padded, and gathered where it is used."""

    def __init__(self, engine: Any, make: MakeSegment, parameters: dict[str, nn.Parameter], ranks: Ranks) -> None:
        inner, rank = engine.optimizer, ranks.rank
        self._inner, self._parameters = inner, parameters
        self.flats: list[Tensor] = list(inner.fp32_partitioned_groups_flat)
        # the pieces of parameters from which they are gathered are views of these
        self.shares: list[Tensor | None] = list(inner.fp16_partitioned_groups_flat)
        self.segments: list[Segment] = []
        for i in range(len(self.flats)):
            offset = 0
            for p in inner.fp16_groups[i]:
                size = p.partition_numel()
                low, high = rank * size, min((rank + 1) * size, p.ds_numel)
                if low < high:
                    self.segments.append(make(p, low, high, i, offset))
                offset += size

    def gradients(self) -> list[Tensor]:
        return list(self._inner.grad_partitions_flat_buffer.split([len(flat) for flat in self.flats]))

    def clear(self) -> None:
        self._inner._pre_step()
        self._inner.averaged_gradients = {}

    def gather(self) -> None:
        inner = self._inner
        # small parameters are kept gathered, and gathering them again would keep the old values
        inner._partition_all_parameters()
        if inner.persistent_parameters:
            inner.persistent_parameters[0].all_gather(inner.persistent_parameters)

    def weights(self, segment: Segment) -> list[Tensor]:
        """This rank's piece, which every gather starts from, and the whole parameter where it is kept gathered."""
        p: Any = self._parameters[segment.name]
        gathered = [p.view(-1)[segment.start : segment.stop]] if p.numel() else []
        return [*gathered, p.ds_tensor.view(-1)[: segment.numel]]


class OwnGradients:
    """Whether this rank's own gradients are finite: once DeepSpeed has reduced them, nobody knows whose was not.

    It is made before DeepSpeed's engine: the hooks of a parameter run in the order in which they were made, and those
    of DeepSpeed reduce the gradient and free it. Each gradient costs one pass over it. Nothing waits for the device,
    which is asked after a bad step alone.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._sums: list[Tensor] = []
        for p in parameters:
            p.register_post_accumulate_grad_hook(self._add)

    def _add(self, p: Tensor) -> None:
        assert p.grad is not None
        # a sum of finite numbers is finite where it has the range of float32, as that of bf16 has
        self._sums.append(p.grad.sum(dtype=torch.float32 if p.dtype == torch.float16 else None))

    def begin_step(self) -> None:
        self._sums.clear()

    def are_finite(self) -> bool:
        """Of all micro-batches since the step began."""
        return bool(torch.stack(self._sums).isfinite().all())


Layout = Replicated | Sliced | Partitioned
STAGES: dict[int, type[Layout]] = {0: Replicated, 1: Sliced, 2: Sliced, 3: Partitioned}
