#!/usr/bin/env python
"""Train with non-finite numbers in random micro-batches, to see what the guard does about them on your config."""

import argparse
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megakexue.config import as_integer, load_config, require, run_program
from megakexue.launcher import read_ranks, said_once
from megakexue.text.manifest import check_inputs

EPILOG = """\
example, on the data of `make demo`:
  deepspeed --num_accelerators 2 tools/inject_faults.py configs/tiny_gqa.yaml --n-faults 50 \\
      train.run=runs/faults train.steps=300 guard.on_nonfinite=shrink

Each fault is one number in one micro-batch of one rank: NaN, or infinity of either sign, in the output of a block or in
its gradient. All ranks draw the same faults from --seed. Otherwise the run is one of launch/train.py: the log has a
line for each fault with its rank and rows, and metrics.jsonl has what the guard did at each step.
"""


@dataclass(frozen=True)
class Fault:
    step: int
    rank: int
    micro_batch: int
    block: int
    is_backward: bool
    value: float


def draw(n: int, seed: int, *, steps: int, ranks: int, micro_batches: int, blocks: int) -> list[Fault]:
    """Return `n` faults in as many different steps."""
    random_ = random.Random(seed)
    return [
        Fault(
            step, random_.randrange(ranks), random_.randrange(micro_batches), random_.randrange(blocks),
            random_.random() < 0.5, random_.choice([float("nan"), float("inf"), -float("inf")]),
        )
        for step in sorted(random_.sample(range(1, steps + 1), n))
    ]  # fmt: skip


def install(faults: list[Fault], *, rank: int, micro_batches: int) -> None:
    """Put the faults of this rank into the decoder of this process."""
    import torch

    from megakexue.core.decoder import Block, Decoder

    own = {((f.step - 1) * micro_batches + f.micro_batch, f.block): f for f in faults if f.rank == rank}
    decoder_forward, block_forward, counts = Decoder.forward, Block.forward, {"micro": -1, "block": -1}

    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        counts["micro"] += torch.is_grad_enabled()
        counts["block"] = -1
        return decoder_forward(self, *arguments, **options)

    def faulty(self: Any, *arguments: Any, **options: Any) -> Any:
        counts["block"] += 1
        out = block_forward(self, *arguments, **options)
        fault = own.get((counts["micro"], counts["block"])) if torch.is_grad_enabled() else None
        if fault is None:
            return out
        one = torch.zeros_like(out)
        one.view(-1)[out.numel() // 2] = fault.value
        if fault.is_backward:
            out.register_hook(lambda gradient: gradient + one)
            return out
        return out + one

    Decoder.forward = forward  # type: ignore[method-assign]
    Block.forward = faulty  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a YAML file, such as configs/tiny_gqa.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--n-faults", type=as_integer, default=50, help="in as many steps (default: %(default)s)")
    parser.add_argument("--seed", type=as_integer, default=0, help="of the faults (default: %(default)s)")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    with said_once("node"):
        ranks = read_ranks()
        config = load_config(arguments.config, arguments.overrides)
        check_inputs(config)
        require(
            0 <= arguments.n_faults <= config.train.steps,
            f"--n-faults {arguments.n_faults} must be between 0 and train.steps={config.train.steps}",
        )
        require(
            not Path(config.train.run, "checkpoints").exists(),
            f"train.run={config.train.run} has checkpoints: faults are counted from step 1, so choose a new train.run",
        )
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as in launch/train.py
    from megakexue.run.train import train
    from megakexue.run.watch import ending

    micro_batches = config.train.n_micro_batches(ranks.data_size)
    faults = draw(
        arguments.n_faults, arguments.seed, steps=config.train.steps, ranks=ranks.world_size,
        micro_batches=micro_batches, blocks=config.model.n_layers,
    )  # fmt: skip
    if ranks.is_first:
        for fault in faults:
            print(fault)
    install(faults, rank=ranks.rank, micro_batches=micro_batches)
    with ending():
        train(config)


if __name__ == "__main__":
    run_program(main)
