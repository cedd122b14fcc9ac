"""The last step of the demo: it reports, and fails where a model has not learned."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.tools.experiments.made_up import write_run

PROGRAM = ROOT / "launch" / "check_demo.py"


def check(demo: Path, loss: float, grown: float) -> subprocess.CompletedProcess[str]:
    (demo / "data").mkdir(parents=True)
    (demo / "data" / "manifest.json").write_text('{"splits": {"valid": {"unigram_entropy_nats": 6.03125}}}')
    write_run(demo / "run", [6.0, loss], loss)
    write_run(demo / "grown_run", [6.0, grown], grown)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [sys.executable, str(PROGRAM), str(demo)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_demo_that_has_learned(tmp_path: Path) -> None:
    done = check(tmp_path / "demo", 4.2, 4.1)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    baseline = "unigram entropy of the validation tokens"
    assert lines[0].startswith("$ tools/plot_run.py ") and lines[0].endswith(f" --baseline {baseline}=6.03125")
    assert f"baseline    {baseline} 6.0312: the last validation loss is 1.8312 below it" in lines
    assert (
        lines[-1] == "validation loss 4.200 nats, grown and trained on 4.100, unigram entropy of the same tokens 6.031"
    )
    assert (tmp_path / "demo" / "loss.png").exists()


@pytest.mark.parametrize(
    ("loss", "grown", "message"),
    [
        (5.55, 4.0, "the model has not learned: its validation loss is not well below the unigram entropy"),
        (4.2, 4.2, "the grown model has not learned: its validation loss is not below that of the small one"),
        (4.2, float("nan"), "the grown model has not learned"),
    ],
)
def test_a_demo_that_has_not_learned(tmp_path: Path, loss: float, grown: float, message: str) -> None:
    done = check(tmp_path / "demo", loss, grown)
    assert done.returncode == 1 and done.stderr.startswith(message)
