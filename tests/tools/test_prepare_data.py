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
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "bad.bin").write_bytes(b"\0")
    (folder / "a.md").write_text("text, text and text")
    (folder / "b.md").write_text("text, text and text")
    options = [folder, "--tokenizer", prepared.tokenizer, "--out", tmp_path / "new" / "out", "--seq-len", 4]
    done = run_tool(*options, "--packing", "best_fit", "--processes", 1)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "train: 1 documents, 19 bytes" in done.stdout
    train, valid, *_ = done.stdout.splitlines()  # the valid split is empty
    assert ", unigram entropy " in train and valid.endswith("0 rows of 4 + 1")
    assert "1 documents kept, 1 duplicates dropped, 1 skipped" in done.stdout
    assert f"skipped, contains a NUL byte: 1, such as {folder}/bad.bin" in done.stdout
    assert (tmp_path / "new/out/skipped.tsv").read_text() == f"binary\t{folder}/bad.bin\n"
    assert "warning: no document fell into the valid split; raise --valid-fraction" in done.stdout
    again = run_tool(*options)
    assert again.returncode == 2 and "exists: choose another, or add --overwrite" in again.stderr
    assert "Traceback" not in again.stderr
    assert run_tool(folder, "--out", "x").returncode == 2
    shown = run_tool("--help")
    assert shown.returncode == 0 and "tools/prepare_data.py notes/" in shown.stdout
