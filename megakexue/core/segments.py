"""Segments: which elements of which parameter a flat tensor holds.

Under ZeRO an optimizer does not see parameters: stages 1 to 3 give each rank flat fp32 slices that cut through them.
So the optimizer, the checkpoints and the bundles work with segments. Without ZeRO each parameter is one segment.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Elements start:stop of a flattened parameter, at offset:offset+(stop-start) of flat tensor number `flat`."""

    name: str
    role: str
    shape: tuple[int, ...]
    start: int
    stop: int
    flat: int
    offset: int

    @classmethod
    def whole(cls, name: str, role: str, shape: tuple[int, ...]) -> "Segment":
        """Return the segment that is all of a parameter, in a flat tensor of its own."""
        return cls(name=name, role=role, shape=shape, start=0, stop=math.prod(shape), flat=0, offset=0)

    @property
    def numel(self) -> int:
        return self.stop - self.start

    @property
    def cut_row(self) -> int | None:
        """The embedding row of which this is a piece; None for whole rows. To ask of what `split_at_rows` returns."""
        if self.role != "embedding" or (self.start % self.shape[-1] == self.stop % self.shape[-1] == 0):
            return None
        return self.start // self.shape[-1]

    @property
    def row_numel(self) -> int:
        """Elements of each row of an embedding, else of this piece of one or of this tensor. To ask as `cut_row`."""
        return self.shape[-1] if self.role == "embedding" and self.cut_row is None else self.numel

    def of(self, flat: Tensor) -> Tensor:
        """The view of this segment in its flat tensor."""
        return flat.detach().view(-1)[self.offset : self.offset + self.numel]

    def split(self, n: int) -> "list[Segment]":
        """Return its parts of `n` elements; the last one has what is left."""
        return self._cut([*range(self.start, self.stop, n), self.stop])

    def split_at_rows(self) -> "list[Segment]":
        """Cut an embedding into a piece of a row, whole rows and a piece of a row, where it has them; no other role."""
        if self.role != "embedding":
            return [self]
        width = self.shape[-1]
        first = min(-(-self.start // width) * width, self.stop)  # the first row that begins here
        last = max(self.stop // width * width, first)  # the end of the last row that ends here
        return self._cut([self.start, first, last, self.stop])

    def _cut(self, places: list[int]) -> "list[Segment]":
        return [
            replace(self, start=start, stop=stop, offset=self.offset + start - self.start)
            for start, stop in pairwise(places)
            if start < stop
        ]


def parts_with_padding(segments: list[Segment]) -> list[Segment]:
    """Return the parts, as by `split_at_rows`, of segments of one flat tensor in its order.

    What lies between them in the flat tensor is a part too, of a parameter without a name in the role `padding`.
    """
    parts: list[Segment] = []
    end = segments[0].offset
    for segment in segments:
        if n := segment.offset - end:
            between = Segment.whole("", "padding", (n,))
            parts.append(replace(between, flat=segment.flat, offset=end))
        parts += segment.split_at_rows()
        end = segment.offset + segment.numel
    return parts


def cut_rows(segments: list[Segment]) -> list[tuple[str, int]]:
    """Return (parameter, row) of the embedding rows of which these segments hold a piece only."""
    parts = [part for segment in segments for part in segment.split_at_rows()]
    return [(part.name, part.cut_row) for part in parts if part.cut_row is not None]
