import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from streaming import MDSWriter

import megakexue.data as data
from megakexue.config import IGNORED, DataConfig, SourceConfig, UserError, sha256
from megakexue.data import Batches, Order, Position, make_batch, permutation, shares
from tests.ranks import run_on_ranks

BOS, EOS, PAD, VOCAB, T = 1, 2, 0, 5000, 16

# streaming leaves the closing of compressed shards that it read to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file .*zstd:ResourceWarning")


def random_rows(n, rng, t=T):
    """Rows cut out of a stream of documents of 0 to 12 tokens, some with padding at their end."""
    stream = []
    while len(stream) < (n + 1) * (t + 1):
        stream += [BOS, *rng.integers(3, VOCAB, rng.integers(0, 13)), EOS]
    rows = np.array(stream[3 : 3 + n * (t + 1)]).reshape(n, t + 1)
    for row in rows[rng.random(n) < 0.3]:
        row[rng.integers(1, t + 1) :] = PAD
    for i, row in enumerate(rows):
        row[0] = 3 + i  # what makes rows differ, also the short ones
    return rows


def write_source(folder, n_train, n_valid=0, seed=0, t=T, rows_of=random_rows, **writer):
    """Write a prepared folder and return {split: rows}."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(b"a tokenizer")
    rows = {"train": rows_of(n_train, rng, t), "valid": rows_of(n_valid, rng, t)}
    for split, values in rows.items():
        if len(values):
            options = {"size_limit": 2000, "hashes": ["xxh64"]} | writer
            with MDSWriter(columns={"tokens": f"ndarray:uint16:{t + 1}"}, out=str(folder / split), **options) as out:
                for row in values.astype(np.uint16):
                    out.write({"tokens": row})
    manifest = {
        "tokenizer_sha256": sha256(folder / "tokenizer.model"), "vocab_size": VOCAB, "seq_len": t,
        "bos_id": BOS, "eos_id": EOS, "pad_id": PAD,
        "splits": {split: {"rows": len(values)} for split, values in rows.items()},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return rows


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def data_config(*sources, tokenizer=None, **options):
    sources = [source if isinstance(source, SourceConfig) else SourceConfig(path=str(source)) for source in sources]
    tokenizer = tokenizer or f"{sources[0].path.removeprefix('file://')}/tokenizer.model"
    return DataConfig(sources=sources, tokenizer=str(tokenizer), **{"seq_len": T, "download_retries": 1} | options)


OPENED = []


def open_batches(config, cache, *, rank=0, world_size=1, global_batch_size=8, micro_batch_size=2, split="train"):
    batches = Batches(
        config,
        split=split,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        local_world_size=world_size,
        cache=Path(cache),
    )
    OPENED.append(batches)
    return batches


def close_all():
    while OPENED:
        OPENED.pop().close()
    for thread in threading.enumerate():
        # one that `close` did not wait for would try its download again in the next test, from that test's bucket
        if "_fetch_ahead" in thread.name or "_read_ahead" in thread.name:
            thread.join(60)
            assert not thread.is_alive(), thread


@pytest.fixture(autouse=True)
def close_batches():
    yield
    close_all()


@pytest.fixture
def small_windows(monkeypatch):
    """Windows of 24 rows, so that epochs have several."""
    monkeypatch.setattr(data, "WINDOW_TOKENS", 24 * T)


def tokens_of(steps):
    return torch.cat([batch.tokens for step in steps for batch in step]).tolist()


def same(batch, other):
    pairs = zip(dataclasses.astuple(batch), dataclasses.astuple(other), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


# --- the order


def test_random_numbers_are_the_same_on_every_machine():
    assert permutation(8, 0, 1, 2, 3).tolist() == [3, 0, 7, 5, 2, 1, 6, 4]
    assert sorted(permutation(1000, 5)) == list(range(1000))


def test_shares():
    assert shares([10, 20], [None, None]) == [10, 20]
    assert shares([10, 20], [1.0, 1.0]) == [15, 15]
    assert shares([10, 10, 10], [0.1, 0.1, 0.1]) == [10, 10, 10]
    for weights in ([1.0, 2.0, 4.0], [0.3, 0.3, 0.4], [1e-3, 5.0, 7.0]):
        chosen = shares([101, 7, 1000], weights)
        assert sum(chosen) == 1108
        assert all(abs(n - 1108 * w / sum(weights)) < 1 for n, w in zip(chosen, weights))


def make_order(sizes, weights=None, *, seed=0, shuffle=True, window_rows=100, shard=30):
    shards = [np.diff([*range(0, n, shard), n]) for n in sizes]
    chosen = shares(list(sizes), list(weights or [None] * len(sizes)))
    return Order(shards, chosen, seed=seed, shuffle=shuffle, window_rows=window_rows)


def epoch_of(order, epoch):
    return np.concatenate([order.window(epoch, w) for w in range(order.n_windows)])


@pytest.mark.parametrize("sizes", [(1,), (100,), (101,), (977, 30, 250)])
def test_every_row_once_in_each_epoch(sizes):
    order = make_order(sizes)
    epochs = [epoch_of(order, epoch) for epoch in range(3)]
    for rows in epochs:
        assert sorted(rows) == list(range(sum(sizes)))
    if sum(sizes) > 1:
        assert not (epochs[0] == epochs[1]).all()
        assert not (epochs[0] == epoch_of(make_order(sizes, seed=1), 0)).all()
    assert [order.row(Position(epoch=2, sample=k)) for k in range(len(epochs[2]))] == epochs[2].tolist()


def test_a_window_needs_few_shards_and_is_well_mixed():
    order = make_order((3000,))
    for w in range(order.n_windows):
        rows = order.window(0, w)
        assert len(np.unique(rows // 30)) <= 100 / 30 + 2
        assert np.mean(np.diff(rows) == 1) < 0.1  # neighbours on disk are rarely neighbours in the order


def test_mixture_is_exact_in_every_window_and_rows_repeat_evenly():
    sizes, weights = (900, 300, 60), (1.0, 3.0, 2.0)
    order = make_order(sizes, weights)
    edges, n, used = np.cumsum(sizes), sum(sizes), Counter()
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


def test_without_shuffle_the_order_is_that_on_disk_and_sources_alternate():
    assert epoch_of(make_order((250,), shuffle=False), 3).tolist() == list(range(250))
    rows = epoch_of(make_order((100, 50), shuffle=False, window_rows=1000), 0)
    assert rows[rows < 100].tolist() == list(range(100))
    assert np.abs(np.cumsum(rows >= 100) - np.arange(1, 151) / 3).max() <= 1


def test_order_of_250_million_rows_is_cheap():
    order = make_order((250_000_000,), window_rows=2**18, shard=16_000)
    began = time.process_time()
    rows = [order.row(Position(epoch=7, sample=k)) for k in (0, 123_456_789, 249_999_999)]
    assert time.process_time() - began < 2
    assert len(set(rows)) == 3 and all(0 <= row < 250_000_000 for row in rows)


# --- one batch


def reference(row):
    """Targets, positions and document starts of one row, token by token."""
    targets, positions, starts = [], [], []
    for k in range(len(row) - 1):
        restart = bool(k == 0 or row[k] == BOS or (row[k] == PAD and row[k - 1] != PAD))
        starts += [k] * restart
        positions.append(0 if restart else positions[-1] + 1)
        targets.append(IGNORED if row[k + 1] in (BOS, PAD) else int(row[k + 1]))
    return targets, positions, starts


def test_targets_positions_and_boundaries_match_a_plain_reference():
    rows = random_rows(300, np.random.default_rng(3))
    rows[0] = PAD
    rows[1, :] = [BOS, EOS] * 8 + [BOS]
    batch = make_batch(rows, [], bos_id=BOS, pad_id=PAD)
    expected = [reference(row) for row in rows]
    assert batch.tokens.tolist() == rows[:, :-1].tolist()
    assert batch.targets.tolist() == [targets for targets, _, _ in expected]
    assert batch.positions.tolist() == [positions for _, positions, _ in expected]
    starts = [i * T + k for i, (_, _, starts) in enumerate(expected) for k in starts]
    assert batch.cu_seqlens.tolist() == [*starts, len(rows) * T]
    assert batch.n_targets == sum(target != IGNORED for targets, _, _ in expected for target in targets)
    assert len(starts) > 2 * len(rows)  # the rows did hold many documents
    assert {batch.tokens.dtype, batch.targets.dtype, batch.positions.dtype} == {torch.int64}
    assert batch.cu_seqlens.dtype == torch.int32 and batch.tokens.is_contiguous()


def test_what_is_predicted():
    row = np.array([[7, EOS, BOS, 8, 9, EOS, PAD, PAD]])
    batch = make_batch(row, [], bos_id=BOS, pad_id=PAD)
    assert batch.targets.tolist() == [[EOS, IGNORED, 8, 9, EOS, IGNORED, IGNORED]]
    assert batch.positions.tolist() == [[0, 1, 0, 1, 2, 3, 0]]
    assert batch.cu_seqlens.tolist() == [0, 2, 6, 7]


# --- the stream


def test_steps_do_not_depend_on_ranks_or_micro_batches(tmp_path, small_windows):
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


@pytest.mark.parametrize("global_batch_size", [7, 50, 64])
def test_exactly_once_in_each_epoch_with_batches_across_its_end(tmp_path, small_windows, global_batch_size):
    rows = write_source(tmp_path / "a", 50)["train"]
    batches = open_batches(
        data_config(tmp_path / "a"), tmp_path, global_batch_size=global_batch_size, micro_batch_size=1
    )
    assert batches.n_rows == 50
    n_steps = 3 * 50 // global_batch_size + 1
    seen, samples = [], []
    for _ in range(n_steps):
        step = batches.next_step()
        seen += tokens_of([step])
        samples += [position for batch in step for position in batch.samples]
    for epoch in range(3):
        assert sorted(seen[50 * epoch : 50 * epoch + 50]) == sorted(rows[:, :-1].tolist())
    assert samples == [Position(epoch=k // 50, sample=k % 50) for k in range(len(samples))]
    epoch, sample = divmod(n_steps * global_batch_size, 50)
    assert batches.position == Position(epoch=epoch, sample=sample)


def test_seek_continues_bit_for_bit(tmp_path, small_windows):
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


def test_seek_outside_the_data(tmp_path):
    write_source(tmp_path / "a", 50)
    with pytest.raises(UserError, match="outside an epoch of 50 rows: the data is not what it was"):
        open_batches(data_config(tmp_path / "a"), tmp_path).seek(Position(epoch=1, sample=50))


def test_fingerprint_changes_with_whatever_changes_the_order(tmp_path):
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


def test_a_sample_can_be_found_on_disk(tmp_path):
    rows = write_source(tmp_path / "a", 50)["train"]
    batches = open_batches(data_config(tmp_path / "a"), tmp_path)
    batch = batches.next_step()[1]
    for tokens, position in zip(batch.tokens.tolist(), batch.samples, strict=True):
        name, row = batches.locate(position).split(" row ")
        index = json.loads((tmp_path / "a/train/index.json").read_text())["shards"]
        before = sum(shard["samples"] for shard in index if shard["raw_data"]["basename"] < Path(name).name)
        assert Path(name).is_file() and rows[before + int(row), :-1].tolist() == tokens


def test_uint32_rows_and_wait_time(tmp_path):
    folder = tmp_path / "a"
    write_source(folder, 10)
    shutil.rmtree(folder / "train")
    with MDSWriter(columns={"tokens": f"ndarray:uint32:{T + 1}"}, out=str(folder / "train")) as out:
        for k in range(10):
            out.write({"tokens": np.full(T + 1, 70_000 + k, np.uint32)})
    batches = open_batches(data_config(folder), tmp_path)
    assert {token for row in tokens_of([batches.next_step()]) for token in row} <= set(range(70_000, 70_010))
    assert batches.wait_s > 0


def test_few_shards_are_open_at_a_time_and_none_after_close(tmp_path, monkeypatch):
    def n_open():
        links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        return sum(str(tmp_path) in os.readlink(link) for link in links if os.path.islink(link))

    write_source(tmp_path / "a", 200, size_limit=700)
    expected = open_batches(data_config(tmp_path / "a"), tmp_path)
    steps = [expected.next_step() for _ in range(30)]
    expected.close()
    monkeypatch.setattr(data, "MAX_OPEN_SHARDS", 3)
    batches = open_batches(data_config(tmp_path / "a"), tmp_path)
    for step in steps:
        assert tokens_of([batches.next_step()]) == tokens_of([step])
    assert 0 < n_open() <= 4
    batches.close()
    assert n_open() == 0
    assert tokens_of([batches.next_step()])  # it can be started again


def test_mixture_of_real_sources(tmp_path, small_windows):
    sources = [write_source(tmp_path / name, n, seed=n)["train"] for name, n in (("a", 60), ("b", 30))]
    config = data_config(
        SourceConfig(path=str(tmp_path / "a"), weight=1.0), SourceConfig(path=str(tmp_path / "b"), weight=2.0)
    )
    batches = open_batches(config, tmp_path, global_batch_size=90, micro_batch_size=90)
    a, b = ({tuple(row) for row in rows[:, :-1].tolist()} for rows in sources)
    used = Counter()
    for _ in range(2):
        rows = [tuple(row) for row in tokens_of([batches.next_step()])]
        assert sum(row in a for row in rows) == 30 and sum(row in b for row in rows) == 60
        used.update(rows)
    assert all(used[row] == 1 for row in a) and all(used[row] == 4 for row in b)


# --- validation


@pytest.mark.parametrize(("n_rows", "n_expected"), [(10, 10), (1000, 23)])
def test_validation_rows_do_not_depend_on_ranks(tmp_path, n_rows, n_expected):
    rows = [write_source(tmp_path / name, 20, n, seed=n)["valid"] for name, n in (("a", 16), ("b", 7), ("c", 0))]
    config = data_config(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    expected = None
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
        assert expected is None or seen == expected
        expected = seen
    a, b = ({tuple(row) for row in values[:, :-1].tolist()} for values in rows[:2])
    from_a = sum(tuple(row) in a for row in expected.values())
    assert from_a + sum(tuple(row) in b for row in expected.values()) == n_expected
    assert abs(from_a - n_expected * 16 / 23) <= 1  # each source is there from the start


def test_no_validation_rows(tmp_path):
    write_source(tmp_path / "a", 20)
    with pytest.raises(UserError, match=r"none of data.sources has rows in its valid split.*evaluate.every_steps=null"):
        open_batches(data_config(tmp_path / "a"), tmp_path, split="valid")


# --- what users get wrong


def test_missing_folder_split_and_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"no such folder: .*nowhere"):
        open_batches(data_config(tmp_path / "nowhere"), tmp_path)
    write_source(tmp_path / "a", 0, 20)
    with pytest.raises(UserError, match=r"a has no rows in its train split: prepare it again"):
        open_batches(data_config(tmp_path / "a"), tmp_path)
    write_source(tmp_path / "b", 20)
    (tmp_path / "other.model").write_bytes(b"another")
    with pytest.raises(UserError, match=r"other.model is not the tokenizer that .*b was prepared with"):
        open_batches(data_config(tmp_path / "b", tokenizer=tmp_path / "other.model"), tmp_path)
    shutil.rmtree(tmp_path / "b/train")
    with pytest.raises(UserError, match=r"b: cannot read train/index.json after 1 attempts \(FileNotFoundError"):
        open_batches(data_config(tmp_path / "b"), tmp_path)
    (tmp_path / "b/manifest.json").unlink()
    with pytest.raises(UserError, match=r"b: cannot read manifest.json after 1 attempts"):
        open_batches(data_config(tmp_path / "b"), tmp_path)


def test_manifest_that_does_not_fit(tmp_path):
    write_source(tmp_path / "a", 20)
    edit_manifest(tmp_path / "a", splits={"train": {"rows": 21}})
    with pytest.raises(UserError, match=r"train/index.json has 20 rows but manifest.json says 21: the copy is incompl"):
        open_batches(data_config(tmp_path / "a"), tmp_path)
    write_source(tmp_path / "b", 20)
    edit_manifest(tmp_path / "b", pad_id=4)
    write_source(tmp_path / "c", 20)
    with pytest.raises(UserError, match=r"\(bos_id, eos_id, pad_id\) differ: \[\(1, 2, 0\), \(1, 2, 4\)\]"):
        open_batches(data_config(tmp_path / "b", tmp_path / "c"), tmp_path)
    (tmp_path / "c/manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"c/manifest.json lacks \['bos_id', 'eos_id'"):
        open_batches(data_config(tmp_path / "c"), tmp_path)


def test_rows_of_another_width(tmp_path):
    write_source(tmp_path / "a", 20, t=8)
    with pytest.raises(
        UserError, match=r"are \{'tokens': 'ndarray:uint16:9'\}, but data.seq_len=16 needs .*uint16:17'"
    ):
        open_batches(data_config(tmp_path / "a"), tmp_path)


def damage(path):
    """Flip one bit in a row."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["bit", "short", "missing"])
def test_a_damaged_shard_is_named_and_the_error_stays(tmp_path, how):
    write_source(tmp_path / "a", 50)
    shard = tmp_path / "a/train/shard.00000.mds"
    if how == "bit":
        damage(shard)
    elif how == "short":
        shard.write_bytes(shard.read_bytes()[:-5])
    else:
        shard.unlink()
    batches = open_batches(data_config(tmp_path / "a"), tmp_path, global_batch_size=50)
    message = "cannot read this shard" if how == "missing" else "damaged shard: its size or hash is not what"
    for _ in range(2):
        with pytest.raises(UserError, match=rf"train/shard.00000.mds: {message}"):
            batches.next_step()


def test_cache_limit(tmp_path, small_windows):
    write_source(tmp_path / "a", 500)
    for limit, message in (("many", "'many' is not a number of bytes such as 200gb"), ("1kb", "is too small: two")):
        with pytest.raises(UserError, match=f"data.cache_limit=.*{message}"):
            open_batches(data_config(f"file://{tmp_path / 'a'}", cache_limit=limit), tmp_path / "cache")


def test_no_progress_is_an_error_not_a_hang(tmp_path):
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


# --- remote sources


class Bucket(BaseHTTPRequestHandler):
    """S3 over a folder: /bucket/key. `fail` names keys and how often they fail; `stall` sends half a file and waits."""

    def do_HEAD(self):
        self.reply(with_body=False)

    def do_GET(self):
        self.reply(with_body=True)

    def reply(self, with_body):
        server, key = self.server, self.path.split("?")[0].split("/", 2)[2]
        path = server.folder / key
        if with_body:
            server.gets[key] += 1
        how = server.fail.get(key, 0)
        server.fail[key] = how - 1
        if how > 0 or not path.is_file():
            self.send_response(500 if how > 0 else 404)
            self.end_headers()
            return
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", '"x"')
        self.end_headers()
        if with_body and key in server.stall:
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            server.stalled.set()
            server.resume.wait(60)
        elif with_body:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    server.daemon_threads = True
    server.folder, server.gets, server.fail, server.stall = tmp_path / "bucket", Counter(), {}, set()
    server.stalled, server.resume = threading.Event(), threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    environment = {
        "S3_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1",
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    yield server
    server.resume.set()
    close_all()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def waits(monkeypatch):
    """The seconds that were to pass before another attempt, which do not pass."""
    seconds = []
    monkeypatch.setattr(data, "time", SimpleNamespace(**vars(time) | {"sleep": seconds.append}))
    return seconds


def s3_config(bucket, *keys, **options):
    sources = [SourceConfig(path=f"s3://bucket/{key}") for key in keys]
    return data_config(*sources, tokenizer=bucket.folder / keys[0] / "tokenizer.model", **options)


def test_remote_equals_local_and_downloads_each_shard_once(tmp_path, bucket):
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


def test_downloads_are_tried_again_a_bounded_number_of_times(tmp_path, bucket, waits, caplog):
    write_source(bucket.folder / "a", 10)
    bucket.fail = {"a/manifest.json": 1, "a/train/index.json": 1, "a/train/shard.00000.mds": 1}
    config = s3_config(bucket, "a", download_retries=1)
    assert len(tokens_of([open_batches(config, tmp_path / "cache").next_step()])) == 8
    assert waits == [1, 1, 1]
    said = [record.getMessage() for record in caplog.records if record.name == "megakexue"]
    assert [line.split(" failed (")[0] for line in said] == [
        f"data source s3://bucket/a: attempt 1 of 2 to read {what}"
        for what in ("manifest.json", "train/index.json", "train/shard.00000.mds")
    ]
    assert all("500" in line and line.endswith("); tries again in 1 s") for line in said)
    waits.clear()
    options = {"tokenizer": bucket.folder / "a/tokenizer.model", "download_retries": 4, "download_timeout_s": 5}
    with pytest.raises(UserError, match=r"data source s3://bucket/none: cannot read manifest.json after 5 attempts"):
        open_batches(data_config("s3://bucket/none", **options), tmp_path / "c")
    assert waits == [1, 2, 4, 5]  # longer each time, up to the timeout

    bucket.fail = {"a/train/shard.00000.mds": 10**6}
    batches = open_batches(config, tmp_path / "another")
    with pytest.raises(
        UserError, match=r"data source s3://bucket/a: cannot read train/shard.00000.mds after 2 attempts"
    ):
        batches.next_step()
    with pytest.raises(UserError, match=r"cannot read manifest.json after 1 attempts \(ValueError: Unsupported remote"):
        open_batches(
            data_config("ftp://a/b", tokenizer=bucket.folder / "a/tokenizer.model", download_retries=0), tmp_path
        )


def test_a_download_that_stalls_has_a_deadline(tmp_path, bucket):
    write_source(bucket.folder / "a", 10)
    bucket.stall = {"a/train/shard.00000.mds"}
    batches = open_batches(s3_config(bucket, "a", download_retries=1, download_timeout_s=1), tmp_path / "cache")
    began = time.monotonic()
    with pytest.raises(UserError, match=r"(no progress for \d+ s at|cannot read) .*train/shard.00000.mds"):
        batches.next_step()
    assert time.monotonic() - began < 10  # two attempts of a second each, and as much again
    # and whoever waits for it can be called away
    batches = open_batches(s3_config(bucket, "a"), tmp_path / "another")
    batches.is_interrupted = lambda: True
    with pytest.raises(data.Interrupted):
        batches.next_step()
    assert batches.position == data.Position()


def test_a_damaged_shard_is_never_trusted(tmp_path, bucket, waits):
    write_source(bucket.folder / "a", 10)
    config = s3_config(bucket, "a")
    expected = tokens_of([open_batches(config, tmp_path / "cache").next_step()])
    (cached,) = (tmp_path / "cache/shards").rglob("*.mds")
    damage(cached)
    assert tokens_of([open_batches(config, tmp_path / "cache").next_step()]) == expected
    assert bucket.gets["a/train/shard.00000.mds"] == 2  # it was downloaded again

    damage(bucket.folder / "a/train/shard.00000.mds")
    batches = open_batches(config, tmp_path / "another")
    with pytest.raises(UserError, match=r"shard.00000.mds after 2 attempts \(OSError: damaged: its size"):
        batches.next_step()
    assert not list((tmp_path / "another/shards").rglob("*.mds"))


def test_a_good_copy_is_not_discarded_in_place_of_the_damaged_one_before_it(tmp_path, bucket, caplog, monkeypatch):
    write_source(bucket.folder / "a", 10)
    source, another, third = (open_batches(s3_config(bucket, "a"), tmp_path / "cache").sources[0] for _ in range(3))
    path = source.fetch(0)
    damage(path)
    is_intact = data.is_intact

    def is_slowly_intact(file, shard):
        """While the damage is found, another process finds it as well, and downloads the shard again."""
        monkeypatch.setattr(data, "is_intact", is_intact)
        verdict = is_intact(file, shard)
        os.close(another.open(0))
        return verdict

    monkeypatch.setattr(data, "is_intact", is_slowly_intact)
    for opened in (source, third):
        os.close(opened.open(0))
    assert bucket.gets["a/train/shard.00000.mds"] == 2
    assert [record.getMessage() for record in caplog.records if record.name == "megakexue"] == [
        f"{path}: this copy in the cache is damaged; it is downloaded again"
    ]


def test_the_cache_stays_within_its_limit(tmp_path, bucket, small_windows):
    write_source(bucket.folder / "a", 480)
    shards = list((bucket.folder / "a/train").glob("*.mds"))
    assert len(shards) > 9
    limit = 6 * 2000
    config = s3_config(bucket, "a", cache_limit=str(limit), n_prefetch=1)
    batches = open_batches(config, tmp_path / "cache", global_batch_size=16)
    local = open_batches(data_config(bucket.folder / "a"), tmp_path, global_batch_size=16)
    for _ in range(45):  # one and a half epochs
        assert tokens_of([batches.next_step()]) == tokens_of([local.next_step()])
        used = sum(path.stat().st_size for path in (tmp_path / "cache/shards").rglob("*.mds") if path.exists())
        assert used <= limit + 2 * 2000
    downloads = sum(n for key, n in bucket.gets.items() if key.endswith(".mds"))
    # an epoch needs every shard, and a shard that was evicted has to come again
    assert len(shards) < downloads < 4 * len(shards)


def test_the_next_window_is_downloaded_ahead(tmp_path, bucket, small_windows):
    write_source(bucket.folder / "a", 400, size_limit=500)  # 4 rows a shard, 24 rows a window
    batches = open_batches(s3_config(bucket, "a", n_prefetch=1), tmp_path / "cache", global_batch_size=2)
    batches.next_step()
    wanted, read = (
        {batches.locate(Position(sample=k)).split("/")[-1].split(" ")[0] for k in range(n)}
        for n in (batches.order.window_starts[2], 8)
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


def test_compressed_shards_go_through_the_cache(tmp_path):
    rows = write_source(tmp_path / "a", 40, compression="zstd")["train"]
    before = sorted(path for path in (tmp_path / "a").rglob("*"))
    batches = open_batches(data_config(tmp_path / "a"), tmp_path / "cache", global_batch_size=40)
    assert sorted(tokens_of([batches.next_step()])) == sorted(rows[:, :-1].tolist())
    assert sorted(path for path in (tmp_path / "a").rglob("*")) == before


# --- several processes


def gather_steps(folder, cache):
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
def test_two_ranks_in_two_processes_share_a_cache(tmp_path):
    write_source(tmp_path / "a", 100)
    local = open_batches(data_config(tmp_path / "a"), tmp_path)
    expected = [tokens_of([local.next_step()]) for _ in range(20)]
    first, second = run_on_ranks(2, gather_steps, str(tmp_path / "a"), str(tmp_path / "cache"), timeout_s=120)
    assert first == second == expected


CHILD = """
import sys
from tests.test_data import data_config, open_batches, tokens_of
from pathlib import Path
folder, path, cache, rank = sys.argv[1:]
config = data_config(path, tokenizer=folder + "/tokenizer.model")
batches = open_batches(config, cache, rank=int(rank), world_size=2)
while True:
    print(tokens_of([batches.next_step()]), flush=True)
"""


@pytest.mark.slow
def test_killed_ranks_leave_nothing_that_stops_the_next_start(tmp_path, bucket):
    write_source(bucket.folder / "a", 400)
    config = s3_config(bucket, "a")
    local = open_batches(data_config(bucket.folder / "a"), tmp_path)
    expected = [tokens_of([local.next_step()]) for _ in range(60)]
    bucket.stall = {"a/train/shard.00003.mds"}  # whoever downloads it holds its lock when it is killed
    shared_memory = set(os.listdir("/dev/shm"))
    arguments = [str(bucket.folder / "a"), "s3://bucket/a", str(tmp_path / "cache")]
    ranks = [
        subprocess.Popen([sys.executable, "-c", CHILD, *arguments, str(rank)], stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    try:
        assert bucket.stalled.wait(300)  # starting takes each 9 s of CPU time, whatever else the machine does
        time.sleep(0.5)
    finally:
        for process in ranks:
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
    assert list((tmp_path / "cache/tmp").iterdir())  # they were killed in the middle
    bucket.stall = set()
    bucket.resume.set()
    # two runs at once start over in what they left
    restarted = [open_batches(config, tmp_path / "cache") for _ in range(2)]
    for step in expected:
        for batches in restarted:
            assert tokens_of([batches.next_step()]) == step
    assert set(os.listdir("/dev/shm")) <= shared_memory


# --- speed


def test_reading_is_far_faster_than_training(tmp_path):
    def long_rows(n, rng, t):
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
