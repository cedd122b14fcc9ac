"""The set of digests is a set, and the split of a document depends on the document alone."""

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megakexue.text.duplicates import DigestSet, digests_of, in_valid
from megakexue.text.prepare import prepare
from tests.text.helpers import arguments, documents_in, write_lines


@given(st.lists(st.lists(st.integers(0, 40) | st.integers(0, 2**64 - 1), max_size=50), max_size=12))
def test_digest_set_agrees_with_a_set(batches: list[list[int]]) -> None:
    ours = DigestSet()
    reference: set[int] = set()
    ours.slots = np.zeros(4, np.uint64)
    for batch in batches:
        new = []
        for key in batch:
            key = max(key, 1)  # 0 marks a free slot and counts as 1
            new.append(key not in reference)
            reference.add(key)
        assert ours.add(np.array(batch, np.uint64)).tolist() == new
    assert ours.n == len(reference)


def test_digest_set_memory() -> None:
    digests, ours = np.random.default_rng(0).integers(0, 2**64, 300_000, dtype=np.uint64), DigestSet()
    for start in range(0, len(digests), 1000):
        assert ours.add(digests[start : start + 1000]).all()
    assert 16 * len(digests) <= ours.slots.nbytes <= 32 * len(digests)
    assert not ours.add(digests).any()


def test_the_split_depends_on_the_document_alone(model: Path, tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(400)]
    write_lines(tmp_path / "a.jsonl", texts)
    write_lines(tmp_path / "b.jsonl.gz", [*texts[:99:-1], "another"])
    for text in texts[:100]:
        (tmp_path / f"{text}.md").write_text(text)
    args = arguments(valid_fraction=0.2, seq_len=8)
    prepare([str(tmp_path / "a.jsonl")], model, tmp_path / "out1", args, processes=1)
    prepare([str(tmp_path / "b.jsonl.gz"), str(tmp_path / "*.md")], model, tmp_path / "out2", args, processes=3)
    valid = documents_in(tmp_path / "out1", "valid")
    assert 50 < len(valid) < 110
    assert set(documents_in(tmp_path / "out2", "valid")) - {"another"} == set(valid)
    assert set(documents_in(tmp_path / "out1")) == set(texts) - set(valid)
    digests = digests_of([text.encode() for text in texts])
    assert (in_valid(digests, 0.2) >= in_valid(digests, 0.1)).all()
    assert not in_valid(digests, 0.0).any()
