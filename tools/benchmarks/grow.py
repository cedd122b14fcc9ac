#!/usr/bin/env python
"""Time growth and its peak memory: a bundle of random weights of one config grows into another."""

import argparse
import math
import multiprocessing
import os
import resource
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megakexue.config import load_config, require, run_program
from megakexue.files import writing

N_TOKENS = 512  # as tools/grow_model.py compares, but random

EPILOG = """\
Peak memory is the resident size of the process that grows, with what it maps of SOURCE's files; the bound is the size
of the new weights, plus the largest of them, plus 1 GiB (for a tiny model the libraries alone take that).

example:
  tools/benchmarks/grow.py configs/1b.yaml configs/7b_from_1b.yaml --scratch /tmp/growth model.d_model=3072 \\
      model.n_heads=24 model.n_kv_heads=6 model.d_ff=8448 model.n_layers=26
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="YAML of the small model")
    parser.add_argument("target", type=Path, metavar="TARGET", help="YAML of the large one")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="over TARGET")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for both bundles; it must not exist")
    parser.add_argument(
        "--tokenizer", type=Path, help="any tokenizer.model, which bundles hold (default: an empty file)"
    )
    args = parser.parse_intermixed_args()
    require(not args.scratch.exists(), f"--scratch {args.scratch} exists: name a folder to be made and removed")
    return args


def write_source(config_path: Path, scratch: Path) -> None:
    from megakexue.bundle.bundle import write_bundle
    from megakexue.core.axes import parameter_names
    from megakexue.core.decoder import initial_weight
    from megakexue.core.resolve import resolve

    config = load_config(config_path)
    model = resolve(config.model, config.optim.name, config.data.seq_len)
    weights = ((name, initial_weight(name, model, 0)) for name in parameter_names(model))
    write_bundle(scratch / "small", model, weights, scratch / "tokenizer.model", {})


def grow(config_path: Path, overrides: list[str], scratch: Path) -> None:
    import torch

    from megakexue.bundle.axis_maps import Choices
    from megakexue.bundle.bundle import Bundle, write_bundle
    from megakexue.bundle.grow import Growth
    from megakexue.bundle.trace import Difference, grown_weights
    from megakexue.core.batch import make_batch
    from megakexue.core.resolve import resolve

    config = load_config(config_path, overrides)
    model = resolve(config.model, config.optim.name, config.data.seq_len)
    source = Bundle(scratch / "small")
    growth = Growth(source.config, model, Choices())
    tokens = torch.randint(2, source.config.vocab_size, (1, N_TOKENS + 1), generator=torch.Generator().manual_seed(0))

    def report(differences: list[Difference]) -> None:
        for d in differences:
            print(f"{d.dtype}: largest difference {d.largest:.2e}, bound {d.bound:.2e}")
            require(d.is_small, "the grown model is not the old one")

    batch = make_batch(tokens.numpy(), [], bos_id=1, pad_id=0)
    weights = grown_weights(growth, lambda name: source.tensor("master", name), batch, report)
    write_bundle(scratch / "large", model, weights, scratch / "tokenizer.model", {})


def measure(function: Callable[..., None], *arguments: Any) -> int:
    """Run a function in a process of its own; print its time, and return its peak of resident bytes."""
    began = time.perf_counter()
    process = multiprocessing.get_context("spawn").Process(target=run_program, args=(partial(function, *arguments),))
    process.start()
    peak, page = 0, resource.getpagesize()
    while process.is_alive():
        try:
            peak = max(peak, int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * page)
        except (OSError, IndexError):
            break
        process.join(0.02)
    process.join()
    require(process.exitcode == 0, f"{function.__name__} failed")
    print(f"{function.__name__}: {time.perf_counter() - began:.0f} s, peak {peak / 2**30:.2f} GiB resident")
    return peak


def print_bound(bundle: Path, peak: int) -> None:
    from megakexue.bundle.bundle import Bundle
    from megakexue.core.axes import parameter_names, shape

    config = Bundle(bundle, check_hashes=False).config
    sizes = [4 * math.prod(shape(name, config)) for name in parameter_names(config)]
    bound = sum(sizes) + max(sizes) + 2**30
    output, largest, limit = (f"{n / 2**30:.2f} GiB" for n in (sum(sizes), max(sizes), bound))
    where = "below" if peak <= bound else "above"
    print(f"output {output}, largest tensor {largest}: the peak is {where} the bound of {limit}")


def main() -> None:
    args = parse_arguments()
    name = f"--scratch {args.scratch}"
    with writing(name, args.scratch):
        args.scratch.mkdir(parents=True)
    try:
        with writing(name, args.scratch):
            if args.tokenizer:
                shutil.copyfile(args.tokenizer, args.scratch / "tokenizer.model")
            else:
                (args.scratch / "tokenizer.model").touch()
        measure(write_source, args.source, args.scratch)
        peak = measure(grow, args.target, args.overrides, args.scratch)
        print_bound(args.scratch / "large", peak)
    finally:
        shutil.rmtree(args.scratch)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    run_program(main)
