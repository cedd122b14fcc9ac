"""A real Slurm of two nodes on this machine, in namespaces of its own: it has its own processes, network and /run.

Nothing of it can be left behind. The first process of the PID namespace reads a pipe that the test holds; when the pipe
is closed, also by the death of the test, that process ends, and the kernel ends all others with it.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare", "nsenter", "setpriv", "ip")
NAMESPACES = ("--mount", "--net", "--pid", "--uts", "--ipc")
# The address is not 127.0.0.1, since Slurm asks only for names that lead to other machines. Ports, sockets and states
# are nobody else's in these namespaces. NVIDIA's GPUs are eight terminals: Slurm only counts them.
SCRIPT = """
set -eu
read -r pid _ </proc/self/stat && echo $pid
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mount --bind "$1/hosts" /etc/hosts
ip link set lo up
ip address add 10.77.0.1/32 dev lo
hostname slurm
install -d -o munge -g munge /run/munge
head -c 1024 /dev/urandom >/run/munge/key
chown munge:munge /run/munge/key && chmod 400 /run/munge/key
setpriv --reuid munge --regid munge --clear-groups munged --key-file /run/munge/key --socket /run/munge/socket \
    --pid-file /run/munge/pid --seed-file /run/munge/seed --log-file /run/munge/log
mkdir -p /run/slurm/state
export SLURM_CONF="$1/slurm.conf"
slurmctld -c
slurmd -N n1
slurmd -N n2
echo ready
read -r _
"""
CONFIG = """
ClusterName=test
SlurmctldHost=slurm
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=/run/munge/socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_min_interval=200000,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MpiDefault=none
StateSaveLocation=/run/slurm/state
SlurmdSpoolDir=/run/slurm/%n
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmdPidFile=/run/slurm/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
GresTypes=gpu
NodeName=n1 NodeHostname=slurm NodeAddr=10.77.0.1 Port=7001 CPUs=96 Gres=gpu:8
NodeName=n2 NodeHostname=slurm NodeAddr=10.77.0.1 Port=7002 CPUs=96 Gres=gpu:8
PartitionName=all Nodes=n1,n2 Default=YES
"""


@dataclass(frozen=True)
class Slurm:
    """Two idle nodes, n1 and n2. Both have the files of this machine."""

    pid: int
    folder: Path

    def run(self, *command: str, cwd: Path, **environment: str) -> str:
        """Run a command where this Slurm is; return what it has written to stdout and stderr."""
        # nsenter leaves its folder when it enters a mount namespace
        inside = ["nsenter", "--target", str(self.pid), *NAMESPACES, "env", f"--chdir={cwd}", *command]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        own = {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path, **environment}
        done = subprocess.run(inside, env=os.environ | own, text=True, stdout=-1, stderr=-2, timeout=300)
        assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job, such as JobState and Restarts."""
        words = self.run("scontrol", "show", "job", number, cwd=self.folder).split()
        return dict(word.partition("=")[::2] for word in words)

    def wait(self, number: str, is_reached: Callable[[dict[str, str]], bool], *, timeout_s: float = 120) -> Any:
        """Wait until a job is as it is wanted, and return what Slurm knows of it."""
        deadline = time.monotonic() + timeout_s
        while not is_reached(job := self.job(number)):
            assert time.monotonic() < deadline, f"after {timeout_s} s: {job}"
            time.sleep(0.2)
        return job

    def wait_for_end(self, number: str, *, timeout_s: float = 120) -> dict[str, str]:
        """Wait until a job has ended for good; one that was put back into the queue starts at once."""

        def is_over(job: dict[str, str]) -> bool:
            if job["JobState"] == "PENDING" and job["Reason"] == "BeginTime":  # Slurm would wait for two minutes
                time.sleep(2)  # in the same second, a node takes the new start for the old one that was ended
                self.run("scontrol", "update", f"JobId={number}", "StartTime=now", cwd=self.folder)
            return job["JobState"] not in ("PENDING", "RUNNING", "COMPLETING")

        return self.wait(number, is_over, timeout_s=timeout_s)


@contextmanager
def two_nodes(folder: Path) -> Iterator[Slurm]:
    """Start Slurm, with its configuration and logs in `folder`; skip the test where that cannot be done."""
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons need root")
    if missing := [program for program in PROGRAMS if not shutil.which(program)]:
        pytest.skip(f"not installed: {', '.join(missing)} (Debian: slurm-wlm, munge, iproute2)")
    (folder / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 slurm n1 n2\n")
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/tty[0-7]\n")
    command = ["unshare", *NAMESPACES, "--fork", "--kill-child", "bash", "-c", SCRIPT, "bash", str(folder)]
    errors = folder / "start.log"
    with errors.open("wb") as log, subprocess.Popen(command, stdin=-1, stdout=-1, stderr=log, text=True) as first:
        assert first.stdin is not None and first.stdout is not None
        try:
            pid, word = first.stdout.readline(), first.stdout.readline()
            if not pid:
                pytest.skip(f"no namespaces here: {errors.read_text().strip()}")
            assert word == "ready\n", errors.read_text()
            slurm = Slurm(int(pid), folder)
            slurm.run("srun", "--nodes=2", "true", cwd=folder)  # waits for both
            yield slurm
        finally:
            first.stdin.close()
