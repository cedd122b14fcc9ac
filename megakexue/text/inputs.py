"""Turn the files that people have into documents: find them, cut them into blocks, read a block.

A document is a text file, a line of a .jsonl (or .ndjson) file or a row of a Parquet or Arrow file. Text and lines may
be packed as .gz, .zst, .bz2 or .xz. Files of token ids are found and cut here too, and read by text/token_files.

What must stay true:
- The borders of the blocks depend on the files alone, so the order of documents does not depend on who reads a block.
- Whoever cuts the files does not read them: a block only names a place. The exception is what can be read from its
  beginning only (packed lines, tables). It is unpacked block by block into small files in a spool folder.
- What is not a usable document is never dropped in silence: it comes with a reason, one of `REASONS`. One bad record
  costs that record. Where packed data is damaged, the lines before the place where its unpacker notices it are kept; a
  damaged text file is not.
"""

import bz2
import codecs
import fnmatch
import glob
import importlib.util
import io
import itertools
import json
import lzma
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megakexue.config import UserError, require
from megakexue.files import parse_json
from megakexue.text.tables import TABLES, check_table, table_lines
from megakexue.text.token_files import TokenFile, find_ids, is_index, spans_of

BLOCK_BYTES = 1 << 20
"""Text in a block. Smaller blocks cost more messages; larger ones cost memory, and leave workers idle at the end."""
MAX_DOCUMENT_BYTES = 1 << 27
"""Longer documents and lines are skipped: with them a process would need more than the promised 1 GiB of memory."""
PACKED_BYTES = 1 << 13
"""Packed bytes that are unpacked at a time: even data made to explode stays within the memory."""

REASONS = {
    "empty": "nothing but white space",
    "binary": "contains a NUL byte",
    "not_utf8": "not valid UTF-8",
    "bad_json": "a line that is no JSON",
    "no_text": "a line or row without a string under the text key (--text-key)",
    "marked": "token ids with BOS, EOS or PAD, or the id of --end-id, in the midst of a document",
    "too_large": f"above {MAX_DOCUMENT_BYTES >> 20} MiB",
    "unreadable": "cannot be read",
    "damaged": "damaged or cut short: the lines before this one are kept, a text file is not",
    "trailing": "other bytes after the packed data, whose text is kept",
    "not_a_file": "a pipe, socket or device",
    "hidden": "hidden: its name begins with a dot",
    "read_already": "a link to a folder that is read already",
    "beside_data": "belongs to a data set and holds none of its documents",
}


class Reading(NamedTuple):
    """What to read of the files."""

    text_key: str = "text"
    """Of lines and rows: the string under it is the document."""
    split_by: str | None = None
    """Of lines and rows: the string or whole number under it is the document's label. `a.b` is b of the object a."""
    end_id: int | None = None
    """What stands between the documents in .bin files of token ids."""
    id_dtype: str | None = None
    """Of ids in .bin files that do not say it. None: files of ids are not read, they are text like any other."""


class Found(NamedTuple):
    """Something that lies where the user pointed."""

    source: int
    """Index of the input that the user named."""
    path: str
    size: int
    """Bytes on disk."""
    fault: str | None
    """One of `REASONS`: why it cannot be a file of documents."""


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
    fault: str | None = None
    """There is nothing to read, for this reason. With a span: from this line of the file on."""
    ids: TokenFile | None = None
    """Token ids; the span is then as `spans_of` gives it."""

    @property
    def path(self) -> str:
        """The user's file that the block begins in."""
        return self.spooled_from or self.paths[0]


class Damaged(Exception):
    """The packed data ends here, for the reason of `REASONS` that is the argument."""


# --- finding files ---------------------------------------------------------------------------------------------------


def suffixes(path: str) -> tuple[str, str]:
    """Return the kind of a file name (.jsonl, .parquet or another) and its packing (such as .gz, or "")."""
    stem, last = os.path.splitext(path.lower())
    packed = last if last in PACKINGS else ""
    kind = os.path.splitext(stem)[1] if packed else last
    return ".jsonl" if kind == ".ndjson" else kind, packed


def find_files(inputs: list[str], folders: set[tuple[int, int]] | None = None) -> Iterator[Found]:
    """Yield what lies at the inputs, in their order and then by name; also what is no file of documents.

    An input is a file, a folder or a glob. Links are followed; a folder is read once for each input, so that links in a
    circle end. Hidden files and folders inside a folder are named, not read.

    Args:
        folders: is filled with the (device, inode) of all folders that are read.

    Raises:
        UserError: there is no such file or folder and no file matches the glob, a folder holds no file, or what the
            user named is no file or may not be read.
    """
    for source, name in enumerate(inputs):
        seen: set[tuple[int, int]] = set()
        found = False
        for root in roots_of(name):
            for path, fault in walk(root, seen) if os.path.isdir(root) else [(root, None)]:
                found = found or fault != "hidden"
                fault = "beside_data" if fault is None and is_index(path) else fault
                size, of_file = look_at(path) if fault is None else (0, fault)
                yield Found(source, path, size, of_file)
        require(found, f"{name}: there is no file in it")
        if folders is not None:
            folders |= seen


def roots_of(name: str) -> list[str]:
    """Return the file or folder that an input names, or what matches it as a glob, sorted. Raises UserError."""
    try:
        mode = os.stat(name).st_mode
    except (FileNotFoundError, NotADirectoryError):
        parts = name.split(os.sep)
        roots = sorted(set(matches("/" if name.startswith("/") else "", [part for part in parts if part])))
        require(bool(roots), f"{name}: no such file or folder, and no file matches it as a glob")
        return roots
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from error
    require(
        stat.S_ISREG(mode) or stat.S_ISDIR(mode),
        f"{name}: a pipe, socket or device has no size and cannot be read twice: write it to a file first",
    )
    try:
        os.scandir(name).close() if stat.S_ISDIR(mode) else open(name, "rb").close()
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}: ask its owner, or name other files") from error
    return [name]


def matches(folder: str, parts: list[str]) -> Iterator[str]:
    """Yield the paths below `folder` that match the parts of a glob; `**` is any number of folders, without links.

    glob.glob does the same, but it leaves out in silence what it cannot list.

    Raises:
        UserError: a folder cannot be listed.
    """
    head, *rest = parts or [""]
    path = os.path.join(folder, head)
    if not head or (head == "**" and not rest):
        if not head or os.path.isdir(folder or "."):  # a file has no folders in it
            yield folder or "."
    elif not glob.has_magic(head):
        if os.path.lexists(path):
            yield from matches(path, rest)
    else:
        names = names_in(folder)
        if head == "**":
            yield from matches(folder, rest)
            inner = (os.path.join(folder, name) for name in names if not name.startswith("."))
            for path in inner:
                if os.path.isdir(path) and not os.path.islink(path):
                    yield from matches(path, parts)
        else:
            for name in fnmatch.filter(names, head):
                path = os.path.join(folder, name)
                is_meant = head.startswith(".") or not name.startswith(".")  # a star does not mean hidden ones
                if is_meant and (not rest or os.path.isdir(path)):
                    yield from matches(path, rest)


def names_in(folder: str) -> list[str]:
    """Return the names in a folder, sorted. Raises UserError."""
    try:
        return sorted(os.listdir(folder or "."))
    except NotADirectoryError:
        return []
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed, and the glob goes through it: {error.strerror}") from error


def walk(root: str, seen: set[tuple[int, int]]) -> Iterator[tuple[str, str | None]]:
    """Yield (path, fault) of all files below a folder: of each folder the files by name, then its folders by name.

    Args:
        seen: (device, inode) of the folders that are read already; those of this walk are added.
    """
    stack = [root]
    while stack:
        folder = stack.pop()
        try:
            info = os.stat(folder)
            if (info.st_dev, info.st_ino) in seen:
                yield folder, "read_already"
                continue
            seen.add((info.st_dev, info.st_ino))
            names = sorted(os.listdir(folder))
        except OSError:
            yield folder, "unreadable"
            continue
        beside = beside_data(folder, names)
        inner = []
        for path in (os.path.join(folder, name) for name in names):
            if os.path.basename(path).startswith("."):
                yield path, "hidden"
            elif os.path.isdir(path):
                inner.append(path)
            else:
                yield path, "beside_data" if os.path.basename(path) in beside else None
        stack += reversed(inner)


def beside_data(folder: str, names: list[str]) -> set[str]:
    """Return which files in a folder belong to a data set of Hugging Face's `datasets` and hold none of its rows.

    They say what it is, or are left of a `map` or a `filter` (cache-*.arrow).

    Raises:
        UserError: a file with rows is missing, which only the data set itself can notice.
    """
    tables = {name for name in names if name.endswith(".arrow")}
    if tables and "state.json" in names:  # written by save_to_disk
        path = os.path.join(folder, "state.json")
        try:
            files = parse_json(Path(path).read_text(encoding="utf-8"))["_data_files"]
            tables = {str(file["filename"]) for file in files}
        except (OSError, ValueError, KeyError, TypeError):
            return set()
        require(bool(tables), f"{path} names no file with rows, and there are some: copy the folder again")
        missing = sorted(tables - set(names))
        require(not missing, f"{path} names {' '.join(missing[:3])}, and there is no such file: copy the folder again")
        return {name for name in set(names) - tables if name.endswith((".arrow", ".json"))}
    if tables and "dataset_info.json" in names:  # a cache
        return set(names) - {name for name in tables if not name.startswith("cache-")}
    return {"dataset_dict.json"} & set(names)


def look_at(path: str) -> tuple[int, str | None]:
    """Return the size of a regular file in bytes, or 0 and why it is none: to read a pipe might never end."""
    try:
        info = os.stat(path)
    except OSError:
        return 0, "unreadable"
    return (info.st_size, None) if stat.S_ISREG(info.st_mode) else (0, "not_a_file")


def check_inputs(inputs: list[str], reading: Reading, out: Path) -> int:
    """Check what can be checked before hours of reading. Return the bytes of all files.

    Args:
        out: the file or folder to be written, which must not lie in an input: the next run would read it.

    Raises:
        UserError: an input is missing, named twice or holds `out`; a package is missing; see `check_readable`.
    """
    require(bool(inputs), "no INPUT: name files, folders or globs")
    paths = [os.path.realpath(name) for name in inputs]
    twice = sorted(name for name, path in zip(inputs, paths) if paths.count(path) > 1)
    require(not twice, f"an INPUT is named twice: {' '.join(twice)}")
    folders: set[tuple[int, int]] = set()
    n_bytes = 0
    for found in find_files(inputs, folders):
        n_bytes += found.size
        if found.fault is None:
            check_readable(found.path, reading)
            require(not is_same(found.path, out), f"--out {out} is INPUT {found.path}: choose another --out")
        elif is_index(found.path):
            ids = found.path.removesuffix(".idx") + ".bin"
            require(os.path.exists(ids), f"{found.path}: there is no {ids}, which has its ids: copy both")
    for parent in Path(os.path.realpath(out)).parents:
        if parent.exists():
            info = parent.stat()
            inside = (info.st_dev, info.st_ino) in folders
            require(not inside, f"--out {out} lies inside an INPUT, and the next run would read it: choose another")
    return n_bytes


def is_same(path: str, out: Path) -> bool:
    return os.path.basename(path) == out.name and os.path.realpath(path) == os.path.realpath(out)


def check_readable(path: str, reading: Reading) -> None:
    """Check that the packages for this file are installed, and that tables and files of ids are what they should be.

    Raises:
        UserError: a package is missing, a table is packed or without the columns, or see `find_ids`.
    """
    kind, packed = suffixes(path)
    if packed == ".zst":
        require(importlib.util.find_spec("zstandard") is not None, f"{path}: to read it, pip install zstandard")
    if kind in TABLES:
        require(not packed, f"{path}: unpack it first; tables are compressed inside")
        check_table(path, kind, reading.text_key, reading.split_by)
    ids_in(path, reading)


def ids_in(path: str, reading: Reading) -> TokenFile | None:
    """Return where a file has token ids, or None: it is no such file. Raises UserError: see `find_ids`."""
    kind, packed = suffixes(path)
    try:
        if reading.id_dtype is None or kind != ".bin" or packed:
            return None
        return find_ids(path, reading.end_id, reading.id_dtype)
    except OSError:
        return None  # it will be listed as unreadable


# --- unpacking -------------------------------------------------------------------------------------------------------


def zstandard_frame() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()


PACKINGS: dict[str, tuple[Callable[[], Any], tuple[bytes, ...]]] = {
    ".gz": (lambda: zlib.decompressobj(wbits=31), (b"\x1f\x8b",)),
    ".bz2": (bz2.BZ2Decompressor, (b"BZh",)),
    ".xz": (lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), (b"\xfd7zXZ\0",)),
    ".zst": (zstandard_frame, (b"\x28\xb5\x2f\xfd", *(bytes([n, 0x2A, 0x4D, 0x18]) for n in range(0x50, 0x60)))),
}
"""By file ending: what unpacks one member (a frame, a stream), and the bytes that a member begins with. A file may hold
several members, and the four unpackers share the attributes `eof` and `unused_data`."""


class Unpacked(io.RawIOBase):
    """The unpacked bytes of a file. Where it is damaged they end, and `fault` says so."""

    def __init__(self, raw: io.BufferedReader, packed: str) -> None:
        self.fault: str | None = None
        self._raw = raw
        self._new, self._magic = PACKINGS[packed]
        self._member: Any = None
        self._head = b""
        """The first bytes of the member."""
        self._n_members = 0  # that are whole
        self._packed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self.fault:
            if not self._packed:
                self._packed = self._raw.read(PACKED_BYTES)
            if not self._packed:
                is_whole = self._member is None and self._n_members > 0
                self.fault = None if is_whole else self._reason()
                break
            self._unpack()
        n = min(len(buffer), len(self._ready))
        buffer[:n], self._ready = self._ready[:n], self._ready[n:]
        return n

    def _unpack(self) -> None:
        """Unpack what was read last, up to the end of the member."""
        if self._member is None:
            if self._n_members:  # gzip and xz allow zeros as padding
                self._packed = self._packed.lstrip(b"\0")
            if not self._packed:
                return
            self._member, self._head = self._new(), b""
        self._head += self._packed[: max(0, 16 - len(self._head))]
        try:
            self._ready = memoryview(self._member.decompress(self._packed))
        except Exception:  # the unpackers have no common error
            self.fault = self._reason()
            return
        self._packed = b""
        if self._member.eof:
            self._packed = self._member.unused_data
            self._member, self._n_members = None, self._n_members + 1

    def _reason(self) -> str:
        """What it means that the packed bytes cannot go on."""
        return "trailing" if self._n_members and not self._head.startswith(self._magic) else "damaged"


def open_unpacked(path: str, raw: io.BufferedReader) -> tuple[io.BufferedReader, Callable[[], str | None]]:
    """Return the text of an open file, and a function that says at its end why it is not all: one of `REASONS`."""
    packed = suffixes(path)[1]
    if not packed:
        return raw, lambda: None
    unpacked = Unpacked(raw, packed)
    return io.BufferedReader(unpacked, 1 << 16), lambda: unpacked.fault


# --- cutting into blocks ---------------------------------------------------------------------------------------------


def cut_into_blocks(files: Iterable[Found], spool: Path, reading: Reading) -> Iterator[Block]:
    """Cut the files into blocks of about `BLOCK_BYTES`.

    Packed lines and tables are unpacked here, a block at a time, into small files in the folder `spool`.
    """
    spool_files = (spool / str(number) for number in itertools.count())
    whole, n_chars = Block(0, [], 0), 0  # a block of whole files, still growing; the characters of their names
    for source, path, size, fault in files:
        ids = ids_in(path, reading) if fault is None else None
        is_document = suffixes(path)[0] not in (".jsonl", *TABLES) and ids is None
        if fault is None and not is_document:
            try:
                open(path, "rb").close()
            except OSError:
                fault, size = "unreadable", 0
        # The names are bounded too: a block that does not fit the pipe could only be sent to an idle worker.
        goes_on = is_document and fault is None and source == whole.source
        if whole.paths and not (goes_on and whole.size + size <= BLOCK_BYTES and n_chars <= 8192):
            yield whole
            whole, n_chars = Block(source, [], 0), 0
        if fault is not None:
            yield Block(source, [path], 0, fault=fault)
        elif is_document:
            whole = Block(source, [*whole.paths, path], whole.size + size)
            n_chars += len(path)
        elif ids is not None:
            for span, n_bytes in spans_of(ids):
                yield Block(source, [path], n_bytes, span, first=span[0] == 0, ids=ids)
        else:
            yield from blocks_of_lines(source, path, size, spool_files, reading)
    if whole.paths:
        yield whole


def blocks_of_lines(source: int, path: str, size: int, spool: Iterator[Path], reading: Reading) -> Iterator[Block]:
    """Yield the blocks of a file of lines or rows."""
    kind, packed = suffixes(path)
    if kind in TABLES:
        lines = table_lines(path, kind, size, reading.text_key, reading.split_by)
        yield from spool_blocks(source, path, lines, spool)
    elif packed:
        yield from spool_blocks(source, path, packed_lines(path), spool)
    else:
        yield from line_spans(source, path, size)


def rest_of_line(file: io.BufferedReader) -> bytes:
    """Read to the end of the line; return so much of a line that is too long that it is seen to be."""
    tail = file.readline(MAX_DOCUMENT_BYTES + 1)
    if len(tail) > MAX_DOCUMENT_BYTES and not tail.endswith(b"\n"):
        while (piece := file.readline(BLOCK_BYTES)) and not piece.endswith(b"\n"):
            pass
        tail += piece[-1:]
    return tail


def line_spans(source: int, path: str, size: int) -> Iterator[Block]:
    """Yield blocks of whole lines of a file that is not packed. Only the last line of each is read here."""
    start = 0
    with open(path, "rb") as file:
        while start < size:
            file.seek(start + BLOCK_BYTES)
            rest_of_line(file)
            stop = min(file.tell(), size)
            yield Block(source, [path], stop - start, span=(start, stop), first=start == 0)
            start = stop


def packed_lines(path: str) -> Iterator[tuple[bytes, int]]:
    """Yield blocks of whole lines of a packed file, each with the packed bytes that were read for it.

    Raises:
        Damaged: after the last whole line.
    """
    with open(path, "rb") as raw:
        file, fault = open_unpacked(path, raw)
        done = 0
        while lines := file.read(BLOCK_BYTES):
            lines += rest_of_line(file)
            if fault() == "damaged":
                lines = lines[: lines.rfind(b"\n") + 1]  # a line that was cut is part of the damage
            if lines:
                yield lines, raw.tell() - done
            done = raw.tell()
        if reason := fault():
            raise Damaged(reason)


def spool_blocks(source: int, path: str, parts: Iterator[tuple[bytes, int]], spool: Iterator[Path]) -> Iterator[Block]:
    """Write the lines of each part to the next file of `spool` and yield its block.

    A part is whole lines and the bytes of input that they stand for.
    """
    first = True
    while True:
        try:
            lines, size = next(parts, (b"", 0))
        except Exception as error:  # pyarrow's and the system's have no common class
            reason = error.args[0] if isinstance(error, Damaged) else "damaged"
            yield Block(source, [path], 0, span=None if first else (0, 0), fault=reason)
            return
        if not lines:
            return
        file = next(spool)
        file.write_bytes(lines)
        yield Block(source, [str(file)], size, span=(0, len(lines)), spooled_from=path, first=first)
        first = False


# --- reading a block -------------------------------------------------------------------------------------------------


def flaw(text: bytes) -> str | None:
    """Return the reason to skip a document, or None. The callers check that it is UTF-8."""
    if len(text) > MAX_DOCUMENT_BYTES:
        return "too_large"
    if not text or text.isspace():
        return "empty"
    if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "not_utf8"
    return "binary" if b"\0" in text else None


def read_file(path: str) -> tuple[bytes | None, str | None]:
    """Return the unpacked text of a file, and what is wrong. Text is None if it is skipped for that."""
    try:
        if (fault := look_at(path)[1]) is not None:
            return None, fault
        with open(path, "rb") as raw:
            file, fault_of = open_unpacked(path, raw)
            text = file.read(MAX_DOCUMENT_BYTES + 1)
            damage = fault_of()
    except OSError:
        return None, "unreadable"
    reason = "damaged" if damage == "damaged" and len(text) <= MAX_DOCUMENT_BYTES else flaw(text)
    try:
        if not reason:
            text.decode()
    except UnicodeDecodeError:
        reason = "not_utf8"
    return (None, reason) if reason else (text.removeprefix(codecs.BOM_UTF8), damage)


def read_line(line: bytes, reading: Reading) -> tuple[bytes | None, str | None, str]:
    """Return the text of a line of JSON, or None and the reason to skip it; and its label, "" if it has none."""
    if len(line) > MAX_DOCUMENT_BYTES:
        return None, "too_large", ""
    if not line or line.isspace():
        return None, "empty", ""
    try:
        record = json.loads(line.decode())
        text = record.get(reading.text_key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            return None, "no_text", ""
        encoded = text.encode()
    except UnicodeError:  # a lone surrogate, such as "\ud800", is valid JSON but not text
        return None, "not_utf8", ""
    except (ValueError, RecursionError):
        return None, "bad_json", ""
    reason = flaw(encoded)
    return (None, reason, "") if reason else (encoded, None, label_of(record, reading.split_by))


def label_of(record: dict[str, Any], key: str | None) -> str:
    """Return the string or whole number under a key of a record, "" if there is none. `a.b` is b of the object a."""
    if key is None:
        return ""
    head, _, rest = key.partition(".")
    if key not in record and rest:
        inner = record.get(head)
        return label_of(inner, rest) if isinstance(inner, dict) else ""
    value = record.get(key)
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""


def lines_of(file: io.BufferedReader, n_bytes: int) -> Iterator[bytes]:
    """Yield the lines of the next `n_bytes`, without their ends; of a line that is too long, only its beginning."""
    stop = file.tell() + n_bytes
    while file.tell() < stop and (line := rest_of_line(file)):
        yield line.removesuffix(b"\n")


def read_block(block: Block, reading: Reading) -> tuple[list[bytes], list[tuple[str, int]], list[str]]:
    """Read a block of text. Lines that were unpacked for it are deleted.

    Returns:
        The documents; for each path or line with a fault, the reason and its index in the block; and the labels of the
        documents.

    Raises:
        UserError: lines that were there when the block was cut cannot be read any more.
    """
    entries: Iterable[tuple[bytes | None, str | None, str]]
    if block.fault is not None:
        entries = [(None, block.fault, "")]
    elif block.span is None:
        entries = ((*read_file(path), "") for path in block.paths)
    else:
        entries = (read_line(line, reading) for line in read_lines(block, block.span))
    documents, faults, labels = [], [], []
    for index, (text, reason, label) in enumerate(entries):
        if reason:
            faults.append((reason, index))
        if text is not None:
            documents.append(text)
            labels.append(label)
    return documents, faults, labels


def read_lines(block: Block, span: tuple[int, int]) -> list[bytes]:
    """Return the lines of a block, the byte order mark of a file left out. Raises UserError: they are gone."""
    start, stop = span
    try:
        with open(block.paths[0], "rb") as file:
            file.seek(start)
            lines = list(lines_of(file, stop - start))
    except OSError as error:
        raise UserError(f"{block.path}: cannot be read any more: {error.strerror}: start again") from error
    if block.first and lines:
        lines[0] = lines[0].removeprefix(codecs.BOM_UTF8)
    if block.spooled_from:
        os.unlink(block.paths[0])
    return lines
