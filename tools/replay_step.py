#!/usr/bin/env python
"""Compute the step that stopped a run again, and name the module where its first non-finite value appears."""

import argparse
import dataclasses
import json
from pathlib import Path

from megakexue.config import require, require_new_file, run_program, write_whole

EPILOG = """\
A run that its guard stops because of non-finite values leaves the weights and batches of that step in DUMP. This
program needs one process and no DeepSpeed. It computes each micro-batch of each rank: the forward pass, the loss, and,
if they are finite, the backward pass. Of a run on many ranks, --rank picks those that the reason names.

The device needs room for the whole model, its gradients and one micro-batch; --device cpu takes longer, and is enough.
Where it is finite in fp32 and not in the dtype of the training, that dtype has overflowed; where it is not finite in
fp32 either, weights or code are to blame, or the row that is named. Finite everywhere means that the values came from
what one process has not: the reduction over ranks, or faulty hardware.

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
        "--rank", type=int, action="append", metavar="N", help="compute what this rank did; repeatable (default: all)"
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="compute in it (default: the training's)")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the first GPU if there is one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings into it, too")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")
    args = parser.parse_args()
    require(args.dump.is_dir(), f"no folder {args.dump}: a run that its guard stops writes RUN/dumps/step_XXXXXXXX")
    if args.json:
        require_new_file("--json", args.json, args.overwrite)
    return args


def main() -> None:
    args = parse_arguments()

    # seconds of imports, which a mistake in the arguments should not cost
    from megakexue import dist
    from megakexue.replay import Dump, replay

    device = dist.device(args.device)
    dump = Dump(args.dump)
    print(f"step {dump.step} was stopped: {dump.reason}")
    print(f"computed in {args.dtype or dump.dtype} on {device}; ranks: {dump.world_size}", flush=True)
    result = replay(dump, device=device, dtype=args.dtype, ranks=args.rank, report=lambda done: print(done, flush=True))
    for note in result.notes:
        print(f"note: {note}")
    print(f"conclusion: {result.conclusion}")
    if args.json:
        content = {"dump": str(args.dump), "step": dump.step, "reason": dump.reason, "device": str(device)}
        content |= dataclasses.asdict(result) | {"conclusion": result.conclusion}
        write_whole(args.json, json.dumps(content, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    run_program(main)
