"""The formulas against the module's own sum, torch's flop counter, and what torch allocates in real steps."""

import dataclasses
import gc
import itertools
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megakexue.config import (
    LOSS_CHUNK,
    AttentionConfig,
    DataConfig,
    EngineConfig,
    MlaConfig,
    ModelConfig,
    OptimConfig,
    ResolvedConfig,
    SourceConfig,
    TrainConfig,
    load_config,
)
from megakexue.core.attention import Layout
from megakexue.core.axes import entries, matrix_shapes, shape
from megakexue.core.batch import Batch
from megakexue.core.costs import (
    PERSISTENT_ELEMENTS,
    WIDTHS,
    flops_per_token,
    kept_of_layer,
    model_state_bytes,
    moments,
    n_parameters,
    parameter_counts,
    peak_memory,
)
from megakexue.core.device import DTYPES, has_compiler
from megakexue.core.loss import plain_cross_entropy
from megakexue.core.resolve import resolve, resolve_optim
from tests.helpers import ROOT, VARIANTS, build, positions_of, tiny
from tests.ranks import run_on_ranks


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_counts_equal_the_module(changes: dict[str, Any]) -> None:
    config = tiny(**changes)
    assert n_parameters(config) == sum(p.numel() for p in build(config).parameters())


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_flops_equal_torchs_counter(changes: dict[str, Any]) -> None:
    config = tiny(**changes)
    model = build(config)
    tokens = torch.randint(0, 97, (2, 33))
    with FlopCounterMode(display=False) as counter:
        rotary = model.rotary(positions_of(tokens), 33)
        x = model.embedding(tokens)
        layout = Layout(positions_of(tokens), None, backend="reference", dtype=x.dtype)
        for block in model.blocks:
            x = block(x, rotary, layout, None)
        weight = model.head.weight
        plain_cross_entropy(model.norm(x).flatten(0, 1), weight, tokens.flatten(), 1.0).sum().backward()
    # the reference attention computes the whole square, so a query costs 33 keys
    assert counter.get_total_flops() == tokens.numel() * flops_per_token(config, 33.0)


def test_state_bytes_by_stage() -> None:
    config = load_config(ROOT / "configs" / "tiny_gqa.yaml", ["engine.dtype=bf16"])
    n = n_parameters(config.model)
    embedding = config.model.vocab_size * config.model.d_model
    matrices = sum(math.prod(shape) for shape in matrix_shapes(config.model).values())
    settings = {("optim.name=adamw",): 8 * n, ("optim.name=lion",): 4 * n, ("optim.momentum_dtype=bf16",): 2 * n,
                ("optim.name=tiger", "optim.embedding=adamw"): 4 * n + 4 * embedding,
                ("optim.name=muon",): 8 * n - 4 * matrices}  # fmt: skip
    for options, state in settings.items():
        totals = []
        for stage in range(4):
            overrides = ["engine.dtype=bf16", f"engine.zero_stage={stage}", *options]
            staged = load_config(ROOT / "configs" / "tiny_gqa.yaml", overrides)
            totals.append(sum(model_state_bytes(staged, 4).values()))
        # bf16 weights and gradients 2 + 2, master 4, the optimizer's; split over 4 ranks from stage 1, 2, 3 on
        own = (4 * n + state) // 4
        assert totals == [8 * n + state, 4 * n + own, 2 * n + n // 2 + own, n + own], options


# --- what torch allocates --------------------------------------------------------------------------------------------

MLA = MlaConfig(d_latent=64, d_query_latent=96, d_nope=48, d_rope=16, d_value=64)


@dataclass(frozen=True, kw_only=True)
class Case:
    stage: int = 1
    dtype: Any = "bf16"
    recompute: Any = "none"
    residual: Any = "deepnorm"
    mla: MlaConfig | None = None
    qk_norm: bool = False
    m: int = 256
    f: int = 768
    n_layers: int = 4
    v: int = 1024
    rows: int = 2
    t: int = 128
    n_micro: int = 2
    accumulate: Any = "gradient"
    optimizer: Any = "tiger"
    compile: Any = "off"
    n_ranks: int = 2
    tile: int | None = None
    n_shared: int = 1
    """Ranks that share rows."""

    def config(self) -> ResolvedConfig:
        kind: dict[str, Any] = dict(mla=self.mla) if self.mla else dict(n_kv_heads=self.m // 128)
        # sdpa keeps what the kernels of a GPU keep
        model = ModelConfig(
            vocab_size=self.v, d_model=self.m, n_layers=self.n_layers, n_heads=self.m // 64, d_ff=self.f,
            residual=self.residual, **kind,
            attention=AttentionConfig(backend="sdpa", qk_norm=self.qk_norm, qkv_bias=self.qk_norm),
        )  # fmt: skip
        return ResolvedConfig(
            model=resolve(model, self.optimizer, self.t),
            data=DataConfig(sources=[SourceConfig(path="none")], tokenizer="none", seq_len=self.t),
            train=TrainConfig(
                run="none", steps=1000, global_batch_size=self.n_ranks // self.n_shared * self.rows * self.n_micro,
                micro_batch_size=self.rows,
            ),
            optim=resolve_optim(OptimConfig(name=self.optimizer, accumulate=self.accumulate), False),
            engine=EngineConfig(
                zero_stage=self.stage, dtype=self.dtype, recompute=self.recompute, compile=self.compile,
                bucket_elements=100_000, tile_tokens=self.tile, sequence_ranks=self.n_shared,
            ),
        )  # fmt: skip


def allocated(cases: list[Case]) -> list[tuple[int, int]]:
    """Of this rank: the bytes between two steps of each case, and the most within the second step."""
    from torch.profiler import ProfilerActivity, profile, record_function

    from megakexue.run.engine import Engine, start
    from tools.benchmarks.memory import Memory, count_traffic

    count_traffic(Counter())  # for each collective is waited, or the profiler misses what its thread releases
    started = start(cases[0].config().engine)
    found = []
    for case in cases:
        ranks = dataclasses.replace(started, sequence_size=case.n_shared)
        generator, b, t = torch.Generator().manual_seed(ranks.data_rank), case.rows, case.t
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            with record_function("phase start"):
                first = torch.empty(16)
            engine = Engine(case.config(), ranks)
            engine.load_new(seed=0)
            for label in ("warm-up", "measured"):
                with record_function(f"phase {label}"):
                    batches = []
                    for _ in range(case.n_micro):
                        ids = torch.randint(0, case.v, (b, t + 1), generator=generator)
                        tokens, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
                        batches.append(Batch(
                            tokens=tokens, targets=targets, positions=torch.arange(t).expand(b, t).contiguous(),
                            cu_seqlens=torch.arange(0, b * t + 1, t, dtype=torch.int32), n_targets=b * t, samples=[],
                        ))  # fmt: skip
                    assert engine.train_step(batches, 1e-3, 1).status == "applied"
                    del batches
        memory = Memory(profiler)
        spans = {name: (began, ended) for began, ended, name in memory.spans}
        before = memory.level(spans["start"][1]) - first.nbytes  # engines of earlier cases are not all forgotten
        began, ended = spans["measured"]
        found.append((memory.level(ended) - before, memory.peak(began, ended) - before))
        del engine, profiler, memory
        gc.collect()
    return found


def between_steps(config: ResolvedConfig, world_size: int) -> int:
    parts, w = model_state_bytes(config, world_size), WIDTHS[config.engine.dtype]
    if config.engine.zero_stage < 3:
        return sum(parts.values()) - parts["gradients"]
    counts = parameter_counts(config.model)
    kept = sum(counts[e] for e in entries(config.model) if math.prod(shape(e, config.model)) <= PERSISTENT_ELEMENTS)
    return sum(parts.values()) + w * (config.engine.bucket_elements + kept)


def compare(cases: list[Case], n_engines: int = 1) -> None:
    """Compare the last of `n_engines` engines of each case."""
    engines = [case for case in cases for _ in range(n_engines)]
    results = [*zip(*run_on_ranks(cases[0].n_ranks, allocated, engines))]
    for case, found in zip(cases, results[n_engines - 1 :: n_engines], strict=True):
        held, peak = (max(of_rank) for of_rank in zip(*found))
        config = case.config()
        options = {"is_compiled": case.compile == "on", "chunk": LOSS_CHUNK["cpu"]}
        moment, parts = peak_memory(config, case.n_ranks, **options)
        assert between_steps(config, case.n_ranks) == pytest.approx(held, rel=0.05), case
        assert sum(parts.values()) == pytest.approx(peak, rel=0.05), (case, moment, parts)


STAGES_AND_DTYPES = list(itertools.product(range(4), ("fp32", "bf16")))


def test_memory_of_a_small_model_at_each_stage() -> None:
    # half of the peak is activations
    compare([Case(stage=stage, dtype=dtype, m=128, f=384, n_layers=2) for stage, dtype in STAGES_AND_DTYPES])


@pytest.mark.slow
def test_memory_of_two_more_sizes_at_each_stage() -> None:
    """Mostly activations, and a loss of several chunks; and a larger model, mostly weights and gradients."""
    compare([
        *(Case(stage=stage, dtype="fp32", t=256, rows=8, n_layers=2, n_micro=1) for stage in range(4)),
        *(Case(stage=stage, m=384, f=1024, t=64, n_micro=1, n_layers=2) for stage in range(4)),
    ])  # fmt: skip


@pytest.mark.slow
def test_memory_of_what_a_config_can_choose() -> None:
    wide: dict[str, Any] = dict(rows=4, t=256, v=2048, n_layers=2)
    compare([
        Case(stage=0, recompute="product", residual="prenorm", **wide), Case(recompute="feed_forward", **wide),
        Case(dtype="fp32", recompute="block", **wide), Case(stage=2, mla=MLA, **wide),
        Case(stage=3, recompute="block", residual="prenorm", **wide),
        Case(stage=3, dtype="fp32", recompute="product", **wide), Case(stage=2, recompute="block", **wide),
        Case(stage=2, optimizer="adamw", t=16, rows=1), Case(optimizer="muon", dtype="fp32", t=16, rows=1),
        Case(stage=1, accumulate="momentum", t=64, m=128),
        Case(tile=64, rows=1, t=512), Case(tile=64, rows=1, t=512, n_shared=2, mla=MLA, residual="prenorm"),
        Case(stage=3, tile=64, rows=1, t=512, n_shared=2, recompute="block"),
    ])  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="needs g++")
def test_memory_of_compiled_blocks_on_one_rank() -> None:
    wide: dict[str, Any] = dict(n_ranks=1, compile="on", rows=8, t=256, v=512, n_layers=2)
    # the first engine with new graphs keeps a tensor where torch has these from its cache on disk
    compare([Case(**wide), Case(recompute="product", qk_norm=True, **wide)], n_engines=2)


def kept_by_a_layer(config: ResolvedConfig, n_rows: int) -> int:
    """Bytes that autograd keeps of one more layer."""
    totals = []
    for n_layers in (1, 2):
        model = build(dataclasses.replace(config.model, n_layers=n_layers), "sdpa", DTYPES[config.engine.dtype])
        model.set_recompute(config.engine.recompute)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, Tensor] = {}

        def keep(t: Tensor, kept: dict[int, Tensor] = kept) -> Tensor:
            kept[t.untyped_storage().data_ptr()] = t
            return t

        tokens = torch.randint(0, config.model.vocab_size, (n_rows, config.data.seq_len))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            _out = model.hidden(tokens, positions_of(tokens).contiguous())
        totals.append(sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights))
    return totals[1] - totals[0]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("residual", ["deepnorm", "prenorm"])
@pytest.mark.parametrize(
    "kind", [{}, dict(qk_norm=True), dict(mla=MLA), dict(mla=dataclasses.replace(MLA, d_query_latent=None))],
    ids=["gqa", "qk norm", "mla", "mla q"],
)  # fmt: skip
def test_what_a_layer_keeps(kind: dict[str, Any], residual: str, dtype: str) -> None:
    for recompute in ("none", "product", "feed_forward", "block"):
        case = Case(residual=residual, dtype=dtype, recompute=recompute, m=128, f=384, t=64, v=64, **kind)
        config = case.config()
        one, two = (kept_by_a_layer(config, n_rows) for n_rows in (1, 2))
        per_token, once = kept_of_layer(config, is_compiled=False)
        assert (two - one) / 64 == pytest.approx(per_token, rel=0.01), recompute
        # beside it, in bf16, gains in float32
        assert 2 * one - two == pytest.approx(once, abs=16 * config.model.d_model), recompute


def test_parts_grow_with_what_they_are_made_of() -> None:
    config = load_config(ROOT / "configs" / "7b_from_1b.yaml")
    for stage in range(4):
        staged = dataclasses.replace(config, engine=dataclasses.replace(config.engine, zero_stage=stage))
        few, many = (
            {name: sum(parts.values()) for name, parts in moments(staged, n).items()} for n in (8, 64)
        )  # fmt: skip
        assert all(many[name] < few[name] for name in few) == (stage > 0)
        rows = [sum(peak_memory(staged, 8, n_rows=n)[1].values()) for n in (1, 2, 4)]
        assert rows == sorted(rows)


def test_messages_of_muon_are_bounded() -> None:
    config = load_config(ROOT / "configs" / "7b_from_1b.yaml", ["optim.name=muon"])
    m, largest = config.model.d_model, config.model.d_model * config.model.d_ff
    work = []
    for stage, n, bucket in ((1, 8, 50_000_000), (3, 8, 10**9), (3, 64, 10**9), (0, 8, 1000)):
        staged = dataclasses.replace(
            config, engine=dataclasses.replace(config.engine, zero_stage=stage, bucket_elements=bucket)
        )
        work.append(moments(staged, n)["in the exchange of matrices"]["work"] // 2 - 3 * largest - 2 * m * m)
    of_all = sum(math.prod(shape) for shape in matrix_shapes(config.model).values())
    assert 50_000_000 < largest < of_all // 64
    assert work == [2 * largest, 2 * (of_all // 8), 2 * (of_all // 64), 9 * largest]


def test_the_run_on_a_gpu_that_was_measured() -> None:
    # docs/benchmarks.md: 52.9 GiB on one H200, when the blocks were eager and a chunk of the loss had 512 tokens
    config = load_config(ROOT / "configs" / "1b.yaml", ["train.global_batch_size=8"])
    _, parts = peak_memory(config, 1, is_compiled=False, chunk=512)
    assert sum(parts.values()) / 2**30 == pytest.approx(52.9, rel=0.05)
