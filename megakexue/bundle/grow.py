"""Growth: the weights of a larger model that computes what a smaller, trained one does, and can learn with all of them.

Every axis has one map (megakexue/bundle/axis_maps.py): weights u, with which the new axis takes the old indices, and
their left inverse v. With U and V the matrices of these, V U = 1, and x' = U x, a parameter changes by what its axes
are to it (the table of megakexue/core/axes.py):

    writes the axis    W' = U W          gradient: V^T G
    reads the axis     W' = W V + N      gradient: G U^T,     N U = 0, otherwise random
    copied             W'_i = W_pi(i)    gradient: u_i v_i G_pi(i)         gains of norms, and u = 1

A bias writes its axis, as a matrix of one column does.

Momentum goes the way of the gradient, Adam's second moment with the squares. N restores the energy of a row: RMS(W') =
RMS(W) sqrt(old/new) of the axis that is read, which is what a new matrix of that size has, and what Tiger's rate goes
by. Without N, copies get equal gradients, and an optimizer that uses their signs keeps the copies equal for ever.

Two things are not maps. A new row of the vocabulary is the mean row plus random numbers of a tenth of the rows'
deviation. A new block adds nothing: its units are pairs that cancel (`pair`), or its last matrices are zero. With
DeepNorm the stream passes the two norms of a new block all the same, so the gain before the block moves behind it;
this is exact but for norm_eps.

Sources: 8444 (copies; RoPE given up), Net2Net 1511.05641, LEMON 2310.07999, HyperCloning 2409.12903 (noise in the null
space of copies); docs/growth.md has the derivation. What must stay true: every parameter has its axes in the table, or
it is an error; a random number depends on (seed, name, shapes) alone, so that the order of tensors never matters; one
tensor at a time is in memory.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from megakexue.bundle.axis_maps import AxisMap, Choices, make_layers, make_maps, sides
from megakexue.bundle.grow_checks import check_growth
from megakexue.config import ResolvedModel
from megakexue.core.axes import axes, parameter_names, shape

Read = Callable[[str], Tensor]
"""Gives a parameter of the old model, or a tensor of its optimizer's state, by the parameter's name."""

CHUNK = 2**22
"""Elements of a grown tensor that are in float64 at a time."""
PAIR_SCALE = 0.3
"""What the last matrices of a new block are multiplied by: the first steps are small, and the RMS is far from 0, where
Tiger could not move it."""
VOCAB_NOISE = 0.1


class Growth:
    """The map from the parameters of one resolved config to those of a larger one.

    Raises:
        UserError: the target cannot be reached without changing the function; the message names the nearest that can.
    """

    def __init__(self, old: ResolvedModel, new: ResolvedModel, choices: Choices) -> None:
        check_growth(old, new, choices)
        self.old, self.new, self.choices = old, new, choices
        self.layers = make_layers(old, new, choices.depth)
        self.maps = make_maps(old, new, choices)
        self._scales = _absorbed_scales(old, new)

    @property
    def is_lossless(self) -> bool:
        return self.choices.depth != "stack" or self.new.n_layers == self.old.n_layers

    @property
    def feels_eps(self) -> bool:
        """Whether norm_eps is felt: in the norms of DeepNorm's new blocks, and where its alpha changes."""
        old, new = self.old, self.new
        return new.residual == "deepnorm" and (old.n_layers, old.residual_alpha) != (new.n_layers, new.residual_alpha)

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

    def scale(self, name: str) -> float:
        """What a parameter is multiplied by, since a scale of the target that acts on it is not the old one."""
        return self._scales.get(".".join(part for part in name.split(".") if not part.isdigit()), 1.0)

    def _before(self, name: str) -> str:
        """The same parameter of the old block before a new one."""
        _, i, rest = name.split(".", 2)
        return f"blocks.{self.layers[int(i)].after}.{rest}"

    def _generator(self, name: str) -> torch.Generator:
        in_old = f"blocks.0.{name.split('.', 2)[2]}" if name.startswith("blocks.") else name
        # the text is part of every random number: another one, and no growth could be repeated
        key = f"grow {self.choices.seed} {name} {shape(in_old, self.old)} {shape(name, self.new)} ()"
        digest = hashlib.sha256(key.encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    # --- weights -----------------------------------------------------------------------------------------------------

    def weight(self, name: str, read: Read, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a grown parameter: computed in float64, and rounded once."""
        return torch.cat([chunk.to(dtype) for chunk in self.chunks(name, read)])

    def chunks(self, name: str, read: Read) -> Iterator[Float64[Tensor, "*rows"]]:
        """Yield a grown parameter, some rows at a time."""
        source = self.origin(name)
        if axes(name).role == "gain":
            yield self._gain(name, None if source is None else read(source))
        elif axes(name).role == "bias":
            yield self._bias(name, None if source is None else read(source))
        elif source is None:
            yield from self._new_matrix(name, read)
        else:
            yield from self._matrix(name, read(source))

    def _gain(self, name: str, old: Tensor | None) -> Tensor:
        out, _ = sides(self.maps, name)
        if old is not None:
            return old.double()[out.index] * self.scale(name)
        # behind DeepNorm's norm the stream must come out of a new block as it went in
        start = 1.0 if self.new.residual == "deepnorm" else self.new.gain_centre
        return torch.full((len(out),), start, dtype=torch.float64)

    def _bias(self, name: str, old: Tensor | None) -> Tensor:
        """0 where it is new: a fresh unit and a new block begin without a bias, as new weights do."""
        out, _ = sides(self.maps, name)
        if old is None:
            return torch.zeros(len(out), dtype=torch.float64)
        return (old.double()[out.index] * out.write * self.scale(name)).where(~out.fresh, 0.0)

    def _matrix(self, name: str, old: Tensor) -> Iterator[Tensor]:
        """A matrix that grows from an old one."""
        out, contracted = sides(self.maps, name)
        is_embedding = axes(name).role == "embedding"
        columns = (contracted.write if is_embedding else contracted.read) * self.scale(name)
        width = len(contracted)
        power = _column_power(old) * self.scale(name) ** 2
        sigma = 0.0 if is_embedding else self._noise(power, contracted)
        fresh_rms = (float(power.sum()) / width) ** 0.5
        generator = self._generator(name)
        is_vocab = axes(name).out == "v"
        if is_vocab and bool(out.fresh.any()):
            mean, deviation = _mean_and_deviation(old)
        for rows in row_chunks(len(out), width):
            taken, fresh = old[out.index[rows]].double(), out.fresh[rows]
            if is_vocab and bool(fresh.any()):
                spread = torch.randn(int(fresh.sum()), len(mean), generator=generator, dtype=torch.float64)
                taken[fresh] = mean + VOCAB_NOISE * deviation * spread
                fresh = torch.zeros_like(fresh)
            chunk = taken[:, contracted.index] * columns * out.write[rows, None]
            if sigma or bool(fresh.any()):
                random = torch.randn(chunk.shape, generator=generator, dtype=torch.float64)
                if sigma:
                    chunk += sigma * _unseen(random, contracted)
                chunk[fresh] = fresh_rms * random[fresh]
            chunk[:, contracted.fresh] = 0.0
            yield chunk

    def _noise(self, power: Float64[Tensor, " old"], contracted: AxisMap) -> float:
        """The deviation of what gives a row its energy back; `power` is the mean square of each old column."""
        kept = torch.zeros_like(power).index_add_(0, contracted.index, contracted.read.square())
        missing = float((power * (1 - kept)).sum())
        # an ancestor fixes one combination of its copies; a silent channel is free
        n_free = int((~contracted.fresh).sum()) - len(contracted.index[contracted.live].unique())
        return self.choices.noise * math.sqrt(max(0.0, missing) / n_free) if n_free else 0.0

    def _new_matrix(self, name: str, read: Read) -> Iterator[Tensor]:
        """A matrix of a new block, as large as that of the block before."""
        n_rows, width = shape(name, self.new)
        generator, table = self._generator(name), axes(name)
        power = _column_power(read(self._before(name)))
        rms = (float(power.sum()) / width) ** 0.5 * self.scale(name)
        is_pair, is_last = self.choices.depth == "pair", table.out == "m"
        if is_last:
            rms *= PAIR_SCALE if is_pair else 0.0
        for rows in row_chunks(n_rows, width):
            chunk = rms * torch.randn(rows.stop - rows.start, width, generator=generator, dtype=torch.float64)
            if is_pair and is_last:
                chunk[:, 1::2] = -chunk[:, ::2]
            if is_pair and table.out[-1] in "ef":
                chunk[1::2] = chunk[::2]
            yield chunk

    # --- the optimizer's state ---------------------------------------------------------------------------------------

    def state(self, name: str, kind: str, read: Read, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a grown tensor of the optimizer's state: momentum and exp_avg as the gradient, exp_avg_sq its square.

        What no old gradient says is 0; in exp_avg_sq, where 0 would be a huge step, the mean of what is known.
        """
        return torch.cat([chunk.to(dtype) for chunk in self._state_chunks(name, kind, read)])

    def _state_chunks(self, name: str, kind: str, read: Read) -> Iterator[Tensor]:
        power = 2 if kind == "exp_avg_sq" else 1
        source, role = self.origin(name), axes(name).role
        old = read(source or self._before(name))
        old = old if old.dim() == 2 else old[:, None]
        out, contracted = sides(self.maps, name)
        # what the rows and the columns of a gradient are multiplied by; 0: nothing is known
        rows_by = out.write * out.read if role == "gain" else out.read
        rows_by = rows_by.where(~out.fresh, 0.0) ** power
        columns_by = (contracted.read if role == "embedding" else contracted.write) / self.scale(name)
        columns_by = columns_by.where(~contracted.fresh, 0.0) ** power
        fill = _known_mean(old, (out.index, contracted.index), (rows_by, columns_by)) if power == 2 else 0.0
        for rows in row_chunks(len(out), len(contracted)):
            if source is None:
                chunk = torch.full((rows.stop - rows.start, len(contracted)), fill, dtype=torch.float64)
            else:
                by = rows_by[rows, None] * columns_by
                chunk = (old[out.index[rows]].double()[:, contracted.index] * by).where(by != 0, fill)
            yield chunk[:, 0] if role in ("gain", "bias") else chunk


def _absorbed_scales(old: ResolvedModel, new: ResolvedModel) -> dict[str, float]:
    """What makes up for a scale of the target that differs, in each parameter that it multiplies."""
    queries = ["wq_up"] if new.mla and new.mla.d_query_latent else ["wq", "bq"]
    if new.attention.qk_norm:  # which undoes the scale of what comes before it
        queries = ["query_norm.gain"]
    alpha = new.residual_alpha / old.residual_alpha
    scales = {
        "embedding.weight": old.embed_scale / new.embed_scale,
        **{f"blocks.attention.{name}": old.attention.softmax_scale / new.attention.softmax_scale for name in queries},
        "blocks.attention.wo": alpha, "blocks.feed_forward.w_down": alpha,
    }  # fmt: skip
    return scales if new.tie_embeddings else scales | {"head.weight": old.logit_scale / new.logit_scale}


def row_chunks(n_rows: int, width: int) -> Iterator[slice]:
    """Cut the rows of a matrix into parts of CHUNK elements."""
    size = max(2, CHUNK // width // 2 * 2)  # even, since pairs of rows stay together
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))


def _column_power(x: Float[Tensor, "rows columns"]) -> Float64[Tensor, " columns"]:
    """The mean square of each column."""
    total = torch.zeros(x.shape[1], dtype=torch.float64)
    for rows in row_chunks(*x.shape):
        total += x[rows].double().square().sum(0)
    return total / len(x)


def _mean_and_deviation(x: Float[Tensor, "rows columns"]) -> tuple[Tensor, Tensor]:
    mean = sum((x[rows].double().sum(0) for rows in row_chunks(*x.shape)), torch.zeros(x.shape[1])) / len(x)
    return mean, (_column_power(x) - mean.square()).clamp(min=0).sqrt()


def _unseen(random: Float64[Tensor, "rows new"], contracted: AxisMap) -> Float64[Tensor, "rows new"]:
    """The part of random readers that is 0 on every x' = U x: E_i - u_i (sum_k u_k E_k) / (sum_k u_k^2).

    The sums are over the k that have the ancestor of i.
    """
    u, n = contracted.write.where(~contracted.fresh, 0.0), contracted.n_old
    power = torch.zeros(n, dtype=torch.float64).index_add_(0, contracted.index, u.square()).clamp(min=1e-300)
    sums = torch.zeros(len(random), n, dtype=torch.float64).index_add_(1, contracted.index, random * u)
    return random - u * (sums / power)[:, contracted.index]


def _known_mean(old: Float[Tensor, "rows columns"], index: tuple[Tensor, ...], by: tuple[Tensor, ...]) -> float:
    """The mean over the grown entries that are known (not multiplied by 0), without forming them."""
    weights = [torch.zeros(n, dtype=torch.float64).index_add_(0, i, x) for n, i, x in zip(old.shape, index, by)]
    total = sum(float(weights[0][r] @ old[r].double() @ weights[1]) for r in row_chunks(*old.shape))
    return total / max(1, math.prod(int((x != 0).sum()) for x in by))


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
