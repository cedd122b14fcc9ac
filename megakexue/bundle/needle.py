"""Needles and copies: does a model find again what it has read, and from how far?

A pattern of n tokens stands in running text, and comes again at the end of the row:

    BOS  text ...  PATTERN  ... text  PATTERN          length + 1 tokens: `length` inputs and as many targets

    needle    a key and a value, of random tokens: the key at the end asks for the value, whose tokens are scored
    random    random tokens; all but the first are scored, since what comes again cannot be known before it begins
    passage   the same with a passage from elsewhere in the data

Nothing is generated: each token is scored given the true ones before it, which a model without instruction tuning can
do. Random tokens are drawn from the more frequent half of those in the data, each at most once in a pattern, so none is
one that the model was never trained on.

What must stay true: the first pattern replaces text of its length, so the row without it has the same length, and the
same text everywhere else: one such row is the control of all places. A case depends on the data, its seed and the row
length alone. Only the logits of CHUNK scored tokens exist at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64

from megakexue.bundle.evaluate import BATCH_TOKENS, CHUNK
from megakexue.config import require
from megakexue.core.decoder import Decoder

KEY, VALUE, COPY = 4, 4, 32
"""Tokens of a needle's key and value, and of a copy. A key of one token would be found at other places of the text."""
NEEDLE = KEY + VALUE
COUNTED = 1 << 20
"""Tokens of the data whose frequencies are counted."""

Kind = Literal["random", "passage"]
Rows = Int64[np.ndarray, "n t1"]
Columns = Int64[np.ndarray, "n k"]


@dataclass(frozen=True, kw_only=True)
class NeedleCell:
    """The needles of all seeds at one depth, in rows of one length."""

    length: int
    depth: float
    """Percent of the text that is before the needle."""
    n_cases: int
    n_exact: int
    """Cases in which each token of the value is the most probable one."""
    log_prob: float
    """Nats for a token of the value, mean over the cases."""
    n_exact_without: int
    """The same without the needle in the text."""
    log_prob_without: float


@dataclass(frozen=True, kw_only=True)
class CopyCell:
    """The copies of all seeds at one distance, in rows of one length; losses in nats per token."""

    kind: Kind
    length: int
    distance: int
    """From a token to the same one in the copy."""
    n_cases: int
    first: float
    """Loss of the first occurrence."""
    again: float
    """Loss of the copy, the last tokens of the row."""
    without: float
    """Loss of the same last tokens where the text has no first occurrence."""


class RunningText:
    """The text of prepared rows as one stream, without BOS, EOS and PAD."""

    def __init__(
        self, read: Callable[[int], np.ndarray], n_rows: int, *, bos_id: int, eos_id: int, pad_id: int
    ) -> None:
        """`read` returns the tokens of a row by its number below `n_rows`; its last token may begin the next row."""
        self.bos_id, self._read, self._n_rows = bos_id, read, n_rows
        self._special = np.array([bos_id, eos_id, pad_id])
        self._common: np.ndarray | None = None

    def _row(self, number: int) -> np.ndarray:
        tokens = self._read(number % self._n_rows)[:-1].astype(np.int64)
        return tokens[~np.isin(tokens, self._special)]

    def take(self, n_tokens: int, generator: np.random.Generator) -> Int64[np.ndarray, " n"]:
        """Return the tokens from a random place on; after the last row comes the first one.

        Raises:
            UserError: there are fewer tokens.
        """
        first = int(generator.integers(self._n_rows))
        tokens = self._row(first)
        skipped = int(generator.integers(max(1, len(tokens))))
        parts, n = [tokens[skipped:]], len(tokens) - skipped
        for number in range(first + 1, first + self._n_rows):
            if n >= n_tokens:
                break
            parts.append(self._row(number))
            n += len(parts[-1])
        if n < n_tokens:
            parts.append(tokens[:skipped])
        text = np.concatenate(parts)[:n_tokens]
        require(
            len(text) == n_tokens,
            f"the data has only {len(text)} tokens of text in this split, and these rows need {n_tokens}: ask for "
            "shorter --lengths, or prepare more text",
        )
        return text

    def draw(self, n_tokens: int, generator: np.random.Generator) -> Int64[np.ndarray, " n"]:
        """Return different tokens, of the more frequent half of those in the data. Raises UserError: it has fewer."""
        if self._common is None:
            parts, n = [], 0
            for number in range(self._n_rows):
                parts.append(self._row(number))
                n += len(parts[-1])
                if n >= COUNTED:
                    break
            ids, counts = np.unique(np.concatenate(parts), return_counts=True)
            self._common = ids[np.argsort(-counts, kind="stable")[: (len(ids) + 1) // 2]]
        require(
            len(self._common) >= n_tokens,
            f"the data has only {len(self._common)} common tokens in this split, and a pattern needs {n_tokens}: "
            "prepare more text",
        )
        return generator.choice(self._common, n_tokens, replace=False)


def place(
    text: Int64[np.ndarray, " n"], pattern: Int64[np.ndarray, " m"], starts: Sequence[int], bos_id: int
) -> Int64[np.ndarray, "s t1"]:
    """Return a row without the first pattern, and then one for each of `starts`, the column where it begins."""
    rows = np.concatenate([[bos_id], text, pattern])[None].repeat(1 + len(starts), 0)
    for row, start in zip(rows[1:], starts, strict=True):
        assert 1 <= start <= len(text) + 1 - len(pattern), "the first pattern is in the text"
        row[start : start + len(pattern)] = pattern
    return rows


def needle_starts(length: int, depths: Sequence[float]) -> list[int]:
    """Return the columns where needles begin: at 0 % just behind BOS, at 100 % just before the key at the end."""
    return [1 + round(depth / 100 * (length - 2 * NEEDLE)) for depth in depths]


def needle_rows(text: RunningText, length: int, depths: Sequence[float], seed: int) -> Int64[np.ndarray, "s t1"]:
    """Return a row without a needle, and one for each depth. Raises UserError: the data has too few tokens."""
    generator = np.random.default_rng(seed)
    needle = text.draw(NEEDLE, generator)
    return place(text.take(length - NEEDLE, generator), needle, needle_starts(length, depths), text.bos_id)


def distances(length: int) -> list[int]:
    """Return the distances of copies in rows of a length: COPY, twice that and so on, and the longest possible."""
    longest, found = length - COPY, [COPY]
    while 2 * found[-1] < longest:
        found.append(2 * found[-1])
    return found if found[-1] == longest else [*found, longest]


def copy_rows(text: RunningText, kind: Kind, length: int, seed: int) -> Int64[np.ndarray, "s t1"]:
    """Return a row without a first occurrence, and one for each distance. Raises UserError: too few tokens."""
    generator = np.random.default_rng(seed)
    drawn = text.draw(COPY, generator)
    # a passage that the text goes on from would be easier where it comes again
    around = text.take(COPY + length, generator)
    pattern = drawn if kind == "random" else around[:COPY]
    starts = [length + 1 - COPY - distance for distance in distances(length)]
    return place(around[2 * COPY :], pattern, starts, text.bos_id)


@torch.no_grad()
def score(model: Decoder, rows: Rows, columns: Columns) -> tuple[Float64[np.ndarray, "n k"], Bool[np.ndarray, "n k"]]:
    """Return the log-probability of the tokens in some columns of each row, given those before them in the row.

    Also return whether they are the most probable ones. Each row is one document.

    Raises:
        UserError: a log-probability is not finite.
    """
    device, (n, t1) = model.embedding.weight.device, rows.shape
    log_probs, is_best = [], []
    n_at_a_time = max(1, BATCH_TOKENS // (t1 - 1))
    for low in range(0, n, n_at_a_time):
        tokens, index = (torch.from_numpy(x[low : low + n_at_a_time]).to(device) for x in (rows, columns))
        positions = torch.arange(t1 - 1, device=device).expand(len(tokens), -1)
        row = torch.arange(len(tokens), device=device)[:, None]
        hidden = model.hidden(tokens[:, :-1], positions)[row, index - 1].flatten(0, 1)
        for x, target in zip(hidden.split(CHUNK), tokens[row, index].flatten().split(CHUNK)):
            logits = model.head(x)
            is_best.append(logits.argmax(-1) == target)
            log_probs.append(logits.log_softmax(-1).gather(1, target[:, None])[:, 0])
    log_prob = torch.cat(log_probs).double().cpu().view(columns.shape)
    require(bool(log_prob.isfinite().all()), "the model's logits are not finite: evaluate with --dtype fp32")
    return log_prob.numpy(), torch.cat(is_best).cpu().view(columns.shape).numpy()


def _scored(rows: list[Int64[np.ndarray, "s t1"]], n_scored: int) -> tuple[Rows, Columns]:
    """Return the rows of all seeds, and of each the last columns."""
    joined = np.concatenate(rows)
    last = np.arange(joined.shape[1] - n_scored, joined.shape[1])
    return joined, last[None].repeat(len(joined), 0)


def needles(
    model: Decoder, text: RunningText, *, length: int, depths: Sequence[float], seeds: Sequence[int]
) -> list[NeedleCell]:
    """Score needles in rows of `length` tokens, at least 2 NEEDLE. Raises UserError: see `take`, `draw` and `score`."""
    rows, columns = _scored([needle_rows(text, length, depths, seed) for seed in seeds], VALUE)
    log_probs, is_best = score(model, rows, columns)
    log_prob = log_probs.reshape(len(seeds), -1, VALUE).mean((0, 2)).tolist()
    n_exact = is_best.reshape(len(seeds), -1, VALUE).all(2).sum(0).tolist()
    without: dict[str, Any] = {"n_exact_without": n_exact[0], "log_prob_without": log_prob[0]}
    return [
        NeedleCell(length=length, depth=depth, n_cases=len(seeds), n_exact=n, log_prob=mean, **without)
        for depth, n, mean in zip(depths, n_exact[1:], log_prob[1:], strict=True)
    ]


def copies(model: Decoder, text: RunningText, *, kind: Kind, length: int, seeds: Sequence[int]) -> list[CopyCell]:
    """Score copies in rows of `length` tokens, at least 2 COPY. Raises UserError: see `take`, `draw` and `score`."""
    apart = distances(length)
    rows, again = _scored([copy_rows(text, kind, length, seed) for seed in seeds], COPY - 1)
    # the row without a first occurrence has none to score: what is read there is its end, once more
    first = again - np.tile([0, *apart], len(seeds))[:, None]
    losses = -score(model, rows, np.concatenate([first, again], axis=1))[0]
    first_loss, again_loss = losses.reshape(len(seeds), len(apart) + 1, 2, -1).mean((0, 3)).T.tolist()
    return [
        CopyCell(kind=kind, length=length, distance=distance, n_cases=len(seeds), first=f, again=a,
                 without=again_loss[0])
        for distance, f, a in zip(apart, first_loss[1:], again_loss[1:], strict=True)
    ]  # fmt: skip
