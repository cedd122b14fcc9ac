"""Growth: the same function from any config to any larger one, gradients by the dual map, and capacity that learns."""

import dataclasses
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megakexue.bundle.axis_maps import Choices
from megakexue.bundle.grow import Growth, grown_state
from megakexue.bundle.grow_checks import locked_axes
from megakexue.bundle.grow_report import plan
from megakexue.config import (
    AttentionConfig,
    DataConfig,
    MlaConfig,
    OptimConfig,
    ResolvedModel,
    RopeConfig,
    SourceConfig,
    UserError,
)
from megakexue.core.axes import axes, parameter_names, shape
from megakexue.core.batch import Batch, make_batch
from megakexue.core.decoder import Cache, Decoder
from megakexue.core.optim import Optimizer
from megakexue.core.resolve import resolve_optim
from megakexue.core.segments import Segment
from megakexue.dist import ALONE
from megakexue.run.data import Batches
from tests.bundle.growing import (
    BASE,
    GQA,
    MLA,
    Weights,
    build,
    gradients_of,
    grown,
    logits_of,
    model,
    packed,
    tied_logit_scale,
    trained,
)
from tests.conftest import Prepared


@torch.no_grad()
def decoded(decoder: Decoder, tokens: Tensor) -> Tensor:
    """The logits of rows that are fed as 5 tokens, then one by one."""
    caches = [Cache() for _ in range(decoder.config.n_layers)]
    parts = []
    for start, stop in [(0, 5)] + [(i, i + 1) for i in range(5, 10)]:
        positions = torch.arange(start, stop).expand(len(tokens), -1)
        parts.append(decoder(tokens[:, start:stop], positions, caches=caches, n_positions=stop))
    return torch.cat(parts, dim=1)


def random_pair(r: random.Random) -> tuple[ResolvedModel, ResolvedModel]:
    """Any config, and another that is larger in some of its axes."""

    def up(x: int, step: int = 1) -> int:
        return x if r.random() < 0.25 else max(x, round(x * r.uniform(1, 2.2) / step) * step)

    residual = r.choice(["deepnorm", "prenorm"])
    # DeepNorm's identity blocks are exact but for eps, which is tested by itself
    common: dict[str, Any] = dict(
        residual=residual, norm_eps=r.choice([1e-30, 1e-5]) if residual == "prenorm" else 1e-30
    )
    scale: Any = r.choice(["log_n", "constant", "log_n_clipped", "gradient_max", "gradient_max_constant"])
    is_tied = r.random() < 0.5
    a: dict[str, Any] = dict(vocab_size=r.choice([31, 50]), d_model=r.choice([8, 12, 20]), n_layers=r.choice([1, 2, 3]),
                             d_ff=r.choice([10, 16]), tie_embeddings=is_tied)  # fmt: skip
    b: dict[str, Any] = dict(vocab_size=up(a["vocab_size"]), d_model=up(a["d_model"]), d_ff=up(a["d_ff"], 2),
                             n_layers=a["n_layers"] + r.choice([0, 0, 1, 2]),
                             tie_embeddings=is_tied and r.random() < 0.7)  # fmt: skip
    if r.random() < 0.5:
        widths: dict[str, Any] = dict(d_latent=r.choice([6, 10]), d_query_latent=r.choice([None, 7]))
        widths |= dict(d_nope=r.choice([3, 4]), d_rope=r.choice([2, 4]), d_value=r.choice([4, 6]))
        a |= dict(n_heads=r.choice([1, 2, 3]), mla=MlaConfig(**widths))
        wider: dict[str, Any] = {k: w and up(w, 2 if k == "d_value" else 1) for k, w in widths.items()}
        b |= dict(n_heads=up(a["n_heads"]), mla=MlaConfig(**wider | {"d_rope": a["mla"].d_rope * r.choice([1, 2, 3])}))
        common["attention"] = AttentionConfig(scale=scale)
    else:
        groups, slots, width, fraction = r.choice([1, 2, 3]), r.choice([1, 2, 3]), r.choice([4, 8]), r.choice([1, 0.5])
        a |= dict(n_heads=groups * slots, n_kv_heads=groups, d_head=width)
        new_groups, new_slots = groups + r.choice([0, 1, 3]), slots + r.choice([0, 1])
        if r.random() < 0.2:  # from shared to own keys and values
            new_groups, new_slots = groups * slots, 1
        similarity: Any = r.choice(["dot", "key_norm", "cosine"])
        bias, normed = r.random() < 0.5, similarity == "dot" and r.random() < 0.5
        scale = r.choice(["log_n", "constant"]) if similarity == "cosine" else scale
        ratios = [1, 1, 2] + [1.5] * (width * fraction > 2)  # so that pairs remain
        wider_head = 1 if similarity == "cosine" or normed else r.choice(ratios)
        b |= dict(n_heads=new_groups * new_slots, n_kv_heads=new_groups, d_head=int(width * wider_head))
        common["attention"] = AttentionConfig(scale=scale, similarity=similarity, qkv_bias=bias, qk_norm=normed)
        common["rope"] = RopeConfig(base=BASE, fraction=fraction)
        # by a ratio that is not whole, the old frequencies are those of another base
        b["rope"] = RopeConfig(base=BASE**1.5 if wider_head == 1.5 else BASE, fraction=fraction)
    old, new = model(a, **common), model(b, **common | {"rope": b.get("rope", RopeConfig(base=BASE))})
    return old, tied_logit_scale(old, new)


def random_choices(r: random.Random, seed: int) -> Choices:
    return Choices(width=r.choice(["pad", "copy"]), units=r.choice(["fresh", "copy"]), noise=r.choice([0.0, 1.0]),
                   depth=r.choice(["pair", "zero"]), seed=seed)  # fmt: skip


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_any_config_grows_into_any_larger_one_without_changing_the_function(first: int) -> None:
    for seed in range(first, first + 20):
        r = random.Random(seed)
        old, new = random_pair(r)
        choices = random_choices(r, seed)
        try:
            growth = Growth(old, new, choices)
        except UserError as error:  # the one combination of choices that can be refused
            assert "without a reader" in str(error)
            growth = Growth(old, new, dataclasses.replace(choices, noise=1.0))
        weights, batch = trained(old, seed), packed(old.vocab_size, seed)
        before, after = build(old, weights.__getitem__), grown(growth, weights)
        n = old.vocab_size
        a, b = logits_of(before, batch), logits_of(after, batch)
        size = max(1.0, float(a.std()))
        assert float((a - b[..., :n]).abs().max()) <= 1e-11 * size, (seed, old, new, choices)
        # latents that are multiplied in another order: absorbed = plain holds to 1e-10
        tokens = batch.tokens[:, :10]
        assert float((decoded(before, tokens) - decoded(after, tokens)[..., :n]).abs().max()) <= 1e-10 * size, seed
        a32, b32 = (logits_of(decoder.float(), batch) for decoder in (before, after))
        assert float((a32 - b32[..., :n]).abs().max()) <= 1e-4 * float(a.std()), seed


@pytest.mark.parametrize("values", [GQA, MLA], ids=["gqa", "mla"])
@pytest.mark.parametrize("residual", ["deepnorm", "prenorm"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_has_a_growth_of_the_right_shape(values: dict[str, Any], residual: str, tied: bool) -> None:
    old = model(values, residual=residual, tie_embeddings=tied)
    new = tied_logit_scale(old, model(values, residual=residual, tie_embeddings=tied, d_model=18, d_ff=14, n_layers=3))
    growth, weights = Growth(old, new, Choices()), trained(old)
    parameters = dict(Decoder(new, "reference").named_parameters())
    assert parameters.keys() == set(parameter_names(new))
    for name, p in parameters.items():
        assert growth.weight(name, weights.__getitem__).shape == p.shape
        for kind in ("momentum", "exp_avg_sq"):
            assert growth.state(name, kind, weights.__getitem__).shape == p.shape


@pytest.mark.parametrize("how", ["pad", "copy"])
@pytest.mark.parametrize("new_size", [512, 600])
def test_readers_get_the_rms_of_a_new_matrix(how: Any, new_size: int) -> None:
    old = model(GQA, d_model=400, d_ff=300, d_head=4)
    growth = Growth(old, model(GQA, d_model=new_size, d_ff=300, d_head=4), Choices(width=how))
    weights = trained(old)
    for name in ("blocks.0.feed_forward.w_up", "blocks.1.attention.wq", "head.weight"):
        before, after = (
            float(x.square().mean().sqrt()) for x in (weights[name], growth.weight(name, weights.__getitem__))
        )
        # 16 rows of 200 random numbers at least: 2 % each way are three deviations
        assert after == pytest.approx(before * math.sqrt(400 / new_size), rel=0.02), name


def test_random_numbers_depend_on_seed_name_and_shapes() -> None:
    old, middle = model(GQA), model(GQA, d_model=20)
    weights = trained(old)
    name = "blocks.0.feed_forward.w_up"

    def noise(growth: Growth, name: str = name) -> Tensor:
        return growth.weight(name, weights.__getitem__, torch.float64)[:, 12:]

    first = noise(Growth(old, middle, Choices()))
    assert torch.equal(first, noise(Growth(old, middle, Choices())))
    for other in (
        noise(Growth(old, middle, Choices(seed=1))),
        noise(Growth(old, middle, Choices()), name.replace("0", "1")),
        noise(Growth(old, model(GQA, d_model=21), Choices()))[:, :8],
    ):
        assert abs(float(functional.cosine_similarity(first.flatten(), other.flatten(), dim=0))) < 0.5


@pytest.mark.parametrize("values", [GQA, MLA], ids=["gqa", "mla"])
def test_growth_in_two_hops_is_exact_too(values: dict[str, Any]) -> None:
    old, middle, new = (
        model(values, norm_eps=1e-30, **sizes)
        for sizes in ({}, dict(d_model=17, n_layers=3, d_ff=12), dict(d_model=25, n_layers=5, d_ff=20, n_heads=8))
    )
    weights, batch = trained(old), packed(40)
    first = Growth(old, middle, Choices())
    halfway = {name: first.weight(name, weights.__getitem__, torch.float64) for name in parameter_names(middle)}
    second = Growth(middle, new, Choices(width="copy", units="copy"))
    a, b = logits_of(build(old, weights.__getitem__), batch), logits_of(grown(second, halfway), batch)
    assert float((a - b).abs().max()) < 1e-11


# --- the optimizer's state -------------------------------------------------------------------------------------------


def is_known(growth: Growth, name: str) -> Tensor:
    """Which elements of a gradient the old one says something about."""
    ones = {n: torch.ones(shape(n, growth.old), dtype=torch.float64) for n in parameter_names(growth.old)}
    return growth.state(name, "momentum", ones.__getitem__) != 0


WHOLE_GROUPS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (GQA, dict(d_model=24, n_heads=8, n_kv_heads=4, d_ff=20)),
    (GQA, dict(d_model=18, n_heads=6, n_kv_heads=3, d_ff=15)),
    (GQA, dict(d_model=18, tie_embeddings=True, d_ff=11)),
    (GQA, dict(d_head=8, n_heads=8, n_kv_heads=2)),
    (
        MLA,
        dict(
            d_model=18, n_heads=5, d_ff=13, mla=MlaConfig(d_latent=9, d_query_latent=8, d_nope=5, d_rope=8, d_value=6)
        ),
    ),
    (MLA, dict(d_model=24, n_heads=6, residual="prenorm", tie_embeddings=True)),
    (GQA, dict(d_model=18, n_layers=3, residual_alpha=2.5, norm_eps=1e-30)),
]


@pytest.mark.parametrize("case", range(len(WHOLE_GROUPS)))
@pytest.mark.parametrize(
    "choices", [Choices(), Choices(width="copy", units="copy", noise=0.0)], ids=["default", "copy"]
)
def test_momentum_is_mapped_as_the_gradient_is(case: int, choices: Choices) -> None:
    values, changes = WHOLE_GROUPS[case]
    same = {key: changes[key] for key in ("residual", "tie_embeddings", "norm_eps") if key in changes}
    old = model(values, **same)
    growth = Growth(old, tied_logit_scale(old, model(values, **changes)), choices)
    weights, batch = trained(old), packed(40)
    before = gradients_of(build(old, weights.__getitem__), batch)
    after = gradients_of(grown(growth, weights), batch)
    n_known = 0
    for name, gradient in after.items():
        known, mapped = is_known(growth, name), growth.state(name, "momentum", before.__getitem__, torch.float64)
        worst = float((mapped - gradient)[known].abs().max()) if known.any() else 0.0
        assert worst <= 1e-12 * float(gradient.abs().max()), name
        assert not mapped[~known].any()
        n_known += int(known.sum())
    assert n_known >= sum(g.numel() for g in before.values())


def test_second_moments_are_squares_and_never_zero() -> None:
    old = model(GQA)
    growth = Growth(old, model(GQA, d_model=18, n_heads=8, n_kv_heads=4, d_ff=16, n_layers=3, vocab_size=44), Choices())
    first = trained(old)
    second = {name: x.square() for name, x in first.items()}
    for name in parameter_names(growth.new):
        m, v = (
            growth.state(name, kind, s.__getitem__, torch.float64)
            for kind, s in (("exp_avg", first), ("exp_avg_sq", second))
        )
        known = is_known(growth, name)
        torch.testing.assert_close(v[known], m.square()[known], rtol=1e-12, atol=0)
        assert bool((v > 0).all()), name
        if known.any() and not known.all():  # what nothing is known of has the mean of what is
            assert float(v[~known].std(correction=0)) < 1e-12
            assert float(v[~known][0]) == pytest.approx(float(v[known].mean()), rel=1e-9)


def test_state_comes_by_kind_and_name() -> None:
    old = model(GQA)
    growth, weights = Growth(old, model(GQA, d_model=18), Choices()), trained(old)
    state = dict(grown_state(growth, lambda name: ["momentum"], lambda kind, name: weights[name]))
    assert state.keys() == {f"momentum/{name}" for name in parameter_names(growth.new)}
    assert all(x.dtype == torch.float32 for x in state.values())


# --- what becomes of new capacity ------------------------------------------------------------------------------------


def train(decoder: Decoder, state: Weights, rows: list[Batch], lr: float) -> None:
    """Train with Tiger in float64, one batch a step, from the given momentum."""
    config = resolve_optim(OptimConfig(lr=lr, weight_decay=0.0, embedding="dense"), False)
    parameters = dict(decoder.named_parameters())
    segments = [
        Segment(name=n, role=axes(n).role, shape=tuple(p.shape), start=0, stop=p.numel(), flat=i, offset=0)
        for i, (n, p) in enumerate(parameters.items())
    ]
    masters = [p.detach().view(-1) for p in parameters.values()]
    optimizer = Optimizer(config, segments, masters, list(parameters), [])
    for segment, own in zip(segments, optimizer.state):
        own["momentum"].copy_(state[segment.name].view(-1))
    for batch in rows:
        gradients = [g.view(-1) for g in gradients_of(decoder, batch).values()]
        sums = optimizer.gradient_sums(gradients)
        one = torch.ones((), dtype=torch.float64)
        optimizer.step(gradients, optimizer.weight_sums(), sums, lr=lr, factor=one)


@pytest.fixture(scope="module")
def text(prepared: Prepared) -> list[Batch]:
    """200 steps of 4 short rows of real text, as bytes of the pieces' ids modulo 40."""
    data = DataConfig(
        sources=[SourceConfig(path=str(prepared.data))], tokenizer=str(prepared.tokenizer), seq_len=prepared.seq_len
    )
    batches = Batches(data, global_batch_size=4, micro_batch_size=4, ranks=ALONE, cache=prepared.data)
    rows = [batches.next_step()[0].tokens[:, :25] for _ in range(200)]
    batches.close()
    return [make_batch((row % 38 + 2).numpy(), [], bos_id=1, pad_id=0) for row in rows]


BIGGER = dict(d_model=24, n_heads=8, n_kv_heads=4, d_ff=20)


def grown_and_trained(choices: Choices, rows: list[Batch], lr: float = 3e-3) -> tuple[Growth, Decoder, Decoder]:
    """A small model that is trained a little, and then it and its growth on the same rows."""
    old, new = model(GQA), model(GQA, **BIGGER)
    small = build(old, trained(old).__getitem__)
    zeros = {name: torch.zeros(shape(name, old), dtype=torch.float64) for name in parameter_names(old)}
    train(small, zeros, rows[:10], lr)
    weights = {name: p.detach().clone() for name, p in small.named_parameters()}
    momentum = gradients_of(small, rows[10])
    growth = Growth(old, new, choices)
    big = grown(growth, weights)
    state = {name: growth.state(name, "momentum", momentum.__getitem__, torch.float64) for name in parameter_names(new)}
    train(small, momentum, rows[10:], lr)
    train(big, state, rows[10:], lr)
    return growth, small, big


def used(growth: Growth, decoder: Decoder) -> tuple[float, float]:
    """The shares of energy that readers and writers of d_model have outside the old model's subspace.

    A vector that the old model can hold is U x; P = U V projects on those. Of the readers W it is
    |W (1 - P)|^2 / |W|^2, of the writers, the embedding among them, |(1 - P) W|^2 / |W|^2. 0 is the old model and
    nothing else; random matrices have 1 - old/new.
    """
    m, found = growth.maps["m"], []
    for is_reader in (True, False):
        outer = whole = 0.0
        for name, p in decoder.named_parameters():
            table, is_embedding = axes(name), name == "embedding.weight"
            if table.role == "gain" or "m" != (table.contracted if is_reader != is_embedding else table.out):
                continue
            w = p.detach() if is_reader or is_embedding else p.detach().T
            left, right = (m.write, m.read) if is_reader else (m.read, m.write)
            inner = torch.zeros(len(w), growth.old.d_model, dtype=w.dtype).index_add_(1, m.index, w * left)
            outer += float((w - inner[:, m.index] * right).square().sum())
            whole += float(w.square().sum())
        found.append(outer / whole)
    return found[0], found[1]


def test_plain_copies_stay_locked_under_tiger(text: list[Batch]) -> None:
    growth, small, big = grown_and_trained(Choices(width="copy", units="copy", noise=0.0), text[:34])
    assert locked_axes(growth.old, growth.new, growth.choices) == ["d_model", "feed-forward", "query heads"]
    # four times the parameters, and after 24 steps still the small model, to rounding
    assert float((logits_of(small, text[0]) - logits_of(big, text[0])).abs().max()) < 1e-9
    assert used(growth, big) == (0.0, 0.0)


@pytest.mark.parametrize(
    "choices", [Choices(), Choices(width="copy", units="copy")], ids=["default", "copy with noise"]
)
def test_new_capacity_is_used_after_190_steps(choices: Choices, text: list[Batch]) -> None:
    growth, small, big = grown_and_trained(choices, text, lr=1e-2)
    assert not locked_axes(growth.old, growth.new, growth.choices)
    at_start = used(growth, grown(growth, trained(growth.old)))
    assert at_start[0] == pytest.approx(0.5, abs=0.05)
    # fresh units write what the old ones did, to the old channels; noise reaches all channels of copied units
    assert (at_start[1] < 1e-20) == (choices.units == "fresh")
    reads, writes = used(growth, big)
    assert reads > 0.15 and writes > 0.1, (reads, writes)
    losses = [
        sum(float(functional.cross_entropy(logits_of(m, b).flatten(0, 1), b.targets.flatten())) for b in text[-40:])
        / 40
        for m in (small, big)
    ]
    assert losses[1] < losses[0]


def test_new_weights_are_as_large_as_the_old_ones() -> None:
    """A rate that goes by the RMS of a matrix needs them so."""
    old = model(GQA, d_model=64, d_ff=64)
    growth = Growth(old, model(GQA, d_model=64, d_ff=128, n_heads=8, n_kv_heads=4, n_layers=3), Choices())
    weights = trained(old)

    def rms(x: Tensor) -> float:
        return float(x.square().mean().sqrt())

    def new(name: str) -> Tensor:
        return growth.weight(name, weights.__getitem__, torch.float64)

    for name, n_old in (("feed_forward.w_up", 64), ("feed_forward.w_gate", 64), ("attention.wv", 8)):
        fresh = rms(new(f"blocks.0.{name}")[n_old:])
        assert fresh == pytest.approx(rms(weights[f"blocks.0.{name}"]), rel=0.1), name
    (block,) = [i for i, layer in enumerate(growth.layers) if layer.old is None]
    before = growth.layers[block].after
    for name, ratio in (("feed_forward.w_up", 1), ("attention.wq", 1), ("feed_forward.w_down", 0.3 / math.sqrt(2))):
        scale = growth.scale(f"blocks.{block}.{name}")  # for alpha
        assert rms(new(f"blocks.{block}.{name}")) == pytest.approx(
            rms(weights[f"blocks.{before}.{name}"]) * ratio * scale, rel=0.1
        ), name


def test_noise_is_as_large_as_asked_for() -> None:
    old, weights = model(GQA), trained(model(GQA))
    sizes = []
    for noise in (0.5, 1.0):
        growth = Growth(old, model(GQA, d_model=24), Choices(noise=noise))
        silent = growth.weight("blocks.0.feed_forward.w_up", weights.__getitem__, torch.float64)[:, 12:]
        sizes.append(float(silent.square().mean().sqrt()))
    assert sizes[0] == pytest.approx(sizes[1] / 2, rel=1e-12) and sizes[1] > 0.1


# --- depth, vocabulary, refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [GQA, MLA], ids=["gqa", "mla"])
@pytest.mark.parametrize("depth", ["pair", "zero"])
@pytest.mark.parametrize("residual", ["deepnorm", "prenorm"])
def test_new_blocks_add_nothing_and_can_learn(values: dict[str, Any], depth: Any, residual: str) -> None:
    old = model(values, residual=residual, norm_eps=1e-6)
    growth = Growth(old, model(values, residual=residual, norm_eps=1e-6, n_layers=5), Choices(depth=depth))
    weights, batch = trained(old), packed(40)
    big = grown(growth, weights)
    a, b = logits_of(build(old, weights.__getitem__), batch), logits_of(big, batch)
    difference = float((a - b).abs().max() / a.std())
    # with DeepNorm eps is felt, and nothing else: without it the blocks are exact, as is proved for any pair
    assert growth.feels_eps == (residual == "deepnorm")
    assert 1e-9 < difference < 1e-4 if growth.feels_eps else difference < 1e-11
    new = [i for i, layer in enumerate(growth.layers) if layer.old is None]
    assert new == [1, 3, 4]
    for i in new:
        last = [big.get_parameter(f"blocks.{i}.{name}") for name in ("attention.wo", "feed_forward.w_down")]
        assert all(bool((w != 0).any()) == (depth == "pair") for w in last)
    gradients = gradients_of(big, batch)
    assert all(bool(gradients[f"blocks.{i}.feed_forward.w_down"].any()) for i in new)


def test_stacked_blocks_are_copies_and_said_to_be_lossy() -> None:
    old = model(GQA)
    growth, weights = Growth(old, model(GQA, n_layers=4), Choices(depth="stack")), trained(old)
    assert not growth.is_lossless and any("THIS CHANGES THE FUNCTION" in line for line in plan(growth))
    for i in range(4):
        for name in ("attention.wq", "feed_forward.w_down", "feed_forward_norm.gain"):
            own = growth.weight(f"blocks.{i}.{name}", weights.__getitem__, torch.float64)
            scale = growth.scale(f"blocks.{i}.{name}")  # alpha is made up for
            torch.testing.assert_close(own, weights[f"blocks.{i % 2}.{name}"] * scale)


def test_new_rows_of_the_vocabulary_are_near_the_mean_and_cost_what_they_must() -> None:
    old = model(GQA, d_model=32)
    growth, weights = Growth(old, model(GQA, d_model=32, vocab_size=52), Choices()), trained(old)
    batch = packed(40)
    a, b = logits_of(build(old, weights.__getitem__), batch), logits_of(grown(growth, weights), batch)
    assert float((a - b[..., :40]).abs().max()) < 1e-11
    loss = [float(functional.cross_entropy(x.flatten(0, 1), batch.targets.flatten())) for x in (a, b)]
    assert 0 < loss[1] - loss[0] < math.log(1 + 12 / 40) + 0.05
    rows = growth.weight("embedding.weight", weights.__getitem__, torch.float64)[40:]
    away = (rows - weights["embedding.weight"].mean(0)) / weights["embedding.weight"].std(0, correction=0)
    assert float(away.square().mean().sqrt()) == pytest.approx(0.1, rel=0.15)


# --- weights and their proof in one pass -----------------------------------------------------------------------------
