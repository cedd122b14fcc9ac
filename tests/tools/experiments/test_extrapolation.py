"""The runs and evaluations of the experiment on length, and its table."""

import json
import sys
from itertools import product
from pathlib import Path

import pytest

import extrapolation
from common import Run
from megakexue.config import load_config
from tests.helpers import ROOT


def test_a_run_differs_by_its_scale_and_its_seed() -> None:
    for scale, seed in product(extrapolation.SCALES, extrapolation.SEEDS):
        run = extrapolation.training(scale, seed)
        config = load_config(ROOT / run.config, list(run.overrides))
        assert (run.name, config.model.attention.scale) == (f"{scale}_{seed}", scale)
        assert (config.train.seed, config.data.shuffle_seed, config.train.steps) == (seed, seed, 600)


def test_what_is_there_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("long", "bundles/log_n_0", "losses"):
        (tmp_path / name).mkdir(parents=True)
    parts = [{"start": start, "loss_sum": 2.0 * start, "n_tokens": 4} for start in (4, 300, 600, 2000)]
    trained: list[str] = []
    calls: list[list[str]] = []

    def train(run: Run, out: Path, title: str) -> None:
        trained.append(run.name)

    def call(command: list[str]) -> None:
        calls.append(command)
        if command[0] == "tools/evaluate.py":
            Path(command[command.index("--json") + 1]).write_text(json.dumps({"by_position": parts}))

    monkeypatch.setattr(extrapolation, "OUT", tmp_path)
    monkeypatch.setattr(extrapolation, "train", train)
    monkeypatch.setattr(extrapolation, "call", call)
    monkeypatch.setattr(sys, "argv", ["extrapolation.py"])
    monkeypatch.chdir(ROOT)
    extrapolation.main()
    assert trained == [f"{scale}_{seed}" for seed in (0, 1, 2) for scale in ("constant", "log_n")]
    exported = [command[-1] for command in calls if command[0] == "tools/export_model.py"]
    assert exported == [f"{tmp_path}/bundles/{name}" for name in trained if name != "log_n_0"]
    evaluated = [command for command in calls if command[0] == "tools/evaluate.py"]
    assert len(evaluated) == len(extrapolation.VARIANTS) * 3
    assert evaluated[-1] == [
        "tools/evaluate.py", f"{tmp_path}/bundles/constant_2", f"{tmp_path}/long", "--by-position", "--one-document",
        "--json", f"{tmp_path}/losses/constant+clipped+ntk_2.json", *extrapolation.CLIPPED, *extrapolation.NTK,
    ]  # fmt: skip
    n = len(calls)
    assert "| log_n+ntk | 2.000 (2.000 .. 2.000) | 150.000 (" in capsys.readouterr().out
    extrapolation.main()
    assert [command[0] for command in calls[n:]] == ["tools/export_model.py"] * 5  # whose folders no one has made


def test_the_table(tmp_path: Path) -> None:
    losses = {"b_0": 3.0, "b_1": 5.0, "a_b_0": 1.0}
    for name, loss in losses.items():
        parts = [
            {"start": start, "loss_sum": loss * n, "n_tokens": n}
            for start, n in ((0, 1), (255, 3), (256, 2), (1500, 2))
        ]
        parts += [{"start": 512, "loss_sum": 10 * loss, "n_tokens": 2}, {"start": 1023, "loss_sum": 0.0, "n_tokens": 8}]
        (tmp_path / f"{name}.json").write_text(json.dumps({"by_position": parts}))
    assert extrapolation.results(tmp_path).splitlines() == [
        "| model | 0-255 | 256-511 | 512-1023 | 1024-2047 |",
        "|---|---|---|---|---|",
        "| a_b | 1.000 (1.000 .. 1.000) | 1.000 (1.000 .. 1.000) | 1.000 (1.000 .. 1.000) | 1.000 (1.000 .. 1.000) |",
        "| b | 4.000 (3.000 .. 5.000) | 4.000 (3.000 .. 5.000) | 4.000 (3.000 .. 5.000) | 4.000 (3.000 .. 5.000) |",
    ]
