"""What W&B and MLflow have after a run and its resume, as JSON, by the Python of tests.environments that has them."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from megakexue.config import MetricsConfig, MlflowConfig, WandbConfig
from megakexue.run.metrics import Metrics
from tests.helpers import make_record


def write_twice(run: Path, config: MetricsConfig) -> None:
    """Five steps, and a resume after step 3 to step 6."""
    for steps, resume_step in ((range(1, 6), 0), (range(4, 7), 3)):
        with Metrics(run, config, n_steps=6, resume_step=resume_step) as metrics:
            for step in steps:
                metrics.log_step(make_record(step, loss=10.0 - step))
            metrics.log_validation(steps[-1], 2.0, 64, 0.5)
            metrics.log_samples(steps[-1], ["def f("], ["x):"])


def check_mlflow(folder: Path) -> list[Any]:
    from mlflow import MlflowClient

    os.environ |= {"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    run, uri = folder / "run", (folder / "store").as_uri()
    run.mkdir()
    (run / "config.yaml").write_text("train: {steps: 6}\n")
    write_twice(run, MetricsConfig(tensorboard=False, mlflow=MlflowConfig(experiment="mine", uri=uri)))
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("mine")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    history = {m.step: m.value for m in client.get_metric_history(found.info.run_id, "train/loss")}
    artifacts = sorted(file.path for file in client.list_artifacts(found.info.run_id))
    print("a server that is not there")
    nowhere = MetricsConfig(tensorboard=False, mlflow=MlflowConfig(experiment="mine", uri="http://127.0.0.1:1"))
    with Metrics(folder / "lost", nowhere, n_steps=1, resume_step=0) as metrics:
        metrics.log_step(make_record(1))
    return [[found.info.run_id, found.info.status], history, found.data.metrics["valid/bits_per_byte"], artifacts]


def check_wandb(folder: Path) -> list[Any]:
    write_twice(folder, MetricsConfig(tensorboard=False, wandb=WandbConfig(project="p", mode="offline")))
    return []


if __name__ == "__main__":
    check = {"mlflow": check_mlflow, "wandb": check_wandb}[sys.argv[1]]
    print(json.dumps(check(Path(sys.argv[2]))))
