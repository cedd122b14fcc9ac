#!/usr/bin/env python
"""Time generation, greedy and drawn, beside transformers' `generate` with a Llama of the same shape."""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megakexue.config import ModelConfig, as_integer, require, run_program
from megakexue.files import json_text, require_new_file, write_whole

EPILOG = """\
All arms continue the same random prompts, eagerly, with random weights of the same shape, one after the other in each
round, in another order each time. Drawn tokens come at temperature 0.8 from the smallest set of mass 0.95. Seconds are
those of the process on a CPU, which other work on the machine changes little, and of the clock on a GPU. A ratio is the
median over the rounds, with the range of its middle half.

examples:
  tools/benchmarks/decode.py                          26M parameters, bf16, 8 prompts
  tools/benchmarks/decode.py --rows 1 --dtype fp32 --rounds 9 --json decode.json
"""
DRAWN = {"temperature": 0.8, "top_p": 0.95}
PEAK = 6  # times the head: logits of deviation 3, of which some hundreds are drawn, as of a trained model


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {"d-model": 512, "n-layers": 6, "n-heads": 8, "n-kv-heads": 2, "d-ff": 1408, "vocab-size": 8192,
             "rows": 8, "prompt": 128, "n-tokens": 128, "rounds": 5}  # fmt: skip
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=as_integer, default=default, help=f"default: {default}")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="default: bf16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there too")
    return parser.parse_intermixed_args()


def make_ours(args: argparse.Namespace) -> Callable[..., int]:
    """Return a function that continues prompts and returns how many tokens came."""
    import torch

    from megakexue.bundle.generate import generate
    from megakexue.core.decoder import Decoder, initial_weight
    from megakexue.core.device import DTYPES, find_device
    from megakexue.core.resolve import resolve

    kinds = {"d_model": args.d_model, "n_layers": args.n_layers, "n_heads": args.n_heads, "d_ff": args.d_ff}
    config = ModelConfig(vocab_size=args.vocab_size, n_kv_heads=args.n_kv_heads, **kinds)
    config = resolve(config, "tiger", args.prompt + args.n_tokens)
    model = Decoder(config, "sdpa").to(find_device(), DTYPES[args.dtype])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_weight(name, config, seed=0) * (PEAK if name == "head.weight" else 1))

    def run(prompts: list[list[int]], options: dict[str, float]) -> int:
        options = options or {"temperature": 0.0}
        rows = generate(model, prompts, n_tokens=args.n_tokens, stop_id=None, seed=0, **options)  # type: ignore[arg-type]
        return sum(map(len, rows))

    return run


def make_transformers(args: argparse.Namespace) -> Callable[..., int]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from megakexue.core.device import DTYPES, find_device

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab_size, hidden_size=args.d_model, intermediate_size=args.d_ff,
        num_hidden_layers=args.n_layers, num_attention_heads=args.n_heads, num_key_value_heads=args.n_kv_heads,
        bos_token_id=1, eos_token_id=None, pad_token_id=3,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).eval()
    model = model.to(find_device(), DTYPES[args.dtype])
    with torch.no_grad():
        model.lm_head.weight *= PEAK

    def run(prompts: list[list[int]], options: dict[str, float]) -> int:
        tokens = torch.tensor(prompts, device=find_device())
        options = options | {"do_sample": True, "top_k": 0} if options else {"do_sample": False}
        out = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=args.n_tokens, **options)
        return out.numel() - tokens.numel()

    return run


MAKERS = {"ours": make_ours, "transformers": make_transformers}


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of each arm in each round."""
    import torch

    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(4, args.vocab_size, (args.rows, args.prompt), generator=generator).tolist()
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    arms: dict[str, tuple[Callable[..., int], dict[str, float]]] = {}
    for name, make in MAKERS.items():
        run = make(args)
        arms |= {f"{name}, greedy": (run, {}), f"{name}, drawn": (run, DRAWN)}
    for run, options in arms.values():
        run(prompts, options)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(args.rounds):
        names = list(arms)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            run, options = arms[name]
            began = clock()
            n = run(prompts, options)  # gives tokens to the host, so that the device is done
            seconds[name].append(clock() - began)
            assert n == args.rows * args.n_tokens, f"{name} made {n} tokens"
    return seconds


def main() -> None:
    args = parse_arguments()
    for name in ("rounds", "rows", "prompt", "n_tokens"):
        value = getattr(args, name)
        require(value > 0, f"--{name.replace('_', '-')} {value} must be positive")
    if args.json:
        require_new_file("--json", args.json, overwrite=False)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    seconds = measure(args)
    for name, values in seconds.items():
        print(f"{name:<22} {args.rows * args.n_tokens / statistics.median(values):9,.1f} tokens/s")
    pairs = [("ours, greedy", "transformers, greedy"), ("ours, drawn", "transformers, drawn")]
    ratios = {}
    for name, other in [*pairs, ("ours, drawn", "ours, greedy")]:
        parts = [b / a for a, b in zip(seconds[name], seconds[other])]
        low, middle, high = statistics.quantiles(parts, n=4) if len(parts) > 1 else parts * 3
        ratios[f"{name} / {other}"] = [low, middle, high]
        print(f"{name:<22} is {middle:5.2f} times as fast as {other} ({low:.2f} .. {high:.2f})")
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        write_whole(args.json, json_text({"settings": settings, "seconds": seconds, "ratios": ratios}))


if __name__ == "__main__":
    run_program(main)
