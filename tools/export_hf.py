#!/usr/bin/env python
"""Write a bundle as a folder for Hugging Face: transformers, vLLM, SGLang and what reads their files."""

import argparse
import re
from pathlib import Path

from megakexue.config import UserError, as_number, require, run_program

EPILOG = """\
A model with residual=prenorm, attention.scale=constant and similarity=dot becomes a plain Llama, or with mla a dense
DeepSeek-V3: its scales are folded into the weights, and everything that loads these classes loads it. Another model
(DeepNorm, log n, cosine, ...) brings a small modelling file, which people load with trust_remote_code=True. It needs
transformers 4.57 or later, nothing of ours, and runs in vLLM and SGLang by their transformers backend.

Before OUT appears, transformers loads it, and its logits on real text are compared with the bundle's in float32, with
the cache and without; if they differ, nothing is left. This takes the memory of two models in float32 (--no-check
leaves it out). docs/interop.md says what the tokenizer does, and what is known of serving engines.

examples:
  tools/export_hf.py bundles/1b hf/1b --license apache-2.0
  tools/export_hf.py bundles/1b hf/1b_fp32 --dtype fp32 --shard-size 2 --text sample.txt
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder written by tools/export_model.py")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the weights (default: bf16)")
    parser.add_argument(
        "--shard-size", type=as_number, default=4.0, metavar="GIB", help="largest file of weights, in GiB (default: 4)"
    )
    parser.add_argument(
        "--license", default="unknown", metavar="ID", help="for the model card, as the hub names it (default: unknown)"
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="what the check encodes (default: our own source)")
    parser.add_argument("--no-check", action="store_true", help="do not compare the export with the bundle")
    parser.add_argument("--device", help="of the check: such as cpu or cuda:1 (default: the first GPU if there is one)")
    args = parser.parse_intermixed_args()
    require(0 < args.shard_size < 2**20, f"--shard-size {args.shard_size} must be positive, in GiB")
    require(
        re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", args.license) is not None,
        f"--license {args.license} must be a short name, such as apache-2.0 or mit",
    )
    for option, value in (("--text", args.text), ("--device", args.device)):
        require(not (args.no_check and value), f"{option} has no effect with --no-check: drop one of them")
    require(args.bundle.is_dir(), f"no bundle {args.bundle}: make one with tools/export_model.py")
    require(not args.out.exists(), f"{args.out} exists: choose another name, or remove it")
    return args


def read_text(path: Path | None) -> str | None:
    try:
        return None if path is None else path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read --text {path}: {error}") from error


def main() -> None:
    args = parse_arguments()
    text = read_text(args.text)

    # seconds of imports, which a mistake in the arguments should not cost
    from megakexue.bundle.bundle import Bundle
    from megakexue.bundle.hf_export import export_hf
    from megakexue.core.costs import n_parameters
    from megakexue.core.device import find_device

    bundle = Bundle(args.bundle)
    kind, reasons, found = export_hf(
        bundle, args.out, dtype=args.dtype, shard_bytes=round(args.shard_size * 2**30), licence=args.license, text=text,
        check=not args.no_check, device=None if args.no_check else find_device(args.device),
    )  # fmt: skip
    n_bytes = sum(path.stat().st_size for path in args.out.iterdir())
    how = f"with its own file, since no plain class has {', '.join(reasons)}" if reasons else "of transformers"
    print(f"{args.out}: {kind} {how}")
    print(f"{n_parameters(bundle.config):,} parameters in {args.dtype}, {n_bytes:,} bytes")
    print(f"checked: {found}" if found else "not checked")


if __name__ == "__main__":
    run_program(main)
