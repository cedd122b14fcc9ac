"""Folders of random rows in the format of prepared data, batches of them, and a bucket that serves them."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from streaming import MDSWriter

from megakexue.config import DataConfig, SourceConfig
from megakexue.core.batch import Batch
from megakexue.dist import Ranks
from megakexue.files import sha256
from megakexue.run.data import Batches

BOS, EOS, PAD, VOCAB, T = 1, 2, 0, 5000, 16
Ints = npt.NDArray[np.int64]


def random_rows(n: int, rng: np.random.Generator, t: int = T) -> Ints:
    """Rows cut out of a stream of documents of 0 to 12 tokens, some with padding at their end."""
    stream: list[int] = []
    while len(stream) < (n + 1) * (t + 1):
        stream += [BOS, *rng.integers(3, VOCAB, rng.integers(0, 13)), EOS]
    rows = np.array(stream[3 : 3 + n * (t + 1)]).reshape(n, t + 1)
    for row in rows[rng.random(n) < 0.3]:
        row[rng.integers(1, t + 1) :] = PAD
    for i, row in enumerate(rows):
        row[0] = 3 + i  # what makes rows differ, also the short ones
    return rows


def write_source(
    folder: Path,
    n_train: int,
    n_valid: int = 0,
    seed: int = 0,
    t: int = T,
    rows_of: Callable[[int, np.random.Generator, int], Ints] = random_rows,
    **writer: Any,
) -> dict[str, Ints]:
    """Write a prepared folder and return {split: rows}."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(b"a tokenizer")
    rows = {"train": rows_of(n_train, rng, t), "valid": rows_of(n_valid, rng, t)}
    for split, values in rows.items():
        if len(values):
            options: dict[str, Any] = {"size_limit": 2000, "hashes": ["xxh64"]} | writer
            with MDSWriter(columns={"tokens": f"ndarray:uint16:{t + 1}"}, out=str(folder / split), **options) as out:
                for row in values.astype(np.uint16):
                    out.write({"tokens": row})
    manifest = {
        "tokenizer_sha256": sha256(folder / "tokenizer.model"), "vocab_size": VOCAB, "seq_len": t,
        "bos_id": BOS, "eos_id": EOS, "pad_id": PAD,
        "splits": {split: {"rows": len(values)} for split, values in rows.items()},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return rows


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def damage(path: Path) -> None:
    """Flip one bit in a row."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def data_config(*given: SourceConfig | Path | str, tokenizer: Path | str | None = None, **options: Any) -> DataConfig:
    sources = [source if isinstance(source, SourceConfig) else SourceConfig(path=str(source)) for source in given]
    tokenizer = tokenizer or f"{sources[0].path.removeprefix('file://')}/tokenizer.model"
    return DataConfig(sources=sources, tokenizer=str(tokenizer), **{"seq_len": T, "download_retries": 1} | options)


OPENED: list[Batches] = []


def open_batches(
    config: DataConfig,
    cache: Path | str,
    *,
    rank: int = 0,
    world_size: int = 1,
    sequence_size: int = 1,
    global_batch_size: int = 8,
    micro_batch_size: int = 2,
    **options: Any,
) -> Batches:
    """Open the batches of one of several ranks of a node; `close_all` closes them."""
    ranks = Ranks(
        rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size, sequence_size=sequence_size
    )
    batches = Batches(
        config, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size, ranks=ranks, cache=Path(cache),
        **options,
    )  # fmt: skip
    OPENED.append(batches)
    return batches


def close_all() -> None:
    while OPENED:
        OPENED.pop().close()
    for thread in threading.enumerate():
        # one that `close` did not wait for would try its download again in the next test, from that test's bucket
        if "_fetch_ahead" in thread.name or "_read_ahead" in thread.name:
            thread.join(60)
            assert not thread.is_alive(), thread


def tokens_of(steps: Sequence[Sequence[Batch]]) -> list[list[int]]:
    return torch.cat([batch.tokens for step in steps for batch in step]).tolist()


class Bucket(ThreadingHTTPServer):
    """S3 over a folder: /bucket/key."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.folder = folder
        self.gets: Counter[str] = Counter()
        """How often each key was asked for."""
        self.puts: list[str] = []
        """Keys that were written, in this order."""
        self.fail: dict[str, int] = {}
        """How often a key is still to fail."""
        self.stall: set[str] = set()
        """Keys of which half is sent; the rest waits for `resume`. Then `stalled` is set."""
        self.stalled, self.resume = threading.Event(), threading.Event()


@contextmanager
def serving(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """Serve s3://bucket from a folder, to this process and to programs that it starts."""
    server = Bucket(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    environment = {
        "S3_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


class Requests(BaseHTTPRequestHandler):
    server: Bucket

    def do_HEAD(self) -> None:
        self.reply(with_body=False)

    def do_GET(self) -> None:
        self.reply(with_body=True)

    def reply(self, with_body: bool) -> None:
        server, key = self.server, self.key
        path = server.folder / key
        if with_body:
            server.gets[key] += 1
        how = server.fail.get(key, 0)
        server.fail[key] = how - 1
        if key == "":  # is there such a bucket?
            self.send_response(200)
            self.end_headers()
            return
        if how > 0 or not path.is_file():
            self.send_response(500 if how > 0 else 404)
            self.end_headers()
            return
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", '"x"')
        self.end_headers()
        if with_body and key in server.stall:
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            server.stalled.set()
            server.resume.wait(60)
        elif with_body:
            self.wfile.write(content)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if "aws-chunked" in self.headers.get("Content-Encoding", ""):
            content = unchunked(content)
        how = self.server.fail.get(self.key, 0)
        self.server.fail[self.key] = how - 1
        if how <= 0:
            path = self.server.folder / self.key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            self.server.puts.append(self.key)
        self.send_response(500 if how > 0 else 200)
        self.send_header("ETag", '"x"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    @property
    def key(self) -> str:
        return [*self.path.split("?")[0].split("/", 2), ""][2]

    def log_message(self, format: str, *args: Any) -> None:
        pass


def unchunked(content: bytes) -> bytes:
    """What a body of chunks, each with its size in front, holds."""
    parts = []
    while content:
        size, _, content = content.partition(b"\r\n")
        n = int(size.split(b";")[0], 16)
        parts.append(content[:n])
        content = content[n + 2 :] if n else b""
    return b"".join(parts)


def s3_config(bucket: Bucket, *keys: str, **options: Any) -> DataConfig:
    sources = [SourceConfig(path=f"s3://bucket/{key}") for key in keys]
    return data_config(*sources, tokenizer=bucket.folder / keys[0] / "tokenizer.model", **options)
