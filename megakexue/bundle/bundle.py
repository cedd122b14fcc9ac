"""Bundles: the only thing that passes between programs.

    bundle/
      config.yaml              the model section, resolved, and the lineage
      model.safetensors        parameters by name; above SHARD_BYTES several files and model.safetensors.index.json
      optimizer.safetensors    if wanted, its state by kind/name; likewise
      tokenizer.model          or tokenizer.json and tokenizer_config.json
      manifest.json            sha256 and size of each file; written last

Pretraining, growth, finetuning, generation and conversion all start from one, and know nothing of DeepSpeed.

What must stay true: a folder with its final name is whole; opening one checks every hash, reads only the files that the
manifest names, and unpickles nothing; the parameters are exactly those of the config.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megakexue.config import OptimConfig, ResolvedModel, UserError, build, read_yaml, require, to_yaml
from megakexue.core.axes import axes, parameter_names, shape
from megakexue.core.resolve import resolve
from megakexue.core.segments import Segment
from megakexue.files import LOCK, new_folder, require_writable, seal, verify, write_json
from megakexue.text.tokenizer import Tokenizer
from megakexue.text.tokenizer_files import JSON, MODEL, copy_tokenizer, load_tokenizer
from megakexue.text.tokenizer_json import CONFIG

SHARD_BYTES = 2 * 2**30
"""Of a file; writing one takes twice as much memory."""
FORMAT = 2
MAKERS = "tools/export_model.py of a run, or tools/import_hf.py of a Hugging Face folder or a GGUF file"


@dataclass(frozen=True, kw_only=True)
class OptimizerInfo:
    """Which optimizer a state belongs to."""

    name: Literal["tiger", "lion", "adamw", "muon"]
    embedding: Literal["lazy", "dense", "adamw"] | None
    """`optim.embedding`, resolved."""
    n_updates: int
    """That it has made."""

    @classmethod
    def of(cls, config: OptimConfig, n_updates: int = 0) -> "OptimizerInfo":
        return cls(name=config.name, embedding=config.embedding, n_updates=n_updates)

    @property
    def family(self) -> tuple[str, bool]:
        """What decides which state tensors there are, and so whether one optimizer can take another's state."""
        return self.name, self.embedding == "adamw"

    def kinds(self, parameter: str) -> list[str]:
        """The kinds of state that a parameter has."""
        return list(OptimConfig(name=self.name, embedding=self.embedding).state_dtypes(axes(parameter).role))


@runtime_checkable
class TrainedModel(Protocol):
    """What generation and export read: a bundle, or the checkpoint of a run."""

    config: ResolvedModel
    lineage: dict[str, Any]
    """Where the weights come from, as YAML values."""
    tokenizer: Path

    def weight(self, name: str) -> Tensor:
        """Return a parameter in its own shape, in the dtype that it is stored in."""


def load_tokenizer_of(model: TrainedModel) -> Tokenizer:
    """Open the tokenizer. Raises UserError: it is none, or has more pieces than the model has embeddings."""
    tokenizer = load_tokenizer(model.tokenizer)
    require(
        tokenizer.vocab_size <= model.config.vocab_size,
        f"{model.tokenizer} has {tokenizer.vocab_size} pieces and the model a vocab_size of "
        f"{model.config.vocab_size}: it is not the tokenizer of these weights",
    )
    return tokenizer


def write_bundle(
    out: Path, config: ResolvedModel, weights: Iterable[tuple[str, Tensor]], tokenizer: Path, lineage: dict[str, Any],
    shard_bytes: int = SHARD_BYTES, overwrite: bool = False,
    optimizer: OptimizerInfo | None = None, state: Iterable[tuple[str, Tensor]] = (),
) -> Path:  # fmt: skip
    """Write a bundle, tensor by tensor, into a temporary folder that is renamed when whole.

    Args:
        weights: every parameter of the resolved `config` once, in any order. They are asked for one by one, and
            `shard_bytes` of them are kept in memory.
        lineage: YAML values that say where the weights come from; read when the weights are written.
        optimizer: what `state` is of; None: there is none.
        state: its tensors by kind/name.

    Raises:
        UserError: `out` exists (with `overwrite`: and is no bundle), it cannot be written, or a weight is not finite.
    """
    assert resolve(config, "adamw", config.rope.context) == config, "resolve first"
    names = parameter_names(config)
    check_out(out, overwrite)
    try:
        with new_folder(out) as folder:
            written = _write_tensors(folder, "model", config, weights, shard_bytes)
            assert written == set(names), "the weights are not those of the config"
            content: dict[str, Any] = {"model": dataclasses.asdict(config)}
            if optimizer is not None:
                written = _write_tensors(folder, "optimizer", config, state, shard_bytes)
                assert written == {f"{kind}/{name}" for name in names for kind in optimizer.kinds(name)}
                content["optimizer"] = dataclasses.asdict(optimizer)
            content["lineage"] = lineage
            (folder / "config.yaml").write_text(to_yaml(content), encoding="utf-8")
            copy_tokenizer(tokenizer, folder)
            files = {path.name: seal(path) for path in sorted(folder.iterdir()) if path.name != LOCK}
            write_json(folder / "manifest.json", {"format": FORMAT, "files": files})
            seal(folder / "manifest.json")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out} is not written: {error}") from error  # what it is made of cannot be read
    return out


def _write_tensors(
    folder: Path, stem: str, config: ResolvedModel, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int
) -> set[str]:
    """Write STEM.safetensors, or several files and their index; return the keys, kind/name or just a name."""
    index: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    n_shards = total = 0

    def flush() -> None:
        nonlocal n_shards
        n_shards += 1
        name = f"{stem}-{n_shards:05d}.safetensors"
        save_tensors(shard, folder / name)
        index.update(dict.fromkeys(shard, name))
        shard.clear()

    for key, tensor in tensors:
        assert tuple(tensor.shape) == shape(key.split("/")[-1], config) and key not in index and key not in shard, key
        require(
            bool(tensor.isfinite().all()),
            f"{key} has elements that are not finite in {str(tensor.dtype).removeprefix('torch.')}: choose a "
            "wider dtype, or weights of an earlier step",
        )
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > shard_bytes:
            flush()
        shard[key] = tensor.contiguous()
        total += tensor.nbytes
    flush()
    if n_shards == 1:
        os.rename(folder / f"{stem}-00001.safetensors", folder / f"{stem}.safetensors")
    else:
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
        (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")
    return set(index)


def save_tensors(shard: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a file. Raises OSError: safetensors itself has an error of its own for a full disk."""
    try:
        save_file(shard, path, metadata)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse to write where nothing can be, or something is, but a bundle that shall be replaced. Raises UserError."""
    require_writable(f"--out {out}", out)
    if os.path.lexists(out):
        require(overwrite, f"{out} exists: choose another name, or add --overwrite")
        require(is_bundle(out), f"{out} is no bundle, so --overwrite does not remove it: choose another name")


def is_bundle(folder: Path) -> bool:
    """Say whether a folder looks like a bundle; opening it says whether it is sound."""
    return all((folder / name).is_file() for name in ("manifest.json", "config.yaml"))


class Bundle:
    """An open bundle: `config`, `lineage`, `optimizer`, `tokenizer` (a path), and tensors read by mmap."""

    def __init__(self, folder: str | Path, *, check_hashes: bool = True) -> None:
        """Verify and open; of many ranks one is enough for the hashes.

        Raises:
            UserError: there is no bundle, it is damaged, or its parameters are not those of its config.
        """
        self.folder = Path(folder)
        require(is_bundle(self.folder), f"{folder} is no bundle: make one with {MAKERS}")
        names = verify(self.folder, FORMAT, check_hashes=check_hashes)
        tokenizer = [JSON, CONFIG] if JSON in names else [MODEL]
        for name in ("config.yaml", *tokenizer):
            require(name in names, f"{folder}: manifest.json does not name {name}: copy the folder again")
        self.config, self.lineage, self.optimizer = _read_config(self.folder / "config.yaml")
        self.tokenizer = self.folder / tokenizer[0]
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name in names:
            if name.startswith(("model", "optimizer")) and name.endswith(".safetensors"):
                self._open(self.folder / name)
        expected, found = set(parameter_names(self.config)), set(self._files)
        if self.optimizer:
            expected |= {f"{kind}/{name}" for name in expected for kind in self.optimizer.kinds(name)}
        require(
            expected == found,
            f"{folder}: the weights do not fit config.yaml: missing {sorted(expected - found)[:3]}, "
            f"unknown {sorted(found - expected)[:3]}",
        )
        for key in expected:
            got, want = self._shapes[key], shape(key.split("/")[-1], self.config)
            require(got == want, f"{folder}: {key} has shape {got} instead of the {want} of config.yaml")

    def _open(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    require(name not in self._files, f"{path}: {name} is in another file too: export the bundle again")
                    self._files[name], self._shapes[name] = path, tuple(file.get_slice(name).get_shape())
        except SafetensorError as error:
            raise UserError(f"{path} is no safetensors file: {error}") from error

    def load_tokenizer(self) -> Tokenizer:
        """Open the tokenizer. Raises UserError: it is none, or has more pieces than the model has embeddings."""
        return load_tokenizer_of(self)

    def weight(self, name: str) -> Tensor:
        """Return a parameter in the dtype that it is stored in."""
        with safe_open(self._files[name], framework="pt") as file:  # anew, or all that was read would stay mapped
            return file.get_tensor(name)

    def tensor(self, kind: str, name: str) -> Tensor:
        """Return a whole parameter (kind master) or a tensor of its optimizer's state, as it is stored."""
        return self.weight(name if kind == "master" else f"{kind}/{name}")

    def read(self, kind: str, segment: Segment) -> Tensor:
        """Return a segment of a parameter or of its state, float32, reading only the rows that it touches."""
        key = segment.name if kind == "master" else f"{kind}/{segment.name}"
        width = segment.shape[1] if len(segment.shape) == 2 else 1
        first, last = segment.start // width, -(-segment.stop // width)
        low = segment.start - first * width
        with safe_open(self._files[key], framework="pt") as file:
            rows = file.get_slice(key)[first:last]
            return rows.reshape(-1)[low : low + segment.numel].float()


def _read_config(path: Path) -> tuple[ResolvedModel, dict[str, Any], OptimizerInfo | None]:
    """Return the model section, the lineage and the optimizer section of a bundle's config.yaml."""
    values = read_yaml(path)
    require(
        isinstance(values, dict) and {"model", "lineage"} <= values.keys(),
        f"{path} has no sections model and lineage: export the bundle again",
    )
    optimizer = values.get("optimizer")
    try:
        info = None if optimizer is None else build(OptimizerInfo, optimizer, where=str(path))
        require(info is None or dataclasses.asdict(info) == optimizer, "a value has another type")
    except ValueError as error:
        raise UserError(
            f"{path}: its section optimizer is not of the form that this version writes: export the bundle again"
        ) from error
    return build(ResolvedModel, values["model"], where=str(path)), values["lineage"], info
