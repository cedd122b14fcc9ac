"""Turn text into the token rows that training streams: read, drop duplicates, tokenise, pack, write shards.

A document is a text file, a line of a .jsonl file or a row of a Parquet file, and becomes BOS, its tokens, EOS. A row
holds seq_len + 1 tokens: inputs are row[:-1] and targets row[1:]. Where documents start is read off the row alone: at
each BOS (no text encodes to one) and at the row's start. Rows are MDS samples of one fixed-shape column, `tokens`.

What must stay true:
- The rows depend on the inputs and the arguments, never on the number of processes: documents travel in numbered
  blocks whose borders only the input decides, and blocks are judged for duplicates and packed in their order. (Which
  segmentation subword sampling draws is the exception.)
- The split of a document depends on its bytes alone, so it never moves between train and valid.
- Nothing is lost in silence: a document is in a split, a duplicate, or skipped for a counted and listed reason.
- The folder appears under its name only when it is whole.

Who does what: the parent cuts inputs into blocks (decompressing what cannot be read from its middle), drops duplicates
and packs; workers read, check and hash a block, and tokenise what the parent keeps of it. Neither imports torch: shards
are written here, byte for byte as `streaming.MDSWriter` writes them (a test compares), because importing streaming
takes five seconds and 700 MB.
"""

import contextlib
import dataclasses
import fcntl
import glob
import gzip
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import stat
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
import xxhash

from megakexue.config import UserError, require, sha256
from megakexue.tokenizer import Tokenizer, set_sample_seed

FORMAT = 1
BLOCK_BYTES = 1 << 20
"""Text that a worker takes at a time; smaller blocks cost messages, larger ones memory and idle workers at the end."""
PIECE_BYTES = 1 << 22
"""A longer document is tokenised in such pieces, to bound the memory: a character may take 4 bytes, and so a token."""
MAX_DOCUMENT_BYTES = 1 << 27
"""Longer ones are skipped: they would not fit the promise of less than 1 GiB in a process."""
SHARD_BYTES = 1 << 26
BUFFER_TOKENS = 1 << 22
"""Tokens that best_fit gathers before it packs them."""
MAX_LISTED = 200
"""Paths in the manifest for each reason to skip."""
LOOKAHEAD = 3
"""Blocks that a worker holds: one being tokenised, one judged, one read."""

REASONS = {
    "empty": "nothing but white space",
    "binary": "contains a NUL byte",
    "not_utf8": "not valid UTF-8",
    "bad_json": "a line that is no JSON",
    "no_text": "a line or row without a string under the text key",
    "too_large": f"above {MAX_DOCUMENT_BYTES >> 20} MiB",
    "unreadable": "cannot be read, or damaged from some point on",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareArguments:
    """What decides the rows, beside the inputs and the tokenizer."""

    seq_len: int
    packing: Literal["concat", "best_fit"] = "concat"
    """concat: one stream, cut every seq_len tokens; best_fit: no document is cut while it fits a row."""
    valid_fraction: float = 0.005
    sample_alpha: float | None = None
    """Subword sampling of the train split; None: the best segmentation. Drawn anew in each run: sentencepiece mixes
    a salt of the process into every seed, so no seed brings a segmentation back."""
    copies: int = 1
    """Sampled segmentations of each training document."""
    text_key: str = "text"

    def __post_init__(self) -> None:
        require(self.seq_len >= 2, f"--seq-len {self.seq_len} must be at least 2")
        require(0 <= self.valid_fraction < 1, f"--valid-fraction {self.valid_fraction} must be in [0, 1)")
        require(self.copies >= 1, f"--copies {self.copies} must be at least 1")
        require(
            self.sample_alpha is None or (math.isfinite(self.sample_alpha) and self.sample_alpha >= 0),
            f"--sample-alpha {self.sample_alpha} must be finite and not negative",
        )
        require(
            self.copies == 1 or self.sample_alpha is not None,
            f"--copies {self.copies} without --sample-alpha would repeat the same rows: add --sample-alpha 0.2",
        )


# ------------------------------------------------------------------------------------------------ duplicates and split


def digests_of(documents: list[bytes]) -> np.ndarray:
    """Return the xxh3 digest of each document, uint64.

    Among n different documents a false duplicate has probability n^2 / 2^65: 3 % for one in a billion documents.
    """
    return np.array([xxhash.xxh3_64_intdigest(text) for text in documents], np.uint64)


def in_valid(digests: np.ndarray, valid_fraction: float) -> np.ndarray:
    """Say which documents are validation: a larger fraction only adds to those of a smaller one."""
    return digests < np.uint64(int(valid_fraction * 2**64))


class DigestSet:
    """A set of uint64 in one array (open addressing, linear probing): 16 to 32 bytes for each member."""

    def __init__(self) -> None:
        self.slots = np.zeros(1 << 12, np.uint64)  # 0: free
        self.n = 0

    def add(self, digests: np.ndarray) -> np.ndarray:
        """Add all and return which were new, bool; of equal ones among them the first counts."""
        keys, first = np.unique(np.maximum(digests, np.uint64(1)), return_index=True)
        if 2 * (self.n + len(keys)) > len(self.slots):
            members = self.slots[self.slots > 0]
            self.slots = np.zeros(1 << (2 * (self.n + len(keys))).bit_length(), np.uint64)
            self._insert(members)
        new = np.zeros(len(digests), bool)
        inserted = self._insert(keys)
        new[first[inserted]] = True
        self.n += int(inserted.sum())
        return new

    def _insert(self, keys: np.ndarray) -> np.ndarray:
        last = len(self.slots) - 1
        place = (keys & np.uint64(last)).astype(np.int64)
        new = np.zeros(len(keys), bool)
        todo = np.arange(len(keys))
        while len(todo):
            free = todo[self.slots[place[todo]] == 0]
            self.slots[place[free]] = keys[free]  # when two claim one slot, one of them stands there afterwards
            new[free] = self.slots[place[free]] == keys[free]
            todo = todo[self.slots[place[todo]] != keys[todo]]
            place[todo] = (place[todo] + 1) & last
        return new


# -------------------------------------------------------------------------------------------------------------- inputs


class Job(NamedTuple):
    """A block of input. The parent reads none of it, so that it stays light: it hands out the place."""

    source: int
    paths: list[str]
    """Files that are one document each; or the one file that the lines stand in."""
    size: int
    """Bytes of input that are done with this block, for the progress bar."""
    span: tuple[int, int] | None = None
    """Of bytes: each line there is a document."""
    spooled_from: str | None = None
    """The packed file that this block of lines was unpacked from; the worker deletes the block."""
    first: bool = False
    """The block begins its file: line numbers start again."""
    damaged: bool = False
    """No block, but the news that the file cannot be read, or no further."""


def suffixes(path: str) -> tuple[str, str]:
    """Return the kind (.jsonl, .parquet or another) and the compression (.gz, .zst or nothing) of a file name."""
    stem, last = os.path.splitext(path.lower())
    packed = last if last in (".gz", ".zst") else ""
    kind = os.path.splitext(stem)[1] if packed else last
    return ".jsonl" if kind == ".ndjson" else kind, packed


def find_files(inputs: list[str]) -> Iterator[tuple[int, str]]:
    """Yield (index of the input, path) in sorted order; inside a folder, hidden files and folders are passed over.

    Raises:
        UserError: an input is there neither as a file, nor as a folder with files, nor as a glob that matches.
    """
    for source, name in enumerate(inputs):
        roots = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        require(bool(roots), f"{name}: no such file or folder, and no file matches it as a glob")
        found = False
        for root in roots:
            if not os.path.isdir(root):
                found = True
                yield source, root
            for folder, folders, files in os.walk(root):
                folders[:] = sorted(inner for inner in folders if not inner.startswith("."))
                for file in sorted(files):
                    if not file.startswith("."):
                        found = True
                        yield source, os.path.join(folder, file)
        require(found, f"{name}: there is no file in it")


def size_of(path: str) -> int:
    """Return the bytes of a regular file. Raises OSError for what is none: reading a pipe would never end."""
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):
        raise OSError(f"{path} is not a regular file")
    return info.st_size


def check_readable(path: str, text_key: str) -> None:
    """Check what a file needs before hours are spent on others. Raises UserError."""
    kind, packed = suffixes(path)
    if packed == ".zst":
        require(importlib.util.find_spec("zstandard") is not None, f"{path}: to read it, pip install zstandard")
    if kind == ".parquet":
        require(importlib.util.find_spec("pyarrow") is not None, f"{path}: to read it, pip install pyarrow")
        require(not packed, f"{path}: unpack it first; Parquet is compressed inside")
        import pyarrow
        import pyarrow.parquet

        try:
            schema = pyarrow.parquet.read_schema(path)
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{path}: not a readable Parquet file: {error}") from error
        require(text_key in schema.names, f"{path}: no column {text_key!r} among {schema.names}: set --text-key")
        column = schema.field(text_key).type
        text = pyarrow.types.is_string(column) or pyarrow.types.is_large_string(column)
        require(text, f"{path}: column {text_key!r} holds {column}, not strings: set --text-key")


@contextlib.contextmanager
def open_unpacked(path: str) -> Iterator[tuple[io.BufferedIOBase, Callable[[], int]]]:
    """Open a file through its decompressor, with a function that says how many of its packed bytes are read."""
    packed = suffixes(path)[1]
    with open(path, "rb") as raw:
        if packed == ".gz":
            yield gzip.GzipFile(fileobj=raw), raw.tell
        elif packed == ".zst":
            import zstandard

            reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True, closefd=False)
            yield io.BufferedReader(reader), raw.tell
        else:
            yield raw, raw.tell


def plan_jobs(files: Iterable[tuple[int, str]], spool: Path, text_key: str) -> Iterator[Job]:
    """Cut the files into blocks.

    What can only be read from its beginning is unpacked here, a block at a time, into small files in `spool`.
    """
    spool_files = (spool / str(number) for number in itertools.count())
    whole, n_chars = Job(0, [], 0), 0  # a block of whole files, being gathered
    for source, path in files:
        kind, packed = suffixes(path)
        is_document = kind not in (".jsonl", ".parquet")
        try:
            size, damaged = size_of(path), False
            if not is_document:
                open(path, "rb").close()
        except OSError:
            size, damaged = 0, True
        # The names are bounded too: a job must fit the pipe, or sending it would wait for a busy worker.
        goes_on = is_document and not damaged and source == whole.source
        if whole.paths and not (goes_on and whole.size + size <= BLOCK_BYTES and n_chars <= 8192):
            yield whole
            whole, n_chars = Job(source, [], 0), 0
        if damaged:
            yield Job(source, [path], 0, damaged=True)
        elif is_document:
            whole = Job(source, [*whole.paths, path], whole.size + size)
            n_chars += len(path)
        elif kind == ".parquet":
            yield from spooled(source, path, parquet_blocks(path, size, text_key), spool_files)
        elif packed:
            yield from spooled(source, path, line_blocks(path), spool_files)
        else:
            yield from line_spans(source, path, size)
    if whole.paths:
        yield whole


def rest_of_line(file: io.BufferedIOBase, path: str) -> bytes:
    tail = file.readline(MAX_DOCUMENT_BYTES)
    require(len(tail) < MAX_DOCUMENT_BYTES, f"{path}: a line is above {MAX_DOCUMENT_BYTES >> 20} MiB: shorten it")
    return tail


def line_spans(source: int, path: str, size: int) -> Iterator[Job]:
    start = 0
    with open(path, "rb") as file:
        while start < size:
            file.seek(start + BLOCK_BYTES)
            stop = min(start + BLOCK_BYTES + len(rest_of_line(file, path)), size)
            yield Job(source, [path], stop - start, span=(start, stop), first=start == 0)
            start = stop


def line_blocks(path: str) -> Iterator[tuple[bytes, int]]:
    with open_unpacked(path) as (file, position):
        done = 0
        while block := file.read(BLOCK_BYTES):
            block += rest_of_line(file, path)
            yield block, position() - done
            done = position()


def parquet_blocks(path: str, size: int, text_key: str) -> Iterator[tuple[bytes, int]]:
    """Yield the rows as lines of JSON, so that workers know one form; a batch of rows at a time."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        n_rows = max(file.metadata.num_rows, 1)
        for batch in file.iter_batches(batch_size=256, columns=[text_key], use_threads=False):
            texts = batch.column(0).to_pylist()
            lines = [json.dumps({text_key: text}, ensure_ascii=False).encode() for text in texts]
            yield b"\n".join(lines) + b"\n", size * len(texts) // n_rows


def spooled(source: int, path: str, blocks: Iterator[tuple[bytes, int]], spool_files: Iterator[Path]) -> Iterator[Job]:
    first = True
    while True:
        try:
            block, size = next(blocks, (b"", 0))
        except UserError:
            raise
        except Exception:  # gzip, zlib, zstandard and pyarrow have no common error
            yield Job(source, [path], 0, damaged=True)
            return
        if not block:
            return
        file = next(spool_files)
        file.write_bytes(block)
        yield Job(source, [str(file)], size, span=(0, len(block)), spooled_from=path, first=first)
        first = False


# ------------------------------------------------------------------------------------------------------------- workers


class Block(NamedTuple):
    """What a worker says of a block after reading it."""

    digests: np.ndarray
    sizes: np.ndarray
    """Bytes of each document."""
    skipped: list[tuple[str, int]]
    """(reason, index of the path or line in the block)."""
    n_entries: int
    """Paths or lines in the block."""


def flaw(text: bytes) -> str | None:
    """Return the reason to skip a document, or None; that it is UTF-8 is checked where it is read."""
    if len(text) > MAX_DOCUMENT_BYTES:
        return "too_large"
    if not text or text.isspace():
        return "empty"
    return "binary" if b"\0" in text else None


def read_file(path: str) -> tuple[bytes, str | None]:
    """Return a file's text, unpacked, and the reason to skip it or None."""
    try:
        size_of(path)
        with open_unpacked(path) as (file, _):
            text = file.read(MAX_DOCUMENT_BYTES + 1)
    except Exception:  # the decompressors have no common error
        return b"", "unreadable"
    reason = flaw(text)
    try:
        if not reason:
            text.decode()
    except UnicodeDecodeError:
        reason = "not_utf8"
    return text, reason


def read_line(line: bytes, text_key: str) -> tuple[bytes, str | None]:
    """Return the text under `text_key` of a line of JSON, and the reason to skip it or None."""
    if not line or line.isspace():
        return b"", "empty"
    try:
        record = json.loads(line.decode())
        text = record.get(text_key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            return b"", "no_text"
        encoded = text.encode()
    except UnicodeError:  # a lone surrogate, such as "\ud800", is JSON but no text
        return b"", "not_utf8"
    except (ValueError, RecursionError):
        return b"", "bad_json"
    return encoded, flaw(encoded)


def read_block(job: Job, text_key: str) -> tuple[list[bytes], Block]:
    """Read a block's documents."""
    entries: Iterable[tuple[bytes, str | None]]
    if job.damaged:
        entries, n_entries = [(b"", "unreadable")], 1
    elif job.span is None:
        entries, n_entries = map(read_file, job.paths), len(job.paths)
    else:
        with open(job.paths[0], "rb") as file:
            file.seek(job.span[0])
            lines = file.read(job.span[1] - job.span[0]).split(b"\n")
        if not lines[-1]:
            lines.pop()  # what follows the last newline is no line
        if job.spooled_from:
            os.unlink(job.paths[0])
        entries, n_entries = (read_line(line, text_key) for line in lines), len(lines)
    documents, skipped = [], []
    for index, (text, reason) in enumerate(entries):
        if reason:
            skipped.append((reason, index))
        else:
            documents.append(text)
    sizes = np.array([len(text) for text in documents], np.int64)
    return documents, Block(digests_of(documents), sizes, skipped, n_entries)


def pieces_of(text: bytes) -> Iterator[bytes]:
    """Cut a very long document, after a line where there is one, never in a character."""
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


def tokenise(
    documents: list[bytes], digests: np.ndarray, tokenizer: Tokenizer, args: PrepareArguments
) -> list[np.ndarray]:
    """Return the tokens of the train and of the valid documents, in one array each: BOS, tokens, EOS, BOS, ...

    Copies of a document do not follow one another.
    """
    dtype = row_dtype(tokenizer.vocab_size)
    bos, eos = np.array([tokenizer.bos_id], dtype), np.array([tokenizer.eos_id], dtype)
    valid = in_valid(digests, args.valid_fraction)
    splits = []
    for wanted, alpha in ((~valid, args.sample_alpha), (valid, None)):
        parts = [np.empty(0, dtype)]
        copies = args.copies if alpha is not None else 1
        for index in np.tile(np.flatnonzero(wanted), copies):
            ids = [tokenizer.encode_array(piece, alpha).astype(dtype) for piece in pieces_of(documents[index])]
            parts += [bos, *ids, eos]
        tokens = np.concatenate(parts)
        assert np.count_nonzero(tokens == bos) == copies * np.count_nonzero(wanted), "BOS inside a document"
        splits.append(tokens)
    return splits


def work(parent: Connection, tokenizer_path: str, args: PrepareArguments) -> None:
    """Serve one worker process: ("read", number, job) is answered by a Block, ("keep", number, bits) by tokens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which stops us
    where = "its start"
    try:
        tokenizer = Tokenizer(tokenizer_path)
        set_sample_seed(int.from_bytes(os.urandom(4), "little"))  # no two workers may draw the same stream
        held: dict[int, tuple[list[bytes], np.ndarray]] = {}
        while True:
            task, number, value = parent.recv()
            if task == "read":
                where = value.spooled_from or value.paths[0]
                documents, block = read_block(value, args.text_key)
                held[number] = documents, block.digests
                parent.send((number, block))
            else:
                documents, digests = held.pop(number)
                keep = np.unpackbits(value, count=len(documents)).astype(bool)
                kept = [text for text, wanted in zip(documents, keep) if wanted]
                del documents
                parent.send((number, tokenise(kept, digests[keep], tokenizer, args)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone
    except BaseException:
        parent.send((None, f"near {where}:\n{traceback.format_exc()}"))


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
        try:
            self.pipes[worker].send((task, number, value))
        except (BrokenPipeError, ConnectionResetError):
            self._died(worker)

    def receive(self) -> tuple[int, int, Any]:
        """Return (worker, block number, its answer). Raises when a worker has failed or died."""
        pipe = wait(self.pipes)[0]
        worker = self.pipes.index(pipe)  # type: ignore[arg-type]
        try:
            number, value = self.pipes[worker].recv()
        except (EOFError, ConnectionResetError):
            self._died(worker)
        if number is None:
            raise RuntimeError(f"a worker failed {value}")
        return worker, number, value

    def _died(self, worker: int) -> None:
        self.processes[worker].join()
        raise UserError(
            f"worker {worker} died with exit code {self.processes[worker].exitcode}; -9 means that it was killed, "
            "often for want of memory: run again with fewer --processes"
        )


# ------------------------------------------------------------------------------------------------------------- packing


def row_dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class Concat:
    """Cut one stream of documents every seq_len tokens.

    A row repeats the last token of the row before it, as its first input, so every token but the stream's first is a
    target once.
    """

    def __init__(self, seq_len: int, dtype: np.dtype, pad_id: int) -> None:
        self.seq_len, self.pad_id = seq_len, pad_id
        self.rest = np.empty(0, dtype)

    def add(self, tokens: np.ndarray) -> np.ndarray:
        """Take whole documents and return the rows that are full, (rows, seq_len + 1)."""
        stream = np.concatenate([self.rest, tokens])
        n = max(len(stream) - 1, 0) // self.seq_len
        self.rest = stream[n * self.seq_len :].copy()
        if n == 0:
            return np.empty((0, self.seq_len + 1), stream.dtype)
        return np.lib.stride_tricks.sliding_window_view(stream, self.seq_len + 1)[:: self.seq_len][:n]

    def finish(self) -> np.ndarray:
        """Return the last row, padded, if any token is left that was no target."""
        rows = np.full((int(len(self.rest) > 1), self.seq_len + 1), self.pad_id, self.rest.dtype)
        rows[:, : len(self.rest)] = self.rest
        return rows


class BestFit:
    """Best-fit-decreasing packing of whole documents within a buffer of `BUFFER_TOKENS`.

    A document longer than a row is cut into row-length pieces that overlap by one token, and only its rest is packed:
    at the start of a row, since it has no BOS to tell it from a document before it.
    """

    def __init__(self, seq_len: int, dtype: np.dtype, bos_id: int, pad_id: int) -> None:
        self.row_len, self.dtype, self.bos_id, self.pad_id = seq_len + 1, dtype, bos_id, pad_id
        self._empty()

    def _empty(self) -> None:
        self.full: list[np.ndarray] = []
        self.rests: list[np.ndarray] = []
        self.documents: list[np.ndarray] = []
        self.buffered = 0

    def add(self, tokens: np.ndarray) -> np.ndarray:
        """Take whole documents and return the rows of the buffer if it is full, (rows, seq_len + 1)."""
        borders = [*np.flatnonzero(tokens == self.bos_id).tolist(), len(tokens)]
        for begin, end in itertools.pairwise(borders):
            place = self.documents
            while end - begin > self.row_len:
                self.full.append(tokens[begin : begin + self.row_len])
                begin += self.row_len - 1
                place = self.rests
            place.append(tokens[begin:end])
        self.buffered += len(tokens)
        return self.finish() if self.buffered >= BUFFER_TOKENS else np.empty((0, self.row_len), self.dtype)

    def finish(self) -> np.ndarray:
        """Return the rows of what is in the buffer."""
        bins = [[piece] for piece in self.full + self.rests]
        by_space: dict[int, list[int]] = {}  # free places -> bins
        spaces = 0  # bit s: some bin has s free places

        def put_back(index: int, space: int) -> int:
            by_space.setdefault(space, []).append(index)
            return spaces | 1 << space

        for index, piece in enumerate(self.rests, start=len(self.full)):
            spaces = put_back(index, self.row_len - len(piece))
        for piece in sorted(self.documents, key=len, reverse=True):
            fitting = spaces >> len(piece) << len(piece)
            if fitting:
                space = (fitting & -fitting).bit_length() - 1
                index = by_space[space].pop()
                if not by_space[space]:
                    spaces ^= 1 << space
                bins[index].append(piece)
            else:
                space, index = self.row_len, len(bins)
                bins.append([piece])
            spaces = put_back(index, space - len(piece))
        rows = np.full((len(bins), self.row_len), self.pad_id, self.dtype)
        for row, pieces in zip(rows, bins):
            joined = np.concatenate(pieces)
            row[: len(joined)] = joined
        self._empty()
        return rows


class ShardWriter:
    """Write rows as MDS shards, byte for byte as `streaming.MDSWriter(hashes=["xxh64"])` does."""

    def __init__(self, folder: Path, row_len: int, dtype: np.dtype) -> None:
        folder.mkdir()
        self.folder = folder
        self.config = {
            "column_encodings": [f"ndarray:{dtype.name}:{row_len}"],
            "column_names": ["tokens"],
            "column_sizes": [row_len * dtype.itemsize],
            "compression": None,
            "format": "mds",
            "hashes": ["xxh64"],
            "size_limit": SHARD_BYTES,
            "version": 2,
        }
        self.head = json.dumps(self.config, sort_keys=True).encode()
        rows = (SHARD_BYTES - 8 - len(self.head)) // (row_len * dtype.itemsize + 4)
        require(rows > 0, f"--seq-len {row_len - 1}: a row does not fit a shard of {SHARD_BYTES >> 20} MiB")
        self.rows = np.empty((rows, row_len), dtype)
        self.n = 0
        self.shards: list[dict[str, Any]] = []

    def write(self, rows: np.ndarray) -> None:
        while len(rows):
            taken = rows[: len(self.rows) - self.n]
            self.rows[self.n : self.n + len(taken)] = taken
            self.n += len(taken)
            rows = rows[len(taken) :]
            if self.n == len(self.rows):
                self._flush()

    def _flush(self) -> None:
        rows = self.rows[: self.n]
        offsets = 8 + 4 * self.n + len(self.head) + np.arange(self.n + 1) * (rows.itemsize * rows.shape[1])
        parts = [np.uint32(self.n).tobytes(), offsets.astype(np.uint32).tobytes(), self.head, rows.data]
        name = f"shard.{len(self.shards):05}.mds"
        digest = xxhash.xxh64()
        with open(self.folder / name, "wb") as file:
            for part in parts:
                digest.update(part)
                file.write(part)
            sync(file)
        info = {"basename": name, "bytes": int(offsets[-1]), "hashes": {"xxh64": digest.hexdigest()}}
        self.shards.append({"samples": self.n, "raw_data": info, "zip_data": None, **self.config})
        self.n = 0

    def finish(self) -> str:
        """Write the last shard and the index, and return the index's sha256."""
        if self.n:
            self._flush()
        index = self.folder / "index.json"
        with open(index, "w") as file:
            json.dump({"version": 2, "shards": self.shards}, file, sort_keys=True)
            sync(file)
        return sha256(index)


def sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


# ----------------------------------------------------------------------------------------------------------- the whole


class Progress(NamedTuple):
    bytes_done: int
    bytes_total: int
    """Of input, as it lies on disk."""
    documents: int
    tokens: int


class Split:
    """One of train and valid: its packer, its shards and its counts."""

    def __init__(self, folder: Path, args: PrepareArguments, tokenizer: Tokenizer) -> None:
        self.bos_id, self.pad_id = tokenizer.bos_id, tokenizer.pad_id
        dtype = row_dtype(tokenizer.vocab_size)
        self.packer: Concat | BestFit
        if args.packing == "concat":
            self.packer = Concat(args.seq_len, dtype, self.pad_id)
        else:
            self.packer = BestFit(args.seq_len, dtype, self.bos_id, self.pad_id)
        self.writer = ShardWriter(folder, args.seq_len + 1, dtype)
        self.counts = dict.fromkeys(("rows", "tokens", "documents", "bytes"), 0)
        self.histogram = np.zeros(tokenizer.vocab_size, np.int64)  # of row[1:]

    def add(self, tokens: np.ndarray) -> None:
        self.counts["tokens"] += len(tokens)
        self._write(self.packer.add(tokens))

    def _write(self, rows: np.ndarray) -> None:
        self.writer.write(rows)
        self.counts["rows"] += len(rows)
        for start in range(0, len(rows), 1024):  # bincount makes int64 of what it is given
            self.histogram += np.bincount(rows[start : start + 1024, 1:].ravel(), minlength=len(self.histogram))

    def finish(self) -> dict[str, Any]:
        """Write what is left and return the split's entry in the manifest.

        Targets are what training predicts: neither PAD nor BOS. `unigram_entropy_nats` is the loss that their
        frequencies alone reach; None without targets.
        """
        self._write(self.packer.finish())
        padding = int(self.histogram[self.pad_id])
        self.histogram[[self.pad_id, self.bos_id]] = 0
        n_targets = int(self.histogram.sum())
        p = self.histogram[self.histogram > 0] / max(n_targets, 1)
        return {
            **self.counts,
            "targets": n_targets,
            "padding": padding,
            "unigram_entropy_nats": float(p @ np.log(1 / p)) if n_targets else None,
            "index_sha256": self.writer.finish(),
        }


@contextlib.contextmanager
def replace_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """Give a folder to write in, which takes the name `out` when the block ends well and is removed when it does not.

    Killed in between, it stays behind as `.NAME.partial`, and the next run for the same `out` removes it.

    Raises:
        UserError: `out` exists, or another run is writing it.
    """
    partial, old = out.parent / f".{out.name}.partial", out.parent / f".{out.name}.old"
    if out.exists():
        require(overwrite, f"--out {out} exists: choose another, or add --overwrite")
        ours = out.is_dir() and ((out / "manifest.json").is_file() or not any(out.iterdir()))
        require(ours, f"--out {out} was not written by prepare_data: --overwrite will not remove it")
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"--out {out}: another run is writing it") from error
        except OSError:
            pass  # a file system without locks
        try:
            for leftover in partial.iterdir():
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                elif leftover.name != "lock":
                    leftover.unlink()
            yield partial
            (partial / "lock").unlink()
            shutil.rmtree(old, ignore_errors=True)
            if out.exists():
                out.rename(old)
            partial.rename(out)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def prepare(
    inputs: list[str],
    tokenizer_path: str | Path,
    out: str | Path,
    args: PrepareArguments,
    *,
    processes: int | None = None,
    overwrite: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Write `out`/{manifest.json, tokenizer.model, train/, valid/} and return the manifest.

    `processes` are the workers; None: one for each core.

    Raises:
        UserError: an argument is wrong, an input is missing, no document is left, or a worker was killed.
    """
    tokenizer_path, out = Path(tokenizer_path), Path(out)
    processes = len(os.sched_getaffinity(0)) if processes is None else processes
    require(processes >= 1, f"--processes {processes} must be at least 1")
    tokenizer = Tokenizer(tokenizer_path)
    require(
        args.sample_alpha is None or tokenizer.is_unigram,
        f"--sample-alpha {args.sample_alpha} needs a unigram tokenizer, and {tokenizer_path} is BPE: "
        "train a unigram one, or leave --sample-alpha out",
    )
    require(bool(inputs), "no INPUT: name files, folders or globs")
    require(len(set(inputs)) == len(inputs), f"an INPUT is named twice: {' '.join(inputs)}")
    for name in inputs:
        inside = overwrite and out.exists() and out.resolve().is_relative_to(Path(name).resolve())
        require(not inside, f"--out {out} lies inside INPUT {name} and would be read: choose another --out")
    bytes_total = 0
    for _, path in find_files(inputs):
        check_readable(path, args.text_key)
        with contextlib.suppress(OSError):
            bytes_total += size_of(path)
    with replace_folder(out, overwrite) as folder:
        shutil.copyfile(tokenizer_path, folder / "tokenizer.model")
        with Workers(processes, folder / "tokenizer.model", args) as workers:
            manifest = write_rows(inputs, tokenizer, folder, args, workers, bytes_total, on_progress)
        shutil.rmtree(folder / "spool")
        with open(folder / "manifest.json", "w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1, ensure_ascii=False)
            sync(file)
    return manifest


def write_rows(
    inputs: list[str],
    tokenizer: Tokenizer,
    folder: Path,
    args: PrepareArguments,
    workers: Workers,
    bytes_total: int,
    on_progress: Callable[[Progress], None],
) -> dict[str, Any]:
    """Drive the workers and write the two splits into `folder`; return the manifest.

    Blocks are judged (which documents are new) and packed in their order. A worker holds up to `LOOKAHEAD` blocks, so
    that it reads ahead while earlier ones are judged.
    """
    (folder / "spool").mkdir()
    splits = {name: Split(folder / name, args, tokenizer) for name in ("train", "valid")}
    sources: list[dict[str, Any]] = [
        {"documents": 0, "tokens": 0, "bytes": 0, "duplicates": 0, "skipped": {}} for _ in inputs
    ]
    listed: dict[str, dict[str, Any]] = {}
    seen = DigestSet()

    def skip(source: int, reason: str, where: str) -> None:
        assert reason in REASONS
        sources[source]["skipped"][reason] = sources[source]["skipped"].get(reason, 0) + 1
        entry = listed.setdefault(reason, {"count": 0, "paths": []})
        entry["count"] += 1
        if entry["count"] <= MAX_LISTED:
            entry["paths"].append(where)

    n_lines = 0  # of the present file, in the blocks judged so far

    def judge(job: Job, block: Block) -> np.ndarray:
        """Count a block and return which of its documents are kept."""
        nonlocal n_lines
        n_lines = 0 if job.first else n_lines
        for reason, index in block.skipped:
            line = f"{job.spooled_from or job.paths[0]}:{n_lines + index + 1}"
            skip(job.source, reason, job.paths[index] if job.span is None else line)
        n_lines += block.n_entries
        keep = seen.add(block.digests)
        valid = in_valid(block.digests, args.valid_fraction)
        source = sources[job.source]
        source["duplicates"] += int((~keep).sum())
        for counts, chosen in (
            (source, keep),
            (splits["train"].counts, keep & ~valid),
            (splits["valid"].counts, keep & valid),
        ):
            counts["documents"] += int(chosen.sum())
            counts["bytes"] += int(block.sizes[chosen].sum())
        return keep

    plan = plan_jobs(find_files(inputs), folder / "spool", args.text_key)
    jobs: dict[int, tuple[Job, int]] = {}  # number -> block, its worker
    blocks: dict[int, Block] = {}  # read, not yet judged
    tokens: dict[int, list[np.ndarray]] = {}  # not yet packed
    load = [0] * len(workers.pipes)
    n_planned = n_judged = n_packed = bytes_done = 0
    more = True
    while True:
        # What waits to be packed is bounded too, or one slow block would let the others fill the memory.
        while more and min(load) < LOOKAHEAD and n_planned - n_packed < (LOOKAHEAD + 1) * len(load):
            if (next_job := next(plan, None)) is None:
                more = False
                break
            worker = load.index(min(load))
            load[worker] += 1
            jobs[n_planned] = next_job, worker
            workers.send(worker, "read", n_planned, next_job)
            n_planned += 1
        if not more and n_packed == n_planned:
            break
        worker, number, answer = workers.receive()
        if isinstance(answer, Block):
            blocks[number] = answer
        else:
            tokens[number] = answer
            load[worker] -= 1
        while n_judged in blocks:
            job, worker = jobs[n_judged]
            workers.send(worker, "keep", n_judged, np.packbits(judge(job, blocks.pop(n_judged))))
            n_judged += 1
        while n_packed in tokens:
            job, _ = jobs.pop(n_packed)
            for split, documents in zip(splits.values(), tokens.pop(n_packed)):
                split.add(documents)
                sources[job.source]["tokens"] += len(documents)
            bytes_done += job.size
            n_packed += 1
            done = {key: sum(split.counts[key] for split in splits.values()) for key in ("documents", "tokens")}
            on_progress(Progress(bytes_done, bytes_total, **done))

    reasons = ", ".join(f"{entry['count']} {REASONS[reason]}" for reason, entry in listed.items())
    require(
        splits["train"].counts["documents"] > 0, f"no training document in {' '.join(inputs)}; skipped: {reasons or 0}"
    )
    entries = {name: split.finish() for name, split in splits.items()}
    n_places = args.seq_len * sum(entry["rows"] for entry in entries.values())
    return {
        "format": FORMAT,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        "dtype": row_dtype(tokenizer.vocab_size).name,
        "inputs": inputs,
        **dataclasses.asdict(args),
        "splits": entries,
        "padding_share": sum(entry["padding"] for entry in entries.values()) / n_places,
        "sources": dict(zip(inputs, sources)),
        "skipped": listed,
    }
