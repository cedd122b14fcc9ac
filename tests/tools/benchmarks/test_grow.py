"""The benchmark of growth: mistakes without torch, and tiny_gqa into tiny_grown."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.programs import run_without_torch

PROGRAM = ROOT / "tools" / "benchmarks" / "grow.py"
CONFIGS = [str(ROOT / "configs" / f"{name}.yaml") for name in ("tiny_gqa", "tiny_grown")]


def test_mistakes(tmp_path: Path) -> None:
    ((code, _, err),) = run_without_torch(PROGRAM, [[*CONFIGS, "--scratch", str(tmp_path)]])
    assert code == 2 and err.endswith("exists: name a folder to be made and removed\n")


@pytest.mark.slow
def test_it_measures_and_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), *CONFIGS, "--scratch", str(tmp_path / "scratch")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\ngrow: \d+ s, peak [\d.]+ GiB resident\noutput 0.02 GiB, largest tensor 0.00 GiB", done.stdout)
    assert not (tmp_path / "scratch").exists()
