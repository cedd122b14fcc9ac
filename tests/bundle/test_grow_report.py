"""The plan: a line for each axis and scale, and one for the blocks."""

import dataclasses

from megakexue.bundle.axis_maps import Choices
from megakexue.bundle.grow import Growth
from megakexue.bundle.grow_report import plan
from megakexue.config import RopeConfig
from tests.bundle.growing import BASE, GQA, MLA, model


def test_a_line_for_each_axis_says_how_it_grows() -> None:
    old = model(GQA | dict(n_heads=2, n_kv_heads=1))
    new = model(GQA, d_model=18, d_head=8, n_layers=3, vocab_size=44)
    lines = plan(Growth(old, new, Choices(units="copy")))
    assert [line.split() for line in lines[:8]] == [
        line.split()
        for line in (
            "vocabulary 40 -> 44 4 new rows at the mean",
            "d_model 12 -> 18 pad, weights 0, 1.2247, null-space noise 1",
            "feed-forward 10 -> 10 as it is",
            "query heads 2 -> 4 0 fresh, 2 copies",
            "kv heads 1 -> 2 0 fresh, 1 copies",
            "unrotated width 0 -> 0 as it is",
            "rotary width 4 -> 8 4 new dimensions, silent in the query",
            "value width 4 -> 8 0 fresh, 4 copies",
        )
    ]
    assert lines[8].split(maxsplit=4) == ["layers", "2", "->", "3", "pair: blocks 2 are new"]
    assert all(line.endswith(" made up for in the weights") for line in lines[9:])
    assert [line.split()[0] for line in lines[9:]] == ["embed_scale", "softmax_scale", "residual_alpha"]


def test_only_what_is_there_has_a_line() -> None:
    old = model(MLA)
    lines = plan(Growth(old, model(MLA, mla=dataclasses.replace(MLA["mla"], d_latent=9)), Choices(width="copy")))
    assert not any(line.startswith(("kv heads", "embed_scale")) for line in lines)
    (line,) = (line for line in lines if line.startswith("kv latent"))
    assert line.endswith(" 6 -> 9        copy, weights 0.866, 1.2247, null-space noise 1")
    assert any(line.startswith("layers") and line.endswith(" as it is") for line in lines)
    rope = dict(d_head=6, rope=RopeConfig(base=BASE**1.5))
    (line,) = (line for line in plan(Growth(model(GQA), model(GQA, **rope), Choices())) if "rope.base" in line)
    assert line.endswith("1e+04 -> 1e+06    where the frequencies are")


def test_stacked_blocks_are_said_to_be_lossy() -> None:
    old = model(GQA)
    stacked, not_deeper = (
        plan(Growth(old, model(GQA, **larger), Choices(depth="stack"))) for larger in (dict(n_layers=4), dict(d_ff=12))
    )
    assert any("THIS CHANGES THE FUNCTION" in line for line in stacked)
    assert not any("FUNCTION" in line for line in not_deeper)
