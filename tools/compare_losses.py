#!/usr/bin/env python
"""Compare the training losses of two runs, step by step, or the validation losses of a run with a recipe's curve.

Two runs are compared exactly by default: two commits on one machine, or a run that was stopped and resumed against one
that was not, must agree in every bit. `--tolerance` is for two machines, whose kernels round differently.

With `--recipe` the question is another one: is this run as good as runs of that recipe are? Its curve has the losses of
several seeds, and a run is on it if each validation loss is within four standard deviations of one seed's run from the
next (megakexue/run/curves.py). A run that is not finished is compared as far as it is.

The text form (a golden file) has a line a step: the step and the loss, the float written so that it reads back exactly.
"""

import argparse
import math
from pathlib import Path

from megakexue.config import UserError, as_number, require, run_program
from megakexue.files import require_new_file, write_whole
from megakexue.run.curves import curve_of, differing, off_curve, read_curve, read_run, write_curve
from megakexue.run.records import StepRecord, read_metrics

CURVES = Path(__file__).parents[1] / "docs" / "curves"
EPILOG = """\
A and B are run folders, metrics.jsonl files or golden text files. Steps that only one of them has are not compared;
the last line tells how many each has.

examples:
  tools/compare_losses.py runs/before runs/after
  tools/compare_losses.py tests/golden/tiny_gqa.txt runs/tiny_gqa --tolerance 1e-3
  tools/compare_losses.py --write-golden tests/golden/tiny_gqa.txt runs/tiny_gqa
  tools/compare_losses.py runs/10m --recipe 10m
  tools/compare_losses.py runs/seed_0 runs/seed_1 runs/seed_2 --write-curve docs/curves/10m.jsonl

exit status: 0 equal, within the tolerance or on the curve; 1 different or off the curve; 2 nothing could be compared
"""


def read_losses(path: Path) -> dict[int, float]:
    """Loss by step of a run folder, a metrics.jsonl or a golden text file. Raises UserError when it is none."""
    if path.is_dir() or path.suffix == ".jsonl":
        return {record.step: record.loss for record in read_metrics(path) if isinstance(record, StepRecord)}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read losses: {error}") from error
    losses: dict[int, float] = {}
    for number, line in enumerate(lines, start=1):
        try:
            step, loss = line.split()
            losses[int(step)] = float(loss)
        except ValueError as error:
            remedy = "write it with --write-golden, or give a run folder"
            raise UserError(f"{path}:{number}: {line!r} is not of the form 'step loss': {remedy}") from error
    return losses


def write_golden(path: Path, run: Path, *, overwrite: bool) -> None:
    losses = read_losses(run)
    require(len(losses) > 0, f"{run}: holds no training step")
    require_new_file("--write-golden", path, overwrite)
    write_whole(path, "".join(f"{step} {loss!r}\n" for step, loss in losses.items()))
    print(f"wrote {len(losses)} steps to {path}")


def difference(a: float, b: float) -> float:
    """|a - b|; 0 for two equal infinities or two nans, inf when just one of the two is not finite."""
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    return abs(a - b) if math.isfinite(a) and math.isfinite(b) else math.inf


def compare(path_a: Path, path_b: Path, *, tolerance: float) -> bool:
    """Print how the two differ; return whether they agree within `tolerance` at every common step."""
    a, b = read_losses(path_a), read_losses(path_b)
    steps = sorted(a.keys() & b.keys())
    require(
        len(steps) > 0,
        f"{path_a} ({len(a)} steps) and {path_b} ({len(b)} steps) have no step in common: check metrics.every_steps",
    )
    differences = {step: difference(a[step], b[step]) for step in steps}
    differing = [step for step in steps if differences[step] > 0]
    beyond = [step for step in steps if differences[step] > tolerance]
    if differing:
        first, largest = differing[0], max(differing, key=differences.__getitem__)
        print(f"first difference: step {first}: {a[first]!r} and {b[first]!r}, difference {differences[first]:.3g}")
        print(f"max abs difference: {differences[largest]:.3g} at step {largest}")
    if not differing:
        verdict = "equal in every bit"
    elif not beyond:
        verdict = f"within {tolerance:g}, equal in {len(steps) - len(differing)}"
    else:
        verdict = f"DIFFERENT: {len(beyond)} beyond the tolerance of {tolerance:g}, the first at step {beyond[0]}"
    print(f"{len(steps)} common steps (A has {len(a)}, B has {len(b)}): {verdict}")
    return not beyond


def compare_with_recipe(run: Path, path: Path) -> bool:
    """Print a run's validation losses beside those of a recipe; return whether it is on the recipe's curve."""
    curve, facts = read_curve(path), read_run(run)
    off = off_curve(curve, facts)
    print(f"{'step':>8}{'this run':>12}{curve.recipe:>12}{'may differ':>12}")
    n_common = 0
    for i, point in enumerate(curve.points):
        if point.step in facts.losses:
            mean, width = curve.band(i)
            mark = "   off" if point.step in off else ""
            print(f"{point.step:>8}{facts.losses[point.step]:>12.4f}{mean:>12.4f}{width:>12.4f}{mark}")
            n_common += 1
    if facts.train_rows != curve.train_rows:
        print("the training rows are not those of the recipe")
    for line in differing(curve, facts):
        print(f"not as in the recipe: {line}")
    of = f"of {n_common} validations, the last at step {max(facts.losses.keys() & {p.step for p in curve.points})}"
    seeds = f"the curve has the seeds {', '.join(map(str, curve.seeds))}"
    print(f"OFF the curve of {curve.recipe} at {len(off)} {of}, the first at step {off[0]}: {seeds}" if off
          else f"on the curve of {curve.recipe} at all {of}: {seeds}")  # fmt: skip
    return not off


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compare the training losses of two runs, or a run with the curve of a recipe.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path,
        help="A and B; just one with --write-golden or --recipe; three or more with --write-curve",
    )  # fmt: skip
    parser.add_argument("--tolerance", metavar="X", type=as_number, help="largest |A - B| allowed (default: 0)")
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument(
        "--recipe", metavar="NAME", help="compare RUN with docs/curves/NAME.jsonl, or a file of that form"
    )
    forms.add_argument("--write-golden", metavar="FILE", type=Path, help="write the losses of RUN as text instead")
    forms.add_argument("--write-curve", metavar="FILE", type=Path, help="write the curve of RUNs that differ in seeds")
    parser.add_argument("--overwrite", action="store_true", help="let --write-golden and --write-curve replace FILE")
    arguments = parser.parse_intermixed_args()
    runs, tolerance = arguments.runs, arguments.tolerance or 0.0
    require(tolerance >= 0, f"--tolerance={tolerance} must be 0 or more")
    if arguments.write_curve:
        require_new_file("--write-curve", arguments.write_curve, arguments.overwrite)
        write_curve(arguments.write_curve, curve_of(arguments.write_curve.stem, runs))
        print(f"wrote the curve of {len(runs)} runs to {arguments.write_curve}")
        return
    if len(runs) != (1 if arguments.write_golden or arguments.recipe else 2):
        parser.error(f"{len(runs)} runs given: a comparison takes two, --recipe and --write-golden one")
    if arguments.recipe is not None:
        name = arguments.recipe
        same = compare_with_recipe(runs[0], Path(name) if name.endswith(".jsonl") else CURVES / f"{name}.jsonl")
    elif arguments.write_golden:
        write_golden(arguments.write_golden, runs[0], overwrite=arguments.overwrite)
        same = True
    else:
        same = compare(*runs, tolerance=tolerance)
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    run_program(main)
