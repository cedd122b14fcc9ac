"""Run a program of tools/ with many command lines in one process, which costs one start of Python for all of them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT

CODE = """
import contextlib, io, json, runpy, sys

results = []
for program, *arguments in json.load(sys.stdin):
    sys.argv, out, err = [program, *arguments], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(program, run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code
    results.append((code, out.getvalue(), err.getvalue(), "torch" in sys.modules))
json.dump(results, sys.stdout)
"""


def run_programs(command_lines: list[list[str]], **options: Any) -> list[tuple[int, str, str, bool]]:
    """Run the programs one after another; return code, stdout and stderr of each, and whether torch is imported."""
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, input=json.dumps(command_lines), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return [tuple(result) for result in json.loads(done.stdout)]


FORKS = """
import json, os, runpy, sys, tempfile, time
import deepspeed, megakexue.run.train  # once for all

results = []
for program, *arguments in json.load(sys.stdin):
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
            sys.argv = [program, *arguments]
            try:
                runpy.run_path(program, run_name="__main__")
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [(file.seek(0), file.read())[1] for file in (out, err)]
    results.append((code, *texts))
json.dump(results, sys.stdout)
"""


def run_forked(command_lines: list[list[str]], **options: Any) -> list[tuple[int, str, str]]:
    """Run programs one after another, each in a process of its own; return code, stdout and stderr of each.

    torch and DeepSpeed are imported once, before the processes part: a training run starts in a second.
    """
    command = [sys.executable, "-c", FORKS]
    done = subprocess.run(command, input=json.dumps(command_lines), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return [tuple(result) for result in json.loads(done.stdout.splitlines()[-1])]


def run_without_torch(program: Path, command_lines: list[list[str]]) -> list[tuple[int, str, str]]:
    """Return exit code, stdout and stderr of each; asserts that none of them has imported torch."""
    results = []
    done = run_programs([[str(program), *arguments] for arguments in command_lines])
    for arguments, (code, out, err, has_torch) in zip(command_lines, done, strict=True):
        assert not has_torch, f"{arguments} imported torch"
        results.append((code, out, err))
    return results


def run_python(code: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], text=True, capture_output=True, cwd=ROOT, **options)


def run_git(repository: Path, *arguments: str) -> str:
    """Run git in that repository and no other, whatever the user's settings and a hook's variables say."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    own = {"GIT_CEILING_DIRECTORIES": str(repository.parent), "GIT_CONFIG_GLOBAL": os.devnull}
    settings = ["-c", "safe.directory=*", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    command = ["git", *settings, *arguments]
    done = subprocess.run(command, cwd=repository, env=kept | own, capture_output=True, check=True)
    return os.fsdecode(done.stdout)


def run_with_mounts(script: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a shell script that may mount what nobody else sees; skip the test where that is not allowed."""
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    try:
        trial = subprocess.run([*unshare, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True)
        is_allowed = trial.returncode == 0
    except FileNotFoundError:
        is_allowed = False
    if not is_allowed:
        pytest.skip("this machine does not allow file systems of one's own (unshare --mount)")
    command = [*unshare, "sh", "-ec", script, "sh", *arguments]
    return subprocess.run(command, text=True, capture_output=True, cwd=ROOT, **options)
