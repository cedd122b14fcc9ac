#!/usr/bin/env python
"""Train a model: the program that `deepspeed` launches on each rank."""

import argparse
import os
from pathlib import Path

from megakexue.config import load_config, run_program
from megakexue.launcher import read_ranks, said_once
from megakexue.text.manifest import check_inputs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  deepspeed --num_accelerators 8 launch/train.py configs/1b.yaml train.run=runs/1b
  deepspeed --num_accelerators 2 launch/train.py configs/tiny_gqa.yaml engine.zero_stage=3 train.steps=30
  srun --ntasks-per-node 8 launch/train.py configs/1b.yaml    on several nodes; mpirun likewise
  launch/train.py configs/tiny_gqa.yaml                       one process
  tools/describe.py configs/1b.yaml --ranks 64                the check before a launch, in a second

`deepspeed --log_level error` leaves out the launcher's own lines, but for the exit code of a run that failed.

Every key is in megakexue/config.py with its meaning and default. The same command again goes on from the newest
checkpoint of train.run. SIGTERM, SIGINT, SIGUSR1 or SIGHUP to any rank saves and ends the run.
Exit codes: 0 done, 1 failed, 2 a mistake in the command, the config or the data, 75 saved after a signal; after a
second signal 128 + its number. docs/recovery.md has what happens when.""",
    )
    parser.add_argument("config", help="a YAML file, such as configs/tiny_gqa.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as optim.lr=3e-4")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # from DeepSpeed's launcher; the environment says it
    arguments = parser.parse_intermixed_args()
    with said_once("node"):
        read_ranks()  # refuses a start that would make several worlds of one
    with said_once("world" if Path(arguments.config).is_file() else "node"):
        config = load_config(arguments.config, arguments.overrides)
    with said_once("node"):
        check_inputs(config)
    # read when torch is imported. Threads that spin while they wait slow down the ranks beside them; and of a rank that
    # is gone the store's C++ prints a stack, where megakexue/run/watch.py says who it was
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "TORCH_CPP_LOG_LEVEL": "ERROR"} | os.environ
    import torch

    from megakexue.run.train import train  # seconds of imports, which a mistake in the config should not cost
    from megakexue.run.watch import ending

    with ending():
        train(config)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_program(main)
