"""Nothing is lost in silence, the rows do not depend on the processes, and the manifest counts what the rows hold."""

import fcntl
import gzip
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megakexue.config import IGNORED, UserError
from megakexue.core.batch import make_batch
from megakexue.files import sha256
from megakexue.text import inputs as inputs_module
from megakexue.text import prepare as module
from megakexue.text.inputs import Block
from megakexue.text.manifest import read_manifest
from megakexue.text.prepare import Progress, Workers, prepare
from megakexue.text.tokenizer import SentencePiece
from megakexue.text.tokenizer_files import load_tokenizer
from megakexue.text.tokenizer_json import read_spec
from tests.conftest import Popen
from tests.foreign import byte_level
from tests.helpers import ROOT
from tests.text.helpers import BOS, EOS, PAD, STDLIB, TEXTS, arguments, documents_in, rows_of, stream_of, write_lines

TOOL = ROOT / "tools" / "prepare_data.py"


def test_what_is_skipped_is_counted_and_listed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs_module, "BLOCK_BYTES", 200)  # line numbers go on from block to block
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
        "damaged": 2,
        "unreadable": 1,
        "not_a_file": 1,
        "bad_json": 61,
        "no_text": 90,
    }
    assert manifests[0]["sources"][str(folder)]["skipped"] == counts
    at = lambda name, *numbers: [f"{folder}/{name}:{number}" for number in numbers]  # noqa: E731
    assert skipped["bad_json"]["paths"] == at("lines.jsonl", 2, 11, 13, 22, 24)
    assert skipped["no_text"]["paths"] == at("lines.jsonl", 3, 4, 5, 14, 15)
    assert skipped["binary"]["paths"] == [f"{folder}/binary", *at("lines.jsonl", 8, 19, 30, 41)]
    assert skipped["not_utf8"]["paths"] == [f"{folder}/latin1.txt", *at("lines.jsonl", 9, 10, 20, 21)]
    assert skipped["unreadable"]["paths"] == [f"{folder}/gone.txt"]
    assert skipped["not_a_file"]["paths"] == [f"{folder}/pipe.jsonl"]
    n_torn = len(documents_in(tmp_path / "out1")) - 31
    assert skipped["damaged"]["paths"] == [f"{folder}/damaged.txt.gz", *at("torn.jsonl.gz", n_torn + 1)]
    documents = documents_in(tmp_path / "out1")
    assert documents[:31] == [f"good {i}" for i in range(30)] + ["line 1"]
    assert 0 < len(documents[31:]) < 50 and documents[31:] == texts[: len(documents) - 31]


@given(st.text(max_size=60), st.integers(4, 20))
def test_pieces_join_to_the_document(text: str, size: int) -> None:
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(module, "PIECE_BYTES", size)
        pieces = list(module.pieces_of(text.encode()))
    assert b"".join(pieces) == text.encode()
    assert all(len(piece) <= size and piece.decode() is not None for piece in pieces)


def test_duplicates_are_dropped_and_counted(model: Path, tmp_path: Path) -> None:
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


class FakeWorkers:
    """Answers what it was sent in an order that `rng` draws; checks what a worker holds."""

    def __init__(self, n: int, rng: random.Random) -> None:
        self.pipes: list[None] = [None] * n  # only counted
        self.rng = rng
        self.answers: list[tuple[int, int, Any]] = []
        self.owner: dict[int, int] = {}  # of each block that is not tokenised

    def send(self, worker: int, task: str, number: int, value: Any) -> None:
        if task == "read":
            assert value.source == number
            self.owner[number] = worker
            assert Counter(self.owner.values())[worker] <= module.LOOKAHEAD
            answer: Any = module.Contents(np.array([number], np.uint64), np.array([1]), [])
        else:
            assert self.owner[number] == worker
            answer = module.Tokenised([np.array([number, int(value[0])])], [])
        self.answers.append((worker, number, answer))

    def receive(self) -> tuple[int, int, Any]:
        worker, number, answer = self.answers.pop(self.rng.randrange(len(self.answers)))
        if isinstance(answer, module.Tokenised):
            del self.owner[number]
        return worker, number, answer


@given(st.integers(0, 40), st.integers(1, 4), st.randoms(use_true_random=False))
def test_blocks_are_judged_and_come_back_in_order(n_blocks: int, n_workers: int, rng: random.Random) -> None:
    taken, judged, done = 0, [], 0

    def blocks() -> Iterator[Block]:
        nonlocal taken
        for number in range(n_blocks):
            taken += 1
            assert taken - done <= (module.LOOKAHEAD + 1) * n_workers  # what is in memory is bounded
            yield Block(number, [], 0)

    def judge(block: Block, contents: module.Contents) -> np.ndarray:
        judged.append((block.source, int(contents.digests[0])))
        return np.array([block.source % 3 == 0])

    workers = cast(Workers, FakeWorkers(n_workers, rng))
    for block, ((tokens,), _) in module.tokenise_in_order(blocks(), workers, judge):
        assert (block.source, *tokens) == (done, done, 128 if done % 3 == 0 else 0)
        done += 1
    assert done == n_blocks
    assert judged == [(number, number) for number in range(n_blocks)]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_rows_do_not_depend_on_the_number_of_processes(
    packing: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs_module, "BLOCK_BYTES", 20_000)
    inputs = [str(STDLIB / "json"), str(STDLIB / "email")]
    args = arguments(seq_len=64, packing=packing, valid_fraction=0.1)
    manifests = [prepare(inputs, model, tmp_path / f"out{n}", args, processes=n) for n in (1, 2, 3)]
    assert manifests[0] == manifests[1] == manifests[2]
    for split in ("train", "valid"):
        files = sorted((tmp_path / "out1" / split).iterdir())
        for n in (2, 3):
            assert all((tmp_path / f"out{n}" / split / f.name).read_bytes() == f.read_bytes() for f in files)


def test_copies_are_different_segmentations_of_each_training_document(
    model: Path, corpus: list[str], tmp_path: Path
) -> None:
    write_lines(tmp_path / "a.jsonl", corpus)
    out, args = tmp_path / "out", arguments(valid_fraction=0.3, sample_alpha=0.2, copies=3)
    manifest = prepare([str(tmp_path / "a.jsonl")], model, out, args, processes=2)
    train, valid = documents_in(out), documents_in(out, "valid")
    n = len(corpus) - len(valid)
    assert valid and sorted(train[:n] + valid) == sorted(corpus)
    assert train == train[:n] * 3  # copies do not follow one another
    assert manifest["splits"]["train"]["documents"] == n
    tokenizer = SentencePiece(model)
    stream = stream_of(rows_of(out / "train"), tokenizer.pad_id)
    starts = [i for i, token in enumerate(stream) if token == tokenizer.bos_id]
    pieces = [tuple(stream[start:stop]) for start, stop in zip(starts, [*starts[1:], len(stream)])]
    long = max(range(n), key=lambda i: len(train[i]))
    assert len({pieces[long], pieces[long + n], pieces[long + 2 * n]}) == 3
    best = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in valid]
    assert stream_of(rows_of(out / "valid"), tokenizer.pad_id) == [token for document in best for token in document]


def test_two_workers_draw_different_segmentations(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes((STDLIB / "json" / "encoder.py").read_bytes())
    drawn: dict[int, list[int]] = {}
    with Workers(2, model, arguments(sample_alpha=0.2)) as workers:
        for worker in range(2):
            workers.send(worker, "read", 0, Block(0, [f"{tmp_path}/a.py"], 1))
            workers.send(worker, "keep", 0, np.packbits([True]))
        while len(drawn) < 2:
            worker, _, answer = workers.receive()
            if isinstance(answer, module.Tokenised):
                drawn[worker] = answer.splits[0].tolist()
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_the_manifest_counts_what_the_rows_hold(packing: str, model: Path, corpus: list[str], tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", corpus)
    inputs, out = [str(tmp_path / "a.jsonl"), str(STDLIB / "email")], tmp_path / "out"
    manifest = prepare(inputs, model, out, arguments(packing=packing, valid_fraction=0.2), processes=2)
    assert json.loads((out / "manifest.json").read_text()) == manifest
    tokenizer, padding, places = SentencePiece(model), 0, 0
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


def test_split_by_length_loses_nothing(model: Path, tmp_path: Path) -> None:
    texts = [f"number {i} of them " * (1 + i % 20) for i in range(60)]
    write_lines(tmp_path / "a.jsonl", [*texts, texts[0], ""])
    common: dict[str, Any] = dict(valid_fraction=0.3, seq_len=64)
    inputs, limit, tokenizer = [str(tmp_path / "a.jsonl")], 40, SentencePiece(model)
    whole = prepare(inputs, model, tmp_path / "whole", arguments(**common), processes=2)
    out = tmp_path / "out"
    both = prepare(inputs, model, out, arguments(**common, split_by_length=limit), processes=2)
    assert {path.name for path in out.iterdir()} == {"long", "short", "skipped.tsv", "tokenizer.model"}
    manifests = {part: json.loads((out / part / "manifest.json").read_text()) for part in ("short", "long")}
    for split in ("train", "valid"):
        expected = documents_in(tmp_path / "whole", split)
        is_long = [len(tokenizer.encode(text)) + 2 > limit for text in expected]
        for part, wanted in (("short", False), ("long", True)):
            of_part = [text for text, long in zip(expected, is_long, strict=True) if long == wanted]
            assert of_part and sorted(documents_in(out / part, split)) == sorted(of_part)
            entry = manifests[part]["splits"][split]
            assert entry == both["splits"][f"{part}/{split}"]
            assert (entry["documents"], entry["bytes"]) == (len(of_part), sum(len(t.encode()) for t in of_part))
        for key in ("documents", "bytes", "tokens"):
            assert sum(m["splits"][split][key] for m in manifests.values()) == whole["splits"][split][key]
    assert both["sources"] == whole["sources"] == manifests["long"]["sources"] and both["skipped"] == whole["skipped"]
    for part in ("short", "long"):
        assert read_manifest(out / part).seq_len == 64
        assert (out / part / "tokenizer.model").read_bytes() == model.read_bytes()
    again = arguments(**common, split_by_length=10**6)
    with pytest.raises(UserError, match=r"no training document of more than 1000000 tokens in .*: choose another"):
        prepare(inputs, model, out, again, processes=1, overwrite=True)
    assert (out / "long/manifest.json").is_file()
    prepare(inputs, model, out, arguments(**common), processes=1, overwrite=True)
    assert not (out / "long").exists()


def test_split_by_a_label_loses_nothing(model: Path, tmp_path: Path) -> None:
    labels = ["zh", "en", None, "..", "a/b", "spool", 7, "", True, "zh"]
    lines: list[dict[str, Any]] = [
        {"text": f"number {i}\n" * (1 + i % 3), "meta": {"of": labels[i % 10]}} for i in range(200)
    ]
    lines += [{"text": "without meta"}, {"text": "a literal key", "meta.of": "en"}, lines[0]]
    path, plain, out = tmp_path / "a.jsonl", tmp_path / "b.txt", tmp_path / "out"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plain.write_text("a text file has no label")
    inputs = [str(path), str(plain)]
    common: dict[str, Any] = dict(valid_fraction=0.3, seq_len=64)
    whole = prepare(inputs, model, tmp_path / "whole", arguments(**common), processes=2)
    both = prepare(inputs, model, out, arguments(**common, split_by="meta.of"), processes=2)
    folders: dict[str, list[Any]] = {
        "zh": ["zh"], "en": ["en"], "%2E.": [".."], "a%2Fb": ["a/b"], "spool%": ["spool"], "7": [7],
        "unlabelled": [None, "", True],
    }  # fmt: skip
    assert {path.name for path in out.iterdir()} == {*folders, "skipped.tsv", "tokenizer.model"}
    extra = {"en": {"a literal key"}, "unlabelled": {"without meta", "a text file has no label"}}
    for folder, of in folders.items():
        wanted = {line["text"] for line in lines[:200] if any(line["meta"]["of"] is label for label in of)}
        found = [text for split in ("train", "valid") for text in documents_in(out / folder, split)]
        assert len(found) == len(set(found)) and set(found) == wanted | extra.get(folder, set())
        assert set(documents_in(out / folder, "valid")) <= set(documents_in(tmp_path / "whole", "valid"))
        splits = json.loads((out / folder / "manifest.json").read_text())["splits"]
        assert splits == {split: both["splits"][f"{folder}/{split}"] for split in ("train", "valid")}
        assert read_manifest(out / folder).seq_len == 64
    for key in ("documents", "bytes", "tokens"):
        for split in ("train", "valid"):
            assert sum(both["splits"][f"{folder}/{split}"][key] for folder in folders) == whole["splits"][split][key]
    assert both["sources"] == whole["sources"]
    sampled = arguments(seq_len=64, split_by="meta.of", sample_alpha=0.2, copies=3)
    copies = prepare(inputs, model, out, sampled, processes=1, overwrite=True)
    assert copies["splits"]["zh/train"]["documents"] == 40
    assert sorted(documents_in(out / "zh")) == sorted(
        3 * [line["text"] for line in lines[:200] if line["meta"]["of"] == "zh"]
    )


def test_what_cannot_be_split_by(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PARTS", 3)
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"{i}", "url": f"http://{i}", "long": "x" * 300}) + "\n" for i in range(9))
    )
    for key, message in (
        ("language", "--split-by language: no line and no row has a string or a whole number there"),
        ("url", "--split-by url: 'http://3' is value number 4. They must be short and at most 3: name a column of"),
        ("long", "--split-by long: 'x+' is value number 1. They must be short"),
    ):
        with pytest.raises(UserError, match=message):
            prepare([str(path)], model, tmp_path / "out", arguments(split_by=key), processes=1)
        assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_progress_reaches_the_end(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs_module, "BLOCK_BYTES", 2000)
    folder = tmp_path / "in"
    folder.mkdir()
    write_lines(folder / "a.jsonl.gz", [f"{i} {text}" for i in range(50) for text in TEXTS])
    (folder / "b.txt").write_text("b")
    seen: list[Progress] = []
    manifest = prepare([str(folder)], model, tmp_path / "out", arguments(), processes=2, on_progress=seen.append)
    assert len(seen) > 10 and seen == sorted(seen)
    total = sum(path.stat().st_size for path in folder.iterdir())
    assert seen[-1] == (total, total, 301, manifest["splits"]["train"]["tokens"])


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_kill_9_leaves_nothing_to_trust(model: Path, tmp_path: Path, popen: Popen) -> None:
    texts = [path.read_text() for path in sorted(STDLIB.glob("*.py"))]
    write_lines(tmp_path / "a.jsonl.gz", texts)
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    command = [sys.executable, TOOL, tmp_path / "a.jsonl.gz", "--tokenizer", model, "--out", out, "--seq-len", "64"]
    process = popen([*map(str, command), "--processes", "2"], stdout=subprocess.DEVNULL)
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
    names = ["manifest.json", "skipped.tsv", "tokenizer.model", "train", "valid"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert set(documents_in(out)) == set(texts)


def test_interruption_cleans_up(model: Path, tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([str(STDLIB / "json")], model, tmp_path / "out", arguments(), processes=1, on_progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    assert multiprocessing.active_children() == []


def test_a_killed_worker_stops_the_run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs_module, "BLOCK_BYTES", 2000)

    def kill(progress: Progress) -> None:
        for worker in multiprocessing.active_children()[:1]:  # both may be gone before that is seen
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)

    with pytest.raises(UserError, match=r"died with exit code -9.*run again with fewer --processes"):
        prepare([str(STDLIB / "json")], model, tmp_path / "out", arguments(), processes=2, on_progress=kill)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_worker_says_where(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("x")
    for path, span, kind, message in [
        (f"{tmp_path}/gone.jsonl", (0, 1), UserError, "gone.jsonl: cannot be read any more"),
        (f"{tmp_path}/a.jsonl", ("a", "b"), RuntimeError, r"a worker failed near .*a.jsonl(.|\n)*TypeError"),
    ]:
        with Workers(1, model, arguments()) as workers:
            workers.send(0, "read", 0, Block(0, [path], 1, span=cast(Any, span)))
            with pytest.raises(kind, match=message):
                workers.receive()


def test_overwrite(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first")
    inputs, out = [str(tmp_path / "a.txt")], tmp_path / "out"
    prepare(inputs, model, out, arguments(seq_len=4), processes=1)
    with pytest.raises(UserError, match="out exists: choose another, or add --overwrite"):
        prepare(inputs, model, out, arguments(seq_len=4), processes=1)
    (tmp_path / "a.txt").write_text("second")
    with pytest.raises(UserError, match="no training document"):
        prepare(inputs, model, out, arguments(valid_fraction=1 - 1e-12), processes=1, overwrite=True)
    assert documents_in(out) == ["first"]  # a run that fails leaves the old one
    with pytest.raises(UserError, match="lies inside an INPUT"):
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
    prepare(inputs, model, home / "set", arguments(seq_len=4), processes=1)  # what lies above a set is not one
    with pytest.raises(UserError, match="home was not written by prepare_data: --overwrite will not remove it"):
        prepare(inputs, model, home, arguments(), processes=1, overwrite=True)
    shutil.copy(tmp_path / "a.txt", out)
    with pytest.raises(
        UserError, match=r"--overwrite would remove .*out/a.txt, which is an INPUT: choose another --out"
    ):
        prepare([str(out / "a.txt")], model, out, arguments(), processes=1, overwrite=True)
    assert documents_in(out) == ["second"] and documents_in(home / "set") == ["second"]


def test_two_runs_for_one_folder(model: Path, tmp_path: Path) -> None:
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
        ({"split_by_length": 1}, "--split-by-length 1 must be at least 2"),
        ({"split_by_length": 9, "copies": 2, "sample_alpha": 0.2}, "--split-by-length does not fit --copies 2, which"),
        ({"sample_alpha": -1.0}, "--sample-alpha -1.0 must be finite and not negative"),
        ({"copies": 2}, "--copies 2 without --sample-alpha would repeat the same rows: add --sample-alpha"),
    ],
)
def test_wrong_arguments(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        arguments(**given)


def test_wrong_inputs(models: dict[str, Path], model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text(" ")
    good, out = str(tmp_path / "a.txt"), tmp_path / "out"

    def fails(
        message: str, inputs: tuple[str, ...] = (good,), tokenizer: Path = model, processes: int = 1, **given: Any
    ) -> None:
        with pytest.raises(UserError, match=message):
            prepare(list(inputs), tokenizer, out, arguments(**given), processes=processes)
        assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".out*"))

    fails("no tokenizer .*none: train one with tools/train_tokenizer.py", tokenizer=tmp_path / "none")
    fails(
        "--sample-alpha 0.2 needs a unigram sentencepiece model, and .*bpe is none",
        tokenizer=models["bpe"],
        sample_alpha=0.2,
    )
    fails("--processes 0 must be at least 1", processes=0)
    fails("no INPUT: name files, folders or globs", inputs=())
    fails("an INPUT is named twice", inputs=(good, good))
    fails(r"\*\.rst: no such file or folder, and no file matches it", inputs=(good, str(tmp_path / "*.rst")))
    fails("empty: there is no file in it", inputs=(str(tmp_path / "empty"),))
    fails("no training document in .*; skipped: 1 nothing but white space", inputs=(str(tmp_path / "blank.txt"),))
    fails("--seq-len 40000000: a row does not fit a shard of 64 MiB", seq_len=40_000_000)


def test_preparing_needs_no_torch() -> None:
    code = (
        "import sys, megakexue.text.prepare; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'streaming', 'rich')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory, corpus: list[str]) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("theirs")
    return {kind: byte_level(folder / kind, kind, corpus, 400) for kind in ("llama3", "qwen", "one mark")}


def test_documents_that_do_not_come_back_are_counted_and_named(
    theirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs_module, "BLOCK_BYTES", 300)
    lines = []
    for i in range(60):  # one in three is changed, one in three is no document
        lines += [json.dumps({"text": f"cafe\u0301 {i}"}), json.dumps({"text": f"café {i} <|endoftext|>"}), "{"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_text("e\u0301")
    (tmp_path / "c.txt").write_text("é")
    inputs = [str(tmp_path / name) for name in ("a.jsonl", "b.txt", "c.txt")]
    args = arguments(valid_fraction=0.3)
    manifests = [prepare(inputs, theirs["qwen"], tmp_path / f"out{n}", args, processes=n) for n in (1, 3)]
    assert manifests[0] == manifests[1]
    paths = [f"{inputs[0]}:{3 * i + 1}" for i in range(60)]
    assert manifests[0]["round_trip"] == {"measured": True, "changed": 61, "paths": paths[:5]}
    listed = [line.split("\t") for line in (tmp_path / "out1" / "skipped.tsv").read_text().splitlines()]
    assert sorted(name for why, name in listed if why == "changed") == sorted([*paths[:20], inputs[1]])
    out, command = tmp_path / "out", [sys.executable, TOOL, *inputs, "--tokenizer", theirs["qwen"], "--seq-len", "32"]
    said = subprocess.run([*map(str, command), "--out", out], capture_output=True, text=True, check=True).stdout
    assert f"round trip: 61 of 122 documents (50.00%) do not come back byte for byte, such as {paths[0]}\n" in said
    assert f"all that was skipped or changed is listed in {out}/skipped.tsv" in said
    special = set(read_spec(theirs["qwen"]).special.values())
    for split, kept in manifests[0]["splits"].items():
        rows = rows_of(tmp_path / "out1" / split)
        assert np.isin(rows, list(special)).sum() <= 3 * kept["documents"] + kept["padding"]  # only marks
    manifest = prepare(inputs, theirs["llama3"], tmp_path / "exact", args, processes=1)
    assert manifest["round_trip"] == {"measured": True, "changed": 0, "paths": []}


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("kind", ["qwen", "one mark"])
def test_rows_with_one_mark_hold_each_document_and_are_counted(
    kind: str, packing: str, theirs: dict[str, Path], corpus: list[str], tmp_path: Path
) -> None:
    write_lines(tmp_path / "a.jsonl", [*corpus, "<|endoftext|>", "x"])
    args = arguments(packing=packing, valid_fraction=0.2, seq_len=48)
    manifest = prepare([str(tmp_path / "a.jsonl")], theirs[kind], tmp_path / "out", args, processes=2)
    tokenizer, n_documents = load_tokenizer(theirs[kind]), 0
    bos, eos, pad = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
    for name, split in manifest["splits"].items():
        rows = rows_of(tmp_path / "out" / name).astype(np.int64)
        batch = make_batch(rows, [], bos_id=bos, eos_id=eos, pad_id=pad)
        targets = batch.targets[batch.targets != IGNORED].tolist()
        assert split["targets"] == len(targets) == split["tokens"] - split["documents"]  # all but BOS, each once
        assert targets.count(eos) == split["documents"] and split["bytes"] == len(tokenizer.decode_bytes(targets))
        shares = [count / len(targets) for count in Counter(targets).values()]
        assert split["unigram_entropy_nats"] == pytest.approx(-sum(p * math.log(p) for p in shares), rel=1e-12)
        assert kind == "one mark" or split["padding"] == (rows[:, 1:] == pad).sum()
        n_documents += split["documents"]
    assert n_documents == len(corpus) + 2 and manifest["round_trip"]["changed"] == 0
