"""Write rows as MDS shards, the format that `streaming` reads, without importing streaming.

That import takes five seconds and 700 MB. What must stay true: the files are those of `streaming.MDSWriter`, byte for
byte; a test compares them.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megakexue.config import require
from megakexue.files import seal

SHARD_BYTES = 1 << 26


class ShardWriter:
    """Write rows as `streaming.MDSWriter(hashes=["xxh64"])` does: samples with one column, `tokens`, of fixed shape.

    Raises:
        UserError: a row does not fit a shard.
    """

    def __init__(self, folder: Path, row_len: int, dtype: np.dtype) -> None:
        folder.mkdir()
        self.folder = folder
        self.config = {
            "column_names": ["tokens"],
            "column_encodings": [f"ndarray:{dtype.name}:{row_len}"], "column_sizes": [row_len * dtype.itemsize],
            "format": "mds", "version": 2, "compression": None, "hashes": ["xxh64"], "size_limit": SHARD_BYTES,
        }  # fmt: skip
        self.head = json.dumps(self.config, sort_keys=True).encode()
        rows = (SHARD_BYTES - 8 - len(self.head)) // (row_len * dtype.itemsize + 4)
        require(rows > 0, f"--seq-len {row_len - 1}: a row does not fit a shard of {SHARD_BYTES >> 20} MiB")
        self.rows = np.empty((rows, row_len), dtype)
        self.n = 0
        self.shards: list[dict[str, Any]] = []

    def write(self, rows: np.ndarray) -> None:
        """Add rows, (rows, row_len), and write the shards that are full."""
        while len(rows):
            taken = rows[: len(self.rows) - self.n]
            self.rows[self.n : self.n + len(taken)] = taken
            self.n += len(taken)
            rows = rows[len(taken) :]
            if self.n == len(self.rows):
                self._flush()

    def _flush(self) -> None:
        rows = self.rows[: self.n]
        offsets = 8 + 4 * self.n + len(self.head) + np.arange(self.n + 1) * (rows.itemsize * rows.shape[1])
        parts = [np.uint32(self.n).tobytes(), offsets.astype(np.uint32).tobytes(), self.head, rows.data]
        name = f"shard.{len(self.shards):05}.mds"
        digest = xxhash.xxh64()
        with open(self.folder / name, "wb") as file:
            for part in parts:
                digest.update(part)
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        info = {"basename": name, "bytes": int(offsets[-1]), "hashes": {"xxh64": digest.hexdigest()}}
        self.shards.append({"samples": self.n, "raw_data": info, "zip_data": None, **self.config})
        self.n = 0

    def finish(self) -> str:
        """Write the last shard and the index, and return the index's sha256."""
        if self.n:
            self._flush()
        index = self.folder / "index.json"
        index.write_text(json.dumps({"version": 2, "shards": self.shards}, sort_keys=True), encoding="utf-8")
        return seal(index)["sha256"]
