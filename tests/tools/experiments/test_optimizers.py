"""The runs of the comparison of optimizers: which are made, with which rates, and their table."""

import math
import sys
from pathlib import Path

import pytest

import optimizers
from common import Run
from megakexue.config import load_config
from tests.helpers import ROOT
from tests.tools.experiments.made_up import write_run


def test_the_best_rate_of_each_gets_more_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    best = {"tiger": "2e-2", "lion": "3e-4", "adamw": "3e-2"}
    made: list[str] = []
    calls: list[list[str]] = []

    def train(run: Run, out: Path) -> None:
        config = load_config(ROOT / run.config, list(run.overrides))
        name, lr, seed = run.name.split("_")
        assert (config.optim.name, config.optim.lr) == (name.split("-")[0], float(lr))
        assert config.train.seed == config.data.shuffle_seed == int(seed)
        made.append(run.name)
        loss = (2.0 if best[config.optim.name] == lr else 3.0) + config.train.seed / 8
        write_run(out / run.name, [loss], math.nan if lr == "1e-2" else loss)

    monkeypatch.setattr(optimizers, "OUT", tmp_path)
    monkeypatch.setattr(optimizers, "train", train)
    monkeypatch.setattr(optimizers, "call", calls.append)
    monkeypatch.setattr(sys, "argv", ["optimizers.py"])
    monkeypatch.chdir(ROOT)
    optimizers.main()
    for name, lr in best.items():
        expected = [f"{name}_{rate}_0" for rate in optimizers.RATES[name]] + [f"{name}_{lr}_1", f"{name}_{lr}_2"]
        assert [run for run in made if run.startswith(f"{name}_")] == expected
    assert made[-3:] == [f"tiger-{variant}_2e-2_0" for variant in ("adamrow", "bf16momentum", "adamwembedding")]
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index("\033[1m== validation loss in nats per token\033[0m") + 1 :][:9] == [
        "| optimizer | lr | seeds | validation loss, mean | lowest .. highest |",
        "|---|---|---|---|---|",
        "| adamw | 1e-3 | 1 | 3.0000 | 3.0000 .. 3.0000 |",
        "| adamw | 3e-3 | 1 | 3.0000 | 3.0000 .. 3.0000 |",
        "| adamw | 1e-2 | 1 | nan | nan .. nan |",
        "| adamw | 3e-2 | 3 | 2.1250 | 2.0000 .. 2.2500 |",
        "| lion | 3e-4 | 3 | 2.1250 | 2.0000 .. 2.2500 |",
        "| lion | 1e-3 | 1 | 3.0000 | 3.0000 .. 3.0000 |",
        "| lion | 3e-3 | 1 | 3.0000 | 3.0000 .. 3.0000 |",
    ]
    assert calls == [
        ["tools/plot_run.py", *(f"{tmp_path}/{name}_{lr}_0" for name, lr in best.items()),
         "--out", f"{tmp_path}/loss.png", "--overwrite"],
    ]  # fmt: skip


def test_a_loss_that_is_no_number_is_not_the_best(tmp_path: Path) -> None:
    runs = {lr: write_run(tmp_path / lr, [1.0], loss) for lr, loss in (("1", math.nan), ("2", 3.0), ("3", 3.0))}
    assert optimizers.best_rate(runs) == "2"


def test_the_variants_of_tiger() -> None:
    row, momentum, embedding = (
        load_config(ROOT / run.config, list(run.overrides)) for run in optimizers.variants_of_tiger("2e-2", "1e-2")
    )
    assert row.model.deepnorm_recipe == "adam" and momentum.optim.momentum_dtype == "bf16"
    assert (embedding.optim.embedding, embedding.optim.embedding_lr, embedding.optim.lr) == ("adamw", 1e-2, 2e-2)
