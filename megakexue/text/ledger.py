"""What became of every document: kept, dropped as a duplicate, or skipped for a reason; the same for both programs.

`Ledger` counts, and names what is skipped: each file, and of a file's lines the first few for each reason.
"""

import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from megakexue.config import UserError
from megakexue.text.duplicates import DigestSet, digests_of
from megakexue.text.inputs import REASONS, Block, Reading, cut_into_blocks, find_files, read_block, suffixes
from megakexue.text.tables import TABLES

MAX_LINES = 20
"""Lines of a file that are named for each reason; all are counted."""
MAX_SHOWN = 5
"""Names that are kept for each reason, to be shown and for the manifest."""
SAMPLE_BYTES = 1 << 16
"""Of a file whose encoding is guessed."""
ENCODINGS = [
    "utf_16", "utf_32", "gb18030", "big5", "shift_jis", "euc_jp", "euc_kr", "cp1251", "koi8_r", "cp1252",
]  # fmt: skip
"""What text that is not UTF-8 usually is. More of them would make a guess from little text worse."""


class Contents(NamedTuple):
    """What is told of a block that was read."""

    digests: np.ndarray
    """Of each document, uint64."""
    sizes: np.ndarray
    """Bytes of each document, int64."""
    faults: list[tuple[str, int]]
    """(reason, index of the path or line in the block)."""
    labels: Sequence[str] = ()
    """Of each document, where they are asked for (--split-by)."""

    @classmethod
    def of(cls, documents: list[bytes], faults: list[tuple[str, int]], labels: Sequence[str] = ()) -> "Contents":
        return cls(digests_of(documents), np.array([len(text) for text in documents], np.int64), faults, labels)


class Ledger:
    """What became of every document. It counts by input, and drops duplicates."""

    def __init__(self, inputs: list[str], list_file: IO[str] | None = None) -> None:
        """Begin to count.

        Args:
            list_file: gets a line for everything that is skipped: its reason and its name, with a tab between.
        """
        self.inputs = [printable(name) for name in inputs]
        self.sources: list[dict[str, Any]] = [
            {"documents": 0, "bytes": 0, "duplicates": 0, "skipped": {}} for _ in inputs
        ]
        self.skipped: dict[str, dict[str, Any]] = {}  # by reason, over all inputs
        self.bytes_done = 0  # of input, as it lies on disk
        self._list_file = list_file
        self._seen = DigestSet()
        self._n_lines = 0  # of the present file, in the blocks judged so far
        self._n_named: Counter[str] = Counter()  # lines of the present file, by reason

    def judge(self, block: Block, contents: Contents) -> np.ndarray:
        """Count what was read and return which documents of it are kept, bool. Blocks must come in order."""
        if block.first or block.span is None:
            self._n_lines = 0
            self._n_named.clear()
        for reason, index in contents.faults:
            self._skip(block, reason, index)
        if block.span is not None:
            self._n_lines += len(contents.faults) + len(contents.sizes)
        keep = self._seen.add(contents.digests)
        self._count(self.sources[block.source], contents, keep)
        self.sources[block.source]["duplicates"] += int((~keep).sum())
        return keep

    def _count(self, counts: dict[str, Any], contents: Contents, chosen: np.ndarray) -> None:
        counts["documents"] += int(chosen.sum())
        counts["bytes"] += int(contents.sizes[chosen].sum())

    def _skip(self, block: Block, reason: str, index: int) -> None:
        of_source = self.sources[block.source]["skipped"]
        of_source[reason] = of_source.get(reason, 0) + 1
        entry = self.skipped.setdefault(reason, {"count": 0, "paths": []})
        entry["count"] += 1
        name = self._name(block, index, self._n_lines)
        if len(entry["paths"]) < MAX_SHOWN:
            entry["paths"].append(name)
        self._n_named[reason] += block.span is not None
        if self._list_file and self._n_named[reason] <= MAX_LINES:
            self._list_file.write(f"{reason}\t{name}\n")

    def _name(self, block: Block, index: int, n_lines: int) -> str:
        """Name a path or a line of a block, before which its file has `n_lines`."""
        if block.span is None:
            return printable(block.paths[index])
        return f"{printable(block.path)}:{n_lines + index + 1}"

    def total(self, key: str) -> int:
        return sum(source[key] for source in self.sources)

    def reasons(self) -> str:
        """Say in one line how many documents were skipped for which reasons."""
        return ", ".join(f"{entry['count']:,} {REASONS[reason]}" for reason, entry in self.skipped.items()) or "0"

    @property
    def facts(self) -> dict[str, Any]:
        """What a manifest says of it: `report` makes sentences of that."""
        return {"inputs": self.inputs, "sources": dict(zip(self.inputs, self.sources)), "skipped": self.skipped}


def report(facts: dict[str, Any]) -> list[str]:
    """Return lines for a person: the documents of each input, what was skipped, and what to do about it.

    Args:
        facts: those of a `Ledger`, or a dict with more keys.
    """
    lines = [
        f"{name}: {source['documents']:,} documents kept, {source['duplicates']:,} duplicates dropped, "
        f"{sum(source['skipped'].values()):,} skipped"
        for name, source in facts["sources"].items()
    ]
    for reason, entry in facts["skipped"].items():
        lines.append(f"skipped, {REASONS[reason]}: {entry['count']:,}, such as {entry['paths'][0]}")
        lines += [f"    {path}" for path in entry["paths"][1:]]
    undecodable = facts["skipped"].get("not_utf8", {"paths": []})["paths"]
    files = dict.fromkeys(re.sub(r":\d+$", "", path) for path in undecodable)
    return lines + [advice(path) for path in files]


def printable(path: str) -> str:
    """Return a file name as text of one line: bytes that are not UTF-8 and control characters as escapes."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def advice(name: str) -> str:
    """Say what the encoding of a file may be, and the command that converts it."""
    import charset_normalizer

    kind, packed = suffixes(name)
    guess = None
    with suppress(OSError):
        if not packed and kind not in TABLES:
            with open(name, "rb") as file:
                guess = charset_normalizer.from_bytes(file.read(SAMPLE_BYTES), cp_isolation=ENCODINGS).best()
    if guess is None or guess.encoding not in ENCODINGS:
        return f"{name} is not UTF-8: convert it with iconv, and start again"
    encoding, (stem, ending) = guess.encoding.upper().replace("_", "-"), os.path.splitext(name)
    target = shlex.quote(f"{stem}.utf8{ending}")
    return f"{name} is perhaps {encoding}: iconv -f {encoding} -t UTF-8 {shlex.quote(name)} > {target}"


def read_kept(inputs: list[str], reading: Reading, spool: Path, ledger: Ledger) -> Iterator[list[str]]:
    """Yield the documents that are kept, block by block, in this process.

    Raises:
        UserError: there is none.
    """
    for block in cut_into_blocks(find_files(inputs), spool, reading):
        documents, faults, _ = read_block(block, reading)
        keep = ledger.judge(block, Contents.of(documents, faults))
        ledger.bytes_done += block.size
        yield [text.decode() for text, wanted in zip(documents, keep) if wanted]
    if not ledger.total("documents"):
        raise UserError(f"no document in {' '.join(ledger.inputs)}; skipped: {ledger.reasons()}")
