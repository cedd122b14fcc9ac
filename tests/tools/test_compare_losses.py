"""The comparison of loss columns: every bit counts, a tolerance is the user's, and mistakes cost one line."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from megakexue.run.metrics import Metrics
from tests.helpers import QUIET, ROOT, make_record
from tests.programs import run_without_torch

TOOL = ROOT / "tools" / "compare_losses.py"


def tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], text=True, capture_output=True)


def write_losses(run: Path, losses: list[float]) -> Path:
    with Metrics(run, QUIET, n_steps=len(losses), resume_step=0) as metrics:
        for step, loss in enumerate(losses, start=1):
            metrics.log_step(make_record(step, loss=loss))
        metrics.log_validation(len(losses), 99.0, 1)  # no part of the comparison
    return run


LOSSES = [10.8, 1 / 3, math.nan, math.inf, 0.1 + 0.2]


def test_equal_runs_in_every_form(tmp_path: Path) -> None:
    a, b = write_losses(tmp_path / "a", LOSSES), write_losses(tmp_path / "b", LOSSES)
    golden = tmp_path / "golden.txt"
    result = tool("--write-golden", golden, a)
    assert (result.returncode, result.stdout) == (0, f"wrote 5 steps to {golden}\n")
    assert golden.read_text() == "1 10.8\n2 0.3333333333333333\n3 nan\n4 inf\n5 0.30000000000000004\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "golden.txt"]
    for other in (b, b / "metrics.jsonl", golden):
        result = tool(a, other)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == "5 common steps (A has 5, B has 5): equal in every bit\n"


def test_one_bit_is_a_difference(tmp_path: Path) -> None:
    changed = [*LOSSES[:4], math.nextafter(LOSSES[4], 1)]
    result = tool(write_losses(tmp_path / "a", LOSSES), write_losses(tmp_path / "b", changed))
    assert result.returncode == 1
    assert result.stdout.splitlines() == [
        "first difference: step 5: 0.30000000000000004 and 0.3000000000000001, difference 5.55e-17",
        "max abs difference: 5.55e-17 at step 5",
        "5 common steps (A has 5, B has 5): DIFFERENT: 1 beyond the tolerance of 0, the first at step 5",
    ]


def test_tolerance_and_common_steps(tmp_path: Path) -> None:
    a, b = write_losses(tmp_path / "a", [3.0, 2.0, 1.0, 0.5]), tmp_path / "b.txt"
    b.write_text("2 2.25\n3 0.5\n4 0.5\n7 1.0\n")
    shown = ["first difference: step 2: 2.0 and 2.25, difference 0.25", "max abs difference: 0.5 at step 3"]
    within, beyond = tool(a, b, "--tolerance", "0.5"), tool(a, b, "--tolerance", "0.3")
    assert within.returncode == 0
    assert within.stdout.splitlines() == [
        *shown,
        "3 common steps (A has 4, B has 4): within 0.5, equal in 1",
    ]
    assert beyond.returncode == 1
    assert beyond.stdout.splitlines() == [
        *shown,
        "3 common steps (A has 4, B has 4): DIFFERENT: 1 beyond the tolerance of 0.3, the first at step 3",
    ]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_loss_that_is_not_finite_in_one_run_is_beyond_any_tolerance(tmp_path: Path, value: str) -> None:
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("1 2.0\n")
    b.write_text(f"1 {value}\n")
    result = tool(a, b, "--tolerance", "1e300")
    assert result.returncode == 1
    assert f"step 1: 2.0 and {value}, difference inf" in result.stdout


def test_existing_golden_is_kept_unless_told(tmp_path: Path) -> None:
    run, golden = write_losses(tmp_path / "run", [1.0]), tmp_path / "golden.txt"
    golden.write_text("1 7.0\n")
    result = tool("--write-golden", golden, run)
    assert (result.returncode, golden.read_text()) == (2, "1 7.0\n")
    assert result.stderr == f"error: --write-golden {golden} exists: choose another name or add --overwrite\n"
    assert tool("--write-golden", golden, run, "--overwrite").returncode == 0
    assert golden.read_text() == "1 1.0\n"


def test_what_cannot_be_compared_exits_2(tmp_path: Path) -> None:
    run = write_losses(tmp_path / "run", [1.0, 2.0])
    empty, late, bad = tmp_path / "empty", tmp_path / "late.txt", tmp_path / "bad.txt"
    write_losses(empty, [])
    late.write_text("9 1.0\n")
    bad.write_text("1 1.0\n2 two\n")
    nowhere = tmp_path / "nowhere" / "golden.txt"
    cases: list[tuple[tuple[object, ...], str]] = [
        ((run, tmp_path), f"{tmp_path}/metrics.jsonl: no such file: give a run folder that"),
        ((run, tmp_path / "none"), f"{tmp_path}/none: cannot read losses: "),
        ((run, late), f"{run} (2 steps) and {late} (1 steps) have no step in common: check metrics.every_steps"),
        ((run, bad), f"{bad}:2: '2 two' is not of the form 'step loss': write it with --write-golden, or give a run"),
        ((run, run, "--tolerance", "-1"), "--tolerance=-1.0 must be 0 or more"),
        ((run, run, "--tolerance", "nan"), "argument --tolerance: nan must be a finite number"),
        ((run,), "1 runs given: a comparison takes two, --recipe and --write-golden one"),
        ((run, run, "--write-golden", late), "2 runs given: a comparison takes two, --recipe and --write-golden one"),
        ((empty, "--write-golden", tmp_path / "new.txt"), f"{empty}: holds no training step"),
        ((run, "--write-golden", nowhere), f"--write-golden {nowhere}: there is no folder {nowhere.parent}"),
    ]
    ends = run_without_torch(TOOL, [list(map(str, arguments)) for arguments, _ in cases])
    for (code, out, err), (arguments, message) in zip(ends, cases, strict=True):
        assert (code, out) == (2, "") and message in err, arguments
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.txt", "empty", "late.txt", "run"]


def test_help_shows_an_example() -> None:
    result = tool("--help")
    assert result.returncode == 0
    assert "tools/compare_losses.py runs/before runs/after" in result.stdout
