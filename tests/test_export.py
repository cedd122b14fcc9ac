"""Bundles: bit for bit what was written, damage and strangers refused, and a real run's loss again from its bundle."""

import json
import math
import os
import pickle
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from megakexue.config import ModelConfig, RopeConfig, UserError, sha256
from megakexue.export import Bundle, export_run, open_source, optimizer_state, verify, write_bundle
from megakexue.generate import load_decoder
from megakexue.model import Decoder, axes, initial_weight, parameter_names, resolve, shape
from megakexue.optim import Segment
from tests.conftest import Prepared
from tests.programs import run_without_torch
from tests.ranks import run_on_ranks
from tests.test_train import records, tiny_config

ROOT = Path(__file__).parents[1]


def tiny_model(**changes: Any) -> ModelConfig:
    sizes = {"vocab_size": 517, "d_model": 12, "n_layers": 2, "n_heads": 3, "n_kv_heads": 1, "d_ff": 20}
    return resolve(ModelConfig(**(sizes | changes), rope=RopeConfig(base=1e4)), "adamw", 64)


def weights_of(config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    for name in parameter_names(config):
        yield name, initial_weight(name, config, seed=0)


def make_bundle(out: Path, prepared: Prepared, config: ModelConfig | None = None, **options: Any) -> Path:
    config = config or tiny_model()
    return write_bundle(out, config, weights_of(config), prepared.tokenizer, {"from": "a test"}, **options)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"residual": "prenorm", "d_head": 6}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_bundle_is_what_was_written(
    prepared: Prepared, tmp_path: Path, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    # numbers whose decimal form is long or unusual: YAML must give back every bit
    config = tiny_model(norm_eps=1e-06 / 3, logit_scale=0.1 + 0.2, embed_scale=1e-30, **changes)
    config = replace(config, rope=replace(config.rope, base=2.0**70 + 2.0**20))
    lineage = {"from": "run", "run": "runs/路 $x", "step": 7, "parent": {"from": "grow"}, "source": None}
    expected = {name: tensor.to(dtype) for name, tensor in weights_of(config)}
    out = write_bundle(tmp_path / "deep" / "bundle", config, expected.items(), prepared.tokenizer, lineage)
    bundle = Bundle(out)
    assert bundle.config == config and bundle.lineage == lineage
    assert bundle.tokenizer.read_bytes() == prepared.tokenizer.read_bytes()
    with torch.device("meta"):
        parameters = dict(Decoder(config, "reference").named_parameters())
    assert expected.keys() == parameters.keys()
    for name, tensor in expected.items():
        assert bundle.weight(name).dtype == dtype
        assert torch.equal(bundle.weight(name), tensor), name
    files = {path.name for path in out.iterdir()}
    assert files == {"config.yaml", "manifest.json", "model.safetensors", "tokenizer.model"}
    assert set(verify(out)) == files - {"manifest.json"}
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]


def test_shards_hold_the_same_and_stay_below_the_limit(prepared: Prepared, tmp_path: Path) -> None:
    limit = 4000
    whole, sharded = (
        Bundle(make_bundle(tmp_path / "a", prepared)),
        make_bundle(tmp_path / "b", prepared, shard_bytes=limit),
    )
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in sorted(sharded.glob("*.safetensors"))}
    assert list(shards) == [f"model-{i + 1:05d}.safetensors" for i in range(len(shards))] and len(shards) > 3
    for name, tensors in shards.items():
        assert set(tensors) == {key for key, file in index["weight_map"].items() if file == name}
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= limit
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in shards.values() for t in tensors.values())
    bundle = Bundle(sharded)
    for name in parameter_names(bundle.config):
        assert torch.equal(bundle.weight(name), whole.weight(name))


@pytest.fixture(scope="module")
def readable(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    """One file, several files, and half precision."""
    folder, config = tmp_path_factory.mktemp("readable"), tiny_model()
    halves = ((name, tensor.bfloat16()) for name, tensor in weights_of(config))
    return [
        Bundle(make_bundle(folder / "whole", prepared)),
        Bundle(make_bundle(folder / "sharded", prepared, shard_bytes=4000)),
        Bundle(write_bundle(folder / "bf16", config, halves, prepared.tokenizer, {})),
    ]


@settings(deadline=None)  # the machine may be busy
@given(st.data())
def test_any_segment_is_the_slice_of_the_whole(readable: list[Bundle], data: st.DataObject) -> None:
    bundle = data.draw(st.sampled_from(readable))
    name = data.draw(st.sampled_from(parameter_names(bundle.config)))
    size = shape(name, bundle.config)
    start = data.draw(st.integers(0, math.prod(size) - 1))
    stop = data.draw(st.integers(start + 1, math.prod(size)))
    segment = Segment(name=name, role=axes(name).role, shape=size, start=start, stop=stop, flat=0, offset=5)
    got = bundle.read("master", segment)
    assert got.dtype == torch.float32
    assert torch.equal(got, bundle.weight(name).float().view(-1)[start:stop])


# --- what is refused -------------------------------------------------------------------------------------------------


def reseal(folder: Path) -> None:
    """Write the manifest anew over all files, as someone who makes a bundle by hand would."""
    files = [path for path in folder.iterdir() if path.name != "manifest.json"]
    entries = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in files}
    (folder / "manifest.json").write_text(json.dumps({"format": 2, "files": entries}))


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    reseal(folder)


def edit_config(folder: Path, old: str, new: str) -> None:
    text = (folder / "config.yaml").read_text()
    assert old in text
    (folder / "config.yaml").write_text(text.replace(old, new))
    reseal(folder)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def duplicate_weights(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "model-2.safetensors")
    reseal(folder)


def put_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Trap(folder.parent / "trapped")))
    reseal(folder)


REFUSED: dict[str, Callable[[Path], Any]] = {
    r"model.safetensors is damaged: its sha256 is not that of manifest.json; copy the folder again": lambda b: (
        flip_a_bit(b / "model.safetensors")
    ),
    r"tokenizer.model is damaged: its sha256": lambda b: flip_a_bit(b / "tokenizer.model"),
    r"config.yaml is damaged: it has \d+ bytes instead of \d+; copy": lambda b: (b / "config.yaml").write_text("m:"),
    r"model.safetensors is missing: copy the folder again": lambda b: (b / "model.safetensors").unlink(),
    r"is no bundle: make one with tools/export_model.py": lambda b: (b / "manifest.json").unlink(),
    r"bundle is no bundle": lambda b: (b / "config.yaml").unlink(),
    r"manifest.json: cannot read the manifest": lambda b: (b / "manifest.json").write_text('{"format": 2, "fil'),
    r"manifest must be a JSON object": lambda b: (b / "manifest.json").write_text("[]"),
    r"format 1 is not 2: use the version of megakexue that wrote it": lambda b: (
        edit_manifest(b, lambda m: m.update(format=1))
    ),
    r"manifest.json is damaged: it has no sizes and hashes of files; copy": lambda b: (
        edit_manifest(b, lambda m: m.update(files={"config.yaml": 3}))
    ),
    r"it has no sizes and hashes": lambda b: edit_manifest(b, lambda m: m.update(files=[])),
    r"names '../secret', which is outside the folder": lambda b: (
        edit_manifest(b, lambda m: m["files"].update({"../secret": {"size": 1, "sha256": ""}}))
    ),
    r"names '/etc/passwd', which is outside": lambda b: (
        edit_manifest(b, lambda m: m["files"].update({"/etc/passwd": {"size": 1, "sha256": ""}}))
    ),
    r"\.\. is missing": lambda b: edit_manifest(b, lambda m: m["files"].update({"..": {"size": 1, "sha256": ""}})),
    r"manifest.json does not name tokenizer.model: copy the folder again": lambda b: (
        edit_manifest(b, lambda m: m["files"].pop("tokenizer.model"))
    ),
    r"do not fit config.yaml: missing \['blocks.0.attention.wo'\], unknown \[\]": lambda b: (
        edit_weights(b, lambda w: w.pop("blocks.0.attention.wo"))
    ),
    r"do not fit config.yaml: missing \[\], unknown \['norm.gain'\]": lambda b: (
        edit_weights(b, lambda w: w.update({"norm.gain": torch.ones(12)}))
    ),
    r"head.weight has shape \(517, 11\) instead of the \(517, 12\) of config.yaml": lambda b: (
        edit_weights(b, lambda w: w.update({"head.weight": torch.ones(517, 11)}))
    ),
    r"head.weight has shape \(6204,\)": lambda b: (
        edit_weights(b, lambda w: w.update({"head.weight": torch.ones(517 * 12)}))
    ),
    r"model.safetensors: \S+ is in another file too: export the bundle again": lambda b: duplicate_weights(b),
    r"model.safetensors is no safetensors file": lambda b: put_a_pickle(b),
    r"config.yaml: .*python/object": lambda b: (
        edit_config(b, "lineage:", f"trap: !!python/object/apply:os.mkdir [{b.parent / 'trapped'}]\nlineage:")
    ),
    r"config.yaml has no sections model and lineage": lambda b: edit_config(b, "lineage:", "history:"),
    r"config.yaml: .*n_layer": lambda b: edit_config(b, "n_layers:", "n_layer:"),
    r"config.yaml: model.n_heads=3 must be a multiple of": lambda b: edit_config(b, "n_kv_heads: 1", "n_kv_heads: 2"),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_damaged_and_foreign_bundles_are_refused(prepared: Prepared, tmp_path: Path, message: str) -> None:
    bundle = make_bundle(tmp_path / "bundle", prepared)
    (tmp_path / "secret").write_text("x")
    Bundle(bundle)
    REFUSED[message](bundle)
    with pytest.raises(UserError, match=message) as error:
        Bundle(bundle)
    assert "\n" not in str(error.value) and not (tmp_path / "trapped").exists()


def test_a_checkpoint_or_a_missing_folder_is_no_bundle(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="is no bundle: make one with"):
            Bundle(folder)


def test_files_that_the_manifest_does_not_name_are_not_read(prepared: Prepared, tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle", prepared)
    before = Bundle(folder).weight("head.weight")
    save_file({"head.weight": torch.zeros(517, 12), "other": torch.ones(1)}, folder / "model-00002.safetensors")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "trapped")))
    (folder / "README.md").write_text("mine")
    assert torch.equal(Bundle(folder).weight("head.weight"), before)
    assert not (tmp_path / "trapped").exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "trapped").exists()  # it would have shown


def test_a_tokenizer_with_more_pieces_than_the_model_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    small = make_bundle(tmp_path / "small", prepared, tiny_model(vocab_size=511))
    with pytest.raises(UserError, match="has 512 pieces and the model a vocab_size of 511: it is not the tokenizer of"):
        Bundle(small).load_tokenizer()
    assert Bundle(make_bundle(tmp_path / "padded", prepared)).load_tokenizer().vocab_size == 512


# --- writing ---------------------------------------------------------------------------------------------------------


def test_an_existing_name_is_refused_or_replaced(prepared: Prepared, tmp_path: Path) -> None:
    out = make_bundle(tmp_path / "bundle", prepared)
    with pytest.raises(UserError, match="bundle exists: choose another name, or add --overwrite"):
        make_bundle(out, prepared)
    make_bundle(out, prepared, tiny_model(d_ff=8), overwrite=True)
    assert Bundle(out).config.d_ff == 8
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match="home is no bundle, so --overwrite does not remove it: choose another name"):
        make_bundle(home, prepared, overwrite=True)
    assert (home / "thesis.tex").read_text() == "years"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="link exists"):
        make_bundle(tmp_path / "link", prepared)
    with pytest.raises(UserError, match=r"cannot make .*partial: Not a directory: choose another place for bundle"):
        make_bundle(home / "thesis.tex" / "bundle", prepared)


def test_a_full_disk_is_told_and_leaves_nothing(prepared: Prepared, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # a file of 50 kB is cut in the middle
    try:
        with pytest.raises(UserError, match=r"bundle is not written, and nothing is left of it: .*File too large"):
            make_bundle(tmp_path / "bundle", prepared)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_refused(prepared: Prepared, tmp_path: Path) -> None:
    config = tiny_model()
    weights = dict(weights_of(config))
    weights["blocks.1.attention.wk"][0, 0] = 70000.0
    halves = ((name, tensor.half()) for name, tensor in weights.items())
    kept = make_bundle(tmp_path / "bundle", prepared)
    message = (
        "blocks.1.attention.wk has elements that are not finite in float16: choose a wider dtype, or weights of an"
    )
    with pytest.raises(UserError, match=message):
        write_bundle(kept, config, halves, prepared.tokenizer, {}, overwrite=True)
    # a failure leaves nothing, and what was there stays
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert Bundle(kept).lineage == {"from": "a test"}


def test_weights_of_another_model_are_not_written(prepared: Prepared, tmp_path: Path) -> None:
    weights = dict(weights_of(tiny_model()))
    twice = [*weights.items(), next(iter(weights.items()))]
    for wrong in (list(weights.items())[1:], twice, dict(weights_of(tiny_model(d_ff=8))).items()):
        with pytest.raises(AssertionError):
            write_bundle(tmp_path / "bundle", tiny_model(), wrong, prepared.tokenizer, {})
        assert list(tmp_path.iterdir()) == []


def test_killed_halfway_leaves_nothing_that_is_trusted(prepared: Prepared, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    code = f"""
import os, signal, sys
from pathlib import Path
from megakexue.config import *
from megakexue.export import write_bundle
from megakexue.model import initial_weight, parameter_names

config = {tiny_model()}

def weights():
    for i, name in enumerate(parameter_names(config)):
        if i == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        yield name, initial_weight(name, config, seed=0)

write_bundle(Path(sys.argv[1]), config, weights(), Path(sys.argv[2]), {{}}, shard_bytes=100)
"""
    done = subprocess.run([sys.executable, "-c", code, out, prepared.tokenizer], cwd=ROOT, timeout=60)
    assert done.returncode == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    assert leftover.name == ".bundle.partial" and len(list(leftover.glob("*.safetensors"))) == 4
    with pytest.raises(UserError, match="is no bundle"):
        Bundle(leftover)
    make_bundle(out, prepared)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    Bundle(out)


# --- a real run ------------------------------------------------------------------------------------------------------


def train_export_train(prepared: Prepared, folder: Path) -> None:
    """Train two steps, export, and start again from the bundle with a learning rate that changes no weight."""
    from megakexue import dist
    from megakexue.train import train

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


@pytest.mark.slow
def test_the_bundle_has_the_loss_that_the_engine_reported(prepared: Prepared, trained: Path) -> None:
    from megakexue.data import Batches

    reported = validation_losses(trained / "run")
    assert len(reported) == 2 and reported[0] != reported[1]
    config = tiny_config(prepared, trained / "unused")
    data = Batches(
        config.data, split="valid", global_batch_size=4, micro_batch_size=4, rank=0, world_size=1, local_rank=0,
        local_world_size=1, cache=trained / "cache",
    )  # fmt: skip
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


PROGRAM = ROOT / "tools" / "export_model.py"


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
    assert bundle.optimizer == {"name": "tiger", "embedding": "lazy", "n_updates": 2}
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
