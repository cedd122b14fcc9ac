"""The shards are byte for byte those of streaming's own writer."""

from pathlib import Path

import numpy as np
import pytest

from megakexue.text import shards as module
from megakexue.text.shards import ShardWriter


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_shards_are_those_of_mds_writer(dtype: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from streaming import MDSWriter

    monkeypatch.setattr(module, "SHARD_BYTES", 3000)
    rows: np.ndarray = np.arange(100 * 33, dtype=dtype).reshape(100, 33)
    writer = ShardWriter(tmp_path / "ours", 33, np.dtype(dtype))
    for start, stop in ((0, 1), (1, 70), (70, 70), (70, 100)):
        writer.write(rows[start:stop])
    writer.finish()
    columns = {"tokens": f"ndarray:{np.dtype(dtype).name}:33"}
    with MDSWriter(columns=columns, out=str(tmp_path / "theirs"), hashes=["xxh64"], size_limit=3000) as theirs:
        for row in rows:
            theirs.write({"tokens": row})
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert len(names) > 3
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == names
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name
