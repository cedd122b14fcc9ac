"""The decoder: its start, what one token may know of another, its formulas, and other implementations of it."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from megakexue.config import (
    IGNORED,
    AttentionConfig,
    MlaConfig,
    ModelConfig,
    Recompute,
    ResolvedModel,
    RopeConfig,
    load_config,
)  # fmt: skip
from megakexue.core import decoder
from megakexue.core.attention import Backend, Layout
from megakexue.core.costs import kept_of_layer
from megakexue.core.decoder import (
    Block,
    Cache,
    Decoder,
    GroupedQueryAttention,
    LatentAttention,
    initial_weight,
    is_absorbed_cheaper,
)
from megakexue.core.device import has_compiler
from megakexue.core.resolve import resolve, resolve_config
from tests.helpers import KINDS, VARIANTS, build, positions_of, tiny
from tests.ranks import run_on_ranks

RECOMPUTE: tuple[Recompute, ...] = ("none", "product", "feed_forward", "block")
# prenorm has no recipe
RECIPES = [
    changes | dict(deepnorm_recipe=recipe)
    for changes in VARIANTS
    for recipe in ("auto", "paper", "sgd", "lamb")
    if changes["residual"] == "deepnorm" or recipe == "auto"
]


@pytest.mark.parametrize("changes", RECIPES, ids=str)
def test_first_loss_is_that_of_a_uniform_guess(changes: dict[str, Any]) -> None:
    config = tiny(vocab_size=5000, **changes)
    model = build(config)
    torch.manual_seed(0)
    tokens = torch.randint(0, 5000, (4, 65))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    loss = model(inputs, positions_of(inputs), targets=targets).objective / targets.numel()
    # ln v plus half the variance of the logits, which are of deviation 1/2 untied and ln(v)/(2 sqrt(m)) tied
    assert math.log(5000) - 0.05 < loss.item() < math.log(5000) + 0.35


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    config = tiny()
    a = initial_weight("blocks.1.attention.wq", config, 0)
    assert torch.equal(a, initial_weight("blocks.1.attention.wq", config, 0))
    assert not torch.equal(a, initial_weight("blocks.2.attention.wq", config, 0))
    assert not torch.equal(a, initial_weight("blocks.1.attention.wq", config, 1))
    assert (initial_weight("blocks.0.attention_norm.gain", config, 0) == 1).all()


def test_initial_gains() -> None:
    mla = MlaConfig(d_latent=256, d_query_latent=384, d_nope=48, d_rope=64, d_value=64)
    for config, exponents in (
        (tiny(d_model=512, d_ff=768, n_heads=8), {"wq": 0, "wk": 0, "wv": 1 / 2, "wo": 1 / 2}),
        # the norm of a latent undoes the scale of the projection into it
        (
            tiny(d_model=512, d_ff=768, n_heads=8, mla=mla),
            {"wq_down": 0, "wq_up": 0, "wkv_down": 0, "wk_rope": 0, "wk_up": 0, "wv_up": 1 / 2, "wo": 1 / 2},
        ),
    ):
        assert config.branch_gain == pytest.approx(1 / 6)
        names = {f"attention.{name}": exponent for name, exponent in exponents.items()}
        names |= {f"feed_forward.{name}": 1 / 3 for name in ("w_gate", "w_up", "w_down")}
        for name, exponent in names.items():
            weight = initial_weight(f"blocks.0.{name}", config, 0)
            assert weight.std().item() * weight.shape[1] ** 0.5 == pytest.approx(6**-exponent, rel=0.03), name


def test_embedding_starts_the_stream_at_rms_one() -> None:
    model = build(tiny(d_model=96))
    x = model.embedding(torch.arange(97)[None])
    assert x.square().mean().sqrt().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("residual", ["deepnorm", "prenorm"])
@pytest.mark.parametrize("backend", ["reference", "sdpa", "blocked"])
def test_document_leakage(kind: str, residual: str, backend: Backend) -> None:
    model = build(tiny(residual=residual, **KINDS[kind]), backend)
    torch.manual_seed(1)
    tokens = torch.randint(0, 97, (1, 60))
    positions = torch.cat([torch.arange(25), torch.arange(35)])[None]
    cu_seqlens = torch.tensor([0, 25, 60], dtype=torch.int32)
    packed = model(tokens, positions, cu_seqlens)
    changed = tokens.clone()
    changed[0, :25] = (tokens[0, :25] + 1) % 97
    assert torch.equal(model(changed, positions, cu_seqlens)[:, 25:], packed[:, 25:])
    assert not torch.allclose(model(changed, positions, cu_seqlens)[:, :25], packed[:, :25])
    # and a document in a row is what it is alone, positions and log n included
    alone = model(tokens[:, 25:], positions[:, 25:])
    assert torch.allclose(packed[:, 25:], alone, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["reference", "sdpa", "blocked"])
def test_future_changes_nothing_past_and_a_row_is_alone(kind: str, backend: Backend) -> None:
    model = build(tiny(**KINDS[kind]), backend, torch.float64)
    torch.manual_seed(2)
    tokens = torch.randint(0, 97, (3, 40))
    logits = model(tokens, positions_of(tokens))
    changed = tokens.clone()
    changed[:, 20:] = 0
    assert torch.allclose(model(changed, positions_of(tokens))[:, :20], logits[:, :20], atol=1e-13)
    for i in range(3):
        assert torch.allclose(model(tokens[[i]], positions_of(tokens[[i]])), logits[[i]], atol=1e-13)


def right_padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@torch.no_grad()
def decode(model: Decoder, rows: list[Tensor], prompts: list[int], part: int) -> list[Tensor]:
    """The logits of every token of each row: prompts in one batch, `part` at a time, then one by one."""
    caches = [Cache() for _ in model.blocks]
    lengths = torch.tensor(prompts)
    longest, n_steps = max(prompts), min(len(row) - n for row, n in zip(rows, prompts))
    padded = right_padded([row[:n] for row, n in zip(rows, prompts)])
    parts = []
    for low in range(0, longest, part):
        positions = torch.arange(low, min(low + part, longest)).expand(len(rows), -1)
        parts.append(model(padded[:, low : low + part], positions, caches=caches, n_positions=min(low + part, longest)))
    whole = torch.cat(parts, dim=1)
    logits = [list(whole[i, :n]) for i, n in enumerate(prompts)]
    for step in range(n_steps):
        tokens = torch.stack([row[n + step] for row, n in zip(rows, prompts)])[:, None]
        out = model(tokens, (lengths + step)[:, None], caches=caches, n_positions=longest + step + 1)
        for kept, new in zip(logits, out[:, 0]):
            kept.append(new)
    return [torch.stack(kept) for kept in logits]


OTHER_SCALES: list[dict[str, Any]] = [
    dict(attention=AttentionConfig(similarity="key_norm")),
    dict(attention=AttentionConfig(similarity="cosine")),
    dict(attention=AttentionConfig(scale="log_n_clipped", log_n_base=30)),
    KINDS["mla"] | dict(attention=AttentionConfig(scale="gradient_max")),
    dict(
        attention=AttentionConfig(scale="constant"),
        rope=RopeConfig(base=1e3, context=128, extension="yarn", trained_context=64),
    ),
]


@pytest.mark.parametrize("changes", VARIANTS + OTHER_SCALES, ids=str)
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_cached_decoding_equals_the_whole_row(changes: dict[str, Any], backend: Backend) -> None:
    model = build(tiny(**changes), backend)
    torch.manual_seed(3)
    # prompts of different lengths, one of a single token, in parts that end inside and outside of them; one row goes on
    # to twice the 64 tokens that the base was chosen for, and another passes them token by token
    rows, prompts = [torch.randint(0, 97, (n,)) for n in (130, 26, 75)], [105, 1, 50]
    for row, logits in zip(rows, decode(model, rows, prompts, part=17), strict=True):
        whole = model(row[None], positions_of(row[None]))[0]
        assert len(logits) == len(row) and (logits - whole).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["mla", "mla with whole queries"])
@pytest.mark.parametrize("scale", ["log_n", "constant"])
def test_absorbed_equals_plain_latent_attention(kind: str, scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = AttentionConfig(scale=scale)  # type: ignore[arg-type]
    model = build(tiny(attention=attention, **KINDS[kind]), dtype=torch.float64)
    torch.manual_seed(4)
    rows, prompts = [torch.randint(0, 97, (n,)) for n in (90, 80)], [33, 20]
    outputs, calls = [], 0
    absorbed = LatentAttention._absorbed

    def counted(self: LatentAttention, *arguments: object) -> Tensor:
        nonlocal calls
        calls += 1
        return absorbed(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(LatentAttention, "_absorbed", counted)
    for is_absorbed in (True, False):
        monkeypatch.setattr(decoder, "is_absorbed_cheaper", lambda *_, answer=is_absorbed: answer)
        outputs.append(decode(model, rows, prompts, part=16))
        # in three layers, two parts and 57 tokens; not the first part, and none in the second round
        assert calls == 3 * (2 + 57)
    for a, b in zip(*outputs):
        assert 0 < (a - b).abs().max() <= 1e-10


def test_the_absorbed_form_is_for_few_queries() -> None:
    assert all(is_absorbed_cheaper(MlaConfig(), 1, n) for n in (2, 100, 100_000))
    assert not any(is_absorbed_cheaper(MlaConfig(), 512, n) for n in (512, 4096, 100_000))


def llama_of(model: Decoder) -> torch.nn.Module:
    """The same weights in transformers' Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    other = LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_groups, head_dim=c.head_width, rope_theta=c.rope.base,
        rms_norm_eps=c.norm_eps, tie_word_embeddings=False, attn_implementation="eager",
    )).double()  # fmt: skip
    own = dict(model.named_parameters())
    names = common_names(c, own)
    for i in range(c.n_layers):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        names |= {f"{theirs}self_attn.{x}_proj.weight": own[f"{ours}attention.w{x}"] for x in "qkvo"}
    other.load_state_dict(names)
    return other


def common_names(config: ResolvedModel, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights outside attention, by the names that both models of transformers give them."""
    names = {
        "model.embed_tokens.weight": own["embedding.weight"] * config.embed_scale,
        "model.norm.weight": own["norm.gain"],
        "lm_head.weight": own["head.weight"],
    }
    for i in range(config.n_layers):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        names |= {f"{theirs}mlp.{x}_proj.weight": own[f"{ours}feed_forward.w_{x}"] for x in ("gate", "up", "down")}
        names[f"{theirs}input_layernorm.weight"] = own[f"{ours}attention_norm.gain"]
        names[f"{theirs}post_attention_layernorm.weight"] = own[f"{ours}feed_forward_norm.gain"]
    return names


def deepseek_of(model: Decoder) -> torch.nn.Module:
    """The same weights in transformers' DeepSeek-V3, all layers dense."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    c, mla = model.config, model.config.mla
    assert mla is not None
    other = DeepseekV3ForCausalLM(DeepseekV3Config(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_heads, q_lora_rank=mla.d_query_latent,
        kv_lora_rank=mla.d_latent, qk_nope_head_dim=mla.d_nope, qk_rope_head_dim=mla.d_rope, v_head_dim=mla.d_value,
        first_k_dense_replace=c.n_layers, rope_theta=c.rope.base, rope_scaling=None, rms_norm_eps=c.norm_eps,
        rope_interleave=False, tie_word_embeddings=False, attn_implementation="eager",
    )).double()  # fmt: skip
    own = dict(model.named_parameters())
    names = common_names(c, own)
    for i in range(c.n_layers):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        mine = {name: own[f"{ours}attention.{name}"] for name in ("wkv_down", "wk_rope", "wk_up", "wv_up", "wo")}
        up = [mine[name].view(c.n_heads, -1, mla.d_latent) for name in ("wk_up", "wv_up")]
        names |= {
            f"{theirs}self_attn.kv_a_proj_with_mqa.weight": torch.cat([mine["wkv_down"], mine["wk_rope"]]),
            f"{theirs}self_attn.kv_a_layernorm.weight": own[f"{ours}attention.kv_norm.gain"],
            f"{theirs}self_attn.kv_b_proj.weight": torch.cat(up, dim=1).flatten(0, 1),
            f"{theirs}self_attn.o_proj.weight": mine["wo"],
        }
        if mla.d_query_latent:
            names |= {
                f"{theirs}self_attn.q_a_proj.weight": own[f"{ours}attention.wq_down"],
                f"{theirs}self_attn.q_a_layernorm.weight": own[f"{ours}attention.q_norm.gain"],
                f"{theirs}self_attn.q_b_proj.weight": own[f"{ours}attention.wq_up"],
            }
        else:
            names[f"{theirs}self_attn.q_proj.weight"] = own[f"{ours}attention.wq"]
    other.load_state_dict(names)
    return other


@pytest.mark.parametrize("kind", ["gqa", "mha", "mqa", "mla", "mla with whole queries"])
def test_equals_the_implementation_of_transformers(kind: str) -> None:
    config = tiny(residual="prenorm", attention=AttentionConfig(scale="constant"), **KINDS[kind])
    model = build(config, dtype=torch.float64)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("gain"):
                p.copy_(0.5 + torch.rand_like(p))
    tokens = torch.randint(0, 97, (2, 60))
    other = (deepseek_of if config.mla else llama_of)(model)
    with torch.no_grad():
        ours, theirs = model(tokens, positions_of(tokens)), other(tokens).logits
    assert ours.std() > 0.1
    # both rotate with float32 cosines, which they compute differently; the weights of attention are of order one
    assert (ours - theirs).abs().max() < 2e-6


def probe_accuracy(with_bos: bool, length: int, n_steps: int) -> float:
    """Train on 0, 0, 0, ... -> 1, 2, 3, ... and return the share of positions that come out right."""
    config = resolve(
        ModelConfig(vocab_size=length + 2, d_model=64, n_layers=2, n_heads=4, d_ff=128, rope=RopeConfig(base=1e4)),
        "adamw",
        length,
    )
    model = build(config, "blocked")
    zeros, counted = torch.zeros(1, length, dtype=torch.long), torch.arange(1, length + 1)[None]
    tokens = torch.cat([torch.full((1, 1), length + 1), zeros], dim=1) if with_bos else zeros
    targets = torch.cat([torch.full((1, 1), IGNORED), counted], dim=1) if with_bos else counted
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step in range(n_steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 50) * (1 - step / n_steps)
        (model(tokens, positions_of(tokens), targets=targets).objective / length).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        right = (model(tokens, positions_of(tokens)).argmax(-1) == targets) & (targets != IGNORED)
    return right.sum().item() / length


@pytest.mark.slow
def test_only_a_special_token_lets_attention_count() -> None:
    # 9105 (URPE): softmax weights sum to 1, so with equal values every position gets the same output; BOS breaks it
    assert probe_accuracy(True, length=32, n_steps=300) > 0.95
    assert probe_accuracy(False, length=32, n_steps=300) <= 1 / 32


def test_log_n_changes_the_logits_only_beyond_one_key() -> None:
    tokens = torch.randint(0, 97, (1, 30))
    outputs = [
        build(tiny(attention=AttentionConfig(scale=s)))(tokens, positions_of(tokens))  # type: ignore[arg-type]
        for s in ("log_n", "constant")
    ]
    assert torch.allclose(outputs[0][:, 0], outputs[1][:, 0], atol=1e-6)
    assert not torch.allclose(outputs[0][:, 5:], outputs[1][:, 5:], atol=1e-3)


def attention_of(model: Decoder) -> GroupedQueryAttention | LatentAttention:
    """The attention of its second block."""
    block = model.blocks[1]
    assert isinstance(block, Block)
    return block.attention


SCALES = {  # what multiplies q.k / sqrt(d), or a cosine, at n visible keys
    ("log_n", "dot"): lambda n, d: math.log(max(n, 16)) / math.log(512) / d**0.5,
    ("log_n_clipped", "dot"): lambda n, d: max(1, math.log(n) / math.log(64)) / d**0.5,
    ("constant", "dot"): lambda n, d: d**-0.5,
    ("gradient_max", "dot"): lambda n, d: 0.84 * math.log(max(n, 16)) ** 0.5 / d**0.5,
    ("gradient_max_constant", "dot"): lambda n, d: 2.5 / d**0.5,
    ("constant", "key_norm"): lambda n, d: 1.0,
    ("log_n", "key_norm"): lambda n, d: math.log(max(n, 16)) / math.log(512),
    ("log_n", "cosine"): lambda n, d: 4 * math.log(max(n, 16)),
    ("constant", "cosine"): lambda n, d: 4 * math.log(32),
}


# with MLA the config refuses any similarity but dot
SCALED = [
    (kind, *names)
    for kind in ("gqa", "partly rotated", "mla", "mla with whole queries")
    for names in SCALES
    if names[1] == "dot" or "mla" not in kind
]


@pytest.mark.parametrize(("kind", "scale", "similarity"), SCALED, ids=str)
def test_scores_are_the_formulas(kind: str, scale: str, similarity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(attention=AttentionConfig(scale=scale, similarity=similarity), **KINDS[kind])  # type: ignore[arg-type]
    model = build(config, dtype=torch.float64)
    torch.manual_seed(6)
    x, positions = torch.randn(1, 90, 48, dtype=torch.float64), torch.arange(90)[None]
    seen: list[Tensor] = []

    def mix(model: Decoder) -> None:
        layer = attention_of(model)
        q, k, v = layer.project(x, model.rotary(positions, 90))
        layer.mix(q, k, v, layout)

    def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, scale: float) -> Tensor:
        seen.append(scale * torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)))
        return q.new_zeros(*q.shape[:3], v.shape[3])

    layout = Layout(positions, None, backend="reference", dtype=torch.float64)
    monkeypatch.setattr(decoder, "attend_shared", attend)
    mix(model)
    # the same attention with neither factor nor normalisation, which are put in by hand
    plain_config = tiny(attention=AttentionConfig(scale="constant"), **KINDS[kind])
    plain = build(plain_config, dtype=torch.float64)
    with torch.no_grad():
        for p, own in zip(plain.parameters(), model.parameters()):
            p.copy_(own)
    vectors: list[Tensor] = []

    def keep(q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, scale: float) -> Tensor:
        vectors.extend([q, k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)])
        return q.new_zeros(*q.shape[:3], v.shape[3])

    monkeypatch.setattr(decoder, "attend_shared", keep)
    mix(plain)
    q, k = vectors
    if similarity != "dot":
        k = k / k.norm(dim=-1, keepdim=True)
    if similarity == "cosine":
        q = q / q.norm(dim=-1, keepdim=True)
    factor = torch.tensor([SCALES[scale, similarity](t + 1, config.head_width) for t in range(90)]).double()
    expected = torch.einsum("bthd,bshd->bhts", q, k) * factor[:, None]
    # cosines, sines and factors are float32
    assert torch.allclose(seen[0], expected, rtol=0, atol=2e-6 * expected.abs().max().item())


def test_gradients_reach_every_parameter() -> None:
    for changes in VARIANTS:
        model = build(tiny(**changes), "blocked")
        tokens = torch.randint(0, 97, (2, 40))
        model(tokens, positions_of(tokens), targets=tokens).objective.backward()
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_bfloat16_rotary_tables_stay_float32() -> None:
    model = build(tiny(), dtype=torch.bfloat16)
    tokens = torch.randint(0, 97, (1, 8))
    assert model(tokens, positions_of(tokens)).dtype == torch.float32
    assert model.rotary(positions_of(tokens), 8).query.dtype == torch.float32
    assert not any("rotary" in name for name, _ in [*model.named_parameters(), *model.named_buffers()])


# --- what a layer of configs/1b.yaml costs --------------------------------------------------------------------------


def kept_and_launched() -> tuple[dict[str, float], int]:
    """Of one compiled layer in bf16: bytes that it keeps a token for its backward pass, and the kernels it launches."""
    torch.manual_seed(0)
    config, n = resolve_config(load_config("configs/1b.yaml")).model, 128
    model = Decoder(dataclasses.replace(config, n_layers=1, vocab_size=8), "sdpa").to(torch.bfloat16)
    model.compile_parts()
    block, x = model.blocks[0], torch.randn(1, n, config.d_model, dtype=torch.bfloat16, requires_grad=True)
    for p in block.parameters():
        nn.init.normal_(p, std=0.02)
    positions = torch.arange(n)[None]
    rotary, layout = model.rotary(positions, n), Layout(positions, None, backend="sdpa", dtype=torch.bfloat16)
    # weights are no activations, and all layers share the rotary tables
    not_ours = [*block.parameters(), *(t for t in rotary if t is not None)]
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    def both_passes() -> None:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = block(x, rotary, layout, None)
        y.backward(torch.ones_like(y))

    n_bytes: dict[str, float] = {}
    with torch._inductor.config.patch(force_disable_caches=True):  # or there is no code to look at
        _, codes = run_and_get_code(both_passes)
    for recompute in RECOMPUTE:
        model.set_recompute(recompute)
        both_passes()
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        for t in not_ours:
            sizes.pop(t.untyped_storage().data_ptr(), None)
        n_bytes[recompute] = sum(sizes.values()) / n
    calls = [re.findall(r"^ +(?:cpp_fused\w*|extern_kernels\.\w+)\(", code, re.MULTILINE) for code in codes]
    return n_bytes, sum(map(len, calls))


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="needs g++")
def test_a_compiled_layer_keeps_and_launches_little() -> None:
    """Kept in bf16: 6 tensors of width d_model (the input, what attention gave, and before and after each norm, where
    the last is the next layer's), queries, keys and values, and of width d_ff gate, up and their product."""
    ((n_bytes, n_kernels),) = run_on_ranks(1, kept_and_launched)
    config = load_config("configs/1b.yaml")
    for recompute, kept in n_bytes.items():
        assert kept == pytest.approx(kept_of_layer(config, True, recompute)[0], rel=1e-3), (recompute, n_bytes)
    assert n_bytes["none"] - n_bytes["product"] == 2 * 5632
    assert 20 < n_kernels + 2 <= 40, n_kernels  # with attention's own


def graphs_of_fifty_steps(kinds: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """The graphs that the compiler makes of the blocks, and its breaks, over rows of one to seven documents."""
    found = []
    for kind in kinds:
        torch._dynamo.reset()
        counters = torch._dynamo.utils.counters
        counters.clear()
        model, generator = build(tiny(**kind), "blocked"), torch.Generator().manual_seed(0)
        model.compile_parts()
        for step in range(50):
            is_start = torch.zeros(2, 32, dtype=torch.bool)
            is_start[:, 0] = True
            for row in is_start:
                row[1 + torch.randperm(31, generator=generator)[: step % 7]] = True
            index = torch.arange(32)
            ends = torch.tensor([*is_start.flatten().nonzero().flatten().tolist(), 64], dtype=torch.int32)
            tokens = torch.randint(0, 97, (2, 32), generator=generator)
            positions = index - (index * is_start).cummax(1).values
            model.hidden(tokens, positions, ends if step % 7 else None).square().mean().backward()
        found.append((counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="needs g++")
def test_two_graphs_serve_all_layers_and_any_number_of_documents() -> None:
    kinds = [KINDS["gqa"], KINDS["mla"] | dict(residual="prenorm")]
    assert run_on_ranks(1, graphs_of_fifty_steps, kinds) == [[(2, 0), (2, 0)]]
