#!/usr/bin/env python
"""Look at prepared data: rows as text with the borders of documents, their lengths, and which are empty or repeated."""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from megakexue import buckets
from megakexue.config import DataConfig, SourceConfig, as_integer, require, run_program
from megakexue.files import read_json
from megakexue.run.rows import Rows
from megakexue.run.source import Source
from megakexue.text.duplicates import digests_of
from megakexue.text.manifest import read_manifest
from megakexue.text.pack import marked_starts
from megakexue.text.tokenizer import Tokenizer
from megakexue.text.tokenizer_files import find_tokenizer, load_tokenizer

EPILOG = """\
Numbers of whole folders come from their manifests. Lengths, near-empty and repeated documents are those of the rows
that are read (--n-rows), and of documents that are whole in them: with --packing concat those that begin and end in
the rows, with best_fit those that fit into a row.

examples:
  tools/inspect_data.py data/web                       # the first rows, and what 2,000 rows hold
  tools/inspect_data.py data/web --row 5000 --pieces   # one row, token by token
  tools/inspect_data.py data/web data/code data/zh     # sources side by side
"""
SHOWN = 160
"""Characters of a document that are shown; --full shows all."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="+", metavar="DATA", help="folder written by tools/prepare_data.py")
    parser.add_argument("--split", choices=["train", "valid"], default="train", help="(default: train)")
    parser.add_argument(
        "--row", type=as_integer, default=0, metavar="N", help="the first row that is shown (default: 0)"
    )
    parser.add_argument("--show", type=as_integer, default=2, metavar="N", help="rows that are shown (default: 2)")
    parser.add_argument("--pieces", action="store_true", help="show each token by itself, with | between them")
    parser.add_argument("--full", action="store_true", help=f"show whole documents, not {SHOWN} characters of each")
    parser.add_argument(
        "--n-rows",
        type=as_integer,
        default=2000,
        metavar="N",
        help="rows that are measured, from the first (default: 2000)",
    )
    parser.add_argument(
        "--near-empty", type=as_integer, default=16, metavar="N",
        help="count documents of fewer tokens than this, BOS and EOS included (default: 16)",
    )  # fmt: skip
    return parser.parse_intermixed_args()


@dataclass(frozen=True)
class Part:
    """What a row has of a document."""

    tokens: np.ndarray
    begins: bool
    """With its first token; without it, it began in an earlier row."""
    ends: bool
    """With its last token."""


def parts_of(row: np.ndarray, bos_id: int, eos_id: int, pad_id: int) -> list[Part]:
    """Cut a row where documents begin, without its padding. The first part may go on with a document from before."""
    n = len(row)
    while n > 1 and row[n - 1] == pad_id and (pad_id != eos_id or row[n - 2] == pad_id):
        n -= 1
    starts = [int(i) for i in np.flatnonzero(marked_starts(row[:n], bos_id, eos_id))]
    edges = sorted({0, *starts, n})
    return [
        Part(
            row[begin:end], begins := begin in starts,
            ends=bool(row[end - 1] == eos_id) and end - begin > int(begins),  # BOS alone may be the mark of an end too
        )
        for begin, end in pairwise(edges)
    ]  # fmt: skip


@dataclass
class Found:
    """What the rows hold."""

    n_rows: int
    lengths: list[int] = field(default_factory=list)
    """Tokens of the documents that are whole."""
    near_empty: list[np.ndarray] = field(default_factory=list)
    repeated: list[tuple[str, int, np.ndarray]] = field(default_factory=list)
    """Where the first occurrence is, the row of this one, and the tokens."""


def whole_documents(rows: Iterator[tuple[int, list[Part]]], is_stream: bool) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the row in which a document begins, and its tokens.

    Args:
        is_stream: whether each row goes on where the one before ended, whose last token it repeats.
    """
    open_parts: list[np.ndarray] = []
    began = 0
    for number, parts in rows:
        for i, part in enumerate(parts):
            if part.begins:
                open_parts, began = [part.tokens], number
            elif open_parts and is_stream and i == 0:
                open_parts.append(part.tokens[1:])  # the token that two rows share
            else:
                open_parts = []
            if part.ends and open_parts:
                yield began, np.concatenate(open_parts)
                open_parts = []


class Folder:
    """One folder of prepared data, open for reading."""

    def __init__(self, path: str, split: str, cache: Path) -> None:
        require(not buckets.is_remote(path), f"{path} is in a bucket: name a local folder, such as a copy of it")
        self.path, self.manifest = path, read_manifest(path)
        tokenizer = find_tokenizer(Path(path))
        config = DataConfig(sources=[SourceConfig(path=path)], tokenizer=f"{tokenizer}", seq_len=self.manifest.seq_len)
        self.source = Source(config.sources[0], split, config, cache)
        require(self.source.n_rows > 0, f"{path} has no rows of the split {split}: choose the other --split")
        self.rows = Rows([self.source])
        self.packing = read_json(Path(path, "manifest.json"), "the manifest of prepared data").get("packing", "concat")
        self.values = self.manifest.splits[split]
        self.tokenizer: Tokenizer = load_tokenizer(tokenizer)

    def parts(self, row: int) -> list[Part]:
        manifest = self.manifest
        return parts_of(self.rows.read(row), manifest.bos_id, manifest.eos_id, manifest.pad_id)

    def measure(self, n_rows: int, near_empty: int, seen: dict[int, str]) -> Found:
        """Read the first rows.

        Args:
            near_empty: documents of fewer tokens count as such.
            seen: by the digest of a document's bytes, where it is; of this folder and of those before.
        """
        found = Found(min(n_rows, self.source.n_rows))
        read = ((row, self.parts(row)) for row in range(found.n_rows))
        for row, document in whole_documents(read, is_stream=self.packing == "concat"):
            found.lengths.append(len(document))
            if len(document) < near_empty:
                found.near_empty.append(document)
            (digest,) = digests_of([self.tokenizer.decode_bytes(document.tolist())]).tolist()
            if digest in seen:
                found.repeated.append((seen[digest], row, document))
            seen.setdefault(digest, f"{self.path} row {row:,}")
        return found


def text_of(tokens: np.ndarray, tokenizer: Tokenizer, args: argparse.Namespace) -> str:
    """Return tokens as one line of text, shortened in the middle unless --full asks for all of it."""
    ids = tokens.tolist()
    parts = [tokenizer.decode([i]) for i in ids] if args.pieces else [tokenizer.decode(ids)]
    text = "|".join(part.encode("unicode_escape").decode() if not part.isprintable() else part for part in parts)
    if args.full or len(text) <= SHOWN:
        return text
    return f"{text[: SHOWN // 2]} [... {len(text) - SHOWN:,} characters ...] {text[-SHOWN // 2 :]}"


def number(value: float | None, form: str, scale: float = 1) -> str:
    """A number of a manifest, which an old one may lack."""
    return "-" if value is None else f"{value * scale:{form}}"


def overview(folders: list[Folder], split: str) -> str:
    """Return a table with a line for each folder, and one for all where there are several."""
    names = ["source", "rows", "tokens", "share", "documents", "MB", "bytes/token", "padding", "unigram nats"]
    total = sum(folder.values.get("tokens", 0) for folder in folders)
    table = [names]
    for folder in folders:
        values = folder.values
        tokens, size = values.get("tokens"), values.get("bytes")
        rate = None if not tokens or size is None else size / tokens
        padding = None if values.get("padding") is None else values["padding"] / (tokens + values["padding"])
        table.append([
            folder.path, number(values["rows"], ","), number(tokens, ","), number(tokens, ".1%", 1 / max(1, total)),
            number(values.get("documents"), ","), number(size, ".2f", 1e-6), number(rate, ".3f"),
            number(padding, ".2%"), number(values.get("unigram_entropy_nats"), ".3f"),
        ])  # fmt: skip
    widths = [max(len(line[i]) for line in table) for i in range(len(names))]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
        for line in table
    ]
    return "\n".join([f"split {split}", *lines])


def described(folder: Folder, found: Found, args: argparse.Namespace) -> Iterator[str]:
    """Yield lines on the documents in the rows that were read."""
    n, manifest = len(found.lengths), folder.manifest
    kind = f"rows of {manifest.seq_len} + 1 tokens, packing {folder.packing}"
    yield f"\n{folder.path}: {kind}; read {found.n_rows:,} of {folder.source.n_rows:,}"
    if not n:
        yield "  lengths      no document is whole in these rows: read more of them (--n-rows)"
        return
    shares = ((0, "shortest"), (10, "10 %"), (50, "half"), (90, "90 %"), (100, "longest"))
    spread = ", ".join(f"{name} {np.percentile(found.lengths, share):,.0f}" for share, name in shares)
    yield f"  lengths      of {n:,} whole documents, in tokens: {spread}"
    few, again = len(found.near_empty), len(found.repeated)
    yield f"  near-empty   {few:,} documents of fewer than {args.near_empty} tokens ({few / n:.2%})"
    for tokens in found.near_empty[:3]:
        yield f"               {text_of(tokens, folder.tokenizer, args)}"
    yield f"  repeated     {again:,} documents that came before, here or in a folder above ({again / n:.2%})"
    for first, row, tokens in found.repeated[:3]:
        yield f"               {first}, and row {row:,}: {text_of(tokens, folder.tokenizer, args)}"


def shown(folder: Folder, args: argparse.Namespace) -> Iterator[str]:
    """Yield some rows as text, a line for each document."""
    for row in range(args.row, min(args.row + args.show, folder.source.n_rows)):
        parts = folder.parts(row)
        n = sum(len(part.tokens) for part in parts)
        yield f"\n{folder.rows.locate(row)} (row {row:,}): {n:,} tokens, {folder.manifest.seq_len + 1 - n:,} padding"
        at = 0
        for part in parts:
            marks = f"{'[' if part.begins else '…'}{']' if part.ends else '…'}"
            yield f"  {at:>6} {marks} {text_of(part.tokens, folder.tokenizer, args)}"
            at += len(part.tokens)


def main() -> None:
    args = parse_arguments()
    for name, lowest in (("row", 0), ("show", 0), ("near_empty", 0), ("n_rows", 1)):
        value = getattr(args, name)
        require(value >= lowest, f"--{name.replace('_', '-')} {value} must be at least {lowest}")
    with tempfile.TemporaryDirectory(prefix="inspect_data_") as cache:
        folders = [Folder(path, args.split, Path(cache)) for path in args.data]
        for folder in folders:
            n_rows = folder.source.n_rows
            require(args.row < n_rows, f"--row {args.row}: {folder.path} has the rows 0 to {n_rows - 1}")
        sys.stdout.write(overview(folders, args.split) + "\n")
        seen: dict[int, str] = {}
        for folder in folders:
            found = folder.measure(args.n_rows, args.near_empty, seen)
            for line in (*described(folder, found, args), *shown(folder, args)):
                print(line)
            folder.rows.close()
    if args.show:
        print("\n[ a document begins here, ] it ends here, … it goes on")


if __name__ == "__main__":
    run_program(main)
