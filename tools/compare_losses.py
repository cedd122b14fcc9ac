#!/usr/bin/env python
"""Compare the training losses of two runs, step by step.

Exact by default: two commits on one machine, or a run that was stopped and resumed against one that was not, must
agree in every bit. `--tolerance` is for two machines, whose kernels round differently.

The text form (a golden file) has a line a step: the step and the loss, the float written so that it reads back exactly.
"""

import argparse
import math
from pathlib import Path

from megakexue.config import UserError, as_number, require, run_program
from megakexue.files import require_new_file, write_whole
from megakexue.run.records import StepRecord, read_metrics

EPILOG = """\
A and B are run folders, metrics.jsonl files or golden text files. Steps that only one of them has are not compared;
the last line tells how many each has.

examples:
  tools/compare_losses.py runs/before runs/after
  tools/compare_losses.py tests/golden/tiny_gqa.txt runs/tiny_gqa --tolerance 1e-3
  tools/compare_losses.py --write-golden tests/golden/tiny_gqa.txt runs/tiny_gqa

exit status: 0 equal or within the tolerance, 1 different, 2 nothing could be compared
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compare the training losses of two runs, step by step.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="A and B; just one with --write-golden")
    parser.add_argument(
        "--tolerance", metavar="X", type=as_number, default=0.0, help="largest |A - B| allowed (default: 0)"
    )
    parser.add_argument("--write-golden", metavar="FILE", type=Path, help="write the losses of RUN as text instead")
    parser.add_argument("--overwrite", action="store_true", help="let --write-golden replace FILE")
    arguments = parser.parse_intermixed_args()
    require(arguments.tolerance >= 0, f"--tolerance={arguments.tolerance} must be 0 or more")
    n_runs = 1 if arguments.write_golden else 2
    if len(arguments.runs) != n_runs:
        parser.error(f"{len(arguments.runs)} runs given: a comparison takes two, --write-golden one")
    if arguments.write_golden:
        write_golden(arguments.write_golden, arguments.runs[0], overwrite=arguments.overwrite)
    elif not compare(*arguments.runs, tolerance=arguments.tolerance):
        raise SystemExit(1)


if __name__ == "__main__":
    run_program(main)
