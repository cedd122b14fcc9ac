"""The order: each row as often as it should be, exact mixtures, few shards at a time, and cheap to find."""

import time
from collections import Counter

import numpy as np
import pytest

from megakexue.core.batch import Position
from megakexue.run.order import Ints, Order, permutation, shares


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
