#!/usr/bin/env python
"""Measure bundles: the loss on prepared data, how it depends on the position, whether the context is used; and tasks.

Without a probe it is the loss of all tokens. The probes:

  --by-position   loss by powers of two of the position in the document, and beside it the loss of the same tokens in
                  short rows: what a longer context gains, and what finetuning for it has cost
  --needle        a key and a value of random tokens stand in running text, at some depth; at the end of the row comes
                  the key again. Shown: in how many cases the model knows the value, and how much more likely it is
                  than without the needle
  --copy          random tokens, or a passage of the data, come again at some distance. Shown: the loss of the first
                  occurrence, of the copy, and of the copy without a first occurrence
  --tasks         tasks of lm-evaluation-harness, which bring their own data: hellaswag, mmlu, yours
"""

import argparse
import dataclasses
import io
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megakexue.config import DataConfig, SourceConfig, UserError, as_integer, as_number, require, run_program
from megakexue.files import require_new_file, write_whole
from megakexue.text.manifest import Manifest, read_manifest
from megakexue.text.tokenizer_files import tokenizer_sha256

if TYPE_CHECKING:
    from megakexue.bundle.bundle import Bundle
    from megakexue.bundle.needle import RunningText
    from megakexue.core.decoder import Decoder
    from megakexue.run.data import Batches

Result = dict[str, Any]
"""What --json says of a bundle."""

EPILOG = """\
DATA was prepared with the tokenizer of the bundles; its rows may be longer than those of the training, to see how a
model extrapolates. The split of a document depends on its bytes and --valid-fraction alone: prepare the longer rows
with the fraction of the training data, and no validation document is one that a model was trained on. Needles and
copies take the text of the rows as one stream, so rows of any length will do.

Lengths beyond the context of a bundle are allowed, and marked with a *.

--set changes how the weights are used, in the model section of a bundle's config, for this evaluation only: a longer
context without finetuning, another base, another attention scale. Scales that follow from a change are chosen anew.

examples:
  tools/evaluate.py bundles/1b data/web
  tools/evaluate.py bundles/1b data/web_8k --by-position --one-document --json losses.json
  tools/evaluate.py bundles/1b bundles/1b_8k data/web_8k --by-position --one-document --plot losses.png
  tools/evaluate.py bundles/1b_8k data/web --needle --plot needle.png
  tools/evaluate.py bundles/1b bundles/1b_8k data/web --needle --lengths 4096,8192,16384 --seeds 20
  tools/evaluate.py bundles/1b_8k data/web --copy
  tools/evaluate.py bundles/1b data/web_8k --by-position --one-document --set rope.base=500000
  tools/evaluate.py bundles/1b data/web_8k --needle --lengths 8192 --set rope.extension=ntk_exact \\
      --set rope.context=8192
  tools/evaluate.py bundles/1b --tasks example_documents,example_endings
  tools/evaluate.py bundles/1b --tasks hellaswag,arc_easy --num-fewshot 5 --cache results --dtype bf16

Tasks get the same numbers as in the harness's own model `hf` from an export of the bundle. example_documents (bits per
byte), example_endings (multiple choice) and example_sums (greedy text) are in configs/tasks. --include names a folder
of yours with such YAML files; a `!function` in them is Python code, and it is run. The data of most other tasks is
downloaded. With --cache, the same command goes on where it was stopped.
"""
PROBES = ("by_position", "needle", "copy", "tasks")
TASKS = Path(__file__).parents[1] / "configs" / "tasks"
DEPTHS = [0.0, 25.0, 50.0, 75.0, 100.0]
STYLE: Any = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "0.6",
    "xtick.color": "0.3", "ytick.color": "0.3", "legend.frameon": False,
}  # fmt: skip


def as_lengths(text: str) -> list[int]:
    return sorted({as_integer(part) for part in text.split(",")})


def as_depths(text: str) -> list[float]:
    return sorted({as_number(part) for part in text.split(",")})


def as_names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if not names:
        raise argparse.ArgumentTypeError("name a task at least")
    return names


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s BUNDLE... DATA [options]\n       %(prog)s BUNDLE... --tasks NAME,NAME [options]",
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="BUNDLE... DATA",
        help="bundles, and at the end a folder written by tools/prepare_data.py; with --tasks only bundles",
    )
    parser.add_argument("--split", choices=("train", "valid"), help="of DATA (default: valid)")
    probe = parser.add_mutually_exclusive_group()
    probe.add_argument("--by-position", action="store_true", help="loss by position")
    probe.add_argument("--needle", action="store_true", help="a table of depths and lengths")
    probe.add_argument("--copy", action="store_true", help="a table of distances")
    probe.add_argument("--tasks", type=as_names, metavar="NAME,NAME", help="of lm-evaluation-harness, also with *")
    parser.add_argument("--n-rows", type=as_integer, metavar="N", help="loss: read the first N rows (default: all)")
    parser.add_argument(
        "--one-document",
        action="store_true",
        help="loss: count only rows that one document fills: then all positions are of the same text",
    )
    parser.add_argument(
        "--short",
        type=as_integer,
        metavar="N",
        help="--by-position: tokens in the short rows (default: the context before any extension, the least of all "
        "bundles; nothing where the rows are not longer)",
    )
    parser.add_argument(
        "--lengths",
        type=as_lengths,
        metavar="N,N",
        help="--needle, --copy: tokens in a row (default: the longest context of the bundles, for needles also a half "
        "and a quarter of it)",
    )
    parser.add_argument(
        "--depths",
        type=as_depths,
        metavar="P,P",
        help="--needle: percent of the text before it (default: 0,25,...,100)",
    )
    parser.add_argument(
        "--seeds",
        type=as_integer,
        metavar="N",
        help="--needle, --copy: cases, each of other text and other tokens (default: 10)",
    )
    parser.add_argument("--include", type=Path, metavar="FOLDER", help="--tasks: YAML files of tasks of yours")
    parser.add_argument(
        "--num-fewshot",
        type=as_integer,
        metavar="N",
        help="--tasks: examples before each question (default: the task's)",
    )
    parser.add_argument("--limit", type=as_integer, metavar="N", help="--tasks: only the first N documents of each")
    parser.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="--tasks: keep results, and compute none that is there"
    )
    parser.add_argument(
        "--batch-tokens",
        type=as_integer,
        metavar="N",
        help="--tasks: tokens that go through the model at a time (default: 4096)",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of model.attention or model.rope; repeatable"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the numbers into it: an object, or a list of them for bundles"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw what the probe has shown")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE and PNG")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of weights (default: fp32)")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the first GPU if there is one)")
    args = parser.parse_intermixed_args()
    check_arguments(args)
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Raises UserError: a value is out of range, an option has no effect, or a file is missing or in the way."""
    probe = next((name for name in PROBES if getattr(args, name)), "loss")
    args.probe = probe
    used_by = {
        "n_rows": {"loss", "by_position"}, "one_document": {"loss", "by_position"}, "short": {"by_position"},
        "lengths": {"needle", "copy"}, "depths": {"needle"}, "seeds": {"needle", "copy"},
        "plot": {"by_position", "needle", "copy"}, "split": {"loss", "by_position", "needle", "copy"},
        **{name: {"tasks"} for name in ("include", "num_fewshot", "limit", "cache", "batch_tokens")},
    }  # fmt: skip
    for name, probes in used_by.items():
        options = " or ".join("--" + p.replace("_", "-") for p in PROBES if p in probes)
        without = " and ".join("--" + p for p in PROBES if p not in probes)
        needs = f"without {without}" if "loss" in probes else f"with {options}"
        is_used = probe in probes or getattr(args, name) in (None, False)
        require(is_used, f"--{name.replace('_', '-')} has an effect only {needs}: drop it")
    for name in ("n_rows", "short", "seeds", "limit", "batch_tokens"):
        value = getattr(args, name)
        require(value is None or value > 0, f"--{name.replace('_', '-')} {value} must be positive")
    require((args.num_fewshot or 0) >= 0, f"--num-fewshot {args.num_fewshot} must not be negative")
    depths = args.depths or []
    require(all(0 <= depth <= 100 for depth in depths), f"--depths {depths}: percents must be between 0 and 100")
    args.bundles, args.data = (args.paths, None) if args.tasks else (args.paths[:-1], args.paths[-1])
    require(bool(args.bundles), f"{args.data}: name a bundle and then prepared data, or a bundle and --tasks")
    for bundle in args.bundles:
        require(bundle.is_dir(), f"no bundle {bundle}: make one with tools/export_model.py or tools/import_hf.py")
    require(not args.data or args.data.is_dir(), f"no folder {args.data}: make one with tools/prepare_data.py")
    require(not args.include or args.include.is_dir(), f"--include {args.include}: no such folder")
    args.split = args.split or "valid"
    for option, path in (("--json", args.json), ("--plot", args.plot)):
        if path:
            require_new_file(option, path, args.overwrite)
    if args.plot:
        require(args.plot.suffix == ".png", f"--plot {args.plot} must end in .png")
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise UserError("--plot needs matplotlib, which is not installed: pip install 'matplotlib>=3.9'") from error


# ----------------------------------------------------------------------------------------------------------- measuring


def open_bundles(args: argparse.Namespace) -> "tuple[list[Bundle], Manifest]":
    """Raises UserError: a bundle or the data is damaged, or they were not made for one another."""
    from megakexue.bundle.bundle import Bundle

    bundles, manifest = [Bundle(folder) for folder in args.bundles], read_manifest(args.data)
    for bundle in bundles:
        bundle.load_tokenizer()  # refuses one that is not of these weights
        digest = tokenizer_sha256(bundle.tokenizer)
        require(
            manifest.tokenizer_sha256 == digest,
            f"{args.data} was prepared with another tokenizer (sha256 {manifest.tokenizer_sha256[:12]}) than that of "
            f"{bundle.folder} ({digest[:12]}): prepare the data with {bundle.tokenizer}",
        )
    require(
        manifest.n_rows(args.split) > 0,
        f"{args.data} has no rows in its {args.split} split: prepare it with a larger --valid-fraction",
    )
    return bundles, manifest


def load_model(bundle: "Bundle", backend_setting: str, args: argparse.Namespace) -> "Decoder":
    """Raises UserError: the device is not there, or the backend cannot run on it."""
    from megakexue.bundle.generate import load_decoder
    from megakexue.core.attention import choose_backend
    from megakexue.core.device import DTYPES, find_device

    device, dtype = find_device(args.device), DTYPES[args.dtype]
    widths = bundle.config.head_width, bundle.config.value_width
    backend, _ = choose_backend(backend_setting, device.type, dtype, *widths)
    return load_decoder(bundle, device, dtype, backend)


def measure_loss(model: "Decoder", batches: "Batches", args: argparse.Namespace, short: int | None) -> Result:
    """Raises UserError: no row counts, or the loss is not finite."""
    from megakexue.bundle.evaluate import loss_by_position, loss_when_cut, position_edges

    seq_len, n_rows = batches.seq_len, min(batches.n_rows, args.n_rows or batches.n_rows)
    edges = position_edges(seq_len) if args.by_position else [0, seq_len]
    edges = sorted({*edges, *([short] if short else [])})
    parts = loss_by_position(model, batches.first_rows(n_rows), edges, one_document=args.one_document)
    n_tokens = sum(part.n_tokens for part in parts)
    require(n_tokens > 0, f"none of the {n_rows} rows is filled by one document: raise --n-rows, or use shorter rows")
    loss = sum(part.loss_sum for part in parts) / n_tokens
    require(math.isfinite(loss), f"the loss is not finite in {args.dtype}: evaluate with --dtype fp32")
    result: Result = {
        "seq_len": seq_len, "n_rows": n_rows, "one_document": args.one_document,
        "n_tokens": n_tokens, "loss": loss, "perplexity": math.exp(loss),
    }  # fmt: skip
    if args.by_position:
        result["by_position"] = [dataclasses.asdict(part) for part in parts]
    if short:
        cut = loss_when_cut(model, batches.first_rows(n_rows), short, one_document=args.one_document)
        first = [part for part in parts if part.stop <= short]
        n_first = sum(part.n_tokens for part in first)
        result["short"] = {
            "length": short, "n_tokens": cut.n_tokens, "loss": cut.loss,
            "n_tokens_first": n_first, "loss_first": sum(part.loss_sum for part in first) / n_first,
        }  # fmt: skip
    return result


def measure_recall(model: "Decoder", text: "RunningText", args: argparse.Namespace, lengths: list[int]) -> Result:
    """Raises UserError: the data has too little text, or logits are not finite."""
    from megakexue.bundle.needle import Kind, copies, needles

    seeds, depths = range(args.seeds or 10), args.depths or DEPTHS
    if args.needle:
        cells = [cell for n in lengths for cell in needles(model, text, length=n, depths=depths, seeds=seeds)]
        return {"needle": [dataclasses.asdict(cell) for cell in cells]}
    kinds: list[Kind] = ["random", "passage"]
    found = [cell for n in lengths for kind in kinds for cell in copies(model, text, kind=kind, length=n, seeds=seeds)]
    return {"copy": [dataclasses.asdict(cell) for cell in found]}


def evaluate_tasks(args: argparse.Namespace) -> None:
    """Run the tasks on each bundle, and print the harness's tables.

    Raises:
        UserError: the harness is not installed, a task or its data is not there, or what `load_model` does.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the harness's own bars too
    from megakexue.bundle.bundle import Bundle
    from megakexue.bundle.evaluate import BATCH_TOKENS, changed
    from megakexue.bundle.harness import BundleLM, load_tasks, run_tasks, table

    bundles = [Bundle(folder) for folder in args.bundles]
    tasks = load_tasks(args.tasks, [TASKS, *([args.include] if args.include else [])])
    results: list[Result] = []
    for bundle in bundles:
        bundle.config, backend = changed(bundle.config, args.set)
        options = {"device": args.device, "dtype": args.dtype, "batch_tokens": args.batch_tokens or BATCH_TOKENS}
        lm = BundleLM(bundle, backend=backend, **options)
        found = run_tasks(lm, tasks, n_shots=args.num_fewshot, limit=args.limit, cache=args.cache)
        print(f"{bundle.folder} ({args.dtype}, {lm.max_length} tokens){''.join(f', {x}' for x in args.set)}")
        print(table(found), flush=True)
        results.append({"bundle": str(bundle.folder), "set": args.set, "context": lm.max_length, **found})
    if args.json:
        write_whole(args.json, json.dumps(results if len(results) > 1 else results[0], indent=1) + "\n")


def choose_lengths(args: argparse.Namespace, context: int) -> list[int]:
    """Return the row lengths for needles or copies. Raises UserError: one is too short."""
    from megakexue.bundle.needle import COPY, NEEDLE

    least = 2 * (NEEDLE if args.needle else COPY)
    usual = [context // 4, context // 2, context] if args.needle else [context]
    lengths = args.lengths or [n for n in usual if n >= least] or [least]
    require(lengths[0] >= least, f"--lengths {lengths[0]} is too short: it must be at least {least}")
    return lengths


# ------------------------------------------------------------------------------------------------------------- printing


def print_loss(result: Result, args: argparse.Namespace) -> None:
    if not args.set and result["seq_len"] > result["context"]:
        print(
            f"note: these rows are longer than the {result['context']} tokens of the model's RoPE context",
            file=sys.stderr,
        )
    n_tokens, of = result["n_tokens"], ", of the rows that one document fills" if args.one_document else ""
    print(f"tokens      {n_tokens:,}{of}")
    print(f"loss        {result['loss']:.4f} nats per token")
    print(f"perplexity  {result['perplexity']:.4g}")


def print_positions(results: list[Result]) -> None:
    """Print a table with two columns for each bundle. All have the same positions and tokens."""

    def line(label: str, n_tokens: str, cells: list[str]) -> None:
        print(f"{label:>14} {n_tokens:>12} " + " ".join(cells))

    def numbers(losses: list[float]) -> list[str]:
        return [f"{loss:>8.4f} {math.exp(loss):>11.4g}" for loss in losses]

    print()
    if len(results) > 1:
        line("", "", [f"{name[-20:]:>20}" for name in names(results)])
    line("position", "tokens", [f"{'loss':>8} {'perplexity':>11}"] * len(results))
    for parts in zip(*(result["by_position"] for result in results)):
        if n := parts[0]["n_tokens"]:
            label = f"{parts[0]['start']}-{parts[0]['stop'] - 1}"
            line(label, f"{n:,}", numbers([part["loss_sum"] / n for part in parts]))
    if "short" in results[0]:
        shorts = [result["short"] for result in results]
        length = shorts[0]["length"]
        line(f"first {length}", f"{shorts[0]['n_tokens_first']:,}", numbers([short["loss_first"] for short in shorts]))
        line(f"in rows of {length}", f"{shorts[0]['n_tokens']:,}", numbers([short["loss"] for short in shorts]))


def marked(length: int, result: Result) -> str:
    """Return a length with a star where it is beyond what the bundle was trained for."""
    return f"{length}{'*' if length > result['context'] else ''}"


def table_of(cells: list[Result], row: str, column: str) -> tuple[list[Any], list[Any], dict[tuple[Any, Any], Result]]:
    """Return the rows and columns of a table, and its cells by both."""
    rows, columns = (sorted({cell[name] for cell in cells}) for name in (row, column))
    return rows, columns, {(cell[row], cell[column]): cell for cell in cells}


def print_needles(result: Result) -> None:
    depths, lengths, cells = table_of(result["needle"], "depth", "length")
    n = result["needle"][0]["n_cases"]
    print(f"values found in {n} cases each, and nats a token that the needle makes them more likely\n")
    print("   depth " + " ".join(f"{marked(length, result):>14}" for length in lengths))
    for depth in depths:
        row = [cells[depth, length] for length in lengths]
        shown = [f"{c['n_exact'] / n:.0%} {c['log_prob'] - c['log_prob_without']:+.2f}" for c in row]
        print(f"{depth:>6g} % " + " ".join(f"{text:>14}" for text in shown))
    without = [cells[depths[0], length] for length in lengths]
    print(" without " + " ".join(f"{c['n_exact_without'] / n:>8.0%}      " for c in without))


def print_copies(result: Result) -> None:
    for length in sorted({cell["length"] for cell in result["copy"]}):
        cells = [cell for cell in result["copy"] if cell["length"] == length]
        apart, _, by_kind = table_of(cells, "distance", "kind")
        print(f"\nrows of {marked(length, result)} tokens, {cells[0]['n_cases']} cases each; nats per token")
        print(f"{'':>9} {'random tokens':>26} {'a passage of the data':>26}")
        print(f"{'distance':>9}" + f"{'first':>9}{'again':>9}{'without':>9}" * 2)
        for distance in apart:
            row = [by_kind[distance, kind] for kind in ("random", "passage")]
            print(f"{distance:>9}" + "".join(f"{c['first']:>9.3f}{c['again']:>9.3f}{c['without']:>9.3f}" for c in row))


def print_result(result: Result, args: argparse.Namespace) -> None:
    if args.probe in ("loss", "by_position"):
        print_loss(result, args)
        return
    (print_needles if args.needle else print_copies)(result)
    lengths = {cell["length"] for cell in result[args.probe]}
    if max(lengths) > result["context"]:
        print(f"\n* beyond the {result['context']} tokens that the bundle was trained for")


# -------------------------------------------------------------------------------------------------------------- drawing


def names(results: list[Result]) -> list[str]:
    """Return what a legend calls the bundles: the last part of their paths, or as much as tells them apart."""
    paths = [Path(result["bundle"]) for result in results]
    short = [path.resolve().name for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


def on_two_powers(axes: Any, label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel(label)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)


def draw_positions(plt: Any, results: list[Result]) -> Any:
    """Draw a curve for each bundle, its loss in short rows dashed, and its context as a dotted line."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for index, (name, result) in enumerate(zip(names(results), results)):
        color, parts = f"C{index}", [part for part in result["by_position"] if part["n_tokens"]]
        middle = [math.sqrt(max(part["start"], 1) * part["stop"]) for part in parts]
        losses = [part["loss_sum"] / part["n_tokens"] for part in parts]
        axes.plot(middle, losses, "o-", color=color, markersize=4, label=f"{name}: {result['loss']:.3f}")
        if "short" in result:
            short = result["short"]
            label = f"in rows of {short['length']}: {short['loss']:.3f}"
            axes.axhline(short["loss"], color=color, linewidth=1, linestyle=(0, (5, 4)), label=label)
        if result["seq_len"] > result["context"]:
            axes.axvline(result["context"], color=color, linewidth=1, linestyle=":")
    on_two_powers(axes, "position (tokens)")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, ncols=2)
    return figure


def draw_needles(plt: Any, results: list[Result]) -> Any:
    """Draw a map of depths and lengths for each bundle; lengths right of the line are beyond its context."""
    figure, panels = plt.subplots(
        1, len(results), figsize=(1 + 5 * len(results), 4.5), layout="constrained", squeeze=False
    )
    for axes, name, result in zip(panels[0], names(results), results):
        depths, lengths, cells = table_of(result["needle"], "depth", "length")
        share = [[cells[d, n]["n_exact"] / cells[d, n]["n_cases"] for n in lengths] for d in depths]
        image = axes.imshow(share, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto", alpha=0.8)
        for y, depth in enumerate(depths):
            for x, length in enumerate(lengths):
                cell = cells[depth, length]
                gain = cell["log_prob"] - cell["log_prob_without"]
                axes.text(x, y, f"{share[y][x]:.0%}\n{gain:+.1f}", ha="center", va="center", fontsize=9)
        axes.set_xticks(range(len(lengths)), [marked(length, result) for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:g} %" for depth in depths])
        n_inside = sum(length <= result["context"] for length in lengths)
        if n_inside < len(lengths):
            axes.axvline(n_inside - 0.5, color="0.2", linewidth=1.5, linestyle=":")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("row (tokens)")
        axes.set_ylabel("text before the needle")
        axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=panels, label="values found", format=lambda value, _: f"{value:.0%}")
    return figure


def draw_copies(plt: Any, results: list[Result]) -> Any:
    """Draw the loss of copies by distance: a row of panels for each length, dashed where nothing came before."""
    lengths = sorted({cell["length"] for cell in results[0]["copy"]})
    figure, panels = plt.subplots(
        len(lengths), 2, figsize=(9, 1 + 3 * len(lengths)), layout="constrained", squeeze=False, sharey="row"
    )
    titles = {"random": "random tokens", "passage": "a passage of the data"}
    for row, length in zip(panels, lengths):
        for axes, kind in zip(row, titles):
            for index, (name, result) in enumerate(zip(names(results), results)):
                cells = [cell for cell in result["copy"] if (cell["kind"], cell["length"]) == (kind, length)]
                apart = [cell["distance"] for cell in cells]
                star = "*" if length > result["context"] else ""
                axes.plot(apart, [c["again"] for c in cells], "o-", color=f"C{index}", markersize=4, label=name + star)
                axes.plot(apart, [c["without"] for c in cells], "--", color=f"C{index}", linewidth=1)
            axes.set_title(f"{titles[kind]}, rows of {length}", fontsize=10)
            on_two_powers(axes, "distance (tokens)")
        highest = max(cell[name] for result in results for cell in result["copy"] for name in ("again", "without"))
        row[0].set_ylim(0, 1.05 * highest)
        row[0].set_ylabel("loss of the copy (nats per token)")
        row[0].legend()
    return figure


def draw(results: list[Result], args: argparse.Namespace) -> None:
    """Write the PNG. Raises UserError: it cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawings: dict[str, Callable[[Any, list[Result]], Any]] = {
        "by_position": draw_positions, "needle": draw_needles, "copy": draw_copies,
    }  # fmt: skip
    with plt.rc_context(STYLE):
        figure = drawings[args.probe](plt, results)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=150)
        plt.close(figure)
    write_whole(args.plot, picture.getvalue())
    print(f"wrote {args.plot}")


def main() -> None:
    args = parse_arguments()
    if args.tasks:
        evaluate_tasks(args)
        return

    # seconds of imports, which a mistake in the arguments should not cost
    from megakexue.bundle.evaluate import BATCH_TOKENS, changed
    from megakexue.bundle.needle import RunningText
    from megakexue.dist import ALONE
    from megakexue.run.data import Batches

    bundles, manifest = open_bundles(args)
    seq_len, is_recall = manifest.seq_len, args.needle or args.copy
    ropes = [bundle.config.rope for bundle in bundles]  # before --set changes them
    short = (args.short or min(r.trained_context or r.context for r in ropes)) if args.by_position else seq_len
    require(args.short is None or short < seq_len, f"--short {short} must be below the {seq_len} tokens of a row")
    lengths = choose_lengths(args, max(rope.context for rope in ropes)) if is_recall else []
    backends = []
    for bundle in bundles:
        bundle.config, backend = changed(bundle.config, args.set)
        backends.append(backend)

    source = SourceConfig(path=str(args.data))
    data = DataConfig(sources=[source], tokenizer=str(bundles[0].tokenizer), seq_len=seq_len, shuffle=False)
    rows_at_a_time = max(1, BATCH_TOKENS // seq_len)
    batches = Batches(
        data, split=args.split, global_batch_size=rows_at_a_time, micro_batch_size=rows_at_a_time,
        ranks=ALONE, cache=args.data,
    )  # fmt: skip
    special = {"bos_id": manifest.bos_id, "eos_id": manifest.eos_id, "pad_id": manifest.pad_id}
    text = RunningText(batches.rows.read, batches.n_rows, **special)
    results: list[Result] = []
    for bundle, backend, rope in zip(bundles, backends, ropes):
        model = load_model(bundle, backend, args)
        result: Result = {
            "bundle": str(bundle.folder), "data": str(args.data), "split": args.split, "set": args.set,
            "context": rope.context,
        }  # fmt: skip
        if is_recall:
            result |= measure_recall(model, text, args, lengths)
            what = f"{args.probe}, {args.seeds or 10} seeds"
        else:
            result |= measure_loss(model, batches, args, short if short < seq_len else None)
            what = f"{result['n_rows']} rows of {seq_len} tokens"
        print(f"{bundle.folder} on the {args.split} split of {args.data}: {what}")
        if args.set:
            print(f"changed     {', '.join(args.set)}")
        print_result(result, args)
        results.append(result)
        print(end="\n" if bundle is not bundles[-1] else "", flush=True)
    batches.close()
    if args.by_position:
        print_positions(results)
    if args.json:
        write_whole(args.json, json.dumps(results if len(results) > 1 else results[0], indent=1) + "\n")
    if args.plot:
        draw(results, args)


if __name__ == "__main__":
    run_program(main)
