import subprocess
import sys
from pathlib import Path

from tests.helpers import ROOT
from tools.code_lines import code_lines, count

TOOL = ROOT / "tools" / "code_lines.py"
SOURCE = '''\
"""A module.

Of three lines."""

import math  # a line of code with a comment


# a comment
def area(r: float) -> float:
    """One line."""

    text = """two
    lines of code"""
    return len(text) * (
        math.pi
        # between two lines of one statement

        * r**2
    )


class Point:
    x: int = 0
    """Of a field."""
    y: int = 0; "code before a string that stands alone"
'''


def tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], text=True, capture_output=True)


def test_docstrings_comments_and_blank_lines_do_not_count() -> None:
    code = ["import", "def", "text", "lines", "return", "math.pi", "r**2", ")", "class", "x", "y"]
    assert code_lines(SOURCE) == len(code)
    assert code_lines("") == code_lines('"""A docstring alone."""\n') == 0


def test_each_folder_counts_without_those_in_it(tmp_path: Path) -> None:
    (tmp_path / "b" / "inner").mkdir(parents=True)
    (tmp_path / "b" / "one.py").write_text("x = 1\n")
    (tmp_path / "b" / "two.py").write_text("x = 1\ny = 2\n")
    (tmp_path / "b" / "inner" / "three.py").write_text("\n\nz = 3\n")
    (tmp_path / "b" / "run.sh").write_text("echo\n")
    # a folder that is named twice counts once
    found = count([tmp_path, tmp_path / "b" / "inner"])
    assert {name: sorted(lines) for name, lines in found.items()} == {
        f"{tmp_path}/b/": [1, 2],
        f"{tmp_path}/b/inner/": [1],
    }


def test_the_table_adds_up() -> None:
    result = tool("tools", "launch")
    assert (result.returncode, result.stderr) == (0, "")
    head, line, *rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in result.stdout.splitlines()]
    assert (head, line) == (["folder", "files", "code lines"], ["---", "--:", "--:"])
    assert [row[0] for row in rows][:2] == ["launch/", "tools/"] and rows[-1][0] == "all"
    for column in (1, 2):
        *parts, total = [int(row[column].replace(",", "")) for row in rows]
        assert sum(parts) == total > 0
    assert len(list((ROOT / "launch").glob("*.py"))) == int(rows[0][1])


def test_a_folder_that_is_not_there_is_refused() -> None:
    result = tool("megakexue", "nowhere")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: nowhere: no such folder in {ROOT}\n"


def test_help_shows_an_example() -> None:
    result = tool("--help")
    assert result.returncode == 0
    assert "tools/code_lines.py megakexue/core tests/core" in result.stdout
