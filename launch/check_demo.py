#!/usr/bin/env python
"""Report on the runs of the demo, and fail if a model has not learned: the last step of `make demo`.

With --prompts, print instead the first words of two documents that no model was trained on, a line each.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

from megakexue.config import require, run_program
from megakexue.files import read_json
from megakexue.run.records import ValidationRecord, read_metrics
from megakexue.text.tokenizer_files import find_tokenizer, load_tokenizer

MARGIN = 0.5  # nats below the unigram entropy
N_TOKENS = 8  # of a prompt


def prompts(data: Path) -> list[str]:
    """The beginnings of the first and the last document in the first shard of the validation rows, in any language."""
    tokenizer = load_tokenizer(find_tokenizer(data))
    split = data / "valid"
    shard = read_json(split / "index.json", "the index of the validation rows")["shards"][0]
    stored = (split / shard["raw_data"]["basename"]).read_bytes()
    n, start = np.frombuffer(stored, np.uint32, 2)
    rows = np.frombuffer(stored, shard["column_encodings"][0].split(":")[1], offset=int(start)).reshape(n, -1)
    found = []
    for row, column in np.argwhere(rows == tokenizer.bos_id):
        words = tokenizer.decode(rows[row, column + 1 : column + 1 + N_TOKENS].tolist())
        # half a character, at the end, is no part of it
        if text := " ".join(words.rstrip("\ufffd").split()):
            found.append(text)
    require(bool(found), f"{split} has no document to take a prompt from")
    return [found[0], found[-1]]


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
    parser.add_argument("--prompts", action="store_true", help="print the first words of two documents, and end")
    args = parser.parse_intermixed_args()
    demo = args.demo
    if args.prompts:
        print(*prompts(demo / "data"), sep="\n")
        return
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
