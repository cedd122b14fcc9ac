"""Two hosts on this machine, n1 and n2, for what needs ssh, names and a network between them.

A host is a network, PID, mount and UTS namespace: its own `hostname`, /proc, sshd and interface eth0, which is joined
to that of the other host alone. So rigs of several tests can live at the same time with the same names and addresses.
Files are shared, as on a cluster with one file system, but for /etc/hosts, /etc/ssh, ~/.ssh, /run and what `bind` adds.
Each host may log in to the other one without a question: keys and known hosts are in a temporary folder that lies over
/etc/ssh, and nothing outside of the hosts changes.

A host ends with its first process. The kernel ends that one when the rig is left, and when whoever made it is killed.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("n1", "n2")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PROGRAMS = ("ip", "unshare", "nsenter", "setpriv", "mount", "ssh", "ssh-keygen", "sshd")
# the shell stays as the first process, which must wait for orphans
INIT = """
hostname "$1"
mount --bind "$2/ssh" /etc/ssh
mount --bind "$2/hosts" /etc/hosts
mount -t tmpfs -o mode=755 none /run
mkdir /run/sshd
if [ -d ~/.ssh ]; then mount -t tmpfs -o mode=700 none ~/.ssh; fi
ip link set lo up
"$3" -D -e &
echo ready
wait
"""
SSHD = """HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/users
PermitRootLogin yes
StrictModes no
UsePAM no
PidFile none
MaxStartups 100
"""
SSH = """IdentityFile /etc/ssh/key
IdentitiesOnly yes
UserKnownHostsFile /etc/ssh/known_hosts
GlobalKnownHostsFile none
"""


class Host:
    """One of the two. Numbers of processes are those that this process sees, so that `os.kill` takes them."""

    def __init__(self, name: str, address: str, folder: Path, pid: int) -> None:
        self.name, self.address, self.pid = name, address, pid
        self.folder = folder
        """ssh/ is its /etc/ssh, `hosts` its /etc/hosts, `log` what its sshd says."""
        self._started: list[subprocess.Popen[str]] = []

    def popen(
        self,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        **how: Any,
    ) -> subprocess.Popen[str]:
        """Start a program in a session of its own. Its number is `pid_of(...)`, since nsenter stays as its parent.

        `env` is the whole environment, by default that of this process.
        """
        enter = ["nsenter", "--target", str(self.pid), "--net", "--pid", "--mount", "--uts"]
        enter += ["--", "env", "--chdir", str(cwd or Path.cwd())]
        process = subprocess.Popen(
            [*enter, *map(str, command)], env=env, text=True, **{"start_new_session": True, **how}
        )
        self._started.append(process)
        return process

    def run(
        self, command: Sequence[str | Path], *, timeout_s: float = 60, **how: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end, at the latest after `timeout_s`, and return what it wrote."""
        process = self.popen(command, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how})
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.kill(pid_of(process), signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(list(map(str, command)), process.returncode, out, err)

    def find(self, pattern: str) -> list[int]:
        """The processes of this host whose command line contains a text; none that has ended."""
        inside, found = os.readlink(f"/proc/{self.pid}/ns/pid"), []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and os.readlink(entry / "ns" / "pid") == inside:
                    words = (entry / "cmdline").read_bytes().split(b"\0")  # empty for a zombie
                    found += [int(entry.name)] if pattern.encode() in b" ".join(words) else []
            except OSError:
                pass  # it has ended meanwhile
        return sorted(found)

    def kill(self, pattern: str, number: int = signal.SIGKILL) -> list[int]:
        """Send a signal to all that `find` finds; return their numbers."""
        found = self.find(pattern)
        for pid in found:
            os.kill(pid, number)
        return found

    def bind(self, source: Path, target: Path) -> None:
        """Let this host see the file or folder `source` at `target`, which must exist."""
        self._must(["mount", "--bind", source, target])

    def unbind(self, target: Path) -> None:
        self._must(["umount", target])

    def cut(self) -> None:
        """Take its network away."""
        self._must(["ip", "link", "set", "eth0", "down"])

    def mend(self) -> None:
        self._must(["ip", "link", "set", "eth0", "up"])

    def close(self) -> None:
        """End all its processes."""
        os.kill(self.pid, signal.SIGKILL)
        for process in self._started:
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe:
                    pipe.close()

    def _must(self, command: Sequence[str | Path]) -> None:
        done = self.run(command)
        assert done.returncode == 0, f"{self.name}: {command}: {done.stderr}"


def pid_of(process: subprocess.Popen[str]) -> int:
    """The program that `Host.popen` started."""
    deadline = time.monotonic() + 10
    while not (children := Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()):
        assert process.poll() is None and time.monotonic() < deadline, "it has not started, or has ended"
        time.sleep(0.01)
    return int(children[0])


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Make n1 and n2, with their files in `folder`; skip the test where that is not allowed."""
    if missing := [program for program in PROGRAMS if not which(program)]:
        pytest.skip(f"no two hosts without {', '.join(missing)}")
    if os.geteuid() != 0 or subprocess.run(["unshare", "--net", "--pid", "--fork", "true"]).returncode != 0:
        pytest.skip("only root, with the right to make namespaces, can make two hosts")
    write_files(folder)
    with ExitStack() as stack:
        one, two = (stack.enter_context(started(folder / name)) for name in NAMES)
        enter = ["nsenter", "--target", str(one.pid), "--net"]
        joined = ["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", str(two.pid)]
        subprocess.run([*enter, *joined], check=True)
        for host in (one, two):
            host._must(["ip", "address", "add", f"{host.address}/24", "dev", "eth0"])
            host.mend()
        for host, other in ((one, two), (two, one)):
            wait_for_ssh(host, other)
        yield one, two


def which(program: str) -> str | None:
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")  # daemons are not on every PATH


def write_files(folder: Path) -> None:
    """Write /etc/hosts and /etc/ssh of both hosts."""
    keys = {}
    for name in NAMES:
        ssh = folder / name / "ssh"
        ssh.mkdir(parents=True)
        for key in ("host_key", "key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", ssh / key], check=True)
        keys[name] = (ssh / "host_key.pub").read_text()
        (ssh / "sshd_config").write_text(SSHD)
        (ssh / "ssh_config").write_text(SSH)
    known = "".join(f"{name},{address} {keys[name]}" for name, address in zip(NAMES, ADDRESSES))
    users = "".join((folder / name / "ssh" / "key.pub").read_text() for name in NAMES)
    for name in NAMES:
        (folder / name / "ssh" / "known_hosts").write_text(f"{known}localhost,127.0.0.1 {keys[name]}")
        (folder / name / "ssh" / "users").write_text(users)
        lines = ["127.0.0.1 localhost", *(f"{address} {n}" for n, address in zip(NAMES, ADDRESSES))]
        (folder / name / "hosts").write_text("\n".join(lines) + "\n")


@contextmanager
def started(folder: Path) -> Iterator[Host]:
    unshare = ["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "--mount-proc", "--kill-child"]
    command = ["setpriv", "--pdeathsig", "KILL", *unshare, "sh", "-euc", INIT, "sh", folder.name, str(folder)]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [*command, str(which("sshd"))], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True
        )
    assert process.stdout is not None
    said = process.stdout.readline()
    if said != "ready\n":
        process.wait()
        pytest.skip(f"no two hosts: {(folder / 'log').read_text().strip()}")
    address = ADDRESSES[NAMES.index(folder.name)]
    host = Host(folder.name, address, folder, pid_of(process))
    try:
        yield host
    finally:
        host.close()
        process.wait()  # it waits for the first process, and that one for all others of the host
        process.stdout.close()


def wait_for_ssh(host: Host, other: Host) -> None:
    deadline = time.monotonic() + 20
    while (done := host.run(["ssh", "-oBatchMode=yes", other.name, "hostname"])).stdout != f"{other.name}\n":
        log = (other.folder / "log").read_text()
        assert time.monotonic() < deadline, f"{host.name} cannot log in to {other.name}: {done.stderr}\n{log}"
        time.sleep(0.1)


if __name__ == "__main__":  # python -m tests.hosts COMMAND ...: run it on n1, to try something by hand
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as name, two_hosts(Path(name)) as (first, _):
        sys.exit(first.run(sys.argv[1:], timeout_s=86400, stdout=None, stderr=None, start_new_session=False).returncode)
