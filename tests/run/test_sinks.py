"""Where records go beside the files: on disk with the real packages, and what a lost service costs.

The packages are in an environment of their own, whose Python runs sink_checks.py.
"""

import json
import subprocess
import threading
from pathlib import Path

import pytest

from megakexue.config import MlflowConfig, UserError, WandbConfig
from megakexue.run import sinks
from megakexue.run.sinks import Opened, Record, Sink
from tests.environments import python_with_sinks
from tests.helpers import ROOT
from tests.programs import run_python


def test_a_sink_that_fails_or_hangs_costs_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    written: list[Record] = []
    release = threading.Event()

    def fails_to_open() -> Opened:
        raise SystemExit("no key\nlog in first")

    def write_once(record: Record) -> None:
        written.append(record)
        raise ZeroDivisionError

    def wait(record: Record) -> None:
        release.wait()

    def fails_to_write() -> Opened:
        return Opened(write_once, lambda: None)

    def hangs() -> Opened:
        return Opened(wait, lambda: None)

    monkeypatch.setattr(sinks, "CLOSING_S", 0.2)
    for open_it, n_waiting in ((fails_to_open, 20), (fails_to_write, 20), (hangs, 3)):
        monkeypatch.setattr(sinks, "MAX_WAITING", n_waiting)
        sink = Sink(open_it.__name__, open_it, said.append)
        for step in range(9):
            sink.write(Record(step, {"train/loss": 1.0}, {}))
        sink.close()
    release.set()
    lost = "gets no more records in this start"
    assert [line.partition(". metrics.jsonl has")[0] for line in said] == [
        f"WARNING: fails_to_open {lost}: no key", f"WARNING: fails_to_write {lost}: ZeroDivisionError",
        f"WARNING: hangs {lost}: 3 records wait for it",
    ]  # fmt: skip
    assert [record.step for record in written] == [0]


def test_a_package_that_is_missing_is_named_before_anything_is_sent(tmp_path: Path) -> None:
    code = f"""
import importlib.util
importlib.util.find_spec = lambda name: None
from pathlib import Path
from megakexue.config import MetricsConfig, UserError, WandbConfig
from megakexue.run.sinks import open_sinks
try:
    open_sinks(Path({str(tmp_path)!r}), MetricsConfig(wandb=WandbConfig(project="p")), 0, print)
except UserError as error:
    print(error)
"""
    said = "metrics.wandb needs wandb, which is not installed: pip install 'megakexue[wandb]', or set it to null\n"
    assert run_python(code, check=True).stdout == said
    with pytest.raises(UserError, match=r"metrics\.wandb\.project"):
        WandbConfig(project="")
    with pytest.raises(UserError, match=r"metrics\.mlflow\.experiment"):
        MlflowConfig(experiment=" ")


def checked(config: pytest.Config, what: str, folder: Path) -> tuple[str, list[str]]:
    """Run a check of sink_checks.py; return what the run said, and what there is after it."""
    command = [str(python_with_sinks(config)), "-m", "tests.run.sink_checks", what, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    *said, found = done.stdout.splitlines()
    return "\n".join(said), json.loads(found)


@pytest.mark.slow
def test_mlflow_on_disk_goes_on_with_the_same_run(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    said, found = checked(pytestconfig, "mlflow", tmp_path)
    first, lost = said.split("a server that is not there\n")
    assert "WARNING" not in first
    own_id = (tmp_path / "run" / "mlflow.id").read_text()
    losses = {str(step): 10.0 - step for step in range(1, 7)}
    assert found == [[own_id, "FINISHED"], losses, 0.5, ["config.yaml", "samples"]]
    assert lost.count("WARNING: metrics.mlflow gets no more records in this start: ") == 1


@pytest.mark.slow
def test_wandb_offline_goes_on_with_the_same_run(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    said, _ = checked(pytestconfig, "wandb", tmp_path)
    assert "WARNING" not in said
    own_id = (tmp_path / "wandb.id").read_text()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{own_id}.wandb"] * 2
    assert all(b"train/loss" in file.read_bytes() and b"samples/1" in file.read_bytes() for file in files)
