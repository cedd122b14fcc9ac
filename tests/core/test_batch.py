"""A batch: targets, positions and boundaries against a plain reference."""

import numpy as np
import pytest
import torch

from megakexue.config import IGNORED
from megakexue.core.batch import make_batch
from tests.sources import BOS, EOS, PAD, Ints, T, random_rows


def reference(row: Ints) -> tuple[list[int], list[int], list[int]]:
    """Targets, positions and document starts of one row, token by token."""
    targets: list[int] = []
    positions: list[int] = []
    starts: list[int] = []
    for k in range(len(row) - 1):
        restart = bool(k == 0 or row[k] == BOS or (row[k] == PAD and row[k - 1] != PAD))
        starts += [k] * restart
        positions.append(0 if restart else positions[-1] + 1)
        targets.append(IGNORED if row[k + 1] in (BOS, PAD) else int(row[k + 1]))
    return targets, positions, starts


def test_targets_positions_and_boundaries_match_a_plain_reference() -> None:
    rows = random_rows(300, np.random.default_rng(3))
    rows[0] = PAD
    rows[1, :] = [BOS, EOS] * 8 + [BOS]
    batch = make_batch(rows, [], bos_id=BOS, pad_id=PAD)
    expected = [reference(row) for row in rows]
    assert batch.tokens.tolist() == rows[:, :-1].tolist()
    assert batch.targets.tolist() == [targets for targets, _, _ in expected]
    assert batch.positions.tolist() == [positions for _, positions, _ in expected]
    starts = [i * T + k for i, (_, _, starts) in enumerate(expected) for k in starts]
    assert batch.cu_seqlens.tolist() == [*starts, len(rows) * T]
    assert batch.n_targets == sum(target != IGNORED for targets, _, _ in expected for target in targets)
    assert len(starts) > 2 * len(rows)  # the rows did hold many documents
    assert {batch.tokens.dtype, batch.targets.dtype, batch.positions.dtype} == {torch.int64}
    assert batch.cu_seqlens.dtype == torch.int32 and batch.tokens.is_contiguous()


def test_what_is_predicted() -> None:
    row = np.array([[7, EOS, BOS, 8, 9, EOS, PAD, PAD]])
    batch = make_batch(row, [], bos_id=BOS, pad_id=PAD)
    assert batch.targets.tolist() == [[EOS, IGNORED, 8, 9, EOS, IGNORED, IGNORED]]
    assert batch.positions.tolist() == [[0, 1, 0, 1, 2, 3, 0]]
    assert batch.cu_seqlens.tolist() == [0, 2, 6, 7]


@pytest.mark.parametrize("bos", [BOS, EOS])
@pytest.mark.parametrize("pad", [PAD, EOS])
def test_marks_that_are_one_id_mean_what_they_mean_apart(bos: int, pad: int) -> None:
    """Rows cut anywhere, with three marks and with fewer: what is learned is the same."""
    rng, stream = np.random.default_rng(3), list[int]()
    while len(stream) < 300 * (T + 1):
        stream += [BOS, *rng.integers(4, 20, rng.integers(1, 13)), EOS]
    apart = np.array(stream[: 300 * (T + 1)]).reshape(300, T + 1)
    apart[0] = PAD
    for row in apart[1:100]:  # some end early
        if len(ends := np.flatnonzero(row == EOS)):
            row[rng.choice(ends) + 1 :] = PAD
    one = np.where(apart == BOS, bos, np.where(apart == PAD, pad, apart))
    expected = make_batch(apart, [], bos_id=BOS, pad_id=PAD, eos_id=EOS)
    found = make_batch(one, [], bos_id=bos, pad_id=pad, eos_id=EOS)
    learned = expected.targets != IGNORED
    assert torch.equal(found.targets, expected.targets) and (found.targets[learned] == EOS).sum() > 100
    assert torch.equal(found.positions[learned], expected.positions[learned])
    assert found.n_targets == expected.n_targets


def test_only_rows_of_one_document_each_need_no_boundaries() -> None:
    def boundaries(*rows: list[int]) -> list[int] | None:
        found = make_batch(np.array(rows), [], bos_id=BOS, pad_id=PAD).boundaries
        return None if found is None else found.tolist()

    whole, cut, last = [BOS, 7, 8, 9, EOS], [7, 8, 9, 10, 11], [7, 8, EOS, PAD, PAD]
    assert boundaries(whole) is None and boundaries(whole, cut) is None
    assert boundaries(whole, [7, EOS, BOS, 8, 9]) == [0, 4, 6, 8]
    assert boundaries(last, cut) == [0, 3, 4, 8]  # padding is one more document
