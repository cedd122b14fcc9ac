"""The runs of the experiment on growth: which, in which order, and with what."""

from pathlib import Path

import pytest

import growth
from common import Run
from growth import PARTS, SHAPES, SIZES, Growth, make, plan
from megakexue.config import load_config
from tests.helpers import ROOT


def test_the_plan() -> None:
    names = [step.name for step in plan(SIZES["small"], "tiger", 1, SHAPES, PARTS)]
    assert names == ["small-tiger-1"] + [
        name
        for shape in ("wide", "deep")
        for name in [
            *(f"scratch_{shape}@{n}-tiger-1" for n in (1000, 2000)),
            f"{shape}-tiger-1",
            *(f"grown_{shape}@{n}-tiger-1" for n in (250, 400, 800, 1200)),
        ]
    ]
    chosen = plan(SIZES["20m"], "adamw", 0, ["deep"], ["scratch", "grown"], [7, 9])
    assert [step.name for step in chosen] == [
        f"{kind}_deep@{n}-adamw-0" for kind in ("scratch", "grown") for n in (7, 9)
    ]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("optimizer", ["tiger", "adamw"])
def test_every_run_has_a_config(size: str, optimizer: str) -> None:
    sizes = SIZES[size]
    for step in plan(sizes, optimizer, 2, SHAPES, PARTS):
        if isinstance(step, Growth):
            continue
        config = load_config(ROOT / step.config, list(step.overrides))
        kind, _, steps = step.name.split("-")[0].partition("@")
        role, _, shape = kind.partition("_")
        assert config.train.steps == (int(steps) if steps else sizes.small_steps)
        assert config.optim.lr == float(sizes.rates[optimizer][shape if role == "scratch" else role])
        assert (config.optim.name, config.train.seed, config.data.shuffle_seed) == (optimizer, 2, 2)
        assert f"model.n_layers={config.model.n_layers}" in sizes.models[shape or "small"]
        assert config.train.init_from == (f"{sizes.out}/bundles/{shape}-{optimizer}-2" if role == "grown" else None)
        assert config.optim.schedule == ("piecewise" if role == "small" else "wsd")
        if role != "small":
            assert config.optim.decay_steps == config.train.steps // 2


def test_a_growth_is_a_command() -> None:
    size = SIZES["small"]
    command = growth.growth(size, "wide", "tiger", 1).command(size.out)
    assert command[:8] == [
        "tools/grow_model.py", "runs/growth/small-tiger-1", "--config", "configs/tiny_grown.yaml",
        "--out", "runs/growth/bundles/wide-tiger-1", "--seed", "1",
    ]  # fmt: skip
    config = load_config(ROOT / "configs" / "tiny_grown.yaml", command[8:])
    assert (config.model.d_model, config.optim.name, config.data.shuffle_seed) == (64, "tiger", 1)


def test_what_is_done_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(growth, "call", calls.append)
    step = Growth(name="wide", source="small", overrides=())
    make(step, tmp_path)
    assert calls == [step.command(tmp_path)] and step.bundle(tmp_path).parent.is_dir()
    step.bundle(tmp_path).mkdir()
    run = Run(name="run", overrides=())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "done").touch()
    make(step, tmp_path)
    make(run, tmp_path)
    assert len(calls) == 1
