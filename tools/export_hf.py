#!/usr/bin/env python
"""Write a bundle or a run as a folder for Hugging Face: transformers, vLLM, SGLang and what reads their files."""

import argparse
import re
from contextlib import ExitStack
from pathlib import Path

from megakexue import buckets
from megakexue.config import UserError, as_integer, as_number, require, run_program
from megakexue.files import temporary_folder

EPILOG = """\
A model with residual=prenorm, attention.scale=constant and similarity=dot becomes a plain Llama, or with mla a dense
DeepSeek-V3: its scales are folded into the weights, and everything that loads these classes loads it. Another model
(DeepNorm, log n, cosine, ...) brings a small modelling file, which people load with trust_remote_code=True. It needs
transformers 4.57 or later, nothing of ours, and runs in vLLM and SGLang by their transformers backend.

Before OUT appears, transformers loads it, and its logits on real text are compared with ours in float32, with
the cache and without; if they differ, nothing is left. This takes the memory of two models in float32 (--no-check
leaves it out). docs/interop.md says what the tokenizer does, and what is known of serving engines.

OUT may be in a bucket (s3://, gs://, oci://), with the credentials that remote data takes. The folder is made
under TMPDIR first. config.json is copied last: a folder that has none is not whole.

examples:
  tools/export_hf.py bundles/1b hf/1b --license apache-2.0
  tools/export_hf.py bundles/1b hf/1b_fp32 --dtype fp32 --shard-size 2 --text sample.txt
  tools/export_hf.py runs/1b s3://bucket/models/1b --step 20000
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SOURCE", help="a bundle, or a run (its fp32 masters)")
    parser.add_argument("out", metavar="OUT", help="folder to write, local or in a bucket")
    parser.add_argument("--step", type=as_integer, help="of a run's checkpoint (default: the newest)")
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
    require(not buckets.is_remote(args.source), f"{args.source} is in a bucket: copy the bundle to this machine first")
    args.source = Path(args.source)
    require(args.source.is_dir(), f"no folder {args.source}: name a bundle or a run")
    if buckets.is_remote(args.out):
        buckets.check_scheme(args.out)
    else:
        require(not Path(args.out).exists(), f"{args.out} exists: choose another name, or remove it")
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
    from megakexue.bundle.hf_export import export_hf
    from megakexue.core.costs import n_parameters
    from megakexue.core.device import find_device
    from megakexue.run.export import open_source

    source = open_source(args.source, args.step)
    with ExitStack() as stack:
        out = Path(args.out)
        if buckets.is_remote(args.out):
            out = stack.enter_context(temporary_folder()) / args.out.rstrip("/").rpartition("/")[2]
            is_there = buckets.fetch(f"{args.out.rstrip('/')}/config.json", out.parent / "there", may_be_absent=True)
            require(not is_there, f"{args.out} has a config.json: choose another name, or remove it")
            buckets.check_writable(args.out)  # before the minutes that the export takes
        kind, reasons, found = export_hf(
            source, out, dtype=args.dtype, shard_bytes=round(args.shard_size * 2**30), licence=args.license, text=text,
            check=not args.no_check, device=None if args.no_check else find_device(args.device),
        )  # fmt: skip
        n_bytes = sum(path.stat().st_size for path in out.iterdir())
        if buckets.is_remote(args.out):
            names = sorted(path.name for path in out.iterdir() if path.name != "config.json")
            buckets.upload(out, [*names, "config.json"], args.out)
    how = f"with its own file, since no plain class has {', '.join(reasons)}" if reasons else "of transformers"
    print(f"{args.out}: {kind} {how}")
    print(f"{n_parameters(source.config):,} parameters in {args.dtype}, {n_bytes:,} bytes")
    print(f"checked: {found}" if found else "not checked")


if __name__ == "__main__":
    run_program(main)
