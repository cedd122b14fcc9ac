"""The program: a run or its bundle grows, is proved, and trains on from the same loss under every ZeRO stage."""

import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megakexue.bundle.bundle import Bundle
from megakexue.config import Config, UserError
from megakexue.core.axes import parameter_names
from megakexue.files import sha256
from megakexue.run.export import export_run
from tests.conftest import Prepared
from tests.helpers import ROOT, outcomes, records, tiny_config, tiny_run, train_all
from tests.programs import run_without_torch
from tests.ranks import run_on_ranks

PROGRAM = ROOT / "tools" / "grow_model.py"
SHORT = ["train.steps=6", "optim.warmup_steps=2", "evaluate.every_steps=null", "metrics.tensorboard=false"]
SMALL = ["model.d_model=32", "model.n_heads=2", "model.n_kv_heads=1", "model.d_ff=64", "model.n_layers=2", *SHORT]
LARGE = ["model.d_model=48", "model.n_heads=3", "model.n_kv_heads=1", "model.d_ff=96", "model.n_layers=3", *SHORT]


def grow(prepared: Prepared, monkeypatch: pytest.MonkeyPatch, *arguments: Any, overrides: list[str] = LARGE) -> None:
    """Run the program in this process. Raises UserError, as its `main` does."""
    config = tiny_run(prepared, Path("runs/never"), *overrides)
    command = [str(PROGRAM), *arguments, "--config", ROOT / "configs" / "tiny_gqa.yaml", *config]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    runpy.run_path(str(PROGRAM))["main"]()


@pytest.fixture(scope="module")
def runs(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with Tiger that could go on for two steps, one that did, and one with AdamW."""
    folder = tmp_path_factory.mktemp("growth")
    half = ["train.stop_at_step=4", "checkpoint.every_steps=4"]
    configs = [
        tiny_config(prepared, folder / "tiger", *SMALL, *half),
        tiny_config(prepared, folder / "whole", *SMALL),
        tiny_config(prepared, folder / "adamw", *SMALL, *half, "optim.name=adamw", "optim.lr=1e-3"),
    ]
    run_on_ranks(1, train_all, configs)
    return folder


def test_a_run_grows_and_its_bundle_grows_into_the_same(
    prepared: Prepared, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grow(prepared, monkeypatch, runs / "tiger", "--out", tmp_path / "a")
    said = capsys.readouterr().out
    assert re.search(r"d_model +32 -> 48 +pad, weights 0, 1.2247, null-space noise 1\n", said)
    assert re.search(r"layers +2 -> 3 +pair: blocks 2 are new\n", said)
    assert re.search(r"parameters +\S+ -> \S+ +\d\.\d+ times\nFLOP per token +", said)
    assert "optimizer        tiger's state after 4 updates grows too\n" in said
    found = re.findall(
        r"(float\d\d) +norm_eps (\S+): 512 tokens' logits differ by at most (\S+) \(bound (\S+), .*\); "
        r"loss (\S+) -> (\S+)",
        said,
    )
    # a new block's norms feel norm_eps, which is left out where the maps are judged
    assert [line[:2] for line in found] == [("float64", "1e-30"), ("float32", "1e-06")]
    for _, _, largest, bound, before, after in found:
        assert float(largest) <= float(bound) and float(before) == pytest.approx(float(after), abs=1e-5)

    export_run(runs / "tiger", tmp_path / "exported", with_optimizer=True)
    grow(prepared, monkeypatch, tmp_path / "exported", "--out", tmp_path / "b")
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert sha256(tmp_path / "a" / name) == sha256(tmp_path / "b" / name)
    a, b = Bundle(tmp_path / "a"), Bundle(tmp_path / "b")
    assert a.config == b.config and a.optimizer == b.optimizer
    assert a.lineage["from"] == "growth" and a.lineage["step"] == 4 and a.lineage["of"]["run"] == str(runs / "tiger")
    assert b.lineage["source_manifest"] == sha256(tmp_path / "exported" / "manifest.json")
    assert [d["dtype"] for d in a.lineage["verified"]] == ["float64", "float32"] and a.lineage["choices"]["seed"] == 0

    # another seed is another growth; a bundle without state grows into one without
    export_run(runs / "tiger", tmp_path / "bare")
    grow(prepared, monkeypatch, tmp_path / "bare", "--out", tmp_path / "c", "--seed", 1)
    assert "optimizer        no state in the source\n" in capsys.readouterr().out
    c = Bundle(tmp_path / "c")
    assert c.optimizer is None and not (tmp_path / "c" / "optimizer.safetensors").exists()
    assert not torch.equal(c.weight("head.weight"), a.weight("head.weight"))
    grow(prepared, monkeypatch, runs / "tiger", "--out", tmp_path / "c", "--overwrite", "--optimizer", "reset")
    assert Bundle(tmp_path / "c").optimizer is None


def test_growth_that_is_not_lossless_is_not_written_but_for_stack(
    prepared: Prepared, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megakexue.bundle.grow import Growth
    from megakexue.bundle.trace import Difference

    stack = ["--out", tmp_path / "stack", "--depth", "stack"]
    grow(prepared, monkeypatch, runs / "tiger", *stack, overrides=[*LARGE, "model.n_layers=4"])
    said = capsys.readouterr().out
    assert "THIS CHANGES THE FUNCTION" in said and "WARNING: --depth stack is not lossless" in said
    monkeypatch.setattr(Growth, "scale", lambda self, name: 1.001)
    with pytest.raises(UserError, match=r"the grown model is not the old one in float64: .*; nothing is written"):
        grow(prepared, monkeypatch, runs / "tiger", "--out", tmp_path / "wrong")
    monkeypatch.undo()
    monkeypatch.setattr(Difference, "is_small", property(lambda self: self.dtype == "float64"))
    for layers, also in (3, r" or to norm_eps in new norms: keep model\.n_layers and model\.residual_alpha"), (2, ""):
        message = r"not the old one in float32: .*: the maps are right, but these weights lose as much to rounding"
        with pytest.raises(UserError, match=f"{message}{also}$"):
            grow(prepared, monkeypatch, runs / "tiger", "--out", tmp_path / "wrong",
                 overrides=[*LARGE, f"model.n_layers={layers}"])  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["stack"]


def test_choices_that_hold_a_model_back_are_said(
    prepared: Prepared, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copies = ["--width", "copy", "--units", "copy", "--noise", 0, "--depth", "zero", "--dry-run"]
    grow(prepared, monkeypatch, runs / "tiger", *copies)
    said = capsys.readouterr().out
    # 48 channels are no multiple of 32, but some are copies; the new block reads the stream apart
    assert "WARNING: with --noise 0 the copies of feed-forward, query heads get equal gradients and stay equal" in said
    assert "WARNING: tiger moves the zero matrices of new blocks by optim.rms_floor=0.001 alone" in said
    assert "logits differ" not in said
    grow(prepared, monkeypatch, runs / "adamw", "--dry-run")
    assert "left out: the state is of adamw, optim.embedding=None, and the target's" in capsys.readouterr().out


def test_mistakes_are_told(prepared: Prepared, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str, *arguments: Any, overrides: list[str] = LARGE) -> None:
        with pytest.raises(UserError, match=message):
            grow(prepared, monkeypatch, *arguments, "--out", tmp_path / "x", overrides=overrides)

    refused(
        "model.d_ff=32 is below that of the weights: set model.d_ff=64 or more",
        runs / "tiger",
        overrides=[*LARGE, "model.d_ff=32"],
    )
    refused("is neither a run nor a bundle: it has no", prepared.data)
    refused(r"has no checkpoint of step 3: it has \[4\]", runs / "tiger", "--step", 3)
    refused("--optimizer keep: left out: the state is of adamw", runs / "adamw", "--optimizer", "keep")
    export_run(runs / "tiger", tmp_path / "bare")
    refused("--optimizer keep: no state in the source: export", tmp_path / "bare", "--optimizer", "keep")
    refused("--step 4 has no effect: .* is a bundle", tmp_path / "bare", "--step", 4)
    keep = [*LARGE, "train.init_from=anywhere", "train.init_optimizer=keep"]
    for source, *reset in ((tmp_path / "bare",), (runs / "adamw",), (runs / "tiger", "--optimizer", "reset")):
        refused("train.init_optimizer=keep, but .*x would have no state: .*: set train.init_optimizer=reset",
                source, *reset, overrides=keep)  # fmt: skip
    golden = ROOT / "tests" / "golden" / "tokenizer.model"
    shutil.copytree(runs / "tiger", tmp_path / "foreign")
    shutil.copyfile(golden, tmp_path / "foreign" / "tokenizer.model")
    refused("data.tokenizer=.* is not the tokenizer of .*foreign, so its ids mean other text", tmp_path / "foreign")
    assert not (tmp_path / "x").exists()


def test_mistakes_in_the_arguments_cost_no_imports(prepared: Prepared, tmp_path: Path) -> None:
    config = str(ROOT / "configs" / "tiny_grown.yaml")
    (tmp_path / "there").mkdir()
    cases = {
        "error: no folder nowhere: name a run, a bundle, a Hugging Face folder or a .gguf file": [
            "nowhere", "--config", config, "--out", "x"],
        "error: s3://b/x is in a bucket: import it first": ["s3://b/x", "--config", config, "--out", "x"],
        "error: --out is missing": [str(tmp_path), "--config", config],
        "there exists: choose another name, or add --overwrite": [
            str(tmp_path), "--config", config, "--out", str(tmp_path / "there")],
        "there is SOURCE itself, which growth would replace: choose another name": [
            str(tmp_path / "there"), "--config", config, "--overwrite", "--out", f"{tmp_path}/./there"],
        "error: no config file nope.yaml": [str(tmp_path), "--config", "nope.yaml", "--out", "x"],
        "model.d_modle is no setting: did you mean model.d_model?": [
            str(tmp_path), "--config", config, "--out", "x", "model.d_modle=3"],
    }  # fmt: skip
    results = run_without_torch(PROGRAM, [*cases.values(), ["--help"]])
    for message, (code, _, err) in zip(cases, results):
        assert code == 2 and message in err and err.count("\n") == 1, err
    assert results[-1][0] == 0 and "bundles/7b_from_1b" in results[-1][1]


def losses(run: Path) -> list[float]:
    return [r["loss"] for r in records(run) if r["kind"] == "train"]


@pytest.mark.slow
def test_training_goes_on_from_the_same_loss_under_every_stage(
    prepared: Prepared, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step after growth has the loss that the small run's next step has, on the same rows."""
    grow(prepared, monkeypatch, runs / "tiger", "--out", tmp_path / "bundle")
    start = [f"train.init_from={tmp_path / 'bundle'}", "train.init_optimizer=keep", "train.init_data=continue"]
    configs = {
        stage: tiny_config(prepared, tmp_path / f"stage{stage}", *LARGE, *start, f"engine.zero_stage={stage}",
                           "train.steps=4", "optim.warmup_steps=1")
        for stage in (1, 2, 3)
    }  # fmt: skip
    assert run_on_ranks(2, outcomes, list(configs.values())) == [[""] * 3] * 2
    expected = losses(runs / "whole")[4]
    for stage in configs:
        found = losses(tmp_path / f"stage{stage}")
        assert found[0] == pytest.approx(expected, abs=1e-5)
        assert found == pytest.approx(losses(tmp_path / "stage1"), rel=1e-4)
        # these three updates lower the loss by 0.14; with the momentum's sign reversed they lower it by 0.01
        assert found[-1] < found[0] - 0.1
    trainer = json.loads((tmp_path / "stage1/checkpoints/step_00000004/trainer.json").read_text())
    assert trainer["n_updates"] == 8
    assert re.search(
        r"weights of .*, with the state of its tiger after 4 updates, data from epoch 0, sample \d+ on",
        trainer["lineage"][0]["origin"],
    )
    # the momentum is the small run's, where there was one
    bundle = Bundle(tmp_path / "bundle")
    old = export_run(runs / "tiger", tmp_path / "old", with_optimizer=True)
    momentum = bundle.tensor("momentum", "blocks.0.attention.wk")
    assert float(momentum[:, 32:].abs().max()) == 0 and bool(momentum[:, :32].any())
    ratio = momentum[:, :32] / Bundle(old).tensor("momentum", "blocks.0.attention.wk")
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1.5**0.5), rtol=1e-6, atol=0)

    # what training cannot go on from
    refused = {
        "has no state of an optimizer: write it with --optimizer, or set train.init_optimizer=reset": [
            f"train.init_from={tmp_path / 'bare'}"
        ],
        "has the state of optim.name=tiger with optim.embedding=lazy: use these, or set": [
            "optim.name=adamw",
            "model.residual_alpha=1",
        ],
        "train.init_data=continue: .* was trained on other rows, weights or order": ["data.shuffle_seed=7"],
    }
    grow(prepared, monkeypatch, runs / "tiger", "--out", tmp_path / "bare", "--optimizer", "reset")
    others = [tiny_config(prepared, tmp_path / "refused", *LARGE, *start, *extra) for extra in refused.values()]
    for message, end in zip(refused, run_on_ranks(1, outcomes, others)[0], strict=True):
        assert re.search(message, end), end


def test_shipped_targets_can_be_reached_from_what_they_name() -> None:
    """On paper: the maps of 7b_from_1b and tiny_grown, without weights."""
    from megakexue.bundle.axis_maps import Choices
    from megakexue.bundle.grow import Growth
    from megakexue.config import load_config
    from megakexue.core.costs import n_parameters
    from megakexue.core.resolve import resolve

    def resolved(name: str) -> tuple[Config, Any]:
        config = load_config(ROOT / "configs" / f"{name}.yaml")
        return config, resolve(config.model, config.optim.name, config.data.seq_len)

    for source, target, n in (("1b", "7b_from_1b", 6.7e9), ("tiny_gqa", "tiny_grown", 4.2e6)):
        (_, old), (config, new) = resolved(source), resolved(target)
        growth = Growth(old, new, Choices())
        assert growth.is_lossless and n_parameters(new) == pytest.approx(n, rel=0.02)
        assert {growth.origin(name) for name in parameter_names(new)} >= set(parameter_names(old))
        assert config.train.init_optimizer == "keep" and config.train.init_data == "continue"
    assert os.access(PROGRAM, os.X_OK)
