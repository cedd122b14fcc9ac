"""Pack documents into rows of seq_len + 1 tokens: the inputs are row[:-1] and the targets row[1:].

A document is BOS, its tokens, EOS. A row alone tells where its documents start: at each BOS, which no text encodes to,
and at its first token. Free places at the end of a row hold PAD.

Where a tokenizer has one mark for both, BOS is EOS: of two in a row, the first ends a document and the second begins
one. Where it has no other mark at all, PAD is that one too.
"""

import itertools

import numpy as np

BUFFER_TOKENS = 1 << 22
"""Tokens that best_fit gathers before it packs them."""


def row_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest type that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def marked_starts(tokens: np.ndarray, bos_id: int, eos_id: int) -> np.ndarray:
    """Return where documents begin that are marked, bool of the shape (tokens,)."""
    is_start = tokens == bos_id
    if bos_id == eos_id:
        is_start[1:] &= is_start[:-1]
    return is_start


class Concat:
    """Cut one stream of documents every seq_len tokens.

    The first token of a row is the last of the row before, so every token but the stream's first is a target once.
    """

    def __init__(self, seq_len: int, dtype: np.dtype, pad_id: int) -> None:
        self.seq_len, self.pad_id = seq_len, pad_id
        self.rest = np.empty(0, dtype)
        self.n_padding = 0

    def add(self, tokens: np.ndarray) -> np.ndarray:
        """Take whole documents and return the rows that are full, (rows, seq_len + 1)."""
        stream = np.concatenate([self.rest, tokens])
        n = max(len(stream) - 1, 0) // self.seq_len
        self.rest = stream[n * self.seq_len :].copy()
        if n == 0:
            return np.empty((0, self.seq_len + 1), stream.dtype)
        return np.lib.stride_tricks.sliding_window_view(stream, self.seq_len + 1)[:: self.seq_len][:n]

    def finish(self) -> np.ndarray:
        """Return the last row, padded, or no row if every token has been a target: (0 or 1, seq_len + 1)."""
        rows = np.full((int(len(self.rest) > 1), self.seq_len + 1), self.pad_id, self.rest.dtype)
        rows[:, : len(self.rest)] = self.rest
        self.n_padding += len(rows) * (self.seq_len + 1 - len(self.rest))
        return rows


class BestFit:
    """Best-fit-decreasing packing of whole documents within a buffer of `BUFFER_TOKENS`.

    A document longer than a row is cut into pieces as long as a row, which overlap by one token. What is left of it has
    no BOS to mark its start, so it always begins a row; shorter documents may follow it.
    """

    def __init__(self, seq_len: int, dtype: np.dtype, bos_id: int, eos_id: int, pad_id: int) -> None:
        self.row_len, self.dtype = seq_len + 1, dtype
        self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id
        self.n_padding = 0
        self._empty()

    def _empty(self) -> None:
        self.full: list[np.ndarray] = []
        self.rests: list[np.ndarray] = []
        self.documents: list[np.ndarray] = []
        self.buffered = 0

    def add(self, tokens: np.ndarray) -> np.ndarray:
        """Take whole documents and return the rows of the buffer if it is full, (rows, seq_len + 1)."""
        borders = [*np.flatnonzero(marked_starts(tokens, self.bos_id, self.eos_id)).tolist(), len(tokens)]
        for begin, end in itertools.pairwise(borders):
            place = self.documents
            while end - begin > self.row_len:
                self.full.append(tokens[begin : begin + self.row_len])
                begin += self.row_len - 1
                place = self.rests
            place.append(tokens[begin:end])
        self.buffered += len(tokens)
        return self.finish() if self.buffered >= BUFFER_TOKENS else np.empty((0, self.row_len), self.dtype)

    def finish(self) -> np.ndarray:
        """Empty the buffer and return its rows, (rows, seq_len + 1)."""
        bins = [[piece] for piece in self.full + self.rests]
        by_space: dict[int, list[int]] = {}  # free places -> bins
        spaces = 0  # bit s: some bin has s free places

        def put_back(index: int, space: int) -> int:
            by_space.setdefault(space, []).append(index)
            return spaces | 1 << space

        for index, piece in enumerate(self.rests, start=len(self.full)):
            spaces = put_back(index, self.row_len - len(piece))
        for piece in sorted(self.documents, key=len, reverse=True):
            fitting = spaces >> len(piece) << len(piece)
            if fitting:  # its lowest bit is the smallest space that is enough
                space = (fitting & -fitting).bit_length() - 1
                index = by_space[space].pop()
                if not by_space[space]:
                    spaces ^= 1 << space
                bins[index].append(piece)
            else:
                space, index = self.row_len, len(bins)
                bins.append([piece])
            spaces = put_back(index, space - len(piece))
        rows = np.full((len(bins), self.row_len), self.pad_id, self.dtype)
        for row, pieces in zip(rows, bins):
            joined = np.concatenate(pieces)
            row[: len(joined)] = joined
            self.n_padding += len(row) - len(joined)
        self._empty()
        return rows
