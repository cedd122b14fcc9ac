"""The records of a run: `metrics.jsonl`, from which everything else is drawn.

Each line is one JSON object. Its "kind" says which fields it has: those of `StepRecord` ("train"), `ValidationRecord`
("valid"), `StatisticsRecord` ("statistics"), `ExportRecord` ("export"), `SamplesRecord` ("samples") or `ReadRecord`
("read"). Floats are written by `repr`, so that they read back to the same bits. JSON has no other numbers, so
non-finite ones are the strings "nan", "inf" and "-inf", which `float()` takes too.
"""

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megakexue.config import Status, UserError, require
from megakexue.files import parse_json


@dataclass(frozen=True, kw_only=True)
class SourceLoss:
    """Of the rows of one source."""

    loss: float
    """Nats per target token."""
    n_tokens: int
    bits_per_byte: float


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
    bits_per_byte: float = math.nan
    """Of the text that the target tokens stand for; nan: not known, as in records of older versions."""
    sources: dict[str, SourceLoss] = dataclasses.field(default_factory=dict)
    """By name; those that had rows in this step."""
    times: dict[str, float] = dataclasses.field(default_factory=dict)
    """Seconds a step by the parts of megakexue/run/clock.py: the mean over the steps since the record before in this
    start, so that a save is seen whatever `metrics.every_steps` is. Empty: not known, as in older records."""


@dataclass(frozen=True, kw_only=True)
class ValidationRecord:
    step: int
    loss: float
    """Nats per target token."""
    n_tokens: int
    bits_per_byte: float = math.nan
    sources: dict[str, SourceLoss] = dataclasses.field(default_factory=dict)


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
class AttentionStatistics:
    """Of one layer, over the queries that `core.entropy` looks at, their heads, and all ranks."""

    entropy: float
    """The mean, in nats."""
    relative_entropy: float
    """The mean of entropy / ln n over the queries that see n > 1 keys: 0 at one key, 1 at all alike."""
    largest_logit: float
    """With the scale."""


@dataclass(frozen=True, kw_only=True)
class StatisticsRecord:
    step: int
    whole: TensorStatistics
    """All tensors as one vector."""
    tensors: dict[str, TensorStatistics]
    """By parameter name."""
    n_drifting_rows: int
    """Rows of the embedding whose RMS is beyond a tenth of 1 / weight_decay."""
    attention: list[AttentionStatistics] = dataclasses.field(default_factory=list)
    """By layer; empty: not known, as in records of older versions."""
    largest_logit: float = math.nan
    """Of the output, over the tokens that `core.entropy` looks at; nan: not known."""


@dataclass(frozen=True, kw_only=True)
class ExportRecord:
    """What came of the export of a checkpoint (`checkpoint.export`). It stands where it ended, steps later."""

    step: int
    """Of the checkpoint."""
    seconds: float
    error: str | None
    """None: it is written."""


def statistics_record(
    step: int, sums_by_name: dict[str, list[float]], n_drifting_rows: int, attention: list[AttentionStatistics],
    largest_logit: float,
) -> StatisticsRecord:  # fmt: skip
    """Make a record of the sums that `optim.N_STATISTICS` lists, by parameter, and of what the logits are."""

    def of(sums: Iterable[float]) -> TensorStatistics:
        weight2, update2, gradient2, product, n_with_gradient, n_against, n = sums
        norms = math.sqrt(update2 * gradient2)
        return TensorStatistics(
            weight_rms=math.sqrt(weight2 / n),
            update_rms=math.sqrt(update2 / n),
            gradient_rms=math.sqrt(gradient2 / n),
            cosine=product / norms if norms else math.nan,
            sign_agreement=n_against / n_with_gradient if n_with_gradient else math.nan,
        )

    return StatisticsRecord(
        step=step,
        whole=of(map(sum, zip(*sums_by_name.values()))),
        tensors={name: of(sums) for name, sums in sums_by_name.items()},
        n_drifting_rows=n_drifting_rows,
        attention=attention,
        largest_logit=largest_logit,
    )


@dataclass(frozen=True, kw_only=True)
class SamplesRecord:
    """What the model makes of `evaluate.prompts`, one text for each."""

    step: int
    prompts: list[str]
    texts: list[str]
    """The continuations."""


@dataclass(frozen=True, kw_only=True)
class SourceRead:
    """What the steps of a run have read of one source."""

    rows: int
    """Rows of data.seq_len tokens."""
    tokens: int
    """Target tokens in them."""
    n_rows: int
    """Rows that the source has: so many are one epoch of it."""
    synthetic: bool


@dataclass(frozen=True, kw_only=True)
class ReadRecord:
    """What was really read up to a step: the last line of a run that has ended."""

    step: int
    sources: dict[str, SourceRead]
    """By name."""


def read_lines(record: ReadRecord) -> list[str]:
    """Return lines that say it: rows, tokens, share of the tokens and epochs of each source."""
    sources = record.sources.values()
    n_tokens, n_rows = sum(source.tokens for source in sources), sum(source.rows for source in sources)
    if len(sources) == 1:
        (name,), (one,) = record.sources, sources
        return [f"read        {one.rows:,} rows of {name}: {one.rows / one.n_rows:.2f} epochs"]
    wide = max(6, *map(len, record.sources))

    def line(*cells: str) -> str:
        name, rows, tokens, share, epochs, note = cells
        return f"{name:<{wide}} {rows:>12} {tokens:>15} {share:>6} {epochs:>7}  {note}".rstrip()

    lines = [line("source", "rows", "tokens", "share", "epochs", f"up to step {record.step}")]
    for name, source in record.sources.items():
        epochs = f"{source.rows / source.n_rows:.2f}"
        share = f"{source.tokens / max(1, n_tokens):.1%}"
        note = "synthetic" if source.synthetic else ""
        lines.append(line(name, f"{source.rows:,}", f"{source.tokens:,}", share, epochs, note))
    synthetic = sum(source.tokens for source in sources if source.synthetic) / max(1, n_tokens)
    lines.append(line("all", f"{n_rows:,}", f"{n_tokens:,}", "", "", f"{synthetic:.1%} synthetic" * (synthetic > 0)))
    return [f"{'' if i else 'read':<12}{text}" for i, text in enumerate(lines)]


Record = StepRecord | ValidationRecord | StatisticsRecord | ExportRecord | SamplesRecord | ReadRecord
_KINDS: dict[str, type[Record]] = {
    "train": StepRecord, "valid": ValidationRecord, "statistics": StatisticsRecord, "export": ExportRecord,
    "samples": SamplesRecord, "read": ReadRecord,
}  # fmt: skip


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
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
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
    values = parse_json(line)
    kind = _KINDS[values.pop("kind")]
    if "sources" in values:
        of_one = SourceRead if kind is ReadRecord else SourceLoss
        values["sources"] = {name: _typed(of_one, source) for name, source in values["sources"].items()}
    if kind is StatisticsRecord:
        values["whole"] = _typed(TensorStatistics, values["whole"])
        values["tensors"] = {name: _typed(TensorStatistics, tensor) for name, tensor in values["tensors"].items()}
        values["attention"] = [_typed(AttentionStatistics, layer) for layer in values.get("attention", [])]
    if "times" in values:
        values["times"] = {part: float(seconds) for part, seconds in values["times"].items()}
    return _typed(kind, values)


def _typed(kind: type[Any], values: dict[str, Any]) -> Any:
    """Make a `kind` of JSON's `values`, whose "nan" becomes nan."""
    for field in dataclasses.fields(kind):
        if field.type in (int, float) and field.name in values:
            values[field.name] = float(values[field.name]) if field.type is float else int(values[field.name])
    return kind(**values)


def json_line(record: Record) -> str:
    """Return the line of metrics.jsonl, with its end, that `read_metrics` reads as `record`."""
    kind = next(name for name, kind in _KINDS.items() if isinstance(record, kind))
    return json.dumps({"kind": kind, **_finite(dataclasses.asdict(record))}, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """Turn floats that JSON does not have into strings, in dicts and lists inside `value` too."""
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
