"""The maps of the axes: left inverses, isometries, heads over their keys, and where blocks come from."""

from typing import Any

import pytest
import torch

from megakexue.bundle.axis_maps import Choices, make_layers, make_maps, sides
from megakexue.config import AttentionConfig, MlaConfig, ResolvedModel
from megakexue.core.axes import parameter_names, shape
from tests.bundle.growing import GQA, MLA, model

LARGER = [
    (model(GQA), model(GQA, d_model=18, n_heads=8, n_kv_heads=4, d_head=8, d_ff=15, vocab_size=44)),
    (
        model(MLA),
        model(MLA, d_model=31, n_heads=4, mla=MlaConfig(d_latent=7, d_query_latent=14, d_nope=5, d_rope=8, d_value=6)),
    ),
]


@pytest.mark.parametrize("old, new", LARGER, ids=["gqa", "mla"])
@pytest.mark.parametrize("choices", [Choices(), Choices(width="copy", units="copy")], ids=["default", "copy"])
def test_what_is_read_undoes_what_is_written(old: ResolvedModel, new: ResolvedModel, choices: Choices) -> None:
    """Of each letter, and of the axes of each parameter, where two letters may be one axis: V U = 1."""
    maps = make_maps(old, new, choices)
    whole = dict(maps)
    for name in parameter_names(old):
        for axis, size, new_size in zip(sides(maps, name), shape(name, old), shape(name, new)):
            assert axis is not None and (axis.n_old, len(axis)) == (size, new_size), name
            whole[f"{name} {size}"] = axis
    for name, axis in whole.items():
        found = torch.zeros(axis.n_old, dtype=torch.float64)
        found.index_add_(0, axis.index, (axis.write * axis.read).where(~axis.fresh, 0.0))
        torch.testing.assert_close(found, torch.ones_like(found), atol=1e-14, rtol=0, msg=name)
        assert not axis.read[axis.fresh].any(), name


@pytest.mark.parametrize("how", ["pad", "copy"])
@pytest.mark.parametrize("new_size", [13, 18, 24, 31])
def test_a_normed_axis_is_an_isometry_with_a_left_inverse(how: Any, new_size: int) -> None:
    m = make_maps(model(GQA), model(GQA, d_model=new_size), Choices(width=how))["m"]
    u, v = torch.zeros(new_size, 12, dtype=torch.float64), torch.zeros(12, new_size, dtype=torch.float64)
    u[torch.arange(new_size), m.index] = m.write
    v[m.index, torch.arange(new_size)] = m.read
    eye = torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(u.T @ u, eye * new_size / 12, atol=1e-14, rtol=0)
    torch.testing.assert_close(v @ u, eye, atol=1e-14, rtol=0)


def test_key_value_heads_are_kept_over_their_query_heads() -> None:
    """From h/g to h'/g' where old heads keep their group: uneven copies, fresh groups, groups of their own."""
    old = model(GQA, n_heads=6)
    for n_heads, groups, heads_of in (
        (9, 3, [[0, 1, 2], [3, 4, 5], [-1] * 3]),
        (8, 4, [[0, 1], [3, 4], [2, -1], [5, -1]]),
        (6, 6, [[0], [3], [1], [4], [2], [5]]),
        (8, 2, [[0, 1, 2, -1], [3, 4, 5, -1]]),
    ):
        maps = make_maps(old, model(GQA, n_heads=n_heads, n_kv_heads=groups), Choices())
        index = maps["h"].index.where(~maps["h"].fresh, -1).view(groups, -1)
        assert index.tolist() == heads_of
        for own, heads in zip(maps["g"].index.tolist(), heads_of):
            assert all(head < 0 or head // 3 == own for head in heads)


@pytest.mark.parametrize("similarity", ["dot", "key_norm"])
def test_old_rotary_pairs_keep_their_frequency(similarity: Any) -> None:
    """Pairs are (x_j, x_(j + half)). In twice the width, with the base of the weights, pair j is the new pair 2 j."""
    old, new = (model(GQA, d_head=d, attention=AttentionConfig(similarity=similarity)) for d in (4, 8))
    maps = make_maps(old, new, Choices())
    silent, fresh = ("query p", "key p") if similarity == "dot" else ("key p", "query p")
    places = [0, 2, 4, 6]
    for side in (silent, fresh):
        assert (
            maps[side].index[places].tolist() == [0, 1, 2, 3] and maps[side].read.nonzero().flatten().tolist() == places
        )
    assert maps[silent].write.nonzero().flatten().tolist() == places and not maps[silent].fresh.any()
    assert (~maps[fresh].fresh).nonzero().flatten().tolist() == places


def test_new_blocks_are_spread_and_the_last_of_them_takes_the_gain() -> None:
    def layers(depth: str = "pair", **changes: Any) -> list[tuple[int | None, int, int | None]]:
        found = make_layers(model(GQA, **changes), model(GQA, n_layers=5, **changes), depth)
        return [(layer.old, layer.after, layer.last_gain) for layer in found]

    assert layers() == [(0, 0, None), (None, 0, 0), (1, 1, None), (None, 1, None), (None, 1, 1)]
    assert layers(residual="prenorm") == [(0, 0, 0), (None, 0, None), (1, 1, 1), (None, 1, None), (None, 1, None)]
    assert layers("stack") == [(i, i, i) for i in (0, 1, 0, 1, 0)]
