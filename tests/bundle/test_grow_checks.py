"""What growth refuses, with a remedy that works, and which copies never part."""

import dataclasses
import math
import re
from typing import Any

import pytest

from megakexue.bundle.axis_maps import Choices
from megakexue.bundle.grow import Growth
from megakexue.bundle.grow_checks import locked_axes
from megakexue.config import AttentionConfig, MlaConfig, RopeConfig, UserError
from tests.bundle.growing import BASE, GQA, MLA, build, grown, logits_of, model, packed, trained

LONGROPE = RopeConfig(base=BASE, extension="longrope", trained_context=32, longrope_factors=[1.0, 3.5])
REFUSALS: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], str, dict[str, Any]]] = [
    # old, changes, choices, message, the remedy that the message names
    (GQA, dict(d_ff=8), {}, "model.d_ff=8 is below that of the weights: set model.d_ff=10 or more", dict(d_ff=10)),
    (GQA, dict(n_layers=1), {}, "model.n_layers=1 is below", dict(n_layers=2)),
    (GQA, dict(d_head=2), {}, "model.d_head=2 is below that of the weights: set model.d_head=4", dict(d_head=4)),
    (
        MLA,
        dict(mla=MlaConfig(d_latent=5, d_query_latent=7, d_nope=3, d_rope=4, d_value=4)),
        {},
        "model.mla.d_latent=5 is below that of the weights: set model.mla.d_latent=6 or more",
        dict(mla=MLA["mla"]),
    ),
    (
        MLA,
        dict(mla=MlaConfig(d_latent=6, d_nope=3, d_rope=4, d_value=4)),
        {},
        "model.mla.d_query_latent=None: a latent can be widened, not put in or taken out, and that of the weights is "
        "7: set model.mla.d_query_latent=7",
        dict(mla=MLA["mla"]),
    ),
    (GQA, dict(n_heads=3, n_kv_heads=None, d_head=None, mla=MLA["mla"]), {}, "model.mla: .* keep the kind", {}),
    (
        GQA,
        dict(norm_eps=1e-6),
        {},
        "model.norm_eps=1e-06 changes what the weights compute, which have 1e-05: set model.norm_eps=1e-05",
        dict(norm_eps=1e-5),
    ),
    (GQA, dict(residual="prenorm"), {}, "model.residual=prenorm .* set model.residual=deepnorm", {}),
    (GQA, dict(attention=AttentionConfig(scale="constant")), {}, "set model.attention.scale=log_n", {}),
    (GQA, dict(gain_centre=0.5), {}, "set model.gain_centre=1.0", {}),
    (GQA, dict(tie_embeddings=True), {}, "embedding and head of the weights are two matrices", {}),
    (
        GQA | dict(tie_embeddings=True),
        dict(logit_scale=0.2),
        {},
        r"set model.logit_scale=0\.\d{8,}",
        dict(logit_scale=None),
    ),
    (GQA, dict(rope=RopeConfig(base=20000)), {}, "set model.rope.base=10000.0, that of the weights", {}),
    (
        GQA,
        dict(d_head=6),
        {},
        r"no other can stand for them: set model.rope.base=1000000.\d* \(base\^1.5\), or model.rope"
        r".fraction=0.666667",
        dict(rope=RopeConfig(base=10000.0**1.5), d_head=6),
    ),
    (
        GQA,
        dict(d_head=8, rope=RopeConfig(base=77)),
        {},
        r"set model.rope.base=10000\d+.0 \(base\^2\), or 10000.0, that of",
        dict(rope=RopeConfig(base=BASE), d_head=8),
    ),
    (
        GQA,
        dict(d_head=8, rope=RopeConfig(base=BASE, fraction=0.25)),
        {},
        "rotates 2 dimensions of a head of 8, fewer than the 4 of the weights: set model.rope.fraction=0.5",
        dict(d_head=8, rope=RopeConfig(base=BASE, fraction=0.5)),
    ),
    (GQA | dict(attention=AttentionConfig(similarity="cosine")), dict(d_head=8), {}, "set model.d_head=4 and grow", {}),
    (
        GQA | dict(attention=AttentionConfig(similarity="cosine", softmax_scale=9.0)),
        dict(attention=AttentionConfig(similarity="cosine", softmax_scale=8.0)),
        {},
        "set model.attention.softmax_scale=9.0",
        {},
    ),
    (
        GQA | dict(rope=RopeConfig(base=BASE, fraction=0.5)),
        dict(d_head=6, rope=RopeConfig(base=BASE, fraction=1)),
        {},
        "leaves unrotated 0 dimensions of a head of 6, fewer than the 2 of the weights: set model.rope.fraction=0.33",
        dict(d_head=6, rope=RopeConfig(base=BASE, fraction=1 / 3)),
    ),
    (
        GQA | dict(n_heads=8),
        dict(n_heads=9, n_kv_heads=3),
        {},
        "serves 4 query heads, and groups of 3 would need 4 of them: set model.n_kv_heads=9",
        dict(n_heads=9, n_kv_heads=9),
    ),
    (
        GQA,
        dict(n_layers=3, d_ff=11),
        {},
        "model.d_ff=11 must be even, since new blocks are pairs: or --depth zero",
        dict(n_layers=3, d_ff=12),
    ),
    (
        GQA,
        dict(d_model=18),
        dict(noise=0.0),
        "--noise 0 leaves the new channels of model.d_model=18 without a reader",
        {},
    ),
    (
        MLA,
        dict(mla=dataclasses.replace(MLA["mla"], d_latent=9)),
        dict(noise=0.0),
        "new channels of model.mla.d_latent=9",
        {},
    ),
    (
        MLA,  # a new block has a latent of its own
        dict(mla=dataclasses.replace(MLA["mla"], d_latent=9), n_layers=3),
        dict(noise=0.0),
        "new channels of model.mla.d_latent=9",
        {},
    ),
    (
        GQA,  # new rows of the vocabulary read what the old ones do
        dict(d_model=18, vocab_size=50),
        dict(noise=0.0),
        "--noise 0 leaves the new channels of model.d_model=18 without a reader",
        {},
    ),
    (
        GQA | dict(rope=RopeConfig(base=BASE, extension="ntk", trained_context=16)),
        dict(d_head=6),  # whose frequencies are no powers of another base
        {},
        "no other can stand for them: set model.rope.fraction=0.666667, which rotates as much as before$",
        dict(rope=RopeConfig(base=BASE, extension="ntk", trained_context=16, fraction=4 / 6), d_head=6),
    ),
    (
        MLA | dict(rope=RopeConfig(base=BASE, extension="ntk", trained_context=16)),
        dict(mla=dataclasses.replace(MLA["mla"], d_rope=6)),
        {},
        "no other can stand for them: set model.mla.d_rope=4$",
        dict(mla=dataclasses.replace(MLA["mla"], d_nope=5)),
    ),
    (
        GQA | dict(rope=LONGROPE),
        dict(rope=dataclasses.replace(LONGROPE, longrope_factors=[1.0, 2.0])),
        {},
        r"model.rope.longrope_factors=\[1.0, 2.0\] changes .*: set model.rope.longrope_factors=\[1.0, 3.5\]",
        dict(rope=dataclasses.replace(LONGROPE, fraction=4 / 6), d_head=6, n_layers=3),
    ),
    (
        GQA,
        dict(rope=RopeConfig(base=BASE, context=64)),
        {},
        "data.seq_len=64: the weights were trained on rows of 32 tokens, .*: grow with data.seq_len=32, and extend",
        {},
    ),
    (GQA, {}, dict(noise=-1.0), "--noise -1.0 must be a number from 0 on", {}),
    (GQA, {}, dict(noise=math.inf), "--noise inf must be a number from 0 on", {}),
    (GQA, {}, dict(seed=-1), "--seed -1 must not be negative", {}),
]


@pytest.mark.parametrize("case", range(len(REFUSALS)))
def test_what_cannot_be_reached_is_refused_with_what_can(case: int) -> None:
    values, changes, choices, message, remedy = REFUSALS[case]
    old, new = model(values), model(values, **changes)
    with pytest.raises(UserError, match=message):
        Growth(old, new, Choices(**choices))
    if remedy:
        growth, weights, batch = Growth(old, model(values, **remedy), Choices()), trained(old), packed(40)
        a, b = logits_of(build(old, weights.__getitem__), batch), logits_of(grown(growth, weights), batch)
        assert float((a - b).abs().max()) < (1e-4 if growth.feels_eps else 1e-6) * float(a.std())


def test_the_logit_scale_that_a_message_names_is_the_one() -> None:
    old = model(GQA, tie_embeddings=True)
    with pytest.raises(UserError) as error:
        Growth(old, model(GQA, tie_embeddings=True, d_model=18, vocab_size=60), Choices())
    found = re.search(r"set model.logit_scale=(\S+)$", str(error.value))
    assert found
    Growth(old, model(GQA, tie_embeddings=True, d_model=18, vocab_size=60, logit_scale=float(found[1])), Choices())


def test_which_copies_are_locked() -> None:
    """Copies stay equal where nothing reads them apart, and only then."""
    old = model(GQA)

    def locked(changes: dict[str, Any], **choices: Any) -> list[str]:
        return locked_axes(old, model(GQA, **changes), Choices(**choices))

    assert locked(dict(d_ff=20), units="copy", noise=0.0) == ["feed-forward"]
    assert locked(dict(d_ff=20), units="copy") == []
    assert (
        locked(dict(d_model=24, n_heads=8, n_kv_heads=4, d_ff=20), width="copy", noise=0.0) == []
    )  # fresh units read the channels apart
    assert locked(dict(d_model=24), width="copy", noise=0.0) == ["d_model"]
    assert locked(dict(d_model=24, n_layers=3), width="copy", noise=0.0) == []  # a new block does
    assert locked(dict(d_model=24, vocab_size=50), width="copy", noise=0.0) == ["d_model"]
