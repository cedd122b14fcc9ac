"""A bundle or a checkpoint as a folder for Hugging Face: transformers, vLLM, SGLang and what reads their files.

    OUT/
      config.json, generation_config.json
      model.safetensors              above the size of a shard several files and model.safetensors.index.json
      tokenizer.json, tokenizer_config.json, tokenizer.model
      modeling_megakexue.py          only where no class of transformers computes the model
      README.md                      the model card

The scales of a model that depend on no position fold into its weights. A pre-norm model is then a plain Llama, with
biases of queries, keys and values a Qwen2, with norms of queries and keys a Qwen3, or with latent attention a
DeepSeek-V3 whose layers are all dense:

    embedding           x embed_scale
    head                x logit_scale; a tied one has the embedding's factor, so the last gain gets the quotient
    query projection    x the scale of attention x sqrt(head width), since these classes divide by it; or its norm

What must stay true: a plain class is taken only where transformers, vLLM and SGLang compute it alike; weights are
folded in float64 and rounded once; the folder appears whole, and after the check if there is one.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megakexue import __version__
from megakexue.bundle.bundle import TrainedModel, load_tokenizer_of, save_tensors
from megakexue.bundle.families import head_rows, is_rotated, permuted, their_names, their_weight
from megakexue.bundle.hf_check import Agreement, compare
from megakexue.bundle.hf_tokenizer import tokenizer_json
from megakexue.config import ResolvedModel, require, to_yaml
from megakexue.core.bases import powers
from megakexue.core.costs import n_parameters
from megakexue.core.device import DTYPES
from megakexue.core.rope import frequencies, query_factor
from megakexue.files import new_folder, read_json, seal, write_json
from megakexue.text.tokenizer import SentencePiece, Tokenizer
from megakexue.text.tokenizer_files import copy_tokenizer
from megakexue.text.tokenizer_json import CONFIG

Class = Literal[
    "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "DeepseekV3ForCausalLM", "MegakexueForCausalLM"
]  # fmt: skip
MODELING = Path(__file__).with_name("modeling_megakexue.py")
INPUTS = ["input_ids", "attention_mask"]
"""What a model takes of what its tokenizer makes."""
DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16"}


def export_hf(
    model: TrainedModel, out: Path, *, dtype: Literal["fp32", "bf16"] = "bf16", shard_bytes: int = 4 * 2**30,
    licence: str = "unknown", text: str | None = None, check: bool = True, device: torch.device | None = None,
) -> tuple[Class, list[str], Agreement | None]:  # fmt: skip
    """Write the folder; return the class, why it is no plain one (or nothing), and what the check has found.

    Args:
        licence: for the model card, as the hub names it; the model does not know it.
        text: what the check encodes; None: the source of this module.
        check: compare with the model here, in float32.

    Raises:
        UserError: `out` exists or cannot be written, or both models differ; then nothing is left.
    """
    require(not out.exists() and not out.is_symlink(), f"{out} exists: choose another name, or remove it")
    tokenizer, config = load_tokenizer_of(model), model.config
    kind, reasons = choose_class(config)
    with new_folder(out) as folder:
        write_json(folder / "config.json", _config(config, kind, tokenizer, dtype))
        write_json(folder / "generation_config.json", _generation_config(config, tokenizer))
        _write_tokenizer(folder, model, tokenizer)
        if kind == "MegakexueForCausalLM":
            shutil.copyfile(MODELING, folder / MODELING.name)
        _write_weights(folder, ((name, x.to(DTYPES[dtype])) for name, x in _weights(model, kind)), shard_bytes)
        found = None
        if check:
            ids = [tokenizer.bos_id, *tokenizer.encode(Path(__file__).read_text("utf-8") if text is None else text)]
            found = compare(model, folder, _weights(model, kind), ids, device)
        (folder / "README.md").write_text(_card(model, out.name, kind, dtype, licence, found), encoding="utf-8")
        for path in sorted(folder.iterdir()):
            seal(path)
    return kind, reasons, found


# --- the class and its config ----------------------------------------------------------------------------------------


def choose_class(config: ResolvedModel) -> tuple[Class, list[str]]:
    """Return the class, and what no plain class has. Raises UserError: none computes the model."""
    attention, mla = config.attention, config.mla
    reasons = {
        f"residual={config.residual}": config.residual != "prenorm",
        f"attention.scale={attention.scale}": _query_log(config)[0] is not None,
        f"attention.similarity={attention.similarity}": attention.similarity != "dot",
        f"rope.fraction={config.rope.fraction:g}": config.rope.fraction != 1,
        # LlamaConfig refuses it
        f"d_model={config.d_model} is no multiple of n_heads": mla is None and config.d_model % config.n_heads != 0,
        # transformers' DeepSeek-V3 always has 1e-6 in the norms of its latents, vLLM's what the config says
        f"mla with norm_eps={config.norm_eps:g}": mla is not None and config.norm_eps != 1e-6,
        # vLLM's DeepSeek takes any type of RoPE for its own YaRN
        f"mla with rope.extension={config.rope.extension}": mla is not None
        and rope_keys(config)["rope_parameters"]["rope_type"] != "default",
    }
    found = [reason for reason, holds in reasons.items() if holds]
    more = {f"attention.{key}=true": getattr(attention, key) for key in ("qkv_bias", "qk_norm")}
    more = {key: value for key, value in more.items() if value}
    require(
        not more or (len(more) == 1 and not found),
        f"no class has {', '.join([*more, *found])} together: exports with biases or norms of queries and keys are "
        "Qwen2 and Qwen3, which have one of the two, and none of the others",
    )
    if found:
        return "MegakexueForCausalLM", found
    if attention.qkv_bias or attention.qk_norm:
        return ("Qwen2ForCausalLM" if attention.qkv_bias else "Qwen3ForCausalLM"), []
    return ("LlamaForCausalLM" if mla is None else "DeepseekV3ForCausalLM"), []


def _query_log(config: ResolvedModel) -> tuple[float | None, float]:
    """Return floor and power of ln(max(n, floor))^power, to which the query's factor is proportional; None: to 1."""
    attention, rope = config.attention, config.rope
    if attention.scale in ("constant", "gradient_max_constant"):
        return None, 1.0
    if attention.scale == "log_n_clipped":  # max(1, ln n / ln base)
        return attention.log_n_base or rope.trained_context or rope.context, 1.0
    return attention.log_n_floor or 16, 0.5 if attention.scale == "gradient_max" else 1.0


def _attention_scale(config: ResolvedModel) -> float:
    """Return what the scores are multiplied by, beside ln(max(n, floor))^power."""
    floor, power = _query_log(config)
    n = 1 if floor is None else math.ceil(floor)
    factor = float(query_factor(torch.tensor(n), config))
    return config.attention.softmax_scale * factor / (1.0 if floor is None else math.log(n) ** power)


def rope_keys(config: ResolvedModel) -> dict[str, Any]:
    """Return the keys that say the frequencies of RoPE to transformers 4 and, in `rope_parameters`, to 5.

    Frequencies that are no powers of a base are a `longrope` with one list of factors for all lengths.
    """
    kind: dict[str, Any]
    if config.rope.extension == "llama3":
        kind = {
            "rope_type": "llama3", "factor": config.rope.llama3_factor, "low_freq_factor": config.rope.llama3_slow,
            "high_freq_factor": config.rope.llama3_fast,
            "original_max_position_embeddings": config.rope.trained_context,
        }  # fmt: skip
        base = float(config.rope.base)
        return {"rope_theta": base, "rope_scaling": kind, "rope_parameters": kind | {"rope_theta": base}}
    theta = frequencies(config.rope, config.rotary_width)
    own = float((theta[1] / theta[0]) ** -len(theta)) if len(theta) > 1 else float(config.rope.base)
    kind = {}
    for base in (float(config.rope.base), own):
        standard = powers(base, config.rotary_width)
        if np.allclose(theta, standard, rtol=1e-10, atol=0):
            kind = {"rope_type": "default"}
            break
        if np.allclose(theta / theta[0], standard, rtol=1e-10, atol=0) and theta[0] < 1:
            kind = {"rope_type": "linear", "factor": float(1 / theta[0])}
            break
    else:
        base = float(config.rope.base)
        factors = (powers(base, config.rotary_width) / theta).tolist()
        kind = {
            "rope_type": "longrope", "long_factor": factors, "short_factor": factors, "factor": 1.0,
            "attention_factor": 1.0, "original_max_position_embeddings": config.rope.context,
        }  # fmt: skip
    return {
        "rope_theta": base,
        "rope_scaling": None if kind["rope_type"] == "default" else kind,
        "rope_parameters": kind | {"rope_theta": base},
    }


def _config(config: ResolvedModel, kind: Class, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """Return the content of config.json."""
    mla = config.mla
    values: dict[str, Any] = {
        "architectures": [kind], "vocab_size": config.vocab_size, "hidden_size": config.d_model,
        "intermediate_size": config.d_ff, "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads, "num_key_value_heads": config.n_groups, "hidden_act": "silu",
        "max_position_embeddings": config.rope.context, "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings, "attention_bias": False, "use_cache": True,
        "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id,
        "dtype": DTYPE_NAMES[dtype], "torch_dtype": DTYPE_NAMES[dtype],  # transformers 5 and 4
    }  # fmt: skip
    if mla is not None:
        values |= {
            "kv_lora_rank": mla.d_latent, "q_lora_rank": mla.d_query_latent, "qk_nope_head_dim": mla.d_nope,
            "qk_rope_head_dim": mla.d_rope, "v_head_dim": mla.d_value,
        }  # fmt: skip
    if kind == "LlamaForCausalLM":
        return values | {"model_type": "llama", "head_dim": config.head_width, "mlp_bias": False} | rope_keys(config)
    if kind in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        own = {"model_type": kind[:5].lower(), "head_dim": config.head_width, "use_sliding_window": False}
        return values | own | rope_keys(config)
    if kind == "DeepseekV3ForCausalLM":
        dense = {"first_k_dense_replace": config.n_layers, "num_mtp_layers": 0, "num_nextn_predict_layers": 0}
        return values | {"model_type": "deepseek_v3", "rope_interleave": True} | dense | rope_keys(config)
    floor, power = _query_log(config)
    module = MODELING.stem
    names = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    return values | {
        "model_type": "megakexue", "auto_map": {auto: f"{module}.Megakexue{name}" for auto, name in names.items()},
        "head_dim": max(config.head_width, config.value_width), "residual": config.residual,
        "residual_alpha": config.residual_alpha, "similarity": config.attention.similarity,
        "attention_scale": _attention_scale(config), "query_log_floor": floor, "query_log_power": power,
        "rotary_frequencies": frequencies(config.rope, config.rotary_width).tolist(),
    }  # fmt: skip


def _generation_config(config: ResolvedModel, tokenizer: Tokenizer) -> dict[str, Any]:
    values: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id
    }  # fmt: skip
    if tokenizer.vocab_size < config.vocab_size:  # rows of the embedding that no token has
        values["suppress_tokens"] = list(range(tokenizer.vocab_size, config.vocab_size))
    return values


# --- weights ---------------------------------------------------------------------------------------------------------


def _weights(model: TrainedModel, kind: Class) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the class by its name there, folded, float64."""
    config = model.config
    factors = _factors(config, kind)

    def read(name: str) -> Tensor:
        weight, factor = model.weight(name).double(), factors.get(name, 1.0)
        # 1 up to rounding must leave the bits as they are
        weight = weight if abs(factor - 1) < 1e-12 else weight * factor
        # a pair stands side by side in DeepSeek, and vLLM's knows no other order
        is_paired = kind == "DeepseekV3ForCausalLM" and is_rotated(name)
        return permuted(weight, *head_rows(name, config)) if is_paired else weight

    for name in their_names(config):
        yield name, their_weight(name, config, read)


def _factors(config: ResolvedModel, kind: Class) -> dict[str, float]:
    """Return what each parameter is multiplied by, where that is not 1."""
    factors = {"embedding.weight": config.embed_scale}
    if config.tie_embeddings:
        is_prenorm = config.residual == "prenorm"
        last = "norm.gain" if is_prenorm else f"blocks.{config.n_layers - 1}.feed_forward_norm.gain"
        factors[last] = config.logit_scale / config.embed_scale
    else:
        factors["head.weight"] = config.logit_scale
    if kind != "MegakexueForCausalLM":  # whose config has the scale
        queries = ["wq_up"] if config.mla and config.mla.d_query_latent else ["wq", "bq"]
        if config.attention.qk_norm:  # which undoes what is before it
            queries = ["query_norm.gain"]
        scale = _attention_scale(config) * math.sqrt(config.head_width)
        factors |= {f"blocks.{i}.attention.{query}": scale for i in range(config.n_layers) for query in queries}
    return factors


def _write_weights(folder: Path, weights: Iterator[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Write the tensors one after another, with `shard_bytes` of them in memory."""
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        shards.append(list(shard))
        save_tensors(shard, folder / f"model-{len(shards):05d}.safetensors", {"format": "pt"})
        shard.clear()

    for name, tensor in weights:
        require(bool(tensor.isfinite().all()), f"{name} has elements that are not finite: export with --dtype fp32")
        if shard and sum(x.nbytes for x in shard.values()) + tensor.nbytes > shard_bytes:
            flush()
        shard[name] = tensor.contiguous()
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "model-00001.safetensors").rename(folder / "model.safetensors")
        return
    index: dict[str, str] = {}
    for i, names in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"model-{i:05d}.safetensors").rename(folder / file)
        index |= dict.fromkeys(names, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


# --- tokenizer and card ----------------------------------------------------------------------------------------------


def _write_tokenizer(folder: Path, model: TrainedModel, tokenizer: Tokenizer) -> None:
    copy_tokenizer(model.tokenizer, folder)
    length, values = {"model_max_length": model.config.rope.context}, dict[str, Any]()
    if not isinstance(tokenizer, SentencePiece):
        config = folder / CONFIG
        values = read_json(config, "a tokenizer_config.json") | length
        values.pop("auto_map", None)  # names code that is not in this folder
        values |= {"model_input_names": INPUTS}  # else the library adds token_type_ids, which generate refuses
        write_json(config, values)
        return
    content = tokenizer_json(tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    pieces = {entry["id"]: entry["content"] for entry in content["added_tokens"]}
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    values = {name: pieces[i] for name, i in ids.items()}
    values |= {
        "tokenizer_class": "PreTrainedTokenizerFast", **length,
        "model_input_names": INPUTS, "padding_side": "left", "add_bos_token": True,
        "add_eos_token": False, "clean_up_tokenization_spaces": False,
        "add_prefix_space": tokenizer.has_prefix,  # which llama.cpp reads beside tokenizer.model
    }  # fmt: skip
    write_json(folder / "tokenizer_config.json", values)


def _card(model: TrainedModel, name: str, kind: Class, dtype: str, licence: str, found: Agreement | None) -> str:
    """Return the model card: what is known of the model, and how it is loaded."""
    origin = model.lineage
    while origin.get("tokens") is None and isinstance(origin.get("of"), dict):  # a grown model was trained before
        origin = origin["of"]
    data, losses = origin.get("data") or {}, origin.get("losses") or {}
    is_ours = kind == "MegakexueForCausalLM"
    unknown = "not known"
    facts = {
        "class": f"`{kind}`" + (f", in `{MODELING.name}` of this folder" if is_ours else ", of transformers"),
        "parameters": f"{n_parameters(model.config):,}, {DTYPE_NAMES[dtype]}",
        "context": f"{model.config.rope.context:,} tokens",
        "trained on": unknown if origin.get("tokens") is None else f"{origin['tokens']:,} tokens",
        "training loss": f"{losses['train']:.4f} nats a token" if "train" in losses else unknown,
        "validation loss": f"{losses['validation']:.4f} nats a token" if "validation" in losses else unknown,
        "data": f"fingerprint `{data['fingerprint']}`" if "fingerprint" in data else unknown,
        "licence": licence,
        "checked": str(found) if found else "no",
    }
    begins = "A text begins with the token BOS, which the tokenizer adds."
    if model.tokenizer.suffix == ".json":  # whose rules are those of the model that it came with
        begins = "Documents in training begin with BOS, or EOS where there is none; the tokenizer may not add it."
    remote = ", trust_remote_code=True" if is_ours else ""
    table = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return f"""---
license: {licence}
library_name: transformers
pipeline_tag: text-generation
tags: [megakexue]
---

# {name}

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{remote})
model = AutoModelForCausalLM.from_pretrained("{name}"{remote})
inputs = tokenizer(["Once upon a time", "import "], return_tensors="pt", padding=True)
print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=50)))
```

{begins} Exported by megakexue {__version__}.

## Lineage

```yaml
{to_yaml(model.lineage)}```

## Model

```yaml
{to_yaml(dataclasses.asdict(model.config))}```
"""
