"""Bundles: the only thing that passes between programs.

    bundle/
      config.yaml              the model section, resolved, and the lineage
      model.safetensors        parameters by name; above SHARD_BYTES several files and model.safetensors.index.json
      tokenizer.model
      manifest.json            sha256 and size of each file; written last

Pretraining, growth, finetuning, generation and conversion all start from one, and know nothing of DeepSpeed.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megakexue import __version__
from megakexue.checkpoint import Reader, step_folders
from megakexue.config import ModelConfig, UserError, build, read_json, require, sha256
from megakexue.model import AXES, axes, shape
from megakexue.optim import Segment

SHARD_BYTES = 4 * 2**30
FORMAT = 1


def parameter_names(config: ModelConfig) -> list[str]:
    """Every parameter of the model, layer by layer, in the order of the axis table."""
    names = []
    for entry in AXES:
        if entry.startswith("blocks."):
            names += [entry.replace("blocks.", f"blocks.{i}.") for i in range(config.n_layers)]
        elif not (entry == "head.weight" and config.tie_embeddings) and not (
            entry == "norm.gain" and config.residual != "prenorm"
        ):
            names.append(entry)
    return names


def export_run(run: Path, out: Path, *, step: int | None = None, dtype: torch.dtype = torch.float32) -> Path:
    """Write the bundle of a run's checkpoint (default: the newest) from its fp32 masters.

    Raises:
        UserError: no such run or step, or `out` exists.
    """
    require((run / "config.yaml").is_file(), f"{run} is no run folder: it has no config.yaml")
    folders = step_folders(run / "checkpoints")
    require(bool(folders), f"{run} has no checkpoint yet: train on, or lower checkpoint.every_steps")
    if step is not None:
        folders = [folder for folder in folders if folder.name == f"step_{step:08d}"]
        require(bool(folders), f"{run} has no checkpoint of step {step}: see {run / 'checkpoints'}")
    folder = folders[0]
    verify(folder)
    trainer = read_json(folder / "trainer.json", "the trainer's state")
    config = build(ModelConfig, trainer["model"], where=str(folder / "trainer.json"))
    reader = Reader(folder)

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name in parameter_names(config):
            size = shape(name, config)
            whole = Segment(
                name=name, role=axes(name).role, shape=size, start=0, stop=torch.Size(size).numel(), flat=0, offset=0
            )
            yield name, reader.read("master", whole).view(size).to(dtype)

    lineage = {
        "from": "run", "run": str(run), "step": trainer["step"], "tokens": trainer["tokens"],
        "source": trainer["source"], "megakexue": __version__,
    }  # fmt: skip
    return write_bundle(out, config, weights(), run / "tokenizer.model", lineage)


def write_bundle(
    out: Path,
    config: ModelConfig,
    weights: Iterator[tuple[str, Tensor]],
    tokenizer: Path,
    lineage: dict[str, Any],
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a bundle, tensor by tensor, into a temporary folder that is renamed when whole."""
    require(not out.exists(), f"{out} exists: choose another name, or remove it")
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    shards: list[dict[str, Tensor]] = [{}]
    files: list[str] = []
    index: dict[str, str] = {}
    n_bytes = total = 0

    def flush() -> None:
        name = f"model-{len(files) + 1:05d}.safetensors"
        save_file(shards[0], temporary / name)
        index.update(dict.fromkeys(shards[0], name))
        files.append(name)
        shards[0] = {}

    for name, tensor in weights:
        if n_bytes + tensor.nbytes > shard_bytes and shards[0]:
            flush()
            n_bytes = 0
        shards[0][name] = tensor.contiguous()
        n_bytes += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(files) == 1:
        os.rename(temporary / files[0], temporary / "model.safetensors")
    else:
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
        (temporary / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    content = {"model": dataclasses.asdict(config), "lineage": lineage}
    (temporary / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(content)), encoding="utf-8")
    shutil.copyfile(tokenizer, temporary / "tokenizer.model")
    entries = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in sorted(temporary.iterdir())}
    manifest = json.dumps({"format": FORMAT, "files": entries}, indent=1)
    (temporary / "manifest.json").write_text(manifest + "\n", encoding="utf-8")
    os.rename(temporary, out)
    return out


def verify(folder: Path) -> None:
    """Check a bundle's or checkpoint's files against its manifest. Raises UserError."""
    manifest = read_json(folder / "manifest.json", "the manifest")
    for name, entry in manifest["files"].items():
        require(name == Path(name).name, f"{folder}: the manifest names {name!r}, which is outside the folder")
        path = folder / name
        require(path.is_file(), f"{path} is missing: copy the folder again")
        require(
            path.stat().st_size == entry["size"] and sha256(path) == entry["sha256"],
            f"{path} is damaged: its size or sha256 is not that of manifest.json; copy the folder again",
        )


class Bundle:
    """An open bundle: `config`, `lineage`, `tokenizer` (a path), and weights read by mmap."""

    def __init__(self, folder: str | Path) -> None:
        """Verify and open. Raises UserError: no bundle, damaged, or its parameters are not those of its config."""
        self.folder = Path(folder)
        require(
            (self.folder / "manifest.json").is_file() and (self.folder / "config.yaml").is_file(),
            f"{folder} is no bundle: make one with tools/export_model.py",
        )
        verify(self.folder)
        values = OmegaConf.load(self.folder / "config.yaml")
        self.config = build(ModelConfig, values.model, where=str(self.folder / "config.yaml"))
        self.lineage = OmegaConf.to_container(values.lineage)
        self.tokenizer = self.folder / "tokenizer.model"
        self._files: dict[str, Any] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            file = safe_open(path, framework="pt")
            self._files |= dict.fromkeys(file.keys(), file)
        expected, found = set(parameter_names(self.config)), set(self._files)
        if expected != found:
            raise UserError(
                f"{folder}: the weights do not fit config.yaml: missing {sorted(expected - found)[:3]}, "
                f"unknown {sorted(found - expected)[:3]}"
            )
        for name in expected:
            got = tuple(self._files[name].get_slice(name).get_shape())
            want = shape(name, self.config)
            require(got == want, f"{folder}: {name} has shape {got} instead of {want}")

    def weight(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def read(self, kind: str, segment: Segment) -> Tensor:
        """Return a segment of a parameter, float32, reading only the rows that it touches."""
        assert kind == "master"
        rows = self._files[segment.name].get_slice(segment.name)
        width = segment.shape[1] if len(segment.shape) == 2 else 1
        first, last = segment.start // width, -(-segment.stop // width)
        low = segment.start - first * width
        return rows[first:last].reshape(-1)[low : low + segment.numel].float()
