"""The program reads every kind of file, says what it did, and refuses what it cannot use."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megakexue.files import sha256
from megakexue.text.tokenizer import SentencePiece
from tests.helpers import ROOT
from tests.programs import run_without_torch
from tests.text.helpers import stdlib_texts

TOOL = ROOT / "tools" / "train_tokenizer.py"


def run_tool(*arguments: object) -> str:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder, texts = tmp_path / "corpus", stdlib_texts(6)
    (folder / "deep").mkdir(parents=True)
    (folder / "deep/a.txt").write_text(texts[0], encoding="utf-8")
    (folder / "b.py.gz").write_bytes(gzip.compress(texts[1].encode()))
    (folder / "c.jsonl").write_text("".join(json.dumps({"content": text}) + "\n" for text in texts[2:4]))
    lines = "".join(json.dumps({"content": text}) + "\n\n" for text in texts[4:])
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "latin1.txt").write_bytes("é".encode("latin-1"))
    (folder / "binary").write_bytes(b"\0\1\2")
    (folder / ".hidden").write_text("hidden")
    return folder


def test_tool_reads_every_kind_of_file(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "new/t.model"
    arguments: list[object] = [
        corpus,
        "--vocab-size",
        500,
        "--kind",
        "bpe",
        "--text-key",
        "content",
        "--user-symbol",
        "<|a|>",
    ]
    said = run_tool(*arguments, "--out", out)
    tokenizer, facts = SentencePiece(out), json.loads((tmp_path / "new/t.facts.json").read_text())
    assert tokenizer.vocab_size == 500 and tokenizer.encode("<|a|>") == [4]
    assert facts["sha256"] == tokenizer.sha256
    assert facts["text_bytes"] == sum(len(text.encode()) for text in stdlib_texts(6))
    counts = {reason: entry["count"] for reason, entry in facts["skipped"].items()}
    assert counts == {"hidden": 1, "binary": 1, "not_utf8": 1, "empty": 2}
    assert f"{facts['bytes_per_token']:.3f} bytes per token" in said
    assert f"{corpus}: 6 documents kept, 0 duplicates dropped, 5 skipped" in said
    assert f"binary\t{corpus}/binary\n" in (out.parent / "t.skipped.tsv").read_text()
    assert "trainer_interface" not in said  # sentencepiece's log
    assert sorted(path.name for path in out.parent.iterdir()) == ["t.facts.json", "t.model", "t.skipped.tsv"]

    # the same text from other files, in another order, gives the same model
    everything = tmp_path / "all.jsonl"
    everything.write_text("".join(json.dumps({"content": text}) + "\n" for text in stdlib_texts(6)[::-1]))
    again = run_tool(tmp_path / "*.jsonl", *arguments[1:], "--out", tmp_path / "u.model", "--verbose")
    assert sha256(tmp_path / "u.model") == tokenizer.sha256
    assert "trainer_interface" in again


def test_tool_errors(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.model"
    size: list[object] = ["--vocab-size", 400, "--kind", "bpe"]

    def refused(*cases: tuple[list[object], str]) -> None:
        command_lines = [list(map(str, arguments)) for arguments, _ in cases]
        results = run_without_torch(TOOL, command_lines)
        for (code, _, err), (_, message) in zip(results, cases, strict=True):
            assert code == 2 and message in err, err

    (tmp_path / "bad.gz").write_bytes(gzip.compress(b"text" * 100)[:-9])
    refused(
        ([corpus / "c.jsonl", *size, "--out", out], "skipped: 2 a line or row without a string under the text key"),
        ([tmp_path / "no*", *size, "--out", out], "no such file or folder, and no file matches it"),
        ([corpus, *size, "--out", corpus / "t.model"], "lies inside an INPUT, and the next run would read it"),
        ([corpus, *size, "--out", tmp_path / "t"], "must end in .model"),
        ([tmp_path / "bad.gz", *size, "--out", out], "skipped: 1 damaged or cut short"),
        ([corpus, *size], "required: --out"),
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.gz", "corpus"]

    text = corpus / "deep/a.txt"
    out.write_bytes(b"old")
    exists = "t.model exists: choose another --out, or pass --overwrite"
    refused(
        ([text, *size, "--vocab-size", 1, "--out", out], exists),
        ([text, *size, "--out", out], exists),
        ([text, "--vocab-size", 262, "--out", out, "--overwrite"], "use at least"),
    )
    assert out.read_bytes() == b"old"
    run_tool(text, *size, "--out", out, "--overwrite")
    assert SentencePiece(out).vocab_size == 400
    assert "example:" in run_tool("--help")
