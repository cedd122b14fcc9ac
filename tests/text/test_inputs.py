"""Every kind of file comes back as its documents, in order; what cannot be read is refused or named."""

import bz2
import contextlib
import errno
import glob
import gzip
import json
import lzma
import os
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megakexue.config import UserError
from megakexue.text import inputs as module
from megakexue.text.inputs import Reading, check_inputs, find_files, matches
from megakexue.text.prepare import prepare
from megakexue.text.tokenizer import SentencePiece
from tests.text.helpers import TEXTS, arguments, documents_in, write_lines


@pytest.mark.parametrize("name", ["a.jsonl", "a.NDJSON", "a.jsonl.gz", "a.JSONL.zst", "a.jsonl.bz2", "a.jsonl.xz"])
@pytest.mark.parametrize("block_bytes", [1 << 20, 1000])
def test_lines_come_back_in_order(
    name: str, block_bytes: int, model: Path, corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", block_bytes)
    write_lines(tmp_path / name, corpus, key="content")
    out = tmp_path / "out"
    manifest = prepare([str(tmp_path / name)], model, out, arguments(text_key="content"), processes=2)
    assert documents_in(out) == corpus
    assert manifest["skipped"] == {}
    assert not (out / "spool").exists()


@pytest.mark.parametrize("large", [False, True])
def test_parquet_comes_back_in_order(large: bool, model: Path, corpus: list[str], tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    texts = pyarrow.array([*corpus, None] * 40, pyarrow.large_string() if large else pyarrow.string())
    numbered = pyarrow.array([None if t is None else f"{i} {t}" for i, t in enumerate(texts.to_pylist())], texts.type)
    table = pyarrow.table({"id": list(range(len(texts))), "body": numbered})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    manifest = prepare([f"{tmp_path}/a.parquet"], model, tmp_path / "out", arguments(text_key="body"), processes=2)
    assert documents_in(tmp_path / "out") == [text for text in numbered.to_pylist() if text is not None]
    n = len(corpus) + 1
    paths = [f"{tmp_path}/a.parquet:{n * (i + 1)}" for i in range(40)]
    assert manifest["skipped"] == {"no_text": {"count": 40, "paths": paths[:5]}}
    assert (tmp_path / "out/skipped.tsv").read_text() == "".join(f"no_text\t{path}\n" for path in paths[:20])


def test_text_files_in_folders_and_globs_come_back_in_order(model: Path, corpus: list[str], tmp_path: Path) -> None:
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
    hidden = [f"{folder}/.git", f"{folder}/.hidden"]
    manifest = prepare(inputs, model, tmp_path / "out", arguments(), processes=1)
    assert documents_in(tmp_path / "out") == [TEXTS[i] for i in (5, 4, 1, 0, 2, 3)]
    sources = manifest["sources"]
    assert list(sources) == inputs
    assert manifest["skipped"] == {"hidden": {"count": 2, "paths": hidden}}
    assert [source["documents"] for source in sources.values()] == [2, 4]
    tokenizer = SentencePiece(model)
    for source, indices in zip(sources.values(), [(5, 4), (0, 1, 2, 3)]):
        assert source["bytes"] == sum(len(TEXTS[i].encode()) for i in indices)
        assert source["tokens"] == sum(len(tokenizer.encode(TEXTS[i])) + 2 for i in indices)


def test_zstandard_text_file(model: Path, tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    frames = [zstandard.compress(part.encode()) for part in ("two frames ", "in one file")]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(frames))
    prepare([str(tmp_path / "a.txt.zst")], model, tmp_path / "out", arguments(seq_len=4), processes=1)
    assert documents_in(tmp_path / "out") == ["two frames in one file"]


def test_a_packed_file_named_twice_is_read_twice(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_lines(tmp_path / "in/a.jsonl.gz", TEXTS)
    inputs = [str(tmp_path / "in/a.jsonl.gz"), str(tmp_path / "in")]
    manifest = prepare(inputs, model, tmp_path / "out", arguments(), processes=1)
    assert documents_in(tmp_path / "out") == TEXTS
    assert [source["duplicates"] for source in manifest["sources"].values()] == [0, len(TEXTS)]


def found(*names: Path | str) -> dict[str, str | None]:
    """What is found at the inputs, by path relative to the first, with its fault."""
    return {os.path.relpath(found.path, names[0]): found.fault for found in find_files([str(name) for name in names])}


def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    (tmp_path / "elsewhere/deep/b.txt").write_text("b")
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "in/a.txt").write_text("a")
    (tmp_path / "in/data").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/sub/up").symlink_to("..")
    (tmp_path / "in/same").symlink_to("sub")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "in")
    (tmp_path / "in/loop").symlink_to("loop")
    assert found(tmp_path / "in") == {
        "a.txt": None, "loop": "unreadable", "data/back": "read_already", "data/deep/b.txt": None,
        "same/up": "read_already", "sub": "read_already",
    }  # fmt: skip


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "device").symlink_to("/dev/null")
    assert found(tmp_path) == {"device": "not_a_file", "gone": "unreadable", "pipe": "not_a_file"}
    with pytest.raises(UserError, match=r"pipe: a pipe, socket or device has no size .*: write it to a file first"):
        list(find_files([str(tmp_path / "pipe")]))


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in/closed").mkdir(parents=True)
    (tmp_path / "in/open.txt").write_text("open")

    def closed(list_: Any) -> Any:  # root may list any folder
        def function(path: Any) -> Any:
            if str(path).endswith("closed"):
                raise PermissionError(errno.EACCES, "Permission denied")
            return list_(path)

        return function

    monkeypatch.setattr(os, "listdir", closed(os.listdir))
    monkeypatch.setattr(os, "scandir", closed(os.scandir))
    assert found(tmp_path / "in") == {"open.txt": None, "closed": "unreadable"}
    with pytest.raises(UserError, match="closed: cannot be read: Permission denied"):
        found(tmp_path / "in/closed")
    with pytest.raises(UserError, match="closed: cannot be listed, and the glob goes through it: Permission denied"):
        found(tmp_path / "in/**/*.txt")


def test_a_file_has_nothing_below_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/a").touch()
    for pattern in ("a/a/**", "*/a/**", "a/**/**"):
        found = set(matches("/", [part for part in f"{tmp_path}/{pattern}".split("/") if part]))
        assert found == ({str(tmp_path / "a")} if pattern == "a/**/**" else set()), pattern


@given(st.data())
def test_globs_match_as_those_of_python(data: st.DataObject) -> None:
    name = st.sampled_from(["a", "b", "a.txt", ".b", "[x]"])
    with tempfile.TemporaryDirectory() as folder:
        for parts in data.draw(st.lists(st.lists(name, min_size=1, max_size=3), max_size=6)):
            path = Path(folder, *parts)
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
        parts = data.draw(
            st.lists(st.sampled_from(["*", "a*", "**", "a", "[ab]", "?.txt", ".*"]), min_size=1, max_size=3)
        )
        pattern = os.path.join(folder, *parts)
        expected = {path for path in glob.glob(pattern, recursive=True) if os.path.lexists(path)}
        found = set(matches("/", [part for part in pattern.split("/") if part]))
        if parts[-1] == "**":  # the folder above, which is read with all that is in it
            assert found <= {path.rstrip("/") for path in expected}
            assert all(any(Path(path).is_relative_to(folder) for folder in found) for path in expected)
        else:
            assert found == expected


def test_a_document_that_is_too_large_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 10)
    (tmp_path / "a.txt").write_bytes(b"x" * 11)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"x" * 11))
    (tmp_path / "c.txt").write_bytes(b"x" * 10)
    read = [module.read_file(str(tmp_path / name))[1] for name in ("a.txt", "b.txt.gz", "c.txt")]
    assert read == ["too_large", "too_large", None]
    assert module.read_line(b'{"text": "12345678901"}', Reading())[1] == "too_large"


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("block_bytes", [10, 1000])
def test_a_giant_line_costs_that_line(
    packed: str, block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 100)
    path = tmp_path / f"a.jsonl{packed}"
    write_lines(path, ["first", "y" * 2000, "z" * 101, "last"])
    documents, faults = read_all(path)
    assert (documents, faults) == ([b"first", b"last"], [("too_large", 2), ("too_large", 3)])


def read_all(path: Path) -> tuple[list[bytes], list[tuple[str, int | None]]]:
    """The documents of a file, and (reason, line) of what is skipped; line: None for the file as a whole."""
    documents: list[bytes] = []
    faults: list[tuple[str, int | None]] = []
    n_lines = 0
    with tempfile.TemporaryDirectory() as spool:
        for block in module.cut_into_blocks(find_files([str(path)]), Path(spool), Reading()):
            texts, skipped, _ = module.read_block(block, Reading())
            documents += texts
            faults += [(reason, None if block.span is None else n_lines + index + 1) for reason, index in skipped]
            n_lines += len(texts) + len(skipped)
    return documents, faults


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstd().compress(data),
}


def zstd() -> Any:
    return pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True)


@pytest.mark.parametrize("packed", PACK)
def test_packed_files_in_every_state(packed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 10_000)
    texts = [f"{i} {random.Random(i).random()}" for i in range(3000)]
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    half = len(texts) // 2
    members = [PACK[packed](b"".join(lines[:half])), PACK[packed](b"".join(lines[half:]))]
    path, text_file = tmp_path / f"a.jsonl{packed}", tmp_path / f"b.txt{packed}"

    def read(data: bytes) -> tuple[int, list[tuple[str, int | None]], int, list[tuple[str, int | None]]]:
        path.write_bytes(data)
        text_file.write_bytes(data)
        documents, faults = read_all(path)
        assert documents == [text.encode() for text in texts[: len(documents)]]
        files, of_file = read_all(text_file)
        assert not files or files == [b"".join(lines[: len(documents)])]
        return len(documents), faults, len(files), of_file

    n = len(texts)
    assert read(b"".join(members)) == (n, [], 1, [])
    if packed in (".gz", ".xz"):  # padding; a device or a block of tape has it
        assert read(b"".join(members) + b"\0" * 512) == (n, [], 1, [])
    for other in (b"x", b"other bytes\n", b"\x1f"):
        assert read(members[0] + other) == (half, [("trailing", half + 1)], 1, [("trailing", None)])
    for data in (
        members[0] + members[1][:-1],
        members[0] + members[1][:9],
        members[0] + members[1][: len(members[1]) // 2],
    ):
        kept, faults, *of_file = read(data)
        assert half <= kept <= n and faults == [("damaged", kept + 1)] and of_file == [0, [("damaged", None)]]
    place = len(members[0]) // 2  # gzip compares its checksum at the end only: some lines may be wrong
    path.write_bytes(members[0][:place] + b"\x55\0\xaa" + members[0][place + 3 :])
    text_file.write_bytes(path.read_bytes())
    assert read_all(path)[1][-1][0] == "damaged" and read_all(text_file) == ([], [("damaged", None)])
    assert read(b"")[1:] == ([("damaged", None)], 0, [("damaged", None)])


def test_skippable_frames_of_zstandard_are_no_text(tmp_path: Path) -> None:
    extra = b"\x5a\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"notes"
    (tmp_path / "a.txt.zst").write_bytes(extra + zstd().compress(b"one ") + extra + zstd().compress(b"two") + extra)
    assert read_all(tmp_path / "a.txt.zst") == ([b"one two"], [])


def test_the_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.jsonl").write_bytes(mark + b'{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(mark + b'{"text": "only"}'))
    (tmp_path / "c.txt").write_bytes(mark + "text \ufeff".encode())
    assert read_all(tmp_path / "a.jsonl") == ([b"a", b"b"], [])
    assert read_all(tmp_path / "b.jsonl.gz") == ([b"only"], [])
    assert read_all(tmp_path / "c.txt") == (["text \ufeff".encode()], [])


def test_every_string_type_of_pyarrow(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = ["a", None, "中", "a"]
    strings = [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()]
    columns = [pyarrow.array(texts, kind) for kind in strings]
    columns += [pyarrow.array(texts, pyarrow.dictionary(pyarrow.int8(), kind)) for kind in strings[:2]]
    columns += [pyarrow.ExtensionArray.from_storage(pyarrow.json_(), columns[0])]
    # as written by a program that does not check: the second is no UTF-8
    binary = pyarrow.array([b"a", b"\xff", b"b"], pyarrow.binary())
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 3, binary.buffers())
    for number, column in enumerate([*columns, broken]):
        path = tmp_path / f"{number}.parquet"
        parquet.write_table(pyarrow.table({"text": column}), path)
        module.check_readable(str(path), Reading())
        is_broken = number == len(columns)
        documents = [b"a", b"b"] if is_broken else [b"a", "中".encode(), b"a"]
        assert read_all(path) == (documents, [("not_utf8" if is_broken else "no_text", 2)])


def test_lines_that_vanish_are_an_error(tmp_path: Path) -> None:
    block = module.Block(0, [str(tmp_path / "gone.jsonl")], 1, span=(0, 1))
    with pytest.raises(UserError, match=r"gone.jsonl: cannot be read any more: No such file or directory: start again"):
        module.read_block(block, Reading())


def test_checks_before_hours_of_reading(tmp_path: Path) -> None:
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "in/a.txt").write_text("12345")
    (tmp_path / "disk").mkdir()
    (tmp_path / "in/linked").symlink_to(tmp_path / "disk")
    folder = str(tmp_path / "in")
    assert check_inputs([folder], Reading(), tmp_path / "out") == 5
    for out in ("in/out", "in/sub/new/out", "disk/out"):
        with pytest.raises(UserError, match="lies inside an INPUT, and the next run would read it: choose another"):
            check_inputs([folder], Reading(), tmp_path / out)
    with pytest.raises(UserError, match=r"is INPUT .*a.txt: choose another --out"):
        check_inputs([f"{folder}/a.txt"], Reading(), tmp_path / "in/a.txt")
    for again in (folder, f"{folder}/", f"{folder}/sub/.."):
        with pytest.raises(UserError, match="an INPUT is named twice"):
            check_inputs([folder, again], Reading(), tmp_path / "out")


def test_wrong_parquet(model: Path, tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_text("no Parquet")  # is listed, as other damage
    (tmp_path / "c.parquet.gz").write_text("packed twice")
    for name, key, message in [
        ("a", "text", r"no column 'text' among \['body', 'n'\]: set --text-key"),
        ("a", "n", "column 'n' holds int64, not strings: set --text-key"),
        ("b", "text", "no training document in .*b.parquet; skipped: 1 damaged or cut short"),
        ("c", "text", "unpack it first; tables are compressed inside"),
    ]:
        path = next(str(path) for path in tmp_path.glob(f"{name}.*"))
        with pytest.raises(UserError, match=message):
            prepare([path], model, tmp_path / "out", arguments(text_key=key), processes=1)


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, package in (("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=f"{name}: to read it, pip install {package}"):
            module.check_readable(str(tmp_path / name), Reading())
