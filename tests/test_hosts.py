"""Hostfiles, the variables that go to each host, and commands over a real ssh."""

import socket
import subprocess
from pathlib import Path

import pytest

from megakexue.config import UserError
from megakexue.hosts import (
    PASSED,
    Host,
    deepspeed_env,
    hosts_variable,
    is_passed,
    passed,
    read_hostfile,
    read_hosts_variable,
    ssh_command,
)
from tests.hosts import two_hosts

AWKWARD = {"AWS_SECRET": "a+b/c=\"d\" '$HOME' `id` \\ % %h é", "HF_HOME": "/a b"}


def test_a_hostfile_is_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# our cluster\nn2 slots=8\n\n  user@n1.lan\tslots=4   # half of it\n10.0.0.3 slots=1\n")
    hosts = read_hostfile(path)
    assert hosts == [Host("n2", 8), Host("user@n1.lan", 4), Host("10.0.0.3", 1)]
    assert hosts_variable(hosts) == "n2:8,n1.lan:4,10.0.0.3:1"
    assert read_hosts_variable("n2:2,n1.lan:1") == ["n2", "n2", "n1.lan"]
    assert [Host(name, 1).is_here for name in ("localhost", socket.gethostname(), "n2")] == [True, True, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n1 slots=8\nn2 8\n", "line 2: 'n2 8' is no host: write `NAME slots=N`"),
        ("n1 slots=0\n", "line 1: 'n1 slots=0' is no host"),
        ("n1 slots=2 gpus=3\n", "line 1"),
        ("-oProxyCommand=id slots=8\n", "line 1"),
        ("n1:22 slots=8\n", "line 1"),
        ("n1 slots=8\n#\nn1 slots=8\n", "line 3: n1 was named before"),
        ("# none\n", "names no host"),
        (None, "cannot read the hostfile .*: No such file or directory"),
    ],
)
def test_a_wrong_hostfile_is_refused_with_its_line(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_hostfile(path)


def test_variables_go_to_all_hosts_by_name_or_prefix() -> None:
    kept = {"NCCL_DEBUG": "INFO", "PYTHONPATH": "/a", "PATH": "/bin", "TORCHINDUCTOR_CACHE_DIR": "/c", "OMP_WAIT": "1"}
    own = {"HOME": "/root", "PATHS": "", "RANK": "0", "MASTER_PORT": "1", "SSH_AUTH_SOCK": "/s", "XPYTHON": ""}
    assert passed(kept | own) == kept
    assert is_passed("MEGAKEXUE_HOSTS") and not is_passed("MEGAKEXUE")
    assert all(PASSED.values())


def test_a_deepspeed_env_is_what_deepspeed_reads() -> None:
    text = deepspeed_env(AWKWARD | {"PYTHONPATH": "/a", "HOME": "/root"})
    assert text.splitlines()[1] == "HF_HOME=/a b"
    # as deepspeed.launcher reads and quotes it, and as pdsh and the shell behind it take it
    exports = "".join(
        f'export {name}="{value}"; ' for name, value in (line.split("=", 1) for line in text.splitlines())
    )
    shown = subprocess.run(
        ["sh", "-c", exports.replace("%%", "%") + "env -0"], env={}, capture_output=True, text=True, check=True
    )
    assert AWKWARD.items() <= dict(pair.split("=", 1) for pair in shown.stdout.split("\0") if pair).items()
    assert "PYTHONPATH" not in text and "HOME=/root" not in text
    with pytest.raises(UserError, match="AWS_KEY has more than one line"):
        deepspeed_env({"AWS_KEY": "a\nb"})


@pytest.mark.slow  # some logins
def test_a_command_runs_on_another_host_as_it_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    with two_hosts(tmp_path) as (one, two):
        command = ssh_command(
            Host("n2", 1), ["sh", "-c", 'pwd; echo "$0" "$HF_HOME"', "$HOME *"], env=AWKWARD, folder=folder
        )
        assert one.run(command).stdout == f"{folder}\n$HOME * /a b\n"
        assert (
            one.run(ssh_command(Host("n2", 1), ["printenv", "AWS_SECRET"], env=AWKWARD)).stdout[:-1]
            == AWKWARD["AWS_SECRET"]
        )
        assert one.run(ssh_command(Host("root@n2", 1), ["sh", "-c", "exit 7"])).returncode == 7
        (one.folder / "ssh" / "known_hosts").write_text("")
        refused = one.run(ssh_command(Host("n2", 1), ["true"]))
        assert refused.returncode == 255 and "Host key verification failed" in refused.stderr
        two.cut()
        assert "No route to host" in one.run(ssh_command(Host("10.77.0.2", 1), ["true"])).stderr
