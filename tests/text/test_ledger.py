"""Random trees of what people have: each document is kept, a duplicate, or listed with a reason; in both programs."""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import shutil
import socket
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from megakexue.config import UserError
from megakexue.text import inputs as inputs_module
from megakexue.text.inputs import Block, Reading
from megakexue.text.ledger import Contents, Ledger, printable, read_kept, report
from megakexue.text.prepare import prepare
from tests.text.helpers import arguments, documents_in

zstandard = pytest.importorskip("zstandard")
CHECKED = zstandard.ZstdCompressor(write_checksum=True)  # without it, changed bytes would be other text
PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": CHECKED.compress}
NAMES = [b"a", b"B.TXT", "中文.md".encode(), b"caf\xe9.txt", b"two\nlines", b"with space.py", b"tab\there", b"-v"]


@dataclass
class Tree:
    """A random tree, and where each document of it was put."""

    root: Path
    rng: random.Random
    places: list[tuple[str, bytes, int | None]] = field(default_factory=list)
    """(text, path, line); line: None for a file that is one document."""
    n: int = 0
    n_files: int = 0

    def text(self) -> str:
        self.n += 1
        if self.places and self.rng.random() < 0.1:
            return self.rng.choice(self.places)[0]
        return f"document {self.n} " + "".join(self.rng.choices("abc é中\n", k=self.rng.randrange(200)))

    def folder(self) -> bytes:
        """A folder, new or not, real or through a link."""
        path = os.fsencode(self.root)
        for _ in range(self.rng.randrange(3)):
            path = os.path.join(path, self.rng.choice([b"x", b"y", b".hidden", b"\xff", "目录".encode()]))
        os.makedirs(path, exist_ok=True)
        return path

    def add(self) -> None:
        """Add something that people have."""
        self.n_files += 1
        path = os.path.join(self.folder(), b"%d" % self.n_files + self.rng.choice(NAMES))
        kind = self.rng.choice(["file", "file", "lines", "lines", "parquet", "odd", "link"])
        packed = self.rng.choice(list(PACK))
        if kind == "file":
            text = self.text()
            path += packed.encode()
            Path(os.fsdecode(path)).write_bytes(self.damage(PACK[packed](text.encode()), packed))
            self.places.append((text, path, None))
        elif kind == "lines":
            path += self.rng.choice([b".jsonl", b".NDJSON", b".JsonL"]) + packed.encode()
            Path(os.fsdecode(path)).write_bytes(self.damage(PACK[packed](self.lines(path)), packed))
        elif kind == "parquet":
            self.add_parquet(path + b".parquet")
        elif kind == "odd":
            self.add_odd(path)
        else:
            os.symlink(self.rng.choice([b".", b"..", b"nowhere", self.folder(), os.path.basename(path)]), path)

    def lines(self, path: bytes) -> bytes:
        lines = []
        for number in range(1, self.rng.randrange(2, 40)):
            bad = [
                b"{",
                b"",
                b"[1]",
                b'{"text": null}',
                b'{"text": 3}',
                b"\xff\xfe",
                b'{"text": "' + b"z" * 3000 + b'"}',
            ]
            if self.rng.random() < 0.3:
                lines.append(self.rng.choice(bad))
            else:
                text = self.text()
                lines.append(json.dumps({"text": text}).encode())
                self.places.append((text, path, number))
        bom = b"\xef\xbb\xbf" if self.rng.random() < 0.3 else b""
        return bom + b"\n".join(lines) + self.rng.choice([b"", b"\n"])

    def damage(self, data: bytes, packed: str) -> bytes:
        """Cut, change or extend packed data, sometimes; of two members, sometimes the second."""
        choice = self.rng.randrange(8)
        if not packed or choice > 4:
            return data
        place = self.rng.randrange(len(data))
        if choice == 4:
            data = data + PACK[packed](b"")  # a second, empty member is sound
        changed = data[:place] + b"\x00\xff\x17" + data[place + 3 :]
        return [data[:place], changed, data + b"x", data + b"\0" * 8, data][choice]

    def add_parquet(self, path: bytes) -> None:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        texts = [None if self.rng.random() < 0.1 else self.text() for _ in range(self.rng.randrange(30))]
        kinds = [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.json_(),
                 pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]  # fmt: skip
        kind = self.rng.choice(kinds)
        if kind == pyarrow.json_():
            column = pyarrow.ExtensionArray.from_storage(kind, pyarrow.array(texts, pyarrow.string()))
        else:
            column = pyarrow.array(texts, kind)
        file = io.BytesIO()
        parquet.write_table(pyarrow.table({"id": list(range(len(texts))), "text": column}), file, row_group_size=10)
        data = file.getvalue()
        cut = self.rng.random() < 0.2
        Path(os.fsdecode(path)).write_bytes(data[: len(data) // 2] if cut else data)
        self.places += [(text, path, number) for number, text in enumerate(texts, 1) if text is not None]

    def add_odd(self, path: bytes) -> None:
        match self.rng.randrange(4):
            case 0:
                os.mkfifo(path)
            case 1:
                with socket.socket(socket.AF_UNIX) as sock:
                    os.chdir(os.path.dirname(path))  # a socket's name may be short only
                    sock.bind(os.path.basename(path))
            case 2:
                text = self.text()
                Path(os.fsdecode(path)).write_bytes(text.encode("utf-16"))
                self.places.append((text, path, None))
            case _:
                Path(os.fsdecode(path)).write_bytes(b"\0" * 10)


def missing(tree: Tree, kept: set[str], listed: list[str]) -> list[tuple[str, bytes, int | None]]:
    """The places of documents that are neither kept nor listed, in or at a file, a folder or a line that is."""
    names = dict(line.split("\t")[::-1] for line in listed)
    lost = []
    for text, path, line in tree.places:
        folders = [printable(os.fsdecode(path))]
        while len(folders[-1]) > len(str(tree.root)):
            folders.append(os.path.dirname(folders[-1]))
        at_line = {f"{folders[0]}:{line}"}
        if line is not None:  # damage names the first line that is not there
            at_line |= {f"{folders[0]}:{n}" for n in range(line) if names.get(f"{folders[0]}:{n}") == "damaged"}
        if text not in kept and not names.keys() & {*folders, *at_line}:
            lost.append((text, path, line))
    return lost


@pytest.mark.parametrize("seed", range(40))
def test_every_document_is_kept_a_duplicate_or_listed(
    seed: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs_module, "MAX_DOCUMENT_BYTES", 2000)
    monkeypatch.setattr(inputs_module, "BLOCK_BYTES", random.Random(seed).choice([100, 1000, 1 << 20]))
    monkeypatch.chdir(tmp_path)
    tree = Tree(tmp_path / "in", random.Random(seed))
    tree.root.mkdir()
    (tree.root / "one.txt").write_text("one document at least")
    for _ in range(25):
        tree.add()
    os.chdir(tmp_path)
    (tmp_path / "spool").mkdir()
    with open("list", "w+") as list_file:
        ledger = Ledger(["in"], list_file)
        texts = [text for block in read_kept(["in"], Reading(), tmp_path / "spool", ledger) for text in block]
        list_file.seek(0)
        listed = list_file.read().splitlines()
    assert len(texts) == len(set(texts)) == ledger.total("documents")
    tree.places = [(text, os.path.relpath(path, os.fsencode(tmp_path)), line) for text, path, line in tree.places]
    tree.root = Path("in")
    assert missing(tree, set(texts), listed) == []
    n_skipped = sum(entry["count"] for entry in ledger.skipped.values())
    assert n_skipped == len(listed) == sum(ledger.sources[0]["skipped"].values())
    if seed < 4:  # what the preparation says is the same
        monkeypatch.undo()
        os.chdir(tmp_path)
        manifest = prepare(["in"], model, "out", arguments(), processes=2)
        again = Ledger(["in"])
        texts = [text for block in read_kept(["in"], Reading(), tmp_path / "spool", again) for text in block]
        assert documents_in(tmp_path / "out") == texts
        tokens = manifest["sources"]["in"].pop("tokens")
        assert tokens == manifest["splits"]["train"]["tokens"]
        assert {key: manifest[key] for key in again.facts} == again.facts


def test_many_lines_of_a_file_are_counted_and_a_few_named(tmp_path: Path) -> None:
    with open(tmp_path / "list", "w+") as file:
        ledger = Ledger(["in"], file)
        for number in range(30):
            block = Block(0, ["in/a.jsonl"], 1, span=(number, number + 1), first=number == 0)
            ledger.judge(block, Contents.of([], [("bad_json", 0), ("empty", 1)]))
        ledger.judge(Block(0, ["in/b", "in/c"], 2), Contents.of([b"text"], [("binary", 1)]))
        file.seek(0)
        lines = file.read().splitlines()
    assert ledger.skipped["bad_json"] == {"count": 30, "paths": [f"in/a.jsonl:{2 * i + 1}" for i in range(5)]}
    assert [line for line in lines if "bad_json" in line] == [f"bad_json\tin/a.jsonl:{2 * i + 1}" for i in range(20)]
    assert lines[-1] == "binary\tin/c" and len(lines) == 41


@pytest.mark.skipif(shutil.which("iconv") is None, reason="needs iconv")
@pytest.mark.parametrize(
    ("text", "encoding", "name"),
    [
        ("春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。", "gbk", "GB18030"),
        ("春眠不覺曉，處處聞啼鳥。夜來風雨聲，花落知多少。這是一個比較長的文本。", "big5", "BIG5"),
        ("Привет, как дела? Всё хорошо.", "cp1251", "CP1251"),
        ("日本語のテキストです。これは長い文章。", "shift_jis", "SHIFT-JIS"),
        ("déjà vu, Straße und Größe", "latin-1", "CP1252"),
        ("English, from another system", "utf-16", "UTF-16"),
    ],
)
def test_the_command_that_is_advised_converts_the_file(text: str, encoding: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "my text.md"
    path.write_bytes(text.encode(encoding))
    (tmp_path / "spool").mkdir()
    ledger = Ledger([str(path)])
    with pytest.raises(UserError, match=r"no document in .*my text.md; skipped: 1 not valid UTF-8"):
        list(read_kept([str(path)], Reading(), tmp_path / "spool", ledger))
    line = report(ledger.facts)[-1]
    assert line.startswith(f"{path} is perhaps {name}: iconv -f {name} -t UTF-8 '")
    assert os.system(line.partition(": ")[2]) == 0
    assert (tmp_path / "my text.utf8.md").read_text(encoding="utf-8") == text


def test_lines_and_files_without_a_guess_have_advice_too(tmp_path: Path) -> None:
    facts = {"sources": {}, "skipped": {"not_utf8": {"count": 3, "paths": ["a.jsonl:1", "a.jsonl:7", "gone.txt"]}}}
    assert report(facts)[-2:] == [
        f"{name} is not UTF-8: convert it with iconv, and start again" for name in ("a.jsonl", "gone.txt")
    ]


def test_names_are_printed_on_one_line() -> None:
    assert printable(os.fsdecode(b"caf\xe9\n\x1b[31m.txt")) == r"caf\xe9\n\x1b[31m.txt"
    assert printable("中文 name.txt") == "中文 name.txt"


def test_the_first_of_equal_documents_is_kept() -> None:
    ledger = Ledger(["a", "b"])
    kept = ledger.judge(Block(0, ["a"], 1), Contents.of([b"x", b"y", b"x"], []))
    assert kept.tolist() == [True, True, False]
    assert not ledger.judge(Block(1, ["b"], 1), Contents.of([b"y"], [])).any()
    assert [source["duplicates"] for source in ledger.sources] == [1, 1]
    assert ledger.total("bytes") == 2 and isinstance(kept, np.ndarray)
