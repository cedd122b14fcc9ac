"""Turn the files that people have into documents: find them, cut them into blocks, read a block.

A document is a text file, a line of a .jsonl file or a row of a Parquet file. Text and lines may be packed as .gz or
.zst.

What must stay true:
- The borders of the blocks depend on the files alone, so the order of documents does not depend on who reads a block.
- Whoever cuts the files does not read them: a block only names a place. The exception is what can be read from its
  beginning only (packed lines, Parquet). It is unpacked block by block into small files in a spool folder.
- What is not a usable document is never dropped in silence: it comes with a reason, one of `REASONS`.
"""

import contextlib
import glob
import gzip
import importlib.util
import io
import itertools
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from megakexue.config import UserError, require

BLOCK_BYTES = 1 << 20
"""Text in a block. Smaller blocks cost more messages; larger ones cost memory, and leave workers idle at the end."""
MAX_DOCUMENT_BYTES = 1 << 27
"""Longer documents are skipped: with them a process would need more than the promised 1 GiB of memory."""

REASONS = {
    "empty": "nothing but white space",
    "binary": "contains a NUL byte",
    "not_utf8": "not valid UTF-8",
    "bad_json": "a line that is no JSON",
    "no_text": "a line or row without a string under the text key",
    "too_large": f"above {MAX_DOCUMENT_BYTES >> 20} MiB",
    "unreadable": "cannot be read, or damaged from some point on",
}


class Block(NamedTuple):
    """A place in the input, to be read by a worker."""

    source: int
    """Index of the input that the user named."""
    paths: list[str]
    """Files that are one document each, or the one file that holds the lines."""
    size: int
    """Bytes of input that are done with this block, for the progress bar."""
    span: tuple[int, int] | None = None
    """The first byte of the lines in the file, and the byte after the last. Each line is a document."""
    spooled_from: str | None = None
    """The packed file that this block of lines was unpacked from. Whoever reads the block deletes the unpacked file."""
    first: bool = False
    """The block is the first of its file: line numbers start again."""
    damaged: bool = False
    """There is nothing to read: the file cannot be read at all, or no further."""

    @property
    def path(self) -> str:
        """The user's file that the block begins in."""
        return self.spooled_from or self.paths[0]


def suffixes(path: str) -> tuple[str, str]:
    """Return the kind of a file name (.jsonl, .parquet or another) and its compression (.gz, .zst or "")."""
    stem, last = os.path.splitext(path.lower())
    packed = last if last in (".gz", ".zst") else ""
    kind = os.path.splitext(stem)[1] if packed else last
    return ".jsonl" if kind == ".ndjson" else kind, packed


def find_files(inputs: list[str]) -> Iterator[tuple[int, str]]:
    """Yield (index of the input, path) of all files, in the order of the inputs and then of the names.

    An input is a file, a folder or a glob. Hidden files and folders inside a folder are left out.

    Raises:
        UserError: there is no such file or folder and no file matches the glob, or a folder holds no file.
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
    """Return the bytes of a regular file. Raises OSError for any other: to read a pipe might never end."""
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):
        raise OSError(f"{path} is not a regular file")
    return info.st_size


def check_readable(path: str, text_key: str) -> None:
    """Check that the packages for this file are installed, and that a Parquet file has strings under `text_key`.

    It is called for all files before the first is read, since reading may take hours.

    Raises:
        UserError: a package is missing, or the Parquet file is packed, damaged or without such a column.
    """
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
    """Open a file and unpack it on the way. The function beside it returns how many packed bytes are read so far."""
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


def cut_into_blocks(files: Iterable[tuple[int, str]], spool: Path, text_key: str) -> Iterator[Block]:
    """Cut the files, pairs as `find_files` yields them, into blocks of about `BLOCK_BYTES`.

    Packed lines and Parquet are unpacked here, a block at a time, into small files in the folder `spool`.

    Raises:
        UserError: a line is longer than a document may be.
    """
    spool_files = (spool / str(number) for number in itertools.count())
    whole, n_chars = Block(0, [], 0), 0  # a block of whole files, still growing; the characters of their names
    for source, path in files:
        kind, packed = suffixes(path)
        is_document = kind not in (".jsonl", ".parquet")
        try:
            size, damaged = size_of(path), False
            if not is_document:
                open(path, "rb").close()
        except OSError:
            size, damaged = 0, True
        # The names are bounded too: a block that does not fit the pipe could only be sent to an idle worker.
        goes_on = is_document and not damaged and source == whole.source
        if whole.paths and not (goes_on and whole.size + size <= BLOCK_BYTES and n_chars <= 8192):
            yield whole
            whole, n_chars = Block(source, [], 0), 0
        if damaged:
            yield Block(source, [path], 0, damaged=True)
        elif is_document:
            whole = Block(source, [*whole.paths, path], whole.size + size)
            n_chars += len(path)
        elif kind == ".parquet":
            yield from spool_blocks(source, path, parquet_lines(path, size, text_key), spool_files)
        elif packed:
            yield from spool_blocks(source, path, packed_lines(path), spool_files)
        else:
            yield from line_spans(source, path, size)
    if whole.paths:
        yield whole


def rest_of_line(file: io.BufferedIOBase, path: str) -> bytes:
    """Read to the end of the line. Raises UserError for a line that is longer than a document may be."""
    tail = file.readline(MAX_DOCUMENT_BYTES)
    require(len(tail) < MAX_DOCUMENT_BYTES, f"{path}: a line is above {MAX_DOCUMENT_BYTES >> 20} MiB: shorten it")
    return tail


def line_spans(source: int, path: str, size: int) -> Iterator[Block]:
    """Yield blocks of whole lines of a file that is not packed. Only the last line of each is read here."""
    start = 0
    with open(path, "rb") as file:
        while start < size:
            file.seek(start + BLOCK_BYTES)
            stop = min(start + BLOCK_BYTES + len(rest_of_line(file, path)), size)
            yield Block(source, [path], stop - start, span=(start, stop), first=start == 0)
            start = stop


def packed_lines(path: str) -> Iterator[tuple[bytes, int]]:
    """Yield blocks of whole lines of a packed file, each with the packed bytes that were read for it."""
    with open_unpacked(path) as (file, position):
        done = 0
        while lines := file.read(BLOCK_BYTES):
            lines += rest_of_line(file, path)
            yield lines, position() - done
            done = position()


def parquet_lines(path: str, size: int, text_key: str) -> Iterator[tuple[bytes, int]]:
    """Yield the rows as lines of JSON, so that there is one form to read; each batch with its share of the file."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        n_rows = max(file.metadata.num_rows, 1)
        for batch in file.iter_batches(batch_size=256, columns=[text_key], use_threads=False):
            texts = batch.column(0).to_pylist()
            lines = [json.dumps({text_key: text}, ensure_ascii=False).encode() for text in texts]
            yield b"\n".join(lines) + b"\n", size * len(texts) // n_rows


def spool_blocks(source: int, path: str, parts: Iterator[tuple[bytes, int]], spool: Iterator[Path]) -> Iterator[Block]:
    """Write the lines of each part to the next file of `spool` and yield its block.

    A part is whole lines and the bytes of input that they stand for.
    """
    first = True
    while True:
        try:
            lines, size = next(parts, (b"", 0))
        except UserError:
            raise
        except Exception:  # gzip, zlib, zstandard and pyarrow have no common error
            yield Block(source, [path], 0, damaged=True)
            return
        if not lines:
            return
        file = next(spool)
        file.write_bytes(lines)
        yield Block(source, [str(file)], size, span=(0, len(lines)), spooled_from=path, first=first)
        first = False


def flaw(text: bytes) -> str | None:
    """Return the reason to skip a document, or None. The callers check that it is UTF-8."""
    if len(text) > MAX_DOCUMENT_BYTES:
        return "too_large"
    if not text or text.isspace():
        return "empty"
    return "binary" if b"\0" in text else None


def read_file(path: str) -> tuple[bytes, str | None]:
    """Return the unpacked text of a file, and None or the reason to skip it."""
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
    """Return the text under `text_key` of a line of JSON, and None or the reason to skip it."""
    if not line or line.isspace():
        return b"", "empty"
    try:
        record = json.loads(line.decode())
        text = record.get(text_key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            return b"", "no_text"
        encoded = text.encode()
    except UnicodeError:  # a lone surrogate, such as "\ud800", is valid JSON but not text
        return b"", "not_utf8"
    except (ValueError, RecursionError):
        return b"", "bad_json"
    return encoded, flaw(encoded)


def read_block(block: Block, text_key: str) -> tuple[list[bytes], list[tuple[str, int]]]:
    """Read a block. Lines that were unpacked for it are deleted.

    Returns:
        The documents, and for each path or line that is skipped, the reason and its index in the block.
    """
    entries: Iterable[tuple[bytes, str | None]]
    if block.damaged:
        entries = [(b"", "unreadable")]
    elif block.span is None:
        entries = map(read_file, block.paths)
    else:
        start, stop = block.span
        with open(block.paths[0], "rb") as file:
            file.seek(start)
            lines = file.read(stop - start).split(b"\n")
        if not lines[-1]:
            lines.pop()  # what follows the last newline is not a line
        if block.spooled_from:
            os.unlink(block.paths[0])
        entries = (read_line(line, text_key) for line in lines)
    documents, skipped = [], []
    for index, (text, reason) in enumerate(entries):
        if reason:
            skipped.append((reason, index))
        else:
            documents.append(text)
    return documents, skipped
