"""Real text for the tests: sources of the Python that runs them, tokenized and prepared by our own tools' code."""

import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

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
