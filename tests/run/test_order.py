"""The order: each row as often as it should be, exact mixtures, few shards at a time, and cheap to find."""

import time
from collections import Counter
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest

from megakexue.core.batch import Position
from megakexue.run.order import Ints, Order, Schedule, permutation, shares


def test_random_numbers_are_the_same_on_every_machine() -> None:
    assert permutation(8, 0, 1, 2, 3).tolist() == [3, 0, 7, 5, 2, 1, 6, 4]
    assert sorted(permutation(1000, 5)) == list(range(1000))


def test_shares() -> None:
    assert shares([10, 20], [None, None]) == [10, 20]
    assert shares([10, 20], [1.0, 1.0]) == [15, 15]
    assert shares([10, 10, 10], [0.1, 0.1, 0.1]) == [10, 10, 10]
    for weights in ([1.0, 2.0, 4.0], [0.3, 0.3, 0.4], [1e-3, 5.0, 7.0]):
        chosen = shares([101, 7, 1000], [*weights])
        assert sum(chosen) == 1108
        assert all(abs(n - 1108 * w / sum(weights)) < 1 for n, w in zip(chosen, weights))


def make_order(
    sizes: tuple[int, ...],
    weights: tuple[float, ...] | None = None,
    *,
    seed: int = 0,
    shuffle: bool = True,
    window_rows: int = 100,
    shard: int = 30,
) -> Order:
    shards = [np.diff([*range(0, n, shard), n]) for n in sizes]
    chosen = shares(list(sizes), list(weights or [None] * len(sizes)))
    return Order(shards, chosen, seed=seed, shuffle=shuffle, window_rows=window_rows)


def epoch_of(order: Order, epoch: int) -> Ints:
    return np.concatenate([order.window(epoch, w) for w in range(order.n_windows)])


def test_the_order_stays_what_it_was() -> None:
    """Checkpoints hold positions in it: another order for the same data would repeat rows and leave rows out."""
    order = make_order((7, 4), (1.0, 1.0), window_rows=6, shard=3)
    windows = [order.window(epoch, w).tolist() for epoch in (0, 1) for w in range(order.n_windows)]
    assert windows == [[6, 10, 3, 4, 7], [5, 7, 8, 0, 1, 9], [9, 6, 3, 2, 8], [7, 5, 4, 10, 8, 0]]


@pytest.mark.parametrize("sizes", [(1,), (100,), (101,), (977, 30, 250)])
def test_every_row_once_in_each_epoch(sizes: tuple[int, ...]) -> None:
    order = make_order(sizes)
    epochs = [epoch_of(order, epoch) for epoch in range(3)]
    for rows in epochs:
        assert sorted(rows) == list(range(sum(sizes)))
    if sum(sizes) > 1:
        assert not (epochs[0] == epochs[1]).all()
        assert not (epochs[0] == epoch_of(make_order(sizes, seed=1), 0)).all()
    assert [order.row(Position(epoch=2, sample=k)) for k in range(len(epochs[2]))] == epochs[2].tolist()


def test_a_window_needs_few_shards_and_is_well_mixed() -> None:
    order = make_order((3000,))
    for w in range(order.n_windows):
        rows = order.window(0, w)
        assert len(np.unique(rows // 30)) <= 100 / 30 + 2
        assert np.mean(np.diff(rows) == 1) < 0.1  # neighbours on disk are rarely neighbours in the order


def test_mixture_is_exact_in_every_window_and_rows_repeat_evenly() -> None:
    sizes, weights = (900, 300, 60), (1.0, 3.0, 2.0)
    order = make_order(sizes, weights)
    edges, n = np.cumsum(sizes), sum(sizes)
    used: Counter[int] = Counter()
    for epoch in range(5):
        for w in range(order.n_windows):
            rows = order.window(epoch, w)
            counts = np.bincount(np.searchsorted(edges, rows, side="right"), minlength=3)
            assert np.abs(counts - len(rows) * np.array(weights) / 6).max() < 2
            used.update(rows.tolist())
    for source, (size, weight) in enumerate(zip(sizes, weights)):
        times = [used[row] for row in range(edges[source] - size, edges[source])]
        average = 5 * n * weight / 6 / size
        assert set(times) <= {int(np.floor(average)), int(np.ceil(average))}
    # a source that an epoch does not use up goes on in the next epoch
    first, second = ({row for row in epoch_of(order, epoch) if row < 900} for epoch in (0, 1))
    assert len(first) == len(second) == n / 6 and not first & second


def test_without_shuffle_the_order_is_that_on_disk_and_sources_alternate() -> None:
    assert epoch_of(make_order((250,), shuffle=False), 3).tolist() == list(range(250))
    rows = epoch_of(make_order((100, 50), shuffle=False, window_rows=1000), 0)
    assert rows[rows < 100].tolist() == list(range(100))
    assert np.abs(np.cumsum(rows >= 100) - np.arange(1, 151) / 3).max() <= 1


def test_order_of_250_million_rows_is_cheap() -> None:
    order = make_order((250_000_000,), window_rows=2**18, shard=16_000)
    began = time.process_time()
    rows = [order.row(Position(epoch=7, sample=k)) for k in (0, 123_456_789, 249_999_999)]
    assert time.process_time() - began < 2
    assert len(set(rows)) == 3 and all(0 <= row < 250_000_000 for row in rows)


# --- changes of the mixture


@dataclass
class Case:
    """A random schedule over random sources."""

    sizes: list[int]
    weights: list[list[float]]
    begins: list[int]
    n: int
    """Samples to look at: some after the last change."""
    schedule: Schedule

    def of_source(self, rows: Ints) -> Ints:
        return np.searchsorted(np.cumsum(self.sizes), rows, side="right")


def random_case(seed: int) -> Case:
    draw = np.random.default_rng(seed)
    sizes = [int(n) for n in draw.integers(1, 70, size=draw.integers(1, 5))]
    shards = [np.bincount(np.sort(draw.integers(0, 4, size=n)), minlength=4).astype(np.int64) for n in sizes]
    n_mixtures = int(draw.integers(1, 6))
    weights = draw.choice([0.0, 0.1, 1.0, 3.0], size=(n_mixtures, len(sizes)))
    weights[np.arange(n_mixtures), draw.integers(0, len(sizes), n_mixtures)] += 1
    lengths = draw.integers(1, draw.choice([5, 40, 300]), size=n_mixtures)
    begins = [0, *np.cumsum(lengths).tolist()]
    mixtures = [(begin, shares(sizes, w)) for begin, w in zip(begins, weights.tolist())]
    shuffle, window_rows = bool(draw.integers(0, 4)), int(draw.integers(1, 50))
    schedule = Schedule(shards, mixtures, seed=seed, shuffle=shuffle, window_rows=window_rows)
    return Case(sizes, weights.tolist(), begins[:-1], begins[-1], schedule)


def read(schedule: Schedule, n: int, begin: int = 0) -> Ints:
    return np.array([schedule.row(schedule.position(k)) for k in range(begin, n)], dtype=np.int64)


def counted(rows: Ints, n_rows: int) -> Ints:
    return np.bincount(rows, minlength=n_rows)


def test_a_change_of_the_mixture_neither_repeats_nor_loses_a_row() -> None:
    """What was read and what a change has left are whole passes, and the first rows of one, for each source."""
    n_changes = 0
    for seed in range(60):
        case = random_case(seed)
        rows, ends = read(case.schedule, case.n), np.cumsum(case.sizes)
        orders = case.schedule._orders
        for order in orders[1:]:
            n_changes += 1
            before = rows[: order.begin]
            for source, (size, end) in enumerate(zip(case.sizes, ends)):
                left, taken = order.rest.rows[source], order.rest.starts[source]
                mine = before[case.of_source(before) == source]
                times = counted(np.concatenate([mine, left]), sum(case.sizes))[end - size : end]
                assert times.sum() == taken == len(mine) + len(left), seed
                assert set(times) <= {taken // size, -(-taken // size)}, seed
                first = order.shards[source][np.flatnonzero(order.shards[source])[0]] if not order.shuffle else 0
                assert (times[: min(first, taken % size)] == -(-taken // size)).all()  # on disk, from the front
    assert n_changes > 80


def test_shares_are_exact_after_each_change() -> None:
    for seed in range(40):
        case = random_case(seed)
        total, n = sum(case.sizes), case.n
        rows = case.of_source(read(case.schedule, n))
        for i, (begin, weights) in enumerate(zip(case.begins, case.weights)):
            end = [*case.begins, n][i + 1]
            order = case.schedule._at(begin)[0]
            share = np.array(weights) / sum(weights)
            for k in range(begin, end):  # at each border of a window
                epoch, sample = divmod(k - begin, total)
                if sample in order.window_starts:
                    counts = np.bincount(rows[begin:k], minlength=len(case.sizes))
                    w = order.window_of(sample)
                    exact = [epoch * n + w * n // order.n_windows for n in order.chosen]
                    assert counts.tolist() == exact, seed
                    assert np.abs(counts - (k - begin) * share).max() <= epoch + len(case.sizes), seed
            assert not np.isin(np.flatnonzero(share == 0), rows[begin:end]).any(), seed


def test_rows_depend_on_nothing_that_comes_later() -> None:
    """So a run may be resumed at any sample, and what is to come may change there."""
    for seed in range(40):
        case = random_case(seed)
        rows, mixtures = read(case.schedule, case.n), case.schedule.mixtures
        first = case.schedule.first
        window_rows = int(np.diff(first.window_starts).max())
        same = partial(Schedule, first.shards, seed=first.seed, shuffle=first.shuffle, window_rows=window_rows)
        draw = np.random.default_rng(seed)
        cut = int(draw.integers(1, case.n + 1))
        begun = case.schedule.begun(case.schedule.position(cut))
        assert [begin for begin, _ in begun] == [begin for begin, _ in mixtures if begin < cut]
        assert begun == mixtures[: len(begun)]
        other = shares(case.sizes, draw.integers(1, 4, size=len(case.sizes)).tolist())
        if -(-first.n_rows // window_rows) == first.n_windows:  # else the windows would be other ones
            changed = same([*begun, (cut, other)])
            assert (read(changed, cut) == rows[:cut]).all(), seed
            # whoever comes there first, without the rows before, comes to the same rows
            resumed = same([*begun, (cut, other)])
            assert (read(resumed, cut + 30, cut) == read(changed, cut + 30, cut)).all(), seed
        # windows one after the other are the same rows, cut where the mixture changes
        number, found = 0, []
        while number < case.n:
            window = case.schedule.window_at(case.schedule.position(number))
            assert window.begin == number, seed
            found.append(window.rows)
            number += len(window.rows)
        assert (np.concatenate(found)[: case.n] == rows).all(), seed


def test_a_change_keeps_its_order() -> None:
    """As `test_the_order_stays_what_it_was`: checkpoints hold positions in it."""
    shards = [np.array([3, 3, 1]), np.array([3, 1])]
    schedule = Schedule(shards, [(0, [6, 5]), (8, [2, 9]), (14, [11, 0])], seed=0, shuffle=True, window_rows=6)
    assert read(schedule, 24).tolist() == [6, 10, 3, 4, 7, 5, 7, 8, 0, 10, 9, 9, 8, 1, 3, 2, 4, 6, 5, 6, 2, 0, 1, 0]
