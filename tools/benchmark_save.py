#!/usr/bin/env python
"""Measure how long training stands still for a checkpoint of your config: written at once, and in a thread."""

import argparse
import dataclasses
import os
import shutil
import statistics
import time
from pathlib import Path

from megakexue.config import load_config, require, run_program

EPILOG = """\
examples:
  deepspeed --num_accelerators 2 tools/benchmark_save.py configs/125m.yaml engine.dtype=fp32 data.seq_len=128 \\
      train.global_batch_size=4 train.micro_batch_size=2
  deepspeed --num_accelerators 8 tools/benchmark_save.py configs/1b.yaml --out /shared/scratch/save

Rows are random tokens, weights random: no data is needed. Each round takes a step, saves at once, takes a step, begins
to save in a thread, and goes on with steps until that is written. What counts is the time for which training stands
still on the slowest rank. On a CPU the thread takes cores from the steps beside it, which `step while writing` shows.
--out must have room for four checkpoints; they are removed.

How long a save takes is also what a cluster must grant after its signal, twice: one may be under way. docs/recovery.md
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a YAML file, such as configs/125m.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rounds", type=int, default=5, help="after one to warm up (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_save"), help="default: %(default)s")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    require(args.rounds > 0, f"--rounds {args.rounds} must be positive")
    config = load_config(args.config, args.overrides)
    require(
        not args.out.exists() or os.environ.get("RANK", "0") != "0",
        f"--out {args.out} exists: choose another folder, which is made and removed",
    )

    import torch

    from megakexue import checkpoint, dist
    from megakexue.data import Batch
    from megakexue.engine import Engine, start
    from megakexue.model import resolve

    ranks = start(config.engine)
    model = resolve(config.model, config.optim.name, config.data.seq_len)
    config = dataclasses.replace(config, model=model, optim=config.optim.resolved(model.tie_embeddings))
    engine = Engine(config, ranks)
    engine.load_new(seed=0)
    rows, t = config.train.micro_batch_size, config.data.seq_len
    tokens = torch.randint(0, model.vocab_size, (rows, t + 1), generator=torch.Generator().manual_seed(ranks.rank))
    batch = Batch(
        tokens=tokens[:, :-1], targets=tokens[:, 1:], positions=torch.arange(t).expand(rows, t),
        cu_seqlens=torch.arange(0, rows * t + 1, t, dtype=torch.int32), n_targets=rows * t, samples=[],
    )  # fmt: skip
    n = 0

    def step() -> float:
        nonlocal n
        n += 1
        began = time.perf_counter()
        engine.train_step([batch] * engine.n_micro_batches, 1e-4, n)
        return time.perf_counter() - began

    def begin(saver: checkpoint.Saver, name: str) -> None:
        saver.start(args.out / name, {"step": n}, step=n, keep_last=1)

    straight, threaded = (
        checkpoint.Saver(engine, dataclasses.replace(config.checkpoint, asynchronous=flag)) for flag in (False, True)
    )
    group = dist.host_group("benchmark", config.engine.timeout_s)
    names = ("step", "step while writing", "written at once", "training waits for a thread")
    times: dict[str, list[float]] = {name: [] for name in names}
    for is_warm in [False] + [True] * args.rounds:
        quiet = step()
        begin(straight, "straight")
        straight.finish()
        step()
        begin(threaded, "threaded")
        beside = [step()]
        while dist.count_over_ranks([threaded.has_finished], group)[0] < ranks.world_size:
            beside.append(step())
        threaded.finish()
        values = (quiet, statistics.median(beside), straight.waited_s, threaded.waited_s)
        for name, value in zip(names, values):
            slowest = max(dist.gather({str(ranks.rank): value}).values())
            times[name] += [slowest] * is_warm
    if ranks.is_first:
        shutil.rmtree(args.out)
        size = sum(view.nbytes for _, views in engine.state_tensors() for view in views.values())
        print(f"\n{ranks.world_size} ranks, ZeRO-{config.engine.zero_stage}, {size / 1e9:.3g} GB on the first")
        for name, seconds in times.items():
            print(f"{name:<26} {statistics.median(seconds):8.3f} s ({min(seconds):.3f} .. {max(seconds):.3f})")
        ratios = [a / b for a, b in zip(times[names[3]], times[names[2]])]
        print(
            f"stands still: {100 * statistics.median(ratios):.2g} % of a save at once "
            f"({100 * min(ratios):.2g} .. {100 * max(ratios):.2g}; {args.rounds} rounds)"
        )
    dist.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_program(main)
