"""The figures of one line against what they must be by arithmetic."""

import subprocess
import sys

import pytest

from tests.helpers import ROOT

TOOL = ROOT / "tools" / "benchmarks" / "memory.py"


@pytest.mark.slow
def test_stage_1_holds_and_sends_what_arithmetic_says() -> None:
    arguments = ["--stages", "1", "--dtypes", "bf16", "--accumulate", "momentum", "--micro-batches", "2"]
    run = subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    header, row = ([cell.strip() for cell in line.split("|")] for line in run.stdout.splitlines()[2:5:2])
    cells = dict(zip(header, row))
    # bf16 weights, and of masters and momentum in fp32 a half
    assert float(cells["held"]) == pytest.approx(2 + (4 + 4) / 2, abs=0.01)
    # all whole gradients in bf16, before they are reduced
    assert 8 < float(cells["peak in backward"]) < 10
    # a reduction for each micro-batch, a gathering for the step
    assert float(cells["sent: all"]) == pytest.approx(2 * 2 + 2, abs=0.01)


def test_no_micro_batches_is_an_error() -> None:
    run = subprocess.run([sys.executable, TOOL, "--micro-batches", "0"], capture_output=True, text=True)
    assert run.returncode == 2 and "--micro-batches 0 must be at least 1" in run.stderr
