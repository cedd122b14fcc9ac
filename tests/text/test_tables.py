"""Rows of Parquet and Arrow files come in order, with their labels; of a folder of `datasets` all and only its rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from megakexue.config import UserError
from megakexue.text import tables as module
from megakexue.text.prepare import prepare
from tests.text.helpers import arguments, documents_in

pyarrow = pytest.importorskip("pyarrow")
TEXTS = [f"第 {i} row of a table\n" for i in range(700)]


def write_arrow(path: Path, texts: list[str | None], rows: int = 300, **columns: Any) -> None:
    """Write a file as `datasets` does: a stream of batches."""
    table = pyarrow.table({"text": texts, **columns})
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


def save_to_disk(folder: Path, shards: list[list[str]]) -> Path:
    """Write a folder as the method of that name does."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{len(shards):05}.arrow" for i in range(len(shards))]
    for name, texts in zip(names, shards):
        write_arrow(folder / name, [*texts])
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "e9a3", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"text": {"dtype": "string"}}}))
    return folder


def test_folders_of_datasets_come_back_whole(model: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "set", tmp_path / "out"
    save_to_disk(data / "a_train", [TEXTS[:500], TEXTS[500:600]])
    save_to_disk(data / "b_test", [TEXTS[600:]])
    (data / "dataset_dict.json").write_text('{"splits": ["a_train", "b_test"]}')
    write_arrow(data / "a_train/cache-12ab.arrow", ["what a map has left"])
    prepare([str(data)], model, out, arguments(), processes=2)
    assert documents_in(out) == TEXTS
    others = [
        "dataset_dict.json",
        *(f"{s}/{n}" for s in ("a_train", "b_test") for n in ("dataset_info.json", "state.json")),
    ]
    listed = [f"beside_data\t{data}/{name}\n" for name in [*others, "a_train/cache-12ab.arrow"]]
    assert sorted((out / "skipped.tsv").read_text().splitlines(keepends=True)) == sorted(listed)
    (data / "a_train/data-00001-of-00002.arrow").unlink()
    with pytest.raises(
        UserError, match=r"state\.json names data-00001-of-00002\.arrow, and there is no such file: copy"
    ):
        prepare([str(data)], model, out, arguments(), processes=1, overwrite=True)


def test_a_description_that_is_wrong_is_refused(model: Path, tmp_path: Path) -> None:
    data = save_to_disk(tmp_path / "set", [TEXTS[:5]])
    for files, message in (([], "names no file with rows"), ([{"filename": 5}], "names 5, and there is no such file")):
        (data / "state.json").write_text(json.dumps({"_data_files": files}))
        with pytest.raises(UserError, match=rf"state\.json {message}.*: copy the folder again"):
            prepare([str(data)], model, tmp_path / "out", arguments(), processes=1)


def test_lines_beside_a_data_set_are_read(model: Path, tmp_path: Path) -> None:
    data, out = save_to_disk(tmp_path / "set", [TEXTS[:5]]), tmp_path / "out"
    (data / "more.jsonl").write_text(json.dumps({"text": TEXTS[5]}) + "\n")
    prepare([str(data)], model, out, arguments(), processes=1)
    assert documents_in(out) == TEXTS[:6]


def test_a_stream_that_was_cut_between_batches_is_listed(model: Path, tmp_path: Path) -> None:
    """To pyarrow it is whole."""
    path, out = tmp_path / "cut.arrow", tmp_path / "out"
    write_arrow(path, [*TEXTS[:600]])
    whole = path.read_bytes()
    sizes = []
    for size in range(len(whole) - 8, 0, -8):
        try:
            with pyarrow.ipc.open_stream(pyarrow.py_buffer(whole[:size])) as reader:
                sizes.append((size, reader.read_all().num_rows))
        except (OSError, pyarrow.ArrowException):
            continue
    assert {n for _, n in sizes} >= {300, 600}
    size = next(size for size, n in sizes if n == 300)
    path.write_bytes(whole[:size])
    prepare([str(path)], model, out, arguments(), processes=1)
    assert documents_in(out) == TEXTS[:300]
    assert (out / "skipped.tsv").read_text().startswith(f"damaged\t{path}")


def test_a_cache_and_arrow_with_an_index(model: Path, tmp_path: Path) -> None:
    cache, out = tmp_path / "cache", tmp_path / "out"
    cache.mkdir()
    (cache / "dataset_info.json").write_text("{}")
    table = pyarrow.table({"text": pyarrow.array([*TEXTS[:299], None], pyarrow.large_string())})
    with pyarrow.ipc.new_file(str(cache / "web-train.arrow"), table.schema) as writer:
        writer.write_table(table)
    whole = (cache / "web-train.arrow").read_bytes()
    write_arrow(tmp_path / "cut.arrow", [*TEXTS[300:]])
    cut = tmp_path / "cut.arrow"
    cut.write_bytes(cut.read_bytes()[:-1000])
    (tmp_path / "empty.arrow").touch()
    write_arrow(cache / "cache-ab.arrow", ["of a map"])
    inputs = [str(cache), str(cut), f"{tmp_path}/empty.arrow"]
    prepare(inputs, model, out, arguments(), processes=1)
    assert (cache / "web-train.arrow").read_bytes() == whole
    assert documents_in(out) == TEXTS[:299] + TEXTS[300:600]  # the first batch of what was cut
    assert (out / "skipped.tsv").read_text().splitlines() == [
        f"beside_data\t{cache}/cache-ab.arrow", f"beside_data\t{cache}/dataset_info.json",
        f"no_text\t{cache}/web-train.arrow:300", f"damaged\t{cut}:301", f"damaged\t{tmp_path}/empty.arrow",
    ]  # fmt: skip


def test_labels_of_columns(tmp_path: Path) -> None:
    import pyarrow.parquet

    meta = pyarrow.array([{"from": "web", "n": 1}, {"from": None, "n": 2}, None])
    language = pyarrow.array(["zh", "en", "zh"]).dictionary_encode()
    broken = pyarrow.array([b"a", b"\xff", b"c"], pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"text": broken, "meta": meta, "language": language, "score": [0.5, 0.5, 0.5]})
    path = str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(table, path)
    with pyarrow.OSFile(f"{tmp_path}/a.arrow", "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    for key, values in (
        ("language", ["zh", "en", "zh"]),
        ("meta.from", ["web", None, None]),
        ("meta.n", ["1", "2", None]),
    ):
        for kind in (".parquet", ".arrow"):
            module.check_table(path.replace(".parquet", kind), kind, "text", key)
            parts = list(module.table_lines(path.replace(".parquet", kind), kind, 1000, "text", key))
            lines = b"".join(lines for lines, _ in parts).splitlines()
            assert [json.loads(lines[0]), lines[1], json.loads(lines[2])] == [
                {"text": "a", key: values[0]}, b"\xff", {"text": "c", key: values[2]},
            ]  # fmt: skip
    for key, message in (
        ("lang", "no column 'lang' among "),
        ("meta.to", "no column 'meta.to'"),
        ("score", "holds double"),
    ):
        with pytest.raises(UserError, match=rf"a\.parquet: .*{message}.*: set --split-by"):
            module.check_table(path, ".parquet", "text", key)
