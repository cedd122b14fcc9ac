"""Models to a bucket and from it, by a server of S3's protocol; a half that was copied never looks whole."""

import runpy
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megakexue import buckets
from megakexue.bundle.bundle import Bundle
from megakexue.config import UserError
from tests.bundle.exporting import PLAIN, random_bundle
from tests.conftest import Prepared
from tests.helpers import ROOT
from tests.hf import save_model
from tests.sources import Bucket, serving


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    with serving(tmp_path / "bucket", monkeypatch) as server:
        yield server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were to pass before each attempt, which do not pass."""
    seconds: list[float] = []
    monkeypatch.setattr(buckets, "time", SimpleNamespace(**vars(time) | {"sleep": seconds.append}))
    return seconds


def run(monkeypatch: pytest.MonkeyPatch, tool: str, *arguments: Any) -> None:
    """Run a program in this process. Raises UserError, as its `main` does."""
    monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
    runpy.run_path(str(ROOT / "tools" / tool))["main"]()


def test_a_model_goes_to_a_bucket_and_comes_back(
    bucket: Bucket, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    bundle = random_bundle(prepared, tmp_path / "bundle", **PLAIN)
    out = ["s3://bucket/models/1b/", "--dtype", "fp32", "--no-check", "--shard-size", "0.0001"]
    # an upload that fails in the middle leaves no config.json
    bucket.fail = {"models/1b/model.safetensors.index.json": 10**6}
    with pytest.raises(UserError, match=r"cannot write s3://bucket/models/1b/model.safetensors.index.json in 3 attem"):
        run(monkeypatch, "export_hf.py", bundle.folder, *out)
    assert bucket.puts and "models/1b/config.json" not in bucket.puts
    with pytest.raises(UserError, match=r"cannot read s3://bucket/models/1b/config.json: .*not found"):
        run(monkeypatch, "import_hf.py", "s3://bucket/models/1b", "--out", tmp_path / "back")

    # some that fail once do not
    bucket.fail = {"models/1b/config.json": 2, "models/1b/README.md": 1}
    waits.clear()
    run(monkeypatch, "export_hf.py", bundle.folder, *out)
    assert bucket.puts[-1] == "models/1b/config.json" and 1 in waits
    shards = sorted((bucket.folder / "models/1b").glob("*.safetensors"))
    assert len(shards) > 2
    assert capsys.readouterr().out.startswith("s3://bucket/models/1b/: LlamaForCausalLM of transformers\n")
    with pytest.raises(UserError, match=r"s3://bucket/models/1b/ has a config.json: choose another name, or remove"):
        run(monkeypatch, "export_hf.py", bundle.folder, *out)

    bucket.fail = {f"models/1b/{shards[1].name}": 1}
    run(monkeypatch, "import_hf.py", "s3://bucket/models/1b", "--out", tmp_path / "back", "--no-check")
    back = Bundle(tmp_path / "back")
    assert back.lineage["source"] == "s3://bucket/models/1b" and back.tokenizer.name == "tokenizer.json"
    name = "blocks.1.feed_forward.w_down"
    assert torch.equal(back.weight(name), bundle.weight(name))


def test_one_file_of_weights_is_compared_as_a_local_one(
    bucket: Bucket, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    save_model("Qwen2", bucket.folder / "qwen", prepared.tokenizer)
    run(monkeypatch, "import_hf.py", "s3://bucket/qwen", "--out", tmp_path / "bundle")
    assert Bundle(tmp_path / "bundle").lineage["verified"]["argmax_equal"] == 1.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bucket", "bundle"]


def test_what_cannot_be_copied_is_said(bucket: Bucket, tmp_path: Path, waits: list[float]) -> None:
    bucket.fail = {"a": 10**6}
    with pytest.raises(UserError, match=r"cannot read s3://bucket/a in 3 attempts: ClientError: .*500.*the network"):
        buckets.fetch("s3://bucket/a", tmp_path / "a", may_be_absent=True)
    assert waits == [0, 1, 3] and not (tmp_path / "a").exists()
    assert not buckets.fetch("s3://bucket/b", tmp_path / "b", may_be_absent=True)
    bucket.fail["step_00040400/a"] = 10**6  # an error whose text has 404 in the path
    with pytest.raises(UserError, match=r"cannot read s3://bucket/step_00040400/a in 3 attempts: "):
        buckets.fetch("s3://bucket/step_00040400/a", tmp_path / "a", may_be_absent=True)
    for path in ("https://host/x", "hf://datasets/a/b", "s3://", "s3:///", "azure://box/a"):
        with pytest.raises(UserError, match=r" is no bucket that can be read and written: name a folder of one, such"):
            buckets.check_scheme(path)
    buckets.check_scheme("gs://bucket/models")
    assert buckets.is_remote("s3://x") and not buckets.is_remote("models/x")
