#!/usr/bin/env python
"""Report on the runs of the demo, and fail if a model has not learned: the last step of `make demo`."""

import argparse
import subprocess
import sys
from pathlib import Path

from megakexue.config import run_program
from megakexue.files import read_json
from megakexue.run.records import ValidationRecord, read_metrics

MARGIN = 0.5  # nats below the unigram entropy


def validation_loss(run: Path) -> float:
    return [record.loss for record in read_metrics(run) if isinstance(record, ValidationRecord)][-1]


def check(loss: float, grown: float, entropy: float) -> None:
    """Print the last validation losses of the small and the grown run, and fail if one has not learned."""
    print(
        f"\nvalidation loss {loss:.3f} nats, grown and trained on {grown:.3f}, "
        f"unigram entropy of the same tokens {entropy:.3f}"
    )
    if not loss < entropy - MARGIN:
        sys.exit("the model has not learned: its validation loss is not well below the unigram entropy")
    if not grown < loss:
        sys.exit("the grown model has not learned: its validation loss is not below that of the small one")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path, metavar="DEMO", help="folder of the demo, runs/demo")
    demo = parser.parse_args().demo
    valid = read_json(demo / "data" / "manifest.json", "the manifest of the data")["splits"]["valid"]
    entropy = valid["unigram_entropy_nats"]
    baseline = f"unigram entropy of the validation tokens={entropy}"
    command = ["tools/plot_run.py", f"{demo}/run", "--report", "--out", f"{demo}/loss.png", "--baseline", baseline]
    print("$ " + " ".join(command), flush=True)
    if code := subprocess.run(command).returncode:
        sys.exit(code)
    check(validation_loss(demo / "run"), validation_loss(demo / "grown_run"), entropy)


if __name__ == "__main__":
    run_program(main)
