"""What a run tells its user: `metrics.jsonl`, one status line a step, a progress bar, TensorBoard.

`metrics.jsonl` is the record that everything else is drawn from. One JSON object a line, whose "kind" says which fields
it has: those of `StepRecord` ("train"), `ValidationRecord` ("valid") or `StatisticsRecord` ("statistics"). Floats are
written by `repr`, so that they read back to the same bits; since JSON has no other numbers, non-finite ones are the
strings "nan", "inf" and "-inf", which `float()` takes like the rest.

What must stay true: an interrupted and resumed run leaves the same loss column as one that was never stopped.
Resuming at a checkpoint therefore first drops the records that lie after it.

MFU is model FLOP/s over peak FLOP/s, the peak being that of `peak_flops`.
"""

import dataclasses
import json
import math
import os
import re
import resource
import statistics
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megakexue.config import MetricsConfig, Status, UserError, require

if TYPE_CHECKING:  # imported where it is used: the tools that only read records start 2.5 s sooner
    import torch


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    step: int
    """Optimizer steps done, this one included: the first is 1."""
    loss: float
    """Nats per target token."""
    grad_norm: float
    lr: float
    tokens: int
    """Target tokens since step 1, padding left out."""
    tokens_per_s: float
    """Over all ranks."""
    mfu: float
    """A fraction; nan when the peak is unknown."""
    memory_gib: float
    status: Status
    loss_scale: float
    epoch: float
    data_wait_s: float
    """The part of `step_s` that was spent waiting for the batch."""
    step_s: float


@dataclass(frozen=True, kw_only=True)
class ValidationRecord:
    step: int
    loss: float
    """Nats per target token."""
    n_tokens: int


@dataclass(frozen=True, kw_only=True)
class TensorStatistics:
    """What one step did to a tensor; an RMS is over its elements."""

    weight_rms: float
    update_rms: float
    """Of the change that the step made to the tensor."""
    gradient_rms: float
    cosine: float
    """Between the change and minus the gradient; nan where either is zero."""
    sign_agreement: float
    """Share of the elements with a nonzero gradient that moved against its sign."""

    @property
    def update_per_weight(self) -> float:
        return self.update_rms / self.weight_rms if self.weight_rms else math.nan


@dataclass(frozen=True, kw_only=True)
class StatisticsRecord:
    step: int
    whole: TensorStatistics
    """All tensors as one vector."""
    tensors: dict[str, TensorStatistics]
    """By parameter name."""
    n_drifting_rows: int
    """Rows of the embedding whose RMS is beyond a tenth of 1 / weight_decay."""


Record = StepRecord | ValidationRecord | StatisticsRecord
_KINDS: dict[str, type[Record]] = {"train": StepRecord, "valid": ValidationRecord, "statistics": StatisticsRecord}


def read_metrics(path: Path) -> list[Record]:
    """Read the records of a run folder, or of a metrics.jsonl, in the order of the file.

    A last line that a kill tore off is left out.

    Raises:
        UserError: there is no such file, a line is no record, or the training steps do not increase.
    """
    path = path / "metrics.jsonl" if path.is_dir() else path
    require(path.is_file(), f"{path}: no such file: give a run folder that launch/train.py has written, or its metrics")
    records: list[Record] = []
    step = 0
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")  # whole lines leave "" at the end
    for number, line in enumerate(lines, start=1):
        try:
            record = _parse(line)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == len(lines):
                break
            remedy = "repair the line or move the file away"
            raise UserError(f"{path}:{number}: no record of a run ({error!r}): {remedy}") from error
        if isinstance(record, StepRecord):
            require(
                record.step > step,
                f"{path}:{number}: step {record.step} comes after step {step}: two runs have written into this folder; "
                "move the file away and give each its own train.run",
            )
            step = record.step
        records.append(record)
    return records


def _parse(line: str) -> Record:
    values = json.loads(line)
    kind = _KINDS[values.pop("kind")]
    if kind is StatisticsRecord:
        values["whole"] = _typed(TensorStatistics, values["whole"])
        values["tensors"] = {name: _typed(TensorStatistics, tensor) for name, tensor in values["tensors"].items()}
    return _typed(kind, values)


def _typed(kind: type[Any], values: dict[str, Any]) -> Any:
    """Make a `kind` of JSON's `values`, whose "nan" becomes nan."""
    for field in dataclasses.fields(kind):
        if field.type in (int, float):
            values[field.name] = float(values[field.name]) if field.type is float else int(values[field.name])
    return kind(**values)


def _json_line(record: Record) -> str:
    kind = next(name for name, kind in _KINDS.items() if isinstance(record, kind))
    return json.dumps({"kind": kind, **_finite(dataclasses.asdict(record))}, allow_nan=False) + "\n"


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Turn floats that JSON does not have into strings, in dicts inside `values` too."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return _finite(value)
        return repr(value) if isinstance(value, float) and not math.isfinite(value) else value

    return {name: finite(value) for name, value in values.items()}


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
            file.writelines(map(_json_line, kept))
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
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=None),
                TextColumn("{task.description}"),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                auto_refresh=False,  # drawn by log_step: no thread beside the training loop
                transient=True,
                expand=True,
            )
            self._progress.start()
            self._bar = self._progress.add_task("loss -", total=n_steps, completed=resume_step)
            self._drawn_at = -math.inf

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def log_step(self, record: StepRecord) -> None:
        """Take note of every step; what is shown and recorded of it is decided here."""
        assert record.step > self._step, f"step {record.step} was logged after step {self._step}"
        self._step = record.step
        if record.status != "applied":
            self._bad_steps[record.status] += 1
        if (
            record.status != "applied"
            or record.step % self._every_steps == 0
            or record.step == 1
            or record.step == self._n_steps
        ):
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
        self._pending += _json_line(record).encode()
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


# Dense TFLOP/s of one GPU by NVIDIA's data sheets: bf16 and fp16 with fp32 accumulation, then fp32 outside the tensor
# cores (TF32 off). The first row whose words all occur in the device's name counts.
_DATA_SHEET: dict[str, tuple[float, float]] = {
    "B200": (2250, math.nan),
    "H200 NVL": (835, 60),
    "H200": (989, 67),
    "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60),
    "H100": (989, 67),
    "H800 PCIe": (756, 51),
    "H800": (989, 67),
    "H20": (148, 44),
    "A100": (312, 19.5),
    "A800": (312, 19.5),
    "L40S": (362, 91.6),
    "L4": (121, 30.3),
    "RTX 5090": (209.5, 104.8),
    "RTX 4090": (165, 82.6),
    "RTX 3090": (71, 35.6),
}
_OTHER_CHIP = {"MIG", "GRID", "Laptop", "D", "Ti"}  # a slice or a variant of the GPU whose name it bears


def data_sheet_tflops(gpu: str, dtype: "torch.dtype") -> float:
    """Dense TFLOP/s of the GPU that calls itself `gpu`; nan when the table does not know it."""
    import torch

    words = set(re.split(r"[\s-]+", gpu))
    if dtype not in (torch.bfloat16, torch.float16, torch.float32) or words & _OTHER_CHIP:
        return math.nan
    for name, (half, single) in _DATA_SHEET.items():
        if words.issuperset(name.split()):
            return single if dtype == torch.float32 else half
    return math.nan


def peak_flops(config: MetricsConfig, device: "torch.device", dtype: "torch.dtype") -> tuple[float, str]:
    """Peak FLOP/s of one device, nan if unknown, and a sentence that says where the number comes from."""
    import torch

    name = str(dtype).removeprefix("torch.")
    if config.peak_tflops is not None:
        return config.peak_tflops * 1e12, f"MFU is against metrics.peak_tflops={config.peak_tflops:g}."
    if device.type == "cpu":
        flops = _matmul_flops(dtype)
        return flops, (
            f"MFU is against a {name} matmul of 1024 x 1024 measured here with {torch.get_num_threads()} threads: "
            f"{flops / 1e12:.3g} TFLOP/s."
        )
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    tflops = data_sheet_tflops(gpu, dtype)
    if math.isnan(tflops):
        return math.nan, (
            f"MFU is not shown: the {name} peak of {gpu} is not known; set metrics.peak_tflops from its data sheet."
        )
    tf32 = " without TF32" if dtype == torch.float32 else ""
    return tflops * 1e12, f"MFU is against the data sheet of {gpu}: {tflops:g} dense {name} TFLOP/s{tf32}."


def _matmul_flops(dtype: "torch.dtype", n: int = 1024) -> float:
    import torch

    matrix = torch.ones(n, n, dtype=dtype)
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(seconds[2:])  # the first ones set the kernel up


def memory_gib(device: "torch.device") -> float:
    """Peak memory in GiB: what PyTorch has reserved of a GPU, on CPU the resident size of this process."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # bytes there, KiB elsewhere
