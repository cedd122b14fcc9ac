"""The program that a launcher starts: which rank says what is wrong."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import distribution, version
from pathlib import Path

import pytest

from megakexue.launcher import PATIENCE_S
from tests.conftest import Prepared
from tests.helpers import ROOT, column, tiny_config, tiny_run, train_all
from tests.hosts import Host, two_hosts
from tests.ranks import FIXED, run_on_ranks

TINY = str(ROOT / "configs" / "tiny_gqa.yaml")


@pytest.mark.parametrize(
    ("arguments", "waits"),
    [
        ([TINY, "optim.lr=-1"], True),  # the first rank says it, and a launcher would end the others meanwhile
        ([TINY, "data.tokenizer=none"], False),  # the disk of each node may lack it
        (["none.yaml"], False),
    ],
)
def test_a_mistake_is_one_line_of_the_first_rank(arguments: list[str], waits: bool, tmp_path: Path) -> None:
    launcher = {"WORLD_SIZE": "4", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for rank in (0, 1, 2):  # of two nodes of two ranks
        environment = os.environ | launcher | {"RANK": str(rank), "LOCAL_RANK": str(rank % 2)}
        command = [sys.executable, str(ROOT / "launch" / "train.py"), *arguments]
        began = time.monotonic()
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        speaks = rank % 2 == 0
        assert done.stderr.count("\n") == speaks and done.stderr.startswith("error: " * speaks)
        assert not (waits and rank == 2) or time.monotonic() - began >= PATIENCE_S


# --- on two hosts ----------------------------------------------------------------------------------------------------

CLUSTER = [sys.executable, str(ROOT / "launch" / "cluster.py")]
TRAIN = str(ROOT / "launch" / "train.py")


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Host]]:
    with two_hosts(tmp_path_factory.mktemp("rig")) as hosts:
        yield hosts


def launch(host: Host, hostfile: Path, slots: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    hostfile.write_text(slots)
    # the number of threads of the second host is its own guess, unless it takes that of the first
    environment = os.environ | FIXED | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    start = [*CLUSTER, "--hostfile", str(hostfile), "--retries", "0", TRAIN, *arguments]
    return host.run(start, env=environment, timeout_s=200)


@pytest.mark.slow
def test_hosts_that_differ_are_refused_in_a_table(rig: tuple[Host, Host], prepared: Prepared, tmp_path: Path) -> None:
    config, manifest = tmp_path / "config.yaml", prepared.data / "manifest.json"
    config.write_text((ROOT / "configs" / "tiny_gqa.yaml").read_text())
    code = ROOT / "megakexue" / "core" / "rope.py"
    metadata = Path(str(distribution("torch").locate_file(""))) / f"torch-{version('torch')}.dist-info" / "METADATA"
    changes = {
        config: ("data:", "guard: {max_bad_steps: 7}\ndata:"),
        code: ('"""', '"""Another. '),
        manifest: ("{", "{ "),
        metadata: (f"Version: {version('torch')}", "Version: 2.99.0"),
    }
    for i, (path, (old, new)) in enumerate(changes.items()):
        text = path.read_text()
        assert old in text
        (tmp_path / f"other_{i}").write_text(text.replace(old, new, 1))
        rig[1].bind(tmp_path / f"other_{i}", path)
    began = time.monotonic()
    try:
        options = tiny_run(prepared, tmp_path / "run")
        done = launch(rig[0], tmp_path / "hosts", "n1 slots=1\nn2 slots=1\n", str(config), *options)
    finally:
        for path in changes:
            rig[1].unbind(path)
    took = time.monotonic() - began
    rows = [line.split() for line in done.stderr.splitlines()]
    assert done.returncode == 2 and took < 60, (took, done.stderr)
    assert "error: the hosts are not equal, and nothing was started:" in done.stderr
    assert ["n1", "n2"] in rows and ["config", "guard.max_bad_steps", "20", "7"] in rows, done.stderr
    assert ["version", "torch", version("torch"), "2.99.0"] in rows, done.stderr
    assert {"code", "config", "data", "version"} == {row[0] for row in rows if len(row) == 4}, done.stderr
    assert "megakexue/core/rope.py" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_hosts_then_one_then_two_are_one_run(rig: tuple[Host, Host], prepared: Prepared, tmp_path: Path) -> None:
    run_on_ranks(2, train_all, [tiny_config(prepared, tmp_path / "straight")])
    two, one = "n1 slots=1\nn2 slots=1\n", "n1 slots=2\n"
    for slots, stop in ((two, 2), (one, 5), (two, 8)):
        options = tiny_run(prepared, tmp_path / "moved", f"train.stop_at_step={stop}")
        done = launch(rig[0], tmp_path / "hosts", slots, TINY, *options)
        assert done.returncode == 0, done.stderr
    assert column(tmp_path / "moved") == column(tmp_path / "straight")
