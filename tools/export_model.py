#!/usr/bin/env python
"""Write the bundle of a run's checkpoint: config, weights, tokenizer, and a manifest with their hashes."""

import argparse
from pathlib import Path

from megakexue.config import as_integer, require, run_program

EPILOG = """\
A bundle is what generation, evaluation, growth, conversion and train.init_from start from; no DeepSpeed is needed to
read it. The weights come from the checkpoint's fp32 masters, whatever the dtype, ZeRO stage and ranks of the run.
Use fp32 for a bundle that is trained further; bf16 and fp16 halve the size.

examples:
  tools/export_model.py runs/1b --out bundles/1b
  tools/export_model.py runs/1b --step 20000 --dtype bf16 --out bundles/1b_at_20000
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, the config's train.run")
    parser.add_argument("--out", required=True, type=Path, metavar="BUNDLE", help="folder to write")
    parser.add_argument("--step", type=as_integer, help="of the checkpoint (default: the newest)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="(default: fp32)")
    parser.add_argument(
        "--optimizer", action="store_true", help="add the optimizer's state, for train.init_optimizer=keep"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a bundle that is there")
    return parser.parse_intermixed_args()


def main() -> None:
    args = parse_arguments()
    require(args.run.is_dir(), f"no run folder {args.run}: name the train.run of a config")
    require(args.overwrite or not args.out.exists(), f"{args.out} exists: choose another name, or add --overwrite")

    # seconds of imports, which a mistake in the arguments should not cost
    from megakexue.bundle.bundle import Bundle
    from megakexue.core.costs import n_parameters
    from megakexue.core.device import DTYPES
    from megakexue.run.export import export_run

    export_run(
        args.run, args.out, step=args.step, dtype=DTYPES[args.dtype], overwrite=args.overwrite,
        with_optimizer=args.optimizer,
    )  # fmt: skip
    bundle = Bundle(args.out)
    n_bytes = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: step {bundle.lineage['step']}")
    print(f"{n_parameters(bundle.config):,} parameters in {args.dtype}, {n_bytes:,} bytes")
    print("lineage: " + ", ".join(f"{key} {value}" for key, value in bundle.lineage.items() if value is not None))


if __name__ == "__main__":
    run_program(main)
