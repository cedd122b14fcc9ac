"""The benchmark of generation: mistakes, and rounds on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.programs import run_without_torch

PROGRAM = ROOT / "tools" / "benchmarks" / "decode.py"
SIZES = "--d-model 32 --n-layers 2 --n-heads 4 --n-kv-heads 2 --d-ff 48 --vocab-size 64 --rows 2".split()


def test_mistakes(tmp_path: Path) -> None:
    commands = [["--rounds", "0"], ["--prompt", "0"], ["--json", str(tmp_path / "no" / "a.json")]]
    messages = ["--rounds 0 must be positive", "--prompt 0 must be positive", "there is no folder"]
    for (code, _, err), message in zip(run_without_torch(PROGRAM, commands), messages, strict=True):
        assert code == 2 and message in err


@pytest.mark.slow
def test_two_rounds(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), *SIZES, "--rounds", "2", "--prompt", "4", "--n-tokens", "5"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command += ["--json", str(tmp_path / "decode.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "decode.json").read_text())
    assert numbers["seconds"].keys() == {
        f"{who}, {how}" for who in ("ours", "transformers") for how in ("greedy", "drawn")
    }
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in numbers["seconds"].values())
    assert len(numbers["ratios"]) == 3
