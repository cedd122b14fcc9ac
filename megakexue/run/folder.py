"""The run folder: taken for one run alone, described, and never begun anew where checkpoints have been.

run/
  config.yaml        the merged config as used, scales resolved
  source.txt         commit of the code, and a hash of how it differs from it
  deepspeed.json     what DeepSpeed was given
  tokenizer.model    a copy
  lock               held while a process trains here; says which
  metrics.jsonl      a record for each step (megakexue/run/records.py)
  tensorboard/
  checkpoints/       megakexue/run/checkpoint.py
  dumps/             the step at which the guard stopped the run, for tools/replay_step.py
  logs/rank_N.log    what each rank did, and its traceback if it failed
  cache/             shards of remote sources
"""

import fcntl
import hashlib
import logging
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megakexue import __version__, dist
from megakexue.config import ResolvedConfig, UserError, require, to_yaml
from megakexue.files import write_json
from megakexue.run.records import read_metrics

ROOT = Path(__file__).resolve().parents[2]
CODE = ("megakexue", "launch", "tools", "configs")
"""Folders whose files are code even before git tracks them."""
HASHED_BYTES = 2**26
"""Of files that differ from the commit, whose content is looked at."""
GIT_S = 20
"""Seconds that git may take for an answer."""

log = logging.getLogger("megakexue")


def open_run(run: Path, ranks: dist.Ranks, stack: ExitStack) -> None:
    """Take the run folder for this run alone, and send this rank's log and traceback to it.

    Raises:
        UserError: the folder cannot be made, another run is using it, or the nodes do not share it.
    """
    try:
        (run / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"train.run={run}: cannot make the run folder: {error}") from error
    token = ""
    if ranks.is_first:
        lock = stack.enter_context(open(run / "lock", "a+", encoding="utf-8"))
        try:
            # the kernel frees the lock when the process ends, however it ends
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            token = f"in use by {lock.read().strip()}"
        else:
            token = f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}"
            lock.truncate(0)
            lock.write(token + "\n")
            lock.flush()
    token = dist.gather({"token": token} if ranks.is_first else {})["token"]
    require(not token.startswith("in use"), f"train.run={run} is {token}: end that run first, or choose another folder")
    own = (run / "lock").read_text(encoding="utf-8").strip() if (run / "lock").exists() else ""
    strangers = dist.gather({socket.gethostname(): True} if own != token else {})
    require(
        not strangers,
        f"train.run={run} is not the same folder on {sorted(strangers)} as on the first node: put it on a file system "
        "that all nodes share",
    )
    handler = logging.FileHandler(run / "logs" / f"rank_{ranks.rank}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
    log.info("pid %d: %s", os.getpid(), " ".join(sys.argv))

    def record(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        log.error("failed", exc_info=(kind, error, trace))
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = record


def describe_run(run: Path, config: ResolvedConfig, deepspeed_config: dict[str, Any], source: str) -> None:
    """Write what this run is into its folder; the newest start counts."""
    (run / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (run / "source.txt").write_text(source + "\n", encoding="utf-8")
    write_json(run / "deepspeed.json", deepspeed_config)
    shutil.copyfile(config.data.tokenizer, run / "tokenizer.model")


def check_not_lost(run: Path, folder: Path | None, ranks: dist.Ranks) -> None:
    """Refuse to start over where checkpoints have been; a run that was killed before its first one has none."""
    checkpoints, fault = run / "checkpoints", None
    if ranks.is_first and folder is None:
        try:
            had_some = not checkpoints.is_dir() or (checkpoints / "latest").exists()
            records = read_metrics(run) if had_some and (run / "metrics.jsonl").exists() else []
            if records:
                fault = (
                    f"train.run={run} has metrics up to step {max(r.step for r in records)} but no checkpoint: restore "
                    f"{checkpoints}, or choose another train.run"
                )
            else:
                checkpoints.mkdir(exist_ok=True)
        except (UserError, OSError) as error:  # the others must not be left waiting
            fault = str(error)
    fault = dist.gather({"fault": fault} if ranks.is_first else {})["fault"]
    require(fault is None, str(fault))


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
