"""The modelling file of an export, alone: every cache and attention function, in transformers 4 and 5, without ours."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megakexue.bundle import modeling_megakexue
from megakexue.bundle.bundle import Bundle
from megakexue.bundle.generate import load_decoder
from megakexue.bundle.hf_export import export_hf
from megakexue.bundle.modeling_megakexue import MegakexueConfig, MegakexueForCausalLM
from megakexue.text.tokenizer import SentencePiece
from tests.bundle.exporting import (
    KINDS,
    PROMPTS,
    left_padded,
    our_logits,
    our_texts,
    random_bundle,
    random_tokens,
)
from tests.conftest import Prepared
from tests.environments import python_with_transformers5

OURS = ["deepnorm, log n", "mla, deepnorm, log n", "mla, wide values, tied", "partly rotated"]
USED = [*OURS, "llama, scales", "llama, yarn", "deepseek"]
TEXTS = ["def f(x):\n    return x + 1", "汉字 and 🎉", ""]


@pytest.fixture(scope="module")
def exports(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Bundle, Path]]:
    """By name: a bundle, and its export in fp32."""
    folder = tmp_path_factory.mktemp("exports")
    made = {}
    for i, name in enumerate(USED):
        bundle = random_bundle(prepared, folder / f"bundle{i}", **KINDS[name][1])
        export_hf(bundle, folder / f"hf{i}", dtype="fp32", check=False)
        made[name] = bundle, folder / f"hf{i}"
    return made


def load(folder: Path, **options: Any) -> MegakexueForCausalLM:
    model = MegakexueForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    model.generation_config.eos_token_id = None
    return model.eval()


def test_it_imports_nothing_but_torch_and_transformers() -> None:
    tree = ast.parse(Path(modeling_megakexue.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} == {"inspect", "typing", "torch", "transformers"}
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree))


def flat_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """What an engine's attention does: it has its own mask, wants one width, and returns tokens x all heads."""
    assert attention_mask is None and kwargs["engine"] == "passed on" and module.is_causal
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] == module.config.head_dim
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return mixed.transpose(1, 2).flatten(0, 1).flatten(1), None


@pytest.mark.parametrize("name", OURS)
def test_every_attention_function_computes_the_same(name: str, exports: dict[str, tuple[Bundle, Path]]) -> None:
    bundle, folder = exports[name]
    model, tokens = load(folder), random_tokens()[:1]
    expected = our_logits(load_decoder(bundle), tokens)
    modeling_megakexue.ALL_ATTENTION_FUNCTIONS["flat"] = flat_attention
    with torch.no_grad():
        for function in ("sdpa", "eager"):
            model.config._attn_implementation = function
            assert (model(tokens).logits - expected).abs().max() < 1e-5, function
        model.config._attn_implementation = "flat"
        # as vLLM calls it: the base model, positions, no cache, no mask, a tuple
        positions = torch.arange(tokens.shape[1])[None]
        options = dict(position_ids=positions, use_cache=False, return_dict=False, engine="passed on")
        hidden = model.model(tokens, **options)[0]
        assert (model.lm_head(hidden) - expected).abs().max() < 1e-5


def test_padding_at_the_left_does_not_count(exports: dict[str, tuple[Bundle, Path]]) -> None:
    _, folder = exports["deepnorm, log n"]
    model, (rows, mask) = load(folder), left_padded()
    with torch.no_grad():
        padded = model(rows, attention_mask=mask).logits
        for row, prompt in zip(padded, PROMPTS, strict=True):
            assert (row[-len(prompt) :] - model(torch.tensor([prompt])).logits[0]).abs().max() < 1e-5


def test_a_cast_leaves_the_frequencies(exports: dict[str, tuple[Bundle, Path]]) -> None:
    _, folder = exports["deepnorm, log n"]
    model = load(folder).half()
    assert model.model.rotary_emb.bits.view(torch.float64).tolist() == model.config.rotary_frequencies


def test_it_trains(exports: dict[str, tuple[Bundle, Path]]) -> None:
    _, folder = exports["mla, deepnorm, log n"]
    model, tokens = load(folder).train(), random_tokens()
    losses = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        out = model(tokens, labels=tokens, output_hidden_states=True)
        out.loss.backward()
        assert len(out.hidden_states) == model.config.num_hidden_layers + 1
        losses.append((out.loss.item(), model.model.layers[0].self_attn.kv_b_proj.weight.grad.clone()))
    assert losses[0][0] == losses[1][0] and torch.allclose(losses[0][1], losses[1][1], atol=1e-6)


def test_its_config_has_defaults_that_make_a_model() -> None:
    config = MegakexueConfig(num_hidden_layers=1, vocab_size=16, rotary_frequencies=[1.0, 0.1])
    assert MegakexueForCausalLM(config)(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def loaded_by(python: Path, exports: dict[str, tuple[Bundle, Path]], tmp_path: Path) -> dict[str, Any]:
    """What tests/bundle/load_export.py prints under another Python that does not find our package."""
    rows, mask = left_padded()
    given = {"rows": rows.tolist(), "mask": mask.tolist(), "whole": random_tokens().tolist(), "texts": TEXTS}
    command = [str(python), str(Path(__file__).with_name("load_export.py").resolve())]
    arguments = [json.dumps([str(folder) for _, folder in exports.values()]), json.dumps(given | {"n_tokens": 12})]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1",
    }  # fmt: skip
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("generation", [4, 5])
def test_it_runs_alone(
    generation: int, exports: dict[str, tuple[Bundle, Path]], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    python = Path(sys.executable)
    if generation == 5:
        python = python_with_transformers5(request.config)
    loaded = loaded_by(python, exports, tmp_path)
    for name, (bundle, folder) in exports.items():
        found, ours = loaded[str(folder)], load_decoder(bundle)
        assert found["version"].startswith(f"{generation}.") and found["class"] == KINDS[name][0]
        assert (torch.tensor(found["logits"]) - our_logits(ours, random_tokens())).abs().max() < 1e-5, name
        assert found["base"] < 1e-5 and found["half"] < 0.1
        texts = our_texts(ours, 12)
        assert found["texts"]["dynamic"] == texts, name
        if name == "deepseek" and generation == 4:  # whose static cache takes no values of another width
            assert "slice shapes" in found["texts"]["static"]
        else:
            assert found["texts"]["static"] == texts, name
        tokenizer = SentencePiece(bundle.tokenizer)
        assert found["ids"] == [[tokenizer.bos_id, *tokenizer.encode(text)] for text in TEXTS]
        assert found["decoded"] == TEXTS and found["keys"] == ["attention_mask", "input_ids"]
