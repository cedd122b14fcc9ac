#!/usr/bin/env python
"""Measure what an optimizer step of Tiger holds in memory and sends, for each ZeRO stage, dtype and accumulation."""

import argparse
import gc
import itertools
import multiprocessing
import os
import socket
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from megakexue.config import (
    DataConfig,
    EngineConfig,
    ModelConfig,
    OptimConfig,
    ResolvedConfig,
    SourceConfig,
    TrainConfig,
    as_integer,
    run_program,
)

if TYPE_CHECKING:
    import torch

    from megakexue.core.batch import Batch
    from megakexue.run.engine import Engine

EPILOG = """
example:
  tools/benchmarks/memory.py --stages 1 3 --dtypes bf16

Two ranks on the CPU, joined by gloo, take two steps of a decoder of 13M parameters, nearly all of it matrices; the
second is measured. Each line has fresh processes. All figures are bytes for each parameter of the model, on the rank
that has most.

Memory is from torch's profiler, which reports each allocation and release of a tensor's memory. It starts before the
engine is built, so a peak has everything: weights, masters, momentum, gradients, buckets, temporaries. Between steps
the figure is checked against the tensors that Python knows. A micro-batch is one row of 16 tokens, so activations are
small. They are in the figures, and `forward keeps` shows them, together with the gradient of the head, which the loss
computes ahead, and at stage 3 with the weights that DeepSpeed keeps gathered in a model below 1e9 parameters. Buckets
are of 1M elements, and count less in a larger model. What gloo holds beside tensors is not seen. Its gathering makes a
copy of all weights, which is seen at stages 1 and 2 in `peak in refresh`.
  held        between two steps
  at forward  before the last micro-batch's forward: large activations would be added to this
  peak in ... the most within any forward; backward with its reductions; putting gradients together, their sums and
              taking them into the momentum; the update of masters and weights; clearing gradients and gathering weights

Bytes sent count the whole tensor of each collective: twice for an all-reduce, which is a reduction and a gathering.
Of n ranks in a ring, each sends (n - 1) / n of that.
"""
TOKENS = 16
BUCKET = 1_000_000
MODEL = ModelConfig(vocab_size=512, d_model=512, n_layers=4, n_heads=8, n_kv_heads=8, d_ff=1408)
PHASES = ("forward", "backward", "absorb", "update", "refresh")
WHOLE = {
    "all_reduce": "tensor", "reduce": "tensor", "broadcast": "tensor", "all_gather": "tensor_list",
    "all_gather_into_tensor": "output_tensor", "reduce_scatter": "input_list", "reduce_scatter_tensor": "input",
    "all_to_all_single": "input",
}  # fmt: skip
"""For each collective, the argument that is as large as the tensors of all ranks together."""


class Case(NamedTuple):
    stage: int
    dtype: str
    accumulate: str
    n_micro_batches: int
    n_ranks: int


class Cost(NamedTuple):
    """Bytes of one rank in one step."""

    n_parameters: int
    held: int
    at_forward: int
    forward_keeps: int
    peaks: dict[str, int]
    sent: dict[str, int]


def count_traffic(sent: Counter[str]) -> None:
    """Make every collective of torch.distributed add its bytes to `sent`.

    Each call waits until its collective has ended: the profiler does not see what another thread releases last.
    """
    import functools
    import inspect

    import torch.distributed as torch_dist
    from torch import Tensor

    is_inside = False  # one collective may be written with another

    def counted(name: str, function: Any) -> Any:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def run(*arguments: Any, **named: Any) -> Any:
            nonlocal is_inside
            if is_inside:
                return function(*arguments, **named)
            bound = signature.bind(*arguments, **named)
            bound.apply_defaults()
            whole = bound.arguments[WHOLE[name]]
            tensors: list[Tensor] = [whole] if isinstance(whole, Tensor) else whole
            sent[name] += sum(x.nbytes for x in tensors) * (2 if name == "all_reduce" else 1)
            is_async, bound.arguments["async_op"], is_inside = bound.arguments["async_op"], True, True
            try:
                work = function(*bound.args, **bound.kwargs)
            finally:
                is_inside = False
            if work is not None:
                work.wait()
                time.sleep(0.02)  # until gloo's thread lets go of the tensors
            return work if is_async else None

        return run

    for name in WHOLE:
        replacement = counted(name, getattr(torch_dist, name))
        for module in (torch_dist, torch_dist.distributed_c10d):
            setattr(module, name, replacement)


def make_config(case: Case) -> ResolvedConfig:
    from megakexue.core.resolve import resolve, resolve_optim

    rows = case.n_micro_batches * case.n_ranks
    return ResolvedConfig(
        model=resolve(MODEL, "tiger", TOKENS),
        data=DataConfig(sources=[SourceConfig(path="none")], tokenizer="none", seq_len=TOKENS),
        train=TrainConfig(run="none", steps=100, global_batch_size=rows, micro_batch_size=1),
        optim=resolve_optim(OptimConfig(accumulate=case.accumulate), tie_embeddings=False),  # type: ignore[arg-type]
        engine=EngineConfig(zero_stage=case.stage, dtype=case.dtype, bucket_elements=BUCKET, timeout_s=300),  # type: ignore[arg-type]
    )


def make_batch(generator: "torch.Generator") -> "Batch":
    """One row of random tokens."""
    import torch

    from megakexue.core.batch import Batch

    row = torch.randint(0, MODEL.vocab_size, (1, TOKENS + 1), generator=generator)
    return Batch(
        tokens=row[:, :-1], targets=row[:, 1:], positions=torch.arange(TOKENS)[None],
        cu_seqlens=torch.tensor([0, TOKENS], dtype=torch.int32), n_targets=TOKENS, samples=[],
    )  # fmt: skip


def mark_phases(engine: "Engine") -> None:
    """Give the calls of an optimizer step names that the profiler records."""
    from torch.profiler import record_function

    optimizer, inner = engine.optimizer, engine._engine
    for phase, owner, name in (
        ("forward", inner, "forward"), ("backward", inner, "backward"), ("absorb", optimizer, "gradient_sums"),
        ("absorb", engine._layout, "gradients"), ("absorb", optimizer, "absorb"), ("update", optimizer, "step"),
        ("refresh", inner, "step"), ("refresh", engine._layout, "gather"),
    ):  # fmt: skip
        setattr(owner, name, record_function(f"phase {phase}")(getattr(owner, name)))


class Memory:
    """The bytes that torch's profiler has recorded over time, and the phases. All times are in nanoseconds."""

    def __init__(self, profiler: Any) -> None:
        from torch._C._profiler import _EventType

        self.levels: list[tuple[int, int]] = [(0, 0)]
        """Time of each allocation or release, and the bytes allocated after it."""
        self.spans: list[tuple[int, int, str]] = []
        """Begin, end and name of each phase."""
        nodes = list(profiler.profiler.kineto_results.experimental_event_tree())
        while nodes:
            node = nodes.pop()
            nodes += node.children
            if node.tag == _EventType.Allocation:
                self.levels.append((node.start_time_ns, node.extra_fields.total_allocated))
            elif node.name.startswith("phase "):
                self.spans.append((node.start_time_ns, node.end_time_ns, node.name.removeprefix("phase ")))
        self.levels.sort(key=lambda level: level[0])
        self.spans.sort()

    def level(self, time: int) -> int:
        return next(total for at, total in reversed(self.levels) if at <= time)

    def peak(self, began: int, ended: int) -> int:
        return max([self.level(began), *(total for at, total in self.levels if began <= at <= ended)])

    def cost(self, n_parameters: int, sent: dict[str, int]) -> Cost:
        """Return the cost of the phase `measured`."""
        began, ended = next((began, ended) for began, ended, name in self.spans if name == "measured")
        of_step = [span for span in self.spans if began <= span[0] <= ended]
        last = [span for span in of_step if span[2] == "forward"][-1]
        peaks = {phase: [self.peak(*span[:2]) for span in of_step if span[2] == phase] for phase in PHASES}
        return Cost(
            n_parameters=n_parameters,
            held=self.level(ended),
            at_forward=self.level(last[0]),
            forward_keeps=self.level(last[1]) - self.level(last[0]),
            peaks={phase: max(found, default=0) for phase, found in peaks.items()},
            sent=sent,
        )


def measure(case: Case, rank: int, port: int) -> Cost:
    """Take two steps as rank `rank` of the case's, and return the cost of the second."""
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(case.n_ranks), "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(case.n_ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    from megakexue.run.engine import Engine, start

    torch.set_num_threads(1)
    sent: Counter[str] = Counter()
    count_traffic(sent)
    config = make_config(case)
    ranks = start(config.engine)
    generator = torch.Generator().manual_seed(rank)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        engine = Engine(config, ranks)
        engine.load_new(seed=0)
        mark_phases(engine)
        for label in ("warm-up", "measured"):
            sent.clear()
            with record_function(f"phase {label}"):
                result = engine.train_step([make_batch(generator) for _ in range(case.n_micro_batches)], 1e-3, 1)
            assert result.status == "applied", result

    # no graph is alive here, so that Python knows every tensor
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    n_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    cost = Memory(profiler).cost(n_parameters, dict(sent))
    missed = cost.held - sum(storages.values())
    assert missed < 0.02 * n_parameters, f"{case}: {missed:,} bytes were released unseen: run this line again"
    return cost


def run_case(case: Case, context: Any) -> Cost:
    """Return the cost on the rank that has most of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(case.n_ranks, mp_context=context) as pool:
        costs = [f.result() for f in [pool.submit(measure, case, rank, port) for rank in range(case.n_ranks)]]
    return Cost(
        n_parameters=costs[0].n_parameters,
        held=max(c.held for c in costs),
        at_forward=max(c.at_forward for c in costs),
        forward_keeps=max(c.forward_keeps for c in costs),
        peaks={phase: max(c.peaks[phase] for c in costs) for phase in costs[0].peaks},
        sent={kind: max(c.sent.get(kind, 0) for c in costs) for kind in sorted(set().union(*(c.sent for c in costs)))},
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stages, dtypes, ways = (0, 1, 2, 3), ("fp32", "bf16"), ("gradient", "momentum")
    parser.add_argument("--stages", type=as_integer, nargs="+", choices=stages, default=stages, help="default: all")
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes, help="default: both")
    parser.add_argument("--accumulate", nargs="+", choices=ways, default=ways, help="default: both")
    parser.add_argument(
        "--micro-batches", type=as_integer, default=4, help="of a rank in a step (default: %(default)s)"
    )
    arguments = parser.parse_intermixed_args()
    if arguments.micro_batches < 1:
        parser.error(f"--micro-batches {arguments.micro_batches} must be at least 1")
    os.environ |= {
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "KINETO_LOG_LEVEL": "99",
    }
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deepspeed", "megakexue.run.engine"])  # imported once, not by every rank
    columns = ("held", "at forward", "forward keeps", *(f"peak in {phase}" for phase in PHASES))
    print(f"bytes a parameter, 2 ranks, {arguments.micro_batches} micro-batches\n")
    print("| stage | dtype | accumulate | " + " | ".join(columns) + " | sent: all | by kind |")
    print("|" + "---|" * (len(columns) + 5))
    for stage, dtype, way in itertools.product(arguments.stages, arguments.dtypes, arguments.accumulate):
        cost = run_case(Case(stage, dtype, way, arguments.micro_batches, 2), context)
        figures = [cost.held, cost.at_forward, cost.forward_keeps, *cost.peaks.values()]
        kinds = ", ".join(f"{kind} {n / cost.n_parameters:.2f}" for kind, n in cost.sent.items())
        cells = [str(stage), dtype, way, *(f"{x / cost.n_parameters:.2f}" for x in figures)]
        cells += [f"{sum(cost.sent.values()) / cost.n_parameters:.2f}", kinds]
        print("| " + " | ".join(cells) + " |", flush=True)
    print(f"\n{cost.n_parameters:,} parameters")


if __name__ == "__main__":
    run_program(main)
