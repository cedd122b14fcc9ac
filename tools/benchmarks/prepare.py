#!/usr/bin/env python
"""Compare the speed of prepare_data with bare sentencepiece on the same documents, and show the memory it takes."""

import argparse
import contextlib
import gzip
import json
import multiprocessing
import os
import re
import resource
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import sentencepiece

from megakexue.config import as_integer, require, run_program
from megakexue.files import temporary_folder
from megakexue.text.tokenizer import train_tokenizer

PROGRAM = Path(__file__).parents[1] / "prepare_data.py"

EPILOG = """
The corpus is the source and documentation of the running Python and of its packages: 40 % text files, 40 % .jsonl,
20 % .jsonl.gz. It is repeated until it is large enough, with another first line each time, so no copy is a duplicate.

Bare sentencepiece is a pool of processes that have the documents in memory when they fork. They encode them to numpy
arrays, which is the fastest form, and return only counts. prepare_data runs as a user runs it. Both include their
start-up. The CPU seconds are those of all processes; other work on the machine changes them less than the clock time.

example:
  tools/benchmarks/prepare.py --megabytes 100 --processes 2
"""


def real_texts() -> Iterator[str]:
    """Yield the texts of the running Python and its packages, in the order of their names."""
    paths = sysconfig.get_paths()
    files = (file for root in (paths["stdlib"], paths["purelib"]) for file in sorted(Path(root).rglob("*")))
    for file in files:
        if file.suffix in (".py", ".md", ".rst", ".txt", ".html", ".c", ".h", ".pyi") and file.is_file():
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            if text.strip() and "\0" not in text:
                yield text


def write_corpus(folder: Path, n_bytes: int) -> list[bytes]:
    """Write the corpus and return its documents."""
    (folder / "files").mkdir(parents=True)
    documents: list[bytes] = []
    with (
        open(folder / "lines.jsonl", "w") as plain,
        gzip.open(folder / "packed.jsonl.gz", "wt", compresslevel=1) as packed,
    ):
        done = round_ = 0
        while done < n_bytes:
            for text in real_texts():
                document = f"# round {round_}\n{text}".encode()
                match len(documents) % 5:
                    case 0 | 1:
                        (folder / "files" / f"{len(documents):07}.txt").write_bytes(document)
                    case 2 | 3:
                        print(json.dumps({"text": document.decode()}), file=plain)
                    case _:
                        print(json.dumps({"text": document.decode()}), file=packed)
                documents.append(document)
                done += len(document)
                if done >= n_bytes:
                    break
            round_ += 1
    return documents


class Cost(NamedTuple):
    wall_s: float
    cpu_s: float

    @classmethod
    def now(cls) -> "Cost":
        """Return the clock, and the CPU seconds of this process and of the children that have ended."""
        usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return cls(time.perf_counter(), sum(usage.ru_utime + usage.ru_stime for usage in usages))

    def since(self) -> "Cost":
        return Cost(*(after - before for after, before in zip(Cost.now(), self)))


processor: sentencepiece.SentencePieceProcessor  # what a bare worker has, beside the documents
texts: list[bytes]


def start_bare(model: Path, documents: list[bytes]) -> None:
    global processor, texts
    processor, texts = sentencepiece.SentencePieceProcessor(model_file=str(model)), documents


def encode_bare(index: int) -> int:
    return len(processor.encode(texts[index], return_type="numpy"))


def run_bare(model: Path, documents: list[bytes], processes: int) -> Cost:
    """Encode all documents with sentencepiece alone."""
    start = Cost.now()
    with multiprocessing.get_context("fork").Pool(processes, start_bare, (model, documents)) as pool:
        for _ in pool.imap_unordered(encode_bare, range(len(documents)), chunksize=64):
            pass
        pool.close()
        pool.join()
    return start.since()


def run_prepare(command: list[str], peaks: dict[int, int]) -> Cost:
    """Run prepare_data, and put the peak resident bytes of each of its processes into `peaks`, by process id."""
    start = Cost.now()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    own = Path(f"/proc/{process.pid}")
    while process.poll() is None:
        with contextlib.suppress(OSError):  # a process may end while we look at it
            children = (own / "task" / own.name / "children").read_text().split()
            for pid in (own.name, *children):
                status = Path(f"/proc/{pid}/status").read_text()
                if found := re.search(r"VmHWM:\s+(\d+) kB", status):
                    peaks[int(pid)] = 1024 * int(found[1])
        time.sleep(0.1)
    require(process.returncode == 0, "prepare_data failed")
    return start.since()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=as_integer, default=100, help="of text (default: 100)")
    parser.add_argument(
        "--processes", type=as_integer, default=len(os.sched_getaffinity(0)), help="default: one for each core"
    )
    parser.add_argument("--rounds", type=as_integer, default=5, help="in each, one runs after the other (default: 5)")
    parser.add_argument("--vocab-size", type=as_integer, default=16384, help="of the unigram tokenizer trained for it")
    parser.add_argument("--packing", choices=("concat", "best_fit"), default="concat")
    parser.add_argument("--seq-len", type=as_integer, default=2048)
    options = parser.parse_intermixed_args()
    require(options.megabytes > 0, f"--megabytes {options.megabytes} must be positive")
    require(options.rounds > 0, f"--rounds {options.rounds} must be positive")
    with temporary_folder() as folder:
        documents = write_corpus(folder / "corpus", options.megabytes * 1_000_000)
        n_bytes = sum(map(len, documents))
        print(f"{len(documents):,} documents, {n_bytes:,} bytes, {options.processes} processes")
        model = folder / "tokenizer.model"
        sample = (text.decode() for text in documents[:: max(1, n_bytes // 10_000_000)])
        train_tokenizer(sample, model, vocab_size=options.vocab_size)
        command = [sys.executable, str(PROGRAM), str(folder / "corpus")]
        command += ["--tokenizer", str(model), "--out", str(folder / "out"), "--seq-len", str(options.seq_len)]
        command += ["--packing", options.packing, "--processes", str(options.processes), "--overwrite"]
        wall_ratios, cpu_ratios = [], []
        peaks: dict[int, int] = {}
        for _ in range(options.rounds):  # in turns, so that a busy machine is busy for both
            bare = run_bare(model, documents, options.processes)
            peaks.clear()
            ours = run_prepare(command, peaks)
            for what, cost in ("bare", bare), ("prepare_data", ours):
                print(f"{what}: {n_bytes / cost.wall_s / 1e6:.2f} MB/s, {cost.cpu_s:.2f} CPU s", end="; ")
            print(f"load {os.getloadavg()[0]:.1f}", flush=True)
            wall_ratios.append(bare.wall_s / ours.wall_s)
            cpu_ratios.append(bare.cpu_s / ours.cpu_s)
        print(f"median of rounds, bare time / prepare_data time: {statistics.median(wall_ratios):.1%}")
        print(f"median of rounds, bare CPU seconds / prepare_data CPU seconds: {statistics.median(cpu_ratios):.1%}")
        print("peak memory of each process, MiB:", sorted((peak >> 20 for peak in peaks.values()), reverse=True))


if __name__ == "__main__":
    run_program(main)
