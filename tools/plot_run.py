#!/usr/bin/env python
"""Draw the training curves of one or several runs, or report on them in a terminal or as one HTML file."""

import argparse
import datetime
import io
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

from megakexue.config import Status, UserError, require, run_program
from megakexue.files import require_new_file, write_whole
from megakexue.run.metrics import human_count
from megakexue.run.records import (
    ReadRecord,
    StatisticsRecord,
    StepRecord,
    ValidationRecord,
    read_lines,
    read_metrics,
)
from megakexue.run.report import page

EPILOG = """\
examples:
  tools/plot_run.py runs/125m --out loss.png
  tools/plot_run.py runs/125m runs/125m_tiger --out both.png --baseline unigram=6.93
  tools/plot_run.py runs/125m --report --baseline unigram=6.93
  tools/plot_run.py runs/125m runs/125m_tiger --html runs.html

The HTML file holds its pictures, and needs neither the network nor scripts. Beside the curves it has of each run its
facts, where the time goes, losses by source, steps that were not applied, starts, attention, samples and config.

A baseline is a loss in nats per token, drawn as a line to compare the curve with. One is the entropy of the unigram
frequencies: a model that ignores the context cannot get below it.
"""

CURVE_WIDTH, CURVE_HEIGHT = 60, 12  # characters; each is 2 by 4 dots of braille
N_BAD_SHOWN = 3  # of the steps that were not applied, for each status
N_SMOOTHED = 50  # a smoothed point averages one part in so many of the run
STYLE: Any = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "0.6", "axes.grid": True,
    "grid.color": "0.92", "axes.axisbelow": True, "xtick.color": "0.3", "ytick.color": "0.3", "legend.frameon": False,
}  # fmt: skip


class Run:
    """The records of one run by kind, under the name that a legend shows."""

    def __init__(self, path: Path) -> None:
        records = read_metrics(path)
        self.folder, self.records = path if path.is_dir() else path.parent, records
        self.name = self.folder.resolve().name
        self.train = [record for record in records if isinstance(record, StepRecord)]
        self.valid = [record for record in records if isinstance(record, ValidationRecord)]
        self.read = [record for record in records if isinstance(record, ReadRecord)]
        require(
            any(math.isfinite(record.loss) for record in self.train), f"{path}: no training step with a finite loss"
        )

    def column(self, field: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a field of the training records, where it is finite."""
        steps = np.array([record.step for record in self.train])
        values = np.array([getattr(record, field) for record in self.train], dtype=np.float64)
        finite = np.isfinite(values)
        return steps[finite], values[finite]


def smoothed(values: np.ndarray) -> np.ndarray:
    """Centred mean; its window shrinks at the start, where a loss falls fast, and loses its right half at the end."""
    n = len(values)
    total = np.concatenate([[0.0], np.cumsum(values)])
    at, half = np.arange(n), n // (2 * N_SMOOTHED)
    start, stop = at - np.minimum(at, half), np.minimum(at + np.minimum(at, half) + 1, n)
    return (total[stop] - total[start]) / (stop - start)


def draw_run(run: Run, index: int, loss: Any, norm: Any, speed: Any, lr: Any) -> tuple[float, float]:
    """Draw the curves of one run into the four panels. Return the lowest and the highest loss to be shown."""
    color = f"C{index}"
    steps, values = run.column("loss")
    curve = smoothed(values)
    loss.plot(steps, values, color=color, alpha=0.25, linewidth=0.6)
    loss.plot(steps, curve, color=color, linewidth=1.6, label=f"{run.name}: {curve[-1]:.3f}")
    low = float(np.percentile(values, 0.5))
    high = float(curve[len(curve) // 100 :].max())  # the first fall of a long run would flatten the rest
    if run.valid:
        at, valid = [record.step for record in run.valid], [record.loss for record in run.valid]
        label = f"{run.name} validation: {valid[-1]:.3f}"
        loss.plot(at, valid, "o", color=color, markersize=4.5, markeredgecolor="white", label=label, zorder=3)
    steps, values = run.column("grad_norm")
    steps, values = steps[values > 0], values[values > 0]
    if len(values):
        norm.set_yscale("log")
        norm.plot(steps, values, color=color, alpha=0.25, linewidth=0.6)
        norm.plot(steps, np.exp(smoothed(np.log(values))), color=color, linewidth=1.4)
    steps, values = run.column("tokens_per_s")
    speed.plot(steps, values, color=color, alpha=0.25, linewidth=0.6)
    speed.plot(steps, smoothed(values), color=color, linewidth=1.4)
    lr.plot(*run.column("lr"), color=color, linewidth=1.4, linestyle="--" if index else "-")
    bad = [record.step for record in run.train if record.status != "applied"]
    if bad:
        # a rug on the step axis: these steps often have no loss to draw a point at
        label = f"{run.name}: {len(bad)} not applied"
        rug = {"marker": "|", "markersize": 9, "linestyle": "none", "transform": norm.get_xaxis_transform()}
        norm.plot(bad, [0.0] * len(bad), color=color, label=label, clip_on=False, **rug)
    return low, high


def label_panels(loss: Any, norm: Any, speed: Any, lr: Any) -> None:
    """Give the panels their legends, labels and ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    above = {
        "loc": "lower left",
        "bbox_to_anchor": (0, 1),
        "borderaxespad": 0.2,
        "ncols": 2,
    }  # off curves and baselines
    loss.set_ylabel("loss (nats per token)")
    loss.legend(**above)
    norm.set_ylabel("gradient norm")
    if norm.get_yscale() == "log":
        lowest, highest = norm.get_ylim()
        norm.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if highest < 50 * lowest else (1,), numticks=6))
        norm.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        norm.yaxis.set_minor_locator(NullLocator())
    if norm.get_legend_handles_labels()[0]:
        norm.legend(**above)
    speed.set_ylabel("tokens/s")
    speed.set_ylim(bottom=0)
    speed.yaxis.set_major_formatter(FuncFormatter(lambda value, _: human_count(value)))
    lr.set_ylabel("learning rate")
    lr.set_ylim(bottom=0)
    lr.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    lr.set_xlabel("step")
    lr.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    lr.margins(x=0.01)
    lr.xaxis.set_major_formatter(FuncFormatter(lambda step, _: human_count(step)))


def pyplot(option: str) -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(f"{option} needs matplotlib, which is not installed: pip install 'matplotlib>=3.9'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def png(plt: Any, figure: Any, dpi: int) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi)
    plt.close(figure)
    return picture.getvalue()


def plot(plt: Any, runs: list[Run], baselines: dict[str, float]) -> bytes:
    """Return the PNG: loss over gradient norm over speed over learning rate, against steps."""
    with plt.rc_context(STYLE):
        figure, (loss, norm, speed, lr) = plt.subplots(
            4, 1, sharex=True, figsize=(9, 9.5), height_ratios=(4, 1.5, 1.5, 1.5), layout="constrained"
        )
        ends = [draw_run(run, index, loss, norm, speed, lr) for index, run in enumerate(runs)]
        shown = [*baselines.values(), *(end for pair in ends for end in pair)]
        margin = 0.05 * (max(shown) - min(shown) or 1.0)
        loss.set_ylim(min(shown) - margin, max(shown) + margin)
        for name, value in baselines.items():
            loss.axhline(value, color="0.35", linewidth=1, linestyle=(0, (5, 4)))
            text, place = f"{name} {value:.3f}", loss.get_yaxis_transform()
            loss.annotate(text, (1, value), (0, 3), xycoords=place, textcoords="offset points", ha="right")
        label_panels(loss, norm, speed, lr)
        figure.align_ylabels()
        return png(plt, figure, 150)


def plot_attention(plt: Any, run: Run) -> bytes | None:
    """Return a PNG of entropy and largest logit by layer, dark to light, against steps; None: not known."""
    found = [record for record in run.records if isinstance(record, StatisticsRecord) and record.attention]
    if not found:
        return None
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
        n_layers = len(found[-1].attention)
        for layer in range(n_layers):
            for panel, field in zip(panels, ("relative_entropy", "largest_logit")):
                points = [(r.step, getattr(r.attention[layer], field)) for r in found if layer < len(r.attention)]
                color = plt.get_cmap("viridis")(0.9 * layer / max(1, n_layers - 1))
                label = f"layer {layer}" if layer in (0, n_layers - 1) else None
                panel.plot(*zip(*points), color=color, marker=".", linewidth=1.2, label=label)
        for panel, name in zip(panels, ("entropy / ln n", "largest logit")):
            panel.set(title=f"{run.name}: attention, {name}", xlabel="step")
        panels[0].legend()
        return png(plt, figure, 110)


def write_html(plt: Any, runs: list[Run], picture: bytes, out: Path) -> None:
    pictures = [("loss, gradient norm, tokens/s and learning rate by step", picture)]
    for run in runs:
        if attention := plot_attention(plt, run):
            pictures.append((f"attention of {run.name} by layer and step", attention))
    text = page(", ".join(run.name for run in runs), pictures, [(run.name, run.folder, run.records) for run in runs])
    write_whole(out, text)


def draw_curve(run: Run, baselines: dict[str, float]) -> list[str]:
    """Lines of the loss curve: a mean for each column of braille dots, baselines dashed behind it."""
    steps, values = run.column("loss")
    n_x, n_y = 2 * CURVE_WIDTH, 4 * CURVE_HEIGHT
    first, last = steps[0], max(steps[-1], steps[0] + 1)
    column = (steps - first) * (n_x - 1) // (last - first)
    means = {int(x): float(values[column == x].mean()) for x in np.unique(column)}
    low, high = min([*means.values(), *baselines.values()]), max([*means.values(), *baselines.values()])
    height = (high - low) or 1.0

    def row(value: float) -> int:
        return round((high - value) / height * (n_y - 1))

    dots = np.zeros((n_y, n_x), dtype=bool)
    previous = None
    for x, mean in means.items():
        y = row(mean)
        above = y if previous is None else previous
        dots[min(y, above) : max(y, above) + 1, x] = True  # a steep curve stays connected
        previous = y
    # bit of each dot of a braille character, as Unicode numbers them from U+2800
    bits = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
    cells = (dots.reshape(CURVE_HEIGHT, 4, CURVE_WIDTH, 2).transpose(0, 2, 1, 3) * bits).sum(axis=(2, 3))
    dashed = {row(value) // 4 for value in baselines.values()}
    lines = []
    for y in range(CURVE_HEIGHT):
        blank = "┄" if y in dashed else " "
        label = (
            f"{high - height * y / (CURVE_HEIGHT - 1):8.3f} ┤"
            if y in (0, CURVE_HEIGHT // 2, CURVE_HEIGHT - 1)
            else " " * 9 + "│"
        )
        lines.append(label + "".join(chr(0x2800 + cell) if cell else blank for cell in cells[y]).rstrip(" "))
    lines.append(" " * 9 + "└" + "─" * CURVE_WIDTH)
    lines.append(" " * 10 + f"{first}" + f"{last}".rjust(CURVE_WIDTH - len(str(first))))
    return lines


def report(run: Run, baselines: dict[str, float]) -> None:
    """Print one screen on a run."""
    last = run.train[-1]
    print(f"{run.name}: training loss by step, nats per token\n")
    print("\n".join(draw_curve(run, baselines)) + "\n")
    series: dict[str, list[StepRecord] | list[ValidationRecord]] = {"train": run.train, "validation": run.valid}
    for name, records in series.items():
        finite = [record for record in records if math.isfinite(record.loss)]
        if finite:
            ends = {"first": finite[0], "last": finite[-1], "best": min(finite, key=lambda record: record.loss)}
            print(f"{name:<12}" + "   ".join(f"{end} {r.loss:.4f} (step {r.step})" for end, r in ends.items()))
    against, which = (run.valid[-1].loss, "validation") if run.valid else (run.column("loss")[1][-1], "training")
    for name, value in baselines.items():
        side = "below" if against < value else "above"
        print(f"{'baseline':<12}{name} {value:.4f}: the last {which} loss is {abs(value - against):.4f} {side} it")
    rate = statistics.median(record.tokens_per_s for record in run.train)
    print(f"{'tokens':<12}{last.tokens:,}, epoch {last.epoch:.3g}, median {human_count(rate)} tok/s")
    if run.read:
        print("\n".join(read_lines(run.read[-1])))
    bad: dict[Status, list[int]] = {}  # always recorded, whatever metrics.every_steps is
    for record in run.train:
        if record.status != "applied":
            bad.setdefault(record.status, []).append(record.step)
    counts = [f"{last.step - sum(map(len, bad.values())):,} applied"]
    for status, steps in bad.items():
        first = ", ".join(map(str, steps[:N_BAD_SHOWN])) + (", ..." if len(steps) > N_BAD_SHOWN else "")
        counts.append(f"{len(steps):,} {status} (at {first})")
    print(f"{'steps':<12}" + ", ".join(counts))
    mean = statistics.mean(record.step_s for record in run.train)
    about = "" if len(run.train) == last.step else "about "
    wall = datetime.timedelta(seconds=round(mean * last.step))
    print(f"{'wall time':<12}{about}{wall} in steps, {mean:.3g} s each")


def parse_baseline(text: str) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    require(name != "" and math.isfinite(number), f"--baseline {text!r} is not of the form NAME=VALUE: unigram=6.93")
    return name, number


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Draw the training curves of runs, or report on them in the terminal.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folder, or its metrics.jsonl")
    parser.add_argument("--out", metavar="PNG", type=Path, help="draw loss, gradient norm, tokens/s and learning rate")
    parser.add_argument("--html", metavar="HTML", type=Path, help="write a report with pictures and facts as one file")
    parser.add_argument("--report", action="store_true", help="print one screen on each run")
    parser.add_argument(
        "--baseline",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a horizontal line at this loss; repeatable",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace PNG and HTML")
    arguments = parser.parse_intermixed_args()
    if not arguments.out and not arguments.html and not arguments.report:
        parser.error("nothing to do: give --out PNG, --html HTML or --report")
    baselines = dict(map(parse_baseline, arguments.baseline))
    for option, out, suffix in (("--out", arguments.out, ".png"), ("--html", arguments.html, ".html")):
        if out:
            require(out.suffix == suffix, f"{option} {out} must end in {suffix}")
            require_new_file(option, out, arguments.overwrite)
    runs = [Run(path) for path in arguments.runs]
    if arguments.report:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")
        for index, run in enumerate(runs):
            print("\n" if index else "", end="")
            report(run, baselines)
    if arguments.out or arguments.html:
        plt = pyplot("--out" if arguments.out else "--html")
        picture = plot(plt, runs, baselines)
        if arguments.out:
            write_whole(arguments.out, picture)
        if arguments.html:
            write_html(plt, runs, picture, arguments.html)
        print("\n".join(f"wrote {out}" for out in (arguments.out, arguments.html) if out))


if __name__ == "__main__":
    run_program(main)
