#!/usr/bin/env python
"""Write the reference of all config keys, from the docstrings of megakexue/config.py."""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from megakexue import config
from megakexue.config import run_program
from megakexue.files import write_whole

EPILOG = """\
examples:
  tools/config_reference.py | less
  tools/config_reference.py --out docs/config.md      # what a test compares
"""
INTRODUCTION = """\
# Config reference

Every key of a run, its type, its default, and what it does. This page is made by `tools/config_reference.py` from
`megakexue/config.py`. A config is a YAML file, and `key=value` arguments that go on top:

```bash
launch/train.py configs/tiny_gqa.yaml optim.lr=1e-2 'data.sources=[{path: runs/demo/data, weight: 1}]'
```

`None` is written `null`. A number of four or five digits in brackets is an article of 科学空间
([articles.md](articles.md)). `tools/describe.py CONFIG key=value ...` shows what a config comes to, with every number
that was chosen for you.
"""
ARTICLE = re.compile(r"(?<=[(,] |.[(])((?:[5-9]|1[01])\d{3})(?=[,)])")
"""A number that stands alone in brackets, or between commas there, is an article."""
TREE = ast.parse(Path(config.__file__).read_text())
NAMED = {
    node.targets[0].id: ast.unparse(node.value)
    for node in TREE.body
    if isinstance(node, ast.Assign)
    and isinstance(node.targets[0], ast.Name)
    and ast.unparse(node.value).startswith("Literal[")
} | {"Place": "path"}
"""Types that have a name in config.py."""
ITEM = re.compile(r"^(\w+)(?: \(\w+ only\))?: ")
"""How a line begins that explains a value of a choice."""


@dataclass(frozen=True)
class Key:
    """A field of a config class, as its source says it."""

    name: str
    type: str
    default: str | None
    """None: the key must be given."""
    text: str


def type_in_words(annotation: ast.expr) -> str:
    """Return a type: Literal["a", "b"], also by its name in config.py, is a | b."""
    source = re.sub(r"\b[A-Z]\w+\b", lambda name: NAMED.get(name.group(), name.group()), ast.unparse(annotation))
    return re.sub(r"Literal\[(.*?)\]", lambda found: found.group(1).replace("'", "").replace(", ", " | "), source)


def default_of(value: ast.expr | None) -> str | None:
    """Return the default as a YAML would have it."""
    if value is None:
        return None
    source = ast.unparse(value)
    made = re.search(r"default_factory=(\w+)", source)
    if made:
        return {"list": "[]", "dict": "{}"}.get(made.group(1), "{}")
    words = {"None": "null", "True": "true", "False": "false"}
    return words.get(source, source.strip("'\""))


def keys_of(node: ast.ClassDef) -> Iterator[Key]:
    """Yield the fields of a config class. The docstring of a field is the text that follows it."""
    for field, after in pairwise([*node.body, ast.Pass()]):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        has_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        text = str(after.value.value) if has_text else ""  # type: ignore[attr-defined]
        yield Key(field.target.id, type_in_words(field.annotation), default_of(field.value), text)


def paragraphs(text: str) -> str:
    """Return a docstring as Markdown: links for articles, and a list where lines explain the values of a choice."""
    lines = [line.strip() for line in ARTICLE.sub(r"[\1](https://kexue.fm/archives/\1)", text).strip().splitlines()]
    items = [ITEM.sub(r"- `\1`: ", line) for line in lines]
    if sum(item.startswith("- ") for item in items) < 2:
        return "\n".join(lines)
    out: list[str] = []
    in_list = False
    for item in items:
        begins = item.startswith("- ")
        ends = in_list and not begins and out[-1].endswith(".")
        if (begins and not in_list) or ends:
            out.append("")
        in_list = begins or (in_list and not ends)
        out.append(item)
    return "\n".join(out)


def section(path: str, node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> Iterator[str]:
    """Yield a section and those inside it."""
    yield f"\n## `{path}`\n"
    text = ast.get_docstring(node)
    if text:
        yield paragraphs(text) + "\n"
    inner = []
    for key in keys_of(node):
        named = re.search(r"(\w+Config)\b", key.type)
        if named:
            inside = f"{path}.{key.name}" + ("[]" if key.type.startswith("list") else "")
            inner.append((inside, classes[named.group(1)]))
        kind = key.type.replace(" | None", " or null")
        if named:
            kind = kind.replace(named.group(1), "section").replace("list[section]", "list of sections")
        default = "required" if key.default is None else f"default `{key.default}`"
        yield f"**`{path}.{key.name}`** ({kind}; {default})\n"
        if key.text:
            yield paragraphs(key.text) + "\n"
    for inside, other in inner:
        yield from section(inside, other, classes)


def reference() -> str:
    """Return the page."""
    classes = {node.name: node for node in TREE.body if isinstance(node, ast.ClassDef)}
    lines = [INTRODUCTION]
    for key in keys_of(classes["Config"]):
        lines += section(key.name, classes[key.type], classes)
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="(default: stdout)")
    args = parser.parse_intermixed_args()
    if args.out is None:
        sys.stdout.write(reference())
    else:
        write_whole(args.out, reference().encode())


if __name__ == "__main__":
    run_program(main)
