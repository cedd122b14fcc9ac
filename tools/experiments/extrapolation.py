#!/usr/bin/env python
"""Length extrapolation (8823, 9706, 9708): what does the log n scale gain on texts longer than those trained on?

Models are trained on rows of 256 tokens, with the log n scale and without it. Their losses are taken by position on
documents of 2048 tokens, as trained and with what can be added after training.
"""

import argparse
import os
import shutil
from itertools import pairwise, product
from pathlib import Path

from common import ROOT, TEXT_TITLE, Run, call, data_of, heading, make_text, prepare_data, table, train
from megakexue.config import run_program
from megakexue.files import read_json, writing

EPILOG = """\
Everything is written under runs/extrapolation. On one idle core it takes about an hour. Started again, it goes on where
it was stopped. docs/experiments.md says what came out.

example:
  tools/experiments/extrapolation.py
"""
OUT = Path("runs/extrapolation")
SEEDS = (0, 1, 2)
SCALES = ("constant", "log_n")
CLIPPED = ("--set", "attention.scale=log_n_clipped")
NTK = ("--set", "rope.extension=ntk_exact", "--set", "rope.context=2048")
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "constant": ("constant", ()),
    "log_n": ("log_n", ()),
    "constant+clipped": ("constant", CLIPPED),
    "constant+ntk": ("constant", NTK),
    "log_n+ntk": ("log_n", NTK),
    "constant+clipped+ntk": ("constant", (*CLIPPED, *NTK)),
}
"""Name: the scale in training, and options of tools/evaluate.py."""
EDGES = (0, 256, 512, 1024, 2048)
"""Of the columns of the table, in tokens."""


def training(scale: str, seed: int) -> Run:
    overrides = (
        *data_of(OUT), f"model.attention.scale={scale}", f"train.seed={seed}", f"data.shuffle_seed={seed}",
        "train.steps=600", "train.micro_batch_size=16", "optim.name=adamw", "optim.lr=3e-3", "optim.warmup_steps=50",
        "checkpoint.every_steps=200", "evaluate.every_steps=null", "metrics.every_steps=10",
    )  # fmt: skip
    return Run(name=f"{scale}_{seed}", overrides=overrides)


def results(losses: Path) -> str:
    """Return the table of nats per token by position, from the files NAME_SEED.json in `losses`."""
    spans = [range(*pair) for pair in pairwise(EDGES)]
    found: dict[str, list[list[float]]] = {}
    for path in sorted(losses.glob("*.json")):
        parts = read_json(path, "losses by position")["by_position"]
        inside = [[part for part in parts if part["start"] in span] for span in spans]
        means = [sum(p["loss_sum"] for p in ps) / sum(p["n_tokens"] for p in ps) for ps in inside]
        found.setdefault(path.stem.rpartition("_")[0], []).append(means)
    rows = [
        [name, *(f"{sum(x) / len(x):.3f} ({min(x):.3f} .. {max(x):.3f})" for x in zip(*seeds))]
        for name, seeds in sorted(found.items())
    ]
    return table(["model", *(f"{span.start}-{span.stop - 1}" for span in spans)], rows)


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_intermixed_args()
    os.chdir(ROOT)
    bundles, losses = OUT / "bundles", OUT / "losses"
    with writing(str(OUT), OUT):
        bundles.mkdir(parents=True, exist_ok=True)
        losses.mkdir(exist_ok=True)
    heading(f"1. {TEXT_TITLE}")
    if not (OUT / "long").is_dir():
        make_text(OUT)
        shutil.rmtree(OUT / "data", ignore_errors=True)
        # the same --valid-fraction twice: the documents of the long rows are those that no model was trained on
        prepare_data(OUT, "data", "--valid-fraction", "0.03", "--seq-len", "256")
        prepare_data(OUT, "long", "--valid-fraction", "0.03", "--seq-len", "2048", "--packing", "best_fit")
    for seed, scale in product(SEEDS, SCALES):
        run = training(scale, seed)
        train(run, OUT, title=f"2. training with the scale {scale}, seed {seed}")
        if not (bundles / run.name).is_dir():
            call(["tools/export_model.py", f"{OUT / run.name}", "--out", f"{bundles / run.name}"])
    heading("3. losses by position, as trained and with what is added after training")
    for (name, (scale, options)), seed in product(VARIANTS.items(), SEEDS):
        path = losses / f"{name}_{seed}.json"
        if not path.is_file():
            models = [f"{bundles}/{scale}_{seed}", f"{OUT}/long"]
            call(["tools/evaluate.py", *models, "--by-position", "--one-document", "--json", f"{path}", *options])
    heading("4. nats per token by position: mean over the seeds (lowest .. highest)")
    print(results(losses))


if __name__ == "__main__":
    run_program(main)
