"""Checkpoints: across stages and world sizes, in a thread, damage found, leftovers ignored, the newest kept."""

import hashlib
import json
import os
import pickle
import random
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megakexue.config import ResolvedConfig, UserError
from megakexue.dist import ALONE
from megakexue.run import checkpoint
from tests.conftest import Prepared
from tests.helpers import make_config
from tests.ranks import run_on_ranks
from tests.run.saving import fill, save, state_differences


def save_then_load(config: ResolvedConfig, folder: Path, stages: list[int]) -> list[str]:
    """Save at each stage and load at every other; return what differs."""
    from megakexue.run.engine import Engine, start

    ranks = start(config.engine)
    faults = []
    engines = {}
    for stage in stages:
        engines[stage] = Engine(replace(config, engine=replace(config.engine, zero_stage=stage)), ranks)
    for source in stages:
        fill(engines[source], base=source)
        engines[source].optimizer.resume(7)
        engines[source].guard.n_good_in_row = 5
        here = folder / f"from_{source}"
        # a copy in a thread, or straight
        save(engines[source], here, source + 1, asynchronous=source % 2 == 0)
        found, _ = checkpoint.find(here, ranks)
        assert found is not None
        for target in stages:
            engine = engines[target]
            if target != source:
                fill(engine, base=50)
            checkpoint.load(found, engine, lambda trainer: None)
            assert engine.optimizer.n_updates == 7 and engine.guard.n_good_in_row == 5
            faults += [f"{source} -> {target}: {what}" for what in state_differences(engine, source)]
            fill(engines[source], base=source)
    return faults


def load_elsewhere(config: ResolvedConfig, folder: Path, stages: list[int]) -> list[str]:
    """Load what another world size saved, at every stage."""
    from megakexue.run.engine import Engine, start

    ranks = start(config.engine)
    faults = []
    for target in stages:
        engine = Engine(replace(config, engine=replace(config.engine, zero_stage=target)), ranks)
        for source in stages:
            found, _ = checkpoint.find(folder / f"from_{source}", ranks)
            assert found is not None
            checkpoint.load(found, engine, lambda trainer: None)
            faults += [f"{source} -> {target}: {what}" for what in state_differences(engine, source)]
    return faults


@pytest.mark.slow
def test_any_stage_and_world_size_reads_any_other(prepared: Prepared, tmp_path: Path) -> None:
    # bf16: the masters hold what bf16 cannot, so a load that went through the module would show
    config = make_config(prepared, dtype="bf16", optim={"name": "muon"})  # with the state of AdamW for some tensors
    config = replace(config, train=replace(config.train, global_batch_size=12))
    assert run_on_ranks(2, save_then_load, config, tmp_path, [0, 1, 2, 3]) == [[], []]
    assert run_on_ranks(1, load_elsewhere, config, tmp_path, [0, 2, 3]) == [[]]
    assert run_on_ranks(3, load_elsewhere, config, tmp_path, [1, 3]) == [[], [], []]


def write_checkpoints(config: ResolvedConfig, folder: Path) -> None:
    from megakexue.run.engine import Engine, start

    engine = Engine(config, start(config.engine))
    fill(engine, base=0)
    (folder / "step_00000009.tmp").mkdir(parents=True)  # as a kill leaves it
    for step in (1, 2, 3):
        save(engine, folder, step)


def load_expecting(config: ResolvedConfig, folder: Path) -> str:
    from megakexue.run.engine import Engine, start

    engine = Engine(config, start(config.engine))
    try:
        checkpoint.load(folder, engine, lambda trainer: None)
    except UserError as error:
        return str(error)
    return "loaded"


class Payload:
    """What a hostile pickle would run."""

    def __reduce__(self) -> Any:
        return os.system, ("touch hacked",)


def test_damage_is_found_and_the_one_before_is_used(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(prepared)
    folder = tmp_path / "checkpoints"
    run_on_ranks(1, write_checkpoints, config, folder)
    assert [path.name for path in checkpoint.step_folders(folder)] == ["step_00000003", "step_00000002"]
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000002", "step_00000003"]
    assert (folder / "latest").read_text() == "step_00000003\n"
    newest = folder / "step_00000003"
    tensors = newest / "rank_00000.safetensors"

    def flip_a_bit() -> None:
        data = bytearray(tensors.read_bytes())
        data[len(data) // 2] ^= 1
        tensors.write_bytes(data)

    def empty() -> None:
        shutil.rmtree(newest)
        newest.mkdir()

    def set_manifest(change: dict[str, Any]) -> None:
        manifest = json.loads((newest / "manifest.json").read_text())
        (newest / "manifest.json").write_text(json.dumps(manifest | change))

    def put(path: Path, content: bytes) -> None:
        """As someone who wants it to be believed: with the right size and hash in the manifest."""
        path.write_bytes(content)
        files = json.loads((newest / "manifest.json").read_text())["files"]
        entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        set_manifest({"files": files | {path.name: entry}})

    def put_tensors(change: dict[str, torch.Tensor]) -> None:
        save_file(load_file(tensors) | change, tensors)
        put(tensors, tensors.read_bytes())

    def link() -> None:
        (tmp_path / "elsewhere").write_bytes(tensors.read_bytes())
        tensors.unlink()
        tensors.symlink_to(tmp_path / "elsewhere")

    key = "master/embedding.weight/0"
    one_nan = torch.ones(517 * 36)
    one_nan[-1] = torch.nan
    outside = {"../../latest": {"size": 1, "sha256": ""}}
    files = json.loads((newest / "manifest.json").read_text())["files"]
    monkeypatch.chdir(tmp_path)
    for damage, message in [
        (flip_a_bit, "does not have the sha256 of the manifest"),
        (lambda: os.truncate(tensors, 5000), "has 5000 bytes instead of"),
        ((newest / "trainer.json").unlink, "trainer.json is missing"),
        (empty, "cannot read the manifest of a checkpoint"),
        (lambda: (newest / "manifest.json").write_text("{"), "cannot read the manifest of a checkpoint"),
        (lambda: (newest / "manifest.json").write_text("[" * 100_000), "nested too deeply"),
        (lambda: set_manifest({"format": 3}), "format 3 is not 4"),
        (lambda: set_manifest({"files": files | outside}), "names '../../latest', which no checkpoint has"),
        (lambda: set_manifest({"files": files | {"a.pt": {}}}), "names 'a.pt', which no checkpoint has"),
        (lambda: set_manifest({"files": {}}), "the manifest lacks ['rank_00000.safetensors', 'trainer.json']"),
        (lambda: set_manifest({"files": []}), "the manifest names no files"),
        (lambda: put(newest / "trainer.json", b'{"step": 7}'), "trainer.json: it is of step 7, not 3"),
        (lambda: put(tensors, pickle.dumps(Payload())), "rank_00000.safetensors: it is no safetensors file"),
        (lambda: put(tensors, struct.pack("<Q", 2**62) + b"{}"), "it is no safetensors file: Error while des"),
        (lambda: put_tensors({key: one_nan}), f"{key} is not finite"),
        (lambda: put_tensors({key: torch.ones(517, 36)}), f"{key} has the shape [517, 36] and the dtype F32 instead"),
        (lambda: put_tensors({key: torch.ones(9, dtype=torch.float64)}), "and the dtype F64 instead of one axis"),
        (lambda: put_tensors({"../x": torch.ones(1)}), "it holds '../x', which no checkpoint has"),
        (link, "rank_00000.safetensors is a link"),
    ]:
        shutil.copytree(folder, tmp_path / "spare")
        damage()
        found, warnings = checkpoint.find(folder, ALONE)
        assert found == folder / "step_00000002", message
        assert len(warnings) == 1 and message in warnings[0] and "step_00000003" in warnings[0], warnings
        # put aside, so that it neither comes back nor takes a place among the kept
        assert not newest.exists() and newest.with_suffix(".damaged").is_dir()
        shutil.rmtree(folder)
        (tmp_path / "spare").rename(folder)
    assert not (tmp_path / "hacked").exists()
    # what is no damage moves nothing: a newer version's, or storage that does not answer
    manifest = (newest / "manifest.json").read_bytes()
    set_manifest({"format": 5})
    with pytest.raises(UserError, match=r"step_00000003 cannot be used by rank 0: format 5 is not 4: it is left"):
        checkpoint.find(folder, ALONE)
    (newest / "manifest.json").unlink()
    (newest / "manifest.json").mkdir()
    with pytest.raises(UserError, match=r"step_00000003 cannot be used by rank 0: .*Is a directory.*: it is left"):
        checkpoint.find(folder, ALONE)
    (newest / "manifest.json").rmdir()
    (newest / "manifest.json").write_bytes(manifest)
    # and one that cannot be put aside, since something else has its name
    shutil.copytree(folder, tmp_path / "spare")
    newest.with_suffix(".damaged").touch()
    flip_a_bit()
    with pytest.raises(UserError, match=r"cannot put a damaged checkpoint aside: .*step_00000003.*: remove it"):
        checkpoint.find(folder, ALONE)
    shutil.rmtree(folder)
    (tmp_path / "spare").rename(folder)
    assert checkpoint.find(folder, ALONE) == (newest, [])
    for path in checkpoint.step_folders(folder):
        (path / "trainer.json").unlink()
    with pytest.raises(UserError, match=r"no sound checkpoint in .*Restore a folder, or move .* away"):
        checkpoint.find(folder, ALONE)
    assert checkpoint.find(tmp_path / "none", ALONE) == (None, [])


def numbers() -> tuple[Any, ...]:
    return torch.rand(3).tolist(), random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand()


def random_numbers(config: ResolvedConfig, folder: Path, is_saving: bool) -> tuple[Any, ...]:
    """The numbers that follow a save, or those that follow a load."""
    from megakexue.run.engine import Engine, start

    ranks = start(config.engine)
    engine = Engine(config, ranks)
    fill(engine, base=0)
    for seeds in (torch.manual_seed, random.seed, np.random.seed):
        seeds(ranks.rank + 5 * is_saving)
    random.gauss(0, 1), np.random.normal()  # each keeps the second of a pair
    if is_saving:
        save(engine, folder, 1)
    else:
        checkpoint.restore(folder / "step_00000001", engine)
    return numbers()


@pytest.mark.slow
def test_random_states_go_on_and_further_ranks_get_their_own(prepared: Prepared, tmp_path: Path) -> None:
    config = replace(make_config(prepared, stage=1), train=replace(make_config(prepared).train, global_batch_size=12))
    saved = run_on_ranks(2, random_numbers, config, tmp_path, True)
    assert run_on_ranks(1, random_numbers, config, tmp_path, False) == saved[:1]
    loaded = run_on_ranks(3, random_numbers, config, tmp_path, False)
    assert loaded[:2] == saved
    assert len({str(x) for x in loaded}) == 3
    assert run_on_ranks(3, random_numbers, config, tmp_path, False) == loaded


def save_and_spoil(config: ResolvedConfig, folder: Path) -> str:
    """Save on two ranks, and load with a random state that the second cannot use."""
    from megakexue.run.engine import Engine, start

    ranks = start(config.engine)
    engine = Engine(config, ranks)
    fill(engine, base=0)
    path = save(engine, folder, 1)
    if not ranks.is_first:
        file = path / "rank_00001.safetensors"
        save_file({key: tensor for key, tensor in load_file(file).items() if key != "rng/torch"}, file)
    try:
        checkpoint.restore(path, engine)
    except UserError as error:
        return str(error)
    return "loaded"


@pytest.mark.slow
def test_what_one_rank_cannot_load_is_refused_by_all(prepared: Prepared, tmp_path: Path) -> None:
    first, second = run_on_ranks(2, save_and_spoil, make_config(prepared, stage=1), tmp_path)
    assert "rank_00001.safetensors holds no random state of ours: KeyError('torch')" in second
    assert f"{tmp_path}/step_00000001 cannot be loaded: {{'rank 1': " in first and second in first


def load_and_watch(config: ResolvedConfig, folder: Path) -> tuple[int, int, int, int]:
    """Bytes of this rank's share, and by how many this process grew while it was read, loaded, and by a gathering."""
    from megakexue.run.engine import Engine, start

    ranks = start(config.engine)
    engine = Engine(config, ranks)
    engine.load(lambda kind, s: torch.ones(s.numel), with_state=True)
    save(engine, folder, 1, asynchronous=False)
    share = sum(view.nbytes for _, views in engine.state_tensors() for view in views.values())

    def resident(name: str) -> int:
        return 1024 * int(next(x for x in Path("/proc/self/status").read_text().splitlines() if name in x).split()[1])

    def growth(action: Any, *arguments: Any) -> int:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident("VmRSS")
        action(*arguments)
        return resident("VmHWM") - before

    gathering = growth(engine._layout.gather)
    loading = growth(checkpoint.restore, folder / "step_00000001", engine)
    engine._layout.gather = engine.check_weights = lambda: None  # type: ignore[method-assign]
    return share, growth(checkpoint.restore, folder / "step_00000001", engine), loading, gathering


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_loading_takes_little_more_than_a_rank_owns(prepared: Prepared, tmp_path: Path, stage: int) -> None:
    config = make_config(prepared, stage=stage, optim={"name": "tiger"})
    config = replace(
        config,
        model=replace(config.model, vocab_size=20_000, d_model=1024, d_ff=4096, n_layers=2, n_heads=16, d_head=64),
    )
    for share, reading, loading, gathering in run_on_ranks(2, load_and_watch, config, tmp_path):
        assert share > 2e8 and reading < 0.2 * share, (share, reading)
        # beyond that, what DeepSpeed takes on a CPU to gather weights after each step too
        assert loading < gathering + 0.2 * share, (share, loading, gathering)


def test_a_checkpoint_of_another_model_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    config = make_config(prepared)
    run_on_ranks(1, write_checkpoints, config, tmp_path)
    wider = replace(config, model=replace(config.model, d_ff=64))
    (message,) = run_on_ranks(1, load_expecting, wider, tmp_path / "step_00000003")
    assert "w_gate" in message and "it was written by another model or optimizer" in message
    # pieces that overlap could hide elements that are missing
    tensors = tmp_path / "step_00000003" / "rank_00000.safetensors"
    values = load_file(tensors)
    values["master/embedding.weight/7"] = values["master/embedding.weight/0"][:5].clone()
    save_file(values, tensors)
    (message,) = run_on_ranks(1, load_expecting, config, tmp_path / "step_00000003")
    assert "elements 7:18612 of embedding.weight (master) are there twice" in message
    del values["master/embedding.weight/7"]
    save_file(values | {"rng/python": torch.zeros(3, dtype=torch.float64)}, tensors)
    (message,) = run_on_ranks(1, load_expecting, config, tmp_path / "step_00000003")
    assert "holds no random state of ours: " in message
