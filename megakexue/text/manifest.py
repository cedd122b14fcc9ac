"""The manifest of prepared data: what a folder says of itself, and whether it fits the config.

This is the one place that reads it. Three programs need it: a launch, before torch is imported; the reader of the rows,
also of remote folders; and an evaluation, which takes the row length from the data.
"""

from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megakexue.config import BOUND, Config, build, require
from megakexue.files import read_json
from megakexue.text.tokenizer_files import find_tokenizer, tokenizer_sha256


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a reader needs of manifest.json; tools/prepare_data.py writes more."""

    tokenizer_sha256: str
    vocab_size: int
    """Pieces of the tokenizer."""
    seq_len: int
    """Tokens in a row that a model sees: a row has one more."""
    bos_id: int
    eos_id: int
    pad_id: int
    splits: dict[str, dict[str, Any]]
    """By name, such as train: its rows, and the sha256 of its index."""

    def n_rows(self, split: str) -> int:
        return (self.splits.get(split) or {}).get("rows", 0)


def read_manifest(folder: str | Path, copy: Path | None = None) -> Manifest:
    """Read the manifest of a prepared folder, or a downloaded `copy` of it.

    Raises:
        UserError: it is missing or damaged, or it lacks a field.
    """
    what = "the manifest of prepared data" if copy is None else f"the manifest of {folder}"
    values = read_json(copy or Path(folder, "manifest.json"), what)
    names = {field.name for field in fields(Manifest)}
    missing = names - values.keys()
    require(not missing, f"{folder}/manifest.json lacks {sorted(missing)}: prepare the data again")
    manifest = build(Manifest, {name: values[name] for name in names}, where=f"{folder}/manifest.json")
    rows = [split.get("rows", 0) for split in manifest.splits.values()]
    require(
        all(isinstance(n, int) and 0 <= n < BOUND for n in rows),
        f"{folder}/manifest.json: splits: rows must be whole numbers, not {rows}: prepare the data again",
    )
    return manifest


def rows_divided(manifest: Manifest, folder: str | Path, seq_len: int) -> int:
    """Return how many rows of `seq_len` tokens a prepared row makes. Raises UserError: it cannot be divided so."""
    require(
        manifest.seq_len % seq_len == 0,
        f"data.seq_len={seq_len} does not divide the rows of {folder} (seq_len={manifest.seq_len}): set it to "
        f"{manifest.seq_len} or a divisor of it, or prepare the data again",
    )
    return manifest.seq_len // seq_len


def check_tokenizer(manifest: Manifest, folder: str | Path, tokenizer: str) -> None:
    """Refuse data that was not prepared with `data.tokenizer`. Raises UserError."""
    digest = tokenizer_sha256(tokenizer)
    require(
        manifest.tokenizer_sha256 == digest,
        f"data.tokenizer={tokenizer} is not the tokenizer that {folder} was prepared with (sha256 {digest[:12]}, not "
        f"{manifest.tokenizer_sha256[:12]}): use {find_tokenizer(Path(folder))} or prepare again",
    )


def check_inputs(config: Config, missing: Collection[str] = ()) -> list[int] | None:
    """Check what can be checked before torch is imported: the files that the config names exist and fit each other.

    Remote folders are checked when they are opened.

    Args:
        missing: paths of sources that are not looked at.

    Returns:
        the training rows of each source; None: not all were looked at.

    Raises:
        UserError: a data folder or the tokenizer is missing, or they were not made for one another.
    """
    tokenizer = Path(config.data.tokenizer)
    require(tokenizer.is_file(), f"data.tokenizer={tokenizer}: no such file; train one with tools/train_tokenizer.py")
    rows = []
    local = [source for source in config.data.sources if not (source.is_remote or source.path in missing)]
    for folder in (Path(source.path) for source in local):
        require(
            (folder / "manifest.json").is_file(),
            f"data.sources: {folder} has no manifest.json: make the folder with tools/prepare_data.py",
        )
        manifest = read_manifest(folder)
        check_tokenizer(manifest, folder, config.data.tokenizer)
        rows.append(manifest.n_rows("train") * rows_divided(manifest, folder, config.data.seq_len))
        require(
            manifest.vocab_size <= config.model.vocab_size,
            f"model.vocab_size={config.model.vocab_size} is below the {manifest.vocab_size} pieces of the tokenizer: "
            f"set model.vocab_size to at least {manifest.vocab_size}",
        )
    if len(local) < len(config.data.sources):
        return None
    config.data.check_synthetic(config.train.steps, rows)
    return rows
