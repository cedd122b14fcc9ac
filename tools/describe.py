#!/usr/bin/env python
"""Say what a config is and costs before anything runs: sizes, scales, FLOPs, cache and model-state bytes."""

import argparse
from pathlib import Path

from megakexue.config import Config, UserError, as_integer, load_config, require, run_program
from megakexue.text.manifest import check_inputs

EPILOG = """\
The lines are those that a run prints before its first step. Numbers come from formulas (megakexue/core/costs.py),
and nothing is allocated. It is also the check before a launch: a mistake that launch/train.py would find before it
builds the model, in the config or in the data, is one line and exit code 2. What does not exist yet is a warning.

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
    parser.add_argument(
        "--ranks", type=as_integer, metavar="N", help="world size (default: the fewest, engine.sequence_ranks)"
    )
    parser.add_argument("--parameters", action="store_true", help="also a line for each kind of parameter")
    return parser.parse_intermixed_args()


def check_what_exists(config: Config) -> tuple[list[str], list[int] | None]:
    """Check the inputs of a launch that are there. Return the paths of those that are not, and the rows of each source.

    Raises:
        UserError: one is there, and the launch would refuse it.
    """
    sources = [source for source in config.data.sources if source.is_remote or Path(source.path).exists()]
    missing = [source.path for source in config.data.sources if source not in sources]
    if not Path(config.data.tokenizer).exists():
        return [*missing, config.data.tokenizer], None
    return missing, check_inputs(config, missing) if sources else None


def main() -> None:
    args = parse_arguments()
    config = load_config(args.config, args.overrides)
    n_sharing = config.engine.sequence_ranks
    n_ranks = n_sharing if args.ranks is None else args.ranks
    require(n_ranks > 0, f"--ranks {n_ranks} must be positive")
    require(n_ranks % n_sharing == 0, f"--ranks {n_ranks} must be a multiple of engine.sequence_ranks={n_sharing}")
    config.train.n_micro_batches(n_ranks // n_sharing)
    missing, rows = check_what_exists(config)

    from megakexue.core.axes import axes, shape
    from megakexue.core.costs import parameter_counts
    from megakexue.core.describe import describe, describe_heads
    from megakexue.core.resolve import resolve_config

    try:
        resolved = resolve_config(config)
    except UserError as error:
        raise UserError(f"{args.config}: {error}") from error
    model = resolved.model
    print(describe(config, resolved, n_ranks, rows=rows))
    print(describe_heads(model))
    if missing:
        print(f"WARNING: a launch needs these, which do not exist yet: {', '.join(missing)}")
    if args.parameters:
        print("\nparameters: elements over all layers, shape, role, share of branch_gain in the initial gain")
        for name, n in parameter_counts(model).items():
            size, table = "x".join(map(str, shape(name, model))), axes(name)
            print(f"  {name:<34}{n:>16,}  {size:<14}{table.role:<11}{table.share:.3g}")


if __name__ == "__main__":
    run_program(main)
