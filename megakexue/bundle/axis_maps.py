"""The map of each axis: what its new indices take from the old ones.

An old activation x becomes x' with x'_i = u_i x_pi(i): new index i takes old index pi(i), its ancestor, with weight
u_i. Numbers v undo it: for each old j, the sum of u_i v_i over the new i whose ancestor is j is 1. A matrix *writes*
its output axis, so its rows are multiplied by u; it *reads* the axis that it contracts, so its columns are multiplied
by v. A *fresh* index has no ancestor: what writes it is random, and what reads it is 0, so the function does not
change. A *silent* index has u = 0: its activation is 0, and what reads it may be anything.

By letter of the legend (megakexue/core/decoder.py):

    m, c, q    An RMSNorm follows, which must not notice: the sum of u_i^2 over the copies of each old index is new/old.
               pad: u = sqrt(new/old), and the new channels are silent. copy: c copies of u = sqrt(new / (old c)).
    f, h, e    Units, u = 1. fresh, or copy: the readers share among the copies, v = 1/c.
    g          Each query head stays under a copy of its own key/value head.
    d, n, p    Dimensions of queries and keys. Old rotary pairs keep their frequency. New dimensions are silent in the
               query and fresh in the key; the other way round where the key's length is divided out. Where the length
               of both is, there are no new ones.
    v          Old rows, then fresh ones.
    blocks     An old block, or a new one that adds nothing to the stream.

What must stay true: every map has the left inverse above (tests).
"""

import math
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from megakexue.config import ResolvedModel
from megakexue.core.axes import axes, axis_sizes
from megakexue.core.rope import frequencies

AXIS_NAMES = {
    "v": "vocabulary", "m": "d_model", "f": "feed-forward", "h": "query heads", "g": "kv heads", "c": "kv latent",
    "q": "query latent", "n": "unrotated width", "p": "rotary width", "e": "value width",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Choices:
    """How new capacity begins. The two configs say how large it is."""

    width: Literal["pad", "copy"] = "pad"
    """Of the axes that pass a norm: d_model, and MLA's latents."""
    units: Literal["fresh", "copy"] = "fresh"
    """Of feed-forward units, heads and value widths."""
    noise: float = 1.0
    """How large the random part of a grown matrix is, which the old activations cancel; 1: its RMS becomes that of a
    new matrix."""
    depth: Literal["pair", "zero", "stack"] = "pair"
    """Of new blocks. pair: their units come in pairs that cancel; zero: their last matrices are zero; stack: the old
    blocks are repeated in order, which changes the function."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class AxisMap:
    """What the new indices of an axis take from the old ones."""

    n_old: int
    index: Int64[Tensor, " new"]
    """pi, the ancestor of each new index; that of a fresh index means nothing."""
    write: Float64[Tensor, " new"]
    """u: a matrix that writes the axis has its rows multiplied by this."""
    read: Float64[Tensor, " new"]
    """v: a matrix that reads the axis has its columns multiplied by this. It also maps the gradient of rows, and has
    that meaning alone where nothing reads the axis linearly (key/value heads)."""
    fresh: Bool[Tensor, " new"]
    """Has no ancestor: its writers are random, its readers 0."""

    @property
    def live(self) -> Bool[Tensor, " new"]:
        """Has an ancestor and is not silent."""
        return ~self.fresh & (self.write != 0)

    def __len__(self) -> int:
        return len(self.index)


def make_maps(old: ResolvedModel, new: ResolvedModel, choices: Choices) -> dict[str, AxisMap]:
    """Return the map of each letter; d, n and p have one for queries (`query d`) and one for keys (`key d`)."""
    sizes, new_sizes = axis_sizes(old), axis_sizes(new)
    maps = {x: _isometry(sizes[x], new_sizes[x], choices.width) for x in "mcq" if x in sizes}
    maps |= {x: _units(sizes[x], new_sizes[x], choices.units) for x in "fhe"}
    maps["v"] = _units(sizes["v"], new_sizes["v"], "fresh")
    if not old.mla:
        maps["h"], maps["g"] = _grouped_heads(old, new, choices.units)
    silent, fresh = ("key", "query") if old.attention.similarity == "key_norm" else ("query", "key")
    for letter, places in (("n", list(range(sizes["n"]))), ("p", _rotary_places(old, new))):
        maps[f"{silent} {letter}"], maps[f"{fresh} {letter}"] = _dimensions(places, new_sizes[letter])
    return maps | {f"{side} d": _in_a_row(maps[f"{side} n"], maps[f"{side} p"]) for side in (silent, fresh)}


def sides(maps: dict[str, AxisMap], name: str) -> tuple[AxisMap, AxisMap]:
    """Return the maps of a parameter's output axis and of the axis that it contracts; gain and bias are one column."""
    part = name.removesuffix(".gain").split(".")[-1]
    side = "query" if part in ("wq", "wq_up", "bq", "query_norm") else "key"

    def merged(letters: str) -> AxisMap:
        return reduce(_merged, (maps[f"{side} {x}" if x in "dnp" else x] for x in letters), _axis_map([0], 1))

    return merged(axes(name).out), merged(axes(name).contracted)


def _axis_map(ancestors: list[int], n_old: int, write: Tensor | None = None, read: Tensor | None = None) -> AxisMap:
    """Make the map of these ancestors (-1: fresh). By default u = 1, and v is the shortest vector that undoes it."""
    index = torch.tensor(ancestors, dtype=torch.long)
    fresh = index < 0
    index = index.clamp(min=0)
    u = torch.ones(len(ancestors), dtype=torch.float64) if write is None else write
    power = torch.zeros(max(1, n_old), dtype=torch.float64)
    power.index_add_(0, index, u.square().where(~fresh, 0.0))
    v = (u / power[index]).where(~fresh, 0.0) if read is None else read
    return AxisMap(n_old=n_old, index=index, write=u, read=v, fresh=fresh)


def _isometry(old: int, new: int, how: str) -> AxisMap:
    """Keep the mean square of every vector, so that an RMSNorm does not notice."""
    index = torch.arange(new) % old
    if how == "pad":
        u = math.sqrt(new / old) * (torch.arange(new) < old).double()
    else:
        u = (new / old / torch.bincount(index)[index].double()).sqrt()
    return _axis_map(index.tolist(), old, u)


def _units(old: int, new: int, how: str) -> AxisMap:
    return _axis_map([i % old if how == "copy" or i < old else -1 for i in range(new)], old)


def _grouped_heads(old: ResolvedModel, new: ResolvedModel, how: str) -> tuple[AxisMap, AxisMap]:
    """Return the maps of query heads and of key/value heads.

    A key/value head is copied as often as its query heads need places. What is left over is fresh, or copies of all.
    """
    g, new_g = old.n_groups, new.n_groups
    slots, new_slots = old.n_heads // g, new.n_heads // new_g
    groups, heads = [], []
    for k in range(new_g):
        copy, j = divmod(k, g)
        groups.append(j if how == "copy" or copy * new_slots < slots else -1)
        for at in range(copy * new_slots, (copy + 1) * new_slots):  # among the query heads of all copies of j
            heads.append(j * slots + at % slots if how == "copy" or at < slots else -1)
    queries = _axis_map(heads, old.n_heads)
    # the gradient of a key/value head is the sum over its query heads: its copies get the shares of theirs
    share = queries.read.view(new_g, new_slots).sum(1) / slots
    return queries, _axis_map(groups, g, read=share)


def _rotary_places(old: ResolvedModel, new: ResolvedModel) -> list[int]:
    """Return the new place of each rotated dimension: where its frequency is, or the nearest to it."""
    theta, wider = (frequencies(c.rope, c.rotary_width) for c in (old, new))
    found = [int(np.argmin(abs(np.log(wider / x)))) for x in theta]
    return found + [len(wider) + i for i in found]  # pairs are (x_j, x_(j + half))


def _dimensions(places: list[int], new: int) -> tuple[AxisMap, AxisMap]:
    """Put old dimension j at places[j]; return the map with silent new ones, and that with fresh ones."""
    back = {place: j for j, place in enumerate(places)}
    fresh = _axis_map([back.get(i, -1) for i in range(new)], len(places))
    return replace(fresh, write=fresh.read, fresh=torch.zeros_like(fresh.fresh)), fresh


def _in_a_row(a: AxisMap, b: AxisMap) -> AxisMap:
    """The axis that has the indices of `a`, then those of `b`."""
    return AxisMap(
        n_old=a.n_old + b.n_old, index=torch.cat([a.index, b.index + a.n_old]), write=torch.cat([a.write, b.write]),
        read=torch.cat([a.read, b.read]), fresh=torch.cat([a.fresh, b.fresh]),
    )  # fmt: skip


def _merged(a: AxisMap, b: AxisMap) -> AxisMap:
    """The axis of all pairs of indices, `a` slowest."""
    return AxisMap(
        n_old=a.n_old * b.n_old, index=(a.index[:, None] * b.n_old + b.index).flatten(),
        write=torch.outer(a.write, b.write).flatten(), read=torch.outer(a.read, b.read).flatten(),
        fresh=(a.fresh[:, None] | b.fresh).flatten(),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Where a block of the grown model comes from."""

    old: int | None
    """The old block that it is; None: it is new."""
    after: int
    """The old block that it is, or the last one before it."""
    last_gain: int | None
    """The old block whose last gain it has; None: it starts anew."""


def make_layers(old: ResolvedModel, new: ResolvedModel, depth: str) -> list[Layer]:
    """Return the source of each block; new ones are spread evenly, each behind an old one.

    A new block adds 0 to the stream. But with DeepNorm the stream passes the new block's norms all the same, and these
    leave a vector as it is only before its gain is applied. So the last gain of an old block moves to the last of the
    new blocks behind it.
    """
    n, new_n = old.n_layers, new.n_layers
    if depth == "stack":
        return [Layer(old=i % n, after=i % n, last_gain=i % n) for i in range(new_n)]
    layers = []
    for i, (start, stop) in enumerate(pairwise([i * new_n // n for i in range(n)] + [new_n])):
        keeps_gain = stop - 1 if old.residual == "deepnorm" else start
        for k in range(start, stop):
            layers.append(Layer(old=i if k == start else None, after=i, last_gain=i if k == keeps_gain else None))
    return layers
