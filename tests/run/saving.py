"""State that says where it belongs, for the tests that save and load it."""

from pathlib import Path
from typing import Any

import torch

from megakexue.config import CheckpointConfig
from megakexue.run.saves import Saver
from tests.helpers import make_state


def fill(engine: Any, base: int) -> None:
    """State that says where it belongs: value = index in the parameter + a constant for kind and name."""
    engine.load(lambda kind, s: filled(kind, s, base), with_state=True)


def filled(kind: str, s: Any, base: int) -> torch.Tensor:
    return torch.arange(s.start, s.stop) * 2.0**-9 + base + len(kind) + hash_of(s.name)


def state_differences(engine: Any, base: int) -> list[str]:
    """Which of this rank's tensors are not as `fill` makes them; there must be some."""
    state = [(kind, s, view) for s, views in engine.state_tensors() for kind, view in views.items()]
    assert state
    return [f"{kind} {s}" for kind, s, view in state if not torch.equal(view, filled(kind, s, base))]


def save(engine: Any, folder: Path, step: int, **config: Any) -> Path:
    """Write the checkpoint of `step` and wait for it."""
    saver = Saver(engine, CheckpointConfig(**{"every_steps": 1, "keep_last": 2} | config))
    saver.start(folder, make_state(step, engine.config, engine.guard.state, n_updates=7))
    assert saver.finish()
    return folder / f"step_{step:08d}"


def hash_of(name: str) -> int:
    return sum(name.encode()) % 97
