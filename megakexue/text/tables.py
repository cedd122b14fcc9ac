"""Parquet and Arrow files as lines of JSON, so that there is one form to read.

Arrow files are those of Hugging Face's `datasets`, in its cache or by `save_to_disk`, which hold batches of rows as a
stream. They are mapped, not loaded. A column may lie inside a struct: `meta.source`.

One text that is no UTF-8 costs that row, which needs care: pyarrow would refuse the whole batch.
"""

import importlib.util
import json
import mmap
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

from megakexue.config import require

TABLES = (".parquet", ".arrow")
ROWS = 256
"""That become lines at a time: rows may be long."""
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
"""The last bytes of a stream of Arrow that was closed."""


def check_table(path: str, kind: str, text_key: str, split_by: str | None) -> None:
    """Check that a file can be read and has the columns.

    Raises:
        UserError: pyarrow is missing, the column of the text holds no strings, or that of `split_by` neither strings
            nor whole numbers.
    """
    require(importlib.util.find_spec("pyarrow") is not None, f"{path}: to read it, pip install pyarrow")
    import pyarrow
    import pyarrow.parquet

    try:
        with open(path, "rb") as file:  # pyarrow itself opens no name that is not UTF-8
            schema = pyarrow.parquet.read_schema(file) if kind == ".parquet" else open_arrow(file).schema
    except (OSError, ValueError, pyarrow.ArrowException):
        return  # it will be listed as damaged
    for option, name in (("--text-key", text_key), ("--split-by", split_by)):
        if name is not None:
            column = type_of(schema, name)
            require(column is not None, f"{path}: no column {name!r} among {schema.names}: set {option}")
            is_number = option == "--split-by" and pyarrow.types.is_integer(column)
            require(is_text(column) or is_number, f"{path}: column {name!r} holds {column}, not strings: set {option}")


def type_of(schema: Any, name: str) -> Any:
    """Return the type of a column, or of a field of a struct; None: there is none."""
    import pyarrow

    head, _, rest = name.partition(".")
    if name in schema.names:
        return schema.field(name).type
    if not rest or head not in schema.names or not pyarrow.types.is_struct(schema.field(head).type):
        return None
    return type_of(pyarrow.schema(list(schema.field(head).type)), rest)


def is_text(column: Any) -> bool:
    """Whether a pyarrow type holds strings: plain, large, as a view, in a dictionary, or with a name of its own."""
    import pyarrow

    if isinstance(column, pyarrow.BaseExtensionType):
        return is_text(column.storage_type)
    if pyarrow.types.is_dictionary(column):
        return is_text(column.value_type)
    kinds = pyarrow.types
    return kinds.is_string(column) or kinds.is_large_string(column) or kinds.is_string_view(column)


def table_lines(path: str, kind: str, size: int, text_key: str, split_by: str | None) -> Iterator[tuple[bytes, int]]:
    """Yield rows as lines of JSON with the two keys, a batch at a time, each with its share of the file's `size`."""
    names = [text_key] if split_by is None else [text_key, split_by]

    def line(values: tuple[bytes | None, ...]) -> bytes:
        try:
            record = {name: None if value is None else value.decode() for name, value in zip(names, values)}
        except UnicodeDecodeError:
            return b"\xff\n"  # read_line will say so
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"

    with open(path, "rb") as file:
        batches = parquet_batches(file, size, names) if kind == ".parquet" else arrow_batches(file, size)
        for batch, share in batches:
            columns = [values_of(batch, name) for name in names]
            yield b"".join(map(line, zip(*columns))), share


def values_of(batch: Any, name: str) -> list[bytes | None]:
    """Return a column of a batch: strings as their bytes, whole numbers as those of their digits."""
    import pyarrow
    import pyarrow.compute

    if name in batch.schema.names:
        column = batch.column(name)
    else:
        head, *rest = name.split(".")
        column = pyarrow.compute.struct_field(batch.column(head), rest)
    if isinstance(column, pyarrow.ExtensionArray):
        column = column.storage
    if isinstance(column, pyarrow.DictionaryArray):
        column = column.dictionary_decode()
    if pyarrow.types.is_integer(column.type):
        column = column.cast(pyarrow.string())
    values: list[bytes | None] = column.cast(pyarrow.large_binary()).to_pylist()
    return values


def parquet_batches(file: BinaryIO, size: int, names: list[str]) -> Iterator[tuple[Any, int]]:
    """Yield batches of a Parquet file, each with its share of the bytes."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as table:
        n_rows = max(table.metadata.num_rows, 1)
        for batch in table.iter_batches(batch_size=ROWS, columns=names, use_threads=False):
            yield batch, size * batch.num_rows // n_rows


def open_arrow(file: BinaryIO) -> Any:
    """Open a file of Arrow's batches, in the form of a stream or of a file with an index, by mapping it."""
    import pyarrow

    data = pyarrow.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    is_stream = not file.read(6).startswith(b"ARROW1")
    return pyarrow.ipc.open_stream(data) if is_stream else pyarrow.ipc.open_file(data)


def arrow_batches(file: BinaryIO, size: int) -> Iterator[tuple[Any, int]]:
    """Yield batches of an Arrow file of at most `ROWS`, each with its share of the bytes.

    Raises:
        EOFError: a stream has no mark at its end. To pyarrow, one that was cut between two batches is whole.
    """
    reader = open_arrow(file)
    batches = reader if hasattr(reader, "read_next_batch") else map(reader.get_batch, range(reader.num_record_batches))
    left = size
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS):
            part = batch.slice(start, ROWS)
            share = min(left, part.nbytes)  # in memory they are as long as on the disk
            left -= share
            yield part, share
    if batches is reader:
        file.seek(max(0, file.seek(0, os.SEEK_END) - len(STREAM_END)))
        if file.read() != STREAM_END:
            raise EOFError("a stream of Arrow without its end")
