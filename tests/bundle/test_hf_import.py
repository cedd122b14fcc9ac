"""Folders and GGUF files of random models: the same weights, the same logits, and what is refused."""

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megakexue.bundle.families import head_rows, is_rotated, our_weight, permuted
from megakexue.bundle.hf_import import Folder, open_source, resolved, weights
from megakexue.config import UserError
from megakexue.core.decoder import Decoder
from tests.conftest import Prepared
from tests.environments import python_with_transformers5
from tests.helpers import ROOT, positions_of
from tests.hf import MODELS, MODELS_5, random_ids, save_model, write_gguf


@torch.no_grad()
def difference(path: Path, theirs: Any) -> float:
    """The largest difference of the float32 logits; `theirs` is a model, or its logits."""
    source = open_source(path)
    config = resolved(source)
    decoder, tokens = Decoder(config, "reference"), random_ids(theirs.shape[1] if isinstance(theirs, Tensor) else 60)
    own = dict(weights(source, config))
    decoder.load_state_dict(own | ({"head.weight": own["embedding.weight"]} if config.tie_embeddings else {}))
    logits = theirs if isinstance(theirs, Tensor) else theirs(tokens).logits
    assert 0.1 < logits.std() < 5
    return float((decoder(tokens, positions_of(tokens)) - logits).abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_of_each_family(name: str, tmp_path: Path) -> None:
    model = save_model(name, tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert difference(tmp_path, model) <= 1e-5
    check_weights(Folder(tmp_path), model.state_dict(), 0.22 if name == "Granite" else 1.0)


def check_weights(source: Folder, state: dict[str, Tensor], factor: float) -> None:
    """Compare bit for bit; `factor` is what multiplies the residual branches."""
    config = resolved(source)
    for own, weight in weights(source, config):
        stored = our_weight(own, config, state.__getitem__)
        if source.imported.is_interleaved and is_rotated(own):
            weight = permuted(weight, *head_rows(own, config))
        if own.endswith((".wo", ".w_down")):
            stored = (stored.double() * factor).float()
        assert torch.equal(weight, stored), own


@pytest.mark.slow
def test_models_of_transformers_5(prepared: Prepared, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Saved by 5.x: imported, compared and exported there by our programs, and imported here."""
    python = python_with_transformers5(request.config)
    command = [str(python), "-m", "tests.bundle.models5", str(tmp_path), str(prepared.tokenizer)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    found, logits = json.loads(done.stdout.splitlines()[-1]), load_file(tmp_path / "logits.safetensors")
    assert found["version"].startswith("5.") and found["models"].keys() == (MODELS | MODELS_5).keys()
    for name, (kind, values) in (MODELS | MODELS_5).items():
        model, theirs = found["models"][name], tmp_path / name / "theirs"
        assert model["difference"] <= 1e-5, name
        assert difference(theirs, logits[name]) <= 1e-5, name
        branch = values.get("residual_multiplier", 1.0)
        if "scale_depth" in values:  # the stream is smaller, so that all norms have the epsilon of the latents
            branch = values["scale_depth"] / math.sqrt(2) * math.sqrt(1e-6 / 1e-5)
        state = load_file(theirs / "model.safetensors")
        check_weights(Folder(theirs), state, branch)
        if kind == "MiniCPM3":
            # the factors of the frequencies are in no plain class
            assert model["class"] == ("MegakexueForCausalLM" if "rope_scaling" in values else "DeepseekV3ForCausalLM")
        elif kind != "Granite" and "rope_interleave" not in values:
            again = load_file(tmp_path / name / "hf" / "model.safetensors")
            assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state), name


def test_dtypes(tmp_path: Path) -> None:
    save_model("Granite", tmp_path)
    save_file({k: x.bfloat16() for k, x in load_file(tmp_path / "model.safetensors").items()},
              tmp_path / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    source = Folder(tmp_path)
    kinds = {name.rpartition(".")[2]: x.dtype for name, x in weights(source, resolved(source))}
    # what the multiplier of the branches goes into is not rounded to bf16 again
    assert {name for name, dtype in kinds.items() if dtype == torch.float32} == {"wo", "w_down"}


def test_a_folder_that_is_not_whole(tmp_path: Path) -> None:
    save_model("SmolLM2", tmp_path)
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, values = load_file(path), json.loads(config.read_text())

    def refused(message: str, tensors: dict[str, Tensor] | None = None, **changes: Any) -> None:
        config.write_text(json.dumps(values | changes))
        if tensors is not None:
            save_file(tensors, path)
        with pytest.raises(UserError, match=message):
            source = open_source(tmp_path)
            list(weights(source, resolved(source)))

    name = "model.layers.0.mlp.up_proj.weight"
    rest = {key: x for key, x in whole.items() if key != name}
    refused(r"has no tensor \['model.layers.0.mlp.up_proj.weight'\] \(1 are missing\)", rest)
    refused(r"has the tensor \['model.layers.0.mlp.up_proj.bias'\].* not supported: a llama model of these sizes has",
            whole | {"model.layers.0.mlp.up_proj.bias": torch.zeros(48)})  # fmt: skip
    refused(r"up_proj|blocks.0.feed_forward.w_up has the shape \(4, 4\)", whole | {name: torch.zeros(4, 4)})
    refused("blocks.0.feed_forward.w_up is quantised .int8.: dequantise it", whole | {name: whole[name].to(torch.int8)})
    # a tied head and old tables of angles are no strangers
    spare = {"lm_head.weight": torch.zeros(1), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(1)}
    save_file(whole | spare, path)
    config.write_text(json.dumps(values))
    resolved(open_source(tmp_path))
    path.write_bytes(path.read_bytes()[:-100])
    refused("model.safetensors is no whole safetensors file")
    path.rename(tmp_path / "pytorch_model.bin")
    refused("has no model.safetensors and no model.safetensors.index.json: other formats run code")
    entries: list[tuple[Any, str]] = [
        ({"a": "../x.safetensors"}, "names .*, which is no file of its folder"),
        ({"a": "x.safetensors"}, "x.safetensors is missing"),
        (["a"], "has no weight_map"),
    ]
    for files, message in entries:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        refused(message)
    config.write_text("{")
    with pytest.raises(UserError, match=r"config.json: cannot read the model's config: Expecting"):
        open_source(tmp_path)
    with pytest.raises(UserError, match=r"no file or folder .*nowhere"):
        open_source(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["Llama 2", "SmolLM2", "Qwen2", "Qwen3"])
def test_gguf(name: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    assert difference(path, write_gguf(name, path)) <= 1e-5


def test_gguf_of_llama_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has the factors of the frequencies alone."""
    pytest.importorskip("gguf")
    from megakexue.bundle import hf_import

    path = tmp_path / "model.gguf"
    model = write_gguf("Llama 3", path)
    with pytest.raises(UserError, match=r"must be below model.rope.context=256"):
        open_source(path)
    monkeypatch.setitem(hf_import.LLAMA3, "original_max_position_embeddings", 32)
    assert difference(path, model) <= 1e-5
    monkeypatch.setitem(hf_import.LLAMA3, "original_max_position_embeddings", 64)
    with pytest.raises(UserError, match=r"rope_freqs.weight is not that of Llama 3.1"):
        open_source(path)


def test_gguf_refusals(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    write_gguf("Llama 2", path, rope__scaling__type="yarn")
    with pytest.raises(UserError, match=r"llama.rope.scaling.type=yarn is not supported"):
        open_source(path)
    writer = gguf.GGUFWriter(path, "gemma2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"general.architecture=gemma2 is not supported: import takes llama, qwen2"):
        open_source(path)
    writer = gguf.GGUFWriter(path, "llama")  # an adapter has the name of its model, and not all of its tensors
    for add in (writer.add_embedding_length, writer.add_block_count, writer.add_feed_forward_length):
        add(32)
    writer.add_head_count([4, 4])
    writer.add_context_length(64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"llama.attention.head_count=\[4, 4\] must be a whole number"):
        open_source(path)
    path.write_bytes(b"no model")
    with pytest.raises(UserError, match=r"is no whole GGUF file"):
        open_source(path)
