"""Batches: rows of prepared data in an order that depends on nothing but the data and the seed.

The order. Sample k of epoch e is one fixed row, a pure function of (rows of each shard, weights, shuffle_seed, e):

1. A source is an endless sequence of passes over its rows; each pass visits its shards in a new random order.
2. An epoch has as many rows as all sources together. A source gives its share of them, n: the next n rows of its
   sequence, wherever the last epoch stopped. So each row is used floor or ceil of its average number of times, by any
   sample of the run; without weights n is the source's size, and each epoch holds each row exactly once.
3. An epoch is cut into windows of 2^29 tokens (1 GB of uint16). Each window takes the same share of each source, to
   within a row, and is shuffled as a whole. Shards are therefore read nearly in sequence, a few of them at a time, and
   finding sample k costs one window, not a permutation of the epoch.

Random numbers are raw Philox words, whose stream numpy guarantees; the order survives an upgrade. An optimizer step is
the next `global_batch_size` samples; micro-batch j of rank r takes [j world mb + r mb, + mb) of them. What must stay
true: neither the world size, nor the micro-batch size, nor a stop and resume changes which rows a step holds.

The storage is mosaicml-streaming's: its MDS shards, downloaders, decompression and hashes. Its StreamingDataset is not
used, since for random access its shared memory costs more than it gives: two jobs that start together on one node
take the same names, a killed job leaves names behind that only a clean-up harmful to live jobs removes, a failed
download leaves the other ranks waiting for ever, a half-downloaded shard is trusted by the next start, and
`cache_limit` may delete a local source. Here the only shared state is files: a shard is downloaded to a temporary
folder, checked, and renamed into the cache, under a lock that the kernel frees when its holder dies. Ranks need no
barrier, any number of runs may share a cache, and a shard that was evicted while open stays readable.
"""

import errno
import fcntl
import hashlib
import itertools
import json
import logging
import math
import os
import queue
import shutil
import socket
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int32, Int64
from streaming.base.format.mds import MDSReader
from streaming.base.hashing import get_hash
from streaming.base.storage import CloudDownloader
from streaming.base.stream import Stream
from streaming.base.util import bytes_to_int
from streaming.base.world import World
from torch import Tensor

from megakexue.config import IGNORED, DataConfig, SourceConfig, UserError, read_json, require, sha256

log = logging.getLogger("megakexue")

T = TypeVar("T")
Ints = npt.NDArray[np.int64]

WINDOW_TOKENS = 2**29
"""Tokens that are shuffled together. Part of the order: changing it changes every run."""
MAX_OPEN_SHARDS = 256


@dataclass(frozen=True, kw_only=True)
class Position:
    """The next unread sample of an epoch."""

    epoch: int = 0
    sample: int = 0


class Interrupted(Exception):
    """Waiting for data was given up, as `Batches.is_interrupted` wished."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of one rank, on the CPU."""

    tokens: Int64[Tensor, "b t"]
    targets: Int64[Tensor, "b t"]
    """The next token; IGNORED where that is PAD, or a BOS, which no document can predict."""
    positions: Int64[Tensor, "b t"]
    """Restart at 0 at each document, each row and the padding at a row's end."""
    cu_seqlens: Int32[Tensor, " n"]
    """Where the positions restart in the flattened tokens, then b t: the boundaries for varlen attention."""
    n_targets: int
    samples: list[Position]
    """Which samples these are, row by row; `Batches.locate` names their shards. Rows of mere padding have none."""


def make_batch(rows: Int64[np.ndarray, "b t1"], samples: list[Position], *, bos_id: int, pad_id: int) -> Batch:
    """Split rows of t1 = t + 1 tokens into inputs and targets, and find the documents in them."""
    tokens, following = rows[:, :-1], rows[:, 1:]
    b, t = tokens.shape
    targets = np.where((following == pad_id) | (following == bos_id), IGNORED, following)
    is_start = tokens == bos_id
    is_start[:, 1:] |= (tokens[:, 1:] == pad_id) & (tokens[:, :-1] != pad_id)
    is_start[:, 0] = True
    column = np.arange(t)
    positions = column - np.maximum.accumulate(np.where(is_start, column, 0), axis=1)
    cu_seqlens = np.append(np.flatnonzero(is_start), b * t).astype(np.int32)
    return Batch(
        tokens=torch.from_numpy(np.ascontiguousarray(tokens)),
        targets=torch.from_numpy(targets),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        n_targets=int((targets != IGNORED).sum()),
        samples=samples,
    )


def shares(sizes: list[int], weights: list[float | None]) -> list[int]:
    """Return the rows that each source gives to an epoch of sum(sizes) rows: by weight, else its own size."""
    given = [weight for weight in weights if weight is not None]
    if len(given) < len(sizes):
        return sizes
    exact = [sum(sizes) * weight / sum(given) for weight in given]
    floors = [math.floor(share) for share in exact]
    largest_remainders = sorted(range(len(sizes)), key=lambda i: floors[i] - exact[i])
    for i in largest_remainders[: sum(sizes) - sum(floors)]:
        floors[i] += 1
    return floors


def permutation(n: int, *key: int) -> Ints:
    """Return a random order of 0 ... n-1 that depends on `key` alone, on every machine and version of numpy."""
    words = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(words, kind="stable")


class Order:
    """The rule of the module's docstring. Rows are numbered through all sources, shard by shard."""

    def __init__(self, shards: list[Ints], chosen: list[int], *, seed: int, shuffle: bool, window_rows: int) -> None:
        """`shards`: rows of each shard of each source; `chosen`: rows of each source in an epoch."""
        self.shards, self.chosen, self.seed, self.shuffle = shards, chosen, seed, shuffle
        self.sizes = [int(rows.sum()) for rows in shards]
        self.n_rows = sum(chosen)
        self.n_windows = math.ceil(self.n_rows / window_rows)
        edge = np.arange(self.n_windows + 1)
        self.window_starts = sum((edge * n // self.n_windows for n in chosen), np.zeros_like(edge))
        self.window = lru_cache(maxsize=2)(self._window)
        """Rows of window w of an epoch, in order: `window(epoch, w)`."""

    def _window(self, epoch: int, w: int) -> Ints:
        parts = []
        for source, n in enumerate(self.chosen):
            start, stop = (epoch * n + edge * n // self.n_windows for edge in (w, w + 1))
            parts.append(self._source_rows(source, start, stop))
        rows = np.concatenate(parts)
        if self.shuffle:
            return rows[permutation(len(rows), self.seed, 0, epoch, w)]
        # spread each source evenly; with one source this is the order on disk
        return rows[np.argsort(np.concatenate([(np.arange(len(p)) + 0.5) / len(p) for p in parts]), kind="stable")]

    def _source_rows(self, source: int, start: int, stop: int) -> Ints:
        """Rows start ... stop of the endless sequence of passes over one source."""
        sizes = self.shards[source]
        first_rows = sum(self.sizes[:source]) + np.cumsum(sizes) - sizes
        parts = [np.empty(0, np.int64)]
        while start < stop:
            number, at = divmod(start, self.sizes[source])
            until = min(at + stop - start, self.sizes[source])
            visited = np.arange(len(sizes))
            if self.shuffle:
                visited = permutation(len(sizes), self.seed, 1, source, number)
            ends = np.cumsum(sizes[visited])
            k = np.arange(at, until)
            nth = np.searchsorted(ends, k, side="right")
            parts.append((first_rows[visited] - (ends - sizes[visited]))[nth] + k)
            start += until - at
        return np.concatenate(parts)

    def window_of(self, sample: int) -> int:
        return int(np.searchsorted(self.window_starts, sample, side="right")) - 1

    def row(self, position: Position) -> int:
        w = self.window_of(position.sample)
        return int(self.window(position.epoch, w)[position.sample - int(self.window_starts[w])])


class Source:
    """One split of one prepared folder: its manifest, its index and random access to its rows.

    A remote folder (and a local one with compressed shards) is read through `cache`, shard by shard. A local one is
    read in place and never written. `file://` makes a mounted folder remote, for a cache on a faster disk.
    """

    def __init__(self, source: SourceConfig, split: str, config: DataConfig, cache: Path) -> None:
        self.path, self.split, self.cache, self.config = source.path, split, cache, config
        self.remote = source.path.removeprefix("file://").rstrip("/")
        # from a local folder nothing is downloaded, so there is nothing to try again
        self.n_attempts = 1 + config.download_retries if source.is_remote else 1
        self.cache_limit = parse_cache_limit(config)
        require(source.is_remote or Path(self.remote).is_dir(), f"data.sources: no such folder: {source.path}")

        self.manifest = self._read_manifest()
        entry = self.manifest["splits"].get(split) or {}
        self.shards: list[MDSReader] = self._read_index() if entry.get("rows") else []
        self.shard_rows = np.array([shard.samples for shard in self.shards], dtype=np.int64)
        require(
            self.n_rows == entry.get("rows", 0),
            f"data source {self.path}: {split}/index.json has {self.n_rows} rows but manifest.json says "
            f"{entry.get('rows')}: the copy is incomplete; copy it again or prepare the data again",
        )
        self.is_cached = source.is_remote or any(shard.compression for shard in self.shards)
        name = f"{Path(self.remote).name}-{hashlib.sha256(self.remote.encode()).hexdigest()[:8]}"
        self.folder = (cache / "shards" / name if self.is_cached else Path(self.remote)) / split
        self.verified: set[int] = set()

    @property
    def n_rows(self) -> int:
        return int(self.shard_rows.sum())

    def _attempt(self, what: str, action: Callable[[], T]) -> T:
        """Call `action` until it succeeds, at most `n_attempts` times, waiting longer each time."""
        for attempt in itertools.count(1):
            try:
                return action()
            except Exception as error:  # each downloader raises its own kinds
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                if attempt == self.n_attempts:
                    raise UserError(
                        f"data source {self.path}: cannot read {what} after {attempt} attempts ({reason}): "
                        "check the path, the access rights and the network, or prepare the data again"
                    ) from error
            wait_s = min(2 ** (attempt - 1), self.config.download_timeout_s)
            log.warning(
                "data source %s: attempt %d of %d to read %s failed (%s); tries again in %g s",
                self.path, attempt, self.n_attempts, what, reason, wait_s,
            )  # fmt: skip
            time.sleep(wait_s)
        raise AssertionError

    def _read_manifest(self) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "manifest.json"

            def download() -> None:
                downloader = CloudDownloader.get(self.remote)
                downloader.download(f"{self.remote}/manifest.json", str(target), self.config.download_timeout_s)

            self._attempt("manifest.json", download)
            manifest = read_json(target, f"the manifest of {self.path}")
        needed = {"tokenizer_sha256", "vocab_size", "bos_id", "eos_id", "pad_id", "seq_len", "splits"}
        require(needed <= manifest.keys(), f"{self.path}/manifest.json lacks {sorted(needed - manifest.keys())}")
        require(
            manifest["tokenizer_sha256"] == sha256(self.config.tokenizer),
            f"data.tokenizer={self.config.tokenizer} is not the tokenizer that {self.path} was prepared with: "
            "use the tokenizer.model of that folder, or prepare the data again",
        )
        return manifest

    def _read_index(self) -> list[MDSReader]:
        """Read the shard index anew at each start, so that a cache never outlives the data it was filled from."""
        with tempfile.TemporaryDirectory() as folder:
            stream = self._stream(folder)
            alone = World(num_nodes=1, ranks_per_node=1, workers_per_rank=1, worker=0)
            readers = self._attempt(
                f"{self.split}/index.json", lambda: stream.get_shards(alone, allow_unsafe_types=False)
            )
        shards = [reader for reader in readers if isinstance(reader, MDSReader)]
        require(shards == readers, f"data source {self.path}: {self.split} is not in MDS format: prepare it again")
        wanted = [f"ndarray:{dtype}:{self.config.seq_len + 1}" for dtype in ("uint16", "uint32")]
        for shard in shards:
            columns = dict(zip(shard.column_names, shard.column_encodings))
            require(
                list(columns) == ["tokens"] and columns["tokens"] in wanted,
                f"data source {self.path}: the rows of {self.split}/{shard.raw_data.basename} are {columns}, but "
                f"data.seq_len={self.config.seq_len} needs {{'tokens': '{wanted[0]}'}} or uint32: "
                "change data.seq_len or prepare the data again",
            )
        return shards

    def _stream(self, folder: str) -> Stream:
        return Stream(
            remote=self.remote,
            local=folder,
            split=self.split,
            download_retry=1,  # that is attempts; ours repeat the hash check as well, which is ours too
            download_timeout=self.config.download_timeout_s,
            keep_zip=False,
        )

    def fetch(self, index: int) -> Path:
        """Have a shard on disk and return its path. Raises UserError when the attempts are used up."""
        basename = self.shards[index].raw_data.basename
        path = self.folder / basename
        if not self.is_cached or is_touched(path):
            return path
        with self._locked(path):
            if not is_touched(path):
                self._attempt(f"{self.split}/{basename}", lambda: self._download(index, path))
        return path

    def _locked(self, path: Path) -> AbstractContextManager[None]:
        """Hold the lock of a shard of the cache: for downloading it, and for discarding a damaged copy."""
        return locked(self.cache / "locks" / self._name(path))

    def _name(self, path: Path) -> str:
        return f"{self.folder.parent.name}-{self.split}-{path.name}".replace("/", "-")

    def _download(self, index: int, path: Path) -> None:
        shard = self.shards[index]
        if self.cache_limit is not None:
            evict(self.cache, self.cache_limit - shard.get_max_size())
        # the same name each time, under the lock: what a killed run left behind is cleared here
        folder = self.cache / "tmp" / f"{socket.gethostname()}-{self._name(path)}"
        shutil.rmtree(folder, ignore_errors=True)
        self._stream(str(folder)).prepare_shard(shard)
        downloaded = folder / self.split / shard.raw_data.basename
        with open(downloaded, "rb") as file:
            if not is_intact(file.fileno(), shard):
                raise OSError("damaged: its size or hash is not what index.json says")
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(downloaded, path)
        shutil.rmtree(folder, ignore_errors=True)

    def _discard(self, path: Path, damaged: int) -> None:
        """Delete the damaged copy open as `damaged`; never a good one that another process has put in its place."""
        with self._locked(path), suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(damaged)):
                log.warning("%s: this copy in the cache is damaged; it is downloaded again", path)
                path.unlink()

    def open(self, index: int) -> int:
        """Return a file descriptor of a shard whose bytes were compared with the index once by this process."""
        for is_last in (False, False, True):
            path = self.fetch(index)
            try:
                file = os.open(path, os.O_RDONLY)
            except OSError as error:
                if self.is_cached and error.errno in (errno.ENOENT, errno.ESTALE) and not is_last:
                    continue  # evicted between fetch and open
                raise UserError(f"{path}: cannot read this shard: {error}") from error
            if index in self.verified or is_intact(file, self.shards[index]):
                self.verified.add(index)
                return file
            try:
                if is_last or not self.is_cached:
                    break
                self._discard(path, file)  # and download it again
            finally:
                os.close(file)
        raise UserError(
            f"{path}: damaged shard: its size or hash is not what {self.path}/{self.split}/index.json says; "
            "restore it from a copy or prepare the data again"
        )


def parse_cache_limit(config: DataConfig) -> int | None:
    if config.cache_limit is None:
        return None
    try:
        return bytes_to_int(config.cache_limit)
    except ValueError as error:
        raise UserError(f"data.cache_limit={config.cache_limit!r} is not a number of bytes such as 200gb") from error


def is_touched(path: Path) -> bool:
    """Mark a file as just used, for `evict`; False when there is none."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def is_intact(file: int, shard: MDSReader) -> bool:
    """Compare an open shard's size, and its hash if the index has one, with the index."""
    if os.fstat(file).st_size != shard.raw_data.bytes:
        return False
    name = next(iter(shard.raw_data.hashes), None)
    return name is None or get_hash(name, os.pread(file, shard.raw_data.bytes, 0)) == shard.raw_data.hashes[name]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock among the processes and threads of this node. The kernel frees it when the holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def evict(cache: Path, limit: int) -> None:
    """Delete the shards that were used longest ago until the cache is within `limit` bytes.

    Downloads under way do not count, so that the cache may pass its limit by one shard for each rank of the node.
    """
    with locked(cache / "locks" / "evict"):
        shards = []
        for path in (cache / "shards").rglob("*.mds"):
            with suppress(FileNotFoundError):  # a damaged one that its reader has just deleted
                stat = path.stat()
                shards.append((stat.st_mtime_ns, stat.st_size, path))
        used = sum(n_bytes for _, n_bytes, _ in shards)
        for _, n_bytes, path in sorted(shards):
            if used <= limit:
                break
            path.unlink(missing_ok=True)
            used -= n_bytes


class Batches:
    """The micro-batches of one rank, step by step. A thread reads `n_prefetch` of them ahead.

    A second thread, for cached sources, downloads the shards of the next window while this one is being read; the
    ranks of a node divide them. Each node downloads all shards, since a step's rows come from all over a window: a
    few MB/s, for a row is trained on much longer than it takes to load.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        split: str = "train",
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        local_rank: int,
        local_world_size: int,
        cache: Path,
    ) -> None:
        """Read the manifests and indexes. `cache` holds the shards of remote sources.

        `split="valid"` ignores weights and shuffle: all sources' validation rows once, each source spread evenly.

        Raises:
            UserError: a source is missing, unreachable, damaged or does not fit `config`; the split has no rows; the
                cache limit is too small.
        """
        assert global_batch_size % (micro_batch_size * world_size) == 0
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank, self.world_size = rank, world_size
        self.local_rank, self.local_world_size = local_rank, local_world_size
        self.n_prefetch, self.seq_len = config.n_prefetch, config.seq_len
        # an attempt's timeout is the downloader's; this one catches what even that does not, and a stuck file system
        self.timeout_s = 2 * (1 + config.download_retries) * config.download_timeout_s
        is_train = split == "train"

        sources = [(Source(source, split, config, cache), source.weight) for source in config.sources]
        for source, _ in sources:
            require(
                source.n_rows > 0 or not is_train,
                f"data source {source.path} has no rows in its train split: prepare it again",
            )
        self.sources = [source for source, _ in sources if source.n_rows > 0]
        require(
            len(self.sources) > 0,
            f"none of data.sources has rows in its {split} split: give tools/prepare_data.py a share for validation, "
            "or turn validation off with evaluate.every_steps=null",
        )
        manifests = [source.manifest for source, _ in sources]
        special = {(m["bos_id"], m["eos_id"], m["pad_id"]) for m in manifests}
        require(len(special) == 1, f"data.sources: (bos_id, eos_id, pad_id) differ: {sorted(special)}: prepare again")
        self.bos_id, _, self.pad_id = special.pop()
        self.vocab_size: int = max(m["vocab_size"] for m in manifests)

        sizes = [source.n_rows for source in self.sources]
        self.order = Order(
            [source.shard_rows for source in self.sources],
            shares(sizes, [weight for _, weight in sources]) if is_train else sizes,
            seed=config.shuffle_seed,
            shuffle=config.shuffle and is_train,
            window_rows=max(1, WINDOW_TOKENS // config.seq_len),
        )
        self._check_cache_limit(config)
        self._shards = [(source, index) for source in self.sources for index in range(len(source.shards))]
        self._ends = np.cumsum(np.concatenate([source.shard_rows for source in self.sources]))

        self.position = Position()
        """Where the next step begins; put it into a checkpoint and give it to `seek`."""
        self.wait_s = 0.0
        """Seconds that the last `next_step` waited for data."""
        self.is_interrupted: Callable[[], bool] = lambda: False
        """Asked about once a second while waiting for data."""
        self._open_shards: OrderedDict[int, tuple[int, Ints]] = OrderedDict()
        """The file and the offsets of the rows, of the shards used last."""
        self._open_lock = threading.Lock()
        self._activity, self._last_activity = "the start", time.monotonic()
        self._queue: queue.Queue[Batch | Exception] | None = None
        self._reader: threading.Thread | None = None
        self._stop = threading.Event()

    def _check_cache_limit(self, config: DataConfig) -> None:
        """Two windows must fit: the one being read, and the next one, which is downloaded meanwhile."""
        limit = parse_cache_limit(config)
        needed = 0
        for source, chosen in zip(self.sources, self.order.chosen):
            if source.is_cached and chosen:
                rows = math.ceil(chosen / self.order.n_windows)
                sizes = [shard.get_max_size() for shard in source.shards]
                window_bytes = math.ceil(rows / source.n_rows * sum(sizes)) + 2 * max(sizes)
                needed += min(2 * window_bytes, sum(sizes))
        require(
            limit is None or needed <= limit,
            f"data.cache_limit={config.cache_limit} is too small: two shuffle windows take {needed} bytes; "
            f"raise it to at least {math.ceil(needed / 2**20)}mb",
        )

    @property
    def n_rows(self) -> int:
        """Rows in an epoch."""
        return self.order.n_rows

    @property
    def fingerprint(self) -> str:
        """A hash of everything that the order depends on: a position means the same rows while it stays the same."""
        order = self.order
        shards = [rows.tolist() for rows in order.shards]
        contents = [source.manifest["splits"][source.split].get("index_sha256") for source in self.sources]
        values = [contents, shards, order.chosen, order.seed, order.shuffle, order.n_windows]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]

    def locate(self, position: Position) -> str:
        """Name the source, shard and row of a sample, for the log of a bad batch."""
        shard, row = self._find(self.order.row(position))
        return f"{self._name(shard)} row {row}"

    def seek(self, position: Position) -> None:
        """Continue from `position`. Raises UserError when the data has no such sample."""
        require(
            position.epoch >= 0 and 0 <= position.sample < self.n_rows,
            f"data.sources: {position} is outside an epoch of {self.n_rows} rows: the data is not what it was; "
            "use the sources that the checkpoint was trained on",
        )
        self.close()
        self.position = position

    def next_step(self) -> list[Batch]:
        """Return this rank's micro-batches of the next optimizer step.

        Raises:
            UserError: a shard is damaged or cannot be downloaded, or reading makes no progress.
            Interrupted: `is_interrupted` came true while waiting; the position is as it was.
        """
        if self._queue is None:
            self._start(self._step_samples(self.position), self.position)
        began = time.monotonic()
        n_micro_batches = self.global_batch_size // (self.micro_batch_size * self.world_size)
        batches = [self._take() for _ in range(n_micro_batches)]
        self.wait_s = time.monotonic() - began
        self.position = self._advance(self.position, self.global_batch_size)
        return batches

    def first_rows(self, n_rows: int) -> Iterator[Batch]:
        """Yield this rank's micro-batches of the first `n_rows` samples, or of all if there are fewer.

        For validation: the rows do not depend on the world size, and every rank gets the same number of micro-batches
        (ZeRO-3 runs collectives in the forward pass); where the rows run out there are rows of padding, all ignored.
        Raises what `next_step` does.
        """
        n_rows = min(n_rows, self.n_rows)
        samples = []
        for start in range(self.rank * self.micro_batch_size, n_rows + self.rank * self.micro_batch_size, self._stride):
            samples.append([Position(sample=k) for k in range(start, min(start + self.micro_batch_size, n_rows))])
        self.close()
        self._start(iter(samples))
        try:
            for _ in samples:
                yield self._take()
        finally:
            self.close()

    def close(self) -> None:
        """Stop the threads and close the files. A later `next_step` starts them again.

        A thread in a download is not waited for: it ends after it, and after the attempts that are left if it fails.
        """
        self._stop.set()
        if self._queue is not None and self._reader is not None:
            with suppress(queue.Empty):
                while True:
                    self._queue.get_nowait()  # wakes a reader that waits for room
            self._reader.join(timeout=1.0)
        self._queue = self._reader = None
        if self._open_lock.acquire(timeout=1.0):  # a read that is stuck keeps its files
            while self._open_shards:
                os.close(self._open_shards.popitem()[1][0])
            self._open_lock.release()

    def _advance(self, position: Position, n: int) -> Position:
        epochs, sample = divmod(position.sample + n, self.n_rows)
        return Position(epoch=position.epoch + epochs, sample=sample)

    def _find(self, row: int) -> tuple[int, int]:
        """Return (shard, row in the shard) of a row of the order."""
        shard = int(np.searchsorted(self._ends, row, side="right"))
        source, index = self._shards[shard]
        return shard, row - int(self._ends[shard]) + source.shards[index].samples

    def _name(self, shard: int) -> str:
        source, index = self._shards[shard]
        return f"{source.path}/{source.split}/{source.shards[index].raw_data.basename}"

    @property
    def _stride(self) -> int:
        """Samples of all ranks' micro-batches."""
        return self.micro_batch_size * self.world_size

    def _step_samples(self, position: Position) -> Iterator[list[Position]]:
        for start in itertools.count(self.rank * self.micro_batch_size, self._stride):
            yield [self._advance(position, start + k) for k in range(self.micro_batch_size)]

    def _start(self, samples: Iterator[list[Position]], ahead_of: Position | None = None) -> None:
        """Read `samples` in a thread, micro-batch by micro-batch; in another fetch the shards from `ahead_of` on."""
        self._stop = threading.Event()
        self._queue = queue.Queue(maxsize=self.n_prefetch)
        self._last_activity = time.monotonic()
        # daemons: a download that hangs must not keep a failed process alive
        arguments = samples, self._stop, self._queue
        self._reader = threading.Thread(target=self._read_ahead, args=arguments, daemon=True)
        self._reader.start()
        if ahead_of and any(source.is_cached for source in self.sources):
            threading.Thread(target=self._fetch_ahead, args=(ahead_of, self._stop), daemon=True).start()

    def _take(self) -> Batch:
        assert self._queue is not None
        while True:
            try:
                item = self._queue.get(timeout=min(1.0, self.timeout_s))
            except queue.Empty:
                if self.is_interrupted():
                    self.close()  # the micro-batches taken so far are read again by a later call
                    raise Interrupted from None
                silent_s = time.monotonic() - self._last_activity
                require(
                    silent_s < self.timeout_s,
                    f"data: no progress for {silent_s:.0f} s at {self._activity}: check the storage and the network, "
                    "or raise data.download_timeout_s",
                )
                continue
            if isinstance(item, Exception):
                self._queue.put(item)  # the thread has ended: a second call fails in the same way
                raise item
            return item

    def _read_ahead(self, samples: Iterator[list[Position]], stop: threading.Event, batches: queue.Queue) -> None:
        """Put the micro-batches of `samples` into the queue, in a thread; an error is the last item."""
        item: Batch | Exception
        for positions in samples:
            try:
                item = self._read(positions)
            except Exception as error:
                item = error
            while not stop.is_set():
                try:
                    batches.put(item, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if stop.is_set() or isinstance(item, Exception):
                return

    def _fetch_ahead(self, position: Position, stop: threading.Event) -> None:
        """Download this rank's part of the shards of each window, one window ahead of the steps, in a thread."""
        epoch, w = position.epoch, self.order.window_of(position.sample)
        while True:
            shards = np.unique(np.searchsorted(self._ends, self.order.window(epoch, w), side="right"))
            for shard in shards[self.local_rank :: self.local_world_size]:
                if stop.is_set():
                    return
                try:
                    source, index = self._shards[shard]
                    source.fetch(index)
                except Exception:  # the reader will come to the same shard, and say what is wrong with it
                    return
            while (self.position.epoch, self.order.window_of(self.position.sample)) < (epoch, w):
                if stop.wait(0.2):
                    return
            epoch, w = (epoch, w + 1) if w + 1 < self.order.n_windows else (epoch + 1, 0)

    def _read(self, samples: list[Position]) -> Batch:
        """Read the rows of `samples`, and fill up with rows of PAD."""
        rows = np.full((self.micro_batch_size, self.seq_len + 1), self.pad_id, dtype=np.int64)
        for i, position in enumerate(samples):
            rows[i] = self._read_row(*self._find(self.order.row(position)))
        return make_batch(rows, samples, bos_id=self.bos_id, pad_id=self.pad_id)

    def _read_row(self, shard: int, row: int) -> npt.NDArray[np.unsignedinteger]:
        source, index = self._shards[shard]
        reader = source.shards[index]
        with self._open_lock:
            self._activity, self._last_activity = self._name(shard), time.monotonic()
            if shard in self._open_shards:
                self._open_shards.move_to_end(shard)
            else:
                file = source.open(index)
                # an MDS shard begins with uint32: n, then n + 1 offsets
                offsets = np.frombuffer(os.pread(file, 4 * (reader.samples + 1), 4), np.uint32).astype(np.int64)
                # an evicted shard keeps its place on the disk for as long as it is open
                evicted = [k for k, (f, _) in self._open_shards.items() if os.fstat(f).st_nlink == 0]
                for key in evicted:
                    os.close(self._open_shards.pop(key)[0])
                self._open_shards[shard] = file, offsets
                if len(self._open_shards) > MAX_OPEN_SHARDS:
                    os.close(self._open_shards.popitem(last=False)[1][0])
            file, offsets = self._open_shards[shard]
            begin, end = int(offsets[row]), int(offsets[row + 1])
            return reader.decode_sample(os.pread(file, end - begin, begin))["tokens"]
