"""A config.json as a model section: every key is read, or refused by its name."""

from typing import Any

import pytest

from megakexue.bundle.hf_config import FAMILIES, read_config
from megakexue.config import UserError

LLAMA: dict[str, Any] = dict(
    model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=100, hidden_size=32, intermediate_size=48,
    num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, torch_dtype="bfloat16",
)  # fmt: skip
SCALED = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
DEEPSEEK: dict[str, Any] = LLAMA | dict(
    model_type="deepseek_v3", architectures=None, kv_lora_rank=8, q_lora_rank=None, qk_rope_head_dim=4,
    qk_nope_head_dim=4, v_head_dim=4, first_k_dense_replace=2,
)  # fmt: skip
LONG = dict(rope_type="longrope", short_factor=[1.0, 1.0, 2.0, 2.0], long_factor=[4.0] * 4,
            original_max_position_embeddings=64)  # fmt: skip
FACTORS = [
    1.0591234137867171, 1.1241891283591912, 1.2596935748670968, 1.5380380402321725, 2.093982484148734,
    3.1446935121267696, 4.937952647693647, 7.524541999994549, 10.475458000005451, 13.062047352306353,
    14.85530648787323, 15.906017515851266, 16.461961959767827, 16.740306425132907, 16.87581087164081,
    16.940876586213285,
]  # fmt: skip
MINICPM3: dict[str, Any] = dict(
    model_type="minicpm3", architectures=["MiniCPM3ForCausalLM"], auto_map={"AutoModel": "modeling_minicpm.x"},
    hidden_act="silu", hidden_size=2560, num_hidden_layers=62, intermediate_size=6400, max_position_embeddings=32768,
    num_attention_heads=40, num_key_value_heads=40, qk_nope_head_dim=64, qk_rope_head_dim=32, q_lora_rank=768,
    kv_lora_rank=256, rms_norm_eps=1e-5, vocab_size=73448, scale_emb=12, dim_model_base=256, scale_depth=1.4,
    rope_scaling=dict(
        type="longrope", long_factor=FACTORS, short_factor=FACTORS, original_max_position_embeddings=32768
    ),
)  # fmt: skip
"""The file of MiniCPM3-4B, but for what changes nothing."""


def test_minicpm3() -> None:
    found = read_config(MINICPM3, "config.json")
    model, mla = found.model, found.model.mla
    assert mla is not None and (mla.d_query_latent, mla.d_value, model.head_width) == (768, 64, 96)
    assert model.tie_embeddings and model.logit_scale == pytest.approx(256 / 2560) and not found.is_interleaved
    # norm(x, 1e-5) is norm(c x, 1e-6) with c^2 = 0.1, so that the norms of latents, and all others, have 1e-6
    assert model.norm_eps == 1e-6 and model.embed_scale == pytest.approx(12 * 0.1**0.5)
    assert found.branch == pytest.approx(1.4 / 62**0.5 * 0.1**0.5)
    rope = model.rope
    assert (rope.extension, rope.longrope_factors, rope.base) == ("longrope", FACTORS, 10000.0)
    assert (rope.context, rope.trained_context, found.context) == (32768, 32768, 32768)


def test_longrope() -> None:
    def rope(context: int, **changes: Any) -> Any:
        return read_config(LLAMA | dict(max_position_embeddings=context, rope_scaling=LONG | changes), "c").model.rope

    # up to the original length, the long set has no effect; beyond it, both must be one
    for context in (64, 32):
        assert rope(context).longrope_factors == [1.0, 1.0, 2.0, 2.0] and rope(context).trained_context == context
    beyond = rope(128, short_factor=[4.0] * 4, attention_factor=1.0)
    assert (beyond.longrope_factors, beyond.trained_context, beyond.context) == ([4.0] * 4, 64, 128)


def test_defaults_are_those_of_the_classes() -> None:
    from transformers import AutoConfig

    for kind, family in FAMILIES.items():
        if kind == "minicpm3":  # of transformers 5; whose numbers must all be given
            continue
        theirs = AutoConfig.for_model(kind)
        for key, value in (family.fixed | family.numbers).items():
            if key != "layer_types":  # which Qwen makes from the others
                assert getattr(theirs, key) == value, (kind, key)
        assert (theirs.rms_norm_eps, theirs.tie_word_embeddings, theirs.rope_theta) == (1e-6, False, 10000.0)


def test_what_is_read() -> None:
    plain = read_config(LLAMA, "config.json")
    assert plain.family == "llama" and plain.context == 64 and plain.branch == 1 and not plain.is_interleaved
    model = plain.model
    assert (model.n_groups, model.head_width, model.norm_eps, model.rope.base) == (4, 8, 1e-6, 10000.0)
    assert model.residual == "prenorm" and model.attention.scale == "constant" and not model.attention.qkv_bias
    # both generations of rope keys say the same
    old = LLAMA | dict(rope_theta=5e5, rope_scaling={"type": "llama3"} | SCALED)
    new = LLAMA | dict(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5} | SCALED)
    both = old | new
    for values in (old, new, both):
        rope = read_config(values, "config.json").model.rope
        assert (rope.base, rope.extension, rope.trained_context, rope.context) == (5e5, "llama3", 16, 64)
        assert (rope.llama3_factor, rope.llama3_slow, rope.llama3_fast) == (8, 1, 4)
    default = read_config(LLAMA | dict(rope_parameters={"rope_type": "default", "rope_theta": 7.0}), "config.json")
    assert default.model.rope.base == 7.0 and default.model.rope.extension is None
    # a window that no position reaches is none; null and false are nothing
    mistral = LLAMA | dict(model_type="mistral", architectures=None, num_key_value_heads=2, sliding_window=64)
    assert read_config(mistral | {"some_flag": False, "other": None}, "config.json").family == "mistral"
    # a further layer that transformers can use would be tensors; its class writes the 1 without them
    more = dict(head_dim=4, n_routed_experts=256, num_nextn_predict_layers=1)
    deepseek = read_config(DEEPSEEK | more, "config.json")
    assert deepseek.is_interleaved and deepseek.model.mla is not None and deepseek.model.mla.d_query_latent is None


REFUSED: dict[str, dict[str, Any]] = {
    "model_type=gemma2 is not supported: import takes llama, mistral": dict(model_type="gemma2"),
    r"architectures=\['LlamaForSequenceClassification'\] must be": dict(
        architectures=["LlamaForSequenceClassification"]
    ),
    "config.json has no max_position_embeddings": dict(max_position_embeddings=...),
    "hidden_act=gelu is not supported: our decoder has hidden_act=silu": dict(hidden_act="gelu"),
    "attention_bias=True is not supported": dict(attention_bias=True),
    "mlp_bias=True is not supported": dict(mlp_bias=True),
    "rope_type=yarn is not supported: import takes default, llama3 and longrope": dict(
        rope_scaling=dict(type="yarn", factor=2)
    ),
    "rope_type=linear is not supported": dict(rope_parameters=dict(rope_type="linear", factor=2.0)),
    r"rope_type=llama3 has the keys \['factor'\] instead of": dict(rope_scaling=dict(rope_type="llama3", factor=2)),
    r"rope_theta has two values: \[1.0, 2.0\]": dict(rope_theta=1.0, rope_parameters=dict(rope_theta=2.0)),
    "rope_parameters and rope_scaling differ": dict(
        rope_parameters=dict(rope_type="llama3") | SCALED, rope_scaling=dict(rope_type="llama3", factor=1.0)
    ),
    "quantization_config=.*is not supported: import does not know": dict(quantization_config={"bits": 4}),
    "num_local_experts=8 is not supported": dict(num_local_experts=8),
    "first_k_dense_replace=None must be a number": DEEPSEEK | dict(first_k_dense_replace=None),
    "logits_scaling=0 must not be 0": dict(model_type="granite", architectures=None, logits_scaling=0),
    "auto_map=.* is not supported": dict(auto_map={"AutoModel": "modeling.Mine"}),
    "sliding_window=4096, the default of MistralConfig, is not supported": dict(
        model_type="mistral", architectures=None, num_key_value_heads=2, max_position_embeddings=8192
    ),
    "config.json has no num_key_value_heads": dict(model_type="mistral", architectures=None, sliding_window=None),
    "use_sliding_window=True is not supported": dict(
        model_type="qwen2", architectures=None, num_key_value_heads=2, use_sliding_window=True
    ),
    r"layer_types=\['full_attention', 'sliding_attention'\] is not supported": dict(
        model_type="qwen3", architectures=None, num_key_value_heads=2, head_dim=8,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "first_k_dense_replace=1 of 2 layers: experts .MoE. are not supported": DEEPSEEK | dict(first_k_dense_replace=1),
    "rms_norm_eps=0 must be a positive number": DEEPSEEK | dict(rms_norm_eps=0),
    r"rope_type=longrope has the keys \['factor'\] instead of": dict(rope_scaling=dict(type="longrope", factor=2)),
    "long_factor differs from short_factor, and max_position_embeddings=64 is beyond original_max.*=32": dict(
        rope_scaling=LONG | dict(original_max_position_embeddings=32)
    ),
    "attention_factor=null with factor=2.0 is not supported": dict(
        rope_scaling=LONG | dict(short_factor=[4.0] * 4, original_max_position_embeddings=32)
    ),
    "attention_factor=1.5 is not supported": dict(rope_scaling=LONG | dict(attention_factor=1.5)),
    "original_max_position_embeddings=x must be a whole number": dict(
        rope_scaling=LONG | dict(original_max_position_embeddings="x")
    ),
    "longrope_factors has 4 numbers, and RoPE rotates 2 pairs": DEEPSEEK | dict(rope_scaling=LONG),
    "rope.longrope_factors=4 must be a list": dict(rope_scaling=LONG | dict(short_factor=4)),
    "config.json has no scale_depth": dict(MINICPM3, scale_depth=...),
    "scale_depth=0 must be a positive number": dict(MINICPM3, scale_depth=0),
    "hidden_size=None must be a positive whole number": dict(MINICPM3, hidden_size=None),
    "num_hidden_layers=0 must be a positive whole number": dict(MINICPM3, num_hidden_layers=0),
    "scale_emb=None must be a number": dict(MINICPM3, scale_emb=None),
    "config.json: hidden_size=x must be a positive whole number": dict(hidden_size="x"),
    "num_hidden_layers=two must be a positive whole number": dict(num_hidden_layers="two"),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message: str) -> None:
    values = {key: value for key, value in (LLAMA | REFUSED[message]).items() if value is not ...}
    with pytest.raises(UserError, match=message):
        read_config(values, "config.json")
