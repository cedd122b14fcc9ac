"""launch/slurm.sbatch under a real Slurm of two nodes: its exit codes, and a run that is signalled and goes on."""

import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megakexue.hosts import PASSED
from tests.conftest import Prepared
from tests.helpers import ROOT, column, tiny_run
from tests.launch.conftest import N_STEPS
from tests.slurm import Slurm, two_nodes

TINY = "configs/tiny_gqa.yaml"
# In place of launch/train.py: it ends with the code that the next argument says, and `wait` with 75 after a signal.
PROGRAM = """#!/usr/bin/env bash
echo "rank $SLURM_PROCID" >>started
[ "$1" != wait ] || { trap 'exit 75' TERM USR1; while :; do sleep 0.1; done; }
n=$(grep -c "rank $SLURM_PROCID" started)
echo "left over: ${MASTER_ADDR-}${RANK-}"
env | grep "=goes to all hosts" | sort >"passed$SLURM_PROCID"
exit "${!n}"
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with two_nodes(tmp_path_factory.mktemp("slurm")) as slurm:
        yield slurm


def submit(slurm: Slurm, folder: Path, *arguments: str, log: str = "slurm-%j.out", **environment: str) -> str:
    options = ["--parsable", "--ntasks-per-node=1", "--cpus-per-task=1", f"--output={log}"]
    return slurm.run("sbatch", *options, "launch/slurm.sbatch", *arguments, cwd=folder, **environment).strip()


def test_the_exit_code_decides_what_follows(slurm: Slurm, tmp_path: Path) -> None:
    cases = {
        "7 0": ("COMPLETED", "0:0", "0", 2),  # a failure: again, in the same job
        "75 138 0": ("COMPLETED", "0:0", "2", 3),  # saved, or too early to be saved: back into the queue
        "2 0": ("FAILED", "2:0", "0", 1),
        "1 1 9 0": ("FAILED", "9:0", "0", 3),
        "wait": ("CANCELLED", "0:15", "0", 1),  # with 75, but whoever cancels a job wants its end
    }
    # the dynamic linker would look at the value, and so would Python at some
    passed = {name.replace("*", "X"): "goes to all hosts" for name in PASSED if name not in ("PATH", "LD_PRELOAD")}
    for codes, (state, exit_code, restarts, starts) in cases.items():  # one after another: each takes all nodes
        folder = tmp_path / codes.replace(" ", "_")
        (folder / "launch").mkdir(parents=True)
        shutil.copy(ROOT / "launch" / "slurm.sbatch", folder / "launch")
        (folder / "launch" / "train.py").write_text(PROGRAM)
        (folder / "launch" / "train.py").chmod(0o755)
        number = submit(slurm, folder, *codes.split(), **passed, RANK="5", MASTER_ADDR="elsewhere")
        if codes == "wait":
            wait_for_lines(folder / "started", 2)
            time.sleep(0.5)  # both listen to signals then
            slurm.run("scancel", number, cwd=folder)
        job = slurm.wait_for_end(number)
        assert (job["JobState"], job["ExitCode"], job["Restarts"]) == (state, exit_code, restarts), codes
        assert (folder / "started").read_text().count("rank") == 2 * starts, codes
        if codes == "wait":
            continue
        log = (folder / f"slurm-{number}.out").read_text()
        assert log.count("left over: \n") == 2 * starts, log
        for rank in "01":
            lines = (folder / f"passed{rank}").read_text().splitlines()
            assert lines == sorted(f"{name}={value}" for name, value in passed.items())


def test_the_file_itself_asks_for_two_nodes_of_96_cores_and_8_gpus(slurm: Slurm) -> None:
    said = slurm.run("sbatch", "--test-only", "launch/slurm.sbatch", TINY, cwd=ROOT)
    assert "using 192 processors on nodes n[1-2]" in said


def ranks_of(slurm: Slurm) -> list[int]:
    """The processes of launch/train.py, by the numbers of the machine."""
    namespace, found = os.readlink(f"/proc/{slurm.pid}/ns/pid"), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text().split("\0")
            if words[1:2] == ["launch/train.py"] and "python" in words[0]:
                if os.readlink(folder / "ns" / "pid") == namespace:
                    found.append(int(folder.name))
        except OSError:  # it has ended
            continue
    return found


def wait_for_lines(path: Path, n: int) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < n:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_srun_gives_the_losses_of_two_local_ranks(
    slurm: Slurm, prepared: Prepared, reference: Path, tmp_path: Path
) -> None:
    arguments = [TINY, *tiny_run(prepared, tmp_path / "run", f"train.steps={N_STEPS}")]
    srun = ("srun", "--nodes=2", "--ntasks=2", "launch/train.py")
    slurm.run(*srun, *arguments, cwd=ROOT, PYTHONPATH=str(ROOT))
    assert column(tmp_path / "run") == column(reference)


@pytest.mark.slow
def test_a_job_whose_time_is_over_is_saved_and_goes_on(
    slurm: Slurm, prepared: Prepared, reference: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    arguments = [TINY, *tiny_run(prepared, run, f"train.steps={N_STEPS}")]
    number = submit(slurm, ROOT, *arguments, log=str(log), PYTHONPATH=str(ROOT))
    wait_for_lines(run / "metrics.jsonl", 3)
    # Slurm looks at the time twice a minute, and continues what it signals. The steps would be over before that.
    for pid in (ranks := ranks_of(slurm)):
        os.kill(pid, signal.SIGSTOP)
    assert len(ranks) == 2
    slurm.run("scontrol", "update", f"JobId={number}", "TimeLimit=6", cwd=tmp_path)
    slurm.wait(number, lambda job: job["JobState"] == "PENDING", timeout_s=60)
    assert len(column(run)) < len(column(reference))
    slurm.run("scontrol", "update", f"JobId={number}", "TimeLimit=60", cwd=tmp_path)
    job = slurm.wait_for_end(number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), log.read_text()
    assert re.search(r"stopped: SIGUSR1 on rank .*; saved after step .*resumed\s+from", log.read_text(), re.DOTALL)
    assert column(run) == column(reference)
