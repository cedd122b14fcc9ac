import fcntl
import gzip
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megakexue import prepare as module
from megakexue.config import IGNORED, UserError, sha256
from megakexue.data import make_batch
from megakexue.prepare import (
    BestFit,
    Concat,
    DigestSet,
    Job,
    PrepareArguments,
    ShardWriter,
    Workers,
    digests_of,
    in_valid,
    prepare,
)
from megakexue.tokenizer import Tokenizer, train_tokenizer

TOOL = Path(__file__).parent.parent / "tools" / "prepare_data.py"
STDLIB = Path(sysconfig.get_paths()["stdlib"])
TEXTS = [
    "春眠不觉晓，处处闻啼鸟。\n夜来风雨声，花落知多少。",
    "emoji 🐅🚀 and a family 👨‍👩‍👧‍👦",
    "def f(x):\r\n\treturn x  # CRLF, tab\r\n",
    "<s> is three characters here, </s> too, ▁ and <pad> as well\n",
    "no newline at the end",
    "\n\n  leading and trailing space  \n\n",
]


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return TEXTS + [path.read_text() for path in sorted((STDLIB / "json").glob("*.py"))]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, corpus: list[str]) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for kind in ("unigram", "bpe"):
        train_tokenizer(corpus, folder / kind, vocab_size=700, kind=kind)
    return {kind: folder / kind for kind in ("unigram", "bpe")}


@pytest.fixture
def model(models: dict[str, Path]) -> Path:
    return models["unigram"]


def rows_of(folder: Path) -> np.ndarray:
    """All rows of a split, read by streaming's own reader, each shard compared with its hash."""
    from streaming.base.format.mds.reader import MDSReader
    from streaming.base.hashing import get_hash

    rows = []
    for shard in json.loads((folder / "index.json").read_text())["shards"]:
        data = (folder / shard["raw_data"]["basename"]).read_bytes()
        assert get_hash("xxh64", data) == shard["raw_data"]["hashes"]["xxh64"]
        assert len(data) == shard["raw_data"]["bytes"]
        reader = MDSReader.from_json(str(folder.parent), folder.name, shard)
        rows += [reader[i]["tokens"] for i in range(shard["samples"])]
    return np.array(rows)


def stream_of(rows: np.ndarray, pad_id: int) -> list[int]:
    """Undo concat: join rows at the token that they share, and drop the padding of the last."""
    np.testing.assert_array_equal(rows[1:, 0], rows[:-1, -1])
    assert not (rows[:-1] == pad_id).any()
    stream = np.concatenate([rows[0], *rows[1:, 1:]])
    n = int((stream != pad_id).sum())
    assert not (stream[:n] == pad_id).any()
    return stream[:n].tolist()


def split_documents(stream: list[int], tokenizer: Tokenizer) -> list[str]:
    documents = []
    for token in stream:
        if token == tokenizer.bos_id:
            documents.append([])
        documents[-1].append(token)
    assert all(document[-1] == tokenizer.eos_id for document in documents)
    return [tokenizer.decode_bytes(document).decode() for document in documents]


def documents_in(out: Path, split: str = "train") -> list[str]:
    tokenizer = Tokenizer(out / "tokenizer.model")
    rows = rows_of(out / split)
    return split_documents(stream_of(rows, tokenizer.pad_id), tokenizer) if len(rows) else []


def write_lines(path: Path, texts: list[str], key: str = "text") -> None:
    lines = "".join(json.dumps({key: text, "other": 1}) + "\n" for text in texts).encode()
    match path.suffix:
        case ".gz":
            path.write_bytes(gzip.compress(lines))
        case ".zst":
            path.write_bytes(pytest.importorskip("zstandard").compress(lines))
        case _:
            path.write_bytes(lines)


def arguments(**given) -> PrepareArguments:
    return PrepareArguments(**{"seq_len": 32, "valid_fraction": 0.0, **given})


# -------------------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("name", ["a.jsonl", "a.NDJSON", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("block_bytes", [1 << 20, 1000])
def test_lines_come_back_in_order(name, block_bytes, model, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", block_bytes)
    write_lines(tmp_path / name, corpus, key="content")
    out = tmp_path / "out"
    manifest = prepare([str(tmp_path / name)], model, out, arguments(text_key="content"), processes=2)
    assert documents_in(out) == corpus
    assert manifest["skipped"] == {}
    assert not (out / "spool").exists()


@pytest.mark.parametrize("large", [False, True])
def test_parquet_comes_back_in_order(large, model, corpus, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    texts = pyarrow.array([*corpus, None] * 40, pyarrow.large_string() if large else pyarrow.string())
    numbered = pyarrow.array([None if t is None else f"{i} {t}" for i, t in enumerate(texts.to_pylist())], texts.type)
    table = pyarrow.table({"id": list(range(len(texts))), "body": numbered})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    manifest = prepare([str(tmp_path)], model, tmp_path / "out", arguments(text_key="body"), processes=2)
    assert documents_in(tmp_path / "out") == [text for text in numbered.to_pylist() if text is not None]
    n = len(corpus) + 1
    paths = [f"{tmp_path}/a.parquet:{n * (i + 1)}" for i in range(40)]
    assert manifest["skipped"] == {"no_text": {"count": 40, "paths": paths}}


def test_text_files_in_folders_and_globs_come_back_in_order(model, corpus, tmp_path):
    folder = tmp_path / "in"
    (folder / "b" / "deep").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden, not read")
    (folder / ".hidden").write_text("hidden, not read")
    (folder / "z.txt.gz").write_bytes(gzip.compress(TEXTS[0].encode()))
    (folder / "a.md").write_bytes(TEXTS[1].encode())
    (folder / "b" / "c.py").write_bytes(TEXTS[2].encode())
    (folder / "b" / "deep" / "Makefile").write_bytes(TEXTS[3].encode())
    (tmp_path / "2.txt").write_bytes(TEXTS[4].encode())
    (tmp_path / "1.txt").write_bytes(TEXTS[5].encode())
    inputs = [str(tmp_path / "*.txt"), str(folder)]
    manifest = prepare(inputs, model, tmp_path / "out", arguments(), processes=1)
    assert documents_in(tmp_path / "out") == [TEXTS[i] for i in (5, 4, 1, 0, 2, 3)]
    sources = manifest["sources"]
    assert list(sources) == inputs
    assert [source["documents"] for source in sources.values()] == [2, 4]
    tokenizer = Tokenizer(model)
    for source, indices in zip(sources.values(), [(5, 4), (0, 1, 2, 3)]):
        assert source["bytes"] == sum(len(TEXTS[i].encode()) for i in indices)
        assert source["tokens"] == sum(len(tokenizer.encode(TEXTS[i])) + 2 for i in indices)


def test_zstandard_text_file(model, tmp_path):
    zstandard = pytest.importorskip("zstandard")
    frames = [zstandard.compress(part.encode()) for part in ("two frames ", "in one file")]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(frames))
    prepare([str(tmp_path / "a.txt.zst")], model, tmp_path / "out", arguments(seq_len=4), processes=1)
    assert documents_in(tmp_path / "out") == ["two frames in one file"]


def test_what_is_skipped_is_counted_and_listed(model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 200)  # line numbers go on from block to block
    monkeypatch.setattr(module, "MAX_LISTED", 3)
    folder = tmp_path / "in"
    folder.mkdir()
    lines = []
    for i in range(30):
        lines += [json.dumps({"text": f"good {i}"}).encode()]
        lines += [b'{"text": "cut', b'{"body": "x"}', b"[1]", b'{"text": 3}', b'{"text": " \\n"}', b""]
        lines += [b'{"text": "a\\u0000b"}', b'{"text": "\\ud800"}', b'{"text": "\xff"}', b"[" * 20000]
    (folder / "lines.jsonl").write_bytes(b"\n".join(lines))
    (folder / "m.jsonl").write_bytes(b'{"text": "line 1"}\nline 2')
    (folder / "binary").write_bytes(b"PNG\0\0")
    (folder / "latin1.txt").write_bytes("café".encode("latin-1"))
    (folder / "empty.txt").write_bytes(b"")
    (folder / "space.txt").write_bytes(b" \n\t\n")
    (folder / "damaged.txt.gz").write_bytes(gzip.compress(b"some text" * 100)[:-20])
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.jsonl")
    rng = np.random.default_rng(0)
    texts = [rng.bytes(100).hex() for _ in range(50)]
    write_lines(folder / "torn.jsonl.gz", texts)
    torn = (folder / "torn.jsonl.gz").read_bytes()
    (folder / "torn.jsonl.gz").write_bytes(torn[: len(torn) // 2])
    manifests = [prepare([str(folder)], model, tmp_path / f"out{n}", arguments(), processes=n) for n in (1, 2)]
    assert manifests[0] == manifests[1]
    skipped = manifests[0]["skipped"]
    counts = {reason: entry["count"] for reason, entry in skipped.items()}
    assert counts == {
        "binary": 31,
        "not_utf8": 61,
        "empty": 62,
        "unreadable": 4,
        "bad_json": 61,
        "no_text": 90,
    }
    assert manifests[0]["sources"][str(folder)]["skipped"] == counts
    at = lambda name, *numbers: [f"{folder}/{name}:{number}" for number in numbers]  # noqa: E731
    assert skipped["bad_json"]["paths"] == at("lines.jsonl", 2, 11, 13)
    assert skipped["no_text"]["paths"] == at("lines.jsonl", 3, 4, 5)
    assert skipped["binary"]["paths"] == [f"{folder}/binary", *at("lines.jsonl", 8, 19)]
    assert skipped["not_utf8"]["paths"] == [f"{folder}/latin1.txt", *at("lines.jsonl", 9, 10)]
    assert skipped["unreadable"]["paths"] == [
        f"{folder}/{name}" for name in ("damaged.txt.gz", "gone.txt", "pipe.jsonl")
    ]
    documents = documents_in(tmp_path / "out1")
    assert documents[:31] == [f"good {i}" for i in range(30)] + ["line 1"]
    assert 0 < len(documents[31:]) < 50 and documents[31:] == texts[: len(documents) - 31]


def test_a_packed_file_named_twice_is_read_twice(model, tmp_path):
    write_lines(tmp_path / "a.jsonl.gz", TEXTS)
    inputs = [str(tmp_path / "a.jsonl.gz"), str(tmp_path)]
    manifest = prepare(inputs, model, tmp_path / "out", arguments(), processes=1)
    assert documents_in(tmp_path / "out") == TEXTS
    assert [source["duplicates"] for source in manifest["sources"].values()] == [0, len(TEXTS)]


def test_a_document_that_is_too_large_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 10)
    (tmp_path / "a.txt").write_bytes(b"x" * 11)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"x" * 11))
    (tmp_path / "c.txt").write_bytes(b"x" * 10)
    read = [module.read_file(str(tmp_path / name))[1] for name in ("a.txt", "b.txt.gz", "c.txt")]
    assert read == ["too_large", "too_large", None]
    assert module.read_line(b'{"text": "12345678901"}', "text")[1] == "too_large"


def test_a_giant_line_is_an_error(model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 10)
    monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 100)
    write_lines(tmp_path / "a.jsonl", ["y" * 200])
    write_lines(tmp_path / "a.jsonl.gz", ["y" * 200])
    for name in ("a.jsonl", "a.jsonl.gz"):
        with pytest.raises(UserError, match=rf"{name}: a line is above 0 MiB: shorten it"):
            prepare([str(tmp_path / name)], model, tmp_path / "out", arguments(), processes=1)
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".out*"))


@given(st.text(max_size=60), st.integers(4, 20))
def test_pieces_join_to_the_document(text, size):
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(module, "PIECE_BYTES", size)
        pieces = list(module.pieces_of(text.encode()))
    assert b"".join(pieces) == text.encode()
    assert all(len(piece) <= size and piece.decode() is not None for piece in pieces)


# ------------------------------------------------------------------------------------------------ duplicates and split


@given(st.lists(st.lists(st.integers(0, 40) | st.integers(0, 2**64 - 1), max_size=50), max_size=12))
def test_digest_set_agrees_with_a_set(batches):
    ours, reference = DigestSet(), set()
    ours.slots = np.zeros(4, np.uint64)
    for batch in batches:
        new = []
        for key in batch:
            key = max(key, 1)  # 0 marks a free slot and counts as 1
            new.append(key not in reference)
            reference.add(key)
        assert ours.add(np.array(batch, np.uint64)).tolist() == new
    assert ours.n == len(reference)


def test_digest_set_memory():
    digests, ours = np.random.default_rng(0).integers(0, 2**64, 300_000, dtype=np.uint64), DigestSet()
    for start in range(0, len(digests), 1000):
        assert ours.add(digests[start : start + 1000]).all()
    assert 16 * len(digests) <= ours.slots.nbytes <= 32 * len(digests)
    assert not ours.add(digests).any()


def test_duplicates_are_dropped_and_counted(model, tmp_path):
    write_lines(tmp_path / "a.jsonl", ["one", "two", "one", "three"])
    (tmp_path / "b.txt").write_text("two")
    write_lines(tmp_path / "c.jsonl.gz", ["three", "four", "one "])
    inputs = [str(tmp_path / name) for name in ("a.jsonl", "b.txt", "c.jsonl.gz")]
    with pytest.raises(UserError, match="no training document"):  # a source of nothing but duplicates is none
        prepare([inputs[0]], model, tmp_path / "out", arguments(valid_fraction=1 - 1e-12), processes=1)
    manifest = prepare(inputs, model, tmp_path / "out", arguments(seq_len=4), processes=2)
    assert documents_in(tmp_path / "out") == ["one", "two", "three", "four", "one "]
    assert [manifest["sources"][name]["duplicates"] for name in inputs] == [1, 1, 1]
    assert [manifest["sources"][name]["documents"] for name in inputs] == [3, 0, 2]


def test_the_split_depends_on_the_document_alone(model, tmp_path):
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


# ------------------------------------------------------------------------------------------------------------- packing

BOS, EOS, PAD = 1, 2, 3


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
def test_concat_makes_each_token_a_target_once(lengths, seq_len, batch):
    documents = fake_documents(lengths)
    rows = pack(Concat(seq_len, np.dtype(np.uint32), PAD), documents, batch)
    stream = [token for document in documents for token in document]
    targets = rows[:, 1:].ravel()
    assert targets[targets != PAD].tolist() == stream[1:]
    if len(rows):
        assert stream_of(rows, PAD) == stream


@given(LENGTHS, st.integers(2, 12), st.integers(1, 5), st.integers(1, 200))
@settings(deadline=None)
def test_best_fit_cuts_no_document_that_fits(lengths, seq_len, batch, buffer):
    documents = fake_documents(lengths)
    with pytest.MonkeyPatch().context() as context:
        context.setattr(module, "BUFFER_TOKENS", buffer)
        rows = pack(BestFit(seq_len, np.dtype(np.uint32), BOS, PAD), documents, batch)
    found = Counter()
    for row in rows.tolist():
        content = row[: len(row) - row[::-1].index(next(t for t in row[::-1] if t != PAD))]
        assert PAD not in content
        starts = sorted({0, *(i for i, token in enumerate(content) if token == BOS)})
        for start, stop in zip(starts, [*starts[1:], len(content)]):
            piece = tuple(content[start:stop])
            # What ends before its EOS is cut, and only a row's end cuts.
            assert piece[-1] == EOS or stop == seq_len + 1
            found[piece] += 1
    expected = Counter()
    for document in documents:
        if len(document) <= seq_len + 1:
            expected[tuple(document)] += 1
            continue
        for start in range(0, len(document) - 1, seq_len):
            expected[tuple(document[start : start + seq_len + 1])] += 1
    assert found == expected
    inner = Counter(token for document in documents for token in document if token >= 10)
    assert Counter(token for token in rows[:, 1:].ravel().tolist() if token >= 10) == inner


def test_best_fit_pads_little(model, tmp_path):
    texts = {f"{path}\n{block}" for path in (STDLIB / "email").glob("*.py") for block in path.read_text().split("\n\n")}
    write_lines(tmp_path / "a.jsonl", sorted(texts))
    args = arguments(seq_len=256, packing="best_fit", valid_fraction=0.05)
    manifest = prepare([str(tmp_path / "a.jsonl")], model, tmp_path / "out", args, processes=2)
    assert manifest["padding_share"] < 0.05  # many are longer than a row, and two of their rests cannot share one
    tokenizer, found = Tokenizer(model), Counter()
    for split in ("train", "valid"):
        for row in rows_of(tmp_path / "out" / split).tolist():
            found.update(whole_documents(row, tokenizer))
    fitting = {text for text in texts if len(tokenizer.encode(text)) + 2 <= 257}
    assert len(fitting) > 100
    assert all(found[text] == 1 for text in fitting)


def test_best_fit_of_short_documents_pads_almost_nothing():
    lengths = np.random.default_rng(0).exponential(200, 20_000).astype(int).clip(3, 513)
    packer = BestFit(512, np.dtype(np.uint16), BOS, PAD)
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


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_shards_are_those_of_mds_writer(dtype, tmp_path, monkeypatch):
    from streaming import MDSWriter

    monkeypatch.setattr(module, "SHARD_BYTES", 3000)
    rows = np.arange(100 * 33, dtype=dtype).reshape(100, 33)
    writer = ShardWriter(tmp_path / "ours", 33, np.dtype(dtype))
    for start, stop in ((0, 1), (1, 70), (70, 70), (70, 100)):
        writer.write(rows[start:stop])
    writer.finish()
    columns = {"tokens": f"ndarray:{np.dtype(dtype).name}:33"}
    with MDSWriter(columns=columns, out=str(tmp_path / "theirs"), hashes=["xxh64"], size_limit=3000) as theirs:
        for row in rows:
            theirs.write({"tokens": row})
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert len(names) > 3
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == names
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name


# ----------------------------------------------------------------------------------------------------------- the whole


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_rows_do_not_depend_on_the_number_of_processes(packing, model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 20_000)
    inputs = [str(STDLIB / "json"), str(STDLIB / "email")]
    args = arguments(seq_len=64, packing=packing, valid_fraction=0.1)
    manifests = [prepare(inputs, model, tmp_path / f"out{n}", args, processes=n) for n in (1, 2, 3)]
    assert manifests[0] == manifests[1] == manifests[2]
    for split in ("train", "valid"):
        files = sorted((tmp_path / "out1" / split).iterdir())
        for n in (2, 3):
            assert all((tmp_path / f"out{n}" / split / f.name).read_bytes() == f.read_bytes() for f in files)


def test_copies_are_different_segmentations_of_each_training_document(model, corpus, tmp_path):
    write_lines(tmp_path / "a.jsonl", corpus)
    out, args = tmp_path / "out", arguments(valid_fraction=0.3, sample_alpha=0.2, copies=3)
    manifest = prepare([str(tmp_path / "a.jsonl")], model, out, args, processes=2)
    train, valid = documents_in(out), documents_in(out, "valid")
    n = len(corpus) - len(valid)
    assert valid and sorted(train[:n] + valid) == sorted(corpus)
    assert train == train[:n] * 3  # copies do not follow one another
    assert manifest["splits"]["train"]["documents"] == n
    tokenizer = Tokenizer(model)
    stream = stream_of(rows_of(out / "train"), tokenizer.pad_id)
    starts = [i for i, token in enumerate(stream) if token == tokenizer.bos_id]
    pieces = [tuple(stream[start:stop]) for start, stop in zip(starts, [*starts[1:], len(stream)])]
    long = max(range(n), key=lambda i: len(train[i]))
    assert len({pieces[long], pieces[long + n], pieces[long + 2 * n]}) == 3
    best = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in valid]
    assert stream_of(rows_of(out / "valid"), tokenizer.pad_id) == [token for document in best for token in document]


def test_two_workers_draw_different_segmentations(model, tmp_path):
    (tmp_path / "a.py").write_bytes((STDLIB / "json" / "encoder.py").read_bytes())
    drawn = {}
    with Workers(2, model, arguments(sample_alpha=0.2)) as workers:
        for worker in range(2):
            workers.send(worker, "read", 0, Job(0, [f"{tmp_path}/a.py"], 1))
            workers.send(worker, "keep", 0, np.packbits([True]))
        while len(drawn) < 2:
            worker, _, answer = workers.receive()
            if isinstance(answer, list):
                drawn[worker] = answer[0].tolist()
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_the_manifest_counts_what_the_rows_hold(packing, model, corpus, tmp_path):
    write_lines(tmp_path / "a.jsonl", corpus)
    inputs, out = [str(tmp_path / "a.jsonl"), str(STDLIB / "email")], tmp_path / "out"
    manifest = prepare(inputs, model, out, arguments(packing=packing, valid_fraction=0.2), processes=2)
    assert json.loads((out / "manifest.json").read_text()) == manifest
    tokenizer, padding, places = Tokenizer(model), 0, 0
    assert manifest["tokenizer_sha256"] == sha256(model) == sha256(out / "tokenizer.model")
    expected = {"format": 1, "vocab_size": 700, "bos_id": BOS, "eos_id": EOS, "pad_id": PAD, "seq_len": 32}
    assert {key: manifest[key] for key in expected} == expected
    assert (manifest["packing"], manifest["dtype"]) == (packing, "uint16")
    for name, split in manifest["splits"].items():
        rows = rows_of(out / name)
        assert rows.dtype == np.uint16 and rows.shape == (split["rows"], 33)
        batch = make_batch(rows.astype(np.int64), [], bos_id=tokenizer.bos_id, pad_id=tokenizer.pad_id)
        targets = batch.targets[batch.targets != IGNORED].tolist()
        starts = int((rows == tokenizer.bos_id).sum())
        if packing == "concat":  # a BOS at a row's border stands in two rows
            starts -= int((rows[1:, 0] == tokenizer.bos_id).sum())
        assert split["documents"] == starts
        assert split["targets"] == len(targets) == split["tokens"] - split["documents"]  # all but BOS, each once
        assert split["padding"] == (rows[:, 1:] == tokenizer.pad_id).sum()
        shares = [count / len(targets) for count in Counter(targets).values()]
        assert split["unigram_entropy_nats"] == pytest.approx(-sum(p * math.log(p) for p in shares), rel=1e-12)
        padding, places = padding + split["padding"], places + rows[:, 1:].size
        assert split["index_sha256"] == sha256(out / name / "index.json")
    assert manifest["padding_share"] == pytest.approx(padding / places)
    for key in ("documents", "tokens", "bytes"):
        in_splits = sum(split[key] for split in manifest["splits"].values())
        assert in_splits == sum(source[key] for source in manifest["sources"].values())


def test_a_vocabulary_above_65536_takes_uint32():
    assert module.row_dtype(1 << 16) == np.uint16
    assert module.row_dtype((1 << 16) + 1) == np.uint32


def test_progress_reaches_the_end(model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 2000)
    write_lines(tmp_path / "a.jsonl.gz", [f"{i} {text}" for i in range(50) for text in TEXTS])
    (tmp_path / "b.txt").write_text("b")
    seen = []
    manifest = prepare([str(tmp_path)], model, tmp_path / "out", arguments(), processes=2, on_progress=seen.append)
    assert len(seen) > 10 and seen == sorted(seen)
    total = sum(path.stat().st_size for path in tmp_path.iterdir() if path.is_file())
    assert seen[-1] == (total, total, 301, manifest["splits"]["train"]["tokens"])


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_kill_9_leaves_nothing_to_trust(model, tmp_path):
    texts = [path.read_text() for path in sorted(STDLIB.glob("*.py"))]
    write_lines(tmp_path / "a.jsonl.gz", texts)
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    command = [sys.executable, TOOL, tmp_path / "a.jsonl.gz", "--tokenizer", model, "--out", out, "--seq-len", "64"]
    process = subprocess.Popen([*map(str, command), "--processes", "2"], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (partial / "spool" / "3").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    workers = children(process.pid)
    process.kill()
    process.wait()
    assert partial.is_dir() and not out.exists()
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.01)
    prepare([str(tmp_path / "a.jsonl.gz")], model, out, arguments(seq_len=64), processes=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl.gz", "out"]
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "tokenizer.model", "train", "valid"]
    assert set(documents_in(out)) == set(texts)


def test_interruption_cleans_up(model, tmp_path):
    def interrupt(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([str(STDLIB / "json")], model, tmp_path / "out", arguments(), processes=1, on_progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    assert multiprocessing.active_children() == []


def test_a_killed_worker_stops_the_run(model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 2000)

    def kill(progress):
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    with pytest.raises(UserError, match=r"died with exit code -9.*run again with fewer --processes"):
        prepare([str(STDLIB / "json")], model, tmp_path / "out", arguments(), processes=2, on_progress=kill)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_worker_says_where(model, tmp_path):
    with Workers(1, model, arguments()) as workers:
        workers.send(0, "read", 0, Job(0, [f"{tmp_path}/gone.jsonl"], 1, span=(0, 1)))
        with pytest.raises(RuntimeError, match=r"a worker failed near .*gone.jsonl(.|\n)*FileNotFoundError"):
            workers.receive()


def test_overwrite(model, tmp_path):
    (tmp_path / "a.txt").write_text("first")
    inputs, out = [str(tmp_path / "a.txt")], tmp_path / "out"
    prepare(inputs, model, out, arguments(seq_len=4), processes=1)
    with pytest.raises(UserError, match="out exists: choose another, or add --overwrite"):
        prepare(inputs, model, out, arguments(seq_len=4), processes=1)
    (tmp_path / "a.txt").write_text("second")
    with pytest.raises(UserError, match="no training document"):
        prepare(inputs, model, out, arguments(valid_fraction=1 - 1e-12), processes=1, overwrite=True)
    assert documents_in(out) == ["first"]  # a run that fails leaves the old one
    with pytest.raises(UserError, match="lies inside INPUT"):
        prepare([str(tmp_path)], model, out, arguments(), overwrite=True)
    prepare(inputs, model, out, arguments(seq_len=4), processes=1, overwrite=True)
    assert documents_in(out) == ["second"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out"]
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="was not written by prepare_data: --overwrite will not remove it"):
        prepare(inputs, model, home, arguments(), processes=1, overwrite=True)
    assert (home / "thesis.txt").read_text() == "years of work"


def test_two_runs_for_one_folder(model, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / ".out.partial").mkdir()
    with open(tmp_path / ".out.partial" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="out: another run is writing it"):
            prepare([str(tmp_path / "a.txt")], model, tmp_path / "out", arguments(), processes=1)
    prepare([str(tmp_path / "a.txt")], model, tmp_path / "out", arguments(seq_len=2), processes=1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seq_len": 1}, "--seq-len 1 must be at least 2"),
        ({"valid_fraction": 1.0}, r"--valid-fraction 1.0 must be in \[0, 1\)"),
        ({"copies": 0}, "--copies 0 must be at least 1"),
        ({"sample_alpha": -1.0}, "--sample-alpha -1.0 must be finite and not negative"),
        ({"copies": 2}, "--copies 2 without --sample-alpha would repeat the same rows: add --sample-alpha"),
    ],
)
def test_wrong_arguments(given, message):
    with pytest.raises(UserError, match=message):
        arguments(**given)


def test_wrong_inputs(models, model, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text(" ")
    good, out = str(tmp_path / "a.txt"), tmp_path / "out"

    def fails(message, inputs=(good,), tokenizer=model, processes=1, **given):
        with pytest.raises(UserError, match=message):
            prepare(list(inputs), tokenizer, out, arguments(**given), processes=processes)
        assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".out*"))

    fails("no tokenizer .*none: train one with tools/train_tokenizer.py", tokenizer=tmp_path / "none")
    fails("--sample-alpha 0.2 needs a unigram tokenizer, and .*bpe is BPE", tokenizer=models["bpe"], sample_alpha=0.2)
    fails("--processes 0 must be at least 1", processes=0)
    fails("no INPUT: name files, folders or globs", inputs=[])
    fails("an INPUT is named twice", inputs=[good, good])
    fails(r"\*\.rst: no such file or folder, and no file matches it", inputs=[good, str(tmp_path / "*.rst")])
    fails("empty: there is no file in it", inputs=[str(tmp_path / "empty")])
    fails("no training document in .*; skipped: 1 nothing but white space", inputs=[str(tmp_path / "blank.txt")])
    fails("--seq-len 40000000: a row does not fit a shard of 64 MiB", seq_len=40_000_000)


def test_wrong_parquet(model, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_text("no Parquet")
    (tmp_path / "c.parquet.gz").write_text("packed twice")
    for name, key, message in [
        ("a", "text", r"no column 'text' among \['body', 'n'\]: set --text-key"),
        ("a", "n", "column 'n' holds int64, not strings: set --text-key"),
        ("b", "text", "not a readable Parquet file"),
        ("c", "text", "unpack it first; Parquet is compressed inside"),
    ]:
        path = next(str(path) for path in tmp_path.glob(f"{name}.*"))
        with pytest.raises(UserError, match=message):
            prepare([path], model, tmp_path / "out", arguments(text_key=key), processes=1)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    for name, package in (("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=f"{name}: to read it, pip install {package}"):
            module.check_readable(str(tmp_path / name), "text")


def run_tool(*options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *map(str, options)], capture_output=True, text=True)


def test_the_program(model, tmp_path):
    (tmp_path / "bad.bin").write_bytes(b"\0")
    (tmp_path / "a.md").write_text("text, text and text")
    (tmp_path / "b.md").write_text("text, text and text")
    options = [tmp_path, "--tokenizer", model, "--out", tmp_path / "new" / "out", "--seq-len", 4]
    done = run_tool(*options, "--packing", "best_fit", "--processes", 1)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "train: 1 documents, 19 bytes" in done.stdout
    train, valid, *_ = done.stdout.splitlines()  # the valid split is empty
    assert ", unigram entropy " in train and valid.endswith("0 rows of 4 + 1")
    assert "1 documents kept, 1 duplicates dropped, 1 skipped" in done.stdout
    assert f"skipped, contains a NUL byte: 1, such as {tmp_path}/bad.bin" in done.stdout
    assert "warning: no document fell into the valid split; raise --valid-fraction" in done.stdout
    again = run_tool(*options)
    assert again.returncode == 2 and "exists: choose another, or add --overwrite" in again.stderr
    assert "Traceback" not in again.stderr
    assert run_tool(tmp_path, "--out", "x").returncode == 2
    shown = run_tool("--help")
    assert shown.returncode == 0 and "tools/prepare_data.py notes/" in shown.stdout


def test_preparing_needs_no_torch():
    code = (
        "import sys, megakexue.prepare; sys.exit(any(name in sys.modules for name in ('torch', 'streaming', 'rich')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_speed_and_memory(model, tmp_path, monkeypatch):
    """A guard against a mistake that costs a multiple; tools/benchmark_prepare.py measures what is claimed."""
    monkeypatch.syspath_prepend(TOOL.parent)
    from benchmark_prepare import run_prepare

    texts = [path.read_bytes() for path in sorted(STDLIB.glob("*.py"))]
    for name, some in (("one", texts[:1]), ("all", texts)):
        (tmp_path / name / "files").mkdir(parents=True)
        for i, text in enumerate(some[::2]):
            (tmp_path / name / "files" / f"{i}.py").write_bytes(text)
        write_lines(tmp_path / name / "lines.jsonl", [text.decode() for text in some[1::2]])
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    start = time.process_time()
    for text in texts:
        processor.encode(text, return_type="numpy")
    bare_s, cpu_s, peaks = time.process_time() - start, {}, {}
    for name in ("one", "all"):
        command = [sys.executable, TOOL, tmp_path / name, "--tokenizer", model, "--out", tmp_path / f"{name}_out"]
        options = ["--seq-len", "2048", "--valid-fraction", "0", "--processes", "1"]
        cpu_s[name] = run_prepare([*map(str, command), *options], peaks).cpu_s
    # docs/benchmarks.md has 74 to 80 %, at 100 MB; a single document pays for the start of the processes
    assert bare_s / (cpu_s["all"] - cpu_s["one"]) > 0.25, (bare_s, cpu_s)
    assert len(peaks) >= 4 and max(peaks.values()) < 256 << 20, peaks  # a parent and a worker each
