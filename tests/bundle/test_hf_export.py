"""A bundle as a folder for Hugging Face: the same logits and the same text, by a plain class where there is one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megakexue.bundle import hf_export
from megakexue.bundle.bundle import Bundle, write_bundle
from megakexue.bundle.generate import load_decoder
from megakexue.bundle.hf_export import export_hf, rope_keys
from megakexue.bundle.hf_import import open_source, resolved, weights
from megakexue.bundle.modeling_megakexue import MegakexueForCausalLM
from megakexue.config import AttentionConfig, UserError
from tests.bundle.exporting import (
    KINDS,
    PLAIN,
    PROMPTS,
    extended,
    left_padded,
    our_logits,
    our_texts,
    random_bundle,
    random_tokens,
)
from tests.conftest import Prepared
from tests.foreign import byte_level
from tests.helpers import tiny
from tests.hf import MODELS, random_ids, save_model


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    is_ours = (folder / "modeling_megakexue.py").exists()
    loader: Any = MegakexueForCausalLM if is_ours else AutoModelForCausalLM
    model = loader.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    return model.eval()


@pytest.mark.parametrize("name", KINDS)
def test_transformers_computes_the_same(name: str, prepared: Prepared, tmp_path: Path) -> None:
    expected, changes = KINDS[name]
    bundle = random_bundle(prepared, tmp_path / "bundle", **changes)
    kind, reasons, _ = export_hf(bundle, tmp_path / "hf", dtype="fp32", check=False)
    assert kind == expected and bool(reasons) == (kind == "MegakexueForCausalLM")
    ours, theirs = load_decoder(bundle), load(tmp_path / "hf")
    assert type(theirs).__name__ == kind
    tokens = random_tokens()
    with torch.no_grad():
        a, b = our_logits(ours, tokens), theirs(tokens).logits
    assert a.std() > 0.1
    assert (a - b).abs().max() < 1e-5
    if name.startswith("llama, "):
        return
    rows, mask = left_padded()
    texts = theirs.generate(rows, attention_mask=mask, max_new_tokens=12, do_sample=False)[:, rows.shape[1] :]
    assert texts.tolist() == our_texts(ours, 12)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_imported_is_exported_as_it_was(name: str, prepared: Prepared, tmp_path: Path) -> None:
    model = save_model(name, tmp_path / "theirs")
    source = open_source(tmp_path / "theirs")
    config = resolved(source)
    bundle = Bundle(
        write_bundle(tmp_path / "bundle", config, weights(source, config), prepared.tokenizer, {"from": "x"})
    )
    kind, _, _ = export_hf(bundle, tmp_path / "hf", dtype="fp32", check=False)
    # Mistral without a window is a Llama, and Granite's multipliers are in a Llama's weights
    assert kind == type(model).__name__.replace("Mistral", "Llama").replace("Granite", "Llama")
    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("hf", "theirs"))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        if name == "DeepSeek, whole queries" and key.endswith(("q_proj.weight", "kv_a_proj_with_mqa.weight")):
            continue  # it had its pairs in another order
        if name != "Granite":
            assert torch.equal(ours[key], tensor), key
    # and imported again
    assert resolved(open_source(tmp_path / "hf")) == config or name == "Granite"
    tokens = random_ids()
    with torch.no_grad():
        difference = load(tmp_path / "hf")(tokens).logits - model(tokens).logits
    assert difference.abs().max() < 1e-5


def test_biases_and_norms_of_heads_that_no_class_has_are_refused(prepared: Prepared, tmp_path: Path) -> None:
    both = AttentionConfig(scale="constant", qkv_bias=True, qk_norm=True)
    for i, changes in enumerate((PLAIN | dict(attention=both), dict(attention=AttentionConfig(qk_norm=True)))):
        bundle = random_bundle(prepared, tmp_path / str(i), **changes)
        with pytest.raises(UserError, match=r"no class has .*attention.qk_norm=true.* together"):
            export_hf(bundle, tmp_path / "hf")
        assert not (tmp_path / "hf").exists()


def test_weights_that_need_no_scale_keep_their_bits(prepared: Prepared, tmp_path: Path) -> None:
    bundle = random_bundle(prepared, tmp_path / "bundle", embed_scale=1.0, logit_scale=1.0, **PLAIN)
    export_hf(bundle, tmp_path / "hf", dtype="fp32", check=False)
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    assert torch.equal(exported["model.layers.1.self_attn.q_proj.weight"], bundle.weight("blocks.1.attention.wq"))
    assert torch.equal(exported["model.embed_tokens.weight"], bundle.weight("embedding.weight"))
    assert torch.equal(exported["lm_head.weight"], bundle.weight("head.weight"))
    assert torch.equal(exported["model.norm.weight"], bundle.weight("norm.gain"))


@pytest.mark.parametrize(
    ("extension", "kind"),
    [("interpolate", "linear"), ("ntk", "default"), ("ntk_exact", "default"), ("ntk_mixed", "longrope")],
)
def test_rope_is_told_to_both_generations(extension: str, kind: str) -> None:
    keys = rope_keys(tiny(rope=extended(extension), **PLAIN))
    assert keys["rope_parameters"]["rope_type"] == kind
    assert keys["rope_theta"] == keys["rope_parameters"]["rope_theta"]
    if kind == "default":
        assert keys["rope_scaling"] is None and keys["rope_theta"] > 1e4
    else:
        assert keys["rope_theta"] == 1e4
        assert keys["rope_parameters"] == keys["rope_scaling"] | {"rope_theta": 1e4}


def test_shards_have_an_index_that_transformers_reads(prepared: Prepared, tmp_path: Path) -> None:
    bundle = random_bundle(prepared, tmp_path / "bundle")
    _, _, found = export_hf(bundle, tmp_path / "hf", dtype="bf16", shard_bytes=40_000)
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    for name in files:
        with safe_open(tmp_path / "hf" / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert all(file.get_tensor(key).dtype == torch.bfloat16 for key in file.keys())
    assert all(path.stat().st_mode & 0o044 for path in (tmp_path / "hf").iterdir())
    assert found is not None and found.rounded is not None
    assert max(found.whole, found.cached) < 1e-5 < found.rounded[0] < 0.05


def test_an_export_that_differs_leaves_nothing(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = random_bundle(prepared, tmp_path / "bundle", **PLAIN)
    factors = hf_export._factors

    def wrong(*arguments: Any) -> dict[str, float]:
        return factors(*arguments) | {"norm.gain": 1.001}

    monkeypatch.setattr(hf_export, "_factors", wrong)
    with pytest.raises(UserError, match=r"the exported model is not ours: on 64 tokens"):
        export_hf(bundle, tmp_path / "hf", dtype="bf16")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_folder_that_is_there_stays(prepared: Prepared, tmp_path: Path) -> None:
    bundle = random_bundle(prepared, tmp_path / "bundle")
    (tmp_path / "hf").mkdir()
    with pytest.raises(UserError, match=r"hf exists: choose another name"):
        export_hf(bundle, tmp_path / "hf")
    assert list((tmp_path / "hf").iterdir()) == []


def test_the_card_says_what_the_bundle_knows(prepared: Prepared, tmp_path: Path) -> None:
    bundle = random_bundle(prepared, tmp_path / "first", **PLAIN)
    run = {
        "from": "run", "step": 7, "tokens": 12345, "data": {"fingerprint": "abc"},
        "losses": {"train": 2.5, "validation": 2.75},
    }  # fmt: skip
    weights = ((name, bundle.weight(name)) for name in bundle._files)
    lineage = {"from": "growth", "of": run}
    grown = Bundle(write_bundle(tmp_path / "second", bundle.config, weights, prepared.tokenizer, lineage))
    export_hf(grown, tmp_path / "hf", check=False, licence="mit")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n")
    for line in (
        "| trained on | 12,345 tokens |", "| training loss | 2.5000 nats a token |", "| licence | mit |",
        "| validation loss | 2.7500 nats a token |", "| data | fingerprint `abc` |", "| checked | no |", "step: 7",
    ):  # fmt: skip
        assert line in card
    assert "trust_remote_code" not in card


def test_generate_takes_what_a_tokenizer_of_others_gives(prepared: Prepared, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    first = random_bundle(prepared, tmp_path / "first", **PLAIN)
    tokenizer = byte_level(tmp_path / "tokenizer", "one mark", ["import this"] * 3, vocab_size=300)
    own = tokenizer.with_name("tokenizer_config.json")
    own.write_text(json.dumps(json.loads(own.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    parts = ((name, first.weight(name)) for name in first._files)
    bundle = Bundle(write_bundle(tmp_path / "second", first.config, parts, tokenizer, {"from": "x"}))
    export_hf(bundle, tmp_path / "hf", check=False)
    inputs = AutoTokenizer.from_pretrained(tmp_path / "hf")("import this", return_tensors="pt")
    assert load(tmp_path / "hf").generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3


def test_prompts_differ_in_length() -> None:
    assert len({len(prompt) for prompt in PROMPTS}) == len(PROMPTS)
