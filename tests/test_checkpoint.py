"""Checkpoints: across stages and world sizes, damage found, leftovers ignored, the newest kept."""

import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megakexue import checkpoint
from megakexue.config import Config, UserError
from megakexue.dist import Ranks
from tests.conftest import Prepared
from tests.ranks import run_on_ranks
from tests.test_engine import make_config

ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1)


def _fill(engine: Any, base: int) -> None:
    """State that says where it belongs: value = index in the parameter + a constant for kind and name."""
    engine.load(
        lambda kind, s: torch.arange(s.start, s.stop) * 2.0**-9 + base + len(kind) + hash_of(s.name), with_state=True
    )


def hash_of(name: str) -> int:
    return sum(name.encode()) % 97


def save_then_load(config: Config, folder: Path, stages: list[int]) -> list[str]:
    """Save at each stage and load at every other; return what differs."""
    from megakexue.engine import Engine, start

    ranks = start(config.engine)
    faults = []
    engines = {}
    for stage in stages:
        engines[stage] = Engine(replace(config, engine=replace(config.engine, zero_stage=stage)), ranks)
    for source in stages:
        _fill(engines[source], base=source)
        engines[source].optimizer.n_updates = 7
        engines[source].guard.n_good_in_row = 5
        state = {"step": source + 1, "n_updates": 7, "guard": engines[source].guard.state_dict()}
        here = folder / f"from_{source}"
        checkpoint.save(here, engines[source], state, step=source + 1, keep_last=2)
        found, _ = checkpoint.find(here, ranks)
        assert found is not None
        for target in stages:
            engine = engines[target]
            if target != source:
                _fill(engine, base=50)
            checkpoint.load(found, engine, lambda trainer: None)
            assert engine.optimizer.n_updates == 7 and engine.guard.n_good_in_row == 5
            for segment, views in engine.state_tensors():
                for kind, view in views.items():
                    want = torch.arange(segment.start, segment.stop) * 2.0**-9 + source + len(kind)
                    if not torch.equal(view, want + hash_of(segment.name)):
                        faults.append(f"{source} -> {target}: {kind} {segment}")
            _fill(engines[source], base=source)
    return faults


def load_elsewhere(config: Config, folder: Path, stages: list[int]) -> list[str]:
    """Load what another world size saved, at every stage."""
    from megakexue.engine import Engine, start

    ranks = start(config.engine)
    faults = []
    for target in stages:
        engine = Engine(replace(config, engine=replace(config.engine, zero_stage=target)), ranks)
        for source in stages:
            found, _ = checkpoint.find(folder / f"from_{source}", ranks)
            assert found is not None
            checkpoint.load(found, engine, lambda trainer: None)
            for segment, views in engine.state_tensors():
                for kind, view in views.items():
                    want = torch.arange(segment.start, segment.stop) * 2.0**-9 + source + len(kind)
                    if not torch.equal(view, want + hash_of(segment.name)):
                        faults.append(f"{source} -> {target}: {kind} {segment}")
    return faults


@pytest.mark.slow
def test_any_stage_and_world_size_reads_any_other(prepared: Prepared, tmp_path: Path) -> None:
    # bf16: the masters hold what bf16 cannot, so a load that went through the module would show
    config = make_config(prepared, dtype="bf16")
    config = replace(config, train=replace(config.train, global_batch_size=12))
    assert run_on_ranks(2, save_then_load, config, tmp_path, [0, 1, 2, 3]) == [[], []]
    assert run_on_ranks(1, load_elsewhere, config, tmp_path, [0, 2, 3]) == [[]]
    assert run_on_ranks(3, load_elsewhere, config, tmp_path, [1, 3]) == [[], [], []]


def write_checkpoints(config: Config, folder: Path) -> None:
    from megakexue.engine import Engine, start

    engine = Engine(config, start(config.engine))
    _fill(engine, base=0)
    (folder / "step_00000009.tmp").mkdir(parents=True)  # as a kill leaves it
    for step in (1, 2, 3):
        state = {"step": step, "n_updates": step, "guard": engine.guard.state_dict()}
        checkpoint.save(folder, engine, state, step=step, keep_last=2)


def load_expecting(config: Config, folder: Path) -> str:
    from megakexue.engine import Engine, start

    engine = Engine(config, start(config.engine))
    try:
        checkpoint.load(folder, engine, lambda trainer: None)
    except UserError as error:
        return str(error)
    return "loaded"


def test_damage_is_found_and_the_one_before_is_used(prepared: Prepared, tmp_path: Path) -> None:
    config = make_config(prepared)
    folder = tmp_path / "checkpoints"
    run_on_ranks(1, write_checkpoints, config, folder)
    assert [path.name for path in checkpoint.step_folders(folder)] == ["step_00000003", "step_00000002"]
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000002", "step_00000003"]
    assert (folder / "latest").read_text() == "step_00000003\n"
    newest = folder / "step_00000003"

    def flip_a_bit(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    def set_manifest(change: dict[str, Any]) -> None:
        manifest = json.loads((newest / "manifest.json").read_text())
        (newest / "manifest.json").write_text(json.dumps(manifest | change))

    outside = {"../../latest": {"size": 1, "sha256": ""}}
    for damage, message in [
        (lambda: flip_a_bit(newest / "rank_00000.safetensors"), "does not have the sha256 of the manifest"),
        (lambda: (newest / "trainer.json").unlink(), "trainer.json is missing"),
        (lambda: (newest / "rank_00000.safetensors").write_bytes(b"short"), "has 5 bytes instead of"),
        (lambda: (newest / "manifest.json").write_text("{"), "cannot read the manifest of a checkpoint"),
        (lambda: (newest / "manifest.json").unlink(), "cannot read the manifest of a checkpoint"),
        (lambda: set_manifest({"format": 99}), "format 99 is not 3"),
        (lambda: set_manifest({"files": outside}), "names '../../latest', which is outside the folder"),
        (lambda: set_manifest({"files": []}), "AttributeError"),
    ]:
        shutil.copytree(folder, tmp_path / "spare")
        damage()
        found, warnings = checkpoint.find(folder, ALONE)
        assert found == folder / "step_00000002", message
        assert len(warnings) == 1 and message in warnings[0] and "step_00000003" in warnings[0]
        # put aside, so that it neither comes back nor takes a place among the kept
        assert not newest.exists() and newest.with_suffix(".damaged").is_dir()
        shutil.rmtree(folder)
        (tmp_path / "spare").rename(folder)
    assert checkpoint.find(folder, ALONE) == (newest, [])
    for path in checkpoint.step_folders(folder):
        (path / "trainer.json").unlink()
    with pytest.raises(UserError, match=r"no sound checkpoint in .*Restore a folder, or move .* away"):
        checkpoint.find(folder, ALONE)
    assert checkpoint.find(tmp_path / "none", ALONE) == (None, [])


def save_after_fallback(config: Config, folder: Path) -> list[str]:
    from megakexue.engine import Engine, start

    engine = Engine(config, start(config.engine))
    _fill(engine, base=0)
    for step in (20, 30):
        checkpoint.save(folder, engine, {"step": step}, step=step, keep_last=2)
    (folder / "step_00000030" / "trainer.json").unlink()
    shutil.copytree(folder / "step_00000020", folder / "step_00000020_best")
    found, _ = checkpoint.find(folder, ALONE)
    assert found is not None and found.name == "step_00000020"
    saved = checkpoint.save(folder, engine, {"step": 25}, step=25, keep_last=1)
    assert saved.is_dir()
    return sorted(path.name for path in folder.iterdir())


def test_keeping_the_last_removes_neither_the_new_one_nor_the_users_own(prepared: Prepared, tmp_path: Path) -> None:
    (names,) = run_on_ranks(1, save_after_fallback, make_config(prepared), tmp_path)
    assert names == ["latest", "step_00000020_best", "step_00000025", "step_00000030.damaged"]


def save_on_a_full_disk(config: Config, folder: Path) -> str:
    """Save on two ranks, of which the second can write no file beyond a few bytes."""
    from megakexue.engine import Engine, start

    ranks = start(config.engine)
    engine = Engine(config, ranks)
    _fill(engine, base=0)
    checkpoint.save(folder, engine, {"step": 1}, step=1, keep_last=2)
    if not ranks.is_first:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        checkpoint.save(folder, engine, {"step": 2}, step=2, keep_last=2)
    except OSError as error:
        return str(error)
    return "saved"


@pytest.mark.slow
def test_a_full_disk_ends_all_ranks_and_leaves_the_old_one(prepared: Prepared, tmp_path: Path) -> None:
    messages = run_on_ranks(2, save_on_a_full_disk, make_config(prepared, stage=1), tmp_path)
    for message in messages:
        assert "cannot save" in message and "rank 1" in message and "make room, then run the same command" in message
    assert checkpoint.find(tmp_path, ALONE) == (tmp_path / "step_00000001", [])


def test_a_checkpoint_of_another_model_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    config = make_config(prepared)
    run_on_ranks(1, write_checkpoints, config, tmp_path)
    wider = replace(config, model=replace(config.model, d_ff=64))
    (message,) = run_on_ranks(1, load_expecting, wider, tmp_path / "step_00000003")
    assert "w_gate" in message and "it was written by another model or optimizer" in message
