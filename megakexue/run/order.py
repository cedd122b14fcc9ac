"""The order of rows: sample k of epoch e is a pure function of (rows of each shard, weights, shuffle_seed, e).

1. A source is an endless sequence of passes over its rows. Each pass visits the shards in a new random order.
2. An epoch has as many rows as all sources together. A source with share n gives the next n rows of its sequence, from
   where the last epoch stopped. So any number of samples uses each row of a source floor or ceil of the average number
   of times. Without weights n is the size of the source, and each epoch holds each row exactly once.
3. An epoch is cut into windows of 2^29 tokens (1 GB of uint16). Each window takes the same share of each source, to
   within a row, and is shuffled as a whole. So shards are read nearly in sequence, a few of them at a time, and finding
   sample k takes the computation of one window, not a permutation of the epoch.
4. Where the mixture changes, an order by new shares begins. It goes on in the passes of each source; the rows of the
   window that the change has cut, and of which the sample has not come, are the first that it reads. So each pass still
   gives each row once, and the rows before a change do not depend on when it comes or on what follows.

What must stay true: the order is the same on every machine and with every version of numpy, since checkpoints store
positions in it. Random numbers are therefore raw words of Philox, a stream that numpy guarantees.
"""

import math
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megakexue.core.batch import Position

Ints = npt.NDArray[np.int64]

WINDOW_TOKENS = 2**29
"""Tokens that are shuffled together. Part of the order: changing it changes every run."""


def shares(sizes: list[int], weights: Sequence[float | None]) -> list[int]:
    """Return how many rows each source gives to an epoch of sum(sizes) rows: by weight; without weights, all it has."""
    given = [weight for weight in weights if weight is not None]
    if len(given) < len(sizes):
        return sizes
    exact = [sum(sizes) * weight / sum(given) for weight in given]
    floors = [math.floor(share) for share in exact]
    largest_remainders = sorted(range(len(sizes)), key=lambda i: floors[i] - exact[i])
    for i in [i for i in largest_remainders if given[i]][: sum(sizes) - sum(floors)]:
        floors[i] += 1
    return floors


def permutation(n: int, *key: int) -> Ints:
    """Return a random order of 0 ... n - 1 that depends on `key` alone."""
    words = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(words, kind="stable")


class Rest(NamedTuple):
    """What a change of the mixture has left of each source."""

    rows: list[Ints]
    """Those of windows that were cut, in the order of the passes."""
    starts: list[int]
    """How many rows of the passes come before those that are in no such window."""


class Order:
    """The rows of each epoch in order, for one mixture. Rows of all sources are numbered from 0, shard by shard."""

    def __init__(
        self, shards: list[Ints], chosen: list[int], *, seed: int, shuffle: bool, window_rows: int,
        begin: int = 0, rest: Rest | None = None,
    ) -> None:  # fmt: skip
        """Take the number of rows of each shard of each source (`shards`), and of each source in an epoch (`chosen`).

        Without `shuffle` a source is read in the order on disk, and the sources alternate evenly in each window.

        Args:
            begin: samples of other mixtures before this one.
            rest: what they have left.
        """
        self.shards, self.chosen, self.seed, self.shuffle = shards, chosen, seed, shuffle
        self.begin, self.rest = begin, rest or Rest([np.empty(0, np.int64)] * len(shards), [0] * len(shards))
        self.sizes = [int(rows.sum()) for rows in shards]
        self.n_rows = sum(chosen)
        self.n_windows = math.ceil(self.n_rows / window_rows)
        edge = np.arange(self.n_windows + 1)
        self.window_starts = sum((edge * n // self.n_windows for n in chosen), np.zeros_like(edge))
        self.window = lru_cache(maxsize=2)(self._window)
        """`window(epoch, w)`: the rows of window w of an epoch, in order. The last two are kept."""

    def _window(self, epoch: int, w: int) -> Ints:
        parts = self._parts(epoch, w)
        return np.concatenate(parts)[self._mixed(parts, epoch, w)]

    def _parts(self, epoch: int, w: int) -> list[Ints]:
        """Return the rows of each source in a window, as they follow one another in it."""
        return [
            self._source_rows(source, *(epoch * n + edge * n // self.n_windows for edge in (w, w + 1)))
            for source, n in enumerate(self.chosen)
        ]

    def _mixed(self, parts: list[Ints], epoch: int, w: int) -> Ints:
        """Return in which order a window takes the rows of its parts, counted through all parts."""
        if self.shuffle:
            place = (epoch, w, self.begin) if self.begin else (epoch, w)
            return permutation(sum(map(len, parts)), self.seed, 0, *place)
        # each source spread evenly; with one source this is the order on disk
        return np.argsort(np.concatenate([(np.arange(len(p)) + 0.5) / len(p) for p in parts]), kind="stable")

    def rest_after(self, n: int) -> Rest:
        """Return what the first `n` samples leave to another mixture: nothing is lost, and nothing comes again."""
        epoch, sample = divmod(n, self.n_rows)
        w = self.window_of(sample)
        parts = self._parts(epoch, w)
        left = np.sort(self._mixed(parts, epoch, w)[sample - int(self.window_starts[w]) :])
        rows, starts, end = [], [], 0
        for source, (part, share) in enumerate(zip(parts, self.chosen)):
            of_part = left[(left >= end) & (left < end + len(part))] - end
            end += len(part)
            taken = epoch * share + (w + 1) * share // self.n_windows
            rows.append(np.concatenate([part[of_part], self.rest.rows[source][taken:]]))
            starts.append(self.rest.starts[source] + max(0, taken - len(self.rest.rows[source])))
        return Rest(rows, starts)

    def _source_rows(self, source: int, start: int, stop: int) -> Ints:
        """Return the next rows of one source, number start ... stop - 1 from `begin` on."""
        first = self.rest.rows[source]
        start, stop, first = start - len(first), stop - len(first), first[start:stop]
        offset = self.rest.starts[source]
        return np.concatenate([first, self._passes(source, offset + max(0, start), offset + max(0, stop))])

    def _passes(self, source: int, start: int, stop: int) -> Ints:
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

    def window_of(self, sample: int) -> int:
        """Return the window that sample number `sample` of any epoch is in."""
        return int(np.searchsorted(self.window_starts, sample, side="right")) - 1

    def row(self, position: Position) -> int:
        """Return the number of the row at a position."""
        w = self.window_of(position.sample)
        return int(self.window(position.epoch, w)[position.sample - int(self.window_starts[w])])


class Window(NamedTuple):
    """Samples that were shuffled together, up to the next change of the mixture."""

    begin: int
    """Number of the first, counted through all epochs."""
    rows: Ints


class Schedule:
    """The order of a run: that of its first mixture, and those of the mixtures that follow."""

    def __init__(
        self, shards: list[Ints], mixtures: list[tuple[int, list[int]]], *, seed: int, shuffle: bool, window_rows: int
    ) -> None:
        """Take the rows of each shard of each source, and the mixtures.

        Args:
            mixtures: the number of its first sample, the first of all 0, and the rows of each source in an epoch.
        """
        self.mixtures = mixtures
        self._begins = [begin for begin, _ in mixtures]
        self._order = partial(Order, shards, seed=seed, shuffle=shuffle, window_rows=window_rows)
        self._orders = [self._order(mixtures[0][1])]
        self._lock = threading.Lock()
        self.n_rows = self._orders[0].n_rows
        """Rows in an epoch: those of all sources together, in any mixture."""

    @property
    def first(self) -> Order:
        return self._orders[0]

    def number(self, position: Position) -> int:
        """Return how many samples come before a position."""
        return position.epoch * self.n_rows + position.sample

    def position(self, number: int) -> Position:
        epoch, sample = divmod(number, self.n_rows)
        return Position(epoch=epoch, sample=sample)

    def advance(self, position: Position, n: int) -> Position:
        """Return the position `n` samples after `position`."""
        return self.position(self.number(position) + n)

    def row(self, position: Position) -> int:
        """Return the number of the row at a position."""
        order, own = self._at(self.number(position))
        return order.row(own)

    def window_at(self, position: Position) -> Window:
        """Return the window that a position is in."""
        number = self.number(position)
        order, own = self._at(number)
        w = order.window_of(own.sample)
        begin = number - own.sample + int(order.window_starts[w])
        i = bisect_right(self._begins, number)
        end = self._begins[i] if i < len(self._begins) else None
        return Window(begin, order.window(own.epoch, w)[: None if end is None else end - begin])

    def begun(self, position: Position) -> list[tuple[int, list[int]]]:
        """Return the mixtures that gave a sample before `position`, the first of all in any case."""
        return self.mixtures[: max(1, bisect_left(self._begins, self.number(position)))]

    def _at(self, number: int) -> tuple[Order, Position]:
        """Return the order of a sample, and the position that it has there."""
        i = bisect_right(self._begins, number) - 1
        if i >= len(self._orders):
            self._reach(i)
        return self._orders[i], self.position(number - self._begins[i])

    def _reach(self, i: int) -> None:
        """Make the orders up to number i: each needs a window of the one before."""
        with self._lock:
            while len(self._orders) <= i:
                before, (begin, chosen) = self._orders[-1], self.mixtures[len(self._orders)]
                rest = before.rest_after(begin - before.begin)
                self._orders.append(self._order(chosen, begin=begin, rest=rest))
