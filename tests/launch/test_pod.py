"""The ranks of one node: their places, one exit code for all of them, and SIGTERM."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Popen
from tests.helpers import ROOT

# Each rank ends as the argument with its number on the node says.
PROGRAM = r"""
import os, signal, sys, time
def say(*words):
    os.write(1, (" ".join(words) + "\n").encode())  # at once, or lines of two ranks mix
say("place", *(os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")))
end = sys.argv[1:][int(os.environ["LOCAL_RANK"])]
if end.isdecimal():
    sys.exit(int(end))
if end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if end == "save":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
if end == "hang":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
say("listening")
time.sleep(100)
"""


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """The folder of pod.py, with less patience, and of what its ranks run.

    Written once for all cases: a rank that starts while its program is written again runs an empty one.
    """
    text = (ROOT / "launch" / "pod.py").read_text()
    assert "PATIENCE_S = 60.0\n" in text
    (tmp_path / "pod.py").write_text(text.replace("PATIENCE_S = 60.0\n", "PATIENCE_S = 2.0\n"))
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path


def start(popen: Popen, folder: Path, *ends: str, index: str = "1") -> subprocess.Popen[str]:
    command = [sys.executable, "pod.py", "--nodes=3", f"--ranks={len(ends)}", "program.py", *ends]
    environment = os.environ | {"JOB_COMPLETION_INDEX": index, "PYTHONPATH": str(ROOT)}
    return popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_one_exit_code_for_the_ranks_of_a_node(programs: Path, popen: Popen) -> None:
    cases = {
        "0 0": 0, "75 75": 75, "2 2": 2, "75 1": 1, "0 75": 1, "75 2": 2, "1 2": 2, "kill 2": 2, "kill kill": 1,
        "1 hang": 1, "2 hang": 2, "save save": 75, "save hang": 1, "save early": 75,
    }  # fmt: skip
    for signalled in (False, True):
        chosen = {ends: code for ends, code in cases.items() if ends.startswith("save") == signalled}
        running = {ends: start(popen, programs, *ends.split()) for ends in chosen}
        for ends, process in running.items():
            assert process.stdout is not None
            said = ""
            while signalled and said.count("listening") < 2:
                said += process.stdout.readline()
            if signalled:
                process.send_signal(signal.SIGTERM)
            said += process.communicate(timeout=60)[0]
            assert process.returncode == chosen[ends], (ends, said)
            places = [line for line in said.splitlines() if line.startswith("place")]
            assert sorted(places) == ["place 2 6 0 2", "place 3 6 1 2"], (ends, said)


def test_a_place_that_cannot_be_is_one_line(programs: Path, popen: Popen) -> None:
    process = start(popen, programs, "0", index="3")
    assert process.communicate()[0] == (
        "error: JOB_COMPLETION_INDEX=3 must be a whole number from 0 to 2: an indexed Job sets it\n"
    )
    assert process.returncode == 2
