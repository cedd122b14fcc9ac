"""The axis table: what the axes of every parameter are, in the letters of one legend.

    b batch · t query position · s key position · m model width · h query heads · g key/value heads
    r query heads per group (h = g r) · d head width = n + p · p its rotated part, the last · n the rest
    c key/value latent · q query latent · e value head width · f feed-forward width · v vocabulary

The same letters stand in shape annotations, einsum strings and prose. Growth reads from the table how to widen a
parameter, the optimizer its role, the description its number of elements, and the initialiser its share of the gain.

What must stay true: the table covers every parameter of every config, and gives its shape.
"""

import math
from dataclasses import dataclass
from typing import Literal

from megakexue.config import ModelConfig

Role = Literal["matrix", "embedding", "head", "gain", "bias"]


@dataclass(frozen=True, kw_only=True)
class Axes:
    """The axes of a parameter. Two letters are one merged axis: the index of the first letter changes slowest."""

    out: str
    contracted: str = ""
    role: Role = "matrix"
    share: float = 0.0
    """Exponent of `branch_gain` in the initial gain."""


AXES = {
    "embedding.weight": Axes(out="v", contracted="m", role="embedding"),
    "blocks.attention.wq": Axes(out="hd", contracted="m"),
    "blocks.attention.wk": Axes(out="gd", contracted="m"),
    "blocks.attention.wv": Axes(out="ge", contracted="m", share=1 / 2),
    "blocks.attention.bq": Axes(out="hd", role="bias"),
    "blocks.attention.bk": Axes(out="gd", role="bias"),
    "blocks.attention.bv": Axes(out="ge", role="bias"),
    "blocks.attention.query_norm.gain": Axes(out="d", role="gain"),
    "blocks.attention.key_norm.gain": Axes(out="d", role="gain"),
    "blocks.attention.wq_down": Axes(out="q", contracted="m"),
    "blocks.attention.q_norm.gain": Axes(out="q", role="gain"),
    "blocks.attention.wq_up": Axes(out="hd", contracted="q"),
    "blocks.attention.wkv_down": Axes(out="c", contracted="m"),
    "blocks.attention.kv_norm.gain": Axes(out="c", role="gain"),
    "blocks.attention.wk_rope": Axes(out="p", contracted="m"),
    "blocks.attention.wk_up": Axes(out="hn", contracted="c"),
    "blocks.attention.wv_up": Axes(out="he", contracted="c", share=1 / 2),
    "blocks.attention.wo": Axes(out="m", contracted="he", share=1 / 2),
    "blocks.attention_norm.gain": Axes(out="m", role="gain"),
    "blocks.feed_forward.w_gate": Axes(out="f", contracted="m", share=1 / 3),
    "blocks.feed_forward.w_up": Axes(out="f", contracted="m", share=1 / 3),
    "blocks.feed_forward.w_down": Axes(out="m", contracted="f", share=1 / 3),
    "blocks.feed_forward_norm.gain": Axes(out="m", role="gain"),
    "norm.gain": Axes(out="m", role="gain"),
    "head.weight": Axes(out="v", contracted="m", role="head"),
}
"""By name, without the number of the block. `entries` says which of them a config has."""
_GQA = {"blocks.attention.wk", "blocks.attention.wv"}
_QKV_BIAS = {f"blocks.attention.b{x}" for x in "qkv"}
_QK_NORM = {f"blocks.attention.{x}_norm.gain" for x in ("query", "key")}
_LOW_RANK_QUERY = {"blocks.attention.wq_down", "blocks.attention.q_norm.gain", "blocks.attention.wq_up"}
_MLA = {f"blocks.attention.{name}" for name in ("wkv_down", "kv_norm.gain", "wk_rope", "wk_up", "wv_up")}


def entries(config: ModelConfig) -> list[str]:
    """Return the names in the axis table that the config has, in the order of the table."""
    absent = _GQA if config.mla else _MLA
    absent = absent | ({"blocks.attention.wq"} if config.mla and config.mla.d_query_latent else _LOW_RANK_QUERY)
    if not config.attention.qkv_bias:
        absent = absent | _QKV_BIAS
    if not config.attention.qk_norm:
        absent = absent | _QK_NORM
    if config.tie_embeddings:
        absent = absent | {"head.weight"}
    if config.residual != "prenorm":
        absent = absent | {"norm.gain"}
    return [name for name in AXES if name not in absent]


def parameter_names(config: ModelConfig) -> list[str]:
    """Return the name of every parameter: entry by entry of the axis table, and for each entry layer by layer."""
    names: list[str] = []
    for entry in entries(config):
        is_block = entry.startswith("blocks.")
        names += [entry.replace("blocks.", f"blocks.{i}.") for i in range(config.n_layers)] if is_block else [entry]
    return names


def axes(name: str) -> Axes:
    """Look up a parameter by its full name, such as blocks.3.attention.wq."""
    return AXES[".".join(part for part in name.split(".") if not part.isdigit())]


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Return the size of each letter that the config has."""
    sizes = {
        "v": config.vocab_size, "m": config.d_model, "f": config.d_ff, "h": config.n_heads, "g": config.n_groups,
        "d": config.head_width, "e": config.value_width, "p": config.rotary_width,
        "n": config.head_width - config.rotary_width,
    }  # fmt: skip
    if config.mla:
        sizes["c"] = config.mla.d_latent
        if config.mla.d_query_latent:
            sizes["q"] = config.mla.d_query_latent
    return sizes


def shape(name: str, config: ModelConfig) -> tuple[int, ...]:
    """Return the shape that the axis table gives a parameter."""
    sizes, table = axis_sizes(config), axes(name)
    return tuple(math.prod(sizes[letter] for letter in side) for side in (table.out, table.contracted) if side)


def matrix_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every matrix of attention and feed-forward: what Muon moves."""
    return {name: shape(name, config) for name in parameter_names(config) if axes(name).role == "matrix"}
