"""Where records go beside the files: on disk with the real packages, and what a lost service costs."""

import threading
from pathlib import Path
from typing import Any

import pytest

from megakexue.config import MetricsConfig, MlflowConfig, UserError, WandbConfig
from megakexue.run import sinks
from megakexue.run.metrics import Metrics
from megakexue.run.sinks import Opened, Record, Sink
from tests.helpers import make_record
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


def write_twice(run: Path, config: MetricsConfig) -> None:
    """Five steps, and a resume after step 3 to step 6."""
    for steps, resume_step in ((range(1, 6), 0), (range(4, 7), 3)):
        with Metrics(run, config, n_steps=6, resume_step=resume_step) as metrics:
            for step in steps:
                metrics.log_step(make_record(step, loss=10.0 - step))
            metrics.log_validation(steps[-1], 2.0, 64, 0.5)
            metrics.log_samples(steps[-1], ["def f("], ["x):"])


@pytest.mark.slow
def test_mlflow_on_disk_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("mlflow", reason="not installed: pip install 'megakexue[mlflow]'")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("train: {steps: 6}\n")
    uri = (tmp_path / "store").as_uri()
    config = MetricsConfig(tensorboard=False, mlflow=MlflowConfig(experiment="mine", uri=uri))
    write_twice(run, config)
    assert "WARNING" not in capsys.readouterr().out
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("mine")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_id, found.info.status) == ((run / "mlflow.id").read_text(), "FINISHED")
    history = {m.step: m.value for m in client.get_metric_history(found.info.run_id, "train/loss")}
    assert history == {step: 10.0 - step for step in range(1, 7)}
    assert found.data.metrics["valid/bits_per_byte"] == 0.5
    assert {file.path for file in client.list_artifacts(found.info.run_id)} == {"config.yaml", "samples"}
    # a server that is not there
    nowhere = MetricsConfig(tensorboard=False, mlflow=MlflowConfig(experiment="mine", uri="http://127.0.0.1:1"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with Metrics(tmp_path / "lost", nowhere, n_steps=1, resume_step=0) as metrics:
        metrics.log_step(make_record(1))
    assert capsys.readouterr().out.count("WARNING: metrics.mlflow gets no more records in this start: ") == 1


@pytest.mark.slow
def test_wandb_offline_goes_on_with_the_same_run(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("wandb", reason="not installed: pip install 'megakexue[wandb]'")
    write_twice(tmp_path, MetricsConfig(tensorboard=False, wandb=WandbConfig(project="p", mode="offline")))
    assert "WARNING" not in capsys.readouterr().out
    own_id = (tmp_path / "wandb.id").read_text()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{own_id}.wandb"] * 2
    assert all(b"train/loss" in file.read_bytes() and b"samples/1" in file.read_bytes() for file in files)
