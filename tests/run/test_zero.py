"""Where each stage keeps masters, gradients and weights: every element once, and what `clear` frees."""

import math
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from megakexue.config import ResolvedConfig
from megakexue.core.axes import parameter_names, shape
from megakexue.run.data import Batches
from megakexue.run.zero import STAGES, Partitioned, Replicated, Sliced
from tests.conftest import Prepared
from tests.helpers import make_config
from tests.ranks import run_on_ranks


def look(config: ResolvedConfig) -> list[dict[str, Any]]:
    """What each stage's layout says on this rank, before and after one step with the rows of rank 0."""
    from megakexue.dist import ALONE
    from megakexue.run.engine import Engine, start

    ranks = start(config.engine)
    found = []
    for stage in STAGES:
        engine = Engine(replace(config, engine=replace(config.engine, zero_stage=stage)), ranks)
        engine.load_new(seed=0)
        layout = engine._layout
        batches = Batches(
            config.data, global_batch_size=2, micro_batch_size=2, ranks=ALONE, cache=Path("unused")
        ).next_step()
        engine._engine.train()
        engine._backward(batches[0], torch.tensor(1.0))
        flats = layout.gradients()
        gradients = [s.of(flats[s.flat]).clone() for s in layout.segments]
        layout.clear()
        inner = engine._engine.optimizer
        held = [x for xs in getattr(inner, "averaged_gradients", {}).values() for x in xs or []]
        found.append(
            {
                "kind": type(layout).__name__,
                "segments": [(s.name, s.start, s.stop) for s in layout.segments],
                "masters": [s.of(layout.flats[s.flat]).clone() for s in layout.segments],
                "weights": [[x.float() for x in layout.weights(s)] for s in layout.segments],
                "gradients": [x.float() for x in gradients],
                "held": len(held) + sum(p.grad is not None for p in engine.module.parameters()) * (stage > 0),
            }
        )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_each_stage_holds_every_element_once(dtype: str, prepared: Prepared) -> None:
    config = make_config(prepared, dtype=dtype, rows=4)
    of_ranks = run_on_ranks(2, look, config)
    whole: dict[str, torch.Tensor] = {}
    for stage, kind in STAGES.items():
        assert kind is {0: Replicated, 1: Sliced, 2: Sliced, 3: Partitioned}[stage]
        pieces: dict[str, list[tuple[int, int]]] = defaultdict(list)
        gradients = {name: torch.zeros(math.prod(shape(name, config.model))) for name in parameter_names(config.model)}
        for rank, stages in enumerate(of_ranks):
            facts = stages[stage]
            assert facts["kind"] == kind.__name__ and facts["held"] == 0
            for (name, start, stop), master, weights, gradient in zip(
                facts["segments"], facts["masters"], facts["weights"], facts["gradients"], strict=True
            ):
                assert master.dtype == torch.float32 and len(master) == len(gradient) == stop - start > 0
                assert weights
                for weight in weights:
                    assert torch.equal(
                        weight, master.to(getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[dtype])).float()
                    )
                pieces[name].append((start, stop))
                if stage > 0 or rank == 0:
                    gradients[name][start:stop] = gradient
        for name in parameter_names(config.model):
            n = math.prod(shape(name, config.model))
            if stage == 0:
                assert pieces[name] == [(0, n)] * 2, name
                continue
            edges = sorted(pieces[name])
            assert edges[0][0] == 0 and edges[-1][1] == n
            assert all(a[1] == b[0] for a, b in pairwise(edges)), (stage, name, edges)
        # both ranks had the same rows, so averaging is exact, and the reduced gradient is that of one rank
        whole = whole or gradients
        for name, gradient in gradients.items():
            assert gradient.abs().sum() > 0 and torch.equal(gradient, whole[name]), (stage, name)
