"""The runs of the experiment on the guard, its table, and one of the runs in small."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import guard
from megakexue.config import UserError, load_config
from tests.conftest import Prepared
from tests.helpers import ROOT, tiny_run
from tests.tools.experiments.made_up import write_run


def test_the_runs() -> None:
    runs = {run.name: run for run in guard.runs()}
    assert list(runs) == ["clean", "clean250", "shrink", "skip", "fp16"]
    assert all(run.command(Path("out"))[:3] == ["deepspeed", "--num_accelerators", "2"] for run in runs.values())
    assert {name for name, run in runs.items() if "--n-faults" in run.overrides} == {"shrink", "skip"}
    configs = {
        name: load_config(ROOT / run.config, [option for option in run.overrides if "=" in option])
        for name, run in runs.items()
    }
    for name, config in configs.items():
        steps = 250 if name == "clean250" else 300
        assert config.train.steps == config.evaluate.every_steps == steps
    assert (configs["shrink"].guard.on_nonfinite, configs["skip"].guard.on_nonfinite) == ("shrink", "skip")
    assert (configs["fp16"].engine.dtype, configs["fp16"].guard.initial_loss_scale) == ("fp16", 2**24)


def test_data_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "DATA", tmp_path / "data")
    monkeypatch.setattr("sys.argv", ["guard.py"])
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="data: run `make demo` first"):
        guard.main()


def test_the_table(tmp_path: Path) -> None:
    nan = float("nan")
    runs = [
        write_run(tmp_path / "clean", [3.0, 2.0, 1.0], 1.25),
        write_run(tmp_path / "skip", [3.0, nan, nan, 1.0], 1.5, statuses={2: "skipped", 3: "shrunk"}),
    ]
    for run, step in zip(runs, (3, 4)):
        checkpoint = run / "checkpoints" / f"step_{step:08d}"
        checkpoint.mkdir(parents=True)
        for rank in range(2):
            values = torch.tensor([nan, 1.0, float("inf")]) if run.name == "skip" else torch.ones(3)
            save_file(
                {"master/a/0": values, "rng/python": torch.tensor([nan])}, checkpoint / f"rank_{rank}.safetensors"
            )
    assert guard.results(runs).splitlines() == [
        "| run | validation loss | steps | weights that are not finite |",
        "|---|---|---|---|",
        "| clean | 1.2500 | 3 applied | 0 |",
        "| skip | 1.5000 | 2 applied, 1 skipped, 1 shrunk | 4 |",
    ]


@pytest.mark.slow
def test_a_run_with_faults_in_small(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    skip = next(run for run in guard.runs(steps=8, n_faults=2) if run.name == "skip")
    tiny = tiny_run(prepared, tmp_path / "skip")
    guard.make(dataclasses.replace(skip, overrides=(*skip.overrides, *tiny)), tmp_path)
    assert "[INFO]" not in capfd.readouterr().out
    assert guard.results([tmp_path / "skip"]).splitlines()[2].endswith(" | 6 applied, 2 skipped | 0 |")
    # what is done is left as it is
    before = (tmp_path / "skip" / "metrics.jsonl").stat().st_mtime_ns
    guard.make(next(run for run in guard.runs() if run.name == "skip"), tmp_path)
    assert (tmp_path / "skip" / "metrics.jsonl").stat().st_mtime_ns == before and capfd.readouterr().out == ""
