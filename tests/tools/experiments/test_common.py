"""What the experiments share: commands, runs that are made once, text, and tables."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import common
from common import Run, call, copy_sources, make_text, step_records, table, train, unigram_entropy, validation_loss
from tests.helpers import ROOT
from tests.tools.experiments.made_up import write_run

PROGRAMS = sorted(path.stem for path in (ROOT / "tools" / "experiments").glob("*.py") if path.stem != "common")


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_program_says_its_question_and_an_example(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "experiments" / f"{name}.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"\n  tools/experiments/{name}.py" in done.stdout and "example" in done.stdout


def test_a_run_is_a_command() -> None:
    run = Run(name="a", overrides=("optim.lr=1", "train.steps=2"))
    started = ["launch/train.py", "configs/tiny_gqa.yaml", "train.run=runs/x/a", "optim.lr=1", "train.steps=2"]
    assert run.command(Path("runs/x")) == started
    run = Run(name="b", config="c.yaml", program="tools/p.py", n_ranks=2, overrides=())
    launched = ["deepspeed", "--num_accelerators", "2", "tools/p.py", "c.yaml", "train.run=runs/x/b"]
    assert run.command(Path("runs/x")) == launched


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_call_is_shown_without_its_noise(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import os, sys; print('a [INFO] b'); print('step 1'); print(os.environ['DS_ACCELERATOR'], file=sys.stderr)"
    call(python(code), hidden=common.NOISE)
    shown = capfd.readouterr()
    assert shown.out.startswith(f"$ {sys.executable} -c import os") and shown.err == ""
    assert sorted(shown.out.splitlines()[1:]) == ["cpu", "step 1"]
    call(python("print('[INFO]')"))
    assert capfd.readouterr().out.endswith("\n[INFO]\n")


@pytest.mark.parametrize(
    ("code", "status"), [("raise SystemExit(75)", 75), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_a_call_that_fails_ends_the_program(code: str, status: int) -> None:
    with pytest.raises(SystemExit) as stop:
        call(python(code))
    assert stop.value.code == status


def test_ctrl_c_lets_a_call_come_to_its_end(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    call(python("import os, signal; os.kill(os.getppid(), signal.SIGINT); print('saved')"), hidden="nothing")
    assert capfd.readouterr().out.endswith("\nsaved\n") and signal.getsignal(signal.SIGINT) is before


def test_a_run_is_trained_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, pathlib; pathlib.Path(sys.argv[2]).mkdir(); print('step 1'); sys.exit(len(sys.argv) - 3)"
    )
    run = Run(name="a", program=sys.executable, config=str(program), overrides=(str(tmp_path / "a"), "fails"))
    with pytest.raises(SystemExit):
        train(run, tmp_path)
    assert not (tmp_path / "a" / "done").exists()
    (tmp_path / "a").rmdir()
    run = Run(name="a", program=sys.executable, config=str(program), overrides=(str(tmp_path / "a"),))
    train(run, tmp_path, title="b", hidden="^step")
    assert (tmp_path / "a" / "done").exists()
    shown = capfd.readouterr().out
    assert "\n\033[1m== a\033[0m\n$ " in shown and "\n\033[1m== b\033[0m\n$ " in shown and shown.count("step 1") == 1
    train(run, tmp_path)
    assert capfd.readouterr().out == ""


def test_sources_are_copied_without_packages_and_large_files(tmp_path: Path) -> None:
    sizes = {"a.py": 10, "b/c.py": 20, "b/large.py": 21, "site-packages/d.py": 1, "b/x-packages/e/f.py": 1, "g.txt": 1}
    for name, size in sizes.items():
        (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / name).write_text("#" * size)
    copy_sources(tmp_path / "from", tmp_path / "to", max_bytes=20)
    copied = {path.relative_to(tmp_path / "to").as_posix() for path in (tmp_path / "to").rglob("*") if path.is_file()}
    assert copied == {"a.py", "b/c.py"}


def test_text_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stdlib").mkdir()
    (tmp_path / "stdlib" / "a.py").write_text("a = 1\n")
    out = tmp_path / "out"
    (out / "text").mkdir(parents=True)
    for name in ("text/old.py", "tokenizer.model", "tokenizer.json"):
        (out / name).touch()
    calls: list[list[str]] = []
    monkeypatch.setattr(common.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "stdlib")})
    monkeypatch.setattr(common, "call", calls.append)
    make_text(out, vocab_size=99)
    assert [path.name for path in out.rglob("*")] == ["text", "a.py"]
    common.prepare_data(out, "long", "--seq-len", "8")
    tokenizer = f"{out}/tokenizer.model"
    assert calls == [
        [
            "tools/train_tokenizer.py",
            f"{out}/text",
            "--vocab-size",
            "99",
            "--sample-bytes",
            "3000000",
            "--out",
            tokenizer,
        ],
        ["tools/prepare_data.py", f"{out}/text", "--tokenizer", tokenizer, "--seq-len", "8", "--out", f"{out}/long"],
    ]


def test_numbers_of_a_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [3.0, 2.0], 2.5)
    assert [record.loss for record in step_records(run)] == [3.0, 2.0] and validation_loss(run) == 2.5
    (tmp_path / "manifest.json").write_text('{"splits": {"train": {"unigram_entropy_nats": 5.5}}}')
    assert unigram_entropy(tmp_path, "train") == 5.5


def test_a_table() -> None:
    assert table(["a", 1], [["b", 2.5], ["", "c"]]) == "| a | 1 |\n|---|---|\n| b | 2.5 |\n|  | c |"
