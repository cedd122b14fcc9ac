"""Faults are drawn alike everywhere, reach the guard where they were put, and mistakes cost one line."""

import math
import runpy
from pathlib import Path

from tests.conftest import Prepared
from tests.helpers import ROOT, records, tiny_config, tiny_run
from tests.programs import run_without_torch
from tests.ranks import run_on_ranks

PROGRAM = ROOT / "tools" / "inject_faults.py"


def test_faults_are_drawn_alike() -> None:
    tool = runpy.run_path(str(PROGRAM))
    sizes = dict(steps=60, ranks=3, micro_batches=4, blocks=2)
    faults = tool["draw"](50, 7, **sizes)
    assert repr(faults) == repr(tool["draw"](50, 7, **sizes)) != repr(tool["draw"](50, 8, **sizes))
    assert len({f.step for f in faults}) == 50 and {f.step for f in faults} <= set(range(1, 61))
    assert {f.rank for f in faults} == {0, 1, 2} and {f.micro_batch for f in faults} == {0, 1, 2, 3}
    assert {f.block for f in faults} == {0, 1} and {f.is_backward for f in faults} == {True, False}
    assert {str(f.value) for f in faults} == {"nan", "inf", "-inf"}


def train_with_faults(prepared: Prepared, run: Path) -> list[int]:
    from megakexue.run.train import train

    tool = runpy.run_path(str(PROGRAM))
    config = tiny_config(prepared, run, "guard.on_nonfinite=shrink")
    faults = tool["draw"](3, 0, steps=8, ranks=1, micro_batches=4, blocks=2)
    tool["install"](faults, rank=0, micro_batches=4)
    train(config)
    return [f.step for f in faults]


def test_each_fault_reaches_the_guard(prepared: Prepared, tmp_path: Path) -> None:
    # with validation in between, whose forward passes do not count
    (steps,) = run_on_ranks(1, train_with_faults, prepared, tmp_path)
    found = [r for r in records(tmp_path) if r["kind"] == "train"]
    assert [r["step"] for r in found if r["status"] == "shrunk"] == steps and len(found) == 8
    assert [math.isfinite(float(r["loss"])) for r in records(tmp_path) if r["kind"] == "valid"] == [True] * 2


def test_mistakes(prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "used" / "checkpoints").mkdir(parents=True)
    config = str(ROOT / "configs" / "tiny_gqa.yaml")
    cases = [
        (["--n-faults", "9", *tiny_run(prepared, tmp_path / "new")], "error: --n-faults 9 must be between 0 and "),
        (tiny_run(prepared, tmp_path / "used"), "has checkpoints: faults are counted from step 1, so choose a new"),
        (
            [f"train.run={tmp_path}/new", f"data.tokenizer={tmp_path}/none"],
            "no such file; train one with tools/train_tokenizer.py",
        ),
    ]
    cases[1][0].append("train.steps=60")
    for (code, _, err), (_, message) in zip(
        run_without_torch(PROGRAM, [[config, *arguments] for arguments, _ in cases]), cases, strict=True
    ):
        assert code == 2 and message in err and err.count("\n") == 1, err
