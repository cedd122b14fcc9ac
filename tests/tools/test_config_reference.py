"""docs/config.md is what the config says today, with every key and its true default."""

import dataclasses
import re
import typing
from typing import Any

from megakexue.config import Config
from tests.helpers import ROOT
from tools.config_reference import paragraphs, reference


def fields(cls: type, path: str = "") -> dict[str, dataclasses.Field[Any]]:
    """All keys below a config class, those of lists of sections too."""
    found = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key = f"{path}{field.name}"
        found[key] = field
        hint = hints[field.name]
        for inner in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(inner) and isinstance(inner, type):
                found |= fields(inner, f"{key}{'[]' if typing.get_origin(hint) is list else ''}.")
    return found


def test_the_page_in_docs_is_that_of_the_config() -> None:
    made = "tools/config_reference.py --out docs/config.md"
    assert (ROOT / "docs" / "config.md").read_text() == reference(), f"out of date: run {made}"


def test_every_key_is_there_with_its_default() -> None:
    shown = dict(re.findall(r"^\*\*`(.*?)`\*\* \(.*; (?:default `)?(.*?)`?\)$", reference(), re.MULTILINE))
    keys = {key: field for key, field in fields(Config).items() if "." in key}
    assert list(shown) and set(shown) == set(keys)
    words = {"None": "null", "True": "true", "False": "false"}
    for key, field in keys.items():
        if field.default is not dataclasses.MISSING:
            expected = words.get(str(field.default), str(field.default))
            assert shown[key].replace("_", "") == expected.replace("_", ""), key
        elif field.default_factory is dataclasses.MISSING:
            assert shown[key] == "required", key


def test_values_of_a_choice_become_a_list() -> None:
    text = "What it does.\nfirst: one (9512);\n    more of one;\nsecond (tiger only): two.\nNone: off."
    assert paragraphs(text).splitlines() == [
        "What it does.", "", "- `first`: one ([9512](https://kexue.fm/archives/9512));", "more of one;",
        "- `second`: two.", "- `None`: off.",
    ]  # fmt: skip
    assert paragraphs("auto: the first. It\nprints why.") == "auto: the first. It\nprints why."
