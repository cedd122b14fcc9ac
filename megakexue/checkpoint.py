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

`Saver` writes in a thread. It first copies the tensors to host memory, which training does not wait for until it is
about to change them: the copy runs beside the forward and backward pass of the next step, and the writing beside those
that follow. The ranks agree over a process group of the thread's own.
"""

import json
import logging
import math
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megakexue import dist
from megakexue.config import CheckpointConfig, UserError, read_json, sha256
from megakexue.engine import Engine
from megakexue.optim import Segment

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


class Saver:
    """Writes the checkpoints of a run, one at a time.

    Host memory: a copy of what this rank owns, kept for the next save. Times are logged: `waited_s` is how long
    training stood still for the last save.
    """

    def __init__(self, engine: Engine, config: CheckpointConfig) -> None:
        self._engine, self._config = engine, config
        self._group = dist.host_group("saver", engine.config.engine.timeout_s)
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        self.waited_s = 0.0
        self._stream = torch.cuda.Stream(engine.device) if engine.device.type == "cuda" else None

    def start(
        self, folder: Path, trainer: dict[str, Any], own: dict[str, Tensor] | None = None, *, step: int,
        keep_last: int | None = None,
    ) -> None:  # fmt: skip
        """Begin to write the checkpoint of `step` into `folder`; on all ranks together, after `finish`.

        Args:
            trainer: JSON values, the same on every rank.
            own: more tensors of this rank, by names without a slash.
            keep_last: remove all but so many, other than `config.keep_last`.
        """
        assert self._thread is None, "finish() the last one first"
        began = time.perf_counter()
        self._failure, self.waited_s = None, 0.0
        live = _own_tensors(self._engine)
        small = {f"rng/{name}": state for name, state in _random_state().items()} | (own or {})
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream())  # for the update that has just been launched
        copied = threading.Event()

        def work() -> None:
            try:
                self._copy(live)
            finally:
                copied.set()
            self._write(folder, trainer, small, step, keep_last or self._config.keep_last, began)

        def wait() -> None:
            began = time.perf_counter()
            copied.wait()
            self.waited_s += time.perf_counter() - began
            self._engine.before_change = lambda: None

        self._engine.before_change = wait
        # a daemon: a process that fails must not hang in the collectives of this one
        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()
        self.waited_s += time.perf_counter() - began
        if not self._config.asynchronous:
            self._thread.join()
            self._copies.clear()
            self.waited_s = time.perf_counter() - began

    @property
    def has_finished(self) -> bool:
        """Whether a save was begun and its thread has come to an end."""
        return self._thread is not None and not self._thread.is_alive()

    def finish(self) -> bool:
        """Wait for the save that was begun, and return whether there was one; on all ranks together.

        Raises:
            OSError: it has failed on some rank. The checkpoints before it are as they were.
        """
        if self._thread is None:
            return False
        self._thread.join()
        self._thread = None
        log.info("training stood still for %.3f s of that save", self.waited_s)
        if self._failure:
            raise OSError(self._failure)
        return True

    def close(self) -> None:
        """Let a save that was begun come to its end, whatever has happened to training: the other ranks write too."""
        if self._thread is not None:
            self._thread.join()

    def _copy(self, live: dict[str, Tensor]) -> None:
        on_device = self._stream is not None
        if on_device:
            torch.cuda.set_device(self._engine.device)
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            for key, tensor in live.items():
                if key not in self._copies:
                    self._copies[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_device)
                self._copies[key].copy_(tensor, non_blocking=True)
        if self._stream:
            self._stream.synchronize()

    def _write(
        self, folder: Path, trainer: dict[str, Any], small: dict[str, Tensor], step: int, keep_last: int, began: float
    ) -> None:
        final = folder / f"step_{step:08d}"
        try:
            _write(self._copies | small, trainer, final, self._engine.ranks, self._group)
            if self._engine.ranks.is_first:
                self._remove_old(folder, step, keep_last)
        except Exception as error:  # of any kind: training must hear of it
            self._failure = str(error) if isinstance(error, OSError) else f"cannot save {final}: {error!r}"
            return
        n_bytes = sum(x.nbytes for x in self._copies.values())
        log.info("saved %s: %.3g GB of this rank in %.2f s", final, n_bytes / 1e9, time.perf_counter() - began)

    def _remove_old(self, folder: Path, step: int, keep_last: int) -> None:
        """Remove checkpoints before `step` but the newest and every n-th; a user's own folders have other names."""
        old = [path for path in step_folders(folder) if step_of(path) < step]
        every = self._config.keep_every
        for path in old[keep_last - 1 :]:
            if every is None or step_of(path) % every:
                shutil.rmtree(path, ignore_errors=True)


def _own_tensors(engine: Engine) -> dict[str, Tensor]:
    """What this rank writes: at stage 0, where all hold everything, its share of the segments."""
    ranks = engine.ranks
    return {
        f"{kind}/{segment.name}/{segment.start}": view
        for i, (segment, views) in enumerate(engine.state_tensors())
        if engine.is_sharded or i % ranks.world_size == ranks.rank
        for kind, view in views.items()
    }


def _write(tensors: dict[str, Tensor], trainer: dict[str, Any], final: Path, ranks: dist.Ranks, group: Any) -> None:
    """Write one checkpoint, all ranks together: under a temporary name, and renamed when it is on the disk.

    Raises:
        OSError: on all ranks, naming those that could not write. Nothing is left behind.
    """
    folder, parent = final.with_suffix(".tmp"), final.parent
    name = f"rank_{ranks.rank:05d}.safetensors"
    entries: dict[str, Any] = {}

    def together(action: Callable[[], Any]) -> dict[str, Any]:
        """Merge what `action` returns on all ranks; where it fails on one, fail on all and do not wait for ever."""
        value: dict[str, Any] = {}
        failure: dict[str, str] = {}
        try:
            value = action() or {}
        except (OSError, SafetensorError) as error:
            failure = {f"rank {ranks.rank}": f"{error}"}
        failures = dist.gather(failure, group)
        if failures:
            if ranks.is_first:
                shutil.rmtree(folder, ignore_errors=True)  # what is half-written takes the room that is missing
            raise OSError(f"cannot save {final}: {failures}")
        return dist.gather(value, group)

    def begin() -> None:
        parent.mkdir(parents=True, exist_ok=True)
        for leftover in parent.glob("*.tmp"):
            shutil.rmtree(leftover)
        folder.mkdir()

    def write_own() -> dict[str, Any]:
        save_file(tensors, folder / name)
        return {name: _seal(folder / name)}

    def end() -> None:
        _write_json(folder / "trainer.json", trainer)
        entries["trainer.json"] = _seal(folder / "trainer.json")
        _write_json(folder / "manifest.json", {"format": FORMAT, "step": step_of(final), "files": entries})
        _seal(folder / "manifest.json")
        _sync_folder(folder)
        if final.exists():  # a run that fell back beyond a damaged checkpoint has come here again
            shutil.rmtree(final)
        os.rename(folder, final)
        with suppress(OSError):  # for people's eyes: the checkpoint is whole without it
            (parent / "latest.tmp_file").write_text(final.name + "\n", encoding="utf-8")
            os.replace(parent / "latest.tmp_file", parent / "latest")
        _sync_folder(parent)

    is_first = ranks.is_first
    together(lambda: begin() if is_first else None)
    entries.update(together(write_own))
    together(lambda: end() if is_first else None)


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
        files = manifest["files"]
        foreign = [name for name in files.keys() if not _FILE.fullmatch(name)]
        if foreign:
            return f"the manifest names {foreign[0]!r}, which no checkpoint has: it is not read"
        n_writers = sum(name != "trainer.json" for name in files)
        lost = {"trainer.json", *map(_file_name, range(max(1, n_writers)))} - files.keys()
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
                if fault := _fault_of_json(path) if name == "trainer.json" else _fault_of_tensors(path):
                    return f"{name}: {fault}"
    except (UserError, KeyError, TypeError, AttributeError, OSError, ValueError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _fault_of_json(path: Path) -> str | None:
    trainer = read_json(path, "the trainer's state")
    step = step_of(path.parent)
    return None if trainer["step"] == step else f"it is of step {trainer['step']}, not {step}"


def _fault_of_tensors(path: Path) -> str | None:
    """What is wrong with a file of tensors that has the hash of its manifest, or None: anyone can make a manifest."""
    try:
        with safe_open(path, framework="pt") as file:
            keys = {key: file.get_slice(key).get_shape() for key in file.keys()}
        for key, size in keys.items():
            if not _KEY.fullmatch(key):
                return f"it holds {key!r}, which no checkpoint has"
            if key.count("/") == 2 and len(size) != 1:
                return f"{key} has {len(size)} axes instead of 1"
            for start in range(0, size[0], _CHUNK // 4) if key.count("/") == 2 else ():
                with safe_open(path, framework="pt") as file:  # anew, or all of it would stay mapped
                    part = file.get_slice(key)[start : start + _CHUNK // 4]
                if not part.is_floating_point() or not part.isfinite().all():
                    return f"{key} is not finite: these weights compute nothing"
    except SafetensorError as error:
        return f"it is no safetensors file: {error}"
    return None


def _file_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


class Reader:
    """Reads ranges of a checkpoint's state tensors, from whichever files hold them, a mapped file at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = sorted(name for name in read_json(folder / "manifest.json", "the manifest")["files"] if "rank_" in name)
        self._paths = [folder / name for name in names]
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Path, str]]] = {}
        for path in self._paths:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    kind, name, start = key.split("/") if key.count("/") == 2 else (key, "", "0")
                    if name:
                        length = file.get_slice(key).get_shape()[0]
                        piece = (int(start), int(start) + length, path, key)
                        self._pieces.setdefault((kind, name), []).append(piece)
        for (kind, name), pieces in self._pieces.items():
            pieces.sort(key=lambda piece: piece[0])
            for (_, stop, _, _), (start, _, path, _) in pairwise(pieces):
                if start < stop:
                    raise UserError(f"{path}: elements {start}:{stop} of {name} ({kind}) are there twice")

    def read(self, kind: str, segment: Segment) -> Tensor:
        """Return the elements of a segment, float32, from the pieces that overlap it.

        Raises:
            UserError: the checkpoint does not hold all of them.
        """
        out = torch.empty(segment.numel)
        n_read = 0
        for start, stop, path, key in self._pieces.get((kind, segment.name), ()):
            low, high = max(start, segment.start), min(stop, segment.stop)
            if low < high:
                with safe_open(path, framework="pt") as file:  # closed again, or what was read would stay mapped
                    out[low - segment.start : high - segment.start] = file.get_slice(key)[low - start : high - start]
                n_read += high - low
        if n_read != segment.numel:
            raise UserError(
                f"{self.folder} holds {n_read} of the {segment.numel} elements {segment.start}:{segment.stop} of "
                f"{segment.name} ({kind}): it was written by another model or optimizer"
            )
        return out

    def restore_random_state(self, rank: int, seed: int) -> None:
        """Put back the random state of `rank`; a rank that the checkpoint's smaller world had not gets a new one.

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
    reader.restore_random_state(engine.ranks.rank, engine.config.train.seed + trainer["step"])


def seed_random_state(seed: int) -> None:
    """Seed all generators of this process, though our own random numbers are keyed and need none of them."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _random_state() -> dict[str, Tensor]:
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
