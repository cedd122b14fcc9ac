"""Our parameters and the tensors of transformers' causal models, by name: what each holds of the other, both ways.

Of Llama, Mistral, Qwen2, Qwen3 and Granite every tensor is one parameter of ours. DeepSeek's latent attention puts
some of ours together:

    kv_a_proj_with_mqa = [wkv_down; wk_rope]        kv_b_proj = for each head [its rows of wk_up; those of wv_up]

Some implementations rotate pairs (x_2j, x_2j+1), where we and most of transformers rotate (x_j, x_(j + half)). It is
another order of the rows that make what is rotated, so `unpermuted` and `permuted` are exact. Scales are not looked at
here.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from megakexue.config import MlaConfig, ModelConfig
from megakexue.core.axes import parameter_names

Read = Callable[[str], Tensor]
"""Gives a tensor by its name."""

PLAIN = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.gain": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "blocks.attention_norm.gain": "input_layernorm.weight",
    "blocks.feed_forward_norm.gain": "post_attention_layernorm.weight",
    "blocks.feed_forward.w_gate": "mlp.gate_proj.weight",
    "blocks.feed_forward.w_up": "mlp.up_proj.weight",
    "blocks.feed_forward.w_down": "mlp.down_proj.weight",
    "blocks.attention.wq": "self_attn.q_proj.weight",
    "blocks.attention.wk": "self_attn.k_proj.weight",
    "blocks.attention.wv": "self_attn.v_proj.weight",
    "blocks.attention.wo": "self_attn.o_proj.weight",
    "blocks.attention.bq": "self_attn.q_proj.bias",
    "blocks.attention.bk": "self_attn.k_proj.bias",
    "blocks.attention.bv": "self_attn.v_proj.bias",
    "blocks.attention.query_norm.gain": "self_attn.q_norm.weight",
    "blocks.attention.key_norm.gain": "self_attn.k_norm.weight",
    "blocks.attention.wq_down": "self_attn.q_a_proj.weight",
    "blocks.attention.q_norm.gain": "self_attn.q_a_layernorm.weight",
    "blocks.attention.wq_up": "self_attn.q_b_proj.weight",
    "blocks.attention.kv_norm.gain": "self_attn.kv_a_layernorm.weight",
}
"""Tensors that are equal. Names of blocks are without their beginning, blocks.N and model.layers.N."""

DOWN, UP = "self_attn.kv_a_proj_with_mqa.weight", "self_attn.kv_b_proj.weight"
_OURS = {theirs: ours for ours, theirs in PLAIN.items()}


def _split(name: str, beginning: str) -> tuple[str, str]:
    """Return the number of the block and the rest of a name; of one outside the blocks "" and the name."""
    found = re.fullmatch(rf"{re.escape(beginning)}\.(\d+)\.(.+)", name)
    return (found[1], found[2]) if found else ("", name)


def _in_block(beginning: str, number: str, rest: str) -> str:
    return f"{beginning}.{number}.{rest}" if number else rest


def sources(name: str) -> list[str]:
    """Return the tensors of theirs that a parameter of ours is made from: one."""
    number, rest = _split(name, "blocks")
    if number:
        part = f"blocks.{rest}"
        theirs = DOWN if part in _FROM_DOWN else UP if part in _FROM_UP else PLAIN[part]
        return [_in_block("model.layers", number, theirs)]
    return [PLAIN[name]]


_FROM_DOWN = ("blocks.attention.wkv_down", "blocks.attention.wk_rope")
_FROM_UP = ("blocks.attention.wk_up", "blocks.attention.wv_up")


def our_weight(name: str, config: ModelConfig, read: Read) -> Tensor:
    """Return a parameter of ours, from tensors of theirs."""
    (source,) = sources(name)
    tensor, part = read(source), name.rpartition(".")[2]
    if source.endswith(DOWN) and config.mla:
        at = config.mla.d_latent
        return tensor[:at] if part == "wkv_down" else tensor[at:]
    if source.endswith(UP) and config.mla:
        heads = tensor.unflatten(0, (config.n_heads, -1))
        n = config.mla.d_nope
        return (heads[:, :n] if part == "wk_up" else heads[:, n:]).flatten(0, 1)
    return tensor


def their_names(config: ModelConfig) -> list[str]:
    """Return the name of every tensor that their class has for a config; a tied head is none."""
    return list(dict.fromkeys(source for name in parameter_names(config) for source in sources(name)))


def their_weight(name: str, config: ModelConfig, read: Read) -> Tensor:
    """Return a tensor of theirs, from parameters of ours. Raises KeyError: there is no such tensor."""
    number, rest = _split(name, "model.layers")

    def ours(part: str) -> Tensor:
        return read(_in_block("blocks", number, part.removeprefix("blocks.")))

    if rest == DOWN:
        return torch.cat([ours(part) for part in _FROM_DOWN])
    if rest == UP:
        heads = [ours(part).unflatten(0, (config.n_heads, -1)) for part in _FROM_UP]
        return torch.cat(heads, dim=1).flatten(0, 1)
    return ours(_OURS[rest])


def is_rotated(name: str) -> bool:
    """Whether rows of a parameter make what is rotated."""
    return name.rpartition(".")[2] in ("wq", "wk", "wq_up", "wk_rope", "bq", "bk")


def unpermuted(tensor: Tensor, width: int, rotated: int) -> Tensor:
    """Order the rows of each head for pairs (x_j, x_(j + half)), from pairs (x_2j, x_2j+1).

    Args:
        width: of a head, the rows that belong together.
        rotated: how many of them, the last, are rotated.
    """
    heads = tensor.unflatten(0, (-1, width))
    rest, pairs = heads[:, : width - rotated], heads[:, width - rotated :].unflatten(1, (-1, 2))
    return torch.cat([rest, pairs.transpose(1, 2).flatten(1, 2)], dim=1).flatten(0, 1)


def permuted(tensor: Tensor, width: int, rotated: int) -> Tensor:
    """Undo `unpermuted`."""
    heads = tensor.unflatten(0, (-1, width))
    rest, halves = heads[:, : width - rotated], heads[:, width - rotated :].unflatten(1, (2, -1))
    return torch.cat([rest, halves.transpose(1, 2).flatten(1, 2)], dim=1).flatten(0, 1)


def head_rows(name: str, config: ModelConfig) -> tuple[int, int]:
    """Return the rows of a head in a parameter for which `is_rotated`, and how many of them are rotated."""
    mla: MlaConfig | None = config.mla
    if name.endswith("wk_rope") and mla:
        return mla.d_rope, mla.d_rope
    return config.head_width, config.rotary_width
