"""Real text for the tests: sources of the Python that runs them, tokenized and prepared by our own tools' code."""

import os
import signal
import subprocess
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported, and for programs that tests start. Tests run side by side: one thread for each process.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

from megakexue.text.prepare import PrepareArguments, prepare
from megakexue.text.tokenizer import train_tokenizer


@dataclass(frozen=True)
class Prepared:
    tokenizer: Path
    data: Path
    seq_len: int


def stdlib_files(n: int) -> list[Path]:
    """The first `n` modules of the standard library, by name."""
    return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:n]


@pytest.fixture(autouse=True)
def no_rank_outlives_its_test() -> Iterator[None]:
    """Kill the ranks that a test has left which failed while it waited for something."""
    yield
    for process in active_children():
        process.kill()
        process.join()


Popen = Callable[..., "subprocess.Popen[Any]"]


@pytest.fixture
def popen() -> Iterator[Popen]:
    """Start programs as subprocess.Popen does, each in a session of its own.

    What the test leaves of them, also one that fails, is killed, and their pipes are closed. Otherwise the next test of
    this process would have their ports, their share of the machine, and the warnings of pipes that are still open.
    """

    def kill(process: subprocess.Popen[Any]) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    with ExitStack() as stack:

        def start(command: Sequence[str | Path], **options: Any) -> subprocess.Popen[Any]:
            process = subprocess.Popen(command, **{"text": True, "start_new_session": True} | options)
            stack.enter_context(process)
            stack.callback(kill, process)
            return process

        yield start


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A tokenizer of 512 pieces and rows of 64 tokens from 8 modules, packed by best fit."""
    folder = tmp_path_factory.mktemp("prepared")
    files = stdlib_files(8)
    tokenizer, seq_len = folder / "tokenizer.model", 64
    train_tokenizer((path.read_text(encoding="utf-8") for path in files), tokenizer, vocab_size=512, n_threads=1)
    arguments = PrepareArguments(seq_len=seq_len, packing="best_fit", valid_fraction=0.2)
    prepare([str(path) for path in files], tokenizer, folder / "data", arguments, processes=1)
    return Prepared(tokenizer, folder / "data", seq_len)
