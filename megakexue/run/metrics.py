"""What a run tells its user: `metrics.jsonl`, status lines, a progress bar, TensorBoard, and how it ended.

What must stay true: an interrupted and resumed run leaves the same loss column as one that was never stopped.
Resuming at a checkpoint therefore first drops the records that lie after it. And showing something never ends a run:
the terminal may be closed, the reader of a pipe may leave, the disk of a log may be full.
"""

import dataclasses
import errno
import math
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megakexue.config import MetricsConfig, Status, mute_stdout
from megakexue.run.records import (
    ExportRecord,
    ReadRecord,
    Record,
    SamplesRecord,
    SourceLoss,
    StatisticsRecord,
    StepRecord,
    ValidationRecord,
    json_line,
    read_lines,
    read_metrics,
)
from megakexue.run.sinks import Record as SinkRecord
from megakexue.run.sinks import open_sinks


def human_count(n: float) -> str:
    """`n` in three digits with k, M, G or T: 41200 is 41.2k."""
    for unit in ("", "k", "M", "G"):
        if not abs(n) >= 999.5:
            return f"{n:.3g}{unit}"
        n /= 1000
    return f"{n:.3g}T"


N_LINES = 20
"""Status lines between two headers, so that a screen of 24 lines has one."""


def _place(step: int | str, n_steps: int) -> str:
    """The first column. All are right-aligned at fixed places, and with a million steps a line has 80 characters."""
    n_digits = len(str(n_steps))
    return f"{step:>{n_digits}}/{n_steps}".rjust(9) if isinstance(step, int) else step.rjust(max(9, 2 * n_digits + 1))


def header_line(n_steps: int) -> str:
    """What the columns of a status line are."""
    return f"{_place('step', n_steps)}     loss      grad        lr  tok/s    mfu  mem GiB"


def status_line(record: StepRecord, n_steps: int, loss: float) -> str:
    """The columns of one step, with `loss` as its loss; its status is said if the step was not applied."""
    mfu = "n/a" if math.isnan(record.mfu) else f"{record.mfu:.1%}"
    status = "" if record.status == "applied" else f"  {record.status}"
    return (
        f"{_place(record.step, n_steps)}  {loss:7.4f}  {record.grad_norm:8.3g}  {record.lr:.2e}  "
        f"{human_count(record.tokens_per_s):>5}  {mfu:>5}  {record.memory_gib:7.1f}{status}"
    )


def statistics_line(record: StatisticsRecord, n_steps: int) -> str:
    """The columns of one record, for all tensors as one vector."""
    whole = record.whole
    return (
        f"{_place(record.step, n_steps)}  update/weight {whole.update_per_weight:.1e}  cosine {whole.cosine:.2f}  "
        f"signs {whole.sign_agreement:.2f}"
    )


def attention_line(record: StatisticsRecord) -> str:
    """The entropy of attention, a mean over layers and their range, and the largest logits there and of the output."""
    entropies = [layer.relative_entropy for layer in record.attention]
    largest = max(layer.largest_logit for layer in record.attention)
    return (
        f"entropy {_mean(entropies):.2f} ln n ({min(entropies):.2f} to {max(entropies):.2f})  "
        f"logits to {largest:.3g}, output {record.largest_logit:.3g}"
    )


def times_line(times: Mapping[str, float]) -> str:
    """The shares that the parts of steps have in the time; the smallest are left out where the line has no room."""
    shares = {part: seconds / (sum(times.values()) or 1.0) for part, seconds in times.items()}
    shown = [part for part, share in shares.items() if share >= 0.005]
    while len(line := "  ".join(f"{part} {shares[part]:.0%}" for part in shown)) > 68:
        shown.remove(min(shown, key=lambda part: shares[part]))
    return line


def is_recorded(step: int, status: Status, every_steps: int, n_steps: int) -> bool:
    """Whether a step is shown and recorded: one in `every_steps`, the first, the last, and what was not applied."""
    return status != "applied" or step % every_steps == 0 or step in (1, n_steps)


def _source_scalars(split: str, record: StepRecord | ValidationRecord) -> dict[str, float]:
    """What TensorBoard gets beside the loss, by tag."""
    scalars = {f"{split}/bits_per_byte": record.bits_per_byte}
    if len(record.sources) > 1:
        for name, source in record.sources.items():
            scalars |= {f"{split}/loss/{name}": source.loss, f"{split}/bits_per_byte/{name}": source.bits_per_byte}
    return {tag: value for tag, value in scalars.items() if not math.isnan(value)}


def _mean(losses: Collection[float]) -> float:
    return sum(losses) / len(losses)


class Metrics:
    """Writes the records of one run; made on rank 0 alone.

    Steps are shown and recorded every `metrics.every_steps`, and so are the first and the last. Steps that were not
    applied are shown, recorded and counted always. A record has the loss of its step. What is shown is the mean loss of
    the applied steps since the line before, unless the step was not applied.
    """

    last_words = ""
    """What `close` says last: how the run ended, and what to do next."""

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
        self._run, self._began = run, time.monotonic()
        self._losses: list[float] = []
        """Of the applied steps since the last line."""
        self._recent: deque[float] = deque(maxlen=100)
        """Of applied steps."""
        self._n_lines = 0
        self._times: Counter[str] = Counter()
        self._times_of_record: Counter[str] = Counter()
        self._n_steps_of_record = 0
        """Seconds of the parts of the steps since the last line on them."""
        self._all_times: Counter[str] = Counter()
        run.mkdir(parents=True, exist_ok=True)
        path = run / "metrics.jsonl"
        dropped_from = resume_step + 1 if resume_step else 0  # a validation may stand at step 0
        last_valid = resume_step if validated is None else validated
        kept = [
            record
            for record in (read_metrics(path) if path.exists() else [])
            if record.step < dropped_from
            and not (isinstance(record, (ValidationRecord, SamplesRecord)) and record.step > last_valid)
        ]
        self._bad_steps: Counter[Status] = Counter(
            r.status for r in kept if isinstance(r, StepRecord) and r.status != "applied"
        )
        self._tokens = max((r.tokens for r in kept if isinstance(r, StepRecord)), default=0)
        self._valid = next((r for r in reversed(kept) if isinstance(r, ValidationRecord)), None)
        self._read = next((r for r in reversed(kept) if isinstance(r, ReadRecord)), None)
        kept = [record for record in kept if not isinstance(record, ReadRecord)]  # `close` writes the one of this start
        self._exports = Counter(record.error is None for record in kept if isinstance(record, ExportRecord))
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

        self._sinks = open_sinks(run, config, resume_step, self.message)

        self._progress: Progress | None = None
        if sys.stdout and sys.stdout.isatty():  # None: it was closed before the start
            self._progress = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"), BarColumn(bar_width=None),
                TextColumn("{task.description}"), TextColumn("ETA"), TimeRemainingColumn(),
                auto_refresh=False,  # drawn by log_step: no thread beside the training loop
                transient=True, expand=True,
            )  # fmt: skip
            self._show(self._progress.start)
            self._bar = self._progress.add_task("loss -", total=n_steps, completed=resume_step)
            self._drawn_at = -math.inf

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log_step(self, record: StepRecord) -> None:
        """Take note of every step; what is shown and recorded of it is decided here."""
        assert record.step > self._step, f"step {record.step} was logged after step {self._step}"
        self._step, self._tokens = record.step, record.tokens
        self._times.update(record.times)
        self._all_times.update(record.times)
        self._times_of_record.update(record.times)
        self._n_steps_of_record += 1
        is_bad = record.status != "applied"
        loss = record.loss
        if is_bad:
            self._bad_steps[record.status] += 1
        else:
            self._losses.append(loss)
            self._recent.append(loss)
            loss = _mean(self._losses)
        if is_recorded(record.step, record.status, self._every_steps, self._n_steps):
            times = {part: s / self._n_steps_of_record for part, s in self._times_of_record.items()}
            record = dataclasses.replace(record, times=times)
            self._times_of_record.clear()
            self._n_steps_of_record = 0
            scalars = ("loss", "grad_norm", "lr", "tokens_per_s", "mfu", "memory_gib", "loss_scale", "data_wait_s")
            tags = {f"train/{name}": getattr(record, name) for name in scalars}
            tags |= {f"times/{part}": seconds for part, seconds in record.times.items()}
            self._write(record, tags | _source_scalars("train", record))
            if self._n_lines % N_LINES == 0:
                if self._n_lines and (line := times_line(self._times)):
                    self.message(f"{_place('time', self._n_steps)}  {line}")
                    self._times.clear()
                self.message(header_line(self._n_steps))
            self._n_lines += 1
            self.message(status_line(record, self._n_steps, loss))
            if not is_bad:
                self._losses.clear()
        if self._progress is not None:
            # drawing costs a millisecond or two: ten a second, so that short steps do not notice
            due = time.monotonic() - self._drawn_at >= 0.1
            text = f"loss {loss:.4f}  {human_count(record.tokens_per_s)} tok/s"
            bar = self._progress
            self._show(lambda: bar.update(self._bar, completed=record.step, description=text, refresh=due))
            if due:
                self._drawn_at = time.monotonic()

    def log_validation(
        self, step: int, loss: float, n_tokens: int, bits_per_byte: float = math.nan,
        sources: dict[str, SourceLoss] | None = None,
    ) -> None:  # fmt: skip
        record = self._valid = ValidationRecord(
            step=step, loss=loss, n_tokens=n_tokens, bits_per_byte=bits_per_byte, sources=sources or {}
        )
        self._write(record, {"valid/loss": record.loss} | _source_scalars("valid", record))
        parts: dict[str, ValidationRecord | SourceLoss] = {"": record}
        if len(record.sources) > 1:
            parts |= {f" of {name}": source for name, source in record.sources.items()}
        for name, part in parts.items():
            place = _place(step if part is record else "", self._n_steps)
            bits = "" if math.isnan(part.bits_per_byte) else f", {part.bits_per_byte:.3f} bits per byte"
            self.message(f"{place}  {part.loss:7.4f}  validation{name}, {human_count(part.n_tokens)} tokens{bits}")

    def log_samples(self, step: int, prompts: list[str], texts: list[str]) -> None:
        record = SamplesRecord(step=step, prompts=prompts, texts=texts)
        # as the code of Markdown, which keeps lines and spaces
        shown = {
            f"samples/{i}": f"    {prompt}{text}".replace("\n", "\n    ")
            for i, (prompt, text) in enumerate(zip(prompts, texts), start=1)
        }
        self._write(record, {}, shown)
        for prompt, text in zip(prompts, texts):
            line = f"{_place('', self._n_steps)}  {prompt!r} -> {text!r}"
            self.message(line if len(line) <= 80 else f"{line[:77]}...")

    def log_statistics(self, record: StatisticsRecord) -> None:
        scalars = {"statistics/n_drifting_rows": float(record.n_drifting_rows)}
        for prefix, values in {"": record.whole, **{f"{name}/": t for name, t in record.tensors.items()}}.items():
            scalars |= {f"statistics/{prefix}{name}": value for name, value in dataclasses.asdict(values).items()}
        for i, layer in enumerate(record.attention):
            scalars |= {f"attention/{name}/{i}": value for name, value in dataclasses.asdict(layer).items()}
        if record.attention:
            scalars["attention/output_logit"] = record.largest_logit
        self._write(record, scalars)
        self.message(statistics_line(record, self._n_steps))
        if record.attention:
            self.message(f"{_place('', self._n_steps)}  {attention_line(record)}")
        if record.n_drifting_rows > 0:
            self.message(
                "WARNING: embedding rows with an RMS beyond a tenth of 1 / optim.weight_decay: "
                f"{record.n_drifting_rows}. Sign updates drive the rows of rare tokens to +-1 / optim.weight_decay "
                "(9736): set optim.embedding=lazy, or lower optim.lr"
            )

    def log_export(self, record: ExportRecord) -> None:
        self._exports[record.error is None] += 1
        self._write(record, {})

    def log_read(self, record: ReadRecord) -> None:
        """Take note of what was read up to a step; the last note is said and recorded at the end."""
        self._read = record

    def message(self, text: str) -> None:
        """Print lines above the progress bar; in a log, just print them."""
        if self._progress is None:
            self._show(lambda: print(text, flush=True))
        else:
            console = self._progress.console
            self._show(lambda: console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True))

    def _show(self, show: Callable[[], None]) -> None:
        """Write to stdout, or do without: the files have what was said."""
        try:
            show()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return  # there may be room again
            mute_stdout()
            if self._progress is not None:
                bar, self._progress = self._progress, None
                bar.stop()

    def sync(self) -> None:
        """Push the records to the disk, before a checkpoint is there that follows them: a power cut leaves no gap."""
        self._flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the files, and say what the run has come to. A second call does nothing."""
        if self._file.closed:
            return
        if self._read:
            self._write(self._read, {})
        self._flush()
        self._file.close()
        if self._tensorboard is not None:
            with suppress(OSError):
                self._tensorboard.close()
        for sink in self._sinks:
            sink.close()
        if self._progress is not None:
            bar, self._progress = self._progress, None
            self._show(bar.stop)
        self.message("\n".join([*self._outcome(), *([self.last_words] if self.last_words else [])]))
        try:
            print(end="", flush=True)
        except OSError:  # of a full disk
            mute_stdout()

    def _outcome(self) -> list[str]:
        """Lines on steps, losses, tokens and time, and where they are."""
        counts: dict[Status, int] = {"applied": self._step - self._bad_steps.total(), **self._bad_steps}
        ends = ", ".join(f"{n} {status}" for status, n in counts.items())
        losses = []
        if self._recent:
            losses.append(f"{_mean(self._recent):.4f} over the last {len(self._recent)} steps")
        if self._valid is not None:
            losses.append(f"validation {self._valid.loss:.4f} at step {self._valid.step}")
        exports = f"exports     {self._exports[True]} written, {self._exports[False]} failed"
        took = timedelta(seconds=round(time.monotonic() - self._began))
        return [
            f"steps       {self._step} of {self._n_steps}: {ends}",
            *([f"loss        {', '.join(losses)}"] if losses else []),
            f"tokens      {self._tokens:,}; this start took {took}",
            *([f"time        {times}"] if (times := times_line(self._all_times)) else []),
            *([exports] if self._exports else []),
            *(read_lines(self._read) if self._read else []),
            f"run         {self._run}",
        ]

    def _write(self, record: Record, scalars: dict[str, float], texts: dict[str, str] | None = None) -> None:
        self._pending += json_line(record).encode()
        self._flush()
        for sink in self._sinks:
            sink.write(SinkRecord(record.step, scalars, texts or {}))
        if self._tensorboard is not None:
            try:
                for name, value in scalars.items():
                    self._tensorboard.add_scalar(name, value, record.step)
                for name, text in (texts or {}).items():
                    self._tensorboard.add_text(name, text, record.step)
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
