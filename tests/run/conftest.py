"""Sources for the tests of reading: a bucket, and small windows of the order."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import megakexue.run.data as data
from tests.sources import Bucket, T, close_all, serving


@pytest.fixture
def close_batches() -> Iterator[None]:
    yield
    close_all()


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 24 rows, so that epochs have several."""
    monkeypatch.setattr(data, "WINDOW_TOKENS", 24 * T)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    with serving(tmp_path / "bucket", monkeypatch) as server:
        yield server
        server.resume.set()
        close_all()
