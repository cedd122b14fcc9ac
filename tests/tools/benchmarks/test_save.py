"""The benchmark of saving: mistakes without torch, and a round on a tiny model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.programs import run_without_torch

PROGRAM = ROOT / "tools" / "benchmarks" / "save.py"
TINY = str(ROOT / "configs" / "tiny_gqa.yaml")


def test_mistakes(tmp_path: Path) -> None:
    ends = run_without_torch(PROGRAM, [[TINY, "--rounds", "0"], [TINY, "--out", str(tmp_path)]])
    for (code, _, err), words in zip(
        ends, ("--rounds 0 must be positive", "exists: choose another folder, which is made and removed")
    ):
        assert code == 2 and err.startswith("error: ") and words in err


@pytest.mark.slow
def test_a_round(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), TINY, "data.seq_len=16", "--rounds", "1", "--out", str(tmp_path / "out")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 ranks, ZeRO-1, 0.0147 GB on the first" in done.stdout
    assert re.search(r"\nstands still: [\d.e+]+ % of a save at once", done.stdout)
    assert not (tmp_path / "out").exists()
