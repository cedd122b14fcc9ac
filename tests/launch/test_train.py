"""The program that a launcher starts: which rank says what is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

TINY = str(ROOT / "configs" / "tiny_gqa.yaml")


@pytest.mark.parametrize(
    ("arguments", "speakers"),
    [
        ([TINY, "optim.lr=-1"], [0]),
        ([TINY, "data.tokenizer=none"], [0, 2]),  # the disk of each node may lack it
        (["none.yaml"], [0, 2]),
    ],
)
def test_a_mistake_is_one_line_of_the_first_rank(arguments: list[str], speakers: list[int], tmp_path: Path) -> None:
    for rank in range(4):  # two nodes of two ranks
        environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank % 2), "WORLD_SIZE": "4"}
        command = [sys.executable, str(ROOT / "launch" / "train.py"), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == (rank in speakers) and done.stderr.startswith("error: " * (rank in speakers))
