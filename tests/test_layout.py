"""The shape of the repository: import levels, one owner for each package, and the tree of docs/design.md."""

import argparse
import ast
import re
import runpy
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT
from tests.programs import run_git

FOLDERS = {
    "": set(),
    "text": {"config", "files"},  # files and processes, no torch
    "core": {"config"},  # torch, no files and no ranks
    "bundle": {"config", "files", "text", "core"},  # one bundle in one process
    "run": {"config", "files", "buckets", "launcher", "facts", "dist", "text", "core", "bundle"},  # ranks and DeepSpeed
}
"""What each folder may import beside itself: modules of the top, and folders."""
LEVELS = {
    "": [{"config"}, {"files", "hosts"}, {"buckets", "facts", "launcher"}, {"dist", "doctor"}],
    "text": [
        {"tokenizer", "tables", "duplicates", "pack", "shards", "progress"},
        {"token_files", "tokenizer_json"},
        {"inputs", "tokenizer_files"},
        {"ledger", "manifest"},
        {"prepare"},
    ],
    "core": [
        {"device", "axes", "sequence", "recompute", "owners", "entropy"},
        {"costs", "batch", "bases", "attention", "loss", "schedule", "segments", "rules", "muon"},
        {"resolve", "rope", "optim", "plan"},
        {"decoder"},
        {"describe"},
    ],
    "bundle": [
        {"bundle", "axis_maps", "modeling_megakexue", "families", "hf_config", "imported_tokenizer"},
        {"generate", "evaluate", "grow_checks", "hf_import"},
        {"grow", "needle", "hf_check", "hf_tokenizer", "harness"},
        {"trace", "grow_report", "hf_export"},
    ],
    "run": [
        {"order", "source", "records", "guard", "preemption", "zero", "rendezvous", "sinks", "profiling", "clock"},
        {"rows", "by_source", "metrics", "state", "folder", "watch", "curves"},
        {"data", "engine", "report"},
        {"checkpoint"},
        {"saves", "resume", "export", "replay"},
        {"exporter"},
        {"train"},
    ],
}
"""Inside a folder, a module imports from lower levels only."""
OWNERS = {
    "omegaconf": {"config"},
    "yaml": {"config"},
    "sentencepiece": {"text.tokenizer", "bundle.hf_tokenizer"},
    "google": {"text.tokenizer"},
    "rjieba": {"text.tokenizer"},
    "tokenizers": {"text.tokenizer_json"},
    "streaming": {"buckets", "run.source"},
    "xxhash": {"text.duplicates", "text.shards", "run.source"},
    "pyarrow": {"text.tables"},
    "zstandard": {"text.inputs"},
    "deepspeed": {"run.engine"},
    "safetensors": {"bundle.bundle", "bundle.hf_import", "run.checkpoint", "run.replay"},
    "gguf": {"bundle.hf_import"},
    "wandb": {"run.sinks"},
    "mlflow": {"run.sinks"},
    "rich": {"run.metrics", "text.progress"},
    "charset_normalizer": {"text.ledger"},
    "lm_eval": {"bundle.harness"},
    "jinja2": {"bundle.harness"},
    "tqdm": {"bundle.harness"},
    "transformers": {"bundle.hf_check", "bundle.modeling_megakexue"},
}


@cache
def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def dotted(path: Path) -> str:
    """The name of a module below megakexue, such as run.train."""
    return ".".join(path.relative_to(ROOT / "megakexue").with_suffix("").parts)


ARTICLES = {
    "7469", "8209", "8444", "8634", "8823", "8978", "9105", "9473", "9512", "9593", "9675", "9687", "9698", "9706",
    "9708", "9736", "9797", "9811", "9812", "9859", "9948", "10091", "10122", "10592", "10739",
}  # fmt: skip
"""Of 科学空间, by the numbers of their addresses."""


def tracked(root: Path = ROOT) -> list[Path]:
    """The files of the repository, without what its user keeps beside them; in a tarball, those of its folders."""
    try:
        names = run_git(root, "ls-files", "-z").split("\0")
    except (FileNotFoundError, subprocess.CalledProcessError):
        folders = ("configs", "docs", "launch", "megakexue", "tests", "tools")
        names = [str(path) for folder in folders for path in (root / folder).rglob("*")]
    paths = [root / name for name in names]
    return sorted(path for path in paths if path.is_file() and "__pycache__" not in path.parts)


FILES = tracked()
PYTHON = [path for path in FILES if path.suffix == ".py"]
READMES = [ROOT / "README.md", ROOT / "README.zh.md"]
DOCUMENTS = [*READMES, *(path for path in FILES if path.suffix == ".md" and path.parent == ROOT / "docs")]


def below(*folders: str) -> list[Path]:
    """The Python files in some folders of the repository."""
    return [path for path in PYTHON if path.relative_to(ROOT).parts[0] in folders]


MODULES = {dotted(path): path for path in below("megakexue") if path.stem != "__init__"}


def folder_of(module: str) -> str:
    return module.rpartition(".")[0]


def own_imports(module: str) -> set[str]:
    """The modules of ours that a module imports."""
    found = {name.removeprefix("megakexue.") for name in imports(MODULES[module])}
    return found & MODULES.keys()


def test_every_module_has_a_level() -> None:
    named = {f"{folder}.{name}".lstrip(".") for folder, levels in LEVELS.items() for name in set().union(*levels)}
    assert set(MODULES) == named


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_folder_imports_only_what_its_code_may_know(module: str) -> None:
    folder = folder_of(module)
    allowed = FOLDERS[folder]
    used = {name for name in own_imports(module) if folder_of(name) != folder}
    assert {name for name in used if folder_of(name) not in allowed and name not in allowed} == set()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_from_lower_levels_of_its_folder(module: str) -> None:
    folder, _, own = module.rpartition(".")
    level = next(i for i, names in enumerate(LEVELS[folder]) if own in names)
    lower = set().union(*LEVELS[folder][:level])
    used = {name.rpartition(".")[2] for name in own_imports(module) if folder_of(name) == folder}
    assert used <= lower


@pytest.mark.parametrize("package", sorted(OWNERS))
def test_each_package_has_one_owner(package: str) -> None:
    users = {name for name, path in MODULES.items() if any(m.split(".")[0] == package for m in imports(path))}
    assert users == OWNERS[package]


def test_text_config_and_costs_do_without_torch() -> None:
    others = "config", "files", "launcher", "hosts", "facts", "doctor", "core.axes", "core.costs", "core.plan"
    names = [f"megakexue.{name}" for name in MODULES if folder_of(name) == "text" or name in others]
    code = f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\nprint('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def tree(document: Path) -> set[str]:
    """The paths in the first block of a document that begins with megakexue/; folders end in a slash."""
    block = re.search(r"```text\n(megakexue/.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    shown: set[str] = set()
    parents: list[tuple[int, str]] = []
    for line in block.group(1).splitlines():
        name, indent = line.split()[0], len(line) - len(line.lstrip())
        parents = [(at, folder) for at, folder in parents if at < indent]
        path = (parents[-1][1] if parents else "") + name
        shown.add(path)
        if name.endswith("/"):
            parents.append((indent, path))
    return shown


def real_files() -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in FILES}


def test_what_a_user_keeps_beside_the_code_is_not_looked_at(tmp_path: Path) -> None:
    for name in ("tools/a.py", "tools/__pycache__/a.pyc", "runs2/first/config.yaml", "tools/mine.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    in_a_tarball = tracked(tmp_path)
    assert [path.name for path in in_a_tarball] == ["a.py", "mine.py"]
    run_git(tmp_path, "init", "--quiet")
    run_git(tmp_path, "add", "tools/a.py")
    assert tracked(tmp_path) == [tmp_path / "tools" / "a.py"]


def test_design_has_a_line_for_each_file() -> None:
    real = {p for p in real_files() if "/" in p and not p.startswith((".", "tests/")) and not p.endswith("__init__.py")}
    assert {path for path in tree(ROOT / "docs" / "design.md") if not path.endswith("/")} == real


def test_articles_are_links_at_their_first_use() -> None:
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        linked = set(re.findall(r"\[(\d{4,5})\]\(https://kexue\.fm/archives/\1\)", text))
        # plain numbers in parentheses, such as (8823) and (10091, DeepSeek-V2), are those of articles
        named = set(re.findall(r"[(;,] ?(\d{4,5})(?=[);,])", re.sub(r"```.*?```", "", text, flags=re.DOTALL)))
        for number in named & ARTICLES | linked:
            first = re.search(rf"\b{number}\b", text)
            assert number in linked, f"{path.name}: {number} is not linked"
            assert first is not None and text[first.start() - 1] == "[", f"{path.name}: {number} is linked too late"


def test_every_test_file_mirrors_a_module_or_a_program() -> None:
    tested = {
        ".".join([*path.relative_to(ROOT / "tests").parts[:-1], path.stem.removeprefix("test_")])
        for path in below("tests")
        if path.name.startswith("test_")
    }
    started = [path for path in FILES if path.parent == ROOT / "launch"]  # by Slurm and Kubernetes too
    programs = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in [*started, *below("tools")]}
    assert tested <= set(MODULES) | programs | {"layout", "golden", "run.recovery", "docs"}
    assert set(MODULES) <= tested


def test_the_chinese_readme_has_the_same_commands() -> None:
    blocks = [re.findall(r"```bash\n.*?```", path.read_text("utf-8"), re.DOTALL) for path in READMES]
    assert blocks[1] == blocks[0]


def headings(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in found]
    return {re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in plain}


def test_documents_link_to_files_that_exist() -> None:
    for path in DOCUMENTS:
        for target, anchor in re.findall(r"\]\(([^)#:]*)(#[^):]+)?\)", path.read_text(encoding="utf-8")):
            file = path.parent / target if target else path
            assert file.exists(), f"{path.name} links to {target}"
            assert not anchor or anchor[1:] in headings(file), f"{path.name} links to {target}{anchor}"
            assert not (path.parent.name == "docs" and target.startswith("..")), f"{path.name}: {target} is on no site"


def test_documents_name_files_that_exist() -> None:
    for path in DOCUMENTS:
        for name in re.findall(r"`((?:tests|megakexue|tools|launch|configs)/[\w/]+\.\w+)`", path.read_text("utf-8")):
            assert (ROOT / name).exists(), f"{path.name} names {name}"


def test_programs_are_executable_and_explain_themselves() -> None:
    shared = ROOT / "tools" / "experiments" / "common.py"
    programs = {*below("launch", "tools")} - {shared}
    for path in programs:
        text = path.read_text(encoding="utf-8")
        assert path.stat().st_mode & 0o111 and text.startswith("#!/usr/bin/env python\n"), path
        assert "run_program(main)" in text, path


def test_shell_scripts_have_no_known_trap() -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("not installed: shellcheck")
    scripts = [path for path in FILES if path.suffix in (".sh", ".sbatch") or path.parent.name == ".ci"]
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert done.stdout + done.stderr == ""


class Captured(Exception):
    """A program has made its parser, and reads its arguments by a method of this name."""


PROGRAMS = {*(ROOT / "launch").rglob("*.py"), *(ROOT / "tools").rglob("*.py")}


def parser_of(program: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[argparse.ArgumentParser, str]:
    """Run a program until it reads its arguments; return its parser, and the method that it reads them with."""

    def capture(name: str) -> Any:
        def stop(parser: argparse.ArgumentParser, *_: Any) -> None:
            raise Captured(parser, name)

        return stop

    with monkeypatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, capture(name))
        with pytest.raises(Captured) as caught:
            runpy.run_path(str(program), run_name="a_program")["main"]()
    parser, name = caught.value.args
    return parser, name


def example(action: argparse.Action) -> str:
    return str(next(iter(action.choices))) if action.choices else "1"


@pytest.mark.parametrize(
    "program", sorted(PROGRAMS - {ROOT / "tools/experiments/common.py"}), ids=lambda path: path.stem
)
def test_programs_take_their_arguments_in_any_order(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parser, method = parser_of(program, monkeypatch)
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    # int and float would take numbers that nothing can hold
    assert [action.dest for action in actions if action.type in (int, float)] == []
    positionals = [
        example(action) for action in actions if not action.option_strings
        for _ in range(3 if action.nargs in ("*", "+") else 1)
    ]  # fmt: skip
    rivals = [action for group in parser._mutually_exclusive_groups for action in group._group_actions[1:]]
    options = [
        [action.option_strings[0], *([] if action.nargs == 0 else [example(action)])]
        for action in actions if action.option_strings and action.nargs not in ("*", "+") and action not in rivals
    ]  # fmt: skip
    mixed = []
    for i in range(max(len(positionals), len(options))):
        mixed += [*(options[i] if i < len(options) else []), *positionals[i : i + 1]]
    plain = [*positionals, *(word for option in options for word in option)]
    assert vars(getattr(parser, method)(mixed)) == vars(parser.parse_args(plain))
