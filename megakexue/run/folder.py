"""The run folder: taken for one run alone, described, and never begun anew where checkpoints have been.

run/
  config.yaml        the merged config as used, scales resolved
  source.txt         commit and hash of the uncommitted difference
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
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megakexue import __version__, dist
from megakexue.config import ResolvedConfig, UserError, require, to_yaml
from megakexue.files import sha256, write_json
from megakexue.run.records import read_metrics

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


def source_version() -> str:
    """The commit of this code and a hash of what is not committed; outside its own repository, the version."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout

    try:
        is_own = Path(git("rev-parse", "--show-toplevel").strip()) == root
        commit, difference = git("rev-parse", "HEAD").strip(), git("diff", "HEAD")
        new_files = git("ls-files", "--others", "--exclude-standard").splitlines()
    except (OSError, subprocess.CalledProcessError):
        is_own = False
    if not is_own:
        return f"megakexue {__version__}"
    difference += "".join(f"{name} {sha256(root / name)}" for name in new_files)
    if difference:
        commit += f" with uncommitted changes {hashlib.sha256(difference.encode()).hexdigest()[:12]}"
    return commit
