"""Sources for the tests of reading: a bucket, and small windows of the order."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import megakexue.run.data as data
from tests.sources import Bucket, T, close_all


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
    server = Bucket(tmp_path / "bucket")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    environment = {
        "S3_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    yield server
    server.resume.set()
    close_all()
    server.shutdown()
    server.server_close()
    thread.join()
