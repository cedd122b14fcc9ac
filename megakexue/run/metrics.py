"""What a run tells its user: `metrics.jsonl`, one status line a step, a progress bar, TensorBoard.

What must stay true: an interrupted and resumed run leaves the same loss column as one that was never stopped.
Resuming at a checkpoint therefore first drops the records that lie after it.
"""

import dataclasses
import math
import os
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megakexue.config import MetricsConfig, Status
from megakexue.run.records import Record, StatisticsRecord, StepRecord, ValidationRecord, json_line, read_metrics


def human_count(n: float) -> str:
    """`n` in three digits with k, M, G or T: 41200 is 41.2k."""
    for unit in ("", "k", "M", "G"):
        if not abs(n) >= 999.5:
            return f"{n:.3g}{unit}"
        n /= 1000
    return f"{n:.3g}T"


def status_line(record: StepRecord, n_steps: int) -> str:
    """The columns of one step, at fixed places so that a log can be read down a column."""
    mfu = "  n/a" if math.isnan(record.mfu) else f"{record.mfu:5.1%}"
    return (
        f"step {record.step:>6}/{n_steps}  loss {record.loss:7.4f}  grad {record.grad_norm:<8.3g}  lr {record.lr:.2e}  "
        f"{human_count(record.tokens_per_s):>5} tok/s  mfu {mfu}  mem {record.memory_gib:5.1f} GiB  {record.status}"
    )


def statistics_line(record: StatisticsRecord, n_steps: int) -> str:
    """The columns of one record, for all tensors as one vector."""
    whole = record.whole
    return (
        f"step {record.step:>6}/{n_steps}  update/weight {whole.update_per_weight:7.1e}  cosine {whole.cosine:5.2f}  "
        f"signs {whole.sign_agreement:.2f}"
    )


class Metrics:
    """Writes the records of one run; made on rank 0 alone.

    Steps are shown and recorded every `metrics.every_steps`, and so are the first and the last. Steps that were not
    applied are shown, recorded and counted always.
    """

    def __init__(
        self, run: Path, config: MetricsConfig, *, n_steps: int, resume_step: int, validated: int | None = None
    ) -> None:
        """Open the run's records, dropping those after `resume_step`; at 0 the run starts anew and all are dropped.

        Args:
            validated: the last step whose validation is not made again, other than `resume_step`.

        Raises:
            UserError: the metrics.jsonl that is there is damaged.
        """
        self._every_steps = config.every_steps
        self._n_steps = n_steps
        self._step = resume_step
        run.mkdir(parents=True, exist_ok=True)
        path = run / "metrics.jsonl"
        dropped_from = resume_step + 1 if resume_step else 0  # a validation may stand at step 0
        last_valid = resume_step if validated is None else validated
        kept = [
            record
            for record in (read_metrics(path) if path.exists() else [])
            if record.step < dropped_from and not (isinstance(record, ValidationRecord) and record.step > last_valid)
        ]
        self._bad_steps: Counter[Status] = Counter(
            r.status for r in kept if isinstance(r, StepRecord) and r.status != "applied"
        )
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(map(json_line, kept))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        self._file = open(path, "ab", buffering=0)
        self._pending = b""
        """Records, or the rest of one, that a full disk has not taken yet."""
        self._is_full = False

        self._tensorboard = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(run / "tensorboard"), purge_step=dropped_from)

        self._progress: Progress | None = None
        if sys.stdout.isatty():
            self._progress = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"), BarColumn(bar_width=None),
                TextColumn("{task.description}"), TextColumn("ETA"), TimeRemainingColumn(),
                auto_refresh=False,  # drawn by log_step: no thread beside the training loop
                transient=True, expand=True,
            )  # fmt: skip
            self._progress.start()
            self._bar = self._progress.add_task("loss -", total=n_steps, completed=resume_step)
            self._drawn_at = -math.inf

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log_step(self, record: StepRecord) -> None:
        """Take note of every step; what is shown and recorded of it is decided here."""
        assert record.step > self._step, f"step {record.step} was logged after step {self._step}"
        self._step = record.step
        is_bad = record.status != "applied"
        if is_bad:
            self._bad_steps[record.status] += 1
        if is_bad or record.step % self._every_steps == 0 or record.step in (1, self._n_steps):
            scalars = ("loss", "grad_norm", "lr", "tokens_per_s", "mfu", "memory_gib", "loss_scale", "data_wait_s")
            self._write(record, {f"train/{name}": getattr(record, name) for name in scalars})
            self.message(status_line(record, self._n_steps))
        if self._progress is not None:
            # drawing costs a millisecond or two: ten a second, so that short steps do not notice
            due = time.monotonic() - self._drawn_at >= 0.1
            text = f"loss {record.loss:.4f}  {human_count(record.tokens_per_s)} tok/s"
            self._progress.update(self._bar, completed=record.step, description=text, refresh=due)
            if due:
                self._drawn_at = time.monotonic()

    def log_validation(self, step: int, loss: float, n_tokens: int) -> None:
        self._write(ValidationRecord(step=step, loss=loss, n_tokens=n_tokens), {"valid/loss": loss})
        self.message(f"step {step:>6}/{self._n_steps}  validation loss {loss:.4f} over {human_count(n_tokens)} tokens")

    def log_statistics(self, record: StatisticsRecord) -> None:
        scalars = {"statistics/n_drifting_rows": float(record.n_drifting_rows)}
        for prefix, values in {"": record.whole, **{f"{name}/": t for name, t in record.tensors.items()}}.items():
            scalars |= {f"statistics/{prefix}{name}": value for name, value in dataclasses.asdict(values).items()}
        self._write(record, scalars)
        self.message(statistics_line(record, self._n_steps))
        if record.n_drifting_rows > 0:
            self.message(
                "WARNING: embedding rows with an RMS beyond a tenth of 1 / optim.weight_decay: "
                f"{record.n_drifting_rows}. Sign updates drive the rows of rare tokens to +-1 / optim.weight_decay "
                "(9736): set optim.embedding=lazy, or lower optim.lr"
            )

    def message(self, text: str) -> None:
        """Print lines above the progress bar; in a log, just print them."""
        if self._progress is None:
            print(text, flush=True)
        else:
            self._progress.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def sync(self) -> None:
        """Push the records to the disk, before a checkpoint is there that follows them: a power cut leaves no gap."""
        self._flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Say how the steps since step 1 ended and close the files. A second call does nothing."""
        if self._file.closed:
            return
        self._flush()
        self._file.close()
        if self._tensorboard is not None:
            with suppress(OSError):
                self._tensorboard.close()
        if self._progress is not None:
            self._progress.stop()
        counts: dict[Status, int] = {"applied": self._step - self._bad_steps.total(), **self._bad_steps}
        print(f"{self._step} steps: " + ", ".join(f"{n} {status}" for status, n in counts.items()), flush=True)

    def _write(self, record: Record, scalars: dict[str, float]) -> None:
        self._pending += json_line(record).encode()
        self._flush()
        if self._tensorboard is not None:
            try:
                for name, value in scalars.items():
                    self._tensorboard.add_scalar(name, value, record.step)
            except OSError as error:
                self._tensorboard = None
                self.message(f"WARNING: TensorBoard's events cannot be written any more: {error}")

    def _flush(self) -> None:
        """Write what is pending, and leave it pending where the disk is full: training is worth more."""
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
            self._is_full = False
        except OSError as error:
            if not self._is_full:
                self.message(f"WARNING: metrics.jsonl cannot be written, and waits: {error}: make room")
            self._is_full = True
