#!/usr/bin/env python
"""Train a tokenizer on text files and report how well it compresses text that it did not see."""

import argparse
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from megakexue.config import as_integer, as_number, require, run_program
from megakexue.files import new_files
from megakexue.text.inputs import Reading, check_inputs
from megakexue.text.ledger import Ledger, read_kept, report
from megakexue.text.progress import Progress, ProgressDisplay, heartbeat
from megakexue.text.tokenizer import train_tokenizer

EPILOG = """example:
  tools/train_tokenizer.py corpus/ 'more/*.jsonl.gz' --vocab-size 32000 --out tokenizer.model

INPUT is what tools/prepare_data.py takes, read by the same rules: text files, .jsonl and .ndjson lines, Parquet and
Arrow rows; packed or not. Documents with the same bytes count once. What cannot be used is counted, and listed in
FILE.skipped.tsv. The same documents and arguments give the same file, byte for byte.
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="file, folder or quoted glob")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.model", help="FILE.facts.json goes beside it")
    parser.add_argument(
        "--vocab-size", type=as_integer, required=True, help="number of ids, the 260 special and byte pieces included"
    )
    parser.add_argument(
        "--kind", choices=["unigram", "bpe"], default="unigram", help="unigram (default) can sample segmentations"
    )
    parser.add_argument(
        "--user-symbol", action="append", default=[], metavar="TEXT", help="always one id, such as <|user|>; repeatable"
    )
    parser.add_argument(
        "--chinese-words",
        action="store_true",
        help="no piece reaches from one Chinese word into the next (8209); here this needs pip install "
        "'megakexue[chinese]', and nothing where the tokenizer is used",
    )
    parser.add_argument("--text-key", default="text", help="of .jsonl, .parquet and .arrow (default: text)")
    parser.add_argument(
        "--sample-bytes",
        type=as_integer,
        default=100_000_000,
        help="train on a random sample of at most so many bytes (default: 100 MB)",
    )
    parser.add_argument(
        "--character-coverage",
        type=as_number,
        default=0.9995,
        help="share of characters with a piece; the rest is spelt in bytes (default: 0.9995)",
    )
    parser.add_argument("--seed", type=as_integer, default=0, help="of the sample (default: 0)")
    parser.add_argument(
        "--threads", type=as_integer, default=16, help="part of the result, hence not the number of cores (default: 16)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing FILE.model")
    parser.add_argument("--verbose", action="store_true", help="show sentencepiece's own log")
    return parser.parse_intermixed_args()


def main() -> None:
    args = parse_arguments()
    out, facts_file, list_file = (args.out.with_suffix(ending) for ending in (".model", ".facts.json", ".skipped.tsv"))
    require(args.out.suffix == ".model", f"--out {args.out} must end in .model")
    for file in (out, facts_file):
        require(args.overwrite or not file.exists(), f"{file} exists: choose another --out, or pass --overwrite")
    reading = Reading(args.text_key)
    n_bytes = check_inputs(args.inputs, reading, out)
    with (
        new_files(out, facts_file, list_file) as folder,
        open(folder / list_file.name, "w", encoding="utf-8") as listing,
        ExitStack() as stack,
    ):
        (folder / "spool").mkdir()
        ledger = Ledger(args.inputs, listing)

        def texts() -> Iterator[str]:
            with ProgressDisplay() as display:
                for documents in read_kept(args.inputs, reading, folder / "spool", ledger):
                    yield from documents
                    display(Progress(ledger.bytes_done, n_bytes, ledger.total("documents"), None))
            print(f"read {ledger.total('bytes') / 1e6:.1f} MB of text; training", flush=True)
            stack.enter_context(heartbeat("training"))

        facts = train_tokenizer(
            texts(), folder / out.name, vocab_size=args.vocab_size, kind=args.kind, user_symbols=args.user_symbol,
            sample_bytes=args.sample_bytes, character_coverage=args.character_coverage, seed=args.seed,
            n_threads=args.threads, chinese_words=args.chinese_words, verbose=args.verbose,
        )  # fmt: skip
        facts |= ledger.facts
        text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
        (folder / facts_file.name).write_text(text, encoding="utf-8")
    print("\n".join(report(facts)))
    if facts["skipped"]:
        print(f"all that was skipped is listed in {list_file}")
    print(
        f"{out}: {facts['vocab_size']} ids, {facts['kind']}, trained on {facts['train_bytes'] / 1e6:.1f} MB "
        f"of {facts['text_bytes'] / 1e6:.1f} MB; {facts['bytes_per_token']:.3f} bytes per token "
        f"on {facts['heldout_bytes'] / 1e6:.2f} MB held out; sha256 {facts['sha256'][:12]}"
    )


if __name__ == "__main__":
    run_program(main)
