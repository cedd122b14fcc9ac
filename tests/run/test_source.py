"""Sources: what users get wrong, downloads that fail, damaged shards, and the limit of the cache."""

import errno
import fcntl
import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import megakexue.run.source as source_module
from megakexue.config import UserError
from tests.sources import Bucket, damage, data_config, edit_manifest, open_batches, s3_config, tokens_of, write_source

# streaming leaves the closing of compressed shards that it read to the garbage collector
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file .*zstd:ResourceWarning"),
    pytest.mark.usefixtures("close_batches"),
]


def test_missing_folder_split_and_tokenizer(tmp_path: Path) -> None:
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


def test_manifest_that_does_not_fit(tmp_path: Path) -> None:
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
    write_source(tmp_path / "d", 20)
    index = tmp_path / "d/train/index.json"
    for samples in ('"5"', "-1", "1e400"):
        index.write_text(re.sub(r'"samples": [^,]+', f'"samples": {samples}', index.read_text()))
        with pytest.raises(UserError, match=r"train/index.json"):
            open_batches(data_config(tmp_path / "d"), tmp_path)
    write_source(tmp_path / "e", 20)
    other, whole = tmp_path / "e/train/index.json", (tmp_path / "e/train/index.json").read_text()
    for old, new in (('"shard.00000.mds"', '"../../shard.mds"'), ('{"xxh64"', '{"md0"')):
        assert old in whole, whole
        other.write_text(whole.replace(old, new))
        with pytest.raises(UserError, match=r"train/index.json .*(is no file of its folder|the hash md0 is not known)"):
            open_batches(data_config(tmp_path / "e"), tmp_path)
    index.write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"cannot read train/index.json after 1 attempts \(RecursionError"):
        open_batches(data_config(tmp_path / "d"), tmp_path)


def test_rows_of_another_width(tmp_path: Path) -> None:
    write_source(tmp_path / "a", 20, t=8)
    with pytest.raises(UserError, match=r"data.seq_len=16 does not divide the rows of .*a \(seq_len=8\): set it to"):
        open_batches(data_config(tmp_path / "a"), tmp_path)
    manifest = tmp_path / "a" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seq_len": 8', '"seq_len": 16'))
    with pytest.raises(UserError, match=r"are \{'tokens': 'ndarray:uint16:9'\}, but seq_len=16 of .*uint16:17'"):
        open_batches(data_config(tmp_path / "a"), tmp_path)


@pytest.mark.parametrize("how", ["bit", "short", "missing"])
def test_a_damaged_shard_is_named_and_the_error_stays(tmp_path: Path, how: str) -> None:
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


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were to pass before another attempt, which do not pass."""
    seconds: list[float] = []
    monkeypatch.setattr(source_module, "time", SimpleNamespace(**vars(time) | {"sleep": seconds.append}))
    return seconds


def test_downloads_are_tried_again_a_bounded_number_of_times(
    tmp_path: Path, bucket: Bucket, waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
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
    tokenizer = bucket.folder / "a/tokenizer.model"
    missing = data_config("s3://bucket/none", tokenizer=tokenizer, download_retries=4, download_timeout_s=5)
    with pytest.raises(UserError, match=r"data source s3://bucket/none: cannot read manifest.json after 5 attempts"):
        open_batches(missing, tmp_path / "c")
    assert waits == [1, 2, 4, 5]  # longer each time, up to the timeout

    bucket.fail = {"a/train/shard.00000.mds": 10**6}
    batches = open_batches(config, tmp_path / "another")
    with pytest.raises(
        UserError, match=r"data source s3://bucket/a: cannot read train/shard.00000.mds after 2 attempts"
    ):
        batches.next_step()
    with pytest.raises(UserError, match=r"cannot read manifest.json after 1 attempts \(ValueError: Unsupported remote"):
        open_batches(data_config("ftp://a/b", tokenizer=tokenizer, download_retries=0), tmp_path)


def test_a_damaged_shard_is_never_trusted(tmp_path: Path, bucket: Bucket, waits: list[float]) -> None:
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


def test_a_good_copy_is_not_discarded_in_place_of_the_damaged_one_before_it(
    tmp_path: Path, bucket: Bucket, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(bucket.folder / "a", 10)
    source, another, third = (open_batches(s3_config(bucket, "a"), tmp_path / "cache").sources[0] for _ in range(3))
    path = source.fetch(0)
    damage(path)
    is_intact = source_module.is_intact

    def is_slowly_intact(file: int, shard: source_module.Shard) -> bool:
        """While the damage is found, another process finds it as well, and downloads the shard again."""
        monkeypatch.setattr(source_module, "is_intact", is_intact)
        verdict = is_intact(file, shard)
        os.close(another.open(0))
        return verdict

    monkeypatch.setattr(source_module, "is_intact", is_slowly_intact)
    for opened in (source, third):
        os.close(opened.open(0))
    assert bucket.gets["a/train/shard.00000.mds"] == 2
    assert [record.getMessage() for record in caplog.records if record.name == "megakexue"] == [
        f"{path}: this copy in the cache is damaged; it is downloaded again"
    ]


def test_the_cache_stays_within_its_limit(tmp_path: Path, bucket: Bucket, small_windows: None) -> None:
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


def test_compressed_shards_go_through_the_cache(tmp_path: Path) -> None:
    rows = write_source(tmp_path / "a", 40, compression="zstd")["train"]
    before = sorted(path for path in (tmp_path / "a").rglob("*"))
    batches = open_batches(data_config(tmp_path / "a"), tmp_path / "cache", global_batch_size=40)
    assert sorted(tokens_of([batches.next_step()])) == sorted(rows[:, :-1].tolist())
    assert sorted(path for path in (tmp_path / "a").rglob("*")) == before


def test_a_cache_that_cannot_be_written_or_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    write_source(tmp_path / "a", 10)
    config = data_config(f"file://{tmp_path / 'a'}")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache=.*file cannot be written: (Not a d|File e).*: choose anot"):
        open_batches(config, tmp_path / "file").next_step()

    def full(path: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"^data\.cache=\S+ cannot .*left.*: make room"):
        patch.setattr(source_module.os, "replace", full)
        open_batches(config, tmp_path / "cache").next_step()
    assert waits

    def no_locks(file: Any, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(UserError, match=r"data\.cache=.* without locks \(flock\).*: set data\.cache to a folder"):
        open_batches(config, tmp_path / "another").next_step()
