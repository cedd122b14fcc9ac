"""Batches: the rows of a step whatever the ranks, resume, validation, waiting for data, several processes, speed."""

import contextlib
import dataclasses
import fcntl
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megakexue.config import IGNORED, DataConfig, SourceConfig, StageConfig, UserError
from megakexue.core.batch import Batch, Position
from megakexue.run.data import Interrupted
from tests.ranks import run_on_ranks, start_on_ranks
from tests.sources import (
    PAD,
    VOCAB,
    Bucket,
    Ints,
    T,
    data_config,
    open_batches,
    s3_config,
    tokens_of,
    write_source,
)

pytestmark = pytest.mark.usefixtures("close_batches")


def same(batch: Batch, other: Batch) -> bool:
    pairs = zip(dataclasses.astuple(batch), dataclasses.astuple(other), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


# --- the stream


def test_stages_cut_the_rows_of_a_step_and_leave_the_order_as_it_is(tmp_path: Path, small_windows: None) -> None:
    write_source(tmp_path / "a", 6, t=4 * T, size_limit=700)
    plain = data_config(tmp_path / "a", seq_len=4 * T)
    stages = [StageConfig(until_step=2, seq_len=T), StageConfig(until_step=3, seq_len=2 * T)]
    staged = dataclasses.replace(plain, stages=stages)
    whole, cut = open_batches(plain, tmp_path), open_batches(staged, tmp_path)
    assert whole.fingerprint == cut.fingerprint
    steps, places = [], [(cut.position, cut.step)]
    for n_rows in (8, 8, 4, 2, 2):  # of a micro-batch of 2 samples; more than an epoch
        expected, step = whole.next_step(), cut.next_step()
        for a, b in zip(expected, step, strict=True):
            assert b.tokens.shape == (n_rows, 8 * T // n_rows) and not b.positions[:, 0].any()
            assert torch.equal(a.tokens.flatten(), b.tokens.flatten())
            assert torch.equal(a.targets.flatten(), b.targets.flatten()) and a.n_targets == b.n_targets
            assert b.samples == [sample for sample in a.samples for _ in range(n_rows // 2)]
            at = np.flatnonzero(b.positions.flatten().numpy() == 0)
            assert b.cu_seqlens.tolist() == [*at, 8 * T]
        steps.append(step)
        places.append((cut.position, cut.step))
    assert whole.position == cut.position
    assert [name.split("row ")[1][2:] for name in cut.names(steps[0][0])] == [f"part {k}" for k in (0, 1, 2, 3) * 2]
    assert cut.names(steps[4][0]) == [whole.locate(sample) for sample in expected[0].samples]
    # from the middle of a stage and from each border
    for place, step in zip(places, steps, strict=False):
        resumed = open_batches(staged, tmp_path)
        resumed.seek(*place)
        assert all(same(a, b) for a, b in zip(resumed.next_step(), step, strict=True))
    # validation has the longest rows
    assert {batch.tokens.shape for batch in cut.first_rows(4)} == {(2, 4 * T)}
    # two ranks hold the same rows together
    ranks = [open_batches(staged, tmp_path, rank=r, world_size=2, micro_batch_size=1) for r in range(2)]
    for step in steps:
        by_rank = [batches.next_step() for batches in ranks]
        assert tokens_of([micros for micros in zip(*by_rank)]) == tokens_of([step])


def test_steps_do_not_depend_on_ranks_or_micro_batches(tmp_path: Path, small_windows: None) -> None:
    write_source(tmp_path / "a", 50)
    config = data_config(tmp_path / "a")
    whole = open_batches(config, tmp_path, global_batch_size=12, micro_batch_size=12)
    steps = [tokens_of([whole.next_step()]) for _ in range(10)]  # 2.4 epochs
    for world_size, micro in ((1, 1), (1, 4), (2, 3), (3, 2), (4, 1)):
        ranks = [
            open_batches(config, tmp_path, rank=r, world_size=world_size, global_batch_size=12, micro_batch_size=micro)
            for r in range(world_size)
        ]
        for expected in steps:
            by_rank = [batches.next_step() for batches in ranks]
            assert len({len(step) for step in by_rank}) == 1
            assert tokens_of([micros for micros in zip(*by_rank)]) == expected


def test_ranks_of_a_sequence_group_read_the_same_rows(tmp_path: Path) -> None:
    write_source(tmp_path / "a", 50)
    config = data_config(tmp_path / "a")
    two = [open_batches(config, tmp_path, rank=r, world_size=2).next_step() for r in range(2)]
    four = [open_batches(config, tmp_path, rank=r, world_size=4, sequence_size=2).next_step() for r in range(4)]
    assert tokens_of([two[0]]) != tokens_of([two[1]])
    assert [tokens_of([step]) for step in four] == [tokens_of([two[r // 2]]) for r in range(4)]


@pytest.mark.parametrize("global_batch_size", [7, 50, 64])
def test_exactly_once_in_each_epoch_with_batches_across_its_end(
    tmp_path: Path, small_windows: None, global_batch_size: int
) -> None:
    rows = write_source(tmp_path / "a", 50)["train"]
    batches = open_batches(
        data_config(tmp_path / "a"), tmp_path, global_batch_size=global_batch_size, micro_batch_size=1
    )
    assert batches.n_rows == 50
    n_steps = 3 * 50 // global_batch_size + 1
    seen: list[list[int]] = []
    samples: list[Position] = []
    for _ in range(n_steps):
        step = batches.next_step()
        seen += tokens_of([step])
        samples += [position for batch in step for position in batch.samples]
    for epoch in range(3):
        assert sorted(seen[50 * epoch : 50 * epoch + 50]) == sorted(rows[:, :-1].tolist())
    assert samples == [Position(epoch=k // 50, sample=k % 50) for k in range(len(samples))]
    epoch, sample = divmod(n_steps * global_batch_size, 50)
    assert batches.position == Position(epoch=epoch, sample=sample)


def test_seek_continues_bit_for_bit(tmp_path: Path, small_windows: None) -> None:
    write_source(tmp_path / "a", 50)
    write_source(tmp_path / "b", 30, seed=1)
    config = data_config(
        SourceConfig(path=str(tmp_path / "a"), weight=1.0), SourceConfig(path=str(tmp_path / "b"), weight=2.0)
    )
    straight = open_batches(config, tmp_path)
    positions, steps = [], []
    for _ in range(25):  # 2.5 epochs of 80 rows
        positions.append(straight.position)
        steps.append(straight.next_step())
    assert Position(epoch=1, sample=0) in positions  # 80 rows are ten steps
    for start in (0, 3, 9, 10, 11, 19, 22):
        resumed = open_batches(config, tmp_path)
        resumed.seek(Position(**json.loads(json.dumps(dataclasses.asdict(positions[start])))))
        for step in steps[start : start + 3]:
            assert all(same(a, b) for a, b in zip(resumed.next_step(), step, strict=True))
    straight.seek(positions[4])  # back, as after a roll-back
    assert all(same(a, b) for a, b in zip(straight.next_step(), steps[4], strict=True))
    assert straight.position == positions[5]


def test_seek_outside_the_data(tmp_path: Path) -> None:
    write_source(tmp_path / "a", 50)
    with pytest.raises(UserError, match="outside an epoch of 50 rows: the data is not what it was"):
        open_batches(data_config(tmp_path / "a"), tmp_path).seek(Position(epoch=1, sample=50))


def test_fingerprint_changes_with_whatever_changes_the_order(tmp_path: Path) -> None:
    write_source(tmp_path / "a", 50)
    write_source(tmp_path / "b", 40)
    write_source(tmp_path / "c", 50, size_limit=4000)
    same_order = [
        open_batches(data_config(tmp_path / "a"), tmp_path).fingerprint,
        open_batches(data_config(tmp_path / "a"), tmp_path, global_batch_size=16).fingerprint,
    ]
    others = [
        open_batches(config, tmp_path).fingerprint
        for config in (
            data_config(tmp_path / "b"),
            data_config(tmp_path / "c"),
            data_config(tmp_path / "a", tmp_path / "b"),
            data_config(tmp_path / "a", shuffle=False),
            data_config(tmp_path / "a", shuffle_seed=1),
        )
    ]
    assert same_order[0] == same_order[1] and len({*same_order, *others}) == 6


def test_mixture_of_real_sources(tmp_path: Path, small_windows: None) -> None:
    sources = [write_source(tmp_path / name, n, seed=n)["train"] for name, n in (("a", 60), ("b", 30))]
    config = data_config(
        SourceConfig(path=str(tmp_path / "a"), weight=1.0), SourceConfig(path=str(tmp_path / "b"), weight=2.0)
    )
    batches = open_batches(config, tmp_path, global_batch_size=90, micro_batch_size=90)
    a, b = ({tuple(row) for row in rows[:, :-1].tolist()} for rows in sources)
    used: Counter[tuple[int, ...]] = Counter()
    for _ in range(2):
        read = [tuple(row) for row in tokens_of([batches.next_step()])]
        assert sum(row in a for row in read) == 30 and sum(row in b for row in read) == 60
        used.update(read)
    assert all(used[row] == 1 for row in a) and all(used[row] == 4 for row in b)
    assert batches.warnings == []
    # a weight that gives a source not one row of the 90
    a_little = SourceConfig(path=str(tmp_path / "a"), weight=1e-3)
    config = data_config(a_little, SourceConfig(path=str(tmp_path / "b"), weight=1.0))
    batches = open_batches(config, tmp_path, global_batch_size=90, micro_batch_size=90)
    assert batches.warnings == [
        f"data source {tmp_path / 'a'} gives none of the 90 rows of an epoch: raise its weight in data.sources, or "
        "leave it out"
    ]


def test_weights_by_step(tmp_path: Path, small_windows: None) -> None:
    """They are those of the steps, whoever resumes where; and what is not read yet may change."""
    sizes = {"a": 50, "b": 30, "c": 7}
    rows = {name: write_source(tmp_path / name, n, seed=n)["train"][:, :-1].tolist() for name, n in sizes.items()}

    def config(*weights: list[float], ends: tuple[int, ...] = (3, 4, 9)) -> DataConfig:
        """The last weights are those of the sources."""
        stages = [StageConfig(until_step=n, weights=dict(zip(sizes, w))) for n, w in zip(ends, weights)]
        sources = [SourceConfig(path=str(tmp_path / n), weight=w) for n, w in zip(sizes, weights[-1])]
        return data_config(*sources, stages=stages)

    plan = config([1, 0, 0], [1, 1, 0], [0, 1, 2], [3, 2, 1])
    straight = open_batches(plan, tmp_path)
    places, steps = [], []
    for _ in range(25):
        places.append((straight.position, straight.step))
        steps.append(straight.next_step())
    places.append((straight.position, straight.step))
    assert [tuple(row) in {tuple(r) for r in rows["a"]} for step in steps[:3] for row in tokens_of([step])] == [
        True
    ] * 24
    used = Counter(tuple(row) for step in steps for row in tokens_of([step]))
    for name, size in sizes.items():
        times = [used[tuple(row)] for row in rows[name]]
        assert max(times) - min(times) <= 2 and sum(times) > size, name
    for start in (2, 4, 9):
        ranks = [open_batches(plan, tmp_path, rank=r, world_size=2) for r in range(2)]
        for batches in ranks:
            batches.seek(*places[start])
        for step in steps[start : start + 3]:
            by_rank = [batches.next_step() for batches in ranks]
            assert tokens_of([micros for micros in zip(*by_rank)]) == tokens_of([step])

    def fingerprints(other: DataConfig, **options: Any) -> list[str]:
        batches = open_batches(other, tmp_path, **options)
        return [batches.fingerprint_at(*place) for place in places]

    own = fingerprints(plan)
    assert own[3] == own[0] != own[4] and len({*own}) == 4
    others = [
        (3, config([1, 0, 0], [1, 2, 0], [0, 1, 2], [3, 2, 1])),
        (4, config([1, 0, 0], [1, 1, 0], [1, 1, 2], [3, 2, 1])),
        (9, config([1, 0, 0], [1, 1, 0], [0, 1, 2], [1, 1, 1])),
        (6, config([1, 0, 0], [1, 1, 0], [0, 1, 2], [1, 1, 1], ends=(3, 4, 6))),
        (9, config([1, 0, 0], [1, 1, 0], [0, 1, 2], [3, 2, 1], ends=(3, 4, 12))),
        (25, config([2, 0, 0], [3, 3, 0], [0, 2, 4], [6, 4, 2])),
        (25, config([1, 0, 0], [1, 1, 0], [0, 1, 2], [3, 2, 1], [1, 0, 0], ends=(3, 4, 9, 25))),
        (3, config([1, 0, 0], [1, 1, 1], ends=(3,))),
    ]
    for last_same, other in others:
        expected = [k <= last_same for k in range(26)]
        assert [a == b for a, b in zip(own, fingerprints(other), strict=True)] == expected, last_same
    # from there on the new weights, and each row that is left of the epoch
    changed = open_batches(others[3][1], tmp_path)
    changed.seek(*places[6])
    again = Counter(tuple(row) for step in steps[:6] for row in tokens_of([step]))
    again.update(tuple(row) for _ in range(19) for row in tokens_of([changed.next_step()]))
    for name in ("a", "b"):
        times = [again[tuple(row)] for row in rows[name]]
        assert max(times) - min(times) <= 2, name
    # another batch size may come before the first change, and not after it
    assert [a == b for a, b in zip(own, fingerprints(plan, global_batch_size=16))][:6] == [True] * 4 + [False] * 2


# --- validation


@pytest.mark.parametrize(("n_rows", "n_expected"), [(10, 10), (1000, 23)])
def test_validation_rows_do_not_depend_on_ranks(tmp_path: Path, n_rows: int, n_expected: int) -> None:
    rows = [write_source(tmp_path / name, 20, n, seed=n)["valid"] for name, n in (("a", 16), ("b", 7), ("c", 0))]
    config = data_config(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    expected: dict[int, list[int]] = {}
    for world_size, micro in ((1, 1), (2, 2), (3, 2), (4, 4)):
        ranks = [
            list(
                open_batches(
                    config, tmp_path, rank=r, world_size=world_size, micro_batch_size=micro,
                    global_batch_size=12 * micro, split="valid",
                ).first_rows(n_rows)
            )
            for r in range(world_size)
        ]  # fmt: skip
        assert {len(batches) for batches in ranks} == {-(-n_expected // (micro * world_size))}
        seen = {}
        for batch in (batch for batches in ranks for batch in batches):
            assert len(batch.tokens) == micro
            for row, position in zip(batch.tokens.tolist(), batch.samples):
                seen[position.sample] = row
            padding = slice(len(batch.samples), None)
            assert (batch.targets[padding] == IGNORED).all() and (batch.tokens[padding] == PAD).all()
        assert sorted(seen) == list(range(n_expected))
        assert not expected or seen == expected
        expected = seen
    a, b = ({tuple(row) for row in values[:, :-1].tolist()} for values in rows[:2])
    from_a = sum(tuple(row) in a for row in expected.values())
    assert from_a + sum(tuple(row) in b for row in expected.values()) == n_expected
    assert abs(from_a - n_expected * 16 / 23) <= 1  # each source is there from the start


def test_no_validation_rows(tmp_path: Path) -> None:
    write_source(tmp_path / "a", 20)
    with pytest.raises(UserError, match=r"none of data.sources has rows in its valid split.*evaluate.every_steps=null"):
        open_batches(data_config(tmp_path / "a"), tmp_path, split="valid")


def test_cache_limit(tmp_path: Path, small_windows: None) -> None:
    write_source(tmp_path / "a", 500)
    for limit, message in (("many", "'many' is not a number of bytes such as 200gb"), ("1kb", "is too small: two")):
        with pytest.raises(UserError, match=f"data.cache_limit=.*{message}"):
            open_batches(data_config(f"file://{tmp_path / 'a'}", cache_limit=limit), tmp_path / "cache")


def test_no_progress_is_an_error_not_a_hang(tmp_path: Path) -> None:
    write_source(tmp_path / "a", 8)
    config = data_config(f"file://{tmp_path / 'a'}", download_retries=0, download_timeout_s=0.5)
    batches = open_batches(config, tmp_path / "cache")
    with contextlib.ExitStack() as stack:
        # hold the shards' locks, as another process would whose download is stuck
        (tmp_path / "cache/locks").mkdir(parents=True)
        name = f"{batches.sources[0].folder.parent.name}-train-shard.00000.mds"
        fcntl.flock(stack.enter_context(open(tmp_path / "cache/locks" / name, "w")), fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"no progress for 1 s at file://.*/train/shard.00000.mds: check the stor"):
            batches.next_step()


def test_remote_equals_local_and_downloads_each_shard_once(tmp_path: Path, bucket: Bucket) -> None:
    write_source(bucket.folder / "a", 200)
    write_source(bucket.folder / "b", 60, seed=1)
    local = open_batches(data_config(bucket.folder / "a", bucket.folder / "b"), tmp_path / "unused")
    config = s3_config(bucket, "a", "b")
    ranks = [open_batches(config, tmp_path / "cache", rank=r, world_size=2) for r in range(2)]
    for _ in range(40):
        by_rank = [batches.next_step() for batches in ranks]
        assert tokens_of([micros for micros in zip(*by_rank)]) == tokens_of([local.next_step()])
    assert not (tmp_path / "unused").exists()
    assert {n for key, n in bucket.gets.items() if key.endswith(".mds")} == {1}
    assert len([key for key in bucket.gets if key.endswith(".mds")]) == 5 + 2  # about 48 rows a shard

    assert not list((tmp_path / "cache/tmp").iterdir())
    again = open_batches(config, tmp_path / "cache")
    again.next_step()
    assert {n for key, n in bucket.gets.items() if key.endswith(".mds")} == {1}


def test_a_download_that_stalls_has_a_deadline(tmp_path: Path, bucket: Bucket) -> None:
    write_source(bucket.folder / "a", 10)
    bucket.stall = {"a/train/shard.00000.mds"}
    batches = open_batches(s3_config(bucket, "a", download_retries=1, download_timeout_s=1), tmp_path / "cache")
    began = time.monotonic()
    with pytest.raises(UserError, match=r"(no progress for \d+ s at|cannot read) .*train/shard.00000.mds"):
        batches.next_step()
    assert time.monotonic() - began < 10  # two attempts of a second each, and as much again
    # and whoever waits for it can be called away
    batches = open_batches(s3_config(bucket, "a"), tmp_path / "another", is_interrupted=lambda: True)
    with pytest.raises(Interrupted):
        batches.next_step()
    assert batches.position == Position()


def test_the_next_window_is_downloaded_ahead(tmp_path: Path, bucket: Bucket, small_windows: None) -> None:
    write_source(bucket.folder / "a", 400, size_limit=500)  # 4 rows a shard, 24 rows a window
    batches = open_batches(s3_config(bucket, "a", n_prefetch=1), tmp_path / "cache", global_batch_size=2)
    batches.next_step()
    wanted, read = (
        {batches.locate(Position(sample=k)).split("/")[-1].split(" ")[0] for k in range(n)}
        for n in (batches.order.first.window_starts[2], 8)
    )
    assert read < wanted
    deadline = time.monotonic() + 20
    while True:
        have = {path.name for path in (tmp_path / "cache/shards").rglob("*.mds")}
        if wanted <= have:
            break
        assert time.monotonic() < deadline, wanted - have
        time.sleep(0.05)
    assert 2 * len(have) < len(list((bucket.folder / "a/train").glob("*.mds")))  # but not the whole epoch


# --- several processes


def gather_steps(folder: str, cache: str) -> list[Any]:
    """One rank of the gloo test: its rows of 20 steps, in the environment of DeepSpeed's launcher."""
    import torch.distributed as dist

    del os.environ["LOCAL_WORLD_SIZE"]
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    batches = open_batches(data_config(f"file://{folder}"), cache, rank=rank, world_size=world_size)
    steps = []
    for _ in range(20):
        mine = torch.stack([batch.tokens for batch in batches.next_step()])
        everyone = [torch.empty_like(mine) for _ in range(world_size)]
        dist.all_gather(everyone, mine)
        steps.append(torch.stack(everyone, 1).flatten(0, 2).tolist())
    batches.close()
    dist.destroy_process_group()
    return steps


@pytest.mark.slow
def test_two_ranks_in_two_processes_share_a_cache(tmp_path: Path) -> None:
    write_source(tmp_path / "a", 100)
    local = open_batches(data_config(tmp_path / "a"), tmp_path)
    expected = [tokens_of([local.next_step()]) for _ in range(20)]
    first, second = run_on_ranks(2, gather_steps, str(tmp_path / "a"), str(tmp_path / "cache"), timeout_s=120)
    assert first == second == expected


def read_for_ever(config: DataConfig, cache: Path) -> None:
    batches = open_batches(config, cache, rank=int(os.environ["RANK"]), world_size=2)
    while True:
        batches.next_step()


def in_shared_memory() -> set[str]:
    """What is there, but for the semaphores of Python's multiprocessing, which tests beside this one may have."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")}


@pytest.mark.slow
def test_killed_ranks_leave_nothing_that_stops_the_next_start(tmp_path: Path, bucket: Bucket) -> None:
    write_source(bucket.folder / "a", 400)
    config = s3_config(bucket, "a")
    local = open_batches(data_config(bucket.folder / "a"), tmp_path)
    expected = [tokens_of([local.next_step()]) for _ in range(60)]
    bucket.stall = {"a/train/shard.00003.mds"}  # whoever downloads it holds its lock when it is killed
    shared_memory = in_shared_memory()
    ranks = start_on_ranks(2, read_for_ever, config, tmp_path / "cache")
    try:
        assert bucket.stalled.wait(300)
        time.sleep(0.5)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    assert list((tmp_path / "cache/tmp").iterdir())  # they were killed in the middle
    bucket.stall = set()
    bucket.resume.set()
    # two runs at once start over in what they left
    restarted = [open_batches(config, tmp_path / "cache") for _ in range(2)]
    for step in expected:
        for batches in restarted:
            assert tokens_of([batches.next_step()]) == step
    assert in_shared_memory() <= shared_memory


# --- speed


def test_reading_is_far_faster_than_training(tmp_path: Path) -> None:
    def long_rows(n: int, rng: np.random.Generator, t: int) -> Ints:
        return rng.integers(3, VOCAB, (n, t + 1))

    write_source(tmp_path / "a", 4096, t=2048, rows_of=long_rows, size_limit=1 << 22)
    config = data_config(tmp_path / "a", seq_len=2048)
    batches = open_batches(config, tmp_path, global_batch_size=512, micro_batch_size=8)
    batches.next_step()
    began, began_cpu = time.monotonic(), time.process_time()
    for _ in range(8):
        batches.next_step()
    rows_per_s = 8 * 512 / (time.monotonic() - began)
    rows_per_cpu_s = 8 * 512 / (time.process_time() - began_cpu)
    print(f"{rows_per_s:.0f} rows/s of 2048 tokens, {rows_per_cpu_s:.0f} per second of CPU time")
    assert rows_per_cpu_s > 1000  # CPU time, for what else runs on the machine takes none of it
