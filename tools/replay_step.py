#!/usr/bin/env python
"""Compute the step that stopped a run again, and name the module where its first non-finite value appears."""

import argparse
import dataclasses
import json
from pathlib import Path

from megakexue.config import as_integer, require, run_program
from megakexue.files import require_new_file, write_whole

EPILOG = """\
A run that its guard stops because of non-finite values leaves the weights and batches of that step in DUMP. This
program needs one process and no DeepSpeed. It computes each micro-batch of each rank: the forward pass, the loss, and,
if they are finite, the backward pass. For a run on many ranks, choose with --rank those that the reason names.

The device needs room for the whole model, its gradients and one micro-batch. --device cpu is slower, and is enough.
What the result means:
  not finite in the dtype of the training, but finite in fp32: that dtype has overflowed
  not finite in fp32 either: the weights, the code or the row that is named has the fault
  finite everywhere: the values came from what one process does not do or see, which is the reduction over ranks, or
  faulty hardware

examples:
  tools/replay_step.py runs/1b/dumps/step_00000012
  tools/replay_step.py runs/1b/dumps/step_00000012 --rank 3 --dtype fp32 --json step_12.json
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dump", type=Path, metavar="DUMP", help="folder RUN/dumps/step_XXXXXXXX")
    parser.add_argument(
        "--rank",
        type=as_integer,
        action="append",
        metavar="N",
        help="compute what this rank did; repeatable (default: all)",
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="compute in it (default: the training's)")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the first GPU if there is one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings into it, too")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")
    args = parser.parse_intermixed_args()
    require(args.dump.is_dir(), f"no folder {args.dump}: a run that its guard stops writes RUN/dumps/step_XXXXXXXX")
    if args.json:
        require_new_file("--json", args.json, args.overwrite)
    return args


def main() -> None:
    args = parse_arguments()

    # seconds of imports, which a mistake in the arguments should not cost
    from megakexue.core.device import find_device
    from megakexue.run.replay import Dump, replay

    device = find_device(args.device)
    dump = Dump(args.dump)
    print(f"step {dump.state.step} was stopped: {dump.state.reason}")
    print(f"computed in {args.dtype or dump.dtype} on {device}; ranks: {dump.world_size}", flush=True)
    result = replay(dump, device=device, dtype=args.dtype, ranks=args.rank, report=lambda done: print(done, flush=True))
    for note in result.notes:
        print(f"note: {note}")
    print(f"conclusion: {result.conclusion}")
    if args.json:
        content = {"dump": str(args.dump), "step": dump.state.step, "reason": dump.state.reason, "device": str(device)}
        content |= dataclasses.asdict(result) | {"conclusion": result.conclusion}
        write_whole(args.json, json.dumps(content, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    run_program(main)
