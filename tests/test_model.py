"""The decoder: its axis table, its start, its recipes, and what one token may know of another."""

import math

import pytest
import torch

from megakexue.config import AttentionConfig, ModelConfig, RopeConfig
from megakexue.export import parameter_names
from megakexue.model import AXES, Decoder, KVCache, axes, deepnorm_scales, initial_weight, resolve, shape


def tiny(**changes: object) -> ModelConfig:
    values: dict = dict(vocab_size=97, d_model=48, n_layers=3, n_heads=6, n_kv_heads=2, d_ff=80)
    return resolve(ModelConfig(**(values | changes)), "adamw", 64)


def build(config: ModelConfig, backend: str = "reference", dtype: torch.dtype = torch.float32) -> Decoder:
    model = Decoder(config, backend).to(dtype)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(initial_weight(name, config, 0))
    return model


VARIANTS = [
    dict(residual=r, tie_embeddings=t, n_kv_heads=g, d_head=d)
    for r in ("deepnorm", "prenorm") for t in (False, True) for g, d in ((2, None), (6, 10), (1, 10))
]  # fmt: skip


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_axis_table_covers_every_parameter_and_matches_its_shape(changes: dict) -> None:
    config = tiny(**changes)
    parameters = dict(Decoder(config, "reference").named_parameters())
    assert {name: tuple(p.shape) for name, p in parameters.items()} == {
        name: shape(name, config) for name in parameters
    }
    assert sorted(parameters) == sorted(parameter_names(config))
    assert {axes(name).role for name in parameters} == {"matrix", "embedding", "gain"}
    assert all(letter in "vmhgdefr" for table in AXES.values() for letter in table.out + table.contracted)


def positions_of(tokens: torch.Tensor) -> torch.Tensor:
    return torch.arange(tokens.shape[1]).expand_as(tokens)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_first_loss_is_that_of_a_uniform_guess(changes: dict) -> None:
    config = tiny(vocab_size=5000, **changes)
    model = build(config)
    torch.manual_seed(0)
    tokens = torch.randint(0, 5000, (4, 65))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    loss = model(inputs, positions_of(inputs), targets=targets) / targets.numel()
    # ln v plus half the variance of the logits, which are of deviation 1/2 untied and ln(v)/(2 sqrt(m)) tied
    assert math.log(5000) - 0.05 < loss.item() < math.log(5000) + 0.35


def test_deepnorm_table() -> None:
    # science table of DeepNet for decoders and of 8978, at M = 12 and 1000
    assert deepnorm_scales("paper", 12) == pytest.approx((2.213364, 0.319472), abs=1e-6)
    assert deepnorm_scales("paper", 1000) == pytest.approx((6.687403, 0.105737), abs=1e-6)
    assert deepnorm_scales("lamb", 12) == pytest.approx((1, 0.204124), abs=1e-6)
    assert deepnorm_scales("adam", 32) == pytest.approx((8, 0.125), abs=1e-6)
    assert deepnorm_scales("sgd", 8) == pytest.approx((2, 0.5), abs=1e-6)
    alpha, gain = deepnorm_scales("adam", 7)
    assert gain / alpha == pytest.approx(1 / 14)  # Adam's condition


def test_resolved_scales_are_numbers_and_given_ones_are_kept() -> None:
    config = tiny(embed_scale=3.0, logit_scale=0.1, residual_alpha=1.5, rope=RopeConfig(base=9000, context=128))
    assert (config.embed_scale, config.logit_scale, config.residual_alpha) == (3.0, 0.1, 1.5)
    assert config.rope == RopeConfig(base=9000.0, context=128)
    default = tiny()
    assert isinstance(default.rope.base, float) and default.rope.context == 64
    assert default.residual_alpha == pytest.approx(6**0.5) and default.branch_gain == pytest.approx(1 / 6)
    assert resolve(default, "adamw", 9999) == default


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    config = tiny()
    a = initial_weight("blocks.1.attention.wq", config, 0)
    assert torch.equal(a, initial_weight("blocks.1.attention.wq", config, 0))
    assert not torch.equal(a, initial_weight("blocks.2.attention.wq", config, 0))
    assert not torch.equal(a, initial_weight("blocks.1.attention.wq", config, 1))
    assert (initial_weight("blocks.0.attention_norm.gain", config, 0) == 1).all()


def test_initial_gains() -> None:
    config = tiny(d_model=512, d_ff=768, n_heads=8)
    assert config.branch_gain is not None
    for name, exponent in (("attention.wq", 0), ("attention.wv", 1 / 2), ("attention.wo", 1 / 2),
                           ("feed_forward.w_gate", 1 / 3), ("feed_forward.w_down", 1 / 3)):  # fmt: skip
        weight = initial_weight(f"blocks.0.{name}", config, 0)
        assert weight.std().item() * weight.shape[1] ** 0.5 == pytest.approx(config.branch_gain**exponent, rel=0.02)


def test_embedding_starts_the_stream_at_rms_one() -> None:
    model = build(tiny(d_model=96))
    x = model.embedding(torch.arange(97)[None])
    assert x.square().mean().sqrt().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("residual", ["deepnorm", "prenorm"])
@pytest.mark.parametrize("backend", ["reference", "sdpa", "blocked"])
def test_document_leakage(residual: str, backend: str) -> None:
    model = build(tiny(residual=residual), backend)
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


@pytest.mark.parametrize("backend", ["reference", "sdpa", "blocked"])
def test_future_changes_nothing_past_and_a_row_is_alone(backend: str) -> None:
    model = build(tiny(), backend, torch.float64)
    torch.manual_seed(2)
    tokens = torch.randint(0, 97, (3, 40))
    logits = model(tokens, positions_of(tokens))
    changed = tokens.clone()
    changed[:, 20:] = 0
    assert torch.allclose(model(changed, positions_of(tokens))[:, :20], logits[:, :20], atol=1e-13)
    for i in range(3):
        assert torch.allclose(model(tokens[[i]], positions_of(tokens[[i]])), logits[[i]], atol=1e-5)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_cached_decoding_equals_the_whole_row(changes: dict) -> None:
    config = tiny(**changes)
    model = build(config)
    torch.manual_seed(3)
    tokens = torch.randint(0, 97, (2, 50))
    whole = model(tokens, positions_of(tokens))
    caches = [KVCache() for _ in model.blocks]
    pieces, start = [], 0
    for n in (7, 1, 1, 20, 1, 20):
        part = slice(start, start + n)
        pieces.append(model(tokens[:, part], positions_of(tokens)[:, part], caches=caches, n_positions=50))
        start += n
    assert torch.allclose(torch.cat(pieces, dim=1), whole, atol=1e-5)


def test_log_n_changes_the_logits_only_beyond_one_key() -> None:
    tokens = torch.randint(0, 97, (1, 30))
    outputs = [
        build(tiny(attention=AttentionConfig(scale=s)))(tokens, positions_of(tokens))  # type: ignore[arg-type]
        for s in ("log_n", "constant")
    ]
    assert torch.allclose(outputs[0][:, 0], outputs[1][:, 0], atol=1e-6)
    assert not torch.allclose(outputs[0][:, 5:], outputs[1][:, 5:], atol=1e-3)


def test_gradients_reach_every_parameter() -> None:
    for changes in VARIANTS:
        model = build(tiny(**changes), "blocked")
        tokens = torch.randint(0, 97, (2, 40))
        model(tokens, positions_of(tokens), targets=tokens).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_bfloat16_rotary_tables_stay_float32() -> None:
    model = build(tiny(), dtype=torch.bfloat16)
    tokens = torch.randint(0, 97, (1, 8))
    assert model(tokens, positions_of(tokens)).dtype == torch.float32
    tables = model.rotary(positions_of(tokens), 8)
    assert tables.dtype == torch.float32
    assert not any("rotary" in name for name, _ in [*model.named_parameters(), *model.named_buffers()])
