#!/usr/bin/env python
"""What growth saved: tables of the runs that tools/experiments/growth.py has made, and a picture of seed 0.

The first table has the validation losses at the ends, and which share of the FLOPs growth saves to the loss of each run
from scratch; the second has the same for the training loss soon after growth.
"""

import argparse
import io
import math
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path

from common import step_records, table, validation_loss
from megakexue.config import load_config, require, run_program
from megakexue.files import write_whole

EPILOG = """\
The picture is FOLDER/growth.png. docs/growth.md says what came out.

examples:
  tools/experiments/growth_table.py
  tools/experiments/growth_table.py runs/growth_20m
"""
OPTIMIZERS = ("tiger", "adamw")
SHAPES = ("wide", "deep")
EARLY = (50, 100, 200, 400, 600)
"""Steps after growth that the second table looks at."""
N_SMOOTHED = 50
"""Steps whose mean is a training loss of the second table and of the picture."""
SECOND_TITLE = (
    f"Training loss (mean of {N_SMOOTHED} steps) some steps after growth, and the FLOPs saved where the longest run "
    "has it from scratch:"
)


@dataclass(frozen=True)
class Result:
    """What a run has reached, and what it has cost."""

    loss: float
    """At the last validation."""
    flops: float
    curve: list[tuple[float, float]]
    """After each step: FLOPs so far, and the mean of the last training losses."""


def read(folder: Path) -> Result:
    from megakexue.core.costs import flops_per_token

    config = load_config(folder / "config.yaml")
    flops = flops_per_token(config.model, (config.data.seq_len + 1) / 2) * config.batch_tokens
    losses = [record.loss for record in step_records(folder)]  # one a step
    windows = [losses[max(0, n - N_SMOOTHED) : n] for n in range(1, len(losses) + 1)]
    curve = [(flops * n, sum(window) / len(window)) for n, window in enumerate(windows, start=1)]
    return Result(validation_loss(folder), flops * config.train.steps, curve)


@dataclass(frozen=True)
class Comparison:
    """Grown runs against those from scratch, by steps, of one optimizer, shape and seed."""

    optimizer: str
    shape: str
    seed: int
    small: Result
    grown: dict[int, Result]
    scratch: dict[int, Result]

    @property
    def longest_grown(self) -> Result:
        return self.grown[max(self.grown)]

    @property
    def longest_scratch(self) -> Result:
        return self.scratch[max(self.scratch)]

    def saved(self, *, with_small: bool) -> str:
        """Return the share of FLOPs saved against each run from scratch. `with_small`: the small run's FLOPs count."""
        shares = []
        for run in self.scratch.values():
            sign, needed = flops_needed(list(self.grown.values()), run.loss)
            shares.append(f"{sign}{1 - (needed + with_small * self.small.flops) / run.flops:.0%}")
        return ", ".join(shares)

    def saved_early(self, n_steps: int) -> str:
        """Return the training loss `n_steps` after growth, and the share of FLOPs saved to reach it."""
        if n_steps > max(self.grown):
            return ""
        flops, loss = self.longest_grown.curve[n_steps - 1]
        needed = next((f for f, x in self.longest_scratch.curve[N_SMOOTHED - 1 :] if x <= loss), math.nan)
        return f"{loss:.2f}: {1 - (self.small.flops + flops) / needed:.0%}"


def flops_needed(grown: list[Result], loss: float) -> tuple[str, float]:
    """Return the FLOPs where the line through the ends of the grown runs (log FLOPs, loss) meets a loss.

    The sign says what is known of the share saved: "> " where the shortest run was already below the loss, "< " where
    the longest was not.
    """
    for one, next_ in pairwise(grown):
        if next_.loss <= loss:
            share = max(0.0, (one.loss - loss) / (one.loss - next_.loss))
            needed = math.exp(math.log(one.flops) + (math.log(next_.flops) - math.log(one.flops)) * share)
            return "> " if one.loss <= loss else "", needed
    return "< ", grown[-1].flops


def comparisons(out: Path) -> list[Comparison]:
    """Read all runs that are done."""

    def done(kind: str, shape: str, optimizer: str, seed: int) -> dict[int, Result]:
        folders = [path.parent for path in out.glob(f"{kind}_{shape}@*-{optimizer}-{seed}/done")]
        return dict(sorted((int(folder.name.split("@")[1].split("-")[0]), read(folder)) for folder in folders))

    found = []
    for optimizer, shape, seed in product(OPTIMIZERS, SHAPES, range(10)):
        grown, scratch = (done(kind, shape, optimizer, seed) for kind in ("grown", "scratch"))
        if grown and scratch:
            small = read(out / f"small-{optimizer}-{seed}")
            found.append(Comparison(optimizer, shape, seed, small, grown, scratch))
    return found


def results(found: list[Comparison]) -> str:
    """Return the table of the losses at the ends, and that of the losses soon after growth."""

    def ends(runs: dict[int, Result]) -> str:
        return ", ".join(f"{steps}: {run.loss:.3f}" for steps, run in runs.items())

    names = ["optimizer", "to", "seed"]
    columns = ["small", "grown, by steps", "from scratch, by steps", "FLOPs saved", "if the small one is there"]
    keys = [[c.optimizer, c.shape, c.seed] for c in found]
    at_end = [
        [f"{c.small.loss:.3f}", ends(c.grown), ends(c.scratch), c.saved(with_small=True), c.saved(with_small=False)]
        for c in found
    ]
    early = [[c.saved_early(n) for n in EARLY] for c in found]
    first = table([*names, *columns], [[*key, *cells] for key, cells in zip(keys, at_end)])
    second = table([*names, *EARLY], [[*key, *cells] for key, cells in zip(keys, early)])
    return f"{first}\n\n{SECOND_TITLE}\n\n{second}"


def draw(found: list[Comparison], lowest: float, path: Path) -> None:
    """Draw the training losses of seed 0 against FLOPs.

    Args:
        lowest: validation loss of all runs.
    """
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(OPTIMIZERS), figsize=(10, 3.6), sharey=True)
    for optimizer, panel in zip(OPTIMIZERS, panels):
        panel.set(title=optimizer, xlabel="FLOPs in all", xscale="log", ylabel="loss, nats per token")
        for c in (c for c in found if c.optimizer == optimizer and c.seed == 0):
            color = {"wide": "C0", "deep": "C1"}[c.shape]
            grown = [(c.small.flops + x, y) for x, y in c.longest_grown.curve]
            panel.plot(*zip(*c.longest_scratch.curve), color=color, lw=1, ls=":", label=f"{c.shape}, from scratch")
            panel.plot(*zip(*grown), color=color, lw=1.2, label=f"{c.shape}, grown")
            if c.shape == "wide":
                panel.plot(*zip(*c.small.curve), color="0.5", lw=1, label="small")
        panel.legend(fontsize=8)
    panels[0].set_ylim(lowest - 0.1, lowest + 2)
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=80)
    write_whole(path, picture.getvalue())


def report(out: Path) -> None:
    """Print the tables of the runs in `out`, and draw OUT/growth.png."""
    done = [path.parent for path in out.glob("*/done")]
    require(len(done) > 0, f"{out} has no run that is done: make them with tools/experiments/growth.py")
    found = comparisons(out)
    print(results(found))
    draw(found, min(map(validation_loss, done)), out / "growth.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/growth"), help="(default: runs/growth)")
    report(parser.parse_intermixed_args().folder)


if __name__ == "__main__":
    run_program(main)
