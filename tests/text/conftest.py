"""Tokenizers of 700 pieces, and the text that they are trained on."""

from pathlib import Path

import pytest

from megakexue.text.tokenizer import Kind, train_tokenizer
from tests.text.helpers import STDLIB, TEXTS


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    return TEXTS + [path.read_text() for path in sorted((STDLIB / "json").glob("*.py"))]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, corpus: list[str]) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    kinds: tuple[Kind, ...] = ("unigram", "bpe")
    for kind in kinds:
        train_tokenizer(corpus, folder / kind, vocab_size=700, kind=kind)
    return {kind: folder / kind for kind in ("unigram", "bpe")}


@pytest.fixture
def model(models: dict[str, Path]) -> Path:
    return models["unigram"]
