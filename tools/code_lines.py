#!/usr/bin/env python
"""Count the lines of code by folder: what is left of the Python files without docstrings, comments and blank lines."""

import argparse
import ast
import io
import tokenize
from collections import defaultdict
from pathlib import Path

from megakexue.config import require, run_program

EPILOG = """\
Each row counts the .py files of one folder, without those of the folders in it; the last row counts all. A docstring is
any string that stands alone as a statement, such as the one below a field. Shell scripts are not counted.

examples:
  tools/code_lines.py
  tools/code_lines.py megakexue/core tests/core
"""

ROOT = Path(__file__).parents[1]
FOLDERS = [Path(name) for name in ("megakexue", "tools", "launch", "tests")]
LAYOUT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
}  # fmt: skip


def code_lines(text: str) -> int:
    """Return the number of lines that hold code: any token but comments, line ends and docstrings."""
    docstrings = {
        (node.lineno, node.col_offset)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT and token.start not in docstrings:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines)


def count(folders: list[Path]) -> dict[str, list[int]]:
    """Return the code lines of each file, by the name of its folder, with folders in order."""
    counts = defaultdict(list)
    for path in sorted({path for folder in folders for path in folder.rglob("*.py")}):
        counts[f"{path.parent}/"].append(code_lines(path.read_text(encoding="utf-8")))
    return dict(sorted(counts.items()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Count the lines of code by folder: no docstrings, no comments, no blank lines.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folders", metavar="FOLDER", nargs="*", type=Path, default=FOLDERS,
        help=f"folders of the repository (default: {' '.join(map(str, FOLDERS))})",
    )  # fmt: skip
    for folder in (folders := parser.parse_intermixed_args().folders):
        require((ROOT / folder).is_dir(), f"{folder}: no such folder in {ROOT}")
    counts = count([ROOT / folder for folder in folders])
    rows = [(name.removeprefix(f"{ROOT}/"), len(lines), sum(lines)) for name, lines in counts.items()]
    rows.append(("all", sum(n for _, n, _ in rows), sum(lines for _, _, lines in rows)))
    print("| folder | files | code lines |\n|---|--:|--:|")
    for name, n_files, n_lines in rows:
        print(f"| {name} | {n_files} | {n_lines:,} |")


if __name__ == "__main__":
    run_program(main)
