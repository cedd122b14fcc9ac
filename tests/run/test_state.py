"""trainer.json is read back as it was written, or refused whole; how two configs differ.

golden/trainer.json was written by the version before `TrainerState`: checkpoints of format 4 must stay readable.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megakexue.config import UserError, load_config
from megakexue.core.batch import Position
from megakexue.files import write_json
from megakexue.run.checkpoint import FORMAT
from megakexue.run.state import StoppedState, TrainerState, differences, plain, shown
from tests.helpers import ROOT, make_state

GOLDEN = ROOT / "tests" / "golden" / "trainer.json"
CONFIG = load_config(ROOT / "configs" / "tiny_gqa.yaml")


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = make_state(7, CONFIG, tokens=99, position=Position(epoch=1, sample=5), init_bundle="ab", n_updates=6)
    state = replace(state, lineage=[{"step": 0, "changes": [], "source": "x", "origin": "new"}])
    write_json(tmp_path / "trainer.json", state.to_json())
    assert TrainerState.read(tmp_path) == state
    stopped = StoppedState(**vars(state), loss_scale=4.0, reason="why", rows={"0": [["row"]]}, is_finite=False)
    write_json(tmp_path / "trainer.json", stopped.to_json())
    assert StoppedState.read(tmp_path) == stopped
    assert TrainerState.read(tmp_path) == state  # what it does not know is not its own


def test_what_earlier_commits_wrote_is_read_and_written_again_the_same(tmp_path: Path) -> None:
    assert FORMAT == 4
    text = GOLDEN.read_text(encoding="utf-8")
    (tmp_path / "trainer.json").write_text(text, encoding="utf-8")
    state = TrainerState.read(tmp_path)
    assert state.step == 15 and state.position == Position(sample=240) and len(state.guard.losses) == 15
    write_json(tmp_path / "again.json", state.to_json())
    again = (tmp_path / "again.json").read_text(encoding="utf-8")
    assert again.replace(' "sources": {},\n', "").strip() == text.strip()  # what they did not count


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda values: values.pop("validated"), "validated"),
        (lambda values: values.update(step="15"), "another type"),
        (lambda values: values.update(step=2**64), "is out of range: it must be between -2^63 and 2^63"),
        (lambda values: values.update(tokens=math.nan), "not JSON compliant"),
        (lambda values: values["guard"].update(scales_loss=3), "scales_loss=3 must be true or false"),
        (lambda values: values["guard"].update(losses=[1.0, "x"]), "x"),
        (lambda values: values["guard"].pop("n_rollbacks"), "another type"),
        (lambda values: values["position"].update(epoch="0"), "another type"),
        (lambda values: values["config"].pop("optim"), "a section is missing"),
        (lambda values: values["lineage"].append({"step": 3}), "a start without its source"),
        (lambda values: values.update(config=3), "config"),
    ],
)
def test_another_form_is_refused(spoil: Callable[[dict[str, Any]], Any], reason: str, tmp_path: Path) -> None:
    values = json.loads(GOLDEN.read_text(encoding="utf-8"))
    spoil(values)
    (tmp_path / "trainer.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(UserError, match="is not of the form that this version writes") as caught:
        TrainerState.read(tmp_path)
    assert reason in str(caught.value) and "remove that folder to go on from the one before" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trainer\.json: cannot read the trainer's state"):
        TrainerState.read(tmp_path)
    # nested so deeply that Python can parse it but not copy it, or not even parse it
    for depth in (100, 600, 800, 900, 950, 100_000):
        text = json.dumps(json.loads(GOLDEN.read_text(encoding="utf-8")) | {"lineage": [{"source": "NEST"}]})
        text = text.replace('"NEST"', "[" * depth + "]" * depth)
        (tmp_path / "trainer.json").write_text(text, encoding="utf-8")
        try:
            TrainerState.read(tmp_path)
        except UserError as error:
            assert depth > 100 and "trainer.json" in str(error) and "\n" not in str(error)
        else:
            assert depth < 900


def test_differences_are_data_by_key() -> None:
    old = plain(CONFIG)
    new = plain(load_config(ROOT / "configs" / "tiny_gqa.yaml", ["optim.lr=1e-3", "model.rope.base=1e4"]))
    assert differences(old, old) == {}
    found = differences(old, new)
    assert found == {"optim.lr": (0.02, 0.001), "model.rope.base": ("auto", 10000.0)}
    assert sorted(shown(found)) == ["model.rope.base auto -> 10000.0", "optim.lr 0.02 -> 0.001"]
    # a section that one of them lacks is a difference of its own
    assert differences({"a": {"b": 1}}, {"a": None, "c": 2}) == {"a": ({"b": 1}, None), "c": (None, 2)}
