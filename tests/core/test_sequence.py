"""Ranks that share rows compute what one rank computes: loss and gradients, in every form of attention."""

import itertools
import os
from typing import Any

import pytest
import torch

from megakexue.config import AttentionConfig, MlaConfig
from megakexue.core.batch import Batch, make_batch
from megakexue.core.device import has_compiler
from megakexue.core.sequence import Sequence
from megakexue.dist import Ranks, sequence_swap
from tests.helpers import build, tiny
from tests.ranks import run_on_ranks

T, BOS, PAD = 64, 1, 0
MLA: dict[str, int] = dict(d_nope=16, d_rope=8, d_value=16, d_latent=32)
MODELS: dict[str, dict[str, Any]] = {
    "4 heads, 2 groups": dict(n_heads=4, n_kv_heads=2),
    "4 heads, 1 group": dict(n_heads=4, n_kv_heads=1),
    "8 heads, 2 groups, cosine": dict(n_heads=8, n_kv_heads=2),
    "4 heads, 2 groups, biases and norms": dict(n_heads=4, n_kv_heads=2),
    "MLA": dict(n_heads=8, mla=MlaConfig(**MLA)),
    "MLA of a wide latent": dict(n_heads=4, mla=MlaConfig(**(MLA | dict(d_latent=96, d_query_latent=24)))),
}


def rows(packed: bool) -> Batch:
    """Two rows, of several documents with padding at the end or of one document."""
    import numpy as np

    tokens = np.random.default_rng(0).integers(3, 97, (2, T + 1))
    tokens[:, 0] = BOS
    if packed:
        tokens[0, [5, 31, 32, 33]] = tokens[1, [16, 50]] = BOS
        tokens[1, 60:] = PAD
    return make_batch(tokens, [], bos_id=BOS, pad_id=PAD)


def step(model: Any, batch: Batch, sequence: Sequence | None) -> dict[str, torch.Tensor]:
    """The summed loss and the gradients of all parameters, added up over the ranks of `sequence`."""
    model.zero_grad()
    if sequence:
        batch = batch.part(sequence.rank, sequence.size)
    inputs = batch.tokens, batch.positions, batch.boundaries
    if model.embedding.weight.dtype == torch.float64:  # the model's own loss is float32
        logits = model(*inputs, sequence=sequence).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, batch.targets.flatten(), reduction="sum")
    else:
        loss = model(*inputs, batch.targets, sequence=sequence).objective
    loss.backward()
    results = {name: p.grad.clone() for name, p in model.named_parameters()} | {"loss": loss.detach()[None]}
    n_targets = torch.tensor(batch.n_targets)
    for x in (*results.values(), n_targets) if sequence else ():
        torch.distributed.all_reduce(x)
    return results | {"targets": n_targets[None].double()}


def greatest_differences(cases: list[tuple[str, bool, bool]], dtype: torch.dtype) -> dict[str, float]:
    """Of (model, packed, compiled): the greatest relative difference that sharing rows makes, and where it is."""
    torch.distributed.init_process_group("gloo")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    ranks = Ranks(rank=rank, world_size=size, local_rank=rank, local_world_size=size, sequence_size=size)
    sequence = Sequence(rank=rank, size=size, swap=sequence_swap(ranks, 60.0))
    found: dict[str, float] = {}
    for name, packed, compiled in cases:
        has_more = "biases" in name
        changes = dict(attention=AttentionConfig(
            scale="log_n", similarity="cosine" if "cosine" in name else "dot", qkv_bias=has_more, qk_norm=has_more
        ))  # fmt: skip
        model = build(tiny(**MODELS[name], **changes), "blocked", dtype)
        expected = step(model, rows(packed), None)
        if compiled:
            model.compile_parts()
        whole = [(what, None) for what in ("none", "product", "feed_forward", "block")]
        # each form is compiled again
        for recompute, tile in [("none", None), ("block", 16)] if compiled else [*whole, ("none", 3), ("block", 3)]:
            model.set_recompute(recompute, tile_tokens=tile)  # type: ignore[arg-type]
            got = step(model, rows(packed), sequence)
            for key in got:
                difference = float((got[key] - expected[key]).norm() / expected[key].norm())
                label = f"{name} {'packed' if packed else 'plain'}"
                found[label] = max(found.get(label, 0.0), difference)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("n_ranks", [2, 4])
def test_ranks_that_share_rows_have_the_gradients_of_one(n_ranks: int) -> None:
    cases = [(name, packed, False) for name, packed in itertools.product(MODELS, (False, True))]
    for found in run_on_ranks(n_ranks, greatest_differences, cases, torch.float64):
        assert len(found) == len(cases) and max(found.values()) < 1e-13, found


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="needs g++")
def test_compiled_blocks_share_rows_too() -> None:
    cases = [(name, True, True) for name in ("4 heads, 2 groups, biases and norms", "MLA")]
    for found in run_on_ranks(2, greatest_differences, cases, torch.float32):
        assert len(found) == len(cases) and max(found.values()) < 3e-6, found


def test_latents_are_sent_where_they_are_less() -> None:
    sequence = Sequence(rank=0, size=4, swap=lambda x: x)
    layers = {name: build(tiny(**kind), "blocked").blocks[0].attention for name, kind in MODELS.items()}
    sent = {name: layer.sends_latent(sequence) for name, layer in layers.items()}  # type: ignore[union-attr, operator]
    assert sent == {name: name == "MLA" for name in MODELS}
