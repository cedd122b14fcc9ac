"""Random bundles of every kind of model that an export tells apart, and what they compute."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megakexue.bundle.bundle import Bundle, write_bundle
from megakexue.bundle.generate import generate
from megakexue.config import AttentionConfig, MlaConfig, RopeConfig
from tests.conftest import Prepared
from tests.helpers import build, positions_of, tiny

MLA = MlaConfig(d_latent=21, d_query_latent=28, d_nope=10, d_rope=6, d_value=14)
WIDE_VALUES = MlaConfig(d_latent=20, d_nope=8, d_rope=8, d_value=20)
CONSTANT = AttentionConfig(scale="constant")
SCALED = AttentionConfig(scale="gradient_max_constant", softmax_scale=0.2)
PLAIN: dict[str, Any] = dict(residual="prenorm", attention=CONSTANT)
N_TOKENS = 60
"""In the rows of the tests; the context is 64."""


def extended(kind: str, **options: Any) -> RopeConfig:
    return RopeConfig(base=1e4, extension=kind, trained_context=24, context=64, **options)  # type: ignore[arg-type]


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", PLAIN),
    "llama, tied, wide heads": ("LlamaForCausalLM", PLAIN | dict(tie_embeddings=True, d_head=12)),
    "llama, scales": (
        "LlamaForCausalLM",
        PLAIN
        | dict(embed_scale=3.3, logit_scale=0.7, norm_eps=1e-5)
        | dict(attention=SCALED),
    ),
    "llama, interpolate": ("LlamaForCausalLM", PLAIN | dict(rope=extended("interpolate"))),
    "llama, ntk": ("LlamaForCausalLM", PLAIN | dict(rope=extended("ntk"))),
    "llama, ntk_exact": ("LlamaForCausalLM", PLAIN | dict(rope=extended("ntk_exact"))),
    "llama, ntk_mixed": ("LlamaForCausalLM", PLAIN | dict(rope=extended("ntk_mixed"))),
    "llama, yarn": ("LlamaForCausalLM", PLAIN | dict(rope=extended("yarn"), tie_embeddings=True)),
    "llama, llama3": ("LlamaForCausalLM", PLAIN | dict(rope=extended("llama3", llama3_factor=4.0))),
    "qwen2": ("Qwen2ForCausalLM", PLAIN | dict(tie_embeddings=True, attention=replace(SCALED, qkv_bias=True))),
    "qwen3": ("Qwen3ForCausalLM", PLAIN | dict(d_head=12, attention=replace(SCALED, qk_norm=True))),
    "deepseek": ("DeepseekV3ForCausalLM", PLAIN | dict(mla=MLA)),
    "deepseek, tied, whole queries": ("DeepseekV3ForCausalLM", PLAIN | dict(mla=WIDE_VALUES, tie_embeddings=True)),
    "deepseek, ntk": ("DeepseekV3ForCausalLM", PLAIN | dict(mla=MLA, rope=extended("ntk"))),
    "deepnorm, log n": ("MegakexueForCausalLM", {}),
    "deepnorm, tied": ("MegakexueForCausalLM", dict(tie_embeddings=True, attention=CONSTANT)),
    "prenorm, log n": ("MegakexueForCausalLM", dict(residual="prenorm", tie_embeddings=True)),
    "yarn, log n": ("MegakexueForCausalLM", dict(rope=extended("yarn", yarn_temperature=True))),
    "log n clipped": (
        "MegakexueForCausalLM", dict(attention=AttentionConfig(scale="log_n_clipped", log_n_base=20)),
    ),
    "gradient_max": ("MegakexueForCausalLM", dict(attention=AttentionConfig(scale="gradient_max"))),
    "cosine": ("MegakexueForCausalLM", dict(attention=AttentionConfig(similarity="cosine"))),
    "key_norm": ("MegakexueForCausalLM", dict(attention=AttentionConfig(similarity="key_norm", scale="constant"))),
    "partly rotated": ("MegakexueForCausalLM", PLAIN | dict(d_head=12, rope=RopeConfig(fraction=0.5))),
    "odd heads": ("MegakexueForCausalLM", PLAIN | dict(n_heads=5, n_kv_heads=5, d_head=8)),
    "mla, deepnorm, log n": ("MegakexueForCausalLM", dict(mla=MLA)),
    "mla, wide values, tied": ("MegakexueForCausalLM", dict(mla=WIDE_VALUES, tie_embeddings=True)),
    "mla, other eps": ("MegakexueForCausalLM", PLAIN | dict(mla=MLA, norm_eps=1e-5)),
    "mla, yarn": ("MegakexueForCausalLM", PLAIN | dict(mla=MLA, rope=extended("yarn"))),
}  # fmt: skip
"""The class that each becomes, and what is special in its config."""


def random_bundle(prepared: Prepared, out: Path, **changes: Any) -> Bundle:
    """A bundle of random weights and random gains, with more rows in the embedding than the tokenizer has pieces."""
    config = tiny(vocab_size=517, **changes)
    torch.manual_seed(3)
    weights = {
        name: 0.5 + torch.rand(p.shape) if p.ndim == 1 else p.detach()  # gains and biases
        for name, p in build(config).named_parameters()
    }
    return Bundle(write_bundle(out, config, weights.items(), prepared.tokenizer, {"from": "a test"}))


def random_tokens() -> Tensor:
    return torch.randint(4, 512, (2, N_TOKENS), generator=torch.Generator().manual_seed(7))


PROMPTS = [random_tokens()[0, :n].tolist() for n in (1, 9, 20, 4)]


@torch.no_grad()
def our_logits(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens, positions_of(tokens))


def our_texts(model: Any, n_tokens: int) -> list[list[int]]:
    """What our `generate` continues PROMPTS with."""
    steps = generate(model, PROMPTS, n_tokens=n_tokens, stop_id=None, vocab_size=512, temperature=0)
    return [list(row) for row in zip(*steps, strict=True)]  # type: ignore[arg-type]


def left_padded() -> tuple[Tensor, Tensor]:
    """PROMPTS as a batch, padded at the left, and its attention mask."""
    longest = max(map(len, PROMPTS))
    rows = [[3] * (longest - len(prompt)) + prompt for prompt in PROMPTS]
    masks = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS]
    return torch.tensor(rows), torch.tensor(masks)
