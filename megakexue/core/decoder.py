"""The decoder: RoPE with the attention factor on the query, GQA or MLA, SwiGLU, RMSNorm, DeepNorm.

The letters in shapes and formulas are those of megakexue/core/axes.py. The file has the order of the forward pass.

Multi-head latent attention (10091, DeepSeek-V2 2405.04434), with x the input and R the rotation:

    c'_t = norm(x_t Wq_down)      q_t = c'_t Wq_up, rotated in its last p      (or q_t = x_t Wq)
    c_s  = norm(x_s Wkv_down)     k_s = [c_s Wk_up, R (x_s Wk_rope)]           v_s = c_s Wv_up

Decoding keeps only c_s and the rotary key. For a few queries there is the absorbed form, in which Wk_up multiplies the
query and Wv_up the weighted sum: the scores are [q_n Wk_up^T, q_p] . [c_s, k_p]. These are two products one after the
other, since a product of the weights made beforehand would be rounded differently (10091).

A block, with x the residual stream and F attention or feed-forward:

    deepnorm   x <- norm(alpha x + F(x))      (8978, arXiv 2203.00555)
    prenorm    x <- x + F(norm(x))            and one norm before the head

Initialisation: every matrix is normal with standard deviation gain / sqrt(fan in). The gain of a whole residual
branch is `branch_gain`; each matrix in its product has a power of it, with the exponent `share` of the axis table:
1/2 for value and output projection, 1/3 for the three matrices of SwiGLU (8978 and bert4keras' initializer of order
3). Query and key have gain 1, since they do not scale the branch, and so have the projections into latents, since a
norm undoes their scale. Through `embed_scale` the embedding starts the stream at RMS 1. With a tied head, a start near
the identity would be a 2-gram model with a loss of sqrt(m) (9698); `logit_scale` makes it ln v.

What must stay true: scales are numbers in the resolved config, never derived from sizes at run time; initial weights
depend on (seed, name) alone; the axis table covers every parameter.
"""

import hashlib
import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor, nn
from torch.nn import functional

from megakexue.config import LossConfig, MlaConfig, Recompute, ResolvedModel
from megakexue.core.attention import Backend, Layout, attend, attend_shared
from megakexue.core.axes import axes, shape
from megakexue.core.device import compiled
from megakexue.core.entropy import Observer
from megakexue.core.loss import PLAIN, Losses, Scale, cross_entropy
from megakexue.core.recompute import in_tiles, recomputed
from megakexue.core.rope import Rotary, RotaryTables, rotate
from megakexue.core.sequence import Sequence

# what goes into the model, and what flows from block to block
Ids = Int64[Tensor, "b t"]
Stream = Float[Tensor, "b t m"]
QueriesKeysValues = tuple[Float[Tensor, "b t h d"], Float[Tensor, "b t g d"], Float[Tensor, "b t g e"]]


class Embedding(nn.Module):
    def __init__(self, config: ResolvedModel) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.empty(shape("embedding.weight", config))), config.embed_scale

    def forward(self, tokens: Ids) -> Stream:
        return functional.embedding(tokens, self.weight) * self.scale


class Norm(nn.Module):
    """RMSNorm with a gain, computed in float32, times `factor`, which costs no extra pass over the result."""

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

    The slot of a token is its position, so that the rows of a batch may be at different positions. The padding at the
    right of a prompt is stored too, but later tokens of the row overwrite it before any query sees it.
    """

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []

    def extend(self, layout: Layout, *new: Float[Tensor, "b t g _"]) -> list[Tensor]:
        """Store the tensors of new tokens at their positions; return those of positions 0 ... n_keys - 1."""
        n_slots = self._tensors[0].shape[1] if self._tensors else 0
        if n_slots < layout.n_keys:
            # zeros, since a slot that no query sees has weight 0, and 0 times NaN would be NaN
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


def _parameters(config: ResolvedModel, part: str, *names: str) -> list[nn.Parameter]:
    """Return the parameters `names` of `part` of a block, without values."""
    return [nn.Parameter(torch.empty(shape(f"blocks.{part}.{name}", config))) for name in names]


def _normalized(x: Float[Tensor, "b t h d"]) -> Float[Tensor, "b t h d"]:
    return functional.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1).to(x.dtype)


class GroupedQueryAttention(nn.Module):
    """Grouped-query attention; MHA is the case n_kv_heads = n_heads, and MQA n_kv_heads = 1."""

    def __init__(self, config: ResolvedModel) -> None:
        super().__init__()
        self.d_head, self.scale = config.head_width, config.attention.softmax_scale
        self.similarity = config.attention.similarity
        self.wq, self.wk, self.wv, self.wo = _parameters(config, "attention", "wq", "wk", "wv", "wo")
        biases: list[nn.Parameter | None] = [None] * 3
        if config.attention.qkv_bias:
            biases = [*_parameters(config, "attention", "bq", "bk", "bv")]
        self.bq, self.bk, self.bv = biases
        norms: list[Norm | None] = [None] * 2
        if config.attention.qk_norm:
            norms = [Norm(self.d_head, config.norm_eps) for _ in norms]
        self.query_norm, self.key_norm = norms

    def forward(self, x: Stream, rotary: Rotary, layout: Layout, cache: Cache | None) -> Stream:
        q, k, v = self.project(x, rotary)
        if cache is not None:
            k, v = cache.extend(layout, k, v)
        return functional.linear(self.mix(q, k, v, layout).flatten(2), self.wo)

    def sends_latent(self, sequence: Sequence | None) -> bool:
        return False

    def mix(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Float[Tensor, "b t h e"]:
        """Attend with what `project` returns."""
        return attend_shared(q, k, v, layout, scale=self.scale)

    def project(self, x: Stream, rotary: Rotary, as_latent: bool = False) -> QueriesKeysValues:
        """Return the queries, keys and values of the tokens."""
        projections = (self.wq, self.bq), (self.wk, self.bk), (self.wv, self.bv)
        # a bias by itself, since DeepSpeed's linear of stage 3 rounds before it and torch's does not
        products = (functional.linear(x, w) if b is None else functional.linear(x, w) + b for w, b in projections)
        q, k, v = (product.unflatten(-1, (-1, self.d_head)) for product in products)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.similarity != "dot":  # without a gain, which would undo it (9859)
            k = _normalized(k)
        if self.similarity == "cosine":
            q = _normalized(q)
        return rotate(q, rotary.query, rotary.factor), rotate(k, rotary.key), v


class LatentAttention(nn.Module):
    """Multi-head latent attention: the plain form in training and for long prompts, the absorbed for a few queries."""

    def __init__(self, config: ResolvedModel, mla: MlaConfig) -> None:
        super().__init__()
        self.mla, self.n_heads, self.scale = mla, config.n_heads, config.attention.softmax_scale
        if mla.d_query_latent:
            self.wq_down, self.wq_up = _parameters(config, "attention", "wq_down", "wq_up")
            self.q_norm = Norm(mla.d_query_latent, config.norm_eps)
        else:
            (self.wq,) = _parameters(config, "attention", "wq")
        self.wkv_down, self.wk_rope = _parameters(config, "attention", "wkv_down", "wk_rope")
        self.wk_up, self.wv_up, self.wo = _parameters(config, "attention", "wk_up", "wv_up", "wo")
        self.kv_norm = Norm(mla.d_latent, config.norm_eps)

    def forward(self, x: Stream, rotary: Rotary, layout: Layout, cache: Cache | None) -> Stream:
        if cache is None:
            parts = self.project(x, rotary, self.sends_latent(layout.sequence))
            return functional.linear(self.mix(*parts, layout).flatten(2), self.wo)
        q, latent, k_rope = self._latents(x, rotary)
        (kept,) = cache.extend(layout, torch.cat([latent[:, :, None], k_rope], dim=-1))
        if layout.is_absorbed:
            return functional.linear(self._absorbed(q, kept, layout).flatten(2), self.wo)
        k, v = self._expand(kept[:, :, 0, : self.mla.d_latent], kept[..., self.mla.d_latent :])
        return functional.linear(attend(q, k, v, layout, scale=self.scale).flatten(2), self.wo)

    def project(self, x: Stream, rotary: Rotary, as_latent: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries, keys and values of the tokens, or the latent [b, t, c] and the rotary key for these."""
        q, latent, k_rope = self._latents(x, rotary)
        return (q, latent, k_rope) if as_latent else (q, *self._expand(latent, k_rope))

    def sends_latent(self, sequence: Sequence | None) -> bool:
        """Whether ranks that share rows exchange latents, since these are less than the keys and values of a rank."""
        mla = self.mla
        widths = self.n_heads * (mla.d_nope + mla.d_rope + mla.d_value)
        return sequence is not None and (mla.d_latent + mla.d_rope) * sequence.size < widths

    def mix(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Float[Tensor, "b t h e"]:
        """Attend with what `project` returns: keys and values, or, if `sends_latent`, what makes them."""
        sequence = layout.sequence
        if sequence is None or not self.sends_latent(sequence):
            return attend_shared(q, k, v, layout, scale=self.scale)
        n_ranks, d = sequence.size, q.shape[3]
        to_all = k[:, :, None].expand(-1, -1, n_ranks, -1), v.expand(-1, -1, n_ranks, -1)
        q, latent, k_rope = sequence.to_heads(q.unflatten(2, (n_ranks, -1)).flatten(3), *to_all)
        k, v = self._expand(latent, k_rope[:, :, None], sequence)
        mixed = attend(q.unflatten(2, (-1, d)), k, v, layout, scale=self.scale)
        return sequence.to_tokens(mixed.flatten(2)).unflatten(3, (-1, self.mla.d_value)).flatten(2, 3)

    def _latents(
        self, x: Stream, rotary: Rotary
    ) -> tuple[Float[Tensor, "b t h d"], Float[Tensor, "b t c"], Float[Tensor, "b t 1 p"]]:
        """Return the queries, and what a cache holds: the latent and the rotary key."""
        c, p = self.mla.d_latent, self.mla.d_rope
        # one product with the input for all projections into latents, since some are too narrow to be fast alone
        if q_width := self.mla.d_query_latent:
            down = torch.cat([self.wq_down, self.wkv_down, self.wk_rope])
            q_latent, latent, k_rope = functional.linear(x, down).split([q_width, c, p], dim=-1)
            # the factor on the latent reaches both parts of the query, so its rotation is the plain one
            q = functional.linear(self.q_norm(q_latent, rotary.factor), self.wq_up)
            q = rotate(q.unflatten(-1, (self.n_heads, -1)), rotary.key)
        else:
            latent, k_rope = functional.linear(x, torch.cat([self.wkv_down, self.wk_rope])).split([c, p], dim=-1)
            q = rotate(functional.linear(x, self.wq).unflatten(-1, (self.n_heads, -1)), rotary.query, rotary.factor)
        return q, self.kv_norm(latent), rotate(k_rope[:, :, None], rotary.key)

    def _expand(
        self, latent: Float[Tensor, "b s c"], k_rope: Float[Tensor, "b s 1 p"], sequence: Sequence | None = None
    ) -> tuple[Float[Tensor, "b s h d"], Float[Tensor, "b s h e"]]:
        """Return the keys and values of each head, or of those of this rank."""
        n_heads = self.n_heads // (sequence.size if sequence else 1)
        weights = [w.chunk(sequence.size)[sequence.rank] if sequence else w for w in (self.wk_up, self.wv_up)]
        k_nope, v = (functional.linear(latent, w).unflatten(-1, (n_heads, -1)) for w in weights)
        return torch.cat([k_nope, k_rope.expand(-1, -1, n_heads, -1)], dim=-1), v

    def _absorbed(
        self, q: Float[Tensor, "b t h d"], kept: Float[Tensor, "b s 1 c_p"], layout: Layout
    ) -> Float[Tensor, "b t h e"]:
        c, h = self.mla.d_latent, self.n_heads
        q_nope, q_rope = q.split([self.mla.d_nope, self.mla.d_rope], dim=-1)
        q_latent = torch.einsum("bthn,hnc->bthc", q_nope, self.wk_up.view(h, -1, c))
        query = torch.cat([q_latent, q_rope], dim=-1)
        out = attend(query, kept, kept[..., :c], layout, scale=self.scale)
        return torch.einsum("bthc,hec->bthe", out, self.wv_up.view(h, -1, c))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ResolvedModel) -> None:
        super().__init__()
        self.w_gate, self.w_up, self.w_down = _parameters(config, "feed_forward", "w_gate", "w_up", "w_down")
        self.recompute: Recompute = "none"

    def forward(self, x: Stream) -> Stream:
        gate, up = functional.linear(x, self.w_gate), functional.linear(x, self.w_up)
        return recomputed(self._down, gate, up) if self.recompute == "product" else self._down(gate, up)

    def _down(self, gate: Float[Tensor, "b t f"], up: Float[Tensor, "b t f"]) -> Stream:
        return functional.linear(functional.silu(gate) * up, self.w_down)


class Block(nn.Module):
    """Attention and feed-forward, each with its norm and its part of the residual stream."""

    def __init__(self, config: ResolvedModel) -> None:
        super().__init__()
        self.is_prenorm, self.alpha = config.residual == "prenorm", config.residual_alpha
        self.attention = LatentAttention(config, config.mla) if config.mla else GroupedQueryAttention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = Norm(config.d_model, config.norm_eps)
        self.feed_forward_norm = Norm(config.d_model, config.norm_eps)
        self._compiled: tuple[Callable[..., tuple[Tensor, Tensor, Tensor]], Callable[..., Stream]] | None = None
        self.recompute: Recompute = "none"
        self.offload = False
        self.tile_tokens: int | None = None

    def forward(self, x: Stream, rotary: Rotary, layout: Layout, cache: Cache | None) -> Stream:
        if self.recompute == "block" and torch.is_grad_enabled():
            return recomputed(self._forward, x, rotary, layout, cache, offload=self.offload)
        return self._forward(x, rotary, layout, cache)

    def _forward(self, x: Stream, rotary: Rotary, layout: Layout, cache: Cache | None) -> Stream:
        # decoding is eager: each length would be another graph
        if cache is not None or (self._compiled is None and self.tile_tokens is None):
            return self._rest(x, self.attention(self._attention_input(x), rotary, layout, cache))
        before, after = self._compiled or (self._before, self._after)
        mixed = self.attention.mix(*before(x, rotary, self.attention.sends_latent(layout.sequence)), layout)
        if self.tile_tokens is None:
            return after(x, mixed.flatten(2))
        norms = [self.feed_forward_norm] if self.is_prenorm else [self.attention_norm, self.feed_forward_norm]
        weights = [self.attention.wo, *self.feed_forward.parameters(), *(norm.gain for norm in norms)]
        return in_tiles(after, self.tile_tokens, (x, mixed.flatten(2)), weights)

    def _attention_input(self, x: Stream) -> Stream:
        return self.attention_norm(x) if self.is_prenorm else x

    def _rest(self, x: Stream, attended: Stream) -> Stream:
        """Return the block's output from its input and what attention makes of it."""
        x = x + attended if self.is_prenorm else self.attention_norm(self.alpha * x + attended)
        branch = self._feed_forward
        y = recomputed(branch, x) if self.recompute == "feed_forward" else branch(x)
        return x + y if self.is_prenorm else self.feed_forward_norm(self.alpha * x + y)

    def _feed_forward(self, x: Stream) -> Stream:
        return self.feed_forward(self.feed_forward_norm(x) if self.is_prenorm else x)

    def compile_parts(self) -> None:
        """Compile what is before and after `attend`, for training and evaluation.

        `attend` stays as it is: its kernels are compiled already, and what it does depends on the documents of a batch,
        for which a graph would be made again and again. All blocks share the graphs.
        """
        self._compiled = compiled(self._before), compiled(self._after)

    def _before(self, x: Stream, rotary: Rotary, as_latent: bool) -> tuple[Tensor, Tensor, Tensor]:
        return self.attention.project(self._attention_input(x), rotary, as_latent)

    def _after(self, x: Stream, mixed: Float[Tensor, "b t h_e"]) -> Stream:
        return self._rest(x, functional.linear(mixed, self.attention.wo))


class Head(nn.Module):
    """Logits or, with targets, the loss without the logits. A tied head holds the embedding's own parameter."""

    def __init__(self, config: ResolvedModel, tied: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape("head.weight", config))) if tied is None else tied
        self.scale, self.is_compiled = config.logit_scale, False

    def forward(
        self, hidden: Float[Tensor, "*b_t m"], targets: Ids | None = None, gradient_scale: Scale = 1.0,
        loss: LossConfig = PLAIN, emo_rows: Float[Tensor, "v m"] | None = None, observer: Observer | None = None,
    ) -> Float[Tensor, "*b_t v"] | Losses:  # fmt: skip
        if targets is None:
            logits = functional.linear(hidden, self.weight)
            return (logits if logits.dtype == torch.float64 else logits.float()) * self.scale
        scales = self.scale, gradient_scale
        flat = hidden.flatten(0, 1)
        if observer is not None:
            observer.see_output(flat, self.weight, self.scale)
        return cross_entropy(flat, self.weight, targets.flatten(), *scales, loss, emo_rows, self.is_compiled)


def is_absorbed_cheaper(mla: MlaConfig, n_queries: int, n_keys: int) -> bool:
    """Compare the multiplications of a head: wider keys for each pair, or making keys and values of the past again."""
    wider = n_queries * n_keys * (2 * mla.d_latent - mla.d_nope - mla.d_value)
    return wider < (n_keys - n_queries) * mla.d_latent * (mla.d_nope + mla.d_value)


class Decoder(nn.Module):
    """The whole model. Its weights have no values until they are loaded."""

    def __init__(self, config: ResolvedModel, backend: Backend) -> None:
        super().__init__()
        self.config, self.backend = config, backend
        self.rotary = RotaryTables(config)
        self.embedding = Embedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        # with DeepNorm, the last block ends with a norm
        self.norm = Norm(config.d_model, config.norm_eps) if config.residual == "prenorm" else nn.Identity()
        self.head = Head(config, self.embedding.weight if config.tie_embeddings else None)

    def forward(
        self, tokens: Ids, positions: Ids, cu_seqlens: Int32[Tensor, " n"] | None = None, targets: Ids | None = None,
        gradient_scale: Scale = 1.0, caches: list[Cache] | None = None, n_positions: int | None = None,
        loss: LossConfig = PLAIN, emo_rows: Float[Tensor, "v m"] | None = None, sequence: Sequence | None = None,
        observer: Observer | None = None,
    ) -> Float[Tensor, "b t v"] | Losses:  # fmt: skip
        """Return logits [b, t, v], or with `targets` the sums of the losses; both float32 (logits of float64: float64).

        Args:
            positions: of the tokens in their documents; all below `n_positions` (default: t).
            cu_seqlens: boundaries of packed documents; None: each row is one document.
            gradient_scale, loss, emo_rows: see `megakexue.core.loss.cross_entropy`.
            caches: one per layer, for decoding: tokens follow those already in it, and a query at position p sees the
                tokens at positions up to p of its row.
            sequence: the ranks that share these rows: tokens and targets are this rank's part of them, and `positions`
                and `cu_seqlens` are of the whole rows.
            observer: is shown the queries and keys of each layer and, with `targets`, what the head multiplies.
        """
        hidden = self.hidden(tokens, positions, cu_seqlens, caches, n_positions, sequence, observer)
        return self.head(hidden, targets, gradient_scale, loss, emo_rows, observer)

    def set_recompute(self, what: Recompute, *, offload: bool = False, tile_tokens: int | None = None) -> None:
        """Say what the backward pass computes again instead of keeping it: see `engine.recompute`,
        `engine.recompute_offload` and `engine.tile_tokens`. Only the last one changes rounding."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.recompute = block.feed_forward.recompute = what
            block.offload, block.tile_tokens = offload, tile_tokens

    def compile_parts(self) -> None:
        """Compile the blocks and the loss, for training and evaluation on rows of one length."""
        for block in self.blocks:
            block.compile_parts()  # type: ignore[operator]
        self.head.is_compiled = True

    def hidden(
        self, tokens: Ids, positions: Ids, cu_seqlens: Int32[Tensor, " n"] | None = None,
        caches: list[Cache] | None = None, n_positions: int | None = None, sequence: Sequence | None = None,
        observer: Observer | None = None,
    ) -> Stream:  # fmt: skip
        """Return what the head multiplies; arguments as in `forward`."""
        n_positions = n_positions or positions.shape[1]
        rotary = self.rotary(sequence.own(positions) if sequence else positions, n_positions)
        x = self.embedding(tokens)
        # the first tokens in a cache are a row of one document, for which the kernels need no mask
        config, n_keys = self.config, n_positions if caches and n_positions > tokens.shape[1] else None
        is_absorbed = bool(n_keys and config.mla and is_absorbed_cheaper(config.mla, tokens.shape[1], n_keys))
        layout = Layout(
            positions, cu_seqlens, backend=self.backend, dtype=x.dtype, n_keys=n_keys, is_absorbed=is_absorbed,
            repeats=config.n_heads if is_absorbed else config.n_heads // config.n_groups, sequence=sequence,
            observer=observer,
        )  # fmt: skip
        for i, block in enumerate(self.blocks):
            x = block(x, rotary, layout, caches[i] if caches else None)
        return self.norm(x)


def centre(name: str, config: ResolvedModel) -> float:
    """Return the mean of a parameter's initial elements, towards which the guard's `shrink` moves it (9512)."""
    return config.gain_centre if axes(name).role == "gain" else 0.0


def initial_weight(name: str, config: ResolvedModel, seed: int) -> Float32[Tensor, "..."]:
    """Return a parameter's initial value, float32 on the CPU; it depends on (seed, name) and the config alone."""
    table, size = axes(name), shape(name, config)
    if table.role in ("gain", "bias"):
        return torch.full(size, centre(name, config))
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    gain = config.branch_gain**table.share
    if name == "head.weight":
        gain = 0.5  # logits of standard deviation 1/2: the first loss is ln v + 1/8
    return torch.randn(size, generator=generator) * (gain / math.sqrt(size[1]))
