"""Files that are whole or not there: hashes, manifests, JSON, and folders that take their name when they are done."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from megakexue.config import UserError, require

LOCK = "lock"
CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
"""Errors that only writing has."""
REMEDIES = {
    errno.ENOSPC: "make room there, or choose another place",
    errno.EDQUOT: "make room there, ask for a larger quota, or choose another place",
    errno.EROFS: "mount it for writing, or choose another place",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.EFBIG: "raise the limit (ulimit -f), or choose a file system that takes larger files",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "check the disks that are read and written",
}
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
WITHOUT_LOCKS = "is on a file system without locks (flock): a second {} at the same time would not be noticed"


def sha256(path: str | Path) -> str:
    """Hex digest of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(path: Path) -> dict[str, Any]:
    """Push a file to the disk and return its entry in a manifest: size and sha256.

    It gets the permissions of any new file in its folder: safetensors lets nobody but the owner read what it writes.
    """
    if path.stat().st_mode & 0o077 == 0:
        probe = path.with_name(f"{path.name}.tmp")
        probe.touch()
        mode = probe.stat().st_mode
        probe.unlink()
        path.chmod(mode)
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
        value = parse_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read {what}: {error}") from error
    require(isinstance(value, dict), f"{path}: {what} must be a JSON object")
    return value


def parse_json(text: str) -> Any:
    """Read JSON that others may have written. Raises ValueError, also where Python's stack would not do."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def json_text(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def write_json(path: Path, value: Any) -> None:
    path.write_text(json_text(value), encoding="utf-8")


@contextmanager
def writing(name: str, *places: Path) -> Iterator[None]:
    """Turn an OSError of the block that is about `places` into one line that names them as `name`, with the remedy.

    An error of reading something else, such as an input, is none of these and passes.

    Raises:
        UserError: a place cannot be written: it is full, read-only, forbidden, no folder, ...
    """
    try:
        yield
    except OSError as error:
        file = error.filename2 or error.filename
        file = os.fsdecode(file) if isinstance(file, str | bytes) else None
        is_inside = file is not None and any(_touches(Path(file), place) for place in places)
        # a read fails by none of the first; the disk that fails may be that of an input, and the remedy says so
        if not (error.errno in CANNOT_WRITE or is_inside or (error.errno == errno.EIO and file is None)):
            raise
        where = "" if file is None or is_inside else f" ({file})"
        remedy = REMEDIES.get(error.errno or 0, "choose another place")
        raise UserError(f"{name} cannot be written: {error.strerror or error}{where}: {remedy}") from error


def _touches(file: Path, place: Path) -> bool:
    """Whether a file is a place, lies in it, or is one of the folders above it."""
    file, place = file.absolute(), place.absolute()
    return file.is_relative_to(place) or place.is_relative_to(file)


def lock(file: IO[Any], *, wait: bool = False) -> bool:
    """Lock an open file for this process alone, until it is closed. False: its file system has no locks.

    The kernel frees the lock when the process ends, however it ends.

    Args:
        wait: until whoever holds it frees it.

    Raises:
        BlockingIOError: another process holds it, and `wait` is false.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise
    return True


def require_new_file(option: str, path: Path, overwrite: bool) -> None:
    """Refuse a file that `option` names if its folder is missing or read-only, or if it is there and is to stay."""
    require(path.parent.is_dir(), f"{option} {path}: there is no folder {path.parent}")
    require(not path.is_dir(), f"{option} {path} is a folder: choose another name")
    require(overwrite or not path.exists(), f"{option} {path} exists: choose another name or add --overwrite")
    require_writable(f"{option} {path}", path)


def require_writable(name: str, path: Path) -> None:
    """Refuse a path that cannot be written because its folder is read-only, before the work whose result it gets."""
    folder = next(folder for folder in path.absolute().parents if folder.is_dir())
    require(os.access(folder, os.W_OK), f"{name}: {folder} is read-only: choose another place")


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Give a folder that is removed at the end. Raises UserError: there is no place for it, or it is full."""
    try:
        folder = tempfile.TemporaryDirectory()
    except OSError as error:
        raise UserError(f"no folder for temporary files: {error}: set TMPDIR to one that can be written") from error
    with folder as name, writing(f"TMPDIR={Path(name).parent}", Path(name)):
        yield Path(name)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file under another name and rename it, so that no half of it is ever found.

    Raises:
        UserError: it cannot be written. Nothing is left behind, and a file that was there stays.
    """
    temporary = path.with_name(path.name + ".tmp")
    with writing(str(path), path, temporary):
        try:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give a folder that takes the name `out` when the block ends well, and is removed when it does not.

    A folder `out` that is there is replaced: the caller has checked that it may be. While the block runs, the new
    folder holds a file `lock`. Killed, it stays behind as `.NAME.partial`, and the next writer of `out` removes it.

    Raises:
        UserError: the folder cannot be made, written or renamed, or another process is writing `out`. Other errors of
            the block pass.
    """
    with _partial_folder(out) as (partial, target):
        yield partial
        old = target.with_name(f".{target.name}.old")
        (partial / LOCK).unlink()
        shutil.rmtree(old, ignore_errors=True)
        try:
            if target.exists():
                target.rename(old)
            partial.rename(target)
        except BaseException:
            if old.exists() and not target.exists():  # the last rename has failed: what was there comes back
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def new_files(out: Path, *beside: Path) -> Iterator[Path]:
    """Give a folder whose files take the names `out` and `beside`, all in one folder, when the block ends well.

    The block writes each of them under its own name into the folder that it is given. They replace files that are
    there: the caller has checked that they may. `out` comes last, so where it is new, the others are too. Killed, the
    folder stays behind as `.NAME.partial`, of the name of `out`, and the next writer of `out` removes it.

    Raises:
        UserError: as `new_folder`.
    """
    for path in (out, *beside):
        require(not path.is_dir(), f"{path} is a folder: choose another name")
    with _partial_folder(out) as (partial, target):
        yield partial
        for path in (*beside, out):
            seal(partial / path.name)
        for path in (*beside, out):
            os.replace(partial / path.name, target.with_name(path.name))
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _partial_folder(out: Path) -> Iterator[tuple[Path, Path]]:
    """Give an empty folder `.NAME.partial` that this process alone writes, and `out` itself, or what it links to.

    The folder is removed when the block fails.
    """
    target = Path(os.path.realpath(out)) if out.is_symlink() else out  # a link to another disk stays one
    require(target.name not in ("", ".."), f"--out {out} has no name of its own: name what is to be written")
    partial = target.with_name(f".{target.name}.partial")
    with writing(f"--out {out}", out, target, partial), ExitStack() as stack:
        partial.mkdir(parents=True, exist_ok=True)
        try:
            file = stack.enter_context(open(partial / LOCK, "w"))
            has_lock = lock(file)
        except BlockingIOError as error:
            raise UserError(f"--out {out}: another run is writing it") from error
        except OSError:
            with suppress(OSError):
                partial.rmdir()  # only if it is empty: without the lock, it may be another's
            raise
        if not has_lock:
            print(f"WARNING: {partial.parent} {WITHOUT_LOCKS.format('writer of the same name')}", file=sys.stderr)
        try:
            for leftover in partial.iterdir():
                if leftover.is_dir() and not leftover.is_symlink():
                    shutil.rmtree(leftover)
                elif leftover.name != LOCK:
                    leftover.unlink()
            yield partial, target
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
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
