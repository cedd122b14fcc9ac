"""The formulas against the module's own sum and torch's flop counter."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megakexue.config import load_config
from megakexue.describe import describe, flops_per_token, model_state_bytes, n_parameters
from megakexue.loss import plain_cross_entropy
from megakexue.model import resolve
from tests.test_model import VARIANTS, build, positions_of, tiny

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_counts_equal_the_module(changes: dict) -> None:
    config = tiny(**changes)
    assert n_parameters(config) == sum(p.numel() for p in build(config).parameters())


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_flops_equal_torchs_counter(changes: dict) -> None:
    config = tiny(**changes)
    model = build(config)
    tokens = torch.randint(0, 97, (2, 33))
    with FlopCounterMode(display=False) as counter:
        rotary = model.rotary(positions_of(tokens), 33)
        x = model.embedding(tokens)
        for block in model.blocks:
            x = block(x, rotary, positions_of(tokens), None, "reference", None)
        weight = model.head.weight
        plain_cross_entropy(model.norm(x).flatten(0, 1), weight, tokens.flatten(), 1.0).backward()
    # the reference attention computes the whole square, so a query costs 33 keys
    assert counter.get_total_flops() == tokens.numel() * flops_per_token(config, 33.0)


def test_state_bytes_by_stage() -> None:
    config = load_config(ROOT / "configs" / "tiny_gqa.yaml", ["engine.dtype=bf16"])
    n = n_parameters(config.model)
    totals = []
    for stage in range(4):
        staged = load_config(ROOT / "configs" / "tiny_gqa.yaml", ["engine.dtype=bf16", f"engine.zero_stage={stage}"])
        totals.append(sum(model_state_bytes(staged, 4).values()))
    # bf16 weights and gradients 2 + 2, master 4, two moments 8; split over 4 ranks from stage 1, 2, 3 on
    assert totals == [16 * n, 4 * n + 3 * n, 2 * n + n // 2 + 3 * n, 4 * n]


def test_description_names_the_numbers() -> None:
    config = load_config(ROOT / "configs" / "tiny_gqa.yaml")
    object.__setattr__(config, "model", resolve(config.model, "adamw", config.data.seq_len))
    text = describe(config, 2)
    for words in ("model:      vocab_size=4096 d_model=128", "rope={base=7400.0 context=256}", "train:      run=runs/",
                  f"{n_parameters(config.model):,} parameters", "rope base 7400 for 256 tokens", "2 ranks x 2 micro-ba",
                  "16 rows x 256 tokens = 4,096 tokens", "200 steps = 819,200 tokens", "ZeRO-1 fp32"):  # fmt: skip
        assert words in text
