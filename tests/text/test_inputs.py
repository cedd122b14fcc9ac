"""Every kind of file comes back as its documents, in order; what cannot be read is refused or named."""

import gzip
import sys
from pathlib import Path

import pytest

from megakexue.config import UserError
from megakexue.text import inputs as module
from megakexue.text.prepare import prepare
from megakexue.text.tokenizer import Tokenizer
from tests.text.helpers import TEXTS, arguments, documents_in, write_lines


@pytest.mark.parametrize("name", ["a.jsonl", "a.NDJSON", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("block_bytes", [1 << 20, 1000])
def test_lines_come_back_in_order(
    name: str, block_bytes: int, model: Path, corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", block_bytes)
    write_lines(tmp_path / name, corpus, key="content")
    out = tmp_path / "out"
    manifest = prepare([str(tmp_path / name)], model, out, arguments(text_key="content"), processes=2)
    assert documents_in(out) == corpus
    assert manifest["skipped"] == {}
    assert not (out / "spool").exists()


@pytest.mark.parametrize("large", [False, True])
def test_parquet_comes_back_in_order(large: bool, model: Path, corpus: list[str], tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    texts = pyarrow.array([*corpus, None] * 40, pyarrow.large_string() if large else pyarrow.string())
    numbered = pyarrow.array([None if t is None else f"{i} {t}" for i, t in enumerate(texts.to_pylist())], texts.type)
    table = pyarrow.table({"id": list(range(len(texts))), "body": numbered})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    manifest = prepare([str(tmp_path)], model, tmp_path / "out", arguments(text_key="body"), processes=2)
    assert documents_in(tmp_path / "out") == [text for text in numbered.to_pylist() if text is not None]
    n = len(corpus) + 1
    paths = [f"{tmp_path}/a.parquet:{n * (i + 1)}" for i in range(40)]
    assert manifest["skipped"] == {"no_text": {"count": 40, "paths": paths}}


def test_text_files_in_folders_and_globs_come_back_in_order(model: Path, corpus: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "b" / "deep").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden, not read")
    (folder / ".hidden").write_text("hidden, not read")
    (folder / "z.txt.gz").write_bytes(gzip.compress(TEXTS[0].encode()))
    (folder / "a.md").write_bytes(TEXTS[1].encode())
    (folder / "b" / "c.py").write_bytes(TEXTS[2].encode())
    (folder / "b" / "deep" / "Makefile").write_bytes(TEXTS[3].encode())
    (tmp_path / "2.txt").write_bytes(TEXTS[4].encode())
    (tmp_path / "1.txt").write_bytes(TEXTS[5].encode())
    inputs = [str(tmp_path / "*.txt"), str(folder)]
    manifest = prepare(inputs, model, tmp_path / "out", arguments(), processes=1)
    assert documents_in(tmp_path / "out") == [TEXTS[i] for i in (5, 4, 1, 0, 2, 3)]
    sources = manifest["sources"]
    assert list(sources) == inputs
    assert [source["documents"] for source in sources.values()] == [2, 4]
    tokenizer = Tokenizer(model)
    for source, indices in zip(sources.values(), [(5, 4), (0, 1, 2, 3)]):
        assert source["bytes"] == sum(len(TEXTS[i].encode()) for i in indices)
        assert source["tokens"] == sum(len(tokenizer.encode(TEXTS[i])) + 2 for i in indices)


def test_zstandard_text_file(model: Path, tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    frames = [zstandard.compress(part.encode()) for part in ("two frames ", "in one file")]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(frames))
    prepare([str(tmp_path / "a.txt.zst")], model, tmp_path / "out", arguments(seq_len=4), processes=1)
    assert documents_in(tmp_path / "out") == ["two frames in one file"]


def test_a_packed_file_named_twice_is_read_twice(model: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl.gz", TEXTS)
    inputs = [str(tmp_path / "a.jsonl.gz"), str(tmp_path)]
    manifest = prepare(inputs, model, tmp_path / "out", arguments(), processes=1)
    assert documents_in(tmp_path / "out") == TEXTS
    assert [source["duplicates"] for source in manifest["sources"].values()] == [0, len(TEXTS)]


def test_a_document_that_is_too_large_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 10)
    (tmp_path / "a.txt").write_bytes(b"x" * 11)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"x" * 11))
    (tmp_path / "c.txt").write_bytes(b"x" * 10)
    read = [module.read_file(str(tmp_path / name))[1] for name in ("a.txt", "b.txt.gz", "c.txt")]
    assert read == ["too_large", "too_large", None]
    assert module.read_line(b'{"text": "12345678901"}', "text")[1] == "too_large"


def test_a_giant_line_is_an_error(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 10)
    monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 100)
    write_lines(tmp_path / "a.jsonl", ["y" * 200])
    write_lines(tmp_path / "a.jsonl.gz", ["y" * 200])
    for name in ("a.jsonl", "a.jsonl.gz"):
        with pytest.raises(UserError, match=rf"{name}: a line is above 0 MiB: shorten it"):
            prepare([str(tmp_path / name)], model, tmp_path / "out", arguments(), processes=1)
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".out*"))


def test_wrong_parquet(model: Path, tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_text("no Parquet")
    (tmp_path / "c.parquet.gz").write_text("packed twice")
    for name, key, message in [
        ("a", "text", r"no column 'text' among \['body', 'n'\]: set --text-key"),
        ("a", "n", "column 'n' holds int64, not strings: set --text-key"),
        ("b", "text", "not a readable Parquet file"),
        ("c", "text", "unpack it first; Parquet is compressed inside"),
    ]:
        path = next(str(path) for path in tmp_path.glob(f"{name}.*"))
        with pytest.raises(UserError, match=message):
            prepare([path], model, tmp_path / "out", arguments(text_key=key), processes=1)


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, package in (("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=f"{name}: to read it, pip install {package}"):
            module.check_readable(str(tmp_path / name), "text")
