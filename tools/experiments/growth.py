#!/usr/bin/env python
"""Growth: does a small model, grown and trained on, reach the loss of the large one from scratch with fewer FLOPs?

A small model is trained at a constant rate, grown before the rate falls, and trained on, against the large one from
scratch: Tiger and AdamW, wide and wide + deep, three seeds, two budgets from scratch.
"""

import argparse
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from common import NOISE, ROOT, TEXT_TITLE, Run, call, copy_sources, data_of, heading, make_text, prepare_data, train
from growth_table import OPTIMIZERS, SHAPES, report
from megakexue.config import as_integer, run_program
from megakexue.files import writing

EPILOG = """\
Everything is written under runs/growth; two idle cores, an optimizer each, take about an hour and a quarter. --size 20m
is a hundred times larger, for a GPU: 5M parameters to 20M and 29M, under runs/growth_20m. Started again, it goes on
where it was stopped. docs/growth.md says what came out.

examples:
  tools/experiments/growth.py
  tools/experiments/growth.py --optimizers adamw --parts small scratch    some runs, beside others; no table

tools/experiments/growth_table.py prints the table of what is there.
"""
PARTS = ("small", "scratch", "bundle", "grown")


def model(d_model: int, n_layers: int, n_heads: int, n_kv_heads: int, d_ff: int) -> tuple[str, ...]:
    return (
        f"model.d_model={d_model}",
        f"model.n_layers={n_layers}",
        f"model.n_heads={n_heads}",
        f"model.n_kv_heads={n_kv_heads}",
        f"model.d_ff={d_ff}",
    )


@dataclass(frozen=True, kw_only=True)
class Size:
    """The models, budgets and rates of one scale of the experiment."""

    out: Path
    vocab_size: int
    seq_len: int
    n_rows: int
    """Of a step."""
    dtype: str
    bucket_elements: int
    small_steps: int
    scratch_steps: tuple[int, ...]
    grown_steps: tuple[int, ...]
    warmup_steps: int
    grown_warmup_steps: int
    models: dict[str, tuple[str, ...]]
    """Overrides, of the small model and of each shape."""
    rates: dict[str, dict[str, str]]
    """By optimizer: of the small model, of each shape from scratch, and after growth."""
    with_packages: bool = False
    """Whether the text has the sources of the installed packages, too."""

    @property
    def common(self) -> tuple[str, ...]:
        """The overrides of every run and every growth."""
        return (
            *data_of(self.out), f"data.seq_len={self.seq_len}", f"model.vocab_size={self.vocab_size}",
            "model.tie_embeddings=true", f"engine.dtype={self.dtype}", f"engine.bucket_elements={self.bucket_elements}",
        )  # fmt: skip


SIZES = {
    "small": Size(
        out=Path("runs/growth"), vocab_size=384, seq_len=128, n_rows=8, dtype="fp32", bucket_elements=1_000_000,
        small_steps=1000, scratch_steps=(1000, 2000), grown_steps=(250, 400, 800, 1200), warmup_steps=50,
        grown_warmup_steps=20,
        models={"small": model(32, 4, 2, 1, 96), "wide": model(64, 4, 4, 2, 192), "deep": model(64, 6, 4, 2, 192)},
        rates={
            "tiger": {"small": "8e-3", "wide": "5.6e-3", "deep": "5.6e-3", "grown": "4e-3"},
            "adamw": {"small": "5e-3", "wide": "5e-3", "deep": "3.5e-3", "grown": "8e-3"},
        },
    ),
    "20m": Size(
        out=Path("runs/growth_20m"), vocab_size=4096, seq_len=512, n_rows=64, dtype="bf16", bucket_elements=50_000_000,
        small_steps=600, scratch_steps=(600, 1200), grown_steps=(240, 480, 720), warmup_steps=100,
        grown_warmup_steps=50,
        with_packages=True,
        models={
            "small": model(256, 6, 4, 2, 704), "wide": model(512, 6, 8, 4, 1408), "deep": model(512, 9, 8, 4, 1408),
        },
        rates={
            "tiger": {"small": "2.5e-3", "wide": "4e-3", "deep": "4e-3", "grown": "2e-3"},
            "adamw": {"small": "1e-3", "wide": "1e-3", "deep": "7e-4", "grown": "1e-3"},
        },
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Growth:
    """A bundle that is grown from the last checkpoint of a run."""

    name: str
    """Of the bundle's folder in OUT/bundles."""
    source: str
    """Name of the run."""
    overrides: tuple[str, ...]
    """key=value over the config, or options of tools/grow_model.py."""

    def bundle(self, out: Path) -> Path:
        return out / "bundles" / self.name

    def command(self, out: Path) -> list[str]:
        files = [f"{out / self.source}", "--config", "configs/tiny_grown.yaml", "--out", f"{self.bundle(out)}"]
        return ["tools/grow_model.py", *files, *self.overrides]


def constant(warmup_steps: int) -> tuple[str, ...]:
    """The schedule that warms up, and stays."""
    return "optim.schedule=piecewise", "optim.warmup_steps=0", f"optim.points={{{warmup_steps}: 1}}"


def falling(steps: int, warmup_steps: int) -> tuple[str, ...]:
    """The schedule that warms up, stays, and falls over the second half."""
    return "optim.schedule=wsd", f"optim.warmup_steps={warmup_steps}", f"optim.decay_steps={steps // 2}"


def training(size: Size, name: str, steps: int, optimizer: str, lr: str, seed: int, *more: str) -> Run:
    overrides = (
        *size.common, f"train.steps={steps}", f"train.global_batch_size={size.n_rows}",
        f"train.micro_batch_size={size.n_rows}", f"optim.name={optimizer}", f"optim.lr={lr}", f"train.seed={seed}",
        f"data.shuffle_seed={seed}", "checkpoint.every_steps=5000", "checkpoint.keep_last=1",
        "evaluate.every_steps=500", "evaluate.n_rows=512", "metrics.statistics_every_steps=null",
        "metrics.tensorboard=false", *more,
    )  # fmt: skip
    return Run(name=name, overrides=overrides)


def small_run(size: Size, optimizer: str, seed: int) -> Run:
    more = (*size.models["small"], *constant(size.warmup_steps))
    lr = size.rates[optimizer]["small"]
    return training(size, f"small-{optimizer}-{seed}", size.small_steps, optimizer, lr, seed, *more)


def scratch_run(size: Size, shape: str, steps: int, optimizer: str, seed: int) -> Run:
    more = (*size.models[shape], *falling(steps, size.warmup_steps))
    lr = size.rates[optimizer][shape]
    return training(size, f"scratch_{shape}@{steps}-{optimizer}-{seed}", steps, optimizer, lr, seed, *more)


def growth(size: Size, shape: str, optimizer: str, seed: int) -> Growth:
    overrides = (
        "--seed", str(seed), *size.common, f"data.shuffle_seed={seed}", f"optim.name={optimizer}", *size.models[shape],
    )  # fmt: skip
    return Growth(name=f"{shape}-{optimizer}-{seed}", source=f"small-{optimizer}-{seed}", overrides=overrides)


def grown_run(size: Size, shape: str, steps: int, optimizer: str, seed: int) -> Run:
    bundle = growth(size, shape, optimizer, seed).bundle(size.out)
    more = (
        *size.models[shape],
        *falling(steps, size.grown_warmup_steps),
        f"train.init_from={bundle}",
        "train.init_optimizer=keep",
        "train.init_data=continue",
    )
    lr = size.rates[optimizer]["grown"]
    return training(size, f"grown_{shape}@{steps}-{optimizer}-{seed}", steps, optimizer, lr, seed, *more)


def plan(size: Size, optimizer: str, seed: int, shapes: Sequence[str], parts: Sequence[str],
         steps: Sequence[int] | None = None) -> list[Run | Growth]:  # fmt: skip
    """List what is to be made with one optimizer and one seed, in order.

    Args:
        steps: budgets instead of those of `size`.
    """
    made: list[Run | Growth] = [small_run(size, optimizer, seed)] if "small" in parts else []
    for shape in shapes:
        if "scratch" in parts:
            made += [scratch_run(size, shape, n, optimizer, seed) for n in steps or size.scratch_steps]
        if "bundle" in parts:
            made.append(growth(size, shape, optimizer, seed))
        if "grown" in parts:
            made += [grown_run(size, shape, n, optimizer, seed) for n in steps or size.grown_steps]
    return made


def make(step: Run | Growth, out: Path) -> None:
    """Train a run, or grow a bundle, unless it is done."""
    if isinstance(step, Run):
        train(step, out, hidden=f"{NOISE}|^step")
    elif not step.bundle(out).is_dir():
        with writing(str(out), out):
            step.bundle(out).parent.mkdir(parents=True, exist_ok=True)
        call(step.command(out))


def prepare(size: Size) -> None:
    if (size.out / "data").is_dir():
        return
    heading(TEXT_TITLE)
    make_text(size.out, vocab_size=size.vocab_size)
    if size.with_packages:
        copy_sources(Path(sysconfig.get_paths()["purelib"]), size.out / "text", max_bytes=299 * 1024)
    prepare_data(size.out, "data", "--seq-len", str(size.seq_len), "--valid-fraction", "0.03")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="small", help="(default: %(default)s)")
    parser.add_argument("--seeds", type=as_integer, nargs="+", default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS, help="(default: all)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES, help="(default: all)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="of the runs (default: all, and then the table)")
    parser.add_argument(
        "--steps",
        type=as_integer,
        nargs="+",
        metavar="N",
        help="from scratch and after growth (default: those of the size)",
    )
    arguments = parser.parse_intermixed_args()
    os.chdir(ROOT)
    size = SIZES[arguments.size]
    prepare(size)
    for seed, optimizer in product(arguments.seeds, arguments.optimizers):
        for step in plan(size, optimizer, seed, arguments.shapes, arguments.parts or PARTS, arguments.steps):
            make(step, size.out)
    if arguments.parts is None:
        report(size.out)


if __name__ == "__main__":
    run_program(main)
