"""A trace is of the steps that were asked for, wherever a start begins and ends, and a disk that is full costs a line.

tests/run/test_by_source.py has one of a real run.
"""

import gzip
import json
from pathlib import Path

import torch

from megakexue.run.profiling import Profiler


def test_a_window(tmp_path: Path) -> None:
    def said(profiler: Profiler, steps: range) -> list[str | None]:
        ends = []
        for step in steps:
            profiler.before(step)
            torch.ones(step).cumsum(0)
            ends.append(profiler.after(step))
        return [*ends, profiler.after(steps[-1], is_end=True)]

    path = tmp_path / "profile" / "steps_2_3.json.gz"
    text = f"trace of steps 2 to 3: {path}, for chrome://tracing or ui.perfetto.dev"
    assert said(Profiler(2, 3, path.parent), range(1, 5)) == [None, None, text, None, None]
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert sum(event["name"] == "aten::cumsum" for event in events) == 2
    # a start within the window, and an end within it
    assert said(Profiler(2, 9, path.parent), range(4, 6))[-1] is not None
    assert said(Profiler(2, 3, path.parent), range(4, 6)) == [None] * 3
    assert sorted(file.name for file in path.parent.iterdir()) == ["steps_2_3.json.gz", "steps_4_5.json.gz"]
    (tmp_path / "file").touch()
    (failed,) = filter(None, said(Profiler(1, 1, tmp_path / "file"), range(1, 2)))
    assert failed.startswith("WARNING: the trace of steps 1 to 1 could not be written to ")
