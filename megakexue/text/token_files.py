"""Token ids that other programs have made, with the tokenizer that made them: they are taken as they are.

Three kinds of .bin file hold ids and nothing else:
- Megatron's, beside whose NAME.bin an index NAME.idx says where each sequence and each document begins;
- that of llm.c, with a head of 1,024 bytes;
- nanoGPT's, with no head at all. Nothing in it says that it holds ids, so only --end-id makes it such a file.
In the last two the id that the user names stands between documents.

What must stay true: a document of the result has the ids of a document of the source, without the marks at its ends,
which packing puts there. An id that the tokenizer does not have ends the program. What a document is judged by (is it
a duplicate, is it validation?) is the text that the ids stand for, so a text and its ids are the same document.
"""

import os
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from megakexue.config import UserError, require
from megakexue.text.tokenizer import Tokenizer

INDEX_MAGIC = b"MMIDIDX\0\0"
INDEX_HEAD = 34
"""Bytes: the magic, the version (8), the type of the ids (1), the numbers of sequences and of document borders (8)."""
INDEX_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
LLM_C_HEAD = 1024
LLM_C_DTYPES = {(20240520, 1): "uint16", (20240801, 7): "uint32"}
"""By the first two numbers of the head, which are int32. The third is the number of ids."""
BLOCK_IDS = 1 << 19
"""In a block, about."""
MAX_BYTES = 1 << 27
"""Of ids or text: longer documents are skipped, as those of text are."""


class TokenFile(NamedTuple):
    """Where ids are."""

    path: str
    dtype: str
    head: int
    """Bytes before the first id."""
    n_ids: int
    index_path: str | None
    """Of Megatron's .idx."""
    end_id: int | None
    """What stands between documents; with an index, what may stand at their ends beside the tokenizer's own marks."""

    def ids(self) -> np.ndarray:
        if not self.n_ids:
            return np.empty(0, self.dtype)
        return np.memmap(self.path, self.dtype, "r", self.head, (self.n_ids,))


class Index(NamedTuple):
    """A .idx of Megatron, mapped."""

    dtype: str
    lengths: np.ndarray
    """Ids of each sequence."""
    pointers: np.ndarray
    """The first byte of each sequence in the .bin."""
    borders: np.ndarray
    """Of the documents: the first sequence of each, and the number of sequences."""

    @classmethod
    def read(cls, path: str) -> "Index":
        """Map an index. Raises UserError: it is cut, or of another version, or its ids are no whole numbers."""
        advice = "copy it again, or prepare it from the text"
        with open(path, "rb") as file:
            head = file.read(INDEX_HEAD)
        require(
            len(head) == INDEX_HEAD and head[9:17] == b"\1" + bytes(7), f"{path} is no index of version 1: {advice}"
        )
        n, n_borders = np.frombuffer(head, "<u8", 2, 18).tolist()
        end = INDEX_HEAD + 12 * n + 8 * n_borders
        whole = os.path.getsize(path) in (end, end + n)  # with a byte for each sequence, of images among the text
        require(whole and n > 0, f"{path} does not hold the {n:,} sequences that it names: {advice}")
        require(head[17] in INDEX_DTYPES, f"{path} names no ids (type {head[17]}): {advice}")
        lengths = np.memmap(path, "<i4", "r", INDEX_HEAD, (n,))
        pointers = np.memmap(path, "<i8", "r", INDEX_HEAD + 4 * n, (n,))
        borders = np.memmap(path, "<i8", "r", INDEX_HEAD + 12 * n, (n_borders,))
        require(
            n_borders > 1 and [int(borders[0]), int(borders[-1])] == [0, n],
            f"{path}: its documents are not all of its {n:,} sequences: {advice}",
        )
        sound = bool((lengths >= 0).all() and (np.diff(borders) >= 0).all())
        require(sound, f"{path}: a sequence or a document ends before it begins: {advice}")
        return cls(INDEX_DTYPES[head[17]], lengths, pointers, borders)

    def place(self, sequences: np.ndarray, size: int) -> np.ndarray:
        """Return the first byte of each sequence; `size` for the one after the last."""
        inside = np.minimum(sequences, len(self.lengths) - 1)
        return np.where(sequences < len(self.lengths), self.pointers[inside], size)


def is_index(path: str) -> bool:
    """Whether a file is an index of Megatron's. What is not called .idx is not opened: a pipe would wait."""
    if not path.endswith(".idx") or not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as file:
            return file.read(len(INDEX_MAGIC)) == INDEX_MAGIC
    except OSError:
        return False


def find_ids(path: str, end_id: int | None, dtype: str) -> TokenFile | None:
    """Return where a .bin file has its ids, or None if it is none of the three kinds.

    Args:
        end_id: --end-id.
        dtype: of ids in a file that does not say it.

    Raises:
        UserError: it is one of them and is damaged, or --end-id is missing.
    """
    size, index = os.path.getsize(path), path.removesuffix(".bin") + ".idx"
    if is_index(index):
        found = Index.read(index)
        n, width = int(found.lengths.sum(dtype=np.int64)), np.dtype(found.dtype).itemsize
        require(
            n * width == size,
            f"{path} has {size:,} bytes, and the {n:,} ids that its .idx names take {n * width:,}: copy both again",
        )
        return TokenFile(path, found.dtype, 0, n, index, end_id)
    with open(path, "rb") as file:
        head = np.frombuffer(file.read(12).ljust(12, b"\0"), "<i4").tolist()
    if known := LLM_C_DTYPES.get((head[0], head[1])):
        n, head_bytes = head[2], LLM_C_HEAD
        require(end_id is not None, f"{path} holds token ids: name the one that stands between documents by --end-id")
        require(n >= 0, f"{path} names {n:,} ids in its head: copy it again")
        dtype = known
    elif end_id is None:
        return None
    else:
        n, head_bytes = size // np.dtype(dtype).itemsize, 0
    expected = head_bytes + n * np.dtype(dtype).itemsize
    require(
        size == expected,
        f"{path} has {size:,} bytes, and not the {expected:,} of {n:,} ids of type {dtype}: copy it again, or leave it "
        "out if it holds no ids",
    )
    return TokenFile(path, dtype, head_bytes, n, None, end_id)


def spans_of(file: TokenFile) -> Iterator[tuple[tuple[int, int], int]]:
    """Yield spans of whole documents, of documents where there is an index and of ids elsewhere, and their bytes."""
    width = np.dtype(file.dtype).itemsize
    if file.index_path is not None:
        index, start = Index.read(file.index_path), 0
        while start < len(index.borders) - 1:
            places = index.place(index.borders[start : start + BLOCK_IDS + 1], file.n_ids * width)
            n = max(1, int(np.searchsorted(places, places[0] + BLOCK_IDS * width, "right")) - 1)
            yield (start, start + n), int(places[n] - places[0])
            start += n
        return
    ids, start = file.ids(), 0
    while start < file.n_ids:
        stop = min(start + BLOCK_IDS, file.n_ids)
        while stop < file.n_ids and ids[stop - 1] != file.end_id:
            ends = np.flatnonzero(ids[stop : stop + BLOCK_IDS] == file.end_id)
            stop = stop + int(ends[0]) + 1 if len(ends) else min(stop + BLOCK_IDS, file.n_ids)
        yield (start, stop), (stop - start) * width + (0 if start else file.head)
        start = stop


def documents_in(file: TokenFile, span: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yield the ids of each document of a span, as they are in the file."""
    ids = file.ids()
    if file.index_path is not None:
        index, width = Index.read(file.index_path), ids.itemsize
        borders = index.borders[span[0] : span[1] + 1]
        first, last = int(borders[0]), int(borders[-1])
        places = index.place(np.arange(first, last + 1), file.n_ids * width)
        require(
            np.array_equal(np.diff(places), index.lengths[first:last].astype(np.int64) * width),
            f"{file.index_path}: documents {span[0] + 1} to {span[1]} do not lie one behind the other: make it anew",
        )
        edges = places[borders - first] // width
    else:
        chunks = range(span[0], span[1], BLOCK_IDS)
        ends = [i + np.flatnonzero(ids[i : min(i + BLOCK_IDS, span[1])] == file.end_id) for i in chunks]
        edges = np.concatenate([[span[0]], *(at + 1 for at in ends), [span[1]]])
    for begin, end in pairwise(edges.tolist()):
        if file.index_path is not None or (
            end > begin and ids[begin] != file.end_id
        ):  # or an end has no document before it
            yield ids[begin:end]


def read_ids(
    file: TokenFile, span: tuple[int, int], tokenizer: Tokenizer
) -> tuple[list[np.ndarray], list[bytes], list[tuple[str, int]]]:
    """Read the documents of a span.

    Returns:
        The ids of each without the marks at its ends, its text, and for each that is skipped the reason and its index.

    Raises:
        UserError: an id is not one of the tokenizer's.
    """
    marks = [i for i in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, file.end_id) if i is not None]
    documents: list[np.ndarray] = []
    texts: list[bytes] = []
    faults: list[tuple[str, int]] = []
    for number, raw in enumerate(documents_in(file, span)):
        ids, text, reason = judge(raw, marks, file, tokenizer)
        if reason:
            faults.append((reason, number))
        else:
            documents.append(ids)
            texts.append(text)
    return documents, texts, faults


def judge(
    raw: np.ndarray, marks: list[int], file: TokenFile, tokenizer: Tokenizer
) -> tuple[np.ndarray, bytes, str | None]:
    """Return the ids of a document without the marks at its ends, its text, and the reason to skip it."""
    if raw.nbytes > MAX_BYTES:
        return raw, b"", "too_large"
    strange = raw[(raw < 0) | (raw >= tokenizer.vocab_size)]
    if len(strange):
        raise UserError(
            f"{file.path} has the id {strange[0]}, and {tokenizer.path} has the ids 0 to {tokenizer.vocab_size - 1}: "
            "name the tokenizer that made the file"
        )
    inside = np.flatnonzero(~np.isin(raw, marks))
    if not len(inside):
        return raw, b"", "empty"
    ids = np.array(raw[inside[0] : inside[-1] + 1])
    if len(ids) != len(inside):
        return ids, b"", "marked"
    text = text_of(ids, tokenizer)
    return ids, text, "too_large" if len(text) > MAX_BYTES else "empty" if not text or text.isspace() else None


def text_of(ids: np.ndarray, tokenizer: Tokenizer) -> bytes:
    """Return the bytes that ids stand for, without a Python integer for each of them at once."""
    starts = range(0, len(ids), BLOCK_IDS)
    data = b"".join(b"".join(map(tokenizer.piece, ids[i : i + BLOCK_IDS].tolist())) for i in starts)
    return data.removeprefix(b" ") if tokenizer.has_prefix else data
