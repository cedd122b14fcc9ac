"""Segments view, cover and cut the elements that they name."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megakexue.core.segments import Segment, cut_rows, parts_with_padding


def test_segment_views_its_elements() -> None:
    segment = Segment(name="w", role="matrix", shape=(4, 5), start=3, stop=9, flat=0, offset=2)
    flat = torch.arange(20.0)
    segment.of(flat).zero_()
    assert segment.numel == 6 and flat.count_nonzero() == 13 and (flat[2:8] == 0).all()


def test_a_whole_segment_is_all_of_a_tensor() -> None:
    segment = Segment.whole("w", "matrix", (4, 5))
    assert segment == Segment(name="w", role="matrix", shape=(4, 5), start=0, stop=20, flat=0, offset=0)
    weight = torch.arange(20.0).view(4, 5)
    assert torch.equal(segment.of(weight), torch.arange(20.0))


def test_a_split_covers_a_segment() -> None:
    segment = Segment(name="w", role="matrix", shape=(4, 5), start=3, stop=14, flat=0, offset=2)
    flat = torch.arange(1.0, 15.0)  # element i of w is at i - 1
    found = segment.split(4)
    assert [(part.start, part.stop) for part in found] == [(3, 7), (7, 11), (11, 14)]
    assert [part.of(flat).tolist() for part in found] == [[3, 4, 5, 6], [7, 8, 9, 10], [11, 12, 13]]


def test_only_an_embedding_is_split_at_rows() -> None:
    segment = Segment(name="w", role="matrix", shape=(4, 5), start=3, stop=14, flat=0, offset=2)
    assert segment.split_at_rows() == [segment] and segment.cut_row is None and cut_rows([segment]) == []


@given(st.integers(1, 5), st.integers(1, 4), st.data())
@settings(deadline=None)
def test_an_embedding_splits_into_whole_rows_and_pieces_of_rows(height: int, width: int, data: Any) -> None:
    start = data.draw(st.integers(0, height * width - 1))
    stop = data.draw(st.integers(start + 1, height * width))
    segment = Segment(name="e", role="embedding", shape=(height, width), start=start, stop=stop, flat=0, offset=0)
    elements = torch.arange(start, stop)
    found = segment.split_at_rows()
    assert torch.equal(torch.cat([part.of(elements) for part in found]), elements)
    for part in found:
        rows = part.of(elements) // width
        if part.cut_row is None:
            assert part.start % width == 0 and part.numel % width == 0
        else:
            assert part.numel < width and (rows == part.cut_row).all()
    cut = [
        row
        for row in range(height)
        if 0 < len(set(range(row * width, (row + 1) * width)) & set(range(start, stop))) < width
    ]
    assert cut_rows([segment]) == [("e", row) for row in cut]


def test_parts_with_padding_follow_one_another() -> None:
    embedding = Segment(name="e", role="embedding", shape=(4, 5), start=3, stop=17, flat=1, offset=2)
    matrix = Segment(name="w", role="matrix", shape=(2, 3), start=0, stop=4, flat=1, offset=20)
    found = parts_with_padding([embedding, matrix])
    assert [(part.role, part.offset, part.numel, part.row_numel) for part in found] == [
        ("embedding", 2, 2, 2), ("embedding", 4, 10, 5), ("embedding", 14, 2, 2), ("padding", 16, 4, 4),
        ("matrix", 20, 4, 4),
    ]  # fmt: skip
    assert all(part.flat == 1 for part in found)
