"""Progress is one line every so often in a log."""

import time

import pytest

from megakexue.text import progress as module
from megakexue.text.progress import Progress, ProgressDisplay, heartbeat


def test_lines_in_a_log(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.0)
    with ProgressDisplay() as display:
        display.start = time.perf_counter() - 10
        display(Progress(25_000_000, 100_000_000, 5000, None))
        display(Progress(50_000_000, 100_000_000, 10_000, 2_000_000))
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("25.0% of 100 MB, ") and first.endswith(" documents/s")
    assert second.startswith("50.0% of 100 MB, ") and second.endswith(" tokens/s")


def test_no_more_than_one_line_in_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay() as display:
        for done in range(100):
            display(Progress(done, 100, done, done))
    assert capsys.readouterr().err == ""


def test_heartbeat_ends_with_the_work(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.01)
    with heartbeat("training"):
        time.sleep(0.2)
    said = capsys.readouterr().err
    assert said.startswith("training, 0 s so far\n") and said.count("\n") >= 3
    time.sleep(0.05)
    assert capsys.readouterr().err == ""
