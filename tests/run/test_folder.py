"""The run folder: one run at a time, and never begun anew where checkpoints have been; and which code runs in it."""

import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

import megakexue.run.folder as folder
from megakexue import __version__
from megakexue.config import Config, UserError
from megakexue.run.folder import source_version
from tests.conftest import Prepared
from tests.helpers import ROOT, outcomes, tiny_config
from tests.programs import run_git
from tests.ranks import run_on_ranks


def train_expecting(config: Config) -> str:
    from megakexue.run.train import train

    try:
        train(config)
    except UserError as error:
        return str(error)
    return "went on"


def test_a_lost_checkpoint_folder_does_not_erase_the_metrics(prepared: Prepared, tmp_path: Path) -> None:
    config = tiny_config(prepared, tmp_path / "run", "train.steps=4", "checkpoint.every_steps=2")
    assert run_on_ranks(1, train_expecting, config) == ["went on"]
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "elsewhere")
    (message,) = run_on_ranks(1, train_expecting, config)
    assert "has metrics up to step 4 but no checkpoint: restore" in message
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_two_runs_do_not_share_a_folder(prepared: Prepared, tmp_path: Path) -> None:
    with open(tmp_path / "lock", "w") as lock:
        lock.write("pid 7 on another")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        (message,) = run_on_ranks(1, train_expecting, tiny_config(prepared, tmp_path))
    assert "is in use by pid 7 on another: end that run first, or choose another folder" in message


def train_in_bad_folders(configs: list[Config]) -> list[str]:
    """What each run ends with; the last one is on a file system without locks."""
    ends = outcomes(configs[:-1])

    def no_locks(file: Any, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    fcntl.flock = no_locks
    return ends + outcomes(configs[-1:])


def test_a_folder_that_one_rank_cannot_write_ends_all(
    prepared: Prepared, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names = ("its log", "the lock", "a full disk", "the records", "without locks")
    runs = {name: tmp_path / name.replace(" ", "_") for name in names}
    for run in runs.values():
        (run / "logs").mkdir(parents=True)
    (runs["its log"] / "logs" / "rank_1.log").mkdir()
    (runs["the lock"] / "lock").mkdir()
    (runs["a full disk"] / "logs" / "rank_0.log").symlink_to("/dev/full")
    (runs["the records"] / "metrics.jsonl.tmp").mkdir()
    options = ("train.steps=2", "evaluate.every_steps=null")
    configs = [tiny_config(prepared, run, *options) for run in runs.values()]
    first, second = run_on_ranks(2, train_in_bad_folders, configs)
    assert first == second
    whose = {"its log": 1, "the lock": 0, "a full disk": 0, "the records": 0}
    for (name, rank), message in zip(whose.items(), first):
        assert message.startswith(f"rank {rank}: ") and str(runs[name]) in message, message
        remedy = "No space left on device: make room there" if name == "a full disk" else "Is a directory: choose"
        assert f" cannot be written: {remedy}" in message, message
    assert first[-1] == "" and (runs["without locks"] / "checkpoints" / "latest").exists()
    warnings = [line for line in capfd.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert warnings == [
        f"WARNING: train.run={runs['without locks']} is on a file system without locks (flock): a second run in it at "
        "the same time would not be noticed"
    ]


def test_a_log_on_a_full_disk_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rank_0.log").symlink_to("/dev/full")
    handler = folder._LogFile(tmp_path / "rank_0.log")
    for _ in range(3):
        handler.handle(logging.LogRecord("megakexue", logging.INFO, "", 0, "a line", None, None))
    with contextlib.suppress(OSError):
        handler.close()
    out, err = capsys.readouterr()
    full = "cannot be written, and waits: [Errno 28] No space left on device: make room"
    assert out == f"WARNING: {tmp_path}/rank_0.log {full}\n" and err == ""


# ------------------------------------------------------------------------------------------------------ source_version

VERSION = f"megakexue {__version__}"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone of a repository that has our folders and what ours ignores."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    origin = tmp_path / "origin"
    for name in ("megakexue/a.py", "tools/b.py", "docs/c.md"):
        (origin / name).parent.mkdir(parents=True)
        (origin / name).write_text(name)
    shutil.copyfile(ROOT / ".gitignore", origin / ".gitignore")
    run_git(origin, "init", "--quiet")
    run_git(origin, "add", ".")
    run_git(origin, "commit", "--quiet", "--message=one")
    run_git(tmp_path, "clone", "--quiet", str(origin), "clone")
    return tmp_path / "clone"


def commit_of(repository: Path) -> str:
    return run_git(repository, "rev-parse", "HEAD").strip()


def test_a_users_files_are_not_the_code(clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = commit_of(clone)
    assert source_version(clone) == commit
    (tmp_path / "disk" / "web").mkdir(parents=True)
    (tmp_path / "disk" / "web" / "shard").touch()
    for name in ("data", "runs", "more_data", "tools/more_data"):  # README's names, and others
        (clone / name).symlink_to(tmp_path / "disk")
    for name in ("corpus", "texts"):
        (clone / name).mkdir()
        (clone / name / "中文.txt").write_text("虎")
    (clone / "dangling").symlink_to("nowhere")
    (clone / os.fsdecode(b"caf\xe9.txt")).touch()
    for name in ("nested", "tools/nested"):
        (clone / name).mkdir()
        run_git(clone / name, "init", "--quiet")
        (clone / name / "own.py").touch()
    os.mkfifo(clone / "tools" / "fifo")
    for name in ("bundle", "loss.png"):
        with open(clone / name, "wb") as file:
            file.truncate(2**34)
    os.utime(clone / "megakexue" / "a.py", (1, 1))  # as a copy of the checkout has it
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "origin" / ".git"))  # as in a hook of another repository
    monkeypatch.setenv("GIT_INDEX_FILE", "nowhere")
    (clone / "tools" / "more_data").unlink()
    began = time.monotonic()
    assert source_version(clone) == commit
    assert time.monotonic() - began < 3
    run_git(clone, "add", "texts")  # what is tracked is code, wherever it lies
    assert "with uncommitted changes" in source_version(clone)


def test_each_change_of_the_code_has_its_own_name(clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = [source_version(clone)]
    for change in (
        "echo changed > tools/b.py", "rm docs/c.md", "touch megakexue/新.py", "echo 1 > megakexue/新.py",
        "ln -s b.py tools/link", "ln -sf nowhere tools/link", "ln -s .. configs", "truncate -s 16G tools/large",
        "truncate -s 17G tools/large",
    ):  # fmt: skip
        subprocess.run(change, shell=True, check=True, cwd=clone)
        seen.append(source_version(clone))
        assert re.fullmatch(f"{commit_of(clone)} with uncommitted changes [0-9a-f]{{12}}", seen[-1])
    assert len(set(seen)) == len(seen)
    run_git(clone, "add", "megakexue")
    assert source_version(clone) == seen[-1]  # what is staged has the same content
    (tmp_path / ".gitconfig").write_text(
        "[color]\nui = always\n[core]\nquotepath = true\n[diff]\nexternal = false\nnoprefix = true\nrenames = copies\n"
    )
    assert source_version(clone) == seen[-1]


def test_where_there_is_no_commit_to_name(clone: Path, tmp_path: Path) -> None:
    shallow = tmp_path / "shallow"
    run_git(tmp_path, "clone", "--quiet", "--depth=1", f"file://{tmp_path}/origin", str(shallow))
    assert source_version(shallow) == commit_of(clone)
    run_git(clone, "worktree", "add", "--quiet", "../worktree")
    assert source_version(tmp_path / "worktree") == commit_of(clone)
    installed = clone / "lib" / "site-packages"
    installed.mkdir(parents=True)
    assert source_version(installed) == VERSION  # not the commit of the repository around it
    (installed / ".git").mkdir()
    assert source_version(installed) == f"{VERSION} (commit unknown)"


def test_a_run_starts_whatever_git_does(clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        for path in (clone, clone / ".git"):
            os.chown(path, 12345, 12345)
        assert source_version(clone) == commit_of(clone)  # files of another user, as in a container
    monkeypatch.setenv("PATH", str(tmp_path))
    assert source_version(clone) == f"{VERSION} (commit unknown)"
    monkeypatch.setattr(folder, "GIT_S", 0.5)
    git = tmp_path / "git"
    for does in ("exit 1", "exec /bin/sleep 60"):
        git.write_text(f'#!/bin/sh\ncase "$*" in *rev-parse*) echo abc;; *) {does};; esac\n')
        git.chmod(0o755)
        assert source_version(clone) == "abc (state of its files unknown)"
