"""Tokenizer files: opened by their content, hashed, copied, and found in a folder of ours."""

import re
from functools import lru_cache
from pathlib import Path

from megakexue.config import require
from megakexue.files import sha256, write_whole
from megakexue.text.tokenizer import SentencePiece, Tokenizer
from megakexue.text.tokenizer_json import CONFIG, TokenizerJson, read_spec

JSON, MODEL = "tokenizer.json", "tokenizer.model"
"""What folders of ours call them; tokenizer_config.json lies beside the first."""
TOKENIZER_FILES = (JSON, MODEL, CONFIG)
OTHERS = {
    rb"\s*version https://git-lfs": "a pointer of Git LFS: fetch the file itself with git lfs pull",
    rb"\x80[\x02-\x05]|PK\x03\x04": "a pickle or an archive, which is never opened here",
    rb"[A-Za-z0-9+/=]+ \d+\r?\n": "a tiktoken file, which lacks its rules for splitting text",
    rb"GGUF": "a GGUF file",
}
"""What people also take for a tokenizer, by its first bytes."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Open a tokenizer.json or a sentencepiece model. Raises UserError: it is neither, or of no use."""
    path = Path(path)
    require(not path.is_dir(), f"{path} is a folder: name the {JSON} or {MODEL} in it")
    return TokenizerJson(path) if _is_json(path) else SentencePiece(path)


def _head(path: Path) -> bytes:
    if not path.is_file():
        return b""
    with open(path, "rb") as file:
        return file.read(256)


def _is_json(path: Path) -> bool:
    """Whether it is a JSON object. Raises UserError: a kind of file that is known and of no use."""
    head = _head(path)
    for pattern, what in OTHERS.items():
        advice = "" if ":" in what else f": name the {JSON} or {MODEL} of the same model"
        require(re.match(pattern, head) is None, f"{path} is {what}{advice}")
    return re.match(rb'\s*\{\s*"', head) is not None


def tokenizer_sha256(path: str | Path) -> str:
    """The `sha256` of a tokenizer, without opening it. Raises UserError: it is a JSON file of another kind."""
    files = [Path(path), Path(path).with_name(CONFIG)]
    stamps = tuple((stat.st_mtime_ns, stat.st_size) for stat in (f.stat() for f in files if f.exists()))
    return _sha256(Path(path), stamps)


@lru_cache(maxsize=8)
def _sha256(path: Path, stamps: tuple[tuple[int, int], ...]) -> str:
    return read_spec(path).sha256 if _is_json(path) else sha256(path)


def copy_tokenizer(path: str | Path, folder: Path) -> Path:
    """Copy what a tokenizer is made of into a folder of ours, and return the path of its copy."""
    path = Path(path)
    target = folder / (JSON if _is_json(path) else MODEL)
    config = path.with_name(CONFIG)
    if target.name == JSON and config.is_file():
        write_whole(folder / CONFIG, config.read_bytes())
    write_whole(target, path.read_bytes())  # which may be this very file
    return target


def find_tokenizer(folder: Path) -> Path:
    """Return the tokenizer of prepared data or a run; it may be missing."""
    return folder / (MODEL if (folder / MODEL).is_file() or not (folder / JSON).is_file() else JSON)
