"""Bundles: bit for bit what was written, damage and strangers refused, and a real run's loss again from its bundle."""

import json
import math
import pickle
import resource
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

from megakexue.bundle.bundle import FORMAT, Bundle, write_bundle
from megakexue.config import ModelConfig, ResolvedModel, RopeConfig, UserError
from megakexue.core.axes import axes, parameter_names, shape
from megakexue.core.decoder import Decoder, initial_weight
from megakexue.core.resolve import resolve
from megakexue.core.segments import Segment
from megakexue.files import sha256, verify
from tests.conftest import Prepared
from tests.helpers import ROOT, edit_manifest, flip_a_bit


def tiny_model(**changes: Any) -> ResolvedModel:
    sizes = {"vocab_size": 517, "d_model": 12, "n_layers": 2, "n_heads": 3, "n_kv_heads": 1, "d_ff": 20}
    return resolve(ModelConfig(**(sizes | changes), rope=RopeConfig(base=1e4)), "adamw", 64)


def weights_of(config: ResolvedModel) -> Iterator[tuple[str, Tensor]]:
    for name in parameter_names(config):
        yield name, initial_weight(name, config, seed=0)


def make_bundle(out: Path, prepared: Prepared, config: ResolvedModel | None = None, **options: Any) -> Path:
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
    assert set(verify(out, FORMAT)) == files - {"manifest.json"}
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
    r"format 1 is not 2: use the version of megakexue that wrote it": lambda b: edit_manifest(
        b, lambda m: m.update(format=1)
    ),
    r"manifest.json is damaged: it has no sizes and hashes of files; copy": lambda b: edit_manifest(
        b, lambda m: m.update(files={"config.yaml": 3})
    ),
    r"it has no sizes and hashes": lambda b: edit_manifest(b, lambda m: m.update(files=[])),
    r"names '../secret', which is outside the folder": lambda b: edit_manifest(
        b, lambda m: m["files"].update({"../secret": {"size": 1, "sha256": ""}})
    ),
    r"names '/etc/passwd', which is outside": lambda b: edit_manifest(
        b, lambda m: m["files"].update({"/etc/passwd": {"size": 1, "sha256": ""}})
    ),
    r"\.\. is missing": lambda b: edit_manifest(b, lambda m: m["files"].update({"..": {"size": 1, "sha256": ""}})),
    r"manifest.json does not name tokenizer.model: copy the folder again": lambda b: edit_manifest(
        b, lambda m: m["files"].pop("tokenizer.model")
    ),
    r"do not fit config.yaml: missing \['blocks.0.attention.wo'\], unknown \[\]": lambda b: edit_weights(
        b, lambda w: w.pop("blocks.0.attention.wo")
    ),
    r"do not fit config.yaml: missing \[\], unknown \['norm.gain'\]": lambda b: edit_weights(
        b, lambda w: w.update({"norm.gain": torch.ones(12)})
    ),
    r"head.weight has shape \(517, 11\) instead of the \(517, 12\) of config.yaml": lambda b: edit_weights(
        b, lambda w: w.update({"head.weight": torch.ones(517, 11)})
    ),
    r"head.weight has shape \(6204,\)": lambda b: edit_weights(
        b, lambda w: w.update({"head.weight": torch.ones(517 * 12)})
    ),
    r"model.safetensors: \S+ is in another file too: export the bundle again": lambda b: duplicate_weights(b),
    r"model.safetensors is no safetensors file": lambda b: put_a_pickle(b),
    r"config.yaml:.*python/object": lambda b: edit_config(
        b, "lineage:", f"trap: !!python/object/apply:os.mkdir [{b.parent / 'trapped'}]\nlineage:"
    ),
    r"config.yaml has no sections model and lineage": lambda b: edit_config(b, "lineage:", "history:"),
    r"config.yaml: .*n_layer": lambda b: edit_config(b, "n_layers:", "n_layer:"),
    r"config.yaml: model.n_heads=3 must be a multiple of": lambda b: edit_config(b, "n_kv_heads: 1", "n_kv_heads: 2"),
}


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
    with pytest.raises(UserError, match=r"--out .*/bundle cannot be written: Not a directory: choose another place"):
        make_bundle(home / "thesis.tex" / "bundle", prepared)


def test_a_full_disk_is_told_and_leaves_nothing(prepared: Prepared, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # a file of 50 kB is cut in the middle
    try:
        with pytest.raises(UserError, match=r"--out .*bundle cannot be written: File too large: raise the limit"):
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
from megakexue.bundle.bundle import write_bundle
from megakexue.core.axes import parameter_names
from megakexue.core.decoder import initial_weight

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
