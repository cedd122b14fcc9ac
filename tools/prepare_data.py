#!/usr/bin/env python
"""Turn text into the folder of token rows that training reads; megakexue/text/prepare.py says how."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from megakexue.config import run_program
from megakexue.text.inputs import REASONS
from megakexue.text.prepare import PrepareArguments, Progress, prepare

EPILOG = """
INPUT is a file, a folder (all its files, but hidden ones) or a quoted glob. Each of these is one document:
  a text file (Markdown, source code, anything in UTF-8), also .gz or .zst;
  a line of a .jsonl file, also .gz or .zst: the string under --text-key;
  a row of a .parquet file: the string in the column --text-key.
Documents with the same bytes are kept once. What cannot be used is counted and listed in manifest.json.

example, a tokenizer and data for a first run:
  tools/train_tokenizer.py notes/ 'wiki/*.jsonl.gz' --vocab-size 16384 --out data/tokenizer.model
  tools/prepare_data.py notes/ 'wiki/*.jsonl.gz' --tokenizer data/tokenizer.model --seq-len 1024 --out data/first
then in the YAML of the run:
  data: {tokenizer: data/first/tokenizer.model, seq_len: 1024, sources: [{path: data/first}]}

The rows do not depend on --processes. A run that is killed leaves nothing under --out: start it again.
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="file, folder or quoted glob")
    parser.add_argument("--tokenizer", required=True, type=Path, help="model file of tools/train_tokenizer.py")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; it must not exist")
    parser.add_argument("--seq-len", required=True, type=int, help="tokens of a row that training predicts")
    parser.add_argument(
        "--packing",
        choices=("concat", "best_fit"),
        default="concat",
        help="concat: one stream, cut at row ends; best_fit: whole documents with padding (default: concat)",
    )
    parser.add_argument(
        "--valid-fraction", type=float, default=0.005, help="share of documents for validation (default: 0.005)"
    )
    parser.add_argument("--text-key", default="text", help="of .jsonl and .parquet (default: text)")
    parser.add_argument(
        "--sample-alpha",
        type=float,
        help="subword sampling of the train split, drawn anew in each run, such as 0.2; unigram tokenizers only",
    )
    parser.add_argument("--copies", type=int, default=1, help="sampled copies of each training document (default: 1)")
    parser.add_argument("--processes", type=int, help="worker processes (default: one for each core)")
    parser.add_argument("--overwrite", action="store_true", help="replace an --out that this program wrote before")
    return parser.parse_args()


class ProgressDisplay:
    """Shows a bar on a terminal, and writes a line every ten seconds to anything else, such as a log."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.bar = None
        if sys.stderr.isatty():
            # imported here, because every worker imports this file
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
            self.bar = Bar(*columns, console=Console(stderr=True))
            self.bar.start()
            self.task = self.bar.add_task("")

    def __call__(self, progress: Progress) -> None:
        now = time.perf_counter()
        text = (
            f"{progress.documents / (now - self.start):,.0f} documents/s, "
            f"{progress.tokens / (now - self.start):,.0f} tokens/s"
        )
        if self.bar:
            self.bar.update(self.task, completed=progress.bytes_done, total=progress.bytes_total, description=text)
        elif now - self.last >= 10:
            self.last = now
            share = progress.bytes_done / max(progress.bytes_total, 1)
            print(f"{share:.1%} of {progress.bytes_total / 1e6:,.0f} MB, {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()


def summary(manifest: dict[str, Any], out: Path, seconds: float) -> str:
    """Return the lines that say what was written, dropped and skipped."""
    lines = []
    for name, split in manifest["splits"].items():
        entropy = split["unigram_entropy_nats"]
        lines.append(
            f"{name}: {split['documents']:,} documents, {split['bytes']:,} bytes, {split['tokens']:,} tokens, "
            f"{split['rows']:,} rows of {manifest['seq_len']} + 1"
            + ("" if entropy is None else f", unigram entropy {entropy:.4f} nats")
        )
    for name, source in manifest["sources"].items():
        lines.append(
            f"{name}: {source['documents']:,} documents kept, {source['duplicates']:,} duplicates dropped, "
            f"{sum(source['skipped'].values()):,} skipped"
        )
    for reason, entry in manifest["skipped"].items():
        lines.append(f"skipped, {REASONS[reason]}: {entry['count']:,}, such as {entry['paths'][0]}")
    if manifest["splits"]["valid"]["documents"] == 0 and manifest["valid_fraction"] > 0:
        lines.append("warning: no document fell into the valid split; raise --valid-fraction")
    lines.append(f"padding {manifest['padding_share']:.2%}; written to {out} in {seconds:.0f} s")
    return "\n".join(lines)


def main() -> None:
    options = parse_arguments()
    args = PrepareArguments(
        seq_len=options.seq_len,
        packing=options.packing,
        valid_fraction=options.valid_fraction,
        sample_alpha=options.sample_alpha,
        copies=options.copies,
        text_key=options.text_key,
    )
    progress = ProgressDisplay()
    try:
        manifest = prepare(
            options.inputs,
            options.tokenizer,
            options.out,
            args,
            processes=options.processes,
            overwrite=options.overwrite,
            on_progress=progress,
        )
    finally:
        progress.close()
    print(summary(manifest, options.out, time.perf_counter() - progress.start))


if __name__ == "__main__":
    run_program(main)
