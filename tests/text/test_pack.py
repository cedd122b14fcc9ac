"""concat makes each token a target once; best_fit cuts no document that fits a row, and pads little."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakexue.text import pack as module
from megakexue.text.pack import BestFit, Concat
from megakexue.text.prepare import prepare
from megakexue.text.tokenizer import SentencePiece, Tokenizer
from tests.text.helpers import BOS, EOS, PAD, STDLIB, arguments, rows_of, stream_of, write_lines


def fake_documents(lengths: list[int]) -> list[list[int]]:
    """Documents of the given lengths; their inner tokens are all different, so that each can be followed."""
    number = iter(range(10, 10**6))
    return [[BOS, *(next(number) for _ in range(length - 2)), EOS] for length in lengths]


def pack(packer: Concat | BestFit, documents: list[list[int]], batch: int) -> np.ndarray:
    rows = []
    for start in range(0, len(documents), batch):
        part = documents[start : start + batch]
        rows.append(packer.add(np.array([token for document in part for token in document], np.uint32)).copy())
    return np.concatenate([*rows, packer.finish()]) if rows else packer.finish()


LENGTHS = st.lists(st.integers(2, 40), max_size=40)


@given(LENGTHS, st.integers(2, 12), st.integers(1, 5))
def test_concat_makes_each_token_a_target_once(lengths: list[int], seq_len: int, batch: int) -> None:
    documents = fake_documents(lengths)
    rows = pack(Concat(seq_len, np.dtype(np.uint32), PAD), documents, batch)
    stream = [token for document in documents for token in document]
    targets = rows[:, 1:].ravel()
    assert targets[targets != PAD].tolist() == stream[1:]
    if len(rows):
        assert stream_of(rows, PAD) == stream


@given(LENGTHS, st.integers(2, 12), st.integers(1, 5), st.integers(1, 200))
@settings(deadline=None)
def test_best_fit_cuts_no_document_that_fits(lengths: list[int], seq_len: int, batch: int, buffer: int) -> None:
    documents = fake_documents(lengths)
    with pytest.MonkeyPatch().context() as context:
        context.setattr(module, "BUFFER_TOKENS", buffer)
        rows = pack(BestFit(seq_len, np.dtype(np.uint32), BOS, EOS, PAD), documents, batch)
    found: Counter[tuple[int, ...]] = Counter()
    for row in rows.tolist():
        content = row[: len(row) - row[::-1].index(next(t for t in row[::-1] if t != PAD))]
        assert PAD not in content
        starts = sorted({0, *(i for i, token in enumerate(content) if token == BOS)})
        for start, stop in zip(starts, [*starts[1:], len(content)]):
            piece = tuple(content[start:stop])
            # What ends before its EOS is cut, and only a row's end cuts.
            assert piece[-1] == EOS or stop == seq_len + 1
            found[piece] += 1
    expected: Counter[tuple[int, ...]] = Counter()
    for document in documents:
        if len(document) <= seq_len + 1:
            expected[tuple(document)] += 1
            continue
        for start in range(0, len(document) - 1, seq_len):
            expected[tuple(document[start : start + seq_len + 1])] += 1
    assert found == expected
    inner = Counter(token for document in documents for token in document if token >= 10)
    assert Counter(token for token in rows[:, 1:].ravel().tolist() if token >= 10) == inner


def test_best_fit_pads_little(model: Path, tmp_path: Path) -> None:
    texts = {f"{path}\n{block}" for path in (STDLIB / "email").glob("*.py") for block in path.read_text().split("\n\n")}
    write_lines(tmp_path / "a.jsonl", sorted(texts))
    args = arguments(seq_len=256, packing="best_fit", valid_fraction=0.05)
    manifest = prepare([str(tmp_path / "a.jsonl")], model, tmp_path / "out", args, processes=2)
    assert manifest["padding_share"] < 0.05  # many are longer than a row, and two of their rests cannot share one
    tokenizer = SentencePiece(model)
    found: Counter[str] = Counter()
    for split in ("train", "valid"):
        for row in rows_of(tmp_path / "out" / split).tolist():
            found.update(whole_documents(row, tokenizer))
    fitting = {text for text in texts if len(tokenizer.encode(text)) + 2 <= 257}
    assert len(fitting) > 100
    assert all(found[text] == 1 for text in fitting)


def test_best_fit_of_short_documents_pads_almost_nothing() -> None:
    lengths = np.random.default_rng(0).exponential(200, 20_000).astype(int).clip(3, 513)
    packer = BestFit(512, np.dtype(np.uint16), BOS, EOS, PAD)
    tokens = np.full(lengths.sum(), 9, np.uint16)
    tokens[np.cumsum(lengths) - lengths] = BOS
    rows = packer.add(tokens)
    rows = np.concatenate([rows, packer.finish()])
    assert (rows != PAD).sum() == lengths.sum()
    assert (rows == PAD).mean() < 0.002


def whole_documents(row: list[int], tokenizer: Tokenizer) -> list[str]:
    starts = [i for i, token in enumerate(row) if token == tokenizer.bos_id]
    pieces = [row[start:stop] for start, stop in zip(starts, [*starts[1:], len(row)])]
    pieces = [[token for token in piece if token != tokenizer.pad_id] for piece in pieces]
    return [tokenizer.decode_bytes(piece).decode() for piece in pieces if piece[-1] == tokenizer.eos_id]


def test_a_vocabulary_above_65536_takes_uint32() -> None:
    assert module.row_dtype(1 << 16) == np.uint16
    assert module.row_dtype((1 << 16) + 1) == np.uint32
