"""The doctor finds what is wrong with two hosts, and names what to do."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import files
from pathlib import Path

import pytest

from tests.conftest import Prepared
from tests.helpers import ROOT, tiny_run
from tests.hosts import Host, pid_of, two_hosts
from tests.programs import run_python

PROGRAM = ROOT / "tools" / "doctor.py"
FAULTS = {
    ("all", "same code"): ("megakexue/core/schedule.py: n1 has ", "same commit"),
    ("all", "same config"): ("optim.lr: n1 has 0.02, n2 has 0.03", "the same config file"),
    ("all", "same version"): ("torch: n1 has .*, n2 has 9.9.9", "constraints.txt"),
    ("n2", "shared"): ("/run is not the same folder as on n1", "mount the file system of n1"),
    ("n2", "disk"): ("25[0-9] KiB free for train.run", "make room in /.*/run"),
    ("n2", "data"): ("has no manifest.json", "as on a host where this is ok"),
    ("n2", "extensions"): ("/py/op/lock has been there for", "rm /.*/py/op/lock"),
    ("n2", "name"): ("the name n2 is 127.0.1.1 here", "in /etc/hosts give n2 the address"),
    ("n2", "clock"): (r"\+5\.[3-9] s from n1's", "timedatectl set-ntp true"),
    ("n1, n2", "interface"): ("NCCL_SOCKET_IFNAME=eth9: there is no interface eth9", "to one of lo, eth0"),
    ("n1", "port"): ("29500 cannot be served: .*in use", "choose another"),
    ("all", "all-reduce"): ("bus bandwidth .* GB/s over all", "below --gb-per-s 1000.0: .*NCCL_SOCKET_IFNAME"),
}
"""What is planted together, by the hosts and the check that find it: what is said of it, and its remedy."""
LOGINS = {
    ("stranger@n2", "ssh"): ("Permission denied", "`ssh-copy-id stranger@n2`"),
    ("n3", "ssh"): ("Could not resolve hostname n3", "add `ADDRESS n3` to /etc/hosts"),
    ("10.77.0.9", "ssh"): ("No route to host|timed out", "`ping 10.77.0.9`"),
    ("n2", "answer"): ("No such file or directory", f"see that {re.escape(sys.executable)} runs"),
}
"""Likewise of hosts that do not answer."""
Told = dict[tuple[str, str], str]


def examine(host: Host, hostfile: str, *arguments: str, **variables: str) -> tuple[int, Told, str]:
    """Run the doctor on a host; return its exit code, its FAIL lines by hosts and check, and all it said."""
    path = host.folder.parent / "hostfile"
    path.write_text(hostfile)
    command = [sys.executable, str(PROGRAM), *arguments, "--hostfile", str(path)]
    done = host.run(["env", *(f"{k}={v}" for k, v in variables.items()), *command], timeout_s=240, cwd=ROOT)
    assert not done.stderr, done.stderr
    failed: Told = {}
    for line in done.stdout.splitlines():
        if match := re.fullmatch(r"FAIL  (.*?) +([a-zA-Z-]+(?: [a-z]+)?): (.*)", line):
            failed[match[1], match[2]] = match[3]
    return done.returncode, failed, done.stdout


def expect(failed: Told, wanted: dict[tuple[str, str], tuple[str, str]]) -> None:
    assert set(failed) == set(wanted)
    for key, (text, fix) in wanted.items():
        assert re.search(f"{text}.*\\. Fix: .*{fix}", failed[key]), (key, failed[key])


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Host]]:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as both:
        yield both


@contextmanager
def mounted(host: Host, target: Path, options: str = "size=1m") -> Iterator[None]:
    """Hide a folder of one host behind an empty one."""
    outside = Path("/")  # a program whose folder is the target would keep it busy
    assert host.run(["mount", "-t", "tmpfs", "-o", options, "none", target], cwd=outside).returncode == 0
    try:
        yield
    finally:
        assert host.run(["umount", target], cwd=outside).returncode == 0


@pytest.mark.slow
def test_two_healthy_hosts(hosts: tuple[Host, Host], prepared: Prepared, tmp_path: Path) -> None:
    config = [str(ROOT / "configs" / "tiny_gqa.yaml"), *tiny_run(prepared, tmp_path / "run")]
    code, failed, out = examine(hosts[0], "n1 slots=2\nn2 slots=1\n", *config)
    assert (code, failed) == (0, {}), out
    lines = out.splitlines()
    for name in ("config", "interface", "limits", "extensions", "compile cache", "data", "run folder", "locks", "disk"):
        assert any(line.startswith(f"ok    n1, n2   {name}: ") for line in lines), name
    for kind in ("code", "config", "data", "tokenizer", "version"):
        assert any(line.startswith(f"ok    all      same {kind}: ") for line in lines), kind
    for line in ("ssh: a login", "clock: within 2 s of n1's", "shared: ", "port: n1:29500 is reached, at 10.77.0.1"):
        assert f"ok    n2       {line}" in out
    reduced = (
        r"3 ranks on 2 hosts over gloo: right sums and products; bus bandwidth [\d.e-]+ GB/s over all, [\d.e-]+ GB/s"
    )
    assert re.search(reduced, lines[-2]) and lines[-1] == "all is well"
    assert not list(tmp_path.iterdir()), "the doctor left files"
    assert not any(host.find("doctor.py") for host in hosts), "the doctor left processes"


@pytest.mark.slow
def test_the_doctor_finds_each_of_twelve_planted_faults(
    hosts: tuple[Host, Host], prepared: Prepared, tmp_path: Path
) -> None:
    one, two = hosts
    for name in ("run", "clock", "skewed", "extensions", "stale/py/op"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "skewed" / "sitecustomize.py").write_text("import time\ntime.time = lambda t=time.time: t() + 5.5\n")
    (tmp_path / "stale" / "py" / "op" / "lock").touch()
    text = (ROOT / "configs" / "tiny_gqa.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "other.yaml").write_text(text.replace("lr: 2e-2", "lr: 3e-2"))
    code = ROOT / "megakexue" / "core" / "schedule.py"
    (tmp_path / "schedule.py").write_text(code.read_text() + "# changed\n")
    metadata = next(Path(str(f.locate())) for f in files("torch") or [] if f.name == "METADATA")
    (tmp_path / "METADATA").write_text(re.sub(r"(?m)^Version: .*", "Version: 9.9.9", metadata.read_text()))
    names = two.folder / "hosts"
    bound = {
        "skewed": tmp_path / "clock", "stale": tmp_path / "extensions", "other.yaml": tmp_path / "config.yaml",
        "schedule.py": code, "METADATA": metadata,
    }  # fmt: skip
    before = names.read_text()
    names.write_text(before.replace("10.77.0.2 n2", "127.0.1.1 n2"))
    for source, target in bound.items():
        two.bind(tmp_path / source, target)
    rival = one.popen([sys.executable, "-c", SERVE], stdout=subprocess.PIPE)
    assert rival.stdout is not None and rival.stdout.readline()
    try:
        with mounted(two, tmp_path / "run", "size=256k"), mounted(two, prepared.data):
            exit_code, failed, out = examine(
                one, "n1 slots=1\nn2 slots=1\n", str(tmp_path / "config.yaml"), *tiny_run(prepared, tmp_path / "run"),
                "--gb-per-s", "1000", NCCL_SOCKET_IFNAME="eth9", TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"),
                PYTHONPATH=f"{tmp_path / 'clock'}:{ROOT}",
            )  # fmt: skip
    finally:
        names.write_text(before)
        for target in bound.values():
            two.unbind(target)
        one.kill("create_server")
    # that the files of the second host are others is said too, beside that it cannot read them
    assert failed.pop(("all", "same data")).endswith("share")
    expect(failed, FAULTS)
    assert exit_code == 1 and out.splitlines()[-1] == "13 of the lines above say FAIL"


SERVE = "import socket, time; s = socket.create_server(('', 29500)); print('ready', flush=True); time.sleep(999)"


@pytest.mark.slow
def test_hosts_that_do_not_answer_fail_alone(hosts: tuple[Host, Host]) -> None:
    one, two = hosts
    with mounted(two, ROOT):
        names = ("n1", "n2", "stranger@n2", "n3", "10.77.0.9")
        code, failed, out = examine(one, "".join(f"{name} slots=1\n" for name in names))
    expect(failed, LOGINS)
    assert code == 1
    assert "ok    n1       interface: " in out and "1 rank on 1 host over gloo: right sums" in out


def test_a_mistake_of_the_user_is_one_line(tmp_path: Path) -> None:
    for arguments, message in (
        (["--port", "70000"], "--port 70000 must be from 1 to 65535"),
        (["--hostfile", f"{tmp_path}/none"], f"cannot read the hostfile {tmp_path}/none: No such file or directory"),
        (["configs/tiny_gqa.yaml", "optim.lr=fast"], "optim.lr"),
    ):
        done = subprocess.run([sys.executable, PROGRAM, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: ")
        assert message in done.stderr and done.stderr.count("\n") == 1


def test_wrong_results_are_laid_to_their_ranks() -> None:
    code = f"""
import runpy
judge = runpy.run_path({str(PROGRAM)!r})["judge"]
good = [dict(rank=i, product=True, sum=True, rates=[4.0, 2.0 + i]) for i in range(3)]
for key, value in ("sum", False), ("product", False), ("sum", True):
    print(judge([good[0], good[1] | {{key: value}}, good[2]], "ranks", 2.5))
print(judge(good, "ranks", 2.0))
"""
    lines = run_python(code).stdout.splitlines()
    assert [line[:16] for line in lines] == ["Check(ok=False, "] * 3 + ["Check(ok=True, t"]
    assert "wrong sum on ranks [1]" in lines[0] and "wrong product on ranks [1]" in lines[1]
    assert "bus bandwidth 2 GB/s over all, 4 GB/s within a host" in lines[2] and "below --gb-per-s 2.5" in lines[2]


@pytest.mark.slow
def test_a_doctor_that_is_interrupted_leaves_no_rank(hosts: tuple[Host, Host]) -> None:
    one, two = hosts
    hostfile = one.folder.parent / "hostfile"
    hostfile.write_text("n1 slots=1\nn2 slots=1\n")
    command = [sys.executable, str(PROGRAM), "--hostfile", str(hostfile)]
    process = one.popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_until(lambda: bool(one.find("--as-rank") and two.find("--as-rank")), 60)
    os.kill(pid_of(process), signal.SIGINT)
    wait_until(lambda: not any(host.find("doctor.py") for host in hosts), 60)
    assert process.communicate()[1] == ""


def wait_until(happens: Callable[[], bool], limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.05)
