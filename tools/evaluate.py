#!/usr/bin/env python
"""Measure the loss of a bundle on prepared data, and how it depends on the position in the document."""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megakexue.config import DataConfig, SourceConfig, as_integer, require, run_program
from megakexue.files import require_new_file, sha256, write_whole
from megakexue.text.manifest import read_manifest

if TYPE_CHECKING:
    from megakexue.bundle.evaluate import PositionLoss

BATCH_TOKENS = 4096  # that go through the model at a time; a longer row goes alone

EPILOG = """\
DATA was prepared with the tokenizer of the bundle; its rows may be longer than those of the training, to see how the
model extrapolates. The split of a document depends on its bytes and --valid-fraction alone: prepare the longer rows
with the fraction of the training data, and no validation document is one that the model was trained on.

--set changes how the weights are used, in the model section of the bundle's config, for this evaluation only: a longer
context without finetuning, another base, another attention scale. Scales that follow from a change are chosen anew.

examples:
  tools/evaluate.py bundles/1b data/web
  tools/evaluate.py bundles/1b data/web_8k --by-position --one-document --json losses.json
  tools/evaluate.py bundles/1b data/web_8k --by-position --one-document --set rope.base=500000
  tools/evaluate.py bundles/1b data/web_8k --by-position --one-document --set rope.extension=ntk_exact \\
      --set rope.context=8192
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder written by tools/export_model.py")
    parser.add_argument("data", type=Path, metavar="DATA", help="folder written by tools/prepare_data.py")
    parser.add_argument("--split", choices=("train", "valid"), default="valid", help="(default: valid)")
    parser.add_argument("--n-rows", type=as_integer, metavar="N", help="read the first N rows (default: all)")
    parser.add_argument("--by-position", action="store_true", help="add a table by powers of two of the position")
    parser.add_argument(
        "--one-document",
        action="store_true",
        help="count only rows that one document fills: then all positions are of the same text",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of model.attention or model.rope; repeatable"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers into it, too")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of weights (default: fp32)")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the first GPU if there is one)")
    args = parser.parse_intermixed_args()
    require(args.n_rows is None or args.n_rows > 0, f"--n-rows {args.n_rows} must be positive")
    require(args.bundle.is_dir(), f"no bundle {args.bundle}: make one with tools/export_model.py")
    require(args.data.is_dir(), f"no folder {args.data}: make one with tools/prepare_data.py")
    if args.json:
        require_new_file("--json", args.json, args.overwrite)
    return args


def report(args: argparse.Namespace, parts: "list[PositionLoss]", n_rows: int, seq_len: int, context: int) -> None:
    """Print the losses of the first rows, and write them to --json. Raises UserError when there is no finite loss."""
    n_tokens = sum(part.n_tokens for part in parts)
    require(n_tokens > 0, f"none of the {n_rows} rows is filled by one document: raise --n-rows, or use shorter rows")
    loss = sum(part.loss_sum for part in parts) / n_tokens
    require(math.isfinite(loss), f"the loss is not finite in {args.dtype}: evaluate with --dtype fp32")
    print(f"{args.bundle} on the {args.split} split of {args.data}: {n_rows} rows of {seq_len} tokens")
    if args.set:
        print(f"changed     {', '.join(args.set)}")
    elif seq_len > context:
        print(f"note: these rows are longer than the {context} tokens of the model's RoPE context", file=sys.stderr)
    print(f"tokens      {n_tokens:,}" + (", of the rows that one document fills" if args.one_document else ""))
    print(f"loss        {loss:.4f} nats per token")
    print(f"perplexity  {math.exp(loss):.4g}")
    if args.by_position:
        print("\n   position       tokens     loss  perplexity")
        for part in parts:
            if part.n_tokens:
                span = f"{part.start}-{part.stop - 1}"
                print(f"{span:>11} {part.n_tokens:>12,} {part.loss:>8.4f} {math.exp(part.loss):>11.4g}")
    if args.json:
        content: dict[str, Any] = {
            "bundle": str(args.bundle), "data": str(args.data), "split": args.split, "set": args.set,
            "seq_len": seq_len, "n_rows": n_rows, "one_document": args.one_document,
            "n_tokens": n_tokens, "loss": loss, "perplexity": math.exp(loss),
        }  # fmt: skip
        if args.by_position:
            content["by_position"] = [dataclasses.asdict(part) for part in parts]
        write_whole(args.json, json.dumps(content, indent=1) + "\n")


def main() -> None:
    args = parse_arguments()

    # seconds of imports, which a mistake in the arguments should not cost
    from megakexue.bundle.bundle import Bundle
    from megakexue.bundle.evaluate import changed, loss_by_position, position_edges
    from megakexue.bundle.generate import load_decoder
    from megakexue.core.attention import choose_backend
    from megakexue.core.device import DTYPES, find_device
    from megakexue.dist import ALONE
    from megakexue.run.data import Batches

    bundle = Bundle(args.bundle)
    bundle.load_tokenizer()  # refuses one that is not of these weights
    manifest, digest = read_manifest(args.data), sha256(bundle.tokenizer)
    require(
        manifest.tokenizer_sha256 == digest,
        f"{args.data} was prepared with another tokenizer (sha256 {manifest.tokenizer_sha256[:12]}) than that of "
        f"{args.bundle} ({digest[:12]}): prepare the data with {args.bundle}/tokenizer.model",
    )
    seq_len, n_rows = manifest.seq_len, manifest.n_rows(args.split)
    require(n_rows > 0, f"{args.data} has no rows in its {args.split} split: prepare it with a larger --valid-fraction")
    n_rows = min(n_rows, args.n_rows or n_rows)
    context = bundle.config.rope.context
    bundle.config, backend_setting = changed(bundle.config, args.set)
    device, dtype = find_device(args.device), DTYPES[args.dtype]
    widths = bundle.config.head_width, bundle.config.value_width
    backend, _ = choose_backend(backend_setting, device.type, dtype, *widths)
    model = load_decoder(bundle, device, dtype, backend)

    source = SourceConfig(path=str(args.data))
    data = DataConfig(sources=[source], tokenizer=str(bundle.tokenizer), seq_len=seq_len, shuffle=False)
    rows_at_a_time = max(1, BATCH_TOKENS // seq_len)
    batches = Batches(
        data, split=args.split, global_batch_size=rows_at_a_time, micro_batch_size=rows_at_a_time,
        ranks=ALONE, cache=args.data,
    )  # fmt: skip
    edges = position_edges(seq_len) if args.by_position else [0, seq_len]
    parts = loss_by_position(model, batches.first_rows(n_rows), edges, one_document=args.one_document)
    batches.close()
    report(args, parts, n_rows, seq_len, context)


if __name__ == "__main__":
    run_program(main)
