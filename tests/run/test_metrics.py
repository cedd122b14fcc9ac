"""The record of a run: every float bit for bit, one file whatever stopped it, lines for a log and a terminal."""

import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megakexue.config import MetricsConfig
from megakexue.run.clock import PARTS
from megakexue.run.metrics import (
    Metrics,
    attention_line,
    header_line,
    human_count,
    statistics_line,
    status_line,
    times_line,
)
from megakexue.run.records import (
    AttentionStatistics,
    SourceLoss,
    StepRecord,
    TensorStatistics,
    ValidationRecord,
    read_metrics,
)
from tests.helpers import QUIET, ROOT, make_record, make_statistics, make_tensor, write_run
from tests.programs import run_python

# of programs that run apart; a record goes into their text by its repr, since this module would import torch
IMPORTS = """
import dataclasses, pathlib, sys
from megakexue.config import MetricsConfig
from megakexue.run.metrics import Metrics
from megakexue.run.records import StepRecord
"""


def test_resumed_run_leaves_the_file_of_an_uninterrupted_one(tmp_path: Path) -> None:
    bad = {4: "skipped", 12: "shrunk"}
    write_run(tmp_path / "whole", range(1, 21), bad=bad)
    write_run(tmp_path / "parts", range(1, 14), bad=bad)
    path = tmp_path / "parts" / "metrics.jsonl"
    with open(path, "a") as file:
        file.write('{"kind": "train", "step": 14, "lo')  # what a kill leaves
    assert [record.step for record in read_metrics(path) if isinstance(record, StepRecord)] == list(range(1, 14))
    write_run(tmp_path / "parts", range(11, 21), resume_step=10, bad=bad)
    assert path.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]  # no temporary file stays


def test_killed_process_loses_nothing_that_it_printed(tmp_path: Path) -> None:
    code = f"""{IMPORTS}
metrics = Metrics(pathlib.Path(sys.argv[1]), MetricsConfig(tensorboard=False), n_steps=10**9, resume_step=0)
for step in range(1, 10**9):
    metrics.log_step(dataclasses.replace({make_record(1)}, step=step))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        shown = [process.stdout.readline() for _ in range(300)]
        process.send_signal(signal.SIGKILL)
        shown += process.stdout.readlines()
    last = max(int(line.split("/")[0]) for line in shown if line[:1].isspace() and "/" in line and "step" not in line)
    steps = [record.step for record in read_metrics(tmp_path)]
    assert last >= 280  # one line in 21 is a header
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= last


def test_a_validation_that_is_made_again_is_recorded_once(tmp_path: Path) -> None:
    for validated in (0, 0, 2):
        with Metrics(tmp_path, QUIET, n_steps=2, resume_step=validated or 2, validated=validated) as metrics:
            if validated == 0:
                metrics.log_validation(2, 1.5, 7)
    assert repr(read_metrics(tmp_path)) == repr([ValidationRecord(step=2, loss=1.5, n_tokens=7)])


def test_records_are_on_the_disk_before_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    with Metrics(tmp_path, QUIET, n_steps=2, resume_step=0) as metrics:
        metrics.log_validation(1, 1.5, 7)
        monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
        metrics.sync()
    assert synced == [str(tmp_path / "metrics.jsonl")]


FULL = """
import os, pathlib, resource, signal, sys
from megakexue.config import MetricsConfig
from megakexue.run.metrics import Metrics
from megakexue.run.records import read_metrics

run = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit is an error, as on a full disk
with Metrics(run, MetricsConfig(tensorboard=False), n_steps=9, resume_step=0) as metrics:
    metrics.log_validation(1, 1.5, 7)
    size = (run / "metrics.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, resource.RLIM_INFINITY))
    for step in (2, 3):
        metrics.log_validation(step, 1.5, 7)
    assert (run / "metrics.jsonl").stat().st_size == size + 10
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    metrics.log_validation(4, 1.5, 7)
assert [r.step for r in read_metrics(run)] == [1, 2, 3, 4]
"""


def test_a_full_disk_loses_no_record_and_stops_nobody(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("WARNING: metrics.jsonl cannot be written, and waits: [Errno 27] File too large") == 1


def test_start_at_step_0_begins_anew(tmp_path: Path) -> None:
    for _ in range(2):
        with Metrics(tmp_path, QUIET, n_steps=20, resume_step=0) as metrics:
            metrics.log_validation(0, 10.8, 100)
            metrics.log_step(make_record(1))
    assert [record.step for record in read_metrics(tmp_path)] == [0, 1]
    write_run(tmp_path, range(2, 4), resume_step=1)
    assert [record.step for record in read_metrics(tmp_path)] == [0, 1, 2, 3]


def test_every_steps_thins_the_applied_steps_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = MetricsConfig(tensorboard=False, every_steps=10)
    bad = {7: "skipped", 8: "skipped", 13: "rolled back"}
    with Metrics(tmp_path, config, n_steps=25, resume_step=0) as metrics:
        for step in range(1, 26):
            metrics.log_step(make_record(step, status=bad.get(step, "applied")))
    shown = [1, 7, 8, 10, 13, 20, 25]
    assert [record.step for record in read_metrics(tmp_path)] == shown
    header, *lines = capsys.readouterr().out.splitlines()
    assert header == header_line(25)
    assert [int(line.split("/")[0]) for line in lines[: len(shown)]] == shown
    assert lines[len(shown)] == "steps       25 of 25: 22 applied, 2 skipped, 1 rolled back"


def test_a_line_has_the_mean_loss_since_the_line_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = MetricsConfig(tensorboard=False, every_steps=5)
    losses = {1: 9.0, 2: 1.0, 3: math.nan, 4: 2.0, 5: 6.0, 6: 4.0, 7: 5.0, 8: 6.0, 9: 7.0, 10: 8.0, 11: 3.0, 12: 5.0}
    with Metrics(tmp_path, config, n_steps=12, resume_step=0) as metrics:
        for step, loss in losses.items():
            metrics.log_step(make_record(step, loss=loss, status="skipped" if step == 3 else "applied"))
        metrics.log_validation(12, 4.5, 65536)
    # the records have each step's own, whatever was shown
    recorded = [record.loss for record in read_metrics(tmp_path) if isinstance(record, StepRecord | ValidationRecord)]
    assert recorded == pytest.approx([9.0, math.nan, 6.0, 8.0, 5.0, 4.5], nan_ok=True)
    _, *lines = capsys.readouterr().out.splitlines()
    shown = [(line.split("/")[0].strip(), line[9:18].strip()) for line in lines[:6]]
    assert shown == [
        ("1", "9.0000"),
        ("3", "nan"),
        ("5", "3.0000"),
        ("10", "6.0000"),
        ("12", "4.0000"),
        ("12", "4.5000"),
    ]
    assert lines[1].endswith("  skipped") and lines[5].endswith("  validation, 65.5k tokens")
    assert lines[7] == "loss        5.0909 over the last 11 steps, validation 4.5000 at step 12"


def test_the_end_says_what_it_has_come_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, range(1, 11))
    capsys.readouterr()
    with Metrics(tmp_path, QUIET, n_steps=20, resume_step=10) as metrics:  # resumed, and stopped before the next step
        metrics.last_words = "stopped: SIGTERM on rank 0"
    assert capsys.readouterr().out.splitlines() == [
        "steps       10 of 20: 10 applied",
        "loss        validation 3.0000 at step 10",
        "tokens      40,960; this start took 0:00:00",
        f"run         {tmp_path}",
        "stopped: SIGTERM on rank 0",
    ]


def test_counts_go_on_after_a_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, range(1, 13), bad={4: "skipped", 12: "shrunk"})
    assert "\nsteps       12 of 20: 10 applied, 1 skipped, 1 shrunk\n" in capsys.readouterr().out
    write_run(tmp_path, range(11, 21), resume_step=10, bad={15: "skipped"})
    assert "\nsteps       20 of 20: 18 applied, 2 skipped\n" in capsys.readouterr().out


def test_close_twice_says_it_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics(tmp_path, QUIET, n_steps=3, resume_step=0)
    metrics.close()
    metrics.close()
    assert capsys.readouterr().out.count("steps       0 of 3: 0 applied\n") == 1


def test_a_step_is_logged_once(tmp_path: Path) -> None:
    with Metrics(tmp_path, QUIET, n_steps=9, resume_step=5) as metrics:
        with pytest.raises(AssertionError, match="step 5 was logged after step 5"):
            metrics.log_step(make_record(5))
        metrics.log_step(make_record(6))
        with pytest.raises(AssertionError, match="step 6 was logged after step 6"):
            metrics.log_step(make_record(6))


def test_status_line() -> None:
    record = make_record(120, loss=4.02134, grad_norm=0.8123, lr=2.98e-4)
    assert header_line(1000) == "     step     loss      grad        lr  tok/s    mfu  mem GiB"
    assert status_line(record, 1000, 4.5) == " 120/1000   4.5000     0.812  2.98e-04  41.2k  38.1%     12.3"
    worst = make_record(7, grad_norm=math.inf, mfu=math.nan, status="rolled back", tokens_per_s=1.25e6)
    assert status_line(worst, 1000, math.nan) == (
        "   7/1000      nan       inf  2.10e-04  1.25M    n/a     12.3  rolled back"
    )


@pytest.mark.parametrize("n_steps", [9, 1_000, 50_000, 999_999, 9_999_999])
def test_lines_fit_a_terminal_and_have_columns(n_steps: int) -> None:
    values: list[dict[str, Any]] = [
        {},
        {"grad_norm": 1.2345e-5, "mfu": math.nan, "memory_gib": 1234.5, "tokens_per_s": 999_999.0},
        {"grad_norm": 1.2345e15, "mfu": 0.999, "lr": 0.0, "tokens_per_s": 3.0},
    ]
    lines = [status_line(make_record(n_steps, status="rolled back", **v), n_steps, 11.0704) for v in values]
    statistics = statistics_line(make_statistics(n_steps), n_steps)
    largest = make_layer(relative_entropy=0.987, largest_logit=-123.456)
    attention = attention_line(make_statistics(1, attention=[largest], largest_logit=-123.456))
    assert len(header_line(n_steps)) - len(header_line(9)) + 11 + len(attention) <= 80
    assert all(len(line) <= 80 for line in (*lines, statistics, header_line(n_steps)))
    ends = [match.end() for match in re.finditer(r"[a-z/]+( GiB)?", header_line(n_steps))]
    for line in lines:
        assert [match.end() for match in re.finditer(r"\S+", line.removesuffix("  rolled back"))] == ends


def test_each_screen_has_the_names_of_the_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, range(1, 71), n_steps=70)
    lines = [line for line in capsys.readouterr().out.splitlines() if "signs" not in line and "valid" not in line]
    assert [i for i, line in enumerate(lines) if line == header_line(70)] == [0, 21, 42, 63]


def test_statistics_line() -> None:
    assert statistics_line(make_statistics(100), 200) == "  100/200  update/weight 1.0e-03  cosine 0.31  signs 0.62"
    # the first step of weights that are zero, and a step that was skipped
    start = make_tensor(weight_rms=0.0, cosine=-0.25, sign_agreement=1.0)
    assert statistics_line(make_statistics(1, whole=start), 200) == (
        "    1/200  update/weight nan  cosine -0.25  signs 1.00"
    )
    skipped = make_tensor(update_rms=0.0, gradient_rms=math.nan, cosine=math.nan, sign_agreement=0.0)
    assert statistics_line(make_statistics(3, whole=skipped), 200) == (
        "    3/200  update/weight 0.0e+00  cosine nan  signs 0.00"
    )


def make_layer(**values: float) -> AttentionStatistics:
    return AttentionStatistics(**{"entropy": 3.0, "relative_entropy": 0.75, "largest_logit": 12.34, **values})


def test_attention_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = [make_layer(), make_layer(relative_entropy=0.5, largest_logit=45.67), make_layer(relative_entropy=0.95)]
    with Metrics(tmp_path, QUIET, n_steps=200, resume_step=0) as metrics:
        metrics.log_statistics(make_statistics(100, attention=layers, largest_logit=21.0))
    assert capsys.readouterr().out.splitlines()[1] == (
        "           entropy 0.73 ln n (0.50 to 0.95)  logits to 45.7, output 21"
    )


def test_times_are_said_with_each_header_and_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of all steps since, also those that have no line."""
    with Metrics(tmp_path, MetricsConfig(tensorboard=False, every_steps=2), n_steps=70, resume_step=0) as metrics:
        for step in range(1, 71):
            times = {"data": 0.5, "forward": 0.5, "saving": 0.001} if step < 41 else {"forward": 2.0}
            metrics.log_step(make_record(step, times=times))
    lines = capsys.readouterr().out.splitlines()
    assert [(i, line) for i, line in enumerate(lines) if "forward" in line] == [
        (21, "     time  data 50%  forward 50%"), (42, "time        data 20%  forward 80%"),
    ]  # fmt: skip
    assert header_line(70) == lines[0] == lines[22]
    means = [record.times for record in read_metrics(tmp_path) if isinstance(record, StepRecord)]
    assert means[1]["saving"] == pytest.approx(0.001) and means[21] == {"forward": 2.0}
    assert means[0]["data"] == means[19]["data"] == 0.5 and "saving" not in means[-1]
    equal = "backward 14%  reduction 14%  optimizer 14%  saving 14%  other 14%"
    assert times_line(dict.fromkeys(PARTS, 1.0)) == equal
    assert times_line({}) == ""


def test_drifting_rows_are_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Metrics(tmp_path, QUIET, n_steps=200, resume_step=0) as metrics:
        metrics.log_statistics(make_statistics(100))
        metrics.log_statistics(make_statistics(200, n_drifting_rows=12))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        statistics_line(make_statistics(100), 200),
        statistics_line(make_statistics(200), 200),
        "WARNING: embedding rows with an RMS beyond a tenth of 1 / optim.weight_decay: 12. Sign updates drive the rows "
        "of rare tokens to +-1 / optim.weight_decay (9736): set optim.embedding=lazy, or lower optim.lr",
    ]


@pytest.mark.parametrize(
    "n, text",
    [
        (0, "0"),
        (7.25, "7.25"),
        (999, "999"),
        (999.6, "1k"),
        (41234, "41.2k"),
        (999_999, "1M"),
        (3e9, "3G"),
        (3e13, "30T"),
    ],
)
def test_human_count(n: float, text: str) -> None:
    assert human_count(n) == text


SHORT_RUN = f"""{IMPORTS}
config = MetricsConfig(tensorboard=False, every_steps=10)
with Metrics(pathlib.Path(sys.argv[1]), config, n_steps=30, resume_step=0) as metrics:
    for step in range(1, 31):
        status = "skipped" if step == 17 else "applied"
        metrics.log_step(dataclasses.replace({make_record(1)}, step=step, status=status))
        if step == 12:
            metrics.message("数据 [red]as it is[/red] :smile: 🐯")
        if step == 29 and len(sys.argv) > 2:
            raise RuntimeError("out of luck")
"""
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


def test_log_has_plain_lines_only(tmp_path: Path) -> None:
    # FORCE_COLOR makes rich believe in a terminal; a log stays a log
    result = run_python(SHORT_RUN, str(tmp_path), env={**os.environ, "FORCE_COLOR": "1", "COLUMNS": "40"}, check=True)
    assert not CONTROL.search(result.stdout)
    lines = result.stdout.splitlines()
    assert [line.split("/")[0].strip() for line in lines if "/30" in line] == ["1", "10", "17", "20", "30"]
    assert lines[3] == "数据 [red]as it is[/red] :smile: 🐯"
    assert lines[7] == "steps       30 of 30: 29 applied, 1 skipped"
    assert len(lines) == 11


# what a shell gives a program whose reader has left, or whose log is on a full disk, or whose terminal is closed
@pytest.mark.parametrize("stdout", ["pipe", "disk", "terminal", "nothing"])
def test_a_stdout_that_fails_stops_nobody(stdout: str, tmp_path: Path) -> None:
    ends = {"pipe": os.pipe, "disk": lambda: (os.open(os.devnull, 0), os.open("/dev/full", 1)), "terminal": os.openpty}
    reader, writer = ends.get(stdout, os.pipe)()
    os.close(reader)
    shell = '"$@" >&-' if stdout == "nothing" else '"$@"'
    command = ["bash", "-c", shell, "bash", sys.executable, "-c", SHORT_RUN, str(tmp_path)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert [r.step for r in read_metrics(tmp_path)] == [1, 10, 17, 20, 30]


def run_on_terminal(code: str, *arguments: str) -> tuple[int, str]:
    """Exit status and all that the program sent to its terminal."""
    master, slave = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=slave, stderr=subprocess.DEVNULL, env=environment, cwd=ROOT
    )
    os.close(slave)
    output = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:  # Linux's end of file, once the other side is closed
            break
        if not piece:
            break
        output += piece
    os.close(master)
    return process.wait(), output.decode()


def test_terminal_has_a_bar_under_the_lines(tmp_path: Path) -> None:
    status, output = run_on_terminal(SHORT_RUN, str(tmp_path))
    assert status == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    assert "step 1/30" in text and "loss 6.5000  41.2k tok/s ETA" in text
    lines = re.findall(r"(\d+)/30  +\d", text)
    assert lines == ["1", "10", "17", "20", "30"]
    assert "数据 [red]as it is[/red] :smile: 🐯" in text
    assert "steps       30 of 30: 29 applied, 1 skipped" in text[text.rindex("/30  ") :]
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") == 1  # the cursor is hidden and comes back


def test_terminal_is_restored_when_training_fails(tmp_path: Path) -> None:
    status, output = run_on_terminal(SHORT_RUN, str(tmp_path), "fail")
    assert status == 1
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")
    assert output.rindex("steps       29 of 30: 28 applied, 1 skipped") > output.rindex("\x1b[?25h")


def test_tensorboard_scalars_and_their_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = MetricsConfig(tensorboard=True)
    for steps, resume_step, shift in ((range(1, 9), 0, 0.0), (range(6, 11), 5, 100.0)):
        with Metrics(tmp_path, config, n_steps=10, resume_step=resume_step) as metrics:
            for step in steps:
                metrics.log_step(make_record(step, loss=step + shift, status="skipped" if step == 3 else "applied"))
                if step in (4, 8):
                    metrics.log_statistics(make_statistics(step, n_drifting_rows=step))
            sources = {name: SourceLoss(loss=x, n_tokens=32, bits_per_byte=x / 4) for name, x in zip("ab", (1.5, 2.5))}
            metrics.log_validation(steps[-1], 2.0, 64, 0.5, sources)
            metrics.log_samples(steps[-1], ["def f("], ["x):\n    return"])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    names = ("loss", "grad_norm", "lr", "tokens_per_s", "mfu", "memory_gib", "loss_scale", "data_wait_s")
    fields = [field.name for field in dataclasses.fields(TensorStatistics)]
    tensors = ("", "embedding.weight/", "blocks.0.attention.wq/")
    assert set(events.Tags()["scalars"]) == (
        {f"train/{name}" for name in names}
        | {"train/bits_per_byte", "valid/loss", "valid/bits_per_byte", "statistics/n_drifting_rows"}
        | {f"valid/{kind}/{source}" for kind in ("loss", "bits_per_byte") for source in "ab"}
        | {f"statistics/{tensor}{field}" for tensor in tensors for field in fields}
    )
    text = events.Tensors("samples/1/text_summary")[-1]  # a reader keeps texts of steps that are trained again
    assert (text.step, text.tensor_proto.string_val[0]) == (10, b"    def f(x):\n        return")
    cosines = [(event.step, event.value) for event in events.Scalars("statistics/embedding.weight/cosine")]
    assert cosines == [(4, pytest.approx(0.104)), (8, pytest.approx(0.108))]  # float32
    assert [(event.step, event.value) for event in events.Scalars("statistics/n_drifting_rows")] == [(4, 4), (8, 8)]
    assert [event.value for event in events.Scalars("statistics/cosine")] == pytest.approx([0.31, 0.31])
    loss = [(event.step, event.value) for event in events.Scalars("train/loss")]
    # steps 6 to 8 of the first start are gone, as in metrics.jsonl
    assert loss == [(step, step if step <= 5 else step + 100) for step in range(1, 11)]
    assert loss == [(r.step, r.loss) for r in read_metrics(tmp_path) if isinstance(r, StepRecord)]
    assert [(event.step, event.value) for event in events.Scalars("valid/loss")] == [(10, 2.0)]
    assert [(event.step, event.value) for event in events.Scalars("valid/bits_per_byte/b")] == [(10, 0.625)]
