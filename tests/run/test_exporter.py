"""Exports beside a run: what is written and removed, what a run feels of it, and what failures do."""

import dataclasses
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megakexue.bundle.bundle import Bundle
from megakexue.config import ResolvedConfig, UserError
from megakexue.core.resolve import resolve_config
from megakexue.run.export import export_run
from megakexue.run.exporter import NICENESS, Exporter, check_exportable, check_room, folder_of, free_memory
from megakexue.run.records import ExportRecord
from tests.conftest import Prepared
from tests.helpers import column, flip_a_bit, outcomes, records, state_hashes, tiny_config
from tests.ranks import run_on_ranks

# prenorm and constant scale, as a plain Llama has them
LLAMA = ["model.residual=prenorm", "model.attention.scale=constant", "train.steps=4", "checkpoint.every_steps=4"]


def exports(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "exports").iterdir())


@pytest.fixture(scope="module")
def trained(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two runs, `with` exports and `without`, of two ranks under ZeRO-3."""
    folder = tmp_path_factory.mktemp("exporter")
    options = [*LLAMA, "engine.zero_stage=3"]
    configs = [
        tiny_config(prepared, folder / "with", *options, "checkpoint.export=hf"),
        tiny_config(prepared, folder / "without", *options),
        # what a start finds missing: an export that was removed, one whose checkpoint is gone, and a half
        tiny_config(prepared, folder / "with", *options, "checkpoint.export=hf"),
    ]
    run_on_ranks(2, train_and_spoil, configs, folder / "with")
    return folder


def train_and_spoil(configs: list[Any], run: Path) -> None:
    from megakexue import dist

    assert outcomes(configs[:2]) == ["", ""]
    if dist.read_ranks().is_first:
        assert exports(run) == ["step_00000004"]
        shutil.rmtree(folder_of(run, 4))
        folder_of(run, 1).mkdir()
        (run / "exports" / ".step_00000002.partial").mkdir()
    dist.barrier()
    assert outcomes(configs[2:]) == [""]


@pytest.mark.slow
def test_a_run_with_exports_is_the_run_without(trained: Path) -> None:
    with_, without = trained / "with", trained / "without"
    assert [x for x in column(with_) if x["kind"] != "export"] == column(without)
    hashes = [state_hashes(run, 4) for run in (with_, without)]
    assert all(a == hashes[1][name] for name, a in hashes[0].items() if name.startswith("rank_"))


@pytest.mark.slow
def test_what_is_exported(trained: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    run = trained / "with"
    assert exports(run) == ["step_00000004"]
    # at the end of the run, and at the start that found it missing
    assert [(r["step"], r["error"]) for r in records(run) if r["kind"] == "export"] == [(4, None)] * 2
    bundle = Bundle(export_run(run, tmp_path / "bundle"))
    weights = load_file(folder_of(run, 4) / "model.safetensors")
    key = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(weights[key], bundle.weight("blocks.1.feed_forward.w_down").bfloat16())
    card = (folder_of(run, 4) / "README.md").read_text()
    assert "| checked | on 64 tokens in float32" in card and "step: 4\n" in card
    model = AutoModelForCausalLM.from_pretrained(folder_of(run, 4), trust_remote_code=False)
    assert type(model).__name__ == "LlamaForCausalLM"
    log = (run / "logs" / "rank_0.log").read_text()
    assert f"exported {folder_of(run, 4)}: LlamaForCausalLM, checked: on 64 tokens" in log


# --- failures --------------------------------------------------------------------------------------------------------


def exporter_of(run: Path, config: ResolvedConfig) -> tuple[Exporter, list[ExportRecord], list[str]]:
    records: list[ExportRecord] = []
    said: list[str] = []
    return Exporter(run, config, record=records.append, say=said.append), records, said


def wait(exporter: Exporter, saved: int) -> None:
    end = time.monotonic() + 120
    while not exporter.tend(saved):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_next_checkpoint_keeps_its_room(tmp_path: Path) -> None:
    check_room(tmp_path, 1, 1)
    with pytest.raises(UserError, match=r"bytes of room, and with the export's 7 too few would be left for the 1,0+"):
        check_room(tmp_path, 7, 10**18)


@pytest.mark.slow
def test_failures_are_lines_and_records(trained: Path, prepared: Prepared, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained / "without", run)
    config = resolve_config(tiny_config(prepared, run, *LLAMA, "checkpoint.export=hf"))
    damaged = run / "checkpoints" / "step_00000004" / "rank_00001.safetensors"
    flip_a_bit(damaged)
    shutil.copytree(run / "checkpoints" / "step_00000004", run / "checkpoints" / "step_00000003")  # of no regular step
    exporter, records, said = exporter_of(run, config)
    with exporter:
        assert not exporter.tend(4)
        process = exporter._process
        assert process is not None and os.getpriority(os.PRIO_PROCESS, process.pid) == NICENESS
        wait(exporter, 4)
        assert exporter.tend(4)  # and is not tried again
    (record,) = records
    assert record.step == 4 and "rank_00001.safetensors is damaged: its sha256 is" in str(record.error)
    assert said == [
        f"WARNING: the export of step 4 has failed: {record.error}; training goes on. {run}/logs/export.log has more; "
        f"by hand: tools/export_hf.py {run} OUT --step 4"
    ]

    # a kill leaves nothing, and neither does the end of the run
    for how in ("kill", "end"):
        exporter, records, said = exporter_of(run, config)
        with exporter:
            assert not exporter.tend(4)
            process = exporter._process
            assert process is not None
            (run / "exports" / ".step_00000004.partial").mkdir(parents=True)
            if how == "kill":
                process.send_signal(signal.SIGKILL)
                wait(exporter, 4)
                assert "signal 9 has killed it" in str(records[0].error)
        assert process.poll() is not None and exports(run) == []


def test_a_run_that_cannot_be_exported_does_not_begin(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["checkpoint.export=hf", "model.attention.qkv_bias=true"]
    config = resolve_config(tiny_config(prepared, Path("run"), *options))
    with pytest.raises(UserError, match=r"checkpoint.export=hf: no class has attention.qkv_bias=true, .*: set it to"):
        check_exportable(config)
    check_exportable(dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, export=None)))
    monkeypatch.setitem(sys.modules, "transformers", None)
    config = resolve_config(tiny_config(prepared, Path("run"), *LLAMA, "checkpoint.export=hf"))
    with pytest.raises(UserError, match=r"checkpoint.export=hf needs transformers: pip install"):
        check_exportable(config)


def test_free_memory() -> None:
    assert 2**24 < free_memory() < 2**45
