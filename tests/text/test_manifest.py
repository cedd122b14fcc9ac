"""The manifest of prepared data: what does not fit the config, and what is no manifest."""

import json
from pathlib import Path

import pytest

from megakexue.config import UserError
from megakexue.text.manifest import check_inputs, read_manifest
from megakexue.text.tokenizer import SentencePiece
from tests.conftest import Prepared
from tests.helpers import n_rows, tiny_config


def test_inputs_that_do_not_fit(prepared: Prepared, tmp_path: Path) -> None:
    assert check_inputs(tiny_config(prepared, tmp_path)) == [n_rows(prepared)]
    other = tmp_path / "tokenizer.model"
    other.write_bytes(b"another")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "manifest.json").write_text("{")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "manifest.json").write_text("{}")
    for overrides, message in {
        f"data.tokenizer={tmp_path}/none": "no such file; train one with tools/train_tokenizer.py",
        f"data.tokenizer={other}": "is not the tokenizer that",
        f"data.sources=[{{path: {tmp_path}}}]": "has no manifest.json: make the folder with tools/prepare_data.py",
        f"data.sources=[{{path: {broken}}}]": "cannot read the manifest of prepared data",
        f"data.sources=[{{path: {empty}}}]": "prepare the data again",
        "data.seq_len=128": "data.seq_len=128 does not divide the rows of",
        f"data.sources=[{{path: {prepared.data}, synthetic: true}}]; data.max_synthetic=0.5": "the synthetic sources "
        f"have a share of 1 ({prepared.data.name} 1)",
        "model.vocab_size=300": "model.vocab_size=300 is below the 512 pieces of the tokenizer",
    }.items():
        with pytest.raises(UserError) as error:
            check_inputs(tiny_config(prepared, tmp_path, *overrides.split("; ")))
        assert message in str(error.value)


def test_a_manifest_is_read_as_it_was_written(prepared: Prepared) -> None:
    manifest = read_manifest(prepared.data)
    tokenizer = SentencePiece(prepared.tokenizer)
    assert manifest.tokenizer_sha256 == tokenizer.sha256 and manifest.vocab_size == tokenizer.vocab_size == 512
    assert (manifest.bos_id, manifest.eos_id, manifest.pad_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    assert manifest.seq_len == prepared.seq_len
    rows = json.loads((prepared.data / "train" / "index.json").read_text())["shards"]
    assert manifest.n_rows("train") == sum(shard["samples"] for shard in rows) > 0
    assert manifest.n_rows("test") == 0


def test_what_is_no_manifest_is_named(prepared: Prepared, tmp_path: Path) -> None:
    written = json.loads((prepared.data / "manifest.json").read_text())
    copy = tmp_path / "manifest.json"
    copy.write_text(json.dumps({key: value for key, value in written.items() if key not in ("pad_id", "splits")}))
    with pytest.raises(UserError) as error:
        read_manifest("s3://bucket/a", copy)
    assert str(error.value) == "s3://bucket/a/manifest.json lacks ['pad_id', 'splits']: prepare the data again"
    copy.write_text(json.dumps(written | {"seq_len": "long"}))
    with pytest.raises(UserError, match=r"a/manifest\.json: seq_len=long must be a whole number"):
        read_manifest("s3://bucket/a", copy)
    rows = r"splits: rows must be whole numbers, not \['5'\]: prepare the data again"
    for spoilt, said in {"[]": r"splits=\[\] must be pairs", '{"train": {"rows": "5"}}': rows}.items():
        copy.write_text(json.dumps(written | {"splits": json.loads(spoilt)}))
        with pytest.raises(UserError, match=said):
            read_manifest("s3://bucket/a", copy)
    copy.write_text('{"splits": ' + "[" * 100_000)
    with pytest.raises(UserError, match="cannot read the manifest of s3://bucket/a: it is nested too deeply"):
        read_manifest("s3://bucket/a", copy)
    copy.write_text("[]")
    with pytest.raises(UserError, match="the manifest of s3://bucket/a must be a JSON object"):
        read_manifest("s3://bucket/a", copy)
