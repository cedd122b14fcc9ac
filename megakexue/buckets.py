"""Files in buckets, such as s3://bucket/folder or gs://bucket/folder: copied from them and to them.

The storage is that of mosaicml-streaming, as of remote data: its downloaders and uploaders, with the credentials that
they read (S3_ENDPOINT_URL, AWS_*, ...). They know no folder as a whole, so a file that is copied last says that the
others are there.
"""

import logging
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

from megakexue.config import UserError, require
from megakexue.files import temporary_folder

N_ATTEMPTS = 3
"""To copy a file."""
TIMEOUT_S = 60.0
"""Of a download, as streaming's clients understand it: between two answers."""
SCHEMES = ("s3", "gs", "oci")
"""Where streaming reads and writes the same plain folders; its two halves do not agree on what azure:// names."""
_ABSENT = {404, "404", "NoSuchKey", "NotFound"}
"""Codes in errors of files that are not there."""

log = logging.getLogger("megakexue")

T = TypeVar("T")


def is_remote(path: str) -> bool:
    return "://" in path


def check_scheme(path: str) -> None:
    """Refuse what is no bucket. Raises UserError."""
    scheme, _, rest = path.partition("://")
    require(
        scheme in SCHEMES and rest.strip("/") != "",
        f"{path} is no bucket that can be read and written: name a folder of one, such as s3://bucket/folder ("
        f"{', '.join(SCHEMES)}), or a local folder",
    )


def download(path: str, target: Path, timeout_s: float = TIMEOUT_S) -> None:
    """Copy one file. Raises whatever the downloader does."""
    from streaming.base.storage import CloudDownloader

    CloudDownloader.get(path).download(path, str(target), timeout_s)


def fetch(path: str, target: Path, *, may_be_absent: bool = False) -> bool:
    """Copy one file, if need be several times; return whether it was there.

    Raises:
        UserError: it cannot be read.
    """
    try:
        _attempt(path, "read", lambda: download(path, target))
    except _Absent:
        if not may_be_absent:
            raise
        return False
    return True


def check_writable(path: str) -> None:
    """Refuse a bucket that is not there, or that may not be used. Raises UserError."""
    with temporary_folder() as folder:
        _uploader(folder, path)


def upload(folder: Path, names: Collection[str], path: str) -> None:
    """Copy files of a folder, in this order. A file that is there is replaced.

    Raises:
        UserError: one cannot be written.
    """
    uploader, path = _uploader(folder, path), path.rstrip("/")
    for name in names:
        _attempt(f"{path}/{name}", "write", lambda name=name: uploader.upload_file(name))  # type: ignore[misc]


def _uploader(folder: Path, path: str) -> Any:
    from streaming.base.storage import CloudUploader

    logging.getLogger("streaming").setLevel(logging.ERROR)  # it warns that the folder is not empty
    places = str(folder), path.rstrip("/")
    return _attempt(path, "write to", lambda: CloudUploader.get(places, keep_local=True, retry=1, exist_ok=True))


class _Absent(UserError):
    """There is no such file."""


def _is_absent(error: Exception) -> bool:
    """Whether an error says that there is no such file. Its text does not count, since it has the path in it."""
    response = getattr(error, "response", None)
    own = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    codes = {own, *(getattr(error, name, None) for name in ("status", "code"))}
    # streaming says so of a file of S3 too that must not be read
    return isinstance(error, FileNotFoundError) or not codes.isdisjoint(_ABSENT)


def _attempt(path: str, what: str, action: Callable[[], T]) -> T:
    """Call `action` until it succeeds, at most N_ATTEMPTS times. Raises UserError, and _Absent at once."""
    reason = ""
    for attempt in range(N_ATTEMPTS):
        time.sleep(2**attempt - 1)
        try:
            return action()
        except Exception as error:  # each kind of storage raises its own
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            if _is_absent(error):
                raise _Absent(f"cannot {what} {path}: {reason}: check the path and the access rights") from error
            log.warning("cannot %s %s: attempt %d of %d: %s", what, path, attempt + 1, N_ATTEMPTS, reason)
    raise UserError(
        f"cannot {what} {path} in {N_ATTEMPTS} attempts: {reason}: check the path, the access rights and the network"
    )
