"""Turn text into the token rows that training streams: read, drop duplicates, tokenise, pack, write shards.

A folder of prepared data holds manifest.json, its tokenizer and the splits train/ and valid/, which are MDS shards.
With `split_by_length` there are two, short/ and long/, and with `split_by` one for each value of a column, so that a
run can give a weight to each.

What must stay true:
- The rows depend on the inputs and the arguments, never on the number of processes. The documents travel in numbered
  blocks whose borders depend on the input alone, and the blocks are judged for duplicates and packed in their order.
  (The exception is subword sampling, which draws other segmentations each time.)
- The split of a document depends on its bytes alone, so it never moves between train and valid.
- Nothing is lost in silence: a document is in a split, or a duplicate, or skipped for a reason that is counted and
  listed. A document that its tokenizer changes is kept, counted and listed.
- The folder appears under its name only when it is complete.

Who does what: the parent process cuts the inputs into blocks, drops duplicates and packs. The workers read, check and
hash a block, and tokenise the documents in it that the parent keeps. Neither imports torch.
"""

import dataclasses
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, NoReturn
from urllib.parse import quote

import numpy as np

from megakexue.config import UserError, require
from megakexue.files import new_folder, read_json, seal
from megakexue.text.duplicates import in_valid
from megakexue.text.inputs import Block, Reading, check_inputs, cut_into_blocks, find_files, ids_in, read_block
from megakexue.text.ledger import MAX_LINES, MAX_SHOWN, Contents, Ledger
from megakexue.text.pack import BestFit, Concat, row_dtype
from megakexue.text.progress import Progress
from megakexue.text.shards import ShardWriter
from megakexue.text.token_files import read_ids
from megakexue.text.tokenizer import Tokenizer, set_sample_seed
from megakexue.text.tokenizer_files import TOKENIZER_FILES, copy_tokenizer, load_tokenizer

FORMAT = 1
PIECE_BYTES = 1 << 22
"""A longer document is tokenised in pieces of this size, to bound the memory: a character may take 4 bytes, and so may
a token."""
MAX_PARTS = 128
"""Folders of --split-by: each gathers rows in memory, up to 64 MiB of them."""
UNLABELLED = "unlabelled"
"""The folder of documents that have no value to split by."""
LOOKAHEAD = 3
"""Blocks that a worker holds: one being tokenised, one judged, one read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareArguments:
    """What decides the rows, beside the inputs and the tokenizer. Raises UserError."""

    seq_len: int
    packing: Literal["concat", "best_fit"] = "concat"
    """concat: one stream, cut every seq_len tokens; best_fit: a document that fits a row is not cut."""
    valid_fraction: float = 0.005
    sample_alpha: float | None = None
    """Subword sampling of the train split; None: the best segmentation. Every run draws other segmentations, because
    sentencepiece mixes a salt of the process into each seed."""
    copies: int = 1
    """Sampled segmentations of each training document."""
    text_key: str = "text"
    split_by_length: int | None = None
    """Documents of more tokens, BOS and EOS among them, go into a folder `long`, the others into `short`. None: one
    folder for all."""
    split_by: str | None = None
    """Documents go into a folder for each string or whole number under this key of a line or column of a table; those
    without one into `unlabelled`."""
    end_id: int | None = None
    """What stands between documents in .bin files of token ids. None: .bin files without Megatron's index are text."""

    def __post_init__(self) -> None:
        require(self.seq_len >= 2, f"--seq-len {self.seq_len} must be at least 2")
        require(0 <= self.valid_fraction < 1, f"--valid-fraction {self.valid_fraction} must be in [0, 1)")
        alpha, copies = self.sample_alpha, self.copies
        require(copies >= 1, f"--copies {copies} must be at least 1")
        require(alpha is None or 0 <= alpha < math.inf, f"--sample-alpha {alpha} must be finite and not negative")
        repeated = f"--copies {copies} without --sample-alpha would repeat the same rows: add --sample-alpha 0.2"
        require(copies == 1 or alpha is not None, repeated)
        limit = self.split_by_length
        require(limit is None or limit >= 2, f"--split-by-length {limit} must be at least 2")
        require(
            limit is None or copies == 1,
            f"--split-by-length does not fit --copies {copies}, which differ in length: leave one of them out",
        )
        require(
            limit is None or self.split_by is None, "--split-by does not fit --split-by-length: leave one of them out"
        )
        require(self.end_id is None or self.end_id >= 0, f"--end-id {self.end_id} must not be negative")

    @property
    def parts(self) -> tuple[str, ...]:
        """Folders below the one that is written, as far as they are known before the text is read."""
        if self.split_by is not None:
            return ()
        return ("",) if self.split_by_length is None else ("short", "long")

    def reading(self, tokenizer: Tokenizer) -> Reading:
        return Reading(self.text_key, self.split_by, self.end_id, row_dtype(tokenizer.vocab_size).name)


def prepare(
    inputs: list[str], tokenizer_path: str | Path, out: str | Path, args: PrepareArguments, *,
    processes: int | None = None, overwrite: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:  # fmt: skip
    """Write the folder `out` and return its manifest; that of both parts has splits such as long/train.

    `processes` is the number of workers; None: one for each core.

    Raises:
        UserError: an argument is wrong, an input is missing, no document is left, or a worker was killed.
    """
    tokenizer_path, out = Path(tokenizer_path), Path(out)
    processes = len(os.sched_getaffinity(0)) if processes is None else processes
    require(processes >= 1, f"--processes {processes} must be at least 1")
    tokenizer = load_tokenizer(tokenizer_path)
    bytes_total = check(inputs, tokenizer, out, args, overwrite)
    with new_folder(out) as folder:
        copy = copy_tokenizer(tokenizer_path, folder)
        (folder / "spool").mkdir()
        blocks = cut_into_blocks(find_files(inputs), folder / "spool", args.reading(tokenizer))
        with open(folder / "skipped.tsv", "w", encoding="utf-8") as list_file:
            ledger = SplitLedger(inputs, list_file, args, tokenizer)
            splits: dict[str, Split] = {}

            def add(documents: dict[str, np.ndarray]) -> None:
                for name in ledger.splits.keys() - splits.keys():
                    (folder / name).parent.mkdir(exist_ok=True)
                    splits[name] = Split(folder / name, args, tokenizer)
                for name, tokens in documents.items():
                    splits[name].add(tokens)

            add({})
            with Workers(processes, copy, args) as workers:
                for block, tokenised in tokenise_in_order(blocks, workers, ledger.judge):
                    add(ledger.add_packed(block, tokenised))
                    so_far = ledger.bytes_done, bytes_total, ledger.total("documents"), ledger.total("tokens")
                    on_progress(Progress(*so_far))
        shutil.rmtree(folder / "spool")
        ledger.check_training()
        entries = {name: splits[name].finish(counts) for name, counts in ledger.splits.items()}
        for part in ledger.parts:
            own = {name: entries[f"{part}/{name}".lstrip("/")] for name in ("train", "valid")}
            path = folder / part / "manifest.json"
            manifest = make_manifest(tokenizer, args, own, ledger)
            path.write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")
            seal(path)
            if part:
                copy_tokenizer(tokenizer_path, folder / part)
    return make_manifest(tokenizer, args, entries, ledger)


def check(inputs: list[str], tokenizer: Tokenizer, out: Path, args: PrepareArguments, overwrite: bool) -> int:
    """Check what can be checked before hours of work. Return the bytes of all input files. Raises UserError."""
    require(
        args.sample_alpha is None or tokenizer.is_unigram,
        f"--sample-alpha {args.sample_alpha} needs a unigram sentencepiece model, and {tokenizer.path} is none: "
        "train one, or leave --sample-alpha out",
    )
    if out.exists():
        require(overwrite, f"--out {out} exists: choose another, or add --overwrite")
        ours = out.is_dir() and (is_prepared(out) or not any(out.iterdir()))
        require(ours, f"--out {out} was not written by prepare_data: --overwrite will not remove it")
        inside = [name for name in inputs if Path(name).resolve().is_relative_to(out.resolve())]
        require(not inside, f"--overwrite would remove {' '.join(inside[:3])}, which is an INPUT: choose another --out")
    reading = args.reading(tokenizer)
    n_bytes = check_inputs(inputs, reading, out)
    if args.sample_alpha is not None:
        of_ids = next((f.path for f in find_files(inputs) if f.fault is None and ids_in(f.path, reading)), None)
        require(of_ids is None, f"{of_ids} has token ids, which --sample-alpha cannot segment anew: leave it out")
    return n_bytes


def is_prepared(folder: Path) -> bool:
    """Whether a folder is the output of this program: one set, or a folder for each part and nothing else in it."""

    def manifest(of: Path) -> dict[str, Any]:
        try:
            found = read_json(of / "manifest.json", "the manifest of prepared data")
        except UserError:
            return {}
        return found if {"splits", "tokenizer_sha256"} <= found.keys() else {}

    if manifest(folder):
        return True
    parts = [manifest(entry) for entry in folder.iterdir() if entry.is_dir()]
    are_parts = bool(parts) and all(part.get("split_by") or part.get("split_by_length") for part in parts)
    return are_parts and (folder / "skipped.tsv").is_file()


def make_manifest(
    tokenizer: Tokenizer, args: PrepareArguments, splits: dict[str, dict[str, Any]], ledger: "SplitLedger"
) -> dict[str, Any]:
    """Return what manifest.json says; `splits` holds the entry of each split."""
    n_places = args.seq_len * sum(entry["rows"] for entry in splits.values())
    return {
        "format": FORMAT, "tokenizer_sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id,
        "dtype": row_dtype(tokenizer.vocab_size).name,
        **dataclasses.asdict(args),
        "splits": splits,
        "round_trip": {"measured": not tokenizer.is_exact, **ledger.changed},
        "padding_share": sum(entry["padding"] for entry in splits.values()) / n_places,
        **ledger.facts,
    }  # fmt: skip


class Tokenised(NamedTuple):
    """A block whose documents are tokens."""

    splits: list[np.ndarray]
    """Of the train and of the valid documents: BOS, tokens, EOS, BOS, tokens, EOS, ..."""
    changed: list[int]
    """The documents that do not come back byte for byte, by their index among those of the block."""


class SplitLedger(Ledger):
    """The ledger, which also counts the tokens and the splits of each part, divides the documents among parts, and
    names those that do not come back."""

    def __init__(self, inputs: list[str], list_file: IO[str], args: PrepareArguments, tokenizer: Tokenizer) -> None:
        super().__init__(inputs, list_file)
        self.args, self._tokenizer = args, tokenizer
        for source in self.sources:
            source["tokens"] = 0
        self.parts: list[str] = []
        self.splits: dict[str, dict[str, int]] = {}
        """Counts by part and split, such as long/train."""
        self._labels: dict[str, str] = {}  # the part of each label
        for part in args.parts:
            self._open(part)
        self._kept: deque[list[tuple[np.ndarray, np.ndarray]]] = deque()
        """Of the blocks that are judged and not packed: bytes and labels of the documents that are kept, first of those
        for training and then of those for validation."""

        self.changed: dict[str, Any] = {"changed": 0, "paths": []}
        self._judged: deque[tuple[int, list[int]]] = deque()  # blocks not yet packed: lines before, those of documents
        self._n_listed: Counter[str] = Counter()  # of the present file's documents that do not come back

    def judge(self, block: Block, contents: Contents) -> np.ndarray:
        keep = super().judge(block, contents)
        n, faulty = len(contents.faults) + len(contents.sizes), {index for _, index in contents.faults}
        self._judged.append((self._n_lines - n, [index for index in range(n) if index not in faulty]))
        valid = in_valid(contents.digests, self.args.valid_fraction)
        labels = np.array(contents.labels or [""] * len(keep), object)
        self._kept.append([(contents.sizes[chosen], labels[chosen]) for chosen in (keep & ~valid, keep & valid)])
        return keep

    def _open(self, part: str) -> str:
        self.parts.append(part)
        self.splits |= {
            f"{part}/{name}".lstrip("/"): dict(tokens=0, documents=0, bytes=0) for name in ("train", "valid")
        }
        return part

    def _part_of(self, label: str) -> str:
        """Return the folder of a label. Raises UserError: labels are too long or too many to be folders."""
        if label not in self._labels:
            name = folder_name(label) if label else UNLABELLED
            require(
                len(name.encode()) <= 200 and len(self._labels) < MAX_PARTS,
                f"--split-by {self.args.split_by}: {label[:40]!r} is value number {len(self._labels) + 1:,}. They must "
                f"be short and at most {MAX_PARTS}: name a column of languages or sources",
            )
            self._labels[label] = name if name in self.parts else self._open(name)
        return self._labels[label]

    def _divided(self, lengths: np.ndarray, labels: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the parts and which of the documents are theirs, by lengths and labels. A copy is one of `lengths`."""
        if self.args.split_by is not None:
            for label in dict.fromkeys(labels):
                yield self._part_of(label), np.resize(labels == label, len(lengths))
        elif self.args.split_by_length is not None:
            is_long = lengths > self.args.split_by_length
            yield from (("short", ~is_long), ("long", is_long))
        else:
            yield "", np.full(len(lengths), True)

    def add_packed(self, block: Block, tokenised: Tokenised) -> dict[str, np.ndarray]:
        """Count the tokens of a block, name its documents that do not come back; return tokens by part and split."""
        found: dict[str, np.ndarray] = {}
        for split, documents, (sizes, labels) in zip(("train", "valid"), tokenised.splits, self._kept.popleft()):
            self.sources[block.source]["tokens"] += len(documents)
            marks = np.flatnonzero(documents == self._tokenizer.bos_id)
            starts = marks[::2] if self._tokenizer.bos_id == self._tokenizer.eos_id else marks
            lengths = np.diff(starts, append=len(documents))
            for part, chosen in self._divided(lengths, labels):
                name = f"{part}/{split}".lstrip("/")
                tokens = documents[np.repeat(chosen, lengths)]
                found[name] = np.concatenate([found[name], tokens]) if name in found else tokens
                of_documents = sizes[chosen[: len(sizes)]]  # copies are no documents
                counted = {"tokens": len(tokens), "documents": len(of_documents), "bytes": int(of_documents.sum())}
                self.splits[name] = {key: n + counted[key] for key, n in self.splits[name].items()}
        self.bytes_done += block.size
        self._name_changed(block, tokenised.changed)
        return found

    def _name_changed(self, block: Block, changed: list[int]) -> None:
        n_lines, places = self._judged.popleft()
        if block.first or block.span is None:
            self._n_listed.clear()
        for index in changed:
            name = self._name(block, places[index], n_lines)
            self.changed["changed"] += 1
            if len(self.changed["paths"]) < MAX_SHOWN:
                self.changed["paths"].append(name)
            self._n_listed[block.path] += block.span is not None
            if self._list_file and self._n_listed[block.path] <= MAX_LINES:
                self._list_file.write(f"changed\t{name}\n")

    def check_training(self) -> None:
        """Require something to train on: in each part, or, with `split_by`, in any, and a label. Raises UserError."""
        split_by = self.args.split_by
        if split_by is not None and self.parts == [UNLABELLED] and "" in self._labels:
            raise UserError(f"--split-by {split_by}: no line and no row has a string or a whole number there")
        found = any(counts["documents"] for name, counts in self.splits.items() if name.endswith("train"))
        for part in self.args.parts or ("",) * (not found):
            kind = {"": "", "short": f" of at most {self.args.split_by_length} tokens",
                    "long": f" of more than {self.args.split_by_length} tokens"}[part]  # fmt: skip
            remedy = ": choose another --split-by-length" if part and self.total("documents") else ""
            require(
                found and self.splits[f"{part}/train".lstrip("/")]["documents"] > 0,
                f"no training document{kind} in {' '.join(self.inputs)}; skipped: {self.reasons()}{remedy}",
            )


class Split:
    """One of train and valid: its packer, its shards, and how often each id is a target."""

    def __init__(self, folder: Path, args: PrepareArguments, tokenizer: Tokenizer) -> None:
        self.bos_id, self.eos_id, self.pad_id = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
        dtype = row_dtype(tokenizer.vocab_size)
        self.packer: Concat | BestFit = Concat(args.seq_len, dtype, self.pad_id)
        if args.packing == "best_fit":
            self.packer = BestFit(args.seq_len, dtype, self.bos_id, self.eos_id, self.pad_id)
        self.writer = ShardWriter(folder, args.seq_len + 1, dtype)
        self.n_rows = self.n_ends = 0
        self.histogram = np.zeros(tokenizer.vocab_size, np.int64)  # of row[1:]

    def add(self, tokens: np.ndarray) -> None:
        """Pack whole documents, and write the rows that are full."""
        self.n_ends += int(np.count_nonzero(tokens == self.eos_id)) // (2 if self.bos_id == self.eos_id else 1)
        self._write(self.packer.add(tokens))

    def _write(self, rows: np.ndarray) -> None:
        self.writer.write(rows)
        self.n_rows += len(rows)
        for start in range(0, len(rows), 1024):  # in parts, because bincount copies to int64
            self.histogram += np.bincount(rows[start : start + 1024, 1:].ravel(), minlength=len(self.histogram))

    def finish(self, counts: dict[str, int]) -> dict[str, Any]:
        """Write what is left and return the split's entry in the manifest, with the ledger's `counts` in it.

        Targets are what training predicts: neither PAD nor BOS. `unigram_entropy_nats` is the loss that their
        frequencies alone reach; None without targets.
        """
        self._write(self.packer.finish())
        self.histogram[[self.pad_id, self.bos_id]] = 0
        self.histogram[self.eos_id] = self.n_ends  # which may be one of the two
        n_targets = int(self.histogram.sum())
        p = self.histogram[self.histogram > 0] / max(n_targets, 1)
        return {
            "rows": self.n_rows,
            **counts,
            "targets": n_targets,
            "padding": self.packer.n_padding,
            "unigram_entropy_nats": float(p @ np.log(1 / p)) if n_targets else None,
            "index_sha256": self.writer.finish(),
        }


def folder_name(label: str) -> str:
    """Return a name for a folder, of another label another one: what is no letter, digit, _, - or . becomes %XX."""
    name = re.sub(r"[^\w.-]|^\.", lambda found: quote(found[0], safe="", errors="surrogatepass"), label)
    name = name.replace(".", "%2E", 1) if name.startswith(".") else name
    return name + "%" if name in ("spool", "skipped.tsv", *TOKENIZER_FILES) else name


# ------------------------------------------------------------------------------------------- many processes, one order


def tokenise_in_order(
    blocks: Iterator[Block], workers: "Workers", judge: Callable[[Block, Contents], np.ndarray]
) -> Iterator[tuple[Block, Tokenised]]:
    """Drive the workers: yield each block, in order, with the tokens of its documents.

    A worker reads its block and waits for the verdict of `judge`, which says what documents to keep, and which is asked
    block by block in order. Meanwhile the worker reads ahead: it holds up to `LOOKAHEAD` blocks.
    """
    numbered = enumerate(blocks)
    in_work: dict[int, tuple[Block, int]] = {}  # number -> block, its worker; until it is yielded
    read: dict[int, Contents] = {}  # not yet judged
    tokenised: dict[int, Tokenised] = {}  # not yet yielded
    load = [0] * len(workers.pipes)  # blocks that each worker holds
    most = (LOOKAHEAD + 1) * len(load)  # in work at once: behind a slow block, tokens must not fill the memory
    n_judged = n_done = 0
    while True:
        while min(load) < LOOKAHEAD and len(in_work) < most and (next_one := next(numbered, None)):
            number, block = next_one
            worker = load.index(min(load))
            load[worker] += 1
            in_work[number] = block, worker
            workers.send(worker, "read", number, block)
        if not in_work:
            return
        worker, number, answer = workers.receive()
        if isinstance(answer, Contents):
            read[number] = answer
        else:
            tokenised[number] = answer
            load[worker] -= 1
        while n_judged in read:
            block, worker = in_work[n_judged]
            workers.send(worker, "keep", n_judged, np.packbits(judge(block, read.pop(n_judged))))
            n_judged += 1
        while n_done in tokenised:
            block, _ = in_work.pop(n_done)
            yield block, tokenised.pop(n_done)
            n_done += 1


class Workers:
    """The worker processes; a context that ends them."""

    def __init__(self, n: int, tokenizer_path: Path, args: PrepareArguments) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy the parent's threads and pipes
        self.processes, self.pipes = [], []
        for _ in range(n):
            pipe, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, str(tokenizer_path), args), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(pipe)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()  # they own nothing that must be saved
            process.join()

    def send(self, worker: int, task: str, number: int, value: Any) -> None:
        """Give a worker a task. Raises UserError when it has died."""
        try:
            self.pipes[worker].send((task, number, value))
        except (BrokenPipeError, ConnectionResetError):
            self._died(worker)

    def receive(self) -> tuple[int, int, Any]:
        """Wait for an answer and return (worker, number of the block, answer).

        Raises:
            UserError: a worker has died, or cannot read its block any more.
            RuntimeError: a worker has failed; the message is its traceback.
        """
        pipe = wait(self.pipes)[0]
        worker = self.pipes.index(pipe)  # type: ignore[arg-type]
        try:
            number, value = self.pipes[worker].recv()
        except (EOFError, ConnectionResetError):
            self._died(worker)
        if isinstance(value, UserError):
            raise value
        if number is None:
            raise RuntimeError(f"a worker failed {value}")
        return worker, number, value

    def _died(self, worker: int) -> NoReturn:
        self.processes[worker].join()
        raise UserError(
            f"worker {worker} died with exit code {self.processes[worker].exitcode}; -9 means that it was killed, "
            "often for want of memory: run again with fewer --processes"
        )


def work(parent: Connection, tokenizer_path: str, args: PrepareArguments) -> None:
    """Serve as one worker process: answer ("read", number, block) by `Contents`, ("keep", number, bits) by tokens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which stops us
    where = "its start"
    try:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or each worker would have a thread for each core
        tokenizer = load_tokenizer(tokenizer_path)
        set_sample_seed(int.from_bytes(os.urandom(4), "little"))  # no two workers may draw the same stream
        held: dict[int, tuple[Sequence[bytes | np.ndarray], np.ndarray]] = {}
        while True:
            task, number, value = parent.recv()
            if task == "read":
                where = value.path
                documents, contents = read(value, tokenizer, args)
                held[number] = documents, contents.digests
                parent.send((number, contents))
            else:
                documents, digests = held.pop(number)
                keep = np.unpackbits(value, count=len(documents)).astype(bool)
                kept = [text for text, wanted in zip(documents, keep) if wanted]
                del documents
                splits, changed = tokenise(kept, digests[keep], tokenizer, args)
                parent.send((number, Tokenised(splits, np.flatnonzero(keep)[changed].tolist())))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone
    except UserError as error:
        parent.send((None, error))
    except BaseException:
        parent.send((None, f"near {where}:\n{traceback.format_exc()}"))


def read(block: Block, tokenizer: Tokenizer, args: PrepareArguments) -> tuple[Sequence[bytes | np.ndarray], Contents]:
    """Return the documents of a block, as text or as ids, and what is told of them."""
    if block.ids is None or block.span is None:
        texts, faults, labels = read_block(block, args.reading(tokenizer))
        return texts, Contents.of(texts, faults, labels if args.split_by is not None else ())
    ids, texts, faults = read_ids(block.ids, block.span, tokenizer)
    return ids, Contents.of(texts, faults)


def tokenise(
    documents: list[bytes | np.ndarray], digests: np.ndarray, tokenizer: Tokenizer, args: PrepareArguments
) -> Tokenised:
    """Return the tokens of documents; ids stay as they are. With copies, each document comes once before the first
    comes again.
    """
    dtype = row_dtype(tokenizer.vocab_size)
    bos, eos = np.array([tokenizer.bos_id], dtype), np.array([tokenizer.eos_id], dtype)
    valid = in_valid(digests, args.valid_fraction)
    splits, changed = [], []
    for wanted, alpha in ((~valid, args.sample_alpha), (valid, None)):
        parts = [np.empty(0, dtype)]
        copies = args.copies if alpha is not None else 1
        for index in np.tile(np.flatnonzero(wanted), copies):
            document = documents[index]
            if isinstance(document, np.ndarray):
                ids = [document]
            else:
                pieces = enumerate(pieces_of(document))
                ids = [tokenizer.encode_array(piece, alpha, is_start=i == 0) for i, piece in pieces]
                if not tokenizer.is_exact and tokenizer.decode_bytes(np.concatenate(ids).tolist()) != document:
                    changed.append(int(index))
            parts += [bos, *(part.astype(dtype) for part in ids), eos]
        tokens = np.concatenate(parts)
        n_marks = copies * np.count_nonzero(wanted) * (2 if bos == eos else 1)
        assert np.count_nonzero(tokens == bos) == n_marks, "BOS inside a document"
        splits.append(tokens)
    return Tokenised(splits, sorted(changed))


def pieces_of(text: bytes) -> Iterator[bytes]:
    """Cut a very long document: at the end of a line if there is one in reach, and never inside a character."""
    start = 0
    while len(text) - start > PIECE_BYTES:
        stop = text.rfind(b"\n", start, start + PIECE_BYTES) + 1
        if stop <= start:
            stop = start + PIECE_BYTES
            while text[stop] & 0xC0 == 0x80:  # continuation byte of UTF-8
                stop -= 1
        yield text[start:stop]
        start = stop
    yield text[start:]
