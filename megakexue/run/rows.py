"""The rows of all sources, read by number: the shards of all sources in one line, and the few of them that are open.

A prepared row makes one row or several of an equal length, whose last tokens are the first ones of the next: each token
is predicted once, whatever the length.

What must stay true: a row of the order is the same row here, since both number the rows of all sources shard by shard;
at most MAX_OPEN_SHARDS files are open; one thread reads at a time, and the others wait for it.
"""

import os
import threading
import time
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from megakexue.run.order import Ints
from megakexue.run.source import Source

MAX_OPEN_SHARDS = 256


class Rows:
    """Random access to the rows of `sources`. A shard is opened, and a remote one downloaded, with its first row."""

    def __init__(self, sources: list[Source]) -> None:
        self._shards = [(source, index) for source in sources for index in range(len(source.shards))]
        self._ends = np.cumsum(np.concatenate([source.shard_rows for source in sources]))
        self._source_ends = np.cumsum([source.n_rows for source in sources])
        self._open: OrderedDict[int, tuple[int, Ints]] = OrderedDict()
        """By shard, the one used last at the end: its file descriptor and the offsets of its rows."""
        self._lock = threading.Lock()
        self.activity, self.last_activity = "the start", time.monotonic()
        """The shard that was read last or is being read, and when that began."""

    def locate(self, row: int, part: int = 0, n_parts: int = 1) -> str:
        """Name the source, the shard, the row in the shard, and its part where it makes several.

        Args:
            part, n_parts: which of several parts of the row is meant.
        """
        _, source, index, row = self._find(row)
        row, own = divmod(row, source.n_parts)
        is_part = source.n_parts * n_parts > 1
        return f"{source.name(index)} row {row}" + (f" part {own * n_parts + part}" if is_part else "")

    def source_of(self, row: int) -> int:
        """Return the number of the source that a row is of."""
        return int(np.searchsorted(self._source_ends, row, side="right"))

    def shards_of(self, rows: Ints) -> list[int]:
        """Return the shards that hold these rows, each once, in order; `fetch` takes them."""
        return np.unique(np.searchsorted(self._ends, rows, side="right")).tolist()

    def fetch(self, shard: int) -> None:
        """Have a shard on disk. Raises UserError when it cannot be downloaded."""
        source, index = self._shards[shard]
        source.fetch(index)

    def read(self, row: int) -> npt.NDArray[np.unsignedinteger]:
        """Return the seq_len + 1 tokens of a row. Raises UserError: the shard is damaged or cannot be read."""
        shard, source, index, row = self._find(row)
        with self._lock:
            self.activity, self.last_activity = source.name(index), time.monotonic()
            if shard not in self._open:
                self._open_shard(shard)
            self._open.move_to_end(shard)
            file, offsets = self._open[shard]
            row, part = divmod(row, source.n_parts)
            begin, end = int(offsets[row]), int(offsets[row + 1])
            tokens = source.shards[index].decode(os.pread(file, end - begin, begin))
            length = (len(tokens) - 1) // source.n_parts
            return tokens[part * length : (part + 1) * length + 1]

    def close(self) -> None:
        """Close the files. A later `read` opens them again."""
        if self._lock.acquire(timeout=1.0):  # a read that is stuck keeps its files
            while self._open:
                os.close(self._open.popitem()[1][0])
            self._lock.release()

    def _find(self, row: int) -> tuple[int, Source, int, int]:
        """Return the shard, its source, its index there, and the row among those that the shard makes."""
        shard = int(np.searchsorted(self._ends, row, side="right"))
        source, index = self._shards[shard]
        return shard, source, index, row - int(self._ends[shard]) + int(source.shard_rows[index])

    def _open_shard(self, shard: int) -> None:
        source, index = self._shards[shard]
        file = source.open(index)
        # an MDS shard begins with uint32: n, then n + 1 offsets
        n_bytes = 4 * (source.shards[index].samples + 1)
        offsets = np.frombuffer(os.pread(file, n_bytes, 4), np.uint32).astype(np.int64)
        # a shard that the cache has evicted keeps its place on the disk for as long as it is open
        for evicted in [k for k, (f, _) in self._open.items() if os.fstat(f).st_nlink == 0]:
            os.close(self._open.pop(evicted)[0])
        self._open[shard] = file, offsets
        if len(self._open) > MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1][0])
