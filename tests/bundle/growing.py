"""Small models with weights that no initialiser makes, and their growth, in float64."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megakexue.bundle.grow import Growth
from megakexue.config import MlaConfig, ModelConfig, ResolvedModel, RopeConfig
from megakexue.core.axes import axes, parameter_names, shape
from megakexue.core.batch import Batch, make_batch
from megakexue.core.decoder import Decoder
from megakexue.core.resolve import resolve

Weights = dict[str, Tensor]

BASE = 10000.0

GQA: dict[str, Any] = dict(vocab_size=40, d_model=12, n_layers=2, n_heads=4, n_kv_heads=2, d_head=4, d_ff=10)

MLA: dict[str, Any] = dict(
    vocab_size=40, d_model=12, n_layers=2, n_heads=3, d_ff=10,
    mla=MlaConfig(d_latent=6, d_query_latent=7, d_nope=3, d_rope=4, d_value=4),
)  # fmt: skip


def model(values: dict[str, Any], **changes: Any) -> ResolvedModel:
    defaults: dict[str, Any] = {"rope": RopeConfig(base=BASE), "norm_eps": 1e-5}
    return resolve(ModelConfig(**defaults | values | changes), "adamw", 32)


def trained(config: ResolvedModel, seed: int = 0) -> Weights:
    """Weights that no initialiser makes: no gain is 1."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name in parameter_names(config):
        role = axes(name).role
        x = torch.randn(shape(name, config), generator=generator, dtype=torch.float64)
        if role == "bias":
            weights[name] = x * 0.5
        else:
            weights[name] = x * 0.3 + 1 if role == "gain" else x * 1.2 / math.sqrt(x.shape[1])
    return weights


def build(config: ResolvedModel, weights: Callable[[str], Tensor], dtype: torch.dtype = torch.float64) -> Decoder:
    decoder = Decoder(config, "reference").to(dtype)
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            p.copy_(weights(name))
    return decoder


def grown(growth: Growth, weights: Weights, dtype: torch.dtype = torch.float64) -> Decoder:
    return build(growth.new, lambda name: growth.weight(name, weights.__getitem__, torch.float64), dtype)


def packed(vocab_size: int, seed: int = 0) -> Batch:
    """Two rows of 24 tokens, the first of three documents."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(2, vocab_size, (2, 25), generator=generator)
    rows[:, 0] = rows[0, 9] = rows[0, 15] = 1
    return make_batch(rows.numpy(), [], bos_id=1, pad_id=0)


@torch.no_grad()
def logits_of(decoder: Decoder, batch: Batch) -> Tensor:
    return decoder(batch.tokens, batch.positions, batch.cu_seqlens)


def tied_logit_scale(old: ResolvedModel, new: ResolvedModel) -> ResolvedModel:
    """The target with the scale that tied logits need: what the tool's message asks for."""
    scale = old.logit_scale * new.embed_scale / (old.embed_scale * new.d_model / old.d_model)
    return dataclasses.replace(new, logit_scale=scale) if new.tie_embeddings else new


def gradients_of(decoder: Decoder, batch: Batch) -> Weights:
    decoder.zero_grad()
    logits = decoder(batch.tokens, batch.positions, batch.cu_seqlens)
    functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).backward()
    return {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
