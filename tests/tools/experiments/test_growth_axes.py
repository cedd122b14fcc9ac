"""The picture of what growth does to weights."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import ROOT
from tests.programs import run_without_torch

PROGRAM = ROOT / "tools" / "experiments" / "growth_axes.py"


def test_mistakes(tmp_path: Path) -> None:
    (tmp_path / "there.png").touch()
    cases = {"a.jpg": "must end in .png", "there.png": "exists: choose another name or add --overwrite"}
    ends = run_without_torch(PROGRAM, [["--out", str(tmp_path / name)] for name in cases])
    for (code, _, err), message in zip(ends, cases.values(), strict=True):
        assert code == 2 and message in err


@pytest.mark.slow
def test_the_picture_is_that_of_the_documentation(tmp_path: Path) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    command = [sys.executable, "-W", "error", str(PROGRAM), "--out", str(tmp_path / "axes.png")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    drawn, shown = plt.imread(tmp_path / "axes.png"), plt.imread(ROOT / "docs" / "growth_axes.png")
    assert drawn.shape == shown.shape
    # fonts and versions of matplotlib differ between machines; the weights do not
    assert np.mean(np.abs(drawn - shown) > 0.1) < 0.02
