"""The decoder: RoPE with the log n factor on the query, grouped-query attention, SwiGLU, RMSNorm, DeepNorm.

One legend of letters, the same in annotations, einsum strings, the axis table and prose:

    b batch · t query position · s key position · m model width · h query heads · g key/value heads
    r query heads per group (h = g r) · d head width · e value head width · f feed-forward width · v vocabulary

A block, with x the residual stream and F attention or feed-forward:

    deepnorm   x <- norm(alpha x + F(x))      (8978, arXiv 2203.00555)
    prenorm    x <- x + F(norm(x))            and one norm before the head

Initialisation: every matrix is normal with standard deviation gain / sqrt(fan in). The gain of a whole residual
branch is `branch_gain`; the matrices multiplied in it share it out by the exponents of the axis table: value and
output projection 1/2 each, the three of SwiGLU 1/3 each (8978 and bert4keras' initializer of order 3); query and key
stay at gain 1. The embedding starts the stream at RMS 1 through `embed_scale`. With a tied head the near-identity
start would be a 2-gram model of loss sqrt(m) (9698); `logit_scale` keeps it at ln v.

What must stay true: scales are numbers in the resolved config, never derived from sizes at run time; initial weights
depend on (seed, name) alone; the axis table covers every parameter.
"""

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor, nn
from torch.nn import functional

from megakexue.attention import Backend, attend
from megakexue.config import ModelConfig
from megakexue.loss import cross_entropy
from megakexue.rope import RotaryTables, rotate, safe_base

Role = Literal["matrix", "embedding", "gain"]


@dataclass(frozen=True, kw_only=True)
class Axes:
    """What a parameter's axes are, in the letters of the legend; two letters are a merged axis, first one slowest."""

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
    "blocks.attention.wo": Axes(out="m", contracted="he", share=1 / 2),
    "blocks.attention_norm.gain": Axes(out="m", role="gain"),
    "blocks.feed_forward.w_gate": Axes(out="f", contracted="m", share=1 / 3),
    "blocks.feed_forward.w_up": Axes(out="f", contracted="m", share=1 / 3),
    "blocks.feed_forward.w_down": Axes(out="m", contracted="f", share=1 / 3),
    "blocks.feed_forward_norm.gain": Axes(out="m", role="gain"),
    "norm.gain": Axes(out="m", role="gain"),
    "head.weight": Axes(out="v", contracted="m"),
}
"""Every parameter, without the number of its block. Growth, the optimizer, the counts and the initialiser read it."""


def axes(name: str) -> Axes:
    """Look up a parameter by its full name, such as blocks.3.attention.wq."""
    return AXES[".".join(part for part in name.split(".") if not part.isdigit())]


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """The size of each letter."""
    return {
        "v": config.vocab_size, "m": config.d_model, "f": config.d_ff, "h": config.n_heads,
        "g": config.n_kv_heads, "d": config.head_width, "e": config.head_width,
    }  # fmt: skip


def shape(name: str, config: ModelConfig) -> tuple[int, ...]:
    """The shape that the axis table gives a parameter."""
    sizes, table = axis_sizes(config), axes(name)
    return tuple(math.prod(sizes[letter] for letter in side) for side in (table.out, table.contracted) if side)


def deepnorm_scales(recipe: str, n_layers: int) -> tuple[float, float]:
    """Return (alpha, lambda) for N layers: the residual weight and the gain of each of a branch's two matrices (8978).

    paper is the decoder-only row of DeepNet; sgd, adam and lamb are the rows of the article's derivation.
    """
    n = n_layers
    return {
        "paper": ((2 * n) ** 0.25, (8 * n) ** -0.25),
        "sgd": ((2 * n) ** 0.25, (2 * n) ** -0.25),
        "adam": ((2 * n) ** 0.5, (2 * n) ** -0.5),
        "lamb": (1.0, (2 * n) ** -0.5),
    }[recipe]


def resolve(config: ModelConfig, optimizer: str, context: int) -> ModelConfig:
    """Return the config with every scale as a number: the RoPE base, alpha, gains, embedding and logit scale.

    Args:
        optimizer: `optim.name`; its family chooses the row of `deepnorm_recipe: auto`.
        context: tokens that RoPE must serve when `rope.context` is None.

    Raises:
        UserError: `rope.base: auto` has no answer for this head width and context.
    """
    if config.residual == "deepnorm":
        recipe: str = config.deepnorm_recipe
        if recipe == "auto":
            recipe = {"adamw": "adam"}[optimizer]
        alpha, gain = deepnorm_scales(recipe, config.n_layers)
        branch_gain = gain**2
    else:
        # 2N branches of this gain add up to the variance of the embedding
        alpha, branch_gain = 1.0, (2 * config.n_layers) ** -0.5
    width = math.sqrt(config.d_model)
    tied_scale = math.log(config.vocab_size) / (2 * width)
    context = config.rope.context or context
    base = config.rope.base
    if isinstance(base, str):
        base = safe_base(config.head_width, context)

    def given(value: float | None, default: float) -> float:
        return default if value is None else value

    return dataclasses.replace(
        config,
        d_head=config.head_width,
        rope=dataclasses.replace(config.rope, base=float(base), context=context),
        residual_alpha=given(config.residual_alpha, alpha),
        branch_gain=given(config.branch_gain, branch_gain),
        embed_scale=given(config.embed_scale, width),
        logit_scale=given(config.logit_scale, tied_scale if config.tie_embeddings else 1.0),
    )


class Norm(nn.Module):
    """RMSNorm with a gain, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.gain, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Float[Tensor, "*n m"]) -> Float[Tensor, "*n m"]:
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps) * self.gain.float()).to(x.dtype)


class KVCache:
    """Keys and values of one layer for the tokens so far, [b, s, g, d] each."""

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.k is not None and self.v is not None:
            k, v = torch.cat([self.k, k], dim=1), torch.cat([self.v, v], dim=1)
        self.k, self.v = k, v
        return k, v


class Attention(nn.Module):
    """Grouped-query attention; MHA and MQA are its ends (n_kv_heads = n_heads, 1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.d_head = config.head_width
        self.wq, self.wk, self.wv, self.wo = (
            nn.Parameter(torch.empty(shape(f"blocks.attention.{name}", config))) for name in ("wq", "wk", "wv", "wo")
        )

    def forward(
        self,
        x: Float[Tensor, "b t m"],
        rotary: Float32[Tensor, "b t 2 2 pair"],
        positions: Int64[Tensor, "b t"],
        cu_seqlens: Int32[Tensor, " n"] | None,
        backend: Backend,
        cache: KVCache | None,
    ) -> Float[Tensor, "b t m"]:
        q, k, v = (functional.linear(x, w).unflatten(-1, (-1, self.d_head)) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(q, rotary[:, :, 0]), rotate(k, rotary[:, :, 1])
        if cache is not None:
            k, v = cache.extend(k, v)
        return functional.linear(attend(q, k, v, positions, cu_seqlens, backend=backend).flatten(2), self.wo)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w_gate, self.w_up, self.w_down = (
            nn.Parameter(torch.empty(shape(f"blocks.feed_forward.{name}", config)))
            for name in ("w_gate", "w_up", "w_down")
        )

    def forward(self, x: Float[Tensor, "b t m"]) -> Float[Tensor, "b t m"]:
        hidden = functional.silu(functional.linear(x, self.w_gate)) * functional.linear(x, self.w_up)
        return functional.linear(hidden, self.w_down)


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.residual_alpha is not None, "resolve the config first"
        self.is_prenorm, self.alpha = config.residual == "prenorm", config.residual_alpha
        self.attention, self.feed_forward = Attention(config), FeedForward(config)
        self.attention_norm = Norm(config.d_model, config.norm_eps)
        self.feed_forward_norm = Norm(config.d_model, config.norm_eps)

    def forward(
        self,
        x: Float[Tensor, "b t m"],
        rotary: Float32[Tensor, "b t 2 2 pair"],
        positions: Int64[Tensor, "b t"],
        cu_seqlens: Int32[Tensor, " n"] | None,
        backend: Backend,
        cache: KVCache | None,
    ) -> Float[Tensor, "b t m"]:
        if self.is_prenorm:
            x = x + self.attention(self.attention_norm(x), rotary, positions, cu_seqlens, backend, cache)
            return x + self.feed_forward(self.feed_forward_norm(x))
        x = self.attention_norm(self.alpha * x + self.attention(x, rotary, positions, cu_seqlens, backend, cache))
        return self.feed_forward_norm(self.alpha * x + self.feed_forward(x))


class Embedding(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.embed_scale is not None
        self.weight, self.scale = nn.Parameter(torch.empty(shape("embedding.weight", config))), config.embed_scale

    def forward(self, tokens: Int64[Tensor, "b t"]) -> Float[Tensor, "b t m"]:
        return functional.embedding(tokens, self.weight) * self.scale


class Head(nn.Module):
    """Logits or, with targets, the loss without the logits. A tied head holds the embedding's own parameter."""

    def __init__(self, config: ModelConfig, tied: nn.Parameter | None) -> None:
        super().__init__()
        assert config.logit_scale is not None
        self.weight = nn.Parameter(torch.empty(shape("head.weight", config))) if tied is None else tied
        self.scale = config.logit_scale

    def forward(
        self,
        hidden: Float[Tensor, "b t m"],
        targets: Int64[Tensor, "b t"] | None,
        gradient_scale: float | Float32[Tensor, ""],
    ) -> Float32[Tensor, "*b_t_v"]:
        if targets is None:
            return functional.linear(hidden, self.weight).float() * self.scale
        return cross_entropy(hidden.flatten(0, 1), self.weight, targets.flatten(), self.scale, gradient_scale)


class Decoder(nn.Module):
    """The whole model; `config` must be resolved. Weights are uninitialised until `init_weights` or a load."""

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        super().__init__()
        assert isinstance(config.rope.base, float), "resolve the config first"
        self.config, self.backend = config, backend
        self.rotary = RotaryTables(config.head_width, config.rope.base, config.attention)
        self.embedding = Embedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        # DeepNorm's stream leaves the last block normed
        self.norm = Norm(config.d_model, config.norm_eps) if config.residual == "prenorm" else nn.Identity()
        self.head = Head(config, self.embedding.weight if config.tie_embeddings else None)

    def forward(
        self,
        tokens: Int64[Tensor, "b t"],
        positions: Int64[Tensor, "b t"],
        cu_seqlens: Int32[Tensor, " n"] | None = None,
        targets: Int64[Tensor, "b t"] | None = None,
        gradient_scale: float | Float32[Tensor, ""] = 1.0,
        caches: list[KVCache] | None = None,
        n_positions: int | None = None,
    ) -> Float32[Tensor, "*b_t_v"]:
        """Return logits [b, t, v], or with `targets` the sum of the losses, both float32.

        Args:
            positions: of the tokens in their documents; all below `n_positions` (default: t).
            cu_seqlens: boundaries of packed documents; None: each row is one document.
            gradient_scale: see `megakexue.loss.cross_entropy`.
            caches: one per layer, for decoding; the tokens then follow those already in it.
        """
        rotary = self.rotary(positions, n_positions or tokens.shape[1])
        x = self.embedding(tokens)
        for i, block in enumerate(self.blocks):
            x = block(x, rotary, positions, cu_seqlens, self.backend, caches[i] if caches else None)
        return self.head(self.norm(x), targets, gradient_scale)


def initial_weight(name: str, config: ModelConfig, seed: int) -> Float32[Tensor, "..."]:
    """Return a parameter's initial value, in float32 on the CPU: a function of (seed, name) and the config alone."""
    table, size = axes(name), shape(name, config)
    if table.role == "gain":
        return torch.ones(size)
    assert config.branch_gain is not None, "resolve the config first"
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    gain = config.branch_gain**table.share
    if name == "head.weight":
        gain = 0.5  # logits of standard deviation 1/2: the first loss is ln v + 1/8
    return torch.randn(size, generator=generator) * (gain / math.sqrt(size[1]))
