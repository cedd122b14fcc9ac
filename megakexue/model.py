"""The decoder: RoPE with the attention factor on the query, GQA or MLA, SwiGLU, RMSNorm, DeepNorm.

One legend of letters, the same in annotations, einsum strings, the axis table and prose:

    b batch · t query position · s key position · m model width · h query heads · g key/value heads
    r query heads per group (h = g r) · d head width = n + p · p its rotated part, the last · n the rest
    c key/value latent · q query latent · e value head width · f feed-forward width · v vocabulary

Multi-head latent attention (10091, DeepSeek-V2 2405.04434), with x the input and R the rotation:

    c'_t = norm(x_t Wq_down)      q_t = c'_t Wq_up, rotated in its last p      (or q_t = x_t Wq)
    c_s  = norm(x_s Wkv_down)     k_s = [c_s Wk_up, R (x_s Wk_rope)]           v_s = c_s Wv_up

Decoding keeps only c_s and the rotary key. For a few queries Wk_up moves to the query and Wv_up behind the weighted sum
(`absorbed`): [q_n Wk_up^T, q_p] . [c_s, k_p], in two products in sequence; weights multiplied beforehand would be
rounded differently (10091).

A block, with x the residual stream and F attention or feed-forward:

    deepnorm   x <- norm(alpha x + F(x))      (8978, arXiv 2203.00555)
    prenorm    x <- x + F(norm(x))            and one norm before the head

Initialisation: every matrix is normal with standard deviation gain / sqrt(fan in). The gain of a whole residual
branch is `branch_gain`; the matrices multiplied in it share it out by the exponents of the axis table: value and
output projection 1/2 each, the three of SwiGLU 1/3 each (8978 and bert4keras' initializer of order 3). Query and key
stay at gain 1, since they do not scale the branch, and so do the projections into latents, whose norms undo any scale.
The embedding starts the stream at RMS 1 through `embed_scale`. With a tied head the near-identity start would be a
2-gram model of loss sqrt(m) (9698); `logit_scale` keeps it at ln v.

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

from megakexue.attention import Backend, Layout, attend
from megakexue.config import LossConfig, ModelConfig
from megakexue.loss import PLAIN, Losses, cross_entropy
from megakexue.rope import Rotary, RotaryTables, choose_base, rotate

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
    "head.weight": Axes(out="v", contracted="m"),
}
"""Every parameter of any config, without the number of its block, and what its axes are. Growth, the optimizer, the
counts and the initialiser read it; `entries` says which of them a config has."""
_GQA = {"blocks.attention.wk", "blocks.attention.wv"}
_LOW_RANK_QUERY = {"blocks.attention.wq_down", "blocks.attention.q_norm.gain", "blocks.attention.wq_up"}
_MLA = {f"blocks.attention.{name}" for name in ("wkv_down", "kv_norm.gain", "wk_rope", "wk_up", "wv_up")}


def entries(config: ModelConfig) -> list[str]:
    """The entries of the axis table that the config has, in its order."""
    absent = _GQA if config.mla else _MLA
    absent = absent | ({"blocks.attention.wq"} if config.mla and config.mla.d_query_latent else _LOW_RANK_QUERY)
    if config.tie_embeddings:
        absent.add("head.weight")
    if config.residual != "prenorm":
        absent.add("norm.gain")
    return [name for name in AXES if name not in absent]


def parameter_names(config: ModelConfig) -> list[str]:
    """Every parameter of the model, entry by entry, layer by layer."""
    names: list[str] = []
    for entry in entries(config):
        is_block = entry.startswith("blocks.")
        names += [entry.replace("blocks.", f"blocks.{i}.") for i in range(config.n_layers)] if is_block else [entry]
    return names


def axes(name: str) -> Axes:
    """Look up a parameter by its full name, such as blocks.3.attention.wq."""
    return AXES[".".join(part for part in name.split(".") if not part.isdigit())]


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """The size of each letter that the config has."""
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
    """Return the config with every scale as a number: RoPE base, softmax, alpha, gains, embedding and logit scale.

    What only chose between numbers (`rope.rule`, `deepnorm_recipe`) is at its default in the result.

    Args:
        optimizer: `optim.name`; its family chooses the row of `deepnorm_recipe: auto`.
        context: tokens that RoPE must serve when `rope.context` is None.

    Raises:
        UserError: `rope.base: auto` has no answer for this head width and context.
    """
    if config.residual == "deepnorm":
        recipe: str = config.deepnorm_recipe
        if recipe == "auto":
            recipe = {"tiger": "lamb", "lion": "adam", "adamw": "adam"}[optimizer]
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
    rope = dataclasses.replace(
        rope,
        base=choose_base(config, context),
        context=context,
        rule="safe",
        yarn_temperature=(rope.yarn_temperature is not False) if rope.extension == "yarn" else None,
    )
    log_n_base, log_n_floor = attention.log_n_base, attention.log_n_floor
    if attention.scale in ("log_n", "log_n_clipped") and attention.similarity != "cosine":
        log_n_base = given(log_n_base, 512.0 if attention.scale == "log_n" else rope.trained_context or context)
    if attention.scale in ("log_n", "gradient_max"):
        log_n_floor = log_n_floor or 16
    softmax_scale = config.head_width**-0.5 if attention.similarity == "dot" else 1.0
    if attention.similarity == "cosine" and attention.scale == "constant":
        softmax_scale = 4 * math.log(context / 2)
    attention = dataclasses.replace(
        attention,
        log_n_base=log_n_base,
        log_n_floor=log_n_floor,
        softmax_scale=given(attention.softmax_scale, softmax_scale),
    )
    return dataclasses.replace(
        config,
        n_kv_heads=None if config.mla else config.n_groups,
        d_head=None if config.mla else config.head_width,
        rope=rope,
        attention=attention,
        deepnorm_recipe="auto",
        residual_alpha=given(config.residual_alpha, alpha),
        branch_gain=given(config.branch_gain, branch_gain),
        embed_scale=given(config.embed_scale, width),
        logit_scale=given(config.logit_scale, tied_scale if config.tie_embeddings else 1.0),
    )


class Norm(nn.Module):
    """RMSNorm with a gain, computed in float32; `factor` multiplies the result without a pass of its own."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.gain, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Float[Tensor, "*n m"], factor: Float32[Tensor, "*n"] | None = None) -> Float[Tensor, "*n m"]:
        x32 = x if x.dtype == torch.float64 else x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        if factor is not None:
            scale = scale * factor[..., None]
        return (x32 * scale * self.gain.to(x32.dtype)).to(x.dtype)


class Cache:
    """What decoding keeps of one layer, by position: keys and values, or in MLA the latent with the rotary key.

    The slot of a token is its position, so that rows of a batch may be at different ones. A right-padded prompt leaves
    its padding in slots that later tokens of the row take over before any query sees them.
    """

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []

    def extend(self, layout: Layout, *new: Float[Tensor, "b t g _"]) -> list[Tensor]:
        """Store the tensors of new tokens at their positions; return those of positions 0 ... n_keys - 1."""
        assert layout.n_keys is not None
        n_slots = self._tensors[0].shape[1] if self._tensors else 0
        if n_slots < layout.n_keys:
            # zeros: a slot that no query sees has weight 0, which must meet a finite number
            size = max(layout.n_keys, 2 * n_slots)
            grown = [x.new_zeros(x.shape[0], size, *x.shape[2:]) for x in new]
            for kept, old in zip(grown, self._tensors):
                kept[:, :n_slots] = old
            self._tensors = grown
        row = torch.arange(len(layout.positions), device=layout.positions.device)[:, None]
        for kept, x in zip(self._tensors, new, strict=True):
            kept[row, layout.positions] = x
        return [kept[:, : layout.n_keys] for kept in self._tensors]

    @property
    def bytes_per_token(self) -> int:
        """Of one token of one row, as allocated."""
        return sum(kept[0, 0].nbytes for kept in self._tensors)


def _parameters(module: nn.Module, config: ModelConfig, *names: str) -> None:
    """Make the attention's parameters `names`, uninitialised."""
    for name in names:
        setattr(module, name, nn.Parameter(torch.empty(shape(f"blocks.attention.{name}", config))))


def _normalized(x: Float[Tensor, "b t h d"]) -> Float[Tensor, "b t h d"]:
    return functional.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1).to(x.dtype)


class GroupedQueryAttention(nn.Module):
    """MHA and MQA are its ends (n_kv_heads = n_heads, 1)."""

    wq: nn.Parameter
    wk: nn.Parameter
    wv: nn.Parameter
    wo: nn.Parameter

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.attention.softmax_scale is not None, "resolve the config first"
        self.d_head, self.scale = config.head_width, config.attention.softmax_scale
        self.similarity = config.attention.similarity
        _parameters(self, config, "wq", "wk", "wv", "wo")

    def forward(
        self, x: Float[Tensor, "b t m"], rotary: Rotary, layout: Layout, backend: Backend, cache: Cache | None
    ) -> Float[Tensor, "b t m"]:
        q, k, v = (functional.linear(x, w).unflatten(-1, (-1, self.d_head)) for w in (self.wq, self.wk, self.wv))
        if self.similarity != "dot":  # by 9859 without a gain, which would undo it
            k = _normalized(k)
        if self.similarity == "cosine":
            q = _normalized(q)
        q, k = rotate(q, rotary.query, rotary.factor), rotate(k, rotary.key)
        if cache is not None:
            k, v = cache.extend(layout, k, v)
        return functional.linear(attend(q, k, v, layout, backend=backend, scale=self.scale).flatten(2), self.wo)


class LatentAttention(nn.Module):
    """Multi-head latent attention; training and long prompts use the plain form, a few cached queries the absorbed."""

    wq: nn.Parameter
    wq_down: nn.Parameter
    wq_up: nn.Parameter
    wkv_down: nn.Parameter
    wk_rope: nn.Parameter
    wk_up: nn.Parameter
    wv_up: nn.Parameter
    wo: nn.Parameter

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.mla is not None and config.attention.softmax_scale is not None, "resolve the config first"
        self.mla, self.n_heads, self.scale = config.mla, config.n_heads, config.attention.softmax_scale
        if self.mla.d_query_latent:
            _parameters(self, config, "wq_down", "wq_up")
            self.q_norm = Norm(self.mla.d_query_latent, config.norm_eps)
        else:
            _parameters(self, config, "wq")
        _parameters(self, config, "wkv_down", "wk_rope", "wk_up", "wv_up", "wo")
        self.kv_norm = Norm(self.mla.d_latent, config.norm_eps)

    def forward(
        self, x: Float[Tensor, "b t m"], rotary: Rotary, layout: Layout, backend: Backend, cache: Cache | None
    ) -> Float[Tensor, "b t m"]:
        c, p = self.mla.d_latent, self.mla.d_rope
        # one product with the input for all projections into latents, some of which are too narrow for one of their own
        if q_width := self.mla.d_query_latent:
            down = torch.cat([self.wq_down, self.wkv_down, self.wk_rope])
            q_latent, latent, k_rope = functional.linear(x, down).split([q_width, c, p], dim=-1)
            # the factor on the latent reaches both parts of the query, so its rotation is the plain one
            q = functional.linear(self.q_norm(q_latent, rotary.factor), self.wq_up)
            q = rotate(q.unflatten(-1, (self.n_heads, -1)), rotary.key)
        else:
            latent, k_rope = functional.linear(x, torch.cat([self.wkv_down, self.wk_rope])).split([c, p], dim=-1)
            q = rotate(functional.linear(x, self.wq).unflatten(-1, (self.n_heads, -1)), rotary.query, rotary.factor)
        latent, k_rope = self.kv_norm(latent), rotate(k_rope[:, :, None], rotary.key)
        if cache is not None:
            (kept,) = cache.extend(layout, torch.cat([latent[:, :, None], k_rope], dim=-1))
            if self._is_absorbed_cheaper(x.shape[1], kept.shape[1]):
                return functional.linear(self._absorbed(q, kept, layout, backend).flatten(2), self.wo)
            latent, k_rope = kept[:, :, 0, :c], kept[..., c:]
        k_nope, v = (functional.linear(latent, w).unflatten(-1, (self.n_heads, -1)) for w in (self.wk_up, self.wv_up))
        k = torch.cat([k_nope, k_rope.expand(-1, -1, self.n_heads, -1)], dim=-1)
        return functional.linear(attend(q, k, v, layout, backend=backend, scale=self.scale).flatten(2), self.wo)

    def _is_absorbed_cheaper(self, n_queries: int, n_keys: int) -> bool:
        """Compare multiplications per head: wider keys for each pair, or keys and values made anew for the past."""
        m = self.mla
        wider = n_queries * n_keys * (2 * m.d_latent - m.d_nope - m.d_value)
        return wider < (n_keys - n_queries) * m.d_latent * (m.d_nope + m.d_value)

    def _absorbed(
        self, q: Float[Tensor, "b t h d"], kept: Float[Tensor, "b s 1 c_p"], layout: Layout, backend: Backend
    ) -> Float[Tensor, "b t h e"]:
        c, h = self.mla.d_latent, self.n_heads
        q_nope, q_rope = q.split([self.mla.d_nope, self.mla.d_rope], dim=-1)
        q_latent = torch.einsum("bthn,hnc->bthc", q_nope, self.wk_up.view(h, -1, c))
        query = torch.cat([q_latent, q_rope], dim=-1)
        out = attend(query, kept, kept[..., :c], layout, backend=backend, scale=self.scale)
        return torch.einsum("bthc,hec->bthe", out, self.wv_up.view(h, -1, c))


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
        self.attention = LatentAttention(config) if config.mla else GroupedQueryAttention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = Norm(config.d_model, config.norm_eps)
        self.feed_forward_norm = Norm(config.d_model, config.norm_eps)

    def forward(
        self, x: Float[Tensor, "b t m"], rotary: Rotary, layout: Layout, backend: Backend, cache: Cache | None
    ) -> Float[Tensor, "b t m"]:
        if self.is_prenorm:
            x = x + self.attention(self.attention_norm(x), rotary, layout, backend, cache)
            return x + self.feed_forward(self.feed_forward_norm(x))
        x = self.attention_norm(self.alpha * x + self.attention(x, rotary, layout, backend, cache))
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
        hidden: Float[Tensor, "*b_t m"],
        targets: Int64[Tensor, "b t"] | None = None,
        gradient_scale: float | Float32[Tensor, ""] = 1.0,
        loss: LossConfig = PLAIN,
        emo_rows: Float[Tensor, "v m"] | None = None,
    ) -> Float[Tensor, "*b_t v"] | Losses:
        if targets is None:
            logits = functional.linear(hidden, self.weight)
            return (logits if logits.dtype == torch.float64 else logits.float()) * self.scale
        return cross_entropy(
            hidden.flatten(0, 1), self.weight, targets.flatten(), self.scale, gradient_scale, loss, emo_rows
        )


class Decoder(nn.Module):
    """The whole model; `config` must be resolved. Weights are uninitialised until they are loaded."""

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        super().__init__()
        assert isinstance(config.rope.base, float), "resolve the config first"
        self.config, self.backend = config, backend
        self.rotary = RotaryTables(config)
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
        caches: list[Cache] | None = None,
        n_positions: int | None = None,
        loss: LossConfig = PLAIN,
        emo_rows: Float[Tensor, "v m"] | None = None,
    ) -> Float[Tensor, "b t v"] | Losses:
        """Return logits [b, t, v], or with `targets` the sums of the losses; both float32 (logits of float64: float64).

        Args:
            positions: of the tokens in their documents; all below `n_positions` (default: t).
            cu_seqlens: boundaries of packed documents; None: each row is one document.
            gradient_scale, loss, emo_rows: see `megakexue.loss.cross_entropy`.
            caches: one per layer, for decoding: tokens follow those already in it, and a query at position p sees the
                tokens at positions up to p of its row.
        """
        hidden = self.hidden(tokens, positions, cu_seqlens, caches, n_positions)
        return self.head(hidden, targets, gradient_scale, loss, emo_rows)

    def hidden(
        self,
        tokens: Int64[Tensor, "b t"],
        positions: Int64[Tensor, "b t"],
        cu_seqlens: Int32[Tensor, " n"] | None = None,
        caches: list[Cache] | None = None,
        n_positions: int | None = None,
    ) -> Float[Tensor, "b t m"]:
        """Return what the head multiplies; arguments as in `forward`."""
        n_positions = n_positions or tokens.shape[1]
        rotary = self.rotary(positions, n_positions)
        layout = Layout(positions, cu_seqlens, n_keys=n_positions if caches else None)
        x = self.embedding(tokens)
        for i, block in enumerate(self.blocks):
            x = block(x, rotary, layout, self.backend, caches[i] if caches else None)
        return self.norm(x)


def centre(name: str, config: ModelConfig) -> float:
    """The mean of a parameter's initial elements, which the guard's shrink draws it to (9512)."""
    return config.gain_centre if axes(name).role == "gain" else 0.0


def initial_weight(name: str, config: ModelConfig, seed: int) -> Float32[Tensor, "..."]:
    """Return a parameter's initial value, in float32 on the CPU: a function of (seed, name) and the config alone."""
    table, size = axes(name), shape(name, config)
    if table.role == "gain":
        return torch.full(size, centre(name, config))
    assert config.branch_gain is not None, "resolve the config first"
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    gain = config.branch_gain**table.share
    if name == "head.weight":
        gain = 0.5  # logits of standard deviation 1/2: the first loss is ln v + 1/8
    return torch.randn(size, generator=generator) * (gain / math.sqrt(size[1]))
