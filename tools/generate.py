#!/usr/bin/env python
"""Continue a text with the model of a bundle, as it is computed."""

import argparse
import math
import os
import sys
import time
from pathlib import Path

from megakexue.config import UserError, require, run_program

EPILOG = """\
The text goes to stdout, the prompt first, and what is said about it to stderr. Prompts are taken byte by byte: a
newline at the end of one is part of it. The same seed gives the same text on the same machine. The text ends early
where the model ends the document.

examples:
  tools/generate.py bundles/1b --prompt 'def fibonacci(n):' --n-tokens 100
  tools/generate.py bundles/1b --prompt '' --n-samples 5 --temperature 1 --top-p 1
  printf '从前有座山，' | tools/generate.py bundles/1b --greedy
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder written by tools/export_model.py")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue; may be empty (default: read from stdin)")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="file to continue")
    parser.add_argument("--n-tokens", type=int, default=200, metavar="N", help="at most so many (default: 200)")
    parser.add_argument("--temperature", type=float, metavar="X", help="0 is greedy (default: 0.8)")
    parser.add_argument("--top-p", type=float, metavar="P", help="mass of the tokens to draw from (default: 0.95)")
    parser.add_argument("--seed", type=int, metavar="N", help="of the first sample; the next count up (default: 0)")
    parser.add_argument("--n-samples", type=int, metavar="K", help="continuations, one after another (default: 1)")
    parser.add_argument("--greedy", action="store_true", help="take the most probable token")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of weights (default: fp32)")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the first GPU if there is one)")
    args = parser.parse_args()
    for name, default in {"temperature": 0.8, "top_p": 0.95, "seed": 0, "n_samples": 1}.items():
        option, is_given = "--" + name.replace("_", "-"), getattr(args, name) is not None
        require(not (args.greedy and is_given), f"{option} has no effect with --greedy: drop one of them")
        if not is_given:
            setattr(args, name, default)
    if args.greedy:
        args.temperature = 0.0
    require(args.n_tokens > 0, f"--n-tokens {args.n_tokens} must be positive")
    require(0 <= args.temperature < math.inf, f"--temperature {args.temperature} must be finite and not negative")
    require(0 < args.top_p <= 1, f"--top-p {args.top_p} must be above 0 and at most 1")
    require(args.n_samples > 0, f"--n-samples {args.n_samples} must be positive")
    require(0 <= args.seed <= 2**62, f"--seed {args.seed} must be between 0 and 2^62")
    require(args.bundle.is_dir(), f"no bundle {args.bundle}: make one with tools/export_model.py")
    return args


def read_prompt(args: argparse.Namespace) -> bytes:
    if args.prompt is not None:
        return os.fsencode(args.prompt)
    if args.prompt_file is not None:
        try:
            return args.prompt_file.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read --prompt-file {args.prompt_file}: {error.strerror}") from error
    if sys.stdin.isatty():
        print("the prompt, then Ctrl-D:", file=sys.stderr)
    return sys.stdin.buffer.read()


def write(text: bytes) -> None:
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()


def main() -> None:
    args = parse_arguments()
    prompt = read_prompt(args)

    import torch  # seconds, which a mistake in the arguments should not cost

    from megakexue.export import Bundle
    from megakexue.generate import complete, load_decoder

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
    bundle = Bundle(args.bundle)
    tokenizer = bundle.load_tokenizer()
    try:
        device = torch.device(args.device) if args.device else None
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device}: {str(error).splitlines()[0]}") from error
    model = load_decoder(bundle, device, dtype)
    n_total = 1 + len(tokenizer.encode(prompt)) + args.n_tokens
    context = bundle.config.rope.context
    if context and n_total > context:
        print(f"warning: {n_total} tokens are more than the {context} of the model's RoPE context", file=sys.stderr)

    n_tokens, began = 0, time.perf_counter()
    for seed in range(args.seed, args.seed + args.n_samples):
        if args.n_samples > 1:
            write(f"--- seed {seed} ---\n".encode())
        write(prompt)
        options = {"temperature": args.temperature, "top_p": args.top_p, "seed": seed, "n_tokens": args.n_tokens}
        for piece in complete(model, tokenizer, prompt, **options):
            write(piece.encode())
            n_tokens += 1
        write(b"\n")
    seconds = time.perf_counter() - began
    print(f"{n_tokens} tokens in {seconds:.2f} s: {n_tokens / seconds:.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    try:
        run_program(main)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
