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

import logging
import math
import os
import random
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megakexue import dist
from megakexue.config import UserError
from megakexue.core.segments import Segment
from megakexue.files import read_json, seal, sha256, sync_folder, write_json
from megakexue.run.engine import Engine
from megakexue.run.state import TRAINER, TrainerState

FORMAT = 4
_FILE = re.compile(r"rank_\d{5}\.safetensors|trainer\.json")
_KEY = re.compile(r"rng/\w+|batch\.\d+\.\w+|\w+/[\w.]+/\d+")
_CHUNK = 2**24
"""Bytes of a tensor that are looked at at a time."""

log = logging.getLogger("megakexue")


def step_folders(checkpoints: Path) -> list[Path]:
    """The finished checkpoints, newest first."""
    found = [path for path in checkpoints.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def write(
    copy: Callable[[], None], tensors: Callable[[], dict[str, Tensor]], state: TrainerState, final: Path,
    ranks: dist.Ranks, group: Any,
) -> None:  # fmt: skip
    """Write one checkpoint, all ranks together: under a temporary name, and renamed when it is on the disk.

    Args:
        copy: called first, then `tensors`.

    Raises:
        OSError: on all ranks, naming those that could not write. Nothing is left behind.
    """
    folder, parent = final.with_suffix(".tmp"), final.parent
    name = file_name(ranks.rank)
    entries: dict[str, Any] = {}

    def together(action: Callable[[], Any]) -> dict[str, Any]:
        """Merge what `action` returns on all ranks; where it fails on one, fail on all and do not wait for ever."""
        value: dict[str, Any] = {}
        failure: dict[str, str] = {}
        try:
            value = action() or {}
        except Exception as error:  # whatever it is, the others must not be left waiting
            failure = {f"rank {ranks.rank}": str(error) or repr(error)}
        failures = dist.gather(failure, group)
        if failures:
            if ranks.is_first:
                shutil.rmtree(folder, ignore_errors=True)  # what is half-written takes the room that is missing
            raise OSError(f"cannot save {final}: {failures}")
        return dist.gather(value, group)

    def begin() -> None:
        parent.mkdir(parents=True, exist_ok=True)
        for leftover in parent.glob("step_*.tmp"):
            shutil.rmtree(leftover)
        folder.mkdir()

    def write_own() -> dict[str, Any]:
        save_file(tensors(), folder / name)
        return {name: seal(folder / name)}

    def end() -> None:
        write_json(folder / TRAINER, state.to_json())
        entries[TRAINER] = seal(folder / TRAINER)
        write_json(folder / "manifest.json", {"format": FORMAT, "step": step_of(final), "files": entries})
        seal(folder / "manifest.json")
        sync_folder(folder)
        if final.exists():  # a dump of the same step, or a save that failed after this point
            shutil.rmtree(final)
        os.rename(folder, final)
        with suppress(OSError):  # the checkpoint is whole without it
            (parent / "latest.tmp_file").write_text(final.name + "\n", encoding="utf-8")
            os.replace(parent / "latest.tmp_file", parent / "latest")
        sync_folder(parent)

    is_first = ranks.is_first
    together(copy)
    together(lambda: begin() if is_first else None)
    entries.update(together(write_own))
    together(lambda: end() if is_first else None)


def find(checkpoints: Path, ranks: dist.Ranks, every: int = 1) -> tuple[Path | None, list[str]]:
    """Return the newest sound checkpoint (None: there is none) and a line on each damaged one that was passed over.

    Every rank checks the hashes of its share of the files, and all agree on the result. Damaged ones are renamed to
    step_X.damaged, so that they neither count nor come back when the run reaches their step again.

    Args:
        every: only those of every so many steps.

    Raises:
        UserError: there are checkpoints and all of them are damaged; or the newest one cannot be read, which is no
            reason to train its steps again.
    """
    # one rank lists the folder: on a network file system others may see another list for a while
    listed = dist.gather({"folders": step_folders(checkpoints)} if ranks.is_first else {})
    folders: list[Path] = [folder for folder in listed["folders"] if step_of(folder) % every == 0]
    warnings: list[str] = []
    for folder in folders:
        fault, is_damaged = _fault(folder, ranks)
        found = dist.gather({str(ranks.rank): (fault, is_damaged)} if fault else {})
        for rank, (text, is_damaged_there) in found.items():
            if not is_damaged_there:
                raise UserError(f"checkpoint {folder} cannot be used by rank {rank}: {text}: it is left as it is")
        if not found:
            failed = {}
            if ranks.is_first:
                try:
                    for damaged in folders[: len(warnings)]:
                        aside = damaged.with_suffix(".damaged")
                        shutil.rmtree(aside, ignore_errors=True)
                        os.rename(damaged, aside)
                except OSError as error:
                    failed["aside"] = str(error)
            for text in dist.gather(failed).values():
                raise UserError(f"cannot put a damaged checkpoint aside: {text}: remove it, with the files it names")
            return folder, warnings
        warnings.append(f"checkpoint {folder} is damaged and is not used: {next(iter(found.values()))[0]}")
    if folders:
        raise UserError(
            f"no sound checkpoint in {checkpoints}: {'; '.join(warnings)}. Restore a folder, or move {checkpoints} "
            "away to start from the beginning"
        )
    return None, warnings


def _fault(folder: Path, ranks: dist.Ranks) -> tuple[str | None, bool]:
    """Return what is wrong with this rank's share of a checkpoint's files, or None; and whether that is damage.

    Two faults are no damage: the storage does not answer, or a newer version of this code wrote the checkpoint.
    """
    try:
        manifest = read_json(folder / "manifest.json", "the manifest of a checkpoint")
        if manifest["format"] != FORMAT:
            is_newer = manifest["format"] in range(FORMAT + 1, 99)
            return f"format {manifest['format']} is not {FORMAT}", not is_newer
        if not isinstance(manifest["files"], dict):
            return "the manifest names no files", True
        return _fault_of_files(folder, manifest["files"], ranks), True
    except (UserError, OSError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        is_damaged = not isinstance(cause, OSError) or isinstance(cause, FileNotFoundError)
        return f"{type(error).__name__}: {error}", is_damaged
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}", True


def _fault_of_files(folder: Path, files: dict[str, Any], ranks: dist.Ranks) -> str | None:
    foreign = [name for name in files.keys() if not _FILE.fullmatch(name)]
    if foreign:
        return f"the manifest names {foreign[0]!r}, which no checkpoint has: it is not read"
    n_writers = sum(name != TRAINER for name in files)
    lost = {TRAINER, *map(file_name, range(max(1, n_writers)))} - files.keys()
    if lost:
        return f"the manifest lacks {sorted(lost)}"
    for i, (name, entry) in enumerate(sorted(files.items())):
        path = folder / name
        if path.is_symlink() or not path.is_file():
            return f"{name} is {'a link' if path.is_symlink() else 'missing'}"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['size']}"
        if i % ranks.world_size == ranks.rank:
            if sha256(path) != entry["sha256"]:
                return f"{name} does not have the sha256 of the manifest"
            if fault := _fault_of_json(path) if name == TRAINER else _fault_of_tensors(path):
                return f"{name}: {fault}"
    return None


def _fault_of_json(path: Path) -> str | None:
    trainer = read_json(path, "the trainer's state")
    step = step_of(path.parent)
    return None if trainer["step"] == step else f"it is of step {trainer['step']}, not {step}"


def _fault_of_tensors(path: Path) -> str | None:
    """What is wrong with a file of tensors that has the hash of its manifest, or None: anyone can make a manifest."""
    try:
        with safe_open(path, framework="pt") as file:
            kinds = {key: (file.get_slice(key).get_shape(), file.get_slice(key).get_dtype()) for key in file.keys()}
        for key, (size, dtype) in kinds.items():
            if not _KEY.fullmatch(key):
                return f"it holds {key!r}, which no checkpoint has"
            if key.count("/") != 2:
                continue
            if len(size) != 1 or dtype not in ("F32", "BF16"):
                return f"{key} has the shape {size} and the dtype {dtype} instead of one axis of F32 or BF16"
            for start in range(0, size[0], _CHUNK // 4):
                with safe_open(path, framework="pt") as file:  # anew, or all of it would stay mapped
                    part = file.get_slice(key)[start : start + _CHUNK // 4]
                if not part.isfinite().all():
                    return f"{key} is not finite: these weights compute nothing"
    except SafetensorError as error:
        return f"it is no safetensors file: {error}"
    return None


def file_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


class Reader:
    """Reads ranges of a checkpoint's state tensors, from whichever files hold them, a mapped file at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = sorted(name for name in read_json(folder / "manifest.json", "the manifest")["files"] if "rank_" in name)
        self._paths = [folder / name for name in names]
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Path, str]]] = {}
        for path in self._paths:
            try:
                self._note_pieces(path)
            except (SafetensorError, ValueError, IndexError) as error:
                raise UserError(f"{path} is damaged: {error}: copy the folder again") from error
        for (kind, name), pieces in self._pieces.items():
            pieces.sort(key=lambda piece: piece[0])
            for (_, stop, _, _), (start, _, path, _) in pairwise(pieces):
                if start < stop:
                    raise UserError(f"{path}: elements {start}:{stop} of {name} ({kind}) are there twice")

    def _note_pieces(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                kind, name, start = key.split("/") if key.count("/") == 2 else (key, "", "0")
                if name:
                    length = file.get_slice(key).get_shape()[0]
                    piece = (int(start), int(start) + length, path, key)
                    self._pieces.setdefault((kind, name), []).append(piece)

    def check(self, kind: str, segment: Segment) -> None:
        """Raise UserError unless the checkpoint holds all elements of a segment."""
        pieces = self._pieces.get((kind, segment.name), ())
        held = sum(max(0, min(stop, segment.stop) - max(start, segment.start)) for start, stop, _, _ in pieces)
        if held != segment.numel:
            raise UserError(
                f"{self.folder} holds {held} of the {segment.numel} elements {segment.start}:{segment.stop} of "
                f"{segment.name} ({kind}): it was written by another model or optimizer"
            )

    def read(self, kind: str, segment: Segment) -> Tensor:
        """Return the elements of a segment, float32, from the pieces that overlap it. Raises what `check` does."""
        self.check(kind, segment)
        out = torch.empty(segment.numel)
        for start, stop, path, key in self._pieces[kind, segment.name]:
            low, high = max(start, segment.start), min(stop, segment.stop)
            if low < high:
                with safe_open(path, framework="pt") as file:  # closed again, or what was read would stay mapped
                    out[low - segment.start : high - segment.start] = file.get_slice(key)[low - start : high - start]
        return out

    def restore_random_state(self, rank: int, seed: int) -> None:
        """Put back the random state of `rank`. A rank that the checkpoint does not know gets a new one: its world was
        smaller.

        Args:
            seed: of the new ones, with the rank.
        """
        if rank >= len(self._paths):
            seed_random_state(seed + rank)
            return
        with safe_open(self._paths[rank], framework="pt") as file:
            state = {key.removeprefix("rng/"): file.get_tensor(key) for key in file.keys() if key.startswith("rng/")}
        try:
            torch.set_rng_state(state["torch"])
            if torch.cuda.is_available() and "cuda" in state:
                torch.cuda.set_rng_state(state["cuda"])
            *words, gauss = state["python"].tolist()
            random.setstate((3, tuple(map(int, words)), None if math.isnan(gauss) else gauss))
            *words, at, has_gauss, gauss = state["numpy"].tolist()
            np.random.set_state(("MT19937", np.array(words, np.uint32), int(at), int(has_gauss), gauss))
        except (KeyError, RuntimeError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{self._paths[rank]} holds no random state of ours: {error!r}") from error


def load(folder: Path, engine: Engine, check: Callable[[TrainerState], None]) -> TrainerState:
    """Restore engine, optimizer, guard and random state from a checkpoint; return the trainer's state.

    Args:
        check: called with that state before anything is changed; raises to refuse the checkpoint.
    """
    state = TrainerState.read(folder)
    check(state)
    restore(folder, engine)
    engine.guard.load(state.guard)
    return state


def restore(folder: Path, engine: Engine) -> None:
    """Put weights, optimizer, random state and the guard's window back; its counts and loss scale go on."""
    state = TrainerState.read(folder)
    failure, own_error = {}, None
    try:
        reader = Reader(folder)
        for segment, views in engine.state_tensors():
            for kind in views:
                reader.check(kind, segment)
        reader.restore_random_state(engine.ranks.rank, engine.config.train.seed + state.step)
    except (UserError, OSError, SafetensorError) as error:
        own_error, failure = error, {f"rank {engine.ranks.rank}": str(error)}
    failure = dist.gather(failure)  # before the collectives of a load, which the others would wait in
    if own_error:
        raise own_error
    if failure:
        raise UserError(f"{folder} cannot be loaded: {failure}")
    engine.load(reader.read, with_state=True)
    engine.optimizer.resume(state.n_updates)
    engine.guard.load_window(state.guard)


def seed_random_state(seed: int) -> None:
    """Seed all generators of this process, though our own random numbers are keyed and need none of them."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_state() -> dict[str, Tensor]:
    _, words, gauss = random.getstate()
    _, keys, *rest = np.random.get_state()  # (name, 624 words, place, has_gauss, gauss)
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([*words, math.nan if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys, *rest], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state
