"""Resolve a config: replace everything that the code may choose by the number that it chooses.

A bundle and a checkpoint hold the resolved config. So growth, a longer context and a conversion keep the scales that
the weights were trained with.

    DeepNorm (8978)     alpha and lambda for N layers, `deepnorm_scales`; branch_gain = lambda^2
    prenorm             alpha = 1, branch_gain = 1 / sqrt(2 N)
    embed_scale         sqrt(m), which starts the stream at RMS 1
    logit_scale         1; with a tied head ln v / (2 sqrt(m)) (9698)
    softmax_scale       1 / sqrt(d); for key_norm and cosine 1; for cosine with scale=constant 4 ln(context / 2) (9859)
    rope.base           megakexue/core/bases.py
    llama3_factor       context / trained context
    log_n_base          512; for log_n_clipped the trained context
    log_n_floor         16

What must stay true: nothing is derived from sizes again after this, and resolving a resolved config changes nothing.
"""

import math
from typing import Any

from megakexue.config import (
    Config,
    ModelConfig,
    OptimConfig,
    ResolvedAttention,
    ResolvedConfig,
    ResolvedModel,
    ResolvedOptim,
    ResolvedRope,
)
from megakexue.core.bases import choose_base


def deepnorm_scales(recipe: str, n_layers: int) -> tuple[float, float]:
    """Return (alpha, lambda) for N layers: the weight of the residual, and the gain of each of a branch's two matrices.

    `paper` is the decoder-only row of DeepNet (arXiv 2203.00555); sgd, adam and lamb are the rows of 8978.
    """
    n = n_layers
    return {
        "paper": ((2 * n) ** 0.25, (8 * n) ** -0.25),
        "sgd": ((2 * n) ** 0.25, (2 * n) ** -0.25),
        "adam": ((2 * n) ** 0.5, (2 * n) ** -0.5),
        "lamb": (1.0, (2 * n) ** -0.5),
    }[recipe]


def resolve(config: ModelConfig, optimizer: str, context: int) -> ResolvedModel:
    """Return the config with every scale as a number: RoPE base, softmax, alpha, gains, embedding and logit scale.

    Settings that only choose between numbers (`rope.rule`, `deepnorm_recipe`) are at their default in the result.

    Args:
        optimizer: `optim.name`; its family chooses the row of `deepnorm_recipe: auto`.
        context: tokens that RoPE must serve when `rope.context` is None.

    Raises:
        UserError: with `rope.base: auto`, no base satisfies the bound rule for this head width and context.
    """
    if config.residual == "deepnorm":
        recipe: str = config.deepnorm_recipe
        if recipe == "auto":
            recipe = "lamb" if optimizer == "tiger" else "adam"
        alpha, gain = deepnorm_scales(recipe, config.n_layers)
        branch_gain = gain**2
    else:
        # 2N branches of this gain add up to the variance of the embedding
        alpha, branch_gain = 1.0, (2 * config.n_layers) ** -0.5
    width = math.sqrt(config.d_model)
    tied_scale = math.log(config.vocab_size) / (2 * width)

    def given(value: float | None, default: float) -> float:
        return default if value is None else value

    rope, attention = config.rope, config.attention
    context = rope.context or context
    llama3_factor = rope.llama3_factor
    if rope.extension == "llama3" and rope.trained_context:
        llama3_factor = given(llama3_factor, context / rope.trained_context)
    resolved_rope = ResolvedRope(**vars(rope) | {
        "base": choose_base(config, context), "context": context, "rule": "safe",
        "yarn_temperature": (rope.yarn_temperature is not False) if rope.extension == "yarn" else None,
        "llama3_factor": llama3_factor,
    })  # fmt: skip
    log_n_base, log_n_floor = attention.log_n_base, attention.log_n_floor
    if attention.scale in ("log_n", "log_n_clipped") and attention.similarity != "cosine":
        log_n_base = given(log_n_base, 512.0 if attention.scale == "log_n" else rope.trained_context or context)
    if attention.scale in ("log_n", "gradient_max"):
        log_n_floor = log_n_floor or 16
    softmax_scale = config.head_width**-0.5 if attention.similarity == "dot" else 1.0
    if attention.similarity == "cosine" and attention.scale == "constant":
        softmax_scale = 4 * math.log(context / 2)
    resolved_attention = ResolvedAttention(**vars(attention) | {
        "log_n_base": log_n_base, "log_n_floor": log_n_floor,
        "softmax_scale": given(attention.softmax_scale, softmax_scale),
    })  # fmt: skip
    return ResolvedModel(**vars(config) | {
        "n_kv_heads": None if config.mla else config.n_groups, "d_head": None if config.mla else config.head_width,
        "rope": resolved_rope, "attention": resolved_attention, "deepnorm_recipe": "auto",
        "residual_alpha": given(config.residual_alpha, alpha), "branch_gain": given(config.branch_gain, branch_gain),
        "embed_scale": given(config.embed_scale, width),
        "logit_scale": given(config.logit_scale, tied_scale if config.tie_embeddings else 1.0),
    })  # fmt: skip


def resolve_optim(config: OptimConfig, tie_embeddings: bool) -> ResolvedOptim:
    """Return the config with a number in place of every None that leaves a choice to the optimizer."""
    lr, beta1, beta2, decay = {
        "tiger": (1e-3, 0.965, None, 0.01),
        "lion": (3e-4, 0.95, 0.98, 0.01),
        "adamw": (3e-4, 0.9, 0.95, 0.1),
        "muon": (3e-4, 0.95, None, 0.1),
    }[config.name]
    values: dict[str, Any] = {"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": decay}
    if config.name in ("tiger", "lion"):
        values["embedding"] = "dense" if tie_embeddings else "lazy"
    if config.embedding == "adamw":
        values["embedding_lr"] = 3e-4
    return ResolvedOptim(**vars(config) | {k: v for k, v in values.items() if getattr(config, k) is None})


def resolve_config(config: Config) -> ResolvedConfig:
    """Return the config of a run with nothing left to choose; raises UserError as `resolve` does."""
    model = resolve(config.model, config.optim.name, config.data.seq_len)
    return ResolvedConfig(**vars(config) | {"model": model, "optim": resolve_optim(config.optim, model.tie_embeddings)})
