#!/usr/bin/env python
"""Say what a config would take on so many GPUs: memory by part, the largest micro-batch, time, tokens, days, money."""

import argparse
from dataclasses import replace
from pathlib import Path

from megakexue.config import Config, as_integer, as_number, load_config, require, run_program
from megakexue.core.costs import WIDTHS, n_data_ranks, n_parameters, peak_memory
from megakexue.core.plan import (
    CONTEXT_GIB,
    GPUS,
    LONG_ROWS,
    MARGIN,
    Cluster,
    Plan,
    largest_micro_batch,
    longest_row,
    plan,
    usable_bytes,
    with_rows_of,
)

EPILOG = """\
All is by formula (megakexue/core/costs.py, megakexue/core/plan.py): it takes no GPU and a second. docs/scale.md says
how far it was right (memory within 5 % of what torch allocates, tokens a second within 15 % for 15 of 25 runs, and too
high for the others), where it was wrong, and what it cannot know. It is no measurement.

`memory` is what one rank holds at that moment of a step at which it holds most. Parts of a step that add up:
  products, attention, elementwise  kernels, each at its published rate
  gaps            what a real step loses beside them, or the host that cannot start small kernels fast enough
  optimizer       the pass over this rank's share
  communication   what is not hidden under computation: all of it at stages 0 to 2
  stragglers      waiting for the slowest GPU

The batch of a step is that of the config (train.global_batch_size). With --scaling it is what a GPU takes now, times
the GPUs, since a batch that stays the same leaves too little for each.

examples:
  tools/plan.py configs/1b.yaml --gpus 64 --gpu h100
  tools/plan.py configs/7b_from_1b.yaml --gpus 64 --gpu h200 --budget-tokens 2e11 --price 2.5
  tools/plan.py configs/7b_from_1b.yaml engine.zero_stage=3 engine.recompute=product --gpus 8 --gpu h100
  tools/plan.py configs/1b.yaml --gpus 8 --gpu h100 --scaling
  tools/plan.py configs/7b_from_1b.yaml engine.zero_stage=3 --gpus 8 --gpu h100 --longest-row
"""
SIZES = (8, 64, 512, 2048, 10_000)
"""GPUs of the scaling table."""
SHARED = (1, 2, 4, 8)
"""Ranks that share a row, in the table of longest rows."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file, such as those in configs/")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings over the file's")
    parser.add_argument("--gpus", type=as_integer, required=True, metavar="N", help="in all, one rank on each")
    parser.add_argument("--gpu", required=True, metavar="NAME", help=f"one of {', '.join(GPUS)}")
    parser.add_argument("--gpus-per-node", type=as_integer, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--network", type=as_number, metavar="GBIT", help="Gbit/s a GPU between nodes (default: 400, a100: 200)"
    )
    parser.add_argument(
        "--document-tokens", type=as_integer, metavar="N", help="average length in packed rows (default: a whole row)"
    )
    parser.add_argument(
        "--budget-tokens", type=as_number, metavar="N", help="tokens of the whole run (default: those of train.steps)"
    )
    parser.add_argument("--price", type=as_number, metavar="USD", help="of one GPU for an hour")
    tables = parser.add_mutually_exclusive_group()
    tables.add_argument("--scaling", action="store_true", help="a table for up to 10,000 GPUs instead")
    tables.add_argument("--longest-row", action="store_true", help="a table of the longest row that fits instead")
    return parser.parse_intermixed_args()


def check(args: argparse.Namespace) -> None:
    require(args.gpu in GPUS, f"--gpu {args.gpu} is not known: use one of {', '.join(GPUS)}")
    for name in ("gpus", "gpus_per_node", "network", "document_tokens", "budget_tokens", "price"):
        value = getattr(args, name)
        require(value is None or value > 0, f"--{name.replace('_', '-')} {value} must be positive")


def memory_lines(config: Config, cluster: Cluster, is_compiled: bool) -> list[str]:
    moment, parts = peak_memory(config, cluster.n_gpus, is_compiled=is_compiled)
    total, room = sum(parts.values()), usable_bytes(cluster.gpu)
    verdict = "fits" if total <= room else "DOES NOT FIT"
    lines = [f"memory        {total / 2**30:8.1f} GiB a rank, {moment}; {verdict} {room / 2**30:.1f} GiB"]
    lines += [f"  {name:<12}{size / 2**30:8.2f}" for name, size in parts.items() if size]
    rows = largest_micro_batch(config, cluster, is_compiled=is_compiled)
    lines.append(
        f"largest micro-batch {rows} rows of {config.data.seq_len}, with {MARGIN:.0%} and {CONTEXT_GIB} GiB of the "
        f"{cluster.gpu.memory_gib} GiB left free"
    )
    if not rows:
        lines.append("  try engine.recompute=block, a higher engine.zero_stage, or more GPUs")
    return lines


def time_lines(config: Config, made: Plan, tokens: float, price: float | None) -> list[str]:
    hours = tokens / (made.tokens_per_s * made.n_gpus) / 3600
    lines = [f"step          {made.step_s:8.3f} s for {made.tokens:,} tokens"]
    lines += [f"  {name:<14}{s:8.3f} s  {s / made.step_s:4.0%}" for name, s in made.parts.items() if s]
    lines += [
        f"speed         {made.tokens_per_s:,.0f} tokens/s a GPU, MFU {made.mfu():.1%} "
        f"({made.mfu(squares=True):.1%} where attention is not halved)",
        f"run           {tokens:.3g} tokens, {tokens / n_parameters(config.model):.0f} a parameter: {hours / 24:,.1f} "
        f"days, {hours * made.n_gpus:,.0f} GPU hours" + (f", {hours * made.n_gpus * price:,.0f} USD" if price else ""),
    ]
    return lines


def scaling_table(config: Config, cluster: Cluster, tokens: float, document: int | None, is_compiled: bool) -> str:
    """The table of docs/scale.md: the rows that a GPU takes in a step now, on more and more GPUs."""
    rows = config.train.global_batch_size // cluster.n_gpus
    lines = [
        "| GPUs | batch, tokens | step, s | communication | tokens/s/GPU | MFU | days | GPU hours |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for n in SIZES:
        larger = replace(config, train=replace(config.train, global_batch_size=rows * n))
        made = plan(larger, replace(cluster, n_gpus=n), document=document, is_compiled=is_compiled)
        hours = tokens / (made.tokens_per_s * n) / 3600
        sent = made.parts["communication"] / made.step_s
        lines.append(
            f"| {n:,} | {made.tokens / 1e6:,.2f}M | {made.step_s:.2f} | {sent:.0%} "
            f"| {made.tokens_per_s:,.0f} | {made.mfu():.1%} | {hours / 24:,.2f} | {hours * n:,.0f} |"
        )
    return "\n".join(lines)


def longest_table(config: Config, cluster: Cluster, is_compiled: bool) -> str:
    """The table of docs/scale.md: by ranks that share a row, and by what the backward pass computes again."""
    heads, groups = config.model.n_heads, config.model.n_groups
    sizes = [
        size for size in SHARED
        if cluster.n_gpus % size == heads % size == 0 and (groups % size == 0 or size % groups == 0)
    ]  # fmt: skip
    lines = [
        f"| {' | '.join(['settings', *(f'shared by {size}' for size in sizes)])} | on the host, GiB a rank |",
        "|---|" + "--:|" * (len(sizes) + 1),
    ]
    model = config.model
    for name, settings in LONG_ROWS.items():
        rows = []
        for size in sizes:
            start = with_rows_of(
                replace(config, engine=replace(config.engine, sequence_ranks=1)), 1024 * size, cluster.n_gpus
            )
            shared = replace(start, engine=replace(config.engine, sequence_ranks=size, **settings))
            rows.append(longest_row(shared, cluster, is_compiled=is_compiled))
        own = rows[-1] // sizes[-1] * model.n_layers * model.d_model * WIDTHS[config.engine.dtype] / 2**30
        host = f"{own:.0f}" if settings["recompute_offload"] else "0"
        lines.append(f"| {name} | {' | '.join(f'{row // 1024:,}k' for row in rows)} | {host} |")
    return "\n".join(lines)


def main() -> None:
    args = parse_arguments()
    check(args)
    config = load_config(args.config, args.overrides)
    n_micro = config.train.n_micro_batches(n_data_ranks(config, args.gpus))
    cluster = Cluster(gpu=GPUS[args.gpu], n_gpus=args.gpus, gpus_per_node=args.gpus_per_node, nic_gbit=args.network)
    is_compiled = config.engine.compile != "off"
    if args.longest_row:
        print(longest_table(config, cluster, is_compiled))
        return
    tokens = args.budget_tokens or config.batch_tokens * config.train.steps
    made = plan(config, cluster, document=args.document_tokens, is_compiled=is_compiled)
    if args.scaling:
        print(scaling_table(config, cluster, tokens, args.document_tokens, is_compiled))
        return
    train, engine = config.train, config.engine
    batches = f"{n_micro} micro-batches x {train.micro_batch_size} x {config.data.seq_len}"
    shared = f", rows shared by {engine.sequence_ranks}" if engine.sequence_ranks > 1 else ""
    where = f"{args.gpus} {args.gpu} in {cluster.n_nodes} nodes"
    print(
        f"plan          {n_parameters(config.model):,} parameters on {where}\n"
        f"              ZeRO-{engine.zero_stage} {engine.dtype}, {'compiled' if is_compiled else 'eager'}, "
        f"recompute {engine.recompute}, {batches}{shared}"
    )
    print("\n".join(memory_lines(config, cluster, is_compiled)))
    print("\n".join(time_lines(config, made, tokens, args.price)))


if __name__ == "__main__":
    run_program(main)
