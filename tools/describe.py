#!/usr/bin/env python
"""Say what a config is and costs before anything runs: sizes, scales, FLOPs, cache and model-state bytes."""

import argparse
from pathlib import Path

from megakexue.config import UserError, load_config, require, run_program

EPILOG = """\
The lines are those that a run prints before its first step, with every setting resolved. Numbers come from formulas
(megakexue/core/describe.py); nothing is allocated, and the data need not exist.

examples:
  tools/describe.py configs/1b.yaml --ranks 64
  tools/describe.py configs/1b.yaml model.mla={} model.n_kv_heads=null --parameters
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file, such as those in configs/")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings over the file's")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="world size (default: 1)")
    parser.add_argument("--parameters", action="store_true", help="also a line for each kind of parameter")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    require(args.ranks > 0, f"--ranks {args.ranks} must be positive")
    config = load_config(args.config, args.overrides)
    config.train.n_micro_batches(args.ranks)

    from megakexue.core.axes import axes, shape
    from megakexue.core.describe import describe, parameter_counts
    from megakexue.core.resolve import resolve_config
    from megakexue.core.rope import base_notes

    try:
        resolved = resolve_config(config)
    except UserError as error:
        raise UserError(f"{args.config}: {error}") from error
    model = resolved.model
    print(describe(resolved, args.ranks))
    for note in base_notes(model):
        print(note)
    if args.parameters:
        print("\nparameters: elements over all layers, shape, role, share of branch_gain in the initial gain")
        for name, n in parameter_counts(model).items():
            size, table = "x".join(map(str, shape(name, model))), axes(name)
            print(f"  {name:<34}{n:>16,}  {size:<14}{table.role:<11}{table.share:.3g}")


if __name__ == "__main__":
    run_program(main)
