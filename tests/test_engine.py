"""DeepSpeed under every stage and dtype, on two real ranks, against plain single-process training."""

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megakexue.attention import Layout
from megakexue.config import (
    Config,
    DataConfig,
    EngineConfig,
    GuardConfig,
    LossConfig,
    MlaConfig,
    ModelConfig,
    OptimConfig,
    SourceConfig,
    TrainConfig,
)
from megakexue.data import Batches
from megakexue.loss import emo_rows, plain_cross_entropy
from megakexue.model import Decoder, initial_weight, resolve, shape
from megakexue.optim import clip_factor, lr_factor
from tests.conftest import Prepared
from tests.ranks import run_on_ranks

N_STEPS = 4
STAGES = (0, 1, 2, 3)
DTYPES = ("fp32", "bf16", "fp16")


def make_config(
    prepared: Prepared,
    *,
    stage: int = 0,
    dtype: str = "fp32",
    micro: int = 2,
    tied: bool = False,
    mla: bool = False,
    emo: bool = False,
) -> Config:
    # sizes that no number of ranks divides, so that partitions cut through tensors and rows
    kind: dict[str, Any] = dict(n_kv_heads=2, d_head=10)
    if mla:
        kind = dict(mla=MlaConfig(d_latent=17, d_query_latent=23, d_nope=7, d_rope=6, d_value=11))
    model = ModelConfig(vocab_size=517, d_model=36, n_layers=2, n_heads=6, d_ff=50, tie_embeddings=tied, **kind)
    return Config(
        model=resolve(model, "adamw", prepared.seq_len),
        data=DataConfig(
            sources=[SourceConfig(path=str(prepared.data))], tokenizer=str(prepared.tokenizer), seq_len=prepared.seq_len
        ),
        train=TrainConfig(
            run="unused",
            steps=N_STEPS,
            global_batch_size=8,
            micro_batch_size=micro,
            init_from="unused" if emo else None,
        ),
        # a norm that clips every step, so that clipping is under test too
        optim=OptimConfig(lr=1e-2, warmup_steps=1, clip_norm=0.1),
        loss=LossConfig(z_loss=1e-3 if emo else 0.0, emo=emo),
        guard=GuardConfig(initial_loss_scale=65536.0),
        engine=EngineConfig(zero_stage=stage, dtype=dtype, bucket_elements=3000),
    )


def initial_masters(engine: Any, config: Config) -> None:
    engine.load(lambda kind, s: initial_weight(s.name, config.model, 0).view(-1)[s.start : s.stop])


def train_steps(config: Config, *, same_batch: bool, poison_step: int | None = None) -> dict[str, Any]:
    """Train N_STEPS on this rank; `same_batch` gives every rank the rows of rank 0.

    At `poison_step` the embedding of the last rank comes out as NaN.
    """
    from megakexue.engine import Engine, start

    ranks = start(config.engine)
    engine = Engine(config, ranks)
    initial_masters(engine, config)
    engine.check_weights()
    if config.loss.emo:
        head = initial_weight("embedding.weight" if config.model.tie_embeddings else "head.weight", config.model, 0)
        engine.emo_rows = emo_rows(head).to(engine.dtype)
    world, rank = (1, 0) if same_batch else (ranks.world_size, ranks.rank)
    size = config.train.global_batch_size // ranks.world_size if same_batch else config.train.global_batch_size
    data = Batches(
        config.data, global_batch_size=size, micro_batch_size=config.train.micro_batch_size, rank=rank,
        world_size=world, local_rank=0, local_world_size=1, cache=Path("unused"),
    )  # fmt: skip
    results, moved = [], []

    def masters() -> list[torch.Tensor]:
        kinds = engine.state_kinds
        return [view.clone() for _, views in engine.state_tensors(kinds) for view in views.values()]

    for step in range(N_STEPS):
        batches = data.next_step()
        if step == poison_step and ranks.rank == ranks.world_size - 1:
            hook = engine.module.embedding.register_forward_hook(lambda m, i, out: out * math.nan)
        else:
            hook = None
        lr = config.optim.lr * lr_factor(config.optim, step + 1, N_STEPS)
        before = masters()
        results.append(engine.train_step(batches, lr, step + 1))
        moved.append(not all(torch.equal(a, b) for a, b in zip(before, masters())))
        if hook:
            hook.remove()
        engine.check_weights()
    data.close()
    state = [(s.name, s.start, s.stop, {k: v.clone() for k, v in views.items()})
             for s, views in engine.state_tensors(engine.state_kinds)]  # fmt: skip
    loss = engine.evaluation_loss(batches[0]).item()
    return {
        "results": results,
        "moved": moved,
        "state": state,
        "n_updates": engine.optimizer.n_updates,
        "evaluation": loss,
    }


def many_cases(cases: list[tuple[Config, bool, int | None]]) -> list[dict[str, Any]]:
    return [train_steps(config, same_batch=same, poison_step=poison) for config, same, poison in cases]


def assemble(ranks: list[dict[str, Any]], config: Config, *, sharded: bool) -> dict[str, dict[str, torch.Tensor]]:
    """Put the segments of all ranks together, asserting that they cover each parameter exactly once."""
    whole: dict[str, dict[str, torch.Tensor]] = {}
    counts: dict[str, torch.Tensor] = {}
    for result in ranks if sharded else ranks[:1]:
        for name, start, stop, views in result["state"]:
            n = math.prod(shape(name, config.model))
            counts.setdefault(name, torch.zeros(n, dtype=torch.int))[start:stop] += 1
            for kind, value in views.items():
                whole.setdefault(kind, {}).setdefault(name, torch.full((n,), torch.nan))[start:stop] = value
    with torch.device("meta"):
        expected = dict(Decoder(config.model, "reference").named_parameters())
    assert counts.keys() == expected.keys()
    assert all((count == 1).all() for count in counts.values())
    return whole


def plain_training(config: Config) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """The same steps with none of our engine: one process, torch's AdamW, all rows at once, the plain loss."""
    model = Decoder(config.model, "reference")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(initial_weight(name, config.model, 0))
    decayed = [p for p in parameters.values() if p.dim() == 2]
    gains = [p for p in parameters.values() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": config.optim.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(config.optim.beta1, config.optim.beta2), eps=config.optim.eps)
    size = config.train.global_batch_size
    data = Batches(
        config.data, global_batch_size=size, micro_batch_size=size, rank=0, world_size=1, local_rank=0,
        local_world_size=1, cache=Path("unused"),
    )  # fmt: skip
    losses, norms = [], []
    for step in range(N_STEPS):
        (batch,) = data.next_step()
        x = model.embedding(batch.tokens)
        rotary = model.rotary(batch.positions, batch.tokens.shape[1])
        for block in model.blocks:
            x = block(x, rotary, Layout(batch.positions, batch.cu_seqlens), "reference", None)
        scale = config.model.logit_scale
        assert scale is not None
        loss = plain_cross_entropy(x.flatten(0, 1), model.head.weight, batch.targets.flatten(), scale)
        loss = loss / batch.n_targets
        loss.backward()
        norm = float(
            torch.stack([p.grad.double().square().sum() for p in parameters.values() if p.grad is not None])
            .sum()
            .sqrt()
        )
        for p in parameters.values():
            assert p.grad is not None
            p.grad *= clip_factor(config.optim, norm)
        for group in optimizer.param_groups:
            group["lr"] = config.optim.lr * lr_factor(config.optim, step + 1, N_STEPS)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        norms.append(norm)
    data.close()
    return losses, norms, {name: p.detach().view(-1) for name, p in parameters.items()}


@pytest.mark.slow
def test_every_stage_and_dtype_trains_as_one_process(prepared: Prepared) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    same = [(make_config(prepared, stage=s, dtype=d, tied=t), True, None)
            for d in DTYPES for s in STAGES for t in (False, True) if d == "fp32" or not t]  # fmt: skip
    same += [(make_config(prepared, stage=s, dtype=d, mla=True), True, None)
             for d in ("fp32", "bf16") for s in STAGES]  # fmt: skip
    same += [(make_config(prepared, stage=s, dtype=d, tied=t, emo=True), True, None)
             for s, d, t in ((1, "fp32", False), (3, "bf16", True), (3, "fp32", False))]  # fmt: skip
    different = [(make_config(prepared, stage=s, dtype=d), False, None) for d in DTYPES for s in STAGES]
    latent = [(make_config(prepared, stage=s, mla=True), False, None) for s in STAGES]
    accumulated = [(make_config(prepared, stage=s, micro=1), False, None) for s in STAGES]
    poisoned = [(make_config(prepared, stage=s, dtype=d), False, 2) for d in DTYPES for s in STAGES]
    cases = same + different + accumulated + latent + poisoned
    two = list(zip(*run_on_ranks(2, many_cases, cases)))
    # what both ranks of `same` saw, on one rank without sharding
    halves = [
        (replace(c, train=replace(c.train, global_batch_size=4), engine=replace(c.engine, zero_stage=0)), True, None)
        for c, *_ in same
    ]
    one = run_on_ranks(1, many_cases, halves)[0]
    assembled = [assemble(list(r), c, sharded=c.engine.zero_stage > 0) for r, (c, *_) in zip(two, cases)]

    for (config, *_), ranks in zip(cases, two):
        where = f"stage {config.engine.zero_stage} {config.engine.dtype}"
        assert repr(ranks[0]["results"]) == repr(ranks[1]["results"]), f"{where}: ranks disagree"

    # 1. two ranks with the same rows = one unsharded rank: every bit of losses, norms, masters and moments
    for (config, *_), ranks, whole, alone in zip(same, two, assembled, one):
        where = f"stage {config.engine.zero_stage} {config.engine.dtype} tied={config.model.tie_embeddings}"
        where += f" mla={config.model.mla is not None}"
        reference = assemble([alone], config, sharded=False)
        rel = 1e-6 if config.engine.dtype == "fp16" and config.engine.zero_stage >= 2 else 1e-15
        for field in ("loss", "grad_norm"):
            got, want = ([getattr(r, field) for r in run["results"]] for run in (ranks[0], alone))
            assert got == pytest.approx(want, rel=rel), f"{where}: {field}"
        for kind, tensors in reference.items():
            for name, value in tensors.items():
                if config.engine.dtype == "fp16" and config.engine.zero_stage >= 2:
                    # these stages halve each micro-batch's gradient before adding, which loses the last bit of fp16's
                    # subnormal numbers: up to 2^-25 / 65536 = 5e-13, of which AdamW makes 5e-13 / eps = 5e-5 lr
                    assert (whole[kind][name] - value).abs().max() < 1e-4 * config.optim.lr, f"{where}: {kind} {name}"
                else:
                    assert torch.equal(whole[kind][name], value), f"{where}: {kind} {name}"

    # 2. different rows: fp32 agrees with plain torch up to the order of float32 sums. AdamW divides by sqrt(v), so an
    #    element whose gradient is rounding noise may move by a different fraction of lr; hence a bound in units of lr
    references = {kind: plain_training(first[0][0]) for kind, first in ((False, different), (True, latent))}
    n = len(same)
    for (config, *_), ranks, whole in zip(cases[n:], two[n:], assembled[n:]):
        if config.engine.dtype == "fp32" and ranks[0]["n_updates"] == N_STEPS:
            where = f"stage {config.engine.zero_stage} micro {config.train.micro_batch_size} {config.model.mla}"
            losses, norms, reference_weights = references[config.model.mla is not None]
            assert [r.loss for r in ranks[0]["results"]] == pytest.approx(losses, rel=1e-6), where
            assert [r.grad_norm for r in ranks[0]["results"]] == pytest.approx(norms, rel=1e-5), where
            for name, value in reference_weights.items():
                difference = (whole["master"][name] - value).abs()
                assert difference.max() < 0.02 * config.optim.lr, f"{where}: {name} {difference.max()}"
                assert difference.mean() < 1e-5 * config.optim.lr, f"{where}: {name} {difference.mean()}"

    # 3. half precision: the same loss column to the precision of the weights
    losses = references[False][0]
    for (config, *_), ranks in zip(different, two[n:]):
        if config.engine.dtype != "fp32":
            rel = {"bf16": 2e-3, "fp16": 3e-4}[config.engine.dtype]
            assert [r.loss for r in ranks[0]["results"]] == pytest.approx(losses, rel=rel), config.engine

    # 4. a non-finite value on one rank: all skip, the state stays finite, the next step moves
    for (config, *_), ranks, whole in zip(poisoned, two[-len(poisoned) :], assembled[-len(poisoned) :]):
        where = f"stage {config.engine.zero_stage} {config.engine.dtype}"
        assert [r.status for r in ranks[0]["results"]] == ["applied", "applied", "skipped", "applied"], where
        assert ranks[0]["n_updates"] == N_STEPS - 1, where
        assert [r.bad_ranks for r in ranks[0]["results"]] == [[], [], [1], []], where
        # a skipped step leaves masters and moments as they were, and the next one moves them
        assert ranks[0]["moved"] == ranks[1]["moved"] == [True, True, False, True], where
        assert math.isfinite(ranks[0]["results"][3].loss), where
        assert all(t.isfinite().all() for tensors in whole.values() for t in tensors.values()), where


def huge_gradients(configs: list[Config]) -> list[tuple[Any, int]]:
    """One step whose gradients are finite and beyond what float32 can square."""
    from megakexue.engine import Engine, start

    outcomes = []
    for config in configs:
        ranks = start(config.engine)
        engine = Engine(config, ranks)
        initial_masters(engine, config)
        data = Batches(
            config.data, global_batch_size=config.train.global_batch_size, rank=ranks.rank, local_rank=0,
            micro_batch_size=config.train.micro_batch_size, world_size=ranks.world_size, local_world_size=1,
            cache=Path("unused"),
        )  # fmt: skip
        for p in engine.module.parameters():
            p.register_hook(lambda g: g * 1e23)
        result = engine.train_step(data.next_step(), 1e-3, 1)
        engine.check_weights()
        data.close()
        outcomes.append((result, engine.optimizer.n_updates))
    return outcomes


@pytest.mark.slow
def test_large_but_finite_gradients_are_applied(prepared: Prepared) -> None:
    # DeepSpeed's own checks take the infinite float32 norm for an overflow at stage 0, and drop the step
    configs = [make_config(prepared, stage=s, dtype=d) for d in ("fp32", "bf16") for s in STAGES]
    for config, (result, n_updates) in zip(configs, run_on_ranks(2, huge_gradients, configs)[0]):
        where = f"stage {config.engine.zero_stage} {config.engine.dtype}"
        assert (result.status, n_updates) == ("applied", 1), where
        assert result.grad_norm > 1e20, where
