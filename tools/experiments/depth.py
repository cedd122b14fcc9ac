#!/usr/bin/env python
"""Depth (8978): does DeepNorm train a hundred layers that plain post-norm does not train?

The same data, seed and learning rate with DeepNorm and without it, and without it at a tenth of the rate.
"""

import argparse
import os
from pathlib import Path

from common import (
    ROOT,
    TEXT_TITLE,
    Run,
    call,
    heading,
    make_text,
    prepare_data,
    step_records,
    table,
    train,
    unigram_entropy,
)
from megakexue.config import run_program

EPILOG = """\
Everything is written under runs/depth. On one idle core a run takes about seven minutes. Started again, it goes on
where it was stopped. docs/experiments.md says what came out.

example:
  tools/experiments/depth.py
"""
OUT = Path("runs/depth")
PLAIN = ("model.residual_alpha=1", "model.branch_gain=1")  # x <- norm(x + F(x)), every matrix at gain 1
RUNS = [
    Run(name=name, config="configs/deep100.yaml", overrides=overrides)
    for name, overrides in {
        "deepnorm": (),
        "postnorm": PLAIN,
        "postnorm_small_lr": (*PLAIN, "optim.lr=1e-4"),
    }.items()
]
WINDOW = 20  # steps whose mean is a row of the table


def results(folders: list[Path]) -> str:
    """Return the table of the training losses, and of the largest gradient norm, of each run."""
    runs = {folder.name: step_records(folder) for folder in folders}
    rows = []
    for first in range(0, max(map(len, runs.values())), WINDOW):
        means = [sum(r.loss for r in records[first : first + WINDOW]) / WINDOW for records in runs.values()]
        rows.append([f"{first + 1}-{first + WINDOW}", *(f"{mean:.3f}" for mean in means)])
    largest = [max(r.grad_norm for r in records) for records in runs.values()]
    rows.append(["largest gradient norm", *(f"{norm:.3g}" for norm in largest)])
    return table(["steps", *runs], rows)


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_intermixed_args()
    os.chdir(ROOT)
    heading(f"1. {TEXT_TITLE}")
    if not (OUT / "data").is_dir():
        make_text(OUT)
        prepare_data(OUT, "data", "--seq-len", "128", "--valid-fraction", "0.1")
    for run in RUNS:
        train(run, OUT)
    heading(f"losses: means of {WINDOW} steps")
    folders = [OUT / run.name for run in RUNS]
    baseline = f"unigram entropy={unigram_entropy(OUT / 'data', 'train')}"
    picture = ["--out", f"{OUT}/loss.png", "--overwrite"]
    call(["tools/plot_run.py", *map(str, folders), "--baseline", baseline, *picture])
    print(results(folders))


if __name__ == "__main__":
    run_program(main)
