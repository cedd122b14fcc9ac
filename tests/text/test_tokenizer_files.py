"""A tokenizer is known by its content, and is the same one wherever it is copied."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest

from megakexue.config import UserError
from megakexue.files import sha256
from megakexue.text.tokenizer import SentencePiece
from megakexue.text.tokenizer_files import copy_tokenizer, find_tokenizer, load_tokenizer, tokenizer_sha256
from megakexue.text.tokenizer_json import TokenizerJson
from tests.foreign import byte_level
from tests.text.helpers import stdlib_texts


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level(tmp_path_factory.mktemp("llama3"), "llama3", stdlib_texts(2), 300)


def test_the_content_tells_what_it_is_and_not_the_name(path: Path, model: Path, tmp_path: Path) -> None:
    shutil.copy(path, tmp_path / "a.model")
    shutil.copy(path.with_name("tokenizer_config.json"), tmp_path)
    shutil.copy(model, tmp_path / "b.json")
    own, theirs = load_tokenizer(tmp_path / "b.json"), load_tokenizer(tmp_path / "a.model")
    assert isinstance(own, SentencePiece) and isinstance(theirs, TokenizerJson)
    assert own.sha256 == tokenizer_sha256(model) == sha256(model)
    assert theirs.sha256 == tokenizer_sha256(path) != sha256(path)


def test_a_copy_is_the_same_tokenizer(path: Path, model: Path, tmp_path: Path) -> None:
    for source, name in ((path, "tokenizer.json"), (model, "tokenizer.model")):
        folder = tmp_path / name
        folder.mkdir()
        assert find_tokenizer(folder) == folder / "tokenizer.model"  # which is then missing
        copy = copy_tokenizer(source, folder)
        assert copy == folder / name == find_tokenizer(folder) == copy_tokenizer(copy, folder)
        assert load_tokenizer(copy).sha256 == tokenizer_sha256(copy) == tokenizer_sha256(source)
    (tmp_path / "tokenizer.model" / "tokenizer.json").write_text("{}")  # as train_tokenizer.py once put it
    assert find_tokenizer(tmp_path / "tokenizer.model").name == "tokenizer.model"


def test_the_hash_follows_the_files(path: Path, tmp_path: Path) -> None:
    copy = copy_tokenizer(path, tmp_path)
    before, config = tokenizer_sha256(copy), tmp_path / "tokenizer_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"eos_token": "<|eot_id|>"}))
    os.utime(config, ns=(1, 1))
    assert tokenizer_sha256(copy) != before


def test_other_files_are_refused_by_name(path: Path, tmp_path: Path) -> None:
    contents = {
        rb"a pickle or an archive, which is never opened here: name the tokenizer\.json": pickle.dumps({"a": 1}),
        rb"a tiktoken file, which lacks its rules for splitting text: name the": b"IQ== 0\nIg== 1\n",
        rb"a pointer of Git LFS: fetch the file itself with git lfs pull$": b"version https://git-lfs.github.com/spec/v1\n",
        rb"a GGUF file: name the": b"GGUF\3\0\0\0",
    }
    for message, content in contents.items():
        (tmp_path / "x").write_bytes(content)
        for action in (load_tokenizer, tokenizer_sha256):
            with pytest.raises(UserError, match=f"x is {message.decode()}"):
                action(tmp_path / "x")
    with pytest.raises(UserError, match=r"is a folder: name the tokenizer\.json or tokenizer\.model in it"):
        load_tokenizer(path.parent)
    with pytest.raises(UserError, match=r"no tokenizer .*none: train one with tools/train_tokenizer\.py"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "x").write_bytes(b"{}")
    with pytest.raises(UserError, match="x is not a sentencepiece model"):
        load_tokenizer(tmp_path / "x")
