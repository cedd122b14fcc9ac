"""The program that a launcher starts: which rank says what is wrong."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megakexue.launcher import PATIENCE_S
from tests.helpers import ROOT

TINY = str(ROOT / "configs" / "tiny_gqa.yaml")


@pytest.mark.parametrize(
    ("arguments", "waits"),
    [
        ([TINY, "optim.lr=-1"], True),  # the first rank says it, and a launcher would end the others meanwhile
        ([TINY, "data.tokenizer=none"], False),  # the disk of each node may lack it
        (["none.yaml"], False),
    ],
)
def test_a_mistake_is_one_line_of_the_first_rank(arguments: list[str], waits: bool, tmp_path: Path) -> None:
    launcher = {"WORLD_SIZE": "4", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for rank in (0, 1, 2):  # of two nodes of two ranks
        environment = os.environ | launcher | {"RANK": str(rank), "LOCAL_RANK": str(rank % 2)}
        command = [sys.executable, str(ROOT / "launch" / "train.py"), *arguments]
        began = time.monotonic()
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        speaks = rank % 2 == 0
        assert done.stderr.count("\n") == speaks and done.stderr.startswith("error: " * speaks)
        assert not (waits and rank == 2) or time.monotonic() - began >= PATIENCE_S
