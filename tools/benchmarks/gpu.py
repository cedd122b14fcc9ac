#!/usr/bin/env python
"""Measure one item of tools/benchmarks/gpu.sh, and print a line of JSON for each figure as it comes."""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megakexue.config import ModelConfig, run_program

if TYPE_CHECKING:
    from torch import Tensor

    from megakexue.core.attention import Layout

EPILOG = """\
items:
  rates      what the device can do: matrix products of configs/1b.yaml in bf16, and copies
  attention  every kernel that runs here, on rows of one document and on packed rows, forward and backward, and its
             error against float32
  loss       cross-entropy in chunks, eager and compiled: time and peak memory
  block      one block, eager and compiled: time, kernels and what is kept for the backward pass
  step       tools/benchmarks/step.py: our compiled step beside transformers' compiled Llama, and a profile of each
  eager      the same for our step without a compiler
  tests      the tests that need a GPU; with tiny sizes, only those of attention

Times are medians, on a GPU by its own events. Without a GPU, or with --small, all sizes are tiny: then the figures only
show that the program runs.

examples:
  tools/benchmarks/gpu.py attention
  tools/benchmarks/gpu.py loss --small
"""


@dataclass(frozen=True)
class Sizes:
    """Those of configs/1b.yaml."""

    rows: int = 4
    seq_len: int = 4096
    documents: int = 4
    n_heads: int = 16
    n_kv_heads: int = 4
    d_head: int = 128
    d_ff: int = 5632
    n_layers: int = 24
    vocab_size: int = 64000
    square: int = 8192
    latent_widths: tuple[int, int] = (192, 128)
    chunks: tuple[int, ...] = (512, 2048, 4096)
    rounds: int = 20
    step_rounds: int = 10

    @property
    def d_model(self) -> int:
        return self.n_heads * self.d_head

    @property
    def n_tokens(self) -> int:
        return self.rows * self.seq_len


SMALL = Sizes(
    rows=2, seq_len=64, n_heads=4, n_kv_heads=2, d_head=16, d_ff=96, n_layers=2, vocab_size=128, square=64,
    latent_widths=(24, 16), chunks=(32, 128), rounds=2, step_rounds=2,
)  # fmt: skip


class Bench:
    """The device, the sizes, and how to time."""

    def __init__(self, item: str, is_small: bool) -> None:
        import torch

        from megakexue.core.device import find_device

        torch.manual_seed(0)
        self.item, self.device = item, find_device()
        self.is_cuda = self.device.type == "cuda"
        self.sizes = SMALL if is_small or not self.is_cuda else Sizes()

    def emit(self, **figures: Any) -> None:
        rounded = {k: float(f"{v:.4g}") if isinstance(v, float) and math.isfinite(v) else v for k, v in figures.items()}
        print(json.dumps({"item": self.item, **rounded}), flush=True)

    def randn(self, *shape: int, requires_grad: bool = False) -> "Tensor":
        import torch

        return torch.randn(*shape, device=self.device, dtype=torch.bfloat16, requires_grad=requires_grad)

    def wait(self) -> None:
        import torch

        if self.is_cuda:
            torch.cuda.synchronize()

    def ms(self, function: Callable[[], Any]) -> float:
        """Return the median; the first two calls set kernels up."""
        for _ in range(2):
            function()
        self.wait()
        return statistics.median(self._events(function) if self.is_cuda else self._clock(function))

    def _events(self, function: Callable[[], Any]) -> list[float]:
        import torch

        pairs = []
        for _ in range(self.sizes.rounds):
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            function()
            pair[1].record()
            pairs.append(pair)
        self.wait()
        return [began.elapsed_time(ended) for began, ended in pairs]

    def _clock(self, function: Callable[[], Any]) -> list[float]:
        times = []
        for _ in range(self.sizes.rounds):
            began = time.perf_counter()
            function()
            times.append((time.perf_counter() - began) * 1e3)
        return times

    def peak_bytes(self, function: Callable[[], Any]) -> int | None:
        """Return what a call needs beside what is there before it; None on a CPU."""
        import torch

        if not self.is_cuda:
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        self.wait()
        return torch.cuda.max_memory_allocated() - before

    @contextmanager
    def reported(self, **what: Any) -> Iterator[None]:
        """One figure that fails is a line that says so, and the next is taken."""
        try:
            yield
        except Exception as error:
            self.emit(**what, error=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")


# --- rates ---------------------------------------------------------------------------------------------------------


def rates(bench: Bench) -> None:
    import torch

    from megakexue.core.attention import choose_backend

    sizes, device = bench.sizes, bench.device
    facts: dict[str, Any] = {"torch": torch.__version__, "small": sizes is SMALL}
    if bench.is_cuda:
        facts |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit,clocks.max.sm,memory.total", "--format=csv"]
        with bench.reported(program="nvidia-smi"):
            facts["gpu"] = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()[-1]
    for name, widths in (("gqa", (sizes.d_head, sizes.d_head)), ("mla", sizes.latent_widths)):
        facts[f"auto_{name}"] = choose_backend("auto", device.type, torch.bfloat16, *widths)
    bench.emit(**facts)
    n, m, f, v = sizes.n_tokens, sizes.d_model, sizes.d_ff, sizes.vocab_size
    square = sizes.square
    for rows, inputs, outputs in ((square, square, square), (n, m, f), (n, f, m), (n, m, m), (512, m, v), (4096, m, v)):
        x, weight = bench.randn(rows, inputs), bench.randn(outputs, inputs)
        ms = bench.ms(partial(torch.nn.functional.linear, x, weight))
        bench.emit(product=[rows, inputs, outputs], ms=ms, tflops=2 * rows * inputs * outputs / ms / 1e9)
    source = bench.randn(2**14 if sizes is SMALL else 2**30)
    target = torch.empty_like(source)
    ms = bench.ms(partial(target.copy_, source))
    bench.emit(copied_bytes=source.nbytes, ms=ms, gb_per_s=2 * source.nbytes / ms / 1e6)


# --- attention -----------------------------------------------------------------------------------------------------


def documents(bench: Bench, is_packed: bool) -> tuple["Tensor", "Tensor | None"]:
    """Positions and boundaries of rows that are one document each, or have documents of random lengths."""
    import torch

    sizes, generator = bench.sizes, torch.Generator().manual_seed(1)
    is_start = torch.zeros(sizes.rows, sizes.seq_len, dtype=torch.bool)
    is_start[:, 0] = True
    if is_packed:
        for row in is_start:
            row[torch.randperm(sizes.seq_len - 1, generator=generator)[: sizes.documents - 1] + 1] = True
    index = torch.arange(sizes.seq_len)
    positions = index - (index * is_start).cummax(1).values
    ends = [*is_start.flatten().nonzero().flatten().tolist(), sizes.n_tokens]
    return positions.to(bench.device), torch.tensor(ends, dtype=torch.int32, device=bench.device) if is_packed else None


def kernels(bench: Bench, is_packed: bool, widths: tuple[int, int]) -> dict[str, Callable[..., "Tensor"] | str]:
    """Return functions of q, k, v, a layout and scale; or why a kernel cannot run here."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    from megakexue.core import attention

    found: dict[str, Callable[..., Tensor] | str] = {}
    if not bench.is_cuda:
        return {"blocked": attention.attend, "sdpa": attention.attend}

    def of_torch(kind: SDPBackend, q: "Tensor", k: "Tensor", v: "Tensor", layout: "Layout", scale: float) -> "Tensor":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(kind):
            options: dict[str, Any] = dict(scale=scale, enable_gqa=q.shape[1] != k.shape[1])
            return scaled_dot_product_attention(q, k, v, is_causal=True, **options).transpose(1, 2)

    for version, kernel in attention.FLASH_ATTN.items():
        if version == 2 and not is_packed:
            continue  # that of torch, below
        name, major = f"flash-attn {version}", torch.cuda.get_device_capability()[0]
        run = partial(attention._flash, version)
        if major not in kernel.capabilities or not kernel.widths(*widths):
            found[name] = "takes no such GPU or widths"
        else:
            found[name] = attention._trial(run, torch.bfloat16, *widths) or run
    if is_packed:
        found["varlen"] = attention._varlen_obstacle(torch.bfloat16, *widths) or attention._varlen
        found |= {"sdpa": attention.attend, "flex": attention.attend}  # the last has a compiler to wait for
    else:
        for kind in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            found[f"sdpa {kind.name}"] = partial(of_torch, kind)
    return found


def attention(bench: Bench) -> None:
    sizes = bench.sizes
    forms = (((sizes.d_head, sizes.d_head), sizes.n_kv_heads), (sizes.latent_widths, sizes.n_heads))
    for widths, n_kv_heads in forms:
        for is_packed in (True, False):
            inputs = [
                bench.randn(sizes.rows, sizes.seq_len, heads, width, requires_grad=True)
                for heads, width in ((sizes.n_heads, widths[0]), (n_kv_heads, widths[0]), (n_kv_heads, widths[1]))
            ]
            for name, kernel in kernels(bench, is_packed, widths).items():
                what = dict(kernel=name, packed=is_packed, widths=widths)
                with bench.reported(**what):
                    if isinstance(kernel, str):
                        bench.emit(**what, skipped=kernel)
                    else:
                        bench.emit(**what, **one_kernel(bench, name, kernel, inputs, is_packed))


def one_kernel(
    bench: Bench, name: str, kernel: Callable[..., "Tensor"], inputs: list["Tensor"], is_packed: bool
) -> dict[str, Any]:
    import torch

    from megakexue.core.attention import Layout

    sizes, (positions, boundaries) = bench.sizes, documents(bench, is_packed)
    # flash's layout has the boundaries that all other kernels read
    backend: Any = name if name in ("blocked", "sdpa", "flex") else "flash"
    layout = Layout(positions, boundaries, backend=backend, dtype=torch.bfloat16)
    d, e = inputs[0].shape[3], inputs[2].shape[3]

    def forward() -> "Tensor":
        return kernel(*inputs, layout, scale=d**-0.5)

    gradient = torch.randn_like(forward())

    def both() -> list["Tensor"]:
        out = forward()
        return [out.detach(), *torch.autograd.grad(out, inputs, gradient)]

    ours = both()
    forward_ms = bench.ms(forward)
    # not by itself, since a compiled backward pass frees what another one would need
    backward_ms = bench.ms(both) - forward_ms
    flop = 2 * sizes.n_heads * (d + e) * float((positions + 1).sum())
    return {
        "forward_ms": forward_ms,
        "backward_ms": backward_ms,
        "forward_tflops": flop / forward_ms / 1e9,
        "backward_tflops": 2.5 * flop / backward_ms / 1e9,  # with the product that it repeats
        "errors": errors(ours, inputs, gradient, positions, boundaries),
    }


def errors(
    ours: list["Tensor"], inputs: list["Tensor"], gradient: "Tensor", positions: "Tensor", boundaries: "Tensor | None"
) -> dict[str, float]:
    """Return the relative errors of the first row's result and gradients against the formula in float32."""
    import torch

    from megakexue.core.attention import Layout, attend

    if boundaries is not None:
        boundaries = boundaries[: int((boundaries <= positions.shape[1]).sum())]
    layout = Layout(positions[:1], boundaries, backend="reference", dtype=torch.float32)
    q, k, v = (x[:1].detach().float().requires_grad_() for x in inputs)
    out = attend(q, k, v, layout, scale=q.shape[3] ** -0.5)
    exact = [out.detach(), *torch.autograd.grad(out, (q, k, v), gradient[:1].float())]
    return {
        name: float(f"{float((mine[:1].float() - right).norm() / right.norm()):.3g}")
        for name, mine, right in zip(("out", "dq", "dk", "dv"), ours, exact)
    }


# --- loss ----------------------------------------------------------------------------------------------------------


def loss(bench: Bench) -> None:
    import torch

    from megakexue.core import loss as module

    sizes = bench.sizes
    hidden = bench.randn(sizes.n_tokens, sizes.d_model, requires_grad=True)
    weight = (bench.randn(sizes.vocab_size, sizes.d_model) / sizes.d_model**0.5).requires_grad_()
    targets = torch.randint(0, sizes.vocab_size, (sizes.n_tokens,), device=bench.device)
    product_flop = 6 * sizes.n_tokens * sizes.d_model * sizes.vocab_size
    for is_compiled in (False, True):
        for chunk in sizes.chunks:
            module.LOSS_CHUNK[bench.device.type] = chunk

            def step(is_compiled: bool = is_compiled) -> "Tensor":
                found = module.cross_entropy(hidden, weight, targets, 1.0, is_compiled=is_compiled)
                torch.autograd.grad(found.objective, (hidden, weight))
                return found.cross_entropy

            what = dict(chunk=chunk, compiled=is_compiled)
            with bench.reported(**what):
                mean = float(step()) / sizes.n_tokens
                ms = bench.ms(step)
                figures = dict(ms=ms, tflops=product_flop / ms / 1e9, peak_bytes=bench.peak_bytes(step), loss=mean)
                bench.emit(**what, **figures, kernels=launches(bench, step))


# --- block ---------------------------------------------------------------------------------------------------------


def launches(bench: Bench, function: Callable[[], Any]) -> int:
    """Return how many kernels a call launches; on a CPU, how many operators of torch it calls."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    kind = DeviceType.CUDA if bench.is_cuda else DeviceType.CPU
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.is_cuda else [])]
    with torch.profiler.profile(activities=activities) as record:
        function()
        bench.wait()
    return sum(e.device_type == kind and not getattr(e, "is_user_annotation", False) for e in record.events() or [])


def saved_bytes(function: Callable[[], Any], parameters: list["Tensor"]) -> int:
    """Return the bytes that a call keeps for its backward pass, each storage once, without parameters."""
    import torch

    found: dict[int, int] = {}
    kept: list[Tensor] = []

    def note(x: "Tensor") -> "Tensor":
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        kept.append(x)  # or another tensor may get its address
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        function()
    own = {p.untyped_storage().data_ptr() for p in parameters}
    return sum(size for address, size in found.items() if address not in own)


def block(bench: Bench) -> None:
    import torch

    from megakexue.core.attention import Layout, choose_backend
    from megakexue.core.decoder import Decoder, initial_weight
    from megakexue.core.resolve import resolve

    sizes = bench.sizes
    config = resolve(
        ModelConfig(
            vocab_size=sizes.vocab_size, d_model=sizes.d_model, n_layers=1, n_heads=sizes.n_heads,
            n_kv_heads=sizes.n_kv_heads, d_ff=sizes.d_ff,
        ),
        "tiger",
        sizes.seq_len,
    )  # fmt: skip
    widths = sizes.d_head, sizes.d_head
    backend, _ = choose_backend("auto", bench.device.type, torch.bfloat16, *widths)
    model = Decoder(config, backend)
    with torch.no_grad():
        for name, parameter in model.blocks.named_parameters():
            parameter.copy_(initial_weight(f"blocks.{name}", config, 0))
    module: Any = model.blocks[0].to(bench.device, torch.bfloat16)
    positions, boundaries = documents(bench, True)
    rotary = model.rotary(positions, sizes.seq_len)
    layout = Layout(positions, boundaries, backend=backend, dtype=torch.bfloat16)
    x = bench.randn(sizes.rows, sizes.seq_len, sizes.d_model, requires_grad=True)
    gradient = torch.randn_like(x)
    leaves = [x, *module.parameters()]
    n_weights = sum(p.numel() for p in module.parameters() if p.dim() > 1)

    def forward() -> "Tensor":
        return module(x, rotary, layout, None)

    def step() -> None:
        torch.autograd.grad(forward(), leaves, gradient)

    for is_compiled in (False, True):
        if is_compiled:
            module.compile_parts()
        with bench.reported(compiled=is_compiled):
            step()
            ms = bench.ms(step)
            bench.emit(
                compiled=is_compiled, backend=backend, ms=ms, kernels=launches(bench, step),
                product_tflops=6 * sizes.n_tokens * n_weights / ms / 1e9,
                saved_bytes_a_token=saved_bytes(forward, leaves[1:]) / sizes.n_tokens,
            )  # fmt: skip


# --- the whole step ------------------------------------------------------------------------------------------------


def step(bench: Bench, *arms: str) -> None:
    """Run step.py, in a process of its own, since it starts DeepSpeed."""
    import torch

    sizes = bench.sizes
    rows = sizes.rows
    if bench.is_cuda and torch.cuda.get_device_properties(0).total_memory < 100e9:
        rows = rows // 2  # both models and their activations do not fit otherwise
    options = {
        "d-model": sizes.d_model, "n-layers": sizes.n_layers, "n-heads": sizes.n_heads, "n-kv-heads": sizes.n_kv_heads,
        "d-ff": sizes.d_ff, "vocab-size": sizes.vocab_size, "seq-len": sizes.seq_len, "rows": rows,
        "documents": sizes.documents, "rounds": sizes.step_rounds,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "step.json")
        command = [sys.executable, str(Path(__file__).with_name("step.py")), "--profile", "--json", str(out)]
        command += [f"--{name}={value}" for name, value in options.items()] + ["--arms", *arms]
        # what it prints goes to the log
        code = subprocess.run(command, stdout=sys.stderr).returncode
        if code:
            sys.exit(code)
        bench.emit(**json.loads(out.read_text()))


def tests(bench: Bench) -> None:
    what = "tests/core/test_attention.py" if bench.sizes is SMALL else "tests"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", what]
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for last in process.stdout:
            print(last, end="", file=sys.stderr, flush=True)
    bench.emit(result=last.strip())
    sys.exit(process.returncode)


ITEMS: dict[str, Callable[[Bench], None]] = {
    "rates": rates,
    "attention": attention,
    "loss": loss,
    "block": block,
    "step": lambda bench: step(bench, "ours-compiled", "transformers-compiled"),
    "eager": lambda bench: step(bench, "ours-eager"),
    "tests": tests,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("item", choices=tuple(ITEMS), help="what to measure")
    parser.add_argument("--small", action="store_true", help="tiny sizes, as without a GPU")
    args = parser.parse_intermixed_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    ITEMS[args.item](Bench(args.item, args.small))


if __name__ == "__main__":
    run_program(main)
