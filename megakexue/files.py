"""Files that are whole or not there: hashes, manifests, JSON, and folders that take their name when they are done."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megakexue.config import UserError, require

LOCK = "lock"


def sha256(path: str | Path) -> str:
    """Hex digest of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(path: Path) -> dict[str, Any]:
    """Push a file to the disk and return its entry in a manifest: size and sha256."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def sync_folder(path: Path) -> None:
    """Push the names in a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """Read a JSON object. Raises UserError, saying `what` the file is, when it is missing or damaged."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read {what}: {error}") from error
    require(isinstance(value, dict), f"{path}: {what} must be a JSON object")
    return value


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def require_new_file(option: str, path: Path, overwrite: bool) -> None:
    """Refuse a file that `option` names if its folder is missing, or if it is there and not to be replaced."""
    require(path.parent.is_dir(), f"{option} {path}: there is no folder {path.parent}")
    require(overwrite or not path.exists(), f"{option} {path} exists: choose another name or add --overwrite")


def write_whole(path: Path, text: str) -> None:
    """Write a file under another name and rename it, so that no half of it is ever found."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give a folder that takes the name `out` when the block ends well, and is removed when it does not.

    A folder `out` that is there is replaced: the caller has checked that it may be. While the block runs, the new
    folder holds a file `lock`. Killed, it stays behind as `.NAME.partial`, and the next writer of `out` removes it.

    Raises:
        UserError: the folder cannot be made, or another process is writing `out`.
        OSError: it cannot be renamed.
    """
    partial, old = (out.with_name(f".{out.name}.{state}") for state in ("partial", "old"))
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {partial}: {error.strerror}: choose another place for {out.name}") from error
    with open(partial / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"--out {out}: another run is writing it") from error
        except OSError:
            pass  # a file system without locks
        try:
            for leftover in partial.iterdir():
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                elif leftover.name != LOCK:
                    leftover.unlink()
            yield partial
            (partial / LOCK).unlink()
            shutil.rmtree(old, ignore_errors=True)
            if out.exists():
                out.rename(old)
            partial.rename(out)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            if old.exists() and not out.exists():  # the last rename has failed: what was there comes back
                old.rename(out)
            raise


def verify(folder: Path, format: int, *, check_hashes: bool = True) -> list[str]:
    """Check the files of a folder against its manifest.json, and return their names.

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
