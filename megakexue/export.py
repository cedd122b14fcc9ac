"""Bundles: the only thing that passes between programs.

    bundle/
      config.yaml              the model section, resolved, and the lineage
      model.safetensors        parameters by name; above SHARD_BYTES several files and model.safetensors.index.json
      tokenizer.model
      manifest.json            sha256 and size of each file; written last

Pretraining, growth, finetuning, generation and conversion all start from one, and know nothing of DeepSpeed.

What must stay true: a folder with its final name is whole; opening one checks every hash, reads only the files that the
manifest names, and unpickles nothing; the parameters are exactly those of the config.
"""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megakexue import __version__
from megakexue.config import ModelConfig, UserError, build, read_json, require, sha256
from megakexue.model import axes, parameter_names, resolve, shape
from megakexue.optim import Segment
from megakexue.tokenizer import Tokenizer

SHARD_BYTES = 4 * 2**30
FORMAT = 2


def export_run(
    run: Path, out: Path, *, step: int | None = None, dtype: torch.dtype = torch.float32, overwrite: bool = False
) -> Path:
    """Write the bundle of a run's checkpoint (default: the newest) from its fp32 masters.

    Raises:
        UserError: no such run or step, a damaged checkpoint, weights that `dtype` cannot hold, or `out` exists.
    """
    # here, since programs that read bundles need neither checkpoints nor the data pipeline below them
    from megakexue import checkpoint

    check_out(out, overwrite)
    for name in ("config.yaml", "tokenizer.model"):
        require((run / name).is_file(), f"{run} is no run folder: it has no {name}")
    folders = checkpoint.step_folders(run / "checkpoints")
    require(bool(folders), f"{run} has no checkpoint yet: train on, or lower checkpoint.every_steps")
    if step is not None:
        steps = [checkpoint.step_of(folder) for folder in folders]
        require(step in steps, f"{run} has no checkpoint of step {step}: it has {sorted(steps)}")
        folders = [folders[steps.index(step)]]
    folder = folders[0]
    try:
        verify(folder, checkpoint.FORMAT)
    except UserError as error:
        raise UserError(f"{error}; or export an earlier checkpoint with --step") from error
    trainer = read_json(folder / "trainer.json", "the trainer's state")
    config = build(ModelConfig, trainer["config"]["model"], where=str(folder / "trainer.json"))
    reader = checkpoint.Reader(folder)

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name in parameter_names(config):
            size = shape(name, config)
            whole = Segment(
                name=name, role=axes(name).role, shape=size, start=0, stop=math.prod(size), flat=0, offset=0
            )
            yield name, reader.read("master", whole).view(size).to(dtype)

    lineage = {
        "from": "run", "run": str(run), "step": trainer["step"], "tokens": trainer["tokens"],
        "init_from": OmegaConf.select(OmegaConf.load(run / "config.yaml"), "train.init_from"),
        "source": trainer["source"], "megakexue": __version__,
    }  # fmt: skip
    return write_bundle(out, config, weights(), run / "tokenizer.model", lineage, overwrite=overwrite)


def write_bundle(
    out: Path,
    config: ModelConfig,
    weights: Iterable[tuple[str, Tensor]],
    tokenizer: Path,
    lineage: dict[str, Any],
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Write a bundle, tensor by tensor, into a temporary folder that is renamed when whole.

    Args:
        weights: every parameter of the resolved `config` once, in any order. They are asked for one by one, and
            `shard_bytes` of them are kept in memory.
        lineage: YAML values that say where the weights come from.

    Raises:
        UserError: `out` exists (with `overwrite`: and is no bundle), or a weight is not finite.
    """
    assert config.rope.context is not None and resolve(config, "adamw", config.rope.context) == config, "resolve first"
    index: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    n_shards = total = 0
    with _new_folder(out, overwrite) as folder:

        def flush() -> None:
            nonlocal n_shards
            n_shards += 1
            name = f"model-{n_shards:05d}.safetensors"
            save_file(shard, folder / name)
            index.update(dict.fromkeys(shard, name))
            shard.clear()

        for name, tensor in weights:
            assert tuple(tensor.shape) == shape(name, config) and name not in index and name not in shard, name
            require(
                bool(tensor.isfinite().all()),
                f"{name} has elements that are not finite in {str(tensor.dtype).removeprefix('torch.')}: choose a "
                "wider dtype, or weights of an earlier step",
            )
            if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > shard_bytes:
                flush()
            shard[name] = tensor.contiguous()
            total += tensor.nbytes
        flush()
        assert index.keys() == set(parameter_names(config)), "the weights are not those of the config"
        if n_shards == 1:
            os.rename(folder / "model-00001.safetensors", folder / "model.safetensors")
        else:
            text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
            (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        content = {"model": dataclasses.asdict(config), "lineage": lineage}
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(content)), encoding="utf-8")
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
        manifest = {"format": FORMAT, "files": {path.name: _seal(path) for path in sorted(folder.iterdir())}}
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        _seal(folder / "manifest.json")
    return out


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse to write where something is, unless it is a bundle that shall be replaced. Raises UserError."""
    if os.path.lexists(out):
        require(overwrite, f"{out} exists: choose another name, or add --overwrite")
        require(is_bundle(out), f"{out} is no bundle, so --overwrite does not remove it: choose another name")


def is_bundle(folder: Path) -> bool:
    """Say whether a folder looks like a bundle; opening it says whether it is sound."""
    return all((folder / name).is_file() for name in ("manifest.json", "config.yaml"))


@contextmanager
def _new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """Give a folder that takes the name `out` when the block ends well, and is removed when it does not.

    Killed in between, it stays behind as `.NAME.partial`, and the next writer of `out` removes it.
    """
    check_out(out, overwrite)
    partial, old = (out.with_name(f".{out.name}.{state}") for state in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot make {partial}: {error.strerror}: choose another place for {out.name}") from error
    try:
        yield partial
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            out.rename(old)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _seal(path: Path) -> dict[str, Any]:
    """Push a file to the disk and return its manifest entry."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def verify(folder: Path, format: int = FORMAT, *, check_hashes: bool = True) -> list[str]:
    """Check a bundle's or checkpoint's files against its manifest, and return their names.

    Other files in the folder are no part of it, and nothing reads them.

    Raises:
        UserError: the manifest is damaged or of another format, or a file is missing, damaged or outside the folder.
    """
    path = folder / "manifest.json"
    manifest = read_json(path, "the manifest")
    found = manifest.get("format")
    require(found == format, f"{path}: format {found} is not {format}: use the version of megakexue that wrote it")
    entries = manifest.get("files")
    if not isinstance(entries, dict) or not all(
        isinstance(e, dict) and {"size", "sha256"} <= e.keys() for e in entries.values()
    ):
        raise UserError(f"{path} is damaged: it has no sizes and hashes of files; copy the folder again")
    for name, entry in entries.items():
        require(name == Path(name).name, f"{folder}: the manifest names {name!r}, which is outside the folder")
        require((folder / name).is_file(), f"{folder / name} is missing: copy the folder again")
        size = (folder / name).stat().st_size
        require(
            size == entry["size"],
            f"{folder / name} is damaged: it has {size} bytes instead of {entry['size']}; copy the folder again",
        )
    for name, entry in entries.items() if check_hashes else ():
        require(
            sha256(folder / name) == entry["sha256"],
            f"{folder / name} is damaged: its sha256 is not that of manifest.json; copy the folder again",
        )
    return sorted(entries)


class Bundle:
    """An open bundle: `config`, `lineage`, `tokenizer` (a path), and weights read by mmap."""

    def __init__(self, folder: str | Path, *, check_hashes: bool = True) -> None:
        """Verify and open; of many ranks one is enough for the hashes.

        Raises:
            UserError: there is no bundle, it is damaged, or its parameters are not those of its config.
        """
        self.folder = Path(folder)
        require(is_bundle(self.folder), f"{folder} is no bundle: make one with tools/export_model.py")
        names = verify(self.folder, check_hashes=check_hashes)
        for name in ("config.yaml", "tokenizer.model"):
            require(name in names, f"{folder}: manifest.json does not name {name}: copy the folder again")
        self.config, self.lineage = _read_config(self.folder / "config.yaml")
        self.tokenizer = self.folder / "tokenizer.model"
        self._files: dict[str, Any] = {}
        for name in names:
            if name.startswith("model") and name.endswith(".safetensors"):
                self._open(self.folder / name)
        expected, found = set(parameter_names(self.config)), set(self._files)
        require(
            expected == found,
            f"{folder}: the weights do not fit config.yaml: missing {sorted(expected - found)[:3]}, "
            f"unknown {sorted(found - expected)[:3]}",
        )
        for name in expected:
            got, want = tuple(self._files[name].get_slice(name).get_shape()), shape(name, self.config)
            require(got == want, f"{folder}: {name} has shape {got} instead of the {want} of config.yaml")

    def _open(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise UserError(f"{path} is no safetensors file: {error}") from error
        for name in file.keys():
            require(name not in self._files, f"{path}: {name} is in another file too: export the bundle again")
            self._files[name] = file

    def load_tokenizer(self) -> Tokenizer:
        """Open the tokenizer. Raises UserError: it is none, or has more pieces than the model has embeddings."""
        tokenizer = Tokenizer(self.tokenizer)
        require(
            tokenizer.vocab_size <= self.config.vocab_size,
            f"{self.tokenizer} has {tokenizer.vocab_size} pieces and the model a vocab_size of "
            f"{self.config.vocab_size}: it is not the tokenizer of these weights",
        )
        return tokenizer

    def weight(self, name: str) -> Tensor:
        """Return a parameter in the dtype it is stored in."""
        return self._files[name].get_tensor(name)

    def read(self, kind: str, segment: Segment) -> Tensor:
        """Return a segment of a parameter, float32, reading only the rows that it touches."""
        assert kind == "master"
        rows = self._files[segment.name].get_slice(segment.name)
        width = segment.shape[1] if len(segment.shape) == 2 else 1
        first, last = segment.start // width, -(-segment.stop // width)
        low = segment.start - first * width
        return rows[first:last].reshape(-1)[low : low + segment.numel].float()


def _read_config(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Return the model section and the lineage of a bundle's config.yaml."""
    try:
        values: Any = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # YAML's and OmegaConf's own errors have no common class
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    require(
        isinstance(values, dict) and {"model", "lineage"} <= values.keys(),
        f"{path} has no sections model and lineage: export the bundle again",
    )
    return build(ModelConfig, values["model"], where=str(path)), values["lineage"]
