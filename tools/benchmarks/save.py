#!/usr/bin/env python
"""Measure how long training stands still for a checkpoint of your config: written at once, and in a thread."""

import argparse
import dataclasses
import shutil
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megakexue.config import Config, UserError, as_integer, load_config, require, run_program
from megakexue.files import require_writable
from megakexue.launcher import read_ranks, said_once

if TYPE_CHECKING:
    from megakexue.core.batch import Batch
    from megakexue.run.engine import Engine

EPILOG = """\
examples:
  deepspeed --num_accelerators 2 tools/benchmarks/save.py configs/125m.yaml engine.dtype=fp32 data.seq_len=128 \\
      train.global_batch_size=4 train.micro_batch_size=2
  deepspeed --num_accelerators 8 tools/benchmarks/save.py configs/1b.yaml --out /shared/scratch/save

Tokens and weights are random, so no data is needed. Each round takes a step, saves at once, takes a step, begins to
save in a thread, and takes more steps until that is written. The result is the time for which training stands still on
the slowest rank. On a CPU the thread takes cores from the steps beside it, as `step while writing` shows.
--out must have room for four checkpoints; they are removed.

After its signal, a cluster must grant the time of two saves, since one may be under way: see docs/recovery.md.
"""


NAMES = ("step", "step while writing", "written at once", "training waits for a thread")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a YAML file, such as configs/125m.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rounds", type=as_integer, default=5, help="after one to warm up (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_save"), help="default: %(default)s")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    return parser.parse_intermixed_args()


def make_batch(config: Config, rank: int) -> "Batch":
    """A micro-batch of random tokens."""
    import torch

    from megakexue.core.batch import Batch

    rows, t = config.train.micro_batch_size, config.data.seq_len
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(0, config.model.vocab_size, (rows, t + 1), generator=generator)
    return Batch(
        tokens=tokens[:, :-1], targets=tokens[:, 1:], positions=torch.arange(t).expand(rows, t),
        cu_seqlens=torch.arange(0, rows * t + 1, t, dtype=torch.int32), n_targets=rows * t, samples=[],
    )  # fmt: skip


def measure(engine: "Engine", batch: "Batch", out: Path, n_rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each round on the slowest rank, by the names of NAMES. A first round is not counted."""
    from megakexue import dist
    from megakexue.run.saves import Saver
    from megakexue.run.state import TrainerState, plain

    config, rank = engine.config, engine.ranks.rank
    state = TrainerState(
        guard=engine.guard.state, data="", tokenizer="", config=plain(config), source="",
        world_size=engine.ranks.world_size,
    )  # fmt: skip
    n = 0

    def step() -> float:
        nonlocal n
        n += 1
        began = time.perf_counter()
        engine.train_step([batch] * engine.n_micro_batches, 1e-4, n)
        return time.perf_counter() - began

    def begin(saver: Saver, name: str) -> None:
        saver.start(out / name, dataclasses.replace(state, step=n), keep_last=1)

    straight, threaded = (
        Saver(engine, dataclasses.replace(config.checkpoint, asynchronous=flag)) for flag in (False, True)
    )
    group = dist.host_group("benchmark", config.engine.timeout_s)
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    for is_warm in [False] + [True] * n_rounds:
        quiet = step()
        begin(straight, "straight")
        straight.finish()
        step()
        begin(threaded, "threaded")
        beside = [step()]
        while dist.count_over_ranks([threaded.has_finished], group)[0] < engine.ranks.world_size:
            beside.append(step())
        threaded.finish()
        values = (quiet, statistics.median(beside), straight.waited_s, threaded.waited_s)
        for name, value in zip(NAMES, values):
            slowest = max(dist.gather({str(rank): value}).values())
            times[name] += [slowest] * is_warm
    return times


def report(engine: "Engine", times: dict[str, list[float]]) -> None:
    size = sum(view.nbytes for _, views in engine.state_tensors() for view in views.values())
    ranks = f"{engine.ranks.world_size} ranks, ZeRO-{engine.config.engine.zero_stage}"
    print(f"\n{ranks}, {size / 1e9:.3g} GB on the first")
    for name, seconds in times.items():
        print(f"{name:<26} {statistics.median(seconds):8.3f} s ({min(seconds):.3f} .. {max(seconds):.3f})")
    shares = [100 * a / b for a, b in zip(times[NAMES[3]], times[NAMES[2]])]
    print(
        f"stands still: {statistics.median(shares):.2g} % of a save at once "
        f"({min(shares):.2g} .. {max(shares):.2g}; {len(shares)} rounds)"
    )


def main() -> None:
    args = parse_arguments()
    with said_once("node"):
        require(args.rounds > 0, f"--rounds {args.rounds} must be positive")
        config = load_config(args.config, args.overrides)
        require(
            not read_ranks().is_first or not args.out.exists(),
            f"--out {args.out} exists: choose another folder, which is made and removed",
        )
        require_writable(f"--out {args.out}", args.out)

    import torch

    from megakexue import dist
    from megakexue.core.resolve import resolve_config
    from megakexue.run.engine import Engine, start

    ranks = start(config.engine)
    engine = Engine(resolve_config(config), ranks)
    engine.load_new(seed=0)
    try:
        times = measure(engine, make_batch(config, ranks.rank), args.out, args.rounds)
    except OSError as error:  # on all ranks alike, and saying why
        raise UserError(f"--out {args.out}: {error}: make room there, or choose another place") from error
    finally:
        if ranks.is_first:
            shutil.rmtree(args.out, ignore_errors=True)
    if ranks.is_first:
        report(engine, times)
    dist.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_program(main)
