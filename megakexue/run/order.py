"""The order of rows: sample k of epoch e is a pure function of (rows of each shard, weights, shuffle_seed, e).

1. A source is an endless sequence of passes over its rows. Each pass visits the shards in a new random order.
2. An epoch has as many rows as all sources together. A source with share n gives the next n rows of its sequence, from
   where the last epoch stopped. So any number of samples uses each row of a source floor or ceil of the average number
   of times. Without weights n is the size of the source, and each epoch holds each row exactly once.
3. An epoch is cut into windows of 2^29 tokens (1 GB of uint16). Each window takes the same share of each source, to
   within a row, and is shuffled as a whole. So shards are read nearly in sequence, a few of them at a time, and finding
   sample k takes the computation of one window, not a permutation of the epoch.

What must stay true: the order is the same on every machine and with every version of numpy, since checkpoints store
positions in it. Random numbers are therefore raw words of Philox, a stream that numpy guarantees.
"""

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from megakexue.core.batch import Position

Ints = npt.NDArray[np.int64]

WINDOW_TOKENS = 2**29
"""Tokens that are shuffled together. Part of the order: changing it changes every run."""


def shares(sizes: list[int], weights: list[float | None]) -> list[int]:
    """Return how many rows each source gives to an epoch of sum(sizes) rows: by weight; without weights, all it has."""
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
    """Return a random order of 0 ... n - 1 that depends on `key` alone."""
    words = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(words, kind="stable")


class Order:
    """The rows of each epoch in order, by the rule above. Rows of all sources are numbered from 0, shard by shard."""

    def __init__(self, shards: list[Ints], chosen: list[int], *, seed: int, shuffle: bool, window_rows: int) -> None:
        """Take the number of rows of each shard of each source (`shards`), and of each source in an epoch (`chosen`).

        Without `shuffle` a source is read in the order on disk, and the sources alternate evenly in each window.
        """
        self.shards, self.chosen, self.seed, self.shuffle = shards, chosen, seed, shuffle
        self.sizes = [int(rows.sum()) for rows in shards]
        self.n_rows = sum(chosen)
        self.n_windows = math.ceil(self.n_rows / window_rows)
        edge = np.arange(self.n_windows + 1)
        self.window_starts = sum((edge * n // self.n_windows for n in chosen), np.zeros_like(edge))
        self.window = lru_cache(maxsize=2)(self._window)
        """`window(epoch, w)`: the rows of window w of an epoch, in order. The last two are kept."""

    def _window(self, epoch: int, w: int) -> Ints:
        parts = []
        for source, n in enumerate(self.chosen):
            start, stop = (epoch * n + edge * n // self.n_windows for edge in (w, w + 1))
            parts.append(self._source_rows(source, start, stop))
        rows = np.concatenate(parts)
        if self.shuffle:
            return rows[permutation(len(rows), self.seed, 0, epoch, w)]
        # each source spread evenly; with one source this is the order on disk
        return rows[np.argsort(np.concatenate([(np.arange(len(p)) + 0.5) / len(p) for p in parts]), kind="stable")]

    def _source_rows(self, source: int, start: int, stop: int) -> Ints:
        """Return rows start ... stop - 1 of the endless sequence of passes over one source."""
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

    def advance(self, position: Position, n: int) -> Position:
        """Return the position `n` samples after `position`."""
        epochs, sample = divmod(position.sample + n, self.n_rows)
        return Position(epoch=position.epoch + epochs, sample=sample)

    def window_of(self, sample: int) -> int:
        """Return the window that sample number `sample` of any epoch is in."""
        return int(np.searchsorted(self.window_starts, sample, side="right")) - 1

    def row(self, position: Position) -> int:
        """Return the number of the row at a position."""
        w = self.window_of(position.sample)
        return int(self.window(position.epoch, w)[position.sample - int(self.window_starts[w])])
