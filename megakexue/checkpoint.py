"""Checkpoints: everything a run needs to go on, over segments, so free of world size and ZeRO stage.

    checkpoints/
      latest                        the name of the newest folder
      step_00000500/
        rank_00000.safetensors      kind/parameter/start -> elements from start on; kind: master, exp_avg, ...
        rank_00001.safetensors      ... and rng/* of that rank
        trainer.json                step, tokens, data position, guard, config
        manifest.json               size and sha256 of each of these; written last

Each rank writes the elements it owns. A folder is written under a temporary name, synced, and renamed, so a folder
with its final name is whole; loading checks the hashes all the same, and falls back to the folder before, saying so.
Each rank reads only the ranges it owns, by mmap, whichever rank wrote them. Nothing is unpickled.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megakexue import dist
from megakexue.config import UserError, read_json, sha256
from megakexue.engine import Engine
from megakexue.optim import Segment

FORMAT = 3


def step_folders(checkpoints: Path) -> list[Path]:
    """The finished checkpoints, newest first."""
    found = [path for path in checkpoints.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def save(
    checkpoints: Path, engine: Engine, trainer: dict[str, Any], own: dict[str, Tensor] | None = None, *, step: int,
    keep_last: int,
) -> Path:  # fmt: skip
    """Write the checkpoint of `step`, on all ranks together, and remove all but the newest `keep_last`.

    Args:
        trainer: JSON values, the same on every rank.
        own: more tensors of this rank, by names without a slash.
    """
    ranks = engine.ranks
    final = checkpoints / f"step_{step:08d}"
    folder = final.with_suffix(".tmp")
    failure = {}
    if ranks.is_first:
        try:
            checkpoints.mkdir(parents=True, exist_ok=True)
            for leftover in checkpoints.glob("*.tmp"):
                shutil.rmtree(leftover)
            folder.mkdir()
        except OSError as error:  # the others must not be left waiting
            failure = {"rank 0": str(error)}
    _raise_together(final, failure)
    tensors = {f"rng/{name}": state for name, state in _random_state().items()} | (own or {})
    for i, (segment, views) in enumerate(engine.state_tensors()):
        if engine.is_sharded or i % ranks.world_size == ranks.rank:
            # copies, since safetensors refuses views that share storage
            for kind, view in views.items():
                tensors[f"{kind}/{segment.name}/{segment.start}"] = view.to("cpu", copy=True)
    name = f"rank_{ranks.rank:05d}.safetensors"
    try:
        save_file(tensors, folder / name)
        entry = {name: _seal(folder / name)}
    except (OSError, SafetensorError) as error:  # a full disk here must not leave the others waiting
        entry, failure = {}, {f"rank {ranks.rank}": str(error)}
    _raise_together(final, failure)
    entries = dist.gather(entry)
    if ranks.is_first:
        _write_json(folder / "trainer.json", trainer)
        entries["trainer.json"] = _seal(folder / "trainer.json")
        _write_json(folder / "manifest.json", {"format": FORMAT, "step": step, "files": entries})
        _seal(folder / "manifest.json")
        _sync_folder(folder)
        if final.exists():  # a run that fell back beyond a damaged checkpoint has come here again
            shutil.rmtree(final)
        os.rename(folder, final)
        (checkpoints / "latest.tmp_file").write_text(final.name + "\n", encoding="utf-8")
        os.replace(checkpoints / "latest.tmp_file", checkpoints / "latest")
        _sync_folder(checkpoints)
        # a user's own folders have other names, and this one is never removed
        for old in [path for path in step_folders(checkpoints) if step_of(path) < step][keep_last - 1 :]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def _raise_together(folder: Path, failure: dict[str, str]) -> None:
    """Raise on all ranks what has failed on any."""
    failures = dist.gather(failure)
    if failures:
        raise OSError(f"cannot save {folder}: {failures}: make room, then run the same command again")


def find(checkpoints: Path, ranks: dist.Ranks) -> tuple[Path | None, list[str]]:
    """Return the newest sound checkpoint (None: there is none) and a line on each damaged one that was passed over.

    Every rank checks the hashes of its share of the files, and all agree on the result. Damaged ones are renamed to
    step_X.damaged, so that they neither count nor come back when the run reaches their step again.

    Raises:
        UserError: there are checkpoints and all of them are damaged.
    """
    # one rank lists the folder: on a network file system others may see another list for a while
    listed = dist.gather({"folders": step_folders(checkpoints)} if ranks.is_first else {})
    folders: list[Path] = listed["folders"]
    warnings: list[str] = []
    for folder in folders:
        fault = _fault(folder, ranks)
        faults = [f for f in dist.gather({str(ranks.rank): fault}).values() if f]
        if not faults:
            if ranks.is_first:
                for damaged in folders[: len(warnings)]:
                    aside = damaged.with_suffix(".damaged")
                    shutil.rmtree(aside, ignore_errors=True)
                    os.rename(damaged, aside)
            dist.barrier()
            return folder, warnings
        warnings.append(f"checkpoint {folder} is damaged and is not used: {faults[0]}")
    if folders:
        raise UserError(
            f"no sound checkpoint in {checkpoints}: {'; '.join(warnings)}. Restore a folder, or move {checkpoints} "
            "away to start from the beginning"
        )
    return None, warnings


def _fault(folder: Path, ranks: dist.Ranks) -> str | None:
    """What is wrong with this rank's share of a checkpoint's files, or None."""
    try:
        manifest = read_json(folder / "manifest.json", "the manifest of a checkpoint")
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']} is not {FORMAT}"
        for i, (name, entry) in enumerate(sorted(manifest["files"].items())):
            if name != Path(name).name:
                return f"the manifest names {name!r}, which is outside the folder"
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (folder / name).stat().st_size != entry["size"]:
                return f"{name} has {(folder / name).stat().st_size} bytes instead of {entry['size']}"
            if i % ranks.world_size == ranks.rank and sha256(folder / name) != entry["sha256"]:
                return f"{name} does not have the sha256 of the manifest"
    except (UserError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return None


class Reader:
    """Reads ranges of a checkpoint's state tensors, from whichever files hold them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = sorted(name for name in read_json(folder / "manifest.json", "the manifest")["files"] if "rank_" in name)
        self._files = [safe_open(folder / name, framework="pt") for name in names]
        self._pieces: dict[tuple[str, str], list[tuple[int, int, int, str]]] = {}
        for number, file in enumerate(self._files):
            for key in file.keys():
                kind, name, start = key.split("/") if key.count("/") == 2 else (key, "", "0")
                if name:
                    length = file.get_slice(key).get_shape()[0]
                    piece = (int(start), int(start) + length, number, key)
                    self._pieces.setdefault((kind, name), []).append(piece)

    def read(self, kind: str, segment: Segment) -> Tensor:
        """Return the elements of a segment, float32, from the pieces that overlap it.

        Raises:
            UserError: the checkpoint does not hold all of them.
        """
        out = torch.full((segment.numel,), torch.nan)  # what no piece covers would show
        n_read = 0
        for start, stop, number, key in self._pieces.get((kind, segment.name), ()):
            low, high = max(start, segment.start), min(stop, segment.stop)
            if low < high:
                part = self._files[number].get_slice(key)[low - start : high - start]
                out[low - segment.start : high - segment.start] = part
                n_read += high - low
        if n_read != segment.numel:
            raise UserError(
                f"{self.folder} holds {n_read} of the {segment.numel} elements {segment.start}:{segment.stop} of "
                f"{segment.name} ({kind}): it was written by another model or optimizer"
            )
        return out

    def restore_random_state(self, rank: int) -> bool:
        """Put back the random state of `rank`; False when the checkpoint has none, from a smaller world."""
        if rank >= len(self._files):
            return False
        file = self._files[rank]
        torch.set_rng_state(file.get_tensor("rng/cpu"))
        if torch.cuda.is_available() and "rng/cuda" in file.keys():
            torch.cuda.set_rng_state(file.get_tensor("rng/cuda"))
        return True


def load(folder: Path, engine: Engine, check: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Restore engine, optimizer, guard and random state from a checkpoint; return the trainer's values.

    Args:
        check: called with those values before anything is read; raises to refuse them.
    """
    trainer = read_json(folder / "trainer.json", "the trainer's state")
    check(trainer)
    restore(folder, engine)
    engine.guard.load_state_dict(trainer["guard"])
    return trainer


def restore(folder: Path, engine: Engine) -> None:
    """Put weights, optimizer, random state and the guard's window back; its counts and loss scale go on."""
    trainer = read_json(folder / "trainer.json", "the trainer's state")
    reader = Reader(folder)
    engine.load(reader.read, with_state=True)
    engine.optimizer.n_updates = trainer["n_updates"]
    engine.guard.load_window(trainer["guard"])
    reader.restore_random_state(engine.ranks.rank)
    engine.check_weights()


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _seal(path: Path) -> dict[str, Any]:
    """Push a file to the disk and return its manifest entry."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
