"""The runs of the experiment on depth, and its table."""

import sys
from pathlib import Path

import pytest

import depth
from common import Run
from megakexue.config import load_config
from tests.helpers import ROOT
from tests.tools.experiments.made_up import write_run


def test_the_runs_differ_by_the_branches_and_the_rate() -> None:
    configs = {run.name: load_config(ROOT / run.config, list(run.overrides)) for run in depth.RUNS}
    assert {name: (c.model.residual_alpha, c.model.branch_gain, c.optim.lr) for name, c in configs.items()} == {
        "deepnorm": (None, None, 1e-3),
        "postnorm": (1.0, 1.0, 1e-3),
        "postnorm_small_lr": (1.0, 1.0, 1e-4),
    }


def test_the_table_and_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text('{"splits": {"train": {"unigram_entropy_nats": 5.918}}}')
    first = {"deepnorm": 4.0, "postnorm": 6.0, "postnorm_small_lr": 7.0}

    def train(run: Run, out: Path) -> None:
        write_run(out / run.name, [first[run.name]] * 20 + [first[run.name] - 1.0] * 20)

    calls: list[list[str]] = []
    monkeypatch.setattr(depth, "OUT", tmp_path)
    monkeypatch.setattr(depth, "train", train)
    monkeypatch.setattr(depth, "call", calls.append)
    monkeypatch.setattr(sys, "argv", ["depth.py"])
    monkeypatch.chdir(ROOT)
    depth.main()
    assert capsys.readouterr().out.endswith(
        "\033[0m\n"
        "| steps | deepnorm | postnorm | postnorm_small_lr |\n|---|---|---|---|\n"
        "| 1-20 | 4.000 | 6.000 | 7.000 |\n"
        "| 21-40 | 3.000 | 5.000 | 6.000 |\n"
        "| largest gradient norm | 40 | 40 | 40 |\n"
    )
    ((program, *runs, baseline, entropy, _, picture, _),) = calls
    assert program == "tools/plot_run.py" and runs == [f"{tmp_path}/{name}" for name in first]
    assert (baseline, entropy, picture) == ("--baseline", "unigram entropy=5.918", f"{tmp_path}/loss.png")
