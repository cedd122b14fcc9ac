"""The proof of a growth, part by part, says what whole models say."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from megakexue.bundle.axis_maps import Choices
from megakexue.bundle.grow import Growth
from megakexue.bundle.trace import Difference, grown_weights
from megakexue.core.axes import parameter_names
from megakexue.core.decoder import Norm
from tests.bundle.growing import GQA, MLA, build, grown, logits_of, model, packed, tied_logit_scale, trained


@pytest.mark.parametrize("values", [GQA, MLA], ids=["gqa", "mla"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("residual", ["deepnorm", "prenorm"])
def test_the_function_is_compared_while_the_weights_are_made(
    values: dict[str, Any], tied: bool, residual: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megakexue.bundle.grow.CHUNK", 100)  # several chunks a matrix
    old = model(values, tie_embeddings=tied, residual=residual)
    new = tied_logit_scale(
        old, model(values, tie_embeddings=tied, residual=residual, d_model=18, n_layers=3, vocab_size=47)
    )
    growth, weights, batch = Growth(old, new, Choices()), trained(old), packed(40)
    weights = {name: w.float() for name, w in weights.items()}
    reports: list[list[Difference]] = []
    made = dict(grown_weights(growth, weights.__getitem__, batch, reports.append))
    assert made.keys() == set(parameter_names(new)) and all(w.dtype == torch.float32 for w in made.values())
    (differences,) = reports
    assert [d.dtype for d in differences] == ["float64", "float32"] and all(d.is_small for d in differences)
    assert growth.feels_eps == (residual == "deepnorm")
    assert [d.norm_eps for d in differences] == [1e-30 if growth.feels_eps else 1e-5, 1e-5]
    for dtype, d in zip((torch.float64, torch.float32), differences):
        before, after = build(old, weights.__getitem__, dtype), build(new, made.__getitem__, dtype)
        if dtype == torch.float64:
            after = grown(growth, weights)
            for module in (*before.modules(), *after.modules()):
                if isinstance(module, Norm):
                    module.eps = d.norm_eps
        a, b = logits_of(before, batch), logits_of(after, batch)
        # float64 from the same rounding to 1e-11; what float32 loses depends on how products are cut
        found = float((a - b[..., :40]).abs().max())
        assert d.largest == (pytest.approx(found, abs=1e-11) if d.dtype == "float64" else pytest.approx(found, rel=0.9))
        assert d.deviation == pytest.approx(float(a.std()), rel=1e-5)
        loss = functional.cross_entropy(a.flatten(0, 1), batch.targets.flatten())
        assert d.losses[0] == pytest.approx(float(loss), rel=1e-5)

    # a map that is not exact is seen
    m = growth.maps["m"]
    growth.maps["m"] = dataclasses.replace(m, read=m.read * (1 + 1e-9))
    list(grown_weights(growth, weights.__getitem__, batch, reports.append))
    assert [d.is_small for d in reports[1]] == [False, True]  # float32 could not say
    growth.maps["m"] = dataclasses.replace(m, read=m.read * math.nan)
    list(grown_weights(growth, weights.__getitem__, batch, reports.append))
    assert not any(d.is_small for d in reports[2])
