"""What several tests of this folder use: text, files of it, and prepared rows read back by streaming's reader."""

import bz2
import gzip
import json
import lzma
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megakexue.text.prepare import PrepareArguments
from megakexue.text.tokenizer import SentencePiece, Tokenizer
from tests.conftest import stdlib_files

STDLIB = Path(sysconfig.get_paths()["stdlib"])
BOS, EOS, PAD = 1, 2, 3
TEXTS = [
    "春眠不觉晓，处处闻啼鸟。\n夜来风雨声，花落知多少。",
    "emoji 🐅🚀 and a family 👨‍👩‍👧‍👦",
    "def f(x):\r\n\treturn x  # CRLF, tab\r\n",
    "<s> is three characters here, </s> too, ▁ and <pad> as well\n",
    "no newline at the end",
    "\n\n  leading and trailing space  \n\n",
]


def stdlib_texts(n: int) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in stdlib_files(n)]


def arguments(**given: Any) -> PrepareArguments:
    return PrepareArguments(**{"seq_len": 32, "valid_fraction": 0.0, **given})


def write_lines(path: Path, texts: list[str], key: str = "text") -> None:
    lines = "".join(json.dumps({key: text, "other": 1}) + "\n" for text in texts).encode()
    match path.suffix:
        case ".gz":
            path.write_bytes(gzip.compress(lines))
        case ".bz2":
            path.write_bytes(bz2.compress(lines))
        case ".xz":
            path.write_bytes(lzma.compress(lines))
        case ".zst":
            path.write_bytes(pytest.importorskip("zstandard").compress(lines))
        case _:
            path.write_bytes(lines)


def rows_of(folder: Path) -> np.ndarray:
    """All rows of a split, read by streaming's own reader, each shard compared with its hash."""
    from streaming.base.format.mds.reader import MDSReader
    from streaming.base.hashing import get_hash

    rows = []
    for shard in json.loads((folder / "index.json").read_text())["shards"]:
        data = (folder / shard["raw_data"]["basename"]).read_bytes()
        assert get_hash("xxh64", data) == shard["raw_data"]["hashes"]["xxh64"]
        assert len(data) == shard["raw_data"]["bytes"]
        reader = MDSReader.from_json(str(folder.parent), folder.name, shard)
        rows += [reader[i]["tokens"] for i in range(shard["samples"])]
    return np.array(rows)


def stream_of(rows: np.ndarray, pad_id: int) -> list[int]:
    """Undo concat: join rows at the token that they share, and drop the padding of the last."""
    np.testing.assert_array_equal(rows[1:, 0], rows[:-1, -1])
    assert not (rows[:-1] == pad_id).any()
    stream = np.concatenate([rows[0], *rows[1:, 1:]])
    n = int((stream != pad_id).sum())
    assert not (stream[:n] == pad_id).any()
    return stream[:n].tolist()


def split_documents(stream: list[int], tokenizer: Tokenizer) -> list[str]:
    documents: list[list[int]] = []
    for token in stream:
        if token == tokenizer.bos_id:
            documents.append([])
        documents[-1].append(token)
    assert all(document[-1] == tokenizer.eos_id for document in documents)
    return [tokenizer.decode_bytes(document).decode() for document in documents]


def documents_in(out: Path, split: str = "train") -> list[str]:
    tokenizer = SentencePiece(out / "tokenizer.model")
    rows = rows_of(out / split)
    return split_documents(stream_of(rows, tokenizer.pad_id), tokenizer) if len(rows) else []
