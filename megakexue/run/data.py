"""Batches: the micro-batches of each optimizer step. They depend on nothing but the data and the seed.

A step is the next `global_batch_size` samples of the order (megakexue/run/order.py). With n data ranks and
micro-batches of mb rows, micro-batch j of data rank r takes samples [(j n + r) mb, (j n + r + 1) mb) of the step. The
ranks of one sequence group read the same rows.

A sample is a row of `data.seq_len` tokens, also in a stage with shorter rows: its micro-batches hold the same samples,
each cut into rows that follow one another. So lengths decide neither the order nor the place in it. Other weights begin
with a step, which is a sample of the order: that many steps of samples after the current one.

What must stay true: neither the number of ranks, nor the micro-batch size, nor a stop and resume changes which rows a
step holds.

Two threads work for a rank. One reads `n_prefetch` micro-batches ahead. The other, for cached sources, downloads the
shards of the next window while this one is read; the ranks of a node divide them. Each node downloads all shards, since
the rows of a step come from all over a window. That is a few MB/s: to train on a row takes much longer than to load it.
"""

import hashlib
import itertools
import json
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from megakexue.config import BOUND, DataConfig, require
from megakexue.core.batch import Batch, Position, make_batch
from megakexue.dist import Ranks
from megakexue.run.order import WINDOW_TOKENS, Schedule, shares
from megakexue.run.rows import Rows
from megakexue.run.source import Source


class Interrupted(Exception):
    """Waiting for data was given up, because `is_interrupted` of `Batches` said so."""


class Reader:
    """A thread that takes micro-batches from an iterator, at most `n_ahead` of them before they are wanted."""

    def __init__(self, batches: Iterator[Batch], n_ahead: int) -> None:
        self.stopped = threading.Event()
        self._queue: queue.Queue[Batch | Exception] = queue.Queue(maxsize=n_ahead)
        # a daemon: a download that hangs must not keep a failed process alive
        self._thread = threading.Thread(target=self._read_ahead, args=(batches,), daemon=True)
        self._thread.start()

    def take(self, timeout_s: float) -> Batch:
        """Return the next micro-batch. Raises queue.Empty after `timeout_s`, and the error that ended the thread."""
        item = self._queue.get(timeout=timeout_s)
        if isinstance(item, Exception):
            self._queue.put(item)  # a second call fails in the same way
            raise item
        return item

    def stop(self) -> None:
        """End the thread, unless it is in a read that takes longer than a second."""
        self.stopped.set()
        with suppress(queue.Empty):
            while True:
                self._queue.get_nowait()  # makes room for a thread that waits for it
        self._thread.join(timeout=1.0)

    def _read_ahead(self, batches: Iterator[Batch]) -> None:
        try:
            for batch in batches:
                self._put(batch)
                if self.stopped.is_set():
                    return
        except Exception as error:
            self._put(error)  # the last item

    def _put(self, item: Batch | Exception) -> None:
        while not self.stopped.is_set():
            with suppress(queue.Full):
                self._queue.put(item, timeout=0.2)
                return


class Batches:
    """The micro-batches of one rank, step by step."""

    def __init__(
        self, config: DataConfig, *, split: str = "train", global_batch_size: int, micro_batch_size: int,
        ranks: Ranks, cache: Path, is_interrupted: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        """Read the manifests and the indexes of the shards.

        Args:
            split: "valid" ignores weights and shuffle: an epoch is the validation rows of all sources, each once, each
                source spread evenly.
            cache: folder for the shards of remote sources.
            is_interrupted: asked about once a second while waiting for data; true ends the wait with `Interrupted`.

        Raises:
            UserError: a source is missing, unreachable, damaged or does not fit `config`; the split has no rows; the
                cache limit is too small.
        """
        self._stride = micro_batch_size * ranks.data_size
        """Samples of the micro-batches that all ranks compute at once."""
        assert global_batch_size % self._stride == 0
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.ranks, self.n_prefetch, self.seq_len = ranks, config.n_prefetch, config.seq_len
        self._seq_len_at = config.seq_len_at
        self.is_interrupted = is_interrupted
        # each attempt has a timeout in the downloader; this one is for what that misses, and for a stuck file system
        self.timeout_s = 2 * (1 + config.download_retries) * config.download_timeout_s
        is_train = split == "train"

        opened = [Source(source, split, config, cache) for source in config.sources]
        for source in opened:
            require(
                source.n_rows > 0 or not is_train,
                f"data source {source.path} has no rows in its train split: prepare it again",
            )
        self.sources = [source for source in opened if source.n_rows > 0]
        require(
            len(self.sources) > 0,
            f"none of data.sources has rows in its {split} split: give tools/prepare_data.py a share for validation, "
            "or turn validation off with evaluate.every_steps=null",
        )
        manifests = [source.manifest for source in opened]
        special = {(manifest.bos_id, manifest.eos_id, manifest.pad_id) for manifest in manifests}
        require(len(special) == 1, f"data.sources: (bos_id, eos_id, pad_id) differ: {sorted(special)}: prepare again")
        self.bos_id, self.eos_id, self.pad_id = special.pop()
        self.vocab_size = max(manifest.vocab_size for manifest in manifests)

        sizes = [source.n_rows for source in self.sources]
        mixtures = [(m.until_step, shares(sizes, m.weights or [None] * len(sizes))) for m in config.mixtures]
        self._mixtures = mixtures if is_train else [(BOUND, sizes)]
        """The last step of each mixture, and the rows of each source in an epoch of it."""
        self._seed, self._shuffle = config.shuffle_seed, config.shuffle and is_train
        self._window_rows = max(1, WINDOW_TOKENS // config.seq_len)
        self.order = self._schedule(Position(), 0)
        self.n_rows = self.order.n_rows
        """Rows in an epoch."""
        check_cache_limit(config, self.sources, self.order)
        self.rows = Rows(self.sources)
        self.position, self.step = Position(), 0
        """Where the next step begins, and the step before it; put them into a checkpoint and give them to `seek`."""
        self.wait_s = 0.0
        """Seconds that the last `next_step` waited for data."""
        self._reader: Reader | None = None

    def _schedule(self, position: Position, step: int) -> Schedule:
        """Return the order in which `step` steps are done at `position`."""
        n_rows = sum(source.n_rows for source in self.sources)
        number, mixtures = position.epoch * n_rows + position.sample, [(0, self._mixtures[0][1])]
        for (last, _), (_, chosen) in itertools.pairwise(self._mixtures):
            begin = number + (last - step) * self.global_batch_size
            mixtures = [*mixtures, (begin, chosen)] if begin > 0 else [(0, chosen)]
        shards = [source.shard_rows for source in self.sources]
        return Schedule(shards, mixtures, seed=self._seed, shuffle=self._shuffle, window_rows=self._window_rows)

    @property
    def fingerprint(self) -> str:
        """A hash of all that the rows before `position` depend on: it means the same rows while this stays the same."""
        return self.fingerprint_at(self.position, self.step)

    def fingerprint_at(self, position: Position, step: int) -> str:
        """The fingerprint after `step` steps, at `position`."""
        schedule = self._schedule(position, step)
        order, later = schedule.first, schedule.begun(position)[1:]
        shards = [rows.tolist() for rows in order.shards]
        contents = [source.manifest.splits[source.split].get("index_sha256") for source in self.sources]
        values = [contents, shards, order.chosen, order.seed, order.shuffle, order.n_windows, *later]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]

    @property
    def warnings(self) -> list[str]:
        """A line for each source that gives no row, in any epoch of any mixture."""
        return [
            f"data source {source.path} gives none of the {self.n_rows} rows of an epoch: raise its weight in "
            "data.sources, or leave it out"
            for source, *of_mixtures in zip(self.sources, *(chosen for _, chosen in self._mixtures))
            if not any(of_mixtures)
        ]

    def locate(self, position: Position) -> str:
        """Name the source, shard and row of a sample."""
        return self.rows.locate(self.order.row(position))

    def names(self, batch: Batch) -> list[str]:
        """Name the source, shard and row of each row of a micro-batch, for the log of a bad one."""
        n = self.seq_len // batch.positions.shape[1]
        return [self.rows.locate(self.order.row(sample), i % n, n) for i, sample in enumerate(batch.samples)]

    def seek(self, position: Position, step: int = 0) -> None:
        """Continue from `position`, after `step` steps. Raises UserError when the data has no such sample."""
        require(
            position.epoch >= 0 and 0 <= position.sample < self.n_rows,
            f"data.sources: {position} is outside an epoch of {self.n_rows} rows: the data is not what it was; "
            "use the sources that the checkpoint was trained on",
        )
        self.close()
        self.position, self.step, self.order = position, step, self._schedule(position, step)

    def next_step(self) -> list[Batch]:
        """Return this rank's micro-batches of the next optimizer step.

        Raises:
            UserError: a shard is damaged or cannot be downloaded, or reading makes no progress.
            Interrupted: `is_interrupted` came true while waiting; the position is as it was.
        """
        if self._reader is None:
            self._reader = self._start(self._samples_from(self.position, self.step))
            if any(source.is_cached for source in self.sources):
                arguments = self.position, self._reader.stopped
                threading.Thread(target=self._fetch_ahead, args=arguments, daemon=True).start()
        began = time.monotonic()
        batches = [self._take() for _ in range(self.global_batch_size // self._stride)]
        self.wait_s = time.monotonic() - began
        self.position, self.step = self.order.advance(self.position, self.global_batch_size), self.step + 1
        return batches

    def first_rows(self, n_rows: int) -> Iterator[Batch]:
        """Yield this rank's micro-batches of the first `n_rows` samples, or of all if there are fewer.

        For validation: the rows do not depend on the number of ranks, and every rank gets the same number of
        micro-batches (ZeRO-3 runs collectives in the forward pass). Where the rows run out there are rows of padding,
        without targets. Raises what `next_step` does.
        """
        n_rows = min(n_rows, self.n_rows)
        first = self.ranks.data_rank * self.micro_batch_size
        ranges = [range(k, min(k + self.micro_batch_size, n_rows)) for k in range(first, n_rows + first, self._stride)]
        samples = [([Position(sample=k) for k in ks], self.seq_len) for ks in ranges]
        self.close()
        self._reader = self._start(iter(samples))
        try:
            for _ in samples:
                yield self._take()
        finally:
            self.close()

    def close(self) -> None:
        """Stop the threads and close the files. A later `next_step` starts them again.

        This does not wait for a thread in a download: that thread ends after the download, or when it has failed as
        often as it may.
        """
        if self._reader is not None:
            self._reader.stop()
            self._reader = None
        self.rows.close()

    def _samples_from(self, position: Position, step: int) -> Iterator[tuple[list[Position], int]]:
        """Yield the samples of this rank's micro-batches after `step`, and the tokens of the rows that they make."""
        for start in itertools.count(self.ranks.data_rank * self.micro_batch_size, self._stride):
            samples = [self.order.advance(position, start + k) for k in range(self.micro_batch_size)]
            yield samples, self._seq_len_at(step + 1 + start // self.global_batch_size)

    def _start(self, samples: Iterator[tuple[list[Position], int]]) -> Reader:
        """Begin to read the micro-batches of `samples`."""
        self.rows.last_activity = time.monotonic()
        return Reader(itertools.starmap(self._read, samples), self.n_prefetch)

    def _read(self, samples: list[Position], seq_len: int) -> Batch:
        """Read the rows of `samples`, fill up with rows of PAD, and cut them all into rows of `seq_len`."""
        rows = np.full((self.micro_batch_size, self.seq_len + 1), self.pad_id, dtype=np.int64)
        numbers = [self.order.row(position) for position in samples]
        for i, number in enumerate(numbers):
            rows[i] = self.rows.read(number)
        sources = [self.rows.source_of(number) for number in numbers]
        if seq_len < self.seq_len:
            cut = np.lib.stride_tricks.sliding_window_view(rows, seq_len + 1, axis=1)[:, ::seq_len]
            rows, n = cut.copy().reshape(-1, seq_len + 1), cut.shape[1]
            samples, sources = [s for s in samples for _ in range(n)], [s for s in sources for _ in range(n)]
        marks = {"bos_id": self.bos_id, "eos_id": self.eos_id, "pad_id": self.pad_id}
        return make_batch(rows, samples, sources=sources, **marks)

    def _take(self) -> Batch:
        """Return the next micro-batch, as soon as the reader has it."""
        assert self._reader is not None
        while True:
            try:
                return self._reader.take(timeout_s=min(1.0, self.timeout_s))
            except queue.Empty:
                if self.is_interrupted():
                    self.close()  # the micro-batches taken so far are read again by a later call
                    raise Interrupted from None
                silent_s = time.monotonic() - self.rows.last_activity
                require(
                    silent_s < self.timeout_s,
                    f"data: no progress for {silent_s:.0f} s at {self.rows.activity}: check the storage and the "
                    "network, or raise data.download_timeout_s",
                )

    def _fetch_ahead(self, position: Position, stopped: threading.Event) -> None:
        """Download this rank's part of the shards of each window, one window ahead of the steps, in a thread."""
        order = self.order
        while True:
            window = order.window_at(position)
            shards = self.rows.shards_of(window.rows)
            for shard in shards[self.ranks.local_rank :: self.ranks.local_world_size]:
                if stopped.is_set():
                    return
                try:
                    self.rows.fetch(shard)
                except Exception:  # the reader will come to the same shard, and say what is wrong with it
                    return
            while order.number(self.position) < window.begin:
                if stopped.wait(0.2):
                    return
            position = order.position(window.begin + len(window.rows))


def check_cache_limit(config: DataConfig, sources: list[Source], order: Schedule) -> None:
    """Refuse a cache without room for two windows: the one being read, and the next one, which is downloaded meanwhile.

    Raises:
        UserError: data.cache_limit is too small.
    """
    needed = 0
    for source, *of_mixtures in zip(sources, *(chosen for _, chosen in order.mixtures)):
        if source.is_cached and any(of_mixtures):
            rows = math.ceil(max(of_mixtures) / order.first.n_windows)
            sizes = [shard.n_bytes + shard.n_compressed for shard in source.shards]
            window_bytes = math.ceil(rows / source.n_rows * sum(sizes)) + 2 * max(sizes)
            needed += min(2 * window_bytes, sum(sizes))
    limit = sources[0].cache_limit
    require(
        limit is None or needed <= limit,
        f"data.cache_limit={config.cache_limit} is too small: two shuffle windows take {needed} bytes; "
        f"raise it to at least {math.ceil(needed / 2**20)}mb",
    )
