#!/usr/bin/env python
"""Widen and deepen trained weights into a larger model that computes the same function, as a bundle."""

import argparse
import dataclasses
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from megakexue.config import SourceConfig, check_inputs, load_config, require, run_program, sha256

VERIFIED_TOKENS = 512  # of held-out text: enough to touch every head and unit, and seconds for a small model

EPILOG = """\
TARGET is the config of the training that follows: its model section says what to grow to, and the function is verified
on held-out rows of its data. Any axis may grow, by any ratio, several at once: d_model, n_heads, n_kv_heads, d_head,
d_ff, vocab_size, n_layers, and the widths of model.mla. What the function depends on (RoPE base, eps, norms, attention
scale) must stay; where the target differs, the error names what to set.

The bundle is written only if the logits in float64 and float32 are those of SOURCE to rounding. --depth stack is the
exception: it repeats blocks, changes the function, and says by how much.

The optimizer's state grows too, where SOURCE has one of the target's optimizer: a run has; a bundle if it was written
with --optimizer. Train on with train.init_from=BUNDLE, train.init_optimizer=keep and train.init_data=continue.

examples:
  tools/grow_model.py runs/1b --config configs/7b_from_1b.yaml --out bundles/7b_from_1b
  tools/grow_model.py runs/1b --config configs/7b_from_1b.yaml --dry-run
  tools/grow_model.py bundles/small --config configs/125m.yaml --out bundles/wide model.d_model=1024 model.n_heads=16
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a run (its fp32 masters) or a bundle")
    parser.add_argument("--config", type=Path, required=True, metavar="TARGET", help="YAML of the run that goes on")
    parser.add_argument("--out", type=Path, metavar="BUNDLE", help="folder to write")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="over TARGET, such as model.d_ff=1024")
    parser.add_argument("--step", type=int, help="of a run's checkpoint (default: the newest)")
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
        type=float,
        default=1.0,
        help="of what cancels in readers, and parts copies; 1 is the size of new weights (default: 1)",
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
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace a bundle that is there")
    args = parser.parse_intermixed_args()
    require(args.source.is_dir(), f"no folder {args.source}: name a run or a bundle")
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
    import torch

    from megakexue import __version__
    from megakexue.data import Batches
    from megakexue.describe import flops_per_token, n_parameters
    from megakexue.export import Bundle, check_out, open_source, state_kinds, write_bundle
    from megakexue.grow import Choices, Difference, Growth, grown_state, grown_weights
    from megakexue.model import resolve

    source = open_source(args.source, args.step)
    require(
        sha256(source.tokenizer) == sha256(config.data.tokenizer),
        f"data.tokenizer={config.data.tokenizer} is not the tokenizer of {args.source}, so its ids mean other text: "
        f"prepare the data with {source.tokenizer}",
    )
    new = resolve(config.model, config.optim.name, config.data.seq_len)
    choices = Choices(width=args.width, units=args.units, noise=args.noise, depth=args.depth, seed=args.seed)
    growth = Growth(source.config, new, choices)

    optim = config.optim.resolved(new.tie_embeddings)
    optimizer, why = None, "left out, as --optimizer reset says"
    if args.optimizer != "reset":
        optimizer, why = _optimizer(source.optimizer, dataclasses.asdict(optim))
        require(
            optimizer is not None or args.optimizer is None,
            f"--optimizer keep: {why}: export the bundle with --optimizer, or set optim.name to that of the state",
        )
    require(
        optimizer is not None or config.train.init_optimizer == "reset",
        f"train.init_optimizer=keep, but {args.out or 'the bundle'} would have no state: {why}: set "
        "train.init_optimizer=reset, or grow from a run or a bundle with that optimizer's state",
    )

    context = (config.data.seq_len + 1) / 2
    sizes = [n_parameters(c) for c in (source.config, new)]
    flops = [flops_per_token(c, context) for c in (source.config, new)]
    print("\n".join(growth.plan()))
    for what, (a, b) in (("parameters", sizes), ("FLOP per token", flops)):
        print(f"{what:<16} {a:>8.4g} -> {b:<8.4g} {b / a:.3g} times")
    print(f"optimizer        {why}")
    if growth.locked:
        print(f"WARNING: with --noise 0 the copies of {', '.join(growth.locked)} get equal gradients and stay equal")
    if choices.depth == "zero" and new.n_layers > source.config.n_layers and optim.name == "tiger":
        print(f"WARNING: tiger moves the zero matrices of new blocks by optim.rms_floor={optim.rms_floor:g} alone; "
              "--depth pair learns at once")  # fmt: skip
    if args.dry_run:
        return
    check_out(args.out, args.overwrite)

    seq_len = min(config.data.seq_len, VERIFIED_TOKENS)
    n_rows = max(1, VERIFIED_TOKENS // config.data.seq_len)
    data = dataclasses.replace(config.data, sources=[SourceConfig(path=s.path) for s in config.data.sources])
    with tempfile.TemporaryDirectory() as cache:
        batches = Batches(
            data, split="valid", global_batch_size=n_rows, micro_batch_size=n_rows, rank=0, world_size=1, local_rank=0,
            local_world_size=1, cache=Path(data.cache or cache),
        )  # fmt: skip
        batch = next(batches.first_rows(n_rows))
        batches.close()
    tokens, targets, positions = (x[:, :seq_len] for x in (batch.tokens, batch.targets, batch.positions))
    starts = [*(positions.flatten() == 0).nonzero().flatten().tolist(), tokens.numel()]
    cu_seqlens = torch.tensor(starts, dtype=torch.int32)
    batch = dataclasses.replace(batch, tokens=tokens, targets=targets, positions=positions, cu_seqlens=cu_seqlens)

    lineage: dict[str, Any] = {
        "from": "growth", "source": str(args.source), "step": source.lineage.get("step"),
        "tokens": source.lineage.get("tokens"), "data": source.lineage.get("data"),
        "choices": dataclasses.asdict(choices), "plan": growth.plan(), "of": source.lineage, "megakexue": __version__,
    }  # fmt: skip
    if isinstance(source, Bundle):
        lineage["source_manifest"] = sha256(source.folder / "manifest.json")

    def report(differences: list[Difference]) -> None:
        _progress("")
        for d in differences:
            print(
                f"{d.dtype:<9} norm_eps {d.norm_eps:g}: {batch.tokens.numel()} tokens' logits differ by at most "
                f"{d.largest:.2e} (bound {d.bound:.2e}, deviation {d.deviation:.3g}); loss {d.losses[0]:.6f} -> "
                f"{d.losses[1]:.6f} nats"
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
        lineage["verified"] = [dataclasses.asdict(d) | {"losses": list(d.losses)} for d in differences]

    def with_progress(tensors: Any) -> Any:
        for name, tensor in tensors:
            _progress(name)
            yield name, tensor
        _progress("")

    began = time.perf_counter()
    write_bundle(
        args.out, new, with_progress(grown_weights(growth, lambda name: source.tensor("master", name), batch, report)),
        source.tokenizer, lineage, overwrite=args.overwrite, optimizer=optimizer,
        state=with_progress(grown_state(growth, partial(state_kinds, optimizer), source.tensor) if optimizer else ()),
    )  # fmt: skip
    n_bytes = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: {sizes[1]:,} parameters, {n_bytes:,} bytes, in {time.perf_counter() - began:.0f} s")
    if not growth.is_lossless:
        print("WARNING: --depth stack is not lossless: this is another function, which has to be trained back first")


def _optimizer(state: dict[str, Any] | None, target: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """Return what the grown state is of (None: there is none) and the reason."""
    from megakexue.export import family

    if state is None:
        return None, "no state in the source"
    if family(state) != family(target):
        own, other = (f"{x['name']}, optim.embedding={x['embedding']}" for x in (state, target))
        return None, f"left out: the state is of {own}, and the target's optimizer is {other}"
    grown = state | {"embedding": target["embedding"]}
    return grown, f"{state['name']}'s state after {state['n_updates']} updates grows too"


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_program(main)
