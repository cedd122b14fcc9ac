#!/usr/bin/env python
"""Compare the parts that are ours with the obvious way, on one CPU thread: interleaved rounds, CPU seconds, medians."""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal
from unittest import mock

from megakexue.config import AttentionConfig, LossConfig, MlaConfig, ModelConfig, OptimConfig, as_integer, run_program

EPILOG = """\
example:
  tools/benchmarks/kernels.py --rounds 9
  tools/benchmarks/kernels.py --only "optimizer step"

Each line is the median over the rounds of (ours / other) in CPU seconds of this process, and the range that holds the
middle half of the rounds. Below 1 ours is faster. Rounds are interleaved, so that a busy machine slows both.

An optimizer step is that of one matrix of 20M elements, as DeepSpeed hands it: flat fp32 master and gradient. Tiger's
sums of the weights are in it. The gradient's sums, from which the guard and clipping decide, are not: the engine takes
them for every optimizer, and torch's AdamW would need them too. The compiler runs before the first round; its seconds,
few when its cache has the kernels, are printed by themselves. Muon's is that of a matrix of 768 x 2048, and is all but
Newton-Schulz: the FLOPs of training that matrix on 3,040 tokens, however many a step has.
"""
MAX_TIGER = 0.85
"""Of the time of torch's fused AdamW, which moves 28 bytes an element; Tiger moves 20."""


class Report:
    """Measures pairs of functions and prints a line for each, but for those that --only excludes."""

    def __init__(self, rounds: int, only: str) -> None:
        self.rounds, self.only, self.is_empty = rounds, only, True

    def wants(self, what: str) -> bool:
        return self.only in what

    def compare(self, what: str, ours: Callable[[], None], other: Callable[[], None]) -> float | None:
        """Print a line and return the ratio; None where --only excludes it."""
        if not self.wants(what):
            return None
        middle, low, high, own_ms, other_ms = compare(ours, other, self.rounds)
        self.is_empty = False
        print(f"{what:<74} {middle:5.2f} ({low:.2f} .. {high:.2f})   {own_ms:7.1f} ms, {other_ms:7.1f} ms", flush=True)
        return middle


def compare(
    ours: Callable[[], None], other: Callable[[], None], rounds: int
) -> tuple[float, float, float, float, float]:
    """Return (median ratio, its lower and upper quartile, median ms of ours, of the other)."""
    times: dict[Callable[[], None], list[float]] = {ours: [], other: []}
    ours()  # the first call sets kernels up
    other()
    for i in range(rounds):
        for arm in (ours, other) if i % 2 else (other, ours):
            began = time.process_time()
            arm()
            times[arm].append(time.process_time() - began)
    ratios = [a / b for a, b in zip(times[ours], times[other])]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high, statistics.median(times[ours]) * 1e3, statistics.median(times[other]) * 1e3


def attention(report: Report) -> None:
    import torch

    from megakexue.core.attention import Backend, Layout, attend

    b, t, h, g, d = 4, 512, 6, 6, 64
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (torch.randn(b, t, n, d, dtype=dtype, requires_grad=True) for n in (h, g, g))
        for n_documents in (1, 4):
            length = t // n_documents
            positions = torch.arange(t).remainder(length).expand(b, t)
            cu_seqlens = None if n_documents == 1 else torch.arange(0, b * t + 1, length, dtype=torch.int32)

            def run(backend: Backend, inputs: tuple = (q, k, v, positions, cu_seqlens)) -> None:
                q, k, v, *documents = inputs
                layout = Layout(*documents, backend=backend, dtype=q.dtype)
                attend(q, k, v, layout, scale=d**-0.5).sum().backward()

            name = str(dtype).removeprefix("torch.")
            report.compare(
                f"attention {name} b{b} h{h} t{t} d{d}, {n_documents} documents a row: blocked / SDPA",
                partial(run, "blocked"),
                partial(run, "sdpa"),
            )


def loss(report: Report) -> None:
    import torch

    from megakexue.core.loss import cross_entropy, plain_cross_entropy

    for dtype in (torch.float32, torch.bfloat16):
        hidden = torch.randn(2048, 384, dtype=dtype, requires_grad=True)
        weight = (torch.randn(32000, 384) / 384**0.5).to(dtype).requires_grad_()
        targets = torch.randint(0, 32000, (2048,))

        def chunked(inputs: tuple = (hidden, weight, targets, 1.0)) -> None:
            cross_entropy(*inputs).objective.backward()

        def plain(inputs: tuple = (hidden, weight, targets, 1.0)) -> None:
            plain_cross_entropy(*inputs).sum().backward()

        name = str(dtype).removeprefix("torch.")
        report.compare(f"cross-entropy {name} n2048 m384 v32000: chunked / all logits at once", chunked, plain)


KINDS: dict[str, dict[str, Any]] = {
    "GQA": dict(n_kv_heads=3),
    "MLA": dict(mla=MlaConfig(d_latent=192, d_query_latent=256, d_nope=48, d_rope=16, d_value=64)),
}


def whole_step(kind: str, scale: Literal["log_n", "constant"] = "log_n") -> Callable[..., None]:
    """Make a small model; return its forward and backward pass, which takes the config of the loss."""
    import torch

    from megakexue.core.decoder import Decoder, initial_weight
    from megakexue.core.loss import PLAIN, unit_rows
    from megakexue.core.resolve import resolve

    sizes: dict[str, Any] = dict(vocab_size=8192, d_model=384, n_layers=4, n_heads=6, d_ff=1024)
    attention = AttentionConfig(scale=scale)
    config = resolve(ModelConfig(**sizes, **KINDS[kind], attention=attention), "adamw", 512)
    model = Decoder(config, "blocked")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_weight(name, config, 0))
    rows = unit_rows(model.head.weight)
    tokens, positions = torch.randint(0, 8192, (2, 512)), torch.arange(512).expand(2, -1)

    def step(losses: LossConfig = PLAIN) -> None:
        emo_rows = rows if losses.emo else None
        model(tokens, positions, targets=tokens, loss=losses, emo_rows=emo_rows).objective.backward()

    return step


def query_factor(report: Report) -> None:
    for kind in KINDS:
        what = f"whole model fp32, {kind}, 1024 tokens: log n / constant scale"
        report.compare(what, whole_step(kind), whole_step(kind, "constant"))


def loss_terms(report: Report) -> None:
    step = whole_step("MLA")
    for what, losses in (("z-loss", LossConfig(z_loss=1e-4)), ("EMO", LossConfig(emo=True))):
        report.compare(f"whole model fp32, MLA: with {what} / without", partial(step, losses), step)


def optimizer_step(report: Report) -> None:
    import torch

    from megakexue.core import rules
    from megakexue.core.muon import Matrices
    from megakexue.core.optim import Optimizer
    from megakexue.core.resolve import resolve_optim
    from megakexue.core.segments import Segment

    factor = torch.ones((), dtype=torch.float64)
    names: tuple[Literal["tiger", "lion", "adamw", "muon"], ...] = ("tiger", "tiger", "lion", "adamw", "muon")
    for i, name in enumerate(names):
        config = resolve_optim(OptimConfig(name=name), tie_embeddings=False)
        shape = (768, 2048) if name == "muon" else (4000, 5000)
        segment = Segment.whole("w", "matrix", shape)
        other_weight, gradient = torch.nn.Parameter(torch.randn(segment.numel)), torch.randn(segment.numel)
        other_weight.grad = gradient
        fused = torch.optim.AdamW([other_weight], fused=True)
        # the second time in chunks, as without a compiler
        with mock.patch.object(rules, "has_compiler", lambda can=i != 1: can):
            matrices = Matrices.of_one_rank({"w": shape}) if name == "muon" else None
            optimizer = Optimizer(config, [segment], [torch.randn(segment.numel)], ["w"], [], None, matrices)
        kind = "torch's kernel" if name == "adamw" else optimizer.kernel_reason.split(":")[0]
        size = "768 x 2048" if name == "muon" else "20M"
        what = f"optimizer step, {size} fp32: {name}, {kind} / torch fused AdamW"
        if not report.wants(what):
            continue
        sums = optimizer.gradient_sums([gradient])

        def step(optimizer: Optimizer = optimizer, sums: Any = sums, gradient: Any = gradient) -> None:
            optimizer.step([gradient], optimizer.weight_sums(), sums, lr=1e-3, factor=factor)

        began = time.perf_counter()
        step()
        seconds = time.perf_counter() - began
        ratio = report.compare(what, step, partial(fused.step))
        if kind == "compiled":
            print(f"  its first step, with the compiler: {seconds:.1f} s")
        if name == "tiger" and kind == "compiled" and ratio is not None:
            print(f"  wanted: at most {MAX_TIGER}, which is {'met' if ratio <= MAX_TIGER else 'MISSED'}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=as_integer, default=9, help="at least 2 (default: %(default)s)")
    parser.add_argument("--only", metavar="TEXT", default="", help="compare only where the line contains TEXT")
    arguments = parser.parse_intermixed_args()
    if arguments.rounds < 2:
        parser.error(f"--rounds {arguments.rounds} must be at least 2")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, load average {os.getloadavg()[0]:.1f}, {arguments.rounds} rounds")
    report = Report(arguments.rounds, arguments.only)
    for measure in (attention, loss, query_factor, loss_terms, optimizer_step):
        measure(report)
    if report.is_empty:
        parser.error(f"--only {arguments.only!r} is in no line")


if __name__ == "__main__":
    run_program(main)
