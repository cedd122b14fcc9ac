"""Replays of dumps with a known cause: the module that is named must be the one that was broken."""

import dataclasses
import json
import math
import runpy
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from megakexue import config as config_module
from megakexue.config import (
    DataConfig,
    EngineConfig,
    LossConfig,
    MlaConfig,
    ModelConfig,
    OptimConfig,
    ResolvedConfig,
    ResolvedModel,
    RopeConfig,
    SourceConfig,
    TrainConfig,
    UserError,
)
from megakexue.core.axes import parameter_names
from megakexue.core.batch import Batch
from megakexue.core.decoder import Decoder, initial_weight
from megakexue.core.device import DTYPES
from megakexue.core.resolve import resolve, resolve_optim
from megakexue.dist import Ranks
from megakexue.files import sha256, write_json
from megakexue.run import checkpoint
from megakexue.run.data import Batches
from megakexue.run.replay import MASTER, Dump, Finding, Replay, replay
from megakexue.run.state import StoppedState
from tests.conftest import Prepared
from tests.helpers import ROOT, make_state

CPU = torch.device("cpu")
WORLD_SIZE, N_MICRO_BATCHES, MICRO_BATCH_SIZE = 2, 2, 2
REASON = "step 12: loss nan, gradient norm nan; guard.on_nonfinite=stop ends the run here"

ROPE = RopeConfig(base=1e4)
GQA = ModelConfig(vocab_size=512, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=48, rope=ROPE)
MLA = ModelConfig(
    vocab_size=512, d_model=32, n_layers=3, n_heads=4, d_ff=48, rope=ROPE, residual="prenorm",
    mla=MlaConfig(d_latent=16, d_query_latent=24, d_nope=8, d_rope=8, d_value=12),
)  # fmt: skip
MODELS = pytest.mark.parametrize("model", [GQA, MLA], ids=["gqa", "mla"])

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def batches(prepared: Prepared) -> list[list[Batch]]:
    """Of each rank the micro-batches of one step."""
    data = DataConfig(
        sources=[SourceConfig(path=str(prepared.data))], tokenizer=str(prepared.tokenizer), seq_len=prepared.seq_len
    )
    steps = []
    for rank in range(WORLD_SIZE):
        reader = Batches(
            data,
            split="train",
            global_batch_size=WORLD_SIZE * N_MICRO_BATCHES * MICRO_BATCH_SIZE,
            micro_batch_size=MICRO_BATCH_SIZE,
            cache=prepared.data,
            ranks=Ranks(rank=rank, world_size=WORLD_SIZE, local_rank=rank, local_world_size=WORLD_SIZE),
        )
        steps.append(reader.next_step())
        reader.close()
    return steps


def config_of(model: ModelConfig, dtype: str, **sections: Any) -> ResolvedConfig:
    return ResolvedConfig(
        model=resolve(model, "adamw", 64),
        data=DataConfig(sources=[SourceConfig(path="data")], tokenizer="tokenizer.model", seq_len=64),
        train=TrainConfig(run="run", steps=20, global_batch_size=8, micro_batch_size=2, init_from="bundle"),
        # JSON turns these steps into strings, which must not keep a dump from being read
        optim=resolve_optim(OptimConfig(schedule="piecewise", warmup_steps=0, points={10: 1.0}), model.tie_embeddings),
        engine=EngineConfig(dtype=dtype),  # type: ignore[arg-type]
        **sections,
    )


def weights_of(config: ResolvedModel) -> Weights:
    return {name: initial_weight(name, config, seed=0) for name in parameter_names(config)}


def write_dump(
    folder: Path,
    batches: list[list[Batch]],
    model: ModelConfig,
    dtype: str,
    spoil: Callable[[Weights], None] = lambda weights: None,
    loss_scale: float = 1.0,
    **sections: Any,
) -> Path:
    """Write what a run on `batches` would, with `spoil` applied to its weights; ranks own pieces of each tensor."""
    folder.mkdir()
    config = config_of(model, dtype, **sections)
    weights = weights_of(config.model)
    spoil(weights)
    for rank, own in enumerate(batches):
        tensors = {"rng/cpu": torch.get_rng_state()}
        for name, weight in weights.items():
            edges = [0, weight.numel() // 3, weight.numel()]  # rank 0 has a third, which ends within a row
            start, stop = list(pairwise(edges))[rank]
            tensors[f"master/{name}/{start}"] = weight.flatten()[start:stop].clone()
        for i, batch in enumerate(own):
            for name in ("tokens", "targets", "positions", "cu_seqlens"):
                tensors[f"batch.{i}.{name}"] = getattr(batch, name)
        save_file(tensors, folder / f"rank_{rank:05d}.safetensors")
    rows = {str(r): [row_names(r, i) for i in range(len(own))] for r, own in enumerate(batches)}
    state = make_state(12, config, world_size=len(batches))
    stopped = StoppedState(**vars(state), loss_scale=loss_scale, reason=REASON, rows=rows, is_finite=False)
    write_json(folder / "trainer.json", stopped.to_json())
    seal(folder)
    return folder


def seal(folder: Path) -> None:
    """Write the manifest of whatever files are there."""
    files = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in folder.iterdir()}
    files.pop("manifest.json", None)
    manifest = {"format": checkpoint.FORMAT, "step": 12, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def row_names(rank: int, micro_batch: int) -> list[str]:
    return [f"data/shard.00000 row {100 * rank + 10 * micro_batch + row}" for row in range(MICRO_BATCH_SIZE)]


def every_finding(result: Replay) -> list[Finding]:
    """The findings, of which each micro-batch must have one."""
    assert len(result.findings) == len(result.micro_batches) == WORLD_SIZE * N_MICRO_BATCHES
    order = [(rank, i) for rank in range(WORLD_SIZE) for i in range(N_MICRO_BATCHES)]
    assert [(f.rank, f.micro_batch) for f in result.findings] == order
    return result.findings


def plain(
    config: ResolvedConfig,
    batch: Batch,
    n_targets: int,
    loss_scale: float,
    spoil: Callable[[Weights], None] = lambda w: None,
) -> tuple[float, Weights]:
    """The mean loss and the gradients of a micro-batch, without hooks."""
    model = Decoder(config.model, "blocked").to(DTYPES[config.engine.dtype])
    weights = weights_of(config.model)
    spoil(weights)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
    is_one_document = len(batch.cu_seqlens) == len(batch.tokens) + 1
    boundaries = None if is_one_document else batch.cu_seqlens
    scale = torch.tensor(loss_scale * WORLD_SIZE / n_targets, dtype=torch.float64).float()
    losses = model(batch.tokens, batch.positions, boundaries, batch.targets, gradient_scale=scale, loss=config.loss)
    (losses.objective * scale).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses.cross_entropy.item() / batch.n_targets, gradients


# --- nothing to find -----------------------------------------------------------------------------------------------


@MODELS
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_finite_step_is_finite_and_has_the_losses_of_the_training(
    tmp_path: Path, batches: list[list[Batch]], model: ModelConfig, dtype: str
) -> None:
    dump = Dump(write_dump(tmp_path / "dump", batches, model, dtype, loss=LossConfig(z_loss=1e-4)))
    assert (dump.state.step, dump.state.reason, dump.world_size, dump.dtype) == (12, REASON, WORLD_SIZE, dtype)
    seen: list[str] = []
    result = replay(dump, device=CPU, report=lambda done: seen.append(str(done)))
    assert not result.findings and not result.overflowing_sums and not result.notes
    config = config_of(model, dtype, loss=LossConfig(z_loss=1e-4))
    n_targets = sum(batch.n_targets for own in batches for batch in own)
    assert dump.n_targets() == n_targets
    expected = [plain(config, batch, n_targets, 1.0)[0] for own in batches for batch in own]
    assert [m.loss for m in result.micro_batches] == expected
    assert seen[2] == f"rank 1 micro-batch 0: loss {expected[2]:.4f}, finite"
    assert result.conclusion == (
        "everything is finite here, and so is the sum of the gradients, so the values came from somewhere else: the "
        f"reduction over ranks, the accumulation of micro-batches in {dtype}, another kernel of the run's device, or "
        "faulty hardware."
    )


def test_rows_of_one_document_each_have_no_boundaries(tmp_path: Path, batches: list[list[Batch]]) -> None:
    t = batches[0][0].tokens.shape[1]
    whole = [
        [
            dataclasses.replace(
                batch,
                positions=torch.arange(t).repeat(len(batch.tokens), 1),
                cu_seqlens=torch.arange(len(batch.tokens) + 1, dtype=torch.int32) * t,
            )
            for batch in own
        ]
        for own in batches
    ]
    seen: list[Tensor | None] = []

    def record(module: torch.nn.Module, args: tuple) -> None:
        if isinstance(module, Decoder):
            seen.append(args[2])

    with register_module_forward_pre_hook(record):
        result = replay(Dump(write_dump(tmp_path / "dump", whole, GQA, "fp32")), device=CPU)
    assert seen == [None] * 4
    config, n_targets = config_of(GQA, "fp32"), sum(batch.n_targets for own in whole for batch in own)
    assert [m.loss for m in result.micro_batches] == [plain(config, b, n_targets, 1.0)[0] for own in whole for b in own]


def test_what_is_left_out_is_said(tmp_path: Path, batches: list[list[Batch]]) -> None:
    attention = dataclasses.replace(GQA.attention, backend="flash")
    model = dataclasses.replace(GQA, attention=attention)
    emo = LossConfig(emo=True, emo_max_ratio=2.0)
    dump = Dump(write_dump(tmp_path / "dump", batches, model, "bf16", loss=emo))
    result = replay(dump, device=CPU, ranks=[1, 1])
    assert [(m.rank, m.micro_batch) for m in result.micro_batches] == [(1, 0), (1, 1)]
    assert result.notes == [
        "the attention is blocked: model.attention.backend=flash needs a CUDA device, not cpu; or use auto",
        "EMO is left out, since the dump has no frozen head: losses and gradients are those of loss.emo=false",
    ]
    assert (
        "somewhere else: the work of 1 of 2 ranks, which was left out, EMO (loss.emo), which was left out, the "
        "reduction over ranks"
    ) in result.conclusion


# --- forward -------------------------------------------------------------------------------------------------------


def set_feed_forward(weights: Weights) -> None:
    weights["blocks.1.feed_forward.w_gate"][3, 5] = 1e30
    weights["blocks.1.feed_forward.w_up"][3, 5] = 1e30


@MODELS
def test_a_product_that_overflows_in_bf16(tmp_path: Path, batches: list[list[Batch]], model: ModelConfig) -> None:
    dump = Dump(write_dump(tmp_path / "dump", batches, model, "bf16", set_feed_forward))
    result = replay(dump, device=CPU)
    for finding in every_finding(result):
        assert (finding.direction, finding.name, finding.what) == ("forward", "blocks.1.feed_forward", "output")
        assert finding.n_inf > 0 and finding.n_elements == MICRO_BATCH_SIZE * 64 * 32
        assert finding.largest_input is not None and 1 < finding.largest_input < 20
        assert finding.rows == row_names(finding.rank, finding.micro_batch)
    assert all(m.loss is None for m in result.micro_batches)
    assert result.conclusion == (
        "4 of 4 micro-batches are not finite, 4 of them first at blocks.1.feed_forward (forward). Compute it with "
        "--dtype fp32: if that is finite, bf16 has overflowed, else more is wrong."
    )
    result = replay(dump, device=CPU, dtype="fp32")
    assert {f.name for f in every_finding(result)} == {"blocks.1.feed_forward"}
    assert "no overflow of a narrow dtype: the weights have diverged" in result.conclusion


@MODELS
def test_a_weight_that_the_dtype_cannot_hold(tmp_path: Path, batches: list[list[Batch]], model: ModelConfig) -> None:
    name = "blocks.2.attention.wo"

    def spoil(weights: Weights) -> None:
        weights[name][3, 5] = -1e30

    result = replay(Dump(write_dump(tmp_path / "dump", batches, model, "fp16", spoil)), device=CPU)
    for finding in every_finding(result):
        assert (finding.direction, finding.name, finding.what) == ("forward", name, "weight cast to fp16")
        assert (finding.n_nan, finding.n_inf) == (0, 1)
        assert finding.largest_input == pytest.approx(1e30)
    (note,) = result.notes
    assert note == f"{name}: weight cast to fp16 has 0 NaN and 1 Inf of {result.findings[0].n_elements} elements"
    assert "--dtype fp32" in result.conclusion


GAINS = pytest.mark.parametrize(
    ("model", "module"),
    [(GQA, "blocks.1.attention_norm"), (MLA, "blocks.2.attention.kv_norm"), (MLA, "norm")],
    ids=["gqa", "mla-latent", "mla-last"],
)


@GAINS
def test_a_gain_that_overflows_fp16(
    tmp_path: Path, batches: list[list[Batch]], model: ModelConfig, module: str
) -> None:
    def spoil(weights: Weights) -> None:
        weights[f"{module}.gain"] *= 4e4  # fp16 holds it; entries of twice the RMS overflow

    dump = Dump(write_dump(tmp_path / "dump", batches, model, "fp16", spoil))
    result = replay(dump, device=CPU)
    for finding in every_finding(result):
        assert (finding.direction, finding.name, finding.what) == ("forward", module, "output")
        assert finding.n_nan == 0 and 0 < finding.n_inf < finding.n_elements / 4
    wide = replay(dump, device=CPU, dtype="fp32")
    assert not wide.findings
    assert wide.conclusion == (
        "everything is finite in fp32, but the run computed in fp16: if it is not finite without --dtype, fp16 has "
        "overflowed; weights and data are sound."
    )


def test_a_residual_sum_is_blamed_on_its_block(tmp_path: Path, batches: list[list[Batch]]) -> None:
    model = dataclasses.replace(GQA, residual_alpha=4e4)  # the embedding has RMS 1
    result = replay(Dump(write_dump(tmp_path / "dump", batches, model, "fp16")), device=CPU)
    for finding in every_finding(result):
        assert (finding.direction, finding.name) == ("forward", "blocks.0")
        assert finding.what == "input that it makes for blocks.0.attention_norm"
        assert finding.largest_input is not None and 1.6 < finding.largest_input < 20


def test_logits_that_overflow_are_blamed_on_the_head(tmp_path: Path, batches: list[list[Batch]]) -> None:
    def spoil(weights: Weights) -> None:
        weights["head.weight"] *= 3e5  # of standard deviation 0.09: fp16 holds most of them, fp32 all

    dump = Dump(write_dump(tmp_path / "dump", batches, GQA, "bf16", spoil))
    assert not replay(dump, device=CPU).findings
    result = replay(dump, device=CPU, dtype="fp16")
    assert {(f.direction, f.name) for f in every_finding(result)} <= {("forward", "head"), ("forward", "head.weight")}


def test_an_objective_that_is_not_finite_beside_a_finite_loss(
    tmp_path: Path, batches: list[list[Batch]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config_module, "BOUND", math.inf)  # so that so small a loss can overflow
    dump = Dump(write_dump(tmp_path / "dump", batches, GQA, "fp32", loss=LossConfig(z_loss=1e38)))
    result = replay(dump, device=CPU)
    assert {(f.direction, f.name, f.n_elements) for f in every_finding(result)} == {("forward", "head", 1)}
    assert all(m.loss is not None and m.loss < 8 for m in result.micro_batches)


def test_a_spoilt_embedding_row_is_found_where_it_is_used(tmp_path: Path, batches: list[list[Batch]]) -> None:
    used = [[set(batch.tokens.flatten().tolist()) for batch in own] for own in batches]
    token = min(used[1][0] - used[0][0] - used[0][1] - used[1][1])
    in_row = [token in row.tolist() for row in batches[1][0].tokens]

    def spoil(weights: Weights) -> None:
        weights["embedding.weight"][token] = torch.nan

    dump = Dump(write_dump(tmp_path / "dump", batches, MLA, "bf16", spoil))
    rows = weights_of(dump.model)["embedding.weight"]
    result = replay(dump, device=CPU)
    (finding,) = result.findings
    assert finding == Finding(
        rank=1, micro_batch=0, direction="forward", name="embedding.weight", what=MASTER, n_nan=32, n_inf=0,
        n_elements=512 * 32, largest_input=finding.largest_input,
        rows=[name for name, is_there in zip(row_names(1, 0), in_row) if is_there],
    )  # fmt: skip
    assert [m.finding is None for m in result.micro_batches] == [True, True, False, True]
    assert finding.largest_input == torch.cat([rows[:token], rows[token + 1 :]]).abs().max()
    assert str(result.micro_batches[2]) == (
        f"rank 1 micro-batch 0: forward: embedding.weight: fp32 master has 32 NaN of 16384 elements, from finite "
        f"values up to {finding.largest_input:.3g}; rows: {', '.join(finding.rows)}"
    )
    assert result.notes == ["embedding.weight: fp32 master has 32 NaN and 0 Inf of 16384 elements"]
    assert result.conclusion == (
        "1 of 4 micro-batches are not finite, 1 of them first at embedding.weight (forward). An earlier step has "
        "spoilt this weight: go on from a checkpoint before it."
    )
    assert not replay(dump, device=CPU, ranks=[0]).findings


def test_only_the_rows_with_the_value_are_named(tmp_path: Path, batches: list[list[Batch]]) -> None:
    """Rows beyond those that are described are padding."""
    batch = batches[0][0]
    rows = [set(row.tolist()) for row in batch.tokens]
    first, second = row_names(0, 0)
    for token, expected in ((min(rows[1] - rows[0]), [second]), (min(rows[0] - rows[1]), [first])):

        def spoil(weights: Weights, token: int = token) -> None:
            weights["embedding.weight"][token, 0] = torch.inf

        dump = Dump(write_dump(tmp_path / f"dump{token}", batches, GQA, "fp32", spoil))
        assert replay(dump, device=CPU, ranks=[0]).findings[0].rows == expected
        dump.state.rows["0"][0] = [first]
        assert replay(dump, device=CPU, ranks=[0]).findings[0].rows == ([first] if expected == [first] else [])


def test_a_tied_head_is_blamed_for_a_row_that_no_token_uses(tmp_path: Path, batches: list[list[Batch]]) -> None:
    used = {token for own in batches for batch in own for token in batch.tokens.flatten().tolist()}
    unused = min(set(range(512)) - used)

    def spoil(weights: Weights) -> None:
        weights["embedding.weight"][unused] = torch.nan

    untied = replay(Dump(write_dump(tmp_path / "untied", batches, GQA, "fp32", spoil)), device=CPU)
    assert not untied.findings
    assert untied.notes == ["embedding.weight: fp32 master has 32 NaN and 0 Inf of 16384 elements"]
    model = dataclasses.replace(GQA, tie_embeddings=True)
    tied = replay(Dump(write_dump(tmp_path / "tied", batches, model, "fp32", spoil)), device=CPU)
    assert {(f.name, f.what) for f in every_finding(tied)} == {("embedding.weight", MASTER)}


# --- backward ------------------------------------------------------------------------------------------------------


@MODELS
def test_a_loss_scale_that_is_too_large(tmp_path: Path, batches: list[list[Batch]], model: ModelConfig) -> None:
    dump = Dump(write_dump(tmp_path / "dump", batches, model, "fp16", loss_scale=2.0**28))
    result = replay(dump, device=CPU)
    for finding, micro_batch in zip(every_finding(result), result.micro_batches):
        assert finding.direction == "backward" and finding.name in ("head", "head.weight")
        assert finding.rows == row_names(finding.rank, finding.micro_batch)
        assert micro_batch.loss is not None and micro_batch.loss < 8
    assert not result.overflowing_sums
    assert "The forward pass is finite, so the loss scale of 2.68435e+08 may be too large." in result.conclusion
    assert not replay(dump, device=CPU, dtype="fp32").findings


def scale_hidden(layer: int) -> Callable[[Weights], None]:
    """Make the hidden units of a feed-forward small and its last matrix large: alike forward, not backward."""

    def spoil(weights: Weights) -> None:
        weights[f"blocks.{layer}.feed_forward.w_up"] *= 2.0**-8
        weights[f"blocks.{layer}.feed_forward.w_down"] *= 2.0**8

    return spoil


@MODELS
@pytest.mark.parametrize("layer", [0, 2])
def test_a_gradient_that_overflows_in_a_layer(
    tmp_path: Path, batches: list[list[Batch]], model: ModelConfig, layer: int
) -> None:
    spoil, config = scale_hidden(layer), config_of(model, "fp32")
    n_targets = sum(batch.n_targets for own in batches for batch in own)
    gradients = plain(config, batches[0][0], n_targets, 1.0, spoil)[1]
    largest = {name: float(gradient.abs().max()) for name, gradient in gradients.items()}
    worst = f"blocks.{layer}.feed_forward.w_up"
    others = max(value for name, value in largest.items() if name != worst)
    assert max(largest, key=largest.__getitem__) == worst and largest[worst] > 4 * others
    loss_scale = 65504 / (largest[worst] * others) ** 0.5
    dump = Dump(write_dump(tmp_path / "dump", batches, model, "fp16", spoil, loss_scale=loss_scale))
    for finding in every_finding(replay(dump, device=CPU)):
        assert (finding.direction, finding.name, finding.what) == ("backward", worst, "gradient")
        assert finding.largest_input is not None and 0 < finding.largest_input < 65504
        assert finding.rows == row_names(finding.rank, finding.micro_batch)


def test_a_residual_sum_of_gradients_is_blamed_on_its_block(tmp_path: Path, batches: list[list[Batch]]) -> None:
    """The gradient to x of norm(alpha x + F(x)) is about that of the norm's output divided by the RMS of x."""
    model = dataclasses.replace(GQA, residual_alpha=1024.0)

    def spoil(weights: Weights) -> None:
        weights["blocks.1.attention_norm.gain"] *= 2.0**-10

    n_targets = sum(batch.n_targets for own in batches for batch in own)
    gradients = plain(config_of(model, "fp32"), batches[0][0], n_targets, 1.0, spoil)[1]
    gradients.pop("blocks.1.attention_norm.gain")  # computed from that sum
    loss_scale = 65504 / (4 * max(float(gradient.abs().max()) for gradient in gradients.values()))
    result = replay(Dump(write_dump(tmp_path / "dump", batches, model, "fp16", spoil, loss_scale)), device=CPU)
    for finding in every_finding(result):
        assert (finding.direction, finding.name) == ("backward", "blocks.1")
        assert finding.what == "gradient that it adds up for the output of blocks.1.attention_norm"


def test_a_module_that_makes_a_gradient_too_large_for_its_input(tmp_path: Path, batches: list[list[Batch]]) -> None:
    """A norm divides the gradient by the RMS of its input, here of an embedding that is nearly zero."""
    model = dataclasses.replace(MLA, embed_scale=2.0**-9, norm_eps=1e-12)
    n_targets = sum(batch.n_targets for own in batches for batch in own)
    gradients = plain(config_of(model, "fp32"), batches[0][0], n_targets, 1.0)[1]
    loss_scale = 65504 / (4 * max(float(gradient.abs().max()) for gradient in gradients.values()))
    result = replay(Dump(write_dump(tmp_path / "dump", batches, model, "fp16", loss_scale=loss_scale)), device=CPU)
    for finding in every_finding(result):
        assert (finding.direction, finding.name) == ("backward", "blocks.0.attention_norm")
        assert finding.what == "gradient of its input"


def test_sums_of_finite_gradients_that_overflow(tmp_path: Path, batches: list[list[Batch]]) -> None:
    config = config_of(GQA, "fp32")
    n_targets = sum(batch.n_targets for own in batches for batch in own)
    each = [plain(config, batch, n_targets, 1.0)[1] for own in batches for batch in own]
    largest = max(float(gradient.abs().max()) for gradients in each for gradient in gradients.values())
    sums = {name: float(sum(gradients[name] for gradients in each).abs().max()) for name in each[0]}  # type: ignore
    highest = max(sums, key=sums.__getitem__)
    assert sums[highest] > 1.5 * largest
    loss_scale = 65504 / (largest * sums[highest]) ** 0.5
    dump = Dump(write_dump(tmp_path / "dump", batches, GQA, "fp16", loss_scale=loss_scale))
    result = replay(dump, device=CPU)
    assert not result.findings and highest in result.overflowing_sums
    assert all(sums[name] * loss_scale > 65000 for name in result.overflowing_sums)
    assert result.conclusion.startswith(
        "each of 4 micro-batches is finite, but the sum of their gradients overflows fp16 in "
        f"{len(result.overflowing_sums)} parameters: {result.overflowing_sums[0]}"
    )
    assert not replay(dump, device=CPU, dtype="bf16").overflowing_sums


# --- what is no dump ------------------------------------------------------------------------------------------------


def test_refuses_what_is_no_dump(tmp_path: Path, batches: list[list[Batch]]) -> None:
    folder = write_dump(tmp_path / "dump", batches, GQA, "fp32")
    with pytest.raises(UserError, match="--rank 2: the dump has ranks 0 to 1"):
        replay(Dump(folder), device=CPU, ranks=[0, 2])
    with pytest.raises(UserError, match="--rank -1: the dump has ranks 0 to 1"):
        replay(Dump(folder), device=CPU, ranks=[-1])

    description = (folder / "trainer.json").read_text()
    damaged = folder / "rank_00001.safetensors"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"rank_00001.safetensors is damaged: its sha256 is not that of manifest.json"):
        Dump(folder)
    damaged.write_bytes(content)

    save_file({"rng/cpu": torch.get_rng_state()}, damaged)
    seal(folder)
    with pytest.raises(UserError, match=r"is no dump of a stopped step: rank_00001.safetensors has no batches"):
        Dump(folder)
    for spoilt in (b"\x05", (100_000).to_bytes(8, "little") + b"[" * 100_000, b"", content[:100]):
        damaged.write_bytes(spoilt)
        seal(folder)  # whoever made the folder made its manifest, too
        with pytest.raises(UserError, match=r"rank_00001.safetensors is damaged: .*: copy the folder again"):
            Dump(folder)
    damaged.unlink()
    seal(folder)
    with pytest.raises(UserError, match=r"world_size=2, but manifest.json lacks \['rank_00001.safetensors'\]: copy it"):
        Dump(folder)

    trainer = json.loads(description)
    for key in ("reason", "rows"):
        del trainer[key]
    (folder / "trainer.json").write_text(json.dumps(trainer))
    seal(folder)
    with pytest.raises(UserError, match=r"its trainer.json lacks \['reason', 'rows'\]; a checkpoint has no "):
        Dump(folder)
    for name in ("trainer.json", "manifest.json"):
        (folder / name).unlink()
        with pytest.raises(UserError, match=f"is no dump of a stopped step: it has no {name}"):
            Dump(folder)


def run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Run the program in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["replay_step.py", *map(str, arguments)])
    try:
        runpy.run_path(str(ROOT / "tools" / "replay_step.py"), run_name="__main__")
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def test_the_program(
    tmp_path: Path, batches: list[list[Batch]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = write_dump(tmp_path / "dump", batches, GQA, "bf16", set_feed_forward), tmp_path / "out.json"
    assert run_tool(monkeypatch, folder, "--device", "cpu", "--rank", "1", "--json", out) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"step 12 was stopped: {REASON}", "computed in bf16 on cpu; ranks: 2"]
    assert [line.split(": ")[:3] for line in lines[2:4]] == [
        [f"rank 1 micro-batch {i}", "forward", "blocks.1.feed_forward"] for i in range(2)
    ]
    assert lines[4].startswith("conclusion: 2 of 2 micro-batches are not finite") and len(lines) == 5
    content = json.loads(out.read_text())
    assert content["reason"] == REASON and content["step"] == 12 and content["micro_batches"][1]["loss"] is None
    assert content["micro_batches"][1]["finding"]["name"] == "blocks.1.feed_forward"
    assert content["conclusion"] == lines[4].removeprefix("conclusion: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dump", "out.json"]

    for arguments, message in (
        ([tmp_path / "none"], f"error: no folder {tmp_path}/none: a run that its guard stops writes RUN/dumps/"),
        ([folder, "--json", out], f"error: --json {out} exists: choose another name or add --overwrite"),
        ([folder, "--json", tmp_path / "no" / "f"], f"no/f: there is no folder {tmp_path}/no"),
        ([folder, "--rank", "7", "--device", "cpu"], "error: --rank 7: the dump has ranks 0 to 1"),
        ([folder, "--device", "abacus"], "error: --device abacus: "),
        ([folder, "--dtype", "int8"], "invalid choice: 'int8'"),
        ([tmp_path], f"error: {tmp_path} is no dump of a stopped step: it has no manifest.json"),
    ):
        assert run_tool(monkeypatch, *arguments) == 2
        assert message in capsys.readouterr().err
    assert run_tool(monkeypatch, folder, "--dtype", "fp32", "--device", "cpu", "--json", out, "--overwrite") == 0
    assert json.loads(out.read_text())["dtype"] == "fp32"
    assert "computed in fp32 on cpu; ranks: 2\nrank 0 micro-batch 0: forward" in capsys.readouterr().out
    assert run_tool(monkeypatch, "--help") == 0
    assert "tools/replay_step.py runs/1b/dumps/step_00000012 --rank 3" in capsys.readouterr().out
