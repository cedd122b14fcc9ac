"""Token ids of others: equal to the source's, document by document; what does not fit is refused."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megakexue.config import UserError
from megakexue.text import token_files as module
from megakexue.text.prepare import prepare
from megakexue.text.tokenizer import SentencePiece
from megakexue.text.tokenizer_files import load_tokenizer
from tests.conftest import Prepared
from tests.foreign import byte_level
from tests.text.helpers import BOS, EOS, arguments, documents_in, rows_of, stdlib_texts, stream_of

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}


def write_megatron(prefix: Path, documents: list[list[list[int]]], dtype: str = "uint16") -> Path:
    """Write NAME.bin and NAME.idx by the layout of Megatron's IndexedDataset: documents of sequences of ids."""
    sequences = [np.array(ids, dtype) for document in documents for ids in document]
    lengths = np.array([len(ids) for ids in sequences], np.int32)
    pointers = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)]) * np.dtype(dtype).itemsize
    borders = np.cumsum([0, *(len(document) for document in documents)])
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, CODES[dtype], len(sequences), len(borders))
    index = [lengths.tobytes(), pointers.astype(np.int64).tobytes(), borders.astype(np.int64).tobytes()]
    prefix.with_suffix(".idx").write_bytes(head + b"".join(index))
    prefix.with_suffix(".bin").write_bytes(b"".join(ids.tobytes() for ids in sequences))
    return prefix.with_suffix(".bin")


def ids_of(out: Path, split: str = "train") -> list[list[int]]:
    """The documents of prepared rows as ids, without BOS and EOS. Also where these are one mark."""
    manifest = json.loads((out / "manifest.json").read_text())
    bos, eos, pad = (manifest[key] for key in ("bos_id", "eos_id", "pad_id"))
    rows = rows_of(out / split)
    if pad != eos:
        stream = stream_of(rows, pad)
    else:
        stream = np.concatenate([rows[0], *rows[1:, 1:]]).tolist()
    documents: list[list[int]] = []
    inside = False
    for token in stream:
        if not inside and token == bos:
            documents.append([])
            inside = True
        elif token == eos:
            inside = False
        else:
            assert inside
            documents[-1].append(token)
    return [document for document in documents if document]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "int64"])
def test_ids_of_every_type(dtype: str, prepared: Prepared, tmp_path: Path) -> None:
    documents = [[[4, 5], [100]], [[6]], [[7, 8, EOS]]]
    file = module.find_ids(str(write_megatron(tmp_path / "a", documents, dtype)), None, "uint16")
    assert file is not None and [span for span, _ in module.spans_of(file)] == [(0, 3)]
    ids, texts, faults = module.read_ids(file, (0, 3), load_tokenizer(prepared.tokenizer))
    assert [i.tolist() for i in ids] == [[4, 5, 100], [6], [7, 8]] and not faults and len(texts) == 3


def test_megatron_documents_keep_their_ids(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_IDS", 300)  # many blocks
    tokenizer, folder, out = SentencePiece(model), tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = [[tokenizer.encode(line) for line in text.splitlines(keepends=True)[:40]] for text in stdlib_texts(12)]
    strange = [[int(i) for i in rng.integers(4, 700, 500)]]  # ids that no text gives stay as they are
    sources = [*lines, strange, *([[5, 6, i]] for i in range(100, 200))]
    documents = [[*sequences[:-1], [*sequences[-1], EOS]] for sequences in sources]  # as --append-eod
    documents.insert(3, [[BOS, EOS]])  # empty
    documents.insert(5, [[7, EOS, 8]])  # an end in the midst
    documents.insert(9, documents[0])  # a duplicate
    path = write_megatron(folder / "my_text_document", documents)
    manifests = [prepare([str(folder)], model, tmp_path / f"out{n}", arguments(), processes=n) for n in (1, 2)]
    assert manifests[0] == manifests[1]
    assert ids_of(tmp_path / "out1") == [[i for ids in sequences for i in ids] for sequences in sources]
    assert manifests[0]["sources"][str(folder)] == {
        "documents": len(sources), "bytes": manifests[0]["splits"]["train"]["bytes"], "duplicates": 1,
        "skipped": {"beside_data": 1, "empty": 1, "marked": 1}, "tokens": manifests[0]["splits"]["train"]["tokens"],
    }  # fmt: skip
    assert (tmp_path / "out1/skipped.tsv").read_text().splitlines() == [
        f"empty\t{path}:4", f"marked\t{path}:6", f"beside_data\t{folder}/my_text_document.idx",
    ]  # fmt: skip
    # a text and its ids are one document: in the same split, and once
    texts = tmp_path / "texts"
    texts.mkdir()
    for i, sequences in enumerate(lines):
        (texts / f"{i:02}").write_bytes(tokenizer.decode_bytes(id for ids in sequences for id in ids))
    both = prepare([str(texts), str(folder)], model, out, arguments(valid_fraction=0.3), processes=1)
    assert both["sources"][str(folder)]["duplicates"] == 1 + len(lines)
    alone = prepare([str(texts)], model, tmp_path / "alone", arguments(valid_fraction=0.3), processes=1)
    assert both["sources"][str(texts)] == alone["sources"][str(texts)]
    prepare([str(folder)], model, tmp_path / "ids", arguments(valid_fraction=0.3), processes=1)
    valid = documents_in(tmp_path / "alone", "valid")
    assert valid and set(valid) <= {tokenizer.decode(ids) for ids in ids_of(tmp_path / "ids", "valid")}


@pytest.mark.parametrize("kind", ["nanoGPT", "llm.c"])
def test_flat_files_are_cut_at_the_id_that_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_IDS", 100)
    texts = list(dict.fromkeys(stdlib_texts(6)))
    path = byte_level(tmp_path / "gpt2", "one mark", texts)  # one id for BOS, EOS and PAD
    tokenizer = load_tokenizer(path)
    end = tokenizer.eos_id
    documents = [tokenizer.encode(text) for text in texts] + [[i] for i in range(60, 70)]
    if kind == "nanoGPT":  # the end behind each document
        ids, head = [i for document in documents for i in (*document, end)], b""
    else:  # the mark before each document, and a head
        ids = [i for document in documents for i in (end, *document)]
        head = np.array([20240520, 1, len(ids), *[0] * 253], "<i4").tobytes()
    (tmp_path / "train.bin").write_bytes(head + np.array(ids, "<u2").tobytes())
    source, out = str(tmp_path / "train.bin"), tmp_path / "out"
    manifest = prepare([source], path, out, arguments(end_id=end), processes=2)
    assert ids_of(out) == documents and manifest["skipped"] == {}
    assert manifest["end_id"] == end and manifest["round_trip"]["changed"] == 0
    with pytest.raises(UserError, match="NUL byte" if kind == "nanoGPT" else "name the one that stands .* by --end-id"):
        prepare([source], path, out, arguments(), processes=1, overwrite=True)
    with pytest.raises(
        UserError, match=r"train\.bin has [\d,]+ bytes, and not the [\d,]+ of [\d,]+ ids of type uint16"
    ):
        (tmp_path / "train.bin").write_bytes((tmp_path / "train.bin").read_bytes()[:-1])
        prepare([source], path, out, arguments(end_id=end), processes=1, overwrite=True)
    assert ids_of(out) == documents


def test_a_wrong_end_id_loses_nothing_in_silence(prepared: Prepared, tmp_path: Path) -> None:
    ids = [i for n in range(300) for i in (10 + n % 7, 20, 30 + n, EOS)]
    (tmp_path / "a.bin").write_bytes(np.array(ids, "<u2").tobytes())
    with pytest.raises(UserError, match=r"no training document .*; skipped: 1 token ids with BOS, EOS or PAD"):
        prepare([f"{tmp_path}/a.bin"], prepared.tokenizer, tmp_path / "out", arguments(end_id=9), processes=1)


def test_what_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    def refused(message: str, path: Path, **given: Any) -> None:
        with pytest.raises(UserError, match=message):
            prepare([str(path)], prepared.tokenizer, tmp_path / "out", arguments(**given), processes=1)
        assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()

    good = write_megatron(tmp_path / "good", [[[4, 5]], [[6], [7, 8]]])
    refused("good.bin has token ids, which --sample-alpha cannot segment anew", good, sample_alpha=0.2)
    too_high = write_megatron(tmp_path / "high", [[[4, 512]]])
    refused(r"high\.bin has the id 512, and .*tokenizer\.model has the ids 0 to 511: name the tokenizer that", too_high)
    refused(r"low\.bin has the id -3, and", write_megatron(tmp_path / "low", [[[4, -3]]], "int32"))
    index = good.with_suffix(".idx")
    whole = index.read_bytes()
    for data, message in (
        (whole[:-1], r"good\.idx does not hold the 3 sequences that it names"),
        (whole[:20], r"good\.idx is no index of version 1"),
        (whole[:17] + b"\7" + whole[18:], r"good\.idx names no ids \(type 7\)"),
        (whole[:-8] + struct.pack("<q", 2), r"good\.idx: its documents are not all of its 3 sequences"),
        (whole[:34] + struct.pack("<i", 5) + whole[38:], r"good\.bin has 10 bytes, and the 8 ids that its \.idx names"),
        (whole[:34] + struct.pack("<3i", 3, 0, 2) + whole[46:], r"good\.idx: documents 1 to 2 do not lie one behind"),
        (
            whole[:34] + struct.pack("<3i", 8, -5, 2) + whole[46:],
            r"good\.idx: a sequence or a document ends before it b",
        ),
        (
            whole[:-16] + struct.pack("<q", -10) + whole[-8:],
            r"good\.idx: a sequence or a document ends before it begins",
        ),
    ):
        index.write_bytes(data)
        refused(message, good)
    index.write_bytes(whole)
    (tmp_path / "c.bin").write_bytes(struct.pack("<3i", 20240520, 1, -10).ljust(1004, b"\0"))
    refused(r"c\.bin names -10 ids in its head: copy it again", tmp_path / "c.bin", end_id=2)
    good.unlink()
    refused(r"good\.idx: there is no .*good\.bin, which has its ids: copy both", index)


def test_long_documents_are_skipped(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 100)
    monkeypatch.setattr(module, "BLOCK_IDS", 16)
    tokenizer = load_tokenizer(prepared.tokenizer)
    path = tmp_path / "a.bin"
    path.write_bytes(np.array([7, 8, EOS, *[9] * 200, EOS, EOS, 10, EOS, 11], "<u2").tobytes())
    file = module.find_ids(str(path), EOS, "uint16")
    assert file is not None
    spans = list(module.spans_of(file))
    assert [n for _, n in spans] == [408, 8] and spans[-1][0][1] == 208
    read = [module.read_ids(file, span, tokenizer) for span, _ in spans]
    assert [[ids.tolist() for ids in documents] for documents, _, _ in read] == [[[7, 8]], [[10], [11]]]
    assert [faults for _, _, faults in read] == [[("too_large", 1)], []]
