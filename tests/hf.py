"""Tiny models of transformers with random weights, saved as their users would have them."""

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIZES: dict[str, Any] = dict(
    vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5,
)  # fmt: skip
LATENTS: dict[str, Any] = dict(
    num_key_value_heads=4, kv_lora_rank=12, q_lora_rank=20, qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=10,
    first_k_dense_replace=2, rms_norm_eps=1e-6,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
FACTORS = [1.0, 1.9, 7.5, 16.9]
LONGROPE = dict(
    rope_type="longrope", short_factor=FACTORS, long_factor=FACTORS, factor=1.0, original_max_position_embeddings=256
)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 2": ("Llama", {}),
    "Llama 3": ("Llama", dict(rope_theta=5e3, rope_scaling=LLAMA3)),
    "Llama, longrope": ("Llama", dict(rope_scaling=LONGROPE)),
    "SmolLM2": ("Llama", dict(tie_word_embeddings=True, rope_theta=1e5)),
    "Mistral": ("Mistral", dict(sliding_window=None, head_dim=12)),
    "Qwen2": ("Qwen2", dict(tie_word_embeddings=True, rope_theta=1e6)),
    "Qwen3": ("Qwen3", dict(head_dim=12)),
    "Granite": ("Granite", dict(
        embedding_multiplier=12.0, logits_scaling=8.0, residual_multiplier=0.22, attention_multiplier=0.3,
        tie_word_embeddings=True,
    )),
    "DeepSeek": ("DeepseekV3", LATENTS),
    "DeepSeek, whole queries": ("DeepseekV3", LATENTS | dict(q_lora_rank=None, rope_interleave=False)),
}  # fmt: skip
"""By name: the class of transformers, and what it has beside `SIZES`."""
MINICPM: dict[str, Any] = LATENTS | dict(rms_norm_eps=1e-5, scale_emb=12, scale_depth=1.4, dim_model_base=16)
del MINICPM["first_k_dense_replace"]
MODELS_5: dict[str, tuple[str, dict[str, Any]]] = {
    "MiniCPM3": ("MiniCPM3", MINICPM | dict(rope_scaling=LONGROPE)),
    "MiniCPM3, untied, whole queries": ("MiniCPM3", MINICPM | dict(q_lora_rank=None, tie_word_embeddings=False)),
}
"""The same, of classes that transformers 5 alone has."""


def make_model(name: str, seed: int = 0) -> Any:
    """A model of transformers in which every parameter is random: no gain is 1, and no bias 0."""
    import transformers

    kind, values = (MODELS | MODELS_5)[name]
    config = getattr(transformers, f"{kind}Config")(**SIZES | values, attn_implementation="eager")
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            random = torch.randn(p.shape, generator=generator)
            p.copy_(random / math.sqrt(p.shape[1]) if p.dim() == 2 else 1 + 0.3 * random)
    return model.eval()


def save_model(name: str, folder: Path, tokenizer: Path | None = None, **options: Any) -> Any:
    """Save a model and, if given, its tokenizer.model; return the model."""
    model = make_model(name)
    model.save_pretrained(folder, **options)
    if tokenizer is not None:
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
    return model


def random_ids(t: int = 60) -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], (2, t), generator=torch.Generator().manual_seed(1))


def write_gguf(name: str, path: Path, **metadata: Any) -> Any:
    """Write a model as llama.cpp's converter does, float32 and Q8_0; return the model with the weights of the file."""
    import gguf
    import numpy as np

    from megakexue.bundle.families import permuted
    from megakexue.bundle.hf_import import GGUF_NAMES

    model, kind = make_model(name), MODELS[name][0].lower()
    writer, c = gguf.GGUFWriter(path, kind), model.config
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_rope_dimension_count(width)
    if kind == "qwen3":
        writer.add_key_length(width)
        writer.add_value_length(width)
    for key, value in metadata.items():
        writer.add_string(f"{kind}.{key.replace('__', '.')}", value)
    theirs = {v: k for k, v in GGUF_NAMES.items()}
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight" or not c.tie_word_embeddings}
    for key, tensor in state.items():
        block, _, rest = key.removeprefix("model.layers.").partition(".")
        short = f"blk.{block}.{theirs[rest]}" if key.startswith("model.layers.") else theirs[key]
        values = tensor
        if kind == "llama" and key.endswith(("q_proj.weight", "k_proj.weight")):
            values = permuted(tensor, width, width)
        if key.endswith("mlp.gate_proj.weight"):  # rows of 32 elements, a block of Q8_0
            packed = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType.Q8_0)
            tensor.copy_(torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)))
            writer.add_tensor(short, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(short, np.ascontiguousarray(values.numpy()))
    if c.rope_scaling:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](c, torch.device("cpu"))
        plain = 1 / c.rope_theta ** (torch.arange(0, width, 2).double() / width)
        writer.add_tensor("rope_freqs.weight", (plain / scaled).float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
