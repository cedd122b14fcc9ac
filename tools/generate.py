#!/usr/bin/env python
"""Continue texts with the model of a bundle: one as it is computed, several together as a batch."""

import argparse
import os
import sys
import time
from pathlib import Path

from megakexue.config import UserError, as_integer, as_number, require, run_program

EPILOG = """\
The text goes to stdout, the prompt first, and what is said about it to stderr. Prompts are taken byte by byte: a
newline at the end of one is part of it. The same seed gives the same text on the same machine, in fp32 also beside
other prompts. The text ends early where the model ends the document.

examples:
  tools/generate.py bundles/1b --prompt 'def fibonacci(n):' --n-tokens 100
  tools/generate.py bundles/1b --prompt '' --n-samples 5 --temperature 1 --top-p 1
  tools/generate.py bundles/1b --prompt 'import ' --prompt 'The answer is' --greedy
  printf '从前有座山，' | tools/generate.py bundles/1b --greedy
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder written by tools/export_model.py")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to continue; may be empty, and be given several times (default: read from stdin)",
    )
    prompt.add_argument("--prompt-file", action="append", type=Path, metavar="FILE", help="the same, from a file")
    parser.add_argument("--n-tokens", type=as_integer, default=200, metavar="N", help="at most so many (default: 200)")
    parser.add_argument("--temperature", type=as_number, metavar="X", help="0 is greedy (default: 0.8)")
    parser.add_argument("--top-p", type=as_number, metavar="P", help="mass of the tokens to draw from (default: 0.95)")
    parser.add_argument(
        "--seed", type=as_integer, metavar="N", help="of the first text; the next count up (default: 0)"
    )
    parser.add_argument("--n-samples", type=as_integer, metavar="K", help="continuations of each prompt (default: 1)")
    parser.add_argument("--greedy", action="store_true", help="take the most probable token")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of weights (default: fp32)")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the first GPU if there is one)")
    args = parser.parse_intermixed_args()
    for name, default in {"temperature": 0.8, "top_p": 0.95, "seed": 0, "n_samples": 1}.items():
        option, is_given = "--" + name.replace("_", "-"), getattr(args, name) is not None
        require(not (args.greedy and is_given), f"{option} has no effect with --greedy: drop one of them")
        if not is_given:
            setattr(args, name, default)
    if args.greedy:
        args.temperature = 0.0
    require(args.n_tokens > 0, f"--n-tokens {args.n_tokens} must be positive")
    require(args.temperature >= 0, f"--temperature {args.temperature} must not be negative")
    require(0 < args.top_p <= 1, f"--top-p {args.top_p} must be above 0 and at most 1")
    require(0 < args.n_samples <= 65536, f"--n-samples {args.n_samples} must be between 1 and 65536")
    require(0 <= args.seed <= 2**62, f"--seed {args.seed} must be between 0 and 2^62")
    require(args.bundle.is_dir(), f"no bundle {args.bundle}: make one with tools/export_model.py or tools/import_hf.py")
    return args


def read_prompts(args: argparse.Namespace) -> list[bytes]:
    if args.prompt is not None:
        return [os.fsencode(text) for text in args.prompt]
    if args.prompt_file is not None:
        try:
            return [path.read_bytes() for path in args.prompt_file]
        except OSError as error:
            raise UserError(f"cannot read --prompt-file {error.filename}: {error.strerror}") from error
    if sys.stdin.isatty():
        print("the prompt, then Ctrl-D:", file=sys.stderr)
    return [sys.stdin.buffer.read()]


def write(text: bytes) -> None:
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()


def main() -> None:
    args = parse_arguments()
    texts = [text for text in read_prompts(args) for _ in range(args.n_samples)]

    # seconds of imports, which a mistake in the arguments should not cost
    from megakexue.bundle.bundle import Bundle
    from megakexue.bundle.generate import complete, encode_prompt, load_decoder
    from megakexue.core.decoder import Cache
    from megakexue.core.device import DTYPES, find_device

    bundle = Bundle(args.bundle)
    tokenizer = bundle.load_tokenizer()
    model = load_decoder(bundle, find_device(args.device), DTYPES[args.dtype])
    prompts = [encode_prompt(tokenizer, text) for text in texts]
    n_total = max(map(len, prompts)) + args.n_tokens
    context = bundle.config.rope.context
    if n_total > context:
        print(f"warning: {n_total} tokens are more than the {context} of the model's RoPE context", file=sys.stderr)

    caches = [Cache() for _ in model.blocks]
    options = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed, "n_tokens": args.n_tokens}
    n_tokens, began = 0, time.perf_counter()
    if len(texts) == 1:
        write(texts[0])
    pieces: list[list[str]] = [[] for _ in texts]
    for row in complete(model, tokenizer, texts, caches=caches, **options):
        n_tokens += sum(piece is not None for piece in row)
        for piece, whole in zip(row, pieces, strict=True):
            whole.append(piece or "")
        if len(texts) == 1:
            write((row[0] or "").encode())
    seconds = time.perf_counter() - began
    if len(texts) == 1:
        write(b"\n")
    else:
        for i, (text, whole) in enumerate(zip(texts, pieces, strict=True)):
            of = f"prompt {i // args.n_samples + 1}, " if len(texts) > args.n_samples else ""
            write(f"--- {of}seed {args.seed + i} ---\n".encode() + text + "".join(whole).encode() + b"\n")
    n_bytes = sum(cache.bytes_per_token for cache in caches)
    print(
        f"{n_tokens} tokens in {seconds:.2f} s: {n_tokens / seconds:.1f} tokens/s; {n_bytes:,} bytes of cache a token",
        file=sys.stderr,
    )


if __name__ == "__main__":
    try:
        run_program(main)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
