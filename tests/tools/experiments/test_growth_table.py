"""The tables of what growth saved, by hand on a few numbers, and on made-up runs."""

import subprocess
import sys
from pathlib import Path

import pytest

import growth
import growth_table
from growth_table import Comparison, Result, flops_needed, read, results
from megakexue.config import UserError, load_config
from megakexue.core.costs import flops_per_token
from tests.helpers import ROOT
from tests.tools.experiments.made_up import write_config, write_run


def test_flops_are_read_off_between_the_runs() -> None:
    grown = [Result(loss, flops, []) for loss, flops in ((3.0, 1.0), (2.0, 4.0), (1.5, 8.0))]
    assert flops_needed(grown, 2.5) == ("", pytest.approx(2.0))  # half-way between log 1 and log 4
    assert flops_needed(grown, 2.0) == ("", pytest.approx(4.0))
    assert flops_needed(grown, 1.75) == ("", pytest.approx(4 * 2**0.5))
    assert flops_needed(grown, 3.5) == ("> ", pytest.approx(1.0))
    assert flops_needed(grown, 1.4) == ("< ", 8.0)


def test_the_tables() -> None:
    curve = [(float(n), 4.0 - n / 50) for n in range(1, 101)]
    grown = {50: Result(2.4, 20.0, []), 100: Result(2.2, 40.0, curve)}
    from_scratch = [(10.0 * n, 4.0 - n / 50) for n in range(1, 151)]
    scratch = {100: Result(2.3, 100.0, []), 200: Result(1.0, 200.0, from_scratch)}
    found = [Comparison("tiger", "wide", 0, Result(2.7, 10.0, []), grown, scratch)]
    # to 2.3: 20 sqrt(2) = 28.3 of 100, and 10 for the small run; to 1.0 even 40 were not enough
    # at step 50: a loss of 3, after 50 and 10; from scratch it is there at step 50, after 500
    assert results(found).splitlines() == [
        "| optimizer | to | seed | small | grown, by steps | from scratch, by steps | FLOPs saved "
        "| if the small one is there |",
        "|---|---|---|---|---|---|---|---|",
        "| tiger | wide | 0 | 2.700 | 50: 2.400, 100: 2.200 | 100: 2.300, 200: 1.000 | 62%, < 75% | 72%, < 80% |",
        "",
        growth_table.SECOND_TITLE,
        "",
        "| optimizer | to | seed | 50 | 100 | 200 | 400 | 600 |",
        "|---|---|---|---|---|---|---|---|",
        "| tiger | wide | 0 | 3.00: 88% | 2.00: 89% |  |  |  |",
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small, a grown and a run from scratch of each optimizer; a run from scratch has no grown one beside it."""
    out = tmp_path_factory.mktemp("growth")
    size = growth.SIZES["small"]
    for optimizer in ("tiger", "adamw"):
        made = [
            growth.small_run(size, optimizer, 0),
            growth.grown_run(size, "wide", 100, optimizer, 0),
            growth.scratch_run(size, "wide", 200, optimizer, 0),
            growth.scratch_run(size, "deep", 200, optimizer, 3),
        ]
        for run in made:
            write_config(run, out)
            write_run(out / run.name, [6.0 - n / 100 for n in range(120)], 4.0 if "grown" in run.name else 5.0)
    return out


def test_a_run_is_read(runs: Path) -> None:
    result = read(runs / "grown_wide@100-tiger-0")
    config = load_config(runs / "grown_wide@100-tiger-0" / "config.yaml")
    flops = flops_per_token(config.model, 64.5) * 8 * 128
    assert (result.loss, result.flops) == (4.0, 100 * flops)
    assert len(result.curve) == 120 and result.curve[0] == (flops, 6.0)
    assert result.curve[99] == (100 * flops, pytest.approx(6 - (50 + 99) / 2 / 100))


def test_the_program(runs: Path) -> None:
    command = [sys.executable, "-W", "error", str(ROOT / "tools" / "experiments" / "growth_table.py"), str(runs)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    for optimizer in ("tiger", "adamw"):
        assert any(line.startswith(f"| {optimizer} | wide | 0 | 5.000 | 100: 4.000 | 200: 5.000 | ") for line in lines)
    assert "deep" not in done.stdout
    assert (runs / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_no_run_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no run that is done"):
        growth_table.report(tmp_path)
