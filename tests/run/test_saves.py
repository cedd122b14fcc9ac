"""Saving in a thread: which moment is kept, which checkpoints stay, and what a full disk does."""

import re
import resource
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from megakexue.config import CheckpointConfig, ResolvedConfig
from megakexue.dist import ALONE
from megakexue.run import checkpoint
from megakexue.run.saves import Saver
from tests.conftest import Prepared
from tests.helpers import make_config, make_state
from tests.ranks import run_on_ranks
from tests.run.saving import fill, save, state_differences


def save_and_list(config: ResolvedConfig, folder: Path) -> list[list[str]]:
    from megakexue.run.engine import Engine, start

    engine = Engine(config, start(config.engine))
    fill(engine, base=0)
    for step in (20, 30):
        save(engine, folder, step)
    (folder / "step_00000030" / "trainer.json").unlink()
    shutil.copytree(folder / "step_00000020", folder / "step_00000020_best")
    found, _ = checkpoint.find(folder, ALONE)
    assert found is not None and found.name == "step_00000020"
    assert save(engine, folder, 25, keep_last=1).is_dir()
    lists = [sorted(path.name for path in folder.iterdir())]
    for step in range(1, 11):
        save(engine, folder / "every", step, keep_every=4)
    # as signals leave them: only as long as they are the newest
    for step in (10, 13, 20, 21, 24):
        save(engine, folder / "signals", step, every_steps=10)
        lists.append(sorted(path.name for path in (folder / "signals").glob("step*")))
    return [sorted(path.name for path in (folder / "every").iterdir()), *lists]


def test_what_is_kept(prepared: Prepared, tmp_path: Path) -> None:
    ((every, after_fallback, *signals),) = run_on_ranks(1, save_and_list, make_config(prepared), tmp_path)
    assert after_fallback == ["latest", "step_00000020_best", "step_00000025", "step_00000030.damaged"]
    assert [[int(name[5:]) for name in names] for names in signals] == [[10], [10, 13], [10, 20], [10, 20, 21],
                                                                        [10, 20, 24]]  # fmt: skip
    assert every == ["latest", "step_00000004", "step_00000008", "step_00000009", "step_00000010"]


def change_while_saving(config: ResolvedConfig, folder: Path) -> tuple[bool, bool, bool]:
    """Begin to save, train on, and load: was the call over early, is the moment kept, are both the same?"""
    from megakexue.run.data import Batches
    from megakexue.run.engine import Engine, start

    ranks = start(config.engine)
    engine = Engine(config, ranks)
    fill(engine, base=3)
    saver = Saver(engine, CheckpointConfig())
    copy, gate = torch.Tensor.copy_, threading.Event()

    def late(self: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        """Copies in the thread wait until training is about to change something."""
        if threading.current_thread() is not threading.main_thread():
            gate.wait(20)
        return copy(self, *arguments, **options)

    torch.Tensor.copy_ = late  # type: ignore[method-assign, assignment]
    saver.start(folder, make_state(1, config, engine.guard.state, n_updates=7))
    engine.before_next_change(gate.set)  # what was asked for last is called first
    data = Batches(
        config.data, global_batch_size=8, micro_batch_size=2, ranks=ranks, cache=folder,
    )  # fmt: skip
    batches = data.next_step()
    was_early = not gate.is_set()
    engine.train_step(batches, 1e-2, 1)
    torch.Tensor.copy_ = copy  # type: ignore[method-assign]
    changed = [view.clone() for _, views in engine.state_tensors() for view in views.values()]
    assert saver.finish() and not saver.finish()
    checkpoint.restore(folder / "step_00000001", engine)
    kept = [view for _, views in engine.state_tensors() for view in views.values()]
    return was_early, not state_differences(engine, 3), all(map(torch.equal, changed, kept))


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", ["gradient", "momentum"])
def test_training_goes_on_and_the_moment_is_kept(prepared: Prepared, tmp_path: Path, accumulate: str) -> None:
    config = make_config(prepared, stage=1, optim={"name": "tiger", "accumulate": accumulate})
    assert run_on_ranks(2, change_while_saving, config, tmp_path) == [(True, True, False)] * 2


def save_on_a_full_disk(config: ResolvedConfig, folder: Path) -> str:
    """Save on two ranks, of which the second can write no file beyond a few bytes."""
    from megakexue.run.engine import Engine, start

    ranks = start(config.engine)
    engine = Engine(config, ranks)
    fill(engine, base=0)
    save(engine, folder, 1)
    if not ranks.is_first:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        save(engine, folder, 2)
    except OSError as error:
        return str(error)
    return "saved"


@pytest.mark.slow
def test_a_full_disk_is_known_to_all_ranks_and_leaves_the_old_one(prepared: Prepared, tmp_path: Path) -> None:
    messages = run_on_ranks(2, save_on_a_full_disk, make_config(prepared, stage=1), tmp_path)
    for message in messages:
        assert "cannot save" in message and "rank 1" in message and "step_00000002" in message
    assert checkpoint.find(tmp_path, ALONE) == (tmp_path / "step_00000001", [])
    assert not list(tmp_path.glob("*.tmp"))  # the room is given back


def save_what_cannot_be(config: ResolvedConfig, folder: Path) -> list[str]:
    """Save with state that is not finite, and with no memory for the copy, on one of two ranks each."""
    from megakexue.run.engine import Engine, start

    ranks = start(config.engine)
    engine = Engine(config, ranks)
    fill(engine, base=0)
    ends = []

    def attempt(saver: Saver, own: dict[str, torch.Tensor] | None = None) -> None:
        saver.start(folder, make_state(1, config), own)
        engine._wait_for_readers()  # a copy that fails must not hold training up
        try:
            ends.append(str(saver.finish()))
        except OSError as error:
            ends.append(str(error))

    saver = Saver(engine, CheckpointConfig())
    view = engine.optimizer.state[0]["exp_avg_sq"]
    view[:1] = 1.0 if ranks.is_first else torch.inf
    attempt(saver)
    attempt(saver, {"batch.0.tokens": torch.zeros(1)})  # a dump is of a step that went wrong
    view[:1] = 1.0
    if ranks.is_first:
        saver._copy = lambda live: bytearray(2**60)  # type: ignore[method-assign, assignment, return-value]
    attempt(saver)
    return ends


@pytest.mark.slow
def test_what_cannot_be_saved_on_one_rank_is_saved_on_none(prepared: Prepared, tmp_path: Path) -> None:
    for ends in run_on_ranks(2, save_what_cannot_be, make_config(prepared, stage=1), tmp_path):
        assert re.search(r"cannot save .*'rank 1': 'exp_avg_sq/.* is not finite, and such", ends[0])
        assert ends[1] == "True"
        assert "'rank 0': 'MemoryError()'" in ends[2]
