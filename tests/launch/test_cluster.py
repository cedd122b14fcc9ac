"""The launcher over ssh: exit codes, signals, restarts, what is shown, and that nothing is left on a host."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Popen, Prepared
from tests.helpers import ROOT, column, tiny_config, tiny_run, train_all
from tests.hosts import Host, pid_of, two_hosts
from tests.ranks import FIXED, free_port, run_on_ranks

CLUSTER = [sys.executable, str(ROOT / "launch" / "cluster.py")]
# each rank does the next of the words of its rank, such as "1" (the exit code), "kill", "wait" or "wait:save"
PROGRAM = """
import os, signal, subprocess, sys, time
from pathlib import Path
rank, folder = os.environ["RANK"], Path(sys.argv[0]).parent
with (folder / f"ports_{rank}").open("a") as ports:
    print(os.environ["MASTER_PORT"], file=ports)
attempt = len((folder / f"ports_{rank}").read_text().split()) - 1
words = sys.argv[1:][int(rank)].split(",")
word = words[min(attempt, len(words) - 1)]
def save(number, frame):
    print(f"rank {rank} saved", flush=True)
    sys.exit(75)
if word.endswith("save"):
    signal.signal(signal.SIGTERM, save)
elif word.endswith("deaf"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(f"rank {rank} speaks")
print(f"rank {rank} complains", file=sys.stderr)
if word.startswith("wait"):
    child = subprocess.Popen(["sleep", "1000"])
    (folder / f"pids_{rank}").write_text(f"{os.getpid()} {child.pid} {os.getppid()}")
    time.sleep(1000)
if word == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(word))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    return tmp_path


def command(folder: Path, *words: str, options: tuple[str, ...] = ()) -> list[str]:
    start = [*CLUSTER, "--hostfile", str(folder / "hosts"), "--pause", "0.05", *options]
    return [*start, str(folder / "program.py"), *words]


def launch(folder: Path, *words: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, *words, options=options), capture_output=True, text=True, timeout=60)


def until(condition: Callable[[], Any], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def waiting(folder: Path) -> list[int]:
    """The two ranks, their children and their supervisor, once all are there."""
    files = [folder / f"pids_{rank}" for rank in (0, 1)]
    until(lambda: all(file.exists() and len(file.read_text().split()) == 3 for file in files))
    return [int(pid) for file in files for pid in file.read_text().split()]


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()]


def ports(folder: Path, rank: int = 0) -> list[str]:
    return (folder / f"ports_{rank}").read_text().split()


@pytest.mark.parametrize(
    ("words", "code", "n_starts", "last"),
    [
        (("0", "0"), 0, 1, "rank . complains"),
        (("75", "75"), 75, 1, "rank . complains"),
        (("75", "0"), 1, 2, "failed: some ranks were done, and others saved after a signal; the same command goes on"),
        (("2", "0"), 2, 1, "failed: localhost rank 0 ended with exit code 2$"),
        (("0", "3"), 1, 2, "failed: localhost rank 1 ended with exit code 3; the same command goes on"),
        (("0", "kill"), 1, 2, "failed: localhost rank 1 was ended by SIGKILL; the same command goes on"),
        (("1,0", "0"), 0, 2, "rank . complains"),
    ],
)
def test_one_rule_says_the_exit_code_and_what_is_restarted(
    words: tuple[str, ...], code: int, n_starts: int, last: str, folder: Path
) -> None:
    done = launch(folder, *words, options=("--retries", "1"))
    assert done.returncode == code, done.stderr
    assert re.match(last, done.stderr.splitlines()[-1]), done.stderr
    assert len(ports(folder)) == n_starts == len(set(ports(folder))) and ports(folder) == ports(folder, 1)
    assert sorted(done.stdout.splitlines()) == sorted(["rank 0 speaks", "rank 1 speaks"] * n_starts)
    assert done.stderr.count("restart 1 of 1 in 0.05 s\n") == n_starts - 1


def test_a_host_that_is_taken_away_is_a_reason_to_restart_if_one_says_so(folder: Path) -> None:
    assert launch(folder, "75,0", "75,0", options=("--restart-preempted",)).returncode == 0
    assert len(ports(folder)) == 2


def test_restarts_are_counted_from_the_last_checkpoint_on(folder: Path) -> None:
    program = folder / "program.py"
    # a checkpoint at each of the first three starts
    save = "(folder / f'checkpoints/step_{min(attempt, 3):08d}').mkdir(exist_ok=True)"
    program.write_text(PROGRAM.replace("word = words", f"{save}\nword = words").replace("sys.argv[1:]", "['1', '1']"))
    (folder / "checkpoints").mkdir()
    config = (str(ROOT / "configs" / "tiny_gqa.yaml"), f"train.run={folder}")
    done = launch(folder, *config, options=("--retries", "2"))
    assert done.returncode == 1
    assert re.findall(r"restart (\d) of 2 in (\S+) s", done.stderr) == [("1", "0.05")] * 4 + [("2", "0.1")]


def test_mistakes_are_one_line(folder: Path) -> None:
    (folder / "two").write_text("localhost slots=1\nn2 slots=1\n")
    cases = [
        (["--hostfile", "none", "x.py"], "cannot read the hostfile none: No such file or directory"),
        (["x.py"], "--hostfile and a program are needed"),
        (["--hostfile", str(folder / "hosts"), "x.py"], "there is no program x.py"),
        (["--hostfile", str(folder / "two"), "x.py"], "other hosts cannot reach localhost"),
        (["--hostfile", str(folder / "hosts"), "--env", "1A=2", str(folder / "program.py")], "--env 1A=2: write NAME"),
        (["--hostfile", str(folder / "hosts"), "--retries", "-1", "x.py"], "must be 0 or more"),
    ]
    for arguments, message in cases:
        done = subprocess.run([*CLUSTER, *arguments], capture_output=True, text=True, cwd=folder)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert message in done.stderr


def test_the_environment_of_a_rank(folder: Path) -> None:
    (folder / "program.py").write_text("import os, sys\nprint(*(f'{k}={os.environ.get(k)}' for k in sys.argv[1:]))\n")
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MEGAKEXUE_HOSTS", "HF_HOME", "--flag"]
    options = ("--hostfile", str(folder / "hosts"), "--env", "HF_HOME=a=b")
    start = [*CLUSTER, *options, "--", str(folder / "program.py"), *names]
    done = subprocess.run(start, capture_output=True, text=True)
    shared = "LOCAL_SIZE=2 MASTER_ADDR=localhost MEGAKEXUE_HOSTS=localhost:2 HF_HOME=a=b --flag=None"
    assert sorted(done.stdout.splitlines()) == [f"RANK={i} WORLD_SIZE=2 LOCAL_RANK={i} {shared}" for i in (0, 1)]


def test_deepspeed_env_is_written_for_its_owner_alone(tmp_path: Path) -> None:
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "eth0", "AWS_KEY": "$ecret"}
    results = [
        subprocess.run(
            [*CLUSTER, "--write-deepspeed-env"], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        for _ in range(2)
    ]
    path = tmp_path / ".deepspeed_env"
    assert {"GLOO_SOCKET_IFNAME=eth0", "AWS_KEY=\\$ecret"} <= set(path.read_text().splitlines())
    assert path.stat().st_mode & 0o777 == 0o600
    assert results[0].stdout.startswith("wrote .deepspeed_env with ")
    assert (results[1].returncode, results[1].stderr) == (
        2, "error: .deepspeed_env is there already: remove it, or change it by hand\n",
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_lets_the_ranks_save_once(number: int, folder: Path, popen: Popen) -> None:
    process = popen(command(folder, "wait:save", "wait:save"), stdout=subprocess.PIPE)
    pids = waiting(folder)
    process.send_signal(number)
    process.send_signal(number)  # so soon after, it is the same request
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 75 and out.count("saved") == 2
    assert alive(pids) == [] and len(ports(folder)) == 1


def test_a_second_signal_kills_what_does_not_listen(folder: Path, popen: Popen) -> None:
    process = popen(command(folder, "wait:deaf", "wait:save"), stderr=subprocess.PIPE)
    pids = waiting(folder)
    process.send_signal(signal.SIGINT)
    time.sleep(6.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 1 and alive(pids) == [] and len(ports(folder)) == 1
    assert err.splitlines()[-1].startswith("failed: a second SIGINT killed the ranks")


@pytest.mark.parametrize("victim", ["launcher", "supervisor"])
def test_nothing_is_left_after_a_kill(victim: str, folder: Path, popen: Popen) -> None:
    process = popen(command(folder, "wait", "wait:save", options=("--retries", "0")), stderr=subprocess.DEVNULL)
    pids = waiting(folder)
    os.kill(process.pid if victim == "launcher" else pids[2], signal.SIGKILL)
    process.wait(timeout=40)
    # what a rank has started is its own to end where the supervisor is gone
    ours = [pid for i, pid in enumerate(pids) if victim == "launcher" or i % 3 != 1]
    until(lambda: not alive(ours))
    for pid in alive(pids):
        os.kill(pid, signal.SIGKILL)


def test_a_screen_that_is_gone_does_not_end_a_run(folder: Path, popen: Popen) -> None:
    (folder / "program.py").write_text(
        "import os, sys, time\nfor i in range(20): print(i); print(i, file=sys.stderr); time.sleep(0.05)\n"
        "open(f'{sys.argv[0]}.{os.environ[\"RANK\"]}', 'w')\n"
    )
    process = popen(command(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    process.stdout.read(1)
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=20) == 0
    assert {path.suffix for path in folder.glob("program.py.*")} == {".0", ".1"}


# --- on two hosts ----------------------------------------------------------------------------------------------------

Rig = tuple[Host, Host]
TRAIN = str(ROOT / "launch" / "train.py")


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with two_hosts(tmp_path_factory.mktemp("rig")) as hosts:
        yield hosts


@pytest.fixture
def both(folder: Path) -> Path:
    (folder / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    return folder


@pytest.mark.slow
def test_two_launches_on_the_same_hosts_do_not_touch_each_other(rig: Rig, both: Path) -> None:
    one, two = rig
    pipes: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    runs = {}
    for name in ("first", "second"):
        (both / name).mkdir()
        (both / name / "program.py").write_text(PROGRAM)
        start = [*command(both, "wait:save", "wait:save")[:-3], "--env", f"HF_HOME=/secret/{name}"]
        runs[name] = one.popen([*start, both / name / "program.py", "wait:save", "wait:save"], **pipes)
        until(lambda name=name: all((both / name / f"pids_{rank}").exists() for rank in (0, 1)))  # type: ignore[misc]
    assert [len(host.find(str(both / name / "program.py"))) for host in rig for name in runs] == [2, 2, 1, 1]
    assert not one.find("/secret/") == two.find("/secret/") == []  # only the launchers that were told it
    os.kill(pid_of(runs["first"]), signal.SIGINT)
    out, err = runs["first"].communicate(timeout=30)
    assert runs["first"].returncode == 75 and out == "rank 0 speaks\nrank 0 saved\n"
    assert sorted(err.splitlines())[1:] == ["n2 rank 1: rank 1 complains", "rank 0 complains"]
    # of the second one nothing was touched, and all of it ends with its launcher, on both hosts
    assert runs["second"].poll() is None and len(two.find(str(both / "second" / "program.py"))) == 1
    os.kill(pid_of(runs["second"]), signal.SIGKILL)
    until(lambda: not any(host.find(what) for host in rig for what in ("program.py", "cluster.py", "sleep 1000")))


@pytest.mark.slow
def test_hosts_that_are_lost_are_named(rig: Rig, both: Path) -> None:
    one, two = rig
    # a rank that does not end is killed, but not at once; and a supervisor that is killed has ranks that end
    process = one.popen(command(both, "wait:deaf", "wait:deaf", options=("--retries", "0")), stderr=subprocess.PIPE)
    until(lambda: all((both / f"pids_{rank}").exists() for rank in (0, 1)))
    began = time.monotonic()
    assert len(two.kill("cluster.py --on-host")) == 1
    until(lambda: not two.find("program.py"), 5)
    _, err = process.communicate(timeout=40)
    assert process.returncode == 1 and 24 < time.monotonic() - began < 45
    assert "n2 was lost (exit code" in err and err.splitlines()[-1].startswith("failed: n2 was lost")
    assert not one.find("program.py")
    two.cut()
    began = time.monotonic()
    done = one.run(command(both, "0", "0"))
    two.mend()
    assert done.returncode == 1 and time.monotonic() - began < 20
    assert "n2: ssh: connect to host n2 port 22: No route to host" in done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        "failed: n2 was not reached, or could not begin: `ssh -o BatchMode=yes"
    )
    assert "speaks" not in done.stdout and not one.find("cluster.py")


def start_everywhere(rig: Rig, start: str, hostfile: Path, folder: Path, program: list[str]) -> list[int]:
    """Train on both hosts; return the exit codes of what was started."""
    environment = os.environ | FIXED | {"PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    bin, one = Path(sys.executable).parent, rig[0]
    torchrun: list[Any] = [bin / "torchrun", "--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "n1"]
    torchrun += ["--master-port", str(free_port())]
    names = ("MASTER_ADDR", "PYTHONPATH", "PATH", *FIXED)
    mpirun: list[Any] = ["mpirun", "--allow-run-as-root", "-np", "2", "--host", "n1,n2", "--wdir", folder]
    mpirun += [word for name in names for word in ("-x", name)]
    starts: dict[str, list[list[Any]]] = {
        "deepspeed": [[bin / "deepspeed", "--hostfile", hostfile, "--master_port", free_port(), *program]],
        "torchrun": [[*torchrun, "--node-rank", i, *program] for i in (0, 1)],
        "mpirun": [[*mpirun, sys.executable, *program]],
    }
    if start == "mpirun":
        environment["MASTER_ADDR"] = "n1"
    written = one.run([*CLUSTER, "--write-deepspeed-env"], env=environment, cwd=folder)
    assert written.returncode == 0, written.stderr
    running = [
        host.popen(words, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for host, words in zip(rig, starts[start])
    ]
    for process in running:
        print(process.communicate(timeout=200)[0])
    return [process.returncode for process in running]


STEPS = ("train.steps=40", "checkpoint.every_steps=10", "evaluate.every_steps=20")


@pytest.fixture(scope="module")
def expected(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks record that `deepspeed` or nobody special has started on one host."""
    run = tmp_path_factory.mktemp("expected")
    run_on_ranks(2, train_all, [tiny_config(prepared, run, *STEPS)])
    return column(run)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["deepspeed", "torchrun", "mpirun"])
def test_other_starts_on_two_hosts_train_as_two_local_ranks(
    start: str, rig: Rig, expected: list[dict[str, Any]], prepared: Prepared, both: Path
) -> None:
    program = [TRAIN, str(ROOT / "configs" / "tiny_gqa.yaml"), *tiny_run(prepared, both / "run", *STEPS)]
    codes = start_everywhere(rig, start, both / "hosts", both, program)
    assert set(codes) == {0} and column(both / "run") == expected


@pytest.mark.slow
def test_a_killed_remote_rank_is_named_and_the_restart_trains_as_two_local_ranks(
    rig: Rig, expected: list[dict[str, Any]], prepared: Prepared, both: Path
) -> None:
    one, two = rig
    run, ranks = both / "run", f"-u {TRAIN}"
    start: list[Any] = [
        *CLUSTER,
        "--hostfile",
        both / "hosts",
        "--pause",
        "0.1",
        TRAIN,
        ROOT / "configs" / "tiny_gqa.yaml",
    ]
    environment = os.environ | FIXED | {"PYTHONPATH": str(ROOT)}
    with open(both / "out", "w") as out, open(both / "err", "w") as err:
        process = one.popen([*start, *tiny_run(prepared, run, *STEPS)], env=environment, stdout=out, stderr=err)
    until(lambda: (run / "checkpoints" / "step_00000010").exists(), 120)
    first = [*one.find(ranks), *two.find(ranks)]
    assert len(first) == 2 and two.kill(ranks) == first[1:]
    until(lambda: not alive(first), 30)
    assert process.wait(timeout=120) == 0, (both / "err").read_text()
    said = (both / "err").read_text()
    assert "failed: n2 rank 1 was ended by SIGKILL; restart 1 of 3 in 0.1 s\n" in said
    assert "resumed from" in (both / "out").read_text()
    assert column(run) == expected
    until(lambda: not any(host.find(what) for host in rig for what in (ranks, "cluster.py")), 5)
