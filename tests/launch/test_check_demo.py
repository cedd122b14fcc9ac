"""The demo: what it checks, deletes and shows. Its last step reports, and fails where a model has not learned."""

import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Prepared, stdlib_files
from tests.helpers import ROOT
from tests.tools.experiments.made_up import write_run

PROGRAM = ROOT / "launch" / "check_demo.py"


def check(demo: Path, loss: float, grown: float) -> subprocess.CompletedProcess[str]:
    (demo / "data").mkdir(parents=True)
    (demo / "data" / "manifest.json").write_text('{"splits": {"valid": {"unigram_entropy_nats": 6.03125}}}')
    write_run(demo / "run", [6.0, loss], loss)
    write_run(demo / "grown_run", [6.0, grown], grown)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [sys.executable, str(PROGRAM), str(demo)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_demo_that_has_learned(tmp_path: Path) -> None:
    done = check(tmp_path / "demo", 4.2, 4.1)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    baseline = "unigram entropy of the validation tokens"
    assert lines[0].startswith("$ tools/plot_run.py ") and lines[0].endswith(f" --baseline {baseline}=6.03125")
    assert f"baseline    {baseline} 6.0312: the last validation loss is 1.8312 below it" in lines
    assert (
        lines[-1] == "validation loss 4.200 nats, grown and trained on 4.100, unigram entropy of the same tokens 6.031"
    )
    assert (tmp_path / "demo" / "loss.png").exists()


@pytest.mark.parametrize(
    ("loss", "grown", "message"),
    [
        (5.55, 4.0, "the model has not learned: its validation loss is not well below the unigram entropy"),
        (4.2, 4.2, "the grown model has not learned: its validation loss is not below that of the small one"),
        (4.2, float("nan"), "the grown model has not learned"),
    ],
)
def test_a_demo_that_has_not_learned(tmp_path: Path, loss: float, grown: float, message: str) -> None:
    done = check(tmp_path / "demo", loss, grown)
    assert done.returncode == 1 and done.stderr.startswith(message)


def test_prompts_are_the_first_words_of_held_out_documents(prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(prepared.data)
    done = subprocess.run([sys.executable, str(PROGRAM), str(tmp_path), "--prompts"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    documents = [" ".join(path.read_text(errors="replace").split()) for path in stdlib_files(8)]
    for prompt in done.stdout.splitlines():
        assert len(prompt) > 3 and any(document.startswith(prompt) for document in documents), prompt
    assert done.stdout.count("\n") == 2


# in place of every program: it shows its arguments, one in brackets each
STUB = """#!/usr/bin/env bash
if [ "${2:-}" = --prompts ]; then printf -- '- 从前有一个\\nIt'"'"'s so\\n'; exit; fi
if [ "${1:-}" = -c ]; then echo "$GPUS"; exit; fi
printf '%s:' "${0##*/}" >>ran; printf ' [%s]' "DS=${DS_ACCELERATOR:-}" "$@" >>ran; echo >>ran
"""


class Demo:
    """A checkout with demo.sh and stubs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("launch", "tools", ".venv/bin"):
            (root / name).mkdir(parents=True)
        shutil.copy(ROOT / "launch" / "demo.sh", root / "launch")
        shutil.copy(ROOT / "Makefile", root)
        (root / ".venv" / "installed").touch()
        (root / "pyproject.toml").touch()
        (root / "constraints.txt").touch()
        os.utime(root / ".venv" / "installed", (2**32, 2**32))
        tools = [f"tools/{name}.py" for name in
                 ("train_tokenizer", "prepare_data", "grow_model", "export_model", "generate")]  # fmt: skip
        for name in (*tools, "launch/check_demo.py", ".venv/bin/python", ".venv/bin/deepspeed"):
            (root / name).write_text(STUB)
            (root / name).chmod(0o755)
        for name in ("run/old", "bundle/old", "wider/bundle"):
            (root / "runs" / "demo" / name).mkdir(parents=True)

    def run(self, *command: str, gpus: str = "0", text: str = "", cwd: str = ".") -> subprocess.CompletedProcess[str]:
        (self.root / "ran").unlink(missing_ok=True)
        environment = os.environ | {"GPUS": gpus, "TEXT": text}
        environment.pop("DS_ACCELERATOR", None)
        return subprocess.run(command, cwd=self.root / cwd, env=environment, capture_output=True, text=True)

    def old(self) -> list[str]:
        return sorted(str(path.relative_to(self.root / "runs" / "demo")) for path in self.root.glob("runs/demo/*/*"))


def test_demo_checks_its_text_before_it_deletes(tmp_path: Path) -> None:
    demo = Demo(tmp_path / "a checkout")
    (demo.root / "my texts").mkdir()
    (demo.root / "my texts" / "[1] it's.txt").touch()
    for text in ("no texts", "my", "my texts/*.md", "my texts/[2]*"):
        done = demo.run("bash", "launch/demo.sh", "my texts", text)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: no text '{text}': TEXT is one file, folder or glob")
    (demo.root / "runs/demo/run/lock").write_text("pid 7 on here\n")
    with open(demo.root / "runs/demo/run/lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = demo.run("bash", "launch/demo.sh", "my texts")
    assert done.stderr.startswith("error: runs/demo/run/lock is held by pid 7 on here: another demo is training")
    assert demo.old() == ["bundle/old", "run/lock", "run/old", "wider/bundle"] and not (demo.root / "ran").exists()
    # by make's variable, by the environment, from another folder; a name that looks like a glob is a name
    for command, cwd, given in [
        (["make", "-s", "demo", "TEXT=my texts"], ".", "my texts"),
        (["make", "-s", "demo", "TEXT=my texts/*.txt"], ".", "my texts/*.txt"),
        (["bash", "launch/demo.sh", "my texts/[1] it's.txt"], ".", "my texts/[1] it's.txt"),
        (["bash", "../launch/demo.sh", "[1] it's.txt"], "my texts", f"{demo.root}/my texts/[1] it's.txt"),
    ]:
        done = demo.run(*command, cwd=cwd)
        assert done.returncode == 0, done.stderr
        assert f"train_tokenizer.py: [DS=] [{given}] [--vocab-size]" in (demo.root / "ran").read_text()
        assert demo.old() == ["wider/bundle"]  # which the demo has not made


@pytest.mark.parametrize(
    ("gpus", "accelerator", "ranks", "where"),
    [
        ("0", "cpu", 2, "two ranks on the CPU"),
        ("1 NVIDIA H100", "", 1, "1 rank(s), each on a GPU of its own: NVIDIA H100"),
        ("8 NVIDIA H100", "", 2, "2 rank(s), each on a GPU of its own: NVIDIA H100"),
    ],
)
def test_demo_shows_commands_that_can_be_pasted(
    gpus: str, accelerator: str, ranks: int, where: str, tmp_path: Path
) -> None:
    demo = Demo(tmp_path / "checkout")
    (demo.root / "it's 中文 $HOME").touch()
    done = demo.run("bash", "launch/demo.sh", "it's 中文 $HOME", gpus=gpus)
    assert done.returncode == 0, done.stderr
    ran = (demo.root / "ran").read_text()
    assert where in done.stdout
    assert (
        f"deepspeed: [DS={accelerator}] [--log_level] [error] [--num_accelerators] [{ranks}] [launch/train.py]" in ran
    )
    assert ran.count("deepspeed:") == 3 and "[--prompt=- 从前有一个]" in ran and "[--prompt=It's so]" in ran
    # the lines that it shows do the same when a shell reads them
    commands = re.findall(r"^\$ (.*)", done.stdout, re.MULTILINE)
    assert len(commands) == len(ran.splitlines())
    path = f"{demo.root}/.venv/bin:{os.environ['PATH']}"
    done = demo.run("bash", "-c", f"PATH={shlex.quote(path)}\n" + "\n".join(commands))
    assert (done.returncode, (demo.root / "ran").read_text()) == (0, ran)
