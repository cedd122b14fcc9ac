"""Checks of one host: real faults on this machine, each found by its own function, with a remedy."""

import fcntl
import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from megakexue import doctor
from megakexue.doctor import Check
from tests.conftest import Prepared
from tests.helpers import tiny_config, tiny_run
from tests.programs import run_python, run_with_mounts

HEALTHY = "NVIDIA H100, 550.54, 0, Not Active, Not Active, Not Active"


def test_a_check_that_hangs_or_fails_leaves_the_others_alone() -> None:
    def fail() -> Check:
        raise ZeroDivisionError("in the check")

    def hang() -> Check:
        time.sleep(30)
        return Check(True, "")

    def miss() -> Check:
        return Check(True, Path("/nowhere/file").read_text())

    start = time.monotonic()
    checks = {"hangs": hang, "fails": fail, "misses": miss}
    found = doctor.run_checks(checks | {"good": lambda: Check(True, "well")}, limit_s=0.3)
    assert time.monotonic() - start < 5
    assert [check.ok for check in found.values()] == [False, False, False, True] and found["good"].text == "well"
    assert (
        found["hangs"].text == "no answer within 0.3 s" and "ZeroDivisionError('in the check')" in found["fails"].text
    )
    assert "/nowhere/file" in found["misses"].text and all(check.fix for check in found.values() if not check.ok)


def test_interfaces_are_named_as_nccl_and_gloo_name_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value, ok in (
        ("NCCL_SOCKET_IFNAME", "l", True),  # the beginning of a name
        ("NCCL_SOCKET_IFNAME", "=l", False),
        ("NCCL_SOCKET_IFNAME", "=lo", True),
        ("NCCL_SOCKET_IFNAME", "^docker,veth9", True),  # all but these
        ("NCCL_SOCKET_IFNAME", "eth97", False),
        ("GLOO_SOCKET_IFNAME", "lo", True),
        ("GLOO_SOCKET_IFNAME", "l", False),
        ("GLOO_SOCKET_IFNAME", "lo,eth97", False),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(key, value)
            found = doctor.interfaces()
        assert found.ok == ok, (key, value, found)
        assert ok or (f"{key}={value}" in found.text and f"set {key} to one of " in found.fix and "lo" in found.fix)


def test_a_port_is_served_and_reached() -> None:
    with ExitStack() as held:
        port = doctor.listen(held, 0)
        assert doctor.reach("127.0.0.1", port).ok
        with pytest.raises(OSError, match="in use"):
            doctor.listen(held, port)
    found = doctor.reach("127.0.0.1", port)
    assert not found.ok and f"127.0.0.1:{port} is not reached: " in found.text and "open the ports" in found.fix


def test_a_run_folder_in_use_is_found(prepared: Prepared, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "first"
    config = tiny_config(prepared, run)
    found = doctor.run_folder(config)
    assert found.ok and f"{run} can be written, in {tmp_path}" == found.text and not list(tmp_path.iterdir())
    assert doctor.file_locks(config).ok and doctor.disk(config, 1000).ok
    run.mkdir(parents=True)
    with open(run / "lock", "w") as file:
        print("pid 17 on n1", file=file, flush=True)
        assert doctor.run_folder(config).ok
        fcntl.flock(file, fcntl.LOCK_EX)
        found = doctor.run_folder(config)
        assert not found.ok and found.text == f"{run} is in use by pid 17 on n1" and "end that run" in found.fix
    assert doctor.run_folder(config) == Check(True, f"{run} can be written")


def test_a_shared_folder_has_the_file_and_its_lock(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    with ExitStack() as held:
        path = doctor.hold(held, run, "token")
        assert doctor.seek(path, "token", "n1").ok
        other = doctor.seek(path, "another token", "n1")
        assert not other.ok and "is not the same folder as on n1" in other.text
        Path(path).rename(tmp_path / "kept")
        assert doctor.seek(path, "token", "n1") == other
        Path(path).write_text("token")  # the file without its lock, as where locks are local
        unlocked = doctor.seek(path, "token", "n1")
        assert not unlocked.ok and "a lock (flock) of n1" in unlocked.text and "local_lock" in unlocked.fix
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]


def test_the_lock_of_a_killed_build_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert doctor.extension_locks().ok
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    found = doctor.extension_locks()
    assert not found.ok and str(lock) in found.text and found.fix.endswith(f"rm {lock}")


def test_a_limit_of_open_files_grows_with_the_ranks() -> None:
    code = """
import resource
from megakexue.doctor import limits
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 4096))
print(limits(64)); print(limits(65))
"""
    enough, low = run_python(code).stdout.splitlines()
    assert "ok=True" in enough or "memlock" in enough
    assert "ok=False" in low and "1024 open files" in low and "65 ranks want 1032" in low and "`ulimit -n 65536`" in low


@pytest.mark.parametrize(
    ("lines", "slots", "text", "fix"),
    [
        ([HEALTHY] * 2, 2, "2 GPUs (NVIDIA H100, driver 550.54), no ECC errors, not slowed", None),
        ([HEALTHY.replace(" 0,", " [N/A],")], None, "1 GPUs", None),
        ([HEALTHY] * 7, 8, "7 GPUs for 8 slots", "slots="),
        ([HEALTHY, HEALTHY.replace(" 0,", " 3,")], 2, "GPU 1 has 3 uncorrected ECC errors", "--gpu-reset -i 1"),
        ([HEALTHY.replace(" Not Active", " Active", 2)], 1, "slowed down: hw_slowdown, hw_thermal_slowdown", "cooling"),
        (["Unable to determine the device handle"], 1, "Unable to determine the device handle", "xid"),
    ],
)
def test_gpus_are_judged_by_what_nvidia_smi_says(
    lines: list[str], slots: int | None, text: str, fix: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a stand-in that prints what nvidia-smi would, since the tests have no broken GPUs
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(lines) + f"\nEND\nexit {lines[0].count('Unable')}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = doctor.gpu_health(slots)
    assert found.ok == (fix is None) and text in found.text
    assert fix is None or fix in found.fix


MOUNTS = """
mount -t tmpfs -o size=1m none /dev/shm
mkdir -p $1/small $1/fixed $1/bin
mount -t tmpfs -o size=64k none $1/small
mount -t tmpfs -o ro none $1/fixed
printf '#!/bin/sh\\n' > $1/bin/nvidia-smi; chmod +x $1/bin/nvidia-smi; export PATH=$1/bin:$PATH
export TORCHINDUCTOR_CACHE_DIR=$1/fixed/cache
printf "127.0.0.1 localhost\\n127.0.1.1 $(hostname)\\n" > $1/hosts; mount --bind $1/hosts /etc/hosts
shift
exec "$@"
"""
CHECK_ALL = """
import json, sys
from megakexue import doctor
from megakexue.config import load_config
config = lambda run: load_config("configs/tiny_gqa.yaml", [*sys.argv[2:], f"train.run={sys.argv[1]}/{run}"])
print(json.dumps([
    doctor.shared_memory(), doctor.disk(config("small/run"), 40_000), doctor.run_folder(config("fixed/run")),
    doctor.compile_cache(), doctor.own_address(),
]))
"""


def test_file_systems_and_names_that_do_not_serve(prepared: Prepared, tmp_path: Path) -> None:
    arguments = [str(tmp_path), sys.executable, "-c", CHECK_ALL, str(tmp_path), *tiny_run(prepared, tmp_path)]
    done = run_with_mounts(MOUNTS, *arguments)
    assert done.returncode == 0, done.stderr
    found: list[Any] = [Check(*check) for check in json.loads(done.stdout)]
    assert [check.ok for check in found] == [False] * 5
    for check, text, fix in zip(
        found,
        (
            "1 MiB free in /dev/shm",
            "64 KiB free",
            "Read-only file system",
            "torch.compile cannot write",
            "is 127.0.1.1",
        ),
        ("--shm-size=16g", "make room in", "mount it for writing", "set TORCHINDUCTOR_CACHE_DIR", "in /etc/hosts give"),
    ):
        assert text in check.text and fix in check.fix, check
