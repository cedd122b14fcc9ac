"""Growth: the weights of a larger model that computes what a smaller, trained one does, and learns with all it has.

Every axis has one map: new index i takes the old index pi(i) with weight u_i, x'_i = u_i x_pi(i), and a left inverse v
with sum over i -> j of u_i v_i = 1 undoes it. A parameter is its axes (the table of megakexue/model.py):

    writes the axis    W' = U W          gradient: V^T G
    reads the axis     W' = W V + N      gradient: G U^T,     N U = 0, otherwise random
    copied             W'_i = W_pi(i)    gradient: u_i v_i G_pi(i)         gains of norms, and u = 1

Momentum goes the way of the gradient, Adam's second moment with the squares.

    m, c, q    pass an RMSNorm, so sum over i -> j of u_i^2 = new/old for every j: rms, eps, gains and alpha stay as
               they are, for any ratio. pad: u = sqrt(new/old), and 0 for the new, silent channels; copy: c copies of
               u = sqrt(new / (old c)).
    f, h, e    units, u = 1. fresh: a random writer and a zero reader; copy: readers share, v = 1/c.
    g          each query head stays under a copy of its own key/value head.
    d, n, p    places. Old rotary pairs keep their frequency; new dimensions are silent in the query (in the key, where
               its length is divided out) and random on the other side.
    v          old rows, then the mean row plus a tenth of the rows' deviation.
    layers     a new block adds nothing: its units are pairs that cancel (`pair`), or its last matrices are zero. With
               DeepNorm the stream passes two norms more, so the gain before the block moves behind it: exact but for
               norm_eps.

N restores the energy of a row: RMS(W') = RMS(W) sqrt(old/new) of the axis that is read, which is what a new matrix of
that size has, and what Tiger's rate goes by. Without it copies get equal gradients, and a sign update never parts them.

Sources: 8444 (copies; RoPE given up), Net2Net 1511.05641, LEMON 2310.07999, HyperCloning 2409.12903 (noise in the null
space of copies); docs/growth.md has the derivation. What must stay true: every parameter has its axes in the table, or
it is an error; a random number depends on (seed, name, shapes) alone, so that the order of tensors never matters;
nothing is held but the tensor at hand.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from operator import attrgetter
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor
from torch.nn import functional

from megakexue.attention import Layout
from megakexue.config import IGNORED, ModelConfig, require
from megakexue.data import Batch
from megakexue.model import Block, Norm, axes, axis_sizes, parameter_names, shape
from megakexue.rope import RotaryTables, frequencies

Read = Callable[[str], Tensor]
"""Gives a parameter of the old model, or a tensor of its optimizer's state, by the parameter's name."""

CHUNK = 2**22
"""Elements of a grown tensor that are in float64 at a time."""
PAIR_SCALE = 0.3
"""Of the last matrices of a new block: small first steps, and far from an RMS of 0, which Tiger could not move."""
VOCAB_NOISE = 0.1
NO_EPS = 1e-30
"""norm_eps that is not felt, and keeps a row of zeros from being divided by zero."""
NAMES = {
    "v": "vocabulary", "m": "d_model", "f": "feed-forward", "h": "query heads", "g": "kv heads", "c": "kv latent",
    "q": "query latent", "n": "unrotated width", "p": "rotary width", "e": "value width",
}  # fmt: skip
"""Of the axes, by letter."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """How new capacity begins; the sizes are those of the two configs."""

    width: Literal["pad", "copy"] = "pad"
    """Of the axes that pass a norm: d_model, and MLA's latents."""
    units: Literal["fresh", "copy"] = "fresh"
    """Of feed-forward units, heads and value widths."""
    noise: float = 1.0
    """Of what readers get in the null space; 1 is the RMS of a new matrix."""
    depth: Literal["pair", "zero", "stack"] = "pair"
    """stack repeats the blocks in order, which changes the function."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class AxisMap:
    """What the new indices of an axis take from the old ones."""

    index: Int64[Tensor, " new"]
    """pi; of a fresh index it means nothing."""
    write: Float64[Tensor, " new"]
    """u."""
    read: Float64[Tensor, " new"]
    """v; for rows that nothing reads linearly, what their gradient is multiplied with."""
    fresh: Bool[Tensor, " new"]
    """Has no ancestor: its writers are random, its readers 0."""

    def __len__(self) -> int:
        return len(self.index)


def _axis_map(index: list[int], write: Tensor | None = None, read: Tensor | None = None) -> AxisMap:
    """An index of -1 is fresh; by default u = 1 and v is the least that undoes it."""
    places = torch.tensor(index)
    fresh = places < 0
    places = places.clamp(min=0)
    u = torch.ones(len(index), dtype=torch.float64) if write is None else write
    power = torch.zeros(int(places.max()) + 1, dtype=torch.float64)
    power.index_add_(0, places, u.square().where(~fresh, 0.0))
    v = (u / power[places]).where(~fresh, 0.0) if read is None else read
    return AxisMap(index=places, write=u, read=v, fresh=fresh)


def _isometry(old: int, new: int, how: str) -> AxisMap:
    """Keep the mean square of every vector, so that an RMSNorm does not notice."""
    index = torch.arange(new) % old
    if how == "pad":
        u = math.sqrt(new / old) * (torch.arange(new) < old).double()
    else:
        u = (new / old / torch.bincount(index)[index].double()).sqrt()
    return _axis_map(index.tolist(), u)


def _units(old: int, new: int, how: str) -> AxisMap:
    return _axis_map([i % old if how == "copy" or i < old else -1 for i in range(new)])


def _places(index: list[int], new: int, scale: float | None) -> AxisMap:
    """Old dimension j goes to index[j]; the new ones are zeros with a `scale` for the old ones, or random without."""
    back = {i: j for j, i in enumerate(index)}
    is_old = torch.tensor([i in back for i in range(new)], dtype=torch.bool)
    c = 1.0 if scale is None else scale
    return AxisMap(
        index=torch.tensor([back.get(i, 0) for i in range(new)], dtype=torch.long),
        write=is_old.double() * c, read=is_old.double() / c,
        fresh=~is_old if scale is None else torch.zeros(new, dtype=torch.bool),
    )  # fmt: skip


def _joined(a: AxisMap, b: AxisMap, n_old: int) -> AxisMap:
    """The merged axis, `a` slowest; `n_old` is the old size of b's axis."""

    def outer(x: Tensor, y: Tensor) -> Tensor:
        return (x[:, None] * y[None]).flatten()

    return AxisMap(
        index=(a.index[:, None] * n_old + b.index[None]).flatten(), write=outer(a.write, b.write),
        read=outer(a.read, b.read), fresh=(a.fresh[:, None] | b.fresh[None]).flatten(),
    )  # fmt: skip


def _grouped_heads(old: tuple[int, int], new: tuple[int, int], how: str) -> tuple[AxisMap, AxisMap]:
    """Return the maps of query heads and key/value heads, from and to (query heads, key/value heads).

    A key/value head is copied as often as its query heads need slots; what is left over is fresh, or copies of all.
    """
    (h, g), (new_h, new_g) = old, new
    slots, new_slots = h // g, new_h // new_g
    n_copies = -(-slots // new_slots)
    groups, heads, taken = [], [], [0] * g
    for k in range(new_g):
        j = k % g if how == "copy" or k < g * n_copies else -1
        groups.append(j)
        for _ in range(new_slots):
            at = taken[j] if j >= 0 else slots
            heads.append(j * slots + at % slots if j >= 0 and (how == "copy" or at < slots) else -1)
            if j >= 0:
                taken[j] += 1
    queries = _axis_map(heads)
    # the gradient of a key/value head is the sum over its query heads: its copies get the shares of theirs
    share = queries.read.view(new_g, new_slots).sum(1) / slots
    return queries, _axis_map(groups, read=share)


def _rotary_places(old: ModelConfig, new: ModelConfig) -> list[int]:
    """Return the new place of each rotated dimension: where its frequency is. Raises UserError: there is none."""
    theta, wider = (frequencies(c.rope, c.rotary_width) for c in (old, new))
    found = [int(np.argmin(abs(np.log(wider / x)))) for x in theta]
    base, ratio = float(old.rope.base), new.rotary_width / old.rotary_width
    remedies = []
    if ratio == 1:
        remedies = [f"model.rope.base={base!r}, that of the weights"]
    else:
        if old.rope.extension not in ("ntk", "ntk_exact", "ntk_mixed"):  # which depend on the width as well
            remedies = [f"model.rope.base={base**ratio!r} (base^{ratio:g})"]
            remedies += [f"{base!r}, that of the weights"] if ratio.is_integer() else []
        if old.mla is None:
            fraction = old.rotary_width / new.head_width
            remedies.append(f"model.rope.fraction={fraction:g}, which rotates as much as before")
        elif not remedies:
            remedies = [f"model.mla.d_rope={old.rotary_width}"]
    require(
        bool(np.allclose(wider[found], theta, rtol=1e-12, atol=0)),
        f"model.rope.base={new.rope.base} on a rotary width of {new.rotary_width} does not have the frequencies of the "
        f"weights, base {base:g} on {old.rotary_width}, and no other can stand for them: set {', or '.join(remedies)}",
    )
    return found + [len(wider) + i for i in found]  # pairs are (x_j, x_(j + half))


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Where a new block comes from."""

    old: int | None
    """The block that it is; None: it is new."""
    after: int
    """The old block that it is, or that is before it."""
    last_gain: int | None
    """The old block whose last gain it has; None: ones."""


def _layers(old: ModelConfig, new: ModelConfig, how: str) -> list[Layer]:
    """Spread new blocks evenly, each behind an old one."""
    n, new_n = old.n_layers, new.n_layers
    if how == "stack":
        return [Layer(old=i % n, after=i % n, last_gain=i % n) for i in range(new_n)]
    starts = [i * new_n // n for i in range(n)] + [new_n]
    layers = []
    for i, (start, stop) in enumerate(pairwise(starts)):
        moves = old.residual == "deepnorm"
        for k in range(start, stop):
            gain = (i if k == stop - 1 else None) if moves else (i if k == start else None)
            layers.append(Layer(old=i if k == start else None, after=i, last_gain=gain))
    return layers


class Growth:
    """The map from the parameters of one resolved config to those of a larger one.

    Raises:
        UserError: the target cannot be reached without changing the function; the message names the nearest that can.
    """

    def __init__(self, old: ModelConfig, new: ModelConfig, choices: Choices) -> None:
        self.old, self.new, self.choices = old, new, choices
        self._check_kind()
        self._check_sizes()
        self._sizes, self._new_sizes = axis_sizes(old), axis_sizes(new)
        self.layers = _layers(old, new, choices.depth)
        self.scales = self._absorbed_scales()
        self.maps = self._make_maps()
        self._check_choices()

    # --- what can be reached -----------------------------------------------------------------------------------------

    def _check_kind(self) -> None:
        old, new = self.old, self.new
        require(
            (old.mla is None) == (new.mla is None),
            "model.mla: grouped-query and latent attention are no sizes of one another: keep the kind of the weights",
        )
        latents = [c.mla and c.mla.d_query_latent for c in (old, new)]
        require(
            (latents[0] is None) == (latents[1] is None),
            f"model.mla.d_query_latent={latents[1]}: a latent can be widened, not put in or taken out, and that of the "
            f"weights is {latents[0]}: set model.mla.d_query_latent={latents[0]}",
        )
        assert old.rope.context is not None and new.rope.context is not None
        require(
            new.rope.context <= old.rope.context,
            f"data.seq_len={new.rope.context}: the weights were trained on rows of {old.rope.context} tokens, and "
            f"longer ones are a step of their own: grow with data.seq_len={old.rope.context}, and extend the grown "
            "model afterwards (model.rope.extension)",
        )
        keys = ["norm_eps", "residual", "gain_centre"]
        keys += [f"attention.{name}" for name in ("scale", "similarity", "log_n_base", "log_n_floor")]
        keys += [f"rope.{name}" for name in ("extension", "trained_context", "ntk_mixed_exponent", "yarn_temperature")]
        if old.rope.extension not in (None, "base"):
            keys.append("rope.context")
        if old.attention.similarity == "cosine":  # whose queries cannot make up for it
            keys.append("attention.softmax_scale")
        for key in keys:
            a, b = (attrgetter(key)(config) for config in (old, new))
            require(a == b, f"model.{key}={b} changes what the weights compute, which have {a}: set model.{key}={a}")
        require(
            old.tie_embeddings or not new.tie_embeddings,
            "model.tie_embeddings=true: embedding and head of the weights are two matrices, which one cannot hold: set "
            "model.tie_embeddings=false",
        )

    def _check_sizes(self) -> None:
        old, new = self.old, self.new
        pairs = [(name, getattr(old, name), getattr(new, name))
                 for name in ("vocab_size", "d_model", "n_layers", "n_heads", "d_ff")]  # fmt: skip
        if old.mla and new.mla:
            pairs += [(f"mla.{name}", getattr(old.mla, name), getattr(new.mla, name))
                      for name in ("d_latent", "d_query_latent", "d_nope", "d_rope", "d_value")]  # fmt: skip
        else:
            pairs += [("n_kv_heads", old.n_groups, new.n_groups), ("d_head", old.head_width, new.head_width)]
        for name, a, b in pairs:
            require(a is None or a <= b, f"model.{name}={b} is below that of the weights: set model.{name}={a} or more")
        for what, a, b in (
            ("rotates", old.rotary_width, new.rotary_width),
            ("leaves unrotated", old.head_width - old.rotary_width, new.head_width - new.rotary_width),
        ):
            require(
                a <= b,
                f"model.rope.fraction={new.rope.fraction:g} {what} {b} dimensions of a head of {new.head_width}, fewer "
                f"than the {a} of the weights: set model.rope.fraction={old.rotary_width / new.head_width:g}",
            )
        require(
            old.attention.similarity != "cosine" or old.head_width == new.head_width,
            f"model.d_head={new.head_width}: attention.similarity=cosine would have new dimensions be silent in "
            f"query and key, and could not learn: set model.d_head={old.head_width} and grow model.n_heads",
        )
        if old.mla is None:
            needed = old.n_heads // old.n_groups
            slots = new.n_heads // new.n_groups
            able = [g for g in range(old.n_groups, new.n_heads + 1)
                    if new.n_heads % g == 0 and g >= old.n_groups * -(-needed // (new.n_heads // g))]  # fmt: skip
            nearest = min(able, key=lambda g: abs(g - new.n_groups))  # each head its own group is always able
            require(
                new.n_groups in able,
                f"model.n_kv_heads={new.n_groups} with model.n_heads={new.n_heads}: each of the {old.n_groups} "
                f"key/value heads of the weights serves {needed} query heads, and groups of {slots} would need "
                f"{old.n_groups * -(-needed // slots)} of them: set model.n_kv_heads={nearest}",
            )

    def _check_choices(self) -> None:
        old, new, choices = self.old, self.new, self.choices
        require(0 <= choices.noise < math.inf, f"--noise {choices.noise} must be a number from 0 on")
        require(choices.seed >= 0, f"--seed {choices.seed} must not be negative")
        if new.n_layers > old.n_layers and choices.depth == "pair":
            for name, size in (("d_ff", new.d_ff), ("mla.d_value" if new.mla else "d_head", new.value_width)):
                require(size % 2 == 0, f"model.{name}={size} must be even, since new blocks are pairs: or --depth zero")
        if choices.width == "pad" and choices.noise == 0:
            for letter, key in (("m", "d_model"), ("c", "mla.d_latent"), ("q", "mla.d_query_latent")):
                a, b = self._sizes.get(letter), self._new_sizes.get(letter)
                require(
                    a == b or self._is_read_at_random(letter),
                    f"--noise 0 leaves the new channels of model.{key}={b} without a reader, so that they "
                    "would never learn: leave --noise at 1, or use --width copy",
                )

    def _is_read_at_random(self, letter: str) -> bool:
        """Whether new rows read the axis in the old blocks, or new blocks the stream."""
        return any(
            bool(self._sides(name)[0].fresh.any()) or (letter == "m" and self.origin(name) is None)
            for name in parameter_names(self.new)
            # new rows of the vocabulary are made of old ones, and read what those do
            if letter in axes(name).contracted and axes(name).out != "v"
        )

    @property
    def locked(self) -> list[str]:
        """The axes whose copies get equal gradients for ever, by name: nothing reads them apart."""
        found = []
        for letter in "mcqfhe" if self.choices.noise == 0 else "":
            if letter in self.maps:
                live = self.maps[letter].index[~self.maps[letter].fresh & (self.maps[letter].write != 0)]
                if len(live) > len(live.unique()) and not self._is_read_at_random(letter):
                    found.append(NAMES[letter])
        return found

    # --- the maps ----------------------------------------------------------------------------------------------------

    def _absorbed_scales(self) -> dict[str, float]:
        """What a scale of the target that differs is made up for by, in each parameter that it multiplies."""
        old, new = self.old, self.new
        ratio = new.d_model / old.d_model
        numbers = [(c.embed_scale, c.logit_scale, c.residual_alpha, c.attention.softmax_scale) for c in (old, new)]
        (embed, logit, alpha, softmax), (new_embed, new_logit, new_alpha, new_softmax) = numbers
        assert embed and logit and alpha and softmax and new_embed and new_logit and new_alpha and new_softmax
        scales = {"embedding.weight": embed / new_embed}
        if new.tie_embeddings:
            needed = logit * new_embed / (embed * ratio)
            require(
                math.isclose(new_logit, needed, rel_tol=1e-12),
                f"model.logit_scale={new_logit!r}: with tied embeddings the logits of these weights need "
                f"{needed!r}: set model.logit_scale={needed!r}",
            )
        else:
            scales["head.weight"] = logit / new_logit
        query = "wq_up" if new.mla and new.mla.d_query_latent else "wq"
        scales[f"blocks.attention.{query}"] = softmax / new_softmax
        scales["blocks.attention.wo"] = scales["blocks.feed_forward.w_down"] = new_alpha / alpha
        return scales

    def _make_maps(self) -> dict[str, AxisMap]:
        """The map of each letter; n and p have one for queries (`query n`) and one for keys."""
        old, new, choices, sizes, new_sizes = self.old, self.new, self.choices, self._sizes, self._new_sizes
        maps = {x: _isometry(sizes[x], new_sizes[x], choices.width) for x in "mcq" if x in sizes}
        maps |= {x: _units(sizes[x], new_sizes[x], choices.units) for x in "fe"}
        maps["v"] = _units(sizes["v"], new_sizes["v"], "fresh")
        if old.mla:
            maps["h"] = _units(old.n_heads, new.n_heads, choices.units)
        else:
            heads = (old.n_heads, old.n_groups), (new.n_heads, new.n_groups)
            maps["h"], maps["g"] = _grouped_heads(*heads, choices.units)
        silent, heard = ("key", "query") if old.attention.similarity == "key_norm" else ("query", "key")
        for letter, places in (("n", list(range(sizes["n"]))), ("p", _rotary_places(old, new))):
            maps[f"{silent} {letter}"] = _places(places, new_sizes[letter], 1.0)
            maps[f"{heard} {letter}"] = _places(places, new_sizes[letter], None)
        return maps

    def _sides(self, name: str) -> tuple[AxisMap, AxisMap | None]:
        """The maps of a parameter's output axis and of the one it contracts."""
        table = axes(name)
        side = "query" if name.split(".")[-1] in ("wq", "wq_up") else "key"

        def of(letter: str) -> tuple[AxisMap, int]:
            if letter == "d":
                n, p = self.maps[f"{side} n"], self.maps[f"{side} p"]
                both = {f.name: torch.cat([getattr(n, f.name), getattr(p, f.name)]) for f in dataclasses.fields(n)}
                both["index"][len(n) :] += self._sizes["n"]
                return AxisMap(**both), self._sizes["d"]
            key = f"{side} {letter}" if letter in "np" else letter
            return self.maps[key], self._sizes[letter]

        def merged(letters: str) -> AxisMap:
            whole, _ = of(letters[0])
            for letter in letters[1:]:
                whole = _joined(whole, *of(letter))
            return whole

        return merged(table.out), merged(table.contracted) if table.contracted else None

    def origin(self, name: str) -> str | None:
        """The old parameter that a new one grows from; None: it is new."""
        if name == "head.weight" and self.old.tie_embeddings:
            return "embedding.weight"
        if not name.startswith("blocks."):
            return name
        _, i, rest = name.split(".", 2)
        layer = self.layers[int(i)]
        source = layer.last_gain if rest == "feed_forward_norm.gain" else layer.old
        return None if source is None else f"blocks.{source}.{rest}"

    def _generator(self, name: str, *what: object) -> torch.Generator:
        key = f"grow {self.choices.seed} {name} {self._old_shape(name)} {shape(name, self.new)} {what}"
        digest = hashlib.sha256(key.encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def _old_shape(self, name: str) -> tuple[int, ...]:
        return shape(name if not name.startswith("blocks.") else f"blocks.0.{name.split('.', 2)[2]}", self.old)

    # --- weights -----------------------------------------------------------------------------------------------------

    def chunks(self, name: str, read: Read) -> Iterator[Float64[Tensor, "*rows"]]:
        """Yield a grown parameter, some rows at a time."""
        if axes(name).role == "gain":
            yield self._gain(name, read)
        elif self.origin(name) is None:
            yield from self._new_matrix(name, read)
        else:
            yield from self._matrix(name, read)

    def weight(self, name: str, read: Read, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a grown parameter: computed in float64, and rounded once."""
        return self._assembled(name, self.chunks(name, read), dtype)

    def _assembled(self, name: str, chunks: Iterator[Tensor], dtype: torch.dtype) -> Tensor:
        whole, at = torch.empty(shape(name, self.new), dtype=dtype), 0
        for chunk in chunks:
            whole[at : at + len(chunk)] = chunk
            at += len(chunk)
        assert at == len(whole), name
        return whole

    def _gain(self, name: str, read: Read) -> Tensor:
        out, _ = self._sides(name)
        source = self.origin(name)
        if source is not None:
            return read(source).double()[out.index]
        # behind DeepNorm's norm the stream must come out of a new block as it went in
        start = 1.0 if self.new.residual == "deepnorm" else self.new.gain_centre
        return torch.full((len(out),), start, dtype=torch.float64)

    def _scale(self, name: str) -> float:
        return self.scales.get(".".join(part for part in name.split(".") if not part.isdigit()), 1.0)

    def _matrix(self, name: str, read: Read) -> Iterator[Tensor]:
        out, contracted = self._sides(name)
        source = self.origin(name)
        assert contracted is not None and source is not None
        old = read(source)
        is_embedding = axes(name).role == "embedding"
        columns = contracted.write if is_embedding else contracted.read
        scale, width = self._scale(name), len(contracted)
        power = _column_power(old) * scale**2
        sigma = 0.0 if is_embedding else self._noise(power, contracted)
        fresh_rms = (float(power.sum()) / width) ** 0.5
        generator = self._generator(name)
        is_vocab = axes(name).out == "v"
        if is_vocab and bool(out.fresh.any()):
            mean, deviation = _mean_and_deviation(old)
        for rows in _row_chunks(len(out), width):
            index, fresh = out.index[rows], out.fresh[rows]
            taken = old[index].double()
            if is_vocab and bool(fresh.any()):
                spread = torch.randn(int(fresh.sum()), len(mean), generator=generator, dtype=torch.float64)
                taken[fresh] = mean + VOCAB_NOISE * deviation * spread
                fresh = torch.zeros_like(fresh)
            chunk = taken[:, contracted.index] * (columns * scale) * out.write[rows, None]
            if sigma or bool(fresh.any()):
                random = torch.randn(chunk.shape, generator=generator, dtype=torch.float64)
                if sigma:
                    chunk += sigma * _silenced(random, contracted)
                chunk[fresh] = fresh_rms * random[fresh]
            chunk[:, contracted.fresh] = 0.0
            yield chunk

    def _noise(self, power: Float64[Tensor, " old"], contracted: AxisMap) -> float:
        """The deviation of what gives a row its energy back; `power` is the mean square of each old column."""
        kept = torch.zeros_like(power).index_add_(0, contracted.index, contracted.read.square())
        missing = float((power * (1 - kept)).sum())
        live = ~contracted.fresh & (contracted.write != 0)
        # an ancestor fixes one combination of its copies; a silent channel is free
        n_free = int((~contracted.fresh).sum()) - len(contracted.index[live].unique())
        return self.choices.noise * math.sqrt(max(0.0, missing) / n_free) if n_free else 0.0

    def _new_matrix(self, name: str, read: Read) -> Iterator[Tensor]:
        """A matrix of a new block, as large as that of the block before."""
        rows_total, width = shape(name, self.new)
        generator, table = self._generator(name), axes(name)
        power = _column_power(read(self._before(name)))
        rms = (float(power.sum()) / width) ** 0.5 * self._scale(name)
        is_last = table.out == "m"
        if is_last:
            rms *= PAIR_SCALE if self.choices.depth == "pair" else 0.0
        is_paired = self.choices.depth == "pair" and table.out[-1] in "ef"
        for rows in _row_chunks(rows_total, width):
            chunk = rms * torch.randn(rows.stop - rows.start, width, generator=generator, dtype=torch.float64)
            if self.choices.depth == "pair" and is_last:
                chunk[:, 1::2] = -chunk[:, ::2]
            if is_paired:
                chunk[1::2] = chunk[::2]
            yield chunk

    def _before(self, name: str) -> str:
        _, i, rest = name.split(".", 2)
        return f"blocks.{self.layers[int(i)].after}.{rest}"

    # --- the optimizer's state ---------------------------------------------------------------------------------------

    def state(self, name: str, kind: str, read: Read, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a grown tensor of the optimizer's state: momentum and exp_avg as the gradient, exp_avg_sq its square.

        What no old gradient says is 0; in exp_avg_sq, where 0 would be a huge step, the mean of what is known.
        """
        return self._assembled(name, self._state_chunks(name, kind, read), dtype)

    def _state_chunks(self, name: str, kind: str, read: Read) -> Iterator[Tensor]:
        power = 2 if kind == "exp_avg_sq" else 1
        source = self.origin(name)
        old = read(source or self._before(name))
        old = old if old.dim() == 2 else old[:, None]
        out, contracted = self._sides(name)
        if contracted is None:
            rows_by, columns_by = out.write * out.read, torch.ones(1, dtype=torch.float64)
            column_index = torch.zeros(1, dtype=torch.long)
        else:
            rows_by = out.read
            columns_by = contracted.read if axes(name).role == "embedding" else contracted.write
            columns_by = (columns_by / self._scale(name)).where(~contracted.fresh, 0.0)
            column_index = contracted.index
        rows_by = rows_by.where(~out.fresh, 0.0) ** power
        columns_by = columns_by**power
        fill = 0.0
        if power == 2:
            # the mean over the entries that are known, without forming them
            weights = [torch.zeros(n, dtype=torch.float64) for n in old.shape]
            weights[0].index_add_(0, out.index, rows_by)
            weights[1].index_add_(0, column_index, columns_by)
            known = int((rows_by != 0).sum()) * int((columns_by != 0).sum())
            for r in _row_chunks(*old.shape):
                fill += float(weights[0][r] @ old[r].double() @ weights[1])
            fill /= max(1, known)
        for rows in _row_chunks(len(out), len(column_index)):
            if source is None:
                chunk = torch.full((rows.stop - rows.start, len(column_index)), fill, dtype=torch.float64)
            else:
                by = rows_by[rows, None] * columns_by
                chunk = (old[out.index[rows]].double()[:, column_index] * by).where(by != 0, fill)
            yield chunk if contracted is not None else chunk[:, 0]

    # --- what is said of it ------------------------------------------------------------------------------------------

    def plan(self) -> list[str]:
        """One line for each axis and scale: what it is, from what to what, and how."""
        old, new, choices = self.old, self.new, self.choices
        lines = []
        for letter, what in NAMES.items():
            a, b = self._sizes.get(letter), self._new_sizes.get(letter)
            if a is None or b is None or (letter == "g" and old.mla):
                continue
            how = "as it is"
            if a != b:
                m = self.maps.get(letter)
                n_fresh = int(m.fresh.sum()) if m is not None else b - a
                if letter in "mcq":
                    u = sorted({round(float(x), 4) for x in m.write}) if m is not None else []
                    how = (
                        f"{choices.width}, weights {', '.join(f'{x:g}' for x in u)}, null-space noise {choices.noise:g}"
                    )
                elif letter in "np":
                    side = "key" if old.attention.similarity == "key_norm" else "query"
                    how = f"{b - a} new dimensions, silent in the {side}"
                elif letter == "v":
                    how = f"{b - a} new rows at the mean"
                else:
                    how = f"{n_fresh} fresh, {b - a - n_fresh} copies"
            lines.append(f"{what:<16} {a:>8} -> {b:<8} {how}")
        new_layers = [str(i) for i, layer in enumerate(self.layers) if layer.old is None]
        how = f"{choices.depth}: blocks {', '.join(new_layers)} are new" if new_layers else "as it is"
        if choices.depth == "stack" and new.n_layers > old.n_layers:
            how = "stack: blocks repeated in order; THIS CHANGES THE FUNCTION"
        lines.append(f"{'layers':<16} {old.n_layers:>8} -> {new.n_layers:<8} {how}")
        for key in ("embed_scale", "logit_scale", "attention.softmax_scale", "residual_alpha", "rope.base"):
            before, after = (attrgetter(key)(config) for config in (old, new))
            if before != after:
                how = "where the frequencies are" if key == "rope.base" else "made up for in the weights"
                lines.append(f"{key.removeprefix('attention.'):<16} {before:>8.4g} -> {after:<8.4g} {how}")
        return lines

    @property
    def is_lossless(self) -> bool:
        return self.choices.depth != "stack" or self.new.n_layers == self.old.n_layers

    @property
    def feels_eps(self) -> bool:
        """Whether norm_eps is felt: in the norms of DeepNorm's new blocks, and where its alpha changes."""
        old, new = self.old, self.new
        is_same = (old.n_layers, old.residual_alpha) == (new.n_layers, new.residual_alpha)
        return new.residual == "deepnorm" and not is_same


def _row_chunks(n_rows: int, width: int) -> Iterator[slice]:
    size = max(2, CHUNK // width // 2 * 2)  # even, since pairs of rows stay together
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))


def _column_power(x: Float[Tensor, "rows columns"]) -> Float64[Tensor, " columns"]:
    """The mean square of each column."""
    total = torch.zeros(x.shape[1], dtype=torch.float64)
    for rows in _row_chunks(*x.shape):
        total += x[rows].double().square().sum(0)
    return total / len(x)


def _mean_and_deviation(x: Float[Tensor, "rows columns"]) -> tuple[Tensor, Tensor]:
    mean = sum((x[rows].double().sum(0) for rows in _row_chunks(*x.shape)), torch.zeros(x.shape[1])) / len(x)
    return mean, (_column_power(x) - mean.square()).clamp(min=0).sqrt()


def _silenced(random: Float64[Tensor, "rows new"], contracted: AxisMap) -> Float64[Tensor, "rows new"]:
    """Project on what reads 0: E_i - u_i (sum_k u_k E_k) / (sum_k u_k^2), over the k of i's ancestor."""
    u = contracted.write.where(~contracted.fresh, 0.0)
    n = int(contracted.index.max()) + 1
    power = torch.zeros(n, dtype=torch.float64).index_add_(0, contracted.index, u.square()).clamp(min=1e-300)
    sums = torch.zeros(len(random), n, dtype=torch.float64).index_add_(1, contracted.index, random * u)
    return random - u * (sums / power)[:, contracted.index]


# --- the function, a part of the model at a time ---------------------------------------------------------------------


class Trace:
    """The forward pass of a decoder of which one part at a time is in memory."""

    def __init__(self, config: ModelConfig, batch: Batch, dtype: torch.dtype) -> None:
        self.config, self.dtype, self._tokens = config, dtype, batch.tokens
        self._rotary = RotaryTables(config)(batch.positions, batch.tokens.shape[1])
        self._layout = Layout(batch.positions, batch.cu_seqlens)
        self._x = torch.full((*batch.tokens.shape, config.d_model), math.nan, dtype=dtype)
        self._n_embedded = 0
        self._logits: list[Tensor] = []

    def embed(self, rows: Float[Tensor, "rows m"]) -> None:
        """Take the next rows of the embedding."""
        assert self.config.embed_scale is not None
        place = self._tokens - self._n_embedded
        here = (place >= 0) & (place < len(rows))
        self._x[here] = rows[place[here]].to(self.dtype) * self.config.embed_scale
        self._n_embedded += len(rows)

    @torch.no_grad()
    def block(self, weights: dict[str, Tensor]) -> None:
        """Go through the next block, whose parameters have names such as attention.wq."""
        with torch.device("meta"):
            block = Block(self.config)
        block.load_state_dict({name: w.to(self.dtype) for name, w in weights.items()}, assign=True)
        self._x = block(self._x, self._rotary, self._layout, "reference", None)

    @torch.no_grad()
    def norm(self, gain: Float[Tensor, " m"]) -> None:
        """Go through the norm before the head."""
        norm = Norm(len(gain), self.config.norm_eps)
        norm.gain = torch.nn.Parameter(gain.to(self.dtype))
        self._x = norm(self._x)

    def head(self, rows: Float[Tensor, "rows m"]) -> None:
        """Take the next rows of the head."""
        assert self.config.logit_scale is not None
        self._logits.append(functional.linear(self._x.flatten(0, 1), rows.to(self.dtype)) * self.config.logit_scale)

    @property
    def logits(self) -> Float[Tensor, "tokens v"]:
        return torch.cat(self._logits, dim=1)


def _trace(
    config: ModelConfig, traces: list[Trace], chunks: Callable[[str], Iterator[Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Go through a model in the order of its forward pass, and yield each parameter once, rounded to float32.

    Args:
        traces: one for each precision that weights are to be used in.
        chunks: a parameter's rows, some at a time, float64.
    """
    names = parameter_names(config)

    def fed(name: str, feed: Callable[[Trace], Callable[[Tensor], None]]) -> Tensor:
        parts = []
        for chunk in chunks(name):
            for trace in traces:
                feed(trace)(chunk)
            parts.append(chunk.float())
        return torch.cat(parts)

    yield "embedding.weight", fed("embedding.weight", lambda trace: trace.embed)
    for i in range(config.n_layers):
        prefix = f"blocks.{i}."
        block = {name: torch.cat(list(chunks(name))) for name in names if name.startswith(prefix)}
        for trace in traces:
            trace.block({name.removeprefix(prefix): w for name, w in block.items()})
        for name in block:
            yield name, block[name].float()
    if "norm.gain" in names:
        yield "norm.gain", fed("norm.gain", lambda trace: trace.norm)
    head = "embedding.weight" if config.tie_embeddings else "head.weight"
    weight = fed(head, lambda trace: trace.head)
    if not config.tie_embeddings:
        yield head, weight


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far the logits of the grown model are from those of the old one, on the same tokens, in one precision."""

    dtype: str
    norm_eps: float
    """That both were computed with."""
    largest: float
    """Over all tokens and the old vocabulary."""
    deviation: float
    """Of the old model's logits, the unit of the bound."""
    bound: float
    losses: tuple[float, float]
    """Mean cross-entropy of the next tokens in nats, of the old model and of the grown one."""

    @property
    def is_small(self) -> bool:
        return self.largest <= self.bound  # NaN is not


def grown_weights(
    growth: Growth, read: Read, batch: Batch, report: Callable[[list[Difference]], None]
) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter of the grown model, float32, and compare its function with the old one's on the way.

    float64 judges the maps, before anything is rounded and without norm_eps where that is felt, to 1e-11; float32 the
    weights as they are yielded and trained on, to 1e-4 of the logits' deviation, or 1e-3 where norm_eps is felt.

    Args:
        report: called at the end with both differences; raises to refuse them.
    """
    eps = NO_EPS if growth.feels_eps else growth.new.norm_eps
    before, after = (
        [Trace(dataclasses.replace(config, norm_eps=eps), batch, torch.float64), Trace(config, batch, torch.float32)]
        for config in (growth.old, growth.new)
    )

    def old_chunks(name: str) -> Iterator[Tensor]:
        weight = read(name)
        for rows in _row_chunks(len(weight), weight[0].numel()):
            yield weight[rows].double()

    for _ in _trace(growth.old, before, old_chunks):
        pass
    yield from _trace(growth.new, after, lambda name: growth.chunks(name, read))
    targets = batch.targets.flatten()
    differences = []
    for a, b in zip(before, after):
        old, new = a.logits, b.logits
        deviation = float(old.std())
        bound = 1e-11 * max(1.0, deviation)
        if a.dtype == torch.float32:
            bound = (1e-3 if growth.feels_eps else 1e-4) * deviation
        losses = [float(functional.cross_entropy(x, targets, ignore_index=IGNORED)) for x in (old, new)]
        differences.append(
            Difference(
                dtype=str(a.dtype).removeprefix("torch."), norm_eps=a.config.norm_eps, deviation=deviation, bound=bound,
                largest=float((new[:, : old.shape[1]] - old).abs().max()), losses=(losses[0], losses[1]),
            )
        )  # fmt: skip
    report(differences)


def grown_state(
    growth: Growth, kinds: Callable[[str], Iterable[str]], read: Callable[[str, str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the grown state of the optimizer, float32, by kind/name.

    Args:
        kinds: of a parameter's state, such as momentum.
        read: gives a tensor of the old state by kind and name.
    """
    for name in parameter_names(growth.new):
        for kind in kinds(name):
            yield f"{kind}/{name}", growth.state(name, kind, partial(read, kind))
