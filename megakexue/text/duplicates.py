"""Decide by a digest of its bytes whether a document is a duplicate, and whether it is validation."""

import numpy as np
import xxhash


def digests_of(documents: list[bytes]) -> np.ndarray:
    """Return the xxh3 digest of each document, uint64 of shape (documents,).

    The probability that any two of n different documents share a digest is n^2 / 2^65: 3 % for a billion documents.
    """
    return np.array([xxhash.xxh3_64_intdigest(text) for text in documents], np.uint64)


def in_valid(digests: np.ndarray, valid_fraction: float) -> np.ndarray:
    """Return which documents are validation, bool. A larger fraction keeps those of a smaller one and adds others."""
    return digests < np.uint64(int(valid_fraction * 2**64))


class DigestSet:
    """A set of uint64 in one array (open addressing, linear probing), which takes 16 to 32 bytes for each member."""

    def __init__(self) -> None:
        self.slots = np.zeros(1 << 12, np.uint64)  # 0: free
        self.n = 0

    def add(self, digests: np.ndarray) -> np.ndarray:
        """Add all, and return which of them were new, bool. Of several equal ones only the first is new."""
        keys, first = np.unique(np.maximum(digests, np.uint64(1)), return_index=True)
        if 2 * (self.n + len(keys)) > len(self.slots):
            members = self.slots[self.slots > 0]
            self.slots = np.zeros(1 << (2 * (self.n + len(keys))).bit_length(), np.uint64)
            self._insert(members)
        new = np.zeros(len(digests), bool)
        inserted = self._insert(keys)
        new[first[inserted]] = True
        self.n += int(inserted.sum())
        return new

    def _insert(self, keys: np.ndarray) -> np.ndarray:
        last = len(self.slots) - 1
        place = (keys & np.uint64(last)).astype(np.int64)
        new = np.zeros(len(keys), bool)
        todo = np.arange(len(keys))
        while len(todo):
            free = todo[self.slots[place[todo]] == 0]
            self.slots[place[free]] = keys[free]  # of several that want one slot, one gets it
            new[free] = self.slots[place[free]] == keys[free]
            todo = todo[self.slots[place[todo]] != keys[todo]]
            place[todo] = (place[todo] + 1) & last
        return new
