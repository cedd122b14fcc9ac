#!/usr/bin/env python
"""Tiger (9512), Lion (9473) and AdamW: which learns most from the same text, each at its best learning rate?

Learning rates are tried on one seed, then the best of each optimizer on two more. Choices within Tiger come last.
"""

import argparse
import math
import os
from pathlib import Path

from common import (
    ROOT,
    TEXT_TITLE,
    Run,
    call,
    data_of,
    heading,
    make_text,
    prepare_data,
    table,
    train,
    validation_loss,
)
from megakexue.config import run_program

EPILOG = """\
Everything is written under runs/optimizers. On one idle core a run takes about three minutes, all of them an hour.
Started again, it goes on where it was stopped. docs/experiments.md says what came out.

example:
  tools/experiments/optimizers.py
"""
OUT = Path("runs/optimizers")
SEEDS = (0, 1, 2)
RATES = {
    "tiger": ("5e-3", "1e-2", "2e-2", "4e-2"),
    "lion": ("3e-4", "1e-3", "3e-3"),
    "adamw": ("1e-3", "3e-3", "1e-2", "3e-2"),
}


def training(optimizer: str, lr: str, *changes: str, variant: str = "", seed: int = 0) -> Run:
    overrides = (
        *data_of(OUT), "train.steps=200", "train.micro_batch_size=16", "checkpoint.every_steps=100",
        "evaluate.every_steps=200", "evaluate.n_rows=512", "metrics.every_steps=10",
        "metrics.statistics_every_steps=null", "metrics.tensorboard=false", f"optim.name={optimizer}",
        f"optim.lr={lr}", f"train.seed={seed}", f"data.shuffle_seed={seed}", *changes,
    )  # fmt: skip
    return Run(name=f"{optimizer}{variant}_{lr}_{seed}", overrides=overrides)


def best_rate(runs: dict[str, Path]) -> str:
    """Return the rate whose run has the lowest validation loss; a loss that is not a number is the highest."""
    losses = {lr: validation_loss(folder) for lr, folder in runs.items()}
    return min(losses, key=lambda lr: (math.isnan(losses[lr]), losses[lr]))


def variants_of_tiger(lr: str, embedding_lr: str) -> list[Run]:
    """DeepNorm's row for Adam, a bf16 momentum, AdamW for the embedding: one seed each."""
    embedding = ("optim.embedding=adamw", f"optim.embedding_lr={embedding_lr}")
    return [
        training("tiger", lr, "model.deepnorm_recipe=adam", variant="-adamrow"),
        training("tiger", lr, "optim.momentum_dtype=bf16", variant="-bf16momentum"),
        training("tiger", lr, *embedding, variant="-adamwembedding"),
    ]


def results(out: Path) -> str:
    """Return the table of all runs in `out`, by optimizer and rate."""
    found: dict[tuple[str, float, str], list[float]] = {}
    for path in sorted(out.glob("*_*_[0-9]/metrics.jsonl")):
        name, lr, _ = path.parent.name.split("_")
        found.setdefault((name, float(lr), lr), []).append(validation_loss(path.parent))
    rows = [
        [name, lr, len(losses), f"{sum(losses) / len(losses):.4f}", f"{min(losses):.4f} .. {max(losses):.4f}"]
        for (name, _, lr), losses in sorted(found.items())
    ]
    return table(["optimizer", "lr", "seeds", "validation loss, mean", "lowest .. highest"], rows)


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_intermixed_args()
    os.chdir(ROOT)
    heading(f"1. {TEXT_TITLE}")
    if not (OUT / "data").is_dir():
        make_text(OUT)
        prepare_data(OUT, "data", "--seq-len", "256", "--valid-fraction", "0.03")
    best = {}
    for optimizer, rates in RATES.items():
        tried = {lr: training(optimizer, lr) for lr in rates}
        for run in tried.values():
            train(run, OUT)
        best[optimizer] = best_rate({lr: OUT / run.name for lr, run in tried.items()})
        for seed in SEEDS[1:]:
            train(training(optimizer, best[optimizer], seed=seed), OUT)
    for run in variants_of_tiger(best["tiger"], best["adamw"]):
        train(run, OUT)
    heading("validation loss in nats per token")
    print(results(OUT), flush=True)
    curves = [f"{OUT}/{optimizer}_{lr}_0" for optimizer, lr in best.items()]
    call(["tools/plot_run.py", *curves, "--out", f"{OUT}/loss.png", "--overwrite"])


if __name__ == "__main__":
    run_program(main)
