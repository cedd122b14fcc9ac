"""The shape of the repository: import levels, one owner for each package, and the README's tree."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = [
    {"config"},
    {"dist", "tokenizer", "rope", "optim", "guard", "metrics"},
    {"attention", "loss", "data", "prepare", "preemption"},
    {"model"},
    {"engine", "describe", "grow"},
    {"checkpoint"},
    {"export", "evaluate"},
    {"generate", "replay", "train"},
]
OWNERS = {
    "omegaconf": {"config", "export"},  # export writes and reads the bundle's YAML
    "sentencepiece": {"tokenizer"},
    "google": {"tokenizer"},
    "streaming": {"data"},
    "xxhash": {"prepare"},
    "pyarrow": {"prepare"},
    "zstandard": {"prepare"},
    "flash_attn": {"attention"},
    "deepspeed": {"engine"},
    "safetensors": {"checkpoint", "export", "replay"},
    "rich": {"metrics"},
    "transformers": set(),
}


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


MODULES = {path.stem: path for path in (ROOT / "megakexue").glob("*.py") if path.stem != "__init__"}


def test_every_module_has_a_level() -> None:
    assert set(MODULES) == set().union(*LEVELS)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_only_from_lower_levels(name: str) -> None:
    level = next(i for i, names in enumerate(LEVELS) if name in names)
    lower = set().union(*LEVELS[:level])
    used = {found.split(".")[1] for found in imports(MODULES[name]) if found.startswith("megakexue.")}
    assert used & set(MODULES) <= lower


@pytest.mark.parametrize("package", sorted(OWNERS))
def test_each_package_has_one_owner(package: str) -> None:
    users = {name for name, path in MODULES.items() if any(m.split(".")[0] == package for m in imports(path))}
    assert users == OWNERS[package]


def test_readme_shows_the_real_tree() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```text\n(megakexue/.*?)```", readme, re.DOTALL)
    assert block is not None
    shown, folder = set(), ""
    for line in block.group(1).splitlines():
        name = line.split()[0] if line.split() else ""
        if line.startswith(" "):
            shown.add(folder + name)
        elif name.endswith("/"):
            folder = name
        elif name:
            shown.add(name)
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("the sources are not in a git repository, so the real tree is not known")
    real = {path for path in listed.stdout.splitlines() if (ROOT / path).exists()}
    # golden losses and the test files are summed up in one line each
    summed = {path for path in real if path.startswith("tests/")} | {
        path for path in shown if path.startswith("tests/")
    }
    assert shown - summed == real - summed


def test_every_test_file_mirrors_a_module_or_a_tool() -> None:
    tested = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")}
    assert tested <= set(MODULES) | tools | {"layout", "golden", "recovery"}
    assert set(MODULES) <= tested


def test_documents_link_to_files_that_exist() -> None:
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_programs_are_executable_and_explain_themselves() -> None:
    programs = [ROOT / "launch" / "train.py", *(ROOT / "tools").glob("*.py")]
    for path in programs:
        text = path.read_text(encoding="utf-8")
        assert path.stat().st_mode & 0o111 and text.startswith("#!/usr/bin/env python\n"), path
        assert "run_program(main)" in text, path
