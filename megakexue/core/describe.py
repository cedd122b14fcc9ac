"""What a config costs: parameters, FLOPs per token, model-state bytes per rank.

    FLOPs per token, forward and backward = 6 P + 3 A,   A = 2 L h (d + e) n

P: parameters in matrix products. The head counts once, tied or not; looking up the embedding is no product.
L: layers. n: mean number of visible keys, (t + 1) / 2 for rows of one document; those who do not halve attention for
causality count n = t. MLA is trained in the plain form, so that all its projections are in P.

    cached elements per token and layer:   MHA 2 h d     GQA 2 g d     MQA 2 d     MLA c + p      (10091)

What must stay true: `n_parameters` equals the module's sum, and FLOPs equal torch's own counter (tests).
"""

import math
from dataclasses import is_dataclass
from typing import Any

from megakexue.config import Config, ModelConfig, ResolvedConfig
from megakexue.core.axes import AXES, axes, entries, parameter_names, shape
from megakexue.core.optim import state_dtypes


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Return the elements, over all layers, of each entry of the axis table that the config has."""
    return {
        name: math.prod(shape(name, config)) * (config.n_layers if name.startswith("blocks.") else 1)
        for name in entries(config)
    }


def n_parameters(config: ModelConfig) -> int:
    return sum(parameter_counts(config).values())


def flops_per_token(config: ModelConfig, n_keys: float) -> float:
    """Return the FLOPs of one token's forward and backward when a query sees `n_keys` keys on average."""
    counts = parameter_counts(config)
    in_products = sum(n for name, n in counts.items() if AXES[name].role == "matrix" and name != "head.weight")
    in_products += config.vocab_size * config.d_model
    attention = 2 * config.n_layers * config.n_heads * (config.head_width + config.value_width) * n_keys
    return 6 * in_products + 3 * attention


def cache_bytes_per_token(config: ModelConfig, bytes_per_element: int = 2) -> dict[str, int]:
    """Return what decoding keeps for each token over all layers, for the model as MHA, GQA, MQA and MLA.

    The kind of the model comes first. The other kinds have sizes that fit it: GQA about a quarter of the heads as
    groups, MLA the proportions of the default, a latent of 4 d and a rotary key of d / 4.
    """
    h, d, e = config.n_heads, config.head_width, config.value_width
    mla = (config.mla.d_latent, config.mla.d_rope) if config.mla else (4 * d, d // 4)
    own = "MLA" if config.mla else "MHA" if config.n_groups == h else "MQA" if config.n_groups == 1 else "GQA"
    divisors = [g for g in range(2, h) if h % g == 0]
    quarter = max((g for g in divisors if g <= h // 4), default=min(divisors, default=1))
    groups = config.n_groups if own == "GQA" else quarter
    elements = {f"MHA of {h} heads": h * (d + e)}
    if groups > 1:
        elements[f"GQA of {groups} groups"] = groups * (d + e)
    elements |= {"MQA": d + e, f"MLA of {mla[0]} + {mla[1]}": sum(mla)}
    elements = dict(sorted(elements.items(), key=lambda item: not item[0].startswith(own)))
    return {name: n * config.n_layers * bytes_per_element for name, n in elements.items()}


def model_state_bytes(config: Config, world_size: int) -> dict[str, int]:
    """Return bytes on each rank of weights, gradients, fp32 masters and optimizer state, by the ZeRO stage.

    ZeRO splits optimizer state and masters from stage 1 on, gradients from 2, weights from 3. In fp32, stage 0 trains
    the weights themselves and has no masters. Not counted: communication buckets, activations, and the second head that
    every rank holds with `loss.emo`.
    """
    n, stage = n_parameters(config.model), config.engine.zero_stage
    width = 4 if config.engine.dtype == "fp32" else 2

    def split(from_stage: int) -> int:
        return world_size if stage >= from_stage else 1

    state = sum(
        dtype.itemsize * math.prod(shape(name, config.model))
        for name in parameter_names(config.model)
        for dtype in state_dtypes(config.optim, axes(name).role).values()
    )
    masters = 0 if stage == 0 and config.engine.dtype == "fp32" else 4 * n
    return {
        "weights": width * n // split(3),
        "gradients": width * n // split(2),
        "masters": masters // split(1),
        "optimizer": state // split(1),
    }


def settings(section: Any) -> str:
    """Return all fields of a section on one line; the fields of a section inside it are in braces."""
    return " ".join(
        f"{name}={{{settings(value)}}}" if is_dataclass(value) else f"{name}={value}"
        for name, value in vars(section).items()
    )


def describe(config: ResolvedConfig, world_size: int) -> str:
    """Return the lines that a run prints before its first step: every setting, then what the config costs."""
    model, train = config.model, config.train
    state = model_state_bytes(config, world_size)
    tokens = config.batch_tokens * train.steps
    if model.mla:
        queries = f"from {model.mla.d_query_latent}" if model.mla.d_query_latent else "straight from the stream"
        heads = (
            f"MLA, {model.n_heads} heads of {model.mla.d_nope} + {model.mla.d_rope} and values of {model.value_width} "
            f"from a latent of {model.mla.d_latent}, queries {queries}"
        )
    else:
        heads = f"{model.n_heads} heads of {model.head_width} in {model.n_groups} groups"
    lines = [f"{name + ':':<12}{settings(section)}" for name, section in vars(config).items()]
    lines += [
        f"model       {n_parameters(model):,} parameters, {model.residual} alpha {model.residual_alpha:.4g}, "
        f"{flops_per_token(model, (config.data.seq_len + 1) / 2):.4g} FLOP per token, forward and backward",
        f"attention   {heads}, scale {model.attention.scale} on {model.attention.softmax_scale:.4g}, "
        f"rope base {model.rope.base:.6g} on {model.rotary_width} of {model.head_width} for {model.rope.context} tokens"
        + (f", {model.rope.extension} from {model.rope.trained_context}" if model.rope.extension else ""),
        "cache       per token in 16 bits: "
        + ", ".join(f"{name} {size:,} bytes" for name, size in cache_bytes_per_token(model).items()),
        f"batch       {train.global_batch_size} rows x {config.data.seq_len} tokens = {config.batch_tokens:,} tokens: "
        f"{world_size} ranks x {train.n_micro_batches(world_size)} micro-batches x {train.micro_batch_size} rows",
        f"budget      {train.steps:,} steps = {tokens:,} tokens, {tokens / n_parameters(model):.1f} per parameter, "
        f"{tokens * flops_per_token(model, (config.data.seq_len + 1) / 2):.3g} FLOP",
        f"state       ZeRO-{config.engine.zero_stage} {config.engine.dtype}, per rank "
        + ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in state.items())
        + f": {sum(state.values()) / 2**20:,.1f} MiB",
    ]
    return "\n".join(lines)
