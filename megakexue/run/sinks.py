"""W&B and MLflow: where the records of a run go beside metrics.jsonl and TensorBoard.

Each has a thread of its own, which opens it, writes to it and waits for it. So a server that is slow or lost does not
hold up a step, and what goes wrong costs one line. A resumed run goes on with the same id, which is in the run folder.
The steps since its checkpoint are sent again: they are the same to the bit. W&B leaves out what it has already.
"""

import importlib.util
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from megakexue.config import MetricsConfig, MlflowConfig, WandbConfig, read_yaml, require

CLOSING_S = 30.0
"""That a sink has to take what is left when the run ends."""
MAX_WAITING = 10_000
"""Records that wait for a sink, after which it counts as lost."""


class Record(NamedTuple):
    step: int
    scalars: dict[str, float]
    """By tag, such as train/loss."""
    texts: dict[str, str]


class Opened(NamedTuple):
    write: Callable[[Record], None]
    close: Callable[[], None]


class Sink:
    """A service that gets records from a thread. `open_it` runs there, and may fail with anything."""

    def __init__(self, name: str, open_it: Callable[[], Opened], say: Callable[[str], None]) -> None:
        self._name, self._open, self._say = name, open_it, say
        self._queue: queue.Queue[Record | None] = queue.Queue(MAX_WAITING)
        self._is_lost = False
        # a daemon: a service that hangs must not keep the process alive
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def write(self, record: Record | None) -> None:
        """Hand a record to the thread; None ends it."""
        if self._is_lost:
            return
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._lose(f"{MAX_WAITING} records wait for it")

    def close(self) -> None:
        """Wait until all is written, for CLOSING_S at most."""
        self.write(None)
        if not self._is_lost:
            self._thread.join(CLOSING_S)
        if self._thread.is_alive():
            self._lose(f"it has not taken all in {CLOSING_S:.0f} s")

    def _run(self) -> None:
        try:
            opened = self._open()
            while (record := self._queue.get()) is not None:
                opened.write(record)
            opened.close()
        except BaseException as error:  # SystemExit too, by which some libraries say that a login is missing
            line = next(iter(str(error).splitlines()), "") or type(error).__name__
            self._lose(line if len(line) <= 120 else f"{line[:117]}...")

    def _lose(self, why: str) -> None:
        if not self._is_lost:
            self._is_lost = True
            self._say(f"WARNING: {self._name} gets no more records in this start: {why}. metrics.jsonl has them all")


def open_sinks(run: Path, config: MetricsConfig, resume_step: int, say: Callable[[str], None]) -> list[Sink]:
    """Open what the config names, for a run that goes on after `resume_step`; at 0 it begins under a new id.

    Raises:
        UserError: a package is not installed.
    """
    sinks = []
    for package, section in (("wandb", config.wandb), ("mlflow", config.mlflow)):
        if section is None:
            continue
        require(
            importlib.util.find_spec(package) is not None,
            f"metrics.{package} needs {package}, which is not installed: pip install 'megakexue[{package}]', or set it "
            "to null",
        )
        id_file = run / f"{package}.id"
        if resume_step == 0:
            id_file.unlink(missing_ok=True)
        sinks.append(Sink(f"metrics.{package}", _opening(section, run, id_file), say))
    return sinks


def _opening(section: WandbConfig | MlflowConfig, run: Path, id_file: Path) -> Callable[[], Opened]:
    if isinstance(section, WandbConfig):
        return lambda: _open_wandb(section, run, id_file)
    return lambda: _open_mlflow(section, run, id_file)


def _open_wandb(config: WandbConfig, run: Path, id_file: Path) -> Opened:
    import wandb

    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4))
    settings = read_yaml(path) if (path := run / "config.yaml").exists() else {}
    opened = wandb.init(
        project=config.project, entity=config.entity, name=run.resolve().name, id=id_file.read_text(), resume="allow",
        dir=str(run), config=settings, mode=config.mode, settings=wandb.Settings(silent=True, console="off"),
    )  # fmt: skip

    def write(record: Record) -> None:
        texts = {tag: wandb.Html(text) for tag, text in record.texts.items()}
        opened.log(record.scalars | texts, step=record.step)

    return Opened(write, opened.finish)


def _open_mlflow(config: MlflowConfig, run: Path, id_file: Path) -> Opened:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(config.uri)
    if not id_file.exists():
        found = client.get_experiment_by_name(config.experiment)
        experiment = found.experiment_id if found else client.create_experiment(config.experiment)
        id_file.write_text(client.create_run(experiment, run_name=run.resolve().name).info.run_id)
    own_id = id_file.read_text()
    client.update_run(own_id, status="RUNNING")
    if (run / "config.yaml").exists():
        client.log_artifact(own_id, str(run / "config.yaml"))

    def write(record: Record) -> None:
        now = round(1000 * time.time())
        # the characters that it takes in a name
        tags = {re.sub(r"[^\w\-. /]", "_", tag): value for tag, value in record.scalars.items()}
        client.log_batch(own_id, metrics=[Metric(tag, value, now, record.step) for tag, value in tags.items()])
        for tag, text in record.texts.items():
            client.log_text(own_id, text, f"{tag}/step_{record.step:08d}.txt")

    return Opened(write, lambda: client.set_terminated(own_id))
