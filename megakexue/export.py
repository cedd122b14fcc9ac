"""Bundles: the only thing that passes between programs.

    bundle/
      config.yaml              the model section, resolved, and the lineage
      model.safetensors        parameters by name; above SHARD_BYTES several files and model.safetensors.index.json
      optimizer.safetensors    if wanted, its state by kind/name; likewise
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
from megakexue.config import ModelConfig, OptimConfig, UserError, build, read_json, require, sha256
from megakexue.model import axes, parameter_names, resolve, shape
from megakexue.optim import Segment, state_dtypes
from megakexue.tokenizer import Tokenizer

SHARD_BYTES = 2 * 2**30
"""Of a file; writing one takes twice as much memory."""
FORMAT = 2


def export_run(
    run: Path, out: Path, *, step: int | None = None, dtype: torch.dtype = torch.float32, overwrite: bool = False,
    with_optimizer: bool = False,
) -> Path:  # fmt: skip
    """Write the bundle of a run's checkpoint (default: the newest) from its fp32 masters.

    Args:
        with_optimizer: its state too, float32, so that training can go on from the bundle with it.

    Raises:
        UserError: no such run or step, a damaged checkpoint, weights that `dtype` cannot hold, or `out` exists.
    """
    check_out(out, overwrite)
    source = RunCheckpoint(run, step)
    names = parameter_names(source.config)
    weights = ((name, source.tensor("master", name).to(dtype)) for name in names)
    optimizer, state = (source.optimizer, optimizer_state(source)) if with_optimizer else (None, ())
    return write_bundle(
        out, source.config, weights, source.tokenizer, source.lineage, overwrite=overwrite, optimizer=optimizer,
        state=state,
    )  # fmt: skip


def family(optimizer: dict[str, Any]) -> tuple[str, bool]:
    """What decides which state tensors there are, and so whether one optimizer can take another's state."""
    return optimizer["name"], optimizer["embedding"] == "adamw"


def state_kinds(optimizer: dict[str, Any], name: str) -> list[str]:
    """The kinds of state that a parameter has under such an optimizer."""
    return list(state_dtypes(OptimConfig(name=optimizer["name"], embedding=optimizer["embedding"]), axes(name).role))


def optimizer_state(source: "RunCheckpoint | Bundle") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the optimizer's state, as `write_bundle` takes them."""
    for name in parameter_names(source.config):
        for kind in state_kinds(source.optimizer, name) if source.optimizer else ():
            yield f"{kind}/{name}", source.tensor(kind, name)


class RunCheckpoint:
    """The weights and the optimizer's state of a run's checkpoint (default: the newest), read by mmap.

    Raises:
        UserError: no such run or step, or a damaged checkpoint.
    """

    def __init__(self, run: Path, step: int | None = None) -> None:
        # here, since programs that read bundles need neither checkpoints nor the data pipeline below them
        from megakexue import checkpoint

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
        self.config = build(ModelConfig, trainer["config"]["model"], where=str(folder / "trainer.json"))
        self.tokenizer = run / "tokenizer.model"
        optim = trainer["config"]["optim"]
        self.optimizer: dict[str, Any] | None = {
            "name": optim["name"], "embedding": optim["embedding"], "n_updates": trainer["n_updates"],
        }  # fmt: skip
        self.lineage = {
            "from": "run", "run": str(run), "step": trainer["step"], "tokens": trainer["tokens"],
            "init_from": OmegaConf.select(OmegaConf.load(run / "config.yaml"), "train.init_from"),
            "source": trainer["source"], "data": {"fingerprint": trainer["data"], **trainer["position"]},
            "megakexue": __version__,
        }  # fmt: skip
        self._folder, self._reader = folder, checkpoint.Reader(folder)

    def tensor(self, kind: str, name: str) -> Tensor:
        """Return a whole parameter (kind master) or a tensor of its optimizer's state, float32."""
        size = shape(name, self.config)
        whole = Segment(name=name, role=axes(name).role, shape=size, start=0, stop=math.prod(size), flat=0, offset=0)
        try:
            return self._reader.read(kind, whole).view(size)
        except FileNotFoundError as error:
            raise UserError(
                f"{self._folder} was removed while it was read, since its run goes on: keep it with "
                "checkpoint.keep_every, or take a newer one"
            ) from error


def open_source(path: Path, step: int | None = None) -> "RunCheckpoint | Bundle":
    """Open a run's checkpoint or a bundle. Raises UserError: it is neither, or damaged."""
    if is_bundle(path):
        require(step is None, f"--step {step} has no effect: {path} is a bundle, which holds one step")
        return Bundle(path)
    require(
        (path / "checkpoints").is_dir(),
        f"{path} is neither a run nor a bundle: it has no checkpoints/ and no manifest.json",
    )
    return RunCheckpoint(path, step)


def write_bundle(
    out: Path,
    config: ModelConfig,
    weights: Iterable[tuple[str, Tensor]],
    tokenizer: Path,
    lineage: dict[str, Any],
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    optimizer: dict[str, Any] | None = None,
    state: Iterable[tuple[str, Tensor]] = (),
) -> Path:
    """Write a bundle, tensor by tensor, into a temporary folder that is renamed when whole.

    Args:
        weights: every parameter of the resolved `config` once, in any order. They are asked for one by one, and
            `shard_bytes` of them are kept in memory.
        lineage: YAML values that say where the weights come from; read when the weights are written.
        optimizer: what `state` is of: `name` and `embedding` as in OptimConfig, and `n_updates`; None: there is none.
        state: its tensors by kind/name.

    Raises:
        UserError: `out` exists (with `overwrite`: and is no bundle), or a weight is not finite.
    """
    assert config.rope.context is not None and resolve(config, "adamw", config.rope.context) == config, "resolve first"
    names = parameter_names(config)
    with _new_folder(out, overwrite) as folder:
        written = _write_tensors(folder, "model", config, weights, shard_bytes)
        assert written == set(names), "the weights are not those of the config"
        content: dict[str, Any] = {"model": dataclasses.asdict(config)}
        if optimizer is not None:
            written = _write_tensors(folder, "optimizer", config, state, shard_bytes)
            assert written == {f"{kind}/{name}" for name in names for kind in state_kinds(optimizer, name)}
            content["optimizer"] = optimizer
        content["lineage"] = lineage
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(content)), encoding="utf-8")
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
        manifest = {"format": FORMAT, "files": {path.name: _seal(path) for path in sorted(folder.iterdir())}}
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        _seal(folder / "manifest.json")
    return out


def _write_tensors(
    folder: Path, stem: str, config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int
) -> set[str]:
    """Write STEM.safetensors, or several files and their index; return the keys, kind/name or just a name."""
    index: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    n_shards = total = 0

    def flush() -> None:
        nonlocal n_shards
        n_shards += 1
        name = f"{stem}-{n_shards:05d}.safetensors"
        save_file(shard, folder / name)
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
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise UserError(f"{out} is not written, and nothing is left of it: {error}") from error
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
    """An open bundle: `config`, `lineage`, `optimizer`, `tokenizer` (a path), and tensors read by mmap."""

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
        self.config, self.lineage, self.optimizer = _read_config(self.folder / "config.yaml")
        self.tokenizer = self.folder / "tokenizer.model"
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name in names:
            if name.startswith(("model", "optimizer")) and name.endswith(".safetensors"):
                self._open(self.folder / name)
        expected, found = set(parameter_names(self.config)), set(self._files)
        if self.optimizer:
            names = parameter_names(self.config)
            expected |= {f"{kind}/{name}" for name in names for kind in state_kinds(self.optimizer, name)}
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
        tokenizer = Tokenizer(self.tokenizer)
        require(
            tokenizer.vocab_size <= self.config.vocab_size,
            f"{self.tokenizer} has {tokenizer.vocab_size} pieces and the model a vocab_size of "
            f"{self.config.vocab_size}: it is not the tokenizer of these weights",
        )
        return tokenizer

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


def _read_config(path: Path) -> tuple[ModelConfig, dict[str, Any], dict[str, Any] | None]:
    """Return the model section, the lineage and the optimizer section of a bundle's config.yaml."""
    try:
        values: Any = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # YAML's and OmegaConf's own errors have no common class
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    require(
        isinstance(values, dict) and {"model", "lineage"} <= values.keys(),
        f"{path} has no sections model and lineage: export the bundle again",
    )
    optimizer = values.get("optimizer")
    require(
        optimizer is None
        or (isinstance(optimizer, dict)
            and {"name", "embedding", "n_updates"} == optimizer.keys()
            and optimizer["name"] in ("tiger", "lion", "adamw")
            and optimizer["embedding"] in (None, "lazy", "dense", "adamw")
            and isinstance(optimizer["n_updates"], int)),
        f"{path}: its section optimizer is not of the form that this version writes: export the bundle again",
    )  # fmt: skip
    return build(ModelConfig, values["model"], where=str(path)), values["lineage"], optimizer
