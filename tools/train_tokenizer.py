#!/usr/bin/env python
"""Train a tokenizer on text files and report how well it compresses text that it did not see."""

import argparse
import glob
import gzip
import json
import os
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from megakexue.config import UserError, require, run_program
from megakexue.text.tokenizer import train_tokenizer

READ_CHARS = 2**20  # a text file is read in pieces, so that its size does not matter
PROGRESS_S = 5.0
N_SKIPPED_SHOWN = 5

EPILOG = """example:
  tools/train_tokenizer.py corpus/ 'more/*.jsonl.gz' --vocab-size 32000 --out tokenizer.model

Inputs are files, folders (read recursively, in name order, without hidden files) and quoted globs. A .jsonl file holds
one JSON object a line, whose --text-key is the text; every other file is plain UTF-8 text; .gz of either is unpacked.
Files that are no UTF-8 text are skipped and counted. The same text and arguments give the same file, byte for byte.
"""


class Corpus:
    """The texts of all inputs, read one by one. It prints progress, and counts the files that are skipped."""

    def __init__(self, inputs: list[str], text_key: str) -> None:
        self.files = find_files(inputs)
        self.text_key = text_key
        self.n_skipped = 0

    def __iter__(self) -> Iterator[str]:
        n_chars, told_at = 0, time.monotonic()
        for n_files, file in enumerate(self.files):
            try:
                for text in read_texts(file, self.text_key):
                    yield text
                    n_chars += len(text)
                    if time.monotonic() - told_at > PROGRESS_S:
                        print(
                            f"read {n_chars / 1e6:.0f} M characters, {n_files} of {len(self.files)} files", flush=True
                        )
                        told_at = time.monotonic()
            except UnicodeDecodeError:
                self.n_skipped += 1
                if self.n_skipped <= N_SKIPPED_SHOWN:
                    print(f"skipped {file}: not UTF-8 text", flush=True)
        print(f"read {n_chars / 1e6:.1f} M characters from {len(self.files)} files; training", flush=True)


def find_files(inputs: list[str]) -> list[Path]:
    """List the files of all inputs, each once. Raises UserError for an input without a file."""
    files: dict[Path, None] = {}
    for name in inputs:
        roots = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        found = [file for root in map(Path, roots) for file in ([root] if root.is_file() else sorted(walk(root)))]
        require(len(found) > 0, f"{name}: no such file, no match, or an empty folder")
        files |= dict.fromkeys(found)
    return list(files)


def walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, without hidden files and folders."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def read_texts(file: Path, text_key: str) -> Iterator[str]:
    """Yield the texts of a file: one for each line of a .jsonl file, or pieces of a plain file.

    Raises:
        UnicodeDecodeError: the file is not UTF-8 text.
        UserError: the file cannot be read, or a line of a .jsonl file has no string at `text_key`.
    """
    is_gzip = file.suffix == ".gz"
    is_jsonl = (file.with_suffix("") if is_gzip else file).suffix == ".jsonl"
    try:
        with (gzip.open if is_gzip else open)(file, "rt", encoding="utf-8", newline="") as stream:  # type: ignore[operator]
            if is_jsonl:
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        yield read_json_line(line, text_key, f"{file}:{number}")
            else:
                while text := stream.read(READ_CHARS):
                    if "\0" in text:
                        raise UnicodeDecodeError("utf-8", b"\0", 0, 1, "a NUL, as binary files have")
                    yield text
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: cannot read it: {error}") from error


def read_json_line(line: str, text_key: str, where: str) -> str:
    """Return the string at `text_key`. Raises UserError, naming the line as `where`."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: no JSON: {error}") from error
    text = value.get(text_key) if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise UserError(f"{where}: no string at {text_key!r}: name the field with --text-key")
    return text


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="file, folder or quoted glob")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE.model", help="FILE.json with the facts goes beside it"
    )
    parser.add_argument(
        "--vocab-size", type=int, required=True, help="number of ids, the 260 special and byte pieces included"
    )
    parser.add_argument(
        "--kind", choices=["unigram", "bpe"], default="unigram", help="unigram (default) can sample segmentations"
    )
    parser.add_argument(
        "--user-symbol", action="append", default=[], metavar="TEXT", help="always one id, such as <|user|>; repeatable"
    )
    parser.add_argument("--text-key", default="text", help="field of a .jsonl line (default: text)")
    parser.add_argument(
        "--sample-bytes",
        type=int,
        default=100_000_000,
        help="train on a random sample of at most so many bytes (default: 100 MB)",
    )
    parser.add_argument(
        "--character-coverage",
        type=float,
        default=0.9995,
        help="share of characters with a piece; the rest is spelt in bytes (default: 0.9995)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: 0)")
    parser.add_argument(
        "--threads", type=int, default=16, help="part of the result, hence not the number of cores (default: 16)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing FILE.model")
    parser.add_argument("--verbose", action="store_true", help="show sentencepiece's own log")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    out, facts_file = args.out, args.out.with_suffix(".json")
    require(out.suffix == ".model", f"--out {out} must end in .model")
    for file in (out, facts_file):
        require(args.overwrite or not file.exists(), f"{file} exists: choose another --out, or pass --overwrite")
    corpus = Corpus(args.inputs, args.text_key)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        model = Path(folder, out.name)
        facts = train_tokenizer(
            corpus,
            model,
            vocab_size=args.vocab_size,
            kind=args.kind,
            user_symbols=args.user_symbol,
            sample_bytes=args.sample_bytes,
            character_coverage=args.character_coverage,
            seed=args.seed,
            n_threads=args.threads,
            verbose=args.verbose,
        )
        facts |= {"inputs": args.inputs, "n_files": len(corpus.files), "n_skipped": corpus.n_skipped}
        Path(folder, facts_file.name).write_text(
            json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        os.replace(Path(folder, facts_file.name), facts_file)
        os.replace(model, out)
    print(
        f"{out}: {facts['vocab_size']} ids, {facts['kind']}, trained on {facts['train_bytes'] / 1e6:.1f} MB "
        f"of {facts['text_bytes'] / 1e6:.1f} MB; {facts['bytes_per_token']:.3f} bytes per token "
        f"on {facts['heldout_bytes'] / 1e6:.2f} MB held out; sha256 {facts['sha256'][:12]}"
    )
    if corpus.n_skipped:
        print(f"skipped {corpus.n_skipped} of {len(corpus.files)} files: not UTF-8 text")


if __name__ == "__main__":
    run_program(main)
