"""Rows by number: each is the one on disk, and few shards are open at a time."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from streaming import MDSWriter

import megakexue.run.rows as rows_module
from megakexue.core.batch import make_batch
from megakexue.run.rows import Rows
from megakexue.run.source import Source
from tests.sources import BOS, PAD, VOCAB, T, data_config, open_batches, tokens_of, write_source

pytestmark = pytest.mark.usefixtures("close_batches")


def test_rows_of_all_sources_are_numbered_shard_by_shard(tmp_path: Path) -> None:
    written = [write_source(tmp_path / name, n, seed=n, size_limit=700)["train"] for name, n in (("a", 30), ("b", 50))]
    config = data_config(tmp_path / "a", tmp_path / "b")
    sources = [Source(source, "train", config, tmp_path / "cache") for source in config.sources]
    assert min(len(source.shards) for source in sources) > 2
    rows = Rows(sources)
    for number in np.random.default_rng(0).permutation(80).tolist():
        assert rows.read(number).tolist() == np.concatenate(written)[number].tolist()
        assert rows.locate(number).startswith(f"{tmp_path}/{'a' if number < 30 else 'b'}/train/shard.")
    rows.close()
    n = sources[0].shards[0].samples
    assert rows.shards_of(np.array([79, n, 0, n - 1, 79])) == [0, 1, sum(len(s.shards) for s in sources) - 1]


def test_a_sample_can_be_found_on_disk(tmp_path: Path) -> None:
    rows = write_source(tmp_path / "a", 50)["train"]
    batches = open_batches(data_config(tmp_path / "a"), tmp_path)
    batch = batches.next_step()[1]
    for tokens, position in zip(batch.tokens.tolist(), batch.samples, strict=True):
        name, row = batches.locate(position).split(" row ")
        index = json.loads((tmp_path / "a/train/index.json").read_text())["shards"]
        before = sum(shard["samples"] for shard in index if shard["raw_data"]["basename"] < Path(name).name)
        assert Path(name).is_file() and rows[before + int(row), :-1].tolist() == tokens


def test_a_prepared_row_makes_rows_of_any_length_that_divides_it(tmp_path: Path) -> None:
    written = write_source(tmp_path / "a", 6, t=4 * T, size_limit=700)["train"]
    config = data_config(tmp_path / "a", shuffle=False)
    batches = open_batches(config, tmp_path, global_batch_size=24, micro_batch_size=24)
    assert (batches.n_rows, batches.vocab_size) == (24, VOCAB)
    (batch,) = batches.next_step()
    # each token of a prepared row is an input once, and each one after its first a target once
    assert batch.tokens.view(6, 4 * T).tolist() == written[:, :-1].tolist()
    whole = make_batch(written, [], bos_id=BOS, pad_id=PAD)
    assert torch.equal(batch.targets.view(6, -1), whole.targets) and batch.n_targets == whole.n_targets
    assert not batch.positions[:, 0].any()
    assert [batches.locate(s).split("row ")[1] for s in batch.samples[:5]] == [
        "0 part 0", "0 part 1", "0 part 2", "0 part 3", "1 part 0",
    ]  # fmt: skip
    # another length means other rows, so a position of the one means nothing in the other
    assert open_batches(data_config(tmp_path / "a", seq_len=2 * T), tmp_path).fingerprint != batches.fingerprint


def test_sources_of_different_lengths_make_one_mixture(tmp_path: Path) -> None:
    long = write_source(tmp_path / "long", 10, t=2 * T)["train"]
    short = write_source(tmp_path / "short", 30, seed=1)["train"]
    batches = open_batches(data_config(tmp_path / "long", tmp_path / "short"), tmp_path, global_batch_size=10)
    rows = [tokens for _ in range(5) for tokens in tokens_of([batches.next_step()])]
    expected = [*long[:, :-1].reshape(20, T).tolist(), *short[:, :-1].tolist()]
    assert sorted(rows) == sorted(map(tuple, expected)) or sorted(map(list, rows)) == sorted(expected)


def test_uint32_rows_and_wait_time(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    write_source(folder, 10)
    shutil.rmtree(folder / "train")
    with MDSWriter(columns={"tokens": f"ndarray:uint32:{T + 1}"}, out=str(folder / "train")) as out:
        for k in range(10):
            out.write({"tokens": np.full(T + 1, 70_000 + k, np.uint32)})
    batches = open_batches(data_config(folder), tmp_path)
    assert {token for row in tokens_of([batches.next_step()]) for token in row} <= set(range(70_000, 70_010))
    assert batches.wait_s > 0


def test_few_shards_are_open_at_a_time_and_none_after_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def n_open() -> int:
        links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        return sum(str(tmp_path) in os.readlink(link) for link in links if os.path.islink(link))

    write_source(tmp_path / "a", 200, size_limit=700)
    expected = open_batches(data_config(tmp_path / "a"), tmp_path)
    steps = [expected.next_step() for _ in range(30)]
    expected.close()
    monkeypatch.setattr(rows_module, "MAX_OPEN_SHARDS", 3)
    batches = open_batches(data_config(tmp_path / "a"), tmp_path)
    for step in steps:
        assert tokens_of([batches.next_step()]) == tokens_of([step])
    assert 0 < n_open() <= 4
    batches.close()
    assert n_open() == 0
    assert tokens_of([batches.next_step()])  # it can be started again
