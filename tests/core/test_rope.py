"""Notes on a base, the frequencies of the extensions, the query's factor, the tables and the rotation."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from megakexue.config import (
    AttentionConfig,
    MlaConfig,
    ModelConfig,
    ResolvedModel,
    ResolvedRope,
    RopeConfig,
    UserError,
)
from megakexue.core.bases import first_violation, safe_base
from megakexue.core.resolve import resolve
from megakexue.core.rope import (
    Rotary,
    RotaryTables,
    base_notes,
    frequencies,
    log_n_factor,
    query_factor,
    rotate,
    temperature,
)


def model(d_head: int = 128, rope: RopeConfig | None = None, **changes: Any) -> ResolvedModel:
    """A resolved config of one head of the given width."""
    sizes = {"vocab_size": 8, "d_model": d_head, "n_layers": 1, "n_heads": 1, "d_ff": 8}
    config = ModelConfig(**sizes, rope=rope or RopeConfig(), **changes)  # type: ignore[arg-type]
    return resolve(config, "adamw", 4096)


def extended(extension: Any, k: float = 8, base: float = 1e4, **changes: Any) -> ResolvedRope:
    """An extension from 1024 tokens to k times as many."""
    return ResolvedRope(extension=extension, base=base, trained_context=1024, context=int(1024 * k), **changes)


# --- notes on a base --------------------------------------------------------------------------------------------------


def test_notes_on_a_base() -> None:
    def notes(context: int, **changes: Any) -> list[str]:
        d_head, mla = changes.pop("d_head", 128), changes.pop("mla", None)
        return base_notes(model(d_head, RopeConfig(context=context, **changes), mla=mla))

    assert notes(4096, base=58800.0) == notes(1707, base=1e4) == []
    assert notes(4096, base=1e4) == [
        "WARNING: model.rope.base=10000 violates the bound rule (10122) at 1707 of 4096 tokens: f(1707) = -0.499 is "
        "the first below 0; model.rope.base=58800 satisfies it"
    ]
    assert notes(1708, base=1e4)[0].endswith(
        "; tools/rope_base.py --d-rotary 128 --context 1708 finds one that satisfies it"
    )
    assert notes(4096, base=1e4, extension="base", trained_context=1024) == notes(4096, base=1e4)

    # 48 unrotated pairs outweigh the 16 rotated ones
    vacuous = (
        "RoPE rotates 32 of a head's 128 dimensions: with half or more of them unrotated every base satisfies the "
        "bound rule (10122); model.rope.base=auto applies it to the rotated part alone"
    )
    remark = (
        "model.rope.base=10000 violates the bound rule (10122) for the rotated part alone, which is stricter, at 474 "
        "of 1024 tokens: f(474) = -0.551 is the first below 0; model.rope.base=153000 satisfies it"
    )
    assert notes(1024, base=1e4, fraction=0.25) == notes(1024, base=1e4, mla=MlaConfig()) == [vacuous, remark]
    assert notes(1024, base=153000.0, fraction=0.25) == [vacuous]

    # 16 unrotated pairs: the rule of the head is weaker than that of its rotated part
    (remark,) = notes(1024, base=5000.0, fraction=0.75)
    assert remark.startswith("model.rope.base=5000 violates the bound rule (10122) for the rotated part alone, ")
    (warning,) = notes(1024, base=390.4, fraction=0.75)
    m = first_violation(390.4, 96, 1024, 16)
    assert warning.startswith(
        f"WARNING: model.rope.base=390.4 violates the bound rule (10122) at {m} of 1024 tokens: f({m}) = -"
    )
    assert warning.endswith(f"; model.rope.base={safe_base(96, 1024):.10g} satisfies it")


def test_notes_on_an_extension_are_of_its_own_frequencies() -> None:
    # base k is too small a base for k times the context, as 9675 says: it works up to about half of it
    rope = extended("ntk", k=8, base=6020.0)
    m = first_violation(6020.0 * 8, 128, 8192)
    assert m == 4482
    assert base_notes(model(rope=rope)) == [
        "model.rope.extension=ntk from 1024 tokens violates the bound rule (10122) at 4482 of 8192 tokens: "
        "f(4482) = -0.107 is the first below 0; model.rope.extension=base with a new base can satisfy it, after "
        "finetuning"
    ]
    # interpolation is the same sum in smaller steps
    assert base_notes(model(rope=extended("interpolate", base=6100.0))) == []


# --- frequencies ------------------------------------------------------------------------------------------------------

PAIR = np.arange(64)
THETA = 1e4 ** (-2 * PAIR / 128)


def test_plain_frequencies() -> None:
    for rope in (ResolvedRope(base=1e4, context=4096), ResolvedRope(base=10000, context=4096), extended("base")):
        assert frequencies(rope, 128) == pytest.approx(THETA, rel=1e-14)
        assert frequencies(rope, 128).dtype == np.float64


def test_interpolation_is_the_same_angle_at_the_stretched_position() -> None:
    theta = frequencies(extended("interpolate"), 128)
    assert 8 * 1000 * theta == pytest.approx(1000 * THETA, rel=1e-14)


def test_ntk() -> None:
    # 9675: theta_m = n / (beta lambda)^(m-1), beta = 10000^(2/d), lambda = k^(2/d)
    theta = frequencies(extended("ntk"), 128)
    assert theta == pytest.approx((1e4 ** (2 / 128) * 8 ** (2 / 128)) ** -PAIR.astype(float), rel=1e-13)
    assert theta[0] == 1
    assert theta[-1] > THETA[-1] / 8
    exact = frequencies(extended("ntk_exact"), 128)
    assert exact == pytest.approx((1e4 ** (2 / 128) * 8 ** (2 / 126)) ** -PAIR.astype(float), rel=1e-13)
    assert (exact[0], exact[-1]) == (1, pytest.approx(THETA[-1] / 8, rel=1e-14))
    with pytest.raises(UserError, match=r"ntk_exact needs a rotary width above 2: use interpolate"):
        frequencies(extended("ntk_exact"), 2)


def test_ntk_mixed() -> None:
    # 9706 with exponent 1: NTK-fixed, n / (lambda (beta lambda)^(m-1)) for the digits m = 1 ... d/2
    beta, scale = 1e4 ** (2 / 128), 8 ** (2 / 128)
    fixed = frequencies(extended("ntk_mixed", ntk_mixed_exponent=1.0), 128)
    assert fixed == pytest.approx(1 / (scale * (beta * scale) ** PAIR), rel=1e-13)
    # towards exponent 0: interpolation
    near = frequencies(extended("ntk_mixed", ntk_mixed_exponent=1e-9), 128)
    assert near == pytest.approx(frequencies(extended("interpolate"), 128), rel=1e-7)
    # the article's own exponent: a (d/2)^0.625 = ln k
    mixed = frequencies(extended("ntk_mixed"), 128)
    a = math.log(8) / 64**0.625
    assert mixed == pytest.approx(THETA / np.exp(a * (PAIR + 1) ** 0.625), rel=1e-13)
    assert mixed[-1] == pytest.approx(THETA[-1] / 8, rel=1e-14)


def test_yarn() -> None:
    # 9948: pairs of more than 32 turns in the trained context are kept, of less than one interpolated
    theta, turns = frequencies(extended("yarn"), 128), THETA * 1024 / (2 * math.pi)
    kept, interpolated = turns > 32, turns < 1
    assert 0 < kept.sum() and 0 < interpolated.sum() and (~kept & ~interpolated).sum() > 5
    assert theta[kept] == pytest.approx(THETA[kept], rel=1e-14)
    assert theta[interpolated] == pytest.approx(THETA[interpolated] / 8, rel=1e-14)
    share = (turns - 1) / 31
    between = ~kept & ~interpolated
    assert theta[between] == pytest.approx((THETA * (share + (1 - share) / 8))[between], rel=1e-13)
    assert (np.diff(theta) < 0).all()


def test_yarn_agrees_with_transformers_at_both_ends() -> None:
    # its ramp between the ends is linear in the pair's index instead of its turns, and its ends may be rounded outwards
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    scaling = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 1024, "truncate": False}
    config = LlamaConfig(
        hidden_size=128, num_attention_heads=1, head_dim=128, rope_theta=1e4, max_position_embeddings=8192,
        rope_scaling=scaling,
    )  # fmt: skip
    theirs, factor = rope_utils.ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    turns = THETA * 1024 / (2 * math.pi)
    ends = (turns > 32) | (turns < 1)
    ours = frequencies(extended("yarn"), 128)
    assert ours[ends] == pytest.approx(theirs.numpy()[ends], rel=1e-5)  # float32
    assert factor**2 == pytest.approx(temperature(extended("yarn")), rel=1e-12)  # theirs is on query and key


def test_llama3_is_that_of_transformers() -> None:
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    for factor, slow, fast, base in ((8.0, 1.0, 4.0, 5e5), (32.0, 1.0, 4.0, 5e5), (8.0, 2.0, 50.0, 1e4)):
        scaling = {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": slow, "high_freq_factor": fast,
            "original_max_position_embeddings": 1024,
        }  # fmt: skip
        config = LlamaConfig(head_dim=128, rope_theta=base, max_position_embeddings=16384, rope_scaling=scaling)
        theirs, scale = rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        rope = extended("llama3", k=16, base=base, llama3_factor=factor, llama3_slow=slow, llama3_fast=fast)
        ours = frequencies(rope, 128)
        assert scale == 1 == temperature(rope)
        assert ours == pytest.approx(theirs.double().numpy(), rel=1e-6)  # theirs are float32
        divided = ours / frequencies(extended("base", base=base), 128)
        assert divided[0] == 1 and divided[-1] == pytest.approx(1 / factor, rel=1e-14)
        assert 3 < ((divided > 1 / factor + 1e-9) & (divided < 1)).sum() < 40
    # without a number, it is the stretch of the context
    chosen = model(rope=RopeConfig(base=1e4, extension="llama3", trained_context=1024, context=8192)).rope
    assert chosen.llama3_factor == 8


def test_longrope_is_that_of_transformers() -> None:
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    factors = (1 + np.arange(64) ** 1.5 / 30).tolist()
    scaling = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "factor": 1.0}
    config = LlamaConfig(head_dim=128, rope_theta=1e4, max_position_embeddings=8192, rope_scaling=scaling)
    theirs, scale = rope_utils.ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
    rope = extended("longrope", longrope_factors=factors)
    assert scale == 1 == temperature(rope)
    assert frequencies(rope, 128) == pytest.approx(theirs.double().numpy(), rel=1e-6)  # theirs are float32
    assert frequencies(rope, 128) == pytest.approx(THETA / factors, rel=1e-14)
    # the factors of the weights themselves: no longer context
    same = model(rope=RopeConfig(base=1e4, extension="longrope", trained_context=4096, longrope_factors=factors)).rope
    assert same.context == same.trained_context == 4096 and same.stretch == 1


def test_temperature() -> None:
    assert temperature(extended("yarn")) == pytest.approx((0.1 * math.log(8) + 1) ** 2, rel=1e-15)
    assert temperature(extended("yarn", yarn_temperature=True)) == temperature(extended("yarn"))
    for rope in (extended("yarn", yarn_temperature=False), extended("ntk"), model().rope):
        assert temperature(rope) == 1


# --- the query's factor -----------------------------------------------------------------------------------------------


def factors(n: list[int], rope: RopeConfig | None = None, **attention: Any) -> list[float]:
    config = model(rope=rope, attention=AttentionConfig(**attention))
    factor = query_factor(torch.tensor(n), config)
    assert factor.dtype == torch.float64
    return factor.tolist()


def test_log_n_factors() -> None:
    # 8823 with bert4keras's floor of 16; each doubling adds 1/9
    known = {1: 4 / 9, 16: 4 / 9, 17: 0.454163, 32: 0.555556, 64: 0.666667, 100: 0.738206, 128: 0.777778,
             256: 0.888889, 511: 0.999687, 512: 1, 513: 1.000313, 1000: 1.107309, 1024: 1.111111, 2048: 1.222222,
             4096: 1.333333, 8192: 1.444444, 16384: 1.555556, 32768: 1.666667, 65536: 1.777778,
             131072: 1.888889}  # fmt: skip
    n = torch.tensor(list(known))
    assert log_n_factor(n, 512, 16).tolist() == pytest.approx(list(known.values()), abs=1e-6)
    assert factors(list(known)) == log_n_factor(n, 512, 16).tolist()
    doubled = factors([1024, 2048])
    assert doubled[1] - doubled[0] == pytest.approx(1 / 9, abs=1e-15)
    assert factors([4, 8, 100], log_n_base=100, log_n_floor=8) == pytest.approx(
        [math.log(8) / math.log(100)] * 2 + [1], rel=1e-15
    )


def test_clipped_log_n_factors() -> None:
    # 9706, and Qwen's list: log(i, seq_length) if i > seq_length else 1
    n = [1, 2, 16, 2047, 2048, 2049, 4096, 32767]
    qwen = [math.log(i, 2048) if i > 2048 else 1 for i in n]
    position = torch.tensor(n) - 1
    rerope = ((position.double() + 1).log() / math.log(2048)).clip(1)
    for rope, base in (
        (RopeConfig(base=1e4, context=2048), None),
        (RopeConfig(base=1e4, context=8192), 2048.0),
        (RopeConfig(base=1e4, context=8192, extension="ntk", trained_context=2048), None),
    ):
        found = factors(n, rope, scale="log_n_clipped", log_n_base=base)
        assert found == pytest.approx(qwen, rel=1e-14)
        assert found == pytest.approx(rerope.tolist(), rel=1e-14)


def test_gradient_maximising_factors() -> None:
    # 9812: the alpha that maximises alpha (1 - e^(alpha^2) / n), for normal scores
    optima = {64: 1.549, 128: 1.711, 256: 1.864, 512: 2.008, 1024: 2.147, 2048: 2.279, 4096: 2.406, 8192: 2.528,
              20000: 2.678}  # fmt: skip
    alpha = np.linspace(0.5, 3, 25001)
    for n, optimum in optima.items():
        assert alpha[np.argmax(alpha * (1 - np.exp(alpha**2) / n))] == pytest.approx(optimum, abs=6e-4)
    found = factors(list(optima), scale="gradient_max")
    assert found == pytest.approx([0.84 * math.sqrt(math.log(n)) for n in optima], rel=1e-15)
    for n, factor in zip(optima, found, strict=True):
        # the article's fit is for long contexts: 11 % off at 64 tokens, 5 % from 512 on, 2 % from 4096 on
        assert factor == pytest.approx(optima[n], rel=0.11 if n < 512 else 0.05 if n < 4096 else 0.02)
    assert factors([1, 16], scale="gradient_max") == pytest.approx([0.84 * math.sqrt(math.log(16))] * 2)
    assert factors([1, 4], scale="gradient_max", log_n_floor=4) == pytest.approx([0.84 * math.sqrt(math.log(4))] * 2)
    assert factors([1, 9999], scale="gradient_max_constant") == [2.5, 2.5]


def test_constant_and_key_norm_factors() -> None:
    assert factors([1, 9999], scale="constant") == [1, 1]
    assert factors([1, 512], similarity="key_norm") == factors([1, 512])


def test_cosine_factors() -> None:
    rope = RopeConfig(base=1e4, context=8192)
    # 9859: 4 ln n, n the visible keys or half of the training length
    assert factors([1, 16, 4096], rope, similarity="cosine") == pytest.approx(
        [4 * math.log(16), 4 * math.log(16), 33.2711], abs=1e-4
    )
    # the latter is the softmax scale of a resolved config, so that a longer context does not change it
    assert factors([1, 4096], rope, similarity="cosine", scale="constant") == [1, 1]


def test_the_temperature_multiplies_the_factor() -> None:
    rope = extended("yarn")
    t = (0.1 * math.log(8) + 1) ** 2
    assert factors([1, 5], rope, scale="constant") == pytest.approx([t, t], rel=1e-15)
    both = extended("yarn", yarn_temperature=True)
    assert factors([512, 1024], both) == pytest.approx([t, t * 10 / 9], rel=1e-14)
    off = extended("yarn", yarn_temperature=False)
    assert factors([512, 1024], off) == pytest.approx([1, 10 / 9], rel=1e-14)


# --- tables and rotation ----------------------------------------------------------------------------------------------


def at(tables: RotaryTables, position: int) -> Any:
    return tables(torch.tensor([[position]]), 4096)


@pytest.mark.parametrize("scale", ["log_n", "log_n_clipped", "constant", "gradient_max", "gradient_max_constant"])
@pytest.mark.parametrize("fraction", [1.0, 0.75, 0.25])
def test_scores_depend_on_distance_and_the_visible_keys(scale: str, fraction: float) -> None:
    rope = RopeConfig(base=1e4, context=1000, fraction=fraction)
    config = model(32, rope, attention=AttentionConfig(scale=scale))  # type: ignore[arg-type]
    tables = RotaryTables(config)
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32)

    def score(t: int, s: int) -> float:
        query, key = at(tables, t), at(tables, s)
        rotated = rotate(q, query.query, query.factor) * rotate(k, key.key)
        return float(rotated.sum()) / query_factor(torch.tensor([t + 1]), config).item()

    assert abs(score(511, 461)) > 0.1
    for t, s in ((700, 650), (4000, 3950), (60, 10)):
        assert score(t, s) == pytest.approx(score(511, 461), rel=1e-4)


def test_rotation_equals_complex_multiplication_of_the_last_part() -> None:
    config = model(32, RopeConfig(base=100, context=64, fraction=0.5))
    tables, torch_x = RotaryTables(config), torch.randn(2, 3, 4, 32, dtype=torch.float64)
    positions = torch.tensor([[0, 5, 63], [7, 7, 1]])
    rotary = tables(positions, 64)
    x = torch_x.numpy()
    pairs = x[..., 16:24] + 1j * x[..., 24:]
    theta = 100.0 ** (-2 * np.arange(8) / 16)
    pairs = pairs * np.exp(1j * positions.numpy()[:, :, None, None] * theta)
    expected = np.concatenate([x[..., :16], pairs.real, pairs.imag], axis=-1)
    assert rotate(torch_x, rotary.key).numpy() == pytest.approx(expected, abs=5e-7)
    factor = query_factor(positions + 1, config).numpy()[:, :, None, None]
    assert rotate(torch_x, rotary.query, rotary.factor).numpy() == pytest.approx(expected * factor, abs=5e-7)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_rotation_rounds_once(fraction: float) -> None:
    rotary = RotaryTables(model(32, RopeConfig(base=100, context=64, fraction=fraction)))(torch.arange(9)[None], 9)
    x = torch.randn(1, 9, 2, 32)
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype)
        assert torch.equal(
            rotate(half, rotary.query, rotary.factor), rotate(half.float(), rotary.query, rotary.factor).to(dtype)
        )
        assert torch.equal(
            rotate(half, rotary.key)[..., : round(32 * (1 - fraction))], half[..., : round(32 * (1 - fraction))]
        )
    # float64 stays float64, so that growth can be shown exact
    exact, single = rotate(x.double(), rotary.key), rotate(x, rotary.key)
    assert exact.dtype == torch.float64 and not torch.equal(exact, single.double())


def test_gradients_reach_both_parts() -> None:
    rotary = RotaryTables(model(32, RopeConfig(base=100, context=64, fraction=0.5)))(torch.arange(5)[None], 5)
    x = torch.randn(1, 5, 1, 32, requires_grad=True)
    rotate(x, rotary.query, rotary.factor).square().sum().backward()
    assert x.grad is not None and rotary.factor is not None
    # a rotation keeps lengths, so the gradient is 2 factor^2 x
    torch.testing.assert_close(x.grad, 2 * rotary.factor[..., None, None] ** 2 * x.detach())


def test_table_at_a_far_position_is_exact_to_float32() -> None:
    # half-precision tables are off by whole radians here
    position = 131_071
    angles = position * 1e7 ** (-2 * np.arange(64) / 128)
    rotary = RotaryTables(model(rope=RopeConfig(base=1e7, context=131072)))(torch.tensor([[position]]), position + 1)
    assert rotary.query.dtype == rotary.key.dtype == torch.float32
    factor = math.log(position + 1) / math.log(512)
    assert rotary.query[0, 0, 0].numpy() == pytest.approx(np.cos(angles) * factor, abs=2e-7)
    assert rotary.key[0, 0, 1].numpy() == pytest.approx(np.sin(angles), abs=1e-7)
    assert rotary.factor is not None and rotary.factor.item() == pytest.approx(factor, rel=1e-7)


def test_tables_use_the_frequencies_of_the_extension() -> None:
    rope = extended("yarn")
    rotary = at(RotaryTables(model(rope=rope, attention=AttentionConfig(scale="constant"))), 1000)
    angles = 1000 * frequencies(rope, 128)
    assert rotary.key[0, 0, 1].numpy() == pytest.approx(np.sin(angles), abs=1e-7)
    assert rotary.query[0, 0, 1].numpy() == pytest.approx(np.sin(angles) * temperature(rope), abs=2e-7)


def test_no_factor_where_it_is_1_everywhere() -> None:
    constant = AttentionConfig(scale="constant")
    for config in (
        model(attention=constant, rope=RopeConfig(base=1e4)),
        model(attention=constant, rope=extended("yarn", yarn_temperature=False)),
    ):
        rotary = at(RotaryTables(config), 5)
        assert rotary.factor is None and rotary.query is rotary.key
    for config in (model(attention=constant, rope=extended("yarn")), model(rope=RopeConfig(base=1e4))):
        rotary = at(RotaryTables(config), 5)
        expected = query_factor(torch.tensor([[6]]), config)
        assert rotary.factor is not None and rotary.factor.tolist() == expected.float().tolist() != [[1]]


def test_tables_grow_by_doubling_and_follow_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = RotaryTables(model(8, RopeConfig(base=1e4)))
    made, make = [], RotaryTables._make

    def counted(self: RotaryTables, size: int, device: torch.device) -> Rotary:
        made.append(size)
        return make(self, size, device)

    monkeypatch.setattr(RotaryTables, "_make", counted)
    first = tables(torch.tensor([[3]]), 4)
    for n in range(4, 101):
        last = tables(torch.tensor([[n - 1]]), n)
    assert made == [4, 8, 16, 32, 64, 128]
    again = tables(torch.tensor([[3]]), 4)
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    fresh = RotaryTables(model(8, RopeConfig(base=1e4)))(torch.tensor([[99]]), 100)
    torch.testing.assert_close(last, fresh, rtol=0, atol=0)
    assert tables(torch.zeros(1, 3, dtype=torch.long, device="meta"), 4).key.device.type == "meta"
    assert torch.equal(tables(torch.tensor([[3]]), 4).key, first.key)


def test_every_scale_has_its_tables() -> None:
    for scale in ("log_n", "log_n_clipped", "constant", "gradient_max", "gradient_max_constant"):
        attention = AttentionConfig(scale=scale)  # type: ignore[arg-type]
        config = model(rope=RopeConfig(base=1e4, context=64), attention=attention)
        rotary = RotaryTables(config)(torch.arange(64)[None], 64)
        factor = query_factor(torch.arange(64) + 1, config)
        expected = rotary.key * factor.float()[None, :, None, None]
        assert rotary.query.numpy() == pytest.approx(expected.numpy(), rel=3e-7, abs=1e-9)
