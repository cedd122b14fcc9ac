"""The benchmark of a step: mistakes, and a round of our arms on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.programs import run_without_torch

PROGRAM = ROOT / "tools" / "benchmarks" / "step.py"
SIZES = "--d-model 32 --n-layers 2 --n-heads 4 --n-kv-heads 2 --d-ff 48 --vocab-size 64 --seq-len 32 --rows 2".split()


def test_mistakes(tmp_path: Path) -> None:
    commands = [["--rounds", "0"], ["--documents", "1024"], ["--json", str(tmp_path / "no" / "a.json")]]
    messages = ["--rounds 0 must be positive", "--documents 1024 must fit a row of 1024 tokens", "there is no folder"]
    for (code, _, err), message in zip(run_without_torch(PROGRAM, commands), messages, strict=True):
        assert code == 2 and message in err


@pytest.mark.slow
def test_a_round(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), *SIZES, "--rounds", "2", "--documents", "3", "--dtype", "fp32"]
    command += ["--arms", "ours-eager", "--json", str(tmp_path / "step.json")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "step.json").read_text())
    arm = numbers["arms"]["ours-eager"]
    assert len(arm["seconds"]) == 2 and 0 < arm["mfu"] < arm["mfu_not_causal"] < 1
    # of fp32: q, k, v, two norms' inputs and the like, and h t / 2 weights a token
    assert 4 * 32 * 10 < arm["saved_bytes_a_token_and_layer"] < 4 * 32 * 100
    assert 3.5 < arm["first_loss"] < 5  # ln 64 = 4.2
