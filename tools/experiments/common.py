"""What the experiments share: text and data, training runs, the numbers that a run has left, and a table.

An experiment is a list of runs and a table. A run is data: its name, its config, and what it changes of it. Everything
is written under one folder of runs/. An experiment that is started again skips what is done, and a run that was stopped
goes on from its newest checkpoint. All paths are relative to the repository root, where each program goes first.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megakexue.files import read_json, writing
from megakexue.run.records import StepRecord, ValidationRecord, read_metrics

ROOT = Path(__file__).resolve().parents[2]
NOISE = r"\[INFO\]|\[WARNING\]"
"""Lines of DeepSpeed that are not shown."""
TEXT_TITLE = "text, tokenizer, shards: all the Python sources that come with Python, its tests included"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run of an experiment."""

    name: str
    """Of its folder."""
    overrides: tuple[str, ...]
    """key=value over the config, or options of `program`."""
    config: str = "configs/tiny_gqa.yaml"
    program: str = "launch/train.py"
    n_ranks: int = 1

    def command(self, out: Path) -> list[str]:
        """Return the command that trains it in the folder `out`."""
        launcher = ["deepspeed", "--num_accelerators", str(self.n_ranks)] if self.n_ranks > 1 else []
        return [*launcher, self.program, self.config, f"train.run={out / self.name}", *self.overrides]


def heading(text: str) -> None:
    print(f"\n\033[1m== {text}\033[0m", flush=True)


def call(command: Iterable[str], *, hidden: str | None = None) -> None:
    """Print a command and run it. If its exit code is not 0, end this program with the same code.

    Args:
        hidden: pattern of the output lines that are not shown.
    """
    command = list(command)
    print("$ " + " ".join(command), flush=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"DS_ACCELERATOR": "cpu"} | os.environ | {"PATH": path}
    output, error = (subprocess.PIPE, subprocess.STDOUT) if hidden else (None, None)
    # Ctrl-C reaches the command too: this program must not end before a run has saved itself
    before = signal.signal(signal.SIGINT, lambda *_: None)
    with subprocess.Popen(
        command, env=environment, stdout=output, stderr=error, encoding="utf-8", errors="replace"
    ) as process:
        for line in process.stdout or []:
            if not re.search(hidden or "", line):
                print(line, end="", flush=True)
    signal.signal(signal.SIGINT, before)
    if process.returncode:
        sys.exit(process.returncode if process.returncode > 0 else 128 - process.returncode)


def train(run: Run, out: Path, *, title: str | None = None, hidden: str = NOISE) -> None:
    """Train a run in the folder `out`, or go on with it. Do nothing if it is done."""
    done = out / run.name / "done"
    if done.exists():
        return
    heading(title or run.name)
    call(run.command(out), hidden=hidden)
    with writing(str(out), out):
        done.touch()


def copy_sources(folder: Path, text: Path, *, max_bytes: float = float("inf")) -> None:
    """Copy the Python sources in `folder` into `text`, without installed packages and files above `max_bytes`."""
    for path in folder.rglob("*.py"):
        inside = path.relative_to(folder)
        if not any(part.endswith("-packages") for part in inside.parts) and path.stat().st_size <= max_bytes:
            with writing(str(text), text):
                (text / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, text / inside)


def make_text(out: Path, *, vocab_size: int = 4096) -> None:
    """Copy all the Python sources that come with Python into OUT/text, and train OUT/tokenizer.model on them."""
    shutil.rmtree(out / "text", ignore_errors=True)
    for path in out.glob("tokenizer.*"):
        path.unlink()
    copy_sources(Path(sysconfig.get_paths()["stdlib"]), out / "text")
    options = ["--vocab-size", str(vocab_size), "--sample-bytes", "3000000", "--out", f"{out}/tokenizer.model"]
    call(["tools/train_tokenizer.py", f"{out}/text", *options])


def prepare_data(out: Path, name: str, *options: str) -> None:
    """Make the shards OUT/NAME of OUT/text."""
    tokenizer = ["--tokenizer", f"{out}/tokenizer.model"]
    call(["tools/prepare_data.py", f"{out}/text", *tokenizer, *options, "--out", f"{out}/{name}"])


def data_of(out: Path) -> tuple[str, ...]:
    """Return the overrides that let a run train on OUT/data."""
    return f"data.sources=[{{path: {out}/data}}]", f"data.tokenizer={out}/tokenizer.model"


def unigram_entropy(data: Path, split: str) -> float:
    """Nats per token: the loss of a model that knows only how often each token occurs."""
    return float(read_json(data / "manifest.json", "prepared data")["splits"][split]["unigram_entropy_nats"])


def step_records(run: Path) -> list[StepRecord]:
    return [record for record in read_metrics(run) if isinstance(record, StepRecord)]


def validation_loss(run: Path) -> float:
    """Nats per token at the last validation of a run."""
    return [record.loss for record in read_metrics(run) if isinstance(record, ValidationRecord)][-1]


def table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """Return a table in Markdown."""
    header = list(header)
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])
