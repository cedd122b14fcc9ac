"""Hashes and manifests find every kind of damage, and a file or folder is found complete or not at all."""

import errno
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megakexue import files
from megakexue.config import UserError
from megakexue.files import (
    new_files,
    new_folder,
    read_json,
    require_new_file,
    seal,
    sha256,
    sync_folder,
    verify,
    write_json,
    write_whole,
)
from tests.conftest import Prepared
from tests.helpers import ROOT, tiny_run
from tests.programs import run_with_mounts


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What is pushed to the disk, in order."""
    paths: list[Path] = []
    monkeypatch.setattr(files.os, "fsync", lambda handle: paths.append(Path(os.readlink(f"/proc/self/fd/{handle}"))))
    return paths


@pytest.mark.parametrize("size", [0, 3, 3_000_000])
def test_sha256_and_seal(size: int, tmp_path: Path, synced: list[Path]) -> None:
    path, data = tmp_path / "a", os.urandom(size)
    path.write_bytes(data)
    assert sha256(path) == sha256(str(path)) == hashlib.sha256(data).hexdigest()
    assert synced == []
    assert seal(path) == {"size": size, "sha256": hashlib.sha256(data).hexdigest()}
    assert synced == [path]


def test_a_sealed_file_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    for umask, mode in ((0o022, 0o644), (0o027, 0o640), (0o077, 0o600)):
        old = os.umask(umask)
        try:
            path = tmp_path / f"{umask}.safetensors"
            save_file({"a": torch.zeros(2)}, path)
            assert path.stat().st_mode & 0o777 == 0o600, "safetensors has changed: seal need not do this"
            seal(path)
        finally:
            os.umask(old)
        assert path.stat().st_mode & 0o777 == mode
    assert names(tmp_path) == [f"{umask}.safetensors" for umask in (0o022, 0o027, 0o077)]


def test_sync_folder(tmp_path: Path, synced: list[Path]) -> None:
    n_open = len(os.listdir("/proc/self/fd"))
    sync_folder(tmp_path)
    assert synced == [tmp_path] and len(os.listdir("/proc/self/fd")) == n_open


def test_json_comes_back(tmp_path: Path) -> None:
    path, value = tmp_path / "a.json", {"text": "虎 \ud800", "numbers": [1, 0.1, None]}
    write_json(path, value)
    assert read_json(path, "a") == read_json(str(path), "a") == value
    assert path.read_text().startswith('{\n "text": ') and path.read_text().endswith("}\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "a.json: cannot read the manifest: .*No such file"),
        (b'{"a": 1', "a.json: cannot read the manifest: Expecting ',' delimiter"),
        (b'{"a": "\xff"}', "a.json: cannot read the manifest: 'utf-8' codec can't decode"),
        (b"[1]", "a.json: the manifest must be a JSON object"),
        (b'{"a": ' + b"[" * 100_000, "a.json: cannot read the manifest: it is nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "a.json: cannot read the manifest: Exceeds the limit"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_read_json_says_what_is_wrong(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_json(tmp_path / "a.json", "the manifest")


def test_write_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "latest"
    for text in ("first", "虎"):
        write_whole(path, text)
        assert path.read_text(encoding="utf-8") == text and names(tmp_path) == ["latest"]

    def fail(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "third")
    assert path.read_text(encoding="utf-8") == "虎"


def test_require_new_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    require_new_file("--plot", path, overwrite=False)
    path.write_text("old")
    with pytest.raises(UserError, match=r"--plot .*/a exists: choose another name or add --overwrite"):
        require_new_file("--plot", path, overwrite=False)
    require_new_file("--plot", path, overwrite=True)
    with pytest.raises(UserError, match=r"--plot .*/none/a: there is no folder .*/none$"):
        require_new_file("--plot", tmp_path / "none" / "a", overwrite=True)
    assert path.read_text() == "old"


# ---------------------------------------------------------------------------------------------------------- new_folder


def test_a_new_folder_takes_its_name_when_it_is_done(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with new_folder(out) as folder:
        assert folder == tmp_path / "deep" / ".out.partial" and names(folder) == ["lock"]
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text("a")
        assert not out.exists()
    assert names(tmp_path / "deep") == ["out"] and names(out) == ["inner"]
    assert (out / "inner" / "a").read_text() == "a"


def test_an_old_folder_is_replaced_only_when_the_new_one_is_done(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    (tmp_path / ".out.old").mkdir()  # what a writer that was killed between two renames leaves
    (tmp_path / ".out.old" / "older").write_text("older")
    with new_folder(out) as folder:
        (folder / "new").write_text("new")
        assert names(out) == ["old"]
    assert names(tmp_path) == ["out"] and names(out) == ["new"]


@pytest.mark.parametrize("error", [ValueError, UserError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("has_old", [False, True])
def test_a_failure_removes_the_new_folder_and_keeps_the_old(
    error: type[BaseException], has_old: bool, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if has_old:
        out.mkdir()
        (out / "old").write_text("old")
    with pytest.raises(error), new_folder(out) as folder:
        (folder / "inner").mkdir()
        raise error
    assert names(tmp_path) == (["out"] if has_old else [])
    assert not has_old or (out / "old").read_text() == "old"


def test_leftovers_are_removed(tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    (partial / "inner" / "deep").mkdir(parents=True)
    for name in ("a", "lock", "inner/b"):
        (partial / name).write_text("left over")
    with new_folder(tmp_path / "out") as folder:
        assert folder == partial and names(folder) == ["lock"]
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == []


def test_a_second_writer_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
        with pytest.raises(UserError, match=r"--out .*/out: another run is writing it"):
            with new_folder(tmp_path / "out"):
                pytest.fail("two writers")
        with new_folder(tmp_path / "other"):
            pass
    assert names(tmp_path / "out") == ["a"]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(file: Any, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
    assert names(tmp_path / "out") == ["a"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"WARNING: {tmp_path} is on a file system without locks (flock): a second writer of the same name at the same "
        "time would not be noticed"
    )


def test_a_folder_that_is_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "disk" / "out").mkdir(parents=True)
    (tmp_path / "disk" / "out" / "old").touch()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    with new_folder(tmp_path / "out") as folder:
        (folder / "new").touch()
    assert (tmp_path / "out").is_symlink() and names(tmp_path) == ["disk", "out"]
    assert names(tmp_path / "disk") == ["out"] and names(tmp_path / "disk" / "out") == ["new"]


def test_the_old_folder_comes_back_when_the_last_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, rename = tmp_path / "out", Path.rename
    out.mkdir()
    (out / "old").touch()

    def failing(self: Path, target: Path) -> Path:
        if self.name == ".out.partial":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no"), new_folder(out):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (out / "old").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    message = r"--out .*/file/out cannot be written: Not a directory: choose another place"
    with pytest.raises(UserError, match=message), new_folder(tmp_path / "file" / "out"):
        pytest.fail("made")
    with pytest.raises(UserError, match="name too long: choose a shorter name"), new_folder(tmp_path / ("a" * 250)):
        pytest.fail("made")
    with pytest.raises(UserError, match=r"--out \. has no name of its own"), new_folder(Path(".")):
        pytest.fail("made")


def test_an_error_of_reading_is_not_one_of_writing(tmp_path: Path) -> None:
    """An input that fails while a folder is written: the caller, who knows the input, says so."""
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "out"):
        (tmp_path / "input").read_text()
    with pytest.raises(PermissionError), new_folder(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "out2"))
    with pytest.raises(UserError, match=r"out cannot be written: Input/output error: check the disks that"):
        with new_folder(tmp_path / "out"):
            raise OSError(errno.EIO, "Input/output error")  # whose disk it is, the system does not say
    assert names(tmp_path) == []


# ------------------------------------------------------------------------------------------------------------ new_files


def test_new_files_take_their_names_together(tmp_path: Path) -> None:
    out, facts = tmp_path / "t.model", tmp_path / "t.json"
    out.write_text("old")
    (tmp_path / ".t.model.partial").mkdir()
    (tmp_path / ".t.model.partial" / "t.model").write_text("of a killed one")
    for n in (1, 2):
        with new_files(out, facts) as folder:
            assert folder == tmp_path / ".t.model.partial" and names(folder) == ["lock"]
            (folder / "t.model").write_text(f"model {n}")
            (folder / "t.json").write_text(f"facts {n}")
            (folder / "scratch").mkdir()
            assert out.read_text() == ("old" if n == 1 else "model 1")
            with pytest.raises(UserError, match=r"--out .*/t\.model: another run is writing it"), new_files(out):
                pytest.fail("two writers")
        assert names(tmp_path) == ["t.json", "t.model"]
        assert out.read_text() == f"model {n}" and facts.read_text() == f"facts {n}"
    with pytest.raises(KeyboardInterrupt), new_files(out, facts) as folder:
        (folder / "t.model").write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["t.json", "t.model"] and out.read_text() == "model 2"
    facts.unlink()
    facts.mkdir()
    with pytest.raises(UserError, match=r"t\.json is a folder: choose another name"), new_files(out, facts):
        pytest.fail("began")


# ----------------------------------------------------------------------------------------------- places full or closed

WRITERS = """
import sys
from pathlib import Path
from megakexue.config import UserError
from megakexue.files import new_files, new_folder, require_new_file, write_whole

def folder(out):
    with new_folder(out) as folder:
        (folder / "a").write_bytes(bytes(500_000))

def files(out):
    with new_files(out, out.with_suffix(".json")) as folder:
        (folder / out.with_suffix(".json").name).write_text("{}")
        (folder / out.name).write_bytes(bytes(500_000))

def whole(out):
    write_whole(out, bytes(500_000))

def checked(out):
    require_new_file("--json", out, False)
    whole(out)

for place in sys.argv[1:]:
    before = sorted(path.name for path in Path(place).iterdir())
    for write in (folder, files, whole, checked):
        try:
            write(Path(place, "out"))
        except UserError as error:
            print(write.__name__, error)
        assert sorted(path.name for path in Path(place).iterdir()) == before, write
"""


def test_a_full_and_a_closed_place_are_one_line_and_hold_nothing(tmp_path: Path) -> None:
    script = """
    mkdir $1/full $1/closed; mount -t tmpfs -o size=300k none $1/full; mount -t tmpfs none $1/closed
    mkdir $1/closed/.out.partial; mount -o remount,ro $1/closed
    exec "$2" -c "$3" $1/full $1/closed"""
    done = run_with_mounts(script, str(tmp_path), sys.executable, WRITERS)
    assert done.returncode == 0, done.stderr
    full, closed = (
        f"out cannot be written: {text}, or choose another place"
        for text in ("No space left on device: make room there", "Read-only file system: mount it for writing")
    )
    assert done.stdout.splitlines() == [
        f"folder --out {tmp_path}/full/{full}", f"files --out {tmp_path}/full/{full}",
        f"whole {tmp_path}/full/{full}", f"checked {tmp_path}/full/{full}",
        f"folder --out {tmp_path}/closed/{closed}", f"files --out {tmp_path}/closed/{closed}",
        f"whole {tmp_path}/closed/{closed}",
        f"checked --json {tmp_path}/closed/out: {tmp_path}/closed is read-only: choose another place",
    ]  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- verify


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """A folder of two files and a manifest, and one file that is not in the manifest."""
    folder = tmp_path / "sealed"
    folder.mkdir()
    for name in ("b", "a", "other"):
        (folder / name).write_text(f"this is {name}")
    write_json(folder / "manifest.json", {"format": 7, "files": {name: seal(folder / name) for name in ("b", "a")}})
    return folder


def test_verify_names_the_files(sealed: Path) -> None:
    assert verify(sealed, 7) == ["a", "b"]
    (sealed / "other").unlink()
    assert verify(sealed, 7, check_hashes=False) == ["a", "b"]


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Return a function that changes the manifest of a folder."""

    def apply(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        write_json(folder / "manifest.json", manifest)

    return apply


NO_HASHES = r"manifest\.json is damaged: it has no sizes and hashes of files; copy the folder again"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), "manifest.json: cannot read the manifest: .*No such file"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json: cannot read the manifest: Expecting"),
        (edit(lambda m: m.update(format=8)), "json: format 8 is not 7: use the version of megakexue that wrote it"),
        (edit(lambda m: m.pop("format")), "json: format None is not 7: use the version of megakexue that wrote it"),
        (edit(lambda m: m.pop("files")), NO_HASHES),
        (edit(lambda m: m.update(files=["a"])), NO_HASHES),
        (edit(lambda m: m["files"].update(a="hash")), NO_HASHES),
        (edit(lambda m: m["files"]["a"].pop("size")), NO_HASHES),
        (edit(lambda m: m["files"]["a"].pop("sha256")), NO_HASHES),
        (edit(lambda m: m["files"].update({"../x": m["files"]["a"]})), "names '../x', which is outside the folder"),
        (lambda f: (f / "a").unlink(), "sealed/a is missing: copy the folder again"),
        (lambda f: (f / "b").write_text("this is b!"), "b is damaged: it has 10 bytes instead of 9; copy the folder"),
    ],
)
@pytest.mark.parametrize("check_hashes", [True, False])
def test_verify_finds(damage: Callable[[Path], object], message: str, check_hashes: bool, sealed: Path) -> None:
    damage(sealed)
    with pytest.raises(UserError, match=message):
        verify(sealed, 7, check_hashes=check_hashes)


def test_verify_finds_other_bytes_by_their_hash(sealed: Path) -> None:
    (sealed / "a").write_text("this is A")
    assert verify(sealed, 7, check_hashes=False) == ["a", "b"]
    message = r"sealed/a is damaged: its sha256 is not that of manifest\.json; copy the folder again"
    with pytest.raises(UserError, match=message):
        verify(sealed, 7)


PROGRAMS = """
import contextlib, io, json, os, runpy, sys, traceback
from pathlib import Path

root, results, environment = Path(sys.argv[1]), [], dict(os.environ)
sys.path.insert(0, str(root / "tools" / "experiments"))
for program, *arguments in json.load(sys.stdin):
    sys.argv, err = [program, *arguments], io.StringIO()
    os.environ.clear()
    os.environ.update(environment)
    if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
        sys.modules["torch"].distributed.destroy_process_group()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(str(root / program), run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            code = traceback.format_exc()
    results.append((code, err.getvalue()))
json.dump(results, sys.stdout)
"""


@pytest.mark.slow
def test_every_program_says_which_place_cannot_be_written(prepared: Prepared, tmp_path: Path) -> None:
    """On a real full disk and on a read-only one, one line with the place and the remedy; and nothing is left."""
    full, closed, run = tmp_path / "full", tmp_path / "closed", tmp_path / "run"
    bundle, data, tokenizer = tmp_path / "bundle", str(prepared.data), str(prepared.tokenizer)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(map(str, range(300_000))))
    tiny = str(ROOT / "configs" / "tiny_gqa.yaml")
    options = tiny_run(prepared, run, "train.steps=2", "checkpoint.every_steps=2", "evaluate.every_steps=null")
    # what can be written is; then what cannot
    commands: list[list[str]] = [
        ["launch/train.py", tiny, *options],
        ["tools/export_model.py", str(run), "--out", str(bundle)],
    ]
    n_good = len(commands)
    for place in (full, closed):
        out = str(place / "out")
        commands += [
            ["tools/prepare_data.py", str(text), "--tokenizer", tokenizer, "--seq-len", "64", "--processes", "1",
             "--out", out],
            ["launch/train.py", tiny, *options, f"train.run={out}"],
            ["tools/export_model.py", str(run), "--out", out],
            ["tools/grow_model.py", str(run), "--config", tiny, "--out", out, *options, "model.d_ff=64"],
            ["tools/evaluate.py", str(bundle), data, "--n-rows", "1", "--json", f"{out}.json"],
            ["tools/plot_run.py", str(run), "--out", f"{out}.png"],
            ["tools/compare_losses.py", "--write-golden", f"{out}.txt", str(run)],
            ["tools/rope_base.py", "--d-rotary", "32", "--context", "256", "--plot", f"{out}.png"],
            ["tools/experiments/growth_axes.py", "--out", f"{out}.png"],
        ]  # fmt: skip
    commands += [
        ["launch/train.py", tiny, *options, f"train.run={closed / 'run'}"],
        ["tools/verify_resume.py", tiny, *options, "--steps", "2", "train.steps=4", "--out", f"{closed}/out"],
        ["tools/replay_step.py", str(run), "--json", f"{closed}/out.json"],
        ["tools/benchmarks/save.py", tiny, "--out", f"{closed}/out"],
        ["tools/benchmarks/grow.py", tiny, tiny, "--scratch", f"{closed}/out"],
    ]
    script = """
    mkdir $1/full $1/closed; mount -t tmpfs -o size=64k none $1/full; mount -t tmpfs none $1/closed
    mkdir -p $1/closed/run/logs; touch $1/closed/run/lock; mount -o remount,ro $1/closed
    head -c 1M /dev/zero > $1/full/filled 2> /dev/null || true
    "$2" -c "$3" $4
    echo left: $(ls -A $1/full) $(ls -A $1/closed) >&2"""
    names = (str(tmp_path), sys.executable, PROGRAMS, str(ROOT))
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = run_with_mounts(script, *names, input=json.dumps(commands), env=environment)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert [code for code, _ in results[:n_good]] == [0] * n_good, results[:n_good]
    for command, (code, err) in zip(commands[n_good:], results[n_good:], strict=True):
        place = full if any(str(full) in word for word in command) else closed
        last = err.splitlines()[-1] if err else ""
        assert code == 2 and last.startswith("error: ") and str(place) in last, (command, code, err)
        assert ("make room" in last) == (place == full) and "Traceback" not in err, err
    assert done.stderr.splitlines()[-1] == "left: filled run"
