#!/usr/bin/env python
"""Finetuning for a longer context: what each way to change RoPE gives, in loss by position and in needles found.

Two texts. `real` is Python's own sources, for a model that hardly uses its context: rows of 256 tokens, then of 2,048.
`copies` is made of random characters in passages that come again, for a model that can use its context: rows of 128
tokens, then of 1,024. Models are trained on short rows, then on long ones with each way to change RoPE. Needles and the
loss by position are taken before and after, and the loss on short rows beside them.
"""

import argparse
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from common import ROOT, Run, call, heading, make_text, prepare_data, table, train
from megakexue.config import as_integer, run_program
from megakexue.files import read_json, write_whole, writing

EPILOG = """\
Everything is written under runs/long_context. On one idle core it takes about an hour. Started again, it goes on where
it was stopped. docs/experiments.md says what came out.

examples:
  tools/experiments/long_context.py
  tools/experiments/long_context.py --texts copies --seeds 0
"""
OUT = Path("runs/long_context")
ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789. "
N_SHORT, N_LONG = 16_000, 3000
"""Documents of the made text."""
DEPTHS = (10, 50, 90)
EXTENSIONS = {
    "base": ("model.rope.extension=base",),
    "ntk": ("model.rope.extension=ntk_exact",),
    "yarn": ("model.rope.extension=yarn", "model.rope.yarn_temperature=false"),
}
"""How RoPE changes for the long rows. log n grows with the context already, so YaRN's temperature is not used."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A text and the two trainings on it."""

    name: str
    make_data: Callable[[Path], None]
    short: int
    """Tokens in a row of the first training."""
    long: int
    short_data: str
    """Folder of the first training; the other's is data."""
    tokenizer: str
    first: tuple[str, ...]
    """Changes of configs/tiny_gqa.yaml for it."""
    second: tuple[str, ...]
    """Changes of configs/tiny_2048.yaml for the finetuning."""

    @property
    def out(self) -> Path:
        return OUT / self.name

    def data(self, name: str) -> tuple[str, ...]:
        """Return the overrides that let a run train on a folder of prepared data."""
        return f"data.sources=[{{path: {self.out}/{name}}}]", f"data.tokenizer={self.out}/{self.tokenizer}"

    @property
    def lengths(self) -> tuple[int, ...]:
        """Rows of the needles: the short length, and twice it, until the long one."""
        return tuple(self.short << i for i in range((self.long // self.short).bit_length()))


def document(generator: np.random.Generator, seq_len: int) -> str:
    """Return one to four times seq_len characters of a passage that comes again and again.

    It comes at once, or after others that are new. Lengths differ, so that the end of a document cannot be foreseen.
    """
    size = int(generator.integers(seq_len, 4 * seq_len))
    if generator.random() < 0.5:
        passage = new_passage(generator, log_uniform(generator, 8, seq_len))
        return (passage * (size // len(passage) + 1))[:size]
    passage, text = new_passage(generator, int(generator.integers(8, 33))), ""
    while len(text) < size:
        text += passage + new_passage(generator, log_uniform(generator, 4, seq_len // 2))
    return text[:size]


def new_passage(generator: np.random.Generator, size: int) -> str:
    return "".join(np.array(list(ALPHABET))[generator.integers(len(ALPHABET), size=size)])


def log_uniform(generator: np.random.Generator, low: int, high: int) -> int:
    return int(math.exp(generator.uniform(math.log(low), math.log(high))))


def make_copies(out: Path) -> None:
    """Documents, a tokenizer whose pieces are characters, and rows, short and long ones."""
    kinds = {"short": (N_SHORT, 128), "data": (N_LONG, 1024)}
    for name, (n, seq_len) in kinds.items():
        shutil.rmtree(out / "text" / name, ignore_errors=True)
        generator = np.random.default_rng(0)
        lines = (json.dumps({"text": document(generator, seq_len)}) + "\n" for _ in range(n))
        with writing(str(out), out):
            (out / "text" / name).mkdir(parents=True)
            (out / "text" / name / "copies.jsonl").write_text("".join(lines))
    tokenizer = tokenizer_of_characters(out)
    for name, (_, seq_len) in kinds.items():
        options = ["--seq-len", f"{seq_len}", "--valid-fraction", "0.02"]
        call(
            [
                "tools/prepare_data.py",
                f"{out}/text/{name}",
                "--tokenizer",
                tokenizer,
                *options,
                "--out",
                f"{out}/{name}",
            ]
        )


def tokenizer_of_characters(out: Path) -> str:
    """Write a tokenizer.json with a token for each character and no others; return its path.

    The pieces for single bytes that tools/train_tokenizer.py adds would never occur here. A model of this size then
    needs several times as many steps before it copies.
    """
    marks = ["<pad>", "<s>", "</s>"]
    vocab = {token: i for i, token in enumerate([*marks, *ALPHABET])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(marks)
    path = out / "tokenizer.json"
    write_whole(path, tokenizer.to_str().encode())
    named = {"pad_token": marks[0], "bos_token": marks[1], "eos_token": marks[2]}
    write_whole(out / "tokenizer_config.json", json.dumps(named).encode())
    return str(path)


def make_real(out: Path) -> None:
    make_text(out)
    prepare_data(out, "data", "--seq-len", "2048", "--valid-fraction", "0.03")


SETTINGS = {
    "real": Setting(
        name="real", make_data=make_real, short=256, long=2048, short_data="data",
        tokenizer="tokenizer.model",
        first=("train.steps=300",),
        second=("train.steps=60", "train.global_batch_size=4", "optim.lr=5e-3"),
    ),
    "copies": Setting(
        name="copies", make_data=make_copies, short=128, long=1024, short_data="short",
        tokenizer="tokenizer.json",
        first=(
            "model.vocab_size=67", "model.n_layers=2", "model.d_ff=256", "model.residual=prenorm", "optim.name=adamw",
            "optim.lr=3e-3", "optim.beta2=0.98", "optim.weight_decay=0.01", "optim.warmup_steps=50",
            "optim.schedule=wsd", "optim.decay_steps=200", "train.steps=1500",
        ),
        second=(
            "train.steps=60", "train.global_batch_size=8", "optim.name=adamw", "optim.lr=1e-3", "optim.beta2=0.98",
            "optim.weight_decay=0.01",
        ),
    ),
}  # fmt: skip


def short_training(setting: Setting, seed: int) -> Run:
    overrides = (
        *setting.data(setting.short_data), f"data.seq_len={setting.short}",
        f"train.seed={seed}", f"data.shuffle_seed={seed}", "train.micro_batch_size=16",
        "checkpoint.every_steps=100", "evaluate.every_steps=100", "evaluate.n_rows=32",
        *setting.first,
    )  # fmt: skip
    return Run(name=f"short_{seed}", overrides=overrides)


def long_training(setting: Setting, kind: str, seed: int) -> Run:
    overrides = (
        *EXTENSIONS[kind], *setting.data("data"), f"data.seq_len={setting.long}",
        f"train.init_from={setting.out}/bundles/short_{seed}", f"data.shuffle_seed={seed + 100}",
        "train.micro_batch_size=2", "checkpoint.every_steps=20", "evaluate.every_steps=null", *setting.second,
    )  # fmt: skip
    return Run(name=f"{kind}_{seed}", overrides=overrides, config="configs/tiny_2048.yaml")


def train_and_measure(setting: Setting, run: Run) -> None:
    """Train a run, export it, and write what the probes say of it."""
    out = setting.out
    train(run, out)
    bundle = out / "bundles" / run.name
    if not bundle.is_dir():
        call(["tools/export_model.py", f"{out / run.name}", "--out", f"{bundle}"])
    lengths, depths = (",".join(map(str, values)) for values in (setting.lengths, DEPTHS))
    probes = {
        "needle": ["--needle", "--lengths", lengths, "--depths", depths, "--seeds", "20"],
        "position": ["--by-position", "--one-document", "--short", str(setting.short), "--n-rows", "100"],
    }
    for name, options in probes.items():
        path = out / "found" / f"{name}_{run.name}.json"
        if not path.is_file():
            call(["tools/evaluate.py", f"{bundle}", f"{out}/data", *options, "--json", f"{path}"])


@dataclass(frozen=True)
class Found:
    """What the probes say of one bundle."""

    needles: list[float]
    """Share of the values found, by length, all depths together."""
    starts: list[int]
    losses: list[float]
    """Nats per token from each start to the next."""
    counts: list[int]
    short: float
    """Nats per token of the same tokens in short rows."""

    def loss(self, low: int, high: int) -> float:
        """Return the nats per token at the positions low..high-1."""
        inside = [i for i, start in enumerate(self.starts) if low <= start < high]
        return sum(self.losses[i] * self.counts[i] for i in inside) / sum(self.counts[i] for i in inside)


def read_found(setting: Setting, name: str) -> Found:
    folder = setting.out / "found"
    cells = read_json(folder / f"needle_{name}.json", "needles")["needle"]
    own = [[cell for cell in cells if cell["length"] == length] for length in setting.lengths]
    said = read_json(folder / f"position_{name}.json", "losses by position")
    parts = [part for part in said["by_position"] if part["n_tokens"]]
    return Found(
        needles=[sum(c["n_exact"] for c in cs) / sum(c["n_cases"] for c in cs) for cs in own],
        starts=[part["start"] for part in parts],
        losses=[part["loss_sum"] / part["n_tokens"] for part in parts],
        counts=[part["n_tokens"] for part in parts],
        short=said["short"]["loss"],
    )


def spread(values: Sequence[float], form: str) -> str:
    """Mean over the seeds (lowest .. highest)."""
    return f"{sum(values) / len(values):{form}} ({min(values):{form}} .. {max(values):{form}})"


def results(setting: Setting, found: dict[str, list[Found]]) -> str:
    """Return the tables of the losses and of the needles found."""
    edges = setting.lengths
    spans = [(0, edges[0]), *pairwise(edges)]
    losses = [
        [kind, *(spread([f.loss(*span) for f in seeds], ".3f") for span in spans),
         spread([f.short for f in seeds], ".3f")]
        for kind, seeds in found.items()
    ]  # fmt: skip
    needles = [
        [kind, *(spread([f.needles[i] for f in seeds], ".0%") for i in range(len(edges)))]
        for kind, seeds in found.items()
    ]
    titles = [f"loss at {low}-{high - 1}" for low, high in spans]
    first = table(["model", *titles, f"in rows of {setting.short}"], losses)
    return first + "\n\n" + table(["model", *(f"needles at {length}" for length in edges)], needles)


def band(axes: Any, x: Sequence[float], curves: Sequence[Sequence[float]], color: str, label: str) -> None:
    """Draw the mean of the seeds, and the range from the lowest to the highest."""
    values = np.array(curves)
    axes.plot(x, values.mean(0), "o-", color=color, markersize=4, label=label)
    axes.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)


def draw(setting: Setting, found: dict[str, list[Found]], path: Path) -> None:
    """Draw the loss by position and the needles by length into a PNG."""
    import matplotlib.pyplot as plt

    figure, (losses, needles) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for index, (kind, seeds) in enumerate(found.items()):
        starts = [max(start, 1) for start in seeds[0].starts]
        middle = [math.sqrt(start * end) for start, end in zip(starts, [*starts[1:], setting.long])]
        label = f"trained on {setting.short}" if kind == "short" else f"then on {setting.long}, {kind}"
        band(losses, middle, [f.losses for f in seeds], f"C{index}", label)
        band(needles, setting.lengths, [f.needles for f in seeds], f"C{index}", label)
    for axes, name in ((losses, "position (tokens)"), (needles, "row (tokens)")):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.axvline(setting.short, color="0.4", linewidth=1, linestyle=":")
        axes.set_xlabel(name)
        axes.grid(color="0.92")
    losses.set_ylabel("loss (nats per token)")
    needles.set_ylabel("values found")
    needles.set_ylim(-0.03, 1.03)
    losses.legend(fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=80)
    plt.close(figure)
    write_whole(path, picture.getvalue())


def run_setting(setting: Setting, seeds: Sequence[int]) -> None:
    with writing(str(setting.out), setting.out):
        (setting.out / "bundles").mkdir(parents=True, exist_ok=True)
        (setting.out / "found").mkdir(exist_ok=True)
    heading(f"{setting.name}: text, tokenizer, shards")
    if not (setting.out / "data").is_dir():
        setting.make_data(setting.out)
    heading(f"{setting.name}: training on rows of {setting.short}, then of {setting.long}; needles and losses")
    for seed in seeds:
        train_and_measure(setting, short_training(setting, seed))
    for seed, kind in product(seeds, EXTENSIONS):
        train_and_measure(setting, long_training(setting, kind, seed))
    names = ("short", *EXTENSIONS)
    found = {kind: [read_found(setting, f"{kind}_{seed}") for seed in seeds] for kind in names}
    heading(f"{setting.name}: nats per token, and share of needles found: mean over the seeds (lowest .. highest)")
    print(results(setting, found))
    draw(setting, found, setting.out / "long_context.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), help="(default: both)")
    parser.add_argument("--seeds", type=as_integer, nargs="+", default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    args = parser.parse_intermixed_args()
    os.chdir(ROOT)
    for name in args.texts:
        run_setting(SETTINGS[name], args.seeds)


if __name__ == "__main__":
    run_program(main)
