"""The config: every YAML builds, every mistake has its message, every field is used."""

import argparse
import ast
import copy
import dataclasses
import itertools
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from megakexue import config as config_module
from megakexue.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RopeConfig,
    SourceConfig,
    TrainConfig,
    UserError,
    as_integer,
    as_number,
    build,
    load_config,
    name_sources,
    read_yaml,
    to_yaml,
)
from megakexue.core.costs import n_parameters
from megakexue.core.decoder import Decoder
from megakexue.core.resolve import resolve, resolve_config, resolve_optim
from tests.conftest import Prepared
from tests.helpers import BUNDLES, ROOT, SHIPPED, bundle_config, load_shipped
from tests.programs import run_python
from tests.reads import Reads

TINY = ROOT / "configs" / "tiny_gqa.yaml"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_yaml_builds_its_model(path: Path, tmp_path: Path) -> None:
    config = load_shipped(path, tmp_path)
    model = resolve(config.model, config.optim.name, config.data.seq_len)
    with torch.device("meta"):
        decoder = Decoder(model, "reference")
    assert sum(p.numel() for p in decoder.parameters()) == n_parameters(model)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_yaml_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_shipped(path, tmp_path)
    (tmp_path / "again.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml") == config


def test_a_model_from_a_bundle(tmp_path: Path) -> None:
    trained = resolve_config(load_config(TINY, ["model.attention.backend=sdpa", "model.tie_embeddings=true"])).model
    bundle = bundle_config(tmp_path / "b", trained)
    path = tmp_path / "c.yaml"
    path.write_text(
        to_yaml(
            {
                "model": {"from": "bundle"},
                "data": {"sources": [{"path": "d"}], "tokenizer": "t", "seq_len": 256},
                "train": {"run": "r", "steps": 200, "global_batch_size": 4, "micro_batch_size": 4},
            }
        )
    )
    start = f"train.init_from={bundle}"

    def model(*overrides: str) -> ModelConfig:
        return load_config(path, [start, *overrides]).model

    # all of it but how attention is computed; a resolved config is resolved to itself
    same = dataclasses.replace(trained, attention=dataclasses.replace(trained.attention, backend="auto"))
    assert resolve_config(load_config(path, [start])).model == same
    assert load_config(path, [start, "data.seq_len=128"]).model.rope.context == 256
    longer = ["data.seq_len=2048", "model.rope.extension=ntk"]
    assert model(*longer).rope == RopeConfig(base=trained.rope.base, trained_context=256, extension="ntk")
    assert model(*longer, "model.rope.context=4096").rope.context == 4096
    assert model(*longer, "model.rope.extension=base").rope == RopeConfig(trained_context=256, extension="base")
    assert model(*longer, "model.rope={extension: base, base: 1e6}").rope.base == 1e6
    factors = [1.0 + i for i in range(trained.rotary_width // 2)]
    longrope = ["data.seq_len=2048", "model.rope.extension=longrope", f"model.rope.longrope_factors={factors}"]
    assert model(*longrope).rope == RopeConfig(
        base=trained.rope.base, trained_context=256, extension="longrope", longrope_factors=factors
    )
    assert model("model.attention.backend=blocked").attention.backend == "blocked"
    # what is extended already keeps it; a new base alone is no obstacle
    extended = resolve_config(load_config(path, [start, *longer])).model
    bundle_config(tmp_path / "b", extended)
    assert model("data.seq_len=2048").rope == RopeConfig(**vars(extended.rope))
    assert (
        model("data.seq_len=2048", "model.rope.extension=yarn", "model.rope.yarn_temperature=false").rope.base == 7400
    )
    rebased = dataclasses.replace(extended.rope, extension="base", base=1e6)
    bundle_config(tmp_path / "b", dataclasses.replace(extended, rope=rebased))
    further = model("data.seq_len=8192", "model.rope.extension=ntk").rope
    assert further == RopeConfig(base=1e6, trained_context=2048, extension="ntk")

    bundle_config(tmp_path / "b", trained)
    refused = {
        f"c.yaml: data.seq_len=2048 is longer than the context of 256 of train.init_from={bundle}: set": [
            "data.seq_len=2048"],
        "c.yaml: model.from=x must be bundle, which is that of train.init_from": ["model.from=x"],
        "c.yaml: model.from=bundle takes the model of train.init_from, and that is null: name a bundle": [
            "train.init_from=null"],
        f"c.yaml: model.from=bundle: train.init_from={tmp_path} is no bundle: make one with tools/export_model.py": [
            f"train.init_from={tmp_path}"],
        "c.yaml: model.rop is no setting: did you mean model.rope?": ["model.rop=1"],
        "c.yaml: model.rope=1 must be of the form": ["model.rope=1"],
        "c.yaml: model.rope.extension=long must be one of": ["model.rope.extension=long"],
        "c.yaml: data.seq_len=x must be a whole number": ["data.seq_len=x"],
    }  # fmt: skip
    for message, overrides in refused.items():
        with pytest.raises(UserError) as error:
            model(*overrides)
        assert message in str(error.value)
    for content, message in {"a: 1": "has no section model", "model: 3": "=3 must be of the form {vocab_size: 3}",
                             "model: {d_model: 3}": "missing: vocab_size, n_layers"}.items():  # fmt: skip
        (bundle / "config.yaml").write_text(content)
        with pytest.raises(UserError, match=message) as error:
            model()
        assert f"{bundle}/config.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.stages=[{until_step: 9, seq_len: 100}]"], "data.stages.seq_len=100 must divide data.seq_len=256, the"),
        (["data.stages=[{until_step: 0, seq_len: 64}]"], "data.stages.until_step=0 must be positive"),
        (["data.stages=[{until_step: 9, seq_len: 1}]"], "data.stages.seq_len=1 must be above 1"),
        (["data.stages=[{until_step: 201, seq_len: 64}]"], "data.stages.until_step=201 must not be above train.steps="),
        (
            ["data.stages=[{until_step: 9, seq_len: 64}, {until_step: 9, seq_len: 128}]"],
            "data.stages.until_step=9 comes after 9: each stage must end later than the one before",
        ),
        (
            ["data.stages=[{until_step: 9, seq_len: 2}]", "engine.sequence_ranks=4"],
            "engine.sequence_ranks=4 must divide data.stages.seq_len=2",
        ),
        (["model.d_modle=64"], "model.d_modle is no setting: did you mean model.d_model?"),
        (["optimizer.lr=1"], "optimizer is no setting: did you mean optim?"),
        (["model.n_layers=many"], "model.n_layers=many must be a whole number, such as 1000 or 1e3"),
        (["engine.dtype=fp8"], "engine.dtype=fp8 must be one of fp32, bf16, fp16"),
        (["train.steps"], "'train.steps' is not of the form key=value, such as train.steps=100"),
        (["model.n_kv_heads=3"], "model.n_heads=4 must be a multiple of model.n_kv_heads=3: set model.n_kv_heads to a"),
        (["model.d_model=130"], "model.d_model=130 must be a multiple of model.n_heads=4: change one, or set model.d_"),
        (["model.d_head=7"], "model.rope.fraction=1 of a head width (model.d_head) of 7 is 7, which must be an even"),
        (["model.rope.fraction=0.3"], "model.rope.fraction=0.3 of a head width (model.d_head) of 32 is 9.6, which"),
        (
            ["model.rope.extension=ntk", "model.rope.trained_context=512", "model.rope.context=512"],
            "model.rope.trained_context=512 must be below model.rope.context=512, the longer one: without a longer",
        ),
        (
            ["model.rope.extension=ntk", "model.rope.trained_context=64"],
            "model.rope.extension=ntk needs trained weights, and train.init_from is null: name a bundle, or train from",
        ),
        (["model.rope.rule=infimum", "model.rope.base=9e3"], "model.rope.rule=infimum has no effect with model.rope.b"),
        (["model.rope.fraction=0.00001"], "model.rope.fraction=1e-05 of a head width (model.d_head) of 32 is 0.00032"),
        (["model.residual=prenorm", "model.residual_alpha=7"], "model.residual_alpha=7.0 has no effect with model.re"),
        (
            ["model.deepnorm_recipe=lamb", "model.residual_alpha=1", "model.branch_gain=1"],
            "model.deepnorm_recipe=lamb has no effect beside model.residual_alpha and model.branch_gain: leave it at",
        ),
        (["model.rope.fraction=0"], "model.rope.fraction=0.0 must be in (0, 1]"),
        (["model.rope.rule=paper"], "model.rope.rule=paper must be one of safe, infimum"),
        (["model.rope.extension=ntk"], "model.rope.extension=ntk does not fit model.rope.trained_context=None: an ext"),
        (["model.rope.trained_context=64"], "model.rope.extension=None does not fit model.rope.trained_context=64: an"),
        (
            ["model.rope.extension=ntk", "model.rope.trained_context=256"],
            "model.rope.trained_context=256 must be below data.seq_len=256, which is the context when model.rope.con",
        ),
        (
            ["model.rope.extension=ntk", "model.rope.trained_context=-1"],
            "model.rope.trained_context=-1 must be above",
        ),
        (["model.rope.ntk_mixed_exponent=0.5"], "model.rope.ntk_mixed_exponent=0.5 has no effect with model.rope.exte"),
        (
            ["model.rope.extension=ntk_mixed", "model.rope.trained_context=64", "model.rope.ntk_mixed_exponent=0"],
            "model.rope.ntk_mixed_exponent=0.0 must be in (0, 1]; for 0 use interpolate",
        ),
        (["model.rope.yarn_temperature=true"], "model.rope.yarn_temperature=True has no effect with model.rope.exten"),
        (
            ["model.rope.longrope_factors=[1, 2]"],
            "model.rope.longrope_factors=[1.0, 2.0] has no effect with model.rope.extension=None: use longrope",
        ),
        (
            ["model.rope.extension=longrope", "model.rope.trained_context=64", "model.rope.longrope_factors=[1, -2]"],
            "model.rope.longrope_factors=[1.0, -2.0] must be positive numbers, one for each rotated pair",
        ),
        (
            ["model.rope.extension=longrope", "model.rope.trained_context=64", "model.rope.longrope_factors=[1, 2]"],
            "model.rope.longrope_factors has 2 numbers, and RoPE rotates 16 pairs: give one for each",
        ),
        (["model.rope.llama3_slow=2"], "model.rope.llama3_slow=2.0 has no effect with model.rope.extension=None: use "),
        (
            ["model.rope.extension=llama3", "model.rope.trained_context=64", "model.rope.llama3_slow=4"],
            "model.rope.llama3_slow=4.0 must be below model.rope.llama3_fast=4.0",
        ),
        (
            ["model.attention.qk_norm=true", "model.attention.similarity=cosine"],
            "model.attention.qk_norm=true does not fit similarity=cosine, which is a norm without a gain: use one",
        ),
        (
            ["model.attention.qkv_bias=true", "model.mla={}", "model.n_kv_heads=null"],
            "model.attention.qkv_bias=True has no effect with model.mla: its latents have norms of their own",
        ),
        (
            ["model.rope.extension=yarn", "model.rope.trained_context=64"],
            "model.rope.extension=yarn and model.attention.scale=log_n are both temperatures of the softmax: set model",
        ),
        (
            ["model.attention.scale=constant", "model.attention.log_n_base=512"],
            "model.attention.log_n_base=512.0 has no effect with scale=constant, similarity=dot: leave it null",
        ),
        (
            ["model.attention.similarity=cosine", "model.attention.log_n_base=512"],
            "model.attention.log_n_base=512.0 has no effect with scale=log_n, similarity=cosine: leave it null",
        ),
        (
            ["model.attention.scale=log_n_clipped", "model.attention.log_n_floor=16"],
            "model.attention.log_n_floor=16 has no effect with scale=log_n_clipped: leave it null",
        ),
        (
            ["model.attention.similarity=cosine", "model.attention.scale=gradient_max"],
            "model.attention.similarity=cosine does not fit scale=gradient_max: use log_n (4 ln n) or constant (4 ln(",
        ),
        (["model.attention.softmax_scale=-1"], "model.attention.softmax_scale=-1.0 must be positive"),
        (["model.mla={}"], "model.n_kv_heads=2 has no effect with model.mla: leave it null; model.mla has the widths"),
        (["model.mla={}", "model.n_kv_heads=null", "model.d_head=32"], "model.d_head=32 has no effect with model.mla:"),
        (
            ["model.mla={}", "model.n_kv_heads=null", "model.rope.fraction=0.5"],
            "model.rope.fraction=0.5 has no effect with model.mla: set model.mla.d_rope",
        ),
        (
            ["model.mla={}", "model.n_kv_heads=null", "model.attention.similarity=key_norm"],
            "model.attention.similarity=key_norm needs each head's keys, which the cache of model.mla does not hold",
        ),
        (["model.mla={d_rope: 7}", "model.n_kv_heads=null"], "model.mla.d_rope=7 must be even, since RoPE rotates pai"),
        (["model.mla={d_latent: 0}", "model.n_kv_heads=null"], "model.mla.d_latent=0 must be positive"),
        (["model.mla={d_ropes: 8}", "model.n_kv_heads=null"], "model.mla.d_ropes is no setting: did you mean model"),
        (["loss.z_loss=-1"], "loss.z_loss=-1.0 must not be negative"),
        (["loss.emo_max_ratio=1"], "loss.emo_max_ratio=1.0 has no effect with loss.emo=false"),
        (["loss.emo=true", "loss.emo_max_ratio=0"], "loss.emo_max_ratio=0.0 must be positive"),
        (["loss.emo=true"], "loss.emo=true needs a trained head (9797), and train.init_from is null: train without it"),
        (["model.n_layers=0"], "model.n_layers=0 must be positive"),
        (["model.gain_centre=0"], "model.gain_centre=0.0 must be positive"),
        (["model.norm_eps=0"], "model.norm_eps=0.0 must be positive"),
        (["model.rope.base=large"], "model.rope.base='large' must be a number or 'auto'"),
        (["model.rope.base=0.5"], "model.rope.base=0.5 must be above 1"),
        (["model.rope.context=0"], "model.rope.context=0 must be positive"),
        (["model.rope.context=100"], "model.rope.context=100 must be at least data.seq_len=256: raise it, or leave it"),
        (["model.attention.log_n_base=1"], "model.attention.log_n_base=1.0 must be above 1"),
        (["model.attention.log_n_floor=1"], "model.attention.log_n_floor=1 must be above 1"),
        (["data.sources=[]"], "data.sources is empty: name a folder written by tools/prepare_data.py"),
        (["data.sources=[{path: a, weight: 1}, {path: b}]"], "give every source a weight, or none (then rows count)"),
        (["data.sources=[{path: a}, {path: a}]"], "data.sources names a folder twice: ['a', 'a']"),
        (["data.sources=[{path: a, weight: 0}]"], "data.sources: weight=0.0 must be positive"),
        (["data.seq_len=1"], "data.seq_len=1 must be above 1"),
        (["data.n_prefetch=0"], "data.n_prefetch=0 must be positive"),
        (["data.shuffle_seed=-1"], "data.shuffle_seed=-1 must not be negative"),
        (["data.download_retries=-1"], "data.download_retries=-1 must not be negative"),
        (["engine.sequence_ranks=3"], "engine.sequence_ranks=3 must divide model.n_heads=4"),
        (["engine.sequence_ranks=4", "data.seq_len=250"], "engine.sequence_ranks=4 must divide data.seq_len=250"),
        (
            ["model.d_model=96", "model.n_heads=12", "model.n_kv_heads=6", "engine.sequence_ranks=4"],
            "engine.sequence_ranks=4 must divide model.n_kv_heads=6, or be a multiple of it",
        ),
        (["engine.tile_tokens=0"], "engine.tile_tokens=0 must be positive, or null for off"),
        (
            ["engine.tile_tokens=64", "engine.recompute=product"],
            "engine.tile_tokens=64 computes the feed-forward again by itself: set engine.recompute to none or block",
        ),
        (["engine.recompute_offload=true"], "engine.recompute_offload=true moves what engine.recompute=block keeps"),
        (["data.download_timeout_s=0"], "data.download_timeout_s=0.0 must be between 0.001 and 31"),
        (["train.micro_batch_size=3"], "train.global_batch_size=16 must be a multiple of train.micro_batch_size=3"),
        (["train.steps=0"], "train.steps=0 must be positive"),
        (["train.stop_at_step=999"], "train.stop_at_step=999 must be between 1 and train.steps=200"),
        (["optim.warmup_steps=999"], "optim.warmup_steps=999 must not be above train.steps=200"),
        (["optim.warmup_steps=-1"], "optim.warmup_steps=-1 must not be negative"),
        (["optim.schedule=wsd"], "optim.decay_steps=None does not fit optim.schedule=wsd: wsd needs it"),
        (["optim.decay_steps=10"], "optim.decay_steps=10 does not fit optim.schedule=cosine"),
        (["optim.schedule=wsd", "optim.decay_steps=190"], "optim.warmup_steps + optim.decay_steps = 210 must not be"),
        (["optim.schedule=piecewise", "optim.warmup_steps=0"], "optim.schedule=piecewise needs optim.points, such as"),
        (
            ["optim.schedule=piecewise", "optim.points={10: 1}"],
            "optim.warmup_steps=20 has no effect with optim.schedule=piecewise: set it to 0",
        ),
        (["optim.points={10: 1}"], "optim.points has no effect with optim.schedule=cosine: use piecewise"),
        (["optim.lr=0"], "optim.lr=0.0 must be positive"),
        (["optim.lr=inf"], "optim.lr=inf must be a finite number, such as 0.1 or 1e-3"),
        (["optim.eps=-1"], "optim.eps=-1.0 must be positive"),
        (["optim.weight_decay=-3"], "optim.weight_decay=-3.0 must not be negative"),
        (["optim.schedule=wsd", "optim.decay_steps=0"], "optim.decay_steps=0 must be positive"),
        (
            ["optim.schedule=piecewise", "optim.warmup_steps=0", "optim.points={-5: 1}"],
            "optim.points={-5: 1.0}: steps and factors must not be negative",
        ),
        (["model.logit_scale=-1"], "model.logit_scale=-1.0 must be positive"),
        (
            ["model.residual=prenorm", "model.deepnorm_recipe=paper"],
            "deepnorm_recipe=paper has no effect with model.re",
        ),
        (["train.seed=-1"], "train.seed=-1 must not be negative"),
        (["train.init_optimizer=keep"], "train.init_optimizer=keep has no effect with train.init_from=null: name a"),
        (["train.init_data=continue"], "train.init_data=continue has no effect with train.init_from=null: name a"),
        (["optim.beta2=1"], "optim.beta2=1.0 must be in [0, 1)"),
        (["optim.beta1=-0.1"], "optim.beta1=-0.1 must be in [0, 1)"),
        (["optim.name=sgd"], "optim.name=sgd must be one of tiger, lion, adamw, muon"),
        (["optim.name=muon", "optim.beta2=0.9"], "optim.beta2=0.9 has no effect with optim.name=muon, whose one beta"),
        (["optim.name=muon", "optim.embedding=adamw"], "optim.embedding=adamw has no effect with optim.name=muon: l"),
        (["optim.name=muon", "optim.accumulate=momentum"], "optim.accumulate=momentum is for optim.name=tiger, not m"),
        (["optim.rms_floor=0"], "optim.rms_floor=0.0 must be positive"),
        (["optim.embedding=adamw", "optim.embedding_lr=0"], "optim.embedding_lr=0.0 must be positive"),
        (
            ["optim.beta2=0.9"],
            "optim.beta2=0.9 has no effect with optim.name=tiger, whose one beta is optim.beta1: l",
        ),
        (
            ["optim.name=adamw", "optim.embedding=lazy"],
            "optim.embedding=lazy has no effect with optim.name=adamw: lea",
        ),
        (["optim.embedding_lr=1e-4"], "optim.embedding_lr=0.0001 has no effect with optim.embedding=None: use adamw"),
        (
            ["optim.name=lion", "optim.embedding=lazy", "optim.embedding_lr=1e-4"],
            "optim.embedding_lr=0.0001 has no effect with optim.embedding=lazy: use adamw",
        ),
        (
            ["optim.name=lion", "optim.accumulate=momentum"],
            "optim.accumulate=momentum is for optim.name=tiger, not lion: leave it at gradient",
        ),
        (
            ["optim.name=lion", "optim.momentum_dtype=bf16"],
            "optim.momentum_dtype=bf16 is for optim.name=tiger, not lion: leave it at fp32",
        ),
        (
            ["optim.name=adamw", "optim.rms_floor=0.01"],
            "optim.rms_floor=0.01 is for optim.name=tiger, not adamw: leave it at 0.001",
        ),
        (
            ["optim.embedding=adamw", "optim.accumulate=momentum"],
            "optim.embedding=adamw needs the whole gradient: set optim.accumulate=gradient",
        ),
        (
            ["model.tie_embeddings=true", "optim.embedding=lazy"],
            "optim.embedding=lazy does not fit model.tie_embeddings=true, where every row has a gradient in every step",
        ),
        (
            ["model.tie_embeddings=true", "optim.embedding=adamw"],
            "optim.embedding=adamw does not fit model.tie_embeddings=true, where every row has a gradient in every ste",
        ),
        (
            ["optim.accumulate=momentum", "guard.on_spike=skip"],
            "guard.on_spike=skip does not fit optim.accumulate=momentum, whose momentum holds the batch before its",
        ),
        (["optim.clip_norm=0"], "optim.clip_norm=0.0 must be positive; optim.clip=null turns it off"),
        (["optim.clip_norm=inf"], "optim.clip_norm=inf must be a finite number"),
        (["optim.eps=1e-6"], "optim.eps=1e-06 has no effect with optim.name=tiger: leave it at 1e-8"),
        (
            ["guard.on_spike=null", "guard.spike_window=64"],
            "guard.spike_sigmas=6.0 and guard.spike_window=64 have no effect with guard.on_spike=null: leave them at",
        ),
        (["optim.final_lr=2"], "optim.final_lr=2.0 is a factor: it must be in [0, 1]"),
        (["guard.max_bad_steps=0"], "guard.max_bad_steps=0 must be positive"),
        (["guard.initial_loss_scale=1000"], "guard.initial_loss_scale=1000.0 must be a power of two"),
        (["guard.loss_scale_window=0"], "guard.loss_scale_window=0 must be positive"),
        (["guard.on_nonfinite=ignore"], "guard.on_nonfinite=ignore must be one of shrink, skip, stop, rollback"),
        (["guard.on_nonfinite=shrink", "guard.shrink_ratio=1"], "guard.shrink_ratio=1.0 must be in (0, 1)"),
        (["guard.shrink_ratio=0.9"], "guard.shrink_ratio=0.9 has no effect with guard.on_nonfinite=skip: use shrink"),
        (["guard.spike_sigmas=0"], "guard.spike_sigmas=0.0 must be positive"),
        (["guard.spike_window=7"], "guard.spike_window=7 must be at least 8, for a median"),
        (["metrics.every_steps=0"], "metrics.every_steps=0 must be positive"),
        (["metrics.statistics_every_steps=0"], "metrics.statistics_every_steps=0 must be positive, or null for off"),
        (["metrics.peak_tflops=-1"], "metrics.peak_tflops=-1.0 must be positive, or null"),
        (["engine.zero_stage=4"], "engine.zero_stage=4 must be 0, 1, 2 or 3"),
        (["engine.bucket_elements=0"], "engine.bucket_elements=0 must be positive"),
        (["engine.timeout_s=0"], "engine.timeout_s=0.0 must be between 0.001 and 31536000 seconds"),
        (["checkpoint.every_steps=0"], "checkpoint.every_steps=0 must be positive"),
        (["checkpoint.keep_last=0"], "checkpoint.keep_last=0 must be positive"),
        (["checkpoint.keep_every=15"], "checkpoint.keep_every=15 must be a multiple of checkpoint.every_steps=10, or"),
        (["checkpoint.grace_s=0"], "checkpoint.grace_s=0.0 must be between 0.001 and 31536000 seconds"),
        (["evaluate.every_steps=0"], "evaluate.every_steps=0 must be positive, or null for off"),
        (["metrics.profile_steps=[3]"], "metrics.profile_steps=[3] must be the first and the last step of the trace"),
        (["metrics.profile_steps=[3, 2]"], "metrics.profile_steps=[3, 2] must be the first and the last step of"),
        (["evaluate.n_rows=0"], "evaluate.n_rows=0 must be positive"),
        (["evaluate.prompts=[a]", "evaluate.every_steps=null"], "evaluate.prompts are continued at validations, and"),
        ([f"evaluate.prompts=[{', '.join('abcdefghijklmnopq')}]"], "evaluate.prompts has 17 texts, and may have 16"),
        (["evaluate.prompt_tokens=9"], "evaluate.prompt_tokens=9 has no effect with evaluate.prompts=[]: name texts"),
        (["train.accept_changes=optim.lr"], "train.accept_changes=optim.lr must be a list, such as [optim.lr]"),
        (["train.accept_changes=[[a]]"], "train.accept_changes[0]=[a] must be a text"),
        (["train.accept_changes=[optim.lr"], "the bracket that opens here is not closed, or lacks a comma"),
        (["data.sources=data/en"], "data.sources=data/en must be a list, such as [{path: data/en}]"),
        (["data.sources=[data/en]"], "data.sources[0]=data/en must be of the form {path: data/en}"),
        (["data.sources={path: a}"], "data.sources={path: a} must be a list, such as [{path: a}]"),
        (["data.sources.0.path=a"], "data.sources={0: {path: a}} must be a list, such as [{path: ...}]"),
        (["data.sources=[{}]"], "missing: data.sources[0].path"),
        (["data.sources=[{path: 'a}]"], "the quote that begins here is not closed"),
        (["data.sources=[{path: a}, {path: ./a/}]"], "data.sources names a folder twice: ['a', './a/']"),
        (["data.sources=[{path: s3://b/a}, {path: s3://b//a/}]"], "data.sources names a folder twice: ['s3://b/a', "),
        (["data.sources=[{path: a}, {path: file://./a}]"], "data.sources names a folder twice: ['a', 'file://./a']"),
        (["data.sources=[{path: a, weight: .inf}]"], "data.sources[0].weight=.inf must be a finite number"),
        (["data.sources=[{path: a, weight: 1e300}]"], "data.sources: weight=1e+300 must be positive, from 1e-9 to 1"),
        (["data.tokenizer="], "data.tokenizer=null must be a text"),
        (['train.run=""'], "train.run= must name a file or a folder"),
        (['train.run="a\\0b"'], r"train.run=a\x00b must name a file or a folder"),
        (["train.run=\udcff"], r"train.run=\udcff must be UTF-8"),
        (["data.cache_limit=\udcff"], r"data.cache_limit=\udcff must be UTF-8"),
        (["train.run=null"], "train.run=null must be a text; in quotes it is one"),
        (["train.run='a"], "the quote that begins here is not closed"),
        (["train.run=${train.name}"], "train.run=${train.name}: ${...} must name another setting, such as ${engine."),
        (["train.run=a${"], "train.run=a${: ${...} must name another setting, such as ${engine.zero_stage}; for the"),
        (["train.run=${train.run}"], "train.run=${train.run}: ${...} must name another setting"),
        (["train.steps=1.5"], "train.steps=1.5 must be a whole number, such as 1000 or 1e3"),
        (["train.steps=0x10"], "train.steps=0x10 must be a whole number"),
        (["train.steps=1:30"], "train.steps=1:30 must be a whole number"),
        (["train.steps=null"], "train.steps=null must be a whole number"),
        (["train.steps=[3]"], "train.steps=[3] must be a whole number"),
        (["train.seed=18446744073709551616"], "train.seed=18446744073709551616 is out of range: it must be between -2"),
        (["data.download_retries=101"], "data.download_retries=101 must be at most 100"),
        (["engine.bucket_elements=2_147_483_648"], "engine.bucket_elements=2147483648 must be at most 214748"),
        (["engine.timeout_s=1e9"], "engine.timeout_s=1000000000.0 must be between 0.001 and 31536000 seconds, a year"),
        (["optim.lr=1e19"], "optim.lr=1e+19 is too large: it must be below 2^63"),
        (["model.n_layers=1e9"], "model.n_layers=1000000000 must be at most 65536"),
        (["model.d_ff=1e12"], "model.d_ff=1000000000000 must be at most 2147483648"),
        (["model.d_model=1e9"], "a head width (model.d_head) of 250000000 must be at most 65536"),
        (["model.mla={d_rope: 1e6}", "model.n_kv_heads=null"], "model.mla.d_rope=1000000 must be at most 65536"),
        (["model.rope.context=1e9"], "model.rope.context=1000000000 must be at most 67108864"),
        (["data.seq_len=1e9"], "data.seq_len=1000000000 must be at most 67108864"),
        (["optim.lr=fast"], "optim.lr=fast must be a number, such as 0.1 or 1e-3"),
        (["optim.lr={}"], "optim.lr={} must be a number, such as 0.1 or 1e-3"),
        (["model.tie_embeddings=1"], "model.tie_embeddings=1 must be true or false"),
        (["model.rope=null"], "model.rope=null must be of the form {base: ...}; leave it out for the defaults"),
        (["model.rope=auto"], "model.rope=auto must be of the form {base: auto}"),
        (["optim.points=0.5"], "optim.points=0.5 must be pairs in braces, such as {1000: 0.5}"),
        (["optim.points={one: 0.5}"], "optim.points: key=one must be a whole number"),
        (["optim.points={1: 0.5, 01: 1}"], "optim.points={1: 0.5, 01: 1} names one key twice"),
        (["optim.points={1: 0.5, 1: 1}"], "the key 1 is there twice"),
        (["train.zzz=1"], "train.zzz is no setting: train has run, steps, global_batch_size, micro_batch_size, seed,"),
        (["=1"], "'=1' is not of the form key=value, such as train.steps=100"),
        (["train..run=a"], "'train..run=a' is not of the form key=value"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_have_their_message(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(TINY, overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.tie_embeddings=true", "optim.embedding=dense"],
        ["optim.embedding=adamw", "optim.embedding_lr=1e-4", "optim.momentum_dtype=bf16", "guard.on_spike=skip"],
        ["optim.accumulate=momentum", "guard.on_spike=rollback", "optim.rms_floor=0.01"],
        ["optim.name=lion", "optim.beta2=0.99", "optim.embedding=adamw"],
        ["optim.name=adamw", "optim.beta2=0.99", "optim.weight_decay=0", "model.tie_embeddings=true"],
        ["optim.name=muon", "optim.beta1=0.9", "optim.eps=1e-10", "model.tie_embeddings=true"],
        ["guard.on_nonfinite=shrink", "guard.shrink_ratio=0.5", "guard.on_spike=skip", "guard.spike_window=8"],
        ["metrics.statistics_every_steps=null"],
    ],
    ids=" ".join,
)
def test_what_fits_is_accepted(overrides: list[str]) -> None:
    load_config(TINY, overrides)


def test_numbers_that_are_left_to_the_optimizer() -> None:
    def numbers(tie_embeddings: bool = False, **settings: Any) -> tuple[Any, ...]:
        given = OptimConfig(**settings)
        resolved = resolve_optim(given, tie_embeddings)
        assert resolve_optim(resolved, tie_embeddings) == resolved
        changed = {f.name for f in dataclasses.fields(given) if getattr(given, f.name) != getattr(resolved, f.name)}
        assert changed <= {"lr", "beta1", "beta2", "weight_decay", "embedding", "embedding_lr"} - settings.keys()
        return tuple(
            getattr(resolved, name) for name in ("lr", "beta1", "beta2", "weight_decay", "embedding", "embedding_lr")
        )

    assert numbers() == numbers(name="tiger") == (1e-3, 0.965, None, 0.01, "lazy", None)
    assert numbers(True) == (1e-3, 0.965, None, 0.01, "dense", None)
    assert numbers(name="lion") == (3e-4, 0.95, 0.98, 0.01, "lazy", None)
    assert numbers(True, name="lion") == (3e-4, 0.95, 0.98, 0.01, "dense", None)
    assert numbers(name="adamw") == numbers(True, name="adamw") == (3e-4, 0.9, 0.95, 0.1, None, None)
    assert numbers(name="muon") == numbers(True, name="muon") == (3e-4, 0.95, None, 0.1, None, None)
    assert numbers(embedding="adamw") == (1e-3, 0.965, None, 0.01, "adamw", 3e-4)
    assert numbers(name="lion", embedding="adamw", lr=2e-4) == (2e-4, 0.95, 0.98, 0.01, "adamw", 3e-4)
    assert numbers(embedding="adamw", embedding_lr=5e-4) == (1e-3, 0.965, None, 0.01, "adamw", 5e-4)
    assert numbers(embedding="dense", weight_decay=0.0, beta1=0.0) == (1e-3, 0.0, None, 0.0, "dense", None)
    assert numbers(name="adamw", beta2=0.999, lr=1e-4) == (1e-4, 0.9, 0.999, 0.1, None, None)


def test_batch_that_the_ranks_do_not_divide() -> None:
    with pytest.raises(UserError, match=r"global_batch_size=16 must be a multiple of .*=4 times the 3 ranks = 12"):
        load_config(TINY).train.n_micro_batches(3)


def test_missing_value_and_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config file .*: the shipped ones are in configs/"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "few.yaml").write_text("model: {d_model: 64}\n")
    with pytest.raises(UserError, match=r"few\.yaml: missing: data, train"):
        load_config(tmp_path / "few.yaml")
    (tmp_path / "bad.yaml").write_text("model: {d_model: 64\n")
    with pytest.raises(UserError, match=r"bad\.yaml"):
        load_config(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "bad.yaml: this is empty: a config has sections, such as `model:` and `data:`; the shipped ones"),
        (b"- a\n- b\n", "bad.yaml: this is no config: a config has sections"),
        (b"\xff", "bad.yaml: this is no UTF-8 text: save it as UTF-8"),
        (b"model:\n\td_model: 3\n", "bad.yaml:2:1: there is a tab here: YAML wants spaces"),
        (b'model:\n  d_model: "3\n  d_ff: 4\n', "bad.yaml:2:12: the quote that begins here is not closed"),
        (b"model: {d_model: 64\n", "bad.yaml:1:8: the bracket that opens here is not closed, or lacks a comma"),
        (b"model: {}}\n", "bad.yaml:1:10: this line does not fit those above: look at the indent"),
        (b"train:\n  run: a: b\n", "bad.yaml:2:9: there is a second ': ' here: put a text with a colon into quotes"),
        (b"train:\n  run: @a\n", "bad.yaml:2:8: a text that begins with this character needs quotes"),
        (b"train:\n  steps: 1\n run: a\n", "bad.yaml:3:2: this line does not fit those above: look at the indent"),
        (b"train:\n  steps: 1\n  steps: 2\n", "bad.yaml:3:3: the key steps is there twice"),
        (b"[a]: 1\n", "bad.yaml:1:1: a key must be a text"),
        (b"~: 1\n", "bad.yaml:1:1: a key must be a text"),
        (b"a: 1\n", "bad.yaml: a is no setting: a config has model, data, train"),
        (b"optim:\n", "bad.yaml: missing: model, data, train"),
        (b"a: \a\n", "bad.yaml: this is no YAML: unacceptable character #x0007"),
        (b"a: *b\n", "bad.yaml:1:4: this is no YAML: found undefined alias"),
        (b"a: &b [*b]\n", "bad.yaml: it is nested too deeply"),
        (b"a: " + b"[" * 500, "bad.yaml: it is nested too deeply"),
        (b"model: {d_ff: !!int x}\n", "bad.yaml:1:15: this is no YAML: could not determine a constructor for the tag"),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else "",
)
def test_what_is_no_yaml_is_said_with_its_place(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(UserError) as error:
        load_config(tmp_path / "bad.yaml")
    assert str(error.value).startswith(f"{tmp_path}/{message}") and "\n" not in str(error.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this is a folder"):
        load_config(tmp_path)
    with pytest.raises(UserError, match="it is nested too deeply"):
        load_config(TINY, [".".join("a" * 1500) + "=1"])
    with pytest.raises(UserError, match="it is nested too deeply"):
        load_config(TINY, ["model=" + "[" * 500])


def test_every_yaml_means_what_omegaconf_reads_in_it() -> None:
    """Numbers, truth values and lists, by another reader: texts are what the two read differently on purpose."""
    for path in [path for path in SHIPPED if path.stem not in BUNDLES]:
        assert load_config(path) == OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path))
        )


WORDS = [
    "007", "2024_01_01", "2024-01-01", "on", "no", "true", "3e-4", "1:30", "0x1f", ".inf", "nan", "=", "<<", "-", "???",
    "a: b", "a #b", "#a", "@a", "%a", "&a", "*a", "!a", "|", ">", "[a]", "{a: b}", "a,b", "a=b", "中文", "a\tb", "`",
]  # fmt: skip
PLAIN = ["007", "2024_01_01", "2024-01-01", "on", "no", "true", "3e-4", "1:30", "0x1f", ".inf", "nan", "a=b", "中文"]
"""Those that YAML takes without quotes."""


def test_text_stays_text(tmp_path: Path) -> None:
    keys = ["train.run", "data.tokenizer", "data.cache", "data.cache_limit", "train.init_from"]
    for word in WORDS:
        config = load_config(TINY, [f"{key}={word}" for key in keys])
        assert (config.train.run, config.data.tokenizer, config.data.cache) == (word, word, word)
        assert (config.data.cache_limit, config.train.init_from) == (word, word)
    double = [word.replace("\t", "\\t") for word in WORDS]
    written = PLAIN + [f"'{word}'" for word in WORDS] + [f'"{word}"' for word in double]
    lines = "".join(f"    - {text}\n" for text in written)
    flow = f"data.sources=[{', '.join(f'{{path: {text}}}' for text in PLAIN)}]"
    config = load_config(TINY, [f"train.accept_changes=[{', '.join(written)}]", flow])
    assert config.train.accept_changes == PLAIN + WORDS + WORDS
    assert [source.path for source in config.data.sources] == PLAIN
    text = TINY.read_text(encoding="utf-8").replace("\ntrain:", f"\ntrain:\n  accept_changes:\n{lines}")
    (tmp_path / "named.yaml").write_text(text, encoding="utf-8")
    assert load_config(tmp_path / "named.yaml").train.accept_changes == PLAIN + WORDS + WORDS


def test_values_of_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    sources = "data.sources=[{path: ~/data, weight: 1e3}, {path: s3://~/b, weight: 2}]"
    train = ["train.run=~/x", "train.init_from=~"]
    config = load_config(TINY, [*train, sources, "data.tokenizer=~/t.model", "data.cache=~/c"])
    assert (config.train.run, config.train.init_from, config.data.cache) == ("/home/me/x", None, "/home/me/c")
    assert config.data.tokenizer == "/home/me/t.model"
    assert [source.path for source in config.data.sources] == ["/home/me/data", "s3://~/b"]
    forms = {"030": 30, "1_000": 1000, "1e3": 1000, "2.5e2": 250, "'30'": 30, "+40": 40, "90.0": 90}
    for text, steps in forms.items():
        assert load_config(TINY, [f"train.steps={text}"]).train.steps == steps
    for text, truth in {"true": True, "False": False, "yes": True, "off": False}.items():
        assert load_config(TINY, [f"data.shuffle={text}"]).data.shuffle is truth
    filled = "train.run=${engine.zero_stage}_${optim.name}_${train.steps}\\${x}"
    assert load_config(TINY, ["train.run=a", filled]).train.run == "1_tiger_200${x}"
    mla = load_config(TINY, ["model.mla.d_rope=16", "model.n_kv_heads=null"]).model.mla
    assert mla is not None and mla.d_rope == 16
    schedule = ["optim.schedule=piecewise", "optim.warmup_steps=0"]
    points = ["optim.points={0: 1, 1e2: 0.5}", "optim.points.150=0.1"]
    assert load_config(TINY, [*schedule, *points]).optim.points == {0: 1.0, 100: 0.5, 150: 0.1}
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data")
    with pytest.raises(UserError, match="names a folder twice"):
        load_config(TINY, [f"data.sources=[{{path: {tmp_path}/data}}, {{path: {tmp_path}/link}}]"])


TWO = "data.sources=[{path: x/web, weight: 3}, {path: x/made, weight: 1, synthetic: true}]"
SIX = "data.sources=[{path: web, weight: 1}, {path: a, weight: 0, synthetic: true}, {path: b, weight: 0}]"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["{until_step: 9}"], "data.stages: the stage until_step=9 changes nothing: give it seq_len or weights"),
        (["{until_step: 9, weights: {web: 1}}"], "the weights until_step=9 lack [made]: name each source; 0 is none"),
        (["{until_step: 9, weights: {web: 1, mad: 1}}"], "name ['mad'], which is no source: data.sources has [web, ma"),
        (["{until_step: 9, weights: {web: 0, made: 0}}"], "until_step=9 are all 0: give at least one source a weight"),
        (["{until_step: 9, weights: {web: -1, made: 0}}"], "data.stages.weights: web=-1.0 must be positive, from 1e-9"),
        (["", "data.max_synthetic=0.2"],
         "data.max_synthetic=0.2, but in steps 1 to 200 the synthetic sources have a share of 0.25 (made 0.25): lower "
         "their weights, add other text, or raise data.max_synthetic"),
        (["{until_step: 9, weights: {web: 9, made: 1}}", "data.max_synthetic=0.2"], "but in steps 10 to 200 the synth"),
        (["{until_step: 9, weights: {web: 1, made: 2}}", "data.max_synthetic=0.25"], "in steps 1 to 9 the synthetic "),
        (["{until_step: 9, seq_len: 64}, {until_step: 20, seq_len: 128}", "data.max_synthetic=0.2"], "steps 1 to 200"),
        (["", "data.max_synthetic=1.5"], "data.max_synthetic=1.5 is a share: it must be from 0 to 1"),
        (["", SIX], "data.sources: weight=0.0 must be positive, since no stage reads a: or leave it out"),
    ],
)  # fmt: skip
def test_mixtures_that_are_refused(overrides: list[str], message: str) -> None:
    stages, *more = overrides
    with pytest.raises(UserError) as error:
        load_config(TINY, [TWO, f"data.stages=[{stages}]", *more])
    assert message in str(error.value)


def test_mixtures_in_turn() -> None:
    def shares(*overrides: str) -> list[tuple[int, list[float] | None]]:
        return [(m.until_step, m.shares()) for m in load_config(TINY, [TWO, *overrides]).data.mixtures]

    end = 2**63
    assert shares() == [(end, [0.75, 0.25])]
    # what changes nothing is no part of its own, such as a stage of lengths
    stages = "{until_step: 2, seq_len: 64}, {until_step: 5, weights: {web: 6, made: 2}}, {until_step: 7, weights: "
    assert shares(f"data.stages=[{stages}{{web: 0, made: 1}}}}]") == [
        (5, [0.75, 0.25]),
        (7, [0, 1]),
        (end, [0.75, 0.25]),
    ]
    # the cap looks at what is read: nothing comes after the last step
    load_config(TINY, [TWO, "data.max_synthetic=0.1", "data.stages=[{until_step: 200, weights: {web: 9, made: 1}}]"])
    load_config(TINY, [TWO, "data.max_synthetic=0.25"])
    data = load_config(
        TINY, ["data.sources=[{path: web}, {path: made, synthetic: true}]", "data.max_synthetic=0.2"]
    ).data
    data.check_synthetic(200, [80, 20])
    with pytest.raises(
        UserError, match=r"in steps 1 to 200 the synthetic sources have a share of 0.2593 \(made 0.2593"
    ):
        data.check_synthetic(200, [80, 28])


def test_names_of_sources_are_short_where_they_differ() -> None:
    assert name_sources(["data/web", "s3://bucket/code", "a/long", "b/long"]) == ["web", "code", "a/long", "b/long"]


def numeric_fields(section: Any, prefix: str = "") -> list[str]:
    """The key of each field that takes numbers."""
    found = []
    for name, kind in get_type_hints(section).items():
        kinds = {kind, *get_args(kind)}
        for inner in filter(dataclasses.is_dataclass, kinds):
            found += numeric_fields(inner, f"{prefix}{name}[0]." if get_origin(kind) is list else f"{prefix}{name}.")
        found += [f"{prefix}{name}"] if kinds & {int, float} else []
    return found


def test_numbers_out_of_range_are_refused_by_name() -> None:
    keys = numeric_fields(Config)
    assert {"train.seed", "data.sources[0].weight", "model.mla.d_rope", "engine.timeout_s", "optim.points"} <= {*keys}
    given: Any = OmegaConf.to_container(OmegaConf.load(TINY), resolve=False)
    given["data"]["stages"] = [{"until_step": 1, "seq_len": 2}]
    for key, value in itertools.product(keys, ["nan", "-.inf", str(2**64), math.nan, math.inf, 2**64]):
        values: Any = copy.deepcopy(given)
        *owners, name = key.replace("[0]", "").split(".")
        section = values
        for owner in owners:
            section = section.setdefault(owner, {})
            section = section[0] if isinstance(section, list) else section
        section[name] = {1: value} if name == "points" else value
        if key == "model.rope.base" and str(value) == str(2**64):  # which narrow heads need
            continue
        with pytest.raises(UserError) as error:
            build(Config, values, where="here")
        assert key in str(error.value) or f"data.sources: {name}=" in str(error.value), (key, value, str(error.value))


def test_numbers_out_of_range_on_the_command_line_and_in_code() -> None:
    for text in ("nan", ".inf", "-.inf", "1e400"):
        with pytest.raises(UserError, match=r"optim\.lr=\S+ must be a finite number, such as 0\.1 or 1e-3"):
            load_config(TINY, [f"optim.lr={text}"])
    with pytest.raises(UserError, match=r"optim\.lr=inf is too large: it must be below 2\^63"):
        OptimConfig(lr=math.inf)
    assert load_config(TINY, [f"train.seed={2**63 - 1}"]).train.seed == 2**63 - 1


def test_numbers_of_programs() -> None:
    assert (as_integer("1e3"), as_integer("-5"), as_integer("1_0"), as_number("1e-3")) == (1000, -5, 10, 0.001)
    for text in ("nan", "inf", str(2**63), "1e400", "x", "", "1.5"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"must be"):
            as_integer(text)
    for text in ("nan", "inf", "1e400", "x", ""):
        with pytest.raises(argparse.ArgumentTypeError, match=r"must be a (finite )?number"):
            as_number(text)


PARTS = st.sampled_from([*WORDS, "${", "\\", "}", " ", "\n", "'"])
TEXTS = st.text(min_size=1) | st.sampled_from(WORDS) | st.lists(PARTS, min_size=1).map("".join)
KEYS = st.sampled_from([*numeric_fields(Config), "train.run", "data.sources", "model", "train", "optim", "a", ""])
TINY_MODEL = load_config(TINY).model


def is_place(text: str) -> bool:
    try:
        return not text.startswith("~") and "\0" not in text and bool(text.encode())
    except UnicodeEncodeError:
        return False


@example(run="0", limit=None, changes=["${", "\\???"], lr=1.0, seed=0)
@given(
    run=TEXTS.filter(is_place), limit=st.none() | TEXTS.filter(lambda text: "\0" not in text), changes=st.lists(TEXTS),
    lr=st.floats(min_value=0, max_value=1e18, exclude_min=True), seed=st.integers(0, 2**63 - 1),
)  # fmt: skip
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_config_is_read_as_it_was_written(
    tmp_path: Path, run: str, limit: str | None, changes: list[str], lr: float, seed: int
) -> None:
    train = TrainConfig(run=run, steps=200, global_batch_size=4, micro_batch_size=4, accept_changes=changes, seed=seed)
    data = DataConfig(sources=[SourceConfig(path=run)], tokenizer=run, seq_len=64, cache_limit=limit)
    config = Config(model=TINY_MODEL, data=data, train=train, optim=OptimConfig(lr=lr))
    try:
        (tmp_path / "again.yaml").write_text(to_yaml(config), encoding="utf-8")
    except UnicodeEncodeError:
        return
    assert load_config(tmp_path / "again.yaml") == config
    values = {"text": changes, "number": lr, "limit": limit, "count": seed}
    (tmp_path / "plain.yaml").write_text(to_yaml(values), encoding="utf-8")
    assert read_yaml(tmp_path / "plain.yaml") == values


@given(override=st.builds("{}={}".format, KEYS, TEXTS | st.just("")) | st.text())
@settings(deadline=None, max_examples=100)
def test_every_override_is_read_or_refused_in_one_line(override: str) -> None:
    try:
        load_config(TINY, [override])
    except UserError as error:
        said = str(error)
        assert said.isprintable(), said
        assert not any(word in said for word in ("OmegaConf", "omegaconf", "Node", "Interpolation", "subclass")), said


def test_yaml_is_loaded_safely(tmp_path: Path) -> None:
    (tmp_path / "evil.yaml").write_text(f"model: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
    with pytest.raises(UserError):
        load_config(tmp_path / "evil.yaml")
    assert not (tmp_path / "made").exists()


def source_overrides(prepared: Prepared) -> list[str]:
    return [
        f"data.sources=[{{path: {prepared.data}}}]",
        f"data.tokenizer={prepared.tokenizer}",
        f"data.seq_len={prepared.seq_len}",
        "model.vocab_size=512",
    ]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.d_modle=64", "d_model"),
        ("data.sources=[{path: no/such/folder}]", "no/such/folder"),
        ("model.n_kv_heads=3", "model.n_kv_heads=3"),
    ],
)
def test_launch_refuses_in_one_line_and_two_seconds(prepared: Prepared, override: str, words: str) -> None:
    command = [sys.executable, "launch/train.py", "configs/tiny_gqa.yaml", *source_overrides(prepared), override]
    began = time.monotonic()
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds = time.monotonic() - began
    assert result.returncode == 2
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ") and words in result.stderr
    assert seconds < 2


def test_config_imports_neither_torch_nor_ours() -> None:
    program = (
        "import sys, megakexue.config; "
        "print([m for m in sys.modules if m == 'torch' or m.startswith('megakexue.') and m != 'megakexue.config'])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def parse(path: Path) -> ast.Module:
    """Parse a source. In config.py the checks are left out: a field that is only checked is not used."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path == ROOT / "megakexue" / "config.py":
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (node.name == "__post_init__" or node.name.startswith("_check_")):
                node.body = [ast.Pass()]
    return tree


def test_every_field_is_used_and_every_used_field_is_declared() -> None:
    classes = [c for c in vars(config_module).values() if isinstance(c, type) and dataclasses.is_dataclass(c)]
    fields = {c.__name__: {f.name for f in dataclasses.fields(c)} for c in classes}
    known = {c.__name__: fields[c.__name__] | set(dir(c)) for c in classes}
    paths = [path for folder in ("megakexue", "launch", "tools") for path in (ROOT / folder).rglob("*.py")]
    reads = Reads([parse(path) for path in paths])
    found = {(owner, name) for owner, name in reads.found if owner in known}
    assert {(owner, name) for owner, name in found if name not in known[owner]} == set()
    # what a resolved section is read for is a use of the section that declares it
    used = {(ancestor, name) for owner, name in found for ancestor in reads.lineage(owner)}
    declared = {(owner, name) for owner in fields for name in fields[owner] if not owner.startswith("Resolved")}
    assert declared - used == set()


def test_reads_tell_a_field_from_an_attribute_of_the_same_name() -> None:
    source = """
class Optim:
    name: str
    path: str
class Config:
    optim: Optim
    parts: list[Part]
class Part:
    path: str
def load() -> Config: ...
class Engine:
    def __init__(self, config: Config, tensor) -> None:
        self.optim, self.tensor = config.optim, tensor
    def step(self):
        return self.optim.name, self.tensor.path, [part.path for part in load().parts]
"""
    found = Reads([ast.parse(source)]).found
    assert {"name", "path"} <= {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    assert ("Optim", "name") in found and ("Part", "path") in found
    assert ("Optim", "path") not in found


def test_build_makes_a_section_from_plain_values() -> None:
    values = {"vocab_size": 8, "d_model": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ff": 8}
    assert build(ModelConfig, values, where="here").head_width == 4
    with pytest.raises(UserError, match=r"here: .*d_fff"):
        build(ModelConfig, values | {"d_fff": 1}, where="here")


PROGRAM = """
import sys
from megakexue.config import UserError, run_program

def main():
    for _ in range(int(sys.argv[2])):
        print("x" * 50)
    if sys.argv[1] == "mistake":
        raise UserError("of the user")
    if sys.argv[1] == "fault":
        raise FileNotFoundError("of the program")
    if sys.argv[1] == "help":
        raise SystemExit(0)

run_program(main)
"""


def test_output_that_nobody_reads_or_that_has_no_room() -> None:
    reader, pipe = os.pipe()
    os.close(reader)
    full = "error: cannot write the output: [Errno 28] No space left on device\n"
    with open("/dev/full", "wb") as disk:
        # 3 lines stay in Python's buffer until the end, 10,000 do not
        for kind, n_lines, stdout, code, message in [
            ("well", 3, pipe, 128 + 13, ""),
            ("well", 10_000, pipe, 128 + 13, ""),
            ("help", 3, pipe, 128 + 13, ""),
            ("well", 3, disk.fileno(), 2, full),
            ("well", 10_000, disk.fileno(), 2, full),
            ("mistake", 3, subprocess.DEVNULL, 2, "error: of the user\n"),
        ]:
            command = [sys.executable, "-c", PROGRAM, kind, str(n_lines)]
            environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True)
            assert (done.returncode, done.stderr) == (code, message), (kind, n_lines)
    os.close(pipe)
    assert run_python(PROGRAM, "fault", "3").stderr.endswith("FileNotFoundError: of the program\n")
