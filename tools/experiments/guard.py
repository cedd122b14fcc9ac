#!/usr/bin/env python
"""The guard on real text: what do fifty non-finite numbers cost, and does fp16 find its loss scale?

300 steps of the tiny model on two ranks: clean; with 50 non-finite numbers in random micro-batches, under two policies;
and in fp16 from a loss scale of 2^24.
"""

import argparse
import os
import shutil
from collections import Counter
from pathlib import Path

from common import ROOT, Run, heading, step_records, table, train, validation_loss
from megakexue.config import require, run_program

EPILOG = """\
`make demo` makes the data. Everything is written under runs/guard. Started again, it makes the runs that are missing.
docs/experiments.md says what came out.

example:
  tools/experiments/guard.py
"""
OUT = Path("runs/guard")
DATA = Path("runs/demo/data")
FAULTS = "tools/inject_faults.py"


def runs(*, steps: int = 300, n_faults: int = 50) -> list[Run]:
    """List the runs, all of the same length but one. Each run with faults has them in `n_faults` of its steps."""
    common = (
        f"train.steps={steps}", "metrics.every_steps=10", "metrics.statistics_every_steps=null",
        "metrics.tensorboard=false", "checkpoint.every_steps=50", f"evaluate.every_steps={steps}",
        "evaluate.n_rows=1000",
    )  # fmt: skip
    fewer = steps - n_faults  # as many updates as the runs with faults make
    faults = ("--n-faults", str(n_faults))
    return [
        Run(name="clean", n_ranks=2, overrides=common),
        Run(
            name=f"clean{fewer}",
            n_ranks=2,
            overrides=(*common, f"train.steps={fewer}", f"evaluate.every_steps={fewer}"),
        ),
        *(
            Run(name=policy, n_ranks=2, program=FAULTS, overrides=(*common, *faults, f"guard.on_nonfinite={policy}"))
            for policy in ("shrink", "skip")
        ),
        Run(name="fp16", n_ranks=2, overrides=(*common, "engine.dtype=fp16", "guard.initial_loss_scale=16777216")),
    ]


def make(run: Run, out: Path) -> None:
    """Train a run that is not done. One with faults begins anew, since faults are counted from the first step."""
    if run.program == FAULTS and not (out / run.name / "done").exists():
        shutil.rmtree(out / run.name, ignore_errors=True)
    train(run, out)


def n_not_finite(checkpoint: Path) -> int:
    """Count the weights and momenta of a checkpoint that are not finite."""
    from safetensors import safe_open

    n = 0
    for path in checkpoint.glob("rank_*.safetensors"):
        with safe_open(path, "pt") as file:
            n += sum(int((~file.get_tensor(key).isfinite()).sum()) for key in file.keys() if key[:4] != "rng/")
    return n


def results(folders: list[Path]) -> str:
    """Return the table of how each run ended."""
    rows = []
    for folder in folders:
        records = step_records(folder)
        n_steps = records[-1].step
        bad = Counter(record.status for record in records if record.status != "applied")
        steps = [f"{n_steps - bad.total()} applied", *(f"{n} {status}" for status, n in bad.items())]
        n_bad = n_not_finite(folder / "checkpoints" / f"step_{n_steps:08d}")
        rows.append([folder.name, f"{validation_loss(folder):.4f}", ", ".join(steps), n_bad])
    return table(["run", "validation loss", "steps", "weights that are not finite"], rows)


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_intermixed_args()
    os.chdir(ROOT)
    require(DATA.is_dir(), f"no {DATA}: run `make demo` first")
    for run in runs():
        make(run, OUT)
    heading("validation loss in nats per token")
    print(results([OUT / run.name for run in runs()]))


if __name__ == "__main__":
    run_program(main)
