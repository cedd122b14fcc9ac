"""A decoder trained with megakexue, for transformers 4.57 and later. Licence of this file: Apache-2.0.

It stands alone: an export copies it beside its weights, where `auto_map` of config.json names it. A block, with F
attention or feed-forward:

    deepnorm   x <- norm(alpha x + F(x))      (DeepNet, arXiv 2203.00555)
    prenorm    x <- x + F(norm(x))            and one norm before the head

The query is multiplied by ln(max(n, floor))^power, where n = position + 1 is the number of keys that it sees
(kexue.fm/archives/8823); without a floor there is no such factor. Scales of embedding and logits are folded into the
weights. For the attention backends of serving engines, whatever is not known here is passed on to the attention
function, and query, key and value get one width where a kernel wants it.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

MASK_ARGUMENTS = set(inspect.signature(create_causal_mask).parameters)
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What this version of transformers calls a cache; both names are taken."""
ANY_WIDTH = ("eager", "sdpa")
"""Attention functions that take values of another width than that of the keys."""


class MegakexueConfig(PretrainedConfig):
    model_type = "megakexue"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    base_model_tp_plan = {
        **dict.fromkeys((f"layers.*.self_attn.{x}_proj" for x in ("q", "k", "v", "q_b", "kv_b")), "colwise"),
        **dict.fromkeys(("layers.*.mlp.gate_proj", "layers.*.mlp.up_proj"), "colwise"),
        **dict.fromkeys(("layers.*.self_attn.o_proj", "layers.*.mlp.down_proj"), "rowwise"),
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 512,
        intermediate_size: int = 1408,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 8,
        num_key_value_heads: int = 8,
        head_dim: int = 64,
        max_position_embeddings: int = 2048,
        rms_norm_eps: float = 1e-6,
        residual: str = "prenorm",
        residual_alpha: float = 1.0,
        similarity: str = "dot",
        attention_scale: float = 0.125,
        query_log_floor: float | None = None,
        query_log_power: float = 1.0,
        rotary_frequencies: tuple[float, ...] | list[float] = (),
        kv_lora_rank: int | None = None,
        q_lora_rank: int | None = None,
        qk_nope_head_dim: int | None = None,
        qk_rope_head_dim: int | None = None,
        v_head_dim: int | None = None,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        """Take the usual sizes, and what is special here.

        Args:
            head_dim: of queries, keys and values; with `kv_lora_rank`, the widest of these.
            residual: deepnorm or prenorm; `residual_alpha` is deepnorm's.
            similarity: dot; key_norm, where keys have length 1; cosine, where queries have too.
            attention_scale: what the scores are multiplied by, beside the factor of the query.
            query_log_floor: in tokens; None: the query has no factor. `query_log_power` is its exponent.
            rotary_frequencies: radians from one position to the next, for each pair of the rotated part of a head,
                which is its last part; pair j is (x_j, x_(j + pairs)) of this part.
            kv_lora_rank: if given, multi-head latent attention with the widths that follow, as in DeepSeek-V3.
        """
        given = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        for name, value in given.items():
            setattr(self, name, value)
        super().__init__(**kwargs)


class MegakexueRMSNorm(nn.Module):
    """RMSNorm, in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)  # in this form, serving engines know it as an RMSNorm and put theirs in its place
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight.to(torch.float32) * scaled).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class MegakexueRotary(nn.Module):
    """cos and sin [b, 1, t, pair] of positions [b, t], and the factor of the query [b, 1, t, 1] or None."""

    def __init__(self, config: MegakexueConfig) -> None:
        super().__init__()
        self.config = config
        # float64 as its bits, since a cast of the model to half precision leaves integers alone
        self.register_buffer("bits", torch.zeros(len(config.rotary_frequencies), dtype=torch.int64), persistent=False)
        self.bits: Tensor
        self.reset()

    def reset(self) -> None:
        frequencies = torch.tensor(self.config.rotary_frequencies, dtype=torch.float64, device="cpu")
        self.bits.copy_(frequencies.view(torch.int64))

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        if position_ids.device.type == "mps":  # which has no float64
            frequencies, positions = self.bits.cpu().view(torch.float64).float().to("mps"), position_ids.float()
        else:
            frequencies, positions = self.bits.view(torch.float64), position_ids.double()
        angles = positions[:, None, :, None] * frequencies
        floor = self.config.query_log_floor
        factor = None
        if floor is not None:
            n = (positions + 1).clamp(min=floor)
            factor = n.log().pow(self.config.query_log_power).float()[:, None, :, None]
        return angles.cos().float(), angles.sin().float(), factor


Rotation = tuple[Tensor, Tensor, Tensor | None]


def _rotate(x: Tensor, rotation: Rotation, is_query: bool = False) -> Tensor:
    """Rotate the last part of heads [b, h, t, d], and multiply queries by their factor."""
    cos, sin, factor = rotation
    rest, first, second = _wide(x).split([x.shape[-1] - 2 * cos.shape[-1], cos.shape[-1], cos.shape[-1]], dim=-1)
    rotated = torch.cat([rest, first * cos - second * sin, second * cos + first * sin], dim=-1)
    return (rotated if factor is None or not is_query else rotated * factor).to(x.dtype)


def _unit(x: Tensor) -> Tensor:
    return functional.normalize(_wide(x), dim=-1).to(x.dtype)


def _eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    weights = _wide(scores).softmax(-1).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, kwargs: dict[str, Any]
) -> Tensor:
    """Attend with heads [b, h, t, d], by the function that the config names; return [b, t, h e]."""
    name = module.config._attn_implementation
    function = _eager if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
    b, h, t, _ = query.shape
    width = value.shape[-1]
    if name not in ANY_WIDTH:
        query, key, value = (functional.pad(x, (0, module.widest - x.shape[-1])) for x in (query, key, value))
    attended, _ = function(module, query, key, value, attention_mask, dropout=0.0, scaling=module.scaling, **kwargs)
    return attended.reshape(b, t, h, value.shape[-1])[..., :width].flatten(2)


class MegakexueAttention(nn.Module):
    """Grouped-query attention."""

    is_causal = True

    def __init__(self, config: MegakexueConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.scaling = config, layer_idx, config.attention_scale
        self.head_dim = self.widest = config.head_dim
        n_heads, n_groups, m = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
        self.num_key_value_groups = n_heads // n_groups
        self.q_proj = nn.Linear(m, n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(m, n_groups * self.head_dim, bias=False)
        self.v_proj = nn.Linear(m, n_groups * self.head_dim, bias=False)
        self.o_proj = nn.Linear(n_heads * self.head_dim, m, bias=False)

    def forward(self, x: Tensor, rotation: Rotation, attention_mask: Any, cache: Any, **kwargs: Any) -> Tensor:
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        query, key, value = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in (query, key, value))
        if self.config.similarity != "dot":
            key = _unit(key)
        if self.config.similarity == "cosine":
            query = _unit(query)
        query, key = _rotate(query, rotation, is_query=True), _rotate(key, rotation)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, {"cache_position": kwargs.get("cache_position")})
        return self.o_proj(_attend(self, query, key, value, attention_mask, kwargs))


class MegakexueLatentAttention(nn.Module):
    """Multi-head latent attention; a cache holds the latent and the rotary key."""

    is_causal = True
    num_key_value_groups = 1

    def __init__(self, config: MegakexueConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.scaling = config, layer_idx, config.attention_scale
        self.widest = config.head_dim
        h, m, c, eps = config.num_attention_heads, config.hidden_size, config.kv_lora_rank, config.rms_norm_eps
        n, p, e = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.query_width = n + p
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(m, h * (n + p), bias=False)
        else:
            self.q_a_proj = nn.Linear(m, config.q_lora_rank, bias=False)
            self.q_a_layernorm = MegakexueRMSNorm(config.q_lora_rank, eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, h * (n + p), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(m, c + p, bias=False)
        self.kv_a_layernorm = MegakexueRMSNorm(c, eps)
        self.kv_b_proj = nn.Linear(c, h * (n + e), bias=False)
        self.o_proj = nn.Linear(h * e, m, bias=False)

    def forward(self, x: Tensor, rotation: Rotation, attention_mask: Any, cache: Any, **kwargs: Any) -> Tensor:
        config = self.config
        c, n, p, e = config.kv_lora_rank, config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        query = self.q_proj(x) if config.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        query = query.unflatten(-1, (-1, self.query_width)).transpose(1, 2)
        query = _rotate(query, rotation, is_query=True)
        latent, rotary_key = self.kv_a_proj_with_mqa(x)[:, None].split([c, p], dim=-1)
        latent, rotary_key = self.kv_a_layernorm(latent), _rotate(rotary_key, rotation)
        if cache is not None:
            # as two halves, since a static cache may want keys and values of one width
            kept = functional.pad(torch.cat([latent, rotary_key], dim=-1), (0, (c + p) % 2)).chunk(2, dim=-1)
            kept = cache.update(*kept, self.layer_idx, {"cache_position": kwargs.get("cache_position")})
            latent, rotary_key = torch.cat(kept, dim=-1)[..., : c + p].split([c, p], dim=-1)
        both = self.kv_b_proj(latent[:, 0]).unflatten(-1, (-1, n + e)).transpose(1, 2)
        key, value = both.split([n, e], dim=-1)
        key = torch.cat([key, rotary_key.expand(-1, key.shape[1], -1, -1)], dim=-1)
        return self.o_proj(_attend(self, query, key, value, attention_mask, kwargs))


class MegakexueMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: MegakexueConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class MegakexueLayer(GradientCheckpointingLayer):
    def __init__(self, config: MegakexueConfig, layer_idx: int) -> None:
        super().__init__()
        self.is_prenorm, self.alpha = config.residual == "prenorm", config.residual_alpha
        attention = MegakexueAttention if config.kv_lora_rank is None else MegakexueLatentAttention
        self.self_attn = attention(config, layer_idx)
        self.mlp = MegakexueMLP(config)
        self.input_layernorm = MegakexueRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = MegakexueRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden_states: Tensor, rotation: Rotation, attention_mask: Any = None, cache: Any = None, **kwargs: Any
    ) -> Tensor:
        x = hidden_states
        if self.is_prenorm:
            x = x + self.self_attn(self.input_layernorm(x), rotation, attention_mask, cache, **kwargs)
            return x + self.mlp(self.post_attention_layernorm(x))
        x = self.input_layernorm(self.alpha * x + self.self_attn(x, rotation, attention_mask, cache, **kwargs))
        return self.post_attention_layernorm(self.alpha * x + self.mlp(x))


class MegakexuePreTrainedModel(PreTrainedModel):
    config_class = MegakexueConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MegakexueLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MegakexueRotary):  # a buffer that no file holds
            module.reset()


class MegakexueModel(MegakexuePreTrainedModel):
    def __init__(self, config: MegakexueConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MegakexueLayer(config, i) for i in range(config.num_hidden_layers))
        # with deepnorm, the last layer ends with a norm
        is_prenorm = config.residual == "prenorm"
        self.norm = MegakexueRMSNorm(config.hidden_size, config.rms_norm_eps) if is_prenorm else nn.Identity()
        self.rotary_emb = MegakexueRotary(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if not use_cache:
            cache = None
        n_past = 0 if cache is None else cache.get_seq_length()
        cache_position = kwargs.pop("cache_position", None)
        if cache_position is None:
            cache_position = torch.arange(x.shape[1], device=x.device) + n_past
        if position_ids is None:
            position_ids = _positions(attention_mask, cache_position)
        given = dict(
            config=self.config, input_embeds=x, inputs_embeds=x, attention_mask=attention_mask,
            position_ids=position_ids, cache_position=cache_position, past_key_values=cache, cache=cache,
        )  # fmt: skip
        mask = create_causal_mask(**{name: value for name, value in given.items() if name in MASK_ARGUMENTS})
        if cache is not None:
            kwargs["cache_position"] = cache_position
        rotation = self.rotary_emb(position_ids)
        kept = [x] if output_hidden_states else []
        for layer in self.layers[: self.config.num_hidden_layers]:
            x = layer(x, rotation=rotation, attention_mask=mask, cache=cache, position_ids=position_ids, **kwargs)
            if output_hidden_states:
                kept.append(x)
        output = BaseModelOutputWithPast(
            last_hidden_state=self.norm(x), hidden_states=tuple(kept) if output_hidden_states else None,
            **{CACHE: cache},
        )  # fmt: skip
        return output.to_tuple() if return_dict is False else output


def _positions(attention_mask: Any, cache_position: Tensor) -> Tensor:
    """Return the position of each token in its text, which a padding at the left does not count in."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return cache_position[None]
    positions = attention_mask.long().cumsum(-1) - 1
    return positions.clamp(min=0)[:, -len(cache_position) :]


class MegakexueForCausalLM(MegakexuePreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: MegakexueConfig) -> None:
        super().__init__(config)
        self.model = MegakexueModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: Any = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        out = self.model(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            cache=cache, inputs_embeds=inputs_embeds, use_cache=use_cache, output_hidden_states=output_hidden_states,
            **kwargs,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=out.hidden_states, **{CACHE: getattr(out, CACHE)}
        )
        return output.to_tuple() if return_dict is False else output
