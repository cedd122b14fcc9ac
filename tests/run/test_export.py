"""From a run to a bundle: the masters as they are, whatever the stage; what is refused; tools/export_model.py."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megakexue.bundle.bundle import Bundle, OptimizerInfo, write_bundle
from megakexue.bundle.generate import load_decoder
from megakexue.config import UserError
from megakexue.core.axes import parameter_names, shape
from megakexue.core.segments import Segment
from megakexue.files import sha256
from megakexue.run.export import export_run, open_source, optimizer_state
from tests.conftest import Prepared
from tests.helpers import ROOT, edit_manifest, flip_a_bit, records, tiny_config
from tests.programs import run_without_torch
from tests.ranks import run_on_ranks

# --- a real run ------------------------------------------------------------------------------------------------------


def train_export_train(prepared: Prepared, folder: Path) -> None:
    """Train two steps, export, and start again from the bundle with a learning rate that changes no weight."""
    from megakexue import dist
    from megakexue.run.train import train

    options = ["train.steps=2", "evaluate.every_steps=1", "engine.zero_stage=2", "checkpoint.every_steps=1"]
    train(tiny_config(prepared, folder / "run", *options))
    if dist.read_ranks().is_first:
        export_run(folder / "run", folder / "bundle")
    dist.barrier()
    options += ["train.steps=1", "optim.lr=1e-30", "optim.warmup_steps=0", f"train.init_from={folder / 'bundle'}"]
    train(tiny_config(prepared, folder / "again", *options, "engine.zero_stage=3"))


@pytest.fixture(scope="module")
def trained(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run` (two ranks, two steps), its `bundle`, and the run `again` that starts from the bundle."""
    folder = tmp_path_factory.mktemp("trained")
    run_on_ranks(2, train_export_train, prepared, folder)
    return folder


def validation_losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run) if record["kind"] == "valid"]


@pytest.mark.slow
def test_a_run_exports_its_masters(trained: Path) -> None:
    bundle, n_read = Bundle(trained / "bundle"), 0
    for path in (trained / "run" / "checkpoints" / "step_00000002").glob("*.safetensors"):
        for key, tensor in load_file(path).items():
            if key.startswith("master/"):
                _, name, start = key.split("/")
                part = bundle.weight(name).view(-1)[int(start) : int(start) + len(tensor)]
                assert part.dtype == torch.float32 and torch.equal(part, tensor), key
                n_read += len(tensor)
    assert n_read == sum(p.numel() for p in load_decoder(bundle, torch.device("cpu")).parameters())
    lineage = bundle.lineage
    assert (lineage["from"], lineage["run"], lineage["step"]) == ("run", str(trained / "run"), 2)
    assert lineage["tokens"] == records(trained / "run")[-2]["tokens"] and lineage["init_from"] is None
    assert lineage["source"].split()[0] in (trained / "run" / "source.txt").read_text()
    losses = {record["step"]: record["loss"] for record in records(trained / "run") if record["kind"] == "train"}
    assert lineage["losses"] == {"train": losses[2], "validation": validation_losses(trained / "run")[-1]}


@pytest.mark.slow
def test_the_bundle_has_the_loss_that_the_engine_reported(prepared: Prepared, trained: Path) -> None:
    from megakexue.dist import ALONE
    from megakexue.run.data import Batches

    reported = validation_losses(trained / "run")
    assert len(reported) == 2 and reported[0] != reported[1]
    config = tiny_config(prepared, trained / "unused")
    data = Batches(
        config.data, split="valid", global_batch_size=4, micro_batch_size=4, ranks=ALONE, cache=trained / "cache"
    )
    model = load_decoder(Bundle(trained / "bundle"), torch.device("cpu"))
    loss, n_targets = 0.0, 0
    with torch.no_grad():
        for batch in data.first_rows(config.evaluate.n_rows):
            loss += float(model(batch.tokens, batch.positions, batch.cu_seqlens, batch.targets).cross_entropy)
            n_targets += batch.n_targets
    data.close()
    # other micro-batches and another form of attention: float32 sums in another order
    assert loss / n_targets == pytest.approx(reported[-1], rel=1e-6)
    # the engine itself, on as many ranks, starts where it left, to the last bit and at another ZeRO stage
    assert validation_losses(trained / "again") == reported[-1:]


@pytest.mark.slow
def test_a_bundle_of_a_run_from_a_bundle_says_so(trained: Path, tmp_path: Path) -> None:
    bundle = Bundle(export_run(trained / "again", tmp_path / "b", dtype=torch.bfloat16))
    assert bundle.lineage["init_from"] == str(trained / "bundle")
    first = Bundle(trained / "bundle")
    for name in parameter_names(first.config):  # the learning rate was too small to move anything
        assert torch.equal(bundle.weight(name), first.weight(name).bfloat16())


@pytest.mark.slow
def test_runs_that_cannot_be_exported(trained: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "bundle"
    shutil.copytree(trained / "run", run)

    def refused(message: str, **options: Any) -> None:
        with pytest.raises(UserError, match=message):
            export_run(run, out, **options)
        assert not out.exists()

    refused(r"run has no checkpoint of step 7: it has \[1, 2\]", step=7)
    flip_a_bit(run / "checkpoints" / "step_00000002" / "rank_00001.safetensors")
    refused("rank_00001.safetensors is damaged: .*; or export an earlier checkpoint with --step")
    assert Bundle(export_run(run, tmp_path / "first", step=1)).lineage["step"] == 1
    edit_manifest(run / "checkpoints" / "step_00000002", lambda m: m.update(format=9))
    refused("format 9 is not 4")
    (run / "checkpoints" / "step_00000002").rename(run / "checkpoints" / "step_00000003.tmp")
    assert Bundle(export_run(run, tmp_path / "second")).lineage["step"] == 1
    (run / "tokenizer.model").unlink()
    refused("run is no run folder: it has no tokenizer.model")
    shutil.copy(trained / "run" / "tokenizer.model", run)
    source = open_source(run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match=r"step_00000001 was removed while it was read, since its run goes on: keep it"):
        source.tensor("master", "embedding.weight")
    refused("run has no checkpoint yet: train on, or lower checkpoint.every_steps")
    (run / "config.yaml").unlink()
    refused("run is no run folder: it has no config.yaml")
    out.mkdir()
    with pytest.raises(UserError, match="bundle exists: choose another name, or add --overwrite"):
        export_run(run, out)


def program(*arguments: str | Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, PROGRAM, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_the_program_exports_and_tells(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    run = trained / "run"
    done = program(run, "--out", out, "--dtype", "bf16", "--step", "1")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    bundle = Bundle(out)
    n = sum(bundle.weight(name).numel() for name in parameter_names(bundle.config))
    n_bytes = sum(path.stat().st_size for path in out.iterdir())
    assert f"{out}: step 1\n{n:,} parameters in bf16, {n_bytes:,} bytes\n" in done.stdout
    assert re.search(rf"lineage: from run, run {run}, step 1, tokens \d+, source .*, megakexue \d", done.stdout)
    assert bundle.weight("head.weight").dtype == torch.bfloat16
    again = program(run, "--out", out, "--overwrite")
    assert again.returncode == 0 and Bundle(out).lineage["step"] == 2, again.stderr


def test_mistakes_in_the_arguments_are_told_before_torch_is_imported(prepared: Prepared, tmp_path: Path) -> None:
    cases: list[tuple[list[str | Path], str]] = [
        ([tmp_path / "none", "--out", tmp_path / "b"], "error: no run folder .*none: name the train.run of a config"),
        ([tmp_path, "--out", tmp_path], f"error: {tmp_path} exists: choose another name, or add --overwrite"),
        ([tmp_path, "--out", tmp_path / "b", "--dtype", "int8"], "invalid choice: 'int8'"),
        ([tmp_path], "the following arguments are required: --out"),
    ]
    results = run_without_torch(PROGRAM, [list(map(str, arguments)) for arguments, _ in cases])
    for (code, out, err), (_, message) in zip(results, cases, strict=True):
        assert (code, out) == (2, "") and re.search(message, err), err


def test_what_is_no_run_is_an_error_of_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["export_model.py", str(tmp_path), "--out", str(tmp_path / "b")])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(PROGRAM), run_name="__main__")
    said = capsys.readouterr()
    assert re.fullmatch(r"error: .* is no run folder: it has no config.yaml.*\n", said.err) and said.out == ""
    assert not (tmp_path / "b").exists()


def test_a_bundle_may_hold_the_state_of_the_optimizer(trained: Path, prepared: Prepared, tmp_path: Path) -> None:
    bundle = Bundle(export_run(trained / "run", tmp_path / "bundle", with_optimizer=True))
    assert bundle.optimizer == OptimizerInfo(name="tiger", embedding="lazy", n_updates=2)
    state = dict(optimizer_state(bundle))
    assert state.keys() == {f"momentum/{name}" for name in parameter_names(bundle.config)}
    assert all(bool(x.any()) for x in state.values())
    name = "blocks.1.attention.wk"
    size = shape(name, bundle.config)
    segment = Segment(name=name, role="matrix", shape=size, start=3, stop=size[1] + 5, flat=0, offset=0)
    assert torch.equal(bundle.read("momentum", segment), state[f"momentum/{name}"].view(-1)[3 : size[1] + 5])
    assert bundle.lineage["data"]["sample"] == 2 * 16 and bundle.lineage["data"]["epoch"] == 0

    # in several files too
    weights = ((name, bundle.weight(name)) for name in parameter_names(bundle.config))
    sharded = write_bundle(
        tmp_path / "sharded", bundle.config, weights, bundle.tokenizer, {}, shard_bytes=9000,
        optimizer=bundle.optimizer, state=optimizer_state(bundle),
    )  # fmt: skip
    assert (sharded / "optimizer-00002.safetensors").exists()
    assert all(torch.equal(x, state[key]) for key, x in optimizer_state(Bundle(sharded)))

    # a state that is not that of the config, or of no optimizer, is refused
    def sealed(out: Path) -> None:
        manifest = json.loads((out / "manifest.json").read_text())
        for file in manifest["files"]:
            manifest["files"][file] = {"size": (out / file).stat().st_size, "sha256": sha256(out / file)}
        (out / "manifest.json").write_text(json.dumps(manifest))

    config = (tmp_path / "bundle" / "config.yaml").read_text()
    for old, new, message in (
        ("name: tiger", "name: adamw", "the weights do not fit config.yaml: missing"),
        ("name: tiger", "name: sgd", "its section optimizer is not of the form that this version writes"),
        ("n_updates: 2", "n_updates: x", "its section optimizer is not of the form that this version writes"),
    ):
        (tmp_path / "bundle" / "config.yaml").write_text(
            config.replace(old, new).replace("embedding: lazy", "embedding: null")
        )
        sealed(tmp_path / "bundle")
        with pytest.raises(UserError, match=message):
            Bundle(tmp_path / "bundle")


PROGRAM = ROOT / "tools" / "export_model.py"
