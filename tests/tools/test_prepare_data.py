"""The program: what it says, and its exit codes."""

import subprocess
import sys
from pathlib import Path

from tests.conftest import Prepared
from tests.helpers import ROOT

TOOL = ROOT / "tools" / "prepare_data.py"


def run_tool(*options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *map(str, options)], capture_output=True, text=True)


def test_the_program(prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "bad.bin").write_bytes(b"\0")
    (tmp_path / "a.md").write_text("text, text and text")
    (tmp_path / "b.md").write_text("text, text and text")
    options = [tmp_path, "--tokenizer", prepared.tokenizer, "--out", tmp_path / "new" / "out", "--seq-len", 4]
    done = run_tool(*options, "--packing", "best_fit", "--processes", 1)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "train: 1 documents, 19 bytes" in done.stdout
    train, valid, *_ = done.stdout.splitlines()  # the valid split is empty
    assert ", unigram entropy " in train and valid.endswith("0 rows of 4 + 1")
    assert "1 documents kept, 1 duplicates dropped, 1 skipped" in done.stdout
    assert f"skipped, contains a NUL byte: 1, such as {tmp_path}/bad.bin" in done.stdout
    assert "warning: no document fell into the valid split; raise --valid-fraction" in done.stdout
    again = run_tool(*options)
    assert again.returncode == 2 and "exists: choose another, or add --overwrite" in again.stderr
    assert "Traceback" not in again.stderr
    assert run_tool(tmp_path, "--out", "x").returncode == 2
    shown = run_tool("--help")
    assert shown.returncode == 0 and "tools/prepare_data.py notes/" in shown.stdout
