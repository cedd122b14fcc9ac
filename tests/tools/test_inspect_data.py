"""What the program says of prepared data is what was prepared: borders, lengths, near-empty and repeated documents."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Prepared
from tests.helpers import ROOT
from tools.inspect_data import parts_of, whole_documents

BOS, EOS, PAD = 1, 2, 3


def run_tool(name: str, *options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / "tools" / name, *map(str, options)], capture_output=True, text=True)


def cut(row: list[int], *, bos: int = BOS, eos: int = EOS, pad: int = PAD) -> list[tuple[list[int], bool, bool]]:
    return [(part.tokens.tolist(), part.begins, part.ends) for part in parts_of(np.array(row), bos, eos, pad)]


def test_a_row_is_cut_where_documents_begin() -> None:
    assert cut([8, EOS, BOS, 9, EOS, BOS, 7, 6, PAD, PAD]) == [
        ([8, EOS], False, True), ([BOS, 9, EOS], True, True), ([BOS, 7, 6], True, False),
    ]  # fmt: skip
    # one mark for both: of two in a row, the first ends a document and the second begins one
    assert cut([8, 2, 2, 9, 2], bos=2) == [([8, 2], False, True), ([2, 9, 2], True, True)]
    # and for padding too
    assert cut([8, 2, 2, 9, 2, 2, 2], bos=2, pad=2)[:2] == [([8, 2], False, True), ([2, 9, 2], True, True)]


def test_documents_are_put_together_from_rows_that_follow_one_another() -> None:
    stream = [BOS, 5, 6, 7, 8, 9, EOS, BOS, 4, EOS, BOS, 5]
    rows = [stream[i : i + 4] for i in range(0, 9, 3)]
    parts = [(i, parts_of(np.array(row), BOS, EOS, PAD)) for i, row in enumerate(rows)]
    found = [(row, document.tolist()) for row, document in whole_documents(iter(parts), is_stream=True)]
    assert found == [(0, [BOS, 5, 6, 7, 8, 9, EOS]), (2, [BOS, 4, EOS])]
    # rows of best_fit do not go on in the next one
    assert [row for row, _ in whole_documents(iter(parts), is_stream=False)] == [2]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_the_program(prepared: Prepared, tmp_path: Path, packing: str) -> None:
    texts = {"a": "one text\nof two lines, which is a little longer", "b": "tiny", "c": "the third text is here"}
    for name, own in (("first", "abc"), ("second", "c")):
        (tmp_path / "text" / name).mkdir(parents=True)
        for key in own:
            (tmp_path / "text" / name / f"{key}.txt").write_text(texts[key])
        options = ["--tokenizer", prepared.tokenizer, "--seq-len", 64, "--packing", packing, "--valid-fraction", 0]
        done = run_tool("prepare_data.py", tmp_path / "text" / name, *options, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
    done = run_tool("inspect_data.py", tmp_path / "first", tmp_path / "second", "--near-empty", 6, "--full")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    said = done.stdout
    assert "of 3 whole documents" in said and "of 1 whole documents" in said
    assert "1 documents of fewer than 6 tokens (33.33%)\n               tiny\n" in said
    assert (
        f"1 documents that came before, here or in a folder above (100.00%)\n               {tmp_path}/first row"
        in said
    )
    assert "[] one text\\nof two lines, which is a little longer\n" in said
    done = run_tool("inspect_data.py", tmp_path / "first", "--split", "valid")
    assert done.returncode == 2 and f"{tmp_path}/first has no rows of the split valid" in done.stderr
    assert "padding" in said and "bytes/token" in said.splitlines()[1]


def test_mistakes(prepared: Prepared, tmp_path: Path) -> None:
    done = run_tool("inspect_data.py", prepared.data, "--row", 10**9)
    assert done.returncode == 2 and "--row 1000000000: " in done.stderr and "has the rows 0 to" in done.stderr
    done = run_tool("inspect_data.py", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    done = run_tool("inspect_data.py", prepared.data, "--near-empty", -1)
    assert done.returncode == 2 and done.stderr == "error: --near-empty -1 must be at least 0\n"
    done = run_tool("inspect_data.py", "s3://bucket/data")
    assert done.returncode == 2 and "name a local folder" in done.stderr
