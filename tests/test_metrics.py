import dataclasses
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megakexue.config import MetricsConfig, UserError
from megakexue.metrics import (
    Metrics,
    StatisticsRecord,
    StepRecord,
    TensorStatistics,
    ValidationRecord,
    data_sheet_tflops,
    human_count,
    memory_gib,
    peak_flops,
    read_metrics,
    statistics_line,
    status_line,
)

ROOT = Path(__file__).resolve().parents[1]
QUIET = MetricsConfig(tensorboard=False)


def make_record(step: int, **values) -> StepRecord:
    """A plausible step of a small run, the same each time."""
    defaults = {
        "loss": 2.5 + 4 / math.sqrt(step),
        "grad_norm": 0.8 + 1 / step,
        "lr": 3e-4 * min(1, step / 10),
        "tokens": 4096 * step,
        "tokens_per_s": 41234.5,
        "mfu": 0.381,
        "memory_gib": 12.3,
        "status": "applied",
        "loss_scale": 1.0,
        "epoch": step / 300,
        "data_wait_s": 0.01,
        "step_s": 0.1,
    }
    return StepRecord(step=step, **{**defaults, **values})


def make_tensor(**values: float) -> TensorStatistics:
    defaults = {"weight_rms": 0.02, "update_rms": 2e-5, "gradient_rms": 3e-4, "cosine": 0.31, "sign_agreement": 0.62}
    return TensorStatistics(**{**defaults, **values})


def make_statistics(step: int, **values) -> StatisticsRecord:
    """The statistics of a plausible step, the same each time."""
    tensors = {"embedding.weight": make_tensor(cosine=0.1 + step / 1000), "blocks.0.attention.wq": make_tensor()}
    return StatisticsRecord(
        **{"step": step, "whole": make_tensor(), "tensors": tensors, "n_drifting_rows": 0, **values}
    )


def write_run(run: Path, steps: range, *, resume_step: int = 0, n_steps: int = 20, bad: dict[int, str] | None = None):
    with Metrics(run, QUIET, n_steps=n_steps, resume_step=resume_step) as metrics:
        for step in steps:
            metrics.log_step(make_record(step, status=(bad or {}).get(step, "applied")))
            if step % 4 == 0:
                metrics.log_statistics(make_statistics(step))
            if step % 5 == 0:
                metrics.log_validation(step, 2.6 + 4 / step, 65536)


# of programs that run apart; a record goes into their text by its repr, since this module would import torch
IMPORTS = """
import dataclasses, pathlib, sys
from megakexue.config import MetricsConfig
from megakexue.metrics import Metrics, StepRecord
"""


def run_python(code: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *arguments], text=True, capture_output=True, cwd=ROOT, **options)


finite_or_not = st.floats(width=64)  # nan, infinities, subnormals and -0.0 included
tensor_statistics = st.builds(
    TensorStatistics, **{field.name: finite_or_not for field in dataclasses.fields(TensorStatistics)}
)


@settings(deadline=None)  # it writes files
@given(loss=finite_or_not, grad_norm=finite_or_not, lr=finite_or_not, valid=finite_or_not, tensor=tensor_statistics)
def test_floats_come_back_bit_for_bit(tmp_path_factory, loss, grad_norm, lr, valid, tensor):
    run = tmp_path_factory.mktemp("run")
    record = make_record(1, loss=loss, grad_norm=grad_norm, lr=lr)
    statistics = make_statistics(1, whole=tensor, tensors={'词表 "a".b': tensor}, n_drifting_rows=3)
    with Metrics(run, QUIET, n_steps=1, resume_step=0) as metrics:
        metrics.log_step(record)
        metrics.log_statistics(statistics)
        metrics.log_validation(1, valid, 7)
    # repr tells -0.0 from 0.0 and takes nan for nan
    assert repr(read_metrics(run)) == repr([record, statistics, ValidationRecord(step=1, loss=valid, n_tokens=7)])


def test_lines_are_strict_json(tmp_path):
    with Metrics(tmp_path, QUIET, n_steps=3, resume_step=0) as metrics:
        for step, loss in enumerate([math.nan, math.inf, -math.inf], start=1):
            metrics.log_step(make_record(step, loss=loss))
        metrics.log_statistics(make_statistics(3, tensors={"gain": make_tensor(cosine=math.nan)}))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    objects = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) for line in lines]
    assert [o["loss"] for o in objects[:3]] == ["nan", "inf", "-inf"]
    assert objects[0].keys() == {"kind"} | {field.name for field in dataclasses.fields(StepRecord)}
    assert objects[0]["kind"] == "train"
    assert objects[3] == {
        "kind": "statistics",
        "step": 3,
        "whole": {"weight_rms": 0.02, "update_rms": 2e-5, "gradient_rms": 3e-4, "cosine": 0.31, "sign_agreement": 0.62},
        "tensors": {"gain": {**objects[3]["whole"], "cosine": "nan"}},
        "n_drifting_rows": 0,
    }


def test_resumed_run_leaves_the_file_of_an_uninterrupted_one(tmp_path):
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


def test_killed_process_loses_nothing_that_it_printed(tmp_path):
    code = f"""{IMPORTS}
metrics = Metrics(pathlib.Path(sys.argv[1]), MetricsConfig(tensorboard=False), n_steps=10**9, resume_step=0)
for step in range(1, 10**9):
    metrics.log_step(dataclasses.replace({make_record(1)}, step=step))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        shown = [process.stdout.readline() for _ in range(300)]
        process.send_signal(signal.SIGKILL)
        shown += process.stdout.readlines()
    last = max(int(line.split()[1].split("/")[0]) for line in shown if line.endswith("applied\n"))
    steps = [record.step for record in read_metrics(tmp_path)]
    assert last >= 300
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= last


def test_a_validation_that_is_made_again_is_recorded_once(tmp_path):
    for validated in (0, 0, 2):
        with Metrics(tmp_path, QUIET, n_steps=2, resume_step=validated or 2, validated=validated) as metrics:
            if validated == 0:
                metrics.log_validation(2, 1.5, 7)
    assert read_metrics(tmp_path) == [ValidationRecord(step=2, loss=1.5, n_tokens=7)]


def test_records_are_on_the_disk_before_a_checkpoint(tmp_path, monkeypatch):
    synced = []
    with Metrics(tmp_path, QUIET, n_steps=2, resume_step=0) as metrics:
        metrics.log_validation(1, 1.5, 7)
        monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
        metrics.sync()
    assert synced == [str(tmp_path / "metrics.jsonl")]


FULL = """
import os, pathlib, resource, signal, sys
from megakexue.config import MetricsConfig
from megakexue.metrics import Metrics, read_metrics

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


def test_a_full_disk_loses_no_record_and_stops_nobody(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("WARNING: metrics.jsonl cannot be written, and waits: [Errno 27] File too large") == 1


def test_start_at_step_0_begins_anew(tmp_path):
    for _ in range(2):
        with Metrics(tmp_path, QUIET, n_steps=20, resume_step=0) as metrics:
            metrics.log_validation(0, 10.8, 100)
            metrics.log_step(make_record(1))
    assert [record.step for record in read_metrics(tmp_path)] == [0, 1]
    write_run(tmp_path, range(2, 4), resume_step=1)
    assert [record.step for record in read_metrics(tmp_path)] == [0, 1, 2, 3]


def test_every_steps_thins_the_applied_steps_only(tmp_path, capsys):
    config = MetricsConfig(tensorboard=False, every_steps=10)
    bad = {7: "skipped", 8: "skipped", 13: "rolled back"}
    with Metrics(tmp_path, config, n_steps=25, resume_step=0) as metrics:
        for step in range(1, 26):
            metrics.log_step(make_record(step, status=bad.get(step, "applied")))
    shown = [1, 7, 8, 10, 13, 20, 25]
    assert [record.step for record in read_metrics(tmp_path)] == shown
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines[:-1]] == shown
    assert lines[-1] == "25 steps: 22 applied, 2 skipped, 1 rolled back"


def test_counts_go_on_after_a_resume(tmp_path, capsys):
    write_run(tmp_path, range(1, 13), bad={4: "skipped", 12: "shrunk"})
    assert capsys.readouterr().out.splitlines()[-1] == "12 steps: 10 applied, 1 skipped, 1 shrunk"
    write_run(tmp_path, range(11, 21), resume_step=10, bad={15: "skipped"})
    assert capsys.readouterr().out.splitlines()[-1] == "20 steps: 18 applied, 2 skipped"


def test_close_twice_says_it_once(tmp_path, capsys):
    metrics = Metrics(tmp_path, QUIET, n_steps=3, resume_step=0)
    metrics.close()
    metrics.close()
    assert capsys.readouterr().out == "0 steps: 0 applied\n"


def test_a_step_is_logged_once(tmp_path):
    with Metrics(tmp_path, QUIET, n_steps=9, resume_step=5) as metrics:
        with pytest.raises(AssertionError, match="step 5 was logged after step 5"):
            metrics.log_step(make_record(5))
        metrics.log_step(make_record(6))
        with pytest.raises(AssertionError, match="step 6 was logged after step 6"):
            metrics.log_step(make_record(6))


@pytest.mark.parametrize(
    "damage",
    [
        '{"kind": "train", "step": 2, "lo',
        "[]",
        '{"kind": "test"}',
        '{"kind": "valid", "step": 2}',
        '{"kind": "statistics", "step": 2, "whole": {}, "tensors": {}, "n_drifting_rows": 0}',
        '{"kind": "statistics", "step": 2, "whole": [], "tensors": [], "n_drifting_rows": 0}',
        "\x00\x00",
        "",
    ],
)
def test_damage_before_the_last_line_is_an_error(tmp_path, damage):
    write_run(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().split("\n")
    lines[1] = damage
    path.write_text("\n".join(lines))
    message = rf"{path}:2: no record of a run \(.*\): repair the line or move the file away"
    with pytest.raises(UserError, match=message):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match=message):
        Metrics(tmp_path, QUIET, n_steps=9, resume_step=3)
    assert path.read_text() == "\n".join(lines)  # untouched, for the user to look at


def test_two_runs_in_one_folder_are_an_error(tmp_path):
    write_run(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() * 2)
    with pytest.raises(UserError, match=r":4: step 1 comes after step 3: two runs have written into this folder; move"):
        read_metrics(path)


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"metrics.jsonl: no such file: give a run folder that launch/train.py has wri"):
        read_metrics(tmp_path)


def test_status_line():
    assert status_line(make_record(120, loss=4.02134, grad_norm=0.8123, lr=2.98e-4), 1000) == (
        "step    120/1000  loss  4.0213  grad 0.812     lr 2.98e-04  41.2k tok/s  mfu 38.1%  mem  12.3 GiB  applied"
    )
    worst = make_record(7, loss=math.nan, grad_norm=math.inf, mfu=math.nan, status="rolled back", tokens_per_s=1.25e6)
    assert status_line(worst, 1000) == (
        "step      7/1000  loss     nan  grad inf       lr 2.10e-04  1.25M tok/s  mfu   n/a  mem  12.3 GiB  rolled back"
    )


def test_statistics_line():
    assert statistics_line(make_statistics(100), 200) == (
        "step    100/200  update/weight 1.0e-03  cosine  0.31  signs 0.62"
    )
    # the first step of weights that are zero, and a step that was skipped
    start = make_tensor(weight_rms=0.0, cosine=-0.25, sign_agreement=1.0)
    assert statistics_line(make_statistics(1, whole=start), 200) == (
        "step      1/200  update/weight     nan  cosine -0.25  signs 1.00"
    )
    skipped = make_tensor(update_rms=0.0, gradient_rms=math.nan, cosine=math.nan, sign_agreement=0.0)
    assert statistics_line(make_statistics(3, whole=skipped), 200) == (
        "step      3/200  update/weight 0.0e+00  cosine   nan  signs 0.00"
    )


def test_drifting_rows_are_a_warning(tmp_path, capsys):
    with Metrics(tmp_path, QUIET, n_steps=200, resume_step=0) as metrics:
        metrics.log_statistics(make_statistics(100))
        metrics.log_statistics(make_statistics(200, n_drifting_rows=12))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [
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
def test_human_count(n, text):
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


def test_log_has_plain_lines_only(tmp_path):
    # FORCE_COLOR makes rich believe in a terminal; a log stays a log
    result = run_python(SHORT_RUN, str(tmp_path), env={**os.environ, "FORCE_COLOR": "1", "COLUMNS": "40"}, check=True)
    assert not CONTROL.search(result.stdout)
    lines = result.stdout.splitlines()
    assert [line.split("/")[0].split()[-1] for line in lines if line.startswith("step ")] == [
        "1",
        "10",
        "17",
        "20",
        "30",
    ]
    assert lines[2] == "数据 [red]as it is[/red] :smile: 🐯"
    assert lines[-1] == "30 steps: 29 applied, 1 skipped"
    assert len(lines) == 7


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


def test_terminal_has_a_bar_under_the_lines(tmp_path):
    status, output = run_on_terminal(SHORT_RUN, str(tmp_path))
    assert status == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    assert "step 1/30" in text and "loss 6.5000  41.2k tok/s ETA" in text
    lines = re.findall(r"step +(\d+)/30  loss", text)
    assert lines == ["1", "10", "17", "20", "30"]
    assert "数据 [red]as it is[/red] :smile: 🐯" in text
    assert text.rstrip().endswith("30 steps: 29 applied, 1 skipped")
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") == 1  # the cursor is hidden and comes back


def test_terminal_is_restored_when_training_fails(tmp_path):
    status, output = run_on_terminal(SHORT_RUN, str(tmp_path), "fail")
    assert status == 1
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")
    assert output.rstrip().endswith("29 steps: 28 applied, 1 skipped")


def test_reading_records_needs_no_torch():
    code = "import sys, megakexue.metrics; sys.exit('torch' in sys.modules or 'omegaconf' not in sys.modules)"
    assert run_python(code).returncode == 0


def test_tensorboard_scalars_and_their_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = MetricsConfig(tensorboard=True)
    for steps, resume_step, shift in ((range(1, 9), 0, 0.0), (range(6, 11), 5, 100.0)):
        with Metrics(tmp_path, config, n_steps=10, resume_step=resume_step) as metrics:
            for step in steps:
                metrics.log_step(make_record(step, loss=step + shift, status="skipped" if step == 3 else "applied"))
                if step in (4, 8):
                    metrics.log_statistics(make_statistics(step, n_drifting_rows=step))
            metrics.log_validation(steps[-1], 2.0, 64)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    names = ("loss", "grad_norm", "lr", "tokens_per_s", "mfu", "memory_gib", "loss_scale", "data_wait_s")
    fields = [field.name for field in dataclasses.fields(TensorStatistics)]
    tensors = ("", "embedding.weight/", "blocks.0.attention.wq/")
    assert set(events.Tags()["scalars"]) == (
        {f"train/{name}" for name in names}
        | {"valid/loss", "statistics/n_drifting_rows"}
        | {f"statistics/{tensor}{field}" for tensor in tensors for field in fields}
    )
    cosines = [(event.step, event.value) for event in events.Scalars("statistics/embedding.weight/cosine")]
    assert cosines == [(4, pytest.approx(0.104)), (8, pytest.approx(0.108))]  # float32
    assert [(event.step, event.value) for event in events.Scalars("statistics/n_drifting_rows")] == [(4, 4), (8, 8)]
    assert [event.value for event in events.Scalars("statistics/cosine")] == pytest.approx([0.31, 0.31])
    loss = [(event.step, event.value) for event in events.Scalars("train/loss")]
    # steps 6 to 8 of the first start are gone, as in metrics.jsonl
    assert loss == [(step, step if step <= 5 else step + 100) for step in range(1, 11)]
    assert loss == [(r.step, r.loss) for r in read_metrics(tmp_path) if isinstance(r, StepRecord)]
    assert [(event.step, event.value) for event in events.Scalars("valid/loss")] == [(10, 2.0)]


CPU = torch.device("cpu")


def test_peak_from_the_config():
    peak, source = peak_flops(MetricsConfig(peak_tflops=123.5), CPU, torch.bfloat16)
    assert peak == 123.5e12
    assert source == "MFU is against metrics.peak_tflops=123.5."


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_of_a_cpu_is_measured(dtype):
    peak, source = peak_flops(MetricsConfig(), CPU, dtype)
    assert 1e9 < peak < 1e14  # from an emulated dtype on one core to a large server
    name, threads = str(dtype).removeprefix("torch."), torch.get_num_threads()
    assert source.startswith(f"MFU is against a {name} matmul of 1024 x 1024 measured here with {threads} threads: ")


@pytest.mark.parametrize(
    "gpu, half, single",
    [
        ("NVIDIA H100 80GB HBM3", 989, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H100 NVL", 835, 60),
        ("NVIDIA H200", 989, 67),
        ("NVIDIA H200 NVL", 835, 60),
        ("NVIDIA H20", 148, 44),
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA A100-PCIE-40GB", 312, 19.5),
        ("NVIDIA A800-SXM4-80GB", 312, 19.5),
        ("NVIDIA B200", 2250, math.nan),
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA GeForce RTX 4090", 165, 82.6),
        # names that hold the name of another chip
        ("NVIDIA GeForce RTX 4090 D", math.nan, math.nan),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", math.nan, math.nan),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", math.nan, math.nan),
        ("NVIDIA A10G", math.nan, math.nan),
        ("NVIDIA L40", math.nan, math.nan),
        ("NVIDIA GH200 480GB", math.nan, math.nan),
    ],
)
def test_peak_of_a_known_gpu(gpu, half, single):
    assert data_sheet_tflops(gpu, torch.bfloat16) == pytest.approx(half, rel=0, nan_ok=True)
    assert data_sheet_tflops(gpu, torch.float16) == pytest.approx(half, rel=0, nan_ok=True)
    assert data_sheet_tflops(gpu, torch.float32) == pytest.approx(single, rel=0, nan_ok=True)
    assert math.isnan(data_sheet_tflops(gpu, torch.float64))


def test_unknown_peak_says_what_to_set():
    peak, source = peak_flops(MetricsConfig(), torch.device("meta"), torch.bfloat16)
    assert math.isnan(peak)
    assert source == (
        "MFU is not shown: the bfloat16 peak of meta is not known; set metrics.peak_tflops from its data sheet."
    )


def test_memory_of_a_cpu_process_is_its_peak():
    before = memory_gib(CPU)
    total_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**30
    assert resident - 0.01 <= before < total_gib
    n_gib = before - resident + 0.125
    block = torch.ones(round(n_gib * 2**28))
    assert memory_gib(CPU) >= before + 0.1
    del block
    assert memory_gib(CPU) >= before + 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_peak_and_memory():
    device = torch.device("cuda")
    peak, source = peak_flops(MetricsConfig(), device, torch.bfloat16)
    assert torch.cuda.get_device_name(device) in source
    assert math.isnan(peak) == source.startswith("MFU is not shown")
    block = torch.ones(2**28, device=device)
    assert memory_gib(device) >= block.nbytes / 2**30
