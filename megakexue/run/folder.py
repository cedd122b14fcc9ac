"""The run folder: taken for one run alone, described, and never begun anew where checkpoints have been.

run/
  config.yaml        the merged config as used, scales resolved
  source.txt         commit of the code, and a hash of how it differs from it
  deepspeed.json     what DeepSpeed was given
  tokenizer.model    a copy; or tokenizer.json and tokenizer_config.json
  lock               held while a process trains here; says which
  metrics.jsonl      a record for each step (megakexue/run/records.py)
  tensorboard/
  checkpoints/       megakexue/run/checkpoint.py
  dumps/             the step at which the guard stopped the run, for tools/replay_step.py
  logs/rank_N.log    what each rank did, and its traceback if it failed
  cache/             shards of remote sources
  exports/           megakexue/run/exporter.py
"""

import hashlib
import json
import logging
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from megakexue import __version__, dist
from megakexue.config import ResolvedConfig, UserError, require, to_yaml
from megakexue.files import WITHOUT_LOCKS, json_text, lock, write_whole, writing
from megakexue.run.records import read_metrics
from megakexue.text.tokenizer_files import copy_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CODE = ("megakexue", "launch", "tools", "configs")
"""Folders whose files are code even before git tracks them."""
HASHED_BYTES = 2**26
"""Of files that differ from the commit, whose content is looked at."""
GIT_S = 20
"""Seconds that git may take for an answer."""

log = logging.getLogger("megakexue")


@contextmanager
def together(run: Path, ranks: dist.Ranks) -> Iterator[None]:
    """Write into the run folder; where one rank cannot, all of them end, and none waits for it. A collective.

    Raises:
        UserError: on all ranks, the first failure, and of which rank if others have not failed.
    """
    failure: Exception | None = None
    try:
        with writing(f"train.run={run}", run):
            yield
    except Exception as error:  # whatever it is, the others must not be left waiting
        failure = error
    failures = dist.gather({str(ranks.rank): str(failure) or repr(failure)} if failure else {})
    if failure and not isinstance(failure, UserError):
        raise failure
    for rank, text in failures.items():
        raise UserError(text if len(failures) == ranks.world_size else f"rank {rank}: {text}") from failure


def open_run(run: Path, ranks: dist.Ranks, stack: ExitStack) -> Path:
    """Take the run folder for this run alone, and send this rank's log to it, whose path is returned.

    Raises:
        UserError: the folder cannot be made or written, another run is using it, or the nodes do not share it.
    """
    token, warning = "", None
    path = run / "logs" / f"rank_{ranks.rank}.log"
    with together(run, ranks):
        (run / "logs").mkdir(parents=True, exist_ok=True)
        if ranks.is_first:
            token, warning = _take(run, stack)
    token = dist.gather({"token": token} if ranks.is_first else {})["token"]
    with together(run, ranks):
        own = (run / "lock").read_text(encoding="utf-8").strip() if (run / "lock").exists() else ""
    strangers = dist.gather({socket.gethostname(): True} if own != token else {})
    require(
        not strangers,
        f"train.run={run} is not the same folder on {sorted(strangers)} as on the first node: put it on a file system "
        "that all nodes share",
    )
    with together(run, ranks), open(path, "ab", buffering=0) as file:
        file.write(f"{time.strftime('%F %T')} pid {os.getpid()}: {' '.join(sys.argv)}\n".encode())
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
    if warning:
        log.warning(warning)
        print(f"WARNING: {warning}", flush=True)
    return path


def _take(run: Path, stack: ExitStack) -> tuple[str, str | None]:
    """Lock the run folder; return what the file `lock` says now, and a warning where there are no locks."""
    # without a buffer, since what a full disk has not taken would be written again when the file is closed
    file = stack.enter_context(open(run / "lock", "a+b", buffering=0))
    try:
        has_lock = lock(file)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().decode(errors="replace").strip()
        message = f"train.run={run} is in use by {holder}: end that run first, or choose another folder"
        raise UserError(message) from error
    token = f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}"
    try:
        file.truncate(0)
        file.write(f"{token}\n".encode())
    except OSError:
        with suppress(OSError):  # leave nothing of a run that never began
            (run / "lock").unlink()
            (run / "logs").rmdir()
            run.rmdir()
        raise
    return token, None if has_lock else f"train.run={run} {WITHOUT_LOCKS.format('run in it')}"


class _LogFile(logging.FileHandler):
    """The log of a rank. On a disk that is full, its lines wait for room, as the records do."""

    is_full = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.is_full:
            self.is_full = True
            print(f"WARNING: {self.baseFilename} cannot be written, and waits: {error}: make room", flush=True)


def describe_run(run: Path, config: ResolvedConfig, deepspeed_config: dict[str, Any], source: str) -> None:
    """Write what this run is into its folder; the newest start counts. Raises UserError: it cannot be written."""
    write_whole(run / "config.yaml", to_yaml(config))
    write_whole(run / "source.txt", source + "\n")
    write_whole(run / "deepspeed.json", json_text(deepspeed_config))
    copy_tokenizer(config.data.tokenizer, run)


def record_start(run: Path, facts: dict[str, Any]) -> None:
    """Add a line to the list of the run's starts: when, by what command, and `facts`."""
    command = " ".join(argument for argument in sys.argv if not argument.startswith("--local_rank"))
    path = run / "starts.jsonl"
    is_torn = path.exists() and not path.read_bytes().endswith(b"\n")  # a kill has left half a line
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n" * is_torn + json.dumps({"time": time.strftime("%F %T"), "command": command} | facts) + "\n")


def check_not_lost(run: Path, folder: Path | None, ranks: dist.Ranks) -> None:
    """Refuse to start over where checkpoints have been; a run that was killed before its first one has none."""
    checkpoints = run / "checkpoints"
    with together(run, ranks):
        if ranks.is_first and folder is None:
            had_some = not checkpoints.is_dir() or (checkpoints / "latest").exists()
            records = read_metrics(run) if had_some and (run / "metrics.jsonl").exists() else []
            last = max((record.step for record in records), default=0)
            require(
                not records,
                f"train.run={run} has metrics up to step {last} but no checkpoint: restore {checkpoints}, or choose "
                "another train.run",
            )
            checkpoints.mkdir(exist_ok=True)


def source_version(root: Path = ROOT) -> str:
    """The commit of the code in `root` and a hash of how it differs; where there is no commit, the version.

    Code is what git tracks, and what it does not track in the folders of CODE: not a user's texts, data and runs beside
    it. Whatever goes wrong with git or the files, a run must be able to start, and the text says what is not known.
    """
    version = f"megakexue {__version__}"
    if not (root / ".git").exists():
        return version
    try:
        commit = _git(root, "rev-parse", "--verify", "HEAD").decode().strip()
    except Exception:
        return f"{version} (commit unknown)"
    try:
        difference = _difference(root)
    except Exception:
        return f"{commit} (state of its files unknown)"
    return f"{commit} with uncommitted changes {difference}" if difference else commit


def _git(root: Path, *arguments: str) -> bytes:
    # the variables of a hook are about another repository; the files here are run already, whoever owns them
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    own = {"GIT_CEILING_DIRECTORIES": str(root.parent), "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    settings = ["-c", "safe.directory=*", "-c", "core.fsmonitor=false", "-c", "diff.autoRefreshIndex=true"]
    return subprocess.run(
        ["git", *settings, *arguments], cwd=root, env=kept | own, stdin=subprocess.DEVNULL, capture_output=True,
        check=True, timeout=GIT_S,
    ).stdout  # fmt: skip


def _difference(root: Path) -> str:
    """A hash of the files that are not as in the commit, by their names and content; "": there are none."""
    changed = _git(root, "diff", "--name-only", "-z", "--no-renames", "--no-ext-diff", "HEAD", "--").split(b"\0")
    new = _git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *CODE).split(b"\0")
    entries, room = [], HASHED_BYTES
    for name in sorted({*changed, *new} - {b""}):
        path = root / os.fsdecode(name)
        try:
            info = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            content = b"removed"
        else:
            if stat.S_ISLNK(info.st_mode):
                content = b"link to " + os.fsencode(path.readlink())
            elif stat.S_ISREG(info.st_mode):
                room -= info.st_size  # past the limit the size stands for the content: data among the code
                content = b"%d " % info.st_size + (hashlib.sha256(path.read_bytes()).digest() if room >= 0 else b"")
            elif name in changed:
                content = b"no file"
            else:
                continue  # a repository of its own
        entries.append(name + b"\0" + content)
    return hashlib.sha256(b"\0".join(entries)).hexdigest()[:12] if entries else ""
