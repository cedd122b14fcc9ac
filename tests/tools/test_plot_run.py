"""The picture and the report of a run: curves where the losses are, on any terminal; mistakes cost one line."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megakexue.config import MetricsConfig
from megakexue.run.metrics import Metrics
from megakexue.run.records import AttentionStatistics
from tests.helpers import ROOT, make_record, make_statistics
from tests.programs import run_without_torch

TOOL = ROOT / "tools" / "plot_run.py"


def tool(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(TOOL), *map(str, arguments)]
    return subprocess.run(command, text=True, capture_output=True, **options)


def loss_at(step: int) -> float:
    return 2 + 8 / step


def write_run(run: Path, n_steps: int, *, every_steps: int = 1, bad: dict[int, str] | None = None) -> Path:
    config = MetricsConfig(tensorboard=False, every_steps=every_steps)
    with Metrics(run, config, n_steps=n_steps, resume_step=0) as metrics:
        for step in range(1, n_steps + 1):
            status = (bad or {}).get(step, "applied")
            loss = math.nan if status == "skipped" else loss_at(step)
            metrics.log_step(make_record(step, loss=loss, status=status, tokens_per_s=1000.0 * step, step_s=1.5))
            if step % 20 == 0:
                metrics.log_statistics(make_statistics(step))
            if step % 50 == 0:
                metrics.log_validation(step, loss_at(step) + 0.5, 65536)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", 200, bad={60: "skipped", 61: "skipped", 150: "shrunk"})


def test_report(run: Path) -> None:
    result = tool(run, "--report", "--baseline", "unigram=6.5", "--baseline", "entropy=1.75")
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == "tiny: training loss by step, nats per token"
    assert lines[-7:] == [
        "train       first 10.0000 (step 1)   last 2.0400 (step 200)   best 2.0400 (step 200)",
        "validation  first 2.6600 (step 50)   last 2.5400 (step 200)   best 2.5400 (step 200)",
        "baseline    unigram 6.5000: the last validation loss is 3.9600 below it",
        "baseline    entropy 1.7500: the last validation loss is 0.7900 above it",
        "tokens      819,200, epoch 0.667, median 100k tok/s",
        "steps       197 applied, 2 skipped (at 60, 61), 1 shrunk (at 150)",
        "wall time   0:05:00 in steps, 1.5 s each",
    ]
    assert len(lines) <= 24  # one screen


def curve_dots(lines: list[str]) -> np.ndarray:
    """The dots of the braille rows, decoded by the Unicode numbering."""
    rows = [line[10:].ljust(60) for line in lines]
    dots = np.zeros((4 * len(rows), 120), dtype=bool)
    for y, row in enumerate(rows):
        for x, character in enumerate(row):
            for bit, (dy, dx) in enumerate([(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (3, 0), (3, 1)]):
                if 0x2800 <= ord(character) <= 0x28FF and (ord(character) - 0x2800) >> bit & 1:
                    dots[4 * y + dy, 2 * x + dx] = True
    return dots


def test_report_draws_the_curve_where_the_losses_are(tmp_path: Path) -> None:
    # one record a dot column, so that each column's mean is a loss
    lines = tool(write_run(tmp_path / "run", 120), "--report", "--baseline", "two=2").stdout.splitlines()[2:14]
    assert all(len(line) <= 70 for line in lines)
    assert (lines[0][:10], lines[11][:10]) == ("  10.000 ┤", "   2.000 ┤")
    dots = curve_dots(lines)
    for x in range(120):
        value = round((10 - loss_at(x + 1)) / 8 * 47)
        ys = np.flatnonzero(dots[:, x])
        assert ys.max() == value
        assert x == 0 or ys.min() == round((10 - loss_at(x)) / 8 * 47)  # joined to the column before
    assert "┄" not in "".join(lines[:11])


def test_report_without_validation_and_with_thinned_steps(tmp_path: Path) -> None:
    result = tool(write_run(tmp_path / "run", 40, every_steps=20), "--report", "--baseline", "unigram=6.5")
    assert result.returncode == 0
    assert "validation" not in result.stdout
    assert "unigram 6.5000: the last training loss is 4.3000 below it" in result.stdout
    assert "wall time   about 0:01:00 in steps, 1.5 s each" in result.stdout
    single = tool(write_run(tmp_path / "single", 1), "--report")
    assert (single.returncode, single.stderr) == (0, "")
    assert "\nsteps       1 applied\n" in single.stdout


def test_report_names_the_first_steps_of_each_status(tmp_path: Path) -> None:
    bad = {4: "rolled back", 7: "skipped", 8: "skipped", 9: "skipped", 30: "skipped", 31: "shrunk"}
    result = tool(write_run(tmp_path / "run", 40, every_steps=20, bad=bad), "--report")
    assert (
        "\nsteps       34 applied, 1 rolled back (at 4), 4 skipped (at 7, 8, 9, ...), 1 shrunk (at 31)\n"
    ) in result.stdout


def test_report_on_a_terminal_that_knows_ascii_alone(run: Path) -> None:
    result = tool(run, "--report", env={"PYTHONIOENCODING": "ascii"})
    assert (result.returncode, result.stderr) == (0, "")
    assert "train       first 10.0000" in result.stdout


def test_png(run: Path, tmp_path: Path) -> None:
    from matplotlib import image

    other = write_run(tmp_path / "other", 100)
    out = tmp_path / "both.png"
    result = tool(run, other, "--out", out, "--baseline", "unigram=6.5")
    assert (result.returncode, result.stderr, result.stdout) == (0, "", f"wrote {out}\n")
    pixels = image.imread(out)
    assert pixels.shape == (1425, 1350, 4)
    for color in ((31, 119, 180), (255, 127, 14)):  # the first two of matplotlib's cycle: both curves are there
        assert (np.abs(pixels[..., :3] * 255 - color).max(axis=-1) < 2).sum() > 500
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both.png", "other"]

    before = out.read_bytes()
    result = tool(run, "--out", out)
    assert (result.returncode, out.read_bytes()) == (2, before)
    assert result.stderr == f"error: --out {out} exists: choose another name or add --overwrite\n"
    assert tool(run, "--out", out, "--overwrite").returncode == 0
    assert out.read_bytes() != before


def test_html_is_one_file_with_its_pictures(run: Path, tmp_path: Path) -> None:
    """tests/run/test_report.py has what it says."""
    out, other = tmp_path / "two.html", tmp_path / "<b>"
    with Metrics(other, MetricsConfig(tensorboard=False), n_steps=9, resume_step=0) as metrics:
        for step in range(1, 10):
            metrics.log_step(make_record(step))
            layer = AttentionStatistics(entropy=2.0, relative_entropy=0.5, largest_logit=float(step))
            metrics.log_statistics(make_statistics(step, attention=[layer] * 3, largest_logit=1.0))
    result = tool(run, other, "--html", out)
    assert (result.returncode, result.stderr, result.stdout) == (0, "", f"wrote {out}\n")
    text = out.read_text()
    assert text.count('src="data:image/png;base64,iVBOR') == text.count("<img") == 2  # curves, and attention of one
    assert "<title>tiny, &lt;b&gt;</title>" in text and "<b>" not in text
    assert "http" not in text and "<script" not in text
    assert tool(run, "--html", out).returncode == 2


def test_tiny_and_odd_runs_can_be_drawn(tmp_path: Path) -> None:
    single = write_run(tmp_path / "single", 1)
    flat = tmp_path / "flat"
    with Metrics(flat, MetricsConfig(tensorboard=False), n_steps=3, resume_step=0) as metrics:
        for step in range(1, 4):
            metrics.log_step(make_record(step, loss=2.0, grad_norm=math.inf if step == 2 else 0.0, lr=0.0))
    for number, runs in enumerate([(single,), (flat,), (single, flat)]):
        result = tool(*runs, "--out", tmp_path / f"{number}.png", "--report")
        assert (result.returncode, result.stderr) == (0, "")


def test_user_errors(run: Path, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    with Metrics(nothing, MetricsConfig(tensorboard=False), n_steps=1, resume_step=0) as metrics:
        metrics.log_step(make_record(1, loss=math.nan))
    png = tmp_path / "a.png"
    form = "is not of the form NAME=VALUE: unigram=6.93"
    cases: list[tuple[tuple[object, ...], str]] = [
        ((run,), "nothing to do: give --out PNG, --html HTML or --report"),
        ((tmp_path, "--report"), f"{tmp_path}/metrics.jsonl: no such file: give a run folder that"),
        ((nothing, "--out", png), f"{nothing}: no training step with a finite loss"),
        ((run, "--out", tmp_path / "a.pdf"), f"--out {tmp_path}/a.pdf must end in .png"),
        ((run, "--html", tmp_path / "a.htm"), f"--html {tmp_path}/a.htm must end in .html"),
        ((run, "--out", tmp_path / "no" / "a.png"), f"there is no folder {tmp_path}/no"),
        ((run, "--report", "--baseline", "6.5"), f"--baseline '6.5' {form}"),
        ((run, "--report", "--baseline", "x=y"), f"--baseline 'x=y' {form}"),
        ((run, "--report", "--baseline", "x=nan"), f"--baseline 'x=nan' {form}"),
    ]
    ends = run_without_torch(TOOL, [list(map(str, arguments)) for arguments, _ in cases])
    for (code, _, err), (arguments, message) in zip(ends, cases, strict=True):
        assert code == 2 and message in err, arguments
    assert [path.name for path in tmp_path.iterdir()] == ["nothing"]


def test_missing_matplotlib_says_what_to_install(run: Path, tmp_path: Path) -> None:
    blocked = "import runpy, sys; sys.modules['matplotlib'] = None; sys.argv = sys.argv[1:]; "
    code = blocked + "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(TOOL), str(run), "--out", str(tmp_path / "a.png")]
    result = subprocess.run(command, text=True, capture_output=True)
    assert result.returncode == 2
    assert result.stderr == "error: --out needs matplotlib, which is not installed: pip install 'matplotlib>=3.9'\n"


def test_help_shows_an_example() -> None:
    result = tool("--help")
    assert result.returncode == 0
    assert "tools/plot_run.py runs/125m --report --baseline unigram=6.93" in result.stdout
