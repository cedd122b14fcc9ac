"""trainer.json: where a run is, beside its weights and its optimizer's state, and how two runs differ.

What must stay true: what is written is read back through the same class, to the same values, or is refused whole.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from megakexue.config import Config, UserError, build, require
from megakexue.core.batch import Position
from megakexue.files import read_json
from megakexue.run.guard import GuardState
from megakexue.run.records import SourceRead

TRAINER = "trainer.json"
State = TypeVar("State", bound="TrainerState")


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """Everything that the next step depends on, but tensors and random states."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Target tokens of these steps."""
    position: Position = field(default_factory=Position)
    """Of the first sample that no step up to `step` has used."""
    sources: dict[str, SourceRead] = field(default_factory=dict)
    """What these steps have read of each, by name."""
    validated: int = 0
    """The last step whose validation loss is on record."""
    init_bundle: str | None = None
    """Fingerprint of `train.init_from`."""
    lineage: list[dict[str, Any]] = field(default_factory=list)
    """The starts at which something changed: step, changes, source and, for the first, origin."""
    n_updates: int = 0
    """Updates that the optimizer has made: fewer than steps where some were not applied."""
    guard: GuardState
    data: str
    """Fingerprint of the order of the rows, by which `position` has a meaning."""
    tokenizer: str
    """Its sha256."""
    config: dict[str, Any]
    """The resolved config, as JSON."""
    source: str
    """The commit of the code, or the version."""
    world_size: int

    def __post_init__(self) -> None:
        sections = [field.name for field in dataclasses.fields(Config)]
        require(all(isinstance(self.config.get(name), dict) for name in sections), "config: a section is missing")
        require(all("source" in start for start in self.lineage), "lineage: a start without its source")

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def read(cls: type[State], folder: Path) -> State:
        """Read the state of a checkpoint. Raises UserError: it is missing, damaged, or of another form."""
        path = folder / TRAINER
        values = {"sources": {}} | read_json(path, "the trainer's state")  # older versions did not count it
        try:
            json.dumps(values, allow_nan=False)  # every number is finite
            known = {field.name: values[field.name] for field in dataclasses.fields(cls)}
            state = build(cls, known, where="")
            # nothing was converted on the way, such as "3" to 3
            require(state.to_json() == known, "a value has another type")
        except (KeyError, ValueError, RecursionError) as error:
            raise UserError(
                f"{path} is not of the form that this version writes ({str(error).strip(': ')}): use the version of "
                "megakexue that wrote it, or remove that folder to go on from the one before"
            ) from error
        return state


@dataclass(frozen=True, kw_only=True)
class StoppedState(TrainerState):
    """trainer.json of a dump: that of the step before, and what is needed to compute the stopped step again."""

    loss_scale: float
    reason: str
    rows: dict[str, Any]
    """By rank: for each of its micro-batches, where its rows come from."""
    is_finite: bool
    """Whether loss and gradient norm were finite, and the step was a spike."""


def plain(section: Any) -> dict[str, Any]:
    """A config dataclass as JSON gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(section)))


def with_new_settings(old: dict[str, Any], section: Any) -> dict[str, Any]:
    """Give a plain config the defaults of those settings of `section` that its writer did not know yet."""
    filled = dict(old)
    for entry in dataclasses.fields(section):
        value = getattr(section, entry.name)
        if dataclasses.is_dataclass(value) and isinstance(old.get(entry.name), dict):
            filled[entry.name] = with_new_settings(old[entry.name], value)
        elif isinstance(value, list) and value and dataclasses.is_dataclass(value[0]):
            filled[entry.name] = [with_new_settings(part, value[0]) for part in old.get(entry.name, [])]
        elif entry.name not in old and entry.default is not dataclasses.MISSING:
            filled[entry.name] = entry.default
    return filled


Differences = dict[str, tuple[Any, Any]]
"""By key, such as rope.base: the old value and the new one."""


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Differences:
    """Return every field in which two plain configs differ."""
    found: Differences = {}
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found[f"{prefix}{key}"] = a, b
    return found


def shown(found: Differences) -> list[str]:
    """One line for each, such as `rope.base 10000.0 -> 59000.0`."""
    return [f"{key} {a} -> {b}" for key, (a, b) in found.items()]
