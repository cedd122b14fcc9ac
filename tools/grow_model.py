#!/usr/bin/env python
"""Widen and deepen trained weights into a larger model that computes the same function, as a bundle."""

import argparse
import dataclasses
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megakexue import __version__
from megakexue.buckets import is_remote
from megakexue.config import (
    DataConfig,
    ResolvedConfig,
    ResolvedModel,
    SourceConfig,
    UserError,
    as_integer,
    as_number,
    load_config,
    require,
    run_program,
)
from megakexue.files import sha256, temporary_folder
from megakexue.text.manifest import check_inputs
from megakexue.text.tokenizer_files import tokenizer_sha256

if TYPE_CHECKING:
    from torch import Tensor

    from megakexue.bundle.bundle import Bundle, OptimizerInfo
    from megakexue.bundle.grow import Growth
    from megakexue.bundle.trace import Difference
    from megakexue.core.batch import Batch
    from megakexue.run.export import RunCheckpoint

VERIFIED_TOKENS = 512  # of held-out text: enough to touch every head and unit, and seconds for a small model

EPILOG = """\
TARGET is the config of the training that follows: its model section says what to grow to, and the function is verified
on held-out rows of its data. Any axis may grow, by any ratio, several at once: d_model, n_heads, n_kv_heads, d_head,
d_ff, vocab_size, n_layers, and the widths of model.mla. What the function depends on (RoPE base, eps, norms, attention
scale) must stay; where the target differs, the error names what to set.

The bundle is written only if the logits in float64 and float32 are those of SOURCE to rounding. --depth stack is the
exception: it repeats blocks, changes the function, and says by how much.

SOURCE may also be a Hugging Face folder or a .gguf file, as tools/import_hf.py takes them. It is imported first, with
its comparison, into a bundle beside OUT, which is removed at the end. Its tokenizer must be that of TARGET's data.

The optimizer's state grows too, where SOURCE has one of the target's optimizer: a run has; a bundle if it was written
with --optimizer. Train on with train.init_from=BUNDLE, train.init_optimizer=keep and train.init_data=continue.

examples:
  tools/grow_model.py runs/1b --config configs/7b_from_1b.yaml --out bundles/7b_from_1b
  tools/grow_model.py runs/1b --config configs/7b_from_1b.yaml --dry-run
  tools/grow_model.py models/SmolLM2-135M --config my.yaml --out bundles/smollm2_285m
  tools/grow_model.py bundles/small --config configs/125m.yaml --out bundles/wide model.d_model=1024 model.n_heads=16
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a run (its fp32 masters), a bundle, a Hugging Face folder or a .gguf file",
    )
    parser.add_argument("--config", type=Path, required=True, metavar="TARGET", help="YAML of the run that goes on")
    parser.add_argument("--out", type=Path, metavar="BUNDLE", help="folder to write")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="over TARGET, such as model.d_ff=1024")
    parser.add_argument("--step", type=as_integer, help="of a run's checkpoint (default: the newest)")
    parser.add_argument(
        "--width",
        choices=("pad", "copy"),
        default="pad",
        help="d_model and MLA's latents: new channels are silent at first, or copies (default: pad)",
    )
    parser.add_argument(
        "--units",
        choices=("fresh", "copy"),
        default="fresh",
        help="feed-forward units, heads, value widths: random and not read yet, or copies (default: fresh)",
    )
    parser.add_argument(
        "--noise",
        type=as_number,
        default=1.0,
        help="size of the random part of grown matrices, which cancels on the old activations and makes copies differ; "
        "1 is that of new weights (default: 1)",
    )
    parser.add_argument(
        "--depth",
        choices=("pair", "zero", "stack"),
        default="pair",
        help="new blocks: units in cancelling pairs, zero output matrices, or repeated blocks (default: pair)",
    )
    parser.add_argument(
        "--optimizer", choices=("keep", "reset"), help="grow its state, or leave it out (default: keep if there is one)"
    )
    parser.add_argument("--seed", type=as_integer, default=0, help="of everything random (default: 0)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace a bundle that is there")
    args = parser.parse_intermixed_args()
    require(
        not is_remote(args.source),
        f"{args.source} is in a bucket: import it first (tools/import_hf.py), or copy the bundle to this machine",
    )
    args.source = Path(args.source)
    is_gguf = args.source.is_file() and args.source.suffix == ".gguf"
    require(
        args.source.is_dir() or is_gguf,
        f"no folder {args.source}: name a run, a bundle, a Hugging Face folder or a .gguf file",
    )
    names = [name for name in ("config.json", "config.yaml") if (args.source / name).is_file()]
    args.is_foreign = is_gguf or names == ["config.json"]
    require(not (args.is_foreign and args.step), f"--step {args.step} has no effect: {args.source} is no run")
    require(args.dry_run or args.out is not None, "--out is missing: name the bundle to write, or give --dry-run")
    require(
        not args.out or args.overwrite or not args.out.exists(),
        f"{args.out} exists: choose another name, or add --overwrite",
    )
    require(
        not args.out or args.out.resolve() != args.source.resolve(),
        f"--out {args.out} is SOURCE itself, which growth would replace: choose another name",
    )
    return args


def main() -> None:
    args = parse_arguments()
    config = load_config(args.config, args.overrides)
    check_inputs(config)

    # seconds of imports, which a mistake in the arguments should not cost
    from megakexue.bundle.axis_maps import Choices
    from megakexue.bundle.bundle import check_out
    from megakexue.bundle.grow import Growth
    from megakexue.core.resolve import resolve_config
    from megakexue.run.export import open_source

    with ExitStack() as stack:
        # of a foreign model, what its small files say is enough to see whether all fits; the weights come later
        source = None if args.is_foreign else open_source(args.source, args.step)
        old, tokenizer, state = stack.enter_context(foreign(args.source)) if source is None else (
            source.config, source.tokenizer, source.optimizer
        )  # fmt: skip
        own = tokenizer if args.source.is_dir() else "the tokenizer of its import (tools/import_hf.py)"
        require(
            tokenizer_sha256(tokenizer) == tokenizer_sha256(config.data.tokenizer),
            f"data.tokenizer={config.data.tokenizer} is not the tokenizer of {args.source}, so its ids mean other "
            f"text: prepare the data with {own}",
        )
        target = resolve_config(config)
        choices = Choices(width=args.width, units=args.units, noise=args.noise, depth=args.depth, seed=args.seed)
        growth = Growth(old, target.model, choices)
        optimizer, why = choose_optimizer(args, target, state)
        print_plan(growth, target, why)
        if args.dry_run:
            return
        check_out(args.out, args.overwrite)
        source = source or open_source(stack.enter_context(imported(args.source, args.out)))
        write(args, growth, source, target, optimizer)


def write(
    args: argparse.Namespace, growth: "Growth", source: "RunCheckpoint | Bundle", target: ResolvedConfig,
    optimizer: "OptimizerInfo | None",
) -> None:  # fmt: skip
    """Write the grown bundle, and compare on the way."""
    from megakexue.bundle.bundle import write_bundle
    from megakexue.bundle.grow import grown_state
    from megakexue.bundle.trace import grown_weights
    from megakexue.core.costs import n_parameters

    batch = held_out_batch(target.data)
    lineage = lineage_of(growth, source, args.source)

    def report(differences: list["Difference"]) -> None:
        show_progress("")
        check_differences(growth, differences, batch.tokens.numel())
        lineage["verified"] = [dataclasses.asdict(d) | {"losses": list(d.losses)} for d in differences]

    began = time.perf_counter()
    weights = grown_weights(growth, lambda name: source.tensor("master", name), batch, report)
    write_bundle(
        args.out, growth.new, with_progress(weights), source.tokenizer, lineage, overwrite=args.overwrite,
        optimizer=optimizer,
        state=with_progress(grown_state(growth, optimizer.kinds, source.tensor)) if optimizer else (),
    )  # fmt: skip
    n_bytes, seconds = sum(path.stat().st_size for path in args.out.iterdir()), time.perf_counter() - began
    print(f"{args.out}: {n_parameters(growth.new):,} parameters, {n_bytes:,} bytes, in {seconds:.0f} s")
    if not growth.is_lossless:
        print("WARNING: --depth stack is not lossless: this is another function, which has to be trained back first")


@contextmanager
def foreign(path: Path) -> Iterator[tuple[ResolvedModel, Path, None]]:
    """Give the model section and the tokenizer of a Hugging Face folder or a GGUF file; it has no optimizer's state."""
    from megakexue.bundle.hf_import import Gguf, open_source, resolved
    from megakexue.bundle.imported_tokenizer import tokenizer_of

    source = open_source(path)
    with temporary_folder() as folder:
        metadata = source.metadata if isinstance(source, Gguf) else None
        yield resolved(source), tokenizer_of(path, None, metadata, folder), None


@contextmanager
def imported(path: Path, out: Path) -> Iterator[Path]:
    """Give a bundle of a Hugging Face folder or a GGUF file, beside `out`; it is removed at the end.

    Raises:
        UserError: it cannot be imported, or is another model here than in transformers.
    """
    bundle = out.absolute().with_name(f".{out.name}.imported")
    program = Path(__file__).with_name("import_hf.py")
    # a process of its own, whose memory is free for growth
    done = subprocess.run(
        [sys.executable, program, path, "--out", bundle, "--overwrite"], capture_output=True, text=True
    )  # fmt: skip
    try:
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
            raise UserError(
                f"tools/import_hf.py {path}: {lines[-1].removeprefix('error: ')}. With other options, import it first, "
                "and grow the bundle"
            )
        print(done.stdout.splitlines()[0], flush=True)
        yield bundle
    finally:
        shutil.rmtree(bundle, ignore_errors=True)


def choose_optimizer(
    args: argparse.Namespace, target: ResolvedConfig, state: "OptimizerInfo | None"
) -> tuple["OptimizerInfo | None", str]:
    """Return what the grown state belongs to (None: it is left out), and what is said of it.

    Raises:
        UserError: it is left out, and --optimizer or train.init_optimizer asks for it.
    """
    from megakexue.bundle.bundle import OptimizerInfo

    wanted = OptimizerInfo.of(target.optim)
    if args.optimizer == "reset":
        why = "left out, as --optimizer reset says"
    elif state is None:
        why = "no state in the source"
    elif state.family != wanted.family:
        own, other = (f"{x.name}, optim.embedding={x.embedding}" for x in (state, wanted))
        why = f"left out: the state is of {own}, and the target's optimizer is {other}"
    else:
        grown = dataclasses.replace(state, embedding=wanted.embedding)
        return grown, f"{state.name}'s state after {state.n_updates} updates grows too"
    require(
        args.optimizer != "keep",
        f"--optimizer keep: {why}: export the bundle with --optimizer, or set optim.name to that of the state",
    )
    require(
        target.train.init_optimizer == "reset",
        f"train.init_optimizer=keep, but {args.out or 'the bundle'} would have no state: {why}: set "
        "train.init_optimizer=reset, or grow from a run or a bundle with that optimizer's state",
    )
    return None, why


def print_plan(growth: "Growth", target: ResolvedConfig, optimizer: str) -> None:
    """Print what growth does to each axis, what it costs, and which choices hold the model back."""
    from megakexue.bundle.grow_checks import locked_axes
    from megakexue.bundle.grow_report import plan
    from megakexue.core.costs import flops_per_token, n_parameters

    old, new, choices = growth.old, growth.new, growth.choices
    context = (target.data.seq_len + 1) / 2
    sizes = [n_parameters(c) for c in (old, new)]
    flops = [flops_per_token(c, context) for c in (old, new)]
    print("\n".join(plan(growth)))
    for what, (a, b) in (("parameters", sizes), ("FLOP per token", flops)):
        print(f"{what:<16} {a:>8.4g} -> {b:<8.4g} {b / a:.3g} times")
    print(f"optimizer        {optimizer}")
    if locked := locked_axes(old, new, choices):
        print(f"WARNING: with --noise 0 the copies of {', '.join(locked)} get equal gradients and stay equal")
    if choices.depth == "zero" and new.n_layers > old.n_layers and target.optim.name == "tiger":
        print(
            f"WARNING: tiger moves the zero matrices of new blocks by optim.rms_floor={target.optim.rms_floor:g} "
            "alone; --depth pair learns at once"
        )


def held_out_batch(data: DataConfig) -> "Batch":
    """Return VERIFIED_TOKENS of held-out text: the first rows, or the beginning of a longer one."""
    from megakexue.dist import ALONE
    from megakexue.run.data import Batches

    seq_len, n_rows = min(data.seq_len, VERIFIED_TOKENS), max(1, VERIFIED_TOKENS // data.seq_len)
    data = dataclasses.replace(data, sources=[SourceConfig(path=s.path) for s in data.sources])
    with temporary_folder() as cache:
        batches = Batches(
            data, split="valid", global_batch_size=n_rows, micro_batch_size=n_rows, ranks=ALONE,
            cache=Path(data.cache or cache),
        )  # fmt: skip
        batch = next(batches.first_rows(n_rows))
        batches.close()
    tokens, targets, positions = (x[:, :seq_len] for x in (batch.tokens, batch.targets, batch.positions))
    starts = [*(positions.flatten() == 0).nonzero().flatten().tolist(), tokens.numel()]
    cu_seqlens = batch.cu_seqlens.new_tensor(starts)
    return dataclasses.replace(batch, tokens=tokens, targets=targets, positions=positions, cu_seqlens=cu_seqlens)


def lineage_of(growth: "Growth", source: "RunCheckpoint | Bundle", path: Path) -> dict[str, Any]:
    """Return where the weights come from, as config.yaml of the bundle tells it."""
    from megakexue.bundle.bundle import Bundle
    from megakexue.bundle.grow_report import plan

    lineage: dict[str, Any] = {
        "from": "growth", "source": str(path), "step": source.lineage.get("step"),
        "tokens": source.lineage.get("tokens"), "data": source.lineage.get("data"),
        "choices": dataclasses.asdict(growth.choices), "plan": plan(growth), "of": source.lineage,
        "megakexue": __version__,
    }  # fmt: skip
    if isinstance(source, Bundle):
        lineage["source_manifest"] = sha256(source.folder / "manifest.json")
    return lineage


def check_differences(growth: "Growth", differences: list["Difference"], n_tokens: int) -> None:
    """Print how far the grown model is from the old one. Raises UserError: farther than rounding explains."""
    for d in differences:
        print(
            f"{d.dtype:<9} norm_eps {d.norm_eps:g}: {n_tokens} tokens' logits differ by at most {d.largest:.2e} "
            f"(bound {d.bound:.2e}, deviation {d.deviation:.3g}); loss {d.losses[0]:.6f} -> {d.losses[1]:.6f} nats"
        )
    too_large = "the maps are right, but these weights lose as much to rounding"
    if growth.feels_eps:
        too_large += " or to norm_eps in new norms: keep model.n_layers and model.residual_alpha"
    causes = {"float64": "this is a defect: report the two configs", "float32": too_large}
    for d in differences if growth.is_lossless else ():
        require(
            d.is_small,
            f"the grown model is not the old one in {d.dtype}: its logits differ by {d.largest:.2e}, more than "
            f"{d.bound:.2e}; nothing is written: {causes[d.dtype]}",
        )


def with_progress(tensors: Iterable[tuple[str, "Tensor"]]) -> Iterator[tuple[str, "Tensor"]]:
    """Pass tensors on, and show the name of the one at hand."""
    for name, tensor in tensors:
        show_progress(name)
        yield name, tensor
    show_progress("")


def show_progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_program(main)
