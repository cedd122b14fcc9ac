"""The run folder: one run at a time, and never begun anew where checkpoints have been."""

import fcntl
from pathlib import Path

from megakexue.config import Config, UserError
from tests.conftest import Prepared
from tests.helpers import tiny_config
from tests.ranks import run_on_ranks


def train_expecting(config: Config) -> str:
    from megakexue.run.train import train

    try:
        train(config)
    except UserError as error:
        return str(error)
    return "went on"


def test_a_lost_checkpoint_folder_does_not_erase_the_metrics(prepared: Prepared, tmp_path: Path) -> None:
    config = tiny_config(prepared, tmp_path / "run", "train.steps=4", "checkpoint.every_steps=2")
    assert run_on_ranks(1, train_expecting, config) == ["went on"]
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "elsewhere")
    (message,) = run_on_ranks(1, train_expecting, config)
    assert "has metrics up to step 4 but no checkpoint: restore" in message
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_two_runs_do_not_share_a_folder(prepared: Prepared, tmp_path: Path) -> None:
    with open(tmp_path / "lock", "w") as lock:
        lock.write("pid 7 on another")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        (message,) = run_on_ranks(1, train_expecting, tiny_config(prepared, tmp_path))
    assert "is in use by pid 7 on another: end that run first, or choose another folder" in message
