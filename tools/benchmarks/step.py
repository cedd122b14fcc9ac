#!/usr/bin/env python
"""Time a whole training step: ours, eager and compiled, beside transformers' compiled Llama of the same shape."""

import argparse
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megakexue.config import (
    Config,
    DataConfig,
    EngineConfig,
    MlaConfig,
    ModelConfig,
    OptimConfig,
    ResolvedConfig,
    SourceConfig,
    TrainConfig,
    as_integer,
    require,
    run_program,
)  # fmt: skip
from megakexue.files import json_text, require_new_file, write_whole

if TYPE_CHECKING:
    from torch import Tensor

    from megakexue.core.batch import Batch

EPILOG = """\
A step is forward, backward and the optimizer: ours by the engine under ZeRO-1 on one rank with Tiger, that of
transformers with autocast and torch's fused AdamW. All arms have the same tokens, the same parameters but for gains,
and run one after the other in each round, in another order each time. Seconds are those of the process on a CPU, which
other work on the machine changes little, and of the clock on a GPU. A ratio is the median over the rounds, with the
range of its middle half. Peak on a CPU: the fastest of the step's own matrix products, timed in each round.

transformers does not keep packed documents apart, so with --documents it has less to do than ours in the mask, and more
in the scores.

examples:
  tools/benchmarks/step.py                                   26M parameters, bf16, one document a row
  tools/benchmarks/step.py --documents 4 --dtype fp32 --rounds 9 --json step.json
  tools/benchmarks/step.py --profile                         where the time of a step goes, too
  tools/benchmarks/step.py --d-model 2048 --n-layers 24 --d-ff 5632 --vocab-size 64000 --rows 4 --seq-len 4096   a GPU
"""
BOS, PAD = 1, 3
WARM_UP = 2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {"d-model": 512, "n-layers": 6, "n-heads": 8, "n-kv-heads": 2, "d-ff": 1408, "vocab-size": 8192,
             "seq-len": 1024, "rows": 2, "documents": 1, "rounds": 5}  # fmt: skip
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=as_integer, default=default, help=f"default: {default}")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="default: bf16")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS), help="default: all")
    parser.add_argument("--profile", action="store_true", help="one more step of each arm: the time of its kernels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there too")
    return parser.parse_intermixed_args()


def make_config(args: argparse.Namespace, *, is_compiled: bool, is_mla: bool = False) -> ResolvedConfig:
    from megakexue.core.resolve import resolve_config

    width = args.d_model // args.n_heads
    kind: dict[str, Any] = {"n_kv_heads": args.n_kv_heads}
    if is_mla:
        kind = {"mla": MlaConfig(d_latent=4 * width, d_nope=width // 2, d_rope=width // 2, d_value=width)}
    return resolve_config(
        Config(
            model=ModelConfig(
                vocab_size=args.vocab_size, d_model=args.d_model, n_layers=args.n_layers, n_heads=args.n_heads,
                d_ff=args.d_ff, **kind,
            ),
            data=DataConfig(sources=[SourceConfig(path="none")], tokenizer="none", seq_len=args.seq_len),
            train=TrainConfig(run="none", steps=1000, global_batch_size=args.rows, micro_batch_size=args.rows),
            optim=OptimConfig(warmup_steps=0),
            engine=EngineConfig(dtype=args.dtype, zero_stage=1, compile="on" if is_compiled else "off"),
        )
    )  # fmt: skip


class Ours:
    """Our engine; `step` takes an optimizer step and returns its loss."""

    def __init__(self, args: argparse.Namespace, *, is_compiled: bool = False, is_mla: bool = False) -> None:
        from megakexue.run.engine import Engine, start

        config = make_config(args, is_compiled=is_compiled, is_mla=is_mla)
        self.engine = Engine(config, start(config.engine))
        self.engine.load_new(seed=0)
        self.n_steps = 0

    def step(self, batch: "Batch") -> float:
        self.n_steps += 1
        return self.engine.train_step([batch], 1e-4, self.n_steps).loss

    def saved_bytes(self, batch: "Batch") -> int:
        """Bytes that autograd keeps for the backward pass of the blocks, each storage once, without parameters."""
        import torch

        module = self.engine.module
        parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
        found: dict[int, int] = {}

        def note(x: "Tensor") -> "Tensor":
            storage = x.untyped_storage()
            if storage.data_ptr() not in parameters:
                found[storage.data_ptr()] = storage.nbytes()
            kept.append(x)  # or another tensor may get its address
            return x

        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            device = self.engine.device
            boundaries = None if batch.boundaries is None else batch.boundaries.to(device)
            module.hidden(batch.tokens.to(device), batch.positions.to(device), boundaries)
        return sum(found.values())


class Transformers:
    """transformers' Llama with its whole model compiled, as its users train it."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from megakexue.core.device import DTYPES, find_device

        config = LlamaConfig(
            vocab_size=args.vocab_size, hidden_size=args.d_model, num_hidden_layers=args.n_layers,
            num_attention_heads=args.n_heads, num_key_value_heads=args.n_kv_heads, intermediate_size=args.d_ff,
            max_position_embeddings=args.seq_len, use_cache=False, attn_implementation="sdpa",
        )  # fmt: skip
        self.device, self.dtype = find_device(), DTYPES[args.dtype]
        model: Any = LlamaForCausalLM(config)
        self.module: torch.nn.Module = model.to(self.device)
        self.forward = torch.compile(self.module)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4, fused=True)

    def step(self, batch: "Batch") -> float:
        import torch

        labels = batch.targets.to(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.forward(input_ids=batch.tokens.to(self.device)).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


ARMS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "ours-eager": Ours,
    "ours-compiled": lambda args: Ours(args, is_compiled=True),
    "ours-mla-compiled": lambda args: Ours(args, is_compiled=True, is_mla=True),
    "transformers-compiled": Transformers,
}


def make_batches(args: argparse.Namespace, n: int) -> list["Batch"]:
    """Random rows with documents of random lengths, the same in each run."""
    import numpy as np

    from megakexue.core.batch import make_batch

    rng, batches = np.random.default_rng(0), []
    for _ in range(n):
        rows = rng.integers(4, args.vocab_size, (args.rows, args.seq_len + 1))
        rows[:, 0] = BOS
        for row in rows:
            row[rng.choice(np.arange(1, args.seq_len), args.documents - 1, replace=False)] = BOS
        batches.append(make_batch(rows, [], bos_id=BOS, pad_id=PAD))
    return batches


GROUPS = {
    "elementwise": r"^triton_(?!tem|.*attention)",  # which has the names of all operators in it
    "attention": r"flash|fmha|attention|attn|sdpa|triton_tem|aten::_softmax|bmm|_Blocked",
    "products": r"gemm|gemv|nvjet|cutlass|cublas|split_?k|::(add)?mm|linear",
    "copies": r"memcpy|memset|copy|clone|contiguous|::(cat|fill_|zero_)",
}
"""Patterns of the names of a GPU's kernels, and on a CPU of torch's operators, where only attention has batched
products. The first that fits counts."""


def summary(kernels: list[tuple[str, float, float]]) -> dict[str, dict[str, float]]:
    """Return ms, idle ms and launches by group, from name, start and microseconds of each kernel.

    What comes after the last product is the tail: the optimizer. Idle is what lies between the kernels.
    """

    def group(name: str) -> str:
        return next((g for g, pattern in GROUPS.items() if re.search(pattern, name, re.IGNORECASE)), "elementwise")

    found = {
        g: {"ms": 0.0, "idle_ms": 0.0, "launches": 0.0}
        for g in ("products", "attention", "elementwise", "copies", "tail")
    }
    kernels = sorted(kernels, key=lambda kernel: kernel[1])
    last_product = max((start for name, start, _ in kernels if group(name) == "products"), default=float("inf"))
    end = kernels[0][1] if kernels else 0.0
    for name, start, length in kernels:
        values = found["tail" if start > last_product else group(name)]
        values["ms"] += length / 1e3
        values["idle_ms"] += max(0.0, start - end) / 1e3  # before this kernel
        values["launches"] += 1
        end = max(end, start + length)
    return found


def profile(arm: Any, batch: "Batch") -> dict[str, dict[str, float]]:
    """Return the `summary` of one more step. On a CPU it is of operators, each without the others in it."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    is_cuda = torch.cuda.is_available()
    kind = DeviceType.CUDA if is_cuda else DeviceType.CPU
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with torch.profiler.profile(activities=activities) as record:
        arm.step(batch)
    events = [e for e in record.events() or [] if e.device_type == kind and not getattr(e, "is_user_annotation", False)]
    if is_cuda:
        return summary([(e.name, e.time_range.start, e.time_range.elapsed_us()) for e in events])
    # operators contain others, so what lies between them says nothing
    found = summary([(e.name, e.time_range.start, e.self_cpu_time_total) for e in events])
    return {group: {k: v for k, v in numbers.items() if k != "idle_ms"} for group, numbers in found.items()}


def product_peak(args: argparse.Namespace, clock: Callable[[], float]) -> float:
    """Return the FLOP/s of the fastest of the step's products, each over a twentieth of a second.

    A CPU that others share is not equally fast from minute to minute, so this is done in each round.
    """
    import torch

    from megakexue.core.costs import product_shapes
    from megakexue.core.device import DTYPES

    rates = []
    for m, k, n in set(product_shapes(make_config(args, is_compiled=False).model, args.rows * args.seq_len)):
        x, weight = (torch.ones(rows, k, dtype=DTYPES[args.dtype]) for rows in (m, n))
        count, began = 0, clock()
        while clock() - began < 0.05:
            torch.nn.functional.linear(x, weight)
            count += 1
        rates.append(2 * m * k * n * count / (clock() - began))
    return max(rates)


def measure(args: argparse.Namespace) -> tuple[dict[str, dict[str, Any]], list[float]]:
    """Return of each arm its seconds in each round, the loss of its first and last step, and what it saves; and the
    FLOP/s of the peak in each round, none on a GPU, whose data sheet says it."""
    import torch

    peaks: list[float] = []
    is_cuda = torch.cuda.is_available()
    clock = time.perf_counter if is_cuda else time.process_time
    batches = make_batches(args, WARM_UP + args.rounds)
    arms, found = {}, {}
    for name in args.arms:
        began = time.perf_counter()
        arms[name] = ARMS[name](args)
        losses = [arms[name].step(batch) for batch in batches[:WARM_UP]]
        found[name] = {"seconds": [], "first_loss": losses[0], "start_s": time.perf_counter() - began}
        print(f"{name}: ready after {found[name]['start_s']:.0f} s, loss {losses[0]:.4f}", flush=True)
    for i, batch in enumerate(batches[WARM_UP:]):
        if not is_cuda:
            peaks.append(product_peak(args, clock))
        for name in args.arms[i % len(arms) :] + args.arms[: i % len(arms)]:
            began = clock()
            loss = arms[name].step(batch)  # reads its loss, so that the device is done
            found[name]["seconds"].append(clock() - began)
            found[name]["last_loss"] = loss
    tokens = args.rows * args.seq_len * args.n_layers
    for name, arm in arms.items():
        if args.profile:
            found[name]["profile"] = profile(arm, batches[0])
        if isinstance(arm, Ours):
            found[name]["saved_bytes_a_token_and_layer"] = arm.saved_bytes(batches[0]) / tokens
    return found, peaks


def report(args: argparse.Namespace, found: dict[str, dict[str, Any]], peaks: list[float]) -> dict[str, Any]:
    """Print a line for each arm and each ratio, and return all numbers."""
    import torch

    from megakexue.config import MetricsConfig
    from megakexue.core.costs import flops_per_token
    from megakexue.core.device import DTYPES, find_device, peak_flops

    source = "of the step's own products, in each round"
    if not peaks:
        peak, source = peak_flops(MetricsConfig(), find_device(), DTYPES[args.dtype])
        peaks = [peak] * args.rounds
    n_keys = statistics.mean(float(b.positions.double().mean()) + 1 for b in make_batches(args, WARM_UP + args.rounds))
    print(
        f"{torch.get_num_threads()} thread(s), torch {torch.__version__}; peak {statistics.median(peaks) / 1e12:.3g} "
        f"TFLOP/s ({min(peaks) / 1e12:.3g} .. {max(peaks) / 1e12:.3g}) {source}"
    )
    for name, values in found.items():
        config = make_config(args, is_compiled=False, is_mla="mla" in name).model
        n_tokens = args.rows * args.seq_len
        share = statistics.median(n_tokens / s / peak for s, peak in zip(values["seconds"], peaks, strict=True))
        rate = n_tokens / statistics.median(values["seconds"])
        values |= {
            "tokens_per_s": rate,
            "mfu": share * flops_per_token(config, n_keys),
            "mfu_not_causal": share * flops_per_token(config, args.seq_len),
        }
        saved = values.get("saved_bytes_a_token_and_layer")
        print(
            f"{name:<22} {rate:9,.0f} tokens/s  {values['mfu']:6.1%} of the peak ({values['mfu_not_causal']:.1%} with "
            f"12 L d t)" + ("" if saved is None else f"  {saved / 1e3:6.1f} kB saved a token and layer")
        )
        for group, numbers in values.get("profile", {}).items():
            idle = f", {numbers['idle_ms']:,.1f} ms idle before them" if "idle_ms" in numbers else ""
            print(f"{'':<22} {numbers['ms']:9,.1f} ms {group:<11} {numbers['launches']:8,.0f} kernels{idle}")
    ratios = {}
    for name in found:
        for other in found:
            if name.startswith("ours") and other != name and other != "ours-mla-compiled":
                parts = [b / a for a, b in zip(found[name]["seconds"], found[other]["seconds"])]
                low, middle, high = statistics.quantiles(parts, n=4) if len(parts) > 1 else parts * 3
                ratios[f"{name} / {other}"] = [low, middle, high]
                print(f"{name:<22} is {middle:5.2f} times as fast as {other} ({low:.2f} .. {high:.2f})")
    settings = {k: v for k, v in vars(args).items() if k != "json"}
    return {"settings": settings, "peak_flops": peaks, "arms": found, "ratios": ratios}


def main() -> None:
    args = parse_arguments()
    require(args.rounds > 0, f"--rounds {args.rounds} must be positive")
    require(1 <= args.documents < args.seq_len, f"--documents {args.documents} must fit a row of {args.seq_len} tokens")
    if args.json:
        require_new_file("--json", args.json, overwrite=False)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    numbers = report(args, *measure(args))
    if args.json:
        write_whole(args.json, json_text(numbers))


if __name__ == "__main__":
    run_program(main)
