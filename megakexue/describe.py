"""What a config costs: parameters, FLOPs per token, model-state bytes per rank.

    FLOPs per token, forward and backward = 6 P + 3 A,   A = 2 L h (d + e) n

P: parameters in matrix products (the head once, tied or not; the embedding look-up is none), n: mean visible keys,
(t + 1) / 2 for rows of one document. A causal query computes only the keys it sees; the convention that does not halve
attention counts n = t.

What must stay true: `n_parameters` equals the module's sum, and FLOPs equal torch's own counter (tests).
"""

import math
from dataclasses import is_dataclass
from typing import Any

from megakexue.config import Config, ModelConfig
from megakexue.model import AXES, shape
from megakexue.optim import MOMENTS


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Elements of each entry of the axis table over all layers; a tied head counts nothing."""
    counts = {}
    for name in AXES:
        n = math.prod(shape(name, config)) * (config.n_layers if name.startswith("blocks.") else 1)
        if (name == "head.weight" and config.tie_embeddings) or (name == "norm.gain" and config.residual != "prenorm"):
            n = 0
        counts[name] = n
    return counts


def n_parameters(config: ModelConfig) -> int:
    return sum(parameter_counts(config).values())


def flops_per_token(config: ModelConfig, n_keys: float) -> float:
    """Return the FLOPs of one token's forward and backward when a query sees `n_keys` keys on average."""
    counts = parameter_counts(config)
    in_products = sum(n for name, n in counts.items() if AXES[name].role == "matrix" and name != "head.weight")
    in_products += config.vocab_size * config.d_model
    attention = 2 * config.n_layers * config.n_heads * 2 * config.head_width * n_keys
    return 6 * in_products + 3 * attention


def model_state_bytes(config: Config, world_size: int) -> dict[str, int]:
    """Return bytes on each rank of weights, gradients, fp32 masters and optimizer state, by the ZeRO stage.

    ZeRO splits optimizer state and masters from stage 1 on, gradients from 2, weights from 3. In fp32, stage 0 trains
    the weights themselves and has no masters. Communication buckets, activations, and an fp32 copy of the rank's
    gradients during the optimizer's step come on top.
    """
    n, stage = n_parameters(config.model), config.engine.zero_stage
    width = 4 if config.engine.dtype == "fp32" else 2

    def split(from_stage: int) -> int:
        return world_size if stage >= from_stage else 1

    masters = 0 if stage == 0 and config.engine.dtype == "fp32" else 4 * n
    return {
        "weights": width * n // split(3),
        "gradients": width * n // split(2),
        "masters": masters // split(1),
        "optimizer": 4 * n * len(MOMENTS[config.optim.name]) // split(1),
    }


def settings(section: Any) -> str:
    """All fields of a section on one line, those of its sections in braces."""
    return " ".join(
        f"{name}={{{settings(value)}}}" if is_dataclass(value) else f"{name}={value}"
        for name, value in vars(section).items()
    )


def describe(config: Config, world_size: int) -> str:
    """The lines that stand before the first step: every setting, then what it costs; `config.model` is resolved."""
    model, train = config.model, config.train
    state = model_state_bytes(config, world_size)
    tokens = config.batch_tokens * train.steps
    lines = [f"{name + ':':<12}{settings(section)}" for name, section in vars(config).items()]
    lines += [
        f"model       {n_parameters(model):,} parameters, {model.residual} alpha {model.residual_alpha:.4g}, "
        f"rope base {model.rope.base:.6g} for {model.rope.context} tokens, attention scale {model.attention.scale}",
        f"batch       {train.global_batch_size} rows x {config.data.seq_len} tokens = {config.batch_tokens:,} tokens: "
        f"{world_size} ranks x {train.n_micro_batches(world_size)} micro-batches x {train.micro_batch_size} rows",
        f"budget      {train.steps:,} steps = {tokens:,} tokens, {tokens / n_parameters(model):.1f} per parameter, "
        f"{tokens * flops_per_token(model, (config.data.seq_len + 1) / 2):.3g} FLOP",
        f"state       ZeRO-{config.engine.zero_stage} {config.engine.dtype}, per rank "
        + ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in state.items())
        + f": {sum(state.values()) / 2**20:,.1f} MiB",
    ]
    return "\n".join(lines)
