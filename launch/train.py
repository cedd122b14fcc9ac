#!/usr/bin/env python
"""Train a model: the program that `deepspeed` launches on each rank."""

import argparse
import os
import sys
from pathlib import Path

from megakexue.config import UserError, load_config, run_program
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
    # threads that spin while they wait slow down the ranks beside them; read when torch is imported
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from megakexue import dist
    from megakexue.run.guard import TrainingStopped
    from megakexue.run.preemption import Preempted
    from megakexue.run.rendezvous import NotAllHere
    from megakexue.run.train import train  # seconds of imports, which a mistake in the config should not cost

    try:
        train(config)
    except (TrainingStopped, NotAllHere) as stopped:
        dist.say_last(f"stopped: {stopped}")
        sys.exit(1)
    except UserError as error:
        dist.say_last(f"error: {error}")
        sys.exit(2)
    except Preempted as preempted:
        os._exit(preempted.code)  # everything is closed; taking NCCL down may hang, and the cluster will not wait
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_program(main)
