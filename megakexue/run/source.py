"""A source: one split of one folder of prepared data, local or remote, and the cache of shards.

The storage is that of mosaicml-streaming: its MDS shards, downloaders and decompression. Only a source that is
downloaded or decompressed imports it, which takes longer than importing torch. Its StreamingDataset is not used. It
gives random access by shared memory, which costs more than it gives: two jobs that start together on one node take the
same names; a killed job leaves names behind, and the clean-up that removes them harms live jobs; after a failed
download the other ranks wait for ever; the next start trusts a shard that is half downloaded; and `cache_limit` may
delete a local source.

What must stay true: files are the only state that processes share. A shard is downloaded to a temporary folder,
checked, and renamed into the cache, under a lock that the kernel frees when its holder dies. So ranks need no barrier,
any number of runs may share a cache, and a shard that is evicted while it is open can still be read. A local source is
never written.
"""

import errno
import hashlib
import itertools
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash

from megakexue.buckets import download, is_remote
from megakexue.config import DataConfig, SourceConfig, UserError, require
from megakexue.files import lock, temporary_folder, writing
from megakexue.text.manifest import Manifest, check_tokenizer, read_manifest, rows_divided

log = logging.getLogger("megakexue")

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """What index.json says of one shard."""

    info: dict[str, Any]
    """All of it, in streaming's words."""
    name: str
    samples: int
    n_bytes: int
    hashes: dict[str, str]
    n_compressed: int
    """Bytes of the compressed file; 0: it is not compressed."""
    columns: dict[str, str]
    """The encoding of each."""

    def decode(self, row: bytes) -> npt.NDArray[np.unsignedinteger]:
        """Return the tokens of a row, uint16 or uint32."""
        return np.frombuffer(row, self.columns["tokens"].split(":")[1])


class Source:
    """One split of one prepared folder: its manifest, its index and its shards.

    A remote folder is read through `cache`, shard by shard, and so is a local one with compressed shards. Another local
    one is read in place. `file://` makes a mounted folder remote, for a cache on a faster disk.
    """

    def __init__(self, source: SourceConfig, split: str, config: DataConfig, cache: Path) -> None:
        self.path, self.split, self.cache, self.config = source.path, split, cache, config
        self.remote = source.path.removeprefix("file://").rstrip("/")
        # from a local folder nothing is downloaded, so there is nothing to try again
        self.n_attempts = 1 + config.download_retries if source.is_remote else 1
        limit = config.cache_limit
        try:
            self.cache_limit = None if limit is None else bytes_of(limit)
        except ValueError as error:
            raise UserError(f"data.cache_limit={limit!r} is not a number of bytes such as 200gb") from error
        require(source.is_remote or Path(self.remote).is_dir(), f"data.sources: no such folder: {source.path}")

        self.manifest = self._read_manifest()
        self.n_parts = rows_divided(self.manifest, source.path, config.seq_len)
        """Rows of this run that a prepared row makes."""
        n_prepared = self.manifest.n_rows(split)
        self.shards = self._read_index() if n_prepared else []
        rows = [shard.samples for shard in self.shards]
        is_sound = all(isinstance(n, int) and 0 <= n <= n_prepared for n in rows)
        require(
            is_sound, f"data source {self.path}: {split}/index.json is damaged: a shard's rows are no number of rows"
        )
        found = sum(rows)
        require(
            found == n_prepared,
            f"data source {self.path}: {split}/index.json has {found} rows but manifest.json says {n_prepared}: "
            "the copy is incomplete; copy it again or prepare the data again",
        )
        self.shard_rows = np.array(rows, dtype=np.int64) * self.n_parts
        self.n_rows = n_prepared * self.n_parts
        self.is_cached = source.is_remote or any(shard.n_compressed for shard in self.shards)
        name = f"{Path(self.remote).name}-{hashlib.sha256(self.remote.encode()).hexdigest()[:8]}"
        if self.is_cached:
            import streaming.base.stream  # noqa: F401  # a thread that reads ahead would have to wait for it
        self.folder = (cache / "shards" / name if self.is_cached else Path(self.remote)) / split
        self.verified: set[int] = set()

    def name(self, index: int) -> str:
        """Name a shard for messages."""
        return f"{self.path}/{self.split}/{self.shards[index].name}"

    def _attempt(self, what: str, action: Callable[[], T]) -> T:
        """Call `action` until it succeeds, at most `n_attempts` times, waiting longer each time."""
        for attempt in itertools.count(1):
            try:
                return action()
            except Exception as error:  # each downloader raises its own kinds
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                if attempt == self.n_attempts:
                    if isinstance(error, UserError):
                        raise  # the cache, not the storage
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

    def _read_manifest(self) -> Manifest:
        with temporary_folder() as folder:
            target = folder / "manifest.json"
            self._attempt("manifest.json", lambda: self._copy("manifest.json", target))
            manifest = read_manifest(self.path, target)
        check_tokenizer(manifest, self.path, self.config.tokenizer)
        return manifest

    def _read_index(self) -> list[Shard]:
        """Read the shard index anew at each start, so that a cache never outlives the data it was filled from."""

        def read() -> list[Shard]:
            with temporary_folder() as folder:
                self._copy(f"{self.split}/index.json", folder / "index.json")
                return read_index(folder / "index.json")

        shards = self._attempt(f"{self.split}/index.json", read)
        is_mds = all(shard.info["format"] == "mds" for shard in shards)
        require(is_mds, f"data source {self.path}: {self.split} is not in MDS format: prepare it again")
        wanted = [f"ndarray:{dtype}:{self.manifest.seq_len + 1}" for dtype in ("uint16", "uint32")]
        for shard in shards:
            require(
                list(shard.columns) == ["tokens"] and shard.columns["tokens"] in wanted,
                f"data source {self.path}: the rows of {self.split}/{shard.name} are {shard.columns}, but "
                f"seq_len={self.manifest.seq_len} of manifest.json needs {{'tokens': '{wanted[0]}'}} or uint32: "
                "prepare the data again",
            )
        return shards

    def _copy(self, name: str, target: Path) -> None:
        """Copy a small file of the source to a path."""
        if not is_remote(self.remote):
            shutil.copyfile(Path(self.remote, name), target)
            return
        download(f"{self.remote}/{name}", target, self.config.download_timeout_s)

    def fetch(self, index: int) -> Path:
        """Have a shard on disk and return its path. Raises UserError when the attempts are used up."""
        basename = self.shards[index].name
        path = self.folder / basename
        if not self.is_cached or is_touched(path):
            return path
        with self._locked(path):
            if not is_touched(path):
                self._attempt(f"{self.split}/{basename}", lambda: self._download(index, path))
        return path

    def _locked(self, path: Path) -> AbstractContextManager[None]:
        """Hold the lock of a shard of the cache: for downloading it, and for discarding a damaged copy."""
        return locked(self.cache, self._name(path))

    def _name(self, path: Path) -> str:
        return f"{self.folder.parent.name}-{self.split}-{path.name}".replace("/", "-")

    def _download(self, index: int, path: Path) -> None:
        with writing(f"data.cache={self.cache}", self.cache):
            self._download_into_cache(index, path)

    def _download_into_cache(self, index: int, path: Path) -> None:
        from streaming.base.format import reader_from_json
        from streaming.base.stream import Stream

        shard = self.shards[index]
        if self.cache_limit is not None:
            evict(self.cache, self.cache_limit - shard.n_bytes - shard.n_compressed)
        # the same name each time, under the lock: what a killed run left behind is cleared here
        folder = self.cache / "tmp" / f"{socket.gethostname()}-{self._name(path)}"
        shutil.rmtree(folder, ignore_errors=True)
        stream = Stream(
            remote=self.remote, local=str(folder), split=self.split, keep_zip=False,
            download_retry=1,  # this counts attempts; `_attempt` repeats the check of the hash as well
            download_timeout=self.config.download_timeout_s,
        )  # fmt: skip
        stream.prepare_shard(reader_from_json(str(folder), self.split, shard.info))
        downloaded = folder / self.split / shard.name
        with open(downloaded, "rb") as file:
            if not is_intact(file.fileno(), shard):
                raise OSError("damaged: its size or hash is not what index.json says")
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(downloaded, path)
        shutil.rmtree(folder, ignore_errors=True)

    def _discard(self, path: Path, damaged: int) -> None:
        """Delete the damaged copy that is open as `damaged`, but not a good one that another process put there."""
        with self._locked(path), suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(damaged)):
                log.warning("%s: this copy in the cache is damaged; it is downloaded again", path)
                path.unlink()

    def open(self, index: int) -> int:
        """Return a file descriptor of a shard. This process compares its bytes with the index the first time.

        Raises:
            UserError: it cannot be read or downloaded, or it is damaged, a fresh download included.
        """
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


def read_index(path: Path) -> list[Shard]:
    """Read an index.json, of which anything may be wrong: the errors are of any kind."""
    index, shards = json.loads(path.read_bytes()), []
    for info in index["shards"]:
        if not info["version"] == index["version"] == 2:
            raise ValueError("its version is not 2")
        raw, compressed = info["raw_data"], info["zip_data"]
        if Path(raw["basename"]).name != raw["basename"]:
            raise ValueError(f"{raw['basename']!r} is no file of its folder")
        for name in raw["hashes"]:
            if name not in xxhash.algorithms_available and name not in hashlib.algorithms_available:
                raise ValueError(f"the hash {name} is not known")
        columns = dict(zip(info["column_names"], info["column_encodings"])) if info["format"] == "mds" else {}
        n_compressed = compressed["bytes"] if compressed else 0
        shards.append(Shard(info, raw["basename"], info["samples"], raw["bytes"], raw["hashes"], n_compressed, columns))
    return shards


def bytes_of(text: str) -> int:
    """Return how many bytes are meant by a text such as 200gb. Raises ValueError."""
    from streaming.base.util import bytes_to_int

    return bytes_to_int(text)


def is_touched(path: Path) -> bool:
    """Mark a file as just used, for `evict`; False when there is none."""
    try:
        os.utime(path)
    except OSError:
        return path.exists()  # in a cache that others may only read, it is used without a mark
    return True


def is_intact(file: int, shard: Shard) -> bool:
    """Compare an open shard's size, and its hash if the index has one, with the index."""
    if os.fstat(file).st_size != shard.n_bytes:
        return False
    for name, expected in shard.hashes.items():
        make = getattr(xxhash, name) if name in xxhash.algorithms_available else getattr(hashlib, name)
        return make(os.pread(file, shard.n_bytes, 0)).hexdigest() == expected
    return True


@contextmanager
def locked(cache: Path, name: str) -> Iterator[None]:
    """Hold a lock of the cache among the processes and threads of this node. The kernel frees it when the holder dies.

    Raises:
        UserError: the cache cannot be written, or its file system has no locks.
    """
    with ExitStack() as stack:
        with writing(f"data.cache={cache}", cache):
            (cache / "locks").mkdir(parents=True, exist_ok=True)
            has_lock = lock(stack.enter_context(open(cache / "locks" / name, "w")), wait=True)
        require(
            has_lock,
            f"data.cache={cache} is on a file system without locks (flock), by which the ranks share downloads: set "
            "data.cache to a folder on a local disk",
        )
        yield


def evict(cache: Path, limit: int) -> None:
    """Delete the shards that were used longest ago until the cache is within `limit` bytes.

    Downloads under way do not count, so the cache may pass its limit by one shard for each rank of the node.
    """
    with locked(cache, "evict"):
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
