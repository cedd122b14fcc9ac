"""The config.json of a Hugging Face model, read as a model section of ours.

What must stay true: every key that changes what transformers' class computes is read, or refused by its name. A key
that is not in the tables below is refused too, whatever it may mean, unless it is null or false.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from megakexue.config import BOUND, ModelConfig, build, require

SIZES = {
    "vocab_size": "vocab_size", "hidden_size": "d_model", "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads", "intermediate_size": "d_ff",
}  # fmt: skip
"""Keys that must be given, and what they are here."""
READ = {
    *SIZES, "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings",
    "rope_theta", "rope_scaling", "rope_parameters",
}  # fmt: skip
HARMLESS = {
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout", "pretraining_tp",
    "max_window_layers", "return_dict", "output_attentions", "output_hidden_states", "_attn_implementation",
    "transformers.js_config", "is_llama_config",
}  # fmt: skip
"""What says how a model was made, stored or is run, and changes no logit."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a config.json of one `model_type` may say."""

    architecture: str
    fixed: dict[str, Any] = field(default_factory=dict)
    """Keys of which we have one value, with that; it is also the default of transformers' class."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """Keys that are read beside `READ`, with their defaults."""
    given: tuple[str, ...] = ()
    """Keys that must be given, since the default of transformers' class fits few models."""
    harmless: tuple[str, ...] = ()
    attention: dict[str, Any] = field(default_factory=dict)
    """Settings of `model.attention` that the family has."""


_LLAMA = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
_QWEN: dict[str, Any] = {"hidden_act": "silu", "use_sliding_window": False}
_LATENTS = ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim")
_DEEPSEEK = (  # experts, and layers that predict further tokens: a folder that has them has tensors of theirs
    "moe_intermediate_size", "n_shared_experts", "n_routed_experts", "routed_scaling_factor", "n_group", "topk_group",
    "num_experts_per_tok", "norm_topk_prob", "topk_method", "scoring_func", "moe_layer_freq", "aux_loss_alpha",
    "seq_aux", "ep_size", "qk_head_dim", "num_nextn_predict_layers", "num_mtp_layers",
)  # fmt: skip
FAMILIES = {
    "llama": Family(architecture="LlamaForCausalLM", fixed=_LLAMA),
    "mistral": Family(
        architecture="MistralForCausalLM", fixed={"hidden_act": "silu"}, numbers={"sliding_window": 4096},
        given=("num_key_value_heads",),
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM", fixed=_QWEN, numbers={"layer_types": None}, harmless=("sliding_window",),
        given=("num_key_value_heads",), attention={"qkv_bias": True},
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM", fixed=_QWEN | {"attention_bias": False}, numbers={"layer_types": None},
        given=("num_key_value_heads", "head_dim"), harmless=("sliding_window",), attention={"qk_norm": True},
    ),
    "granite": Family(
        architecture="GraniteForCausalLM", fixed=_LLAMA,
        numbers={"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0,
                 "attention_multiplier": 1.0},
    ),
    "deepseek_v3": Family(
        architecture="DeepseekV3ForCausalLM",
        fixed={"hidden_act": "silu", "attention_bias": False},
        numbers={"rope_interleave": True, "first_k_dense_replace": 3},
        given=(*_LATENTS, "v_head_dim", "first_k_dense_replace"), harmless=_DEEPSEEK,
    ),
    "minicpm3": Family(
        architecture="MiniCPM3ForCausalLM", fixed=_LLAMA, numbers={"tie_word_embeddings": True},
        # the class that its makers publish has other defaults than that of transformers
        given=(*_LATENTS, "scale_emb", "scale_depth", "dim_model_base", "rms_norm_eps"),
        # auto_map names the makers' class, which is not run: transformers 5 has its own
        harmless=("v_head_dim", "qk_head_dim", "auto_map"),
    ),
}  # fmt: skip
"""By `model_type`."""
MULTIPLIERS = ("scale_emb", "scale_depth", "dim_model_base")
"""Of MiniCPM3: numbers that must be given."""
LATENT_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A model of another stack, in our terms."""

    family: str
    model: ModelConfig
    context: int
    """Tokens that it was trained for, or that its frequencies are made for."""
    branch: float = 1.0
    """What multiplies the last matrix of each residual branch, where their class has a number for it and ours none."""
    is_interleaved: bool = False
    """Whether its rotary pairs are neighbours."""


def read_config(values: dict[str, Any], where: str) -> Imported:
    """Read a config.json.

    Raises:
        UserError: a key is missing, has a value that our decoder does not have, or is unknown; the message names it.
    """
    kind = values.get("model_type")
    require(
        isinstance(kind, str) and kind in FAMILIES,
        f"{where}: model_type={kind} is not supported: import takes {', '.join(FAMILIES)}",
    )
    family = FAMILIES[str(kind)]
    _check_keys(values, family, where)
    numbers = {key: values.get(key, default) for key, default in family.numbers.items()}
    numbers |= {key: values[key] for key in MULTIPLIERS if key in family.given}
    for key, value in numbers.items():
        is_list = key == "layer_types" and isinstance(value, list)
        may_be_null = key in ("layer_types", "sliding_window") and value is None
        require(
            is_list or may_be_null or isinstance(value, int | float), f"{where}: {key}={_short(value)} must be a number"
        )
    _check_numbers(values, numbers, where)
    context, eps = values["max_position_embeddings"], values.get("rms_norm_eps", 1e-6)
    embed, branch, logits = _multipliers(values, numbers, where)
    model = {ours: values[theirs] for theirs, ours in SIZES.items()} | {
        "rope": _rope(values, where), "attention": {"scale": "constant"} | family.attention,
        "tie_embeddings": numbers.get("tie_word_embeddings", values.get("tie_word_embeddings", False)),
        "norm_eps": eps, "residual": "prenorm", "embed_scale": embed, "logit_scale": logits,
    }  # fmt: skip
    if "kv_lora_rank" in family.given:
        model["mla"] = _latents(values, where)
        # norms of latents have this eps in their classes, whatever config.json says; norm(x, eps) is norm(c x, eps c^2)
        shrunk = math.sqrt(LATENT_EPS / eps)
        branch *= shrunk
        model |= {"norm_eps": LATENT_EPS, "embed_scale": embed * shrunk}
    else:
        model["n_kv_heads"], model["d_head"] = values.get("num_key_value_heads"), values.get("head_dim")
    if "attention_multiplier" in numbers:
        model["attention"]["softmax_scale"] = numbers["attention_multiplier"]
    return Imported(
        family=str(kind), model=build(ModelConfig, model, where=where), context=context,
        branch=branch, is_interleaved=bool(numbers.get("rope_interleave", False)),
    )  # fmt: skip


def _multipliers(values: dict[str, Any], numbers: dict[str, Any], where: str) -> tuple[float, float, float]:
    """Return what multiplies embeddings, residual branches and logits, by the keys of Granite or of MiniCPM3."""
    if "scale_emb" in numbers:
        branch = numbers["scale_depth"] / math.sqrt(values["num_hidden_layers"])
        return numbers["scale_emb"], branch, numbers["dim_model_base"] / values["hidden_size"]
    scaling = numbers.get("logits_scaling", 1.0)
    require(scaling != 0, f"{where}: logits_scaling=0 must not be 0")
    return numbers.get("embedding_multiplier", 1.0), numbers.get("residual_multiplier", 1.0), 1 / scaling


def _check_keys(values: dict[str, Any], family: Family, where: str) -> None:
    """Refuse keys that are missing, unknown, or have a value that we have not."""
    for key in (*SIZES, "max_position_embeddings", *family.given):
        require(key in values, f"{where} has no {key}: a config.json of transformers has it")
    names = values.get("architectures") or [family.architecture]
    require(names == [family.architecture], f"{where}: architectures={names} must be [{family.architecture}]")
    for key, value in family.fixed.items():
        found = values.get(key, value)
        require(found == value, f"{where}: {key}={found} is not supported: our decoder has {key}={value}")
    known = READ | HARMLESS | {*family.fixed, *family.numbers, *family.given, *family.harmless}
    for key, value in values.items():
        require(
            key in known or value is None or value is False,
            f"{where}: {key}={_short(value)} is not supported: import does not know what it changes; if it changes "
            "nothing, take it out of config.json",
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_numbers(values: dict[str, Any], numbers: dict[str, Any], where: str) -> None:
    """Refuse sizes and multipliers that are none, and what reaches beyond plain, dense attention."""
    for key in SIZES:
        is_size = isinstance(values[key], int) and 0 < values[key] < BOUND
        require(is_size, f"{where}: {key}={_short(values[key])} must be a positive whole number")
    for key in ("scale_emb", "scale_depth", "dim_model_base", "rms_norm_eps"):
        value = numbers.get(key, values.get(key, 1.0))
        is_factor = isinstance(value, int | float) and 0 < value < BOUND
        require(is_factor, f"{where}: {key}={_short(value)} must be a positive number")
    context, n_layers = values["max_position_embeddings"], values["num_hidden_layers"]
    require(
        isinstance(context, int) and isinstance(n_layers, int),
        f"{where}: max_position_embeddings={context} and num_hidden_layers={n_layers} must be whole numbers",
    )
    window = numbers.get("sliding_window")
    said = "" if "sliding_window" in values else ", the default of MistralConfig,"
    require(
        window is None or window >= context,
        f"{where}: sliding_window={window}{said} is not supported: every token must see all before it (if the model "
        "has no window, write null)",
    )
    types = numbers.get("layer_types") or []
    require(set(types) <= {"full_attention"}, f"{where}: layer_types={sorted(set(types))} is not supported")
    dense = numbers.get("first_k_dense_replace", n_layers)
    require(
        dense >= n_layers,
        f"{where}: first_k_dense_replace={dense} of {n_layers} layers: experts (MoE) are not supported",
    )


def _rope(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Read the base and the scaling of the angles, of both generations of keys."""
    new, old = values.get("rope_parameters") or {}, values.get("rope_scaling") or {}
    require(
        isinstance(new, dict) and isinstance(old, dict), f"{where}: rope_parameters and rope_scaling must be objects"
    )
    bases = [x for x in (values.get("rope_theta"), new.get("rope_theta"), old.get("rope_theta")) if x is not None]
    require(len(set(bases)) <= 1, f"{where}: rope_theta has two values: {bases}")
    found = [{k: v for k, v in part.items() if k not in ("rope_theta", "type")} for part in (new, old)]
    for part, source in zip(found, (new, old)):
        kind = source.get("rope_type", source.get("type", "default"))
        part["rope_type"] = "default" if kind is None else kind
    scaled = [part for part in found if part["rope_type"] != "default" or len(part) > 1]
    require(len(scaled) < 2 or scaled[0] == scaled[1], f"{where}: rope_parameters and rope_scaling differ")
    rope: dict[str, Any] = {"base": bases[0] if bases else 10000.0, "context": values["max_position_embeddings"]}
    if not scaled:
        return rope
    kind = scaled[0].pop("rope_type")
    require(
        kind in ("llama3", "longrope"),
        f"{where}: rope_type={kind} is not supported: import takes default, llama3 and longrope",
    )
    own = _llama3(scaled[0], where) if kind == "llama3" else _longrope(scaled[0], rope["context"], where)
    return rope | {"extension": kind} | own


def _llama3(values: dict[str, Any], where: str) -> dict[str, Any]:
    names = {
        "factor": "llama3_factor", "low_freq_factor": "llama3_slow", "high_freq_factor": "llama3_fast",
        "original_max_position_embeddings": "trained_context",
    }  # fmt: skip
    require(
        values.keys() == names.keys(),
        f"{where}: rope_type=llama3 has the keys {sorted(values)} instead of {sorted(names)}",
    )
    return {ours: values[theirs] for theirs, ours in names.items()}


def _longrope(values: dict[str, Any], context: int, where: str) -> dict[str, Any]:
    """Read the numbers that divide the frequencies: of two sets, the one that serves every position."""
    short, long = "short_factor", "long_factor"
    needed = {short, long, "original_max_position_embeddings"}
    require(
        needed <= values.keys() <= needed | {"factor", "attention_factor"},
        f"{where}: rope_type=longrope has the keys {sorted(values)} instead of {sorted(needed)}",
    )
    trained = values["original_max_position_embeddings"]
    require(
        isinstance(trained, int) and trained > 1,
        f"{where}: original_max_position_embeddings={_short(trained)} must be a whole number above 1",
    )
    require(
        context <= trained or values[short] == values[long],
        f"{where}: {long} differs from {short}, and max_position_embeddings={context} is beyond "
        f"original_max_position_embeddings={trained}: our decoder has one set for all lengths (for a context of "
        f"{trained}, set max_position_embeddings={trained})",
    )
    scale, factor = values.get("attention_factor"), values.get("factor")
    if scale is None:
        factor = context / trained if factor is None else factor
        scale = 1.0 if isinstance(factor, int | float) and factor <= 1 else f"null with factor={_short(factor)}"
    require(scale == 1, f"{where}: attention_factor={_short(scale)} is not supported: our decoder has 1 with longrope")
    return {"longrope_factors": values[short], "trained_context": min(trained, context)}


def _latents(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Read the widths of latent attention."""
    heads = values["num_attention_heads"]
    for key, needed in (("num_key_value_heads", heads), ("head_dim", values["qk_rope_head_dim"])):
        found = values.get(key)
        require(found in (None, needed), f"{where}: {key}={found} must be {needed} with latent attention")
    width = values.get("v_head_dim")
    if width is None:  # MiniCPM3
        width = values["hidden_size"] // heads if isinstance(heads, int) and heads > 0 else None
    return {
        "d_latent": values["kv_lora_rank"], "d_query_latent": values["q_lora_rank"],
        "d_nope": values["qk_nope_head_dim"], "d_rope": values["qk_rope_head_dim"], "d_value": width,
    }  # fmt: skip
