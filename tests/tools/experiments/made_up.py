"""Made-up runs, written as training writes them, for the tables of the experiments."""

from pathlib import Path

from common import Run
from megakexue.config import MetricsConfig, Status, load_config, to_yaml
from megakexue.run.metrics import Metrics
from tests.helpers import ROOT, make_record


def write_run(
    folder: Path, losses: list[float], valid: float | None = None, *, statuses: dict[int, Status] | None = None
) -> Path:
    """Write the records of a run that is done: a step for each loss, and a validation after the last."""
    n = len(losses)
    with Metrics(folder, MetricsConfig(tensorboard=False), n_steps=n, resume_step=0) as metrics:
        for step, loss in enumerate(losses, start=1):
            status = (statuses or {}).get(step, "applied")
            metrics.log_step(make_record(step, loss=loss, status=status, grad_norm=float(step)))
        if valid is not None:
            metrics.log_validation(n, valid, 4096)
    (folder / "done").touch()
    return folder


def write_config(run: Run, out: Path) -> None:
    """Write the config.yaml of a run into its folder in `out`."""
    config = load_config(ROOT / run.config, [f"train.run={out / run.name}", *run.overrides])
    (out / run.name).mkdir(parents=True, exist_ok=True)
    (out / run.name / "config.yaml").write_text(to_yaml(config))
