"""Needles and copies: where they are, what is scored, and known answers of a model that finds what it can see."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megakexue.bundle.evaluate import CHUNK
from megakexue.bundle.needle import (
    COPY,
    KEY,
    NEEDLE,
    VALUE,
    Kind,
    RunningText,
    copies,
    copy_rows,
    distances,
    needle_rows,
    needle_starts,
    needles,
    score,
)
from megakexue.config import RopeConfig, UserError
from megakexue.core.attention import Backend
from megakexue.core.decoder import Decoder
from tests.helpers import KINDS, build, tiny

BOS, EOS, PAD, VOCABULARY = 1, 2, 0, 600
DEPTHS = (0.0, 30.0, 50.0, 100.0)


def make_text(n_rows: int = 40, seq_len: int = 64) -> RunningText:
    """Rows of random tokens from 10 on, with documents of 30 tokens and padding in them."""
    generator = np.random.default_rng(7)
    rows = generator.integers(10, VOCABULARY, (n_rows, seq_len + 1)).astype(np.uint16)
    rows[:, ::30], rows[:, 29::30], rows[::3, -5:] = BOS, EOS, PAD
    return RunningText(lambda number: rows[number], n_rows, bos_id=BOS, eos_id=EOS, pad_id=PAD)


def stream(text: RunningText) -> list[int]:
    return np.concatenate([text._row(number) for number in range(text._n_rows)]).tolist()


class Finder(Decoder):
    """Predicts what followed the last `n_matched` tokens when they were last seen, up to `window` tokens before.

    Where they were not seen, all tokens are as probable.
    """

    def __init__(self, n_matched: int, window: int) -> None:
        super().__init__(tiny(vocab_size=VOCABULARY), "reference")
        self.n_matched, self.window = n_matched, window
        self.head = nn.Identity()  # type: ignore[assignment]

    def hidden(self, tokens: Tensor, positions: Tensor, *_: Any, **__: Any) -> Tensor:
        b, t = tokens.shape
        assert (positions == torch.arange(t)).all(), "a row is one document"
        found, logits = torch.zeros(b, t, dtype=torch.bool), torch.zeros(b, t, VOCABULARY)
        for distance in range(1, min(self.window + 1, t)):
            same = torch.zeros(b, t, dtype=torch.bool)
            same[:, distance:] = tokens[:, distance:] == tokens[:, :-distance]
            run = same.clone()
            for k in range(1, self.n_matched):
                run[:, k:] &= same[:, :-k]
                run[:, :k] = False
            row, column = (run & ~found).nonzero(as_tuple=True)
            logits[row, column, tokens[row, column - distance + 1]] = 40.0
            found |= run
        return logits


def test_the_text_is_that_of_the_rows_from_some_place_on() -> None:
    text = make_text()
    whole = stream(text)
    assert not {BOS, EOS, PAD} & set(whole)
    twice = whole + whole
    starts = set()
    for seed in range(20):
        taken = text.take(200, np.random.default_rng(seed)).tolist()
        starts.add(next(i for i in range(len(whole)) if twice[i : i + 200] == taken))
    assert len(starts) == 20 and max(starts) > len(whole) - 200, "some go on with the first row"
    everything = text.take(len(whole), np.random.default_rng(3)).tolist()
    assert len(everything) == len(whole) and sorted(everything) == sorted(whole)
    with pytest.raises(UserError, match=rf"only {len(whole)} tokens of text in this split, and these rows need"):
        text.take(len(whole) + 1, np.random.default_rng(3))


def test_patterns_are_of_the_more_frequent_half_of_the_tokens() -> None:
    rows = np.array([[BOS, *[20] * 9, *[21] * 8, *[22] * 7, 23, 24, 25, EOS, PAD]])
    text = RunningText(lambda number: rows[number], 1, bos_id=BOS, eos_id=EOS, pad_id=PAD)
    assert sorted(text.draw(3, np.random.default_rng(0))) == [20, 21, 22]
    with pytest.raises(UserError, match="only 3 common tokens in this split, and a pattern needs 8"):
        text.draw(NEEDLE, np.random.default_rng(0))


@pytest.mark.parametrize("length", [2 * NEEDLE, 100, 257])
def test_a_needle_is_at_its_depth_and_the_row_has_its_length(length: int) -> None:
    text = make_text()
    rows = needle_rows(text, length, DEPTHS, seed=5)
    assert rows.shape == (1 + len(DEPTHS), length + 1) and (rows[:, 0] == BOS).all()
    without, needle = rows[0], rows[0, -NEEDLE:]
    assert len(set(needle.tolist())) == NEEDLE
    free = length - 2 * NEEDLE  # tokens of text beside the needle
    expected = {0.0: 1, 30.0: 1 + round(0.3 * free), 50.0: 1 + round(free / 2), 100.0: length + 1 - 2 * NEEDLE}
    for depth, row in zip(DEPTHS, rows[1:]):
        start = expected[depth]
        assert row[start : start + NEEDLE].tolist() == needle.tolist() == row[-NEEDLE:].tolist()
        others = np.ones(length + 1, dtype=bool)
        others[start : start + NEEDLE] = False
        assert (row == without)[others].all(), "all the rest is as without it"
    whole = ",".join(map(str, stream(text) * 2))
    assert ",".join(map(str, without[1:-NEEDLE])) in whole


def test_a_case_depends_on_its_seed_and_length_alone() -> None:
    rows = needle_rows(make_text(), 100, DEPTHS, seed=5)
    assert (needle_rows(make_text(), 100, DEPTHS, seed=5) == rows).all()
    assert (needle_rows(make_text(), 100, (50.0,), seed=5) == rows[[0, 3]]).all()
    assert (needle_rows(make_text(), 90, DEPTHS, seed=5)[:, -NEEDLE:] == rows[:, -NEEDLE:]).all()
    assert not (needle_rows(make_text(), 100, DEPTHS, seed=6)[0, 1:] == rows[0, 1:]).all()
    kinds: tuple[Kind, ...] = ("random", "passage")
    random, passage = (copy_rows(make_text(), kind, 200, seed=5) for kind in kinds)
    assert (copy_rows(make_text(), "passage", 200, seed=5) == passage).all()
    assert (random[0, :-COPY] == passage[0, :-COPY]).all(), "the same text around both"
    whole = stream(make_text()) * 2
    at = next(i for i in range(len(whole)) if whole[i : i + COPY] == passage[0, -COPY:].tolist())
    text = passage[0, 1:-COPY].tolist()
    assert whole[at + 2 * COPY : at + 2 * COPY + len(text)] == text, "the passage does not lead into the text"
    assert ",".join(map(str, random[0, -COPY:])) not in ",".join(map(str, whole))


def test_distances_are_those_of_the_copies() -> None:
    assert distances(2 * COPY) == [COPY]
    assert distances(300) == [32, 64, 128, 256, 268]
    assert distances(288) == [32, 64, 128, 256]
    for distance, row in zip(distances(300), copy_rows(make_text(), "random", 300, seed=1)[1:], strict=True):
        assert len(row) == 301
        assert row[-COPY - distance : len(row) - distance].tolist() == row[-COPY:].tolist()


def test_a_model_that_sees_far_enough_finds_the_needle_and_no_other_does() -> None:
    """The window ends at the needle in the middle, or one token before: a place that is off by one shows."""
    length, seeds = 120, range(6)
    at_50 = length + 1 - NEEDLE - needle_starts(length, DEPTHS)[2]
    for window, n_found in ((length, [6, 6, 6, 6]), (at_50, [0, 0, 6, 6]), (at_50 - 1, [0, 0, 0, 6])):
        cells = needles(Finder(KEY, window), make_text(), length=length, depths=DEPTHS, seeds=seeds)
        assert [cell.n_exact for cell in cells] == n_found
        for cell in cells:
            assert (cell.length, cell.n_cases, cell.n_exact_without) == (length, 6, 0)
            assert cell.log_prob_without == pytest.approx(-math.log(VOCABULARY))
            expected = 0 if cell.n_exact else -math.log(VOCABULARY)
            assert cell.log_prob == pytest.approx(expected, abs=1e-5)
    # a model that must match more than the key does not know the first token of the value, and that is no exact match
    cells = needles(Finder(KEY + 1, length), make_text(), length=length, depths=(50.0,), seeds=seeds)
    assert cells[0].n_exact == 0
    assert cells[0].log_prob == pytest.approx(-math.log(VOCABULARY) / VALUE)


@pytest.mark.parametrize("kind", ["random", "passage"])
def test_a_model_that_sees_far_enough_copies(kind: Kind) -> None:
    """Of the 31 tokens that are scored, a finder of pairs does not know the first: it has seen one token of two."""
    uniform, length = math.log(VOCABULARY), 300
    for window, n_copied in ((length, 5), (128, 3), (127, 2)):
        cells = copies(Finder(2, window), make_text(), kind=kind, length=length, seeds=range(4))
        assert [cell.distance for cell in cells] == distances(length)
        for i, cell in enumerate(cells):
            assert cell.first == pytest.approx(uniform) and cell.without == pytest.approx(uniform)
            assert cell.again == pytest.approx(uniform / (COPY - 1) if i < n_copied else uniform, abs=1e-5)


def test_the_same_tokens_of_both_occurrences_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []

    def noted(model: Decoder, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        seen.extend([rows, columns])
        return score(model, rows, columns)

    monkeypatch.setattr("megakexue.bundle.needle.score", noted)
    cells = copies(Finder(2, 200), make_text(), kind="random", length=200, seeds=range(2))
    rows, columns = seen
    n = COPY - 1
    for i, (row, places) in enumerate(zip(rows, columns, strict=True)):
        assert places[n:].tolist() == list(range(201 - n, 201))
        assert (row[places[:n]] == row[places[n:]]).all()
        distance = i % (len(cells) + 1) and cells[i % (len(cells) + 1) - 1].distance
        assert (places[n:] - places[:n] == distance).all()


EXTENDED: dict[str, dict[str, Any]] = {
    extension: dict(
        rope=RopeConfig(context=64, trained_context=32, extension=extension, yarn_temperature=temperature)  # type: ignore[arg-type]
    )
    for extension, temperature in (("base", None), ("interpolate", None), ("ntk_mixed", None), ("yarn", True))
}


@pytest.mark.parametrize("kind", [*KINDS, *EXTENDED])
def test_scores_are_those_of_a_full_forward_pass(kind: str) -> None:
    """Also beyond the context of 64 tokens, and for columns that differ from row to row."""
    backends: tuple[Backend, ...] = ("reference", "blocked", "sdpa")
    generator = np.random.default_rng(0)
    rows = generator.integers(0, 97, (3, 151))
    columns = np.array([[150, 1, 40], [3, 149, 80], [2, 75, 76]])
    for backend in backends:
        model = build(tiny(**(KINDS | EXTENDED)[kind]), backend)
        log_prob, is_best = score(model, rows, columns)
        tokens = torch.from_numpy(rows)
        with torch.no_grad():
            logits = model(tokens[:, :-1], torch.arange(150).expand(3, -1)).double().log_softmax(-1)
        for row, places in enumerate(columns):
            for i, column in enumerate(places):
                expected = logits[row, column - 1]
                assert log_prob[row, i] == pytest.approx(float(expected[rows[row, column]]), abs=1e-5)
                assert is_best[row, i] == (int(expected.argmax()) == rows[row, column])


def test_scores_do_not_depend_on_the_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = build(tiny()), np.random.default_rng(0).integers(0, 97, (7, 33))
    columns = np.arange(21, 28)[:, None]
    together = score(model, rows, columns)[0]
    monkeypatch.setattr("megakexue.bundle.needle.BATCH_TOKENS", 70)  # two rows at a time, and one
    assert score(model, rows, columns)[0] == pytest.approx(together, abs=1e-5)


def test_only_the_logits_of_scored_tokens_exist() -> None:
    """Neither all positions of a row, nor more than a chunk of scored tokens."""
    model = build(tiny())
    n_logits: list[int] = []
    model.head.register_forward_hook(lambda _module, _inputs, logits: n_logits.append(logits.shape[0]))
    rows = np.random.default_rng(0).integers(0, 97, (16, 71))
    score(model, rows, np.arange(67, 71)[None].repeat(16, 0))
    assert n_logits == [16 * 4]
    n_logits.clear()
    score(model, rows, np.arange(1, 71)[None].repeat(16, 0))
    assert max(n_logits) == CHUNK and sum(n_logits) == 16 * 70


def test_numbers_that_are_not_finite_are_refused() -> None:
    model = build(tiny())
    with torch.no_grad():
        model.head.weight.fill_(math.nan)
    with pytest.raises(UserError, match="logits are not finite: evaluate with --dtype fp32"):
        score(model, np.zeros((1, 9), dtype=np.int64), np.array([[8]]))
